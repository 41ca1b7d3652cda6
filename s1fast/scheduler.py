"""Continuous batching: which rows bring which tokens to the next step.

A step has `max_slots` token slots. Every running row gets one; what is left goes, oldest first, to
rows with more to feed (a forced string, a prompt in chunks), then to waiting rows, then to drafts.
So a long prompt never holds up the rows that decode.

Rows are served in the order in which they came. A waiting row is admitted when the pages for all
of its tokens are free and one more for each running row; the one that came first is admitted
first. A running row that needs a page when there is none takes it from the row that came last,
which waits again and computes its tokens anew. The oldest row thus always goes on, and so every row
becomes the oldest.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from s1fast.kv_cache import PAGE_SIZE, KVCache, Pages, Part, page_name
from s1fast.row import Order, Row


@dataclass
class Grant:
    """What a row brings to the next step: so many of its pending tokens, and drafts behind them."""

    row: Row
    count: int
    drafts: list[int] = field(default_factory=list)

    @property
    def draws(self) -> bool:
        """Whether the row draws a token after it: nothing is left to feed."""
        return self.count == self.row.pending

    def part(self) -> Part:
        row = self.row
        start = len(row.ids) - row.pending
        tokens = row.ids[start : start + self.count] + self.drafts
        wanted = 1 + len(self.drafts) if self.draws else 0
        return Part(row.line, start, tokens, row.pages, wanted)


Draft = Callable[[Row, int], list[int]]

Retire = Callable[[list[int], int], None]
"""Told of the pages and of the line, -1 for none, that a row leaves."""


class Scheduler:
    """Waiting and running rows, and the pages that they hold."""

    def __init__(self, pages: Pages, cache: KVCache, max_rows: int, max_slots: int) -> None:
        self.pages, self.cache, self.max_slots = pages, cache, max_slots
        self.waiting: list[Row] = []
        self.running: list[Row] = []
        """Both in the order in which the rows came."""
        self.preemptions = 0
        self.retire: Retire = self.give_back
        """A loop that runs ahead of its device gives back later what it may still write to."""
        self.margin = 1
        """Pages that are left free for every running row when another is admitted."""
        self._lines = list(range(max_rows - 1, -1, -1))

    def add(self, row: Row) -> None:
        bisect.insort(self.waiting, row, key=_order)

    def remove(self, row: Row) -> None:
        """A finished or cancelled row goes, wherever it is."""
        (self.running if row.line >= 0 else self.waiting).remove(row)
        self._release(row)

    def plan(self, draft: Draft | None = None) -> list[Grant]:
        """The next step; nothing if no row is left."""
        grants = self._one_each()
        spare = self.max_slots - len(grants)
        # Forced strings first: their rows draw again in this very step.
        for grant in sorted(grants, key=lambda g: g.row.pending > PAGE_SIZE):
            spare -= self.extend(grant, spare)
        while spare and (row := self.admit()) is not None:
            grant = Grant(row, 0)
            spare -= self.extend(grant, spare)
            grants.append(grant)
        if draft is not None:
            for grant in grants:
                spare -= self._draft(grant, draft, spare)
        return grants

    def _one_each(self) -> list[Grant]:
        grants = []
        for row in list(self.running):
            if row.line < 0:  # preempted by an older one just now
                continue
            if self.reach(row, len(row.ids) - row.pending + 1):
                grants.append(Grant(row, 1))
        return grants

    def extend(self, grant: Grant, spare: int) -> int:
        """Gives a row more slots, as far as pages are free; returns how many."""
        row = grant.row
        start = len(row.ids) - row.pending
        more = min(row.pending - grant.count, spare)
        have = (len(row.pages) + self.pages.available) * PAGE_SIZE
        more = max(0, min(more, have - start - grant.count))
        grant.count += more
        self._grow(row, start + grant.count)
        self.name(row, start + grant.count)
        return more

    def _draft(self, grant: Grant, draft: Draft, spare: int) -> int:
        if not grant.draws or not spare:
            return 0
        row = grant.row
        have = (len(row.pages) + self.pages.available) * PAGE_SIZE
        room = min(spare, have - len(row.ids), self.cache.table.shape[1] * PAGE_SIZE - len(row.ids))
        grant.drafts = draft(row, room) if room > 0 else []
        self._grow(row, len(row.ids) + len(grant.drafts))
        return len(grant.drafts)

    # -- pages ------------------------------------------------------------------------------

    def admit(self) -> Row | None:
        """The first waiting row starts, if a line and the pages for all of its tokens are free."""
        if not self._lines or not self.waiting:
            return None
        row = self.waiting[0]
        forked = bool(row.pages)
        if not forked:
            self._take_over(row)
        needed = -(-(len(row.ids) + 1) // PAGE_SIZE) - len(row.pages)
        needed += self.margin * len(self.running)
        others = [r for r in self.waiting[1:] if r.pages]
        while self.pages.available < needed and others:
            self._release(others.pop())  # branches that hold what they were forked from
        if self.pages.available < needed:
            if not forked:
                self._release(row)
            return None
        del self.waiting[0]
        row.line = self._lines.pop()
        bisect.insort(self.running, row, key=_order)
        self._write_table(row, 0)
        self._grow(row, len(row.ids))
        return row

    def _take_over(self, row: Row) -> None:
        """Shares the pages of an equal beginning. One token at least is left to feed."""
        row.name, row.named = b"", 0
        for stop in range(PAGE_SIZE, len(row.ids), PAGE_SIZE):
            name = page_name(row.name, row.ids[stop - PAGE_SIZE : stop])
            page = self.pages.named(name)
            if page is None:
                break
            row.pages.append(self.pages.share(page))
            row.name, row.named = name, row.named + 1
        row.cached = len(row.pages) * PAGE_SIZE
        if not row.steps:  # not what a preempted row gets back of its own
            row.taken_over = row.cached

    def name(self, row: Row, cached: int) -> None:
        """Names the pages that are full when this step is done. Rows planned after this one may
        share them in the same step already: a layer writes all keys before any row attends."""
        stop = min(cached, row.stable)
        while (row.named + 1) * PAGE_SIZE <= stop:
            at = row.named * PAGE_SIZE
            row.name = page_name(row.name, row.ids[at : at + PAGE_SIZE])
            self.pages.name(row.pages[row.named], row.name)
            row.named += 1

    def fits(self, row: Row, length: int) -> bool:
        """Whether the row has the pages for a length, or takes those that are free now."""
        if -(-length // PAGE_SIZE) - len(row.pages) > self.pages.available:
            return False
        self._grow(row, length)
        return True

    def reach(self, row: Row, length: int) -> bool:
        """Makes room up to a length; False if the row itself had to give way."""
        while len(row.pages) * PAGE_SIZE < length and not self.pages.available:
            holders = [r for r in (*self.running, *self.waiting) if r.pages]
            last = max(holders, key=_order)
            self._preempt(last)
            if last is row:
                return False
        self._grow(row, length)
        return True

    def _grow(self, row: Row, length: int) -> None:
        """Takes free pages up to a length."""
        first = len(row.pages)
        while len(row.pages) * PAGE_SIZE < length:
            page = self.pages.take()
            self.cache.reach(page)
            row.pages.append(page)
        self._write_table(row, first)

    def _write_table(self, row: Row, first: int) -> None:
        if len(row.pages) > first and row.line >= 0:
            table: Tensor = self.cache.table
            fresh = row.pages[first:]
            table[row.line, first : len(row.pages)] = table.new_tensor(fresh)

    def _preempt(self, row: Row) -> None:
        if row.line >= 0:
            self.preemptions += 1
            self.running.remove(row)
            self.add(row)
        self._release(row)

    def _release(self, row: Row) -> None:
        """The row leaves all that it holds; it may compute its tokens anew."""
        pages, line = row.pages, row.line
        row.pages, row.cached, row.named, row.name, row.line = [], 0, 0, b"", -1
        self.retire(pages, line)

    def give_back(self, pages: list[int], line: int) -> None:
        """Pages and a line that a row has left are free for others."""
        self.pages.drop(pages)
        if line >= 0:
            self.cache.table[line] = 0
            self._lines.append(line)

    def fork(self, source: Row, branch: Row, length: int) -> None:
        """The branch takes over the first `length` positions of a row: its full pages are shared,
        the partly filled one is copied. Where no page is free for that, those few are computed
        anew."""
        length = min(length, source.cached)
        full, rest = divmod(length, PAGE_SIZE)
        branch.pages = [self.pages.share(page) for page in source.pages[:full]]
        if rest and self.pages.available:
            page = self.pages.take()
            self.cache.copy(source.pages[full], page)
            branch.pages.append(page)
        branch.cached = min(length, len(branch.pages) * PAGE_SIZE)
        branch.taken_over = branch.cached


def _order(row: Row) -> Order:
    return row.order
