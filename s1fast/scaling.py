"""The paper's measures of test-time scaling, and how sure one can be of them.

For runs a with a mean of x_a thinking tokens and an accuracy of f_a percent (arXiv 2501.19393):

    Control      share of runs whose x_a lies within what was asked for, percent
    Scaling      mean over all pairs x_b > x_a of (f_b - f_a) / (x_b - x_a)
    Performance  max f_a

As printed, Scaling is in percent per token, but the paper's own table holds values that its points
give only with x = log2(tokens): percent per doubling. Both are computed. Intervals are percentile
bootstraps over the problems.
"""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
"""As many as the paper draws."""
LEVEL = 95.0
"""Percent of the resamples that an interval holds."""


@dataclass(frozen=True)
class Point:
    """One run over a benchmark: its mean thinking tokens and accuracy."""

    tokens: float
    accuracy: float
    """Percent."""
    least: float = 0.0
    most: float = math.inf
    """Bounds on tokens that the run was asked to keep."""


def control(points: Sequence[Point]) -> float | None:
    """Percent of the runs that kept their bounds; None where none had any."""
    bounded = [p for p in points if p.least > 0 or p.most < math.inf]
    if not bounded:
        return None
    return 100.0 * sum(p.least <= p.tokens <= p.most for p in bounded) / len(bounded)


def scaling(points: Sequence[Point], *, log2: bool = False) -> float | None:
    """Mean slope over all pairs of runs; None without two runs that differ in tokens.

    Args:
        log2: per doubling of the tokens, as the paper's numbers are, instead of per token.
    """
    if log2:
        points = [Point(math.log2(p.tokens), p.accuracy) for p in points if p.tokens > 0]
    pairs = itertools.combinations(sorted(points, key=lambda p: p.tokens), 2)
    slopes = [
        (b.accuracy - a.accuracy) / (b.tokens - a.tokens) for a, b in pairs if b.tokens > a.tokens
    ]
    return sum(slopes) / len(slopes) if slopes else None


def performance(points: Sequence[Point]) -> float | None:
    """The best run's accuracy, percent."""
    return max((p.accuracy for p in points), default=None)


def interval(scores: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """Bounds of the mean of one score a problem, by the bootstrap, in the scores' unit."""
    means = _resampled_means(np.asarray(scores, dtype=np.float64), seed)
    low, high = np.percentile(means, [50 - LEVEL / 2, 50 + LEVEL / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """Mean score of A minus that of B over the same problems, with its interval."""

    mean: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def paired(a: Sequence[float], b: Sequence[float], *, seed: int = 0) -> Difference:
    """The difference of two runs; a[i] and b[i] are scores on the same problem.

    Resampling problems, and with each its two scores, takes out what makes problems hard for both.
    """
    if len(a) != len(b):
        raise ValueError(f"paired: {len(a)} scores against {len(b)}")
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    low, high = interval(difference.tolist(), seed=seed)
    return Difference(float(difference.mean()), low, high)


def _resampled_means(scores_N: np.ndarray, seed: int) -> np.ndarray:
    """Means of RESAMPLES draws of N scores out of N, a thousand at a time: 10 MB at N 1,319."""
    if not len(scores_N):
        raise ValueError("no scores to resample")
    generator = np.random.default_rng(seed)
    parts = [
        scores_N[generator.integers(0, len(scores_N), (1000, len(scores_N)))].mean(1)
        for _ in range(RESAMPLES // 1000)
    ]
    return np.concatenate(parts)


# -- several samples a problem ------------------------------------------------------------------


def majority(votes: Sequence[str]) -> str:
    """The commonest vote, the earliest of equals; samples without an answer ("") do not vote."""
    counts = collections.Counter(vote for vote in votes if vote)
    return counts.most_common(1)[0][0] if counts else ""


def powers(samples: int) -> Iterable[int]:
    """2, 4, 8, ... up to the number of samples, and that number itself."""
    k = 2
    while k < samples:
        yield k
        k *= 2
    if samples > 1:
        yield samples
