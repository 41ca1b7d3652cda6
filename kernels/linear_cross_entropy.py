"""Cross-entropy of a linear head without ever holding all logits, gradients included.

    loss = sum_t weight_t * (logsumexp_v(hidden_t . W_v) - hidden_t . W_label_t)

Three GEMMs of 2 R V D FLOPs (logits, d hidden, d weight) for the R rows that carry a label: rows
without one never reach a GEMM. Floor for R 4,700, D 5,120, V 152,064: 22.0 TFLOP, 27.5 ms at 798
TFLOP/s; the pass that turns logits into gradients (softmax_gradient.py) adds 0.95 ms. On an H200:
29.8 ms, 90 % of what its best product of the same run would allow.

The gradient is formed while the logits of a chunk exist, in forward, so that each GEMM is computed
once; backward hands the gradients on, scaled in place unless the upstream gradient is 1. A chunk
has 4,224 rows: with tiles of 128 x 256 and D 5,120 the d hidden GEMM then fills 132
multiprocessors exactly five times. All rows go in one chunk if they fit in the memory given, since
every further chunk reads and writes d weight once more.

Extra memory, beyond inputs and gradients: a chunk's logits and, where rows are masked, its hidden
states and their gradients; at most `max_chunk_bytes`. Beside that, a head wider than the hidden
states is copied in their dtype, and `accum_dtype` other than the head's costs that buffer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, overload

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from s1fast.kernels.arguments import expect, floats
from s1fast.kernels.jit import jit, tl
from s1fast.kernels.softmax_gradient import num_programs, softmax_gradient_

IGNORE = -100
CHUNK_ROWS = 4224
CHUNK_BYTES = {"cuda": 1_900_000_000, "cpu": 256 << 20}
"""Default of max_chunk_bytes; on a GPU cuBLAS's workspace and the rest then stay below 2 GB."""

_ROW_ALIGNMENT = 64
"""Rows of logits start at multiples of it, so that any vocabulary is read in whole vectors."""


@overload
def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    label_T: Tensor,
    loss_weight_T: Tensor,
    valid_rows: Tensor | None = None,
    *,
    return_logprobs: Literal[False] = False,
    accum_dtype: torch.dtype | None = None,
    max_chunk_bytes: int | None = None,
    bad_labels: Tensor | None = None,
) -> Tensor: ...


