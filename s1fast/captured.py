"""The token loop ahead of its device: the host launches steps and learns later what was drawn.

The device draws, applies each row's budget and lays out its next step by itself; up to DEPTH steps
are launched before the first of them is looked at. What each row drew lies in a ring in the host's
memory: once a step's event has come, the row and its automaton here take the same tokens, and make
text of them, branches and completions. So interventions cost nothing, and the host's work is
hidden.

An iteration: look at the oldest step, if DEPTH are under way; admit rows and compute what they have
before their last token, a chunk of it; give every row the pages that the next launch may write to;
launch. It waits for nothing but the event of that oldest step, and what it decides follows from
orders and tokens alone, so all ranks decide the same.

* A row is armed when one token, or a few that fit a step's spare slots, are left to feed: its state
  goes to its line on the device, between two launches. When a row joins or is taken away, the next
  step is laid out anew from the rows' state: a launch sees the rows that were armed when it was
  made.
* What a row leaves, its line and its pages, is free when the last launch that saw it is done.
* Where pages run short, fewer steps are launched ahead, and only when none is under way does the
  youngest row give way.
* What the device cannot do, log-probabilities, and a tree that compares two masks at its first
  tokens, is done by the host's own step (loop.py), for all rows, as long as such a row needs it.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from s1fast.decode_step import Chunk
from s1fast.device import Device, limit
from s1fast.kv_cache import PAGE_SIZE
from s1fast.loop import Loop
from s1fast.request import Piece
from s1fast.row import Row
from s1fast.scheduler import Grant

DEPTH = 3
"""Launches under way at most."""
POLL_S = 2e-5
"""Between two looks at an event."""


class Event(Protocol):
    def query(self) -> bool: ...


@dataclass(frozen=True)
class Launch:
    """One iteration's work on the device."""

    number: int
    """Of its step, as the device counts; of a chunk alone, the next step's."""
    rows: dict[int, Row]
    """The rows that were armed, by line."""
    event: Event


class _Done:
    """The event of a device that has done its work when a launch returns."""

    def query(self) -> bool:
        return True


def record(device: torch.device) -> Event:
    """An event that comes when all that was launched so far is done."""
    if device.type != "cuda":
        return _Done()
    event = torch.cuda.Event()
    event.record()
    return event


