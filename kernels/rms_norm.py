"""Root-mean-square normalisation, alone or after a residual addition, and its gradient.

    r_t = 1 / sqrt(mean_d(x_td^2) + eps),  n_td = x_td r_t,  y_td = n_td weight_d
    dx_td = r_t (dn_td - n_td mean_d(dn_td n_td)) + dresidual_td,  dn_td = dy_td weight_d
    dweight_d = sum_t dy_td n_td

A row is normalised in fp32, rounded to x's dtype, and only then scaled by the weight in x's dtype,
which is the order of transformers' Qwen2RMSNorm. The gradient is computed in fp32 and rounded once.

Bytes, each tensor being read or written once, and the floor at 3.0 TB/s for T 4,700, D 5,120 in
bf16, where one tensor is 48 MB. On an H200 forward takes 28 us and backward 54, at 32,768 rows 92 %
of its copy roof.

    forward            x -> y                          4 T D     96 MB    32 us
    with residual      x, residual -> sum, y           8 T D    193 MB    64 us
    backward           dy, x -> dx                     6 T D    144 MB    48 us
    with residual, y   dy, x, dresidual -> dx, y      10 T D    241 MB    80 us
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from s1fast.kernels.arguments import expect, expect_unit_stride, floats, wide
from s1fast.kernels.jit import jit, tl
from s1fast.kernels.softmax_gradient import num_programs

MAX_WIDTH = 8192
"""A program holds a row in registers: a wider one would not fit beside the sums of d weight."""

_TILE = 4096
"""Elements that a program holds at least: several rows where they are short."""
_ELEMENTS = 32
"""Of a tile, in a thread of forward."""
_BACKWARD = {torch.bfloat16: (32, 4), torch.float32: (16, 2)}
"""Elements of a tile in a thread, and stages: one tile in use, the others on their way to shared
memory."""
_WARPS = 8
"""Of backward, on a multiprocessor; with twice as many an H200 moved a tenth less."""

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
    return _op(x_TD, None, weight_D, eps)[1]


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
    sum_TD, y_TD, _ = _op(x_TD, residual_TD, weight_D, eps)
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


def _forward(x_TD: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(sum_TD, y_TD, rstd_T); without a residual the sum is x_TD itself."""
    return (triton_forward if x_TD.is_cuda else reference_forward)(x_TD, *rest)


