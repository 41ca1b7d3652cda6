"""Reasoning traces from a teacher: every question asked once, every answer kept.

    s1fast distill questions.jsonl out/traces.sqlite --model MODEL --max-dollars 50

The store is the result and the state in one; beside it `traces.jsonl` is written for the next step.
Thinking and answer are kept apart. A row's `thoughts_kind` says what the thinking is: raw, a
summary (its text is far shorter than the tokens that were billed for it), or none. The first five
answers are looked at before the rest is paid for: s1's teacher showed its raw thoughts, later ones
may not, and a model trained on summaries does not learn to think.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from s1fast.errors import InputError
from s1fast.files import write_atomic
from s1fast.recipes.asking import Meter, Pace, Task, ask_all
from s1fast.recipes.questions import (
    Questions,
    check_target,
    read_questions,
    write_rows,
    write_skipped,
)
from s1fast.recipes.store import Store
from s1fast.recipes.teachers import Sampling, make_teacher

BYTES_PER_TOKEN = 4.0
"""UTF-8 bytes of a token of English mathematics, roughly: 3 to 4.5 in today's vocabularies, while a
summary is several times shorter than what it sums up. So this rough count tells them apart."""
LEAST_SHARE = 0.3
"""Below this share of the billed thoughts tokens, thinking is taken for a summary."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Ask a teacher every question once and keep its thinking and answer."""

    teacher: Literal["gemini", "openai", "engine"] = "gemini"
    """Gemini, any OpenAI-compatible server, or a model folder in our own engine."""
    model: str = ""
    """The teacher's model; a folder or hub id for engine. No default: models come and go."""
    base_url: str = ""
    """Another server than the provider's own."""
    rows: int | None = None
    """Ask only the first so many questions."""
    accept_summaries: bool = False
    """Go on although the first answers show no thinking, or only a summary of it."""
    sampling: Sampling = field(default_factory=Sampling)
    pace: Pace = field(default_factory=Pace)


def distill(sources: Sequence[Path], path: Path, config: DistillConfig, console: Console) -> Path:
    """Asks what the store does not hold yet and exports it all; returns the file of rows.

    Raises:
        InputError: see ask_all; bad input is found before anything is asked.
    """
    target = path.with_suffix(".jsonl")
    check_target(target, [*sources, path])
    if config.rows is not None and config.rows < 1:
        raise InputError(f"--rows: must be at least 1, got {config.rows}")
    questions = read_questions(sources)
    questions.rows = questions.rows[: config.rows]
    teacher = make_teacher(config.teacher, config.model, config.base_url, config.sampling)
    tasks = [
        Task(key=row["question_hash"], question=row["question"], extra={"model": config.model})
        for row in questions.rows
    ]
    with Store(path, {"step": "distill", **teacher.identity}) as store:
        skipped = write_skipped(target, questions.skipped)
        probe = None if config.accept_summaries else look_at_thoughts
        try:
            meter = ask_all(teacher, tasks, store, config.pace, console, probe)
        finally:
            write_rows(target, export(questions, store))
        _report(meter, store, len(tasks), skipped, config, console)
    return target


def thoughts_kind(record: dict[str, Any]) -> Literal["raw", "summary", "none"]:
    """What the thinking of an answer is, judged by its length beside the tokens billed for it."""
    size = len(record["thinking"].strip().encode())
    if not size:
        return "none"
    billed = record["thoughts_tokens"]
    if billed is not None and size / BYTES_PER_TOKEN < LEAST_SHARE * billed:
        return "summary"
    return "raw"


def look_at_thoughts(records: list[dict[str, Any]]) -> None:
    """Raises an InputError with what it means when an answer shows no or too little thinking."""
    for record in records:
        kind = thoughts_kind(record)
        if kind == "raw":
            continue
        billed, size = record["thoughts_tokens"], len(record["thinking"].encode())
        seen = (
            "no thinking" if kind == "none" else f"about {size / BYTES_PER_TOKEN:.0f} tokens of it"
        )
        thought = f"where {billed} were thought: it hides" if billed else "and bills none: it hides"
        raise InputError(
            f"{record['model']} shows {seen} {thought}, sums up or "
            "has no thoughts, and traces made of that do not teach to think; choose a "
            "model that returns raw thoughts, or go on with --accept-summaries. The first "
            f"{len(records)} answers are stored and will not be paid for again"
        )


def export(questions: Questions, store: Store) -> Iterator[dict[str, Any]]:
    """The questions that have a record, with it: rows that training and curation take."""
    for row in questions.rows:
        record = store.get(row["question_hash"])
        if record is not None:
            yield {**row, **record, "thoughts_kind": thoughts_kind(record)}


def _report(
    meter: Meter, store: Store, total: int, skipped: str, config: DistillConfig, console: Console
) -> None:
    path = store.path.with_suffix(".failed.txt")
    path.unlink(missing_ok=True)  # of an earlier run
    if meter.failed:
        write_atomic(path, "".join(f"{key}: {why}\n" for key, why in meter.failed.items()))
    for key, reason in list(meter.failed.items())[:5]:
        console.print(f"  failed: {key}: {reason}", highlight=False, markup=False)
    line = f"{meter.line(total, config.pace.max_dollars)}; {skipped}"
    if store.abandoned:
        line += f"; {store.abandoned} requests were under way when a run was killed"
    if meter.failed:
        line += f"; the failed ones are listed in {path}, run again to ask them"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
