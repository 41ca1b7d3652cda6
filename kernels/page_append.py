"""What stands between the projection and attention in a step of the token loop, in one launch.

    [q, k, v] = qkv + bias;   q, k rotated by the angle of their position;   k, v into their page

Slot c carries the token at position_C[c] of row line_C[c]; its keys and values go to page
table_RP[line, position // S], offset position % S, in one layer's pages. An idle slot, line -1,
gets a query of zeros and writes zeros to the sink, page 0, offset 0. Sums and rotation in fp32,
rounded once; the rotation is that of rope.py.

One read and one write of every head, 4 (H + 2N) K bytes a token in bf16. Floor at 3.0 TB/s for 64
tokens, 40 + 8 heads of 128: 1.8 MB, 0.6 us; so a launch costs more than the work. Measured on an
H100: not yet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from s1fast.kernels.arguments import expect, expect_unit_stride, floats, wide
from s1fast.kernels.jit import jit, tl

_WARPS = 2
_VECTORS = 1
"""Of 16 bytes, that a thread takes of each half."""


def append_qkv(
    qkv_CQ: Tensor,
    bias_Q: Tensor | None,
    cos_XR: Tensor,
    sin_XR: Tensor,
    position_C: Tensor,
    line_C: Tensor,
    table_RP: Tensor,
    k_PSNK: Tensor,
    v_PSNK: Tensor,
    num_heads: int,
) -> Tensor:
    """Bias, rotation, and keys and values into their pages, in place; no autograd.

    Args:
        qkv_CQ: the fused projection of C slots, Q = (H + 2N) K: queries, keys, values; bf16 or
            fp32 (fp64 on CPU), unit stride along Q.
        bias_Q: of the same dtype, contiguous, or None.
        cos_XR, sin_XR: fp32 tables by absolute position (fp64 is taken with fp64 heads), R = K / 2,
            contiguous; every position is below X.
        position_C, line_C: int32, contiguous. No two slots of a step share line and position.
        table_RP: int32 page table, unit stride along P.
        k_PSNK, v_PSNK: one layer's pages, in qkv's dtype, unit stride along K.
        num_heads: H.

    Returns:
        q_CHK, contiguous; zeros in idle slots.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or layout, before any launch.
    """
    dtypes, device = floats(qkv_CQ, "qkv_CQ"), qkv_CQ.device
    expect("qkv_CQ", qkv_CQ, ("C", "Q"), dtypes, device)
    expect("k_PSNK", k_PSNK, ("P", "S", "N", "K"), (qkv_CQ.dtype,), device)
    expect("v_PSNK", v_PSNK, tuple(k_PSNK.shape), (qkv_CQ.dtype,), device)
    _, _, kv_heads, width = k_PSNK.shape
    if width % 2 or not k_PSNK.numel():
        raise ValueError(f"k_PSNK has shape {tuple(k_PSNK.shape)}, expected heads of an even width")
    if num_heads < 1:
        raise ValueError(f"num_heads {num_heads}: expected at least 1")
    columns = (num_heads + 2 * kv_heads) * width
    expect("qkv_CQ", qkv_CQ, ("C", columns), dtypes, device)
    if bias_Q is not None:
        expect("bias_Q", bias_Q, (columns,), (qkv_CQ.dtype,), device)
    angles = tuple({torch.float32, wide(qkv_CQ.dtype)})
    expect("cos_XR", cos_XR, ("X", width // 2), angles, device)
    expect("sin_XR", sin_XR, tuple(cos_XR.shape), (cos_XR.dtype,), device)
    for name, x_C in (("position_C", position_C), ("line_C", line_C)):
        expect(name, x_C, (len(qkv_CQ),), (torch.int32,), device)
    expect("table_RP", table_RP, ("R", "P"), (torch.int32,), device)
    strided = {"qkv_CQ": qkv_CQ, "table_RP": table_RP, "k_PSNK": k_PSNK, "v_PSNK": v_PSNK}
    for name, x in strided.items():
        expect_unit_stride(name, x)
    whole = {"cos_XR": cos_XR, "sin_XR": sin_XR, "position_C": position_C, "line_C": line_C}
    for name, x in (whole if bias_Q is None else whole | {"bias_Q": bias_Q}).items():
        if not x.is_contiguous():
            raise ValueError(f"{name} has strides {x.stride()}, pass {name}.contiguous()")

    q_CHK = qkv_CQ.new_empty(len(qkv_CQ), num_heads, width)
    tables = position_C, line_C, table_RP
    function = triton_ if qkv_CQ.is_cuda else reference_
    function(qkv_CQ, bias_Q, cos_XR, sin_XR, *tables, k_PSNK, v_PSNK, q_CHK)
    return q_CHK


def reference_(
    qkv_CQ: Tensor,
    bias_Q: Tensor | None,
    cos_XR: Tensor,
    sin_XR: Tensor,
    position_C: Tensor,
    line_C: Tensor,
    table_RP: Tensor,
    k_PSNK: Tensor,
    v_PSNK: Tensor,
    q_CHK: Tensor,
) -> None:
    """append_qkv in plain PyTorch, the queries into q_CHK."""
    live_C = line_C >= 0
    position_C, line_C = (torch.where(live_C, x, 0).long() for x in (position_C, line_C))
    size, kv_heads, width = k_PSNK.shape[1:]
    x_CQ = qkv_CQ.to(wide(qkv_CQ.dtype))
    x_CQ = x_CQ if bias_Q is None else x_CQ + bias_Q
    x_CJK = torch.where(live_C[:, None], x_CQ, 0.0).unflatten(1, (-1, width))
    q, k, v = x_CJK.split((q_CHK.shape[1], kv_heads, kv_heads), 1)
    cos, sin = (x_XR[position_C][:, None] for x_XR in (cos_XR, sin_XR))
    page_C = torch.where(live_C, table_RP[line_C, position_C // size], 0).long()
    q_CHK.copy_(_turned(q, cos, sin))
    k_PSNK[page_C, position_C % size] = _turned(k, cos, sin).to(k_PSNK.dtype)
    v_PSNK[page_C, position_C % size] = v.to(v_PSNK.dtype)


def _turned(x_CHK: Tensor, cos_C1R: Tensor, sin_C1R: Tensor) -> Tensor:
    a_CHR, b_CHR = x_CHK.chunk(2, dim=2)
    return torch.cat((a_CHR * cos_C1R - b_CHR * sin_C1R, b_CHR * cos_C1R + a_CHR * sin_C1R), 2)


@jit
def _append_kernel(
    qkv_ptr,
    bias_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    line_ptr,
    table_ptr,
    k_ptr,
    v_ptr,
    q_ptr,
    qkv_stride,
    table_stride,
    k_stride_p,
    k_stride_s,
    k_stride_n,
    v_stride_p,
    v_stride_s,
    v_stride_n,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    BIASED: tl.constexpr,
):
    """A program is some of a slot's heads, in the order of the fused projection."""
    TOTAL: tl.constexpr = HEADS + 2 * KV_HEADS
    slot = tl.program_id(0).to(tl.int64)
    head_H = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column_R = tl.arange(0, COLUMNS)
    inside_HR = (head_H < TOTAL)[:, None] & (column_R < HALF)[None, :]
    line = tl.load(line_ptr + slot)
    live = line >= 0
    position = tl.where(live, tl.load(position_ptr + slot), 0)
    entry = tl.where(live, line, 0).to(tl.int64) * table_stride + position // SIZE
    page = tl.load(table_ptr + entry, mask=live, other=0).to(tl.int64)
    offset = (position % SIZE).to(tl.int64)

    x_HR = head_H[:, None] * (2 * HALF) + column_R[None, :]
    in_HR = qkv_ptr + slot * qkv_stride + x_HR
    a_HR = tl.load(in_HR, mask=inside_HR, other=0.0).to(tl.float32)
    b_HR = tl.load(in_HR + HALF, mask=inside_HR, other=0.0).to(tl.float32)
    if BIASED:
        a_HR += tl.load(bias_ptr + x_HR, mask=inside_HR, other=0.0).to(tl.float32)
        b_HR += tl.load(bias_ptr + x_HR + HALF, mask=inside_HR, other=0.0).to(tl.float32)
    angle_R = position.to(tl.int64) * HALF + column_R
    cos_1R = tl.load(cos_ptr + angle_R, mask=column_R < HALF, other=0.0)[None, :]
    sin_1R = tl.load(sin_ptr + angle_R, mask=column_R < HALF, other=0.0)[None, :]
    turned_H1 = (head_H < HEADS + KV_HEADS)[:, None]
    c_HR = tl.where(turned_H1, a_HR * cos_1R - b_HR * sin_1R, a_HR)
    d_HR = tl.where(turned_H1, b_HR * cos_1R + a_HR * sin_1R, b_HR)

    key_H, value_H = head_H - HEADS, head_H - (HEADS + KV_HEADS)
    q_H = q_ptr + (slot * HEADS + head_H) * (2 * HALF)
    k_H = k_ptr + page * k_stride_p + offset * k_stride_s + key_H * k_stride_n
    v_H = v_ptr + page * v_stride_p + offset * v_stride_s + value_H * v_stride_n
    out_H = tl.where(key_H < 0, q_H, tl.where(value_H < 0, k_H, v_H))
    out_HR = out_H[:, None] + column_R[None, :]
    kind = q_ptr.dtype.element_ty
    tl.store(out_HR, tl.where(live, c_HR, 0.0).to(kind), mask=inside_HR)
    tl.store(out_HR + HALF, tl.where(live, d_HR, 0.0).to(kind), mask=inside_HR)


