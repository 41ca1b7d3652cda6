"""Whatever is sent: 2xx as promised, or 4xx that names what is wrong; never 5xx, and at once."""

from __future__ import annotations

import collections
import contextlib
import http.client
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="no fastapi; unproven: s1fast serve")
pytest.importorskip("prometheus_client", reason="no prometheus_client; unproven: s1fast serve")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s1fast.protocol import (
    BUDGET_FIELDS,
    NEUTRAL,
    ChatAsked,
    ChatMessage,
    CompletionAsked,
    Defaults,
)
from serving import InProcess, in_process
from writers import Ascii

MakeModel = Callable[..., Path]
ANSWER_S = 20.0
"""Thousands of times what an answer takes here, so only a hang is above."""

# -- what is sent ---------------------------------------------------------------------------------

WORDS = (
    "a",
    "the sum",
    "é🍓",
    "\n",
    "<|im_start|>",
    "<|im_end|>",
    "Wait",
    "Final Answer:",
    "1 + 1?",
)
NUMBERS = (129, 2**31, 2**63, 2**64, -(2**63), 10**40, 1e308, 1e-9, math.nan, math.inf, -0.0)
NAMES = sorted({*ChatAsked.model_fields, *CompletionAsked.model_fields, *NEUTRAL})
PATHS = ("/v1/completions", "/v1/models", "/v1/x", "/%ff", "//", "/", "/metrics")

words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map("".join)
texts = words | words | st.text(st.characters() | st.just("\ud800"), max_size=9)
numbers = st.integers(-3, 70) | st.sampled_from(NUMBERS) | st.floats()
anything = st.recursive(
    st.none() | st.booleans() | numbers | texts | st.sampled_from(["", "auto", "none", "x" * 3000]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(texts | st.sampled_from(NAMES), inner, max_size=3)
    ),
    max_leaves=6,
)
"""Any JSON, and a little more."""
ids = st.lists(st.integers(0, 311), min_size=1, max_size=9)
parts = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": words}), max_size=2)
messages = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "user", "assistant", "system", "developer"]),
        "content": words | parts,
    }
)
RIGHT: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.sampled_from([0, 0.5, 1, 2.0]),
    "top_p": st.floats(0.1, 1),
    "top_k": st.integers(-1, 50),
    "min_p": st.floats(0, 1),
    "n": st.integers(1, 2),
    "seed": st.integers(0, 2**64 - 1),
    "stop": st.sampled_from(WORDS) | st.lists(st.sampled_from(WORDS), max_size=4),
    "max_tokens": st.integers(25, 30),
    "thinking_token_budget": st.integers(-1, 14),
    "min_thinking_tokens": st.integers(0, 4),
    "num_ignore": st.integers(0, 5),
    "ignore_text": st.sampled_from(["Wait", ["Hmm", "é"], "x\n"]),
    "final_text": st.sampled_from(["", "So:", "🍓"]),
    "budgets": st.lists(st.sampled_from([None, -1, 0, 3, 9]), min_size=1, max_size=3),
    "num_ignores": st.lists(st.sampled_from([None, 0, 2]), min_size=1, max_size=2),
}


def fields(names: Iterable[str]) -> st.SearchStrategy[dict[str, Any]]:
    """A few of them, right each by itself."""
    each = st.one_of([st.tuples(st.just(name), RIGHT[name]) for name in names])
    return st.lists(each, unique_by=lambda field: field[0], max_size=4).map(dict)


chat_fields, completion_fields = fields(RIGHT), fields(sorted(RIGHT.keys() - BUDGET_FIELDS))


