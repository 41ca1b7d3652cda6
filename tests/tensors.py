"""Random tensors, the same on every device, and such as lie far apart."""

from __future__ import annotations

import torch
from torch import Tensor

FAR = (1 << 30) + 16
"""Elements: fits an int32, and so does a row's number; their product does not."""


def random(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Tensor:
    """Standard normal, rounded from float64."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64).to(device, dtype)


def far_apart(x: Tensor) -> Tensor:
    """The same rows, FAR apart; on a CPU only what is used of them takes memory."""
    apart = torch.empty((len(x) - 1) * FAR + x[0].numel(), dtype=x.dtype, device=x.device)
    return apart.as_strided(x.shape, (FAR, *x.stride()[1:])).copy_(x)
