"""Timing callables side by side: each round runs every one of them once, in balanced order.

Clocks, power and temperature drift while a GPU works; what is measured in the same rounds drifts
alike. On a GPU a call is timed by CUDA events after L2 has been emptied, and the device is kept
busy before it while the host launches it: what is timed is the device, of which the host is as far
ahead in a training step. Elsewhere the wall clock tells.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

FLUSH_BYTES = 256 << 20
"""Written before each timed call: more than twice the L2 of an H100 (50 MB) or H200 (60 MB)."""


HEAD_START_CYCLES = 4_000_000
"""Two milliseconds of the device: the host launches a call within them, autograd included."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median of some rounds, and where 20 and 80 % of them lie."""

    median_ms: float
    q20_ms: float
    q80_ms: float
    rounds: int


@dataclass(frozen=True)
class Call:
    """What is timed, given what `prepare` returns; prepare runs before each time, untimed."""

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


def balanced_order(names: Sequence[str], round_index: int) -> list[str]:
    """A Williams design: over len(names) rounds everybody stands once in every place, and over
    twice as many everybody follows everybody else equally often."""
    n = len(names)
    zigzag = [k // 2 if k % 2 == 0 else n - 1 - k // 2 for k in range(n)]
    order = [names[(k + round_index) % n] for k in zigzag]
    return order[::-1] if round_index // max(n, 1) % 2 else order


def interleaved(calls: Mapping[str, Call], rounds: Mapping[str, int]) -> dict[str, Timing]:
    """Times every call in its number of rounds; one with fewer sits out rounds, evenly spread."""
    total = max(rounds.values(), default=0)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(total):
        active = [n for n in calls if (index + 1) * rounds[n] // total > len(seconds[n])]
        for name in balanced_order(active, index):
            seconds[name].append(_seconds(calls[name]))
    return {name: summary(found) for name, found in seconds.items()}


def measure(call: Callable[[], object], *, warmup: int = 2, repeats: int = 10) -> Timing:
    """One callable by itself, after calls that are not timed."""
    for _ in range(warmup):
        call()
    return interleaved({"": Call(lambda _: call())}, {"": repeats})[""]


def summary(seconds: Sequence[float]) -> Timing:
    """Median and quantiles, linear between neighbours as in triton.testing.do_bench."""
    fifths = (
        statistics.quantiles(seconds, n=5, method="inclusive")
        if len(seconds) > 1
        else [seconds[0]] * 4
    )
    return Timing(statistics.median(seconds) * 1e3, fifths[0] * 1e3, fifths[3] * 1e3, len(seconds))


def _seconds(call: Call) -> float:
    state = call.prepare()
    if not torch.cuda.is_available():
        began = perf_counter()
        call.run(state)
        return perf_counter() - began
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    _flush_buffer().zero_()
    torch.cuda._sleep(HEAD_START_CYCLES)
    start.record()
    call.run(state)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


@lru_cache(maxsize=1)
def _flush_buffer() -> Tensor:
    l2_bytes = torch.cuda.get_device_properties().L2_cache_size
    return torch.empty(max(FLUSH_BYTES, 2 * l2_bytes), dtype=torch.uint8, device="cuda")
