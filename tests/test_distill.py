"""Distillation against a faulty server: everything answered, each answer paid for once."""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console

import fake_gemini as fake
from s1fast.errors import InputError
from s1fast.recipes import store as store_module
from s1fast.recipes.asking import Meter, Pace, Task, ask_all
from s1fast.recipes.distill import DistillConfig, distill
from s1fast.recipes.questions import question_hash, read_questions
from s1fast.recipes.store import Store, peek
from s1fast.recipes.teachers import Reply

pytest.importorskip("google.genai", reason="no google-genai; unproven: distillation")
PRICES = {"input_price": 2.0, "output_price": 10.0}


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    monkeypatch.setenv("GEMINI_API_KEY", "right-key")
    servers = []

    def make(**options: Any) -> Any:
        servers.append(fake.FakeGemini(**options))
        return servers[-1]

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


def config(server: Any, **values: Any) -> DistillConfig:
    pace = {
        "concurrency": 16,
        "request_seconds": 2.0,
        "first_wait_seconds": 0.02,
        "longest_wait_seconds": 0.2,
        **PRICES,
        **values.pop("pace", {}),
    }
    return DistillConfig(
        **{"model": "known", "base_url": server.url, "pace": Pace(**pace), **values}
    )


def write_questions(path: Path, count: int) -> Path:
    path.write_text(
        "".join(json.dumps({"question": f"What is {i} + {i}?"}) + "\n" for i in range(count))
    )
    return path


def quiet() -> Console:
    return Console(file=io.StringIO(), width=1000)


def stored(path: Path) -> dict[str, dict[str, Any]]:
    with sqlite3.connect(path) as db:
        return {k: json.loads(v) for k, v in db.execute("SELECT key, value FROM records")}


def billed(path: Path) -> tuple[int, int]:
    records = stored(path).values()
    output = sum(r["answer_tokens"] + (r["thoughts_tokens"] or 0) for r in records)
    return sum(r["prompt_tokens"] for r in records), output


def test_every_fault_and_each_paid_once(serve: Any, tmp_path: Path) -> None:
    server, n = serve(), 200
    source, path = write_questions(tmp_path / "q.jsonl", n), tmp_path / "s.sqlite"
    console = quiet()
    target = distill([source], path, config(server), console)
    assert len(server.paid) == n and set(server.paid.values()) == {1}
    assert all(server.fault_counts[f] > 2 for f in fake.FAULTS), server.fault_counts
    assert tuple(server.tokens) == billed(path)
    dollars = (2.0 * server.tokens[0] + 10.0 * server.tokens[1]) / 1e6
    assert f"${dollars:.4f}" in console.file.getvalue()  # type: ignore[attr-defined]
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert len(rows) == n
    refused = [row for row in rows if row["refused"]]
    assert 0 < len(refused) < n / 4 and {r["refused"] for r in refused} == {"RECITATION"}
    for row in rows:
        expected = fake.answer(row["question"], "raw")["candidates"][0]
        if not row["refused"]:
            thinking, answer = expected["content"]["parts"]
            assert (row["thinking"], row["answer"]) == (thinking["text"], answer["text"])
            assert row["thoughts_kind"] == "raw" and row["model"] == "known"
    before = server.seen.total()
    distill([source], path, config(server), quiet())
    assert server.seen.total() == before  # all of it is in the store
    for file in tmp_path.iterdir():
        assert b"right-key" not in file.read_bytes()


# An answer that comes too late is paid for and asked again, which is no fault of a kill: the
# child's patience is beyond what a busy machine takes.
CHILD = """
import sys
from pathlib import Path
from rich.console import Console
from s1fast.recipes.asking import Pace
from s1fast.recipes.distill import DistillConfig, distill
pace = Pace(concurrency=8, request_seconds=4.0, first_wait_seconds=0.02, longest_wait_seconds=0.2)
config = DistillConfig(model="known", base_url=sys.argv[3], pace=pace)
distill([Path(sys.argv[1])], Path(sys.argv[2]), config, Console(quiet=True))
"""


