"""One captured step for each bucket of rows, on a GPU a CUDA graph.

A bucket is so many rows, of which some may be missing, over C token slots: one for each row, the
rest spare, for forced strings and drafts. Up to 4 rows have 8 slots, which is what csrc multiplies
at the price of one; more have 8 beyond the rows.

A bucket's first step runs as it is, so that its kernels are compiled and loaded; the second is
captured. Graphs share one pool of memory: they never run beside each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from s1fast.errors import InputError

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
MOST_ROWS = BUCKETS[-1]
FEW_ROWS, FEW_SLOTS = 4, 8
SPARE = 8


def num_slots(bucket: int) -> int:
    """Token slots of a bucket."""
    return FEW_SLOTS if bucket <= FEW_ROWS else bucket + SPARE


def buckets_for(max_rows: int) -> tuple[int, ...]:
    """The buckets that up to so many rows need.

    Raises:
        InputError: more rows than the largest bucket has.
    """
    if max_rows > MOST_ROWS:
        raise InputError(
            f"max_batch {max_rows}: the device's loop runs at most {MOST_ROWS} rows together; ask "
            'for fewer, or take loop = "host"'
        )
    return tuple(b for i, b in enumerate(BUCKETS) if not i or BUCKETS[i - 1] < max_rows)


class Graphs:
    """Runs a function of a bucket, captured where the device can.

    Args:
        step: launches the bucket's step; on static memory alone, without waiting for anything.
    """

    def __init__(
        self, step: Callable[[int], None], buckets: Sequence[int], device: torch.device
    ) -> None:
        self.buckets, self._step, self._device = tuple(buckets), step, device
        self._graphs: dict[int, torch.cuda.CUDAGraph | None] = {}  # None: ran once
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def bucket(self, num_rows: int) -> int:
        """The smallest bucket for so many rows."""
        return next(b for b in self.buckets if b >= num_rows)

    def run(self, bucket: int) -> None:
        """Launches the bucket's step."""
        if self._device.type != "cuda" or bucket not in self._graphs:
            self._step(bucket)
            self._graphs[bucket] = None
            return
        graph = self._graphs[bucket]
        if graph is None:
            graph = self._graphs[bucket] = self._capture(bucket)
        graph.replay()

    def _capture(self, bucket: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Other threads, NCCL's among them, may use CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._step(bucket)
        return graph
