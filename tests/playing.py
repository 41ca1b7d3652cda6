"""Playing a budget program against a written-out sampler: what several budget tests use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from s1fast.automaton import Automaton, Move, Phase, Program

# A vocabulary of a few ids. Words are 30 and up.
START, END = 1, 2  # <|im_start|>, <|im_end|>
NEWLINE, DOT_NEWLINE = 3, 4  # both end in a newline
WAIT = (10, 11)
NATURAL = (START, 20)
FORCED = (START, 20, 21, 22)

THINKS = Program(
    max_tokens=100,
    room=1000,
    stop_ids=frozenset({END}),
    think=True,
    ends=((START,), (END,)),
    ignore_ids=(WAIT,),
    natural_ids=NATURAL,
    forced_ids=FORCED,
    newline_ids=(NEWLINE,),
    newline_enders=frozenset({NEWLINE, DOT_NEWLINE}),
)

Draw = Callable[[Automaton, bool], int]
"""Stands for the model and its sampler: the next token, given the state and whether END is masked.
Never reads more of the state than its position, `thinking` or `generated`."""


@dataclass
class Trace:
    """A row as the decoder keeps it: every Move applied to a list, in the documented order."""

    automaton: Automaton
    ids: list[int] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    """Of each id: thinking, ignore, end or answer."""
    masked: list[bool] = field(default_factory=list)
    """Per sampled token: was END masked?"""

    def apply(self, move: Move, token: int | None, kind: str) -> None:
        if token is not None and move.keep:
            self.ids.append(token)
            self.kinds.append(kind)
        assert move.cut <= len(self.ids)
        del self.ids[len(self.ids) - move.cut :], self.kinds[len(self.kinds) - move.cut :]
        self.ids += move.ignore + move.end
        self.kinds += ["ignore"] * len(move.ignore) + ["end"] * len(move.end)

    def of(self, *kinds: str) -> tuple[int, ...]:
        return tuple(i for i, kind in zip(self.ids, self.kinds, strict=True) if kind in kinds)

    @property
    def thinking(self) -> tuple[int, ...]:
        return self.of("thinking", "ignore")


def play(program: Program, draw: Draw, check: Callable[[Trace], None] | None = None) -> Trace:
    """Runs a row to its end; `check` sees it after every move."""
    automaton = Automaton(program)
    trace = Trace(automaton)
    trace.apply(automaton.begin(), None, "")
    for _ in range(10_000):
        assert automaton.generated == len(trace.ids)
        if check is not None:
            check(trace)
        if automaton.phase is Phase.DONE:
            return trace
        kind = "thinking" if automaton.phase is Phase.THINK else "answer"
        masked = automaton.masked
        trace.masked.append(bool(masked))
        token = draw(automaton, bool(masked))
        assert token not in masked
        trace.apply(automaton.step(token), token, kind)
    raise AssertionError("the automaton does not finish")
