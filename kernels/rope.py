"""Rotary position embedding of queries and keys, in the half-split layout of Hugging Face weights.

    [a, b] -> [a cos - b sin, b cos + a sin],  a, b the two halves of a head

Its gradient is the rotation back: the same with -sin. Computed in fp32, rounded once.

One read and one write of every head: 4 T (H + N) K bytes in bf16, and 8 T R for the tables. Floor
at 3.0 TB/s for T 4,700, 40 + 8 heads of 128, R 64: 118 MB, 39 us; split and merge, which copy 8
heads more, 137 MB, 46 us. On an H200: 38 us, forward and back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s1fast.kernels.arguments import expect, expect_unit_stride, floats, wide
from s1fast.kernels.jit import jit, tl

_WARPS = 4
_VECTORS = 2
"""Of 16 bytes, that a thread takes of each half."""

# -- the public functions ----------------------------------------------------------------------


def rope(x_THK: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotates every head of every token, in one launch; differentiable in x.

    Args:
        x_THK: heads, queries and keys side by side, bf16 or fp32 (fp64 on CPU), unit stride in K.
        cos_TR, sin_TR: fp32 tables (fp64 is taken with fp64 heads) at the tokens' positions,
            R = K / 2, contiguous.

    Returns:
        The rotated heads in x's dtype, contiguous.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or layout, before any launch.
    """
    _check("x_THK", x_THK, cos_TR, sin_TR)
    return _op(x_THK, cos_TR, sin_TR, False)


