"""The token loop: a step at a time, tokens through the model and draws through the automata.

Every step is one packed stream of token slots (scheduler.py says whose). Where a row has nothing
left to feed, a token is drawn after its last one, and its automaton decides what becomes of it;
where drafts follow, they are checked one by one against what would be drawn, and the first that
differs ends the row's step.

The noise of a draw depends on (seed, sample, position, token id) alone, so which rows share a step
decides nothing but rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from s1fast import tree
from s1fast.automaton import Phase
from s1fast.chat import Chat
from s1fast.kernels.device_rows import GRAM
from s1fast.kernels.sample import sample
from s1fast.kv_cache import KVCache, Pages
from s1fast.model import Model
from s1fast.request import Completion, Logprob, Piece
from s1fast.row import Row
from s1fast.scheduler import Grant, Scheduler
from s1fast.tensor_parallel import Ranks


@dataclass
class Stats:
    """What the engine has done since it was made."""

    steps: int = 0
    """Forward passes."""
    slots: int = 0
    """Tokens that went through the model."""
    drawn: int = 0
    """Tokens that were drawn and not dropped."""
    drafted: int = 0
    accepted: int = 0
    """Drafts, and those of them that were what the sampler drew."""
    preemptions: int = 0
    """Rows that gave their pages to an older one."""


Emit = Callable[[Row, list[Piece], list[tuple[int, Completion]]], None]
"""Told of a row's new pieces and, when it is done, of its completions with their cells."""

Fail = Callable[[int, Exception], None]
"""Told of a request that could not go on, and why."""


