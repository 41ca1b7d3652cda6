"""Triton where it is installed; elsewhere a stand-in that lets the kernel files be imported.

Gluon is Triton's lower level: layouts, barriers and warps by hand. It is known as `gl`, and what
only Hopper has as `hopper`; both are None where Triton is older than 3.6 or not there.

A CPU runs the plain PyTorch references and needs no Triton.
"""

from __future__ import annotations

import os
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper

    hopper.tma.make_tensor_descriptor  # noqa: B018  # what Triton 3.6 brought
except (ImportError, AttributeError):
    gluon = gl = hopper = None

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, which takes tensors on a CPU."""


def jit(function: Any) -> Any:
    """triton.jit, or the function itself, which nothing then launches."""
    return function if triton is None else triton.jit(function)


def gluon_jit(function: Any) -> Any:
    """gluon.jit, or the function itself, which nothing then launches."""
    return function if gluon is None else gluon.jit(function)


def constant(value: float) -> Any:
    """A number that kernels may read as a global."""
    return value if tl is None else tl.constexpr(value)
