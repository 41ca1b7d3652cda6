"""Breaks the code in one place after another and shows that the tests notice each time.

    python tests/mutation_check.py [--only WORD]

Each mutation replaces one piece of text in a copy of the project and runs tests there until one
fails. A mutation that no test notices is a hole in the tests: the exit status is then 1. So it is
if the tests fail without any mutation, or if a mutation's text is not found exactly once, or if its
tests do not run.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 600
NOT_COPIED = shutil.ignore_patterns(".*", "out", "*.egg-info", "__pycache__")


@dataclass(frozen=True)
class Mutation:
    """`old` becomes `new` in `file`; both may be pieces of a line."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ("tests/test_linear_cross_entropy.py",)


def _rows(name: str, old: str, new: str) -> Mutation:
    return Mutation(f"row kernel: {name}", "kernels/softmax_gradient.py", old, new)


def _head(name: str, old: str, new: str) -> Mutation:
    return Mutation(f"head: {name}", "kernels/linear_cross_entropy.py", old, new)


ATTENTION = "tests/test_packed_attention.py"


def _attention(name: str, old: str, new: str, *tests: str) -> Mutation:
    """In the kernels and their launches; `tests` are the functions that it takes, if not all."""
    chosen = tuple(f"{ATTENTION}::{test}" for test in tests) or (ATTENTION,)
    file = "kernels/packed_attention_triton.py"
    return Mutation(f"attention: {name}", file, old, new, chosen)


def _attention_call(name: str, old: str, new: str, *tests: str) -> Mutation:
    """In what checks the arguments and registers the operation."""
    kernels = _attention(name, old, new, *tests)
    return replace(kernels, file="kernels/packed_attention.py")


def _norm(name: str, old: str, new: str) -> Mutation:
    tests = ("tests/test_rms_norm.py",)
    return Mutation(f"RMSNorm: {name}", "kernels/rms_norm.py", old, new, tests)


def _rope(name: str, old: str, new: str) -> Mutation:
    return Mutation(f"RoPE: {name}", "kernels/rope.py", old, new, ("tests/test_rope.py",))


def _swiglu(name: str, old: str, new: str) -> Mutation:
    return Mutation(f"SwiGLU: {name}", "kernels/swiglu.py", old, new, ("tests/test_swiglu.py",))


def _refused(name: str, old: str, new: str) -> Mutation:
    """Of a check that turns bad arguments away."""
    return _attention_call(name, old, new, "test_bad_arguments_are_named")


