"""A chunk of logits becomes, in place, the gradient of its weighted cross-entropy.

    p = softmax(logits_c),  logprob_c = log p[label_c]
    logits_c <- weight_c * (p - onehot(label_c))

Bytes: every logit is read from and written to device memory once, 2 R V sizeof(dtype). Floor for
R 4,700, V 152,064 in bf16: 2.86 GB, 0.95 ms at 3.0 TB/s. Measured on an H100: not yet.

A row (304 KB) is longer than a multiprocessor's memory, so it is passed over twice: for maximum and
sum, then for the gradient. One program per multiprocessor keeps the rows in flight (132 x 304 KB =
40 MB) within a 50 MB L2, and the second pass runs backwards, so that what it reads was loaded last:
even where only part of the rows fits, that part is found there.

The true class is taken out of the row first, by overwriting its logit with -inf. So the sum of the
others is known by itself, and 1 - p[label] = others / sum keeps its relative precision in fp32
however close p[label] comes to 1, as does the log-probability, -log1p(others / own). No element is
compared with the label, and a label's gradient is rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s1fast.kernels.jit import constant, jit, tl

LOG2_E = constant(1.4426950408889634)
LOWEST = constant(-1e30)  # finite, so that two rows without any logit yet do not differ by NaN

_VECTOR_BYTES = 16
_CONFIG = {torch.bfloat16: (16, 4, 3), torch.float32: (16, 4, 3)}
"""dtype -> (warps, vectors of 16 bytes a thread holds of a tile, stages of loads in flight)."""


def softmax_gradient_(
    logits_CV: Tensor, label_C: Tensor, weight_C: Tensor, *, write_gradient: bool = True
) -> Tensor:
    """Overwrites logits with the gradient of sum_c -weight_c * logprob_c, or with rubbish.

    Args:
        logits_CV: bf16 or fp32 (fp64 on CPU); unit stride along V.
        label_C: int64 in [0, V): not checked here.
        weight_C: fp32 (fp64 with fp64 logits). A row of weight 0 is not looked at: its gradient and
            its log-probability are 0, whatever it holds.
        write_gradient: without it the logits are left undefined.

    Returns:
        logprob_C in the weights' dtype.
    """
    if logits_CV.is_cuda:
        return triton_(logits_CV, label_C, weight_C, write_gradient)
    return reference_(logits_CV, label_C, weight_C, write_gradient)


def reference_(
    logits_CV: Tensor, label_C: Tensor, weight_C: Tensor, write_gradient: bool
) -> Tensor:
    """softmax_gradient_ in plain PyTorch, on a copy of the logits in the weights' dtype."""
    index_C1, used_C1 = label_C[:, None], (weight_C != 0)[:, None]
    wide_CV = logits_CV.to(weight_C.dtype).masked_fill(~used_C1, 0.0)
    own_C1 = wide_CV.gather(1, index_C1)
    wide_CV.scatter_(1, index_C1, -torch.inf)
    high_C1 = torch.maximum(wide_CV.amax(1, keepdim=True), own_C1)
    wide_CV.sub_(high_C1).exp_()
    others_C1 = wide_CV.sum(1, keepdim=True)
    sum_C1 = others_C1 + (own_C1 - high_C1).exp()
    rest_C1 = torch.where(own_C1 == high_C1, others_C1, sum_C1 - 1)
    logprob_C1 = (own_C1 - high_C1 - rest_C1.log1p()).masked_fill(~used_C1, 0.0)
    if write_gradient:
        wide_CV.scatter_(1, index_C1, -others_C1)
        logits_CV.copy_(wide_CV.mul_(weight_C[:, None] / sum_C1))
    return logprob_C1[:, 0]


@jit
def _log1p(x):
    """log(1 + x), exact for small x too: the rounding of 1 + x cancels in the quotient."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@jit
def _add_tile(tile_JL, high_L, sum_L):
    """Online maximum and sum of exponentials per lane; a lane's J values lie in one thread."""
    new_L = tl.maximum(high_L, tl.max(tile_JL, axis=0))
    tile_JL = tl.exp2((tile_JL - new_L[None, :]) * LOG2_E)
    return new_L, sum_L * tl.exp2((high_L - new_L) * LOG2_E) + tl.sum(tile_JL, axis=0)