@overload
def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    label_T: Tensor,
    loss_weight_T: Tensor,
    valid_rows: Tensor | None = None,
    *,
    return_logprobs: Literal[True],
    accum_dtype: torch.dtype | None = None,
    max_chunk_bytes: int | None = None,
    bad_labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    label_T: Tensor,
    loss_weight_T: Tensor,
    valid_rows: Tensor | None = None,
    *,
    return_logprobs: bool = False,
    accum_dtype: torch.dtype | None = None,
    max_chunk_bytes: int | None = None,
    bad_labels: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropies of the rows that carry a label.

    A row is masked if its label is -100, its weight 0, or its label outside [0, V). Backward may
    walk the graph once: it scales the gradients in place.

    Args:
        hidden_TD: final hidden states, bf16 or fp32 (fp64 on CPU), unit stride along D.
        weight_VD: head, in hidden's dtype or fp32, unit stride along D; used in hidden's dtype, its
            gradient comes in its own.
        label_T: int64 class per row; read only at valid_rows.
        loss_weight_T: fp32 weight per row: mask and normalisation in one (fp64 is taken too).
        valid_rows: (R,) int64 indices of the rows that are not masked, each once, built by the host
            that packed the batch. None: found here, which waits for the device once.
        return_logprobs: also return the log-probability of each label.
        accum_dtype: where d weight is summed over chunks: the head's dtype (None) or fp32, rounded
            to the head's once at the end.
        max_chunk_bytes: most memory for a chunk's buffers; CHUNK_BYTES by default.
        bad_labels: int64 scalar on the device, to which the number of labels at valid_rows that are
            outside [0, V) and not -100 is added: these count as masked, and nobody waits to hear of
            them. Such a row's hidden state must be finite if valid_rows names it.

    Returns:
        The loss, a scalar in fp32 (fp64 where hidden or weight is); no rows give 0 and zero
        gradients. With return_logprobs also logprob_T in the same dtype, 0 where masked, without
        gradient.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or layout, before any launch.
    """
    _check(hidden_TD, weight_VD, label_T, loss_weight_T, valid_rows, bad_labels)
    if accum_dtype not in (None, weight_VD.dtype, torch.float32):
        raise ValueError(
            f"accum_dtype {accum_dtype}: d weight is summed in the head's {weight_VD.dtype} "
            "or in torch.float32"
        )
    device = hidden_TD.device.type
    limit = CHUNK_BYTES[device] if max_chunk_bytes is None else max_chunk_bytes
    if limit < _row_bytes(hidden_TD, weight_VD):
        raise ValueError(
            f"max_chunk_bytes {limit}: one row of hidden {tuple(hidden_TD.shape)} and its logits "
            f"for weight {tuple(weight_VD.shape)} take {_row_bytes(hidden_TD, weight_VD)}"
        )
    grad = torch.is_grad_enabled()
    loss, logprob_T, num_bad, _, _ = _op(
        hidden_TD,
        weight_VD,
        label_T,
        loss_weight_T,
        valid_rows,
        grad and hidden_TD.requires_grad,
        grad and weight_VD.requires_grad,
        accum_dtype or weight_VD.dtype,
        limit,
    )
    if bad_labels is not None:
        bad_labels.add_(num_bad)
    return (loss, logprob_T) if return_logprobs else loss


def _check(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    label_T: Tensor,
    loss_weight_T: Tensor,
    valid_rows: Tensor | None,
    bad_labels: Tensor | None,
) -> None:
    """Raises ValueError, naming the argument, what it is and what is accepted."""
    device = hidden_TD.device
    expect("hidden_TD", hidden_TD, ("T", "D"), floats(hidden_TD, "hidden_TD"), device)
    num_tokens, width = hidden_TD.shape
    dtype = hidden_TD.dtype
    wider = (dtype, torch.float32) if dtype == torch.bfloat16 else (dtype,)
    expect("weight_VD", weight_VD, ("V", width), wider, device)
    if not weight_VD.numel():
        raise ValueError(f"weight_VD has shape {tuple(weight_VD.shape)}: it must not be empty")
    expect("label_T", label_T, (num_tokens,), (torch.int64,), device)
    weights = (torch.float32, torch.float64)
    expect("loss_weight_T", loss_weight_T, (num_tokens,), weights, device)
    if valid_rows is not None:
        expect("valid_rows", valid_rows, ("R",), (torch.int64,), device)
        if len(valid_rows) > num_tokens:
            raise ValueError(
                f"valid_rows has shape {tuple(valid_rows.shape)}, expected at most the "
                f"{num_tokens} rows of hidden_TD, each once"
            )
    if bad_labels is not None:
        expect("bad_labels", bad_labels, (), (torch.int64,), device)
    for name, x in (("hidden_TD", hidden_TD), ("weight_VD", weight_VD)):
        rows_apart = len(x) < 2 or x.stride(0) >= width
        if not (rows_apart and (width == 1 or x.stride(1) == 1)):
            raise ValueError(
                f"{name} of shape {tuple(x.shape)} has strides {x.stride()}, expected contiguous "
                f"rows; pass {name}.contiguous()"
            )


def _wide(hidden_TD: Tensor, weight_VD: Tensor) -> torch.dtype:
    """Of loss and log-probabilities."""
    return torch.promote_types(torch.promote_types(hidden_TD.dtype, weight_VD.dtype), torch.float32)


def _row_stride(weight_VD: Tensor) -> int:
    return -(-len(weight_VD) // _ROW_ALIGNMENT) * _ROW_ALIGNMENT


def _row_bytes(hidden_TD: Tensor, weight_VD: Tensor) -> int:
    """Of one row of logits, and of its hidden state and that one's gradient."""
    return (_row_stride(weight_VD) + 2 * hidden_TD.shape[1]) * hidden_TD.dtype.itemsize


# -- the operation -----------------------------------------------------------------------------


