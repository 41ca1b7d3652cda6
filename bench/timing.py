"""Timing a callable: warm-up, then the median and the 20 and 80 % quantiles of single calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def measure(call: Callable[[], object], *, warmup: int = 2, repeats: int = 10) -> dict[str, float]:
    """Seconds of one call: {"median_s", "q20_s", "q80_s"}; a GPU is waited for on both sides."""
    for _ in range(warmup):
        call()
    seconds = []
    for _ in range(repeats):
        _wait()
        start = time.perf_counter()
        call()
        _wait()
        seconds.append(time.perf_counter() - start)
    fifths = statistics.quantiles(seconds, n=5) if len(seconds) > 1 else seconds * 4
    return {"median_s": statistics.median(seconds), "q20_s": fifths[0], "q80_s": fifths[3]}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
