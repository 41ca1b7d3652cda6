"""Measuring the providers of an operation on one shape: errors, extra memory, times.

A provider may be missing or fail, at any point and in any way: it is then listed so, with the
reason, and the others are measured all the same.
"""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from s1fast.bench.op import (
    Context,
    Forward,
    MissingError,
    Op,
    Output,
    Problem,
    Provider,
    Sizes,
    joined,
    shape_name,
)
from s1fast.bench.roofs import Roofs
from s1fast.bench.timing import Call, Timing, interleaved

ROUNDS = 20
FEWEST_ROUNDS = 5
BUDGET_S = 0.4
"""A provider's share of the time per shape, all rounds together; at least FEWEST_ROUNDS though."""
LONGEST_CALL_S = 4.0
"""A provider that needs longer for one forward and backward is not timed."""

LIMITS = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
"""Relative error above which a result is called wrong. bf16 rounds thrice on the way, by 2^-8 each,
and once more per chunk where it accumulates; a row left out of 4,700 shows as 1 in the maximum."""


Working = tuple[Provider, Forward, float]
"""A provider, what it built, and the seconds of one call."""


@dataclass
class Measurement:
    """One provider on one shape, as it goes into the results.

    status: "ok", "missing" or "error", with the reason. timings: forward (without gradients),
    backward, and full, which is forward with gradients and backward. tflops: of each, counted as
    the operation says; gb_s: of each, where it counts bytes alone. roof_fraction: least possible
    time / time, of full. extra_bytes: peak beyond inputs and returned gradients; None on a CPU.
    errors: of output and gradients, as {"max": max |x - r| / max |r|, "norm": |x - r| / |r|}, None
    where not finite. wrong: an error is above the limit.
    """

    provider: str
    version: str | None = None
    status: str = "ok"
    reason: str = ""
    timings: dict[str, Timing] = field(default_factory=dict)
    tflops: dict[str, float] = field(default_factory=dict)
    gb_s: dict[str, float] = field(default_factory=dict)
    roof_fraction: float | None = None
    extra_bytes: int | None = None
    errors: dict[str, dict[str, float | None]] = field(default_factory=dict)
    wrong: bool = False

    def fail(self, error: BaseException) -> None:
        """Keeps the kind of error and its first line, as one line of text."""
        missing = isinstance(error, ImportError | MissingError)
        self.status = "missing" if missing else "error"
        text = (str(error).strip().splitlines() or [""])[0][:300]
        self.reason = text if missing else f"{type(error).__name__}: {text}"
        self.timings = {}


def measure_shape(
    op: Op,
    sizes: Sizes,
    providers: Sequence[tuple[Provider, str | None]],
    roofs: Roofs,
    device: torch.device,
) -> dict[str, Any]:
    """The shape, its floor, and a Measurement of each provider (given with its version)."""
    problem = op.problem(sizes, device)
    dtype = problem.dtype
    # An operation is bound by whichever takes longer: its products or its traffic. What has no
    # products writes about as much as it reads, as a copy does.
    stream_gb_s = max(roofs.copy_gb_s, roofs.read_gb_s) if problem.flops else roofs.copy_gb_s
    floor_s = max(
        problem.flops / (roofs.gemm_tflops(dtype) * 1e12),
        problem.num_bytes / (stream_gb_s * 1e9),
    )
    found = {provider.name: Measurement(provider.name, v) for provider, v in providers}
    works = _try(op, problem, providers, found)
    _time(problem, works, found)
    flops = _of_modes(problem.forward_flops, problem.flops)
    num_bytes = _of_modes(problem.forward_bytes, problem.num_bytes)
    for one in found.values():
        if one.timings:
            one.tflops = {m: flops[m] / t.median_ms / 1e9 for m, t in one.timings.items()}
            if not problem.flops:
                one.gb_s = {m: num_bytes[m] / t.median_ms / 1e6 for m, t in one.timings.items()}
            one.roof_fraction = floor_s * 1e3 / one.timings["full"].median_ms
    return {
        "op": op.name,
        "shape": shape_name(sizes),
        "sizes": sizes,
        "dtype": str(dtype).removeprefix("torch."),
        "forward_flops": problem.forward_flops,
        "flops": problem.flops,
        "num_bytes": problem.num_bytes,
        "floor_ms": floor_s * 1e3,
        "measurements": [dataclasses.asdict(one) for one in found.values()],
    }


def _of_modes(forward: int, full: int) -> dict[str, int]:
    return {"forward": forward, "full": full, "backward": full - forward}


def peak_extra(problem: Problem, forward: Forward) -> int | None:
    """Bytes at the peak of forward and backward beyond what was there and the gradients."""
    problem.clear()
    if not torch.cuda.is_available():
        problem.full(forward)
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    problem.full(forward)
    torch.cuda.synchronize()
    returned = sum(x.grad.nbytes for x in problem.leaves.values() if x.grad is not None)
    return max(0, torch.cuda.max_memory_allocated() - before - returned)