def _launch_options(dtype: torch.dtype, half: int) -> tuple[dict[str, Any], dict[str, int]]:
    """(constants, options) of a launch."""
    columns = 1 << (half - 1).bit_length()
    rows = max(_WARPS * 32 * _VECTORS * 16 // dtype.itemsize // columns, 1)
    return {"HALF": half, "COLUMNS": columns, "ROWS": rows}, {"num_warps": _WARPS}


def triton_(
    qkv_CQ: Tensor,
    bias_Q: Tensor | None,
    cos_XR: Tensor,
    sin_XR: Tensor,
    position_C: Tensor,
    line_C: Tensor,
    table_RP: Tensor,
    k_PSNK: Tensor,
    v_PSNK: Tensor,
    q_CHK: Tensor,
) -> None:
    """append_qkv by the kernel, the queries into q_CHK."""
    constants, options = _launch_options(qkv_CQ.dtype, cos_XR.shape[1])
    num_slots, heads, _ = q_CHK.shape
    kv_heads = k_PSNK.shape[2]
    if not num_slots:
        return
    _append_kernel[(num_slots, -(-(heads + 2 * kv_heads) // constants["ROWS"]))](
        qkv_CQ,
        qkv_CQ if bias_Q is None else bias_Q,
        cos_XR,
        sin_XR,
        position_C,
        line_C,
        table_RP,
        k_PSNK,
        v_PSNK,
        q_CHK,
        qkv_CQ.stride(0),
        table_RP.stride(0),
        *k_PSNK.stride()[:3],
        *v_PSNK.stride()[:3],
        HEADS=heads,
        KV_HEADS=kv_heads,
        SIZE=k_PSNK.shape[1],
        BIASED=bias_Q is not None,
        **constants,
        **options,
    )


_HEADS = ("qkv_ptr", "bias_ptr", "k_ptr", "v_ptr", "q_ptr")
_TABLES = ("position_ptr", "line_ptr", "table_ptr")
_STRIDES = ["qkv_stride", *(f"{x}_stride_{d}" for x in "kv" for d in "psn")]
COMPILE_CASES = [
    (
        f"page_append/{name}/{heads} + {kv_heads} heads of {2 * half}" + "/no bias" * (not biased),
        _append_kernel,
        {
            **dict.fromkeys(_HEADS, f"*{name}"),
            **dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32"),
            **dict.fromkeys(_TABLES, "*i32"),
            **dict.fromkeys(_STRIDES, "i32:16"),
            "table_stride": "i32",
        },
        {
            "HEADS": heads,
            "KV_HEADS": kv_heads,
            "SIZE": 16,
            "BIASED": biased,
            **_launch_options(dtype, half)[0],
        },
        _launch_options(dtype, half)[1],
    )
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    for heads, kv_heads, half, biased in ((40, 8, 64, True), (14, 2, 32, True), (40, 8, 64, False))
]
"""As softmax_gradient.COMPILE_CASES."""
