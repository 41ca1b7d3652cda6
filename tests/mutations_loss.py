"""What tests/mutation_check.py breaks in the loss: its row kernel and its operation."""

from __future__ import annotations

from mutation import Mutation


def _rows(name: str, old: str, new: str) -> Mutation:
    return Mutation(f"row kernel: {name}", "kernels/softmax_gradient.py", old, new)


def _head(name: str, old: str, new: str) -> Mutation:
    return Mutation(f"head: {name}", "kernels/linear_cross_entropy.py", old, new)


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
)
