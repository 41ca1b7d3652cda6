"""Root-mean-square normalisation, alone or after a residual addition, and its gradient.

    r_t = 1 / sqrt(mean_d(x_td^2) + eps),  n_td = x_td r_t,  y_td = n_td weight_d
    dx_td = r_t (dn_td - n_td mean_d(dn_td n_td)) + dresidual_td,  dn_td = dy_td weight_d
    dweight_d = sum_t dy_td n_td

A row is normalised in fp32, rounded to x's dtype, and only then scaled by the weight in x's dtype,
which is the order of transformers' Qwen2RMSNorm. The gradient is computed in fp32 and rounded once.

Bytes, each tensor being read or written once, and the floor at 3.0 TB/s for T 4,700, D 5,120 in
bf16, where one tensor is 48 MB. Measured on an H100: not yet.

    forward            x -> y                          4 T D     96 MB    32 us
    with residual      x, residual -> sum, y           8 T D    193 MB    64 us
    backward           dy, x -> dx                     6 T D    144 MB    48 us
    with residual, y   dy, x, dresidual -> dx, y      10 T D    241 MB    80 us
"""

from __future__ import annotations

import torch
from torch import Tensor

from s1fast.kernels.arguments import expect, expect_unit_stride, floats, wide

MAX_WIDTH = 16384
"""A program holds a row in registers."""

_WEIGHTS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


# -- the public functions ----------------------------------------------------------------------


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Normalises each row; differentiable in x and weight.

    Args:
        x_TD: rows, bf16 or fp32 (fp64 on CPU), unit stride along D.
        weight_D: scale, any floating dtype; its gradient comes in that one.
        eps: added to the mean square.

    Returns:
        y_TD in x's dtype, contiguous.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or layout, before any launch.
    """
    _check(x_TD, weight_D, None)
    return _op(x_TD, weight_D, eps)[0]


def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Adds, rounds the sum to x's dtype and normalises that; differentiable in all three tensors.

    Args:
        residual_TD: of x's shape and dtype. The others: see rms_norm.

    Returns:
        (sum_TD, y_TD) in x's dtype, contiguous.

    Raises:
        ValueError: as rms_norm.
    """
    _check(x_TD, weight_D, residual_TD)
    sum_TD, y_TD, _ = _add_op(x_TD, residual_TD, weight_D, eps)
    return sum_TD, y_TD


# -- the building blocks: no autograd ----------------------------------------------------------


