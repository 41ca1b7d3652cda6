"""Budget forcing: how long a model thinks, as a small automaton beside each row of the decoder.

A `Budget` is what a user asks for. `compile_program` turns it into token ids and limits for one
request, once; the `Automaton` then steps once per sampled token and says what happens to it. This
plain Python is the reference that every faster version must equal.

Thinking is every token after the start marker `<|im_start|>think`, appended texts included. It ends

  naturally, when the model samples an END id (`<|im_start|>` or `<|im_end|>`): the id is dropped
    and `<|im_start|>answer` is appended;
  by length, at max_thinking_tokens: a newline, unless the text ends in one, and then
    `<|im_start|>answer\\nFinal Answer:` are appended.

While ignores are left, an END id is dropped and the ignore text ("Wait") appended instead. END ids
are masked while thinking is shorter than min_thinking_tokens and, when num_ignore is given, for one
token after the start marker and after every ignore text.

Source of the rules: simplescaling/s1, eval/lm-evaluation-harness/lm_eval/models/vllm_causallms.py.
`accounting="harness"` repeats that file exactly: each of num_ignore + 1 rounds may sample the full
maximum, thinking is cut to the maximum afterwards, and the last round's finish reason chooses the
end string even if it lies beyond the cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from s1fast.chat import END_TOKENS, THINK_END, THINK_START, Chat
from s1fast.errors import InputError

ANSWER_ROOM = 100
"""Tokens that max_thinking_tokens="auto" leaves for the answer, as s1's harness does."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long to think. Raises an InputError naming the field when the values cannot hold."""

    max_thinking_tokens: int | Literal["auto"] | None = None
    """Most thinking tokens; "auto" for what the context leaves, None for no limit of its own."""
    min_thinking_tokens: int = 0
    """Thinking cannot end before this many tokens."""
    num_ignore: int | None = None
    """How many times the end of thinking is ignored; 0 differs from None in that thinking cannot
    be empty."""
    ignore_text: str | Sequence[str] = "Wait"
    """Appended for each ignored end; several are used in turn."""
    final_text: str = "Final Answer:"
    """Appended after the answer marker when thinking is cut."""
    accounting: Literal["total", "harness"] = "total"
    """Whether the maximum holds for all thinking, or for each round and the final cut."""

    def __post_init__(self) -> None:
        longest, least, ignores = (
            self.max_thinking_tokens,
            self.min_thinking_tokens,
            self.num_ignore,
        )
        if longest is not None and longest != "auto" and not _is_count(longest):
            raise InputError(
                f"max_thinking_tokens must be a count, 'auto' or None, got {longest!r}"
            )
        if not _is_count(least):
            raise InputError(f"min_thinking_tokens must be a count, got {least!r}")
        if ignores is not None and not _is_count(ignores):
            raise InputError(f"num_ignore must be a count or None, got {ignores!r}")
        if isinstance(longest, int) and least > longest:
            raise InputError(f"min_thinking_tokens {least} is above max_thinking_tokens {longest}")
        if self.accounting not in ("total", "harness"):
            raise InputError(f"accounting must be 'total' or 'harness', got {self.accounting!r}")
        if self.accounting == "harness" and longest is None:
            raise InputError("accounting 'harness' needs max_thinking_tokens: it cuts to it")
        if self.accounting == "harness" and ignores is not None and least > 1:
            raise InputError(
                f"min_thinking_tokens {least} with num_ignore: the harness has no such run; use "
                "accounting 'total'"
            )
        texts = self.ignore_texts
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InputError(
                f"ignore_text must be a text or a list of texts, got {self.ignore_text!r}"
            )
        if not isinstance(self.final_text, str):
            raise InputError(f"final_text must be a text, got {self.final_text!r}")

    @property
    def ignore_texts(self) -> tuple[str, ...]:
        return (self.ignore_text,) if isinstance(self.ignore_text, str) else tuple(self.ignore_text)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


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
    max_thinking: int | None = None
    min_thinking: int = 0
    num_ignore: int = 0
    mask_first: bool = False
    """Mask END ids for one token after the start marker and after every ignore text."""
    end_ids: frozenset[int] = frozenset()
    ignore_ids: tuple[tuple[int, ...], ...] = ((),)
    natural_ids: tuple[int, ...] = ()
    forced_ids: tuple[int, ...] = ()
    newline_ids: tuple[int, ...] = ()
    newline_enders: frozenset[int] = frozenset()
    harness: bool = False


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


