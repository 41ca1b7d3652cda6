"""Builds every shipped configuration of every Triton kernel for an H100 and holds it to a budget.

    python tests/compile_kernels.py [--record]

Needs neither GPU nor driver, but a process of its own: whether a kernel is interpreted or compiled
is settled when it is defined. What is built is what a kernel file lists in COMPILE_CASES, as
(name, kernel, argument types, constants, options); an integer's type may end in ":16", divisible by
16; pointers always are, as in a launch. A kernel that no case builds is a failure.

Budgets lie in kernel_budgets.json. A build may use no more registers (a multiple of 8, as hardware
deals them out), stack, spills and shared memory than stated, stack and spills being 0 unless
stated; it must have as many of each of the instructions as stated. A build without a budget fails,
and so does a budget without a build.

--record widens the budgets to what was measured, so that one file holds for several versions of
Triton: it was recorded with 3.7.1 and 3.6.0. To tighten a budget, delete it and record with both.
Stack and spills are never recorded: whoever wants these writes them by hand.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

BUDGETS = Path(__file__).with_name("kernel_budgets.json")
SHARED_BYTES = 232_448
"""Of an H100's multiprocessor, for one block. Only a launch would notice more."""
GRANULE = 8
"""Registers come to a thread in steps of it."""

AT_MOST = ("registers", "stack_bytes", "spill_bytes", "shared_bytes")
INSTRUCTIONS = {  # of the machine code
    "wgmma": r"\bHGMMA\b",
    "tma": r"\bUTMA(?:LDG|STG|REDG)\b",
    "cp_async": r"\bLDGSTS\b",
    "set_registers": r"\bUSETMAXREG\b",
    "wide_loads": r"\bLDG\.E[\w.]*\.128\b",
    "wide_stores": r"\bSTG\.E[\w.]*\.128\b",
}
AT_LEAST = (*INSTRUCTIONS, "overlapped")

Measured = dict[str, int]