def _backward(dy_TD: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    return (triton_backward if dy_TD.is_cuda else reference_backward)(dy_TD, *rest)


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


# -- Triton ------------------------------------------------------------------------------------


@jit
def _tile(start, num_rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows (int64) of a tile, its columns, and which of its elements exist."""
    row_R = start + tl.arange(0, ROWS)
    column_C = tl.arange(0, COLUMNS)
    inside_RC = (row_R < num_rows)[:, None] & (column_C < WIDTH)[None, :]
    return row_R.to(tl.int64), column_C, inside_RC


@jit
def _load_weight(weight_ptr, column_C, WIDTH: tl.constexpr, kind):
    """In fp32, rounded to the rows' dtype before."""
    return tl.load(weight_ptr + column_C, mask=column_C < WIDTH).to(kind).to(tl.float32)[None, :]


@jit
def _forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    sum_ptr,
    y_ptr,
    rstd_ptr,
    num_rows,
    x_stride,
    residual_stride,
    eps,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ADD: tl.constexpr,
    KNOWN: tl.constexpr,
):
    """ADD: the residual. KNOWN: rstd is read, not written."""
    kind = y_ptr.dtype.element_ty
    row_R, column_C, inside_RC = _tile(tl.program_id(0) * ROWS, num_rows, WIDTH, ROWS, COLUMNS)
    out_RC = row_R[:, None] * WIDTH + column_C[None, :]
    x_RC = x_ptr + row_R[:, None] * x_stride + column_C[None, :]
    x_RC = tl.load(x_RC, mask=inside_RC, other=0.0).to(tl.float32)
    if ADD:
        residual_RC = residual_ptr + row_R[:, None] * residual_stride + column_C[None, :]
        x_RC += tl.load(residual_RC, mask=inside_RC, other=0.0).to(tl.float32)
        x_RC = x_RC.to(kind)
        tl.store(sum_ptr + out_RC, x_RC, mask=inside_RC)
        x_RC = x_RC.to(tl.float32)
    if KNOWN:
        rstd_R = tl.load(rstd_ptr + row_R, mask=row_R < num_rows)
    else:
        mean_R = tl.sum(x_RC * x_RC, axis=1) * (1.0 / WIDTH)
        rstd_R = tl.div_rn(1.0, tl.sqrt_rn(mean_R + eps))
        tl.store(rstd_ptr + row_R, rstd_R, mask=row_R < num_rows)
    n_RC = (x_RC * rstd_R[:, None]).to(kind).to(tl.float32)
    y_RC = n_RC * _load_weight(weight_ptr, column_C, WIDTH, kind)
    tl.store(y_ptr + out_RC, y_RC.to(kind), mask=inside_RC)


@jit
def _backward_kernel(
    dy_ptr,
    x_ptr,
    rstd_ptr,
    weight_ptr,
    residual_ptr,
    dx_ptr,
    y_ptr,
    partial_ptr,
    num_rows,
    dy_stride,
    x_stride,
    residual_stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    ADD: tl.constexpr,
    WANT_Y: tl.constexpr,
):
    """A program takes every so many tiles of rows, and sums their part of d weight in registers."""
    kind = dx_ptr.dtype.element_ty
    column_C = tl.arange(0, COLUMNS)
    weight_1C = _load_weight(weight_ptr, column_C, WIDTH, kind)
    partial_RC = tl.zeros((ROWS, COLUMNS), tl.float32)
    step = tl.num_programs(0) * ROWS
    for start in tl.range(tl.program_id(0) * ROWS, num_rows, step, num_stages=STAGES):
        row_R, column_C, inside_RC = _tile(start, num_rows, WIDTH, ROWS, COLUMNS)
        x_RC = x_ptr + row_R[:, None] * x_stride + column_C[None, :]
        x_RC = tl.load(x_RC, mask=inside_RC, other=0.0).to(tl.float32)
        dy_RC = dy_ptr + row_R[:, None] * dy_stride + column_C[None, :]
        dy_RC = tl.load(dy_RC, mask=inside_RC, other=0.0).to(tl.float32)
        rstd_R1 = tl.load(rstd_ptr + row_R, mask=row_R < num_rows, other=0.0)[:, None]
        n_RC = x_RC * rstd_R1
        rounded_RC = n_RC.to(kind).to(tl.float32)
        partial_RC += dy_RC * rounded_RC
        dn_RC = dy_RC * weight_1C
        mean_R = tl.sum(dn_RC * n_RC, axis=1) * (1.0 / WIDTH)
        dx_RC = rstd_R1 * (dn_RC - n_RC * mean_R[:, None])
        if ADD:
            residual_RC = residual_ptr + row_R[:, None] * residual_stride + column_C[None, :]
            dx_RC += tl.load(residual_RC, mask=inside_RC, other=0.0).to(tl.float32)
        out_RC = row_R[:, None] * WIDTH + column_C[None, :]
        tl.store(dx_ptr + out_RC, dx_RC.to(kind), mask=inside_RC)
        if WANT_Y:
            tl.store(y_ptr + out_RC, (rounded_RC * weight_1C).to(kind), mask=inside_RC)
    partial_C = partial_ptr + tl.program_id(0) * WIDTH + column_C
    tl.store(partial_C, tl.sum(partial_RC, axis=0), mask=column_C < WIDTH)


def _launch_options(width: int, elements: int) -> tuple[dict[str, int], dict[str, int]]:
    """(constants, options) of a launch."""
    columns = 1 << (width - 1).bit_length()
    rows = max(_TILE // columns, 1)
    constants = {"WIDTH": width, "ROWS": rows, "COLUMNS": columns}
    return constants, {"num_warps": rows * columns // elements // 32}


def triton_forward(
    x_TD: Tensor,
    residual_TD: Tensor | None,
    weight_D: Tensor,
    eps: float,
    rstd_T: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    constants, options = _launch_options(x_TD.shape[1], _ELEMENTS)
    flags = {"ADD": residual_TD is not None, "KNOWN": rstd_T is not None}
    if rstd_T is None:
        rstd_T = x_TD.new_empty(len(x_TD), dtype=torch.float32)
    sum_TD, y_TD = x_TD if residual_TD is None else _rows(x_TD), _rows(x_TD)
    other_TD = x_TD if residual_TD is None else residual_TD
    tensors = (x_TD, other_TD, weight_D, sum_TD, y_TD, rstd_T)
    numbers = (len(x_TD), x_TD.stride(0), other_TD.stride(0), eps)
    grid = (-(-len(x_TD) // constants["ROWS"]),)
    _forward_kernel[grid](*tensors, *numbers, **flags, **constants, **options)
    return sum_TD, y_TD, rstd_T


def triton_normalise(x_TD: Tensor, rstd_T: Tensor, weight_D: Tensor) -> Tensor:
    return triton_forward(x_TD, None, weight_D, 0.0, rstd_T)[1]


def triton_backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    rstd_T: Tensor,
    weight_D: Tensor,
    dresidual_TD: Tensor | None,
    want_y: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The programs' sums of d weight are added by torch, whose order is fixed too."""
    num_tokens, width = x_TD.shape
    elements, stages = _BACKWARD[x_TD.dtype]
    constants, options = _launch_options(width, elements)
    most = num_programs(x_TD) * max(1, _WARPS // options["num_warps"])
    programs = min(-(-num_tokens // constants["ROWS"]), most)
    partial_PD = rstd_T.new_empty(programs, width)
    dx_TD, y_TD = _rows(x_TD), _rows(x_TD) if want_y else None
    other_TD = x_TD if dresidual_TD is None else dresidual_TD
    results = (dx_TD, dx_TD if y_TD is None else y_TD, partial_PD)
    numbers = (num_tokens, dy_TD.stride(0), x_TD.stride(0), other_TD.stride(0))
    flags = {"ADD": dresidual_TD is not None, "WANT_Y": want_y, "STAGES": stages}
    tensors = (dy_TD, x_TD, rstd_T, weight_D, other_TD, *results)
    _backward_kernel[(programs,)](*tensors, *numbers, **flags, **constants, **options)
    return dx_TD, partial_PD.sum(0), y_TD


# -- registration ------------------------------------------------------------------------------


@torch.library.custom_op("s1fast::rms_norm", mutates_args=())
def _op(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum_TD, y_TD, rstd_T); the sum is empty without a residual."""
    sum_TD, y_TD, rstd_T = _forward(x_TD, residual_TD, weight_D, eps)
    return x_TD.new_empty(0) if residual_TD is None else sum_TD, y_TD, rstd_T


@torch.library.custom_op("s1fast::rms_norm_backward", mutates_args=())
def _backward_op(
    dy_TD: Tensor, x_TD: Tensor, rstd_T: Tensor, weight_D: Tensor, dresidual_TD: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(dx_TD, dweight_D)"""
    dx_TD, dweight_D, _ = _backward(dy_TD, x_TD, rstd_T, weight_D, dresidual_TD, False)
    return dx_TD, dweight_D


@_op.register_fake
def _(x_TD, residual_TD, weight_D, eps):
    sum_TD = x_TD.new_empty(0) if residual_TD is None else _rows(x_TD)
    return sum_TD, _rows(x_TD), x_TD.new_empty(len(x_TD), dtype=wide(x_TD.dtype))


@_backward_op.register_fake
def _(dy_TD, x_TD, rstd_T, weight_D, dresidual_TD):
    return _rows(x_TD), rstd_T.new_empty(weight_D.shape)


def _rows(x_TD: Tensor) -> Tensor:
    """Uninitialised, contiguous whatever x's strides are."""
    return x_TD.new_empty(x_TD.shape)


def _setup_context(ctx, inputs, output) -> None:
    x_TD, residual_TD, weight_D, _ = inputs
    sum_TD, _, rstd_T = output
    ctx.added = residual_TD is not None
    ctx.save_for_backward(sum_TD if ctx.added else x_TD, rstd_T, weight_D)
    ctx.mark_non_differentiable(rstd_T, *(() if ctx.added else (sum_TD,)))


def _gradient(ctx, dsum_TD, dy_TD, _):
    x_TD, rstd_T, weight_D = ctx.saved_tensors
    dsum_TD = dsum_TD.contiguous() if ctx.added else None
    dx_TD, dweight_D = _backward_op(dy_TD.contiguous(), x_TD, rstd_T, weight_D, dsum_TD)
    return dx_TD, dx_TD if ctx.added else None, dweight_D.to(weight_D.dtype), None


_op.register_autograd(_gradient, setup_context=_setup_context)


_INTEGERS = {"num_rows": "i32", "x_stride": "i32:16", "residual_stride": "i32:16"}
_SHIPPED = [
    (f"{name}/weight {weight}/{width}", name, dtype, weight, width)
    for name, dtype, weight in (
        ("bf16", torch.bfloat16, "bf16"),
        ("bf16", torch.bfloat16, "fp32"),
        ("fp32", torch.float32, "fp32"),
    )
    for width in (1536, 5120, 8192)
]
COMPILE_CASES = [
    (
        f"rms_norm/forward/{case}{suffix}",
        _forward_kernel,
        {
            **dict.fromkeys(("x_ptr", "residual_ptr", "sum_ptr", "y_ptr"), f"*{name}"),
            "weight_ptr": f"*{weight}",
            "rstd_ptr": "*fp32",
            "eps": "fp32",
            **_INTEGERS,
        },
        {**_launch_options(width, _ELEMENTS)[0], "ADD": add, "KNOWN": known},
        _launch_options(width, _ELEMENTS)[1],
    )
    for case, name, _, weight, width in _SHIPPED
    for suffix, add, known in (
        ("", False, False),
        ("/residual", True, False),
        ("/again", False, True),
    )
] + [
    (
        f"rms_norm/backward/{case}{suffix}",
        _backward_kernel,
        {
            **dict.fromkeys(("dy_ptr", "x_ptr", "residual_ptr", "dx_ptr", "y_ptr"), f"*{name}"),
            **dict.fromkeys(("rstd_ptr", "partial_ptr"), "*fp32"),
            "weight_ptr": f"*{weight}",
            "dy_stride": "i32:16",
            **_INTEGERS,
        },
        {
            **_launch_options(width, _BACKWARD[dtype][0])[0],
            "STAGES": _BACKWARD[dtype][1],
            "ADD": add,
            "WANT_Y": want_y,
        },
        _launch_options(width, _BACKWARD[dtype][0])[1],
    )
    for case, name, dtype, weight, width in _SHIPPED
    for suffix, add, want_y in (("", False, False), ("/residual, y", True, True))
]
"""As softmax_gradient.COMPILE_CASES."""