@jit
def _softmax_gradient_kernel(
    logits_ptr,
    label_ptr,
    weight_ptr,
    logprob_ptr,
    num_rows,
    vocab,
    row_stride,
    J: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
    WRITE: tl.constexpr,
):
    TILE: tl.constexpr = J * LANES
    column_JL = tl.arange(0, J)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    whole = vocab // TILE * TILE  # columns in whole tiles; the ragged rest stays in registers
    rest_JL = column_JL < vocab - whole
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row_ptr = logits_ptr + tl.cast(row, tl.int64) * row_stride
        weight = tl.load(weight_ptr + row)
        if weight != 0.0:
            own_ptr = row_ptr + tl.load(label_ptr + row)
            own = tl.load(own_ptr).to(tl.float32)
            tl.debug_barrier()  # every thread has read the true logit
            tl.store(own_ptr, float("-inf"))
            tl.debug_barrier()  # and sees it gone

            high_L = tl.full((LANES,), LOWEST, tl.float32)
            sum_L = tl.zeros((LANES,), tl.float32)
            for start in tl.range(0, whole, TILE, num_stages=STAGES):
                tile_JL = tl.load(row_ptr + start + column_JL).to(tl.float32)
                high_L, sum_L = _add_tile(tile_JL, high_L, sum_L)
            last_JL = tl.load(row_ptr + whole + column_JL, mask=rest_JL, other=float("-inf"))
            high_L, sum_L = _add_tile(last_JL.to(tl.float32), high_L, sum_L)

            others_high = tl.max(high_L, axis=0)
            high = tl.maximum(others_high, own)
            others = tl.sum(sum_L * tl.exp2((high_L - high) * LOG2_E), axis=0)
            total = others + tl.exp2((own - high) * LOG2_E)
            rest = tl.where(own >= others_high, others, total - 1.0)
            tl.store(logprob_ptr + row, own - high - _log1p(rest))

            if WRITE:
                factor = weight / total
                last_JL = tl.exp2((last_JL.to(tl.float32) - high) * LOG2_E) * factor
                out_ptr = row_ptr + whole + column_JL
                tl.store(out_ptr, last_JL.to(logits_ptr.dtype.element_ty), mask=rest_JL)
                for done in tl.range(0, whole, TILE, num_stages=STAGES):
                    tile_ptr = row_ptr + (whole - TILE - done) + column_JL
                    tile_JL = tl.exp2((tl.load(tile_ptr).to(tl.float32) - high) * LOG2_E) * factor
                    tl.store(tile_ptr, tile_JL.to(logits_ptr.dtype.element_ty))
                tl.debug_barrier()  # the zero that the label's column got is in place
                tl.store(own_ptr, (-others * factor).to(logits_ptr.dtype.element_ty))
        else:
            tl.store(logprob_ptr + row, 0.0)
            if WRITE:
                zero_JL = tl.zeros((J, LANES), logits_ptr.dtype.element_ty)
                for start in range(0, vocab, TILE):
                    here_JL = column_JL < vocab - start
                    tl.store(row_ptr + start + column_JL, zero_JL, mask=here_JL)


def _launch_options(dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    """(constants, options) of a launch."""
    warps, vectors, stages = _CONFIG[dtype]
    lanes = warps * 32 * _VECTOR_BYTES // dtype.itemsize
    return {"J": vectors, "LANES": lanes, "STAGES": stages}, {"num_warps": warps}


def triton_(logits_CV: Tensor, label_C: Tensor, weight_C: Tensor, write_gradient: bool) -> Tensor:
    """softmax_gradient_ by the kernel."""
    num_rows, vocab = logits_CV.shape
    logprob_C = torch.empty_like(weight_C)
    constants, options = _launch_options(logits_CV.dtype)
    _softmax_gradient_kernel[(min(num_rows, num_programs(logits_CV)),)](
        logits_CV,
        label_C,
        weight_C,
        logprob_C,
        num_rows,
        vocab,
        logits_CV.stride(0),
        WRITE=write_gradient,
        **constants,
        **options,
    )
    return logprob_C


def num_programs(x: Tensor) -> int:
    """One program per multiprocessor."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count


_TYPES = {
    "label_ptr": "*i64",
    "weight_ptr": "*fp32",
    "logprob_ptr": "*fp32",
    "num_rows": "i32",
    "row_stride": "i32:16",
}
COMPILE_CASES = [
    (
        f"softmax_gradient/{name}/{'train' if write else 'evaluate'}{suffix}",
        _softmax_gradient_kernel,
        {"logits_ptr": f"*{name}", "vocab": vocab, **_TYPES},
        {**_launch_options(dtype)[0], "WRITE": write},
        _launch_options(dtype)[1],
    )
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    for write in (True, False)
    for vocab, suffix in (("i32:16", ""), ("i32", "/odd vocabulary"))
]
"""(name, kernel, argument types, constants, options) of what is shipped; ":16" divides by 16."""
