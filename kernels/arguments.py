"""What the operations demand of their arguments, said in one way."""

from __future__ import annotations

import torch
from torch import Tensor

_DEVICES = ("cuda", "cpu")


def floats(x: Tensor, name: str) -> tuple[torch.dtype, ...]:
    """The dtypes that a device takes: bf16 and fp32, on a CPU fp64 too."""
    if x.device.type not in _DEVICES:
        raise ValueError(f"{name} is on {x.device}, expected {' or '.join(_DEVICES)}")
    wide = (torch.float64,) if x.device.type == "cpu" else ()
    return (torch.bfloat16, torch.float32, *wide)


def expect(
    name: str,
    x: Tensor,
    shape: tuple[int | str, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """Checks rank, the sizes that are numbers, dtype and device. Raises ValueError."""
    fits = x.ndim == len(shape) and all(
        isinstance(want, str) or want == size for want, size in zip(shape, x.shape, strict=True)
    )
    if not fits:
        expected = ", ".join(map(str, shape))
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected ({expected})")
    if x.dtype not in dtypes:
        accepted = " or ".join(map(str, dtypes))
        raise ValueError(f"{name} {tuple(x.shape)} is {x.dtype}, expected {accepted}")
    if x.device != device:
        raise ValueError(f"{name} {tuple(x.shape)} is on {x.device}, expected {device}")


def expect_unit_stride(name: str, x: Tensor) -> None:
    """Along the last dimension. Raises ValueError."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{name} of shape {tuple(x.shape)} has strides {x.stride()}, expected 1 along the "
            f"last dimension; pass {name}.contiguous()"
        )


def wide(dtype: torch.dtype) -> torch.dtype:
    """What a dtype is computed in: fp32, fp64 for itself."""
    return torch.promote_types(dtype, torch.float32)
