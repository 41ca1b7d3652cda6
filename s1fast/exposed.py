"""Exposed communication: how long a rank's stream is held up by what only sharding makes it do.

A span is opened and closed where the compute stream meets others: around FSDP's hooks of every
unit, around our own collectives, and at the end of backward. On a GPU both ends are CUDA events on
the compute stream, so a span lasts from the end of the kernel before to the moment when the next
one may start:

    forward    | unit's weights awaited, copied out | unit runs
    backward   unit has run | gradients copied, earlier reduction awaited; next weights awaited |
    at the end the last gradients copied, all reductions awaited

It counts waits for collectives and for slower ranks, the copies into and out of their buffers, and
the host where it is late. Not counted is communication beside compute. On one GPU FSDP still casts
and copies, and that is all there is. On a CPU the host is the device, its clock measures the same.

About four spans a layer with Ulysses, two events each: some 3 ms of the host's time in a step of
64 layers, none of the device's, and nothing is waited for.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Mark = float | torch.cuda.Event
"""A moment on a device: an event, or the host's clock in seconds."""
Span = tuple[Mark, Mark]


def mark(device: torch.device) -> Mark:
    """The moment at which the device will have done what was launched so far."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(start: Mark, end: Mark) -> float:
    """Between two moments of one device, both past."""
    if isinstance(start, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return start.elapsed_time(end) / 1e3
    assert isinstance(end, float)
    return end - start


class _Spans:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.open: Mark | None = None
        self.closed: list[Span] = []
        self.end_expected = False
        """The end of the backward that is under way will open a span."""


_spans: _Spans | None = None
"""Of this process, which drives one device: a collective inside an operation has nothing else to
find it by."""


@contextlib.contextmanager
def collecting(device: torch.device) -> Iterator[None]:
    """A block whose spans are kept, for take()."""
    global _spans
    _spans = _Spans(device)
    try:
        yield
    finally:
        _spans = None


def take() -> list[Span] | None:
    """The spans since the last call; None where none are collected."""
    if _spans is None:
        return None
    taken, _spans.closed = _spans.closed, []
    return taken


def begin(*_: object) -> None:
    """Opens a span, unless one is open."""
    if _spans is not None and _spans.open is None:
        _spans.open = mark(_spans.device)


def end(*_: object) -> None:
    """Closes the open span, if there is one."""
    if _spans is not None and _spans.open is not None:
        _spans.closed.append((_spans.open, mark(_spans.device)))
        _spans.open = None


@contextlib.contextmanager
def span() -> Iterator[None]:
    """A block that waits for other ranks."""
    begin()
    try:
        yield
    finally:
        end()


# -- around FSDP -----------------------------------------------------------------------------------


def watch(unit: nn.Module) -> None:
    """Opens and closes spans around what FSDP does in a unit's hooks; call it after fully_shard.

    FSDP gathers in a hook before forward and in one of the output's gradient, and reduces in a node
    that it puts between the unit and its input. Hooks run in order of registration, so ours, on the
    same tensors, come right before and after.
    """
    given: list[Tensor] = []

    def before_forward(module: nn.Module, args: Any) -> None:
        if _spans is None:
            return
        given[:] = _with_gradient(args)
        for x in given:
            x.register_hook(end)  # after FSDP's node, and after the hooks of the unit below
        begin()

    def after_gather(module: nn.Module, args: Any) -> None:
        if _spans is None:
            return
        end()
        for x in _with_gradient(args):
            # FSDP puts no node there when a layer is computed again within backward.
            if all(x is not y for y in given):
                x.register_hook(begin)
        given.clear()

    def before_output(module: nn.Module, args: Any, output: Any) -> None:
        if _spans is not None:
            for x in _with_gradient([output]):
                x.register_hook(_begin_backward)

    def after_output(module: nn.Module, args: Any, output: Any) -> None:
        if _spans is not None:
            for x in _with_gradient([output]):
                x.register_hook(end)

    unit.register_forward_pre_hook(before_forward, prepend=True)
    unit.register_forward_pre_hook(after_gather)
    unit.register_forward_hook(before_output, prepend=True)
    unit.register_forward_hook(after_output)


def _with_gradient(values: Sequence[Any]) -> list[Tensor]:
    return [x for x in values if isinstance(x, Tensor) and x.requires_grad]


def _begin_backward(gradient: Tensor) -> None:
    """Before FSDP's first hook of a backward, so that our callback at its end is before FSDP's."""
    if _spans is not None and not _spans.end_expected:
        _spans.end_expected = True
        _at_end_of_backward(_begin_last)
    begin()


def _begin_last() -> None:
    if _spans is not None:
        _spans.end_expected = False
        begin()
        _at_end_of_backward(end)


def _at_end_of_backward(callback: Any) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(callback)
