"""The token loop's matrix products, by csrc or by torch, as was chosen and never otherwise.

    y = norm(x) @ weight.T (+ bias) (+ residual),  or  silu(gate) * up of a fused weight

`matmul = "cuda"` takes csrc/gemv.cuh for up to 8 tokens and cuBLAS for more, "torch" cuBLAS always.
What the first cannot do on this machine or with these weights is an error when they are loaded.

Floor: the weight is read once, 2 N K bytes at 3.0 TB/s. Measured: csrc/README.md.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from s1fast.build import build
from s1fast.errors import InputError
from s1fast.kernels.arguments import expect, expect_unit_stride
from s1fast.kernels.rms_norm import rms_norm
from s1fast.kernels.swiglu import swiglu as gated

Choice = Literal["cuda", "torch"]

MAX_TOKENS = 8
"""Of csrc's kernel, one tile of tensor cores; with more, cuBLAS has products of its usual kind."""
CAPABILITY = (9, 0)
ALIGNMENT = 16
"""Bytes in which csrc copies."""


@dataclass(frozen=True)
class Matmul:
    """The products of one stream: made by `prepare`, called by the loop.

    workspace: partial sums of the kernel, all zero between launches; None for torch. Launches that
    share it must follow each other on one stream.
    """

    choice: Choice
    workspace: Tensor | None = None

    def __call__(self, x_MK: Tensor, weight_NK: Tensor, **around: Any) -> Tensor:
        """One product, by what was chosen for so many tokens; the rest as `gemv` takes it."""
        if self.workspace is None or len(x_MK) > MAX_TOKENS:
            return by_torch(x_MK, weight_NK, **around)
        return gemv(x_MK, weight_NK, self.workspace, **around)

    def describe(self, max_tokens: int) -> str:
        """The path per number of tokens, for the line that is printed at load."""
        if self.choice == "torch":
            return f"matmul: {_span(1, max_tokens)} by torch"
        paths = [f"{_span(1, min(max_tokens, MAX_TOKENS))} by csrc"]
        if max_tokens > MAX_TOKENS:
            paths.append(f"{_span(MAX_TOKENS + 1, max_tokens)} by torch")
        return f"matmul: {', '.join(paths)}"


def prepare(choice: Choice, device: torch.device, weights: Mapping[str, Tensor]) -> Matmul:
    """Checks and makes ready what was chosen: compiles csrc where that has not been done.

    Args:
        choice: "cuda" or "torch".
        device: where the weights are.
        weights: every (N, K) matrix that will be multiplied, by the name that an error shall use.

    Raises:
        InputError: "cuda" without a CUDA device of compute capability 9.0, without a compiler, or
            with a weight that its kernel does not take.
    """
    if choice == "torch":
        return Matmul("torch")
    if device.type != "cuda":
        raise InputError(
            f'matmul = "cuda" runs on a CUDA device, and this is {device}; take matmul = "torch"'
        )
    found = torch.cuda.get_device_capability(device)
    if found != CAPABILITY:
        raise InputError(
            f'matmul = "cuda" is written for compute capability {_dotted(CAPABILITY)} (H100, '
            f"H200), and {torch.cuda.get_device_name(device)} has {_dotted(found)}; take "
            'matmul = "torch"'
        )
    for name, weight_NK in weights.items():
        try:
            _check_rows(name, weight_NK)
        except ValueError as error:
            raise InputError(f'matmul = "cuda": {error}; or take matmul = "torch"') from None
    made = Matmul("cuda", new_workspace(device))
    torch.cuda.synchronize(device)  # weights are read ahead of the stream: see gemv
    return made


