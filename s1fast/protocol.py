"""What clients send, under OpenAI's and vLLM's names, and what the engine is asked for it.

A field is honoured or the request is refused with HTTP 400 naming it. A few that clients send
although they mean nothing are taken with the one value that means nothing (NEUTRAL).

`to_requests` joins a request with the server's defaults. Chats think; completions, whose prompt is
taken as it is, think only where the request names a budget.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from s1fast.budget import ANSWER_ROOM, Budget
from s1fast.chat import Chat
from s1fast.errors import InputError
from s1fast.flags import ThinkingFlags
from s1fast.request import Request, SamplingParams

MOST_CHOICES = 128
"""Prompts x samples x cells of one request."""
MOST_FIELDS = 200
"""Of one object: more than there are names."""

NEUTRAL: dict[str, Any] = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "repetition_penalty": 1,
    "logit_bias": {},
    "logprobs": False,
    "top_logprobs": 0,
    "best_of": 1,
    "echo": False,
    "suffix": None,
    "min_tokens": 0,
    "ignore_eos": False,
    "tools": [],
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "functions": [],
    "function_call": "none",
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "service_tier": "auto",
    "store": False,
    "include_reasoning": True,
    "add_generation_prompt": True,
    "continue_final_message": False,
    "skip_special_tokens": False,
}
"""Fields that are not honoured, with the value that asks for nothing; null does so as well."""

NEUTRAL_IN_MESSAGE = ("refusal", "audio", "annotations", "function_call", "tool_calls", "name")
"""What clients repeat of an earlier answer, as null."""


# -- the fields ---------------------------------------------------------------------------------


def _without(data: Any, neutral: Iterable[tuple[str, Any]]) -> Any:
    """The fields without those that ask for nothing."""
    if not isinstance(data, dict):
        return data
    if len(data) > MOST_FIELDS:
        raise ValueError(f"an object of {len(data)} fields, at most {MOST_FIELDS}")
    data = dict(data)
    for name, nothing in neutral:
        if name not in data:
            continue
        value = data[name]
        same = value == nothing and isinstance(value, bool) == isinstance(nothing, bool)
        if value is None or same:
            del data[name]
    return data


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("not valid Unicode") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]
Item = TypeVar("Item")
Listed = Annotated[list[Item], Field(fail_fast=True)]
"""Read up to its first error: a body can hold a million."""


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class TextPart(_Fields):
    type: Literal["text"]
    text: Text


class ChatMessage(_Fields):
    """A turn. What an assistant thought in an earlier one is not shown to the model again, as it
    was not in training."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Listed[TextPart]
    type: Literal["text"] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        return _without(data, ((name, None) for name in NEUTRAL_IN_MESSAGE))

    @model_validator(mode="after")
    def _check(self) -> ChatMessage:
        if self.role != "assistant" and (self.reasoning or self.reasoning_content):
            raise ValueError(f"reasoning is the assistant's, not of role {self.role}")
        return self

    def plain(self) -> dict[str, str]:
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Fields):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: Literal[False] | None = None


Limit = Annotated[int, Field(ge=-1)] | Literal["auto"]
"""Most thinking tokens; -1 for no limit of its own, "auto" for what the context leaves."""
Count = Annotated[int, Field(ge=0)]
Short = Annotated[Text, Field(max_length=10_000)]

BUDGET_FIELDS = (
    "thinking_token_budget",
    "max_thinking_tokens",
    "min_thinking_tokens",
    "num_ignore",
    "ignore_text",
    "final_text",
    "budgets",
    "num_ignores",
)


