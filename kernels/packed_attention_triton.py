"""The Triton kernels of packed attention: forward, d query, d key and d value.

With s = q k^T * scale, p = exp(s - lse), o = p v and delta = rowsum(do * o):

    dv = p^T do        dp = do v^T        ds = p * (dp - delta)
    dq = scale * ds k  dk = scale * ds^T q

Seven products for the five that an atomically summed dq would take: d query and d key/value are
programs of their own, each owning its tile of the result, so that every run gives the same bits.

A program is one tile of one sequence and one head. Tiles are listed on the host, once for a batch,
heaviest first, so that no program is empty and none starts late that takes long; heads run fastest,
so that those sharing keys and values run together. Loads and stores go through TMA descriptors
bounded by the sequence: rows beyond it read as zeros and are not written, so nothing of a
neighbour, not even a NaN, can enter. log-sum-exp is kept to base 2, lse2 = lse / ln 2.

Keys that every query of a tile sees are taken without a mask, those on the diagonal or at the end
of the sequence after them, with one. Nothing is warp-specialised: what the compiler makes of the
hint (Triton 3.6) is wrong in the second half of every tile; kernels/README.md tells more.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from s1fast.kernels.jit import constant, jit, tl, triton

LOWEST = constant(-1e30)  # finite: a row that has seen nothing yet must not make a NaN
LOG2_E = 1.4426950408889634

Tile = tuple[int, ...]
"""(query rows, key rows, warps, stages), and the most registers of a thread where, without such a
bound, only one block would run on a multiprocessor."""
FORWARD: dict[int, Tile] = {64: (128, 64, 8, 3), 128: (128, 64, 8, 2, 128)}
DQUERY: dict[int, Tile] = {64: (128, 64, 8, 3), 128: (128, 32, 8, 3, 128)}
DKEY: dict[int, Tile] = {64: (64, 64, 4, 2), 128: (64, 64, 4, 2)}
"""Head width -> the configuration that is shipped."""


@jit
def _tile_of(tile_ptr, index):
    """(first token of the sequence, its length, first row of the tile within it)."""
    start = tl.load(tile_ptr + 3 * index).to(tl.int64)
    return start, tl.load(tile_ptr + 3 * index + 1), tl.load(tile_ptr + 3 * index + 2)


@jit
def _rows(ptr, start, length, head, stride_t, stride_h, ROWS: tl.constexpr, K: tl.constexpr):
    """Descriptor of one head's rows of one sequence."""
    base = ptr + start * stride_t + head.to(tl.int64) * stride_h
    return tl.make_tensor_descriptor(base, [length, K], [stride_t, 1], [ROWS, K])


@jit
def _seen(row, length, M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr):
    """Of a tile of queries: keys up to the first are seen by every row, none from the second on."""
    whole = (row if CAUSAL else length) // N * N
    return whole, tl.minimum(row + M, length) if CAUSAL else length


