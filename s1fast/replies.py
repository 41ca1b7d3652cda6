"""What clients get: completions as OpenAI's JSON, pieces as the chunks of a stream.

Thinking, ignore texts included, is `reasoning` (vLLM's name) and `reasoning_content` (everybody
else's); what follows the answer's marker is the content, so a forced "Final Answer:" stands in it.
Every choice tells its interventions as `s1`, every chunk of a stream what kind of text it brings.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from s1fast.budget import Budget
from s1fast.protocol import Asked, ChatAsked
from s1fast.request import Completion, Piece, cost

DONE = b"data: [DONE]\n\n"


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return (
        b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
    )


def told(done: Completion) -> dict[str, Any]:
    """A completion's interventions."""
    return {
        "waits_used": done.waits_used,
        "forced_end": done.thinking_end == "length",
        "thinking_tokens": done.thinking_tokens,
    }


def cached_prompt(done: Sequence[Completion]) -> int:
    """Tokens of the prompt of all these choices that none of them had to compute."""
    return min(len(done[0].prompt_ids), *(c.cached_tokens for c in done))


def usage(done: Sequence[Completion], prompts: int = 1) -> dict[str, Any]:
    """Of all choices of a request, as many for each of its prompts, which count once."""
    count = len(done) // prompts
    of_prompts = [done[at : at + count] for at in range(0, len(done), count)]
    prompt = sum(len(choices[0].prompt_ids) for choices in of_prompts)
    completion = sum(len(c.token_ids) for c in done)
    thinking = sum(c.thinking_tokens for c in done)
    s1: dict[str, Any] = {
        "waits_used": sum(c.waits_used for c in done),
        "forced_end": any(c.thinking_end == "length" for c in done),
        "thinking_tokens": thinking,
    }
    spent = cost(done)
    if spent.steps < spent.separate_steps:  # a tree: what it saved
        s1 |= {"steps": spent.steps, "separate_steps": spent.separate_steps}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "completion_tokens_details": {"reasoning_tokens": thinking},
        "prompt_tokens_details": {"cached_tokens": sum(map(cached_prompt, of_prompts))},
        "s1": s1,
    }


class Writer:
    """The bodies and chunks of one request."""

    def __init__(self, asked: Asked, name: str, marker: str, model: str, created: int) -> None:
        self.chat, self._tree = isinstance(asked, ChatAsked), asked.is_tree
        self._marker = marker
        self._head = {"id": name, "created": created, "model": model}
        self._object = "chat.completion" if self.chat else "text_completion"
        self._ends: dict[int, str] = {}
        """By choice: the text that led from thinking to the answer, as far as it has come."""

    def whole(self, done: Sequence[Completion], prompts: int) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = []
        for index, completion in enumerate(done):
            fields = self._message(completion) if self.chat else {"text": _text(completion)}
            choices.append({"index": index, **fields, **self._closing(completion)})
        counts = usage(done, prompts)
        return {**self._head, "object": self._object, "choices": choices, "usage": counts}

    def opening(self, choices: int) -> list[bytes]:
        """The chunks that say who speaks."""
        if not self.chat:
            return []
        said = {"role": "assistant", "content": ""}
        return [self._chunk({"index": i, "delta": said, **_OPEN}) for i in range(choices)]

    def piece(self, index: int, piece: Piece, tokens: int) -> bytes:
        """The chunk of a piece; `tokens` counts those before it too that had no text yet."""
        s1: dict[str, Any] = {"kind": piece.kind, "tokens": tokens}
        if piece.kind == "end":
            s1["text"] = piece.text
        if not self.chat:
            return self._chunk({"index": index, "text": piece.text, **_OPEN, "s1": s1})
        delta: dict[str, Any] = {"content": piece.text}
        if piece.kind in ("thinking", "ignore"):
            delta = {"reasoning": piece.text, "reasoning_content": piece.text}
        elif piece.kind == "end":  # of it, what stands behind the marker is the answer's
            before = self._ends.get(index, "")
            self._ends[index] = before + piece.text
            shown = before.partition(self._marker)[2]
            delta = {"content": self._ends[index].partition(self._marker)[2][len(shown) :]}
        return self._chunk({"index": index, "delta": delta, **_OPEN, "s1": s1})

    def closing(self, index: int, done: Completion) -> bytes:
        """The last chunk of a choice."""
        nothing: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        return self._chunk({"index": index, **nothing, **self._closing(done)})

    def usage(self, done: Sequence[Completion]) -> bytes:
        return self._chunk(None, usage=usage(done))

    def _chunk(self, choice: dict[str, Any] | None, **fields: Any) -> bytes:
        name = "chat.completion.chunk" if self.chat else self._object
        choices = [] if choice is None else [choice]
        return event({**self._head, "object": name, "choices": choices, **fields})

    def _message(self, done: Completion) -> dict[str, Any]:
        thinking = done.thinking or None
        fields = {"reasoning": thinking, "reasoning_content": thinking}
        return {"message": {"role": "assistant", "content": done.answer, **fields}}

    def _closing(self, done: Completion) -> dict[str, Any]:
        s1 = told(done)
        if self._tree:
            assert isinstance(done.budget, Budget)
            s1["max_thinking_tokens"] = done.budget.max_thinking_tokens
            s1["num_ignore"] = done.budget.num_ignore
        return {"logprobs": None, "finish_reason": done.finish_reason, "s1": s1}


_OPEN = {"logprobs": None, "finish_reason": None}


def _text(done: Completion) -> str:
    return "".join(piece.text for piece in done.pieces)
