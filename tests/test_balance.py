"""The split of a step over groups of ranks: best, complete, bounded, the same everywhere."""

from __future__ import annotations

import itertools
import random

import pytest

from s1fast.balance import EXACT_ITEMS, balanced_split, imbalance, split_step
from s1fast.bench import imbalance as bench


def costs_of(count: int, seed: int) -> list[float]:
    draw = random.Random(seed)
    return [draw.lognormvariate(0, 1) for _ in range(count)]


def slowest(split: list[list[int]], costs: list[float]) -> float:
    return max(sum(costs[i] for i in group) for group in split)


def best(costs: list[float], num_groups: int) -> float:
    """By trying every assignment."""
    loads = []
    for owners in itertools.product(range(num_groups), repeat=len(costs)):
        load = [0.0] * num_groups
        for owner, cost in zip(owners, costs, strict=True):
            load[owner] += cost
        loads.append(max(load))
    return min(loads)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 2, 3, 7, 12])
def test_two_groups_are_split_exactly(count: int, seed: int) -> None:
    costs = costs_of(count, seed)
    assert slowest(balanced_split(costs, 2), costs) == pytest.approx(best(costs, 2), rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("count", "num_groups"), [(6, 3), (7, 3), (7, 4)])
def test_more_groups_are_split_well(count: int, num_groups: int, seed: int) -> None:
    """Largest first alone is within a third of the best; exchanges come nearer."""
    costs = costs_of(count, seed)
    assert slowest(balanced_split(costs, num_groups), costs) <= 1.1 * best(costs, num_groups)


def test_exchanges_help() -> None:
    """Largest first puts 3, 2, 2 together; 3, 3 beside 2, 2, 2 is even."""
    assert balanced_split([3, 3, 2, 2, 2, 6], 3) == [[0, 1], [2, 3, 4], [5]]


@pytest.mark.parametrize("num_groups", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("count", [0, 1, 5, EXACT_ITEMS, EXACT_ITEMS + 1, 64])
def test_every_sequence_is_in_one_group(count: int, num_groups: int) -> None:
    costs = costs_of(count, 0)
    split = balanced_split(costs, num_groups)
    assert len(split) == num_groups
    assert sorted(i for group in split for i in group) == list(range(count))
    assert all(group == sorted(group) for group in split)
    loads = [sum(costs[i] for i in group) for group in split]
    assert loads == sorted(loads, reverse=True)


def test_equal_costs_have_one_answer() -> None:
    """Ties are broken by index, so that ranks cannot disagree."""
    assert balanced_split([1.0] * 4, 2) == balanced_split([1.0] * 4, 2) == [[0, 1], [2, 3]]
    assert balanced_split([1.0] * 4, 3) == [[0, 3], [1], [2]]


def test_passes_hold_what_they_may() -> None:
    """Every group has a stream in every pass; a long sequence has its own, whole."""
    seqlens = [5, 3, 9, 30, 1, 1, 10, 10, 2]
    passes = split_step(seqlens, [float(n) for n in seqlens], 2, 12)
    assert all(len(streams) == 2 for streams in passes)
    streams = [stream for streams in passes for stream in streams]
    assert sorted(i for stream in streams for i in stream) == list(range(9))
    assert [3] in streams
    assert all(sum(seqlens[i] for i in stream) <= 12 for stream in streams if stream != [3])
    assert split_step(seqlens, [float(n) for n in seqlens], 1, 71) == [[list(range(9))]]


def test_too_few_sequences_leave_empty_streams() -> None:
    assert split_step([7, 4], [7.0, 4.0], 4, 100) == [[[0], [1], [], []]]


def test_imbalance_by_hand() -> None:
    """Two passes: the first lasts 3, the second 2, of a mean of 2 + 1.5."""
    assert imbalance([[[0], [1]], [[2], [3]]], [3, 1, 2, 1]) == pytest.approx(5 / 3.5)
    assert imbalance([[[0, 1, 2, 3]]], [3, 1, 2, 1]) == 1


def test_s1k_is_even_over_two_nodes() -> None:
    """1,000 batches of 16 as long as s1K's, beside a sequence for every rank."""
    found = bench.measure(1000)
    assert found["two groups, balanced"]["mean"] <= 1.001
    assert found["two groups, balanced"]["worst"] <= 1.01
    assert 1.35 < found["one sequence a rank"]["mean"] < 1.55
