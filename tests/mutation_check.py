"""Breaks the code in one place after another and shows that the tests notice each time.

    python tests/mutation_check.py [--only WORD]

Each mutation replaces one piece of text in a copy of the project and runs tests there until one
fails. A mutation that no test notices is a hole in the tests: the exit status is then 1. So it is
if the tests fail without any mutation, or if a mutation's text is not found exactly once, or if its
tests do not run.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 600
NOT_COPIED = shutil.ignore_patterns(".*", "out", "*.egg-info", "__pycache__")


@dataclass(frozen=True)
class Mutation:
    """`old` becomes `new` in `file`; both may be pieces of a line."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ("tests/test_linear_cross_entropy.py",)


def _rows(name: str, old: str, new: str) -> Mutation:
    return Mutation(f"row kernel: {name}", "kernels/softmax_gradient.py", old, new)


def _head(name: str, old: str, new: str) -> Mutation:
    return Mutation(f"head: {name}", "kernels/linear_cross_entropy.py", old, new)


MUTATIONS = (
    _rows("mask one short", "column_JL < vocab - whole\n", "column_JL < vocab - whole - 1\n"),
    _rows("masked logits count", 'mask=rest_JL, other=float("-inf")', "mask=rest_JL, other=0.0"),
    _rows(
        "tail tile not summed",
        "            high_L, sum_L = _add_tile(last_JL.to(tl.float32), high_L, sum_L)\n",
        "",
    ),
    _rows(
        "tail tile not written",
        "tl.store(out_ptr, last_JL.to(logits_ptr.dtype.element_ty), mask=rest_JL)",
        "pass",
    ),
    _rows("row offset in 32 bits", "tl.cast(row, tl.int64) * row_stride", "row * row_stride"),
    _rows("row offset", "tl.cast(row, tl.int64) * row_stride", "row * vocab"),
    _rows(
        "column offset of pass 1",
        "tl.load(row_ptr + start + column_JL)",
        "tl.load(row_ptr + column_JL)",
    ),
    _rows("column offset of pass 2", "(whole - TILE - done)", "(whole - TILE)"),
    _rows("rows of a program", "range(tl.program_id(0), num_rows, tl", "range(0, num_rows, tl"),
    _rows("maximum without rescale", "sum_L * tl.exp2((high_L - new_L) * LOG2_E) +", "sum_L +"),
    _rows("lanes without rescale", "sum_L * tl.exp2((high_L - high) * LOG2_E)", "sum_L"),
    _rows(
        "maximum without the true class",
        "high = tl.maximum(others_high, own)",
        "high = others_high",
    ),
    _rows("weight left out", "factor = weight / total", "factor = 1.0 / total"),
    _rows("sum left out", "factor = weight / total", "factor = weight"),
    _rows("true class counted twice", 'tl.store(own_ptr, float("-inf"))', "pass"),
    _rows("true class's gradient", "(-others * factor)", "(others * factor)"),
    _rows(
        "true class by cancellation",
        "(-others * factor)",
        "(weight * ((total - others) / total - 1.0))",
    ),
    _rows(
        "log-probability by cancellation",
        "own - high - _log1p(rest)",
        "own - high - tl.log(1.0 + rest)",
    ),
    _rows("label index", "tl.load(label_ptr + row)", "tl.load(label_ptr)"),
    _rows("weightless rows used", "if weight != 0.0:", "if weight != -1.0:"),
    _rows("weightless rows left", "zero_JL, mask=here_JL", "zero_JL, mask=here_JL & (start < 0)"),
    _rows("reference: weight", "weight_C[:, None] / sum_C1", "1 / sum_C1"),
    _rows(
        "reference: true class",
        "own_C1 == high_C1, others_C1, sum_C1 - 1",
        "own_C1 == high_C1, sum_C1 - 1, sum_C1 - 1",
    ),
    _rows(
        "reference: masked rows",
        "masked_fill(~used_C1, 0.0)\n    own",
        "masked_fill(used_C1 & False, 0.0)\n    own",
    ),
    _head("chunks overwrite d weight", "beta = 0 if first else 1", "beta = 0"),
    _head("d weight starts from rubbish", "beta = 0 if first else 1", "beta = 1"),
    _head(
        "labels of another chunk",
        "label_R[chunk], weight_R[chunk]",
        "label_R[:size], weight_R[chunk]",
    ),
    _head(
        "weights of another chunk",
        "label_R[chunk], weight_R[chunk]",
        "label_R[chunk], weight_R[:size]",
    ),
    _head(
        "gather index",
        "torch.index_select(hidden_TD, 0, rows[chunk]",
        "torch.index_select(hidden_TD, 0, rows[:size]",
    ),
    _head(
        "scatter index",
        "dhidden_TD.index_copy_(0, rows[chunk]",
        "dhidden_TD.index_copy_(0, rows[:size]",
    ),
    _head("masked rows not zeroed", "        dhidden_TD.zero_()", "        pass"),
    _head("d weight of no rows", "        dweight_VD.zero_()", "        pass"),
    _head("loss without weights", "-(weight_R * logprob_R).sum()", "-logprob_R.sum()"),
    _head(
        "sum of d weight in the head's dtype", "accum_dtype or weight_VD.dtype,", "weight_VD.dtype,"
    ),
    _head("ignored labels counted as bad", "(~in_range_R & (label_R != IGNORE))", "(~in_range_R)"),
    _head("bad labels' weight", "weight_R.where(in_range_R, 0.0)", "weight_R"),
    _head("last class out of range", "label_R < num_classes", "label_R < num_classes - 1"),
    _head("bad labels overwritten", "bad_labels.add_(num_bad)", "bad_labels.copy_(num_bad)"),
    _head("no upstream scaling", "_scaled(x, dloss) if", "x if"),
    _head("scale kernel", ".to(tl.float32) * scale", ".to(tl.float32)"),
    _head(
        "scale kernel's offset",
        "offset = start + tl.arange(0, BLOCK)",
        "offset = first + tl.arange(0, BLOCK)",
    ),
    _head("backward twice", "        ctx.walked = True\n", ""),
    _head(
        "rows of log-probabilities",
        ".index_copy_(0, rows, logprob_R)",
        ".index_copy_(0, rows, logprob_R.flip(0))",
    ),
    _head(
        "limit not kept",
        "size = num_rows - start if num_rows - start <= most else step",
        "size = min(step, num_rows - start)",
    ),
)


