"""Measures our kernels beside their peers and the ceilings of the same run.

    python -m s1fast.bench.kernels
    python -m s1fast.bench.kernels --shape T4700 T4700xmasked50 --against my_module:my_function
    python -m s1fast.bench.kernels --op packed_attention
    ncu --profile-from-start off python -m s1fast.bench.kernels --shape T4700 --once
    python -m s1fast.bench.kernels --compare before.json after.json

`s1fast bench kernels` is the same, where tyro is installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from s1fast.bench.adamw import OP as ADAMW
from s1fast.bench.advance import OP as ADVANCE
from s1fast.bench.decode_attention import OP as DECODE_ATTENTION
from s1fast.bench.environment import RESULTS, environment, result_path, version
from s1fast.bench.gemv import OP as GEMV
from s1fast.bench.layer import OP as LAYER
from s1fast.bench.linear_cross_entropy import OP as LINEAR_CROSS_ENTROPY
from s1fast.bench.memory_bound import RMS_NORM, ROPE, SWIGLU
from s1fast.bench.op import MissingError, Op, Problem, Provider, Sizes, parse_shape, shape_name
from s1fast.bench.packed_attention import OP as PACKED_ATTENTION
from s1fast.bench.providers import measure_shape
from s1fast.bench.report import compare, csv_text, plot, table
from s1fast.bench.roofs import lines, roofs
from s1fast.errors import InputError
from s1fast.files import make_directory, write_atomic

OPS = (
    LINEAR_CROSS_ENTROPY,
    PACKED_ATTENTION,
    RMS_NORM,
    ROPE,
    SWIGLU,
    ADAMW,
    LAYER,
    GEMV,
    DECODE_ATTENTION,
    ADVANCE,
)


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Measure our kernels beside their peers: milliseconds, share of the ceiling, memory, error."""

    op: str = "all"
    """One operation only, by name."""
    shape: tuple[str, ...] = ()
    """Shapes instead of the default ones, as T4700xD5120xV152064xmasked50 for linear
    cross-entropy, S4096xB16xH40xN8xK128 for attention, R4700 for what only moves memory,
    P2000xnarrowxclip for AdamW, M1xN27648xK5120xnormxswiglu for the token loop's products,
    L4096xB64xspread for its attention, B64xgreedy for its draws; what is left out keeps its
    default. `masked` is the percentage of rows without label, `peaked` makes logits as after
    training, `ragged` draws lengths as of s1K."""
    peers: tuple[str, ...] = ()
    """Only peers of these names, or with these in their name; "none" for ours alone."""
    against: tuple[str, ...] = ()
    """More providers, as module:function: callables with the signature of ours."""
    once: bool = False
    """One warm launch of ours and nothing else, between cudaProfilerStart and Stop."""
    compare: tuple[Path, ...] = ()
    """Print how every median changed from one result file to a second; measures nothing."""
    output: Path = RESULTS
    """Folder for the results."""


