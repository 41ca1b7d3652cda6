"""evaluate against OpenAI-compatible servers, by the real client: budgets kept or the run ends."""

from __future__ import annotations

import collections
import io
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from s1fast.answers import How
from s1fast.errors import InputError
from s1fast.evaluate import EvaluateConfig, evaluate
from s1fast.recipes.asking import Pace

pytest.importorskip("openai", reason="no openai; unproven: evaluate --endpoint")
pytest.importorskip("math_verify", reason="no math-verify; unproven: evaluation")
LONG = 40
"""Tokens that the server's model thinks when nothing stops it."""


class Server(ThreadingHTTPServer):
    """Adds two numbers if it may think eight tokens, else says 0. Modes change what it admits."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, mode: str = "ours") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.mode, self.bodies, self.keys = mode, [], set()  # type: ignore[var-annotated]
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def reply(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        text = body["messages"][-1]["content"]
        if self.mode == "grader":
            return 200, chat("I compare them.\n\n" + ("Yes" if "seven" in text else "No"))
        if self.mode == "rejects":
            return 400, {"error": {"message": "thinking_token_budget: unknown field"}}
        if self.mode == "flaky" and len(self.bodies) % 3 == 0:
            return 503, {"error": {"message": "busy"}}
        natural = LONG + 10 * body.get("num_ignore", 0)
        budget = body.get("thinking_token_budget", natural)
        thought = natural if self.mode == "ignores budgets" else min(natural, budget)
        numbers = [int(n) for n in re.findall(r"\d+", text)]
        answer = f"\nFinal Answer: {sum(numbers) if thought >= 8 else 0}"
        told: dict[str, Any] = {"prompt_tokens": 9, "completion_tokens": thought + 5}
        told["total_tokens"] = 14 + thought
        if self.mode not in ("counts nothing", "grader"):
            told["completion_tokens_details"] = {"reasoning_tokens": thought}
        if self.mode in ("ours", "flaky"):
            waits = min(body.get("num_ignore", 0), 1)
            told["s1"] = {
                "waits_used": waits,
                "forced_end": thought < natural,
                "thinking_tokens": thought,
            }
        return 200, chat(answer, "think " * thought, told)


def chat(answer: str, thinking: str = "", usage: dict[str, Any] | None = None) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer, "reasoning_content": thinking}
    usage = usage or {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    shared = {"id": "x", "object": "chat.completion", "created": 1, "model": "m"}
    return {**shared, "choices": [choice], "usage": usage}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.send(200, {"object": "list", "data": [{"id": "m", "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.keys.add(self.headers["Authorization"])
        self.send(*self.server.reply(body))

    def send(self, code: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    servers = []

    def make(mode: str = "ours") -> Server:
        servers.append(Server(mode))
        return servers[-1]

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def go(tmp_path: Path) -> Callable[..., Path]:
    rows = [{"question": f"{i} + {i + 1}?", "answer": f"#### {2 * i + 1}"} for i in range(6)]
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(server: Server | str, name: str = "out", **values: Any) -> Path:
        url = server if isinstance(server, str) else server.url
        pace = {"attempts": 3, "first_wait_seconds": 0.01, "longest_wait_seconds": 0.02}
        config = EvaluateConfig(
            tasks=f"gsm8k={path}",
            output=tmp_path / name,
            endpoint=url,
            grading_workers=1,
            how=How(**values.pop("how", {})),
            pace=Pace(**{**pace, **values.pop("pace", {})}),
            **values,
        )
        evaluate("m", config, Console(file=io.StringIO()))
        return tmp_path / name

    return run


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_a_grid_on_a_server_that_keeps_budgets(
    serve: Callable[..., Server], go: Callable[..., Path]
) -> None:
    server = serve()
    how = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 99, "top_k": 7, "seed": 10}
    folder = go(server, budgets="5,20,auto", num_ignores="none,2", samples=2, how=how)
    rows = rows_of(folder)
    assert len(rows) == 6 * 6 * 2
    found = {
        cell: [row for row in rows if row["cell"] == cell]
        for cell in dict.fromkeys(r["cell"] for r in rows)
    }
    assert {row["thoughts_tokens"] for row in found["5"]} == {5}
    assert not any(row["correct"] for row in found["5"]) and all(r["correct"] for r in found["20"])
    assert {row["thinking_end"] for row in found["20"]} == {"length"}
    assert {row["thinking_end"] for row in found["auto"]} == {"natural"}
    assert {(row["waits_used"], row["thoughts_tokens"]) for row in found["auto ignore=2"]} == {
        (1, 60)
    }
    assert rows[0]["thinking"] == "think think think think think" and rows[0]["answer_tokens"] == 5
    sent = [b for b in server.bodies if b.get("num_ignore") and "thinking_token_budget" not in b]
    assert {b["seed"] for b in sent} == {10, 11} and len(sent) == 12
    for body in sent:
        assert body["ignore_text"] == ["Wait"] and body["top_k"] == 7 and "final_text" not in body
        assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.5, 0.9, 99)
    summary = json.loads((folder / "summary.json").read_text())["tasks"]["gsm8k"]
    assert [cell["accuracy"] for cell in summary["cells"]] == [0, 0, 100, 100, 100, 100]
    assert summary["methods"][0]["control"] == 100
    asked = len(server.bodies)
    go(server, budgets="5,20,auto", num_ignores="none,2", samples=2, how=how)
    assert len(server.bodies) == asked == 72, "nothing was asked again"


def test_a_busy_server_is_asked_again(
    serve: Callable[..., Server], go: Callable[..., Path]
) -> None:
    rows = rows_of(go(serve("flaky"), budgets="20", pace={"attempts": 20, "concurrency": 2}))
    assert len(rows) == 6 and all(row["correct"] for row in rows)


def test_rejection_sampling_on_a_server(
    serve: Callable[..., Server], go: Callable[..., Path]
) -> None:
    """It always thinks 40 tokens: under 39 every draw is rejected, under 40 the first is taken."""
    server = serve()
    folder = go(server, reject_above="39,40", max_tries=3, how={"temperature": 1.0})
    tries = collections.Counter(row["cell"] for row in rows_of(folder))
    assert tries == {"reject>39": 18, "reject>40": 6}
    assert [
        cell["accuracy"]
        for cell in json.loads((folder / "summary.json").read_text())["tasks"]["gsm8k"]["cells"]
    ] == [0, 100]


def test_draws_that_do_not_count_are_not_graded_for_money(
    serve: Callable[..., Server], go: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In words, which only the grader understands: of each problem the one draw that counts."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-right")
    server, grader = serve(), serve("grader")

    def reply(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        code, done = Server.reply(server, {**body, "num_ignore": body["seed"] % 2})
        first = int(re.findall(r"\d+", body["messages"][-1]["content"])[0])
        text = f"Draw {'abc'[body['seed']]} says seven to {'uvwxyz'[first]}"
        done["choices"][0]["message"]["content"] = text
        return code, done

    server.reply = reply  # type: ignore[method-assign]
    how = {"temperature": 1.0, "seed": 1}  # the first draw thinks 50 tokens, the second 40
    spec = f"openai:judge@{grader.url}"
    rows = rows_of(go(server, reject_above="30,40", max_tries=2, how=how, grader=spec))
    assert len(rows) == 2 * 12 and len(grader.bodies) == 6
    assert {row["correct"] for row in rows if row["cell"] == "reject>30"} == {False}
    assert sum(row["correct"] for row in rows) == 6


def test_money_is_for_answers_and_grades_together(
    serve: Callable[..., Server], go: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-right")
    server, grader = serve(), serve("grader")

    def reply(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        code, done = Server.reply(server, body)
        done["choices"][0]["message"]["content"] = f"{body['messages'][-1]['content']} Words."
        return code, done

    server.reply = reply  # type: ignore[method-assign]
    prices = {"input_price": 1e6, "output_price": 0.0, "max_dollars": 57.0, "concurrency": 1}
    spec = f"openai:judge@{grader.url}"  # answers cost 9 dollars each, grades 1
    with pytest.raises(InputError, match=r"--max-dollars 57: reached"):
        go(server, budgets="20", pace=prices, grader=spec)
    assert len(server.bodies) == 6 and len(grader.bodies) == 3


def test_one_process_asks(
    serve: Callable[..., Server], go: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="--endpoint: one process asks"):
        go(serve(), budgets="20")


@pytest.mark.parametrize(
    ("mode", "values", "naming"),
    [
        ("ignores budgets", {"budgets": "20"}, "thought 40 tokens where thinking_token_budget was"),
        ("counts nothing", {"budgets": "20"}, "does not count thinking tokens.*--tokenizer"),
        ("plain", {"num_ignores": "2"}, "no usage.s1 that tells waits"),
        ("plain", {"reject_above": "9", "how": {"temperature": 1.0}}, "no usage.s1"),
        ("rejects", {"budgets": "20"}, "failed alike: the server rejects .*thinking_token_budget"),
        ("ours", {"how": {"accounting": "harness"}}, "--accounting harness: no server takes it"),
        ("ours", {"no_thinking": True}, "--no-thinking: an endpoint decides itself"),
        ("ours", {"budgets": "5,auto,none"}, "--budgets: to an endpoint auto and none are the"),
        ("flaky", {"pace": {"attempts": 1}}, r"samples failed, the first, gsm8k/\d/auto/0, .*busy"),
    ],
)
def test_what_a_server_does_not_honour(
    mode: str,
    values: dict[str, Any],
    naming: str,
    serve: Callable[..., Server],
    go: Callable[..., Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(InputError, match=naming):
        go(serve(mode), **values)
    assert not (tmp_path / "out" / "samples.jsonl").exists()


def test_thinking_is_counted_here_where_the_server_does_not(
    serve: Callable[..., Server], go: Callable[..., Path], tiny_tokenizer: Path
) -> None:
    folder = go(serve("counts nothing"), rows=2, tokenizer=str(tiny_tokenizer))
    from s1fast.chat import load_tokenizer

    text = ("think " * LONG).strip()
    count = len(load_tokenizer(tiny_tokenizer).encode(text, add_special_tokens=False).ids)
    assert {row["thoughts_tokens"] for row in rows_of(folder)} == {count}
    unknown = go(serve("counts nothing"), "unknown", rows=2)
    assert {row["thoughts_tokens"] for row in rows_of(unknown)} == {None}
    (cell,) = json.loads((unknown / "summary.json").read_text())["tasks"]["gsm8k"]["cells"]
    assert cell["accuracy"] == 100 and cell["thinking_tokens"] is None


def test_nobody_there(go: Callable[..., Path]) -> None:
    """Told at once, not after all retries; the URL is named."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(InputError, match=rf"http://127.0.0.1:{port}/v1/: cannot be reached"):
        go(f"http://127.0.0.1:{port}/v1", pace={"attempts": 50, "first_wait_seconds": 60.0})


