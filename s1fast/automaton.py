"""The budget automaton: a request's rules as one flat table of integers, stepped once per token.

`Program` is what a request compiles to, by name. `Program.table` is the same as one row of int32,
at most TABLE_SIZE of them: the fields of `At`, then the id lists that they point to. The
`Automaton` reads nothing but that row and the vocabulary's newline table, so a kernel that is
handed the two can do what it does; its state is a dozen integers.

The delimiters that end thinking are matched by one node per row: the table holds the failure
function of Aho and Corasick (1975), so a delimiter of several tokens costs no look at the past. A
delimiter of one id is an edge from the root.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from functools import cached_property
from typing import Literal

from s1fast.errors import InputError

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


@dataclass(frozen=True, kw_only=True)
class Program:
    """A request's budget as token ids and limits: all that the token loop needs to know."""

    max_tokens: int
    """Most tokens generated, appended ones included."""
    room: int
    """Positions that the prompt leaves in the context; harness rounds may fill them all."""
    stop_ids: frozenset[int]
    """Ids that end the answer."""
    think: bool = False
    """Whether the row starts inside thinking."""
    thought: int = 0
    """Thinking tokens that stand in the prompt already."""
    newline_ended: bool = False
    """Whether the prompt's thinking ends in a newline."""
    half_end: tuple[int, ...] = ()
    """The prompt's last ids, of which the first part of a delimiter may be."""
    max_thinking: int | None = None
    min_thinking: int = 0
    num_ignore: int = 0
    mask_first: bool = False
    """Mask the end of thinking for one token after the start marker and every ignore text."""
    ends: tuple[tuple[int, ...], ...] = ()
    """Delimiters that end thinking, and the answer; s1's are of one id each."""
    ignore_ids: tuple[tuple[int, ...], ...] = ((),)
    natural_ids: tuple[int, ...] = ()
    forced_ids: tuple[int, ...] = ()
    newline_ids: tuple[int, ...] = ()
    newline_enders: frozenset[int] = frozenset()
    """Ids whose text ends in a newline: the vocabulary's, so not in the request's table."""
    harness: bool = False

    @property
    def longest(self) -> int:
        """Most tokens that are ever there at once: rounds of the harness may pass max_tokens."""
        if not self.harness or self.max_thinking is None:
            return self.max_tokens
        text = max(map(len, self.ignore_ids))
        rounds = (self.num_ignore + 1) * (self.max_thinking + text)
        return max(self.max_tokens, min(self.room, rounds))

    @cached_property
    def table(self) -> tuple[int, ...]:
        """The program as integers.

        Raises:
            InputError: more of them than TABLE_SIZE.
        """
        row = [0] * At.SIZE
        longest = -1 if self.max_thinking is None else self.max_thinking
        row[: At.NODE] = [
            self.max_tokens,
            self.room,
            int(self.think),
            self.thought,
            int(self.newline_ended),
            longest,
            self.min_thinking,
            self.num_ignore,
            int(self.mask_first),
            int(self.harness),
        ]
        row[At.LONGEST_END] = max(map(len, self.ends), default=1)

        def put(at: At, ids: Sequence[int], count: int | None = None) -> None:
            row[at], row[at + 1] = len(row), len(ids) if count is None else count
            row.extend(ids)

        put(At.STOPS, sorted(self.stop_ids))
        put(At.NATURAL, self.natural_ids)
        put(At.FORCED, self.forced_ids)
        put(At.NEWLINE, self.newline_ids)
        starts = []
        for ids in self.ignore_ids:
            starts += [len(row), len(ids)]
            row.extend(ids)
        put(At.IGNORES, starts, len(self.ignore_ids))
        nodes, edges = _matcher(self.ends)
        first = len(row) + 4 * len(nodes)
        flat: list[int] = []
        for (fail, match), out in zip(nodes, edges, strict=True):
            flat += [fail, match, first, len(out)]
            first += 2 * len(out)
        put(At.NODES, flat, len(nodes))
        row += [i for out in edges for edge in out.items() for i in edge]
        if len(row) > TABLE_SIZE:
            raise InputError(
                f"ignore_text, final_text and stop_token_ids: as a program they take {len(row)} "
                f"integers, at most {TABLE_SIZE}; shorten the longest"
            )
        for token in self.half_end:
            row[At.NODE] = _follow(row, row[At.NODE], token)
        return tuple(row)


def _matcher(
    ends: Sequence[Sequence[int]],
) -> tuple[list[tuple[int, int]], list[dict[int, int]]]:
    """(failure node, length of the longest delimiter that ends here) and edges of every node."""
    edges: list[dict[int, int]] = [{}]
    depth, whole = [0], [False]
    for end in ends:
        node = 0
        for token in end:
            if token not in edges[node]:
                edges[node][token] = len(edges)
                edges.append({})
                depth.append(depth[node] + 1)
                whole.append(False)
            node = edges[node][token]
        whole[node] = True
    fail, match = [0] * len(edges), [0] * len(edges)
    queue = list(edges[0].values())
    for node in queue:  # by depth, growing as it goes
        match[node] = depth[node] if whole[node] else match[fail[node]]
        for token, child in edges[node].items():
            back = fail[node]
            while back and token not in edges[back]:
                back = fail[back]
            fail[child] = edges[back].get(token, 0)
            queue.append(child)
    return list(zip(fail, match, strict=True)), edges


def _follow(table: Sequence[int], node: int, token: int) -> int:
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


class Automaton:
    """The state of one row. `begin` once, then `step` per sampled token until phase is DONE."""

    def __init__(self, program: Program) -> None:
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

    def under(self, program: Program) -> Automaton:
        """A copy in the same state, going on under another maximum and number of ignores."""
        other = copy.copy(self)
        other._table = program.table
        other._read_limits()
        other._mask_round = self._mask_round and bool(program.table[At.MASK_FIRST])
        return other

    def _read_limits(self) -> None:
        t = self._table
        self._max_tokens, self._room = t[At.MAX_TOKENS], t[At.ROOM]
        self._maximum, self._minimum = t[At.MAX_THINKING], t[At.MIN_THINKING]
        self._harness, self._num_ignore = bool(t[At.HARNESS]), t[At.NUM_IGNORE]

    def _list(self, at: int) -> tuple[int, ...]:
        start = self._table[at]
        return self._table[start : start + self._table[at + 1]]

    @property
    def masked(self) -> dict[int, None]:
        """Ids that must not be sampled now: they would end thinking too early. In fixed order."""
        if self.phase is not Phase.THINK:
            return {}
        early = self._longest_end - 1  # tokens of a delimiter before its last, taken back with it
        bare = self._mask_round and self._round <= early
        if self.thinking - early >= self._minimum and not bare:
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
        self._node = _follow(self._table, self._node, token)
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