@pytest.mark.parametrize(("n", "kills"), [(120, 3), pytest.param(1000, 20, marks=pytest.mark.slow)])
def test_kill_9_neither_loses_nor_repays(n: int, kills: int, serve: Any, tmp_path: Path) -> None:
    """What was stored at a kill is never asked again; only what was under way can be paid twice."""
    server, rng = serve(delay_s=0.15), random.Random(0)
    source, path = write_questions(tmp_path / "q.jsonl", n), tmp_path / "s.sqlite"
    questions = {question_hash(r["question"]): r["question"] for r in read_questions([source]).rows}
    command = [sys.executable, "-c", CHILD, str(source), str(path), server.url]
    lost, torn = 0, dict.fromkeys(questions, 0)
    for kill in range(kills):
        child = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        enough = n * (kill + 1) // (kills + 2)  # some progress each time
        while len(server.paid) < enough:
            assert child.poll() is None, "it ended by itself"
            time.sleep(0.005)
        time.sleep(rng.random() * 0.2)
        child.send_signal(signal.SIGKILL)
        child.wait()
        while server.active:
            time.sleep(0.01)
        with sqlite3.connect(path) as db:
            under_way = {key for (key,) in db.execute("SELECT key FROM under_way")}
        kept = stored(path)
        for key in kept:
            assert server.paid[questions[key]] >= 1
        frozen = {key: server.seen[questions[key]] for key in kept}
        unstored = [q for k, q in questions.items() if k not in kept and server.paid[q]]
        assert {question_hash(q) for q in unstored} <= under_way and len(under_way) <= 8
        for key, question in questions.items():
            new = server.paid[question] - (key in kept) - torn[key]
            assert new == 0 or (new == 1 and key in under_way)
            torn[key] += new
        lost = server.paid.total() - len(kept)
        if kill + 1 < kills:
            continue
        assert subprocess.run(command, timeout=300).returncode == 0
        assert all(server.seen[questions[key]] == count for key, count in frozen.items())
    assert set(stored(path)) == set(questions)
    assert server.paid.total() == n + lost  # nothing but what kills tore off was paid twice
    console = quiet()
    distill([source], path, config(server), console)
    prompt, output = billed(path)  # the meter is the sum over the stored answers
    assert f"${(2.0 * prompt + 10.0 * output) / 1e6:.4f}" in console.file.getvalue()  # type: ignore[attr-defined]
    beyond = [0, 0]  # and the server's total exceeds it by the answers in flight at a kill
    for key, question in questions.items():
        usage = fake.answer(question, "raw")["usageMetadata"]
        beyond[0] += torn[key] * usage["promptTokenCount"]
        counted = usage.get("thoughtsTokenCount", 0) + usage.get("candidatesTokenCount", 0)
        beyond[1] += torn[key] * counted
    assert [server.tokens[0] - prompt, server.tokens[1] - output] == beyond
    with Store(
        path, {"step": "distill", "teacher": "gemini", "model": "known", "base_url": server.url}
    ) as s:
        assert sum(torn.values()) == lost <= s.abandoned <= 8 * kills


def test_a_rejected_question_does_not_stop_the_others(serve: Any, tmp_path: Path) -> None:
    server = serve(faults=False)
    source, path = write_questions(tmp_path / "q.jsonl", 20), tmp_path / "s.sqlite"
    long = "".join(json.dumps({"question": f"Too long {i}"}) + "\n" for i in range(7))
    source.write_text(source.read_text() + long)
    console = quiet()
    for _ in range(2):  # seven first questions rejected, but the store shows that the model works
        distill([source], path, config(server), console)
        listed = path.with_suffix(".failed.txt").read_text().splitlines()
        assert len(listed) == 7 and all("HTTP 400" in x and "too many" in x for x in listed)
    assert "7 failed" in console.file.getvalue()  # type: ignore[attr-defined]
    assert len(server.paid) == 20 and set(server.paid.values()) == {1}
    assert {n for q, n in server.seen.items() if q.startswith("Too long")} == {2}  # once a run


@pytest.mark.parametrize(("kind", "code", "asked"), [("Too long", 400, 5), ("Down", 503, 15)])
def test_five_alike_failures_stop(
    kind: str, code: int, asked: int, serve: Any, tmp_path: Path
) -> None:
    server, source = serve(faults=False), tmp_path / "q.jsonl"
    source.write_text("".join(json.dumps({"question": f"{kind} {i}"}) + "\n" for i in range(40)))
    naming = rf"first 5 questions failed alike.*HTTP {code}.*check the server, --model"
    with pytest.raises(InputError, match=naming):
        distill([source], tmp_path / "s.sqlite", config(server, pace={"attempts": 3}), quiet())
    assert server.seen.total() == asked


def test_half_a_character_is_stored(serve: Any, tmp_path: Path) -> None:
    server, source = serve(faults=False), tmp_path / "q.jsonl"
    source.write_text("".join(json.dumps({"question": f"Half {i}"}) + "\n" for i in range(8)))
    target = distill([source], tmp_path / "s.sqlite", config(server), quiet())
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert len(rows) == 8 and set(server.paid.values()) == {1}
    assert all(row["answer"].endswith("\ufffd") for row in rows if not row["refused"])


