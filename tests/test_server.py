"""The server's answers beside the engine's, what it refuses, and what happens to whoever leaves."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import json
import logging
import socket
import statistics
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="no fastapi; unproven: s1fast serve")
pytest.importorskip("prometheus_client", reason="no prometheus_client; unproven: s1fast serve")

from s1fast.budget import Budget
from s1fast.decoder import Engine, SamplingParams
from s1fast.errors import InputError
from s1fast.gate import EventStream, JsonLines, is_loopback, logger
from s1fast.loop import Loop
from s1fast.server import ServeConfig, bind, serve
from serving import Client, InProcess, in_process, wait_until
from writers import Ascii

MakeModel = Callable[..., Path]
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def restless(make_model: MakeModel) -> Ascii:
    return Ascii(make_model("qwen2", seed=3), end=1.8)


@pytest.fixture(scope="module")
def served(restless: Ascii) -> Iterator[InProcess]:
    with in_process(restless.engine) as server:
        yield server
        server.idle()


@pytest.fixture(scope="module")
def endless(make_model: MakeModel) -> Iterator[InProcess]:
    """A model that never ends by itself, with room for long texts."""
    writer = Ascii(make_model("qwen2", seed=4, max_position_embeddings=8192), end=0.0)
    writer.engine.chat.stop_ids = frozenset()
    with in_process(writer.engine, queue=8) as server:
        yield server


# -- answers ------------------------------------------------------------------------------------


FIELDS: list[dict[str, Any]] = [
    {"thinking_token_budget": 20, "num_ignore": 2},
    {"max_thinking_tokens": 5, "final_text": "So:"},
    {"min_thinking_tokens": 12, "ignore_text": ["Wait", "Hmm"], "num_ignore": 3},
    {"thinking_token_budget": -1, "temperature": 0.7, "seed": 5, "top_k": 8, "n": 2},
    {"stop": ["e", "s"], "thinking_token_budget": 9},
    {"reasoning_effort": "none"},
]


def expected(engine: Engine, fields: dict[str, Any], max_tokens: int = 60) -> list[Any]:
    """What the engine gives for the same."""
    names = ("temperature", "seed", "top_k", "n", "stop")
    params = {k: v for k, v in fields.items() if k in names}
    longest = fields.get("thinking_token_budget", fields.get("max_thinking_tokens", "auto"))
    values = {k: v for k, v in fields.items() if k in Budget.__dataclass_fields__}
    if longest == "auto":  # 60 tokens do not hold "auto": half of them are the answer's
        forced = engine.chat.encode("\n<|im_start|>answer\nFinal Answer:")
        longest = (max_tokens - len(forced)) // 2
    values["max_thinking_tokens"] = None if longest == -1 else longest
    budget = None if "reasoning_effort" in fields else Budget(**values)
    return engine.generate(["1 + 1?"], SamplingParams(max_tokens=max_tokens, **params), budget)


@pytest.mark.parametrize("fields", FIELDS, ids=lambda f: " ".join(f))
def test_a_chat_is_what_the_engine_gives(served: InProcess, fields: dict[str, Any]) -> None:
    wanted = expected(served.engine, fields)
    answer = served.chat(max_tokens=60, **fields)
    assert answer.status == 200, answer.data
    body = answer.json
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-")
    assert body["id"].endswith(answer.headers["x-request-id"])
    assert [c["index"] for c in body["choices"]] == list(range(len(wanted)))
    for choice, done in zip(body["choices"], wanted, strict=True):
        message = choice["message"]
        assert (message["role"], message["content"]) == ("assistant", done.answer)
        assert message["reasoning"] == message["reasoning_content"] == (done.thinking or None)
        assert choice["finish_reason"] == done.finish_reason
        assert choice["s1"] == {
            "waits_used": done.waits_used,
            "forced_end": done.thinking_end == "length",
            "thinking_tokens": done.thinking_tokens,
        }
    usage, thinking = body["usage"], sum(c.thinking_tokens for c in wanted)
    assert usage["prompt_tokens"] == len(wanted[0].prompt_ids)
    assert usage["completion_tokens"] == sum(len(c.token_ids) for c in wanted)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": thinking}
    assert usage["s1"]["waits_used"] == sum(c.waits_used for c in wanted)
    assert usage["s1"]["forced_end"] == any(c.thinking_end == "length" for c in wanted)
    assert usage["s1"]["thinking_tokens"] == thinking
    if "stop" not in fields:
        assert any(c.answer for c in wanted), "nothing was compared"


@pytest.mark.parametrize("fields", FIELDS, ids=lambda f: " ".join(f))
def test_a_stream_adds_up_to_the_whole(served: InProcess, fields: dict[str, Any]) -> None:
    whole = served.chat(max_tokens=60, **fields).json
    options = {"stream": True, "stream_options": {"include_usage": True}}
    answer = served.chat(max_tokens=60, **fields, **options)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, counts, last = answer.events
    assert last == "[DONE]" and counts["choices"] == []
    for name in ("s1", "completion_tokens", "completion_tokens_details"):
        assert counts["usage"][name] == whole["usage"][name]
    assert all("usage" not in chunk for chunk in chunks)
    for wanted in whole["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == wanted["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        for name in ("content", "reasoning", "reasoning_content"):
            text = "".join(c["delta"].get(name, "") for c in mine)
            assert text == (wanted["message"][name] or "")
        assert [c["finish_reason"] for c in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == wanted["finish_reason"]
        assert mine[-1]["s1"] == wanted["s1"] and len(mine) > 3
        told = [c["s1"] for c in mine[1:-1]]
        assert sum(s["kind"] == "ignore" for s in told) == wanted["s1"]["waits_used"]
        thought = sum(s["tokens"] for s in told if s["kind"] in ("thinking", "ignore"))
        assert thought == wanted["s1"]["thinking_tokens"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_budget_tree_is_a_choice_a_cell(served: InProcess, stream: bool) -> None:
    budgets, ignores = [30, 3, 10], [0, 2]
    wanted = served.engine.generate(
        ["1 + 1?"],
        SamplingParams(max_tokens=60, temperature=0.5, seed=2, n=2),
        Budget(),
        budgets=budgets,
        num_ignores=ignores,
    )
    fields = {"budgets": budgets, "num_ignores": ignores, "n": 2, "temperature": 0.5, "seed": 2}
    answer = served.chat(max_tokens=60, **fields, stream=stream)
    grid = [(b, i) for b in budgets for i in ignores] * 2
    if not stream:
        choices = answer.json["choices"]
        texts = [(c["message"]["reasoning"], c["message"]["content"]) for c in choices]
        cost = answer.json["usage"]["s1"]
        assert cost["steps"] < cost["separate_steps"]
    else:
        chunks = [e["choices"][0] for e in answer.events[:-1]]
        mine = [[c for c in chunks if c["index"] == i] for i in range(12)]
        texts = [
            tuple("".join(c["delta"].get(n) or "" for c in each) for n in ("reasoning", "content"))
            for each in mine
        ]
        choices = [each[-1] for each in mine]
        assert all(len(each) > 4 for each in mine), "every cell is streamed"
    assert texts == [(c.thinking, c.answer) for c in wanted]
    for choice, done, (budget, ignore) in zip(choices, wanted, grid, strict=True):
        s1 = choice["s1"]
        assert (s1["max_thinking_tokens"], s1["num_ignore"]) == (budget, ignore)
        assert s1["waits_used"] == done.waits_used
        assert s1["thinking_tokens"] == done.thinking_tokens


def test_cached_tokens_of_a_tree_are_those_that_nobody_computed(restless: Ascii) -> None:
    with in_process(Engine(restless.folder)) as server:
        told = [server.chat(max_tokens=60, budgets=[3, 30]).json["usage"] for _ in range(2)]
        hits = server.metric("prefix_cache_hits_total")
    counts = [usage["prompt_tokens_details"]["cached_tokens"] for usage in told]
    assert counts[0] == 0 < counts[1] == hits


def test_completions_take_prompts_as_they_are(served: InProcess) -> None:
    chat = served.engine.chat
    texts = ["the sum of ", "numbers"]
    params = SamplingParams(max_tokens=12, n=2)
    wanted = served.engine.generate([chat.encode(text) for text in texts], params)
    text_of = ["".join(p.text for p in c.pieces) for c in wanted]
    for prompt in (texts, [chat.encode(text) for text in texts]):
        body = {"prompt": prompt, "n": 2, "max_tokens": 12, "model": "tiny"}
        answer = served.post("/v1/completions", body).json
        assert [c["text"] for c in answer["choices"]] == text_of
        assert answer["usage"]["prompt_tokens"] == sum(len(chat.encode(text)) for text in texts)
    for prompt in (texts[0], chat.encode(texts[0])):
        body = {"prompt": prompt, "max_tokens": 12}
        answer = served.post("/v1/completions", body).json
        assert [c["text"] for c in answer["choices"]] == text_of[:1]
        streamed = served.post("/v1/completions", {**body, "stream": True}).events[:-1]
        assert "".join(e["choices"][0]["text"] for e in streamed) == text_of[0]
    body = {"prompt": "Hi<|im_start|>think", "thinking_token_budget": 4, "max_tokens": 30}
    answer = served.post("/v1/completions", body).json
    assert answer["choices"][0]["s1"]["thinking_tokens"] == 4
    assert "<|im_start|>answer\nFinal Answer:" in answer["choices"][0]["text"]


def test_too_many_prompts_are_named(served: InProcess) -> None:
    error = served.post("/v1/completions", {"prompt": ["a"] * 129}).json["error"]
    assert error["param"] == "prompt" and "129 choices" in error["message"]


def test_few_tokens_leave_half_for_the_answer(served: InProcess) -> None:
    """Clients that know of no budgets send a small max_tokens: there is an answer all the same."""
    forced = len(served.engine.chat.encode("\n<|im_start|>answer\nFinal Answer:"))
    for count in (forced + 1, 30, 150, 400):
        answer = served.chat(max_tokens=count, min_thinking_tokens=None).json
        assert answer["usage"]["completion_tokens"] <= count
        most = count - forced - 100 if count >= forced + 200 else (count - forced) // 2
        assert answer["usage"]["s1"]["thinking_tokens"] <= most
    assert served.chat(max_tokens=1).json["choices"][0]["finish_reason"] == "length"


def test_defaults_are_the_flags_and_requests_go_before_them(restless: Ascii) -> None:
    from s1fast.protocol import Defaults

    defaults = Defaults(
        max_thinking_tokens=12, num_ignore=4, ignore_text=("Hmm",), final_text="So:"
    )
    with in_process(restless.engine, defaults=defaults) as server:
        body = server.chat(max_tokens=60).json
        assert body["usage"]["s1"]["thinking_tokens"] <= 12 and body["usage"]["s1"]["waits_used"]
        message = body["choices"][0]["message"]
        assert "Hmm" in message["reasoning"] and "So:" in message["content"]
        body = server.chat(max_tokens=60, thinking_token_budget=3, num_ignore=0).json
        assert body["usage"]["s1"] == {"waits_used": 0, "forced_end": True, "thinking_tokens": 3}


def test_without_a_seed_samples_differ(served: InProcess) -> None:
    texts = {
        served.chat(max_tokens=40, temperature=1.0).json["choices"][0]["message"]["reasoning"]
        for _ in range(4)
    }
    assert len(texts) > 1
    again = [served.chat(max_tokens=40, temperature=1.0, seed=7).json["choices"] for _ in range(2)]
    assert again[0] == again[1]


def test_earlier_turns_may_bring_their_reasoning_and_nulls(served: InProcess) -> None:
    """As clients send an answer back: its thinking is not shown to the model again."""
    first = {
        "role": "user",
        "content": [{"type": "text", "text": "1 + "}, {"type": "text", "text": "1?"}],
    }
    earlier = {"role": "assistant", "content": "2", "refusal": None, "tool_calls": None}
    told = {"reasoning": "hm", "reasoning_content": "hm"}
    last = {"role": "user", "content": "And 2 + 2?", "type": "text"}
    system = {"role": "developer", "content": "Be brief."}
    body = {"messages": [system, first, {**earlier, **told}, last], "max_tokens": 40}
    plain = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And 2 + 2?"},
    ]
    answer = served.post(CHAT, body).json
    assert answer["usage"]["prompt_tokens"] == len(served.engine.chat.prompt_ids(plain, think=True))


def test_models_health_and_what_is_not_there(served: InProcess) -> None:
    (card,) = served.get("/v1/models").json["data"]
    assert (card["id"], card["max_model_len"]) == ("tiny", served.engine.context)
    assert served.get("/v1/models/tiny").json == card
    assert served.get("/v1/models/other").status == 404
    health = served.get("/health")
    assert (health.status, health.data) == (200, b"")
    assert served.send("HEAD", "/health").status == 200  # as load balancers ask
    for method, path, status in [("GET", "/v2", 404), ("GET", CHAT, 405), ("DELETE", "/", 405)]:
        answer = served.send(method, path)
        assert answer.status == status and answer.json["error"]["type"]


def test_a_lost_engine_is_not_healthy(restless: Ascii, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(restless.folder)
    with in_process(engine) as served:
        for name in ("step", "clear"):
            monkeypatch.setattr(engine._loop, name, lambda: 1 / 0)
        assert served.get("/health").status == 200
        assert (
            served.post(
                CHAT, {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
            ).status
            == 500
        )
        assert served.get("/health").status == 503


def test_metrics_count_what_was_done(restless: Ascii) -> None:
    engine = Engine(restless.folder)
    with in_process(engine) as server:
        bodies = [
            server.chat(max_tokens=60, thinking_token_budget=20, num_ignore=1).json,
            server.chat(max_tokens=60, thinking_token_budget=2, n=2).json,
        ]
        server.chat(nonsense=1)
        usages = [body["usage"] for body in bodies]
        assert server.metric("prompt_tokens_total") == sum(u["prompt_tokens"] for u in usages)
        generated = sum(u["completion_tokens"] for u in usages)
        assert server.metric("generation_tokens_total") == generated
        for name in ("thinking_tokens", "waits_used"):
            counted = server.metric(f"{name.removesuffix('_used')}_total")
            assert counted == sum(u["s1"][name] for u in usages)
        assert server.metric("forced_ends_total") == 2
        assert server.metric("request_success_total") == 3
        assert server.metric("request_thinking_tokens_count") == 3
        assert server.metric("time_to_first_token_seconds_count") == 2
        assert server.metric("inter_token_latency_seconds_count") > 30
        assert server.metric("e2e_request_latency_seconds_count") == 2
        assert server.metric("engine_steps_total") == engine.stats.steps
        assert server.metric("prefix_cache_hits_total") > 0
        server.idle()
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert server.metric(name) == 0
        text = server.get("/metrics").data.decode()
        assert 's1fast:requests_total{model_name="tiny",status="400"} 1.0' in text


# -- refusals -----------------------------------------------------------------------------------

ASK = [{"role": "user", "content": "1"}]
IMAGE = {"type": "image_url", "image_url": {}}
BUDGET, AUTO = {"thinking_token_budget": 5}, {"thinking_token_budget": "auto"}


@pytest.mark.parametrize(
    ("fields", "status", "param", "said"),
    [
        ({"temperature": float("nan")}, 400, "temperature", "finite"),
        ({"temperature": float("inf")}, 400, "temperature", "finite"),
        ({"temperature": -1}, 400, "temperature", "must be 0 or"),
        ({"temperature": "hot"}, 400, "temperature", "valid number"),
        ({"top_p": 0}, 400, "top_p", "must be in"),
        ({"top_k": -2}, 400, "top_k", "greater"),
        ({"seed": -1}, 400, "seed", "must be in"),
        ({"n": 10**9}, 400, "n", "128"),
        ({"n": 0}, 400, "n", "greater"),
        ({"n": 100, "budgets": [1, 2]}, 400, "n", "200 choices"),
        ({"max_tokens": "9"}, 400, "max_tokens", "valid integer"),
        ({"max_tokens": True}, 400, "max_tokens", "valid integer"),
        ({"max_tokens": 5000}, 400, "max_tokens", "context of 1024"),
        ({"max_completion_tokens": 5000}, 400, "max_completion_tokens", "context of 1024"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, 400, "max_completion_tokens", "the same"),
        ({"messages": []}, 400, "messages", "at least 1"),
        ({"messages": None}, 400, "messages", "list"),
        ({"messages": "hi"}, 400, "messages", "list"),
        ({"messages": [{"role": "wizard", "content": "1"}]}, 400, "messages[0].role", "system"),
        ({"messages": [{"role": "tool", "content": "1"}]}, 400, "messages[0].role", "system"),
        ({"messages": [*ASK, {"role": "user"}]}, 400, "messages[1].content", "required"),
        (
            {"messages": [*ASK, {"role": "user", "content": 5}]},
            400,
            "messages[1].content",
            "string",
        ),
        ({"messages": [{**ASK[0], "x": 1}]}, 400, "messages[0].x", "does not honour"),
        ({"messages": [{**ASK[0], "tool_calls": [1]}]}, 400, "messages[0].tool_calls", "honour"),
        ({"messages": [{**ASK[0], "reasoning": "m"}]}, 400, "messages[0]", "assistant's"),
        (
            {"messages": [{**ASK[0], "content": [IMAGE]}]},
            400,
            "messages[0].content[0].type",
            "'text'",
        ),
        ({"stop": ["a", 5]}, 400, "stop[1]", "valid string"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, 400, "messages", "context"),
        (
            {"messages": [{"role": "user", "content": "\ud800"}]},
            400,
            "messages[0].content",
            "Unicode",
        ),
        ({"model": "gpt-9"}, 404, "model", "only 'tiny'"),
        ({"model": "\ud800"}, 404, "model", "only 'tiny'"),
        ({"model": 5}, 400, "model", "valid string"),
        ({"stop": 5}, 400, "stop", "valid string"),
        ({"stop": [""]}, 400, "stop", "non-empty"),
        ({"stop_token_ids": [-1]}, 400, "stop_token_ids", "list of ids"),
        ({"stream": "yes"}, 400, "stream", "boolean"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "stream: true"),
        ({"stream": True, "stream_options": {"x": 1}}, 400, "stream_options.x", "honour"),
        ({"thinking_budget": 5}, 400, "thinking_budget", "is thinking_token_budget meant?"),
        (
            {"chat_template_kwargs": {"thinking_token_budget": 5}},
            400,
            "chat_template_kwargs",
            "honour",
        ),
        ({"logprobs": True}, 400, "logprobs", "leave it out"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "leave it out"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "leave it out"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty", "leave it out"),
        ({"reasoning_effort": "low"}, 400, "reasoning_effort", "'none'"),
        ({"reasoning_effort": "none", "num_ignore": 1}, 400, "num_ignore", "cannot go with"),
        ({"thinking_token_budget": -2}, 400, "thinking_token_budget", "greater"),
        ({"thinking_token_budget": 2.5}, 400, "thinking_token_budget", "integer"),
        ({"thinking_token_budget": 5000}, 400, "thinking_token_budget", "cannot hold"),
        (
            {"thinking_token_budget": 50, "max_tokens": 20},
            400,
            "thinking_token_budget",
            "cannot hold",
        ),
        (
            {"thinking_token_budget": "auto", "max_tokens": 20},
            400,
            "thinking_token_budget",
            "leaves",
        ),
        ({"max_thinking_tokens": 5000}, 400, "max_thinking_tokens", "cannot hold"),
        (
            {"max_thinking_tokens": 5, "thinking_token_budget": 5},
            400,
            "max_thinking_tokens",
            "same",
        ),
        ({**BUDGET, "min_thinking_tokens": 9}, 400, "thinking_token_budget", "is above"),
        ({"min_thinking_tokens": -1}, 400, "min_thinking_tokens", "greater"),
        ({"num_ignore": -1}, 400, "num_ignore", "greater"),
        ({"num_ignore": 1, "ignore_text": "<|im_end|>"}, 400, "ignore_text", "holds a marker"),
        ({"num_ignore": 1, "ignore_text": "wait " * 1900}, 400, "ignore_text", "at most 1024"),
        ({"ignore_text": []}, 400, "ignore_text", "at least 1"),
        ({"final_text": 5}, 400, "final_text", "valid string"),
        ({"budgets": []}, 400, "budgets", "at least 1"),
        ({"budgets": [5, 5000]}, 400, "budgets", "cannot hold"),
        ({"budgets": [5], "thinking_token_budget": 5}, 400, "thinking_token_budget", "the same"),
        ({"x" * 5000: 5}, 400, "x" * 100, "does not honour"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_what_is_not_honoured_is_named(
    served: InProcess, fields: dict[str, Any], status: int, param: str, said: str
) -> None:
    answer = served.post(CHAT, {"messages": ASK, **fields})
    assert answer.status == status, answer.data
    error = answer.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param and said in error["message"], error


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": []},
        {"stop": None, "tools": None, "tool_choice": "none", "logit_bias": {}, "user": "u"},
        {"parallel_tool_calls": True, "store": False, "service_tier": "auto"},
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logprobs": False, "top_k": -1},
        {
            "response_format": {"type": "text"},
            "n": None,
            "temperature": None,
            "metadata": {"a": "b"},
        },
    ],
)
def test_what_means_nothing_is_accepted(served: InProcess, fields: dict[str, Any]) -> None:
    assert served.chat(max_tokens=20, **fields).status == 200


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"\\ud800": 5}',
        b"[" * 200_000,
        b'{"messages": [{"role": "user", "content": "1"}], "max_tokens": 1' + b"0" * 5000 + b"}",
        b'{"messages": ' + b'{"a":' * 50_000,
    ],
    ids=lambda data: repr(data[:20]),
)
def test_bodies_that_are_no_request(served: InProcess, data: bytes) -> None:
    for path in (CHAT, "/v1/completions"):
        answer = served.send("POST", path, data)
        assert answer.status == 400 and answer.json["error"]["type"] == "invalid_request_error"


MANY = 600_000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [1] * MANY}),
        (CHAT, {"messages": [{"role": "user", "content": [1] * MANY}]}),
        (CHAT, {"messages": ASK, "stop": [1] * MANY}),
        (CHAT, {"messages": ASK, **{str(i): 1 for i in range(MANY // 3)}}),
        (CHAT, {"messages": [{"role": "user", "content": "a b " * (3 * MANY // 2)}]}),
        ("/v1/completions", {"prompt": [1.5] * MANY}),
        ("/v1/completions", {"prompt": "a" * 6 * MANY}),
    ],
    ids=["messages", "parts", "stop", "fields", "long text", "ids", "long word"],
)
def test_a_large_wrong_body_holds_nobody_up(served: InProcess, path: str, body: Any) -> None:
    """Not every error of a million is told, nor is a text tokenised that is far too long."""
    data, waited = json.dumps(body).encode(), [0.0]
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(served.send, "POST", path, data)
        while not answer.done():
            began = time.monotonic()
            assert served.get("/health").status == 200
            waited.append(time.monotonic() - began)
    assert answer.result().status == 400, answer.result().data
    assert max(waited) < 2.5


def test_a_page_of_the_web_cannot_ask(served: InProcess) -> None:
    """What a browser sends without asking first is refused, and so is a name that is not ours."""
    body = json.dumps({"messages": ASK, "max_tokens": 2}).encode()
    for kind in ("text/plain", "", "application/x-www-form-urlencoded"):
        answer = served.send("POST", CHAT, body, {"Content-Type": kind})
        assert answer.status == 400 and "application/json" in answer.json["error"]["message"]
    for host in ("evil.example", "evil.example:80", "10.0.0.1"):
        assert served.send("GET", "/v1/models", headers={"Host": host}).status == 403
    for host in ("localhost", "127.0.0.1:8000", "[::1]:8000", "[::1]"):
        assert served.send("GET", "/v1/models", headers={"Host": host}).status == 200


def test_keys(restless: Ascii) -> None:
    with in_process(restless.engine, keys=["right", "also"]) as server:
        assert server.chat(max_tokens=2).status == 200
        server.key = "also"
        assert server.get("/v1/models").status == 200
        for key in ("left", "righ", "right2", "rïght"):
            answer = server.send("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert answer.status == 401 and key not in answer.data.decode()
            assert answer.headers["www-authenticate"] == "Bearer"
        server.key = ""
        for path in ("/v1/models", CHAT, "/openapi.json", "/nothing"):
            assert server.send("POST", path, b"{}").status == 401
        basic = server.send("GET", "/v1/models", headers={"Authorization": "Basic right"})
        assert basic.status == 401
        for path in ("/", "/page.js", "/page.css", "/health", "/metrics"):
            assert server.get(path).status == 200
        assert server.send("GET", "/health", headers={"Host": "any.example"}).status == 200


def test_limits_of_body_and_queue(endless: InProcess) -> None:
    with in_process(endless.engine, body_bytes=2000, queue=3) as server:
        assert server.chat("a" * 1800, max_tokens=2).status == 200
        for size in (2000, 12_000):  # who has sent it all sees the answer
            assert server.chat("a" * size, max_tokens=2).status == 413
        head = {"Content-Length": "9000", "Expect": "100-continue"}
        assert server.send("POST", CHAT, b"", head).status == 413  # and who waits is told at once
        answer = server.chat("a" * 2000, max_tokens=2)
        assert answer.status == 413 and "2000 bytes" in answer.json["error"]["message"]
        head = {"Transfer-Encoding": "chunked"}
        chunked = b"".join(b"3e8\r\n" + b"a" * 1000 + b"\r\n" for _ in range(3)) + b"0\r\n\r\n"
        assert server.send("POST", CHAT, chunked, head).status == 413
        assert server.chat(n=4, max_tokens=2).json["error"]["param"] == "n"
        held = server.begin(n=2, max_tokens=7000)
        wait_until(lambda: server.engine.pages.held > 0)
        answer = server.chat(n=2, max_tokens=2)
        assert answer.status == 429 and int(answer.headers["retry-after"]) > 0
        assert answer.json["error"]["type"] == "rate_limit_error"
        assert server.chat(max_tokens=2).status == 200
        held.close()
        server.idle()
        assert server.chat(n=3, max_tokens=2).status == 200


def test_a_body_that_does_not_come(served: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s1fast.gate.READ_S", 0.2)
    slow = socket.create_connection(("127.0.0.1", served.port), timeout=10)
    slow.sendall(
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{{".encode()
    )
    assert slow.recv(1000).startswith(b"HTTP/1.1 408")
    slow.close()


BEGUN = b"GET /health HTTP/1.1\r\n"


@pytest.mark.parametrize(
    ("data", "patience_s"),
    [
        (b"", 0.2),
        (b"GET / HT", 0.2),
        (BEGUN + b"\r\nGET /h", 0.2),
        (BEGUN + b"X: " + b"a" * 10**7, 60),
    ],
    ids=["silent", "begun", "begun again", "endless"],
)
def test_a_head_that_does_not_end(
    served: InProcess, monkeypatch: pytest.MonkeyPatch, data: bytes, patience_s: float
) -> None:
    """Idle connections would in the end take all that the system has."""
    monkeypatch.setattr("s1fast.server.HEAD_S", patience_s)
    with (
        contextlib.suppress(ConnectionError),  # while it is still sent
        socket.create_connection(("127.0.0.1", served.port), timeout=3) as idle,
    ):
        idle.sendall(data)
        while idle.recv(1000):
            pass


def test_a_public_address_needs_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restless: Ascii
) -> None:
    monkeypatch.delenv("S1FAST_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "10.1.2.3", "example.com"):
        assert not is_loopback(host)
        with pytest.raises(InputError, match="S1FAST_API_KEY or --api-key-file"):
            serve("no-model", ServeConfig(host=host))
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"))
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(InputError, match="holds no key"):
        serve("no-model", ServeConfig(api_key_file=tmp_path / "empty"))
    with in_process(restless.engine) as server, pytest.raises(InputError, match="in use"):
        serve("no-model", ServeConfig(port=server.port))
    with bind("127.0.0.1", 0) as first, pytest.raises(InputError, match="in use"):
        bind("127.0.0.1", first.getsockname()[1])  # though that one does not answer yet
    for name, value in {"port": -1, "queue": 0, "timeout_s": 0, "drain_s": -1}.items():
        with pytest.raises(InputError, match="--" + name.replace("_", "-")):
            ServeConfig(**{name: value})  # type: ignore[arg-type]


# -- those who leave, and what fails ------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"n": 3}, {"budgets": [4000, 5000]}])
def test_whoever_leaves_frees_the_pages(endless: InProcess, fields: dict[str, Any]) -> None:
    asked = endless.begin(max_tokens=6000, **fields)
    wait_until(lambda: endless.engine.pages.held > 2)
    steps = endless.engine.stats.steps
    asked.close()
    endless.idle()
    assert endless.engine.stats.steps - steps < 2000, "it went on for nobody"
    wait_until(lambda: endless.metric("num_requests_running") == 0)
    assert 'status="499"' in endless.get("/metrics").data.decode()
    assert endless.chat(max_tokens=3).status == 200


def test_whoever_leaves_when_some_prompts_are_done(
    endless: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[str] = []
    monkeypatch.setattr("s1fast.gate.log_failure", lambda name, error: failures.append(str(error)))
    before = endless.metric("request_success_total")
    body = json.dumps({"prompt": [[5] * 8180, [5]]}).encode()
    with socket.create_connection(("127.0.0.1", endless.port)) as asked:
        asked.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        wait_until(lambda: endless.metric("request_success_total") == before + 1)
    endless.idle()
    wait_until(lambda: endless.metric("num_requests_running") == 0)
    assert not failures


def test_a_stream_that_never_starts_is_ended(endless: InProcess) -> None:
    """As when the server ends, or its client has left, before the first chunk."""
    ended: list[int] = []

    async def never() -> AsyncGenerator[bytes]:
        raise AssertionError("it was read")
        yield b""

    async def go() -> None:
        async def fails(message: Any) -> None:
            raise OSError("gone")

        async def waits() -> Any:
            await asyncio.sleep(60)

        stream = EventStream(never(), 60.0, ended.append)
        with pytest.raises(OSError, match="gone"):
            await stream({"type": "http"}, waits, fails)
        stream = EventStream(never(), 60.0, ended.append)
        task = asyncio.create_task(stream({"type": "http"}, waits, lambda _: waits()))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go())
    assert ended == [499, 499]


def test_time_is_limited(endless: InProcess) -> None:
    with in_process(endless.engine, timeout_s=0.3) as server:
        answer = server.chat(max_tokens=7000)
        assert answer.status == 504 and "0.3 s" in answer.json["error"]["message"]
        server.idle()
        events = server.chat(max_tokens=7000, stream=True).events
        assert len(events) > 3 and events[-1]["error"]["type"] == "timeout_error"
        server.idle()
        text = server.get("/metrics").data.decode()
        assert 's1fast:requests_total{model_name="tiny",status="504"} 2.0' in text


def test_a_failing_request_gets_an_id_and_the_engine_goes_on(
    restless: Ascii, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its log tells where, but nothing of what was asked."""
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    handler.setFormatter(JsonLines())
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "propagate", False)
    logger.setLevel(logging.INFO)
    draw = Loop._draw

    def fails(self: Loop, row: Any, *rest: Any) -> int:
        if row.params.seed == 77:
            raise RuntimeError(f"cannot go on after {row.ids}: SECRET PROMPT")
        return draw(self, row, *rest)

    monkeypatch.setattr(Loop, "_draw", fails)
    with (
        in_process(Engine(restless.folder), keys=["SECRET KEY"]) as server,
        ThreadPoolExecutor() as pool,
    ):
        other = pool.submit(server.chat, max_tokens=400)
        answer = server.chat("SECRET PROMPT", max_tokens=20, seed=77)
        name = answer.headers["x-request-id"]
        assert answer.status == 500 and answer.json["error"]["type"] == "server_error"
        assert name in answer.json["error"]["message"] and b"SECRET" not in answer.data
        events = server.chat("SECRET PROMPT", max_tokens=20, seed=77, stream=True).events
        assert events[-1]["error"]["code"] == "internal_error"
        monkeypatch.setattr("s1fast.service.to_requests", lambda *_: 1 / 0)
        assert server.chat(max_tokens=3).status == 500
        monkeypatch.undo()
        monkeypatch.setattr(logger, "handlers", [handler])
        assert other.result().status == 200 and server.chat(max_tokens=3).status == 200
        server.idle()
    lines = [json.loads(line) for line in said.getvalue().splitlines()]
    failures = [line for line in lines if line["event"] == "failure"]
    assert [f["error"] for f in failures] == ["RuntimeError", "RuntimeError", "ZeroDivisionError"]
    assert failures[0]["id"] == name and any("fails" in place for place in failures[0]["at"])
    assert "SECRET" not in said.getvalue()
    done = [line for line in lines if line["event"] == "request" and line["status"] == 200]
    assert done and {"wall_s", "prompt_tokens", "thinking_tokens", "first_token_s"} <= set(done[0])