def new_workspace(device: torch.device) -> Tensor:
    """Zeroed scratch memory for `gemv`: one for each stream, kept as long as its launches run."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    num_bytes = library().s1fast_workspace_bytes(processors)
    return torch.zeros(num_bytes, dtype=torch.uint8, device=device)


def gemv(
    x_MK: Tensor,
    weight_NK: Tensor,
    workspace: Tensor,
    *,
    norm_K: Tensor | None = None,
    eps: float = 0.0,
    bias_N: Tensor | None = None,
    residual_MN: Tensor | None = None,
    swiglu: bool = False,
    live: Tensor | None = None,
) -> Tensor:
    """A product of at most 8 tokens with its surroundings, in one launch.

    Args:
        x_MK: bf16, 1 to 8 rows.
        weight_NK: bf16. With swiglu gate rows, then as many up rows. It is asked for before the
            kernel queued ahead of this one has ended: nothing there may write to it, or to norm_K.
        workspace: of `new_workspace`; back to zero afterwards.
        norm_K: scale of an RMSNorm of x with `eps`, or None for none. Where rms_norm rounds x after
            normalising it and again after scaling, this rounds x * norm only.
        bias_N, residual_MN: added in fp32; not with swiglu.
        live: one int32 on the device, read when the kernel runs: so many of x's rows are there. The
            output's others are left as memory was. None for all.

    Returns:
        (M, N) in bf16, with swiglu (M, N / 2). A row's bits do not depend on M, on `live` and on
        the other rows.

    Raises:
        ValueError: a wrong shape, dtype, device, stride or alignment, before any launch.
    """
    _check(x_MK, weight_NK, workspace, norm_K, bias_N, residual_MN, swiglu, live)
    library()
    return torch.ops.s1fast.gemv(
        x_MK, weight_NK, workspace, norm_K, bias_N, residual_MN, live, eps, swiglu
    )


def by_torch(
    x_MK: Tensor,
    weight_NK: Tensor,
    *,
    norm_K: Tensor | None = None,
    eps: float = 0.0,
    bias_N: Tensor | None = None,
    residual_MN: Tensor | None = None,
    swiglu: bool = False,
    live: Tensor | None = None,
) -> Tensor:
    """The same by torch and our norm and activation, of all tokens; the reference on a CPU."""
    if norm_K is not None:
        x_MK = rms_norm(x_MK, norm_K, eps)
    if residual_MN is not None and bias_N is None:
        return torch.addmm(residual_MN, x_MK, weight_NK.T)
    y_MN = F.linear(x_MK, weight_NK, bias_N)
    if swiglu:
        y_MN = gated(y_MN)
    return y_MN if residual_MN is None else y_MN + residual_MN


@cache
def library() -> ctypes.CDLL:
    """csrc's shared object, compiled if need be, its operation known to torch."""
    path = str(build())
    torch.ops.load_library(path)
    torch.library.register_fake("s1fast::gemv", _fake)
    torch.library.impl("s1fast::gemv", "CPU", _on_cpu)
    found = ctypes.CDLL(path)
    found.s1fast_workspace_bytes.restype = ctypes.c_int64
    found.s1fast_current_stream.restype = ctypes.c_char_p
    return found


def _fake(x, weight, workspace, norm, bias, residual, live, eps, swiglu):
    return x.new_empty(x.shape[0], weight.shape[0] // (2 if swiglu else 1))


def _on_cpu(x, weight, workspace, norm, bias, residual, live, eps, swiglu):
    around = {"norm_K": norm, "bias_N": bias, "residual_MN": residual}
    return by_torch(x, weight, eps=eps, swiglu=swiglu, **around)


def _check(
    x_MK: Tensor,
    weight_NK: Tensor,
    workspace: Tensor,
    norm_K: Tensor | None,
    bias_N: Tensor | None,
    residual_MN: Tensor | None,
    swiglu: bool,
    live: Tensor | None,
) -> None:
    device = x_MK.device
    if x_MK.ndim != 2 or not 1 <= len(x_MK) <= MAX_TOKENS:
        raise ValueError(
            f"x_MK has shape {tuple(x_MK.shape)}, expected 1 to {MAX_TOKENS} rows; more go to torch"
        )
    width = x_MK.shape[1]
    _check_rows("x_MK", x_MK)
    _check_rows("weight_NK", weight_NK)
    expect("weight_NK", weight_NK, ("N", width), (torch.bfloat16,), device)
    num_rows = len(weight_NK)
    if swiglu and num_rows % 2:
        raise ValueError(f"weight_NK has {num_rows} rows, expected gate rows and as many up rows")
    if swiglu and not (bias_N is None and residual_MN is None):
        raise ValueError("swiglu takes neither bias_N nor residual_MN")
    expect("workspace", workspace, ("bytes",), (torch.uint8,), device)
    if norm_K is not None:
        expect("norm_K", norm_K, (width,), (torch.bfloat16,), device)
        _check_aligned("norm_K", norm_K)
    if bias_N is not None:
        expect("bias_N", bias_N, (num_rows,), (torch.bfloat16,), device)
        expect_unit_stride("bias_N", bias_N)
    if residual_MN is not None:
        expect("residual_MN", residual_MN, (len(x_MK), num_rows), (torch.bfloat16,), device)
        expect_unit_stride("residual_MN", residual_MN)
    if live is not None:
        expect("live", live, (1,), (torch.int32,), device)


def _check_rows(name: str, x: Tensor) -> None:
    """A bf16 matrix whose rows begin, lie and end on 16 bytes. Raises ValueError."""
    expect(name, x, ("rows", "columns"), (torch.bfloat16,), x.device)
    if 0 in x.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: nothing to multiply")
    step = ALIGNMENT // x.element_size()
    if x.shape[1] % step:
        raise ValueError(f"{name} has {x.shape[1]} columns, expected a multiple of {step}")
    _check_aligned(name, x)
    if x.stride(0) % step or x.stride(0) < x.shape[1]:
        raise ValueError(
            f"{name} of shape {tuple(x.shape)} has rows {x.stride(0)} elements apart, expected at "
            f"least {x.shape[1]} and a multiple of {step}; pass {name}.contiguous()"
        )


def _check_aligned(name: str, x: Tensor) -> None:
    expect_unit_stride(name, x)
    if x.data_ptr() % ALIGNMENT:
        raise ValueError(f"{name} begins at no multiple of {ALIGNMENT} bytes; pass {name}.clone()")


def _span(low: int, high: int) -> str:
    return f"{low} token" if low == high == 1 else f"{low} to {high} tokens"


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