def parse(arguments: Sequence[str]) -> KernelsConfig:
    """The same flags as tyro makes of KernelsConfig, without tyro."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise InputError(f"{message}; --help lists the flags")

    parser = Parser(
        "s1fast.bench.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--op", default="all", help="one operation only, by name")
    parser.add_argument("--shape", nargs="+", default=(), help="as T4700xD5120xV152064xmasked50")
    parser.add_argument("--peers", nargs="+", default=(), help="only those of such names, or none")
    parser.add_argument("--against", nargs="+", default=(), help="module:function, one more")
    parser.add_argument("--once", action="store_true", help="one warm launch of ours, for ncu")
    parser.add_argument("--compare", nargs="+", type=Path, default=(), help="two result files")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    found = vars(parser.parse_args(arguments))
    values: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
    return KernelsConfig(**values)


def run(config: KernelsConfig) -> None:
    """Measures, writes JSON, CSV and PNG, prints a table; or launches once; or compares."""
    if config.compare:
        if len(config.compare) != 2:
            raise InputError(f"--compare: two result files, not {len(config.compare)}")
        for line in compare(*config.compare):
            print(line)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ops = _chosen(config.op)
    # Everything that was asked for is understood before anything is measured.
    shapes = _given(config.shape, ops, device) or _defaults(config.once, ops, device)
    there = {peer.name for op, _ in shapes for peer in op.peers}
    for name in config.peers:
        if name != "none" and not any(name in peer for peer in there):
            raise InputError(
                f"--peers: none is called {name!r}; there are {', '.join(sorted(there))}"
            )
    functions = [(name, _function(name)) for name in config.against]
    if config.once:
        if functions:
            raise InputError("--once: launches ours and nothing else; leave --against out")
        for op, sizes in shapes:
            _launch(op, op.problem(sizes, device), shape_name(sizes))
        return
    try:
        make_directory(config.output)
    except InputError as error:
        raise InputError(f"--output: {error}") from None
    narrowed = config != KernelsConfig(output=config.output, peers=config.peers)
    _measure(shapes, functions, config.peers, config.output, device, narrowed)


def _measure(
    shapes: Sequence[tuple[Op, Sizes]],
    functions: Sequence[tuple[str, Callable[..., torch.Tensor]]],
    peers: Sequence[str],
    folder: Path,
    device: torch.device,
    narrowed: bool,
) -> None:
    """Roofs, then shape after shape; the JSON is rewritten after each: a crash leaves those before.
    What cannot be made is told when all others have been measured.

    A narrowed run gets a name of its own: tables are of whole ones.
    """
    env = environment()
    print(f"{env['device']}, torch {env['torch']}: roofs")
    ceilings = roofs()
    for line in lines(ceilings):
        print(f"  {line}")
    path = result_path(folder, env, "kernels" if narrowed else "")
    result: dict[str, Any] = {
        "environment": env,
        "roofs": dataclasses.asdict(ceilings),
        "complete": False,
        "shapes": [],
    }
    refused: list[str] = []
    for i, (op, sizes) in enumerate(shapes):
        print(f"{op.name} {shape_name(sizes)} ({i + 1} of {len(shapes)})", flush=True)
        chosen = [p for p in op.peers if not peers or p.name in _named(op, peers)]
        providers = [op.ours, *chosen, *(op.against(name, f) for name, f in functions)]
        versions = [version(p.package) if p.package else None for p in providers]
        named = list(zip(providers, versions, strict=True))
        try:
            result["shapes"].append(measure_shape(op, sizes, named, ceilings, device))
        except (InputError, torch.OutOfMemoryError) as error:  # its inputs, or their reference
            text = str(error).splitlines()[0]
            refused.append(text if "--shape" in text else f"--shape: {shape_name(sizes)}: {text}")
            continue
        result["complete"] = not narrowed and len(result["shapes"]) == len(shapes)
        write_atomic(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
    if result["shapes"]:
        write_atomic(path.with_suffix(".csv"), csv_text(result))
        write_atomic(path.with_suffix(".png"), plot(result))
        for line in table(result):
            print(line)
        print(path)
    if refused:
        raise InputError("; ".join(refused))


def _named(op: Op, names: Sequence[str]) -> set[str]:
    """The operation's peers that are meant: what is some peer's whole name means that one alone."""
    whole = {peer.name for known in OPS for peer in known.peers}
    there = {peer.name for peer in op.peers}
    return {p for p in there for name in names if (p == name if name in whole else name in p)}


def _chosen(name: str) -> tuple[Op, ...]:
    ops = tuple(op for op in OPS if name in ("all", op.name))
    if not ops:
        raise InputError(f"--op: no {name!r}; there are all, {', '.join(op.name for op in OPS)}")
    return ops


def _defaults(once: bool, ops: Sequence[Op], device: torch.device) -> list[tuple[Op, Sizes]]:
    """The shapes of each operation; to be launched once, only the first of these."""
    shapes = ((op, op.shapes(device)[: 1 if once else None]) for op in ops)
    return [(op, parse_shape(s, op.sizes(device))) for op, texts in shapes for s in texts]


def _given(texts: Sequence[str], ops: Sequence[Op], device: torch.device) -> list[tuple[Op, Sizes]]:
    """The shapes that are asked for, each for the operations that have all of its sizes.

    Where none has, the one that has some of them says what is wrong, or the first.
    """
    found = []
    for text in texts:
        names = {part.rstrip("0123456789") for part in text.split("x")}
        takers = (
            [op for op in ops if names <= op.cpu_sizes.keys()]
            or [op for op in ops if names & op.cpu_sizes.keys()]
            or ops[:1]
        )
        found += [(op, parse_shape(text, op.sizes(device))) for op in takers]
    return found


def _function(name: str) -> Callable[..., torch.Tensor]:
    """The callable that "module:function" names; modules are also found in the current folder."""
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise InputError(f"--against: {name!r} is not of the form module:function")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # theirs to mend, whatever their module raises
        raise InputError(f"--against: {name}: {type(error).__name__}: {error}") from None
    if not callable(found):
        raise InputError(f"--against: {name} is no function but {type(found).__name__}")
    return found


def _launch(op: Op, problem: Problem, shape: str) -> None:
    """Forward and backward twice: to warm up, then where a profiler is told to look."""
    provider: Provider = op.ours
    try:
        forward = provider.build(problem)
    except MissingError as error:
        raise InputError(f"--once: {op.name}: {error}") from None
    problem.full(forward)
    problem.clear()
    if problem.arguments[0].is_cuda:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        problem.full(forward)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    else:
        problem.full(forward)
    print(f"launched {op.name} {shape} once, warm")


def main() -> None:
    try:
        run(parse(sys.argv[1:]))
    except InputError as error:
        print(f"s1fast: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
