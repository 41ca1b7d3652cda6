"""The benchmarks' rows: how they become prompts and answers, and what is wrong with bad ones."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from s1fast import tasks
from s1fast.errors import InputError
from s1fast.tasks import TASKS, fingerprint, load

Write = Callable[..., Path]
GPQA = {
    "Question": "Which one?\n",
    "Correct Answer": "muon",
    "Incorrect Answer 1": "proton",
    "Incorrect Answer 2": "electron",
    "Incorrect Answer 3": "neutron, free",
}


def test_rows_become_problems(write_rows: Write) -> None:
    gsm8k = write_rows([{"question": "How many?", "answer": "6 * 7 = <<6*7=42>>42\n#### 1,042"}])
    (problem,) = load(f"gsm8k={gsm8k}")
    assert (problem.question, problem.gold, problem.kind) == ("How many?", "1042", "math")
    assert (problem.task, problem.id) == ("gsm8k", "1")
    aime = write_rows(
        [{"problem": "P", "answer": "025"}, {"question": "Q", "answer": 33}], "a.jsonl"
    )
    assert [(p.question, p.gold, p.kind) for p in load(f"aime25={aime}")] == [
        ("P", "025", "integer"),
        ("Q", "33", "integer"),
    ]
    assert len(load(f"aime24={aime}", rows=1)) == 1


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_gpqa_is_asked_with_shuffled_choices(tmp_path: Path) -> None:
    """Four lines below the question, in an order that hangs on the question alone."""
    rows = [{**GPQA, "Question": f"Which one of {i}?"} for i in range(40)]
    path = write_csv(tmp_path / "gpqa_diamond.csv", rows)
    problems = load(f"gpqa={path}")
    for problem in problems:
        question, _, listed = problem.question.partition("\n\n")
        assert question.startswith("Which one of")
        assert listed.splitlines() == [
            f"{x}) {c}" for x, c in zip("ABCD", problem.choices, strict=True)
        ]
        assert problem.choices["ABCD".index(problem.gold)] == "muon"
        assert sorted(problem.choices) == ["electron", "muon", "neutron, free", "proton"]
    assert {problem.gold for problem in problems} == set("ABCD")
    backwards = load(f"gpqa={write_csv(tmp_path / 'back.csv', rows[::-1])}")
    assert [p.question for p in backwards[::-1]] == [p.question for p in problems]


def test_every_task_from_its_published_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the hub: of a dataset's files the task's own are read, and no others."""
    layout: dict[str, tuple[str, dict[str, Any]]] = {
        "aime24": ("data/train-00000-of-00001.parquet", {"problem": "P", "answer": "1"}),
        "aime25": ("train.jsonl", {"question": "P", "answer": "1"}),
        "math500": ("data/test-00000-of-00001.parquet", {"problem": "P", "answer": "x"}),
        "gpqa": ("gpqa_diamond.csv", GPQA),
        "gsm8k": ("main/test-00000-of-00001.parquet", {"question": "P", "answer": "#### 1"}),
    }
    assert set(layout) == set(TASKS)

    def find(name: str, kind: str, files: tuple[str, ...]) -> Path:
        folder = tmp_path / name
        task = next(t for t in TASKS if TASKS[t].dataset == name)
        path, row = folder / layout[task][0], layout[task][1]
        path.parent.mkdir(parents=True)
        if path.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
        elif path.suffix == ".csv":
            write_csv(path, [row])
        else:
            path.write_text(json.dumps(row) + "\n")
        for other in ("README.md", "socratic/test-0.parquet", "gpqa_main.csv"):
            if task in ("gpqa", "gsm8k"):
                (folder / other).parent.mkdir(exist_ok=True)
                (folder / other).write_text("not to be read")
        return folder

    monkeypatch.setattr(tasks, "find", find)
    for name in TASKS:
        (problem,) = load(name)
        assert problem.task == name and problem.kind == TASKS[name].kind


def test_fingerprints_tell_data_apart(write_rows: Write) -> None:
    one = load(f"aime24={write_rows([{'problem': 'P', 'answer': 1}])}")
    other = load(f"aime24={write_rows([{'problem': 'P', 'answer': 2}], 'b.jsonl')}")
    assert fingerprint(one) == fingerprint(one) != fingerprint(other)


@pytest.mark.parametrize(
    ("name", "row", "naming"),
    [
        ("math500", {"problem": "P"}, "row 2: field answer is missing.*nothing can be graded"),
        ("math500", {"answer": "1"}, "row 2: field problem or question is missing"),
        (
            "math500",
            {"problem": "P", "answer": ["1"]},
            "row 2: field answer must be text, found list",
        ),
        ("math500", {"problem": "  ", "answer": "1"}, "row 2: field problem is empty"),
        ("aime24", {"problem": "P", "answer": "1/2"}, "row 2: field answer must be a whole number"),
        ("gsm8k", {"question": "P", "answer": "42"}, "row 2: field answer has no '#### result'"),
        (
            "gsm8k",
            {"question": "P", "answer": "42 ####"},
            "row 2: field answer has no '#### result'",
        ),
        ("gsm8k", [1], "row 2: expected an object"),
        ("gpqa", {"Question": "Q", "Correct Answer": "x"}, "row 2: field Incorrect Answer 1"),
        ("gpqa", {**GPQA, "Incorrect Answer 2": "muon"}, "row 2: field Correct Answer equals"),
    ],
)
def test_malformed_rows(name: str, row: Any, naming: str, tmp_path: Path) -> None:
    good = {**GPQA, "problem": "P", "question": "P", "answer": "#### 1" if name == "gsm8k" else "1"}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=f"rows.jsonl: {naming}"):
        load(f"{name}={path}")
    assert len(load(f"{name}={path}", rows=1)) == 1


@pytest.mark.parametrize(
    ("spec", "rows", "naming"),
    [
        (
            "maht500",
            None,
            r"no task 'maht500' \(did you mean math500\?\); there are aime24, aime25",
        ),
        ("zzz", None, "no task 'zzz'; there are"),
        ("", None, "no task ''"),
        ("aime24=FOLDER/none.jsonl", None, "no such path"),
        ("aime24=FOLDER/empty.jsonl", None, "holds no rows"),
        ("aime24=FOLDER", 0, "--rows: must be at least 1"),
        ("gpqa=FOLDER", None, "no file there is named like gpqa_diamond.csv"),
        ("gpqa=FOLDER/torn.csv", None, "torn.csv: row 1: not as many cells"),
        ("gpqa=FOLDER/latin.csv", None, "latin.csv: not a usable CSV file"),
        ("aime24=FOLDER/notes.txt", None, "expected a .jsonl or .parquet file"),
    ],
)
def test_bad_specs(spec: str, rows: int | None, naming: str, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "torn.csv").write_text("Question,Correct Answer\nWhich?\n")
    (tmp_path / "latin.csv").write_bytes(b"Question\n\xff\n")
    with pytest.raises(InputError, match=naming):
        load(spec.replace("FOLDER", str(tmp_path)), rows)