class Captured(Loop):
    """Rows in, pieces and completions out, the steps between them on the device's own account."""

    def __init__(self, device: Device, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._device = device
        self._armed: dict[int, Row] = {}
        self._resident: dict[int, Row] = {}  # whose ids and pages the device has, by line
        self._laid_out: int | None = None  # the bucket that the next step is laid out for
        self._flying: deque[Launch] = deque()
        self._leaving: list[tuple[Launch, list[int], int]] = []
        self._number = 0
        self.scheduler.retire = self._retire
        self.scheduler.margin = 1 + -(-DEPTH * device.most_slots // PAGE_SIZE)

    @property
    def idle(self) -> bool:
        return super().idle and not self._flying

    def step(self) -> None:
        """One iteration."""
        if any(_needs_host(row) for row in self.scheduler.running):
            self._plain()
            return
        while len(self._flying) >= DEPTH or not self._cover():
            self._land()
        fed = self._fill()
        while not self._cover():  # of those that were armed just now
            self._land()
        if self._armed or fed:
            self._launch()
        elif self._flying:
            self._land()

    def clear(self) -> None:
        """Gives up on all rows, when the device has done what was launched."""
        flying, self._flying = self._flying, deque()
        for launch in flying:
            _wait(launch.event)
        leaving, self._leaving = self._leaving, []
        for _, pages, line in leaving:
            self.scheduler.give_back(pages, line)
        super().clear()
        self._device.count_from(self._number)

    def warm_up(self) -> None:
        """Compiles and captures every bucket's step, while there are no rows."""
        for bucket in self._device.graphs.buckets:
            for _ in range(2):
                self._device.lay_out(bucket)
                self._device.graphs.run(bucket)
                self._number += 1
        self._laid_out = None

    # -- to the device ---------------------------------------------------------------------------

    def _cover(self) -> bool:
        """Sees to it that running rows have the pages for all that the next launch may write to.
        False if that has to wait for one under way."""
        ahead = (len(self._flying) + 1) * self._device.most_slots
        for row in list(self.scheduler.running):
            if row.line < 0:  # preempted by an older one just now
                continue
            armed, had = row.line in self._armed, len(row.pages)
            length = min(len(row.ids) + ahead, limit(row)) if armed else len(row.ids)
            if not self.scheduler.fits(row, length):
                if self._flying:
                    return False
                if not self.scheduler.reach(row, length):
                    continue
            if armed and len(row.pages) > had:
                self._device.extend(row.line, had, len(row.pages))
        return True

    def _fill(self) -> bool:
        """Admits rows, computes a chunk of what they have before their last token, and arms those
        that are ready. Returns whether there was a chunk."""
        most, spare = self.scheduler.max_slots, self._device.most_slots - 1
        rows = [row for row in self.scheduler.running if row.line not in self._armed]
        chunks: list[Chunk] = []
        while most:
            row = rows.pop(0) if rows else self.scheduler.admit()
            if row is None:
                break
            if _needs_host(row):
                continue
            if self._resident.get(row.line) is not row:
                self._resident[row.line] = row
                self._device.load(row)
            before = row.pending - 1
            if before <= spare:  # a step's spare slots take them along
                spare -= before
            else:
                grant = Grant(row, 0)
                most -= self.scheduler.extend(grant, min(most, before))
                chunks.append(Chunk(row.line, row.cached, grant.count))
                row.cached += grant.count
                before -= grant.count
                if before:
                    break
            self._arm(row)
        if chunks:
            self._device.prefill(chunks)
            self.stats.steps += 1
            self.stats.slots += sum(chunk.count for chunk in chunks)
        return bool(chunks)

    def _arm(self, row: Row) -> None:
        self._device.arm(row, self.speculate)
        self._armed[row.line] = row
        self._laid_out = None

    def _launch(self) -> None:
        number = self._number
        if self._armed:
            bucket = self._device.graphs.bucket(len(self._armed))
            if self._laid_out != bucket:
                self._device.lay_out(bucket)
                self._laid_out = bucket
            self._device.graphs.run(bucket)
            self._number += 1
            self.stats.steps += 1
        self.stats.preemptions = self.scheduler.preemptions
        event = record(self._device.device)
        self._flying.append(Launch(number, dict(self._armed), event))

    # -- back from it ----------------------------------------------------------------------------

    def _land(self) -> None:
        """Waits for the oldest launch and takes over what it drew."""
        launch = self._flying.popleft()
        _wait(launch.event)
        for line, row in launch.rows.items():
            if self._armed.get(line) is row:
                drawn = self._device.drawn(launch.number, line)
                if drawn:
                    self._guard(row, partial(self._take, row, drawn))
        leaving, self._leaving = self._leaving, []
        for last, pages, line in leaving:
            if last is launch:
                self.scheduler.give_back(pages, line)
            else:
                self._leaving.append((last, pages, line))

    def _take(self, row: Row, drawn: list[int]) -> None:
        pieces: list[Piece] = []
        for number, token in enumerate(drawn):
            self.stats.slots += row.pending
            row.cached = len(row.ids)
            pieces += row.take(token)
            self.stats.drawn += 1
            self.stats.accepted += number > 0
            if row.done:  # a stop text ends a row here alone
                break
        self.scheduler.name(row, row.cached)
        if row.done and not row.params.stop:
            # The device knew: no launch after this one has seen the row.
            del self._armed[row.line], self._resident[row.line]
        self._after(row, pieces, scheduled=True)

    def _retire(self, pages: list[int], line: int) -> None:
        """A row leaves: what launches under way may write to stays its own until they are done."""
        if self._armed.pop(line, None) is not None:
            self._device.disarm(line)
            self._laid_out = None
        if self._resident.pop(line, None) is not None and self._flying:
            self._leaving.append((self._flying[-1], pages, line))
        else:
            self.scheduler.give_back(pages, line)

    def _plain(self) -> None:
        """The host's own step, when nothing is under way."""
        while self._flying:
            self._land()
        for line in self._armed:
            self._device.disarm(line)
        self._armed, self._resident, self._laid_out = {}, {}, None
        super().step()


def _needs_host(row: Row) -> bool:
    """Whether the next draw takes the logits to the host: a log-probability is asked for, or a tree
    must know whether a cell that masks nothing would draw otherwise."""
    if row.params.logprobs is not None:
        return True
    if row.automaton.waits or not row.automaton.masks:
        return False
    trunk, *others = row.cells[0][0], *row.waiting_cells
    return trunk.program.mask_first and not all(c.program.mask_first for c in others)


def _wait(event: Event) -> None:
    while not event.query():
        time.sleep(POLL_S)
