"""Causal attention over a packed stream: each sequence attends to itself alone.

    out_t = sum_{s <= t, same sequence} softmax_s(q_t . k_s * scale) v_s

FLOPs forward: 2 H K sum_i n_i^2 (the causal half of 4 H K n^2), backward 2.5 times that. Floor for
an s1K batch of 16 sequences of 4,900 tokens, 40 heads of 128: 3.9 TFLOP forward, 5.3 ms at
742 TFLOP/s.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_attention(
    q_THK: Tensor,
    k_TNK: Tensor,
    v_TNK: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    softmax_scale: float | None = None,
) -> Tensor:
    """Variable-length causal attention with grouped key-value heads.

    Args:
        q_THK: queries of the packed stream; H a multiple of N.
        k_TNK, v_TNK: keys and values, same T, dtype and device.
        cu_seqlens: (B + 1,) int32 sequence boundaries, on the host: slicing by it never waits for
            a device.
        max_seqlen: length of the longest sequence.
        softmax_scale: K ** -0.5 unless given.

    Returns:
        (T, H, K) in q's dtype. Tokens beyond cu_seqlens[-1] get zeros.

    Raises:
        ValueError: boundaries that do not rise, pass T or disagree with max_seqlen; heads that do
            not divide.
    """
    bounds = _checked_bounds(q_THK, k_TNK, cu_seqlens, max_seqlen)
    num_groups = q_THK.shape[1] // k_TNK.shape[1]
    outs = []
    for start, stop in pairwise(bounds):
        if start == stop:
            continue
        # (1, heads, tokens, K): four dimensions are what selects torch's fused CPU kernel.
        q, k, v = (x[start:stop].transpose(0, 1)[None] for x in (q_THK, k_TNK, v_TNK))
        if num_groups > 1:
            k, v = (x.repeat_interleave(num_groups, dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale)
        outs.append(out[0].transpose(0, 1))
    outs.append(torch.zeros_like(q_THK[bounds[-1] :]))
    return torch.cat(outs)


def _checked_bounds(q_THK: Tensor, k_TNK: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> list[int]:
    if cu_seqlens.device.type != "cpu":
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}; pass the host copy")
    bounds: list[int] = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in pairwise(bounds)]
    if not bounds or bounds[0] != 0 or min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens must start at 0 and never fall, got {bounds}")
    if bounds[-1] > len(q_THK):
        raise ValueError(f"cu_seqlens ends at {bounds[-1]} but there are {len(q_THK)} tokens")
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(f"max_seqlen {max_seqlen} is below the longest sequence, {max(lengths)}")
    if q_THK.shape[1] % k_TNK.shape[1]:
        raise ValueError(f"{q_THK.shape[1]} query heads are no multiple of {k_TNK.shape[1]}")
    return bounds
