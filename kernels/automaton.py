"""The budget automaton: what becomes of a row's tokens, stepped once per sampled token.

A request's rules are one flat table of integers, at most TABLE_SIZE of them: the fields of `At`,
then the id lists that they point to (s1fast/automaton.py compiles it). The `Automaton` reads
nothing but that row and the vocabulary's newline table; its state is the integers of `State`.
advance.py does the same on the device, where both lie in tensors.

The delimiters that end thinking are matched by one node per row: the table holds the failure
function of Aho and Corasick (1975), so a delimiter of several tokens costs no look at the past. A
delimiter of one id is an edge from the root. Nothing here needs torch.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Literal, NamedTuple, Protocol

TABLE_SIZE = 1024
"""Most integers of a program: 4 KB a request. s1's own takes about 60."""


class At(IntEnum):
    """Where a program's fields lie in its table. A list takes two: where it starts, how long."""

    MAX_TOKENS = 0
    ROOM = 1
    THINK = 2
    THOUGHT = 3
    NEWLINE_ENDED = 4
    MAX_THINKING = 5  # -1 for none
    MIN_THINKING = 6
    NUM_IGNORE = 7
    MASK_FIRST = 8
    HARNESS = 9
    NODE = 10  # where the matcher stands after the prompt
    LONGEST_END = 11
    STOPS = 12
    NATURAL = 14
    FORCED = 16
    NEWLINE = 18
    IGNORES = 20  # a list of (start, length)
    NODES = 22  # a list of (failure node, length matched there, first edge, edges)
    SIZE = 24


class Phase(Enum):
    THINK = "think"
    ANSWER = "answer"
    DONE = "done"


PHASES = tuple(Phase)


class Rules(Protocol):
    """What an automaton needs of a program."""

    @property
    def table(self) -> tuple[int, ...]: ...

    @property
    def newline_enders(self) -> Container[int]: ...


def follow(table: Sequence[int], node: int, token: int) -> int:
    """The matcher's node after one more token."""
    nodes = table[At.NODES]
    while True:
        first, count = table[nodes + 4 * node + 2], table[nodes + 4 * node + 3]
        for edge in range(first, first + 2 * count, 2):
            if table[edge] == token:
                return table[edge + 1]
        if not node:
            return 0
        node = table[nodes + 4 * node]


@dataclass(frozen=True)
class Move:
    """What happens to a row after a sampled token, in this order."""

    keep: bool = True
    """The sampled token stays."""
    cut: int = 0
    """So many of the newest tokens are taken back."""
    ignore: tuple[int, ...] = ()
    """Ids of an ignore text that follow."""
    end: tuple[int, ...] = ()
    """Ids that lead from thinking to the answer."""

    @property
    def append(self) -> tuple[int, ...]:
        """Everything that follows without being sampled."""
        return self.ignore + self.end


KEEP = Move()


class State(NamedTuple):
    """All that a row's automaton has beside its program, as the device keeps it."""

    phase: int  # an index into PHASES
    generated: int
    thinking: int
    waits: int
    round: int
    mask_round: int
    node: int
    newlines: int


