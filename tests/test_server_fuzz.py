"""Whatever is sent: 2xx as promised, or 4xx that names what is wrong; never 5xx, and at once."""

from __future__ import annotations

import collections
import contextlib
import http.client
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="no fastapi; unproven: s1fast serve")
pytest.importorskip("prometheus_client", reason="no prometheus_client; unproven: s1fast serve")

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

WORDS = [
    "a",
    "the sum",
    "é🍓",
    "\n",
    "<|im_start|>",
    "<|im_end|>",
    "Wait",
    "Final Answer:",
    "1 + 1?",
]
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 7, 129, 2**31, 2**63, 2**64, -(2**63), 10**40, 0.5, -0.0, 1e-9),
    *(1e308, math.nan, math.inf, -math.inf, "", "auto", "none", "\ud800", "\u0000", "user", "1"),
    *([], {}, [[]], [None], [1, "a"], {"type": "text"}, {"role": "user"}, "x" * 3000, [0] * 3000),
]
GOOD: dict[str, Callable[[random.Random], Any]] = {
    "temperature": lambda r: r.choice([0, 0.5, 1, 2.0]),
    "top_p": lambda r: r.uniform(0.1, 1),
    "top_k": lambda r: r.randint(-1, 50),
    "min_p": lambda r: r.random(),
    "n": lambda r: r.randint(1, 2),
    "seed": lambda r: r.getrandbits(64),
    "stop": lambda r: r.choice([r.choice(WORDS), r.sample(WORDS, r.randint(0, 4))]),
    "max_tokens": lambda r: r.randint(25, 30),
    "thinking_token_budget": lambda r: r.randint(-1, 14),
    "min_thinking_tokens": lambda r: r.randint(0, 4),
    "num_ignore": lambda r: r.randint(0, 5),
    "ignore_text": lambda r: r.choice(["Wait", ["Hmm", "é"], "x\n"]),
    "final_text": lambda r: r.choice(["", "So:", "🍓"]),
    "budgets": lambda r: [r.choice([None, -1, 0, 3, 9]) for _ in range(r.randint(1, 3))],
    "num_ignores": lambda r: [r.choice([None, 0, 2]) for _ in range(r.randint(1, 2))],
}
NAMES = sorted({*ChatAsked.model_fields, *CompletionAsked.model_fields, *NEUTRAL})


def text(r: random.Random) -> str:
    if r.random() < 0.8:
        return "".join(r.choices(WORDS, k=r.randint(1, 6)))
    return "".join(chr(r.randrange(0x11000)) for _ in range(r.randint(0, 9)))  # surrogates, too


def odd(r: random.Random, depth: int = 2) -> Any:
    """Any JSON."""
    kind = r.random()
    if depth and kind < 0.15:
        return [odd(r, depth - 1) for _ in range(r.randint(0, 3))]
    if depth and kind < 0.3:
        return {
            r.choice([text(r), r.choice(NAMES)]): odd(r, depth - 1) for _ in range(r.randint(0, 3))
        }
    return r.choice([r.choice(ODD), text(r), r.randint(-3, 70), r.uniform(-2, 2)])


def message(r: random.Random) -> dict[str, Any]:
    role = r.choice(["user", "user", "assistant", "system", "developer"])
    parts = [{"type": "text", "text": text(r)} for _ in range(r.randint(0, 2))]
    return {"role": role, "content": r.choice([text(r), parts])}


def request(r: random.Random) -> tuple[str, bytes]:
    """A path and a body: mostly right, with a field or two wrong; sometimes broken as bytes."""
    chat = r.random() < 0.6
    body: dict[str, Any] = {}
    if chat:
        body["messages"] = [message(r) for _ in range(r.randint(1, 3))]
    else:
        ids = [r.randrange(400) for _ in range(r.randint(1, 9))]
        body["prompt"] = r.choice([text(r), ids, [text(r), text(r)], [ids, ids]])
    names = sorted(set(GOOD) - (set() if chat else set(BUDGET_FIELDS)))
    for name in r.sample(names, r.randint(0, 4)):
        body[name] = GOOD[name](r)
    if r.random() < 0.25:
        body["stream"] = True
    if chat and r.random() < 0.1:
        field = r.choice([*ChatMessage.model_fields, text(r)])
        body["messages"].append({**message(r), field: odd(r)})
    if r.random() < 0.4:
        body[r.choice([r.choice(NAMES), text(r)])] = odd(r)
    data = json.dumps(body).encode()
    if r.random() < 0.05:
        at = r.randrange(len(data))
        data = data[:at] + r.randbytes(r.randint(0, 3)) + data[at + r.randint(0, 9) :]
    path = "/v1/chat/completions" if chat else "/v1/completions"
    if r.random() < 0.05:
        path = r.choice(["/v1/completions", "/v1/models", "/v1/x", "/%ff", "//", "/", "/metrics"])
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
        self._connection.request("POST", path, data, {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        return response.status, response.read()

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


def fuzz(served: InProcess, count: int, seed: int) -> None:
    kinds: collections.Counter[str] = collections.Counter()
    r = random.Random(seed)
    with contextlib.closing(Wire(served.port)) as wire:
        for _ in range(count):
            path, data = request(r)
            try:
                kinds[check(*wire.post(path, data))] += 1
            except BaseException:
                print(f"{path} {data!r}")
                raise
    assert kinds["named"] > count / 5 and kinds["answered"] > count / 5, kinds
    assert kinds["streamed"] > count / 20 and kinds["refused"] > count / 50, kinds
    served.idle()
    assert served.chat(max_tokens=5).status == 200
    assert served.metric("num_requests_running") == served.metric("num_requests_waiting") == 0


def test_two_thousand_requests(served: InProcess) -> None:
    fuzz(served, 2000, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_requests(served: InProcess) -> None:
    fuzz(served, 10_000, seed=2)


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
