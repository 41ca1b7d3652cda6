"""Makes Triton's interpreter (TRITON_INTERPRET=1) compute what a GPU would.

The interpreter of Triton 3.6 and 3.7 keeps a bf16 value as the 16 bits of a numpy uint16 and then
adds, multiplies and compares those bits as if they were whole numbers; casts to bf16 cut bits off;
a bf16 constant is an error. Here every operation on bf16 widens to fp32, computes, and rounds to
nearest even, as the hardware does. So that nothing else surprises:

- a comparison gives booleans, also where its result is cast or stored;
- tl.minimum and tl.maximum pass a NaN over, as on a GPU;
- a run-time bound of a loop works (Triton 3.6 with numpy 2.4);
- overflows and NaNs make no Python warnings.

What remains: fp8 casts are slightly wrong, bf16 atomics and tensor descriptors padded with NaN in
bf16 are errors, dots of fp32 are exact where a GPU may use tf32, and programs run one by one, so
that a race never shows.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle


def narrow(x: Any) -> Any:
    """fp32 numbers to the bits of the nearest bf16, ties to even; every NaN becomes 0x7FC0."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16).reshape(np.shape(x))


def widen(bits: Any) -> Any:
    """The bits of bf16 to the same numbers in fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def is_bf16(handle: Any) -> bool:
    """Whether its data are bits of bf16."""
    return handle.dtype.scalar == tl.bfloat16


def numbers(handle: Any) -> Any:
    """The data of a handle, as numpy can compute with them."""
    return widen(handle.data) if is_bf16(handle) else handle.data


def computed(original: Callable[..., Any], builder: Any, *arguments: Any) -> Any:
    """Stands for unary_op, binary_op and ternary_op, whose last argument is numpy's function."""
    *operands, function = arguments
    if function is np.where or not any(map(is_bf16, operands)):
        result = original(builder, *arguments)  # np.where only moves bits about
    else:
        result = Handle(function(*map(numbers, operands)), tl.float32)
        if result.data.dtype != np.bool_:
            return Handle(narrow(result.data), tl.bfloat16)
    if result.data.dtype == np.bool_:
        result.dtype = tl.int1  # Triton leaves the operands' type here
    return result


def cast(original: Callable[..., Any], builder: Any, source: Any, to: Any) -> Any:
    """Stands for cast_impl, through which every conversion between numbers goes."""
    target = to.scalar
    if tl.bfloat16 not in (source.dtype.scalar, target):
        return original(builder, source, to)
    if target == tl.bfloat16:
        data = source.data if is_bf16(source) else narrow(source.data)
        return Handle(data, target)
    return Handle(numbers(source).astype(interpreter._get_np_dtype(target)), target)


def float_to_float(
    original: Callable[..., Any], builder: Any, source: Any, to: Any, rounding: Any
) -> Any:
    """Stands for create_fp_to_fp: with bf16 and no 8-bit type, rounding to nearest is a cast."""
    types = source.dtype.scalar, to.scalar
    nearest = rounding in (None, interpreter._ir.ROUNDING_MODE.RTNE)
    if nearest and tl.bfloat16 in types and all(t.primitive_bitwidth > 8 for t in types):
        return builder.cast_impl(source, to)
    return original(builder, source, to, rounding)


def dot(original: Callable[..., Any], builder: Any, a: Any, b: Any, c: Any, *rest: Any) -> Any:
    """Stands for create_dot: products and sums in fp32, one rounding where c is bf16."""
    if not any(map(is_bf16, (a, b, c))):
        return original(builder, a, b, c, *rest)
    total = np.matmul(numbers(a), numbers(b), dtype=np.float32) + numbers(c)
    return Handle(narrow(total) if is_bf16(c) else total, c.dtype.scalar)


def fused(original: Callable[..., Any], builder: Any, x: Any, y: Any, z: Any) -> Any:
    """Stands for create_fma; fp64 holds a product of bf16 exactly, and nearly always the sum."""
    if not is_bf16(z):
        return original(builder, x, y, z)
    product = numbers(x).astype(np.float64) * numbers(y)
    return Handle(narrow(product + numbers(z)), tl.bfloat16)


def rsqrt(original: Callable[..., Any], builder: Any, x: Any) -> Any:
    """Stands for create_rsqrt, which goes past unary_op."""
    if not is_bf16(x):
        return original(builder, x)
    return Handle(narrow(1 / np.sqrt(numbers(x))), tl.bfloat16)


def over_tensors(original: Callable[..., Any], operation: Any, inputs: Any) -> Any:
    """Stands for apply, of reductions and scans: bf16 goes in and out as fp32."""
    if not isinstance(inputs, tuple):
        return operation.apply((inputs,))[0]
    narrows = [x.dtype == tl.bfloat16 for x in inputs]
    results = original(operation, tuple(map(_as_fp32, inputs)))
    return tuple(_as_bf16(x) if n else x for x, n in zip(results, narrows, strict=True))


def _as_fp32(x: Any) -> Any:
    return _retyped(x, widen, tl.float32) if x.dtype == tl.bfloat16 else x


def _as_bf16(x: Any) -> Any:
    return _retyped(x, narrow, tl.bfloat16) if x.dtype == tl.float32 else x


def _retyped(x: Any, convert: Callable[[Any], Any], dtype: Any) -> Any:
    kind = tl.block_type(dtype, list(x.shape)) if x.type.is_block() else dtype
    return tl.core.tensor(Handle(convert(x.handle.data), dtype), kind)


def make_index(original: Callable[..., Any], tensor: Any, scope: Any) -> None:
    """Stands for _patch_lang_tensor: a scalar is an array of one element, an index is an int."""
    original(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))


def launch(original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Stands for the call that runs a grid: a GPU does not warn of overflows and NaNs."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's "All-NaN slice encountered"
        return original(*arguments, **options)


def _replace(owner: Any, name: str, stand_in: Callable[..., Any]) -> None:
    """Puts stand_in(original, ...) in the place of owner.name."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def call(*arguments: Any, **options: Any) -> Any:
        return stand_in(original, *arguments, **options)

    setattr(owner, name, call)


_installed = False


def install() -> None:
    """Corrects the interpreter of this process, once; kernels may be defined before or after."""
    global _installed
    if _installed:
        return
    _installed = True
    for name in ("unary_op", "binary_op", "ternary_op"):
        _replace(Builder, name, computed)
    _replace(Builder, "cast_impl", cast)
    _replace(Builder, "create_fp_to_fp", float_to_float)
    _replace(Builder, "create_dot", dot)
    _replace(Builder, "create_fma", fused)
    _replace(Builder, "create_rsqrt", rsqrt)
    Builder.get_bf16 = lambda self, value: Handle(narrow([value]), tl.bfloat16)
    Builder.create_minnumf = lambda self, x, y: self.binary_op(x, y, np.fmin)
    Builder.create_maxnumf = lambda self, x, y: self.binary_op(x, y, np.fmax)
    _replace(interpreter.ReduceScanOpInterface, "apply", over_tensors)
    _replace(interpreter, "_patch_lang_tensor", make_index)
    _replace(interpreter.GridExecutor, "__call__", launch)
