"""The way into attention: norm, fused projection, rotary embedding.

    y = rms_norm(hidden) * norm
    [q, k, v] = y @ weight.T + bias
    q, k <- rope(q), rope(k)

FLOPs: 2 T D (H + 2N) K forward, twice that backward. Floor at T 4,700, D 5,120, 40 + 2 x 8 heads of
128: 345 GFLOP, 0.49 ms at 700 TFLOP/s; around it norm and rope move 2.3e8 bytes, 0.08 ms.

What is kept for backward is the input, its rstd and what attention keeps anyway: q, k, v. The norm
is computed again; no product is. The residual stream passes through the operation, so that its
gradient is added inside the norm's backward and not by a pass of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from s1fast.kernels import rms_norm, rope
from s1fast.kernels.arguments import wide
from s1fast.kernels.linear import cast


def norm_qkv(
    hidden_TD: Tensor,
    norm_D: Tensor,
    weight_QD: Tensor,
    bias_Q: Tensor | None,
    cos_TR: Tensor,
    sin_TR: Tensor,
    *,
    eps: float,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values of a packed stream.

    Args:
        hidden_TD: residual stream, bf16 or fp32.
        norm_D: scale of the norm.
        weight_QD: (H + 2N) K rows: queries, keys, values. Weights of another dtype are cast for
            each product and their gradients back.
        bias_Q: or None.
        cos_TR, sin_TR: fp32 tables at the tokens' positions.

    Returns:
        (hidden_TD, q_THK, k_TNK, v_TNK), each contiguous in hidden's dtype. The first is the input
        itself: take the residual from there.
    """
    return _NormQKV.apply(
        hidden_TD, norm_D, weight_QD, bias_Q, cos_TR, sin_TR, eps, num_heads, num_kv_heads
    )


class _NormQKV(torch.autograd.Function):
    """The graph's node. What computes is opaque operations, in which no compiler looks for things
    to keep or to compute again; it also could not express an output that is an input."""

    @staticmethod
    def forward(
        ctx, hidden_TD, norm_D, weight_QD, bias_Q, cos_TR, sin_TR, eps, num_heads, num_kv_heads
    ):
        q_THK, k_TNK, v_TNK, rstd_T = torch.ops.s1fast.norm_qkv(
            hidden_TD, norm_D, weight_QD, bias_Q, cos_TR, sin_TR, eps, num_heads, num_kv_heads
        )
        ctx.save_for_backward(hidden_TD, norm_D, weight_QD, cos_TR, sin_TR, rstd_T)
        ctx.bias_dtype = None if bias_Q is None else bias_Q.dtype
        return hidden_TD, q_THK, k_TNK, v_TNK

    @staticmethod
    def backward(ctx, dhidden_TD, dq_THK, dk_TNK, dv_TNK):
        dhidden_TD, dnorm_D, dweight_QD, dbias_Q = torch.ops.s1fast.norm_qkv_backward(
            dhidden_TD.contiguous(), dq_THK, dk_TNK, dv_TNK, *ctx.saved_tensors
        )
        dbias_Q = None if ctx.bias_dtype is None else dbias_Q.to(ctx.bias_dtype)
        return dhidden_TD, dnorm_D, dweight_QD, dbias_Q, None, None, None, None, None


@torch.library.custom_op("s1fast::norm_qkv", mutates_args=())
def _op(
    hidden_TD: Tensor,
    norm_D: Tensor,
    weight_QD: Tensor,
    bias_Q: Tensor | None,
    cos_TR: Tensor,
    sin_TR: Tensor,
    eps: float,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q_THK, k_TNK, v_TNK, rstd_T)."""
    y_TD, rstd_T = rms_norm.forward(hidden_TD, norm_D, eps)
    weight_DQ = cast(weight_QD, y_TD).T
    qkv_TQ = (
        y_TD @ weight_DQ if bias_Q is None else torch.addmm(cast(bias_Q, y_TD), y_TD, weight_DQ)
    )
    qkv_THK = qkv_TQ.unflatten(1, (num_heads + 2 * num_kv_heads, -1))
    return *rope.split(qkv_THK, cos_TR, sin_TR, num_heads, num_kv_heads), rstd_T


@_op.register_fake
def _(hidden_TD, norm_D, weight_QD, bias_Q, cos_TR, sin_TR, eps, num_heads, num_kv_heads):
    width = weight_QD.shape[0] // (num_heads + 2 * num_kv_heads)
    sizes = [(hidden_TD.shape[0], n, width) for n in (num_heads, num_kv_heads, num_kv_heads)]
    rstd_T = hidden_TD.new_empty(hidden_TD.shape[0], dtype=wide(hidden_TD.dtype))
    return *(hidden_TD.new_empty(size) for size in sizes), rstd_T


@torch.library.custom_op("s1fast::norm_qkv_backward", mutates_args=())
def _backward_op(
    dresidual_TD: Tensor,
    dq_THK: Tensor,
    dk_TNK: Tensor,
    dv_TNK: Tensor,
    hidden_TD: Tensor,
    norm_D: Tensor,
    weight_QD: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    rstd_T: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dhidden_TD, dnorm_D, dweight_QD, dbias_Q)."""
    dqkv_TQ = rope.merge(dq_THK, dk_TNK, dv_TNK, cos_TR, sin_TR).flatten(1)
    dy_TD = dqkv_TQ @ cast(weight_QD, dqkv_TQ)
    dhidden_TD, dnorm_D, y_TD = rms_norm.backward(
        dy_TD, hidden_TD, rstd_T, norm_D, dresidual_TD, want_y=True
    )
    assert y_TD is not None
    dweight_QD = (dqkv_TQ.T @ y_TD).to(weight_QD.dtype)
    return dhidden_TD, dnorm_D.to(norm_D.dtype), dweight_QD, dqkv_TQ.sum(0)


@_backward_op.register_fake
def _(dresidual, dq_THK, dk, dv, hidden_TD, norm_D, weight_QD, cos, sin, rstd):
    new = torch.empty_like
    return new(hidden_TD), new(norm_D), new(weight_QD), dq_THK.new_empty(len(weight_QD))


@register_flop_formula(torch.ops.s1fast.norm_qkv)
def _flops(hidden, norm, weight, *_, **__) -> int:
    return 2 * hidden[0] * weight[0] * weight[1]


@register_flop_formula(torch.ops.s1fast.norm_qkv_backward)
def _backward_flops(dresidual, dq, dk, dv, hidden, norm, weight, *_, **__) -> int:
    return 4 * hidden[0] * weight[0] * weight[1]
