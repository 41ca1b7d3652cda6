"""What a step is measured by, gathered without waiting: read a step later, when it is there.

A value that is asked for arrives after all that was launched before. So loss and norm are copied
to the host at the end of their own step, and the host, a step ahead, waits for that copy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s1fast import exposed
from s1fast.exposed import Mark, Span
from s1fast.parallel import Layout
from s1fast.step import StepResult


@dataclass(frozen=True)
class Measured:
    """Of one step."""

    loss: float
    grad_norm: float
    bad_labels: int
    step_s: float
    """On the device, from its first launch to its last."""
    elapsed_s: float
    """From the loop's beginning to the step's end."""
    exposed_s: float | None
    """On this rank, see exposed.py; None where one process has its weights whole."""
    peak_bytes: int | None
    """Most that torch's allocator had given out, on the fullest rank; None on a CPU."""


@dataclass(frozen=True)
class Readings:
    """A step's measurements on their way."""

    values: Tensor
    """On the host: loss, norm, bad labels and on a GPU bytes, once `ended` has passed."""
    first: Mark
    began: Mark
    ended: Mark
    spans: Sequence[Span] | None

    def wait(self) -> Measured:
        """Waits until the device has ended the step."""
        if isinstance(self.ended, torch.cuda.Event):
            self.ended.synchronize()
        loss, grad_norm, bad_labels, *peak = self.values.tolist()
        spans = self.spans
        return Measured(
            loss,
            grad_norm,
            int(bad_labels),
            step_s=exposed.seconds(self.began, self.ended),
            elapsed_s=exposed.seconds(self.first, self.ended),
            exposed_s=None if spans is None else sum(exposed.seconds(*span) for span in spans),
            peak_bytes=int(peak[0]) if peak else None,
        )


class Gauges:
    """Those of a rank; made as the loop begins."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self._first = layout, exposed.mark(layout.device)

    def begin(self) -> None:
        """As a step begins."""
        self._began = exposed.mark(self.layout.device)
        exposed.take()
        if self.layout.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.layout.device)

    def end(self, result: StepResult) -> Readings:
        """As its last kernel has been launched; all ranks call it."""
        device = self.layout.device
        values = [result.loss, result.grad_norm, result.bad_labels]
        if device.type == "cuda":
            bytes_ = torch.cuda.max_memory_allocated(device)
            peak = torch.full((), bytes_, dtype=torch.float64, device=device)
            values.append(self.layout.most(peak))
        told = torch.stack([value.double() for value in values])
        told = told.to("cpu", non_blocking=True)  # into pinned memory
        return Readings(told, self._first, self._began, exposed.mark(device), exposed.take())