def split(
    qkv_THK: Tensor, cos_TR: Tensor, sin_TR: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries, rotated keys and values of the fused projection, in one launch; no autograd.

    Args:
        qkv_THK: (T, H + 2N, K): queries, keys, values. The others: see rope.

    Returns:
        (q_THK, k_TNK, v_TNK), each a tensor of its own.

    Raises:
        ValueError: as rope.
    """
    _check("qkv_THK", qkv_THK, cos_TR, sin_TR)
    heads = (num_heads, num_kv_heads, num_kv_heads)
    num_tokens, total, width = qkv_THK.shape
    if min(heads) < 1 or total != sum(heads):
        raise ValueError(
            f"qkv_THK has shape {tuple(qkv_THK.shape)}, expected {num_heads} + 2 x {num_kv_heads} "
            "heads, at least one of each"
        )
    q_THK, k_TNK, v_TNK = (qkv_THK.new_empty(num_tokens, n, width) for n in heads)
    parts = qkv_THK.split(heads, dim=1)
    _rotate(parts, (q_THK, k_TNK, v_TNK), cos_TR, sin_TR, 2, back=False)
    return q_THK, k_TNK, v_TNK


def merge(dq_THK: Tensor, dk_TNK: Tensor, dv_TNK: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """The gradient of split, in one launch; no autograd.

    Args:
        dq_THK, dk_TNK, dv_TNK: gradients of split's results, unit stride along K.

    Returns:
        dqkv_THK (T, H + 2N, K), contiguous.

    Raises:
        ValueError: as rope.
    """
    _check("dq_THK", dq_THK, cos_TR, sin_TR)
    num_tokens, num_heads, width = dq_THK.shape
    for name, x_TNK in (("dk_TNK", dk_TNK), ("dv_TNK", dv_TNK)):
        num_kv_heads = dk_TNK.shape[1] if dk_TNK.ndim == 3 else "N"
        shape = (num_tokens, num_kv_heads, width)
        expect(name, x_TNK, shape, (dq_THK.dtype,), dq_THK.device)
        expect_unit_stride(name, x_TNK)
    heads = (num_heads, dk_TNK.shape[1], dv_TNK.shape[1])
    dqkv_THK = dq_THK.new_empty(num_tokens, sum(heads), width)
    parts = dqkv_THK.split(heads, dim=1)
    _rotate((dq_THK, dk_TNK, dv_TNK), parts, cos_TR, sin_TR, 2, back=True)
    return dqkv_THK


def _check(name: str, x_THK: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> None:
    """Raises ValueError, naming the argument, what it is and what is accepted."""
    expect(name, x_THK, ("T", "H", "K"), floats(x_THK, name), x_THK.device)
    num_tokens, num_heads, width = x_THK.shape
    if width % 2 or not width or not num_heads:
        raise ValueError(f"{name} has shape {tuple(x_THK.shape)}, expected heads of an even width")
    expect_unit_stride(name, x_THK)
    dtypes = tuple({torch.float32, wide(x_THK.dtype)})
    for table, x_TR in (("cos_TR", cos_TR), ("sin_TR", sin_TR)):
        expect(table, x_TR, (num_tokens, width // 2), dtypes, x_THK.device)
        if not x_TR.is_contiguous():
            raise ValueError(f"{table} has strides {x_TR.stride()}, pass {table}.contiguous()")


def _rotate(
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    cos_TR: Tensor,
    sin_TR: Tensor,
    num_rotated: int,
    *,
    back: bool,
) -> None:
    """Heads of each input, rotated, into its output; those beyond the first num_rotated copied."""
    function = triton_ if cos_TR.is_cuda else reference_
    function(inputs, outputs, cos_TR, sin_TR, num_rotated, back)


def reference_(
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    cos_TR: Tensor,
    sin_TR: Tensor,
    num_rotated: int,
    back: bool,
) -> None:
    """_rotate in plain PyTorch."""
    cos, sin = cos_TR[:, None], (-sin_TR if back else sin_TR)[:, None]
    for i, (x_THK, out_THK) in enumerate(zip(inputs, outputs, strict=True)):
        if i < num_rotated:
            a_THR, b_THR = x_THK.to(wide(x_THK.dtype)).chunk(2, dim=2)
            x_THK = torch.cat((a_THR * cos - b_THR * sin, b_THR * cos + a_THR * sin), 2)
        out_THK.copy_(x_THK)


@jit
def _rotate_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_out_ptr,
    k_out_ptr,
    v_out_ptr,
    cos_ptr,
    sin_ptr,
    num_rows,
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    q_out_stride_t,
    q_out_stride_h,
    k_out_stride_t,
    k_out_stride_h,
    v_out_stride_t,
    v_out_stride_h,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BACK: tl.constexpr,
):
    """A row is a head of a token; rows go token by token, as the fused projection lies in memory.
    Both halves of a row are in one thread."""
    TOTAL: tl.constexpr = HEADS + 2 * KV_HEADS
    row_X = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token_X = (row_X // TOTAL).to(tl.int64)
    head_X = (row_X % TOTAL).to(tl.int64)
    in_X = q_ptr + token_X * q_stride_t + head_X * q_stride_h
    out_X = q_out_ptr + token_X * q_out_stride_t + head_X * q_out_stride_h
    if KV_HEADS:
        key_X = head_X - HEADS
        value_X = key_X - KV_HEADS
        k_X = k_ptr + token_X * k_stride_t + key_X * k_stride_h
        v_X = v_ptr + token_X * v_stride_t + value_X * v_stride_h
        in_X = tl.where(key_X < 0, in_X, tl.where(value_X < 0, k_X, v_X))
        k_X = k_out_ptr + token_X * k_out_stride_t + key_X * k_out_stride_h
        v_X = v_out_ptr + token_X * v_out_stride_t + value_X * v_out_stride_h
        out_X = tl.where(key_X < 0, out_X, tl.where(value_X < 0, k_X, v_X))
    column_C = tl.arange(0, COLUMNS)
    inside_XC = (row_X < num_rows)[:, None] & (column_C < HALF)[None, :]
    turned_XC = (head_X < HEADS + KV_HEADS)[:, None] & inside_XC

    in_XC = in_X[:, None] + column_C[None, :]
    a_XC = tl.load(in_XC, mask=inside_XC).to(tl.float32)
    b_XC = tl.load(in_XC + HALF, mask=inside_XC).to(tl.float32)
    table_XC = token_X[:, None] * HALF + column_C[None, :]
    cos_XC = tl.load(cos_ptr + table_XC, mask=turned_XC)
    sin_XC = tl.load(sin_ptr + table_XC, mask=turned_XC)
    if BACK:
        sin_XC = -sin_XC
    kind = q_out_ptr.dtype.element_ty
    c_XC = tl.where(turned_XC, a_XC * cos_XC - b_XC * sin_XC, a_XC)
    d_XC = tl.where(turned_XC, b_XC * cos_XC + a_XC * sin_XC, b_XC)
    out_XC = out_X[:, None] + column_C[None, :]
    tl.store(out_XC, c_XC.to(kind), mask=inside_XC)
    tl.store(out_XC + HALF, d_XC.to(kind), mask=inside_XC)


def _launch_options(dtype: torch.dtype, half: int) -> tuple[dict[str, int], dict[str, int]]:
    """(constants, options) of a launch."""
    columns = 1 << (half - 1).bit_length()
    rows = max(_WARPS * 32 * _VECTORS * 16 // dtype.itemsize // columns, 1)
    return {"HALF": half, "COLUMNS": columns, "ROWS": rows}, {"num_warps": _WARPS}


def triton_(
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    cos_TR: Tensor,
    sin_TR: Tensor,
    num_rotated: int,
    back: bool,
) -> None:
    """_rotate by the kernel: of one tensor, or of queries, keys and values, these copied."""
    heads = [x_THK.shape[1] for x_THK in inputs]
    constants, options = _launch_options(inputs[0].dtype, cos_TR.shape[1])
    num_rows = len(cos_TR) * sum(heads)
    three = 3 // len(inputs)  # one tensor stands for all three
    tensors = (*inputs * three, *outputs * three)
    strides = (stride for x_THK in tensors for stride in x_THK.stride()[:2])
    _rotate_kernel[(-(-num_rows // constants["ROWS"]),)](
        *tensors,
        cos_TR,
        sin_TR,
        num_rows,
        *strides,
        HEADS=heads[0],
        KV_HEADS=heads[1] if num_rotated == 2 else 0,
        BACK=back,
        **constants,
        **options,
    )


# -- registration ------------------------------------------------------------------------------


@torch.library.custom_op("s1fast::rope", mutates_args=())
def _op(x_THK: Tensor, cos_TR: Tensor, sin_TR: Tensor, back: bool) -> Tensor:
    out_THK = x_THK.new_empty(x_THK.shape)
    _rotate((x_THK,), (out_THK,), cos_TR, sin_TR, 1, back=back)
    return out_THK


@_op.register_fake
def _(x_THK: Tensor, cos_TR: Tensor, sin_TR: Tensor, back: bool) -> Tensor:
    return x_THK.new_empty(x_THK.shape)


def _setup_context(ctx, inputs, output) -> None:
    _, cos_TR, sin_TR, ctx.back = inputs
    ctx.save_for_backward(cos_TR, sin_TR)


def _gradient(ctx, dout_THK):
    return _op(dout_THK.contiguous(), *ctx.saved_tensors, not ctx.back), None, None, None


_op.register_autograd(_gradient, setup_context=_setup_context)


_POINTERS = ("q_ptr", "k_ptr", "v_ptr", "q_out_ptr", "k_out_ptr", "v_out_ptr")
_STRIDES = [name.replace("ptr", f"stride_{d}") for name in _POINTERS for d in "th"]
COMPILE_CASES = [
    (
        f"rope/{use}/{name}/{heads} + {kv_heads} heads of {2 * half}",
        _rotate_kernel,
        {
            **dict.fromkeys(_POINTERS, f"*{name}"),
            **dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32"),
            **dict.fromkeys(_STRIDES, "i32:16"),
            "num_rows": "i32",
        },
        {
            "HEADS": heads + kv_heads * (use == "rope"),
            "KV_HEADS": kv_heads * (use != "rope"),
            "BACK": use == "merge",
            **_launch_options(dtype, half)[0],
        },
        _launch_options(dtype, half)[1],
    )
    for use in ("rope", "split", "merge")
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    for heads, kv_heads, half in ((40, 8, 64), (14, 2, 32))
]
"""As softmax_gradient.COMPILE_CASES."""
