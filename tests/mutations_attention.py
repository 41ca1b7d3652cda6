"""What tests/mutation_check.py breaks in packed attention."""

from __future__ import annotations

from dataclasses import replace

from mutation import Mutation

ATTENTION = "tests/test_packed_attention.py"
BACKWARD = ("dquery", "dkey", "delta", "group's first head", "tail of d")
"""How names of mutations begin that lie in the backward's file."""


def _attention(name: str, old: str, new: str, *tests: str) -> Mutation:
    """In the kernels and their launches; `tests` are the functions that it takes, if not all."""
    chosen = tuple(f"{ATTENTION}::{test}" for test in tests) or (ATTENTION,)
    backward = name.startswith(BACKWARD)
    file = f"kernels/packed_attention_{'backward' if backward else 'triton'}.py"
    return Mutation(f"attention: {name}", file, old, new, chosen)


def _gluon(name: str, old: str, new: str) -> Mutation:
    """In the forward for Hopper."""
    tests = ("tests/test_packed_attention_gluon.py",)
    return Mutation(f"gluon: {name}", "kernels/packed_attention_gluon.py", old, new, tests)


def _attention_call(name: str, old: str, new: str, *tests: str) -> Mutation:
    """In what checks the arguments and registers the operation."""
    kernels = _attention(name, old, new, *tests)
    return replace(kernels, file="kernels/packed_attention.py")


def _refused(name: str, old: str, new: str) -> Mutation:
    """Of a check that turns bad arguments away."""
    return _attention_call(name, old, new, "test_bad_arguments_are_named")


