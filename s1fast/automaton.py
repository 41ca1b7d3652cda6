"""A request's rules as one flat table of integers.

`Program` is what a request compiles to, by name. `Program.table` is the same as one row of int32,
at most TABLE_SIZE of them: all that an automaton (kernels/automaton.py) needs, on a CPU or a GPU,
beside the vocabulary's newline table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from s1fast.errors import InputError
from s1fast.kernels.automaton import KEEP, TABLE_SIZE, At, Automaton, Move, Phase, follow

__all__ = ["KEEP", "TABLE_SIZE", "At", "Automaton", "Move", "Phase", "Program"]


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
            row[At.NODE] = follow(row, row[At.NODE], token)
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
