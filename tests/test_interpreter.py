"""Triton's interpreter, corrected by interpreter.py, against PyTorch on bf16."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":  # conftest.py sets it
    pytest.skip("Triton runs for real here, or not at all", allow_module_level=True)

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
interpreter = pytest.importorskip("interpreter")

SIZE = 1 << 16  # as many as there are numbers in bf16


def every_bf16() -> Tensor:
    """All of them: zeros, subnormals, infinities and NaNs too."""
    return torch.arange(SIZE).to(torch.uint16).view(torch.bfloat16)


def shuffled_bf16(seed: int) -> Tensor:
    return every_bf16()[torch.randperm(SIZE, generator=torch.Generator().manual_seed(seed))]


def ordinary_bf16(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def same(found: Tensor, wanted: Tensor) -> bool:
    """Equal numbers of one dtype, every NaN being equal to every other."""
    assert found.dtype == wanted.dtype
    return bool(((found == wanted) | (found.isnan() & wanted.isnan())).all())


# -- one by one --------------------------------------------------------------------------------


@triton.jit
def elementwise(x_ptr, y_ptr, out_ptr, OPERATION: tl.constexpr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + index), tl.load(y_ptr + index)
    if OPERATION == "add":
        out = x + y
    elif OPERATION == "subtract":
        out = x - y
    elif OPERATION == "multiply":
        out = x * y
    elif OPERATION == "divide":
        out = x / y
    elif OPERATION == "remainder":
        out = x % y
    elif OPERATION == "fused":
        out = tl.fma(x, y, x)
    elif OPERATION == "negative":
        out = -x
    elif OPERATION == "absolute":
        out = tl.abs(x)
    elif OPERATION == "minimum":
        out = tl.minimum(x, y)
    elif OPERATION == "maximum":
        out = tl.maximum(x, y)
    elif OPERATION == "less":
        out = x < y
    elif OPERATION == "greater or equal":
        out = x >= y
    elif OPERATION == "equal":
        out = x == y
    elif OPERATION == "unequal":
        out = x != y
    elif OPERATION == "where":
        out = tl.where(x < y, x, y)
    elif OPERATION == "of a comparison":
        out = (x < y).to(tl.bfloat16) * y
    elif OPERATION == "constant":
        out = x * tl.full((SIZE,), 1.005859375, tl.bfloat16)  # half way between two: 1.0078125
    elif OPERATION == "python number":
        out = x * 3 + 0.5
    tl.store(out_ptr + index, out)


# What PyTorch computes: in fp32, rounded once to bf16 by each operation. Where its bf16 operation
# does not (fmod of subnormals, fmin of signalling NaNs), written another way.
ELEMENTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "subtract": torch.sub,
    "multiply": torch.mul,
    "divide": torch.div,
    "remainder": lambda x, y: torch.fmod(x.double(), y.double()).bfloat16(),
    "fused": lambda x, y: (x.double() * y + x).float().bfloat16(),
    "negative": lambda x, y: -x,
    "absolute": lambda x, y: x.abs(),
    "minimum": lambda x, y: torch.where(y.isnan() | (x < y), x, y),
    "maximum": lambda x, y: torch.where(y.isnan() | (x > y), x, y),
    "less": torch.lt,
    "greater or equal": torch.ge,
    "equal": torch.eq,
    "unequal": torch.ne,
    "where": lambda x, y: torch.where(x < y, x, y),
    "of a comparison": lambda x, y: (x < y).bfloat16() * y,
    "constant": lambda x, y: x * torch.tensor(1.0078125).bfloat16(),
    "python number": lambda x, y: x * 3 + 0.5,
}


@pytest.mark.parametrize("values", ["every", "ordinary"])
@pytest.mark.parametrize("operation", ELEMENTWISE)
def test_elementwise(operation: str, values: str) -> None:
    if values == "every":
        x, y = every_bf16(), shuffled_bf16(0)
        y[::97] = x[::97]  # equal pairs are rare otherwise
    else:
        x, y = ordinary_bf16(SIZE), ordinary_bf16(SIZE, seed=1)
    wanted = ELEMENTWISE[operation](x, y)
    found = torch.empty_like(wanted)
    elementwise[(1,)](x, y, found, operation, SIZE)
    assert same(found, wanted)


@triton.jit
def convert(x_ptr, out_ptr, BY_STORE: tl.constexpr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    x = tl.load(x_ptr + index)
    if not BY_STORE:
        x = x.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + index, x)


def converted(x: Tensor, dtype: torch.dtype, by_store: bool = False) -> Tensor:
    out = torch.empty(len(x), dtype=dtype)
    convert[(1,)](x, out, by_store, len(x))
    return out


HARD_FP32 = {
    "ties": torch.arange(SIZE, dtype=torch.int32) << 16 | 0x8000,
    "below ties": torch.arange(SIZE, dtype=torch.int32) << 16 | 0x7FFF,
    "above ties": torch.arange(SIZE, dtype=torch.int32) << 16 | 0x8001,
    "exact": torch.arange(SIZE, dtype=torch.int32) << 16,
    "subnormal": torch.arange(SIZE, dtype=torch.int32) * 127,
    "near infinity": 0x7F800000 - torch.arange(SIZE, dtype=torch.int32),
    "near NaN": 0x7F800000 + torch.arange(SIZE, dtype=torch.int32),
}


@pytest.mark.parametrize("by_store", [True, False], ids=["stored", "cast"])
@pytest.mark.parametrize("name", HARD_FP32)
def test_fp32_to_bf16(name: str, by_store: bool) -> None:
    """Bit for bit, to nearest even, ties, infinities, NaNs and subnormals included."""
    x = HARD_FP32[name].view(torch.float32)
    found, wanted = converted(x, torch.bfloat16, by_store), x.bfloat16()
    assert same(found, wanted)
    kept = ~wanted.isnan()
    assert torch.equal(found[kept].view(torch.int16), wanted[kept].view(torch.int16))


@given(st.lists(st.floats(width=32), min_size=64, max_size=64))
def test_fp32_to_bf16_of_anything(values: list[float]) -> None:
    x = torch.tensor(values)
    assert same(converted(x, torch.bfloat16), x.bfloat16())


def test_bf16_to_fp32_is_exact() -> None:
    x = every_bf16()
    for by_store in (True, False):
        assert same(converted(x, torch.float32, by_store), x.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32, torch.int8], ids=str)
def test_other_casts(dtype: torch.dtype) -> None:
    x = ordinary_bf16(1024) * 30
    assert torch.equal(converted(x, dtype), x.to(dtype))
    wide = (torch.randn(1024, generator=torch.Generator().manual_seed(2)) * 40).to(dtype)
    assert torch.equal(converted(wide, torch.bfloat16), wide.to(torch.bfloat16))


# -- together ----------------------------------------------------------------------------------


@triton.jit
def _larger_in_size(x, y):
    return tl.where(tl.abs(x) > tl.abs(y), x, y)


@triton.jit
def reductions(
    x_ptr, sum_ptr, max_ptr, min_ptr, first_ptr, own_ptr, scan_ptr, R: tl.constexpr, C: tl.constexpr
):
    index = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    row = tl.arange(0, R)
    x = tl.load(x_ptr + index)
    tl.store(sum_ptr + row, tl.sum(x, axis=1))
    tl.store(max_ptr + row, tl.max(x, axis=1))
    tl.store(min_ptr + row, tl.min(x, axis=1))
    tl.store(first_ptr + row, tl.argmax(x, axis=1))
    tl.store(own_ptr + row, tl.reduce(x, 1, _larger_in_size))
    tl.store(scan_ptr + index, tl.cumsum(x, axis=1))


def test_reductions() -> None:
    # Eighths below 4: sums of 32 are exact in fp32, and few of them are bf16's numbers.
    draw = torch.Generator().manual_seed(0)
    x = (torch.randint(-32, 32, (4, 32), generator=draw) / 8).bfloat16()
    outs = [torch.empty(4, dtype=torch.bfloat16) for _ in range(5)]
    sums, largest, smallest, _, own = outs
    first, scan = torch.empty(4, dtype=torch.int32), torch.empty(4, 32, dtype=torch.bfloat16)
    reductions[(1,)](x, sums, largest, smallest, first, own, scan, 4, 32)
    assert torch.equal(sums, x.float().sum(1).bfloat16())
    assert torch.equal(largest, x.amax(1)) and torch.equal(smallest, x.amin(1))
    assert torch.equal(first, x.argmax(1).int())
    assert torch.equal(own.abs(), x.abs().amax(1))
    assert torch.equal(scan, x.float().cumsum(1).bfloat16())


@triton.jit
def product(
    a_ptr, b_ptr, out_ptr, depth, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, F: tl.constexpr
):
    """out = a @ b in tiles of depth K, through tensor descriptors."""
    a = tl.make_tensor_descriptor(a_ptr, [M, depth], [depth, 1], [M, K])
    b = tl.make_tensor_descriptor(b_ptr, [depth, N], [N, 1], [K, N])
    out = tl.make_tensor_descriptor(out_ptr, [M, N], [N, 1], [M, N])
    total = tl.zeros((M, N), tl.float32)
    for k in range(0, depth, K):  # a bound known only at run time
        total = tl.dot(a.load([0, k]), b.load([k, 0]), total)
    out.store([0, 0], total.to(out_ptr.dtype.element_ty) if F else total.to(tl.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dot_through_descriptors(dtype: torch.dtype) -> None:
    """Sums of 80 products in fp32; the last tile reaches beyond the end, where zeros are read."""
    a, b = ordinary_bf16(16, 80), ordinary_bf16(80, 32, seed=1)
    out = torch.full((16, 32), torch.nan, dtype=dtype)
    product[(1,)](a, b, out, 80, 16, 32, 32, dtype == torch.bfloat16)
    exact = a.double() @ b.double()
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    bound = exact.abs() * rounding * 1.01 + a.double().abs() @ b.double().abs() * 80 * 2.0**-24
    assert ((out - exact).abs() <= bound).all()


@triton.jit
def count(out_ptr, first, last, STEP: tl.constexpr):
    steps = 0
    for _ in range(first, last, STEP):
        steps += 1
    for _ in tl.range(first, last, STEP, num_stages=2):
        steps += 1
    tl.store(out_ptr, steps)


@given(first=st.integers(-9, 9), last=st.integers(-9, 9), step=st.integers(1, 4))
def test_bounds_known_at_run_time(first: int, last: int, step: int) -> None:
    out = torch.zeros(1, dtype=torch.int32)
    count[(1,)](out, first, last, step)
    assert out == 2 * len(range(first, last, step))


@triton.jit
def overflow(x_ptr, out_ptr, SIZE: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, SIZE))
    tl.store(out_ptr, tl.max(tl.exp2(x * 1e30) - tl.exp2(x * 1e30), axis=0))


def test_overflow_does_not_warn() -> None:
    """Warnings are errors in this suite; inf - inf and the maximum of NaNs alone are neither."""
    out = torch.zeros(1)
    overflow[(1,)](torch.ones(16), out, 16)
    assert out.isnan()


def test_installed_once() -> None:
    def patched() -> list[Any]:
        owners = (
            interpreter.Builder,
            interpreter.interpreter,
            interpreter.interpreter.GridExecutor,
        )
        return [value for owner in owners for value in vars(owner).values()]

    before = patched()
    interpreter.install()
    assert all(a is b for a, b in zip(before, patched(), strict=True))


@given(st.integers(0, SIZE - 1))
def test_narrow_keeps_what_bf16_holds(bits: int) -> None:
    wide = interpreter.widen(np.array([bits], dtype=np.uint16))
    assert np.isnan(wide) or interpreter.narrow(wide) == bits
