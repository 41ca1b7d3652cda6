"""What the selection needs to know of a question: difficulty, trace length, subject.

    python -m s1fast.recipes.features out/traces.jsonl out/features.jsonl --work out/work \\
        --tokenizer Qwen/Qwen2.5-32B-Instruct --solver engine:Qwen/Qwen2.5-7B-Instruct \\
        --solver engine:Qwen/Qwen2.5-32B-Instruct --subjects msc.json --classifier gemini:MODEL

Difficulty: two models answer every question, and their answers and the teacher's are graded, by
math-verify or, with --grader, by a language model as in the paper. Every answer, grade and subject
is kept by question hash in stores under --work, so that a second run pays for new questions only.
A TEACHER is gemini:MODEL, openai:MODEL, openai:MODEL@URL or engine:FOLDER.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from s1fast.chat import load_tokenizer
from s1fast.errors import InputError, exit_on_input_error
from s1fast.files import parse_json, read_bytes
from s1fast.grading import Graders, Item, boxed
from s1fast.hub import find
from s1fast.recipes.asking import Meter, Pace, Task, ask_all
from s1fast.recipes.questions import (
    Row,
    check_target,
    question_hash,
    read_questions,
    text_of,
    write_rows,
    write_skipped,
)
from s1fast.recipes.store import Store, peek
from s1fast.recipes.teachers import Sampling, Teacher, make_teacher

GRADER = (
    "You check answers to examination problems. You get a problem, an attempt and the correct "
    "answer. Decide whether the attempt reaches the correct answer; another form of writing it "
    "counts as correct, a missing or different result does not. Reason briefly. The last line of "
    "your reply must be the single word Yes or No."
)
CLASSIFIER = (
    "You sort examination questions by subject. You are given a question and a list of subjects, "
    "each with a two-digit code. Choose the one subject whose methods the solution needs most. "
    "Reason briefly. End your reply with the two digits of its code and nothing after them."
)
SOLVING = Sampling(temperature=0.05, max_tokens=32768)
"""s1's for the two models."""
GRADING = Sampling(max_tokens=8192)
"""s1's for the grader and the classifier."""


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """Who answers, grades and classifies."""

    work: Path
    """Folder of the stores."""
    tokenizer: str
    """Folder, tokenizer.json or hub id whose tokens measure a trace."""
    solvers: tuple[str, ...]
    """The two models whose failure makes a question difficult."""
    classifier: str
    """Teacher that names the subject."""
    subjects: Path
    """JSON list of {code, title}: the 61 classes of s1's data/msc.json."""
    grader: str = ""
    """Teacher that grades; math-verify if empty."""
    pace: Pace = field(default_factory=Pace)


def featurise(
    sources: Sequence[Path], target: Path, config: FeatureConfig, console: Console
) -> Path:
    """Adds length, subject, solver_correct_0 and _1, and teacher_correct to distilled rows.

    A feature that could not be had is null; the selection leaves such rows out and counts them.

    Raises:
        InputError: bad rows only, a bad flag or file, or whatever stops ask_all.
    """
    if len(config.solvers) != 2:
        raise InputError(f"--solver: give two, as s1 did, not {len(config.solvers)}")
    teachers = [("--solver", spec) for spec in config.solvers]
    teachers += [("--classifier", config.classifier), ("--grader", config.grader)]
    for flag, spec in teachers:
        if spec:
            check_teacher(spec, flag)
    subjects = read_subjects(config.subjects)
    count = token_counter(config.tokenizer)
    check_target(target, sources)
    questions = read_questions(sources)
    rows = questions.rows
    for row in rows:
        if row.get("thinking"):
            text = text_of(row, "thinking", row["question_hash"])
            row["length"] = count(text)
    answers = [{r["question_hash"]: str(r["answer"]) for r in rows if r.get("answer")}]
    tasks = [Task(key=row["question_hash"], question=row["question"]) for row in rows]
    for i, name in enumerate(config.solvers):
        answers.append(_replies(f"solver-{i}", name, tasks, config, console, SOLVING))
    fields = ("teacher_correct", "solver_correct_0", "solver_correct_1")
    with Graders() as graders:
        for name, given in zip(fields, answers, strict=True):
            grades = _grade(rows, given, config, console, graders)
            for row in rows:
                row[name] = grades.get(row["question_hash"])
    _classify(rows, subjects, config, console)
    write_rows(target, rows)
    missing = {n: sum(r.get(n) is None for r in rows) for n in ("length", "subject", *fields)}
    listed = ", ".join(f"{count} without {name}" for name, count in missing.items() if count)
    skipped = write_skipped(target, questions.skipped)
    console.print(f"{len(rows)} questions; {listed or 'every feature there'}; {skipped}: {target}")
    return target