MUTATIONS = (
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
    _attention("output without rescale", "acc_MK * fade_M[:, None])", "acc_MK)"),
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
        "queries stop early",
        "tl.minimum(row + M, length) if CAUSAL else length",
        "tl.minimum(row + M // 2, length) if CAUSAL else length",
    ),
    _attention("diagonal without a mask", "(row if CAUSAL", "(row + M if CAUSAL"),
    _attention(
        "full: last keys without a mask", "else length) // N * N", "else length + N) // N * N"
    ),
    _attention(
        "keys left out before the mask", "tl.range(whole, stop, N", "tl.range(whole + N, stop, N"
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
        "dquery: diagonal left out", "tl.range(whole, stop, N", "tl.range(whole + N, stop, N"
    ),
    _attention(
        "dquery: tiles of key rows",
        "table = tiles(bounds, tile[0], causal, q_THK.device)\n    launch(\n        _attention_dq",
        "table = tiles(bounds, tile[1], causal, q_THK.device)\n    launch(\n        _attention_dq",
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
    # -- forward in Gluon: who waits for what
    _gluon(
        "keys given back before their scores",
        """    score_RN = hopper.warpgroup_mma_wait(1, [score])
    hopper.mbarrier.arrive(k_empty.index(slot), count=1)
""",
        """    hopper.mbarrier.arrive(k_empty.index(slot), count=1)
    score_RN = hopper.warpgroup_mma_wait(1, [score])
""",
    ),
    _gluon(
        "values given back before their product",
        """    acc_RK = hopper.warpgroup_mma_wait(0, [acc])
    hopper.mbarrier.arrive(v_empty.index(before), count=1)
""",
        """    hopper.mbarrier.arrive(v_empty.index(before), count=1)
    acc_RK = hopper.warpgroup_mma_wait(0, [acc])
""",
    ),
    _gluon(
        "queries given back before the last scores",
        "            for free in gl.static_range",
        "            hopper.mbarrier.arrive(q_empty.index(PART), count=1)\n"
        "            for free in gl.static_range",
    ),
    _gluon(
        "scores not waited for",
        "score_RN = hopper.warpgroup_mma_wait(1,",
        "score_RN = hopper.warpgroup_mma_wait(2,",
    ),
    _gluon(
        "product not waited for",
        "    acc_RK = hopper.warpgroup_mma_wait(0, [acc])\n    hopper.mbarrier.arrive(v_empty",
        "    acc_RK = hopper.warpgroup_mma_wait(1, [acc])\n    hopper.mbarrier.arrive(v_empty",
    ),
    _gluon(
        "keys not waited for",
        "    hopper.mbarrier.wait(k_full.index(slot), phase)\n    before",
        "    before",
    ),
    _gluon(
        "values not waited for",
        "    hopper.mbarrier.wait(v_full.index(before), phase)\n",
        "",
    ),
    _gluon(
        "last values not waited for",
        "            hopper.mbarrier.wait(v_full.index(slot), phase)\n",
        "",
    ),
    _gluon(
        "queries not waited for",
        "            hopper.mbarrier.wait(q_full.index(PART), step % 2)\n            hopper.",
        "            hopper.",
    ),
    _gluon("keys overwritten", "hopper.mbarrier.wait(k_empty.index(slot), 1 - phase)", "pass"),
    _gluon("values overwritten", "hopper.mbarrier.wait(v_empty.index(slot), 1 - phase)", "pass"),
    _gluon(
        "queries overwritten", "hopper.mbarrier.wait(q_empty.index(part), (step + 1) % 2)", "pass"
    ),
    _gluon("the producer's phase", "k_empty.index(slot), 1 - phase", "k_empty.index(slot), phase"),
    _gluon("a phase too short", "STAGES, i // STAGES % 2", "STAGES, i % 2"),
    _gluon(
        "the consumers' phase",
        "before, phase = _slot(count - 1, STAGES)",
        "before = _slot(count - 1, STAGES)[0]",
    ),
    _gluon("the queries' phase", "(step + 1) % 2)", "step % 2)"),
    _gluon(
        "one reader of keys", "keys = _ring(STAGES, N, K, PARTS)", "keys = _ring(STAGES, N, K, 1)"
    ),
    _gluon(
        "one reader of values",
        "values = _ring(STAGES, N, K, PARTS)",
        "values = _ring(STAGES, N, K, 1)",
    ),
    _gluon("half the bytes", "desc.block_type.nbytes)", "desc.block_type.nbytes // 2)"),
    _gluon("nobody's first turn", "if PART == 0 else turns % 2", "if PART == 9 else turns % 2"),
    _gluon("the turn kept", "turn.index((PART + 1) % PARTS)", "turn.index(PART)"),
    # -- forward in Gluon: what it computes
    _gluon("edge not zeroed", "(row_8 < known - i)", "(row_8 < N)"),
    _gluon("edge zeroed too far", "(row_8 < known - i)", "(row_8 < known - i - 1)"),
    _gluon("edge one short", "(row_8 < known - i)", "(row_8 < known - i + 1)"),
    _gluon(
        "edge without a fence",
        "        hopper.fence_async_shared()\n        hopper.mbarrier",
        "        hopper.mbarrier",
    ),
    _gluon("edge for whole tiles alone", "if known >= N:", "if known < N:"),
    _gluon("no edge of one", "if known >= N:", "if known >= N - 1:"),
    _gluon("edge's phase", "wait(edge, edges % 2)", "wait(edge, 0)"),
    _gluon("mask one late", "column_N[None, :] <= (last", "column_N[None, :] <= 1 + (last"),
    _gluon("mask one short", "column_N[None, :] <= (last", "column_N[None, :] < (last"),
    _gluon("diagonal without a mask", "columns - row // N if DEEP", "1 if DEEP"),
    _gluon("full: a key beyond", "else row_R * 0 + length - 1", "else row_R * 0 + length"),
    _gluon("sum without rescale", "sum_R * fade_R +", "sum_R +"),
    _gluon(
        "output without rescale",
        "acc_RK * gl.convert_layout(fade_R, gl.SliceLayout(1, ACC))[:, None]",
        "acc_RK",
    ),
    _gluon(
        "maximum of this tile alone",
        "gl.maximum(high_R, gl.max(score_RN, 1))",
        "gl.max(score_RN, 1)",
    ),
    _gluon("keys in the wrong order", "column = (columns - 1 - i) * N", "column = i * N"),
    _gluon("key head", "_copy(k_desc, head // group", "_copy(k_desc, head % group"),
    _gluon("rows of a consumer", "start + row + part * ROWS", "start + row"),
    _gluon("log-sum-exp without the sum", "high_R * scale2 + gl.log2(sum_R)", "high_R * scale2"),
    _gluon(
        "log-sum-exp written beyond",
        "lse2_R, mask=row_R < length)",
        "lse2_R, mask=row_R <= length)",
    ),
    _gluon("output written beyond", "mask=(row_R < length)[:", "mask=(row_R <= length)[:"),
    _gluon("a block's items", "gl.num_programs(0), gl.program_id(0)", "gl.num_programs(0), 0"),
)