def test_a_slow_reader_holds_nobody_up(endless: InProcess) -> None:
    slow = endless.begin(max_tokens=3000, stream=True)
    wait_until(lambda: endless.engine.pages.held > 2)
    began = time.monotonic()
    assert endless.chat(max_tokens=5).status == 200
    assert time.monotonic() - began < 10
    slow.close()
    endless.idle()


def test_many_at_once(served: InProcess) -> None:
    """Requests of every kind together give what each gives alone."""
    alone = [
        served.chat(max_tokens=60, **fields).json["choices"]
        for fields in FIELDS
        if "n" not in fields
    ]
    together = [fields for fields in FIELDS if "n" not in fields] * 6
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda f: served.chat(max_tokens=60, **f).json["choices"], together))
    equal = [a == b for a, b in zip(alone * 6, found, strict=True)]
    assert sum(equal) >= 0.8 * len(equal), "more than ties can explain"
    assert not [t for t in threading.enumerate() if t.name == "s1fast" and not t.is_alive()]


def test_small_chunks_are_sent_at_once(served: InProcess) -> None:
    """Where they wait for the client's acknowledgement, an answer takes 40 ms."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port)
    taken = []
    for _ in range(21):
        began = time.perf_counter()
        connection.request("GET", "/v1/models")
        connection.getresponse().read()
        taken.append(time.perf_counter() - began)
    connection.close()
    assert statistics.quantiles(taken, n=4)[0] < 0.03
    with bind("127.0.0.1", 0) as bound:
        assert bound.proto == socket.IPPROTO_TCP


def test_the_schema_is_told(served: Client) -> None:
    schema = served.get("/openapi.json").json
    fields = schema["components"]["schemas"]["ChatAsked"]["properties"]
    assert {"thinking_token_budget", "num_ignore", "budgets", "messages"} <= set(fields)
    for path in ("/docs", "/redoc"):  # they load scripts from elsewhere
        assert served.get(path).status == 404
