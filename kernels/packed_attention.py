"""Attention over a packed stream: each sequence attends to itself alone.

    out_t = sum_{s <= t, same sequence} softmax_s(q_t . k_s * scale) v_s

FLOPs forward: 2 H K sum_i n_i^2 (the causal half of 4 H K n^2), backward 2.5 times that; ours does
3.5, to be deterministic. Floor for an s1K batch of 16 sequences of 4,900 tokens, 40 heads of 128:
3.9 TFLOP forward, 5.3 ms at 742 TFLOP/s; backward 13.2 ms, 18.5 with the two products more. On an
H200: 9.1 ms forward, 28.0 backward.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from itertools import pairwise
from typing import Literal, get_args, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from s1fast.kernels import packed_attention_backward as gradients
from s1fast.kernels import packed_attention_gluon as gluon_kernels
from s1fast.kernels import packed_attention_triton as kernels
from s1fast.kernels.jit import INTERPRETED, gluon, triton

Backend = Literal["triton", "gluon", "flash", "torch", "reference"]
OURS: tuple[Backend, ...] = ("triton", "gluon")
"""Backends by our own kernels: opaque to a compiler, with a log-sum-exp."""


@overload
def packed_attention(
    q_THK: Tensor,
    k_TNK: Tensor,
    v_TNK: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    backend: Backend | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def packed_attention(
    q_THK: Tensor,
    k_TNK: Tensor,
    v_TNK: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    backend: Backend | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def packed_attention(
    q_THK: Tensor,
    k_TNK: Tensor,
    v_TNK: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    backend: Backend | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Variable-length attention with grouped key-value heads.

    Args:
        q_THK: queries of the packed stream; H a multiple of N, unit stride along K.
        k_TNK, v_TNK: keys and values, same T, dtype and device.
        cu_seqlens: (B + 1,) int32 sequence boundaries, on the host: nothing waits for a device to
            learn them.
        max_seqlen: length of the longest sequence.
        causal: whether a token sees only itself and those before it.
        softmax_scale: K ** -0.5 unless given.
        backend: "triton": ours, bf16 with K 64 or 128; "gluon": the same with a forward for Hopper
            alone (H100, H200); "flash": flash-attn, whichever of 4, 3 and 2 is installed;
            "torch": torch.nn.attention.varlen; "reference": torch's scaled_dot_product_attention,
            sequence by sequence. None: default_backend.
        return_lse: also return the log-sum-exp of every row, by "triton" and "gluon" only.

    Returns:
        (T, H, K) in q's dtype. Tokens beyond cu_seqlens[-1] get zeros. With return_lse also
        lse_HT in fp32 to base e, without gradient, -inf beyond cu_seqlens[-1].

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or layout, boundaries that do not
            rise, pass T or disagree with max_seqlen, a backend that cannot take the input or is
            not there.
    """
    _check(q_THK, k_TNK, v_TNK, cu_seqlens)
    width = q_THK.shape[2]
    backend = backend or default_backend(q_THK.device, q_THK.dtype, width)
    try:
        check_backend(backend, q_THK.device, q_THK.dtype, width)
    except ValueError as error:
        raise ValueError(f"q_THK {tuple(q_THK.shape)}: {error}") from None
    scale = width**-0.5 if softmax_scale is None else softmax_scale
    if not 0 < scale < float("inf"):
        raise ValueError(f"softmax_scale {scale}: expected a positive number")
    if not torch.compiler.is_compiling():  # a compiled graph is one for every length
        _checked_bounds(cu_seqlens, len(q_THK), max_seqlen)
    if backend in OURS:
        out_THK, lse2_HT = forward(q_THK, k_TNK, v_TNK, cu_seqlens, causal, scale, backend)
        return (out_THK, lse2_HT / kernels.LOG2_E) if return_lse else out_THK
    if return_lse:
        raise ValueError(f"return_lse: backend {backend!r} does not return it, 'triton' does")
    bounds = _checked_bounds(cu_seqlens, len(q_THK))
    if backend == "reference":
        return _reference(q_THK, k_TNK, v_TNK, bounds, causal, scale)
    call = _flash if backend == "flash" else _torch_varlen
    end = bounds[-1]
    if not end:
        return torch.zeros_like(q_THK)
    q, k, v = (x[:end] for x in (q_THK, k_TNK, v_TNK))
    out = call(q, k, v, _on_device(bounds, q_THK.device), max_seqlen, causal, scale)
    return out if end == len(q_THK) else torch.cat((out, torch.zeros_like(q_THK[end:])))


