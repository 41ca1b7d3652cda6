"""Triton kernels that read or copy memory at full speed. Imported only where there is a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

VARIANTS = ((4096, 8, 8), (8192, 8, 4), (16384, 16, 2), (8192, 16, 2))
"""(32-bit words a program takes at a time, warps, programs per multiprocessor)."""


@triton.jit
def _read_kernel(x_ptr, out_ptr, numel, BLOCK: tl.constexpr):
    """ORs all words, so that no load can be left out; one word of result per program."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    found = tl.zeros((BLOCK,), tl.int32)
    for start in range(first, numel, tl.num_programs(0) * BLOCK):
        found |= tl.load(x_ptr + start + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.program_id(0), tl.reduce(found, 0, _or))


@triton.jit
def _copy_kernel(x_ptr, y_ptr, numel, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, numel, tl.num_programs(0) * BLOCK):
        offset = start + tl.arange(0, BLOCK)
        tl.store(y_ptr + offset, tl.load(x_ptr + offset))


@triton.jit
def _or(a, b):
    return a | b


def read(x: Tensor, variant: tuple[int, int, int]) -> Tensor:
    """Reads fp32 or int32, a multiple of the variant's words; partial ORs, one per program."""
    block, warps, programs = variant
    assert x.element_size() == 4 and x.numel() % block == 0
    num_programs = programs * _multiprocessors(x)
    out = torch.empty(num_programs, dtype=torch.int32, device=x.device)
    _read_kernel[(num_programs,)](x.view(torch.int32), out, x.numel(), BLOCK=block, num_warps=warps)
    return out


def copy(x: Tensor, y: Tensor, variant: tuple[int, int, int]) -> None:
    """y = x, both fp32 or int32, a multiple of the variant's words."""
    block, warps, programs = variant
    assert x.element_size() == 4 and x.numel() == y.numel() and x.numel() % block == 0
    grid = (programs * _multiprocessors(x),)
    _copy_kernel[grid](x, y, x.numel(), BLOCK=block, num_warps=warps)


def _multiprocessors(x: Tensor) -> int:
    if not x.is_cuda:  # Triton's interpreter
        return 1
    return torch.cuda.get_device_properties(x.device).multi_processor_count