MUTATIONS = (
    _rows("mask one short", "column_JL < vocab - whole\n", "column_JL < vocab - whole - 1\n"),
    _rows("masked logits count", 'mask=rest_JL, other=float("-inf")', "mask=rest_JL, other=0.0"),
    _rows(
        "tail tile not summed",
        "            high_L, sum_L = _add_tile(last_JL.to(tl.float32), high_L, sum_L)\n",
        "",
    ),
    _rows(
        "tail tile not written",
        "tl.store(out_ptr, last_JL.to(logits_ptr.dtype.element_ty), mask=rest_JL)",
        "pass",
    ),
    _rows("row offset in 32 bits", "tl.cast(row, tl.int64) * row_stride", "row * row_stride"),
    _rows("row offset", "tl.cast(row, tl.int64) * row_stride", "row * vocab"),
    _rows(
        "column offset of pass 1",
        "tl.load(row_ptr + start + column_JL)",
        "tl.load(row_ptr + column_JL)",
    ),
    _rows("column offset of pass 2", "(whole - TILE - done)", "(whole - TILE)"),
    _rows("rows of a program", "range(tl.program_id(0), num_rows, tl", "range(0, num_rows, tl"),
    _rows("maximum without rescale", "sum_L * tl.exp2((high_L - new_L) * LOG2_E) +", "sum_L +"),
    _rows("lanes without rescale", "sum_L * tl.exp2((high_L - high) * LOG2_E)", "sum_L"),
    _rows(
        "maximum without the true class",
        "high = tl.maximum(others_high, own)",
        "high = others_high",
    ),
    _rows("weight left out", "factor = weight / total", "factor = 1.0 / total"),
    _rows("sum left out", "factor = weight / total", "factor = weight"),
    _rows("true class counted twice", 'tl.store(own_ptr, float("-inf"))', "pass"),
    _rows("true class's gradient", "(-others * factor)", "(others * factor)"),
    _rows(
        "true class by cancellation",
        "(-others * factor)",
        "(weight * ((total - others) / total - 1.0))",
    ),
    _rows(
        "log-probability by cancellation",
        "own - high - _log1p(rest)",
        "own - high - tl.log(1.0 + rest)",
    ),
    _rows("label index", "tl.load(label_ptr + row)", "tl.load(label_ptr)"),
    _rows("weightless rows used", "if weight != 0.0:", "if weight != -1.0:"),
    _rows("weightless rows left", "zero_JL, mask=here_JL", "zero_JL, mask=here_JL & (start < 0)"),
    _rows("reference: weight", "weight_C[:, None] / sum_C1", "1 / sum_C1"),
    _rows(
        "reference: true class",
        "own_C1 == high_C1, others_C1, sum_C1 - 1",
        "own_C1 == high_C1, sum_C1 - 1, sum_C1 - 1",
    ),
    _rows(
        "reference: masked rows",
        "masked_fill(~used_C1, 0.0)\n    own",
        "masked_fill(used_C1 & False, 0.0)\n    own",
    ),
    _head("chunks overwrite d weight", "beta = 0 if first else 1", "beta = 0"),
    _head("d weight starts from rubbish", "beta = 0 if first else 1", "beta = 1"),
    _head(
        "labels of another chunk",
        "label_R[chunk], weight_R[chunk]",
        "label_R[:size], weight_R[chunk]",
    ),
    _head(
        "weights of another chunk",
        "label_R[chunk], weight_R[chunk]",
        "label_R[chunk], weight_R[:size]",
    ),
    _head(
        "gather index",
        "torch.index_select(hidden_TD, 0, rows[chunk]",
        "torch.index_select(hidden_TD, 0, rows[:size]",
    ),
    _head(
        "scatter index",
        "dhidden_TD.index_copy_(0, rows[chunk]",
        "dhidden_TD.index_copy_(0, rows[:size]",
    ),
    _head("masked rows not zeroed", "        dhidden_TD.zero_()", "        pass"),
    _head("d weight of no rows", "        dweight_VD.zero_()", "        pass"),
    _head("loss without weights", "-(weight_R * logprob_R).sum()", "-logprob_R.sum()"),
    _head(
        "sum of d weight in the head's dtype", "accum_dtype or weight_VD.dtype,", "weight_VD.dtype,"
    ),
    _head("ignored labels counted as bad", "(~in_range_R & (label_R != IGNORE))", "(~in_range_R)"),
    _head("bad labels' weight", "weight_R.where(in_range_R, 0.0)", "weight_R"),
    _head("last class out of range", "label_R < num_classes", "label_R < num_classes - 1"),
    _head("bad labels overwritten", "bad_labels.add_(num_bad)", "bad_labels.copy_(num_bad)"),
    _head("no upstream scaling", "_scaled(x, dloss) if", "x if"),
    _head("scale kernel", ".to(tl.float32) * scale", ".to(tl.float32)"),
    _head(
        "scale kernel's offset",
        "offset = start + tl.arange(0, BLOCK)",
        "offset = first + tl.arange(0, BLOCK)",
    ),
    _head("backward twice", "        ctx.walked = True\n", ""),
    _head(
        "rows of log-probabilities",
        ".index_copy_(0, rows, logprob_R)",
        ".index_copy_(0, rows, logprob_R.flip(0))",
    ),
    _head(
        "limit not kept",
        "size = num_rows - start if num_rows - start <= most else step",
        "size = min(step, num_rows - start)",
    ),
    # -- forward
    _attention(
        "forward mask one late",
        "seen_MN = tl.arange(0, N)[None, :] <= ",
        "seen_MN = tl.arange(0, N)[None, :] <= 1 + ",
    ),
    _attention(
        "forward mask one short",
        "seen_MN = tl.arange(0, N)[None, :] <= ",
        "seen_MN = tl.arange(0, N)[None, :] < ",
    ),
    _attention("sum without rescale", "sum_M = sum_M * fade_M +", "sum_M = sum_M +"),
    _attention(
        "output without rescale", "acc_MK = acc_MK * fade_M[:, None]", "acc_MK = acc_MK + 0.0"
    ),
    _attention(
        "maximum of this tile alone",
        "tl.maximum(high_M, tl.max(score_MN, 1))",
        "tl.max(score_MN, 1)",
    ),
    _attention(
        "maximum not taken out",
        "score_MN * scale2 - (new_M * scale2)",
        "score_MN * scale2 - (0 * new_M)",
    ),
    _attention("output not normalised", "(acc_MK / sum_M[:, None]).to", "acc_MK.to"),
    _attention(
        "forward's scale to base e",
        "scale * LOG2_E,\n        num_tokens,\n        heads,\n        heads //",
        "scale,\n        num_tokens,\n        heads,\n        heads //",
    ),
    _attention(
        "log-sum-exp without the sum", "high_M * scale2 + tl.log2(sum_M)", "high_M * scale2"
    ),
    _attention(
        "log-sum-exp of another head",
        "lse2_ptr += head.to(tl.int64) * num_tokens + start\n    tl.store",
        "lse2_ptr += start\n    tl.store",
    ),
    _attention(
        "log-sum-exp written beyond",
        "tl.store(lse2_ptr + row_M, lse2_M, mask=row_M < length)",
        "tl.store(lse2_ptr + row_M, lse2_M, mask=row_M < length + 1)",
    ),
    _attention(
        "forward stops early",
        "stop = tl.minimum(row + M, length) if CAUSAL else length\n    for column in tl.range("
        "0, stop, N, num_stages=STAGES, warp",
        "stop = tl.minimum(row + M // 2, length) if CAUSAL else length\n    for column in tl.range("
        "0, stop, N, num_stages=STAGES, warp",
    ),
    _attention(
        "forward's value head",
        "head // group, stride_vt, stride_vh, N, K)\n    out_desc",
        "head % group, stride_vt, stride_vh, N, K)\n    out_desc",
    ),
    _attention(
        "full: a key beyond the last",
        "else row_M * 0 + length - 1\n    high_M",
        "else row_M * 0 + length\n    high_M",
        "test_is_float64s",
    ),
    # -- addresses
    _attention("a row of the next sequence", "base, [length, K]", "base, [length + 1, K]"),
    _attention("one row short", "base, [length, K]", "base, [length - 1, K]"),
    _attention("sequence's start left out", "base = ptr + start * stride_t +", "base = ptr +"),
    _attention(
        "sequence's start in 32 bits",
        "tl.load(tile_ptr + 3 * index).to(tl.int64)",
        "tl.load(tile_ptr + 3 * index)",
        "test_sequences_beyond_int32",
    ),
    _attention(
        "head in 32 bits",
        "head.to(tl.int64) * stride_h",
        "head * stride_h",
        "test_heads_beyond_int32",
    ),
    _attention(
        "group's first head in 32 bits",
        "kv_head.to(tl.int64) * group",
        "kv_head * group",
        "test_heads_beyond_int32",
    ),
    _attention(
        "delta's head in 32 bits",
        "(tl.program_id(0) % heads).to(tl.int64)",
        "tl.program_id(0) % heads",
        "test_heads_beyond_int32",
    ),
    _attention(
        "delta's token in 32 bits",
        "(tl.program_id(0) // heads).to(tl.int64) * ROWS",
        "tl.program_id(0) // heads * ROWS",
        "test_sequences_beyond_int32",
    ),
    # -- backward
    _attention("delta zero", "tl.sum(dout_TK * out_TK, 1)", "0.0 * tl.sum(dout_TK * out_TK, 1)"),
    _attention(
        "delta of a program's tokens",
        "// heads).to(tl.int64) * ROWS +",
        "// heads).to(tl.int64) * 0 +",
        "test_shipped_tiles",
    ),
    _attention(
        "delta's last token", "mask=token_T < num_tokens)", "mask=token_T < num_tokens - 1)"
    ),
    _attention("dquery: no delta", "dout_MK, v_NK.T) - delta_M[:, None])", "dout_MK, v_NK.T))"),
    _attention("dquery: no scale", "(dq_MK * scale).to", "dq_MK.to"),
    _attention(
        "dquery: mask one late",
        "p_MN = tl.where(tl.arange(0, N)[None, :] <= ",
        "p_MN = tl.where(tl.arange(0, N)[None, :] <= 1 + ",
    ),
    _attention(
        "dquery: mask one short",
        "p_MN = tl.where(tl.arange(0, N)[None, :] <= ",
        "p_MN = tl.where(tl.arange(0, N)[None, :] < ",
    ),
    _attention(
        "dquery: log-sum-exp of another head",
        "offset_M = head.to(tl.int64) * num_tokens + start + row_M",
        "offset_M = start + row_M",
    ),
    _attention(
        "dquery stops early",
        "stop = tl.minimum(row + M, length) if CAUSAL else length\n    for column in tl.range("
        "0, stop, N, num_stages=STAGES):",
        "stop = tl.minimum(row + M // 2, length) if CAUSAL else length\n    for column in tl.range("
        "0, stop, N, num_stages=STAGES):",
    ),
    _attention(
        "dquery: tiles of key rows",
        "table = tiles(bounds, tile[0], causal, q_THK.device)\n    _launch(\n        _dquery",
        "table = tiles(bounds, tile[1], causal, q_THK.device)\n    _launch(\n        _dquery",
    ),
    _attention("dkey: no delta", "v_NK, dout_MK.T) - delta_M[None, :])", "v_NK, dout_MK.T))"),
    _attention("dkey: no scale", "(dk_NK * scale).to", "dk_NK.to"),
    _attention(
        "dkey: mask one late",
        "(column_N - row)[:, None] <= tl.arange",
        "(column_N - row)[:, None] <= 1 + tl.arange",
    ),
    _attention(
        "dkey: mask one short",
        "(column_N - row)[:, None] <= tl.arange",
        "(column_N - row)[:, None] < tl.arange",
    ),
    _attention("dkey: always causal", "if CAUSAL:\n            p_NM", "if True:\n            p_NM"),
    _attention(
        "dkey: first tile of queries",
        "first = column // M * M if CAUSAL",
        "first = column // M * M + M if CAUSAL",
    ),
    _attention("dkey: last tile of queries", "tl.cdiv(length - first, M)", "(length - first) // M"),
    _attention("dkey: first member alone", "group * blocks, num", "blocks, num"),
    _attention("dkey: members not told apart", "member, row = i // blocks,", "member, row = 0,"),
    _attention("dkey: rows of a member", "first + i % blocks * M", "first + i // group * M"),
    _attention(
        "dkey: strides of query exchanged",
        "[stride_qh, stride_qt, 1]",
        "[stride_qt, stride_qh, 1]",
    ),
    _attention(
        "dkey: strides of upstream exchanged",
        "[stride_dh, stride_dt, 1]",
        "[stride_dt, stride_dh, 1]",
    ),
    _attention(
        "dkey: log-sum-exp of the first group",
        "lse2_ptr += head * num_tokens + start\n    delta",
        "lse2_ptr += start\n    delta",
    ),
    _attention(
        "dkey: delta of the first group", "delta_ptr += head * num_tokens", "delta_ptr += 0"
    ),
    _attention(
        "dkey: tiles of query rows", "tiles(bounds, tile[1], False", "tiles(bounds, tile[0], False"
    ),
    _attention("dkey: one key head", "len(table) * kv_heads", "len(table)"),
    # -- tails and tiles
    _attention("tail of the output", "out_THK[bounds[-1] :] = 0.0", "pass"),
    _attention("tail of log-sum-exp", "lse2_HT[:, bounds[-1] :] = -torch.inf", "pass"),
    _attention("tail of dq", "for x in gradients:", "for x in gradients[1:]:"),
    _attention("tail of dk", "for x in gradients:", "for x in gradients[::2]:"),
    _attention("tail of dv", "for x in gradients:", "for x in gradients[:2]:"),
    _attention("tile's start", "(start, stop - start, row)", "(start + 1, stop - start, row)"),
    _attention("tile's length", "(start, stop - start, row)", "(start, stop - start + 1, row)"),
    _attention(
        "rest of a sequence left out",
        "range(0, stop - start, rows)",
        "range(0, stop - start - rows + 1, rows)",
    ),
    _attention(
        "an empty tile",
        "range(0, stop - start, rows)",
        "range(0, stop - start + 1, rows)",
        "test_tiles_cover_every_row_once",
    ),
    _attention(
        "light queries first",
        "-tile[2] if growing",
        "tile[2] if growing",
        "test_tiles_cover_every_row_once",
    ),
    _attention(
        "light keys first",
        "else tile[2] - tile[1]",
        "else tile[1] - tile[2]",
        "test_tiles_cover_every_row_once",
    ),
    _attention(
        "tiles of every call",
        "@lru_cache(maxsize=16)",
        "@lru_cache(maxsize=0)",
        "test_tiles_are_built_once_for_a_batch",
    ),
    # -- the operation
    _attention_call(
        "log-sum-exp to base 2", "lse2_HT / kernels.LOG2_E", "lse2_HT", "test_log_sum_exp"
    ),
    _attention_call(
        "log-sum-exp has a gradient",
        "    ctx.mark_non_differentiable(lse2_HT)\n",
        "",
        "test_log_sum_exp",
    ),
    _attention_call(
        "any alignment",
        " and x.data_ptr() % 16 == 0",
        "",
        "test_layouts_of_the_upstream_gradient",
        "test_bad_arguments_are_named",
    ),
    _refused("any stride of K", "x.stride(2) == 1 and ", ""),
    _refused("expanded heads", "min(x.stride()) > 0", "min(x.stride()) >= 0"),
    _refused("falling boundaries", "min(lengths, default=0) < 0", "max(lengths, default=0) < 0"),
    _refused("boundaries beyond", "bounds[-1] > num_tokens:", "bounds[-1] > num_tokens + 1:"),
    _refused("longest sequence", "default=0) > max_seqlen:", "default=0) > max_seqlen + 1:"),
    # -- one pass over memory
    _norm("a row short", "(row_R < num_rows)[:, None] &", "(row_R < num_rows - 1)[:, None] &"),
    _norm(
        "a column beyond the last", "(column_C < WIDTH)[None, :]", "(column_C <= WIDTH)[None, :]"
    ),
    _norm("a column short", "(column_C < WIDTH)[None, :]", "(column_C < WIDTH - 1)[None, :]"),
    _norm("rows of a program", "_tile(tl.program_id(0) * ROWS,", "_tile(tl.program_id(0),"),
    _norm(
        "mean of the tile",
        "tl.sum(x_RC * x_RC, axis=1) * (1.0 / WIDTH)",
        "tl.sum(x_RC * x_RC, axis=1) * (1.0 / COLUMNS)",
    ),
    _norm("no eps", "tl.sqrt_rn(mean_R + eps)", "tl.sqrt_rn(mean_R)"),
    _norm("sum not rounded", "        x_RC = x_RC.to(kind)\n", ""),
    _norm(
        "sum without the residual",
        "  x_RC += tl.load(residual_RC",
        "  x_RC += 0 * tl.load(residual_RC",
    ),
    _norm(
        "rows not rounded before the weight",
        "(x_RC * rstd_R[:, None]).to(kind).to(tl.float32)",
        "x_RC * rstd_R[:, None]",
    ),
    _norm("weight not rounded", "mask=column_C < WIDTH).to(kind).to", "mask=column_C < WIDTH).to"),
    _norm(
        "stride of x",
        "x_RC = x_ptr + row_R[:, None] * x_stride + column_C[None, :]\n    x_RC",
        "x_RC = x_ptr + row_R[:, None] * WIDTH + column_C[None, :]\n    x_RC",
    ),
    _norm(
        "stride of the residual",
        "residual_stride + column_C[None, :]\n        x_RC",
        "WIDTH + column_C[None, :]\n        x_RC",
    ),
    _norm(
        "rows in 32 bits",
        "return row_R.to(tl.int64), column_C",
        "return row_R, column_C",
    ),
    _norm(
        "backward: tiles of another program",
        "tl.range(tl.program_id(0) * ROWS, num_rows, step",
        "tl.range(0, num_rows, step",
    ),
    _norm(
        "backward: one tile a program",
        "tl.range(tl.program_id(0) * ROWS, num_rows, step",
        "tl.range(tl.program_id(0) * ROWS, tl.minimum(num_rows, step), step",
    ),
    _norm(
        "backward: d weight of the last tile",
        "partial_RC += dy_RC * rounded_RC",
        "partial_RC = dy_RC * rounded_RC",
    ),
    _norm(
        "backward: d weight without rstd",
        "partial_RC += dy_RC * rounded_RC",
        "partial_RC += dy_RC * x_RC",
    ),
    _norm("backward: no mean", "dn_RC - n_RC * mean_R[:, None]", "dn_RC"),
    _norm("backward: no rstd", "rstd_R1 * (dn_RC - n_RC", "1.0 * (dn_RC - n_RC"),
    _norm("backward: no weight", "dn_RC = dy_RC * weight_1C", "dn_RC = dy_RC"),
    _norm(
        "backward: mean of the tile",
        "tl.sum(dn_RC * n_RC, axis=1) * (1.0 / WIDTH)",
        "tl.sum(dn_RC * n_RC, axis=1) * (1.0 / COLUMNS)",
    ),
    _norm(
        "backward: residual left out",
        "dx_RC += tl.load(residual_RC",
        "dx_RC += 0 * tl.load(residual_RC",
    ),
    _norm("backward: stride of dy", "row_R[:, None] * dy_stride", "row_R[:, None] * WIDTH"),
    _norm(
        "backward: stride of x",
        "x_RC = x_ptr + row_R[:, None] * x_stride + column_C[None, :]\n        x_RC",
        "x_RC = x_ptr + row_R[:, None] * WIDTH + column_C[None, :]\n        x_RC",
    ),
    _norm(
        "backward: y not rounded before the weight",
        "(rounded_RC * weight_1C).to(kind)",
        "(n_RC * weight_1C).to(kind)",
    ),
    _norm(
        "backward: one place for all sums",
        "partial_ptr + tl.program_id(0) * WIDTH",
        "partial_ptr + 0 * WIDTH",
    ),
    _norm("backward: sums of one program", "partial_PD.sum(0), y_TD", "partial_PD[0], y_TD"),
    _norm(
        "reference: weight's rounding",
        "n_TD.mul_(weight_D.to(x_TD.dtype))",
        "(n_TD * weight_D).to(x_TD.dtype)",
    ),
    _norm("reference: residual left out", "        dx_TD += dresidual_TD\n", "        pass\n"),
    _norm(
        "gradient of the sum",
        "sum_TD, rstd_T, weight_D, dsum_TD.contiguous()",
        "sum_TD, rstd_T, weight_D, None",
    ),
    _rope("the wrong way", "if BACK:", "if not BACK:"),
    _rope("gradient turns on", "not ctx.back), None", "ctx.back), None"),
    _rope("merge turns on", "2, back=True)", "2, back=False)"),
    _rope(
        "second half's sign",
        "b_XC * cos_XC + a_XC * sin_XC, b_XC",
        "b_XC * cos_XC - a_XC * sin_XC, b_XC",
    ),
    _rope(
        "values turned",
        "(head_X < HEADS + KV_HEADS)[:, None]",
        "(head_X < HEADS + 2 * KV_HEADS)[:, None]",
    ),
    _rope("keys not turned", "(head_X < HEADS + KV_HEADS)[:, None]", "(head_X < HEADS)[:, None]"),
    _rope(
        "values by a product",
        "a_XC * cos_XC - b_XC * sin_XC, a_XC)",
        "a_XC * cos_XC - b_XC * sin_XC, a_XC + 0 * b_XC)",
    ),
    _rope(
        "a row beyond the last", "(row_X < num_rows)[:, None] &", "(row_X <= num_rows)[:, None] &"
    ),
    _rope("a row short", "(row_X < num_rows)[:, None] &", "(row_X < num_rows - 1)[:, None] &"),
    _rope("a column beyond the half", "(column_C < HALF)[None, :]", "(column_C <= HALF)[None, :]"),
    _rope("table of the first token", "token_X[:, None] * HALF", "0 * token_X[:, None]"),
    _rope("rows of a program", "tl.program_id(0) * ROWS", "tl.program_id(0)"),
    _rope(
        "key's stride",
        "token_X * k_stride_t + key_X * k_stride_h",
        "token_X * k_stride_t + key_X * k_out_stride_h",
    ),
    _rope(
        "query's stride of tokens",
        "q_ptr + token_X * q_stride_t",
        "q_ptr + token_X * q_out_stride_t",
    ),
    _rope(
        "value's stride of tokens", "v_ptr + token_X * v_stride_t", "v_ptr + token_X * k_stride_t"
    ),
    _rope("tokens in 32 bits", "(row_X // TOTAL).to(tl.int64)", "row_X // TOTAL"),
    _rope("heads in 32 bits", "(row_X % TOTAL).to(tl.int64)", "row_X % TOTAL"),
    _rope("first key is a query", "tl.where(key_X < 0, in_X", "tl.where(key_X <= 0, in_X"),
    _rope(
        "first value is a key",
        "tl.where(value_X < 0, k_X, v_X))\n    column_C",
        "tl.where(value_X <= 0, k_X, v_X))\n    column_C",
    ),
    _rope("reference: sign", "a_THR * cos - b_THR * sin", "a_THR * cos + b_THR * sin"),
    _swiglu(
        "a column beyond the last",
        "tl.store(dgate_ptr, dgate.to(kind), mask=inside)",
        "tl.store(dgate_ptr, dgate.to(kind), mask=column <= width)",
    ),
    _swiglu("rows in 32 bits", "blocks).to(tl.int64)", "blocks).to(tl.int32)"),
    _swiglu("blocks of a row", "tl.program_id(0) % blocks * BLOCK", "tl.program_id(0) * BLOCK"),
    _swiglu(
        "row of a program",
        "(tl.program_id(0) // blocks).to(tl.int64)",
        "tl.program_id(0).to(tl.int64)",
    ),
    _swiglu("sign of the exponent", "tl.exp2(-x * LOG2_E)", "tl.exp2(x * LOG2_E)"),
    _swiglu("base of the exponent", "tl.exp2(-x * LOG2_E)", "tl.exp2(-x)"),
    _swiglu("halves exchanged", "y = gate * _sigmoid(gate) * up", "y = up * _sigmoid(up) * gate"),
    _swiglu(
        "y of forward alone",
        "y = gate * _sigmoid(gate) * up",
        "y = (gate * _sigmoid(gate)).to(y_ptr.dtype.element_ty) * up",
    ),
    _swiglu("gate's gradient", "1.0 + gate * (1.0 - s)", "1.0 + gate * (0.0 - s)"),
    _swiglu("gate's gradient without up", "dgate = dy * up * (s", "dgate = dy * (s"),
    _swiglu("up's gradient", "(dy * silu).to(kind)", "(dy * s).to(kind)"),
    _swiglu(
        "gradients exchanged",
        "tl.store(dgate_ptr + width, (dy * silu)",
        "tl.store(dgate_ptr, (dy * silu)",
    ),
    _swiglu("stride of dy", "row * dy_stride", "row * width"),
    _swiglu("stride of the gradient", "row * out_stride", "row * row_stride"),
    _swiglu(
        "stride of rows",
        "gate_up_TF2, y_TF, width, blocks, gate_up_TF2.stride(0)",
        "gate_up_TF2, y_TF, width, blocks, 2 * width",
    ),
    _swiglu("reference: gate's gradient", "(1 + gate_TF * (1 - s_TF))", "(1 + gate_TF)"),
    _swiglu("out is not used", "if out is None else out\n", "\n"),
)


