"""Runs that are killed, damaged or changed, and resumed: the same bits, or a clear refusal."""

from __future__ import annotations

import ast
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from s1fast import cli, snapshot
from s1fast.packing import PackedBatch, pack_batch

ROOT = Path(__file__).resolve().parent.parent
STEPS, EVERY, KEEP = 20, 2, 2
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

# Runs the command line in a process that dies by SIGKILL at the n-th call of a function, before
# the call does anything.
DOOMED = """
import importlib, json, os, signal, sys
points = json.loads(sys.argv.pop(1))
for target, nth in points:
    module, *path, name = target.split(".")
    owner = importlib.import_module("s1fast." + module)
    for part in path:
        owner = getattr(owner, part)
    def wrapper(*args, real=getattr(owner, name), left=[nth], **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(owner, name, wrapper)
from s1fast.cli import main
main()
"""


@dataclass(frozen=True)
class Setup:
    """A recipe, and the run of it that nobody disturbed."""

    recipe: Path
    rows: Path
    whole: Path


@pytest.fixture(scope="module")
def setup(
    make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Setup]:
    folder = tmp_path_factory.mktemp("resume")
    draw = random.Random(0)
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps(
                {
                    "text": f"<|im_start|>user\nthe sum of {i} and {i}?<|im_end|>\n"
                    f"<|im_start|>assistant\n{'think ' * draw.randrange(30)}{2 * i}<|im_end|>\n"
                }
            )
            + "\n"
            for i in range(14)
        )
    )
    recipe = folder / "recipe.toml"
    recipe.write_text(
        f'model = "{make_model("qwen2", tie_word_embeddings=True)}"\n'
        f'output = "{folder / "whole"}"\n'
        'epochs = 5\nbatch_size = 4\nmicrobatch_tokens = 100\ndevice = "cpu"\n'
        f'[data]\npath = "{rows}"\n'
        "[optim]\nlr = 1e-3\n"
        f"[checkpoint]\nevery = {EVERY}\nkeep = {KEEP}\n"
        "[log]\ntensorboard = false\n"
    )
    done = s1fast("train", str(recipe))
    assert done.returncode == 0, done.stderr
    yield Setup(recipe, rows, folder / "whole")


def s1fast(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "s1fast", *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def resume(setup: Setup, output: Path) -> list[str]:
    return ["train", str(setup.recipe), "--output", str(output), "--checkpoint.resume"]


Command = Callable[[list[str]], subprocess.CompletedProcess[str]]


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """The same in this process, which spares it the imports."""

    def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["s1fast", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes of their own: bits depend on it
    yield run
    torch.set_num_threads(threads)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The message of a command that ended with exit code 2 and one line."""
    assert done.returncode == 2
    assert done.stderr.startswith("s1fast: error: ") and done.stderr.count("\n") == 1
    return done.stderr


@dataclass(frozen=True)
class Outcome:
    """All that a run must reproduce to the bit."""

    state: dict[str, Tensor]
    weights: dict[str, Tensor]
    metrics: list[dict[str, float]]
    files: dict[str, bytes]


TIMING = {"step_s", "tokens_per_s", "tflops", "mfu", "eta_s", "dollars"}


def outcome(run: Path) -> Outcome:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return Outcome(
        state=load_file(run / "snapshots" / f"step-{STEPS:06}" / "rank-00000.safetensors"),
        weights=load_file(run / "hf" / "model.safetensors"),
        metrics=[{k: v for k, v in line.items() if k not in TIMING} for line in lines],
        files={path.name: path.read_bytes() for path in (run / "hf").iterdir()},
    )


def assert_same_outcome(run: Path, whole: Path, what: str) -> None:
    found, wanted = outcome(run), outcome(whole)
    for a, b in ((found.state, wanted.state), (found.weights, wanted.weights)):
        assert a.keys() == b.keys(), what
        for name, x in b.items():
            assert torch.equal(a[name].view(torch.uint8), x.view(torch.uint8)), f"{what}: {name}"
    assert found.metrics == wanted.metrics, what
    assert found.files == wanted.files, what
    left = [path for path in run.rglob("*") if path.name.endswith(".tmp")]
    assert not left, what


def test_the_undisturbed_run(setup: Setup) -> None:
    """It trained: what the others are compared with is no standstill."""
    done = outcome(setup.whole)
    assert [line["step"] for line in done.metrics] == list(range(1, STEPS + 1))
    assert done.metrics[-1]["loss"] < 0.8 * done.metrics[0]["loss"]
    assert done.state["exp_avg/layers.0.qkv_weight"].abs().max() > 0
    assert {x.dtype for x in done.state.values()} == {torch.float32}
    assert {x.dtype for x in done.weights.values()} == {torch.bfloat16}
    kinds = {name.split("/")[0] for name in done.state}
    assert kinds == {"param", "exp_avg", "exp_avg_sq"} and len(done.state) % 3 == 0
    # Only the newest are kept, and a second start of a finished run changes nothing.
    kept = sorted(path.name for path in (setup.whole / "snapshots").iterdir())
    assert kept == [f"step-{STEPS - EVERY:06}", f"step-{STEPS:06}"]


# -- killed --------------------------------------------------------------------------------------

Kill = Callable[[Setup, Path], None]


def when(ready: Callable[[Path], bool]) -> Kill:
    """Kills the command from outside as soon as the run's folder looks so."""

    def kill(setup: Setup, output: Path) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "s1fast", *resume(setup, output)],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        give_up = time.monotonic() + 300
        while not ready(output) and process.poll() is None and time.monotonic() < give_up:
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"

    return kill


def at(*points: tuple[str, int]) -> Kill:
    """The command kills itself at the first of the named calls."""

    def kill(setup: Setup, output: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-c", DOOMED, json.dumps(points), *resume(setup, output)],
            cwd=ROOT,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == -signal.SIGKILL, f"{points} never happened: {done.stderr}"

    return kill


def steps_logged(count: int) -> Kill:
    def ready(output: Path) -> bool:
        try:
            return (output / "metrics.jsonl").read_bytes().count(b"\n") >= count
        except FileNotFoundError:
            return False

    return when(ready)


def writing_a_snapshot(output: Path) -> bool:
    names = [path.name for path in (output / "snapshots").glob("*step-*")]
    return any(n.endswith(".tmp") for n in names) and any(n.startswith("step-") for n in names)


def tear_metrics(setup: Setup, output: Path) -> None:
    """What a crash of the machine may leave of the last line."""
    path = output / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])


