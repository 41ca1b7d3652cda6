"""The Triton kernels of advance.py: a program for every row that draws, then one that lays out the
next step.

Cost: the first passes over each row's logits once or more, see sample_triton.py; the second reads a
few integers a row, in some 5 us of latency. Measured on an H100: not yet.
"""

from __future__ import annotations

from torch import Tensor

from s1fast.kernels.automaton_triton import DONE, LENGTH, PHASE, mask, step
from s1fast.kernels.device_rows import GRAM, MIXERS, NEAR, Field, Rows, Slots
from s1fast.kernels.jit import constant, jit, tl
from s1fast.kernels.sample_triton import draw

TILE = 2048
"""Ids that a program looks at together."""
WARPS = 16
"""Of a program that draws: 512 threads with up to 128 registers each."""

_SIZE = constant(int(Field.SIZE))
_ACTIVE, _CACHED = constant(int(Field.ACTIVE)), constant(int(Field.CACHED))
_FED, _INDEXED = constant(int(Field.FED)), constant(int(Field.INDEXED))
_LIMIT, _DRAFTS = constant(int(Field.LIMIT)), constant(int(Field.DRAFTS))

_GRAM = constant(GRAM)
_MIX_0, _MIX_1, _MIX_2 = map(constant, MIXERS)
_MANY = constant(128)
"""Ids that are entered in the n-gram index together."""


@jit
def _gram_place(first, second, third, places):
    """device_rows.gram_place."""
    word = first.to(tl.uint32) * _MIX_0 + second.to(tl.uint32) * _MIX_1
    word += third.to(tl.uint32) * _MIX_2
    return ((word ^ (word >> 15)) & (places - 1).to(tl.uint32)).to(tl.int32)


@jit
def _index(gram_ptr, ids_ptr, first, length, places):
    """Enters the ends of GRAM ids from `first` on, that of the row left out."""
    for base in range(tl.maximum(first, _GRAM), length, _MANY):
        stop_T = base + tl.arange(0, _MANY)
        inside_T = stop_T < length
        id_ptr_T = ids_ptr + stop_T - _GRAM
        place_T = _gram_place(
            tl.load(id_ptr_T, mask=inside_T, other=0),
            tl.load(id_ptr_T + 1, mask=inside_T, other=0),
            tl.load(id_ptr_T + 2, mask=inside_T, other=0),
            places,
        )
        tl.atomic_max(gram_ptr + place_T, stop_T, mask=inside_T, sem="relaxed")


@jit
def _draw_kernel(
    draw_ptr,
    token_ptr,
    step_ptr,
    ring_ptr,
    near_ptr,
    state_ptr,
    ids_ptr,
    program_ptr,
    gram_ptr,
    ender_ptr,
    logits_ptr,
    logits_stride,
    vocab_size,
    lines,
    positions,
    table,
    places,
    ring_size,
    ring_width,
    TILE: tl.constexpr,
    NEAR: tl.constexpr,
):
    """A row's draws and what its automaton makes of them."""
    index = tl.program_id(0)
    line = tl.load(draw_ptr + 3 * index)
    wide = tl.maximum(line, 0).to(tl.int64)
    state_ptr += wide * _SIZE
    going = (line >= 0) & (tl.load(state_ptr + _ACTIVE) != 0)
    if going:
        slot = tl.load(draw_ptr + 3 * index + 1)
        wanted = tl.load(draw_ptr + 3 * index + 2)
        ids_ptr += wide * positions
        program_ptr += wide * table
        gram_ptr += wide * places
        near_ptr += index * (2 * NEAR)
        launch = tl.load(step_ptr)
        ring_ptr += ((launch % ring_size) * lines + wide) * ring_width

        length = tl.load(state_ptr + LENGTH)
        cached = length
        number = 0
        while going:
            row_ptr = logits_ptr + (slot + number).to(tl.int64) * logits_stride
            mask(row_ptr, program_ptr, state_ptr)
            token = draw(row_ptr, vocab_size, near_ptr, state_ptr, length, TILE, NEAR)
            tl.store(ring_ptr + 2 + number, token)
            plain, low, length = step(token, program_ptr, ender_ptr, ids_ptr, state_ptr)
            number += 1
            draft = tl.load(token_ptr + slot + number, mask=number < wanted, other=-1)
            going = plain & (draft == token)
            cached = tl.where(going, length, tl.minimum(cached, low))

        indexed = tl.load(state_ptr + _INDEXED)
        _index(gram_ptr, ids_ptr, tl.minimum(indexed, cached), length, places)
        tl.debug_barrier()
        tl.store(ring_ptr, ((launch + 1) & 0x7FFFFFFF).to(tl.int32))
        tl.store(ring_ptr + 1, number)
        tl.store(state_ptr + _CACHED, cached)
        tl.store(state_ptr + _FED, 0)
        tl.store(state_ptr + _INDEXED, length)


# -- layout ------------------------------------------------------------------------------------


