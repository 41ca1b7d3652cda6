"""The Triton kernel of decode attention: a step's rows in splits.

The work of a step is cut on the device. The positions of all rows are added up and cut into splits
of nearly the same length, so many that they fill a fixed number of programs evenly: one long row,
many short ones and any mixture keep the whole device busy, and idle slots cost nothing, while the
grid is always the same. A split is one kv head over some positions of one row. Its tile has at
least 16 query rows, as tensor cores want it: the query heads of a group and, where there is room,
those of further slots of the same row, which so share what is read. Which slots share is settled by
their place alone: those of one line within the same QUERIES places.

Programs that finish a split leave their result, normalised, with its log-sum-exp to base 2. The
last one to arrive, told by a counter, adds those of the row up in their order: so every run gives
the same bits.

Positions that a query may not see score -inf and those beyond a row's end are not read, so nothing
there, not even a NaN, can enter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from s1fast.kernels.jit import constant, jit, tl

LOWEST = constant(-1e30)  # finite: a row that has seen nothing yet must not make a NaN
JOINED = constant(8)
"""Partial results that are on their way when a row's are added up."""
LOG2_E = 1.4426950408889634

MAX_WIDTH, MAX_GROUP = 128, 32
"""Of a head, and heads that share keys: more would not fit in a multiprocessor's memory."""

PROGRAMS = 264
"""Of a decoding launch: two on each multiprocessor of an H100. Also on other devices, so that these
cut rows in the same way."""
SHORTEST = 256
"""Positions in a split, where a row has them: fewer are over before loads overlap. A multiple of
every tile's."""
SPLITS = 32
"""Of a row at most, where batch_invariant."""
TILE_ROWS = 16
"""Of queries at least, as tensor cores count."""
MAX_QUERIES = 8
"""Slots that share a program."""
DECODE = {torch.bfloat16: (64, 4, 7), torch.float32: (32, 8, 3)}
"""dtype -> (keys of a tile, warps, stages)."""


@jit
def _cut(
    line_ptr,
    position_ptr,
    num_slots,
    programs,
    SLOTS: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    SHORT: tl.constexpr,
    INVARIANT: tl.constexpr,
):
    """(positions of each slot, its splits): none where another slot answers for it, or nobody."""
    slot_C = tl.arange(0, SLOTS)
    inside_C = slot_C < num_slots
    line_C = tl.load(line_ptr + slot_C, mask=inside_C, other=-1)
    length_C = tl.load(position_ptr + slot_C, mask=inside_C, other=-1) + 1
    leads_C = line_C >= 0
    for i in tl.static_range(1, QUERIES):
        before_C = inside_C & (slot_C % QUERIES >= i)
        after_C = (slot_C % QUERIES + i < QUERIES) & (slot_C + i < num_slots)
        leads_C &= tl.load(line_ptr + slot_C - i, mask=before_C, other=-1) != line_C
        same_C = tl.load(line_ptr + slot_C + i, mask=after_C, other=-1) == line_C
        further_C = tl.load(position_ptr + slot_C + i, mask=after_C, other=-1) + 1
        length_C = tl.where(same_C, tl.maximum(length_C, further_C), length_C)
    length_C = tl.where(leads_C, length_C, 0)
    if INVARIANT:
        split_C = tl.cdiv(length_C, INVARIANT)
    else:
        rows = tl.sum(leads_C.to(tl.int32), 0)
        wanted = programs * tl.cdiv(3 * rows, programs) - rows + 1  # and each row may have one more
        split_C = tl.cdiv(tl.sum(length_C, 0), tl.maximum(wanted, 1)) + tl.zeros_like(length_C)
    split_C = tl.maximum(tl.cdiv(split_C, TILE) * TILE, SHORT)
    return length_C, tl.cdiv(length_C, split_C)