# -- running -----------------------------------------------------------------------------------


def mutated(text: str, mutation: Mutation) -> str:
    count = text.count(mutation.old)
    if count != 1:
        raise ValueError(f"{mutation.name}: its text occurs {count} times in {mutation.file}")
    return text.replace(mutation.old, mutation.new)


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a copy, whose modules come before any that are installed."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        # A mutation may keep a file's size and second: bytecode would pass for up to date.
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def run_tests(folder: Path, tests: Sequence[str]) -> tuple[bool | None, str]:
    """(whether they pass, or None if they did not run; the first that failed)."""
    options = ("-x", "-q", "-p", "no:cacheprovider", "-m", "not slow")
    try:
        done = python(folder, "-m", "pytest", *options, *tests)
    except subprocess.TimeoutExpired:
        return False, "hung"
    if done.returncode < 0:
        return False, f"died of signal {-done.returncode}"
    first = re.search(r"^(?:FAILED|ERROR) \S*?::(.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode == 0 or (done.returncode == 1 and first):
        return done.returncode == 0, first[1] if first else ""
    return None, (done.stdout + done.stderr).strip().rpartition("\n")[2]


def try_mutation(folder: Path, mutation: Mutation) -> tuple[bool, str]:
    """(whether a test noticed, the account); the copy is whole again afterwards."""
    path = folder / mutation.file
    before = path.read_text()
    try:
        path.write_text(mutated(before, mutation))
        passed, first = run_tests(folder, mutation.tests)
    except ValueError as error:
        return False, str(error)
    finally:
        path.write_text(before)
    if passed is None:
        return False, f"its tests did not run: {first}"
    return not passed, "SURVIVED" if passed else first


def check(root: Path, mutations: Sequence[Mutation]) -> int:
    """Prints a line per mutation; returns the number that were not noticed, or could not be."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve() / "copy"
        shutil.copytree(root, folder, symlinks=True, ignore=NOT_COPIED)
        imported = python(folder, "-c", "import s1fast; print(s1fast.__file__)").stdout.strip()
        if not imported or not Path(imported).is_relative_to(folder):
            print(f"the copy is not what is imported, but {imported or 'nothing'}")
            return 1
        tests = sorted({test for mutation in mutations for test in mutation.tests})
        passed, first = run_tests(folder, tests)
        if not passed:
            print(f"without a mutation the tests do not pass: {first}")
            return 1
        missed = 0
        for mutation in mutations:
            start = time.monotonic()
            noticed, account = try_mutation(folder, mutation)
            missed += not noticed
            mark = "ok  " if noticed else "MISS"
            print(
                f"{mark} {mutation.name:45} {time.monotonic() - start:4.0f} s  {account}",
                flush=True,
            )
    print(f"{len(mutations) - missed} of {len(mutations)} mutations were noticed")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", metavar="WORD", help="mutations whose name holds it")
    only = parser.parse_args().only
    chosen = [mutation for mutation in MUTATIONS if only in mutation.name]
    return 1 if not chosen or check(ROOT, chosen) else 0


if __name__ == "__main__":
    sys.exit(main())