def sometimes(draw: st.DrawFn, percent: int) -> bool:
    return draw(st.integers(0, 99)) >= 100 - percent  # shrinks to no


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, bytes]:
    """A path and a body: mostly right, with a field wrong; sometimes broken as bytes."""
    path, body = "/v1/chat/completions", draw(chat_fields)
    if sometimes(draw, 40):
        path, body = "/v1/completions", draw(completion_fields)
        body["prompt"] = draw(words | ids | st.lists(words, max_size=2) | st.lists(ids, max_size=2))
    else:
        body["messages"] = draw(st.lists(messages, min_size=1, max_size=3))
        if sometimes(draw, 10):
            field = draw(st.sampled_from(list(ChatMessage.model_fields)) | texts)
            body["messages"][-1][field] = draw(anything)
    if sometimes(draw, 25):
        body["stream"] = True
    if sometimes(draw, 40):
        body[draw(st.sampled_from(NAMES) | texts)] = draw(anything)
    data = json.dumps(body).encode()
    if sometimes(draw, 5):
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.binary(max_size=3)) + data[at + draw(st.integers(0, 9)) :]
    if sometimes(draw, 5):
        path = draw(st.sampled_from(PATHS))
    return path, data


# -- what comes back ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(make_model: MakeModel) -> Iterator[InProcess]:
    restless = Ascii(make_model("qwen2", seed=3, max_position_embeddings=200), end=1.8)
    with in_process(restless.engine, queue=16, defaults=Defaults(max_tokens=12)) as server:
        yield server
        server.idle()


class Wire:
    """One connection, for as long as the server keeps it."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)

    def post(self, path: str, data: bytes) -> tuple[int, bytes]:
        try:
            self._connection.request("POST", path, data, {"Content-Type": "application/json"})
            response = self._connection.getresponse()
            return response.status, response.read()
        except BaseException:
            self.close()  # the next one gets a new one
            raise

    def close(self) -> None:
        self._connection.close()


def check(status: int, data: bytes) -> str:
    """Holds an answer against what is promised; says of which kind it is."""
    assert status < 500, data
    if status >= 400:
        error = json.loads(data)["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        return "named" if error["param"] else "refused"
    assert status == 200
    if data.startswith(b"data: "):
        assert data.endswith(b"data: [DONE]\n\n") and b'"error"' not in data.split(b"\n\n")[-3]
        return "streamed"
    choices = json.loads(data)["choices"]
    assert [c["index"] for c in choices] == list(range(len(choices))) and choices
    assert all(c["finish_reason"] in ("stop", "length") for c in choices)
    return "answered"


def fuzz(served: InProcess, count: int, derandomize: bool) -> None:
    kinds: collections.Counter[str] = collections.Counter()

    @settings(
        max_examples=count,
        derandomize=derandomize,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(requests())
    def holds(asked: tuple[str, bytes]) -> None:
        kinds[check(*wire.post(*asked))] += 1

    with contextlib.closing(Wire(served.port)) as wire:
        holds()
    assert kinds["named"] > count / 5 and kinds["answered"] > count / 5, kinds
    assert kinds["streamed"] > count / 20 and kinds["refused"] > count / 50, kinds
    served.idle()
    assert served.chat(max_tokens=5).status == 200
    assert served.metric("num_requests_running") == served.metric("num_requests_waiting") == 0


def test_whatever_is_sent(served: InProcess) -> None:
    fuzz(served, 600, derandomize=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_whatever_is_sent_at_length(served: InProcess) -> None:
    fuzz(served, 10_000, derandomize=False)


def test_what_is_no_http(served: InProcess) -> None:
    """Broken framing ends the connection, nothing else."""
    import socket

    for data in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nAuthorization: " + b"\xff" * 50_000 + b"\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
        b"\r\n" * 100,
    ):
        with socket.create_connection(("127.0.0.1", served.port), timeout=ANSWER_S) as raw:
            raw.sendall(data)
            raw.shutdown(socket.SHUT_WR)
            answer = b""
            while got := raw.recv(65536):
                answer += got
            assert not answer or answer.split()[1][:1] in (b"2", b"4"), answer[:200]
    assert served.chat(max_tokens=5).status == 200
