"""The Triton kernels of packed attention backward: d query, d key and d value.

With s = q k^T * scale, p = exp(s - lse), o = p v and delta = rowsum(do * o):

    dv = p^T do        dp = do v^T        ds = p * (dp - delta)
    dq = scale * ds k  dk = scale * ds^T q

Seven products for the five that an atomically summed dq would take: d query and d key/value are
programs of their own, each owning its tile of the result, so that every run gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s1fast.kernels.jit import jit, tl, triton
from s1fast.kernels.packed_attention_triton import (
    LOG2_E,
    Tile,
    case,
    cases,
    head_rows,
    launch,
    seen,
    strides_of,
    tile_of,
    tiles,
)

DQUERY: dict[int, Tile] = {64: (128, 64, 8, 3), 128: (128, 32, 8, 3, 128)}
DKEY: dict[int, Tile] = {64: (64, 64, 4, 2), 128: (64, 64, 4, 2)}
"""Head width -> the configuration that is shipped."""


@jit
def _attention_delta_kernel(
    dout_ptr,
    out_ptr,
    delta_ptr,
    num_tokens,
    heads,
    stride_dt,
    stride_dh,
    stride_ot,
    stride_oh,
    K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """delta_ht = sum_k dout_thk * out_thk."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    token_T = (tl.program_id(0) // heads).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside_T1 = (token_T < num_tokens)[:, None]
    width_1K = tl.arange(0, K)[None, :]
    dout_ptr += head * stride_dh + token_T[:, None] * stride_dt + width_1K
    out_ptr += head * stride_oh + token_T[:, None] * stride_ot + width_1K
    dout_TK = tl.load(dout_ptr, mask=inside_T1, other=0.0).to(tl.float32)
    out_TK = tl.load(out_ptr, mask=inside_T1, other=0.0).to(tl.float32)
    delta_T = tl.sum(dout_TK * out_TK, 1)
    tl.store(delta_ptr + head * num_tokens + token_T, delta_T, mask=token_T < num_tokens)