KILLED: dict[str, list[Kill]] = {
    "at its start, and at its end": [
        at(("files.os.fsync", 1)),  # config.toml is not in place yet
        at(("checkpoint.write_tensors", 1)),  # the export has begun
    ],
    "around snapshots, and a line torn": [
        at(("snapshot_writer.write_atomic", 4)),  # the second lacks only its manifest
        tear_metrics,
        # What was left of the second goes first. The third is in place, its steps must be logged.
        at(("snapshot_writer.shutil.rmtree", 2)),
    ],
}

MORE: dict[str, list[Kill]] = {
    # As test_resume_ranks.py's random deaths, but from outside.
    "between two steps": [steps_logged(7)],
    "while a snapshot is written": [when(writing_a_snapshot)],
    # Every file and folder is flushed before it is renamed: a sweep over the whole run.
    **{f"at flush {n}": [at(("files.os.fsync", n))] for n in (2, 3, 4, 9, 17, 30, 46, 61)},
    "before the last old snapshot goes": [at(("snapshot_writer.shutil.rmtree", 8))],
    "before the plot": [at(("trainer.plot_loss", 1))],
    "after two steps, then five": [steps_logged(2), steps_logged(7)],
    "again and again": [at(("trainer.Trainer.step", 4)) for _ in range(5)],
}


@pytest.mark.parametrize(
    "cases",
    [pytest.param(KILLED, id="two"), pytest.param(MORE, id="fourteen", marks=pytest.mark.slow)],
)
def test_a_killed_run_ends_as_if_it_had_not_been(
    cases: dict[str, list[Kill]], setup: Setup, tmp_path: Path
) -> None:
    """kill -9, resumed: the same weights, moments and losses to the bit, each step logged once."""

    def survive(name: str) -> subprocess.CompletedProcess[str]:
        for kill in cases[name]:
            kill(setup, tmp_path / name)
        return s1fast(*resume(setup, tmp_path / name))

    with ThreadPoolExecutor(2) as pool:
        for name, done in zip(cases, pool.map(survive, cases), strict=True):
            assert done.returncode == 0, f"{name}: {done.stderr}"
            assert_same_outcome(tmp_path / name, setup.whole, name)


# -- damaged -------------------------------------------------------------------------------------


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


class Bomb:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


TENSORS = "rank-00000.safetensors"