class Asked(_Fields):
    """What chats and completions have in common."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: float | None = None
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Short | Annotated[list[Short], Field(max_length=64)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=1024)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    thinking_token_budget: Limit | None = None
    max_thinking_tokens: Limit | None = None
    min_thinking_tokens: Count | None = None
    num_ignore: Count | None = None
    ignore_text: Short | Annotated[list[Short], Field(min_length=1, max_length=64)] | None = None
    final_text: Short | None = None
    budgets: Annotated[list[Limit | None], Field(min_length=1, max_length=64)] | None = None
    num_ignores: Annotated[list[Count | None], Field(min_length=1, max_length=64)] | None = None

    prompt_field: ClassVar[str]

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        return _without(data, NEUTRAL.items())

    @model_validator(mode="after")
    def _check(self) -> Asked:
        def both(a: str, b: str) -> None:
            if getattr(self, a) is not None and getattr(self, b) is not None:
                raise ValueError(f"{b} and {a} say the same; give one")

        both("thinking_token_budget", "max_thinking_tokens")
        both("budgets", "thinking_token_budget")
        both("budgets", "max_thinking_tokens")
        both("num_ignores", "num_ignore")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def cells(self) -> int:
        return len(self.budgets or "1") * len(self.num_ignores or "1")

    @property
    def choices(self) -> int:
        return (self.n or 1) * self.cells

    @property
    def is_tree(self) -> bool:
        return self.budgets is not None or self.num_ignores is not None

    def given(self, names: Iterable[str]) -> list[str]:
        """Those of the fields that the request has."""
        return [name for name in names if getattr(self, name, None) is not None]


class ChatAsked(Asked):
    """POST /v1/chat/completions"""

    messages: Annotated[Listed[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    reasoning_effort: Literal["none"] | None = None

    prompt_field = "messages"

    @model_validator(mode="after")
    def _check_chat(self) -> ChatAsked:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_completion_tokens and max_tokens say the same; give one")
        budget = self.given(BUDGET_FIELDS)
        if self.reasoning_effort and budget:
            raise ValueError(f"{budget[0]} cannot go with reasoning_effort none")
        return self


class CompletionAsked(Asked):
    """POST /v1/completions: the prompt as it is, texts or token ids."""

    prompt: Text | Listed[Text] | Listed[int] | Listed[Listed[int]]

    prompt_field = "prompt"

    @property
    def prompts(self) -> list[str | list[int]]:
        prompt = self.prompt
        if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int):
            return [prompt]  # type: ignore[list-item]
        return list(prompt)

    @property
    def choices(self) -> int:
        return len(self.prompts) * super().choices

    @model_validator(mode="after")
    def _check_completion(self) -> CompletionAsked:
        if self.stream and len(self.prompts) > 1:
            raise ValueError("prompt must be one where stream is true")
        return self


# -- what the engine is asked -------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Defaults(ThinkingFlags):
    """What a request gets that does not say it."""

    max_thinking_tokens: int | Literal["auto", "none"] = "auto"
    """Most thinking tokens of a chat: a count, auto (what the context leaves), or none."""

    def __post_init__(self) -> None:
        Budget(
            max_thinking_tokens=self.longest,
            min_thinking_tokens=self.min_thinking_tokens,
            num_ignore=self.num_ignore,
            ignore_text=self.ignore_text,
            final_text=self.final_text,
        )
        SamplingParams(temperature=self.temperature)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InputError(f"max_tokens must be at least 1, got {self.max_tokens}")

    @property
    def longest(self) -> int | Literal["auto"] | None:
        return None if self.max_thinking_tokens == "none" else self.max_thinking_tokens


def to_requests(asked: Asked, chat: Chat, context: int, defaults: Defaults) -> list[Request]:
    """One Request a prompt.

    Raises:
        InputError: what the engine could not honour.
    """
    if isinstance(asked, CompletionAsked):
        prompts = [_ids(p, chat, context) for p in asked.prompts]
        thinks = bool(asked.given(BUDGET_FIELDS))
        limit = asked.max_tokens
    else:
        assert isinstance(asked, ChatAsked)
        thinks = asked.reasoning_effort is None
        plain = [message.plain() for message in asked.messages]
        prompts = [_ids(chat.prompt_text(plain, think=thinks), chat, context)]
        limit = asked.max_completion_tokens or asked.max_tokens
    requests = []
    for ids in prompts:
        room = context - len(ids)
        most = (
            limit if limit is not None else defaults.max_tokens and min(defaults.max_tokens, room)
        )
        params = _params(asked, most, defaults)
        longest = room if most is None else most
        budget = _budget(asked, chat, longest, defaults) if thinks else None
        budgets = None
        if asked.budgets is not None:
            budgets = [None if b == -1 else b for b in asked.budgets]
        requests.append(
            Request(
                prompt=ids,
                params=params,
                budget=budget,
                budgets=budgets,
                num_ignores=asked.num_ignores,
            )
        )
    return requests


def _ids(prompt: str | list[int], chat: Chat, context: int) -> list[int]:
    """A prompt's. One that is far too long is refused before all of it has been tokenised."""
    if isinstance(prompt, str):
        size, count = max(context, 4096), 0
        for at in range(0, len(prompt) if len(prompt) > 8 * size else 0, size):
            count += len(chat.encode(prompt[at : at + size]))
            if count > 2 * size:  # the cuts between them add a few
                raise InputError(f"prompt of over {size} tokens passes the context of {context}")
        prompt = chat.encode(prompt)
    if len(prompt) >= context:
        raise InputError(f"prompt of {len(prompt)} tokens passes the model's context of {context}")
    return prompt


