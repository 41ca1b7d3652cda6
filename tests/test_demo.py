"""The demo's claim: accuracy rises with thinking, whatever the seed; and its command works."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from s1fast import demo
from s1fast.chat import Chat
from s1fast.decoder import Engine
from s1fast.demo_tasks import GO_ON, TASKS, IteratedMap, PairSearch, write_model
from s1fast.errors import InputError

ROOT = Path(__file__).resolve().parent.parent


SEEDS = pytest.mark.parametrize("seed", [0, 1, 2])


def _curve(task: IteratedMap, seed: int, folder: Path) -> dict[str, demo.Point]:
    model, problems = demo.learn(task, seed, folder / "demo", Console(quiet=True))
    points = demo.measure(Engine(model, max_batch=256), task, problems)
    demo.plot(points, task, folder / "curve.png")
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    return {p.setting: p for p in points}


def _assert_rises(points: dict[str, demo.Point], settings: list[str]) -> None:
    for less, more in pairwise(settings):
        assert points[less].thinking_tokens < points[more].thinking_tokens
        # 240 problems: a standard deviation of a difference is at most 4.6 points.
        assert points[less].accuracy + 0.03 < points[more].accuracy, (less, more)


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2))])
def test_accuracy_rises_with_thinking(seed: int, tmp_path: Path) -> None:
    """Half of the demo's training is enough for the beginning of the curve."""
    points = _curve(dataclasses.replace(IteratedMap(), num_steps=600), seed, tmp_path)
    _assert_rises(points, ["cut at 0 tokens", "cut at 6 tokens", "natural stop", "1 x Wait"])


@pytest.mark.slow
@SEEDS
def test_whole_curve(seed: int, tmp_path: Path) -> None:
    points = _curve(IteratedMap(), seed, tmp_path)
    waits = [f"{n} x Wait" for n in (1, 2, 3)]
    _assert_rises(points, ["cut at 0 tokens", "cut at 6 tokens", "natural stop", *waits])
    assert points["3 x Wait"].accuracy > 0.9


def test_map_traces_are_right() -> None:
    task = IteratedMap()
    assert task.solution((3, 2)) == str((5 * ((5 * 3 + 7) % 97) + 7) % 97)
    assert task.trace((3, 4), ["Hmm"]) == ("3: 22\n2: 20\n1: 10\nHmm\n0: 57", "57")
    assert task.trace((3, 1), ["Wait"]) == ("0: 22\nWait\n0: 22", "22")


def test_search_traces_are_right() -> None:
    task = PairSearch()
    problem = ((1, 2, 3, 4, 5, 20), 25)
    assert task.solution(problem) == "5 20"
    trace, answer = task.trace(problem, ["Wait"] * 4)
    assert trace.count("Wait") == 4 and trace.endswith("5 20 = 25 off 0") and answer == "5 20"
    trace, answer = task.trace(((1, 2, 3, 4, 5, 20), 3), ["Wait"])
    assert trace == "1 2 = 3 off 0\nWait\n1 2 = 3 off 0" and answer == "1 2"


@pytest.mark.parametrize("name", list(TASKS))
def test_every_word_is_known(name: str, tmp_path: Path) -> None:
    """The tokenizer gives back question, trace and answer, and held-out problems are new."""
    task = TASKS[name]
    write_model(task, tmp_path)
    chat = Chat.load(tmp_path)
    training, held_out = task.split(random.Random(0))
    assert len(held_out) == 240 and not set(held_out) & set(training)
    for problem in held_out[:50]:
        thinking, answer = task.trace(problem, GO_ON)
        for line in (task.question(problem), thinking, f"Final Answer: {answer}"):
            assert chat.decode(chat.encode(line)) == line


def test_output_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="holds other files"):
        demo.run("map", seed=0, output=tmp_path, weights=tmp_path)
    with pytest.raises(InputError, match=r"thesis.tex is a file"):
        demo.run("map", seed=0, output=tmp_path / "thesis.tex", weights=tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


@pytest.mark.slow
def test_whole_command(smollm2: Path, tmp_path: Path) -> None:
    """Both acts, in under two minutes."""
    command = [sys.executable, "-m", "s1fast", "demo", "--output", str(tmp_path / "demo")]
    done = subprocess.run(
        [*command, "--weights", str(smollm2)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "6 x Wait" in done.stdout and "[Wait]" in done.stdout and "two Waits" in done.stdout
    assert (tmp_path / "demo" / "scaling.png").exists()