# -- running -----------------------------------------------------------------------------------


def mutated(text: str, mutation: Mutation) -> str:
    count = text.count(mutation.old)
    if count != 1:
        raise ValueError(f"{mutation.name}: its text occurs {count} times in {mutation.file}")
    return text.replace(mutation.old, mutation.new)


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a copy, whose modules come before any that are installed."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        # A mutation may keep a file's size and second: bytecode would pass for up to date.
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def run_tests(folder: Path, tests: Sequence[str]) -> tuple[bool | None, str]:
    """(whether they pass, or None if they did not run; the first that failed)."""
    options = ("-x", "-q", "-p", "no:cacheprovider", "-m", "not slow")
    try:
        done = python(folder, "-m", "pytest", *options, *tests)
    except subprocess.TimeoutExpired:
        return False, "hung"
    if done.returncode < 0:
        return False, f"died of signal {-done.returncode}"
    first = re.search(r"^(?:FAILED|ERROR) \S*?::(.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode == 0 or (done.returncode == 1 and first):
        return done.returncode == 0, first[1] if first else ""
    return None, (done.stdout + done.stderr).strip().rpartition("\n")[2]


def try_mutation(folder: Path, mutation: Mutation) -> tuple[bool, str]:
    """(whether a test noticed, the account); the copy is whole again afterwards."""
    path = folder / mutation.file
    before = path.read_text()
    try:
        path.write_text(mutated(before, mutation))
        passed, first = run_tests(folder, mutation.tests)
    except ValueError as error:
        return False, str(error)
    finally:
        path.write_text(before)
    if passed is None:
        return False, f"its tests did not run: {first}"
    return not passed, "SURVIVED" if passed else first


def check(root: Path, mutations: Sequence[Mutation]) -> int:
    """Prints a line per mutation; returns the number that were not noticed, or could not be."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve() / "copy"
        shutil.copytree(root, folder, symlinks=True, ignore=NOT_COPIED)
        imported = python(folder, "-c", "import s1fast; print(s1fast.__file__)").stdout.strip()
        if not imported or not Path(imported).is_relative_to(folder):
            print(f"the copy is not what is imported, but {imported or 'nothing'}")
            return 1
        tests = sorted({test for mutation in mutations for test in mutation.tests})
        passed, first = run_tests(folder, tests)
        if not passed:
            print(f"without a mutation the tests do not pass: {first}")
            return 1
        missed = 0
        for mutation in mutations:
            start = time.monotonic()
            noticed, account = try_mutation(folder, mutation)
            missed += not noticed
            mark = "ok  " if noticed else "MISS"
            print(
                f"{mark} {mutation.name:45} {time.monotonic() - start:4.0f} s  {account}",
                flush=True,
            )
    print(f"{len(mutations) - missed} of {len(mutations)} mutations were noticed")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", metavar="WORD", help="mutations whose name holds it")
    only = parser.parse_args().only
    chosen = [mutation for mutation in MUTATIONS if only in mutation.name]
    return 1 if not chosen or check(ROOT, chosen) else 0


if __name__ == "__main__":
    sys.exit(main())
