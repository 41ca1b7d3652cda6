"""The shape of the project: who imports whom, what lies where, and what a wheel holds."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HF_KERNELS = ROOT / ".venv" / "hf-kernels"
FOLDERS = ("kernels", "recipes", "bench", "csrc")

# From the bottom to the top: module of s1fast -> the others that it may import. Each names only
# modules above its own line, so nothing can go round in circles. A new module gets a line here.
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),
    "kernels": {"kernels"},
    "errors": set(),
    "flags": set(),
    "ranks": {"errors"},
    "files": {"errors", "ranks"},
    "slices": set(),
    "tensor_files": {"errors"},
    "hub": {"errors"},
    "config": {"errors", "files"},
    "markers": {"errors"},
    "chat": {"errors", "files", "markers"},
    "snapshot": {"errors", "files", "ranks", "slices", "tensor_files"},
    "snapshot_writer": {"errors", "files", "ranks", "slices", "snapshot", "tensor_files"},
    "automaton": {"errors", "kernels"},
    "budget": {"automaton", "chat", "errors"},
    "build": {"errors", "files"},
    "matmul": {"build", "errors", "kernels"},
    "packing": {"chat"},
    "rows": {"chat", "config", "errors", "files", "hub"},
    "model": {"errors", "kernels", "slices"},
    "exposed": set(),
    "heartbeat": set(),
    "ulysses": {"exposed", "kernels"},
    "parallel": {"errors", "exposed", "heartbeat", "model", "ranks", "ulysses"},
    "fake_ranks": {"errors", "model", "parallel", "ranks", "ulysses"},
    "published": {"model"},
    "rates": {"errors", "files"},
    "selftest": {"parallel", "rates"},
    "optimizer": {"config", "kernels"},
    "metrics": {"errors", "files", "model"},
    "recompute": {"kernels", "metrics", "model"},
    "balance": {"config", "metrics", "model", "packing"},
    "checkpoint": {"errors", "files", "model", "ranks", "slices", "tensor_files"},
    "planner": {"balance", "config", "metrics", "model", "packing", "parallel", "rates"}
    | {"recompute"},
    "plan_report": {"metrics", "planner", "rates"},
    "plan": {"chat", "checkpoint", "config", "errors", "fake_ranks", "files", "kernels"}
    | {"metrics", "model", "packing"}
    | {"plan_report", "planner", "published", "rates", "recompute", "rows"},
    "kv_cache": {"kernels", "model"},
    "step": {"balance", "chat", "config", "errors", "kernels", "metrics", "model", "optimizer"}
    | {"packing", "parallel", "recompute", "slices", "snapshot", "ulysses"},
    "gauges": {"exposed", "parallel", "step"},
    "profile": {"config", "errors", "files", "metrics", "parallel"},
    "trainer": {"balance", "chat", "checkpoint", "config", "errors", "exposed", "files", "gauges"}
    | {"hub", "metrics", "model", "optimizer", "packing", "parallel", "profile", "ranks", "rows"}
    | {"selftest", "slices", "snapshot", "snapshot_writer", "step"},
    "tensor_parallel": {"checkpoint", "errors", "model"},
    "request": {"automaton", "budget", "chat", "errors"},
    "row": {"automaton", "chat", "request"},
    "scheduler": {"kv_cache", "row"},
    "tree": {"automaton", "request", "row"},
    "loop": {"automaton", "chat", "kernels", "kv_cache", "model", "request", "row", "scheduler"}
    | {"tensor_parallel", "tree"},
    "graphs": {"errors"},
    "decode_step": {"kernels", "kv_cache", "matmul", "model", "tensor_parallel"},
    "device": {"chat", "decode_step", "graphs", "kernels", "kv_cache", "matmul", "model", "row"}
    | {"tensor_parallel"},
    "captured": {"decode_step", "device", "kv_cache", "loop", "matmul", "request", "row"}
    | {"scheduler"},
    "handle": {"request"},
    "decoder": {"budget", "captured", "chat", "checkpoint", "errors", "graphs", "handle"}
    | {"hub", "kv_cache", "loop", "markers", "matmul", "model", "request", "row"}
    | {"tensor_parallel", "tree"},
    "console": {"decoder", "request"},
    "demo_tasks": {"files"},
    "demo": {
        "budget",
        "config",
        "console",
        "decoder",
        "demo_tasks",
        "errors",
        "metrics",
        "plan",
        "trainer",
    },
    "grading": {"errors"},
    "recipes": {"budget", "chat", "decoder", "errors", "files", "grading", "hub", "recipes"}
    | {"rows"},
    "bench": {"automaton", "balance", "bench", "captured", "chat", "config", "decoder", "device"}
    | {"errors", "files", "kernels", "kv_cache", "matmul", "metrics", "model", "packing"}
    | {"parallel", "plan", "planner", "published", "rates", "request", "row", "step"}
    | {"checkpoint", "graphs", "tensor_parallel", "tree"},
    "tasks": {"errors", "files", "hub", "rows"},
    "scaling": set(),
    "answers": {"budget", "chat", "decoder", "errors", "hub", "recipes", "request", "tasks"},
    "curves": {"errors", "files", "scaling"},
    "results": {"answers", "curves", "errors", "files", "grading", "recipes", "scaling", "tasks"},
    "evaluate": {"answers", "decoder", "errors", "files", "metrics", "ranks", "recipes", "results"}
    | {"tasks"},
    "protocol": {"budget", "chat", "errors", "flags", "request"},
    "refusals": {"chat", "errors", "protocol"},
    "replies": {"budget", "protocol", "request"},
    "gate": {"refusals", "replies"},
    "server_metrics": {"decoder", "replies", "request"},
    "service": {"decoder", "errors", "flags", "gate", "handle", "protocol", "refusals", "replies"}
    | {"request", "server_metrics"},
    "server": {"decoder", "errors", "files", "gate", "protocol", "refusals", "request", "service"},
    "cli": {"__init__", "bench", "budget", "config", "console", "curves", "decoder", "demo"}
    | {"build", "errors", "evaluate", "flags", "plan", "recipes", "server", "trainer"},
    "__main__": {"cli"},
}

# os.walk does not follow the links in s1fast, so every file is met once.
SOURCES = sorted(
    Path(folder) / name
    for top in ("s1fast", *FOLDERS)
    for folder, _, names in os.walk(ROOT / top)
    for name in names
    if name.endswith(".py")
)
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> set[str]:
    """Dotted names that the file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{relative(path)} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(path: Path) -> str:
    """The line of the table that a file belongs to."""
    top = path.relative_to(ROOT).parts[0]
    return path.stem if top == "s1fast" else top