def forward(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """rms_norm's (y_TD, rstd_T); rstd_T, which backward needs, is fp32 (fp64 for fp64)."""
    _check(x_TD, weight_D, None)
    _, y_TD, rstd_T = _forward(x_TD, None, weight_D, eps)
    return y_TD, rstd_T


def normalise(x_TD: Tensor, rstd_T: Tensor, weight_D: Tensor) -> Tensor:
    """y_TD again, bit for bit, from the rstd_T that forward returned."""
    _check(x_TD, weight_D, None)
    _check_rstd(x_TD, rstd_T)
    return (triton_normalise if x_TD.is_cuda else reference_normalise)(x_TD, rstd_T, weight_D)


def backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    rstd_T: Tensor,
    weight_D: Tensor,
    dresidual_TD: Tensor | None = None,
    *,
    want_y: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradient of forward, in one pass; the same sums in the same order each time.

    Args:
        dy_TD: gradient of y_TD, in x's dtype, unit stride along D.
        x_TD, rstd_T, weight_D: what forward took, and its rstd_T.
        dresidual_TD: a gradient of x_TD that came by another way, in x's dtype: added to dx.
        want_y: also return y_TD, bit for bit forward's.

    Returns:
        (dx_TD in x's dtype, dweight_D in fp32 (fp64 for fp64), y_TD or None).

    Raises:
        ValueError: as rms_norm.
    """
    _check(x_TD, weight_D, dresidual_TD, "dresidual_TD")
    _check_rstd(x_TD, rstd_T)
    expect("dy_TD", dy_TD, tuple(x_TD.shape), (x_TD.dtype,), x_TD.device)
    expect_unit_stride("dy_TD", dy_TD)
    return _backward(dy_TD, x_TD, rstd_T, weight_D, dresidual_TD, want_y)


def _check(
    x_TD: Tensor, weight_D: Tensor, residual_TD: Tensor | None, name: str = "residual_TD"
) -> None:
    """Raises ValueError, naming the argument, what it is and what is accepted."""
    expect("x_TD", x_TD, ("T", "D"), floats(x_TD, "x_TD"), x_TD.device)
    if not 0 < x_TD.shape[1] <= MAX_WIDTH:
        raise ValueError(f"x_TD has shape {tuple(x_TD.shape)}, expected D from 1 to {MAX_WIDTH}")
    expect_unit_stride("x_TD", x_TD)
    expect("weight_D", weight_D, (x_TD.shape[1],), _WEIGHTS, x_TD.device)
    expect_unit_stride("weight_D", weight_D)
    if residual_TD is not None:
        expect(name, residual_TD, tuple(x_TD.shape), (x_TD.dtype,), x_TD.device)
        expect_unit_stride(name, residual_TD)


def _check_rstd(x_TD: Tensor, rstd_T: Tensor) -> None:
    expect("rstd_T", rstd_T, (len(x_TD),), (wide(x_TD.dtype),), x_TD.device)
    expect_unit_stride("rstd_T", rstd_T)


def _forward(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum_TD, y_TD, rstd_T); without a residual the sum is x_TD itself."""
    function = triton_forward if x_TD.is_cuda else reference_forward
    return function(x_TD, residual_TD, weight_D, eps)


def _backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    rstd_T: Tensor,
    weight_D: Tensor,
    dresidual_TD: Tensor | None,
    want_y: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    function = triton_backward if x_TD.is_cuda else reference_backward
    return function(dy_TD, x_TD, rstd_T, weight_D, dresidual_TD, want_y)


# -- plain PyTorch -----------------------------------------------------------------------------


def reference_forward(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    sum_TD = x_TD if residual_TD is None else x_TD + residual_TD
    mean_T = sum_TD.to(wide(x_TD.dtype)).square().mean(1)
    rstd_T = torch.rsqrt(mean_T + eps)
    return sum_TD, reference_normalise(sum_TD, rstd_T, weight_D), rstd_T


def reference_normalise(x_TD: Tensor, rstd_T: Tensor, weight_D: Tensor) -> Tensor:
    n_TD = (x_TD.to(rstd_T.dtype) * rstd_T[:, None]).to(x_TD.dtype)
    return n_TD.mul_(weight_D.to(x_TD.dtype))


def reference_backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    rstd_T: Tensor,
    weight_D: Tensor,
    dresidual_TD: Tensor | None,
    want_y: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    dy = dy_TD.to(rstd_T.dtype)
    n_TD = x_TD.to(rstd_T.dtype) * rstd_T[:, None]
    dweight_D = (dy * n_TD.to(x_TD.dtype)).sum(0)
    dn_TD = dy * weight_D.to(x_TD.dtype)
    dx_TD = rstd_T[:, None] * (dn_TD - n_TD * (dn_TD * n_TD).mean(1, keepdim=True))
    if dresidual_TD is not None:
        dx_TD += dresidual_TD
    y_TD = reference_normalise(x_TD, rstd_T, weight_D) if want_y else None
    return dx_TD.to(x_TD.dtype), dweight_D, y_TD


def triton_forward(*args):
    raise NotImplementedError


triton_normalise = triton_backward = triton_forward


# -- registration ------------------------------------------------------------------------------


@torch.library.custom_op("s1fast::rms_norm", mutates_args=())
def _op(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y_TD, rstd_T)"""
    _, y_TD, rstd_T = _forward(x_TD, None, weight_D, eps)
    return y_TD, rstd_T


@torch.library.custom_op("s1fast::add_rms_norm", mutates_args=())
def _add_op(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum_TD, y_TD, rstd_T)"""
    return _forward(x_TD, residual_TD, weight_D, eps)


@torch.library.custom_op("s1fast::rms_norm_backward", mutates_args=())
def _backward_op(
    dy_TD: Tensor, x_TD: Tensor, rstd_T: Tensor, weight_D: Tensor, dresidual_TD: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(dx_TD, dweight_D)"""
    dx_TD, dweight_D, _ = _backward(dy_TD, x_TD, rstd_T, weight_D, dresidual_TD, False)
    return dx_TD, dweight_D


@_op.register_fake
def _(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _rows(x_TD), x_TD.new_empty(len(x_TD), dtype=wide(x_TD.dtype))


@_add_op.register_fake
def _(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _rows(x_TD), _rows(x_TD), x_TD.new_empty(len(x_TD), dtype=wide(x_TD.dtype))


@_backward_op.register_fake
def _(
    dy_TD: Tensor, x_TD: Tensor, rstd_T: Tensor, weight_D: Tensor, dresidual_TD: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _rows(x_TD), rstd_T.new_empty(weight_D.shape)


def _rows(x_TD: Tensor) -> Tensor:
    """Uninitialised, contiguous whatever x's strides are."""
    return x_TD.new_empty(x_TD.shape)


def _setup_context(ctx, inputs, output) -> None:
    x_TD, weight_D, _ = inputs
    ctx.save_for_backward(x_TD, output[1], weight_D)
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx, dy_TD, _):
    x_TD, rstd_T, weight_D = ctx.saved_tensors
    dx_TD, dweight_D = _backward_op(dy_TD.contiguous(), x_TD, rstd_T, weight_D, None)
    return dx_TD, dweight_D.to(weight_D.dtype), None


def _setup_add_context(ctx, inputs, output) -> None:
    sum_TD, _, rstd_T = output
    ctx.save_for_backward(sum_TD, rstd_T, inputs[2])
    ctx.mark_non_differentiable(rstd_T)


def _add_gradient(ctx, dsum_TD, dy_TD, _):
    sum_TD, rstd_T, weight_D = ctx.saved_tensors
    dx_TD, dweight_D = _backward_op(
        dy_TD.contiguous(), sum_TD, rstd_T, weight_D, dsum_TD.contiguous()
    )
    return dx_TD, dx_TD, dweight_D.to(weight_D.dtype), None


_op.register_autograd(_gradient, setup_context=_setup_context)
_add_op.register_autograd(_add_gradient, setup_context=_setup_add_context)
