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


def _refused(name: str, old: str, new: str) -> Mutation:
    """Of a check that turns bad arguments away."""
    return _attention_call(name, old, new, "test_bad_arguments_are_named")


CSRC = "tests/test_csrc.py"


def _gemv(name: str, old: str, new: str, *tests: str) -> Mutation:
    """In csrc's kernel, which is built anew and run on fibers."""
    chosen = tuple(f"{CSRC}::{test}" for test in tests or ("test_tiles_shared_by_blocks",))
    return Mutation(f"gemv: {name}", "csrc/gemv.cuh", old, new, chosen)


def _build(name: str, old: str, new: str) -> Mutation:
    return Mutation(f"build: {name}", "s1fast/build.py", old, new, ("tests/test_build.py",))


MUTATIONS = (
    _gemv(
        "tokens before the wait", "  dependency_wait();\n  live = live_tokens(g);", "  live = 1;"
    ),
    _gemv(
        "a stage filled too early", "at.parity ^ 1);", "at.parity);", "test_rings_that_turn_often"
    ),
    _gemv("a stage emptied too early", "WARPS);\n    }", "1);\n    }"),
    _gemv("rubbish behind a row", "here = column < columns;", "here = true;", "test_ragged_shapes"),
    _gemv("one block's share left out", "block <= last; ++block)", "block < last; ++block)"),
    _gemv("arrivals left over", "if (thread == 0) g.arrivals[first] = 0;", ""),
    _gemv("two shares in one place", "2 * block + (block == first)", "2 * block"),
    _gemv(
        "a tile summed too early",
        "atomicAdd(&g.arrivals[first], 1) == last - first",
        "atomicAdd(&g.arrivals[first], 1) == 1",
    ),
    _gemv("squares of another token", "group % 2 ? squares[1] : squares[0]", "squares[0]"),
    _gemv("mean of a chunk", "value(SUMS + token) / g.width", "value(SUMS + token) / g.plan.chunk"),
    _gemv("gate for up", "lane >= OUTPUTS ? g.outputs : 0", "lane >= OUTPUTS ? 0 : 0"),
    _gemv(
        "more tokens than slots",
        "live < g.slots ? live : g.slots",
        "live",
        "test_live_tokens_are_counted_on_the_device",
    ),
    _gemv(
        "rows that are not live",
        "if (token >= live ||",
        "if (",
        "test_live_tokens_are_counted_on_the_device",
    ),
    _gemv("sums overwritten while read", "    turn ^= 1;\n", "", "test_rings_that_turn_often"),
    _gemv("rounding down", "(bits + 0x7fffu + (bits >> 16 & 1)) >> 16", "bits >> 16"),
    _gemv("too much memory", "233472 / 2 - 1024", "233472", "test_plans_of_real_shapes"),
    _gemv("units of unequal work", "best_share >= 0.95 ||", "true ||", "test_plans_of_real_shapes"),
    _build("no lock", "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass"),
    _build("built by others meanwhile", "if not library.exists():", "if True:"),
    _build("versions not in the key", 'f"{versions}\\n{FLAGS}\\n".encode()', 'b""'),
    _build("leftovers stay", "            remove_leftovers(target.parent)\n", ""),
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
