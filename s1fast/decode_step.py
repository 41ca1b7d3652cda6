"""What the device does in a step of the captured loop, and the chunks of prompts before it.

A step is C token slots, each with its token, position and row, laid out on the device by the step
before: forward, draw, automaton, next layout. Nothing in it depends on a value that the host would
have to read, so that it can be captured once and replayed. A chunk is many tokens of few rows, run
from the host, and draws nothing.

Launches of a step: 4 + 6 L, by torch's products 5 + 9 L. Floor of a step: its weights are
read once, 2 bytes each in bf16, and the keys and values of its rows: 22 ms and 2.7 us a position
for Qwen2.5-32B at 3.0 TB/s. On an H200, whose floor is 14.7 ms at 8K, by torch's products: 19.1 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from s1fast.kernels.decode_attention import decode_attention, decode_workspace, prefill_attention
from s1fast.kernels.device_rows import Rows, Slots
from s1fast.kernels.page_append import append_qkv
from s1fast.kv_cache import KVCache
from s1fast.matmul import Matmul
from s1fast.model import Layer, Model, inverse_frequencies
from s1fast.tensor_parallel import Ranks


@dataclass(frozen=True)
class Chunk:
    """Tokens at positions start, start + 1, ... of one row, by its line."""

    line: int
    start: int
    count: int


class DecodeStep:
    """The forward pass over slots, on weights that are not moved any more.

    Args:
        max_slots: of any step.
        ranks: over which partial results are summed, those of the first holding the residual, and
            logits joined.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        rows: Rows,
        matmul: Matmul,
        max_slots: int,
        ranks: Ranks | None,
    ) -> None:
        self.model, self.cache, self.rows, self.matmul = model, cache, rows, matmul
        self._ranks = ranks
        self._layers = cast(list[Layer], list(model.layers))
        device = cache.k.device
        self._position_X = torch.arange(rows.ids_RX.shape[1], dtype=torch.int32, device=device)
        c = model.config
        if ranks is not None:
            ranks.sum_small(max_slots * c.hidden_size, model.compute_dtype, device)
        self._workspace = decode_workspace(
            max_slots, c.num_attention_heads, c.num_key_value_heads, c.head_dim, device
        )
        freq_R = inverse_frequencies(model.config).to(device)
        angle_XR = self._position_X[:, None].float() * freq_R
        self._cos_XR, self._sin_XR = angle_XR.cos(), angle_XR.sin()

    def logits(self, slots: Slots) -> Tensor:
        """(C, V) logits after each slot; of slots that are not live, anything."""
        hidden_CD = self._embed(slots.token_C)
        for layer in range(len(self._layers)):
            q_CHK = self._before(layer, hidden_CD, slots.position_C, slots.line_C, slots.live)
            out_CHK = decode_attention(
                q_CHK,
                self.cache.k[layer],
                self.cache.v[layer],
                self.rows.table_RP,
                slots.line_C,
                slots.position_C,
                workspace=self._workspace,
            )
            hidden_CD = self._after(layer, out_CHK, hidden_CD, slots.live)
        head = self.model.head
        logits_CV = self.matmul(
            hidden_CD, self.model.head_weight, norm_K=head.norm, eps=head.eps, live=slots.live
        )
        vocab_size = self.model.config.vocab_size
        return logits_CV if self._ranks is None else self._ranks.join(logits_CV, vocab_size)

    def prefill(self, chunks: Sequence[Chunk]) -> None:
        """Computes keys and values of tokens that lie in the rows already."""
        rows = self.rows
        token_T = _joined([rows.ids_RX[c.line, c.start : c.start + c.count] for c in chunks])
        position_T = _joined([self._position_X[c.start : c.start + c.count] for c in chunks])
        line_T = _joined([token_T.new_full((c.count,), c.line) for c in chunks])
        hidden_TD = self._embed(token_T)
        last = len(self._layers) - 1
        for layer in range(last + 1):
            q_THK = self._before(layer, hidden_TD, position_T, line_T, None)
            if layer == last:
                return  # what follows would make logits
            k, v, at, outs = self.cache.k[layer], self.cache.v[layer], 0, []
            for c in chunks:
                q = q_THK[at : at + c.count]
                outs.append(prefill_attention(q, k, v, rows.table_RP[c.line], c.start))
                at += c.count
            hidden_TD = self._after(layer, _joined(outs), hidden_TD, None)

    def _embed(self, token_T: Tensor) -> Tensor:
        return F.embedding(token_T, self.model.embed.weight)

    def _before(
        self,
        layer: int,
        hidden_TD: Tensor,
        position_T: Tensor,
        line_T: Tensor,
        live: Tensor | None,
    ) -> Tensor:
        """Up to attention: queries; keys and values go to their pages."""
        weights, c = self._layers[layer], self.model.config
        qkv_TQ = self.matmul(
            hidden_TD, weights.qkv_weight, norm_K=weights.input_norm, eps=c.rms_norm_eps, live=live
        )
        return append_qkv(
            qkv_TQ,
            weights.qkv_bias,
            self._cos_XR,
            self._sin_XR,
            position_T,
            line_T,
            self.rows.table_RP,
            self.cache.k[layer],
            self.cache.v[layer],
            c.num_attention_heads,
        )

    def _after(self, layer: int, out_THK: Tensor, hidden_TD: Tensor, live: Tensor | None) -> Tensor:
        """From attention to the next layer."""
        weights, c = self._layers[layer], self.model.config
        hidden_TD = self._add(out_THK.flatten(1), weights.o_weight, hidden_TD, live)
        gated_TF = self.matmul(
            hidden_TD,
            weights.gate_up_weight,
            norm_K=weights.post_norm,
            eps=c.rms_norm_eps,
            swiglu=True,
            live=live,
        )
        return self._add(gated_TF, weights.down_weight, hidden_TD, live)

    def _add(self, x: Tensor, weight: Tensor, hidden_TD: Tensor, live: Tensor | None) -> Tensor:
        """hidden + x @ weight.T, over all ranks: the residual is part of one rank's sum."""
        if self._ranks is None:
            return self.matmul(x, weight, residual_MN=hidden_TD, live=live)
        residual = None if self._ranks.rank else hidden_TD
        return self._ranks.reduce(self.matmul(x, weight, residual_MN=residual, live=live))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
