"""The benchmarks of the paper: where their rows are, how they are asked, what the answer is.

A task is asked as s1 asked it: the bare problem, for GPQA with the four choices below it, and no
word about boxes or formats (simplescaling/s1, lm_eval/tasks/aime, openai_math, gpqa/openai). Rows
come from Hugging Face, once, or from a file that has the same fields.

GPQA's choices are shuffled by a seed of the question's own text, so that they do not depend on the
order of the rows; s1's harness shuffled with one generator for all rows.
"""

from __future__ import annotations

import csv
import difflib
import fnmatch
import hashlib
import io
import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from s1fast.errors import InputError
from s1fast.files import read_bytes
from s1fast.hub import find
from s1fast.rows import read_rows

Row = dict[str, Any]
Kind = Literal["integer", "math", "letter"]
"""How an answer is graded: as a whole number, as mathematics, as one of four letters."""

STYLES = {
    "plain": "",
    "short": (
        "\n\nAnswer after a short amount of thinking. Do not spend excessive time double-checking "
        "your work."
    ),
    "long": (
        "\n\nAnswer after a long amount of thinking. If you feel like you are finished early, "
        "spend the extra time trying to double-check your work until you are absolutely sure that "
        "you have the correct answer."
    ),
}
"""What is appended to a problem. short and long are the paper's class-conditional control."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One question with its answer."""

    task: str
    id: str
    """Row number in the task's data, counted from 1."""
    question: str
    gold: str
    kind: Kind
    choices: tuple[str, ...] = ()
    """Texts of A, B, C and D where the answer is a letter."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark. `read` makes question, answer and choices of a row; `where` names the row."""

    dataset: str
    """Hugging Face id."""
    files: tuple[str, ...]
    """Patterns of the files in it that hold the test rows."""
    kind: Kind
    read: Callable[[Row, str], tuple[str, str, tuple[str, ...]]]


def load(spec: str, rows: int | None = None) -> list[Problem]:
    """The problems of a task.

    Args:
        spec: a name of TASKS, or NAME=PATH for a local .jsonl, .parquet or .csv file, or folder.
        rows: only the first so many.

    Raises:
        InputError: an unknown task, with the nearest name; no rows; a malformed row, naming the
            field.
    """
    name, _, local = spec.partition("=")
    task = TASKS.get(name)
    if task is None:
        near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.3)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(f"--tasks: no task {name!r}{hint}; there are {', '.join(TASKS)}")
    if rows is not None and rows < 1:
        raise InputError(f"--rows: must be at least 1, got {rows}")
    path = find(local) if local else find(task.dataset, "dataset", task.files)
    problems: list[Problem] = []
    for where, row in itertools.islice(_rows(path, task), rows):
        question, gold, choices = task.read(row, where)
        problems.append(
            Problem(
                task=name,
                id=str(len(problems) + 1),
                question=question,
                gold=gold,
                kind=task.kind,
                choices=choices,
            )
        )
    if not problems:
        raise InputError(f"task {name}: {path} holds no rows")
    return problems


def fingerprint(problems: Sequence[Problem]) -> str:
    """First 16 hex digits of a hash of all questions and answers: tells two sets apart."""
    texts = [f"{p.question}\0{p.gold}\0" for p in problems]
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:16]


def _rows(path: Path, task: Task) -> Iterator[tuple[str, Row]]:
    if not path.is_dir():
        yield from _read(path)
        return
    files = [
        file
        for file in sorted(p for p in path.rglob("*") if p.is_file())
        if any(fnmatch.fnmatch(file.relative_to(path).as_posix(), name) for name in task.files)
    ]
    if not files:
        raise InputError(f"{path}: no file there is named like {' or '.join(task.files)}")
    for file in files:
        yield from _read(file)


def _read(path: Path) -> Iterator[tuple[str, Row]]:
    """read_rows, and CSV, in which GPQA is published."""
    if path.suffix != ".csv":
        yield from read_rows(path, "")
        return
    try:
        lines = io.StringIO(read_bytes(path).decode("utf-8-sig"), newline="")
        for number, row in enumerate(csv.DictReader(lines, strict=True), start=1):
            if None in row or None in row.values():
                raise InputError(f"{path}: row {number}: not as many cells as the first line names")
            yield f"{path}: row {number}", row
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a usable CSV file: {error}") from None


def _text(row: Row, names: Sequence[str], where: str) -> str:
    """The first of these fields that the row has; numbers count as text."""
    for name in names:
        value = row.get(name)
        if value is None:
            continue
        if type(value) is int:
            return str(value)
        if not isinstance(value, str):
            raise InputError(f"{where}: field {name} must be text, found {type(value).__name__}")
        if not value.strip():
            raise InputError(f"{where}: field {name} is empty")
        return value.strip()
    listed = ", ".join(str(name)[:40] for name in list(row)[:12])
    why = "; without answers nothing can be graded" if "answer" in names else ""
    raise InputError(
        f"{where}: field {' or '.join(names)} is missing; the row has {listed or 'no fields'}{why}"
    )


def _math(row: Row, where: str) -> tuple[str, str, tuple[str, ...]]:
    return _text(row, ("problem", "question"), where), _text(row, ("answer",), where), ()


def _aime(row: Row, where: str) -> tuple[str, str, tuple[str, ...]]:
    question, gold, _ = _math(row, where)
    if not re.fullmatch(r"\d{1,3}", gold):
        raise InputError(f"{where}: field answer must be a whole number up to 999, found {gold!r}")
    return question, gold, ()


def _gsm8k(row: Row, where: str) -> tuple[str, str, tuple[str, ...]]:
    question, answer = _text(row, ("question",), where), _text(row, ("answer",), where)
    gold = answer.rpartition("####")[2].strip().replace(",", "")
    if "####" not in answer or not gold:
        raise InputError(f"{where}: field answer has no '#### result' at its end")
    return question, gold, ()


def _gpqa(row: Row, where: str) -> tuple[str, str, tuple[str, ...]]:
    names = ("Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))
    question = _text(row, ("Question",), where)
    choices = [_text(row, (name,), where) for name in names]
    right = choices[0]
    if choices.count(right) > 1:
        raise InputError(f"{where}: field Correct Answer equals an incorrect one")
    random.Random(hashlib.sha256(question.encode()).digest()).shuffle(choices)
    listed = "\n".join(f"{letter}) {text}" for letter, text in zip("ABCD", choices, strict=True))
    return f"{question}\n\n{listed}", "ABCD"[choices.index(right)], tuple(choices)


_WHOLE = ("*.parquet", "*.jsonl")
_TEST = ("*test*.parquet", "*test*.jsonl")

TASKS: dict[str, Task] = {
    "aime24": Task(
        dataset="simplescaling/aime24_nofigures", files=_WHOLE, kind="integer", read=_aime
    ),
    "aime25": Task(dataset="TIGER-Lab/AIME25", files=_WHOLE, kind="integer", read=_aime),
    "math500": Task(dataset="simplescaling/openaimath", files=_TEST, kind="math", read=_math),
    "gpqa": Task(dataset="Idavidrein/gpqa", files=("gpqa_diamond.csv",), kind="letter", read=_gpqa),
    "gsm8k": Task(
        dataset="openai/gsm8k",
        files=("main/test*.parquet", "*gsm8k_test.jsonl"),
        kind="math",
        read=_gsm8k,
    ),
}
