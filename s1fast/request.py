"""What goes into the engine and what comes out: sampling parameters, requests, pieces, completions.

A request is one prompt; compiled, it is `Cell`s per sample. Without a grid there is one cell, the
budget that was asked for. With `budgets` or `num_ignores` there is one per pair (tree.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from s1fast.automaton import Program
from s1fast.budget import Budget, check_fields, compile_program
from s1fast.chat import Chat, Message
from s1fast.errors import InputError

COLDEST, HOTTEST = 1e-6, 1e6
"""Temperatures above 0: logits divided by them stay far inside fp32."""

MOST_LOGPROBS = 100

Prompt = str | Sequence[int] | Sequence[Message]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn, under vLLM's names. Raises an InputError naming a bad field."""

    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """Sample among the k likeliest; 0 for all."""
    top_p: float = 1.0
    """Sample among the likeliest that together have this probability."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the likeliest."""
    seed: int = 0
    """A request's draws depend on this, the sample's index and the position alone."""
    n: int = 1
    """Samples per prompt."""
    max_tokens: int | None = None
    """Most tokens generated, thinking and appended texts included; None for the whole context."""
    stop: Sequence[str] = ()
    """Texts that end the answer; they are not part of it."""
    stop_token_ids: Sequence[int] = ()
    """Further ids that end the answer, beside the model's own."""
    logprobs: int | None = None
    """Tell the log-probability of every drawn token, and of so many likeliest beside it."""

    def __post_init__(self) -> None:
        rules = [
            (
                "temperature",
                _number(self.temperature, 0, HOTTEST) and not 0 < self.temperature < COLDEST,
                f"0 or a number in {COLDEST:g}..{HOTTEST:g}",
            ),
            ("top_k", type(self.top_k) is int and self.top_k >= 0, "a count"),
            ("top_p", _number(self.top_p, 0, 1) and self.top_p > 0, "in (0, 1]"),
            ("min_p", _number(self.min_p, 0, 1), "in [0, 1]"),
            ("seed", type(self.seed) is int and 0 <= self.seed < 1 << 64, "in 0..2^64-1"),
            ("n", type(self.n) is int and self.n >= 1, "at least 1"),
            ("stop", _all_are(self.stop, str) and all(self.stop), "a list of non-empty texts"),
            (
                "stop_token_ids",
                _all_are(self.stop_token_ids, int)
                and all(0 <= i < 1 << 31 for i in self.stop_token_ids),
                "a list of ids",
            ),
            (
                "logprobs",
                self.logprobs is None
                or (type(self.logprobs) is int and 0 <= self.logprobs <= MOST_LOGPROBS),
                f"None or in 0..{MOST_LOGPROBS}",
            ),
        ]
        check_fields(self, rules)


