"""Which group of ranks trains on which sequences of a step: balanced on FLOPs, on the host alone.

Under FSDP all ranks meet at every layer, so a step lasts as long as its slowest group. A function
of the batch alone: every rank computes the same split without asking another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from s1fast.config import TrainConfig
from s1fast.metrics import train_flops
from s1fast.model import ModelConfig
from s1fast.packing import step_indices

EXACT_ITEMS = 20
"""Two groups are split exactly up to so many sequences: 2^19 subsets take a few milliseconds."""

Split = list[list[int]]
"""Indices per group, each ascending."""


def balanced_split(costs: Sequence[float], num_groups: int) -> Split:
    """Splits items so that the costliest group is as cheap as possible.

    Exact for two groups of at most EXACT_ITEMS items together; else largest first to the cheapest
    group, then single moves and exchanges until none helps. Groups come in falling order of cost,
    and may be empty.
    """
    if num_groups == 2 and 0 < len(costs) <= EXACT_ITEMS:
        groups = _exact_halves(costs)
    else:
        groups = _largest_first(costs, num_groups)
        _exchange(costs, groups)
    groups = [sorted(group) for group in groups]
    return sorted(groups, key=lambda group: (-sum(costs[i] for i in group), group))


def _exact_halves(costs: Sequence[float]) -> Split:
    """The best of all subsets that hold item 0, the others being their complements."""
    sums = np.array([costs[0]], np.float64)
    for cost in costs[1:]:  # bit i - 1 of a subset's number says whether it holds item i
        sums = np.concatenate([sums, sums + cost])
    total = sums[-1]
    best = int(np.argmin(np.maximum(sums, total - sums)))
    held = [i for i in range(len(costs)) if i == 0 or best >> (i - 1) & 1]
    return [held, [i for i in range(len(costs)) if i not in set(held)]]


def _largest_first(costs: Sequence[float], num_groups: int) -> Split:
    groups: Split = [[] for _ in range(num_groups)]
    loads = [0.0] * num_groups
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        cheapest = loads.index(min(loads))
        groups[cheapest].append(i)
        loads[cheapest] += costs[i]
    return groups


def _exchange(costs: Sequence[float], groups: Split) -> None:
    """Moves or exchanges items between the costliest group and another while that lowers both."""
    while True:
        loads = [sum(costs[i] for i in group) for group in groups]
        top = loads.index(max(loads))
        best = (loads[top] * (1 - 1e-12), -1, -1, -1)  # rounding is no improvement
        for g, group in enumerate(groups):
            for i in groups[top] if g != top else ():
                for j in (-1, *group):  # -1: nothing comes back
                    shift = costs[i] - (costs[j] if j >= 0 else 0.0)
                    best = min(best, (max(loads[top] - shift, loads[g] + shift), g, i, j))
        _, g, i, j = best
        if g < 0:
            return
        groups[top].remove(i)
        groups[g].append(i)
        if j >= 0:
            groups[g].remove(j)
            groups[top].append(j)


def split_step(
    seqlens: Sequence[int], costs: Sequence[float], num_groups: int, most_tokens: int
) -> list[Split]:
    """Lays a step's sequences out as passes of one packed stream a group.

    As few passes as hold the batch with streams of at most most_tokens; a longer sequence has a
    stream of its own. All groups have the same number of passes, since every pass is a collective;
    streams of like cost share one. Every split is balanced anew, so streams are even within passes
    and between them.

    Returns:
        A Split a pass, largest streams first; an empty stream where sequences do not suffice.
    """
    num_passes = max(1, -(-sum(seqlens) // (num_groups * most_tokens)))
    while True:
        streams = balanced_split(costs, num_passes * num_groups)
        tokens = [sum(seqlens[i] for i in stream) for stream in streams]
        if all(
            len(stream) < 2 or held <= most_tokens
            for stream, held in zip(streams, tokens, strict=True)
        ):
            break
        num_passes += 1
    return [streams[i : i + num_groups] for i in range(0, len(streams), num_groups)]


@dataclass(frozen=True)
class StepPlan:
    """A step's sequences, and which group of ranks trains on which of them."""

    batch: list[int]
    """Indices into the data."""
    seqlens: list[int]
    labels: list[int]
    costs: list[float]
    """FLOPs; like the two before, of each sequence of the batch."""
    passes: list[Split]
    """Indices into the batch, of each pass, of each group."""

    def stream_tokens(self, split: Split) -> list[int]:
        """Tokens of each stream of a pass."""
        return [sum(self.seqlens[i] for i in stream) for stream in split]


def plan_step(
    step: int,
    config: TrainConfig,
    model: ModelConfig,
    seqlens: Sequence[int],
    labels: Sequence[int],
    world: int,
    ulysses: int,
) -> StepPlan:
    """Step 0, 1, ... of a run; seqlens and labels of all its data."""
    batch = step_indices(len(seqlens), config.batch_size, config.seed, step)
    lengths, counts = [seqlens[i] for i in batch], [labels[i] for i in batch]
    costs = [train_flops(model, [n], m) for n, m in zip(lengths, counts, strict=True)]
    most_tokens = config.microbatch_tokens * ulysses
    passes = split_step(lengths, costs, world // ulysses, most_tokens)
    return StepPlan(batch, lengths, counts, costs, passes)


def imbalance(passes: Sequence[Split], costs: Sequence[float]) -> float:
    """Slowest over mean: how much longer a step takes than if every pass were perfectly even."""
    loads = [[sum(costs[i] for i in stream) for stream in split] for split in passes]
    mean = sum(map(sum, loads)) / len(loads[0])
    return sum(map(max, loads)) / mean
