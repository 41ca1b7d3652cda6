"""What backward computes again instead of keeping: the least that fits, chosen for every stream.

    for Qwen2.5-32B in bf16        kept, a token and layer    time, computed again
    none     norms, gated product                  156 KB
    gate_up  and their projections                  45 KB    +19 %
    full     the whole layer                        10 KB    +33 %

A function of token count and budget alone: all ranks of a step choose the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch

from s1fast.kernels.linear_cross_entropy import CHUNK_BYTES
from s1fast.model import ModelConfig, Recompute, kept_bytes

Mode = Literal["auto", "none", "full"]

_IN_BACKWARD = 2
"""Layers' worth of "none" that the layer in backward holds: what it computes again, gradients."""
_UNSHARDED_LAYERS = 3
"""In use, the next in backward's order, and the buffer that it was gathered in."""
_COMMUNICATORS = 2 << 30
"""NCCL's buffers, which it takes when first used."""
_FRAGMENTATION = 0.04
"""Share of the memory that the allocator cannot put to use."""


def saved_bytes(config: ModelConfig, dtype: torch.dtype, ulysses: int = 1) -> dict[Recompute, int]:
    """Bytes a token and layer that forward keeps for backward.

    Args:
        ulysses: ranks that share a stream; key-value heads fewer than these are repeated.
    """
    dealt = replace(config, num_key_value_heads=max(config.num_key_value_heads, ulysses))
    return {what: kept_bytes(dealt, what, dtype) for what in get_args(Recompute)}


def choose_recompute(
    mode: Mode, num_layers: int, saved: dict[Recompute, int], num_tokens: int, budget_bytes: float
) -> list[Recompute]:
    """What each layer computes again, for a stream of num_tokens tokens on a rank.

    "auto" turns as few layers as fit from "none" to "gate_up", and when all are, from "gate_up" to
    "full". Early layers first: while they run backward, the later ones' activations are gone.
    A stream that does not fit even so has every layer "full".
    """
    if mode != "auto":
        return [mode] * num_layers
    most = budget_bytes / max(1, num_tokens) - _IN_BACKWARD * saved["none"]  # bytes a token
    chosen: list[Recompute] = ["none"] * num_layers
    steps: Sequence[tuple[Recompute, Recompute]] = (("none", "gate_up"), ("gate_up", "full"))
    for more, less in steps:
        excess = sum(saved[what] for what in chosen) - most
        if excess <= 0:
            break
        count = math.ceil(min(num_layers, excess / (saved[more] - saved[less])))
        chosen[:count] = [less] * count
    return chosen


def activation_budget(free_bytes: int, config: ModelConfig, itemsize: int, world: int) -> int:
    """Bytes for what forward keeps, of those free once weights and moments are there.

    Most is kept when backward begins. Beside it there are then the fp32 gradients of this rank's
    shard from the pass before, some layers' weights, and either the head with its gradient, which
    is copied to fp32 to be reduced, or that copy still in flight while the last layer's follows.
    """
    num_layers, head = config.num_hidden_layers, config.vocab_size * config.hidden_size
    embeddings = head * (1 if config.tie_word_embeddings else 2)
    layer = (config.num_weights - embeddings) // num_layers
    reducing = max(head * (2 * itemsize + 4), head * 4 + layer * (itemsize + 4))
    taken = (
        4 * config.num_weights // world
        + max(
            2 * head * itemsize + CHUNK_BYTES["cuda"],
            _UNSHARDED_LAYERS * layer * itemsize + reducing,
        )
        + _COMMUNICATORS
        + int(_FRAGMENTATION * free_bytes)
    )
    return max(0, free_bytes - taken)