@jit
def _drafts(state_ptr_R, ids_ptr_R, gram_ptr_R, length_R, asked_R, most, places):
    """(most drafts of every row that asks, where they begin among its ids)."""
    asked_R &= length_R > _GRAM
    last_ptr_R = ids_ptr_R + length_R - _GRAM
    first_R = tl.load(last_ptr_R, mask=asked_R, other=0)
    second_R = tl.load(last_ptr_R + 1, mask=asked_R, other=0)
    third_R = tl.load(last_ptr_R + 2, mask=asked_R, other=0)
    place_R = _gram_place(first_R, second_R, third_R, places)
    stop_R = tl.load(gram_ptr_R + place_R, mask=asked_R, other=0)
    asked_R &= (stop_R >= _GRAM) & (stop_R < length_R)
    found_ptr_R = ids_ptr_R + stop_R - _GRAM
    asked_R &= tl.load(found_ptr_R, mask=asked_R, other=-1) == first_R
    asked_R &= tl.load(found_ptr_R + 1, mask=asked_R, other=-1) == second_R
    asked_R &= tl.load(found_ptr_R + 2, mask=asked_R, other=-1) == third_R
    count_R = tl.minimum(tl.load(state_ptr_R + _DRAFTS, mask=asked_R, other=0), most)
    room_R = tl.load(state_ptr_R + _LIMIT, mask=asked_R, other=0) - length_R
    count_R = tl.minimum(tl.minimum(count_R, room_R), length_R - stop_R)
    return tl.where(asked_R, tl.maximum(count_R, 0), 0), stop_R


@jit
def _lay_out_kernel(
    token_ptr,
    position_ptr,
    line_ptr,
    live_ptr,
    draw_ptr,
    step_ptr,
    state_ptr,
    ids_ptr,
    gram_ptr,
    lines,
    slots,
    bucket,
    spare,
    launched,
    most_drafts,
    positions,
    places,
    LINES: tl.constexpr,
    SLOTS: tl.constexpr,
    BUCKET: tl.constexpr,
):
    line_R = tl.arange(0, LINES)
    inside_R = line_R < lines
    wide_R = line_R.to(tl.int64)
    state_ptr_R = state_ptr + wide_R * _SIZE
    ids_ptr_R = ids_ptr + wide_R * positions
    length_R = tl.load(state_ptr_R + LENGTH, mask=inside_R, other=0)
    cached_R = tl.load(state_ptr_R + _CACHED, mask=inside_R, other=0)
    if launched != 0:
        cached_R += tl.load(state_ptr_R + _FED, mask=inside_R, other=0)
        tl.store(state_ptr_R + _CACHED, cached_R, mask=inside_R)
        tl.store(step_ptr, tl.load(step_ptr) + 1)
    going_R = tl.load(state_ptr_R + _ACTIVE, mask=inside_R, other=0) != 0
    going_R &= tl.load(state_ptr_R + PHASE, mask=inside_R, other=DONE) != DONE
    going_R &= tl.cumsum(going_R.to(tl.int32), axis=0) <= bucket
    left = tl.minimum(spare, slots - tl.sum(going_R.to(tl.int32), axis=0))

    # More of what there is to feed, the shortest first.
    rest_R = tl.where(going_R, tl.maximum(length_R - cached_R - 1, 0), 0)
    before_RR = (rest_R[None, :] < rest_R[:, None]) | (
        (rest_R[None, :] == rest_R[:, None]) & (line_R[None, :] < line_R[:, None])
    )
    ahead_R = tl.sum(tl.where(before_RR, rest_R[None, :], 0), axis=1)
    more_R = tl.minimum(tl.maximum(left - ahead_R, 0), rest_R)
    left -= tl.sum(more_R, axis=0)

    draws_R = going_R & (more_R == rest_R)
    gram_ptr_R = gram_ptr + wide_R * places
    drafts_R, stop_R = _drafts(
        state_ptr_R, ids_ptr_R, gram_ptr_R, length_R, draws_R, most_drafts, places
    )
    ahead_R = tl.cumsum(drafts_R, axis=0) - drafts_R
    drafts_R = tl.minimum(tl.maximum(left - ahead_R, 0), drafts_R)

    fed_R = tl.where(going_R, 1 + more_R, 0)
    tl.store(state_ptr_R + _FED, fed_R, mask=inside_R)
    end_R = tl.cumsum(fed_R + drafts_R, axis=0)
    first_R = end_R - fed_R - drafts_R
    live = tl.sum(fed_R + drafts_R, axis=0)
    tl.store(live_ptr, live)

    # A slot finds its row, and from it its place among the row's ids.
    slot_C = tl.arange(0, SLOTS)
    mine_CR = (slot_C[:, None] >= first_R[None, :]) & (slot_C[:, None] < end_R[None, :])
    shift_R = length_R - 1 - rest_R - first_R
    line_C = tl.sum(tl.where(mine_CR, line_R[None, :], 0), axis=1)
    position_C = slot_C + tl.sum(tl.where(mine_CR, shift_R[None, :], 0), axis=1)
    length_C = tl.sum(tl.where(mine_CR, length_R[None, :], 0), axis=1)
    stop_C = tl.sum(tl.where(mine_CR, stop_R[None, :], 0), axis=1)
    from_C = tl.where(position_C < length_C, position_C, stop_C + position_C - length_C)
    used_C = slot_C < live
    id_ptr_C = ids_ptr + line_C.to(tl.int64) * positions + from_C
    token_C = tl.load(id_ptr_C, mask=used_C, other=0)
    tl.store(token_ptr + slot_C, token_C, mask=slot_C < slots)
    tl.store(position_ptr + slot_C, tl.where(used_C, position_C, 0), mask=slot_C < slots)
    tl.store(line_ptr + slot_C, tl.where(used_C, line_C, -1), mask=slot_C < slots)

    order_R = tl.cumsum(draws_R.to(tl.int32), axis=0) - 1
    tl.store(draw_ptr + 3 * order_R, line_R, mask=draws_R)
    tl.store(draw_ptr + 3 * order_R + 1, first_R + fed_R - 1, mask=draws_R)
    tl.store(draw_ptr + 3 * order_R + 2, 1 + drafts_R, mask=draws_R)
    idle_B = tl.arange(0, BUCKET)
    behind_B = (idle_B >= tl.sum(draws_R.to(tl.int32), axis=0)) & (idle_B < bucket)
    tl.store(draw_ptr + 3 * idle_B, -1, mask=behind_B)
    tl.store(draw_ptr + 3 * idle_B + 1, 0, mask=behind_B)
    tl.store(draw_ptr + 3 * idle_B + 2, 0, mask=behind_B)