class Loop:
    """Rows in, pieces and completions out; not thread-safe."""

    def __init__(
        self,
        model: Model,
        chat: Chat,
        pages: Pages,
        cache: KVCache,
        *,
        max_rows: int,
        max_slots: int,
        speculate: int,
        emit: Emit,
        fail: Fail,
        ranks: Ranks | None = None,
    ) -> None:
        self.model, self.vocab_size, self.cache = model, chat.vocab_size, cache
        self.scheduler = Scheduler(pages, cache, max_rows, max_slots)
        self.speculate, self.emit, self.fail, self._ranks = speculate, emit, fail, ranks
        self.stats = Stats()

    @property
    def idle(self) -> bool:
        return not self.scheduler.running and not self.scheduler.waiting

    def add(self, row: Row) -> None:
        """A new row; one that its automaton ends at once never runs."""
        self._after(row, row.begin(), scheduled=False)

    def _guard(self, row: Row, work: Callable[[], None]) -> None:
        """What goes wrong with one request's text ends that request, not the others."""
        try:
            work()
        except Exception as error:
            self.remove(row.job)
            self.fail(row.job, error)

    def remove(self, job: int) -> None:
        """Cancels a request's rows: their pages are free at once."""
        for row in [*self.scheduler.running, *self.scheduler.waiting]:
            if row.job == job:
                self.scheduler.remove(row)

    def clear(self) -> None:
        """Gives up on all rows, and on all that the cache holds."""
        for row in [*self.scheduler.running, *self.scheduler.waiting]:
            self.scheduler.remove(row)
        self.scheduler.pages.forget()

    def step(self) -> None:
        """One forward pass and what follows from it."""
        grants = self.scheduler.plan(self._draft if self.speculate else None)
        step = self.cache.begin([grant.part() for grant in grants])
        reduce = None if self._ranks is None else self._ranks.reduce
        hidden_CD = self.model(step.token_C, step.position_C, self.cache.attend, reduce)
        self.stats.steps += 1
        self.stats.slots += len(step.token_C)
        self.stats.preemptions = self.scheduler.preemptions
        logits_BV = self.model.logits(hidden_CD[step.wanted])
        if self._ranks is not None:
            logits_BV = self._ranks.join(logits_BV, self.model.config.vocab_size)
        logits_BV[:, self.vocab_size :] = -math.inf
        likeliest = self._agreed(logits_BV.argmax(-1)).tolist() if len(logits_BV) else []
        at = 0
        for grant in grants:
            row, draws = grant.row, grant.draws
            row.cached += grant.count
            if draws:
                stop = at + 1 + len(grant.drafts)
                logits, found = logits_BV[at:stop], likeliest[at:stop]
                if row.line >= 0:  # not removed just now with another of its request
                    self._guard(row, partial(self._draws, grant, logits, found))
                at = stop

    def _draft(self, row: Row, most: int) -> list[int]:
        """Up to `most` ids that may follow the row's: what did the last time that its last GRAM ids
        stood there. A draft is kept only where it equals what is drawn, so it changes when tokens
        come, never which; reasoning repeats itself, which is all that this lives on.

        `row.drafts` maps every GRAM ids to where their last occurrence but the row's end stops.
        Ids that were taken back may be found in it still: then the draft costs its slots.
        """
        ids, found = row.ids, row.drafts
        if len(ids) <= GRAM:
            return []
        for stop in range(max(row.indexed, GRAM), len(ids)):
            found[tuple(ids[stop - GRAM : stop])] = stop
        row.indexed = len(ids)
        at = found.get(tuple(ids[-GRAM:]), len(ids))
        return ids[at : at + min(most, self.speculate)]

    def _draws(self, grant: Grant, logits_BV: Tensor, likeliest: list[int]) -> None:
        """Draws after the row's last token, and after each draft that turns out right."""
        row = grant.row
        row.cached = len(row.ids)
        pieces: list[Piece] = []
        self.stats.drafted += len(grant.drafts)
        for number, logits_V in enumerate(logits_BV):
            length = len(row.ids)
            masked = row.automaton.masked
            token = self._draw(row, logits_V, likeliest[number], masked)
            if masked and row.waiting_cells and not row.automaton.waits:
                self._compare_masks(row, logits_V, likeliest[number], masked, token)
            logprob = None
            if row.params.logprobs is not None:
                logprob = _logprob(logits_V[: self.vocab_size], token, row.params.logprobs)
            pieces += row.take(token, logprob)
            self.stats.drawn += 1
            right = number < len(grant.drafts) and grant.drafts[number] == token
            if row.done or len(row.ids) != length + 1 or row.ids[-1] != token or not right:
                break
            row.cached = len(row.ids)
            self.stats.accepted += 1
        self._after(row, pieces, scheduled=True)

    def _draw(self, row: Row, logits_V: Tensor, likeliest: int, masked: dict[int, None]) -> int:
        p = row.params
        if p.temperature == 0.0 and likeliest not in masked:
            return likeliest
        if masked:
            logits_V = logits_V.clone()
            logits_V[list(masked)] = -math.inf
        token = sample(
            logits_V,
            temperature=p.temperature,
            top_k=p.top_k,
            top_p=p.top_p,
            min_p=p.min_p,
            seed=p.seed,
            sample=row.sample,
            position=len(row.ids),
        )
        return int(self._agreed(token))

    def _agreed(self, drawn: Tensor) -> Tensor:
        return drawn if self._ranks is None else self._ranks.agree(drawn)

    def _compare_masks(
        self, row: Row, logits_V: Tensor, likeliest: int, masked: dict[int, None], token: int
    ) -> None:
        """Notes whether a cell of the tree that counts no ignores would have drawn otherwise."""
        for cell in row.waiting_cells:
            if cell.program.mask_first:
                continue
            fewer = row.automaton.under(cell.program).masked
            if fewer != masked and self._draw(row, logits_V, likeliest, fewer) != token:
                row.mask_changed = True
            return

    def _after(self, row: Row, pieces: list[Piece], *, scheduled: bool) -> None:
        """Tells what a row has produced, makes a tree's branches, and lets a finished row go."""
        if row.waiting_cells and row.automaton.phase is not Phase.THINK:
            for branch in tree.branches(row):
                self.scheduler.fork(row, branch, branch.taken_over)
                self._after(branch, [], scheduled=False)
        if not row.done:
            if not scheduled:
                self.scheduler.add(row)
        elif scheduled:
            self.scheduler.remove(row)
        else:
            self.scheduler.pages.drop(row.pages)
        self.emit(row, pieces, row.completions() if row.done else [])


def _logprob(logits_V: Tensor, token: int, most: int) -> Logprob:
    logprobs_V = logits_V.float().log_softmax(-1)
    top = logprobs_V.topk(min(most, len(logprobs_V)))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return Logprob(float(logprobs_V[token]), tuple(pairs))
