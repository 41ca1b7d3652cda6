"""AdamW over all parameter shards of a device in one launch, and the norm of their gradients.

    g <- clip * grad
    p <- p * (1 - lr * decay)
    m <- m + (1 - beta1) * (g - m)
    v <- beta2 * v + (1 - beta2) * g * g
    p <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

with torch.optim.AdamW's order of operations (Loshchilov and Hutter, arXiv 1711.05101). Learning
rate and clip factor are read from device memory, so that the host neither waits for a norm nor
launches anew for a rate. Gradients are scaled on their way in and never written; the masters are
the only copy of the weights.

Bytes a parameter: fp32 p, m and v read and written, 24, and an fp32 gradient read, 4: 28; 20 with
bf16 moments. The norm before it reads the gradients once more, 4. Floor for the 2.05e9 parameters
that a GPU of 16 holds of a 32B model: 57.4 GB, 19.1 ms at 3.0 TB/s (bf16 moments 41.0 GB, 13.7 ms),
and the norm 8.2 GB, 2.7 ms. On an H200 1.5e9 parameters with bf16 moments took 7.3 ms, 96 % of its
copy roof. State: 12 bytes a parameter, 24.6 GB (bf16 moments 8 and 16.4 GB), beside the gradients.

A shard is cut into chunks of 32,768 elements, a program each; a table on the device, made once,
says which. Gradients are new tensors at every step: their addresses follow in one copy from fresh
pinned memory, which the allocator takes back only after the copy has read it. A chunk's whole tiles
move by vectors of 4 elements, if all four of its arrays begin on such a boundary; the ragged end,
and chunks of arrays that begin elsewhere, move element by element.

The norm has no atomics: a chunk's squares are added in fp32, 16 in a row in each of 2,048 lanes and
then as a tree, the chunks' sums in fp64 in one order. So a norm repeats bit for bit, and its
relative error does not grow with the number of elements. Squares beyond fp32 give inf.

Both are launched by the optimizer only, outside of any graph, over lists that are checked at every
step: there is nothing to register as an operation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s1fast.kernels.jit import jit, tl

CHUNK = 32768
"""Elements of a program."""
PIECE = 1 << 17
"""Elements that the reference takes at a time."""
_BLOCK, _WARPS = 2048, 16  # 4 elements a thread: 8 bytes of bf16, 16 of fp32
_TOTAL = {"BLOCK": 4096}, {"num_warps": 16}  # constants and options of the last reduction


class Shards:
    """Parameters with their moments, checked, and the tables that kernels find them by.

    The tensors stay where they are: whoever moves one (p.data = ...) makes new Shards.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        decays: Sequence[float],
    ) -> None:
        """Args:
            params: fp32, contiguous, of any shape, empty ones too; all on one device.
            exp_avgs, exp_avg_sqs: the moments, each shaped as its parameter; all fp32 or all bf16.
            decays: weight decay of each parameter.

        Raises:
            ValueError: where these do not match.
        """
        self.params = [p.detach() for p in params]
        self.exp_avgs, self.exp_avg_sqs, self.decays = [*exp_avgs], [*exp_avg_sqs], [*decays]
        _check_shards(self)
        self.device = self.params[0].device
        sizes = torch.tensor([p.numel() for p in self.params])
        chunks = -(-sizes // CHUNK)
        shard = torch.repeat_interleave(torch.arange(len(sizes)), chunks)
        number = torch.arange(len(shard)) - (chunks.cumsum(0) - chunks)[shard]
        arrays = zip(self.params, self.exp_avgs, self.exp_avg_sqs, strict=True)
        rows = [[*(x.data_ptr() for x in three), three[0].numel()] for three in arrays]
        self.table = torch.tensor(rows).to(self.device)
        """(shards, 4) int64: addresses of parameter and moments, number of elements."""
        self.chunks = torch.stack((shard, number), 1).to(self.device, torch.int32)
        """(chunks, 2): shard, and which of its chunks."""
        self.decay = torch.tensor(self.decays, dtype=torch.float32).to(self.device)

    @property
    def narrow(self) -> bool:
        """Whether the moments are bf16."""
        return self.exp_avgs[0].dtype == torch.bfloat16


@dataclass(frozen=True)
class Gradients:
    """A step's gradients; `table` is None on a CPU."""

    grads: list[Tensor]
    table: Tensor | None
    """(shards,) int64 addresses, on the device."""

    @property
    def narrow(self) -> bool:
        return self.grads[0].dtype == torch.bfloat16


def gradients(shards: Shards, grads: Sequence[Tensor]) -> Gradients:
    """Checks the gradients of a step and sends their addresses off; the host does not wait.

    Args:
        grads: shaped as the parameters, contiguous; all fp32 or all bf16.

    Raises:
        ValueError: where they do not match the shards.
    """
    _check_gradients(shards, grads)
    table = _addresses(grads, shards.device) if shards.device.type == "cuda" else None
    return Gradients([*grads], table)


def sum_of_squares(shards: Shards, found: Gradients) -> Tensor:
    """Sum of the squares of all gradients, a 0-d fp32 tensor on their device."""
    if found.table is None:
        return reference_sum_of_squares(found)
    return triton_sum_of_squares(shards, found)


def adamw_(
    shards: Shards,
    found: Gradients,
    lr: Tensor,
    clip: Tensor,
    step: int,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One step, in place on parameters and moments.

    Args:
        lr, clip: learning rate and the factor on all gradients; 0-d fp32 tensors on the device.
        step: 1 for the first.
        betas: in [0, 1).
        eps: positive.

    Raises:
        ValueError: an argument outside of these.
    """
    for name, x in (("lr", lr), ("clip", clip)):
        if x.shape != () or x.dtype != torch.float32 or x.device != shards.device:
            found_there = f"{tuple(x.shape)} is {x.dtype} on {x.device}"
            raise ValueError(f"{name} {found_there}, expected a 0-d float32 on {shards.device}")
    if step < 1:
        raise ValueError(f"step is {step}, the first one is 1")
    if not all(0 <= beta < 1 for beta in betas) or not 0 < eps < math.inf:
        raise ValueError(f"betas {betas} must lie in [0, 1), eps {eps} must be positive")
    run = reference_ if found.table is None else triton_
    run(shards, found, lr, clip, step, betas, eps)


def reference_sum_of_squares(found: Gradients) -> Tensor:
    """sum_of_squares in plain PyTorch, whose sums are trees as well."""
    sums = [piece.float().square().sum() for g in found.grads for (piece,) in _pieces(g)]
    return torch.stack(sums).double().sum().float()


def reference_(
    shards: Shards,
    found: Gradients,
    lr: Tensor,
    clip: Tensor,
    step: int,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """adamw_ in plain PyTorch, a piece at a time."""
    correction1, root_correction2 = _corrections(step, betas)
    step_size = lr / correction1
    keeps = {decay: 1 - lr * decay for decay in {*shards.decays}}
    for i, decay in enumerate(shards.decays):
        arrays = (shards.params[i], shards.exp_avgs[i], shards.exp_avg_sqs[i], found.grads[i])
        for param, exp_avg, exp_avg_sq, grad in _pieces(*arrays):
            g = grad.float() * clip
            m, v = exp_avg.float(), exp_avg_sq.float()  # themselves, where they are fp32
            m.lerp_(g, 1 - betas[0])
            v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
            root = v.sqrt().div_(root_correction2).add_(eps)
            param.mul_(keeps[decay]).addcdiv_(torch.mul(m, step_size, out=g), root, value=-1)
            if shards.narrow:
                exp_avg.copy_(m)
                exp_avg_sq.copy_(v)


def _pieces(*arrays: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Views of the same elements of each, few enough for what is computed with them to stay in a
    processor's cache."""
    if arrays[0].numel() <= PIECE:
        return (arrays,)
    return zip(*(x.view(-1).split(PIECE) for x in arrays), strict=True)


def _corrections(step: int, betas: tuple[float, float]) -> tuple[float, float]:
    """1 - beta1^t and the root of 1 - beta2^t."""
    return 1 - betas[0] ** step, math.sqrt(1 - betas[1] ** step)


# -- the kernels -------------------------------------------------------------------------------


@jit
def _pointer(address, NARROW: tl.constexpr, ALIGNED: tl.constexpr):
    if NARROW:
        ptr = address.to(tl.pointer_type(tl.bfloat16))
    else:
        ptr = address.to(tl.pointer_type(tl.float32))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@jit
def _update(
    param_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    grad_ptr,
    mask_B,
    keep,
    clip,
    step_size,
    weight1,
    beta2,
    weight2,
    root_correction2,
    eps,
):
    """A tile; the pointers are blocks."""
    g_B = tl.load(grad_ptr, mask=mask_B).to(tl.float32) * clip
    m_B = tl.load(exp_avg_ptr, mask=mask_B).to(tl.float32)
    v_B = tl.load(exp_avg_sq_ptr, mask=mask_B).to(tl.float32)
    p_B = tl.load(param_ptr, mask=mask_B)
    m_B += weight1 * (g_B - m_B)
    v_B = v_B * beta2 + weight2 * g_B * g_B
    root_B = tl.div_rn(tl.sqrt_rn(v_B), root_correction2) + eps
    p_B = p_B * keep - tl.div_rn(step_size * m_B, root_B)
    tl.store(param_ptr, p_B, mask=mask_B)
    tl.store(exp_avg_ptr, m_B.to(exp_avg_ptr.dtype.element_ty), mask=mask_B)
    tl.store(exp_avg_sq_ptr, v_B.to(exp_avg_sq_ptr.dtype.element_ty), mask=mask_B)


@jit
def _adamw_kernel(
    chunks_ptr,
    table_ptr,
    grads_ptr,
    decay_ptr,
    lr_ptr,
    clip_ptr,
    weight1,
    beta2,
    weight2,
    correction1,
    root_correction2,
    eps,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    NARROW_GRADS: tl.constexpr,
    NARROW_MOMENTS: tl.constexpr,
):
    chunk_ptr = chunks_ptr + 2 * tl.program_id(0)
    shard = tl.load(chunk_ptr)
    start = tl.load(chunk_ptr + 1).to(tl.int64) * CHUNK
    param = tl.load(table_ptr + 4 * shard) + 4 * start
    exp_avg = tl.load(table_ptr + 4 * shard + 1) + (2 if NARROW_MOMENTS else 4) * start
    exp_avg_sq = tl.load(table_ptr + 4 * shard + 2) + (2 if NARROW_MOMENTS else 4) * start
    grad = tl.load(grads_ptr + shard) + (2 if NARROW_GRADS else 4) * start
    size = tl.minimum(tl.load(table_ptr + 4 * shard + 3) - start, CHUNK).to(tl.int32)
    lr, clip = tl.load(lr_ptr), tl.load(clip_ptr)
    keep = 1.0 - lr * tl.load(decay_ptr + shard)
    step_size = tl.div_rn(lr, correction1)

    whole = size // BLOCK * BLOCK  # elements in tiles that move by vectors
    if ((param | exp_avg | exp_avg_sq | grad) & 15) != 0:
        whole = 0
    at_B = tl.arange(0, BLOCK)
    for at in range(0, whole, BLOCK):
        _update(
            _pointer(param, False, True) + at + at_B,
            _pointer(exp_avg, NARROW_MOMENTS, True) + at + at_B,
            _pointer(exp_avg_sq, NARROW_MOMENTS, True) + at + at_B,
            _pointer(grad, NARROW_GRADS, True) + at + at_B,
            None,
            keep,
            clip,
            step_size,
            weight1,
            beta2,
            weight2,
            root_correction2,
            eps,
        )
    for at in range(whole, size, BLOCK):
        _update(
            _pointer(param, False, False) + at + at_B,
            _pointer(exp_avg, NARROW_MOMENTS, False) + at + at_B,
            _pointer(exp_avg_sq, NARROW_MOMENTS, False) + at + at_B,
            _pointer(grad, NARROW_GRADS, False) + at + at_B,
            at_B < size - at,
            keep,
            clip,
            step_size,
            weight1,
            beta2,
            weight2,
            root_correction2,
            eps,
        )


@jit
def _squares_kernel(
    chunks_ptr,
    table_ptr,
    grads_ptr,
    partial_ptr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    NARROW_GRADS: tl.constexpr,
):
    chunk = tl.program_id(0)
    shard = tl.load(chunks_ptr + 2 * chunk)
    start = tl.load(chunks_ptr + 2 * chunk + 1).to(tl.int64) * CHUNK
    grad = tl.load(grads_ptr + shard) + (2 if NARROW_GRADS else 4) * start
    size = tl.minimum(tl.load(table_ptr + 4 * shard + 3) - start, CHUNK).to(tl.int32)
    whole = size // BLOCK * BLOCK
    if (grad & 15) != 0:
        whole = 0
    at_B = tl.arange(0, BLOCK)
    sum_B = tl.zeros((BLOCK,), tl.float32)
    for at in range(0, whole, BLOCK):
        g_B = tl.load(_pointer(grad, NARROW_GRADS, True) + at + at_B).to(tl.float32)
        sum_B += g_B * g_B
    for at in range(whole, size, BLOCK):
        grad_ptr = _pointer(grad, NARROW_GRADS, False) + at + at_B
        g_B = tl.load(grad_ptr, mask=at_B < size - at, other=0.0).to(tl.float32)
        sum_B += g_B * g_B
    tl.store(partial_ptr + chunk, tl.sum(sum_B))


@jit
def _total_kernel(partial_ptr, total_ptr, num_chunks, BLOCK: tl.constexpr):
    """One program adds all partial sums."""
    at_B = tl.arange(0, BLOCK)
    sum_B = tl.zeros((BLOCK,), tl.float64)
    for at in range(0, num_chunks, BLOCK):
        partial_B = tl.load(partial_ptr + at + at_B, mask=at_B < num_chunks - at, other=0.0)
        sum_B += partial_B.to(tl.float64)
    tl.store(total_ptr, tl.sum(sum_B).to(tl.float32))


def triton_sum_of_squares(shards: Shards, found: Gradients) -> Tensor:
    """sum_of_squares by the kernels."""
    num_chunks = len(shards.chunks)
    partial = torch.empty(num_chunks, dtype=torch.float32, device=shards.device)
    total = torch.zeros((), dtype=torch.float32, device=shards.device)
    if num_chunks:
        _squares_kernel[(num_chunks,)](
            shards.chunks,
            shards.table,
            found.table,
            partial,
            CHUNK=CHUNK,
            BLOCK=_BLOCK,
            NARROW_GRADS=found.narrow,
            num_warps=_WARPS,
        )
        constants, options = _TOTAL
        _total_kernel[(1,)](partial, total, num_chunks, **constants, **options)
    return total


def triton_(
    shards: Shards,
    found: Gradients,
    lr: Tensor,
    clip: Tensor,
    step: int,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """adamw_ by the kernel."""
    if not len(shards.chunks):
        return
    _adamw_kernel[(len(shards.chunks),)](
        shards.chunks,
        shards.table,
        found.table,
        shards.decay,
        lr,
        clip,
        1 - betas[0],
        betas[1],
        1 - betas[1],
        *_corrections(step, betas),
        eps,
        CHUNK=CHUNK,
        BLOCK=_BLOCK,
        NARROW_GRADS=found.narrow,
        NARROW_MOMENTS=shards.narrow,
        num_warps=_WARPS,
    )


def _addresses(grads: Sequence[Tensor], device: torch.device) -> Tensor:
    """The gradients' addresses on the device."""
    pinned = device.type == "cuda"
    held = torch.tensor([g.data_ptr() for g in grads], dtype=torch.int64, pin_memory=pinned)
    return held.to(device, non_blocking=True)


# -- what is refused ---------------------------------------------------------------------------


def _check_shards(shards: Shards) -> None:
    params = shards.params
    counts = {len(x) for x in (params, shards.exp_avgs, shards.exp_avg_sqs, shards.decays)}
    if len(counts) > 1 or not params:
        raise ValueError(
            f"{len(params)} parameters, {len(shards.exp_avgs)} and {len(shards.exp_avg_sqs)} "
            f"moments, {len(shards.decays)} weight decays: expected as many of each, at least one"
        )
    if shards.exp_avgs[0].dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"moments are {shards.exp_avgs[0].dtype}, expected float32 or bfloat16")
    for i, param in enumerate(params):
        _check_like(f"parameter {i}", param, param, torch.float32, params[0].device)
        for name, x in (("exp_avg", shards.exp_avgs[i]), ("exp_avg_sq", shards.exp_avg_sqs[i])):
            dtype = shards.exp_avgs[0].dtype
            _check_like(f"{name} {i}", x, param, dtype, param.device)
        if not 0 <= shards.decays[i] < math.inf:
            raise ValueError(f"weight decay {i} is {shards.decays[i]}, expected a number from 0")
    everything = [*params, *shards.exp_avgs, *shards.exp_avg_sqs]
    addresses = [x.data_ptr() for x in everything if x.numel()]
    if len({*addresses}) < len(addresses):
        raise ValueError("two of the tensors share their memory; give each parameter once")


def _check_gradients(shards: Shards, grads: Sequence[Tensor]) -> None:
    if len(grads) != len(shards.params):
        raise ValueError(f"{len(grads)} gradients for {len(shards.params)} parameters")
    dtype = grads[0].dtype
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"gradients are {dtype}, expected float32 or bfloat16")
    for i, (grad, param) in enumerate(zip(grads, shards.params, strict=True)):
        _check_like(f"gradient {i}", grad, param, dtype, shards.device)


def _check_like(
    name: str, x: Tensor, like: Tensor, dtype: torch.dtype, device: torch.device
) -> None:
    if x.shape != like.shape or x.dtype != dtype or x.device != device:
        raise ValueError(
            f"{name} {tuple(x.shape)} is {x.dtype} on {x.device}, expected {tuple(like.shape)} "
            f"{dtype} on {device}"
        )
    if not x.is_contiguous():
        raise ValueError(f"{name} {tuple(x.shape)} has strides {x.stride()}, expected contiguous")


# -- what is shipped ---------------------------------------------------------------------------

_WORDS = {"chunks_ptr": "*i32", "table_ptr": "*i64", "grads_ptr": "*i64"}
_NUMBERS = ("weight1", "beta2", "weight2", "correction1", "root_correction2", "eps")
_POINTERS = ("decay_ptr", "lr_ptr", "clip_ptr")
COMPILE_CASES = [
    (
        f"adamw/{'bf16' if moments else 'fp32'} moments/{'bf16' if grads else 'fp32'} gradients",
        _adamw_kernel,
        {**_WORDS, **dict.fromkeys(_POINTERS, "*fp32"), **dict.fromkeys(_NUMBERS, "fp32")},
        {"CHUNK": CHUNK, "BLOCK": _BLOCK, "NARROW_GRADS": grads, "NARROW_MOMENTS": moments},
        {"num_warps": _WARPS},
    )
    for moments in (False, True)
    for grads in (False, True)
]
COMPILE_CASES += [
    (
        f"adamw/squares/{'bf16' if grads else 'fp32'} gradients",
        _squares_kernel,
        {**_WORDS, "partial_ptr": "*fp32"},
        {"CHUNK": CHUNK, "BLOCK": _BLOCK, "NARROW_GRADS": grads},
        {"num_warps": _WARPS},
    )
    for grads in (False, True)
]
_TOTALS = {"partial_ptr": "*fp32", "total_ptr": "*fp32", "num_chunks": "i32"}
COMPILE_CASES += [("adamw/total", _total_kernel, _TOTALS, *_TOTAL)]
"""(name, kernel, argument types, constants, options) of what is shipped."""
