"""What makes the host wait for a device: methods, and a mode that refuses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class WaitError(Exception):
    """Raised where the host would wait for a device."""


READERS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")
"""Methods that hand a tensor's values to Python."""
SEARCHERS = ("nonzero", "equal", "unique", "masked_select")
"""Methods and functions; a mode does not see those that run inside our own operations."""
SIZED_BY_DATA = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "nonzero_numpy",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
    "_unique2",
}
"""Operations whose result, or its shape, the host must learn from the device."""


class NoWaiting(TorchDispatchMode):
    """Refuses every such operation, forward and backward, where `applies`."""

    def __init__(self, applies: Callable[[], bool] = lambda: True) -> None:
        super().__init__()
        self.applies = applies

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if (name in SIZED_BY_DATA or masks) and self.applies():
            raise WaitError(name)
        return func(*args, **(kwargs or {}))
