"""Packed attention forward in Gluon, for Hopper: products of one consumer during another's softmax.

A block is a producer warp, which copies tiles of queries, keys and values through TMA, and two
warpgroups (or three) of 64 queries each that consume them. Blocks are as many as multiprocessors,
and each takes one item (tile of queries, head) of the host's list after another; so the copies of
an item begin while the one before it is finished. Keys and values lie in rings of STAGES tiles;
each slot has a barrier that says full and one that says empty, used like this for the i-th tile:

    slot i % STAGES;  consumers wait for the phase i // STAGES % 2 of full, the producer for the
    opposite one of empty, which is over from the start

Within a consumer the scores of the next tile of keys, and the product of this tile's probabilities
with the values, are issued together; the softmax of those scores runs during the latter. With
PINGPONG consumers take turns in issuing, so that one's softmax runs during the other's products.
Tiles go from the last keys to the first: what needs a mask comes first, the rest needs none.

Descriptors span the whole stream, made once by each block. What a neighbouring sequence holds must
not enter, not even a NaN: scores of keys beyond the sequence are replaced, values beyond it, which
their probability of zero would not make harmless, are overwritten with zeros by the producer (once
for an item at most), and rows beyond it are not stored.

FLOPs and floor as in packed_attention.py: 3.9 TFLOP, 4.8 ms at 820 TFLOP/s (an H200's products) for
a batch of s1K. Expected, and never measured: 550 to 620 TFLOP/s, where the Triton forward has 453:
a warpgroup's exponentials take 512 cycles of the 1,024 that its products do, and hide behind them.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from s1fast.kernels.jit import constant, gl, gluon_jit, hopper
from s1fast.kernels.packed_attention_triton import (
    LOG2_E,
    LOWEST,
    allow_descriptors,
    cases,
    empty_results,
    strides_of,
    tiles,
)

ROWS = constant(64)
"""Queries of a consumer: what one matrix instruction takes."""

Tile = tuple[int, int, int, bool]
"""(consumers, key rows, stages, whether consumers take turns)."""
FORWARD: dict[int, Tile] = {64: (2, 128, 4, True), 128: (2, 128, 2, True)}
"""Head width -> the configuration that is shipped."""
REGISTERS = {2: (168, 232, 40), 3: (128, 160, 32)}
"""Consumers -> registers of a thread: at launch, of a consumer, of the producer. A multiprocessor
has 65,536, warpgroups are as many as consumers and one."""


@gluon_jit
def _item_of(step, items):
    """The step-th item of this block: odd rounds run backwards, which evens out the weights."""
    blocks, block = gl.num_programs(0), gl.program_id(0)
    return step * blocks + (block if step % 2 == 0 else blocks - 1 - block)


@gluon_jit
def _tile_of(tile_ptr, index, M: gl.constexpr, N: gl.constexpr, CAUSAL: gl.constexpr):
    """(first token of the sequence, its length, first row of the tile, tiles of keys it sees)."""
    start = gl.load(tile_ptr + 3 * index)
    length = gl.load(tile_ptr + 3 * index + 1)
    row = gl.load(tile_ptr + 3 * index + 2)
    stop = gl.minimum(row + M, length) if CAUSAL else length
    return start, length, row, (stop + N - 1) // N


@gluon_jit
def _slot(i, STAGES: gl.constexpr):
    """(slot of the ring for its i-th tile, phase of the slot's barriers)."""
    return i % STAGES, i // STAGES % 2


# -- producer ------------------------------------------------------------------------------------


@gluon_jit
def _copy(desc, head, row, full, to):
    hopper.mbarrier.expect(full, desc.block_type.nbytes)
    hopper.tma.async_copy_global_to_shared(desc, [head, row, 0], full, to)


@gluon_jit
def _copy_values(
    desc, head, row, known, edge, edges, full, v_NK, N: gl.constexpr, LAYOUT: gl.constexpr
):
    """_copy, where only the first `known` values are the sequence's own: others become zeros.

    Returns how many tiles were such an edge so far.
    """
    if known >= N:
        _copy(desc, head, row, full, v_NK)
    else:
        _copy(desc, head, row, edge, v_NK)
        hopper.mbarrier.wait(edge, edges % 2)
        row_8 = gl.arange(0, 8, gl.SliceLayout(1, LAYOUT))
        for i in gl.static_range(0, N, 8):
            piece_8K = v_NK.slice(i, 8)
            value_8K = piece_8K.load(LAYOUT)
            piece_8K.store(gl.where((row_8 < known - i)[:, None], value_8K, 0.0))
        hopper.fence_async_shared()
        hopper.mbarrier.arrive(full, count=1)
        edges += 1
    return edges


@gluon_jit
def _produce(
    made,
    K: gl.constexpr,
    PARTS: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    """Copies what the consumers need, as slots become empty."""
    inputs, strides, tile_ptr, rings, edge, sizes = made
    q_ptr, k_ptr, v_ptr = inputs
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh = strides
    num_tokens, heads, group, items = sizes
    queries, keys, values = rings
    q_PRK, q_full, q_empty = queries
    k_SNK, k_full, k_empty = keys
    v_SNK, v_full, v_empty = values
    Q_BOX: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, ROWS, K], gl.bfloat16)
    BOX: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, N, K], gl.bfloat16)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K, K // 8], [1, 1], [1, 0])
    kv_heads = heads // group
    q_desc = hopper.tma.make_tensor_descriptor(
        q_ptr, [heads, num_tokens, K], [stride_qh, stride_qt, 1], [1, ROWS, K], Q_BOX
    )
    k_desc = hopper.tma.make_tensor_descriptor(
        k_ptr, [kv_heads, num_tokens, K], [stride_kh, stride_kt, 1], [1, N, K], BOX
    )
    v_desc = hopper.tma.make_tensor_descriptor(
        v_ptr, [kv_heads, num_tokens, K], [stride_vh, stride_vt, 1], [1, N, K], BOX
    )
    count = 0  # tiles of keys, and of values, of the items before
    edges = 0
    for step in range(gl.cdiv(items, gl.num_programs(0))):
        item = _item_of(step, items)
        if item < items:
            head = item % heads
            start, length, row, columns = _tile_of(tile_ptr, item // heads, PARTS * ROWS, N, CAUSAL)
            for part in gl.static_range(PARTS):
                hopper.mbarrier.wait(q_empty.index(part), (step + 1) % 2)
                to_RK = q_PRK.index(part)
                _copy(q_desc, head, start + row + part * ROWS, q_full.index(part), to_RK)
            # In the order of use: the keys of a tile, then the values of the one before it.
            for i in range(columns + 1):
                column = (columns - 1 - i) * N
                if i < columns:
                    slot, phase = _slot(count + i, STAGES)
                    hopper.mbarrier.wait(k_empty.index(slot), 1 - phase)
                    full, to_NK = k_full.index(slot), k_SNK.index(slot)
                    _copy(k_desc, head // group, start + column, full, to_NK)
                if i > 0:
                    column += N
                    slot, phase = _slot(count + i - 1, STAGES)
                    hopper.mbarrier.wait(v_empty.index(slot), 1 - phase)
                    edges = _copy_values(
                        v_desc,
                        head // group,
                        start + column,
                        length - column,
                        edge,
                        edges,
                        v_full.index(slot),
                        v_SNK.index(slot),
                        N,
                        WIDE,
                    )
            count += columns


# -- consumers -----------------------------------------------------------------------------------


@gluon_jit
def _issue_scores(q_RK, k_NK, N: gl.constexpr, LAYOUT: gl.constexpr):
    zero_RN = gl.zeros((ROWS, N), gl.float32, LAYOUT)
    return hopper.warpgroup_mma(q_RK, k_NK.permute((1, 0)), zero_RN, use_acc=False, is_async=True)


@gluon_jit
def _mask(score_RN, column, last_R, N: gl.constexpr, LAYOUT: gl.constexpr):
    column_N = gl.arange(0, N, gl.SliceLayout(0, LAYOUT))
    return gl.where(column_N[None, :] <= (last_R - column)[:, None], score_RN, LOWEST)


@gluon_jit
def _as_operand(p_RN, LAYOUT: gl.constexpr):
    return gl.convert_layout(p_RN.to(gl.bfloat16), gl.DotOperandLayout(0, LAYOUT, 2))


@gluon_jit
def _take(
    rings,
    turn,
    step,
    count,
    column,
    last_R,
    scale2,
    high_R,
    sum_R,
    acc_RK,
    p_RN,
    PART: gl.constexpr,
    PARTS: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    PINGPONG: gl.constexpr,
    MASKED: gl.constexpr,
    SCORE: gl.constexpr,
    ACC: gl.constexpr,
):
    """Scores and softmax of the tile of keys `count`, product with the values of the one before."""
    queries, keys, values = rings
    q_PRK, q_full, _ = queries
    k_SNK, k_full, k_empty = keys
    v_SNK, v_full, v_empty = values
    slot, phase = _slot(count, STAGES)
    hopper.mbarrier.wait(k_full.index(slot), phase)
    before, phase = _slot(count - 1, STAGES)
    hopper.mbarrier.wait(v_full.index(before), phase)
    if PINGPONG:  # the first consumer's first turn is its own from the start
        turns = count - step - 1
        hopper.mbarrier.wait(turn.index(PART), (turns + 1) % 2 if PART == 0 else turns % 2)
    score = _issue_scores(q_PRK.index(PART), k_SNK.index(slot), N, SCORE)
    acc = hopper.warpgroup_mma(p_RN, v_SNK.index(before), acc_RK, is_async=True)
    if PINGPONG:
        hopper.mbarrier.arrive(turn.index((PART + 1) % PARTS), count=1)
    score_RN = hopper.warpgroup_mma_wait(1, [score])
    hopper.mbarrier.arrive(k_empty.index(slot), count=1)
    if MASKED:
        score_RN = _mask(score_RN, column, last_R, N, SCORE)
    new_R = gl.maximum(high_R, gl.max(score_RN, 1))
    next_RN = gl.exp2(score_RN * scale2 - (new_R * scale2)[:, None])
    fade_R = gl.exp2((high_R - new_R) * scale2)
    sum_R = sum_R * fade_R + gl.sum(next_RN, 1)
    # Over since the item began; but a wait is a loop, and out of it ptxas moves nothing. Without
    # one it puts the softmax behind the next instruction, and nothing overlaps.
    hopper.mbarrier.wait(q_full.index(PART), step % 2)
    acc_RK = hopper.warpgroup_mma_wait(0, [acc])
    hopper.mbarrier.arrive(v_empty.index(before), count=1)
    acc_RK = acc_RK * gl.convert_layout(fade_R, gl.SliceLayout(1, ACC))[:, None]
    return new_R, sum_R, acc_RK, _as_operand(next_RN, ACC)


@gluon_jit
def _consume(
    taken,
    PART: gl.constexpr,
    K: gl.constexpr,
    PARTS: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    PINGPONG: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    """Rows PART * 64 and on of every tile of this block."""
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K, K // 8], [4, 1], [1, 0])
    M: gl.constexpr = PARTS * ROWS
    results, tile_ptr, rings, turn, scale2, sizes = taken
    out_ptr, lse2_ptr, stride_ot, stride_oh = results
    num_tokens, heads, _, items = sizes
    queries, keys, values = rings
    q_PRK, q_full, q_empty = queries
    k_SNK, k_full, k_empty = keys
    v_SNK, v_full, v_empty = values
    count = 0  # tiles of keys of the items before
    for step in range(gl.cdiv(items, gl.num_programs(0))):
        item = _item_of(step, items)
        if item < items:
            head = item % heads
            start, length, row, columns = _tile_of(tile_ptr, item // heads, M, N, CAUSAL)
            row_R = row + PART * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SCORE))
            last_R = gl.minimum(row_R, length - 1) if CAUSAL else row_R * 0 + length - 1
            slot, phase = _slot(count, STAGES)
            hopper.mbarrier.wait(q_full.index(PART), step % 2)
            hopper.mbarrier.wait(k_full.index(slot), phase)
            score = _issue_scores(q_PRK.index(PART), k_SNK.index(slot), N, SCORE)
            score_RN = hopper.warpgroup_mma_wait(0, [score])
            hopper.mbarrier.arrive(k_empty.index(slot), count=1)
            score_RN = _mask(score_RN, (columns - 1) * N, last_R, N, SCORE)
            high_R = gl.max(score_RN, 1)
            p_RN = gl.exp2(score_RN * scale2 - (high_R * scale2)[:, None])
            sum_R = gl.sum(p_RN, 1)
            p_RN = _as_operand(p_RN, ACC)
            acc_RK = gl.zeros((ROWS, K), gl.float32, ACC)
            DEEP: gl.constexpr = CAUSAL and M > N  # the diagonal reaches beyond the first tile
            first = columns - row // N if DEEP else 1
            for free in gl.static_range(0 if DEEP else 1, 2):  # with a mask, then without
                for i in range(first if free else 1, columns if free else first):
                    high_R, sum_R, acc_RK, p_RN = _take(
                        rings,
                        turn,
                        step,
                        count + i,
                        (columns - 1 - i) * N,
                        last_R,
                        scale2,
                        high_R,
                        sum_R,
                        acc_RK,
                        p_RN,
                        PART,
                        PARTS,
                        N,
                        STAGES,
                        PINGPONG,
                        free == 0,
                        SCORE,
                        ACC,
                    )
            hopper.mbarrier.arrive(q_empty.index(PART), count=1)
            count += columns
            slot, phase = _slot(count - 1, STAGES)
            hopper.mbarrier.wait(v_full.index(slot), phase)
            acc = hopper.warpgroup_mma(p_RN, v_SNK.index(slot), acc_RK, is_async=True)
            acc_RK = hopper.warpgroup_mma_wait(0, [acc])
            hopper.mbarrier.arrive(v_empty.index(slot), count=1)

            head = head.to(gl.int64)
            lse2_R = high_R * scale2 + gl.log2(sum_R)
            gl.store(lse2_ptr + head * num_tokens + start + row_R, lse2_R, mask=row_R < length)
            share_R = gl.convert_layout(1.0 / sum_R, gl.SliceLayout(1, ACC))
            out_RK = gl.convert_layout((acc_RK * share_R[:, None]).to(gl.bfloat16), WIDE)
            row_R = row + PART * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, WIDE))
            at_R = (start + row_R).to(gl.int64) * stride_ot + head * stride_oh
            at_RK = at_R[:, None] + gl.arange(0, K, gl.SliceLayout(0, WIDE))[None, :]
            gl.store(out_ptr + at_RK, out_RK, mask=(row_R < length)[:, None])