def _number(value: object, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high  # type: ignore[operator]


def _all_are(values: object, kind: type) -> bool:
    return isinstance(values, list | tuple) and all(type(value) is kind for value in values)


Kind = Literal["thinking", "answer", "ignore", "end"]
"""Of a piece of output: what the model thought or answered, an appended ignore text, and the marker
(with the final text, when thinking was cut) that leads from thinking to the answer."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of one kind, as it is streamed."""

    index: int
    """Which prompt."""
    sample: int
    """Which of its n samples."""
    kind: Kind
    text: str
    ids: tuple[int, ...]


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """The same in as few pieces as tell their kinds; every ignore text stays one of its own."""
    made: list[Piece] = []
    for kind, neighbours in groupby(pieces, lambda piece: piece.kind):
        same = list(neighbours)
        if kind != "ignore":
            text = "".join(piece.text for piece in same)
            ids = tuple(i for piece in same for i in piece.ids)
            same = [dataclasses.replace(same[0], text=text, ids=ids)]
        made += same
    return made


@dataclass(frozen=True, slots=True)
class Logprob:
    """How likely a drawn token was: log softmax of the logits as they are, over the tokenizer's
    ids, before temperature, filters and masks."""

    logprob: float
    top: tuple[tuple[int, float], ...]
    """(id, log-probability) of the likeliest, the likeliest first."""


@dataclass
class Completion:
    """One finished sample."""

    index: int
    sample: int
    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    """Everything after the prompt, appended ids included, the final stop id not."""
    thinking: str = ""
    """What was thought, ignore texts included."""
    answer: str = ""
    """What follows the answer marker, final text included."""
    thinking_tokens: int = 0
    waits_used: int = 0
    thinking_end: Literal["natural", "length"] | None = None
    """How thinking ended; None if it never began or never ended."""
    finish_reason: Literal["stop", "length"] | None = None
    budget: Budget | None = None
    """The budget that it ran under: of a grid, its own cell's."""
    pieces: list[Piece] = field(default_factory=list)
    logprobs: list[Logprob | None] | None = None
    """Per token of token_ids, None for appended ones; only if asked for."""
    steps: int = field(default=0, compare=False)
    """Tokens drawn on the way to it, dropped ones included: its steps if it had run alone."""
    shared_steps: int = field(default=0, compare=False)
    """How many of them were drawn for another cell of its tree already."""
    cached_tokens: int = field(default=0, compare=False)
    """Tokens, prompt included, whose keys and values were there before it began."""


@dataclass(frozen=True)
class Cost:
    """What completions cost together, against what each alone would have cost."""

    steps: int
    """Tokens drawn: a row's steps through the model."""
    separate_steps: int
    tokens: int
    """Tokens that went through the model, prompts and appended texts included."""
    separate_tokens: int


def cost(done: Sequence[Completion]) -> Cost:
    """Adds up completions, as a tree or a shared prompt saved them work."""
    steps = sum(c.steps for c in done)
    tokens = sum(len(c.prompt_ids) + len(c.token_ids) for c in done)
    return Cost(
        steps=steps - sum(c.shared_steps for c in done),
        separate_steps=steps,
        tokens=tokens - sum(c.cached_tokens for c in done),
        separate_tokens=tokens,
    )


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt with all that is asked of it."""

    prompt: Prompt
    """A question, a conversation, or token ids that are taken as they are. Questions and
    conversations go through the chat template, and with a budget end with the start of thinking."""
    params: SamplingParams = SamplingParams()
    budget: Budget | None = None
    """None for plain generation."""
    budgets: Sequence[int | Literal["auto"] | None] | None = None
    """Values of max_thinking_tokens, one completion each."""
    num_ignores: Sequence[int | None] | None = None
    """Values of num_ignore, one completion each, for each of the budgets."""

    @property
    def is_tree(self) -> bool:
        return self.budgets is not None or self.num_ignores is not None

    def grid(self) -> list[Budget | None]:
        """The cells' budgets, budgets first."""
        if not self.is_tree:
            return [self.budget]
        base = self.budget or Budget()
        longest = self.budgets if self.budgets is not None else [base.max_thinking_tokens]
        ignores = self.num_ignores if self.num_ignores is not None else [base.num_ignore]
        for name, values in (("budgets", longest), ("num_ignores", ignores)):
            if not isinstance(values, list | tuple) or not values:
                raise InputError(f"{name} must be a list with at least one value, got {values!r}")
        return [
            dataclasses.replace(base, max_thinking_tokens=b, num_ignore=n)
            for b in longest
            for n in ignores
        ]


@dataclass(frozen=True)
class Cell:
    """One completion to be made, of each sample."""

    number: int
    """Its place in the grid."""
    budget: Budget | None
    program: Program


def compile_request(request: Request, chat: Chat, context: int) -> tuple[list[int], list[Cell]]:
    """A request as token ids and cells.

    Raises:
        InputError: naming what cannot be honoured.
    """
    grid, params = request.grid(), request.params
    ids = _prompt_ids(request.prompt, chat, think=grid[0] is not None)
    cells = []
    for number, budget in enumerate(grid):
        program = compile_program(
            budget,
            chat,
            ids,
            context=context,
            max_tokens=params.max_tokens,
            stop_ids=chat.stop_ids | frozenset(params.stop_token_ids),
        )
        cells.append(Cell(number, budget, program))
    return ids, cells


def _prompt_ids(prompt: Prompt, chat: Chat, *, think: bool) -> list[int]:
    if isinstance(prompt, str):
        if not prompt:
            raise InputError("prompt: empty")
        return chat.prompt_ids(prompt, think=think)
    if prompt and isinstance(prompt[0], dict):
        return chat.prompt_ids(prompt, think=think)  # type: ignore[arg-type]
    ids = list(prompt)
    bad = [i for i in ids if type(i) is not int or not 0 <= i < chat.vocab_size]
    if bad:
        raise InputError(f"prompt: {bad[0]!r} is no token id below {chat.vocab_size}")
    return ids  # type: ignore[return-value]