def rooms_imported(path: Path) -> set[str]:
    names = {name.split(".")[1] for name in imports(path) if name.startswith("s1fast.")}
    names |= {"__init__" for name in imports(path) if name == "s1fast"}
    return {name if name in MAY_IMPORT else "__init__" for name in names}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_point_down(path: Path) -> None:
    assert room(path) in MAY_IMPORT, f"{relative(path)} has no line in the table"
    extra = rooms_imported(path) - MAY_IMPORT[room(path)]
    assert not extra, f"{relative(path)} imports {extra}"


def test_the_table_is_a_ladder() -> None:
    below: set[str] = set()
    for name, allowed in MAY_IMPORT.items():
        assert allowed - {name} <= below, f"{name} may import {allowed - below}, named after it"
        below.add(name)
    assert below == {room(path) for path in SOURCES}, "the table names what is not there"


def test_imports_are_found(tmp_path: Path) -> None:
    """The checks above would notice an import however it is written and wherever it stands."""
    path = tmp_path / "x.py"
    path.write_text(
        "import s1fast.demo as d\nimport os\n"
        "def f():\n    from s1fast.trainer import train\n    from s1fast import cli, Engine\n"
    )
    assert rooms_imported(path) == {"demo", "trainer", "cli", "__init__"}


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=relative)
def test_kernels_import_torch_and_triton_only(path: Path) -> None:
    others = (name for name in imports(path) if not name.startswith("s1fast.kernels."))
    tops = {name.split(".")[0] for name in others}
    assert tops <= {"torch", "triton"} | sys.stdlib_module_names


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=relative)
def test_folders_are_reached_through_s1fast(path: Path) -> None:
    """`import kernels` would find Hugging Face's package, or register every op a second time."""
    assert not {name.split(".")[0] for name in imports(path)} & set(FOLDERS)


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=relative)
def test_files_stay_short(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= (800 if path in TESTS else 500)


def test_folders_have_no_init() -> None:
    """With one, ./kernels would shadow Hugging Face's whenever the checkout is on sys.path."""
    found = [name for name in (*FOLDERS, "tests") if list((ROOT / name).rglob("__init__.py"))]
    assert not found


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_are_linked_into_the_package(name: str) -> None:
    link = ROOT / "s1fast" / name
    assert link.is_symlink(), f"{relative(link)} is no link"
    assert os.readlink(link) == f"../{name}"
    assert link.is_dir()


# -- in fresh interpreters ----------------------------------------------------------------------


def python(code: str, cwd: Path = ROOT, path: Path | None = None) -> str:
    """Runs code in a new interpreter and returns what it prints."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_public_names_resolve_lazily() -> None:
    code = """
import sys, s1fast
assert not {"torch", "numpy", "transformers"} & set(sys.modules), "s1fast is not light to import"
for name in s1fast.__all__:
    assert getattr(s1fast, name) is not None
    exec(f"from s1fast import {name}")
try:
    s1fast.no_such_name
except AttributeError as error:
    print(len(s1fast.__all__), "torch" in sys.modules, error)
"""
    count, torch_loaded, message = python(code).split(" ", 2)
    assert int(count) >= 10 and torch_loaded == "True"
    assert message == "module 's1fast' has no attribute 'no_such_name'"


MODEL_AND_KERNEL = """
import transformers.models.qwen2.modeling_qwen2
import s1fast.kernels.linear_cross_entropy as ours
import kernels
print(getattr(kernels, "__file__", None), hasattr(kernels, "get_kernel"), ours.__file__)
"""


def test_without_hugging_faces_kernels() -> None:
    """From the root, where ./kernels is on sys.path: only a namespace, which nothing mistakes."""
    if list(importlib.metadata.distributions(name="kernels")):
        pytest.skip("Hugging Face's kernels is installed here; unproven: that it is not needed")
    file, theirs, ours = python(MODEL_AND_KERNEL).split(" ")
    assert (file, theirs) == ("None", "False")
    assert ours == str(ROOT / "s1fast" / "kernels" / "linear_cross_entropy.py")


def test_with_hugging_faces_kernels() -> None:
    """From the root too: theirs is a regular package and wins, ours is still found."""
    if not HF_KERNELS.is_dir():
        pytest.skip(f"no {relative(HF_KERNELS)} (make setup); unproven: life beside their kernels")
    file, theirs, ours = python(MODEL_AND_KERNEL, path=HF_KERNELS).split(" ")
    assert Path(file).is_relative_to(HF_KERNELS) and theirs == "True"
    assert ours == str(ROOT / "s1fast" / "kernels" / "linear_cross_entropy.py")


@pytest.mark.slow
def test_wheel(tmp_path: Path) -> None:
    """Built from a copy, it holds the linked folders' files as s1fast's, and works alone."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("no setuptools (pip install setuptools); unproven: that a wheel builds")
    left_out = shutil.ignore_patterns(".*", "out", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "source", symlinks=True, ignore=left_out)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "-w", str(tmp_path / "dist")],
        cwd=tmp_path / "source",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    tops = {name.split("/")[0] for name in names}
    assert "s1fast" in tops and all(t == "s1fast" or t.endswith(".dist-info") for t in tops)
    data = [p for folder in FOLDERS for p in (ROOT / folder).glob("*.*") if p.suffix != ".pyc"]
    packed = [p for p in data if p.suffix in (".py", ".toml", ".md", ".cu", ".cuh", ".cpp", ".h")]
    assert (ROOT / "kernels" / "linear_cross_entropy.py") in packed
    for path in [*packed, *SOURCES]:
        name = relative(path) if room(path) not in FOLDERS else f"s1fast/{relative(path)}"
        installed = tmp_path / "installed" / name
        assert installed.read_bytes() == path.read_bytes(), f"{name} is not in the wheel"
    assert {"s1fast/py.typed", "s1fast/page/index.html", "s1fast/page/page.js"} <= names
    assert {f"s1fast/{relative(path)}" for path in ROOT.glob("bench/results/*.json")} <= names
    code = "import s1fast, s1fast.kernels.rope as r; print(s1fast.__file__, r.__file__)"
    found = python(code, cwd=tmp_path, path=tmp_path / "installed").split()
    assert all(Path(file).is_relative_to(tmp_path / "installed") for file in found)
