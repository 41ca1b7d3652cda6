"""s1fast: the s1 recipe for test-time scaling, made fast.

The public names load lazily, so that `import s1fast` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Budget": "s1fast.budget",
    "Cancelled": "s1fast.handle",
    "Completion": "s1fast.request",
    "Engine": "s1fast.decoder",
    "InputError": "s1fast.errors",
    "Piece": "s1fast.request",
    "Ranks": "s1fast.tensor_parallel",
    "Request": "s1fast.request",
    "SamplingParams": "s1fast.request",
    "TrainConfig": "s1fast.config",
    "cost": "s1fast.request",
    "linear_cross_entropy": "s1fast.kernels.linear_cross_entropy",
    "packed_attention": "s1fast.kernels.packed_attention",
    "train": "s1fast.trainer",
}

__all__ = ["__version__", *_HOME]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 's1fast' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
