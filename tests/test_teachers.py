"""The other teachers: an OpenAI-compatible server, by the real client, and our own engine."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from s1fast.errors import InputError
from s1fast.recipes.features import teacher_of
from s1fast.recipes.teachers import (
    OurEngine,
    Rejected,
    Reply,
    Sampling,
    Unavailable,
    _fail,
    make_teacher,
)

pytest.importorskip("openai", reason="no openai; unproven: OpenAI-compatible teachers")


class Handler(BaseHTTPRequestHandler):
    code, body = 200, b""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.code)
        self.send_header("Retry-After", "7")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


Ask = Callable[[int, Any], Reply]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ask]:
    """Asks a server that answers with that code and body."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def run(code: int, body: Any) -> Reply:
        Handler.code, Handler.body = code, json.dumps(body).encode()
        url = f"http://127.0.0.1:{server.server_port}/v1"

        async def once() -> Reply:
            teacher = make_teacher("openai", "m", url, Sampling(max_tokens=9))
            try:
                return await teacher.ask("Q?", "be brief")
            finally:
                await teacher.aclose()

        return asyncio.run(once())

    yield run
    server.shutdown()
    server.server_close()


def chat(message: dict[str, Any], reason: str = "stop", **details: int) -> dict[str, Any]:
    usage: dict[str, Any] = {"prompt_tokens": 5, "completion_tokens": 30, "total_tokens": 35}
    if details:
        usage["completion_tokens_details"] = details
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": reason}
    shared = {"id": "x", "object": "chat.completion", "created": 1, "model": "m"}
    return {**shared, "choices": [choice], "usage": usage}


def test_thinking_apart_and_counted(ask: Ask) -> None:
    told = ask(200, chat({"content": "A", "reasoning_content": "T"}, reasoning_tokens=20))
    assert (told.thinking, told.answer, told.thoughts_tokens, told.answer_tokens) == (
        "T",
        "A",
        20,
        10,
    )
    for text in ("<think>\nT\n</think>\n\nA", "T\n</think>\n\nA"):  # or the prompt opens it
        inline = ask(200, chat({"content": text}))
        assert (inline.thinking, inline.answer, inline.thoughts_tokens) == ("T", "A", None)
    cut = ask(200, chat({"content": "<think>\nT"}, "length"))
    assert (cut.thinking, cut.answer, cut.finish_reason) == ("T", "", "length")
    half = ask(200, chat({"content": "A\ud83d", "reasoning": "\ud83d\ude00"}))
    assert (half.thinking, half.answer) == ("\U0001f600", "A\ufffd")
    assert (inline.prompt_tokens, inline.answer_tokens) == (5, 30)
    assert ask(200, chat({"content": None}, "content_filter")).refused == "content_filter"


def test_errors(ask: Ask) -> None:
    with pytest.raises(Unavailable, match="HTTP 429") as limited:
        ask(429, {"error": {"message": "slow down"}})
    assert limited.value.retry_after_s == 7
    for words in ("Please retry in 34.5s.", "Rate limit. Try again in 34.5s"):
        told = _fail(429, words, "m", "key", {})
        assert isinstance(told, Unavailable) and told.retry_after_s == 34.5
    for body in ({"choices": [{"finish_reason": "error"}]}, {"choices": []}, {}, "busy", None):
        with pytest.raises(Unavailable, match="no choice with a message"):
            ask(200, body)
    broke = ((402, "Insufficient Balance"), (429, "insufficient_quota: check your plan"))
    for code, message in broke:
        with pytest.raises(InputError, match="no credit left"):
            ask(code, {"error": {"message": message, "code": message.split(":")[0]}})
    kinds = ((401, InputError, "key was refused"), (404, InputError, "unknown"))
    for code, kind, naming in (*kinds, (400, Rejected, "rejects"), (413, Rejected, "rejects")):
        with pytest.raises(kind, match=naming) as refused:
            ask(code, {"error": {"message": "bad sk-secret"}})
        assert "sk-secret" not in str(refused.value)


def test_our_engine_answers_in_batches(make_model: Callable[..., Path]) -> None:
    """Two together as each alone; what does not fit the context is cut by it, or rejected."""
    model = make_model("qwen2", hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    teacher = OurEngine(str(model), Sampling(max_tokens=12), think=False)

    async def both() -> list[Reply]:
        return await asyncio.gather(teacher.ask("2 + 2?"), teacher.ask("3 + 3?"))

    replies = asyncio.run(both())
    stats = teacher._engine.stats
    assert all(0 < r.answer_tokens <= 12 for r in replies)
    assert stats.drawn > stats.steps, "they shared steps"
    alone = asyncio.run(teacher.ask("2 + 2?"))
    assert alone == replies[0]
    context = teacher._engine.context
    teacher._params = dataclasses.replace(teacher._params, max_tokens=context)
    whole = asyncio.run(teacher.ask("2 + 2?"))
    assert whole.answer_tokens == context - whole.prompt_tokens or whole.finish_reason == "stop"
    with pytest.raises(Rejected, match="context"):
        asyncio.run(teacher.ask("2 + 2? " * context))


@pytest.mark.parametrize("spec", ["gemini", "engine:", "oracle:m"])
def test_teachers_by_flag(spec: str) -> None:
    with pytest.raises(InputError, match=r"--solver|teacher 'oracle'"):
        teacher_of(spec, Sampling(), "--solver")