# -- launches ----------------------------------------------------------------------------------


def draw_(rows: Rows, slots: Slots, logits_CV: Tensor, vocab_size: int) -> None:
    """The first half of advance."""
    near = slots.near_BK.shape[1] // 2
    _draw_kernel[(len(slots.draw_B3),)](
        slots.draw_B3,
        slots.token_C,
        slots.step,
        slots.ring_DRW,
        slots.near_BK,
        rows.state_RF,
        rows.ids_RX,
        rows.program_RZ,
        rows.gram_RG,
        rows.ender_V,
        logits_CV,
        logits_CV.stride(0),
        vocab_size,
        len(rows.state_RF),
        rows.ids_RX.shape[1],
        rows.program_RZ.shape[1],
        rows.gram_RG.shape[1],
        slots.ring_DRW.shape[0],
        slots.ring_DRW.shape[2],
        TILE=min(TILE, near),
        NEAR=near,
        num_warps=WARPS,
    )


def lay_out_(rows: Rows, slots: Slots, spare: int, launched: bool) -> None:
    """lay_out; `launched`: the step laid out last was run."""
    lines, size, bucket = len(rows.state_RF), len(slots.token_C), len(slots.draw_B3)
    _lay_out_kernel[(1,)](
        slots.token_C,
        slots.position_C,
        slots.line_C,
        slots.live,
        slots.draw_B3,
        slots.step,
        rows.state_RF,
        rows.ids_RX,
        rows.gram_RG,
        lines,
        size,
        bucket,
        spare,
        int(launched),
        slots.ring_DRW.shape[2] - 3,
        rows.ids_RX.shape[1],
        rows.gram_RG.shape[1],
        LINES=_lanes(lines),
        SLOTS=_lanes(size),
        BUCKET=_lanes(bucket),
        num_warps=8,
    )


def _lanes(size: int) -> int:
    """The power of 2 that holds so many, at least 16."""
    return 1 << max(4, (size - 1).bit_length())


_TYPES = {
    "draw_ptr": "*i32",
    "token_ptr": "*i32",
    "step_ptr": "*i64",
    "state_ptr": "*i32",
    "ids_ptr": "*i32",
    "gram_ptr": "*i32",
    "lines": "i32",
    "positions": "i32:16",
    "places": "i32:16",
}
COMPILE_CASES = [
    *(
        (
            f"advance/draw/{name}",
            _draw_kernel,
            {
                **_TYPES,
                "ring_ptr": "*i32",
                "near_ptr": "*i32",
                "program_ptr": "*i32",
                "ender_ptr": "*u8",
                "logits_ptr": f"*{name}",
                "logits_stride": "i32:16",
                "vocab_size": "i32",
                "table": "i32:16",
                "ring_size": "i32",
                "ring_width": "i32",
            },
            {"TILE": TILE, "NEAR": NEAR},
            {"num_warps": WARPS},
        )
        for name in ("bf16", "fp32")
    ),
    (
        "advance/lay_out",
        _lay_out_kernel,
        {
            **_TYPES,
            "position_ptr": "*i32",
            "line_ptr": "*i32",
            "live_ptr": "*i32",
            "slots": "i32",
            "bucket": "i32",
            "spare": "i32",
            "launched": "i32",
            "most_drafts": "i32",
        },
        {"LINES": 64, "SLOTS": 128, "BUCKET": 64},
        {"num_warps": 8},
    ),
]
"""(name, kernel, argument types, constants, options) of what is shipped; ":16" divides by 16."""
