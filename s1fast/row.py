"""A running sample: its tokens, its automaton, and the text made of them so far."""

from __future__ import annotations

from collections.abc import Sequence

from s1fast.automaton import Automaton, Move, Phase
from s1fast.chat import Chat, TextStream
from s1fast.request import Cell, Completion, Kind, Logprob, Piece, SamplingParams, joined

Order = tuple[int, ...]
"""Who came first: of requests, then of samples, then of branches."""

_SEAM = 16
"""Ids before a seam that are decoded with what follows: more than a character ever has."""


class Row:
    """One sample. Most rows make one completion; a tree's share what they have in common.

    What the scheduler keeps of a row stands here too: `cached`, `pages`, `line`.
    """

    def __init__(
        self,
        job: int,
        order: Order,
        index: int,
        sample: int,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        cells: Sequence[Cell],
        chat: Chat,
    ) -> None:
        self.job, self.order, self.index, self.sample = job, order, index, sample
        self.params, self.chat = params, chat
        self.prompt_ids = list(prompt_ids)
        self.ids = list(prompt_ids)
        self.kinds: list[Kind] = []
        """Of every id after the prompt."""
        self.logprobs: list[Logprob | None] = []
        """Of every id after the prompt, where asked for."""
        self.cells: list[tuple[Cell, Automaton, int]] = []
        """The completions that this row makes: cell, its automaton, steps that were another's."""
        self.pieces: list[Piece] = []
        self.shown = 0
        """So many of its cells have been shown the pieces before those that come."""
        self.steps = 0
        self.automaton = Automaton(cells[0].program)
        self.waiting_cells: list[Cell] = list(cells[1:])
        """Cells of a tree that leave this row where its thinking, or theirs, ends."""
        self.cells.append((cells[0], self.automaton, 0))
        self.draws: list[tuple[int, Logprob | None]] = []
        """Of a tree's trunk: every token drawn in thinking, dropped ones too."""
        self.mask_changed = False
        """Of a tree's trunk: whether the mask of counted ignores ever changed a draw."""

        self.cached = 0
        """So many of ids have their keys and values in the cache."""
        self.taken_over = 0
        """So many of them another row had computed."""
        self.pages: list[int] = []
        self.named = 0
        """So many of the pages have been named, the last with `name`."""
        self.name = b""
        self.line = -1
        """Its line in the page table, while it runs."""
        self.drafts: dict[tuple[int, ...], int] = {}
        self.indexed = 0

        self._released = 0
        self._unstopped = ""
        self._text = TextStream(chat)
        self._text.push(prompt_ids[-_SEAM:])  # prompt and output decode as one text
        self._last: Kind | None = None

    @property
    def pending(self) -> int:
        """Tokens to feed before the next draw: at least one, the last, to draw after it."""
        return max(1, len(self.ids) - self.cached)

    @property
    def stable(self) -> int:
        """So many of ids will never be taken back."""
        return len(self.prompt_ids) + self._released

    @property
    def done(self) -> bool:
        return self.automaton.phase is Phase.DONE

    def begin(self) -> list[Piece]:
        """What is certain before anything is drawn."""
        return self.apply(self.automaton.begin())

    def take(self, token: int, logprob: Logprob | None = None) -> list[Piece]:
        """Lets the automaton judge a drawn token; returns the output that is certain now."""
        kind: Kind = "answer"
        if self.automaton.phase is Phase.THINK:
            kind = "thinking"
            if self.waiting_cells:
                self.draws.append((token, logprob))
        self.steps += 1
        return self.apply(self.automaton.step(token), token, kind, logprob)

    def apply(
        self,
        move: Move,
        token: int | None = None,
        kind: Kind = "answer",
        logprob: Logprob | None = None,
    ) -> list[Piece]:
        if token is not None and move.keep:
            self._add(kind, (token,), logprob)
        if move.cut:
            for values in (self.ids, self.kinds, self.logprobs):
                del values[len(values) - move.cut :]
            self.cached = min(self.cached, len(self.ids))
        self._add("ignore", move.ignore)
        self._add("end", move.end)
        return self._release()

    def _add(self, kind: Kind, ids: Sequence[int], logprob: Logprob | None = None) -> None:
        self.ids += ids
        self.kinds += [kind] * len(ids)
        if self.params.logprobs is not None:
            self.logprobs += [logprob] * len(ids)

    def continue_from(self, text: Sequence[Piece], count: int) -> None:
        """Takes over what another row has released of the same ids: `text`, `count` ids long."""
        self.pieces, self._released = list(text), count
        if text:
            self._last = text[-1].kind
        self._text = TextStream(self.chat)
        at = len(self.prompt_ids) + count
        self._text.push(self.ids[max(0, at - _SEAM) : at])

    def _release(self) -> list[Piece]:
        """Turns tokens that stay into pieces."""
        first = len(self.prompt_ids)
        stop = len(self.kinds) - self.automaton.unsure
        pieces: list[Piece] = []
        while self._released < stop:
            at = self._released
            kind, end = self.kinds[at], at + 1
            while end < stop and self.kinds[end] == kind:
                end += 1
            self._released = end
            pieces += self._piece(kind, self.ids[first + at : first + end])
        if self.done and self._unstopped:
            pieces.append(self._emit("answer", [], self._unstopped))
            self._unstopped = ""
        self.pieces += pieces
        return pieces

    def _piece(self, kind: Kind, ids: list[int]) -> list[Piece]:
        pieces = []
        if self._last is not None and kind != self._last:
            left = self._text.flush()  # half a character is not completed by an appended text
            if left:
                pieces.append(self._emit(self._last, [], left))
        self._last = kind
        text = self._text.push(ids)
        if kind != "answer" or not self.params.stop:
            return [*pieces, self._emit(kind, ids, text)]
        # Hold back what may be the beginning of a stop text.
        self._unstopped += text
        found = [i for stop in self.params.stop if (i := self._unstopped.find(stop)) >= 0]
        if found:
            text, self._unstopped = self._unstopped[: min(found)], ""
            self.automaton.finish()
        else:
            keep = max(len(stop) for stop in self.params.stop) - 1
            cut = max(0, len(self._unstopped) - keep)
            text, self._unstopped = self._unstopped[:cut], self._unstopped[cut:]
        return [*pieces, self._emit(kind, ids, text)]

    def _emit(self, kind: Kind, ids: list[int], text: str) -> Piece:
        return Piece(self.index, self.sample, kind, text, tuple(ids))

    def told(self, pieces: list[Piece]) -> list[tuple[int, Piece]]:
        """What its cells are told of new pieces, with their numbers. A cell that joins when there
        are pieces already is told these first, in as few as tell their kinds."""
        late = self.shown < len(self.cells) and len(self.pieces) > len(pieces)
        before = joined(self.pieces) if late else pieces
        shown, self.shown = self.shown, len(self.cells)
        return [
            (cell.number, piece)
            for count, (cell, *_) in enumerate(self.cells)
            for piece in (pieces if count < shown else before)
        ]

    def completions(self) -> list[tuple[int, Completion]]:
        """The finished row's, with the numbers of their cells."""
        token_ids = self.ids[len(self.prompt_ids) :]
        thinking = "".join(p.text for p in self.pieces if p.kind in ("thinking", "ignore"))
        ended = "".join(p.text for p in self.pieces if p.kind == "end")
        answer = "".join(p.text for p in self.pieces if p.kind == "answer")
        made = []
        for at, (cell, automaton, shared) in enumerate(self.cells):
            cached = self.taken_over if at == 0 else len(self.prompt_ids) + len(token_ids)
            done = Completion(
                self.index,
                self.sample,
                list(self.prompt_ids),
                list(token_ids),
                thinking,
                ended.partition(self.chat.markers.answer)[2] + answer,
                automaton.thinking,
                automaton.waits,
                automaton.thinking_end,
                self.automaton.finish_reason,
                cell.budget,
                list(self.pieces),
                list(self.logprobs) if self.params.logprobs is not None else None,
                self.steps,
                shared if at == 0 else self.steps,
                cached,
            )
            made.append((cell.number, done))
        return made