@jit
def _rows(ptr, table_ptr, key_N, inside_N, stride_p, stride_s, SIZE: tl.constexpr):
    """Addresses of one head's keys or values at positions key_N of a row."""
    page_N = tl.load(table_ptr + key_N // SIZE, mask=inside_N, other=0).to(tl.int64)
    return ptr + page_N * stride_p + (key_N % SIZE).to(tl.int64) * stride_s


@jit
def attend_pages(
    q_MK,
    last_M,
    k_ptr,
    v_ptr,
    table_ptr,
    start,
    stop,
    length,
    scale2,
    k_stride_p,
    k_stride_s,
    v_stride_p,
    v_stride_s,
    M: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """(out_MK normalised, lse2_M) of queries that see start .. last_M; 0 and LOWEST of nothing."""
    column_1K = tl.arange(0, COLUMNS)[None, :]
    high_M = tl.full((M,), LOWEST, tl.float32)
    sum_M = tl.zeros((M,), tl.float32)
    acc_MK = tl.zeros((M, COLUMNS), tl.float32)
    for at in tl.range(start, stop, TILE, num_stages=STAGES):
        key_N = at + tl.arange(0, TILE)
        inside_N = key_N < length
        inside_NK = inside_N[:, None] & (column_1K < WIDTH)
        k_N = _rows(k_ptr, table_ptr, key_N, inside_N, k_stride_p, k_stride_s, SIZE)
        k_NK = tl.load(k_N[:, None] + column_1K, mask=inside_NK, other=0.0)
        score_MN = tl.dot(q_MK, k_NK.T, input_precision="ieee") * scale2
        score_MN = tl.where(key_N[None, :] <= last_M[:, None], score_MN, float("-inf"))
        new_M = tl.maximum(high_M, tl.max(score_MN, 1))
        p_MN = tl.exp2(score_MN - new_M[:, None])
        fade_M = tl.exp2(high_M - new_M)
        sum_M = sum_M * fade_M + tl.sum(p_MN, 1)
        v_N = _rows(v_ptr, table_ptr, key_N, inside_N, v_stride_p, v_stride_s, SIZE)
        v_NK = tl.load(v_N[:, None] + column_1K, mask=inside_NK, other=0.0)
        acc_MK = acc_MK * fade_M[:, None]
        acc_MK = tl.dot(p_MN.to(v_NK.dtype), v_NK, acc_MK, input_precision="ieee")
        high_M = new_M
    sum_M = tl.where(sum_M == 0.0, 1.0, sum_M)
    return acc_MK / sum_M[:, None], high_M + tl.log2(sum_M)


@jit
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    line_ptr,
    position_ptr,
    out_ptr,
    partial_ptr,
    lse2_ptr,
    counter_ptr,
    scale2,
    num_slots,
    table_stride,
    q_stride_c,
    q_stride_h,
    k_stride_p,
    k_stride_s,
    k_stride_n,
    v_stride_p,
    v_stride_s,
    v_stride_n,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    SLOTS: tl.constexpr,
    M: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    STAGES: tl.constexpr,
    SHORT: tl.constexpr,
    INVARIANT: tl.constexpr,
):
    ROWS: tl.constexpr = QUERIES * GROUP
    slot_C = tl.arange(0, SLOTS)
    row_M = tl.arange(0, M)
    column_1K = tl.arange(0, COLUMNS)[None, :]
    program, programs = tl.program_id(0), tl.num_programs(0)
    heads = KV_HEADS * GROUP
    for i in range(0, tl.cdiv(num_slots - program, programs)):
        slot = program + i * programs
        if tl.load(line_ptr + slot) < 0:
            for head in range(0, heads):
                zero_1K = tl.zeros((1, COLUMNS), out_ptr.dtype.element_ty)
                at_1K = (slot.to(tl.int64) * heads + head) * WIDTH + column_1K
                tl.store(out_ptr + at_1K, zero_1K, mask=column_1K < WIDTH)

    length_C, splits_C = _cut(
        line_ptr,
        position_ptr,
        num_slots,
        tl.maximum(programs // KV_HEADS, 1),
        SLOTS,
        QUERIES,
        TILE,
        SHORT,
        INVARIANT,
    )
    stop_C = tl.cumsum(splits_C, 0)
    units = tl.sum(splits_C, 0) * KV_HEADS
    for i in range(0, tl.cdiv(units - program, programs)):
        unit = program + i * programs
        item, head = unit // KV_HEADS, unit % KV_HEADS
        slot = tl.sum((stop_C <= item).to(tl.int32), 0)
        splits = tl.sum(tl.where(slot_C == slot, splits_C, 0), 0)
        first = tl.sum(tl.where(slot_C == slot, stop_C, 0), 0) - splits
        length = tl.sum(tl.where(slot_C == slot, length_C, 0), 0)
        size = tl.cdiv(tl.cdiv(length, splits), TILE) * TILE  # never so long that one is empty
        start = (item - first) * size
        line = tl.load(line_ptr + slot)

        slot_M = slot + row_M // GROUP
        mine_M = (row_M < ROWS) & (slot_M // QUERIES == slot // QUERIES) & (slot_M < num_slots)
        mine_M &= tl.load(line_ptr + slot_M, mask=mine_M, other=-1) == line
        last_M = tl.load(position_ptr + slot_M, mask=mine_M, other=-1)
        head_M = (head * GROUP + row_M % GROUP).to(tl.int64)
        mine_MK = mine_M[:, None] & (column_1K < WIDTH)
        q_M = q_ptr + slot_M.to(tl.int64) * q_stride_c + head_M * q_stride_h
        q_MK = tl.load(q_M[:, None] + column_1K, mask=mine_MK, other=0.0)
        out_MK, lse2_M = attend_pages(
            q_MK,
            last_M,
            k_ptr + head.to(tl.int64) * k_stride_n,
            v_ptr + head.to(tl.int64) * v_stride_n,
            table_ptr + line.to(tl.int64) * table_stride,
            start,
            tl.minimum(start + size, length),
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
        arrived = splits - 1
        if splits > 1:
            here_M = unit.to(tl.int64) * ROWS + row_M
            tl.store(lse2_ptr + here_M, lse2_M, mask=mine_M)
            tl.store(partial_ptr + here_M[:, None] * WIDTH + column_1K, out_MK, mask=mine_MK)
            tl.debug_barrier()  # the one thread that counts does so after all have written
            arrived = tl.atomic_add(counter_ptr + slot * KV_HEADS + head, 1, sem="acq_rel")
        if arrived == splits - 1:
            if splits > 1:
                tl.store(counter_ptr + slot * KV_HEADS + head, 0)
                out_MK = _joined(
                    partial_ptr,
                    lse2_ptr,
                    first * KV_HEADS + head,
                    splits,
                    mine_M,
                    KV_HEADS,
                    ROWS,
                    M,
                    WIDTH,
                    COLUMNS,
                )
            at_M = (slot_M.to(tl.int64) * heads + head_M) * WIDTH
            kind = out_ptr.dtype.element_ty
            tl.store(out_ptr + at_M[:, None] + column_1K, out_MK.to(kind), mask=mine_MK)


@jit
def _joined(
    partial_ptr,
    lse2_ptr,
    unit,
    splits,
    mine_M,
    KV_HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    M: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sum of a row's splits, in their order."""
    column_1K = tl.arange(0, COLUMNS)[None, :]
    mine_MK = mine_M[:, None] & (column_1K < WIDTH)
    high_M = tl.full((M,), LOWEST, tl.float32)
    sum_M = tl.zeros((M,), tl.float32)
    acc_MK = tl.zeros((M, COLUMNS), tl.float32)
    for i in tl.range(0, splits, num_stages=JOINED):
        here_M = (unit + i * KV_HEADS).to(tl.int64) * ROWS + tl.arange(0, M)
        lse2_M = tl.load(lse2_ptr + here_M, mask=mine_M, other=LOWEST)
        part_MK = tl.load(
            partial_ptr + here_M[:, None] * WIDTH + column_1K, mask=mine_MK, other=0.0
        )
        new_M = tl.maximum(high_M, lse2_M)
        weight_M, fade_M = tl.exp2(lse2_M - new_M), tl.exp2(high_M - new_M)
        sum_M = sum_M * fade_M + weight_M
        acc_MK = acc_MK * fade_M[:, None] + part_MK * weight_M[:, None]
        high_M = new_M
    return acc_MK / sum_M[:, None]


# -- launches ----------------------------------------------------------------------------------


def _power(n: int) -> int:
    """The power of two that is no less."""
    return 1 << (n - 1).bit_length()


def _queries(group: int, batch_invariant: bool) -> int:
    """Slots whose query heads share a tile."""
    if batch_invariant:
        return 1
    return min(MAX_QUERIES, max(TILE_ROWS, _power(group)) // group)


def partial_rows(num_slots: int, group: int, kv_heads: int) -> int:
    """Rows of partial results that a step of either kind may need."""
    fair = (max(PROGRAMS // kv_heads, 1) + 3 * num_slots) * _queries(group, False)
    return kv_heads * group * max(fair, SPLITS * num_slots)


def columns(width: int) -> dict[str, int]:
    return {"WIDTH": width, "COLUMNS": max(_power(width), 16)}


def _decode_options(
    num_slots: int, group: int, kv_heads: int, width: int, dtype: torch.dtype, invariant: bool
) -> tuple[dict[str, Any], dict[str, int]]:
    """(constants, options) of a launch."""
    tile, warps, stages = DECODE[dtype]
    constants = {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "QUERIES": _queries(group, invariant),
        "SLOTS": _power(num_slots),
        "M": max(TILE_ROWS, _power(group)),
        "TILE": tile,
        "STAGES": stages,
        "SHORT": SHORTEST,
        "INVARIANT": SPLITS if invariant else 0,
    }
    return constants | columns(width), {"num_warps": warps, "num_stages": stages}


def decode(
    q_CHK: Tensor,
    k_PSNK: Tensor,
    v_PSNK: Tensor,
    table_RP: Tensor,
    line_C: Tensor,
    position_C: Tensor,
    out_CHK: Tensor,
    partial: Tensor,
    lse2: Tensor,
    counter: Tensor,
    batch_invariant: bool,
) -> None:
    """decode_attention by the kernel, into out_CHK."""
    num_slots, heads, width = q_CHK.shape
    kv_heads = k_PSNK.shape[2]
    if not num_slots:
        return
    constants, options = _decode_options(
        num_slots, heads // kv_heads, kv_heads, width, q_CHK.dtype, batch_invariant
    )
    _decode_kernel[(PROGRAMS,)](
        q_CHK,
        k_PSNK,
        v_PSNK,
        table_RP,
        line_C,
        position_C,
        out_CHK,
        partial,
        lse2,
        counter,
        width**-0.5 * LOG2_E,
        num_slots,
        table_RP.stride(0),
        *q_CHK.stride()[:2],
        *k_PSNK.stride()[:3],
        *v_PSNK.stride()[:3],
        SIZE=k_PSNK.shape[1],
        **constants,
        **options,
    )


# -- what is compiled ahead of time -------------------------------------------------------------

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def types_of(name: str, pointers: tuple[str, ...], rows: str) -> dict[str, str]:
    strides = [f"q_stride_{d}" for d in (rows, "h")]
    strides += [f"{x}_stride_{d}" for x in "kv" for d in "psn"]
    return {
        **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{name}"),
        **dict.fromkeys(pointers, "*i32"),
        **dict.fromkeys(strides, "i32:16"),
        "scale2": "fp32",
    }


def _decode_case(name: str, slots: int, heads: tuple[int, int, int], invariant: bool = False):
    group, kv_heads, width = heads
    constants, options = _decode_options(slots, group, kv_heads, width, DTYPES[name], invariant)
    pointers = ("table_ptr", "line_ptr", "position_ptr", "counter_ptr")
    types = types_of(name, pointers, "c") | {"partial_ptr": "*fp32", "lse2_ptr": "*fp32"}
    types |= dict.fromkeys(("num_slots", "table_stride"), "i32")
    if slots == 1:  # which a launch makes a constant
        del types["num_slots"]
        constants["num_slots"] = 1
    full = (
        f"decode_attention/{name}/{slots} slots/{group * kv_heads} over {kv_heads} heads of {width}"
    )
    full += "/invariant" if invariant else ""
    return full, _decode_kernel, types, {**constants, "SIZE": 16}, options


COMPILE_CASES = [
    *(_decode_case("bf16", slots, (5, 8, 128)) for slots in (1, 8, 64)),
    _decode_case("bf16", 64, (5, 8, 128), True),
    _decode_case("bf16", 8, (7, 2, 64)),
    _decode_case("bf16", 8, (1, 16, 128)),
    _decode_case("bf16", 8, (5, 1, 128)),
    _decode_case("fp32", 8, (5, 8, 128)),
]
"""As softmax_gradient.COMPILE_CASES."""