def test_a_grader_is_asked_about_what_the_rules_reject(
    serve: Callable[..., Server],
    go: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In words, no rule finds 7; the grader does, is asked once a text, and never about digits."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-right")
    server, grader = serve(), serve("grader")
    words = {7: "It is seven.", 3: "Three, I think."}

    def reply(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        code, done = Server.reply(server, body)
        total = sum(int(n) for n in re.findall(r"\d+", body["messages"][-1]["content"]))
        if total in words:
            done["choices"][0]["message"]["content"] = words[total]
        return code, done

    server.reply = reply  # type: ignore[method-assign]
    spec = f"openai:judge@{grader.url}"
    rows = rows_of(go(server, budgets="5,20", grader=spec))
    by_gold = {row["gold"]: row for row in rows if row["cell"] == "20"}
    assert by_gold["7"]["correct"] and by_gold["7"]["why"].endswith("accepts it")
    assert not by_gold["3"]["correct"] and by_gold["3"]["why"].endswith("rejects it, too")
    assert by_gold["5"]["correct"] and "judge" not in by_gold["5"]["why"]
    assert len(grader.bodies) == 2, "two texts that four samples wrote; digits are clear"
    assert grader.keys == {"Bearer sk-right"}
    again = rows_of(go(server, budgets="5,20", grader=spec))
    assert again == rows and len(grader.bodies) == 2
    rules = rows_of(go(server, budgets="5,20"))
    assert sum(r["correct"] for r in rules) == sum(r["correct"] for r in rows) - 2
