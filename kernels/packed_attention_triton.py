"""The Triton kernel of packed attention forward, and what all of its kernels share.

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
"""Head width -> the configuration that is shipped."""


@jit
def tile_of(tile_ptr, index):
    """(first token of the sequence, its length, first row of the tile within it)."""
    start = tl.load(tile_ptr + 3 * index).to(tl.int64)
    return start, tl.load(tile_ptr + 3 * index + 1), tl.load(tile_ptr + 3 * index + 2)


@jit
def head_rows(ptr, start, length, head, stride_t, stride_h, ROWS: tl.constexpr, K: tl.constexpr):
    """Descriptor of one head's rows of one sequence."""
    base = ptr + start * stride_t + head.to(tl.int64) * stride_h
    return tl.make_tensor_descriptor(base, [length, K], [stride_t, 1], [ROWS, K])


@jit
def seen(row, length, M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr):
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
    start, length, row = tile_of(tile_ptr, tl.program_id(0) // heads)
    q_desc = head_rows(q_ptr, start, length, head, stride_qt, stride_qh, M, K)
    k_desc = head_rows(k_ptr, start, length, head // group, stride_kt, stride_kh, N, K)
    v_desc = head_rows(v_ptr, start, length, head // group, stride_vt, stride_vh, N, K)
    out_desc = head_rows(out_ptr, start, length, head, stride_ot, stride_oh, M, K)
    q_MK = q_desc.load([row, 0])
    row_M = row + tl.arange(0, M)
    last_M = tl.minimum(row_M, length - 1) if CAUSAL else row_M * 0 + length - 1
    high_M = tl.full((M,), LOWEST, tl.float32)
    sum_M = tl.zeros((M,), tl.float32)
    acc_MK = tl.zeros((M, K), tl.float32)
    whole, stop = seen(row, length, M, N, CAUSAL)
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


def strides_of(*tensors: Tensor) -> list[int]:
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


def allow_descriptors() -> None:
    """Before a launch of a kernel that makes them."""
    triton.set_allocator(_scratch)  # kept per thread, and autograd walks in threads of its own


def launch(kernel, grid: int, tile: Tile, width: int, causal: bool, *arguments) -> None:
    constants, options = _constants(tile, width, causal)
    allow_descriptors()
    if grid:
        kernel[(grid,)](*arguments, **constants, **options)


def empty_results(q_THK: Tensor, bounds: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(out_THK, lse2_HT), set beyond the last sequence only: zeros and -inf."""
    num_tokens, heads, _ = q_THK.shape
    out_THK = q_THK.new_empty(q_THK.shape)
    lse2_HT = q_THK.new_empty(heads, num_tokens, dtype=torch.float32)
    out_THK[bounds[-1] :] = 0.0
    lse2_HT[:, bounds[-1] :] = -torch.inf
    return out_THK, lse2_HT


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
    out_THK, lse2_HT = empty_results(q_THK, bounds)
    tile = FORWARD[width]
    table = tiles(bounds, tile[0], causal, q_THK.device)
    launch(
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
        *strides_of(q_THK, k_TNK, v_TNK, out_THK),
    )
    return out_THK, lse2_HT


# -- what is compiled ahead of time -------------------------------------------------------------

_TYPES = (
    {f"{x}_ptr": "*bf16" for x in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")}
    | {"lse2_ptr": "*fp32", "delta_ptr": "*fp32", "tile_ptr": "*i32"}
    | {"scale": "fp32", "scale2": "fp32"}
    | dict.fromkeys(("num_tokens", "heads", "kv_heads", "group", "items"), "i32")
    | {
        f"stride_{x}{i}": "i32:16"
        for x in ("q", "k", "v", "o", "d", "dq", "dk", "dv")
        for i in "th"
    }
)


def case(name: str, kernel, constants: dict[str, Any], options: dict[str, int]):
    code = getattr(kernel, "fn", kernel).__code__
    taken = code.co_varnames[: code.co_argcount]
    types = {x: _TYPES[x] for x in taken if x in _TYPES and x not in constants}
    return name, kernel, types, {x: y for x, y in constants.items() if x in taken}, options


_ONES = dict.fromkeys(("num_tokens", "heads", "kv_heads", "group", "items"), 1)
"""A launch makes constants of arguments that are 1."""


def cases(name: str, kernel, shipped: dict[int, Any], constants_of=_constants):
    for width in shipped:
        for causal in (True, False):
            constants, options = constants_of(shipped[width], width, causal)
            full = f"packed_attention/{name}/{width}{'' if causal else '/full'}"
            yield case(full, kernel, constants, options)
            if causal:
                yield case(f"{full}/one token, one head", kernel, constants | _ONES, options)


COMPILE_CASES = [*cases("forward", _attention_forward_kernel, FORWARD)]
"""As softmax_gradient.COMPILE_CASES."""
