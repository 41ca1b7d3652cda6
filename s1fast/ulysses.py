"""Attention over a stream whose tokens are cut evenly over a group of ranks (Ulysses).

Everything but attention works token by token. Around attention an all-to-all turns token shards
into head shards and back: with u ranks each attends with H / u heads to the whole stream, so that
attention is as even as the rest.

    T tokens, H + 2 N heads  --deal-->  u T tokens, (H + 2 N) / u heads  --attend, collect-->  T, H

Floor for 32B, 38K tokens over 8 GPUs: a rank sends 7/8 of 4,750 x 56 heads x 256 bytes forward for
q, k, v, 60 MB, and 43 MB for the output; backward the same: 205 MB a layer, 0.7 ms at 300 GB/s.
Measured on an H100: not yet.

Backward of attention needs of its output only delta = rowsum(dO * O), which is formed where the
tokens are and sent with dO: the output is kept once, as the input of the next projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from s1fast import exposed
from s1fast.kernels import packed_attention as kernels
from s1fast.kernels.packed_attention import Backend, packed_attention


@dataclass(frozen=True)
class Group:
    """Some ranks with a communicator, by its name: a compiled graph can hold no more."""

    name: str
    size: int


def ulysses_attention(
    q_THK: Tensor,
    k_TNK: Tensor,
    v_TNK: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    backend: Backend | None = None,
    group: Group | None = None,
) -> Tensor:
    """packed_attention, where a group's ranks have a part of the stream each.

    Arguments and result are this rank's tokens; boundaries are those of the whole stream. Query
    heads must be a multiple of the group's size; key-value heads fewer than that are repeated. No
    group: the stream is whole. All backends compute the same; only ours keep the output once.
    """
    if group is None:
        return packed_attention(q_THK, k_TNK, v_TNK, cu_seqlens, max_seqlen, backend=backend)
    width = q_THK.shape[2]
    backend = backend or kernels.default_backend(q_THK.device, q_THK.dtype, width)
    if backend in kernels.OURS:
        return _Attention.apply(q_THK, k_TNK, v_TNK, cu_seqlens, group, backend)
    q, k, v = _ToHeads.apply(q_THK, k_TNK, v_TNK, group)
    out_THK = packed_attention(q, k, v, cu_seqlens, max_seqlen, backend=backend)
    return _ToTokens.apply(out_THK, group)


# -- tokens to heads and back ----------------------------------------------------------------------


def exchange(message: Tensor, group: Group) -> Tensor:
    """Row i of (u, ...) goes to rank i; row i of the result came from there."""
    return _exchange(message, group.name)


@torch.library.custom_op("s1fast::exchange", mutates_args=())
def _exchange(message: Tensor, group: str) -> Tensor:
    received = torch.empty_like(message)
    ranks = _resolve_process_group(group)  # type: ignore[arg-type]  # GroupName is a str
    with exposed.span():
        dist.all_to_all_single(received, message, group=ranks)
    return received


@_exchange.register_fake
def _(message: Tensor, group: str) -> Tensor:
    return torch.empty_like(message)


def to_heads(q_THK: Tensor, k_TNK: Tensor, v_TNK: Tensor, group: Group) -> list[Tensor]:
    """(T, heads, K) of this rank's tokens -> (u T, heads / u, K) of all, views of one buffer."""
    repeats = _repeats(k_TNK, group)
    if repeats > 1:
        k_TNK, v_TNK = (x.repeat_interleave(repeats, dim=1) for x in (k_TNK, v_TNK))
    return _deal([q_THK, k_TNK, v_TNK], group)


def to_heads_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, repeats: int, group: Group
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the dealt heads -> those of this rank's tokens."""
    dq, dk, dv = _collect([dq, dk, dv], group)
    if repeats > 1:  # bf16 is summed in fp32 within
        dk, dv = (x.unflatten(1, (-1, repeats)).sum(2) for x in (dk, dv))
    return dq, dk, dv


