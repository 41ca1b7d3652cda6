"""What is computed again: as little as fits, early layers first, whatever the budget."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
import torch

from rank_checks import model_config
from s1fast.model import ModelConfig, Recompute, kept_bytes
from s1fast.recompute import activation_budget, choose_recompute, saved_bytes

SAVED: dict[Recompute, int] = {"none": 100, "gate_up": 30, "full": 10}
COST: dict[Recompute, float] = {"none": 0, "gate_up": 0.194, "full": 0.333}  # of a layer's time
WORKING = 2 * 100
"""Bytes a token that the layer in backward holds beside what is kept."""


def qwen_32b() -> ModelConfig:
    return model_config(
        hidden_size=5120,
        intermediate_size=27648,
        num_hidden_layers=64,
        num_attention_heads=40,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=152064,
    )


def kept(chosen: list[Recompute]) -> int:
    return sum(SAVED[what] for what in chosen)


@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_no_cheaper_choice_fits(num_layers: int) -> None:
    """Beside all mixtures of the two policies that a budget chooses between, at every budget."""
    for budget in range(0, 100 * num_layers + 20, 5):
        tokens = 7
        chosen = choose_recompute("auto", num_layers, SAVED, tokens, tokens * (budget + WORKING))
        least = 10 * num_layers
        assert kept(chosen) <= max(budget, least)
        cost = sum(COST[what] for what in chosen)
        kinds: list[list[Recompute]] = [["none", "gate_up"], ["gate_up", "full"]]
        for pair in kinds:
            for other in itertools.combinations_with_replacement(pair, num_layers):
                if kept(list(other)) <= budget:
                    assert cost <= sum(COST[what] for what in other) + 1e-9


def test_early_layers_first() -> None:
    """When the last layers run backward, theirs is all that may be computed again beside it."""
    order = list(get_args(Recompute))
    for budget in range(0, 1000, 10):
        chosen = choose_recompute("auto", 10, SAVED, 1, budget + WORKING)
        ranks = [order.index(what) for what in chosen]
        assert ranks == sorted(ranks, reverse=True)


def test_more_tokens_never_keep_more_a_token() -> None:
    before = choose_recompute("auto", 64, SAVED, 1, 1e6)
    for tokens in range(2, 2000, 37):
        chosen = choose_recompute("auto", 64, SAVED, tokens, 1e6)
        assert kept(chosen) <= kept(before)
        before = chosen
    assert before[0] != "none"


@pytest.mark.parametrize("mode", ["none", "full"])
def test_fixed_modes_ask_no_budget(mode: str) -> None:
    assert choose_recompute(mode, 3, SAVED, 10**9, 0) == [mode] * 3  # type: ignore[arg-type]


def test_a_boundless_budget_recomputes_nothing() -> None:
    assert choose_recompute("auto", 3, SAVED, 10**9, float("inf")) == ["none"] * 3


def test_saved_bytes_are_the_models() -> None:
    """Repeated key-value heads are kept as often as they are repeated."""
    config = qwen_32b()
    for what in get_args(Recompute):
        assert saved_bytes(config, torch.bfloat16, 8)[what] == kept_bytes(
            config, what, torch.bfloat16
        )
    more = saved_bytes(config, torch.bfloat16, 40)
    assert more["none"] - saved_bytes(config, torch.bfloat16)["none"] == 2 * 32 * 128 * 2
    assert more["full"] == 5120 * 2


def test_the_plan_of_the_16_gpu_run() -> None:
    """32B on 16 GPUs of 80 GB with bf16 moments, as the plan reckons it: weights 8.2 GB and moments
    8.2 GB are there, gradients of as much come, and 10 to 15 GB are for what passes. At 4,700
    tokens a few layers in ten compute gate and up again, at 6,500 half, never a whole layer."""
    config = qwen_32b()
    free = int(79e9 - 2 * 4 * config.num_weights / 16)
    budget = activation_budget(free, config, 2, 16)
    assert 10e9 < free - budget - 8.2e9 < 15e9
    saved = saved_bytes(config, torch.bfloat16, 8)
    shares = {}
    for tokens in (2500, 4700, 6500):
        chosen = choose_recompute("auto", 64, saved, tokens, budget)
        assert "full" not in chosen
        shares[tokens] = chosen.count("gate_up") / 64
    assert shares[2500] == 0 and 0 < shares[4700] < 0.4 and 0.4 < shares[6500] < 0.7, shares
