"""What an evaluation's samples say: their grades, and a summary.

A summary has, for every cell of every task, the accuracy with its 95 % interval and the tokens;
and, for every method (budgets and Waits, words below the problem, rejection sampling), the paper's
measures over its cells as runs. Majority voting takes the commonest answer of the first k samples,
coverage asks whether any of them is right.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from s1fast.answers import Cell, Record
from s1fast.curves import measures, plot, table
from s1fast.errors import InputError
from s1fast.files import write_atomic
from s1fast.grading import Grade, Graders, Item
from s1fast.recipes.asking import Meter, ask_all
from s1fast.recipes.features import GRADING, grading_task, teacher_of, verdict
from s1fast.recipes.store import Store
from s1fast.scaling import Point, control, interval, majority, performance, powers, scaling
from s1fast.tasks import Problem

Row = dict[str, Any]
"""A sample with its grade, as a line of samples.jsonl."""


def finish(
    folder: Path,
    identity: dict[str, Any],
    problems: Sequence[Problem],
    cells: Sequence[Cell],
    records: Sequence[Record],
    config: Any,
    console: Console,
) -> Path:
    """Grades everything, writes samples.jsonl, summary.json and the plots, prints the table.

    Args:
        config: an EvaluateConfig.

    Raises:
        InputError: a grader that cannot be asked; the samples themselves are kept.
    """
    rows = _rows(problems, cells, records)
    by_id = {(p.task, p.id): p for p in problems}
    _grade(rows, by_id, config.grading_workers)
    _refuse_long_draws(rows, cells)
    if config.grader:
        _ask_grader(rows, by_id, folder, config, console)
    write_atomic(
        folder / "samples.jsonl",
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
    )
    summary = summarise(rows, cells, identity["model"])
    path = folder / "summary.json"
    write_atomic(path, json.dumps(summary, indent=1) + "\n")
    for name, task in summary["tasks"].items():
        console.print(table(name, task))
        for method in task["methods"]:
            console.print(measures(method), highlight=False, soft_wrap=True)
        if any((cell["thinking_tokens"] or {}).get("mean") for cell in task["cells"]):
            plot(name, task, identity["model"], folder / f"scaling-{name}.png")
    console.print(f"{path}, samples.jsonl and the curves beside it", highlight=False)
    return path


def _rows(
    problems: Sequence[Problem], cells: Sequence[Cell], records: Sequence[Record]
) -> list[Row]:
    """The samples in the order of problems and cells, whatever order they were finished in.

    Of rejection sampling the last draw counts; `tries` tells how many there were.
    """
    task_order = {(p.task, p.id): i for i, p in enumerate(problems)}
    cell_order = {cell.label: i for i, cell in enumerate(cells)}
    by_id = {(p.task, p.id): p for p in problems}
    drawn = {cell.label for cell in cells if cell.reject is not None}
    ordered = sorted(
        records,
        key=lambda r: (
            cell_order[r["cell"]],
            task_order[r["task"], r["problem"]],
            r["sample"],
        ),
    )
    last = {(r["task"], r["problem"], r["cell"]): r["sample"] for r in ordered}
    rows = []
    for record in ordered:
        place = record["task"], record["problem"], record["cell"]
        problem = by_id[place[:2]]
        row = {
            **record,
            "question_hash": hashlib.sha256(problem.question.encode()).hexdigest()[:16],
            "gold": problem.gold,
            "counted": record["cell"] not in drawn or record["sample"] == last[place],
        }
        if record["cell"] in drawn:
            row["tries"] = record["sample"] + 1
        rows.append(row)
    return rows


# -- grades -------------------------------------------------------------------------------------


def _grade(rows: Sequence[Row], problems: dict[tuple[str, str], Problem], workers: int) -> None:
    items = [_item(row, problems[row["task"], row["problem"]]) for row in rows]
    with Graders(workers) as graders:
        grades = graders.grade(items)
    for row, grade in zip(rows, grades, strict=True):
        row |= asdict(grade)


def _item(row: Row, problem: Problem) -> Item:
    return Item(kind=problem.kind, gold=problem.gold, answer=row["answer"], choices=problem.choices)


def _ask_grader(
    rows: Sequence[Row],
    problems: dict[tuple[str, str], Problem],
    folder: Path,
    config: Any,
    console: Console,
) -> None:
    """Asks a language model about what the rules reject without digits or letters to decide it."""
    doubtful = [row for row in rows if row["counted"] and not (row["correct"] or row["decided"])]
    teacher = teacher_of(config.grader, GRADING, "--grader")
    tasks = {}
    for row in doubtful:
        problem = problems[row["task"], row["problem"]]
        gold = problem.gold
        if problem.kind == "letter":
            gold = f"{gold}) {problem.choices['ABCD'.index(gold)]}"
        tasks[id(row)] = grading_task(problem.question, gold, row["answer"])
    unique = list({task.key: task for task in tasks.values()}.values())
    spent = Meter(config.pace.input_price, config.pace.output_price)
    for row in rows if config.endpoint else ():  # --max-dollars is for both together
        spent.add(row)
    with Store(folder / "grader.sqlite", {"step": "grade", **teacher.identity}) as store:
        meter = ask_all(teacher, unique, store, config.pace, console, elsewhere=spent.dollars)
        console.print(f"grader: {meter.line(len(unique), config.pace.max_dollars)}")
        if meter.failed:
            reason = next(iter(meter.failed.values()))
            raise InputError(
                f"--grader: {len(meter.failed)} of {len(unique)} questions failed, the first "
                f"because: {reason}; all samples and verdicts are kept: run again"
            )
        for row in doubtful:
            reply = store.get(tasks[id(row)].key)
            said = verdict(reply["answer"]) if reply is not None else None
            verb = {True: "accepts it", False: "rejects it, too", None: "does not decide"}[said]
            grade = Grade(
                correct=said is True,
                extracted=row["extracted"],
                vote=row["vote"],
                why=f"{row['why']}; {config.grader} {verb}",
                decided=said is not None,
            )
            row |= asdict(grade)


def _refuse_long_draws(rows: Sequence[Row], cells: Sequence[Cell]) -> None:
    """Of rejection sampling, what was never short enough is wrong, whatever it says."""
    by_label = {cell.label: cell for cell in cells if cell.reject is not None}
    for row in rows:
        cell = by_label.get(row["cell"])
        if cell is not None and row["counted"] and not cell.accepts(row):
            why = f"no thinking within {cell.reject} tokens in {row['tries']} tries"
            row |= asdict(Grade(correct=False, extracted=row["extracted"], why=why))


# -- the summary --------------------------------------------------------------------------------


def summarise(rows: Sequence[Row], cells: Sequence[Cell], model: str) -> dict[str, Any]:
    """summary.json: every task's cells and the measures of the methods among them."""
    names = list(dict.fromkeys(row["task"] for row in rows))
    tasks = {}
    for name in names:
        made = []
        for cell in cells:
            own = [r for r in rows if (r["task"], r["cell"]) == (name, cell.label)]
            made.append(_cell(cell, own))
        tasks[name] = {"cells": made, "methods": _methods(cells, made)}
    return {"model": model, "tasks": tasks}