def test_a_bug_loses_no_answer_under_way(tmp_path: Path) -> None:
    """What no one foresaw ends the run once the other answers, which are billed, are stored."""

    class Odd:
        identity: ClassVar = {"teacher": "odd"}

        async def ask(self, question: str, system: str = "") -> Reply:
            await asyncio.sleep(0.05)
            if question == "q3":
                raise ZeroDivisionError("a bug")
            await asyncio.sleep(0.2)
            return Reply(answer="a")

        async def aclose(self) -> None:
            pass

    tasks = [Task(key=str(i), question=f"q{i}") for i in range(40)]
    with Store(tmp_path / "s.sqlite", {}) as store:
        with pytest.raises(ZeroDivisionError):
            ask_all(Odd(), tasks, store, Pace(concurrency=8), quiet())
        assert [key for key, _ in store.records()] == ["0", "1", "2", "4", "5", "6", "7"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_waits_for_what_is_under_way(name: str, serve: Any, tmp_path: Path) -> None:
    server = serve(delay_s=0.5, faults=False)
    source, path = write_questions(tmp_path / "q.jsonl", 60), tmp_path / "s.sqlite"
    command = [sys.executable, "-c", CHILD, str(source), str(path), server.url]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while server.active < 8 or len(server.paid) < 6:  # the first five are asked alone
        assert child.poll() is None, "it ended by itself"
        time.sleep(0.005)
    child.send_signal(getattr(signal, name))
    assert "interrupted; all answers are kept" in child.communicate(timeout=60)[1]
    assert 6 <= len(stored(path)) == server.paid.total() == server.seen.total() < 60


def test_other_questions_of_the_store_are_not_counted(serve: Any, tmp_path: Path) -> None:
    server, console = serve(faults=False), quiet()
    source, path = write_questions(tmp_path / "q.jsonl", 30), tmp_path / "s.sqlite"
    distill([source], path, config(server), quiet())
    prompt, output = billed(path)
    distill([source], path, config(server, rows=6), console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"[56] of 6 answered", said) and server.paid.total() == 30
    assert f"${(2.0 * prompt + 10.0 * output) / 1e6:.4f}" in said, "but what they cost is"


def test_the_meter_tells_what_was_cut() -> None:
    meter = Meter(None, None)
    counts = {"prompt_tokens": 1, "thoughts_tokens": None, "answer_tokens": 2, "refused": ""}
    for reason in ("STOP", "MAX_TOKENS", "length"):
        meter.add({**counts, "finish_reason": reason})
    assert meter.line(9, None) == "3 of 9 answered, 2 of them cut by the token limit; 9 tokens"


@pytest.mark.parametrize("name", ["q.sqlite", "s.jsonl"])
def test_no_result_replaces_what_it_is_made_of(name: str, serve: Any, tmp_path: Path) -> None:
    source = write_questions(tmp_path / "q.jsonl", 6)
    before = source.read_bytes()
    with pytest.raises(InputError, match=r"\.jsonl: would be overwritten"):
        distill([source], tmp_path / name, config(serve(faults=False)), quiet())
    assert source.read_bytes() == before and list(tmp_path.iterdir()) == [source]


def test_help_into_a_closed_pipe_and_a_bad_flag() -> None:
    code = "from s1fast.cli import main; main()"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], stdout=writer, stderr=subprocess.PIPE, timeout=60
    )
    os.close(writer)
    assert done.stderr == b""
    flags = ["distill", "q.jsonl", "s.sqlite", "--model", "m", "--concurrency"]
    for value in ("0", "many"):
        bad = subprocess.run(
            [sys.executable, "-c", code, *flags, value], capture_output=True, text=True, timeout=60
        )
        (line,) = bad.stderr.splitlines()
        assert bad.returncode == 2 and "--concurrency" in line and not set("│─╭") & set(line)


@pytest.mark.parametrize("thoughts", ["none", "summary"])
def test_hidden_thoughts_stop_after_five(thoughts: str, serve: Any, tmp_path: Path) -> None:
    server = serve(faults=False, thoughts=thoughts)
    source, path = write_questions(tmp_path / "q.jsonl", 40), tmp_path / "s.sqlite"
    for _ in range(2):  # the second time from the store, without paying
        with pytest.raises(InputError, match="--accept-summaries"):
            distill([source], path, config(server), quiet())
        answered = [r for r in stored(path).values() if not r["refused"]]
        assert len(answered) == 5 and server.paid.total() == len(stored(path))
    target = distill([source], path, config(server, accept_summaries=True), quiet())
    kinds = {json.loads(x)["thoughts_kind"] for x in target.read_text().splitlines()}
    assert thoughts in kinds and "raw" not in kinds and set(server.paid.values()) == {1}