DAMAGES: dict[str, Callable[[Path], object]] = {
    "tensors cut": lambda s: os.truncate(s / TENSORS, 5000),
    "tensors gone": lambda s: (s / TENSORS).unlink(),
    "tensors empty": lambda s: (s / TENSORS).write_bytes(b""),
    "one bit of a weight": lambda s: flip(s / TENSORS, -1),
    "one bit of the header": lambda s: flip(s / TENSORS, 20),
    "tensors are a pickle": lambda s: (s / TENSORS).write_bytes(pickle.dumps(Bomb(s / "boom"))),
    "manifest cut": lambda s: os.truncate(s / "manifest.json", 300),
    "manifest gone": lambda s: (s / "manifest.json").unlink(),
    "manifest no object": lambda s: (s / "manifest.json").write_text("[]"),
    "manifest empty": lambda s: (s / "manifest.json").write_text("{}"),
    "manifest a pickle": lambda s: (s / "manifest.json").write_bytes(
        pickle.dumps(Bomb(s / "boom"))
    ),
}


@pytest.fixture
def two_snapshots(setup: Setup, tmp_path: Path) -> Path:
    """A copy of the two that the undisturbed run kept."""
    shutil.copytree(setup.whole / "snapshots", tmp_path / "snapshots")
    return tmp_path / "snapshots"


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_named_and_set_aside(name: str, two_snapshots: Path) -> None:
    old, new = sorted(two_snapshots.iterdir())
    DAMAGES[name](new)
    names = {path.name for path in new.iterdir()}
    kept, warnings = snapshot.newest(two_snapshots, repair=False)
    assert kept is not None and kept.folder == old and len(warnings) == 1
    assert sorted(two_snapshots.iterdir()) == [old, new]  # looking changes nothing
    found, warnings = snapshot.newest(two_snapshots, repair=True)
    assert found is not None and found.folder == old and found.step == STEPS - EVERY
    assert len(warnings) == 1
    assert str(new) in warnings[0] and f"set aside as {new.name}.damaged" in warnings[0]
    aside = two_snapshots / f"{new.name}.damaged"
    assert sorted(two_snapshots.iterdir()) == [old, aside]
    assert {path.name for path in aside.iterdir()} == names  # nothing was unpickled
    assert snapshot.newest(two_snapshots, repair=True) == (found, [])


def test_no_bit_of_the_manifest_goes_unnoticed(two_snapshots: Path) -> None:
    """Step, shapes, names, checksums: a change of any is found, wherever it is."""
    path = two_snapshots / f"step-{STEPS:06}" / "manifest.json"
    whole = path.read_bytes()
    for position in random.Random(0).sample(range(len(whole)), 60):
        flip(path, position)
        found, _ = snapshot.newest(two_snapshots, repair=False)
        assert found is not None and found.step == STEPS - EVERY, position
        path.write_bytes(whole)
    found, warnings = snapshot.newest(two_snapshots, repair=False)
    assert found is not None and found.step == STEPS and not warnings


def test_a_damaged_snapshot_costs_only_its_steps(
    setup: Setup, tmp_path: Path, command: Command
) -> None:
    """Warned of and set aside; the run goes on from the one before and ends in the same bits."""
    run = tmp_path / "run"
    shutil.copytree(setup.whole, run)
    shutil.rmtree(run / "hf")
    flip(run / "snapshots" / f"step-{STEPS:06}" / TENSORS, -1)
    done = command(resume(setup, run))
    assert done.returncode == 0, done.stderr
    assert f"warning: {run}/snapshots/step-{STEPS:06}" in done.stdout
    assert f"resuming after step {STEPS - EVERY}" in done.stdout
    assert_same_outcome(run, setup.whole, "damaged")