def _chunks(num_rows: int, most: int) -> Iterator[slice]:
    """Chunks of CHUNK_ROWS, or of what fits in whole tiles; the last takes all that fits."""
    step = CHUNK_ROWS if most >= CHUNK_ROWS else max(most // 128 * 128, min(most, 128))
    start = 0
    while start < num_rows:
        size = num_rows - start if num_rows - start <= most else step
        yield slice(start, start + size)
        start += size


@torch.library.custom_op("s1fast::linear_cross_entropy", mutates_args=())
def _op(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    label_T: Tensor,
    loss_weight_T: Tensor,
    valid_rows: Tensor | None,
    needs_dhidden: bool,
    needs_dweight: bool,
    accum_dtype: torch.dtype,
    max_chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, logprob_T, number of bad labels, d hidden, d weight); what is not needed is empty."""
    num_tokens, num_classes = len(hidden_TD), len(weight_VD)
    rows = valid_rows
    if rows is not None:
        _check_rows(rows, num_tokens)
        if len(rows) == num_tokens:
            rows = None
    label_R = label_T if rows is None else label_T[rows]
    weight_R = loss_weight_T if rows is None else loss_weight_T[rows]
    weight_R = weight_R.to(_wide(hidden_TD, weight_VD))
    in_range_R = (label_R >= 0) & (label_R < num_classes)
    num_bad = (~in_range_R & (label_R != IGNORE)).sum()
    label_R, weight_R = label_R.where(in_range_R, 0), weight_R.where(in_range_R, 0.0)
    if valid_rows is None:
        used = torch.nonzero(weight_R)[:, 0]  # waits for the device
        if len(used) < num_tokens:
            rows, label_R, weight_R = used, label_R[used], weight_R[used]

    logprob_R, dhidden_TD, dweight_VD = _loop(
        hidden_TD,
        weight_VD,
        label_R,
        weight_R,
        rows,
        (needs_dhidden, needs_dweight),
        accum_dtype,
        max_chunk_bytes // _row_bytes(hidden_TD, weight_VD),
    )
    loss = -(weight_R * logprob_R).sum()
    logprob_T = logprob_R
    if rows is not None:
        logprob_T = logprob_R.new_zeros(num_tokens).index_copy_(0, rows, logprob_R)
    return loss, logprob_T, num_bad, dhidden_TD, dweight_VD


def _check_rows(rows: Tensor, num_tokens: int) -> None:
    """On a GPU nobody waits to see the indices: there they are trusted."""
    if rows.is_cuda:
        return
    in_range = ((rows >= 0) & (rows < num_tokens)).all()
    if not in_range or len(rows.unique()) < len(rows):
        raise ValueError(
            f"valid_rows of shape {tuple(rows.shape)}: every index must be in [0, {num_tokens}) "
            "and occur once"
        )


def _loop(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    label_R: Tensor,
    weight_R: Tensor,
    rows: Tensor | None,
    needs_grad: tuple[bool, bool],
    accum_dtype: torch.dtype,
    most_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, gradient in their place, its two products, chunk by chunk; rows None means all."""
    num_rows, (num_classes, width) = len(label_R), weight_VD.shape
    chunks = list(_chunks(num_rows, most_rows))
    largest = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    head_VD = weight_VD.to(hidden_TD.dtype)
    logits = hidden_TD.new_empty(largest, _row_stride(weight_VD))
    packed = None if rows is None else hidden_TD.new_empty(2, largest, width)
    logprob_R = torch.empty_like(weight_R)
    dhidden_TD, dweight_VD = _empty_gradients(hidden_TD, weight_VD, needs_grad, accum_dtype)
    if rows is not None:
        dhidden_TD.zero_()
    if not num_rows:
        dweight_VD.zero_()
    for chunk in chunks:
        size = chunk.stop - chunk.start
        grad_CV = logits[:size, :num_classes]
        if rows is None or packed is None:
            hidden_CD, dhidden_CD = hidden_TD[chunk], dhidden_TD[chunk]
        else:
            hidden_CD, dhidden_CD = packed[0, :size], packed[1, :size]
            torch.index_select(hidden_TD, 0, rows[chunk], out=hidden_CD)
        torch.mm(hidden_CD, head_VD.T, out=grad_CV)
        logprob_R[chunk] = softmax_gradient_(
            grad_CV, label_R[chunk], weight_R[chunk], write_gradient=any(needs_grad)
        )
        if needs_grad[0]:
            torch.mm(grad_CV, head_VD, out=dhidden_CD)
            if rows is not None:
                dhidden_TD.index_copy_(0, rows[chunk], dhidden_CD)
        if needs_grad[1]:
            _add_product(dweight_VD, grad_CV.T, hidden_CD, first=chunk.start == 0)
    return logprob_R, dhidden_TD, dweight_VD.to(weight_VD.dtype)


def _empty_gradients(
    hidden_TD: Tensor, weight_VD: Tensor, needs_grad: tuple[bool, bool], accum_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    dhidden_TD = hidden_TD.new_empty(hidden_TD.shape if needs_grad[0] else (0,))
    dweight_VD = weight_VD.new_empty(
        weight_VD.shape if needs_grad[1] else (0,), dtype=accum_dtype if needs_grad[1] else None
    )
    return dhidden_TD, dweight_VD


def _add_product(out: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """out = a @ b for the first, then out += a @ b, summed inside the GEMM in out's dtype."""
    beta = 0 if first else 1
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif out.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)
    else:  # a CPU has no product of mixed dtypes
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)


@_op.register_fake
def _(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    label_T: Tensor,
    loss_weight_T: Tensor,
    valid_rows: Tensor | None,
    needs_dhidden: bool,
    needs_dweight: bool,
    accum_dtype: torch.dtype,
    max_chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = _wide(hidden_TD, weight_VD)
    dhidden_TD, dweight_VD = _empty_gradients(
        hidden_TD, weight_VD, (needs_dhidden, needs_dweight), weight_VD.dtype
    )
    loss = hidden_TD.new_empty((), dtype=wide)
    logprob_T = hidden_TD.new_empty(len(hidden_TD), dtype=wide)
    return loss, logprob_T, label_T.new_empty(()), dhidden_TD, dweight_VD


@register_flop_formula(torch.ops.s1fast.linear_cross_entropy)
def _flops(
    hidden, weight, label, loss_weight, valid_rows, needs_dhidden, needs_dweight, *_, **__
) -> int:
    """Of the products, from shapes: FlopCounterMode cannot look inside. No index: all rows."""
    (num_rows,) = valid_rows or label
    return 2 * num_rows * weight[0] * weight[1] * (1 + needs_dhidden + needs_dweight)


def _setup_context(ctx, inputs, output) -> None:
    _, logprob_T, num_bad, dhidden_TD, dweight_VD = output
    ctx.save_for_backward(dhidden_TD, dweight_VD)
    ctx.mark_non_differentiable(logprob_T, num_bad, dhidden_TD, dweight_VD)
    ctx.set_materialize_grads(False)
    ctx.walked = False


def _backward(ctx, dloss, *_):
    gradients: list[Tensor | None] = [None, None]
    if dloss is not None:
        if ctx.walked:
            raise RuntimeError(
                "linear_cross_entropy scales its gradients in place, so backward can walk its "
                "graph once: compute the loss again instead of retain_graph"
            )
        ctx.walked = True
        for i, x in enumerate(ctx.saved_tensors):
            gradients[i] = _scaled(x, dloss) if ctx.needs_input_grad[i] else None
    return *gradients, *[None] * 7


_op.register_autograd(_backward, setup_context=_setup_context)


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    """x *= scale, a scalar on the device; nothing is read or written where that is 1."""
    if type(x) is not Tensor:  # traced by a compiler, whose graphs may not change what was saved
        return x * scale
    if x.is_cuda:
        scale_(x, scale)
    elif scale != 1:
        x.mul_(scale)
    return x


def scale_(x: Tensor, scale: Tensor) -> None:
    """Multiplies a contiguous bf16 or fp32 tensor in place by an fp32 scalar, by Triton."""
    _scale_kernel[(8 * num_programs(x),)](x, scale, x.numel(), BLOCK=_SCALE_BLOCK)


_SCALE_BLOCK = 4096


@jit
def _scale_kernel(x_ptr, scale_ptr, numel, BLOCK: tl.constexpr):
    scale = tl.load(scale_ptr)
    if scale != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in range(first, numel, tl.num_programs(0) * BLOCK):
            offset = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + offset, mask=offset < numel).to(tl.float32) * scale
            tl.store(x_ptr + offset, x.to(x_ptr.dtype.element_ty), mask=offset < numel)


COMPILE_CASES = [
    (
        f"linear_cross_entropy/scale/{name}/{numel}",
        _scale_kernel,
        {"x_ptr": f"*{name}", "scale_ptr": "*fp32", "numel": numel},
        {"BLOCK": _SCALE_BLOCK},
        {"num_warps": 4},
    )
    for name in ("bf16", "fp32")
    for numel in ("i32:16", "i64:16", "i32")
]
"""As softmax_gradient.COMPILE_CASES."""