@pytest.mark.parametrize(("limit", "unseen"), [(0.03, False), (0.006, True)])
def test_the_money_ends_it(limit: float, unseen: bool, serve: Any, tmp_path: Path) -> None:
    """An answer costs up to 0.001; sixteen sent at once, before one has come, would pass 0.006."""
    server = serve(faults=False, delay_s=0.01)
    source, path = write_questions(tmp_path / "q.jsonl", 100), tmp_path / "s.sqlite"
    pace = {"max_dollars": limit}
    with pytest.raises(InputError, match=rf"--max-dollars {limit}: reached"):
        distill([source], path, config(server, pace=pace, accept_summaries=unseen), quiet())
    tokens = server.tokens
    assert tuple(tokens) == billed(path)
    assert limit - 0.003 < (2.0 * tokens[0] + 10.0 * tokens[1]) / 1e6 <= limit
    with pytest.raises(InputError, match="--output-price"):
        Pace(max_dollars=1.0)


@pytest.mark.parametrize(
    ("key", "model", "naming"),
    [
        ("", "known", "environment variable GEMINI_API_KEY"),
        ("wrong", "known", "API key was refused"),
        ("right-key", "gone", "--model 'gone': unknown"),
        ("right-key", "", "--model: name"),
    ],
)
def test_key_and_model(
    key: str, model: str, naming: str, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    monkeypatch.setenv("GEMINI_API_KEY", key)
    monkeypatch.delenv("GOOGLE_API_KEY", raising=False)
    source = write_questions(tmp_path / "q.jsonl", 20)
    with pytest.raises(InputError, match=naming):
        distill([source], tmp_path / "s.sqlite", config(server, model=model), quiet())
    assert not server.paid


def test_malformed_and_duplicate_rows_are_listed(serve: Any, tmp_path: Path) -> None:
    source = write_questions(tmp_path / "q.jsonl", 6)
    bad = [{"question": 3}, {"solution": "x"}, {"question": "What is 1 + 1?"}]
    bad.append({"question": "A?", "question_hash": "0" * 16})
    source.write_text(source.read_text() + "".join(json.dumps(row) + "\n" for row in bad))
    target = distill([source], tmp_path / "s.sqlite", config(serve(faults=False)), quiet())
    lines = target.with_name("s.jsonl.skipped.txt").read_text().splitlines()
    for line, found in zip(
        lines,
        ["7: field question is int", "8: field question is m", "9: dup", "10: field question_h"],
        strict=True,
    ):
        assert f"row {found}" in line


def test_a_store_of_another_run_schema_or_process(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    with Store(path, {"model": "misspelt"}):
        pass
    with Store(path, {"model": "a"}) as store:  # an empty one is anybody's
        store.put("k", {"x": 1})
        with pytest.raises(InputError, match="another run is writing"):
            Store(path, {"model": "a"})
    with pytest.raises(InputError, match="another run"):
        Store(path, {"model": "b"})
    with sqlite3.connect(path) as db:
        db.execute("UPDATE meta SET value='9' WHERE name='schema'")
    with pytest.raises(InputError, match="schema 9, expected 1"):
        Store(path, {"model": "a"})
    sqlite3.connect(tmp_path / "torn.sqlite").execute("PRAGMA journal_mode=WAL").close()
    assert peek(tmp_path / "torn.sqlite") == ({}, []), "killed before it had tables"
    path.write_text("no database at all " * 100)
    with pytest.raises(InputError, match=r"s\.sqlite: file is not a database"):
        Store(path, {"model": "a"})


def test_a_full_disk_loses_nothing(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite says that the disk is full until the reserve is gone; all that was paid is stored."""
    server = serve(faults=False, delay_s=0.02)
    source, path = write_questions(tmp_path / "q.jsonl", 60), tmp_path / "s.sqlite"
    whole = Store._put

    def full(self: Store, key: str, value: str) -> None:
        if len(self) >= 20 and self._reserve.exists():
            raise sqlite3.OperationalError("database or disk is full")
        whole(self, key, value)

    monkeypatch.setattr(store_module.Store, "_put", full)
    with pytest.raises(InputError, match="disk is full"):
        distill([source], path, config(server), quiet())
    assert 20 < len(stored(path)) < 60 and tuple(server.tokens) == billed(path)
    monkeypatch.setattr(store_module.Store, "_put", whole)
    distill([source], path, config(server), quiet())
    assert len(server.paid) == 60 and set(server.paid.values()) == {1}


def test_a_question_is_given_up_between_attempts(serve: Any, tmp_path: Path) -> None:
    """The time for a question ends its attempts, never an answer under way: it will be billed."""
    server = serve(faults=False, delay_s=0.5)
    source = write_questions(tmp_path / "q.jsonl", 4)
    with source.open("a") as file:
        file.write(json.dumps({"question": "Down"}) + "\n")
    pace = {"question_seconds": 0.2, "attempts": 1000}
    distill([source], tmp_path / "s.sqlite", config(server, pace=pace), quiet())
    assert len(stored(tmp_path / "s.sqlite")) == server.paid.total() == 4
    assert 1 < server.seen["Down"] < 100
    assert "Down" not in server.paid and (tmp_path / "s.failed.txt").exists()
