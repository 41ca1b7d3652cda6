"""Budget forcing: how long a model thinks.

A `Budget` is what a user asks for. `compile_program` turns it into token ids and limits for one
request, once; the automaton beside each row of the decoder (automaton.py) then steps once per
sampled token and says what happens to it.

Thinking is every token after the start marker, s1's `<|im_start|>think`, appended texts included.
It ends

  naturally, when the model samples an end (`<|im_start|>` or `<|im_end|>`): that is dropped
    and `<|im_start|>answer` is appended;
  by length, at max_thinking_tokens: a newline, unless the text ends in one, and then
    `<|im_start|>answer\\nFinal Answer:` are appended.

While ignores are left, an end is dropped and the ignore text ("Wait") appended instead. Ends are
masked while thinking is shorter than min_thinking_tokens and, when num_ignore is given, for one
token after the start marker and after every ignore text. Other models' markers: markers.py.

Source of the rules: simplescaling/s1, eval/lm-evaluation-harness/lm_eval/models/vllm_causallms.py.
`accounting="harness"` repeats that file exactly: each of num_ignore + 1 rounds may sample the full
maximum, thinking is cut to the maximum afterwards, and the last round's finish reason chooses the
end string even if it lies beyond the cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from s1fast.automaton import Program
from s1fast.chat import Chat
from s1fast.errors import InputError

ANSWER_ROOM = 100
"""Tokens that max_thinking_tokens="auto" leaves for the answer, as s1's harness does."""

LONGEST_END = 16
"""Most tokens of a delimiter."""


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
        texts = [self.ignore_text] if isinstance(self.ignore_text, str) else self.ignore_text
        listed = isinstance(texts, list | tuple) and len(texts) > 0
        rules = [
            (
                "max_thinking_tokens",
                longest in (None, "auto") or _is_count(longest),
                "a count, 'auto' or None",
            ),
            ("min_thinking_tokens", _is_count(least), "a count"),
            ("num_ignore", ignores is None or _is_count(ignores), "a count or None"),
            ("accounting", self.accounting in ("total", "harness"), "'total' or 'harness'"),
            (
                "ignore_text",
                listed and all(isinstance(text, str) for text in texts),
                "a text or a list of texts",
            ),
            ("final_text", isinstance(self.final_text, str), "a text"),
        ]
        check_fields(self, rules)
        if isinstance(longest, int) and least > longest:
            raise InputError(f"min_thinking_tokens {least} is above max_thinking_tokens {longest}")
        if self.accounting == "harness" and longest is None:
            raise InputError("accounting 'harness' needs max_thinking_tokens: it cuts to it")
        if self.accounting == "harness" and ignores is not None and least > 1:
            raise InputError(
                f"min_thinking_tokens {least} with num_ignore: the harness has no such run; use "
                "accounting 'total'"
            )

    @property
    def ignore_texts(self) -> tuple[str, ...]:
        return (self.ignore_text,) if isinstance(self.ignore_text, str) else tuple(self.ignore_text)


