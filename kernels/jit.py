"""Triton where it is installed; elsewhere a stand-in that lets the kernel files be imported.

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

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, which takes tensors on a CPU."""


def jit(function: Any) -> Any:
    """triton.jit, or the function itself, which nothing then launches."""
    return function if triton is None else triton.jit(function)


def constant(value: float) -> Any:
    """A number that kernels may read as a global."""
    return value if tl is None else tl.constexpr(value)