def _cell(cell: Cell, rows: Sequence[Row]) -> dict[str, Any]:
    counted = [row for row in rows if row["counted"]]
    by_problem: dict[str, list[Row]] = {}
    for row in counted:
        by_problem.setdefault(row["problem"], []).append(row)
    groups = list(by_problem.values())
    found: dict[str, Any] = {
        "cell": cell.label,
        "problems": len(groups),
        "samples": len(counted),
        **_accuracy([fmean([row["correct"] for row in group]) for group in groups]),
        "thinking_tokens": _spread([row["thoughts_tokens"] for row in counted]),
        "answer_tokens": _spread([row["answer_tokens"] for row in counted]),
        "forced_ends": _known_mean(
            [None if r["waits_used"] is None else r["thinking_end"] == "length" for r in counted]
        ),
        "waits": _known_mean([row["waits_used"] for row in counted]),
        "without_answer": sum(not row["extracted"] for row in counted),
        "undecided": sum(not row["correct"] and not row["decided"] for row in counted),
    }
    if cell.reject is not None:
        found["tries"] = fmean([row["tries"] for row in counted])
    most = max(len(group) for group in groups)
    if most > 1:
        found["at_k"] = [_at(k, groups) for k in powers(most)]
    return found


def _at(k: int, groups: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """Majority and coverage of the first k samples, and the thinking they cost together.

    Right answers are one vote however they are written; wrong ones agree if their votes do.
    """
    winners, covered = [], []
    for group in groups:
        first = group[:k]
        votes = ["right" if row["correct"] else row["vote"] and f"={row['vote']}" for row in first]
        winners.append(float(majority(votes) == "right"))
        covered.append(float("right" in votes))
    tokens = [row["thoughts_tokens"] for group in groups for row in group[:k]]
    mean = _known_mean(tokens)
    return {
        "k": k,
        "majority": _accuracy(winners),
        "coverage": _accuracy(covered),
        "thinking_tokens": None if mean is None else mean * k,
    }


def _accuracy(scores: Sequence[float]) -> dict[str, Any]:
    """Percent, with the bootstrap's interval over the problems."""
    percents = [100.0 * score for score in scores]
    return {"accuracy": fmean(percents), "interval95": list(interval(percents))}


def _known_mean(values: Sequence[float | None]) -> float | None:
    """None where one is not known: a mean of the others would be of other samples."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def _spread(values: Sequence[int | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    mean = _known_mean(values)
    return None if mean is None else {"mean": mean, "min": min(known), "max": max(known)}


def _methods(cells: Sequence[Cell], made: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The paper's measures, each method's cells being its runs.

    Control: thinking within the budget or limit; for the two styles, shorter or longer than under
    the plain problem in the same cell.
    """
    points: dict[str, list[Point]] = {}
    pairs = list(zip(cells, made, strict=True))
    tokens = {cell.label: (m["thinking_tokens"] or {}).get("mean") for cell, m in pairs}
    for cell, m in pairs:
        mean = tokens[cell.label]
        if mean is None or not cell.think:
            continue
        least, most = 0.0, float("inf")
        plain = tokens.get(Cell("plain", cell.budget, cell.ignores, cell.reject).label)
        if cell.reject is not None:
            method, most = "rejection", float(cell.reject)
        elif cell.style != "plain":
            method = "class-conditional"
            if plain is not None:
                least, most = (0.0, plain) if cell.style == "short" else (plain, most)
        else:
            method = "budget forcing"
            most = float(cell.budget) if isinstance(cell.budget, int) else most
        points.setdefault(method, []).append(Point(mean, m["accuracy"], least, most))
    return [
        {
            "method": method,
            "runs": len(some),
            "control": control(some),
            "scaling_per_token": scaling(some),
            "scaling_per_doubling": scaling(some, log2=True),
            "performance": performance(some),
        }
        for method, some in points.items()
    ]
