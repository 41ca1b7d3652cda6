"""Drawing the next token: Gumbel-max over filtered logits, with noise that depends only on
(seed, sample, position, token id).

    token = argmax_v (logit_v / temperature + gumbel(seed, sample, position, v)),  v in the kept set

So a row's draw does not depend on its batch, rank or schedule, and a speculative draft can be
checked by drawing again. This is the reference; sample_triton.py draws on the device.

What is kept is decided on integers: an id's distance from the likeliest in 2^-20 of a bit, and its
weight 2^(30 - distance / 2^20), by a polynomial in whole numbers. A distance takes a division, a
difference and a product that IEEE 754 rounds in one way everywhere, so the device keeps the same
set. What may differ there is the last bit of the noise's logarithms, which shows where two scores
tie.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FIXED_POINT = 1 << 30
"""Weights are relative to the likeliest id's, as integers: their sums have no rounding, so the set
that top-p keeps does not depend on the order of summation."""

PER_NAT = 1.4426950408889634 * (1 << 20)
"""Distances in a difference of 1 between logits."""
FAR = 31 << 20
"""No distance is larger: there the weight is 0."""
POWER = (0xB171E5B0, 0x3D7CB2F8, 0x0E28A02E, 0x025BFAD3, 0x003E27EE)
"""2^-f = 1 - f (a - f (b - f (c - f (d - f e)))) for f in [0, 1), in 2^-32: within 1.3e-7."""


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


def fixed_point(share: float) -> int:
    """A share in [0, 1] of FIXED_POINT, rounded up."""
    return math.ceil(share * FIXED_POINT)


def distance(logits_V: Tensor) -> Tensor:
    """How far ids lie below the likeliest, in 2^-20 of a bit, rounded down: int64 in [0, FAR]."""
    below_V = (logits_V.max() - logits_V) * PER_NAT
    return below_V.clamp(max=FAR).long()


def weight(distance_V: Tensor) -> Tensor:
    """Probability relative to the likeliest id's, in 2^-30, of distances: int64."""
    fraction_V = (distance_V & 0xFFFFF) << 11  # in 2^-31, so that no product passes 2^63
    power_V = torch.full_like(distance_V, POWER[-1])
    for term in POWER[-2::-1]:
        power_V = term - (power_V * fraction_V >> 31)
    return FIXED_POINT - (power_V * fraction_V >> 33) >> (distance_V >> 20)


def share_of(total: int, share: int) -> int:
    """total * share / FIXED_POINT, rounded up; both below 2^62."""
    high, low = total >> 30, total & (FIXED_POINT - 1)
    return high * share + (low * share + FIXED_POINT - 1 >> 30)


def keep_mask(logits_V: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Which ids stay: top-k, then top-p of what top-k left, then min-p. Equals stay together, and
    equal are two whose distances are.

    Args:
        logits_V: fp32, already divided by the temperature; -inf for forbidden ids.
        top_k: how many, 0 for all.
        top_p: share of probability to keep, in (0, 1].
        min_p: least probability relative to the likeliest id's, in [0, 1].
    """
    distance_V = distance(logits_V)
    weight_V = weight(distance_V)
    limit = FAR
    if 0 < top_k < len(logits_V):
        limit = int(distance_V.kthvalue(top_k).values)
    if top_p < 1.0:
        # The nearest limit whose survivors have the share.
        sorted_V, order_V = distance_V.sort()
        mass_V = (weight_V[order_V] * (sorted_V <= limit)).cumsum(0)
        need = share_of(int(mass_V[-1]), fixed_point(top_p))
        limit = min(limit, int(sorted_V[int((mass_V < need).sum())]))
    near_V = (distance_V <= limit) & (weight_V >= fixed_point(min_p))
    return near_V & (logits_V > -math.inf)


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
    # By a tensor: a GPU divides by a number as it multiplies by the number's inverse.
    scaled_V = logits_V / logits_V.new_full((1,), temperature)
    kept = keep_mask(scaled_V, top_k, top_p, min_p).nonzero()[:, 0]
    return kept[(scaled_V[kept] + gumbel(seed, sample, position, kept)).argmax()]