def _repeats(k_TNK: Tensor, group: Group) -> int:
    return max(1, group.size // k_TNK.shape[1])


def _deal(heads: list[Tensor], group: Group) -> list[Tensor]:
    num_tokens, _, width = heads[0].shape
    counts = [x.shape[1] // group.size for x in heads]
    message = heads[0].new_empty(group.size, num_tokens, sum(counts), width)
    for x, slot in zip(heads, message.split(counts, dim=2), strict=True):
        slot.copy_(x.unflatten(1, (group.size, -1)).transpose(0, 1))
    return list(exchange(message, group).flatten(0, 1).split(counts, dim=1))


def _collect(heads: list[Tensor], group: Group) -> list[Tensor]:
    """The inverse of _deal; contiguous results."""
    counts = [x.shape[1] for x in heads]
    joined = torch.cat(heads, dim=1) if len(heads) > 1 else heads[0].contiguous()
    received = exchange(joined.unflatten(0, (group.size, -1)), group).transpose(0, 1)
    return [x.flatten(1, 2).contiguous() for x in received.split(counts, dim=2)]


# -- any backend -----------------------------------------------------------------------------------


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_THK, k_TNK, v_TNK, group):
        ctx.group, ctx.repeats = group, _repeats(k_TNK, group)
        return tuple(to_heads(q_THK, k_TNK, v_TNK, group))

    @staticmethod
    def backward(ctx: Any, dq, dk, dv):
        return *to_heads_backward(dq, dk, dv, ctx.repeats, ctx.group), None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out_THK, group):
        ctx.group = group
        return _collect([out_THK], group)[0]

    @staticmethod
    def backward(ctx: Any, dout_THK):
        return _deal([dout_THK], ctx.group)[0], None


# -- ours, the output kept once --------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    """The graph's node; what computes is opaque operations, as in norm_qkv."""

    @staticmethod
    def forward(ctx: Any, q_THK, k_TNK, v_TNK, cu_seqlens, group, backend):
        ctx.group, ctx.repeats = group, _repeats(k_TNK, group)
        ctx.scale = q_THK.shape[2] ** -0.5
        heads = to_heads(q_THK, k_TNK, v_TNK, group)
        out_heads, lse2 = kernels.forward(*heads, cu_seqlens, True, ctx.scale, backend)
        (out_THK,) = _collect([out_heads], group)
        ctx.save_for_backward(*heads, lse2, out_THK, cu_seqlens)
        return out_THK

    @staticmethod
    def backward(ctx: Any, dout_THK):
        q, k, v, lse2, out_THK, cu_seqlens = ctx.saved_tensors
        dout, delta = _deal_gradient(dout_THK, kernels.delta(dout_THK, out_THK), ctx.group)
        saved = (q, k, v, delta, lse2, cu_seqlens)
        dq, dk, dv = kernels.backward(dout, *saved, True, ctx.scale)
        return *to_heads_backward(dq, dk, dv, ctx.repeats, ctx.group), None, None, None


def _deal_gradient(dout_THK: Tensor, delta_HT: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """dout (u T, H / u, K) and delta (H / u, u T) of this rank's heads, in one all-to-all.

    A message's row is a token: its heads' dout, their delta as pairs of bf16, and room that keeps
    the rows at multiples of 16 bytes, as the kernels' descriptors need them.
    """
    parts, (num_tokens, _, width) = group.size, dout_THK.shape
    heads = dout_THK.shape[1] // parts
    end = heads * width
    row = end + -(-2 * heads // 8) * 8
    message = dout_THK.new_empty(parts, num_tokens, row)
    dealt = message[..., :end].unflatten(2, (heads, width))
    dealt.copy_(dout_THK.unflatten(1, (parts, heads)).transpose(0, 1))
    deltas = message[..., end : end + 2 * heads].view(torch.float32)
    deltas.copy_(delta_HT.unflatten(0, (parts, heads)).transpose(1, 2))
    received = exchange(message, group).flatten(0, 1)
    delta = received[:, end : end + 2 * heads].view(torch.float32).t().contiguous()
    return received[:, :end].unflatten(1, (heads, width)), delta
