"""A rank's rows of a tensor that is cut along its rows, whoever cut it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slice:
    """Rows `start` to `stop` of a tensor; on one rank, all of them."""

    tensor: Tensor
    """Contiguous, of at least one dimension; may have no row."""
    start: int
    shape: tuple[int, ...]
    """Of the whole tensor."""

    @property
    def stop(self) -> int:
        return self.start + len(self.tensor)

    def fill(self, start: int, stop: int, read: Callable[[int, int], Tensor]) -> None:
        """Copies those of the whole tensor's rows start to stop that are ours.

        Args:
            read: rows a to b of a source whose row 0 is our row `start`; only called for rows that
                are needed. They are cast to our dtype.
        """
        first, last = max(start, self.start), min(stop, self.stop)
        if first < last:
            with torch.no_grad():
                ours = self.tensor[first - self.start : last - self.start]
                ours.copy_(read(first - start, last - start))


def slice_of(tensor: Tensor) -> Slice:
    """The rows that this rank holds of a plain tensor, all, or of a DTensor cut along its rows.

    FSDP2 cuts as torch.chunk does: all ranks get ceil(rows / ranks) rows, the last ones fewer or
    none. The slice shares the tensor's memory.
    """
    tensor = tensor.detach()
    shape = tuple(tensor.shape)
    mesh: Any = getattr(tensor, "device_mesh", None)
    if mesh is None:  # importing DTensor to ask would take half a second
        return Slice(tensor, 0, shape)
    placements: Any = tensor.placements  # type: ignore[attr-defined]
    if mesh.ndim != 1 or not placements[0].is_shard(0):
        raise ValueError(f"expected one mesh dimension and Shard(0), got {mesh}, {placements}")
    with torch.no_grad():
        local: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    chunk = -(-shape[0] // mesh.size())
    start = min(mesh.get_local_rank() * chunk, shape[0])
    expected = min(chunk, shape[0] - start)
    if len(local) != expected:
        raise ValueError(f"rank holds {len(local)} rows of {shape}, expected {expected}")
    return Slice(local, start, shape)
