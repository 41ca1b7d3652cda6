"""`s1fast serve` as a process: many clients at once, memory, signals, kill -9, flags."""

from __future__ import annotations

import json
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="no fastapi; unproven: s1fast serve")
pytest.importorskip("prometheus_client", reason="no prometheus_client; unproven: s1fast serve")

from s1fast.cli import main
from serving import PATIENCE_S, Process, wait_until
from writers import Ascii

MakeModel = Callable[..., Path]
CLIENTS = 64


@pytest.fixture(scope="module")
def endless(make_model: MakeModel) -> Path:
    """A model that never ends by itself."""
    folder = make_model("qwen2", seed=4, max_position_embeddings=8192, eos_token_id=511)
    return Ascii(folder, end=0.0).folder


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def go(model: Path, *flags: str, **more: Any) -> Process:
        started.append(Process(model, tmp_path / f"log-{len(started)}", *flags, **more))
        return started[-1]

    yield go
    for process in started:
        process.close()


# -- many clients ---------------------------------------------------------------------------------


def wave(server: Process, clients: int, tokens: int, seed: int) -> list[Any]:
    """So many clients at once, a third of which leave in the middle: half of those stream. What the
    others got."""
    rng = random.Random(seed)
    together = threading.Barrier(clients)

    def one(number: int) -> Any:
        text = f"What is {number} + {rng.randrange(100)}?"
        fields: dict[str, Any] = {"max_tokens": tokens, "thinking_token_budget": tokens // 3}
        fields |= {"num_ignore": 1} if number % 2 else {}
        together.wait(PATIENCE_S)
        if number % 3 == 0:
            streams = bool(number % 2)
            asked = server.begin(text, **{**fields, "max_tokens": 4 * tokens}, stream=streams)
            if streams:
                assert asked.recv(4096).startswith(b"HTTP/1.1 200")
            time.sleep(0.2 + number / clients)
            asked.close()
            return None
        if number % 3 == 1:
            return server.chat(text, **fields)
        return server.chat(text, **fields, stream=True, stream_options={"include_usage": True})

    with ThreadPoolExecutor(clients) as pool:
        return [done for done in pool.map(one, range(clients)) if done is not None]


def check_wave(server: Process, done: list[Any], tokens: int) -> None:
    for answer in done:
        assert answer.status == 200, answer.data
        usage = answer.events[-2]["usage"] if b"data: " in answer.data else answer.json["usage"]
        assert 0 < usage["completion_tokens"] <= tokens
        assert usage["s1"]["thinking_tokens"] <= tokens // 3
    wait_until(lambda: server.metric("num_requests_running") == 0)
    wait_until(lambda: server.metric("kv_cache_usage_perc") == 0, 5)
    assert server.metric("num_requests_waiting") == 0


def statuses(server: Process) -> set[int]:
    """Of all requests, as the log tells them."""
    lines = map(json.loads, server.log.read_text().splitlines())
    return {line["status"] for line in lines if line["event"] == "request"}


def test_sixty_four_clients_on_real_weights(start: Callable[..., Process], smollm2: Path) -> None:
    server = start(smollm2, "--cache-tokens", "3072", OMP_NUM_THREADS="2")
    done = wave(server, CLIENTS, 12, seed=1)
    assert len(done) == CLIENTS - -(-CLIENTS // 3)
    check_wave(server, done, 12)
    assert statuses(server) == {200, 499}, "an error that nobody injected"


def check_memory(server: Process, waves: int) -> None:
    """Once the cache, of 8 MB, has been used up, nothing grows."""
    for seed in range(2):
        check_wave(server, wave(server, CLIENTS, 60, seed), 60)
    before = server.resident_bytes
    later = []
    for seed in range(2, 2 + waves):
        check_wave(server, wave(server, CLIENTS, 60, seed), 60)
        later.append(server.resident_bytes)
    least = min(later[len(later) // 2 - 1 :])  # it goes up and down by some MB
    assert least - before < 6e6, "more than an allocator's fragments"
    assert statuses(server) == {200, 499}


def test_memory_stays_flat(start: Callable[..., Process], endless: Path) -> None:
    check_memory(start(endless, "--cache-tokens", "16384"), waves=2)


@pytest.mark.slow
def test_memory_stays_flat_at_length(start: Callable[..., Process], endless: Path) -> None:
    """A leak of 5 KB a request would show."""
    check_memory(start(endless, "--cache-tokens", "16384"), waves=20)


def test_the_load_script_tells_both_sides(endless: Path) -> None:
    from s1fast.bench.serving import measure

    found = measure(str(endless), streams=[1, 3], tokens=12, rounds=1)
    assert list(found) == ["1", "3"]
    for row in found.values():
        for name in ("http first ms", "http between ms", "engine first ms", "engine between ms"):
            assert 0 < row[name] < 1000
        assert row["http first ms"] > row["http between ms"]
        assert abs(row["added us a token"]) < 1e5


# -- signals --------------------------------------------------------------------------------------


def test_sigterm_lets_requests_finish(start: Callable[..., Process], endless: Path) -> None:
    server = start(endless)
    with ThreadPoolExecutor() as pool:
        running = [
            pool.submit(server.chat, max_tokens=900, stream=stream) for stream in (False, True)
        ]
        wait_until(lambda: server.metric("num_requests_running") == 2)
        for _ in range(2):  # once more is no more
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: not listens(server.port))
        whole, streamed = (done.result() for done in running)
    assert whole.json["usage"]["completion_tokens"] == 900 and streamed.events[-1] == "[DONE]"
    assert server.process.wait(PATIENCE_S) == 0
    assert json.loads(server.log.read_text().splitlines()[-1])["event"] == "ended"


def test_what_does_not_finish_is_ended(start: Callable[..., Process], endless: Path) -> None:
    server = start(endless, "--drain-s", "1")
    held = server.begin(max_tokens=8000, n=4)
    wait_until(lambda: server.metric("kv_cache_usage_perc") > 0)
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(PATIENCE_S) == 0
    assert time.monotonic() - began < 20
    held.close()


def test_after_kill_9_it_serves_again(start: Callable[..., Process], endless: Path) -> None:
    server = start(endless)
    first = server.chat(max_tokens=30).json["choices"]
    held = server.begin(max_tokens=8000, stream=True)
    wait_until(lambda: server.metric("kv_cache_usage_perc") > 0)
    server.process.send_signal(signal.SIGKILL)
    assert server.process.wait(PATIENCE_S) == -signal.SIGKILL
    again = start(endless, port=server.port)
    assert again.port == server.port
    assert again.chat(max_tokens=30).json["choices"] == first
    held.close()


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


# -- the command ----------------------------------------------------------------------------------


def test_flags_and_keys_of_the_command(
    start: Callable[..., Process], endless: Path, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("from-the-file\n")
    flags = ("--served-model-name", "mine", "--max-thinking-tokens", "7", "--final-text", "So:")
    more = ("--api-key-file", str(tmp_path / "keys"), "--host", "0.0.0.0")
    server = start(endless, *flags, *more, S1FAST_API_KEY="from-the-environment,other")
    for key in ("from-the-environment", "other", "from-the-file"):
        server.key = key
        assert server.get("/v1/models").json["data"][0]["id"] == "mine"
    body = server.chat("a secret question", max_tokens=40, model="mine").json
    assert body["usage"]["s1"]["thinking_tokens"] == 7
    assert body["choices"][0]["message"]["content"].startswith("\nSo:")
    server.key = "wrong-key"
    assert server.chat(max_tokens=4).status == 401
    log = server.log.read_text()
    assert all(json.loads(line)["time"] for line in log.splitlines())
    assert "secret" not in log and "from-the" not in log and "wrong-key" not in log


@pytest.mark.parametrize(
    ("flags", "naming"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0: whoever reaches it"),
        (["--port", "x"], "--port"),
        (["--max-thinking-tokens", "x"], "--max-thinking-tokens"),
        (["--temperature", "-1"], "temperature must be"),
        (["--num-ignore", "-1"], "num_ignore must be"),
        (["--max-batch", "0"], "max_batch must be"),
        (["--api-key-file", "/nowhere"], "/nowhere"),
    ],
)
def test_flags_that_cannot_be_honoured(
    flags: list[str],
    naming: str,
    endless: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("S1FAST_API_KEY", raising=False)
    monkeypatch.setattr(sys, "argv", ["s1fast", "serve", str(endless), "--port", "0", *flags])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and naming in said and said.count("\n") == 1


def test_without_its_packages_the_command_says_which(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("s1fast.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.setattr(sys, "argv", ["s1fast", "serve", "model"])
    with pytest.raises(SystemExit):
        main()
    assert "serve needs fastapi: pip install 's1fast[serve]'" in capsys.readouterr().err