def _params(asked: Asked, max_tokens: int | None, defaults: Defaults) -> SamplingParams:
    temperature = defaults.temperature if asked.temperature is None else asked.temperature
    seed = asked.seed
    if seed is None:  # as elsewhere: who wants the same again says which
        seed = random.getrandbits(63) if temperature else 0
    return SamplingParams(
        temperature=temperature,
        top_k=max(0, asked.top_k or 0),
        top_p=1.0 if asked.top_p is None else asked.top_p,
        min_p=asked.min_p or 0.0,
        seed=seed,
        n=asked.n or 1,
        max_tokens=max_tokens,
        stop=[asked.stop] if isinstance(asked.stop, str) else asked.stop or [],
        stop_token_ids=asked.stop_token_ids or [],
    )


def _budget(asked: Asked, chat: Chat, limit: int, defaults: Defaults) -> Budget:
    final = defaults.final_text if asked.final_text is None else asked.final_text
    longest: int | Literal["auto"] | None = asked.thinking_token_budget
    if longest is None:
        longest = asked.max_thinking_tokens
    if longest is None and asked.budgets is None:
        forced = len(chat.encode(f"\n{chat.markers.answer}\n{final}"))
        longest = _fitting(defaults.longest, limit, forced)
    elif longest == -1:
        longest = None
    least = asked.min_thinking_tokens
    if least is None:  # a default does not stand in the way of what was asked
        maxima = [longest] if asked.budgets is None else asked.budgets
        counts = [b for b in maxima if isinstance(b, int) and b >= 0]
        least = min([defaults.min_thinking_tokens, max(0, limit), *counts])
    ignores = asked.num_ignore
    if ignores is None and asked.num_ignores is None:
        ignores = defaults.num_ignore
    text = defaults.ignore_text if asked.ignore_text is None else asked.ignore_text
    return Budget(
        max_thinking_tokens=longest,
        min_thinking_tokens=least,
        num_ignore=ignores,
        ignore_text=text,
        final_text=final,
    )


def _fitting(
    longest: int | Literal["auto"] | None, limit: int, forced: int
) -> int | Literal["auto"] | None:
    """The server's own maximum as far as `limit` tokens hold it, the end of thinking and an answer.
    Where they are few, half of them is the answer's; where they do not even hold the end, there is
    nothing to force."""
    room = limit - forced
    if longest is None or room < 1:
        return None
    if room >= 2 * ANSWER_ROOM:
        return "auto" if longest == "auto" else min(longest, room - ANSWER_ROOM)
    half = room // 2
    return half if longest == "auto" else min(longest, half)