class Automaton:
    """The state of one row. `begin` once, then `step` per sampled token until phase is DONE."""

    def __init__(self, program: Rules) -> None:
        t = self._table = program.table
        self._enders = program.newline_enders
        self._longest_end = t[At.LONGEST_END]
        self._read_limits()
        self.phase = Phase.THINK if t[At.THINK] else Phase.ANSWER
        self.generated = 0
        """Tokens generated so far, appended ones included, cut ones not."""
        self.thinking = t[At.THOUGHT]
        self.waits = 0
        """Ends of thinking that were ignored."""
        self.thinking_end: Literal["natural", "length"] | None = None
        self.finish_reason: Literal["stop", "length"] | None = None
        self._round = 0  # tokens sampled since the prompt or the last ignore text
        self._mask_round = bool(t[At.MASK_FIRST]) and not t[At.THOUGHT]
        self._node = t[At.NODE]
        self._newlines = t[At.NEWLINE_ENDED]  # a bit per token, the newest lowest

    def under(self, program: Rules) -> Automaton:
        """A copy in the same state, going on under another maximum and number of ignores."""
        other = copy.copy(self)
        other._table = program.table
        other._read_limits()
        other._mask_round = self._mask_round and bool(program.table[At.MASK_FIRST])
        return other

    @property
    def state(self) -> State:
        return State(
            PHASES.index(self.phase),
            self.generated,
            self.thinking,
            self.waits,
            self._round,
            int(self._mask_round),
            self._node,
            self._newlines,
        )

    @classmethod
    def resume(cls, program: Rules, state: State) -> Automaton:
        """One that goes on from a state; how thinking or the answer ended before is not in it."""
        self = cls(program)
        self.phase = PHASES[state.phase]
        self.generated, self.thinking, self.waits = state[1:4]
        self._round, self._mask_round = state.round, bool(state.mask_round)
        self._node, self._newlines = state.node, state.newlines
        return self

    def _read_limits(self) -> None:
        t = self._table
        self._max_tokens, self._room = t[At.MAX_TOKENS], t[At.ROOM]
        self._maximum, self._minimum = t[At.MAX_THINKING], t[At.MIN_THINKING]
        self._harness, self._num_ignore = bool(t[At.HARNESS]), t[At.NUM_IGNORE]

    def _list(self, at: int) -> tuple[int, ...]:
        start = self._table[at]
        return self._table[start : start + self._table[at + 1]]

    @property
    def masks(self) -> bool:
        """Whether thinking may not end yet. Once that is over, the next ignore text alone brings it
        back."""
        if self.phase is not Phase.THINK:
            return False
        early = self._longest_end - 1  # tokens of a delimiter before its last, taken back with it
        bare = self._mask_round and self._round <= early
        return bare or self.thinking - early < self._minimum

    @property
    def masked(self) -> dict[int, None]:
        """Ids that must not be sampled now: they would end thinking too early. In fixed order."""
        if not self.masks:
            return {}
        t, nodes, node = self._table, self._table[At.NODES], self._node
        found: dict[int, int] = {}  # id -> length of the delimiter that it would complete
        while True:
            first, count = t[nodes + 4 * node + 2], t[nodes + 4 * node + 3]
            for edge in range(first, first + 2 * count, 2):
                found.setdefault(t[edge], t[nodes + 4 * t[edge + 1] + 1])
            if not node:
                break
            node = t[nodes + 4 * node]
        return {
            token: None
            for token, length in found.items()
            if length
            and (
                self.thinking - (length - 1) < self._minimum
                or (self._mask_round and self._round < length)
            )
        }

    @property
    def unsure(self) -> int:
        """How many of the newest tokens may yet be taken back: the first part of a delimiter, and
        what a harness round has beyond the maximum."""
        if self.phase is Phase.DONE:
            return 0
        depth = 0
        if self._longest_end > 1 and self._node:  # the depth is not stored: bounded from above
            depth = min(self._longest_end - 1, self._round)
        if self._harness and self.phase is Phase.THINK:
            depth = max(depth, min(self.generated, self.thinking - self._maximum))
        return depth

    def begin(self) -> Move:
        """What follows the prompt before anything is sampled: a maximum of 0 ends at once."""
        move = KEEP
        thinks = self.phase is Phase.THINK
        if thinks and 0 <= self._maximum <= self.thinking:
            move = self._end("length")
        self._stop_at_limit()
        return move

    def step(self, token: int) -> Move:
        """Takes a sampled token."""
        self._node = follow(self._table, self._node, token)
        match = self._table[self._table[At.NODES] + 4 * self._node + 1]
        if self.phase is Phase.THINK:
            move = self._delimiter(match) if match else self._think(token)
        else:
            move = self._answer(token, match)
        self._stop_at_limit()
        return move

    def finish(self) -> None:
        """Ends the answer from outside: a stop string was found in its text."""
        self._finish("stop")

    def _stop_at_limit(self) -> None:
        rounds = self._harness and self.phase is Phase.THINK  # these may pass max_tokens
        if self.phase is not Phase.DONE and not rounds and self.generated >= self._max_tokens:
            self._finish("length")

    def _answer(self, token: int, match: int) -> Move:
        if match:
            cut = min(match - 1, self._round)
            self.generated -= cut
            self._finish("stop")
            return Move(keep=False, cut=cut)
        if token in self._list(At.STOPS):
            self._finish("stop")
            return Move(keep=False)
        self.generated += 1
        self._round += 1
        return KEEP

    def _think(self, token: int) -> Move:
        self.generated += 1
        self.thinking += 1
        self._round += 1
        self._newlines = (self._newlines << 1 | (token in self._enders)) & 0xFFFF
        return self._end("length") if self._at_maximum() else KEEP

    def _at_maximum(self) -> bool:
        if self._maximum < 0:
            return False
        if self._harness:  # a round also ends where the context does
            return self._round >= self._maximum or self.generated >= self._room
        return self.thinking >= self._maximum

    def _delimiter(self, length: int) -> Move:
        """A whole delimiter was sampled: it goes, and an ignore text or the answer follows."""
        cut = min(length - 1, self._round)  # never what stands in the prompt
        self.generated -= cut
        self.thinking -= cut
        self._newlines >>= cut
        if self.waits >= self._num_ignore:
            end = self._end("natural")
            return Move(keep=False, cut=cut + end.cut, end=end.end)
        return self._ignore(cut)

    def _ignore(self, cut: int) -> Move:
        """Appends the next ignore text, cut at the maximum."""
        t = self._table
        at = t[At.IGNORES] + 2 * (self.waits % t[At.IGNORES + 1])
        ids = self._list(at)
        self.waits += 1
        room = (self._room if self._harness else self._max_tokens) - self.generated
        if not self._harness and self._maximum >= 0:
            room = min(room, self._maximum - self.thinking)
        ids = ids[:room]
        self.generated += len(ids)
        self.thinking += len(ids)
        self._round, self._node = 0, 0  # a delimiter never spans an appended text
        self._mask_round = bool(t[At.MASK_FIRST])
        if ids:
            self._newlines = int(ids[-1] in self._enders)
        if not self._at_maximum():
            return Move(keep=False, cut=cut, ignore=ids)
        end = self._end("length")
        # Only the harness cuts, and there the text just appended goes first.
        kept = ids[: max(0, len(ids) - end.cut)]
        cut += max(0, end.cut - len(ids))
        return Move(keep=False, cut=cut, ignore=kept, end=end.end)

    def _end(self, reason: Literal["natural", "length"]) -> Move:
        """Leaves thinking: cuts what the harness cuts and appends the end string."""
        self.phase, self.thinking_end = Phase.ANSWER, reason
        self._round, self._node = 0, 0
        cut = 0
        if self._harness:
            cut = min(max(0, self.thinking - self._maximum), self.generated)  # never the prompt
        self.thinking -= cut
        self.generated -= cut
        ids = self._list(At.NATURAL)
        if reason == "length":
            newline = () if self._newlines & 1 else self._list(At.NEWLINE)
            ids = newline + self._list(At.FORCED)
        if self.generated + len(ids) > self._max_tokens:  # without a maximum nothing was reserved
            self._finish("length")
            return Move(cut=cut)
        self.generated += len(ids)
        return Move(cut=cut, end=ids)

    def _finish(self, reason: Literal["stop", "length"]) -> None:
        self.phase, self.finish_reason = Phase.DONE, reason