def default_backend(device: torch.device, dtype: torch.dtype, width: int) -> Backend:
    """ "triton" where it takes such heads on such a device, else "reference"."""
    taken = dtype == torch.bfloat16 and width in kernels.FORWARD and triton is not None
    return "triton" if device.type == "cuda" and taken else "reference"


def check_backend(backend: str, device: torch.device, dtype: torch.dtype, width: int) -> None:
    """Raises ValueError, with the remedy, where a backend cannot run or take such heads."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend {backend!r}: there are {', '.join(get_args(Backend))}")
    if backend == "reference":
        return
    other = "'reference' takes any input"
    if not (device.type == "cuda" or (backend == "triton" and INTERPRETED)):
        raise ValueError(f"backend {backend!r} needs tensors on CUDA, not on {device}; {other}")
    if backend == "flash":
        _flash_module()
    if backend in OURS:
        if triton is None:
            raise ValueError(f"backend {backend!r}: not installed; pip install triton, or {other}")
        if dtype != torch.bfloat16:
            raise ValueError(f"backend {backend!r} takes torch.bfloat16, not {dtype}; {other}")
        if width not in kernels.FORWARD:
            widths = " or ".join(map(str, kernels.FORWARD))
            raise ValueError(f"backend {backend!r} takes heads {widths} wide, not {width}; {other}")
    if backend == "gluon":
        if gluon is None:
            raise ValueError("backend 'gluon' needs Triton 3.6 or newer; or choose 'triton'")
        if torch.cuda.get_device_capability(device)[0] != 9:
            name = torch.cuda.get_device_name(device)
            raise ValueError(f"backend 'gluon' is for Hopper, not for {name}; choose 'triton'")


# -- checks --------------------------------------------------------------------------------------


def _check(q_THK: Tensor, k_TNK: Tensor, v_TNK: Tensor, cu_seqlens: Tensor) -> None:
    """Shapes, dtypes and devices."""
    for name, x in (("q_THK", q_THK), ("k_TNK", k_TNK), ("v_TNK", v_TNK)):
        if x.ndim != 3:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (T, heads, K)")
        if x.dtype != q_THK.dtype or x.device != q_THK.device:
            raise ValueError(
                f"{name} {tuple(x.shape)} is {x.dtype} on {x.device}, q_THK is {q_THK.dtype} on "
                f"{q_THK.device}: they must agree"
            )
    num_tokens, heads, width = q_THK.shape
    if not q_THK.is_floating_point():
        raise ValueError(f"q_THK {tuple(q_THK.shape)} is {q_THK.dtype}, expected a floating dtype")
    if k_TNK.shape != v_TNK.shape or (k_TNK.shape[0], k_TNK.shape[2]) != (num_tokens, width):
        raise ValueError(
            f"k_TNK {tuple(k_TNK.shape)} and v_TNK {tuple(v_TNK.shape)}: expected both to be "
            f"({num_tokens}, N, {width}) as q_THK is {tuple(q_THK.shape)}"
        )
    if not k_TNK.shape[1] or heads % k_TNK.shape[1]:
        raise ValueError(f"{heads} query heads are no multiple of {k_TNK.shape[1]}")
    if cu_seqlens.device.type != "cpu":
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}; pass the host copy")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"cu_seqlens {tuple(cu_seqlens.shape)} is {cu_seqlens.dtype}, expected (B + 1,) int32"
        )


def _checked_bounds(
    cu_seqlens: Tensor, num_tokens: int, max_seqlen: int | None = None
) -> tuple[int, ...]:
    """The boundaries, which are data: a compiled graph looks at them when it runs."""
    return _checked(tuple(cu_seqlens.tolist()), num_tokens, max_seqlen)


@lru_cache(maxsize=16)
def _checked(bounds: tuple[int, ...], num_tokens: int, max_seqlen: int | None) -> tuple[int, ...]:
    """Once for a batch, whose every layer asks."""
    lengths = [stop - start for start, stop in pairwise(bounds)]
    if not bounds or bounds[0] != 0 or min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens must start at 0 and never fall, got {list(bounds)}")
    if bounds[-1] > num_tokens:
        raise ValueError(f"cu_seqlens ends at {bounds[-1]} but there are {num_tokens} tokens")
    if max_seqlen is not None and max(lengths, default=0) > max_seqlen:
        raise ValueError(f"max_seqlen {max_seqlen} is below the longest sequence, {max(lengths)}")
    return bounds


def _fits_tma(x: Tensor) -> bool:
    aligned = x.stride(0) % 8 == x.stride(1) % 8 == 0 and x.data_ptr() % 16 == 0
    return x.stride(2) == 1 and min(x.stride()) > 0 and aligned


# -- the operation -------------------------------------------------------------------------------


@torch.library.custom_op("s1fast::packed_attention", mutates_args=())
def forward(
    q_THK: Tensor,
    k_TNK: Tensor,
    v_TNK: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    scale: float,
    backend: str = "triton",
) -> tuple[Tensor, Tensor]:
    """(out_THK, lse2_HT), log-sum-exp to base 2; `backend` is one of OURS."""
    for name, x in (("q_THK", q_THK), ("k_TNK", k_TNK), ("v_TNK", v_TNK)):
        if not _fits_tma(x):
            raise ValueError(
                f"{name} {tuple(x.shape)} has strides {x.stride()}: backend {backend!r} needs unit "
                f"stride along K and rows at multiples of 16 bytes; pass {name}.contiguous()"
            )
    bounds = _checked_bounds(cu_seqlens, len(q_THK))
    module = gluon_kernels if backend == "gluon" else kernels
    return module.forward(q_THK, k_TNK, v_TNK, bounds, causal, scale)


@forward.register_fake
def _(
    q_THK: Tensor,
    k_TNK: Tensor,
    v_TNK: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    scale: float,
    backend: str = "triton",
) -> tuple[Tensor, Tensor]:
    num_tokens, heads, _ = q_THK.shape
    return q_THK.new_empty(q_THK.shape), q_THK.new_empty(heads, num_tokens, dtype=torch.float32)


@torch.library.custom_op("s1fast::packed_attention_delta", mutates_args=())
def delta(dout_THK: Tensor, out_THK: Tensor) -> Tensor:
    """delta_HT = sum_k dout * out, in fp32: what backward needs of the output."""
    return gradients.delta(_aligned(dout_THK), out_THK)


@delta.register_fake
def _(dout_THK: Tensor, out_THK: Tensor) -> Tensor:
    num_tokens, heads, _ = out_THK.shape
    return out_THK.new_empty(heads, num_tokens, dtype=torch.float32)


@torch.library.custom_op("s1fast::packed_attention_backward", mutates_args=())
def backward(
    dout_THK: Tensor,
    q_THK: Tensor,
    k_TNK: Tensor,
    v_TNK: Tensor,
    delta_HT: Tensor,
    lse2_HT: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq_THK, dk_TNK, dv_TNK)."""
    saved = (q_THK, k_TNK, v_TNK, delta_HT, lse2_HT)
    return gradients.backward(_aligned(dout_THK), *saved, tuple(cu_seqlens.tolist()), causal, scale)


