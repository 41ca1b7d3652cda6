"""What tests/mutation_check.py breaks in decode attention, prefill attention and append."""

from __future__ import annotations

from mutation import Mutation

ATTENTION = "tests/test_decode_attention.py"
_FILLED = "test_a_row_fills_all_programs_whatever_else_is_idle"


def _decode(name: str, old: str, new: str, *tests: str) -> Mutation:
    """`tests` are the functions that the mutation takes, if not all."""
    chosen = tuple(f"{ATTENTION}::{test}" for test in tests) or (ATTENTION,)
    file = "kernels/decode_attention_triton.py"
    return Mutation(f"decode attention: {name}", file, old, new, chosen)


def _prefill(name: str, old: str, new: str) -> Mutation:
    tests = (f"{ATTENTION}::test_prefill", f"{ATTENTION}::test_pages_beyond_int32")
    return Mutation(
        f"prefill attention: {name}", "kernels/prefill_attention_triton.py", old, new, tests
    )


def _append(name: str, old: str, new: str) -> Mutation:
    tests = ("tests/test_page_append.py",)
    return Mutation(f"append: {name}", "kernels/page_append.py", old, new, tests)


def _refused(name: str, old: str, new: str) -> Mutation:
    """Of a check that turns bad arguments away."""
    tests = (f"{ATTENTION}::test_bad_arguments_are_named",)
    return Mutation(f"decode attention: {name}", "kernels/decode_attention.py", old, new, tests)


MUTATIONS = (
    # -- a tile of keys
    _decode("mask one late", "key_N[None, :] <= last_M", "key_N[None, :] <= 1 + last_M"),
    _decode("mask one short", "key_N[None, :] <= last_M", "key_N[None, :] < last_M"),
    _decode("read beyond a row's end", "inside_N = key_N < length", "inside_N = key_N <= length"),
    _decode("sum without rescale", "sum_M * fade_M + tl.sum", "sum_M + tl.sum"),
    _decode("output without rescale", "acc_MK = acc_MK * fade_M[:, None]\n        acc", "acc"),
    _decode(
        "maximum of this tile alone",
        "tl.maximum(high_M, tl.max(score_MN, 1))",
        "tl.max(score_MN, 1)",
    ),
    _decode("scale to base e", "width**-0.5 * LOG2_E", "width**-0.5"),
    _decode("nothing seen is NaN", "tl.where(sum_M == 0.0, 1.0, sum_M)", "sum_M"),
    _decode(
        "pages in 32 bits",
        "other=0).to(tl.int64)\n    return",
        "other=0)\n    return",
        "test_pages_beyond_int32",
    ),
    _decode("offset in the page", "(key_N % SIZE)", "(key_N % SIZE // 2)"),
    # -- the cut
    _decode("a split to the row's end", "tl.minimum(start + size, length)", "length"),
    _decode(
        "splits that share a tile",
        "tl.cdiv(tl.cdiv(length, splits), TILE) * TILE",
        "tl.cdiv(length, splits)",
    ),
    _decode(
        "length of the first slot",
        "tl.where(same_C, tl.maximum(length_C, further_C), length_C)",
        "length_C",
    ),
    _decode(
        "every slot leads",
        "leads_C &= tl.load(line_ptr + slot_C - i, mask=before_C, other=-1) != line_C",
        "pass",
        _FILLED,
    ),
    _decode("splits without end", "programs) - rows + 1", "programs) * 3 - rows + 1", _FILLED),
    _decode("splits that leave programs idle", "tl.cdiv(3 * rows, programs)", "1", _FILLED),
    _decode(
        "splits too short",
        "tl.maximum(tl.cdiv(split_C, TILE) * TILE, SHORT)",
        "tl.maximum(tl.cdiv(split_C, TILE) * TILE, TILE // 2)",
    ),
    _decode(
        "one split too few",
        "units = tl.sum(splits_C, 0) * KV_HEADS",
        "units = tl.sum(splits_C, 0) * KV_HEADS - 1",
    ),
    _decode(
        "invariant slots share",
        "    if batch_invariant:\n        return 1\n",
        "",
        "test_batch_invariant",
    ),
    _decode("invariant to nothing", '"INVARIANT": SPLITS if invariant else 0', '"INVARIANT": 0'),
    # -- who answers for what
    _decode("slots of the next program", "(slot_M // QUERIES == slot // QUERIES)", "(slot_M >= 0)"),
    _decode("slots of other rows", "mask=mine_M, other=-1) == line", "mask=mine_M, other=-1) >= 0"),
    _decode("heads of the first group", "head * GROUP + row_M % GROUP", "row_M % GROUP"),
    _decode("row of the table", "line.to(tl.int64) * table_stride", "line.to(tl.int64) * 0"),
    _decode("idle slots", "if tl.load(line_ptr + slot) < 0", "if tl.load(line_ptr + slot) < -1"),
    # -- the sum of the splits
    _decode("joined by the first", "if arrived == splits - 1", "if arrived == 0"),
    _decode("counter not reset", "head, 0)\n", "head, 1)\n"),
    _decode("another head's results", "first * KV_HEADS + head", "first * KV_HEADS"),
    _decode("a split left out", "tl.range(0, splits, num", "tl.range(1, splits, num"),
    _decode("splits of equal weight", "tl.exp2(lse2_M - new_M), tl", "lse2_M * 0 + 1, tl"),
    _decode("joined without rescale", "acc_MK * fade_M[:, None] + part", "acc_MK + part"),
    # -- prefill
    _prefill("positions of the chunk", "start + token_M, -1", "token_M, -1"),
    _prefill(
        "read beyond the last token", "start + tl.minimum(row + M, num_tokens)", "start + row + M"
    ),
    _prefill("key head", "k_ptr + head // group", "k_ptr + 0 * head"),
    _prefill("a tile short", "tl.cdiv(num_tokens, M) - 1 -", "tl.cdiv(num_tokens, M) - 2 -"),
    # -- append
    _append("no bias", "    if BIASED:\n", "    if False:\n"),
    _append("values turned", "head_H < HEADS + KV_HEADS)", "head_H < HEADS + 2 * KV_HEADS)"),
    _append("keys not turned", "head_H < HEADS + KV_HEADS)", "head_H < HEADS)"),
    _append("sense of rotation", "b_HR * cos_1R + a_HR * sin_1R", "b_HR * cos_1R - a_HR * sin_1R"),
    _append("angle of the slot", "angle_R = position.to", "angle_R = slot.to"),
    _append("offset in the page", "offset = (position % SIZE)", "offset = (position % SIZE // 2)"),
    _append("page of the first row", "tl.where(live, line, 0).to", "tl.where(live, 0, 0).to"),
    _append("pages in 32 bits", "other=0).to(tl.int64)\n", "other=0)\n"),
    _append("NaN into the sink", "tl.where(live, d_HR, 0.0)", "d_HR"),
    _append("sink", "mask=live, other=0)", "mask=live, other=1)"),
    _append("a head too many", "(head_H < TOTAL)", "(head_H <= TOTAL)"),
    _append("stride of the values", "value_H * v_stride_n", "value_H * k_stride_n"),
    # -- checks
    _refused(
        "page table of int64",
        'expect("table_RP", table_RP, ("R", "P"), (torch.int32,)',
        'expect("table_RP", table_RP, ("R", "P"), (table_RP.dtype,)',
    ),
    _refused("too few pages", "len(table_P) < needed", "len(table_P) < 0"),
    _refused("workspace", "if not large or", "if"),
)
