"""What is made of samples: the summary by hand, the curves, the comparison of two runs."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from s1fast.answers import Cell
from s1fast.curves import compare, plot
from s1fast.errors import InputError
from s1fast.results import summarise

Row = dict[str, Any]


def row(problem: str, cell: str, correct: bool, tokens: int | None = 10, **values: Any) -> Row:
    return {
        "task": "gsm8k",
        "problem": problem,
        "cell": cell,
        "sample": 0,
        "counted": True,
        "correct": correct,
        "decided": True,
        "extracted": "7",
        "vote": "7",
        "thoughts_tokens": tokens,
        "answer_tokens": 4,
        "waits_used": 0,
        "thinking_end": "natural",
        "question_hash": f"hash {problem}",
        **values,
    }


def test_a_summary_by_hand() -> None:
    cells = [Cell(budget=20), Cell(budget=80), Cell("short", 80), Cell("long", 80)]
    rows = [
        row("1", "20", False, 20, thinking_end="length", extracted=""),
        row("2", "20", True, 20),
        row("1", "80", True, 80, waits_used=3),
        row("2", "80", True, 40, waits_used=1),
        row("1", "80 short", True, 50),
        row("2", "80 short", False, 50, decided=False),
        row("1", "80 long", False, 50),
        row("2", "80 long", False, 50),
    ]
    task = summarise(rows, cells, "m")["tasks"]["gsm8k"]
    first, second, third, _ = task["cells"]
    assert (first["accuracy"], second["accuracy"], third["accuracy"]) == (50, 100, 50)
    assert first["interval95"] == [0, 100] and second["interval95"] == [100, 100]
    assert second["thinking_tokens"] == {"mean": 60, "min": 40, "max": 80}
    assert (first["forced_ends"], second["waits"], first["without_answer"]) == (0.5, 2, 1)
    assert (first["undecided"], third["undecided"]) == (0, 1)
    forcing, classes = task["methods"]
    assert forcing == {
        "method": "budget forcing",
        "runs": 2,
        "control": 100,
        "scaling_per_token": 50 / 40,
        "scaling_per_doubling": pytest.approx(50 / 1.5849625),
        "performance": 100,
    }
    # short thinks 50 where plain thinks 60, as it should; long thinks 50, which is not more
    assert (classes["method"], classes["control"], classes["performance"]) == (
        "class-conditional",
        50,
        50,
    )
    assert classes["scaling_per_token"] is None, "both thought equally long"


def test_votes_by_hand() -> None:
    """Of four samples: two right ones, however written, against a wrong one that comes twice."""
    votes = {"1": ["9", "right 1/2", "9", "right 0.5"], "2": ["8", "right", "right", ""]}
    rows = [
        row(p, "auto", vote.startswith("right"), 5, vote=vote, sample=i, extracted=vote)
        for p, samples in votes.items()
        for i, vote in enumerate(samples)
    ]
    (cell,) = summarise(rows, [Cell()], "m")["tasks"]["gsm8k"]["cells"]
    assert cell["accuracy"] == 50 and cell["problems"] == 2 and cell["samples"] == 8
    two, four = cell["at_k"]
    assert (two["k"], two["majority"]["accuracy"], two["coverage"]["accuracy"]) == (2, 0, 100)
    assert (four["k"], four["majority"]["accuracy"]) == (4, 50), "9 came first among equals"
    assert four["thinking_tokens"] == 20


def test_unknown_counts_stay_unknown() -> None:
    rows = [row("1", "auto", True, None, waits_used=None), row("2", "auto", True, 5)]
    task = summarise(rows, [Cell()], "m")["tasks"]["gsm8k"]
    (cell,) = task["cells"]
    assert cell["thinking_tokens"] is None and cell["waits"] is None
    assert cell["forced_ends"] is None and task["methods"] == []


@pytest.mark.parametrize("name", ["math500", "gsm8k"])
def test_curves_are_drawn(name: str, tmp_path: Path) -> None:
    cells = [Cell(budget=b, ignores=i) for b in (20, 80) for i in (None, 2)]
    rows = [row(str(p), c.label, p > 1, c.budget, task=name) for c in cells for p in range(4)]  # type: ignore[arg-type]
    task = summarise(rows, cells, "m")["tasks"][name]
    plot(name, task, "out/m", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# -- two runs -----------------------------------------------------------------------------------


def write(folder: Path, rows: list[Row]) -> Path:
    folder.mkdir()
    (folder / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_compare_pairs_problems(tmp_path: Path) -> None:
    """B misses six that A has, of 200: sure by pairs. Problems of one run alone are left out, and
    draws that rejection sampling threw away."""
    generator = random.Random(0)
    a = [row(str(i), "auto", generator.random() < 0.5) for i in range(200)]
    lost = [r["problem"] for r in a if r["correct"]][:6]
    b = [{**r, "correct": r["correct"] and r["problem"] not in lost} for r in a]
    a += [row("300", "auto", True), row("0", "500", True)]
    b += [row("5", "auto", not b[5]["correct"], counted=False)]
    console = Console(file=io.StringIO(), width=120)
    (found,) = compare(write(tmp_path / "A", a), write(tmp_path / "B", b), console)
    assert found["problems"] == 200 and found["cell"] == "auto"
    assert found["mean"] == pytest.approx(3) and found["low"] > 0
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "+3.0" in text and "differ" in text
    for name, tokens in (("A", 400), ("B", 900)):
        asked = {"model": name, "max_tokens": tokens, "temperature": 0.0}
        (tmp_path / name / "run.json").write_text(json.dumps(asked))
    compare(tmp_path / "A", tmp_path / "B", console)
    (told,) = [x for x in console.file.getvalue().splitlines() if " is " in x]  # type: ignore[attr-defined]
    assert told == "max_tokens is 400 in A and 900 in B", "where an equal cell means another thing"


def test_compare_refuses_what_cannot_be_compared(tmp_path: Path) -> None:
    a = write(tmp_path / "A", [row("1", "auto", True)])
    other = write(tmp_path / "B", [row("1", "auto", True, question_hash="x")])
    with pytest.raises(InputError, match="problem 1 of gsm8k is another question in"):
        compare(a, other, Console(quiet=True))
    apart = write(tmp_path / "C", [row("1", "500", True)])
    with pytest.raises(InputError, match=r"no cell in common; .* gsm8k auto; .* gsm8k 500"):
        compare(a, apart, Console(quiet=True))
    disjoint = write(tmp_path / "D", [row("2", "auto", True)])
    with pytest.raises(InputError, match="no problem of gsm8k is in both"):
        compare(a, disjoint, Console(quiet=True))
    with pytest.raises(InputError, match=r"nowhere: no samples.jsonl there"):
        compare(a, tmp_path / "nowhere", Console(quiet=True))
    torn = write(tmp_path / "E", [{"task": "gsm8k"}])
    with pytest.raises(InputError, match="row 1: no sample of an evaluation: 'counted' is missing"):
        compare(a, torn, Console(quiet=True))