def relative_errors(found: Tensor, wanted: Tensor) -> dict[str, float | None]:
    """Maximum and norm of the difference, each relative to that of `wanted`; chunked, in fp64."""
    if found.shape != wanted.shape:
        raise ValueError(f"shape {tuple(found.shape)}, expected {tuple(wanted.shape)}")
    zero = torch.zeros((), dtype=torch.float64, device=wanted.device)
    most = {"found": zero, "wanted": zero}
    squares = {"found": zero, "wanted": zero}
    size = 1 << 26
    pairs = zip(found.reshape(-1).split(size), wanted.reshape(-1).split(size), strict=True)
    for a, b in pairs:
        for name, x in (("found", a.double() - b.double()), ("wanted", b.double())):
            most[name] = torch.maximum(most[name], x.abs().amax())  # a NaN stays one
            squares[name] = squares[name] + x.square().sum()
    tiny = torch.finfo(torch.float64).tiny
    values = {
        "max": (most["found"] / most["wanted"].clamp(min=tiny)).item(),
        "norm": (squares["found"].sqrt() / squares["wanted"].sqrt().clamp(min=tiny)).item(),
    }
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def is_wrong(errors: dict[str, dict[str, float | None]], dtype: torch.dtype) -> bool:
    """Whether any error is above the dtype's limit, or not finite."""
    values = [value for pair in errors.values() for value in pair.values()]
    return not all(value is not None and value <= LIMITS[dtype] for value in values)


def _try(
    op: Op,
    problem: Problem,
    providers: Sequence[tuple[Provider, str | None]],
    found: dict[str, Measurement],
) -> dict[str, Working]:
    """Warms every provider up, checks it and its memory; those that work."""
    output, gradients = op.reference(problem)
    works = {}
    for provider, _ in providers:
        one = found[provider.name]
        try:
            with provider.context():
                forward = provider.build(problem)
                problem.inference(forward)
                problem.full(forward)
                seconds = _call_seconds(problem, forward)
                if seconds > LONGEST_CALL_S:
                    raise TimeoutError(f"one call takes {seconds:.1f} s: not timed")
                one.extra_bytes = peak_extra(problem, forward)
                one.errors = {"output": relative_errors(joined(problem.full(forward)), output)}
            for name, leaf in problem.leaves.items():
                if leaf.grad is None:
                    raise RuntimeError(f"no gradient of {name}")
                one.errors[f"d {name}"] = relative_errors(leaf.grad, gradients[name])
            one.wrong = is_wrong(one.errors, problem.dtype)
            works[provider.name] = provider, forward, seconds
        except Exception as error:
            one.fail(error)
        _release(problem)
    return works


def _time(problem: Problem, works: dict[str, Working], found: dict[str, Measurement]) -> None:
    """Times the three modes, every provider in each round; fills in `found`."""
    # A round runs forward four times and backward twice, of which three and two are timed or needed
    # to: two and a half full calls.
    rounds = {
        name: min(ROUNDS, max(FEWEST_ROUNDS, int(BUDGET_S / (2.5 * seconds + 1e-6))))
        for name, (_, _, seconds) in works.items()
    }
    for mode in ("forward", "backward", "full") if problem.backward else ("full",):
        calls = {
            name: _guarded(_call(mode, problem, forward), provider.context, found[name])
            for name, (provider, forward, _) in works.items()
            if found[name].status == "ok"
        }
        timings = interleaved(calls, {name: rounds[name] for name in calls})
        for name, timing in timings.items():
            if found[name].status == "ok":
                found[name].timings[mode] = timing
        _release(problem)


def _call(mode: str, problem: Problem, forward: Forward) -> Call:
    def output() -> Output:
        problem.clear()
        return forward()

    if mode == "forward":
        return Call(lambda _: problem.inference(forward))
    if mode == "backward":
        return Call(lambda y: torch.autograd.backward(y, problem.upstream), prepare=output)
    return Call(lambda _: problem.full(forward), prepare=problem.clear)


def _guarded(call: Call, context: Context, one: Measurement) -> Call:
    """The call in its context, which notes its own failure and from then on does nothing."""

    def prepare() -> Any:
        try:
            with context():
                return call.prepare() if one.status == "ok" else None
        except Exception as error:
            one.fail(error)
            return None

    def run(state: Any) -> None:
        try:
            with context():
                if one.status == "ok":
                    call.run(state)
        except Exception as error:
            one.fail(error)

    return Call(run, prepare)


def _call_seconds(problem: Problem, forward: Forward) -> float:
    began = perf_counter()
    problem.full(forward)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - began


def _release(problem: Problem) -> None:
    """Gives back what a provider, or its failure, left behind."""
    problem.clear()
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
