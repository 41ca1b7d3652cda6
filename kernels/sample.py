"""Drawing the next token: Gumbel-max over filtered logits, with noise that depends only on
(seed, sample, position, token id).

    token = argmax_v (logit_v / temperature + gumbel(seed, sample, position, v)),  v in the kept set

So a row's draw does not depend on its batch, rank or schedule, and a speculative draft can be
checked by drawing again. One read of the logits: 4 V bytes a row; floor for V 152,064 at 3.0 TB/s:
0.2 us a row, so a launch costs more than the work.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FIXED_POINT = 1 << 30
"""Probabilities relative to the largest one, as integers: their sums have no rounding, so the set
that top-p keeps does not depend on the order of summation."""


def philox(counter: tuple[Tensor | int, ...], key: tuple[int, int], like: Tensor) -> Tensor:
    """First word of Philox4x32-10 (Salmon et al., SC 2011, "Parallel random numbers").

    Args:
        counter: four 32-bit words, integers or int64 tensors that broadcast.
        key: two 32-bit words.
        like: int64 tensor that gives the shape and device.

    Returns:
        int64 values in [0, 2^32).
    """
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = (torch.zeros_like(like) + c for c in counter)
    k0, k1 = key
    for _ in range(10):
        # 32 x 32 -> 64 bits in int64: split the constant so that no product passes 2^63.
        hi0, lo0 = _mul_wide(0xD2511F53, c0)
        hi1, lo1 = _mul_wide(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0


def _mul_wide(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b for 32-bit a and b (int64 tensor)."""
    low = (a & 0xFFFF) * b  # < 2^48
    high = (a >> 16) * b + (low >> 16)  # < 2^49
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def gumbel(seed: int, sample: int, position: int, token: Tensor) -> Tensor:
    """fp32 Gumbel noise for token ids (int64) at an absolute position of a sample.

    Key = (low word of seed, sample), counter = (position, token, high word of seed, 0). The top 23
    bits and a half give u in (0, 1), never 0 or 1 in fp32.
    """
    word = philox(
        (position, token, (seed >> 32) & 0xFFFFFFFF, 0), (seed & 0xFFFFFFFF, sample), token
    )
    u = ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23
    return -torch.log(-torch.log(u))


def keep_mask(logits_V: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Which ids stay: top-k, then top-p of what top-k left, then min-p. Equals stay together.

    Args:
        logits_V: fp32, already divided by the temperature; -inf for forbidden ids.
        top_k: how many, 0 for all.
        top_p: share of probability to keep, in (0, 1].
        min_p: least probability relative to the likeliest id's, in [0, 1].
    """
    keep = logits_V > -math.inf
    if 0 < top_k < len(logits_V):
        keep &= logits_V >= logits_V.topk(top_k).values[-1]
    weight_V = ((logits_V - logits_V.max()).exp().double() * FIXED_POINT).long() * keep
    if top_p < 1.0:
        # The largest threshold whose survivors reach the share: found among the sorted weights.
        sorted_V = weight_V.sort(descending=True).values
        mass_V = sorted_V.cumsum(0)
        need = math.ceil(top_p * int(mass_V[-1]))
        keep &= weight_V >= sorted_V[int((mass_V < need).sum())]
    if min_p > 0.0:
        keep &= weight_V >= math.ceil(min_p * FIXED_POINT)
    return keep


def sample(
    logits_V: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    sample: int,
    position: int,
) -> Tensor:
    """Draws one id for one row; temperature 0 is the argmax, the lowest id among equals.

    Args:
        logits_V: (V,) any floating dtype; forbidden ids at -inf.
        temperature, top_k, top_p, min_p: see keep_mask; applied in this order.
        seed: 64 bits; sample: index among the request's n; position: absolute position of the
            token that is drawn.

    Returns:
        () int64 on the logits' device.
    """
    logits_V = logits_V.float()
    if temperature == 0.0:
        return logits_V.argmax()
    scaled_V = logits_V / temperature
    kept = keep_mask(scaled_V, top_k, top_p, min_p).nonzero()[:, 0]
    return kept[(scaled_V[kept] + gumbel(seed, sample, position, kept)).argmax()]
