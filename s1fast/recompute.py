"""What backward computes again instead of keeping: the least that fits, chosen for every stream.

    for Qwen2.5-32B in bf16        kept, a token and layer    time, computed again
    none     norms, gated product                  156 KB
    gate_up  and their projections                  45 KB    +19 %
    full     the whole layer                        10 KB    +33 %

Backward frees what a layer kept and leaves its gradient, layer by layer from the last one down. So
in a step's first pass the two are never there in full together: when k layers are left, there is
what these k kept and the gradients of the others, and the largest such sum must fit. Later passes
find all gradients there.

A function of token count, pass and budget alone: all ranks of a step choose the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from s1fast.kernels.linear_cross_entropy import CHUNK_BYTES
from s1fast.metrics import layer_parameters
from s1fast.model import ModelConfig, Recompute, kept_bytes

Mode = Literal["auto", "none", "full"]

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


@dataclass(frozen=True)
class Memory:
    """What a rank has for a pass, and what the layers put there, in bytes.

    budget: for what is kept and for gradients. saved: a token's in a layer, by policy. at_work: a
    token's in the layer that runs backward. gradient: of a layer, this rank's rows in fp32.
    """

    num_layers: int
    budget: float
    saved: dict[Recompute, int]
    at_work: int
    gradient: int

    def needed(self, what: Sequence[Recompute], num_tokens: int, first_pass: bool = True) -> int:
        """The largest sum of kept and gradients during backward, with the layer at work."""
        most = held = len(what) * self.gradient  # no layer is left
        for policy in what:
            held += self.saved[policy] * num_tokens - (self.gradient if first_pass else 0)
            most = max(most, held)
        return most + self.at_work * num_tokens

    def choose(self, mode: Mode, num_tokens: int, first_pass: bool = True) -> list[Recompute]:
        """What each layer computes again, for a stream of num_tokens tokens on a rank.

        "auto" turns as few layers as fit from "none" to "gate_up", and when all are, from
        "gate_up" to "full". Early layers first: while they run backward, the later ones'
        activations are gone. A stream that does not fit even so has every layer "full".
        """
        if mode != "auto":
            return [mode] * self.num_layers
        steps: Sequence[tuple[Recompute, Recompute]] = (("none", "gate_up"), ("gate_up", "full"))
        for more, less in steps:
            for count in range(self.num_layers):
                chosen = [less] * count + [more] * (self.num_layers - count)
                if self.needed(chosen, num_tokens, first_pass) <= self.budget:
                    return chosen
        return ["full"] * self.num_layers


def layer_memory(
    config: ModelConfig, dtype: torch.dtype, world: int, ulysses: int, budget: float
) -> Memory:
    """The memory of a rank of `world`, `ulysses` of which share a stream."""
    gate_up = 2 * config.intermediate_size * dtype.itemsize
    return Memory(
        num_layers=config.num_hidden_layers,
        budget=budget,
        saved=saved_bytes(config, dtype, ulysses),
        at_work=2 * gate_up + 4 * config.hidden_size * dtype.itemsize,
        gradient=4 * layer_parameters(config) // world,
    )


def working_bytes(config: ModelConfig, dtype: torch.dtype, world: int) -> dict[str, int]:
    """What logits, gathered weights and gradients being reduced take, in the fullest moment.

    In the loss: the head's weight, its gradient, a chunk of logits, two layers gathered. When the
    head's gradient is reduced: the same without logits, and the gradient in fp32. When a layer runs
    backward: three gathered, its gradient, and in fp32 what is being reduced, two layers or the
    head. On one rank nothing is copied to be gathered or reduced, but the weights' casts are as
    large.
    """
    layer, head = layer_parameters(config), config.vocab_size * config.hidden_size
    moments = (  # gathered, gradient, reduced, logits
        (head + 2 * layer, head, 0, CHUNK_BYTES["cuda"]),
        (head + 2 * layer, head, head, 0),
        (3 * layer, layer, max(2 * layer, head), 0),
    )
    size = dtype.itemsize
    gathered, gradient, reduced, logits = max(
        moments, key=lambda m: (m[0] + m[1]) * size + 4 * m[2] + m[3]
    )
    embeddings = config.num_weights - config.num_hidden_layers * layer
    return {
        "gathered weights": gathered * size,
        "gradients of a unit": gradient * size,
        "gradients being reduced": 4 * reduced,
        "gradients of embedding and head": 4 * embeddings // world,
        "logits of a chunk": logits,
    }


def reserve_bytes(free_bytes: int) -> dict[str, int]:
    """What no tensor of the model or the step accounts for."""
    return {
        "communicators": _COMMUNICATORS,
        "lost by the allocator": int(_FRAGMENTATION * free_bytes),
    }


def activation_budget(free_bytes: int, config: ModelConfig, dtype: torch.dtype, world: int) -> int:
    """Bytes for what forward keeps and for the layers' gradients, of those free once weights and
    moments are there."""
    taken = working_bytes(config, dtype, world) | reserve_bytes(free_bytes)
    return max(0, free_bytes - sum(taken.values()))