@backward.register_fake
def _(
    dout_THK: Tensor,
    q_THK: Tensor,
    k_TNK: Tensor,
    v_TNK: Tensor,
    delta_HT: Tensor,
    lse2_HT: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q_THK.new_empty(q_THK.shape), k_TNK.new_empty(k_TNK.shape), v_TNK.new_empty(v_TNK.shape)


def _aligned(dout_THK: Tensor) -> Tensor:
    """As the descriptors need it: a contiguous one may be misaligned too."""
    if _fits_tma(dout_THK):
        return dout_THK
    return dout_THK.clone(memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    q_THK, k_TNK, v_TNK, cu_seqlens, ctx.causal, ctx.scale, _ = inputs
    out_THK, lse2_HT = output
    ctx.save_for_backward(q_THK, k_TNK, v_TNK, out_THK, lse2_HT, cu_seqlens)
    ctx.mark_non_differentiable(lse2_HT)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout_THK, _):
    if dout_THK is None:
        return (None,) * 7
    q_THK, k_TNK, v_TNK, out_THK, lse2_HT, cu_seqlens = ctx.saved_tensors
    saved = (q_THK, k_TNK, v_TNK, delta(dout_THK, out_THK), lse2_HT, cu_seqlens)
    found = backward(dout_THK, *saved, ctx.causal, ctx.scale)
    return *found, None, None, None, None


forward.register_autograd(_backward, setup_context=_setup_context)


# -- other backends ------------------------------------------------------------------------------


def _reference(
    q_THK: Tensor,
    k_TNK: Tensor,
    v_TNK: Tensor,
    bounds: tuple[int, ...],
    causal: bool,
    scale: float,
) -> Tensor:
    """One call of torch's attention per sequence."""
    num_groups = q_THK.shape[1] // k_TNK.shape[1]
    outs = []
    for start, stop in pairwise(bounds):
        if start == stop:
            continue
        # (1, heads, tokens, K): four dimensions are what selects torch's fused CPU kernel.
        q, k, v = (x[start:stop].transpose(0, 1)[None] for x in (q_THK, k_TNK, v_TNK))
        if num_groups > 1:
            k, v = (x.repeat_interleave(num_groups, dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
        outs.append(out[0].transpose(0, 1))
    outs.append(torch.zeros_like(q_THK[bounds[-1] :]))
    return torch.cat(outs)


@lru_cache(maxsize=16)
def _on_device(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    """(B + 1,) int32, copied once for a batch."""
    return kernels.without_waiting(torch.tensor(bounds, dtype=torch.int32), device)


def _torch_varlen(
    q_THK: Tensor,
    k_TNK: Tensor,
    v_TNK: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    group = q_THK.shape[1] // k_TNK.shape[1]
    if group > 1:  # torch 2.11 has no grouped heads here
        k_TNK, v_TNK = (x.repeat_interleave(group, dim=1) for x in (k_TNK, v_TNK))
    window = (-1, 0) if causal else (-1, -1)
    boundaries = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    out = varlen_attn(q_THK, k_TNK, v_TNK, *boundaries, scale=scale, window_size=window)
    assert isinstance(out, Tensor)
    return out


_FLASH = ("flash_attn.cute", "flash_attn_interface", "flash_attn")  # flash-attn 4, 3, 2


def _flash(
    q_THK: Tensor,
    k_TNK: Tensor,
    v_TNK: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
) -> Tensor:
    """flash-attn's varlen function: the same arguments in all three, another home."""
    call = importlib.import_module(_flash_module()).flash_attn_varlen_func
    boundaries = {f"cu_seqlens_{x}": cu_seqlens for x in "qk"}
    longest = {f"max_seqlen_{x}": max_seqlen for x in "qk"}
    out = call(q_THK, k_TNK, v_TNK, **boundaries, **longest, causal=causal, softmax_scale=scale)
    return out[0] if isinstance(out, tuple) else out


@lru_cache(maxsize=1)
def _flash_module() -> str:
    """The newest flash-attn that is installed. Raises ValueError if there is none."""
    for module in _FLASH:
        if _found(module):
            return module
    raise ValueError(
        "backend 'flash': flash-attn is not installed; pip install flash-attn-4 (or build its "
        "version 3 or 2), or choose 'triton', 'torch' or 'reference'"
    )


def _found(module: str) -> bool:
    """Whether it can be imported; asking for a part imports the whole."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