@dataclass(frozen=True)
class Case:
    """A kernel as it is shipped."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]


# -- what there is to build --------------------------------------------------------------------


def kernel_modules(package: str) -> Iterator[ModuleType]:
    folder = importlib.import_module(package).__path__
    for module in sorted(pkgutil.iter_modules(folder), key=lambda found: found.name):
        yield importlib.import_module(f"{package}.{module.name}")


def kernels_of(module: ModuleType) -> dict[str, Any]:
    """Those that the module defines, launched or called by others."""
    from triton.runtime.jit import JITFunction

    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and value.__module__ == module.__name__
    }


def collect(package: str) -> tuple[list[Case], list[str]]:
    """The cases of all modules, and what is wrong with them."""
    cases: list[Case] = []
    kernels: dict[int, tuple[str, Any]] = {}
    problems = []
    for module in kernel_modules(package):
        found = kernels_of(module)
        kernels |= {id(kernel): (f"{module.__name__}.{n}", kernel) for n, kernel in found.items()}
        if found and not hasattr(module, "COMPILE_CASES"):
            problems.append(f"{module.__name__} has kernels and no COMPILE_CASES")
        cases += [Case(*fields) for fields in getattr(module, "COMPILE_CASES", [])]
    names = [case.name for case in cases]
    problems += [f"{name}: two cases have this name" for name in {*names} if names.count(name) > 1]
    reached = {id(case.kernel) for case in cases}
    called = set().union(*(names_in(kernel) for _, kernel in kernels.values()))
    for key, (name, kernel) in kernels.items():
        if key not in reached and kernel.__name__ not in called:
            problems.append(f"{name} is built by no case")
    return cases, problems


def names_in(kernel: Any) -> set[str]:
    tree = ast.parse(inspect.cleandoc(inspect.getsource(kernel.fn)))
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


# -- building ----------------------------------------------------------------------------------


def build(case: Case) -> Measured:
    """Compiles a case as a launch on an H100 would."""
    from triton import compile, knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    names = case.kernel.arg_names
    stated = {**case.signature, **dict.fromkeys(case.constants, "constexpr")}
    if set(names) != set(stated):
        raise ValueError(f"arguments {set(names) ^ set(stated)} are not both taken and stated")
    kinds = [stated[name].partition(":") for name in names]
    kind_of_source = GluonASTSource if case.kernel.is_gluon() else ASTSource
    source = kind_of_source(
        fn=case.kernel,
        signature={name: kind for name, (kind, _, _) in zip(names, kinds, strict=True)},
        constexprs=case.constants,
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, (kind, _, divisor) in enumerate(kinds)
            if kind.startswith("*") or divisor == "16"
        },
    )
    built = compile(source, target=GPUTarget("cuda", 90, 32), options=case.options)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx.write_text(built.asm["ptx"])
        cubin.write_bytes(built.asm["cubin"])
        sass = run(knobs.nvidia.cuobjdump.path, "-sass", str(cubin))
        arch = next(iter(re.findall(r"^\.target (\w+)", ptx.read_text(), re.MULTILINE)))
        log = run(knobs.nvidia.ptxas.path, "-v", f"--gpu-name={arch}", str(ptx), "-o", os.devnull)
    return {
        "registers": largest(r"Used (\d+) registers", log),
        "stack_bytes": largest(r"(\d+) bytes stack frame", log),
        "spill_bytes": largest(r"(\d+) bytes spill (?:stores|loads)", log),
        "shared_bytes": built.metadata.shared,
        **{name: len(re.findall(pattern, sass)) for name, pattern in INSTRUCTIONS.items()},
        "overlapped": overlapped(sass),
    }


def overlapped(sass: str) -> int:
    """Exponentials computed while a product is on its way: between the wait for all but the last
    product and the next wait. ptxas moves them freely, and nothing else would tell."""
    after_waits = sass.split("WARPGROUP.DEPBAR")
    return sum(x.count("MUFU.EX2") for x in after_waits if x.startswith(".LE gsb0, 0x1"))


def built(cases: Sequence[Case]) -> Iterator[Measured | str]:
    """Each, or why it does not compile, which does not hide the others; by as many processes as
    there are cores, which have the kernels by forking."""
    with multiprocessing.get_context("fork").Pool(
        initializer=_CASES.extend, initargs=(cases,)
    ) as p:
        yield from p.imap(_build_one, range(len(cases)))


_CASES: list[Case] = []
"""Of a process of the pool."""


def _build_one(index: int) -> Measured | str:
    try:
        return build(_CASES[index])
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout + done.stderr


def largest(pattern: str, log: str) -> int:
    found = re.findall(pattern, log)
    if not found:
        raise ValueError(f"ptxas does not say {pattern!r}")
    return max(map(int, found))


# -- judging -----------------------------------------------------------------------------------


def judge(name: str, measured: Measured, budget: Measured | None) -> Iterator[str]:
    """What is wrong with a build."""
    if measured["shared_bytes"] > SHARED_BYTES:
        yield f"{name}: shared_bytes {measured['shared_bytes']}, an H100 has {SHARED_BYTES}"
    if budget is None:
        yield f"{name}: no budget (--record writes one)"
        budget = {"registers": 255, "shared_bytes": SHARED_BYTES}
    for key in AT_MOST:
        if measured[key] > budget.get(key, 0):
            yield f"{name}: {key} {measured[key]}, at most {budget.get(key, 0)}"
    for key in AT_LEAST:
        if measured[key] < budget.get(key, 0):
            yield f"{name}: {key} {measured[key]}, at least {budget[key]}"
    for key in budget.keys() - {*AT_MOST, *AT_LEAST}:
        yield f"{name}: a budget of {key}, which nobody measures"


def widened(budget: Measured, measured: Measured) -> Measured:
    """What --record writes: the budget, if any, stretched to this build; not stack and spills."""
    registers = -(-measured["registers"] // GRANULE) * GRANULE
    least = {key: min(measured[key], budget.get(key, measured[key])) for key in AT_LEAST}
    return {
        **{key: budget[key] for key in ("stack_bytes", "spill_bytes") if key in budget},
        "registers": max(registers, budget.get("registers", 0)),
        "shared_bytes": max(measured["shared_bytes"], budget.get("shared_bytes", 0)),
        **{key: n for key, n in least.items() if n},
    }


def check(package: str, path: Path, record: bool) -> list[str]:
    """Builds and prints everything; returns what is wrong."""
    budgets = json.loads(path.read_text()) if path.exists() else {}
    cases, problems = collect(package)
    measured: dict[str, Measured] = {}
    for case, found in zip(cases, built(cases), strict=True):
        if isinstance(found, str):
            problems.append(f"{case.name}: {found}")
            continue
        measured[case.name] = found
        print(f"{case.name}: {', '.join(f'{key} {n}' for key, n in found.items() if n)}")
    if record:
        budgets = {name: widened(budgets.get(name, {}), m) for name, m in measured.items()}
        path.write_text(json.dumps(budgets, indent=2) + "\n")
    for name, found in measured.items():
        problems += judge(name, found, budgets.get(name))
    names = {case.name for case in cases}
    return problems + [f"{name}: a budget and no such case" for name in budgets.keys() - names]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--record", action="store_true", help="write what was measured")
    parser.add_argument("--package", default="s1fast.kernels", help="whose modules hold kernels")
    parser.add_argument("--budgets", type=Path, default=BUDGETS)
    arguments = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # nothing has imported Triton yet
    with tempfile.TemporaryDirectory() as cache:  # a stale build proves nothing
        os.environ["TRITON_CACHE_DIR"] = cache
        problems = check(arguments.package, arguments.budgets, arguments.record)
    print(*problems, sep="\n", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
