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
from pathlib import Path

import mutations_adamw
import mutations_attention
import mutations_csrc
import mutations_decode
import mutations_loss
import mutations_memory_bound
from mutation import Mutation

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 600
NOT_COPIED = shutil.ignore_patterns(".*", "out", "*.egg-info", "__pycache__")

MUTATIONS = (
    *mutations_loss.MUTATIONS,
    *mutations_attention.MUTATIONS,
    *mutations_memory_bound.MUTATIONS,
    *mutations_adamw.MUTATIONS,
    *mutations_decode.MUTATIONS,
    *mutations_csrc.MUTATIONS,
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