def check_fields(values: object, rules: Iterable[tuple[str, bool, str]]) -> None:
    """Raises an InputError for the first (field, whether it holds, what it must be) that fails."""
    for name, holds, rule in rules:
        if not holds:
            raise InputError(f"{name} must be {rule}, got {getattr(values, name)!r}")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


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
    markers = chat.markers
    ends = _end_ids(chat)
    thinking = _open_thinking(chat, prompt_ids, ends)
    if thinking is None:
        return Program(max_tokens=limit, room=room, stop_ids=stop_ids, ends=ends)
    forced = tuple(chat.encode(f"{markers.answer}\n{budget.final_text}"))
    newline = tuple(chat.encode("\n"))
    longest = budget.max_thinking_tokens
    where = (
        f"max_tokens {limit}" if max_tokens else f"the context, {limit} tokens after the prompt,"
    )
    if longest == "auto":
        longest = len(thinking) + limit - len(forced) - ANSWER_ROOM
        if longest < 0:
            raise InputError(
                f"max_thinking_tokens 'auto': {where} leaves none beside the end of thinking and "
                f"an answer, {len(forced) + ANSWER_ROOM} tokens; give more, or a number"
            )
    _check_room(budget, longest, len(thinking), limit, len(newline) + len(forced), where)
    ignore_ids = tuple(tuple(chat.encode(text)) for text in budget.ignore_texts)
    if any(_holds(ids, ends) for ids in ignore_ids):
        raise InputError(
            f"ignore_text {budget.ignore_text!r} holds a marker that ends thinking: "
            f"{' or '.join(markers.ends)}"
        )
    program = Program(
        max_tokens=limit,
        room=room,
        stop_ids=stop_ids,
        think=True,
        thought=len(thinking),
        newline_ended=bool(thinking) and thinking[-1] in chat.ends_in_newline,
        half_end=tuple(thinking[-LONGEST_END:]),
        max_thinking=longest,
        min_thinking=budget.min_thinking_tokens,
        num_ignore=budget.num_ignore or 0,
        mask_first=budget.num_ignore is not None,
        ends=ends,
        ignore_ids=ignore_ids,
        natural_ids=tuple(chat.encode(markers.answer)),
        forced_ids=forced,
        newline_ids=newline,
        newline_enders=chat.ends_in_newline,
        harness=budget.accounting == "harness",
    )
    _ = program.table  # too large a program is refused here, not in the loop
    return program


def _check_room(
    budget: Budget, longest: int | None, thought: int, limit: int, ending: int, where: str
) -> None:
    """Whether `limit` tokens, which are `where`, hold what is asked for and the ids that end it."""
    least = budget.min_thinking_tokens
    if longest is not None:
        needed = max(0, longest - thought) + ending
        if needed > limit:
            raise InputError(
                f"{where} cannot hold max_thinking_tokens {longest} and the {ending} tokens that "
                f"end thinking; it needs {needed}"
            )
    if least > thought + limit:
        raise InputError(f"min_thinking_tokens {least} is above max_tokens {limit}")
    if longest is not None and least > longest:
        raise InputError(
            f"min_thinking_tokens {least} is above what max_thinking_tokens 'auto' leaves, "
            f"{longest}"
        )


def _end_ids(chat: Chat) -> tuple[tuple[int, ...], ...]:
    """Ids of every text that ends thinking.

    Raises:
        InputError: a marker that does not tokenise as needed.
    """
    if chat.markers.single:
        return tuple((chat.marker_id(text),) for text in chat.markers.ends)
    ends = []
    for text in chat.markers.ends:
        ids = tuple(chat.encode(text))
        if not 0 < len(ids) <= LONGEST_END or chat.decode(ids) != text:
            raise InputError(
                f"{chat.where}: {text} must be 1 to {LONGEST_END} tokens that decode to it again, "
                f"it is {len(ids)}; choose other markers"
            )
        ends.append(ids)
    stops = sorted(chat.stop_ids) if chat.markers.stops_end else []
    return (*ends, *((i,) for i in stops))


def _holds(ids: Sequence[int], ends: tuple[tuple[int, ...], ...]) -> bool:
    """Whether any of the ends stands in the ids."""
    text = tuple(ids)
    return any(
        text[i : i + len(end)] == end for end in ends for i in range(len(text) - len(end) + 1)
    )


def _open_thinking(
    chat: Chat, prompt_ids: Sequence[int], ends: tuple[tuple[int, ...], ...]
) -> list[int] | None:
    """Ids after the prompt's last start marker, or None when they hold an end of thinking."""
    start = chat.encode(chat.markers.start)
    tail = chat.encode(chat.markers.opening.removeprefix(chat.markers.start))
    ids = list(prompt_ids)
    for i in range(len(ids) - len(start), -1, -1):
        if ids[i : i + len(start)] == start:
            after = ids[i + len(start) :]
            if tail and after[: len(tail)] == tail:  # of the marker, not of the thinking
                after = after[len(tail) :]
            return None if _holds(after, ends) else after
    raise InputError(
        f"prompt: a budget needs the start-of-thinking marker {chat.markers.start} in it"
    )
