"""What is computed again: the least that fits, and never more than there is room for."""

from __future__ import annotations

from itertools import product
from typing import get_args

import pytest
import torch

from s1fast.model import Recompute
from s1fast.published import model_config
from s1fast.recompute import Memory, activation_budget, layer_memory, saved_bytes, working_bytes

QWEN = model_config("Qwen/Qwen2.5-32B-Instruct")
assert QWEN is not None
COST = {"none": 0.0, "gate_up": 0.19, "full": 0.33}
SMALL = Memory(
    num_layers=5,
    budget=0.0,
    saved={"none": 16, "gate_up": 5, "full": 1},
    at_work=20,
    gradient=300,
)


def by_hand(memory: Memory, what: list[Recompute], tokens: int, first: bool = True) -> int:
    """Layer by layer: k are left, the others' gradients are there, after a first pass all."""
    sums = [
        sum(memory.saved[policy] * tokens for policy in what[:k])
        + (len(what) - k if first else len(what)) * memory.gradient
        for k in range(len(what) + 1)
    ]
    return max(sums) + memory.at_work * tokens


@pytest.mark.parametrize("tokens", [1, 10, 100, 1000])
def test_needed_is_the_fullest_moment_of_backward(tokens: int) -> None:
    for what in product(get_args(Recompute), repeat=5):
        for first in (True, False):
            found = SMALL.needed(what, tokens, first)
            assert found == by_hand(SMALL, list(what), tokens, first)


def test_the_least_that_fits_is_chosen() -> None:
    """Among all early-layers-first choices, for every budget: the first that fits, by cost."""
    tokens, layers = 100, 5
    order: list[list[Recompute]] = [
        [less] * n + [more] * (layers - n)
        for more, less in (("none", "gate_up"), ("gate_up", "full"))
        for n in range(layers)
    ] + [["full"] * layers]
    seen = set()
    for budget, first in product(range(0, 12000, 37), (True, False)):
        memory = Memory(layers, budget, SMALL.saved, SMALL.at_work, SMALL.gradient)
        found = memory.choose("auto", tokens, first)
        fitting = [what for what in order if by_hand(memory, what, tokens, first) <= budget]
        best = min(fitting, key=lambda what: sum(COST[p] for p in what), default=order[-1])
        assert found == best
        seen.add(tuple(found))
    # Where gradients fill the fullest moment, two choices need the same, and the first is taken.
    assert len(seen) >= len(order) - 1


def test_more_tokens_never_compute_less_again() -> None:
    memory = layer_memory(QWEN, torch.bfloat16, 16, 8, 50e9)
    costs = [sum(COST[p] for p in memory.choose("auto", t)) for t in range(100, 60000, 500)]
    assert costs == sorted(costs)
    assert costs[0] == 0.0 and costs[-1] == pytest.approx(0.33 * 64)


def test_what_is_asked_for_is_done() -> None:
    memory = layer_memory(QWEN, torch.bfloat16, 16, 8, 0.0)
    assert memory.choose("none", 10**9) == ["none"] * 64
    assert memory.choose("full", 1) == ["full"] * 64


def test_kv_heads_are_kept_as_often_as_they_are_repeated() -> None:
    """14 query and 2 key-value heads of 64 over 4 ranks: two more of each, in bf16."""
    small = model_config("Qwen/Qwen2.5-0.5B")
    assert small is not None
    alone, dealt = (saved_bytes(small, torch.bfloat16, u) for u in (1, 4))
    assert dealt["none"] - alone["none"] == 2 * 2 * 64 * 2
    assert dealt["full"] == alone["full"] == 896 * 2


def test_working_bytes_of_qwen_32b() -> None:
    """By hand, in GB: head 0.7786e9 weights, a layer 0.4876e9. The head's moment is the fuller."""
    found = working_bytes(QWEN, torch.bfloat16, 16)
    head, layer = 152064 * 5120, 487_587_840
    assert found == {
        "gathered weights": 2 * (head + 2 * layer),
        "gradients of a unit": 2 * head,
        "gradients being reduced": 4 * head,
        "gradients of embedding and head": 4 * 2 * head // 16,
        "logits of a chunk": 0,
    }
    assert activation_budget(1 << 30, QWEN, torch.bfloat16, 16) == 0
    free = 60 << 30
    assert 0 < activation_budget(free, QWEN, torch.bfloat16, 16) < free - sum(found.values())
