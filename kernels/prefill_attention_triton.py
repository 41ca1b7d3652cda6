"""The Triton kernel of prefill attention: a chunk of one row over its pages.

A program is a tile of queries of one head, against tiles of keys that are gathered through the page
table. Heads run fastest, so that those sharing keys and values run together; the latest queries,
which see most, come first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from s1fast.kernels.decode_attention_triton import (
    DTYPES,
    LOG2_E,
    attend_pages,
    columns,
    types_of,
)
from s1fast.kernels.jit import jit, tl

PREFILL = {torch.bfloat16: (128, 64, 8, 5), torch.float32: (32, 32, 8, 2)}
"""dtype -> (queries and keys of a tile, warps, stages)."""


@jit
def _prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    out_ptr,
    scale2,
    start,
    num_tokens,
    heads,
    group,
    q_stride_t,
    q_stride_h,
    k_stride_p,
    k_stride_s,
    k_stride_n,
    v_stride_p,
    v_stride_s,
    v_stride_n,
    M: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    STAGES: tl.constexpr,
):
    head = (tl.program_id(0) % heads).to(tl.int64)
    row = (tl.cdiv(num_tokens, M) - 1 - tl.program_id(0) // heads) * M
    token_M = row + tl.arange(0, M)
    inside_M = token_M < num_tokens
    column_1K = tl.arange(0, COLUMNS)[None, :]
    inside_MK = inside_M[:, None] & (column_1K < WIDTH)
    q_M = q_ptr + token_M.to(tl.int64) * q_stride_t + head * q_stride_h
    q_MK = tl.load(q_M[:, None] + column_1K, mask=inside_MK, other=0.0)
    length = start + tl.minimum(row + M, num_tokens)
    out_MK, _ = attend_pages(
        q_MK,
        tl.where(inside_M, start + token_M, -1),
        k_ptr + head // group * k_stride_n,
        v_ptr + head // group * v_stride_n,
        table_ptr,
        0,
        length,
        length,
        scale2,
        k_stride_p,
        k_stride_s,
        v_stride_p,
        v_stride_s,
        M,
        TILE,
        WIDTH,
        COLUMNS,
        SIZE,
        STAGES,
    )
    at_M = (token_M.to(tl.int64) * heads + head) * WIDTH
    kind = out_ptr.dtype.element_ty
    tl.store(out_ptr + at_M[:, None] + column_1K, out_MK.to(kind), mask=inside_MK)


def _options(width: int, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, int]]:
    """(constants, options) of a launch."""
    rows, tile, warps, stages = PREFILL[dtype]
    constants = {"M": rows, "TILE": tile, "STAGES": stages}
    return constants | columns(width), {"num_warps": warps, "num_stages": stages}


def prefill(
    q_THK: Tensor, k_PSNK: Tensor, v_PSNK: Tensor, table_P: Tensor, start: int, out_THK: Tensor
) -> None:
    """prefill_attention by the kernel, into out_THK."""
    num_tokens, heads, width = q_THK.shape
    constants, options = _options(width, q_THK.dtype)
    if not num_tokens:
        return
    _prefill_kernel[(-(-num_tokens // constants["M"]) * heads,)](
        q_THK,
        k_PSNK,
        v_PSNK,
        table_P,
        out_THK,
        width**-0.5 * LOG2_E,
        start,
        num_tokens,
        heads,
        heads // k_PSNK.shape[2],
        *q_THK.stride()[:2],
        *k_PSNK.stride()[:3],
        *v_PSNK.stride()[:3],
        SIZE=k_PSNK.shape[1],
        **constants,
        **options,
    )


def _case(name: str, width: int):
    constants, options = _options(width, DTYPES[name])
    types = types_of(name, ("table_ptr",), "t")
    types |= dict.fromkeys(("start", "num_tokens", "heads", "group"), "i32")
    return (
        f"prefill_attention/{name}/{width}",
        _prefill_kernel,
        types,
        {**constants, "SIZE": 16},
        options,
    )


COMPILE_CASES = [_case(name, width) for name in DTYPES for width in (64, 128)]
"""As softmax_gradient.COMPILE_CASES."""
