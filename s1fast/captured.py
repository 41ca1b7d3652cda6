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
* What a row leaves, its line and its pages, is free when the last launch that saw it is done;
  where it was written to since the last launch, with the next one.
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
from s1fast.matmul import Matmul
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
    """Of launches."""
    step: int
    """Number of its step, as the device counts."""
    rows: dict[int, Row]
    """The rows that the step had, by line; none where there was no step."""
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

    def __init__(self, matmul: Matmul, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.device = Device(
            self.model,
            self.cache,
            matmul,
            arguments["chat"],
            max_rows=arguments["max_rows"],
            depth=DEPTH,
            ranks=self._ranks,
        )
        self._armed: dict[int, Row] = {}
        self._resident: dict[int, Row] = {}  # whose ids and pages the device has, by line
        self._laid_out: int | None = None  # the bucket that the next step is laid out for
        self._flying: deque[Launch] = deque()
        self._launches = self._steps = 0
        self._written = False  # to lines or pages since the last launch
        self._leaving: deque[tuple[int, list[int], int]] = deque()  # behind the launch's number
        self.scheduler.retire = self._retire
        self.scheduler.margin = 1 + -(-DEPTH * self.device.most_slots // PAGE_SIZE)

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
        self._fill()
        covered = self._cover()  # also those that were armed just now
        if self._armed or self._written:
            self._launch(covered)
        elif self._flying:
            self._land()

    def clear(self) -> None:
        """Gives up on all rows, when the device has done what was launched."""
        _wait(record(self.device.device))
        self._flying.clear()
        self._written = False
        self._free(self._launches)
        super().clear()
        # A step that failed half-way may stand in the ring under its number.
        self._steps += 1
        self.device.count_from(self._steps)

    def warm_up(self) -> None:
        """Compiles and captures every bucket's step, while there are no rows."""
        for bucket in self.device.graphs.buckets:
            for _ in range(2):
                self.device.lay_out(bucket)
                self.device.graphs.run(bucket)
                self._steps += 1
        self._laid_out = None

    # -- to the device ---------------------------------------------------------------------------

    def _cover(self) -> bool:
        """Sees to it that running rows have the pages for all that the next launch may write to.
        False if that has to wait for one under way."""
        ahead = (len(self._flying) + 1) * self.device.most_slots
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
                self.device.extend(row.line, had, len(row.pages))
        return True

    def _fill(self) -> None:
        """Admits rows, computes a chunk of what they have before their last token, and arms those
        that are ready."""
        most, spare = self.scheduler.max_slots, self.device.most_slots - 1
        rows = [row for row in self.scheduler.running if row.line not in self._armed]
        chunks: list[Chunk] = []
        while most:
            row = rows.pop(0) if rows else self.scheduler.admit()
            if row is None:
                break
            if _needs_host(row):
                continue
            self._written = True
            if self._resident.get(row.line) is not row:
                self._resident[row.line] = row
                self.device.load(row)
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
            self.device.prefill(chunks)
            self.stats.steps += 1
            self.stats.slots += sum(chunk.count for chunk in chunks)

    def _arm(self, row: Row) -> None:
        self.device.arm(row, self.speculate)
        self._armed[row.line] = row
        self._laid_out = None

    def _launch(self, covered: bool) -> None:
        """A step of the rows that are armed, if their pages are covered, and an event."""
        rows, step = dict(self._armed) if covered else {}, self._steps
        if rows:
            bucket = self.device.graphs.bucket(len(rows))
            if self._laid_out != bucket:
                self.device.lay_out(bucket)
                self._laid_out = bucket
            self.device.graphs.run(bucket)
            self._steps += 1
            self.stats.steps += 1
        self.stats.preemptions = self.scheduler.preemptions
        event = record(self.device.device)
        self._flying.append(Launch(self._launches, step, rows, event))
        self._launches += 1
        self._written = False

    # -- back from it ----------------------------------------------------------------------------

    def _land(self) -> None:
        """Waits for the oldest launch and takes over what it drew."""
        launch = self._flying.popleft()
        _wait(launch.event)
        for line, row in launch.rows.items():
            if self._armed.get(line) is row:
                drawn = self.device.drawn(launch.step, line)
                if drawn:
                    self._guard(row, partial(self._take, row, drawn))
        self._free(launch.number)

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
            self.device.disarm(line)
            self._laid_out = None
        seen = self._resident.pop(line, None) is not None
        if seen and (self._flying or self._written):
            last = self._launches if self._written else self._launches - 1
            self._leaving.append((last, pages, line))
        else:
            self.scheduler.give_back(pages, line)

    def _free(self, number: int) -> None:
        """Gives back what rows left that no launch after this one saw."""
        while self._leaving and self._leaving[0][0] <= number:
            _, pages, line = self._leaving.popleft()
            self.scheduler.give_back(pages, line)

    def _plain(self) -> None:
        """The host's own step, when nothing is under way."""
        while self._flying:
            self._land()
        for line in self._armed:
            self.device.disarm(line)
        self._armed, self._resident, self._laid_out = {}, {}, None
        if not self.idle:  # the rows may have failed while they landed
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