@jit
def _softmax_step(
    q_MK,
    k_desc,
    v_desc,
    column,
    last_M,
    scale2,
    high_M,
    sum_M,
    acc_MK,
    N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of keys and values more."""
    score_MN = tl.dot(q_MK, k_desc.load([column, 0]).T)
    if MASKED:
        seen_MN = tl.arange(0, N)[None, :] <= (last_M - column)[:, None]
        score_MN = tl.where(seen_MN, score_MN, LOWEST)
    new_M = tl.maximum(high_M, tl.max(score_MN, 1))
    p_MN = tl.exp2(score_MN * scale2 - (new_M * scale2)[:, None])
    fade_M = tl.exp2((high_M - new_M) * scale2)
    sum_M = sum_M * fade_M + tl.sum(p_MN, 1)
    v_NK = v_desc.load([column, 0])
    return new_M, sum_M, tl.dot(p_MN.to(v_NK.dtype), v_NK, acc_MK * fade_M[:, None])


@jit
def _attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse2_ptr,
    tile_ptr,
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
    stride_ot,
    stride_oh,
    K: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    head = tl.program_id(0) % heads
    start, length, row = _tile_of(tile_ptr, tl.program_id(0) // heads)
    q_desc = _rows(q_ptr, start, length, head, stride_qt, stride_qh, M, K)
    k_desc = _rows(k_ptr, start, length, head // group, stride_kt, stride_kh, N, K)
    v_desc = _rows(v_ptr, start, length, head // group, stride_vt, stride_vh, N, K)
    out_desc = _rows(out_ptr, start, length, head, stride_ot, stride_oh, M, K)
    q_MK = q_desc.load([row, 0])
    row_M = row + tl.arange(0, M)
    last_M = tl.minimum(row_M, length - 1) if CAUSAL else row_M * 0 + length - 1
    high_M = tl.full((M,), LOWEST, tl.float32)
    sum_M = tl.zeros((M,), tl.float32)
    acc_MK = tl.zeros((M, K), tl.float32)
    whole, stop = _seen(row, length, M, N, CAUSAL)
    for column in tl.range(0, whole, N, num_stages=STAGES):
        high_M, sum_M, acc_MK = _softmax_step(
            q_MK, k_desc, v_desc, column, last_M, scale2, high_M, sum_M, acc_MK, N, False
        )
    for column in tl.range(whole, stop, N, num_stages=STAGES):
        high_M, sum_M, acc_MK = _softmax_step(
            q_MK, k_desc, v_desc, column, last_M, scale2, high_M, sum_M, acc_MK, N, True
        )
    out_desc.store([row, 0], (acc_MK / sum_M[:, None]).to(out_ptr.dtype.element_ty))
    lse2_M = high_M * scale2 + tl.log2(sum_M)
    lse2_ptr += head.to(tl.int64) * num_tokens + start
    tl.store(lse2_ptr + row_M, lse2_M, mask=row_M < length)


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
    start, length, row = _tile_of(tile_ptr, tl.program_id(0) // heads)
    q_MK = _rows(q_ptr, start, length, head, stride_qt, stride_qh, M, K).load([row, 0])
    dout_MK = _rows(dout_ptr, start, length, head, stride_dt, stride_dh, M, K).load([row, 0])
    k_desc = _rows(k_ptr, start, length, head // group, stride_kt, stride_kh, N, K)
    v_desc = _rows(v_ptr, start, length, head // group, stride_vt, stride_vh, N, K)
    dq_desc = _rows(dq_ptr, start, length, head, stride_dqt, stride_dqh, M, K)
    row_M = row + tl.arange(0, M)
    last_M = tl.minimum(row_M, length - 1) if CAUSAL else row_M * 0 + length - 1
    offset_M = head.to(tl.int64) * num_tokens + start + row_M
    inside_M = row_M < length
    lse2_M = tl.load(lse2_ptr + offset_M, mask=inside_M, other=float("inf"))  # beyond: p = 0
    delta_M = tl.load(delta_ptr + offset_M, mask=inside_M, other=0.0)
    dq_MK = tl.zeros((M, K), tl.float32)
    whole, stop = _seen(row, length, M, N, CAUSAL)
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
    start, length, column = _tile_of(tile_ptr, tl.program_id(0) // kv_heads)
    head = kv_head.to(tl.int64) * group
    k_NK = _rows(k_ptr, start, length, kv_head, stride_kt, stride_kh, N, K).load([column, 0])
    v_NK = _rows(v_ptr, start, length, kv_head, stride_vt, stride_vh, N, K).load([column, 0])
    dk_desc = _rows(dk_ptr, start, length, kv_head, stride_dkt, stride_dkh, N, K)
    dv_desc = _rows(dv_ptr, start, length, kv_head, stride_dvt, stride_dvh, N, K)
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


@lru_cache(maxsize=16)
def tiles(bounds: tuple[int, ...], rows: int, growing: bool, device: torch.device) -> Tensor:
    """(tiles, 3) int32 on the device: start and length of a sequence, first row of a tile in it.

    Heaviest first: a tile's work grows towards the end of a sequence for causal queries, towards
    its start for causal keys. Built once for a batch; the copy to the device is not waited for.
    """
    found = [
        (start, stop - start, row)
        for start, stop in pairwise(bounds)
        for row in range(0, stop - start, rows)
    ]
    found.sort(key=lambda tile: -tile[2] if growing else tile[2] - tile[1])
    return without_waiting(torch.tensor(found, dtype=torch.int32).reshape(-1, 3), device)


def without_waiting(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, for which the host does not wait."""
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def _strides(*tensors: Tensor) -> list[int]:
    """Of token and head, for each."""
    return [x.stride(i) for x in tensors for i in (0, 1)]


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where a launch keeps the descriptors that its programs make."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _constants(tile: Tile, width: int, causal: bool) -> tuple[dict[str, Any], dict[str, int]]:
    rows, columns, warps, stages, *registers = tile
    constants = {"K": width, "M": rows, "N": columns, "STAGES": stages, "CAUSAL": causal}
    options = {"num_warps": warps, "num_stages": stages}
    return constants, options | ({"maxnreg": registers[0]} if registers else {})


def _launch(kernel, grid: int, tile: Tile, width: int, causal: bool, *arguments) -> None:
    constants, options = _constants(tile, width, causal)
    triton.set_allocator(_scratch)  # kept per thread, and autograd walks in threads of its own
    if grid:
        kernel[(grid,)](*arguments, **constants, **options)


def forward(
    q_THK: Tensor,
    k_TNK: Tensor,
    v_TNK: Tensor,
    bounds: tuple[int, ...],
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out_THK, lse2_HT): zeros and -inf beyond the last sequence."""
    num_tokens, heads, width = q_THK.shape
    out_THK = q_THK.new_empty(q_THK.shape)
    lse2_HT = q_THK.new_empty(heads, num_tokens, dtype=torch.float32)
    out_THK[bounds[-1] :] = 0.0
    lse2_HT[:, bounds[-1] :] = -torch.inf
    tile = FORWARD[width]
    table = tiles(bounds, tile[0], causal, q_THK.device)
    _launch(
        _attention_forward_kernel,
        len(table) * heads,
        tile,
        width,
        causal,
        q_THK,
        k_TNK,
        v_TNK,
        out_THK,
        lse2_HT,
        table,
        scale * LOG2_E,
        num_tokens,
        heads,
        heads // k_TNK.shape[1],
        *_strides(q_THK, k_TNK, v_TNK, out_THK),
    )
    return out_THK, lse2_HT


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
        *_strides(dout_THK, out_THK),
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
    _launch(
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
        *_strides(*inputs, gradients[0]),
    )
    tile = DKEY[width]
    table = tiles(bounds, tile[1], False, q_THK.device)
    _launch(
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
        *_strides(*inputs, *gradients[1:]),
    )
    return gradients[0], gradients[1], gradients[2]


# -- what is compiled ahead of time -------------------------------------------------------------

_TYPES = (
    {f"{x}_ptr": "*bf16" for x in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")}
    | {"lse2_ptr": "*fp32", "delta_ptr": "*fp32", "tile_ptr": "*i32"}
    | {"scale": "fp32", "scale2": "fp32"}
    | dict.fromkeys(("num_tokens", "heads", "kv_heads", "group"), "i32")
    | {
        f"stride_{x}{i}": "i32:16"
        for x in ("q", "k", "v", "o", "d", "dq", "dk", "dv")
        for i in "th"
    }
)


def _case(name: str, kernel, constants: dict[str, Any], options: dict[str, int]):
    code = getattr(kernel, "fn", kernel).__code__
    taken = code.co_varnames[: code.co_argcount]
    types = {x: _TYPES[x] for x in taken if x in _TYPES and x not in constants}
    return name, kernel, types, {x: y for x, y in constants.items() if x in taken}, options


_ONES = dict.fromkeys(("num_tokens", "heads", "kv_heads", "group"), 1)
"""A launch makes constants of arguments that are 1."""


def _cases(name: str, kernel, shipped: dict[int, Tile]):
    for width in shipped:
        for causal in (True, False):
            constants, options = _constants(shipped[width], width, causal)
            full = f"packed_attention/{name}/{width}{'' if causal else '/full'}"
            yield _case(full, kernel, constants, options)
            if causal:
                yield _case(f"{full}/one token, one head", kernel, constants | _ONES, options)


COMPILE_CASES = [
    *_cases("forward", _attention_forward_kernel, FORWARD),
    *_cases("dquery", _attention_dquery_kernel, DQUERY),
    *_cases("dkey", _attention_dkey_kernel, DKEY),
    *(
        _case(
            f"packed_attention/delta/{width}",
            _attention_delta_kernel,
            {"K": width, "ROWS": 8192 // width},
            {"num_warps": 4},
        )
        for width in FORWARD
    ),
]
"""As softmax_gradient.COMPILE_CASES."""