def token_counter(name: str) -> Callable[[str], int]:
    """Counts a text's tokens; name: a folder, tokenizer.json or hub id."""
    path = find(name)
    tokenizer = load_tokenizer(path / "tokenizer.json" if path.is_dir() else path)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def read_subjects(path: Path) -> dict[str, str]:
    """Two-digit code -> title. Raises an InputError that names the entry."""
    entries = parse_json(read_bytes(path), str(path))
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: expected a list of subjects with code and title")
    found: dict[str, str] = {}
    for i, entry in enumerate(entries):
        where = f"{path}: entry {i + 1}"
        row = entry if isinstance(entry, dict) else {}
        code, title = text_of(row, "code", where), text_of(row, "title", where)
        if not re.fullmatch(r"\d\d", code) or code in found:
            raise InputError(f"{where}: code {code!r} must be two digits that no other entry has")
        found[code] = title
    return found


def teacher_of(spec: str, sampling: Sampling, flag: str) -> Teacher:
    """The teacher that a flag like openai:MODEL@URL names; its thoughts are not wanted."""
    name, colon, model = spec.partition(":")
    if not colon or not model:
        raise InputError(
            f"{flag} {spec!r}: expected gemini:MODEL, openai:MODEL@URL or engine:FOLDER"
        )
    model, _, url = model.partition("@http")
    return make_teacher(name, model, f"http{url}" if url else "", sampling, think=False)


def check_teacher(spec: str, flag: str) -> None:
    """Raises an InputError where it could not be asked, before others are asked for days."""
    if spec.startswith("engine:"):
        find(spec.removeprefix("engine:"))
    else:
        teacher_of(spec, GRADING, flag)


def _replies(
    step: str,
    spec: str,
    tasks: Sequence[Task],
    config: FeatureConfig,
    console: Console,
    sampling: Sampling,
) -> dict[str, str]:
    """What a teacher answers, by key, from its store where it has answered before."""
    teacher = teacher_of(spec, sampling, f"--{step.split('-')[0]}")
    console.print(f"{step}: {spec}", highlight=False)
    with Store(config.work / f"{step}.sqlite", {"step": step, **teacher.identity}) as store:
        elsewhere = _spent(config, store.path)
        meter = ask_all(teacher, tasks, store, config.pace, console, elsewhere=elsewhere)
        console.print(meter.line(len(tasks), config.pace.max_dollars), highlight=False)
        for key, reason in list(meter.failed.items())[:5]:
            console.print(f"  failed: {key}: {reason}", highlight=False, markup=False)
        found = {task.key: store.get(task.key) for task in tasks}
    return {key: r["answer"] for key, r in found.items() if r is not None and not r["refused"]}


def _spent(config: FeatureConfig, current: Path) -> float:
    """Dollars of the other steps' answers: --max-dollars is for all steps together."""
    meter = Meter(config.pace.input_price, config.pace.output_price)
    for path in sorted(config.work.glob("*.sqlite")):
        identity, records = peek(path) if path != current else ({}, [])
        if identity.get("teacher") != "engine":
            for record in records:
                meter.add(record)
    return meter.dollars


def _grade(
    rows: Sequence[Row],
    answers: dict[str, str],
    config: FeatureConfig,
    console: Console,
    graders: Graders,
) -> dict[str, bool | None]:
    """Question hash -> whether the answer is right; None where nothing can tell."""
    able = [r for r in rows if r.get("solution") and r["question_hash"] in answers]
    given = [answers[row["question_hash"]] for row in able]
    if config.grader:
        pairs = zip(able, given, strict=True)
        tasks = [grading_task(row["question"], row["solution"], text) for row, text in pairs]
        asked = [task for task, text in zip(tasks, given, strict=True) if text.strip()]
        replies = _replies("grader", config.grader, asked, config, console, GRADING)
        grades = [verdict(replies.get(task.key, "")) for task in tasks]
    else:
        grades = verify(given, [row["solution"] for row in able], graders)
    return {
        row["question_hash"]: grade if text.strip() else False  # no answer is a wrong one
        for row, text, grade in zip(able, given, grades, strict=True)
    }