def compile_program(
    budget: Budget | None,
    chat: Chat,
    prompt_ids: Sequence[int],
    *,
    context: int,
    max_tokens: int | None,
    stop_ids: frozenset[int],
) -> Program:
    """Turns a request into a Program; texts become ids here, once.

    Args:
        budget: None for plain generation.
        prompt_ids: ends with the start marker, or with thinking that goes on. Thinking that the
            prompt has closed after its last start marker is not entered again.
        context: most positions of the model.
        max_tokens: most tokens to generate; None for all that the context leaves.
        stop_ids: ids that end the answer.

    Raises:
        InputError: naming the field that cannot be honoured.
    """
    room = context - len(prompt_ids)
    if not prompt_ids:
        raise InputError("prompt: empty")
    if max_tokens is not None and (not _is_count(max_tokens) or max_tokens < 1):
        raise InputError(f"max_tokens must be at least 1, got {max_tokens!r}")
    if room < 1 or (max_tokens or 0) > room:
        raise InputError(
            f"prompt of {len(prompt_ids)} tokens and max_tokens {max_tokens or 1} pass the model's "
            f"context of {context}"
        )
    limit = room if max_tokens is None else max_tokens
    if budget is None:
        return Program(max_tokens=limit, room=room, stop_ids=stop_ids)
    end_ids = frozenset(chat.marker_id(token) for token in END_TOKENS)
    thinking = _open_thinking(chat, prompt_ids, end_ids)
    if thinking is None:
        return Program(max_tokens=limit, room=room, stop_ids=stop_ids | end_ids)
    forced = chat.encode(f"{THINK_END}\n{budget.final_text}")
    newline = chat.encode("\n")
    longest = budget.max_thinking_tokens
    if longest == "auto":
        longest = len(thinking) + limit - len(forced) - ANSWER_ROOM
        if longest < 0:
            raise InputError(
                f"max_thinking_tokens 'auto': the prompt leaves {limit} tokens, the end of "
                f"thinking and an answer need {len(forced) + ANSWER_ROOM}"
            )
    generated = 0 if longest is None else max(0, longest - len(thinking))
    needed = generated + len(newline) + len(forced)
    if longest is not None and needed > limit:
        raise InputError(
            f"max_tokens {limit} cannot hold max_thinking_tokens {longest} and the "
            f"{len(newline) + len(forced)} tokens that end thinking; it needs {needed}"
        )
    if budget.min_thinking_tokens > len(thinking) + limit:
        raise InputError(
            f"min_thinking_tokens {budget.min_thinking_tokens} is above max_tokens {limit}"
        )
    if longest is not None and budget.min_thinking_tokens > longest:
        raise InputError(
            f"min_thinking_tokens {budget.min_thinking_tokens} is above what "
            f"max_thinking_tokens 'auto' leaves, {longest}"
        )
    ignore_ids = tuple(tuple(chat.encode(text)) for text in budget.ignore_texts)
    if any(end_ids & set(ids) for ids in ignore_ids):
        raise InputError(
            f"ignore_text {budget.ignore_text!r} holds a marker that ends thinking: "
            f"{' or '.join(END_TOKENS)}"
        )
    return Program(
        max_tokens=limit,
        room=room,
        stop_ids=stop_ids,
        think=True,
        thought=len(thinking),
        newline_ended=bool(thinking) and thinking[-1] in chat.ends_in_newline,
        max_thinking=longest,
        min_thinking=budget.min_thinking_tokens,
        num_ignore=budget.num_ignore or 0,
        mask_first=budget.num_ignore is not None,
        end_ids=end_ids,
        ignore_ids=ignore_ids,
        natural_ids=tuple(chat.encode(THINK_END)),
        forced_ids=tuple(forced),
        newline_ids=tuple(newline),
        newline_enders=chat.ends_in_newline,
        harness=budget.accounting == "harness",
    )


def _open_thinking(
    chat: Chat, prompt_ids: Sequence[int], end_ids: frozenset[int]
) -> list[int] | None:
    """Ids after the prompt's last start marker, or None when they hold an END id."""
    start = chat.encode(THINK_START)
    ids = list(prompt_ids)
    for i in range(len(ids) - len(start), -1, -1):
        if ids[i : i + len(start)] == start:
            after = ids[i + len(start) :]
            return None if end_ids & set(after) else after
    raise InputError(f"prompt: a budget needs the start-of-thinking marker {THINK_START} in it")