def test_a_run_that_is_done_is_not_repeated(
    setup: Setup, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it has kept no snapshot to go on from."""
    run = tmp_path / "run"
    shutil.copytree(setup.whole, run)
    shutil.rmtree(run / "snapshots")
    monkeypatch.delattr("s1fast.step.Trainer.step")
    done = command([*resume(setup, run), "--checkpoint.every", "0"])
    assert done.returncode == 0, done.stderr
    assert (run / "metrics.jsonl").read_bytes() == (setup.whole / "metrics.jsonl").read_bytes()


def test_when_all_are_damaged_the_run_starts_anew(
    setup: Setup, tmp_path: Path, command: Command
) -> None:
    run = tmp_path / "run"
    shutil.copytree(setup.whole, run)
    shutil.rmtree(run / "hf")
    for folder in (run / "snapshots").iterdir():
        flip(folder / TENSORS, -1)
    done = command(resume(setup, run))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("warning: ") == 2 and "resuming" not in done.stdout
    assert_same_outcome(run, setup.whole, "all damaged")


def test_a_diverged_run_keeps_its_last_good_snapshot(
    setup: Setup,
    tmp_path: Path,
    command: Command,
) -> None:
    """The rate is 0 in step 1 and absurd in step 2, so the loss of step 3 is none."""
    arguments = ["train", str(setup.recipe), "--output", str(tmp_path / "run")]
    error = refusal(command([*arguments, "--optim.lr", "1e30", "--checkpoint.every", "1"]))
    assert "step 3: loss " in error and "optim.lr" in error
    found, _ = snapshot.newest(tmp_path / "run" / "snapshots", repair=False)
    assert found is not None and found.step == 2
    assert all(x.isfinite().all() for x in load_file(found.folder / TENSORS).values())
    assert not (tmp_path / "run" / "hf").exists()


# -- changed -------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(
    "change",
    [
        "--optim.lr=2e-3",
        "--optim.betas=0.9 0.99",
        "--optim.moments=bfloat16",
        "--optim.warmup-ratio=0.1",
        "--batch-size=5",
        "--microbatch-tokens=99",
        "--epochs=6",
        "--max-steps=7",
        "--seed=1",
        "--data.loss-weight=token",
        "--checkpoint.export-dtype=float32",
    ],
)
def test_a_changed_recipe_is_another_run(
    change: str,
    setup: Setup,
    command: Command,
) -> None:
    """The message names the field and both values; nothing is touched."""
    flag, value = change.split("=")
    before = contents(setup.whole)
    error = refusal(
        command(["train", str(setup.recipe), "--checkpoint.resume", flag, *value.split()])
    )
    field = flag.removeprefix("--").replace("-", "_")
    assert f"{field}: " in error and ", was " in error
    assert str(setup.whole) in error
    assert contents(setup.whole) == before


def test_changed_data_is_another_run(setup: Setup, command: Command) -> None:
    """One digit of one row; and a row more, which also changes the schedule."""
    rows, before = setup.rows.read_text(), contents(setup.whole)
    arguments = ["train", str(setup.recipe), "--checkpoint.resume"]
    try:
        for changed in (rows.replace("sum of 7", "sum of 8"), rows + rows.splitlines()[0] + "\n"):
            assert changed != rows
            setup.rows.write_text(changed)
            error = refusal(command(arguments))
            assert "data_sha256" in error and f"step-{STEPS:06}" in error
            assert contents(setup.whole) == before
    finally:
        setup.rows.write_text(rows)


def test_a_run_is_not_overwritten(setup: Setup, command: Command) -> None:
    before = contents(setup.whole)
    error = refusal(command(["train", str(setup.recipe)]))
    assert "--checkpoint.resume" in error and str(setup.whole) in error
    assert contents(setup.whole) == before


def test_what_may_change_does_not_matter(setup: Setup, tmp_path: Path, command: Command) -> None:
    """Another number of kept snapshots and other logging, where the run goes on."""
    run = tmp_path / "run"
    shutil.copytree(setup.whole, run)
    shutil.rmtree(run / "hf")
    shutil.rmtree(run / "snapshots" / f"step-{STEPS:06}")
    other = ["--checkpoint.every", "1", "--checkpoint.keep", "3", "--log.every", "2"]
    done = command([*resume(setup, run), *other])
    assert done.returncode == 0, done.stderr
    kept = sorted(path.name for path in (run / "snapshots").iterdir())
    assert kept == [f"step-{step:06}" for step in (18, 19, 20)]
    assert_same_outcome(run, setup.whole, "other logging")


# -- export --------------------------------------------------------------------------------------


def test_moments_in_bf16_resume_to_the_bit(setup: Setup, tmp_path: Path, command: Command) -> None:
    """From the middle of a run, whose later snapshots are taken away; fp32 is tested above."""
    narrow = ["--optim.moments", "bfloat16", "--output"]
    assert command(["train", str(setup.recipe), *narrow, str(tmp_path / "a")]).returncode == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, *later = sorted((tmp_path / "b" / "snapshots").iterdir())
    for folder in (*later, tmp_path / "b" / "hf"):
        shutil.rmtree(folder)
    done = command([*resume(setup, tmp_path / "b"), "--optim.moments", "bfloat16"])
    assert done.returncode == 0 and f"resuming after step {int(first.name[-6:])}" in done.stdout
    a, b = (load_file(tmp_path / run / "snapshots" / f"step-{STEPS:06}" / TENSORS) for run in "ab")
    assert a.keys() == b.keys()
    for name, x in a.items():
        kind = torch.float32 if name.startswith("param/") else torch.bfloat16
        assert x.dtype == kind and x.equal(b[name]) and x.any(), name


def test_export_is_the_runs_own_folder(setup: Setup, tmp_path: Path) -> None:
    done = s1fast("export", str(setup.whole), str(tmp_path / "out"))
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "out")
    found, wanted = (
        {path.name: path.read_bytes() for path in folder.iterdir()}
        for folder in (tmp_path / "out", setup.whole / "hf")
    )
    assert found == wanted


def test_export_touches_nothing_of_a_run_that_goes_on(
    setup: Setup,
    tmp_path: Path,
    command: Command,
) -> None:
    """A snapshot being written stays; a damaged one is passed over with a warning."""
    run = tmp_path / "run"
    shutil.copytree(setup.whole, run)
    flip(run / "snapshots" / f"step-{STEPS:06}" / TENSORS, -1)
    (run / "snapshots" / ".step-000022.x.tmp").mkdir()
    (run / "snapshots" / ".step-000022.x.tmp" / TENSORS).write_bytes(b"half")
    before = contents(run)
    done = command(["export", str(run), str(tmp_path / "out")])
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "out")
    assert f"warning: {run}/snapshots/step-{STEPS:06}" in done.stderr
    assert contents(run) == before
    exported = load_file(tmp_path / "out" / "model.safetensors")
    old = load_file(run / "snapshots" / f"step-{STEPS - EVERY:06}" / TENSORS)
    name = "model.embed_tokens.weight"
    assert torch.equal(exported[name], old["param/embed.weight"].bfloat16())


def test_export_without_a_run_or_snapshot(
    setup: Setup,
    tmp_path: Path,
    command: Command,
) -> None:
    target = tmp_path / "out"
    error = refusal(command(["export", str(tmp_path), str(target)]))
    assert f"{tmp_path}: no config.toml there" in error
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(setup.whole / "config.toml", run)
    error = refusal(command(["export", str(run), str(target)]))
    assert error == f"s1fast: error: {run}: no whole snapshot there\n"
    shutil.copytree(setup.whole / "snapshots", run / "snapshots")
    for folder in (run / "snapshots").iterdir():
        flip(folder / TENSORS, -1)
    error = refusal(command(["export", str(run), str(target)]))
    assert "no whole snapshot there; " in error and "checksum differs" in error
    assert not target.exists()


# -- never unpickled -----------------------------------------------------------------------------

UNPICKLERS = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def unpickling(source: str) -> list[str]:
    """What in a module's text could unpickle."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in UNPICKLERS]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = {a.name for a in node.names}
            if module.split(".")[0] in UNPICKLERS and names != {"dumps"}:  # which only writes
                found.append(module)
            if module.split(".")[0] == "torch" and names & {"load", "save", "*"}:
                found.append(f"{module}: {names}")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in (("torch", "load"), ("torch", "save")):
                found.append(f"torch.{node.attr}")
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append("allow_pickle")
    return found


def test_nothing_is_ever_unpickled() -> None:
    files = [*ROOT.glob("s1fast/*.py"), *ROOT.glob("s1fast/*/*.py")]
    assert {"trainer.py", "snapshot.py", "rms_norm.py"} <= {path.name for path in files}
    for path in files:
        assert not unpickling(path.read_text()), path
    for bad in (
        "import pickle",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "from joblib import load",
        "np.load('x', allow_pickle=True)",
    ):
        assert unpickling(bad), bad


# -- runs that must not go on -------------------------------------------------------------------


def label_beyond(stream: PackedBatch) -> None:
    stream.label_T[stream.valid_rows[0]] = 1 << 20


def weight_not_finite(stream: PackedBatch) -> None:
    stream.loss_weight_T[stream.valid_rows[0]] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (label_beyond, "step 4: 1 labels are outside the model's vocabulary"),
        (weight_not_finite, "step 4: loss nan, gradient norm nan"),
    ],
)
@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_spoilt_step_is_in_no_snapshot(
    spoil: Callable[[PackedBatch], None],
    message: str,
    every: int,
    setup: Setup,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps 1 to 3 are sound, the fourth is not: its metrics are read before anything is saved."""
    steps = iter(range(1, 100))

    def pack(*arguments: Any) -> Iterator[PackedBatch]:
        number = next(steps)
        for stream in pack_batch(*arguments):
            if number == 4:
                spoil(stream)
                number = 0
            yield stream

    monkeypatch.setattr("s1fast.step.pack_batch", pack)
    flags = ["--output", str(tmp_path / "run"), "--checkpoint.every", str(every)]
    done = command(["train", str(setup.recipe), *flags])
    assert done.returncode == 2 and message in done.stderr
    newest, _ = snapshot.newest(tmp_path / "run" / "snapshots", repair=False)
    assert newest is not None and newest.step == 3 // every * every
    assert not (tmp_path / "run" / "hf").exists()
