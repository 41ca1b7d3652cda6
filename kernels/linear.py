"""A projection back into the residual stream.

    out = residual + x @ weight.T

One product, the sum in its epilogue: 2 T F D FLOPs forward, twice that backward. Floor at T 4,700,
5,120 x 5,120: 246 GFLOP, 0.35 ms at 700 TFLOP/s. Kept for backward: x alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def linear_residual(x_TF: Tensor, weight_DF: Tensor, residual_TD: Tensor) -> Tensor:
    """residual + x @ weight.T, rounded once.

    Args:
        x_TF: bf16 or fp32.
        weight_DF: of another dtype it is cast for each product, and its gradient back.
        residual_TD: in x's dtype.
    """
    return torch.ops.s1fast.linear_residual(x_TF, weight_DF, residual_TD)


def cast(weight: Tensor, x: Tensor) -> Tensor:
    """The weight in x's dtype: itself where it has it already."""
    return weight.to(x.dtype)


@torch.library.custom_op("s1fast::linear_residual", mutates_args=())
def _op(x_TF: Tensor, weight_DF: Tensor, residual_TD: Tensor) -> Tensor:
    return torch.addmm(residual_TD, x_TF, cast(weight_DF, x_TF).T)


@_op.register_fake
def _(x_TF, weight_DF, residual_TD):
    return torch.empty_like(residual_TD)


@torch.library.custom_op("s1fast::linear_backward", mutates_args=())
def _backward_op(dout_TD: Tensor, x_TF: Tensor, weight_DF: Tensor) -> tuple[Tensor, Tensor]:
    """(dx_TF, dweight_DF)."""
    return dout_TD @ cast(weight_DF, dout_TD), (dout_TD.T @ x_TF).to(weight_DF.dtype)


@_backward_op.register_fake
def _(dout_TD, x_TF, weight_DF):
    return x_TF.new_empty(x_TF.shape), torch.empty_like(weight_DF)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx, dout_TD):
    return *torch.ops.s1fast.linear_backward(dout_TD, *ctx.saved_tensors), dout_TD


_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.s1fast.linear_residual)
def _flops(x, weight, *_, **__) -> int:
    return 2 * x[0] * weight[0] * weight[1]


@register_flop_formula(torch.ops.s1fast.linear_backward)
def _backward_flops(dout, x, weight, *_, **__) -> int:
    return 4 * x[0] * weight[0] * weight[1]