class Automaton:
    """The state of one row. `begin` once, then `step` per sampled token until phase is DONE."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.phase = Phase.THINK if program.think else Phase.ANSWER
        self.generated = 0
        """Tokens generated so far, appended ones included, cut ones not."""
        self.thinking = program.thought
        self.waits = 0
        """Ends of thinking that were ignored."""
        self.thinking_end: Literal["natural", "length"] | None = None
        self.finish_reason: Literal["stop", "length"] | None = None
        self._round = 0
        self._first = program.mask_first and not program.thought
        self._newline = program.newline_ended

    @property
    def end_masked(self) -> bool:
        """END ids are not to be sampled now."""
        if self.phase is not Phase.THINK:
            return False
        return self._first or self.thinking < self.program.min_thinking

    def begin(self) -> Move:
        """What follows the prompt before anything is sampled: a maximum of 0 ends at once."""
        p = self.program
        move = Move()
        if p.think and p.max_thinking is not None and self.thinking >= p.max_thinking:
            move = self._end("length")
        self._stop_at_limit()
        return move

    def step(self, token: int) -> Move:
        """Takes a sampled token."""
        move = self._think(token) if self.phase is Phase.THINK else self._answer(token)
        self._stop_at_limit()
        return move

    def finish(self) -> None:
        """Ends the answer from outside: a stop string was found in its text."""
        self._finish("stop")

    def _stop_at_limit(self) -> None:
        rounds = self.program.harness and self.phase is Phase.THINK  # these may pass max_tokens
        if (
            self.phase is not Phase.DONE
            and not rounds
            and self.generated >= self.program.max_tokens
        ):
            self._finish("length")

    def _answer(self, token: int) -> Move:
        if token in self.program.stop_ids or token in self.program.end_ids:
            self._finish("stop")
            return Move(keep=False)
        self.generated += 1
        return Move()

    def _think(self, token: int) -> Move:
        p = self.program
        if token in p.end_ids:
            return self._ignore() if self.waits < p.num_ignore else self._end("natural", keep=False)
        self.generated += 1
        self.thinking += 1
        self._round += 1
        self._first = False
        self._newline = token in p.newline_enders
        return self._end("length") if self._at_maximum() else Move()

    def _at_maximum(self) -> bool:
        p = self.program
        if p.max_thinking is None:
            return False
        if p.harness:  # a round also ends where the context does
            return self._round >= p.max_thinking or self.generated >= p.room
        return self.thinking >= p.max_thinking

    def _ignore(self) -> Move:
        """Drops an END id and appends the next ignore text, cut at the maximum."""
        p = self.program
        ids = p.ignore_ids[self.waits % len(p.ignore_ids)]
        self.waits += 1
        if p.harness:
            ids = ids[: p.room - self.generated]
        else:
            ids = ids[: p.max_tokens - self.generated]
            if p.max_thinking is not None:
                ids = ids[: p.max_thinking - self.thinking]
        self.generated += len(ids)
        self.thinking += len(ids)
        self._round = 0
        self._first = p.mask_first
        if ids:
            self._newline = ids[-1] in p.newline_enders
        if not self._at_maximum():
            return Move(keep=False, ignore=ids)
        end = self._end("length", keep=False)
        # Only the harness cuts, and there the text just appended goes first.
        kept = ids[: max(0, len(ids) - end.cut)]
        return Move(keep=False, cut=max(0, end.cut - len(ids)), ignore=kept, end=end.end)

    def _end(self, reason: Literal["natural", "length"], *, keep: bool = True) -> Move:
        """Leaves thinking: cuts what the harness cuts and appends the end string."""
        p = self.program
        self.phase, self.thinking_end = Phase.ANSWER, reason
        cut = 0
        if p.harness and p.max_thinking is not None:
            cut = min(max(0, self.thinking - p.max_thinking), self.generated)  # never the prompt
        self.thinking -= cut
        self.generated -= cut
        ids = p.natural_ids
        if reason == "length":
            ids = p.forced_ids if self._newline else p.newline_ids + p.forced_ids
        if self.generated + len(ids) > p.max_tokens:  # without a maximum nothing was reserved
            self._finish("length")
            return Move(keep=keep, cut=cut)
        self.generated += len(ids)
        return Move(keep=keep, cut=cut, end=ids)

    def _finish(self, reason: Literal["stop", "length"]) -> None:
        self.phase, self.finish_reason = Phase.DONE, reason