def grading_task(question: str, solution: str, attempt: str) -> Task:
    """What a grader is asked. Its key holds question and attempt: all attempts share one store."""
    text = f"## Problem\n{question}\n\n## Attempt\n{attempt}\n\n## Correct answer\n{solution}"
    return Task(key=question_hash(question) + question_hash(text), question=text, system=GRADER)


def verdict(reply: str) -> bool | None:
    """The Yes or No that a grader's reply ends with; None if it does not."""
    last = (reply.split() or [""])[-1].strip(".*").lower()
    return {"yes": True, "no": False}.get(last)


def subject_of(reply: str, subjects: dict[str, str]) -> str | None:
    """The subject whose code a reply ends with, or else the one code that its last line names."""
    last = (reply.strip().splitlines() or [""])[-1]
    end = re.search(r"(?<!\d)(\d\d)\W*$", last)
    named = {code for code in re.findall(r"(?<!\d)\d\d(?!\d)", last) if code in subjects}
    code = end[1] if end else named.pop() if len(named) == 1 else ""
    return subjects.get(code)


def _classify(
    rows: Sequence[Row], subjects: dict[str, str], config: FeatureConfig, console: Console
) -> None:
    listed = "\n".join(f"{code} {title}" for code, title in subjects.items())
    tasks = [
        Task(
            key=row["question_hash"],
            question=f"## Question\n{row['question']}\n\n## Subjects\n{listed}",
            system=CLASSIFIER,
        )
        for row in rows
    ]
    replies = _replies("classifier", config.classifier, tasks, config, console, GRADING)
    for row in rows:
        row["subject"] = subject_of(replies.get(row["question_hash"], ""), subjects)


def verify(answers: Sequence[str], solutions: Sequence[str], graders: Graders) -> list[bool | None]:
    """Whether each answer's result equals its solution's; None if the solution states no result.

    Letters of multiple choice are compared as letters, all else as s1fast evaluate does.
    """
    golds = [final_result(solution) for solution in solutions]
    items = []
    for gold, answer in zip(golds, answers, strict=True):
        letter = re.fullmatch(r"\(?([A-H])\)?", gold or "")
        if letter:
            items.append(Item(kind="letter", gold=letter[1], answer=answer))
        elif gold is not None:
            items.append(Item(kind="math", gold=gold, answer=answer))
    grades = iter(graders.grade(items))
    return [None if gold is None else next(grades).correct for gold in golds]


def final_result(text: str) -> str | None:
    """The last boxed result, else what follows the last "Answer:" or "####", else a short text."""
    box = boxed(text)
    if box is not None:
        return box
    marked = re.findall(r"(?:Answer\s*:|####)\s*(.+)", text)
    found = marked[-1] if marked else text
    found = found.strip().strip("$").rstrip(".")
    return found if 0 < len(found) <= 60 else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", type=Path, nargs="+")
    parser.add_argument("target", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--solver", dest="solvers", action="append", default=[], metavar="TEACHER")
    parser.add_argument("--classifier", required=True, metavar="TEACHER")
    parser.add_argument("--subjects", type=Path, required=True)
    parser.add_argument("--grader", default="", metavar="TEACHER")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--input-price", type=float, help="dollars a million prompt tokens")
    parser.add_argument("--output-price", type=float, help="dollars a million other tokens")
    parser.add_argument("--max-dollars", type=float, help="for all steps together")
    given = vars(parser.parse_args())
    with exit_on_input_error():
        names = {f.name for f in dataclasses.fields(Pace)}
        pace = Pace(**{name: given.pop(name) for name in list(given) if name in names})
        sources, target = given.pop("sources"), given.pop("target")
        given["solvers"] = tuple(given["solvers"])
        featurise(sources, target, FeatureConfig(pace=pace, **given), Console())


if __name__ == "__main__":
    main()