@jit
def _dquery_step(
    q_MK,
    dout_MK,
    k_desc,
    v_desc,
    column,
    last_M,
    lse2_M,
    delta_M,
    scale2,
    dq_MK,
    N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of keys and values more."""
    k_NK = k_desc.load([column, 0])
    v_NK = v_desc.load([column, 0])
    p_MN = tl.exp2(tl.dot(q_MK, k_NK.T) * scale2 - lse2_M[:, None])
    if MASKED:
        p_MN = tl.where(tl.arange(0, N)[None, :] <= (last_M - column)[:, None], p_MN, 0.0)
    ds_MN = p_MN * (tl.dot(dout_MK, v_NK.T) - delta_M[:, None])
    return tl.dot(ds_MN.to(k_NK.dtype), k_NK, dq_MK)


@jit
def _attention_dquery_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse2_ptr,
    delta_ptr,
    dq_ptr,
    tile_ptr,
    scale,
    scale2,
    num_tokens,
    heads,
    group,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_dt,
    stride_dh,
    stride_dqt,
    stride_dqh,
    K: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    head = tl.program_id(0) % heads
    start, length, row = tile_of(tile_ptr, tl.program_id(0) // heads)
    q_MK = head_rows(q_ptr, start, length, head, stride_qt, stride_qh, M, K).load([row, 0])
    dout_MK = head_rows(dout_ptr, start, length, head, stride_dt, stride_dh, M, K).load([row, 0])
    k_desc = head_rows(k_ptr, start, length, head // group, stride_kt, stride_kh, N, K)
    v_desc = head_rows(v_ptr, start, length, head // group, stride_vt, stride_vh, N, K)
    dq_desc = head_rows(dq_ptr, start, length, head, stride_dqt, stride_dqh, M, K)
    row_M = row + tl.arange(0, M)
    last_M = tl.minimum(row_M, length - 1) if CAUSAL else row_M * 0 + length - 1
    offset_M = head.to(tl.int64) * num_tokens + start + row_M
    inside_M = row_M < length
    lse2_M = tl.load(lse2_ptr + offset_M, mask=inside_M, other=float("inf"))  # beyond: p = 0
    delta_M = tl.load(delta_ptr + offset_M, mask=inside_M, other=0.0)
    dq_MK = tl.zeros((M, K), tl.float32)
    whole, stop = seen(row, length, M, N, CAUSAL)
    for column in tl.range(0, whole, N, num_stages=STAGES):
        dq_MK = _dquery_step(
            q_MK, dout_MK, k_desc, v_desc, column, last_M, lse2_M, delta_M, scale2, dq_MK, N, False
        )
    for column in tl.range(whole, stop, N, num_stages=STAGES):
        dq_MK = _dquery_step(
            q_MK, dout_MK, k_desc, v_desc, column, last_M, lse2_M, delta_M, scale2, dq_MK, N, True
        )
    dq_desc.store([row, 0], (dq_MK * scale).to(dq_ptr.dtype.element_ty))


@jit
def _attention_dkey_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse2_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    tile_ptr,
    scale,
    scale2,
    num_tokens,
    kv_heads,
    group,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_dt,
    stride_dh,
    stride_dkt,
    stride_dkh,
    stride_dvt,
    stride_dvh,
    K: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """One tile of keys and values meets the queries of every head that shares them, in order."""
    kv_head = tl.program_id(0) % kv_heads
    start, length, column = tile_of(tile_ptr, tl.program_id(0) // kv_heads)
    head = kv_head.to(tl.int64) * group
    k_NK = head_rows(k_ptr, start, length, kv_head, stride_kt, stride_kh, N, K).load([column, 0])
    v_NK = head_rows(v_ptr, start, length, kv_head, stride_vt, stride_vh, N, K).load([column, 0])
    dk_desc = head_rows(dk_ptr, start, length, kv_head, stride_dkt, stride_dkh, N, K)
    dv_desc = head_rows(dv_ptr, start, length, kv_head, stride_dvt, stride_dvh, N, K)
    q_desc = tl.make_tensor_descriptor(
        q_ptr + start * stride_qt + head * stride_qh,
        [group, length, K],
        [stride_qh, stride_qt, 1],
        [1, M, K],
    )
    dout_desc = tl.make_tensor_descriptor(
        dout_ptr + start * stride_dt + head * stride_dh,
        [group, length, K],
        [stride_dh, stride_dt, 1],
        [1, M, K],
    )
    lse2_ptr += head * num_tokens + start
    delta_ptr += head * num_tokens + start
    column_N = column + tl.arange(0, N)
    dk_NK = tl.zeros((N, K), tl.float32)
    dv_NK = tl.zeros((N, K), tl.float32)
    first = column // M * M if CAUSAL else 0
    blocks = tl.cdiv(length - first, M)
    for i in tl.range(0, group * blocks, num_stages=STAGES):
        member, row = i // blocks, first + i % blocks * M
        q_MK = q_desc.load([member, row, 0]).reshape(M, K)
        dout_MK = dout_desc.load([member, row, 0]).reshape(M, K)
        row_M = row + tl.arange(0, M)
        offset_M = member.to(tl.int64) * num_tokens + row_M
        inside_M = row_M < length
        lse2_M = tl.load(lse2_ptr + offset_M, mask=inside_M, other=float("inf"))  # beyond: p = 0
        p_NM = tl.exp2(tl.dot(k_NK, q_MK.T) * scale2 - lse2_M[None, :])
        if CAUSAL:
            p_NM = tl.where((column_N - row)[:, None] <= tl.arange(0, M)[None, :], p_NM, 0.0)
        dv_NK = tl.dot(p_NM.to(dout_MK.dtype), dout_MK, dv_NK)
        delta_M = tl.load(delta_ptr + offset_M, mask=inside_M, other=0.0)
        ds_NM = p_NM * (tl.dot(v_NK, dout_MK.T) - delta_M[None, :])
        dk_NK = tl.dot(ds_NM.to(q_MK.dtype), q_MK, dk_NK)
    dk_desc.store([column, 0], (dk_NK * scale).to(dk_ptr.dtype.element_ty))
    dv_desc.store([column, 0], dv_NK.to(dv_ptr.dtype.element_ty))


# -- launches ----------------------------------------------------------------------------------


def delta(dout_THK: Tensor, out_THK: Tensor) -> Tensor:
    """delta_HT in fp32."""
    num_tokens, heads, width = out_THK.shape
    delta_HT = out_THK.new_empty(heads, num_tokens, dtype=torch.float32)
    rows = 8192 // width
    _attention_delta_kernel[(triton.cdiv(num_tokens, rows) * heads,)](
        dout_THK,
        out_THK,
        delta_HT,
        num_tokens,
        heads,
        *strides_of(dout_THK, out_THK),
        K=width,
        ROWS=rows,
    )
    return delta_HT


def backward(
    dout_THK: Tensor,
    q_THK: Tensor,
    k_TNK: Tensor,
    v_TNK: Tensor,
    delta_HT: Tensor,
    lse2_HT: Tensor,
    bounds: tuple[int, ...],
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq_THK, dk_TNK, dv_TNK): zeros beyond the last sequence."""
    num_tokens, heads, width = q_THK.shape
    kv_heads = k_TNK.shape[1]
    group = heads // kv_heads
    gradients = [x.new_empty(x.shape) for x in (q_THK, k_TNK, v_TNK)]
    for x in gradients:
        x[bounds[-1] :] = 0.0
    inputs = (q_THK, k_TNK, v_TNK, dout_THK)
    shared = (*inputs, lse2_HT, delta_HT)
    tile = DQUERY[width]
    table = tiles(bounds, tile[0], causal, q_THK.device)
    launch(
        _attention_dquery_kernel,
        len(table) * heads,
        tile,
        width,
        causal,
        *shared,
        gradients[0],
        table,
        scale,
        scale * LOG2_E,
        num_tokens,
        heads,
        group,
        *strides_of(*inputs, gradients[0]),
    )
    tile = DKEY[width]
    table = tiles(bounds, tile[1], False, q_THK.device)
    launch(
        _attention_dkey_kernel,
        len(table) * kv_heads,
        tile,
        width,
        causal,
        *shared,
        *gradients[1:],
        table,
        scale,
        scale * LOG2_E,
        num_tokens,
        kv_heads,
        group,
        *strides_of(*inputs, *gradients[1:]),
    )
    return gradients[0], gradients[1], gradients[2]


COMPILE_CASES = [
    *cases("dquery", _attention_dquery_kernel, DQUERY),
    *cases("dkey", _attention_dkey_kernel, DKEY),
    *(
        case(
            f"packed_attention/delta/{width}",
            _attention_delta_kernel,
            {"K": width, "ROWS": 8192 // width},
            {"num_warps": 4},
        )
        for width in DQUERY
    ),
]
"""As softmax_gradient.COMPILE_CASES."""
