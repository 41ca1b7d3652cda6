"""Keys and values of running rows: one contiguous stretch a row, grown by doubling.

A row's newest entries can be taken back by writing over them: the caller says at which position
each token of a step lies, and everything beyond a row's last written position is unread.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from s1fast.kernels.packed_attention import packed_attention
from s1fast.model import ModelConfig


class KVCache:
    """Cache of rows 0 .. B - 1. Before each forward pass `plan` tells what it will bring.

    Layout: k and v are (L, B, N, S, K), so that a row's head is contiguous.
    """

    def __init__(
        self, config: ModelConfig, num_rows: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        n, k = config.num_key_value_heads, config.head_dim
        shape = (config.num_hidden_layers, num_rows, n, 0, k)
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty(shape, device=device, dtype=dtype)

    def plan(self, starts: Sequence[int], lengths: Sequence[int]) -> None:
        """Row b brings lengths[b] tokens at positions starts[b], starts[b] + 1, ..."""
        device = self.k.device
        stops = [start + length for start, length in zip(starts, lengths, strict=True)]
        self._reserve(max(stops))
        longest = max(lengths)
        self._fresh = not any(starts)
        self._lengths, self._longest, self._max_stop = lengths, longest, max(stops)
        self._cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(
            0, dtype=torch.int32
        )
        length_B = torch.tensor(lengths, device=device)
        start_B = torch.tensor(starts, device=device)
        row_T = torch.arange(len(lengths), device=device).repeat_interleave(length_B)
        slot_T = torch.arange(len(row_T), device=device)
        slot_T = slot_T - (length_B.cumsum(0) - length_B)[row_T]  # place in its row's step
        self._row_T, self._slot_T, self._position_T = row_T, slot_T, start_B[row_T] + slot_T
        # Where a token's heads lie in a layer of the cache, seen as one list of vectors.
        head_N = torch.arange(self.k.shape[2], device=device)
        head_TN = row_T[:, None] * self.k.shape[2] + head_N
        self._place_TN = (head_TN * self.k.shape[3] + self._position_T[:, None]).flatten()
        self._seen_BCS = None
        if not self._fresh and (longest > 1 or min(stops) < self._max_stop):
            # Query i of row b sees keys up to its own position; what a row shorter than the longest
            # has beyond its step is computed and dropped.
            last_BC = start_B[:, None] + torch.arange(longest, device=device)
            self._seen_BCS = torch.arange(self._max_stop, device=device) <= last_BC[..., None]

    @property
    def positions_T(self) -> Tensor:
        """Position of each token of the planned step in its own row."""
        return self._position_T

    def attend(self, layer: int, q_THK: Tensor, k_TNK: Tensor, v_TNK: Tensor) -> Tensor:
        """Stores the step's keys and values, and attends over everything before."""
        for cache, fresh_TNK in ((self.k, k_TNK), (self.v, v_TNK)):
            cache[layer].flatten(0, 2).index_copy_(0, self._place_TN, fresh_TNK.flatten(0, 1))
        if self._fresh:
            return packed_attention(q_THK, k_TNK, v_TNK, self._cu_seqlens, self._longest)
        num_rows, kv_heads = len(self._lengths), k_TNK.shape[1]
        k, v = (cache[layer, :num_rows, :, : self._max_stop] for cache in (self.k, self.v))
        # The query heads of a group share keys and masks: they are one longer row of queries.
        q_TNGK = q_THK.unflatten(1, (kv_heads, -1))
        groups = q_TNGK.shape[2]
        mask = None
        if self._seen_BCS is not None:
            mask = self._seen_BCS[:, None, None].expand(-1, -1, groups, -1, -1).flatten(2, 3)
        if self._longest == 1:  # one token a row: the stream is the batch
            out = F.scaled_dot_product_attention(q_TNGK, k, v, attn_mask=mask)
            return out.flatten(1, 2)
        q = q_THK.new_zeros(num_rows, self._longest, *q_TNGK.shape[1:])
        q[self._row_T, self._slot_T] = q_TNGK
        q = q.permute(0, 2, 3, 1, 4).flatten(2, 3)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = out.unflatten(2, (groups, self._longest)).permute(0, 3, 1, 2, 4)
        return out[self._row_T, self._slot_T].flatten(1, 2)

    def move(self, source: int, target: int) -> None:
        """Row `target` becomes a copy of row `source`."""
        self.k[:, target] = self.k[:, source]
        self.v[:, target] = self.v[:, source]

    def _reserve(self, length: int) -> None:
        held = self.k.shape[3]
        if length <= held:
            return
        grow = max(length, 2 * held, 256) - held
        self.k = F.pad(self.k, (0, 0, 0, grow))
        self.v = F.pad(self.v, (0, 0, 0, grow))
