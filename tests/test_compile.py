"""Every shipped kernel compiled for sm_90a within its budget; and that the check goes red."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tests" / "compile_kernels.py"

pytest.importorskip("triton")


def compile_kernels(*arguments: str, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, cwd=path
    )


def test_shipped_kernels_keep_to_their_budgets() -> None:
    done = compile_kernels()
    assert done.returncode == 0, done.stderr
    budgets = json.loads((SCRIPT.parent / "kernel_budgets.json").read_text())
    assert budgets and len(done.stdout.splitlines()) == len(budgets)


# -- what it finds -----------------------------------------------------------------------------

TOYS = {
    "good": """
@triton.jit
def half(x):
    return x / 2

@triton.jit
def halve(x_ptr, stride, SIZE: tl.constexpr):
    index = tl.program_id(0) * stride + tl.arange(0, SIZE)
    tl.store(x_ptr + index, half(tl.load(x_ptr + index)))

SIGNATURE = {"x_ptr": "*fp32", "stride": "i32:16"}
COMPILE_CASES = [
    ("good/aligned", halve, SIGNATURE, {"SIZE": 1024}, {"num_warps": 4}),
    ("good/ragged", halve, {**SIGNATURE, "stride": "i32"}, {"SIZE": 1024}, {"num_warps": 4}),
]
""",
    "spilling": """
@triton.jit
def normalise(x_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    x = tl.load(x_ptr + index)
    tl.store(x_ptr + index, x / tl.sum(x, axis=0))

COMPILE_CASES = [("spilling", normalise, {"x_ptr": "*fp32"}, {"SIZE": 16384}, {"num_warps": 1})]
""",
    "greedy": """
@triton.jit
def product(a_ptr, b_ptr, out_ptr, depth, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, depth, K):
        a = tl.load(a_ptr + m * depth + start + k[None, :])
        total = tl.dot(a, tl.load(b_ptr + (start + k[:, None]) * N + n), total)
    tl.store(out_ptr + m * N + n, total)

SIGNATURE = {"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*fp32", "depth": "i32:16"}
SIZES = {"M": 128, "N": 256, "K": 64}
COMPILE_CASES = [
    (f"greedy/{n}", product, SIGNATURE, SIZES, {"num_warps": 8, "num_stages": n}) for n in (3, 7)
]
""",
    "caseless": """
@triton.jit
def zero(x_ptr):
    tl.store(x_ptr, 0.0)
""",
    "partial": """
@triton.jit
def one(x_ptr):
    tl.store(x_ptr, 1.0)

@triton.jit
def two(x_ptr):
    tl.store(x_ptr, 2.0)

@triton.jit
def broken(x_ptr):
    tl.store(x_ptr, no_such_name)

COMPILE_CASES = [
    ("partial/one", one, {"x_ptr": "*fp32"}, {}, {}),
    ("partial/misnamed", one, {"y_ptr": "*fp32"}, {}, {}),
    ("partial/broken", broken, {"x_ptr": "*fp32"}, {}, {}),
]
""",
    "plain": "",
}
FLAGS = ("--package", "toys", "--budgets", "budgets.json")


@pytest.fixture
def toys(tmp_path: Path) -> Path:
    folder = tmp_path / "toys"
    folder.mkdir()
    for name, text in TOYS.items():
        head = "import triton\nimport triton.language as tl\n" if text else ""
        (folder / f"{name}.py").write_text(head + text)
    return tmp_path


def keep(toys: Path, *names: str) -> None:
    for name in TOYS.keys() - set(names):
        (toys / "toys" / f"{name}.py").unlink()


def test_every_fault_is_named(toys: Path) -> None:
    done = compile_kernels(*FLAGS, "--record", path=toys)
    assert done.returncode == 1
    for fault in (
        "spilling: stack_bytes ",
        "spilling: spill_bytes ",
        "greedy/7: shared_bytes ",
        "toys.caseless has kernels and no COMPILE_CASES",
        "toys.caseless.zero is built by no case",
        "toys.partial.two is built by no case",
        "partial/misnamed: ValueError: arguments ",
        "partial/broken: CompilationError",
    ):
        assert fault in done.stderr, f"{fault!r} not in {done.stderr}"
    for innocent in ("good", "greedy/3", "partial/one", "plain"):
        assert innocent not in done.stderr
    wgmma = [line for line in done.stdout.splitlines() if "wgmma" in line and "cp_async" in line]
    assert [line.partition(":")[0] for line in wgmma] == ["greedy/3", "greedy/7"]


def test_budgets(toys: Path) -> None:
    """Recorded, kept to, outgrown, missing, left over; and what alignment is worth."""
    keep(toys, "good")
    done = compile_kernels(*FLAGS, path=toys)
    assert done.returncode == 1
    assert done.stderr.count(": no budget (--record writes one)") == 2
    assert compile_kernels(*FLAGS, "--record", path=toys).returncode == 0
    path = toys / "budgets.json"
    recorded: dict[str, Any] = json.loads(path.read_text())
    assert recorded["good/aligned"]["wide_loads"] == 2
    assert "wide_loads" not in recorded["good/ragged"]
    path.write_text(json.dumps({**recorded, "good/ragged": {"registers": 8, "wide_stores": 2}}))
    done = compile_kernels(*FLAGS, path=toys)
    assert done.returncode == 1
    assert "good/ragged: registers " in done.stderr and ", at most 8" in done.stderr
    assert "good/ragged: wide_stores 0, at least 2" in done.stderr
    assert "good/aligned" not in done.stderr
    path.write_text(
        json.dumps({**recorded, "gone": {}, "good/ragged": {"regs": 1, "registers": 99}})
    )
    done = compile_kernels(*FLAGS, path=toys)
    assert done.returncode == 1
    assert set(done.stderr.splitlines()) == {
        "gone: a budget and no such case",
        "good/ragged: a budget of regs, which nobody measures",
    }