# -- kernel --------------------------------------------------------------------------------------


@gluon_jit
def _ring(SIZE: gl.constexpr, ROWS_OF: gl.constexpr, K: gl.constexpr, READERS: gl.constexpr):
    """(tiles in shared memory, their full barriers, their empty barriers)."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS_OF, K], gl.bfloat16)
    tile = gl.allocate_shared_memory(gl.bfloat16, [SIZE, ROWS_OF, K], LAYOUT)
    return tile, _barriers(SIZE, 1), _barriers(SIZE, READERS)


@gluon_jit
def _barriers(SIZE: gl.constexpr, ARRIVALS: gl.constexpr):
    found = gl.allocate_shared_memory(gl.int64, [SIZE, 1], hopper.mbarrier.MBarrierLayout())
    for i in gl.static_range(SIZE):
        hopper.mbarrier.init(found.index(i), count=ARRIVALS)
    return found


@gluon_jit
def _attention_forward_gluon_kernel(
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
    items,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    K: gl.constexpr,
    PARTS: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    PINGPONG: gl.constexpr,
    CAUSAL: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    queries = _ring(PARTS, ROWS, K, 1)
    keys = _ring(STAGES, N, K, PARTS)
    values = _ring(STAGES, N, K, PARTS)
    turn = _barriers(PARTS, 1)
    edge = _barriers(1, 1)
    hopper.fence_async_shared()  # copies count on the barriers too
    rings = (queries, keys, values)
    results = (out_ptr, lse2_ptr, stride_ot, stride_oh)
    inputs = (q_ptr, k_ptr, v_ptr)
    strides = (stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh)
    sizes = (num_tokens, heads, group, items)
    taken = (results, tile_ptr, rings, turn, scale2, sizes)
    made = (inputs, strides, tile_ptr, rings, edge.index(0), sizes)
    if PARTS == 2:
        gl.warp_specialize(
            [
                (_consume, (taken, 0, K, PARTS, N, STAGES, PINGPONG, CAUSAL)),
                (_consume, (taken, 1, K, PARTS, N, STAGES, PINGPONG, CAUSAL)),
                (_produce, (made, K, PARTS, N, STAGES, CAUSAL)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (taken, 0, K, PARTS, N, STAGES, PINGPONG, CAUSAL)),
                (_consume, (taken, 1, K, PARTS, N, STAGES, PINGPONG, CAUSAL)),
                (_consume, (taken, 2, K, PARTS, N, STAGES, PINGPONG, CAUSAL)),
                (_produce, (made, K, PARTS, N, STAGES, CAUSAL)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )


# -- launch --------------------------------------------------------------------------------------


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _constants(tile: Tile, width: int, causal: bool) -> tuple[dict[str, int], dict[str, int]]:
    parts, columns, stages, turns = tile
    launched, consumer, producer = REGISTERS[parts]
    constants = {"K": width, "PARTS": parts, "N": columns, "STAGES": stages, "PINGPONG": turns}
    constants |= {"CAUSAL": causal}
    constants |= {"CONSUMER_REGISTERS": consumer, "PRODUCER_REGISTERS": producer}
    return constants, {"num_warps": 4, "maxnreg": launched}


def forward(
    q_THK: Tensor,
    k_TNK: Tensor,
    v_TNK: Tensor,
    bounds: tuple[int, ...],
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As packed_attention_triton.forward."""
    num_tokens, heads, width = q_THK.shape
    out_THK, lse2_HT = empty_results(q_THK, bounds)
    tile = FORWARD[width]
    table = tiles(bounds, tile[0] * 64, causal, q_THK.device)
    items = len(table) * heads
    if not items:
        return out_THK, lse2_HT
    constants, options = _constants(tile, width, causal)
    allow_descriptors()
    _attention_forward_gluon_kernel[(min(items, _multiprocessors(q_THK.device)),)](
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
        items,
        *strides_of(q_THK, k_TNK, v_TNK, out_THK),
        **constants,
        **options,
    )
    return out_THK, lse2_HT


COMPILE_CASES = [*cases("gluon", _attention_forward_gluon_kernel, FORWARD, _constants)]
"""As softmax_gradient.COMPILE_CASES."""
