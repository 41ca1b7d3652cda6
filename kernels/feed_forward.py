"""The feed-forward block with its norm and residual.

    y = rms_norm(hidden) * norm
    [gate, up] = y @ gate_up.T
    out = hidden + (silu(gate) * up) @ down.T

FLOPs: 6 T D F forward, 12 T D F backward, 4 T D F more where gate and up are computed again. Floor
at T 4,700, D 5,120, F 27,648: 3.99 TFLOP, 5.7 ms at 700 TFLOP/s; the norm and the activation move
0.9e9 bytes, 0.3 ms.

Kept for backward: the input, its rstd, and [gate, up], which for these widths is 111 of the 156 KB
that a layer keeps for each token; with `recompute_gate_up` it is not kept. The norm and the gated
product are always computed again, by the passes that need them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from s1fast.kernels import rms_norm, swiglu
from s1fast.kernels.arguments import wide
from s1fast.kernels.linear import cast


def feed_forward(
    hidden_TD: Tensor,
    norm_D: Tensor,
    gate_up_FD: Tensor,
    down_DF: Tensor,
    *,
    eps: float,
    recompute_gate_up: bool = False,
) -> Tensor:
    """hidden + down(silu(gate) * up), both projections of the normalised rows.

    Args:
        hidden_TD: residual stream, bf16 or fp32.
        norm_D: scale of the norm.
        gate_up_FD: (2F, D), gate first. Weights of another dtype are cast for each product and
            their gradients back.
        down_DF: (D, F).
        recompute_gate_up: trade 4 T D F FLOPs in backward for the memory of gate and up.

    Returns:
        (T, D) in hidden's dtype.
    """
    flags = (eps, recompute_gate_up)
    out_TD, _, _ = torch.ops.s1fast.feed_forward(hidden_TD, norm_D, gate_up_FD, down_DF, *flags)
    return out_TD


@torch.library.custom_op("s1fast::feed_forward", mutates_args=())
def _op(
    hidden_TD: Tensor,
    norm_D: Tensor,
    gate_up_FD: Tensor,
    down_DF: Tensor,
    eps: float,
    recompute_gate_up: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out_TD, rstd_T, [gate, up] or nothing)."""
    y_TD, rstd_T = rms_norm.forward(hidden_TD, norm_D, eps)
    both_TF2 = y_TD @ cast(gate_up_FD, y_TD).T
    del y_TD
    out_TD = torch.addmm(hidden_TD, swiglu.forward(both_TF2), cast(down_DF, hidden_TD).T)
    return out_TD, rstd_T, both_TF2.new_empty(0) if recompute_gate_up else both_TF2


@_op.register_fake
def _(hidden_TD, norm_D, gate_up_FD, down_DF, eps, recompute_gate_up):
    num_tokens = hidden_TD.shape[0]
    kept = (0,) if recompute_gate_up else (num_tokens, gate_up_FD.shape[0])
    rstd_T = hidden_TD.new_empty(num_tokens, dtype=wide(hidden_TD.dtype))
    return torch.empty_like(hidden_TD), rstd_T, hidden_TD.new_empty(kept)


@torch.library.custom_op("s1fast::feed_forward_backward", mutates_args=())
def _backward_op(
    dout_TD: Tensor,
    hidden_TD: Tensor,
    norm_D: Tensor,
    gate_up_FD: Tensor,
    down_DF: Tensor,
    rstd_T: Tensor,
    both_TF2: Tensor,
    recompute_gate_up: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dhidden_TD, dnorm_D, dgate_up_FD, ddown_DF)."""
    gate_up = cast(gate_up_FD, dout_TD)
    spent = None
    if recompute_gate_up:
        spent = both_TF2 = rms_norm.normalise(hidden_TD, rstd_T, norm_D) @ gate_up.T
    dgated_TF = dout_TD @ cast(down_DF, dout_TD)
    dboth_TF2, gated_TF = swiglu.backward(dgated_TF, both_TF2, out=spent)
    del dgated_TF
    ddown_DF = (dout_TD.T @ gated_TF).to(down_DF.dtype)
    del gated_TF
    dhidden_TD, dnorm_D, y_TD = rms_norm.backward(
        dboth_TF2 @ gate_up, hidden_TD, rstd_T, norm_D, dout_TD, want_y=True
    )
    assert y_TD is not None
    dgate_up_FD = (dboth_TF2.T @ y_TD).to(gate_up_FD.dtype)
    return dhidden_TD, dnorm_D.to(norm_D.dtype), dgate_up_FD, ddown_DF


@_backward_op.register_fake
def _(dout, hidden_TD, norm_D, gate_up_FD, down_DF, rstd, both, recompute_gate_up):
    new = torch.empty_like
    return new(hidden_TD), new(norm_D), new(gate_up_FD), new(down_DF)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, _, ctx.recompute_gate_up = inputs
    _, rstd_T, both_TF2 = output
    ctx.save_for_backward(*tensors, rstd_T, both_TF2)
    ctx.mark_non_differentiable(rstd_T, both_TF2)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout_TD, *_):
    if dout_TD is None:
        return (None,) * 6
    gradients = torch.ops.s1fast.feed_forward_backward(
        dout_TD.contiguous(), *ctx.saved_tensors, ctx.recompute_gate_up
    )
    return *gradients, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.s1fast.feed_forward)
def _flops(hidden, norm, gate_up, down, *_, **__) -> int:
    return 2 * hidden[0] * (gate_up[0] * gate_up[1] + down[0] * down[1])


@register_flop_formula(torch.ops.s1fast.feed_forward_backward)
def _backward_flops(
    dout, hidden, norm, gate_up, down, rstd, both, recompute_gate_up, *_, **__
) -> int:
    again = 2 * hidden[0] * gate_up[0] * gate_up[1] if recompute_gate_up else 0
    return 4 * hidden[0] * (gate_up[0] * gate_up[1] + down[0] * down[1]) + again
