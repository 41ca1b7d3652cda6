"""What tests/mutation_check.py breaks in RMSNorm, RoPE and SwiGLU."""

from __future__ import annotations

from mutation import Mutation


def _norm(name: str, old: str, new: str) -> Mutation:
    tests = ("tests/test_rms_norm.py",)
    return Mutation(f"RMSNorm: {name}", "kernels/rms_norm.py", old, new, tests)


def _rope(name: str, old: str, new: str) -> Mutation:
    return Mutation(f"RoPE: {name}", "kernels/rope.py", old, new, ("tests/test_rope.py",))


def _swiglu(name: str, old: str, new: str) -> Mutation:
    return Mutation(f"SwiGLU: {name}", "kernels/swiglu.py", old, new, ("tests/test_swiglu.py",))


MUTATIONS = (
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
        "dsum_TD = dsum_TD.contiguous() if ctx.added else None",
        "dsum_TD = None",
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
