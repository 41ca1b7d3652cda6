"""From featurised questions to a small set: quality, then difficulty, then diversity.

    s1fast curate out/features.jsonl out/s1k --size 1000 --seed 0

Algorithm 1 of the paper: after the two filters, questions that count on their own (benchmark-like
sources, long MATH traces) are taken first; then a subject is drawn uniformly and from it a question
with weight 2^-rank, the longest trace having rank 0, until the set is full. With --notebook the
subject is weighted by its share of AIME and GPQA questions once 700 are chosen, as in the notebook
that s1 published.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from s1fast.errors import InputError
from s1fast.recipes.curation_report import PAPER, write_report
from s1fast.recipes.questions import Row, check_question, read_questions, text_of
from s1fast.recipes.teachers import CUT

AIME, GPQA = "qq8933/AIME_1983_2024", "Idavidrein/gpqa"
MATH = ("simplescaling/openaimath", "qfq/openaimath")
LONG_MATH = 5600
"""Thinking tokens above which a correctly solved MATH question is always taken."""
NOTEBOOK_UNIFORM = 700
"""Chosen questions up to which the notebook, too, draws subjects uniformly."""

_BROKEN = re.compile(r"!\[Image\]|p[1-9]\d{0,2}\.|\*\*[^\s*]*\d[^\s*]*\*\*")


@dataclass(frozen=True, kw_only=True)
class CurateConfig:
    """Select a small training set from featurised questions."""

    size: int = 1000
    """Questions to select."""
    seed: int = 0
    """Seed of all draws: the same rows and seed give the same set."""
    subset: Literal["s1", "random", "diverse", "longest", "all"] = "s1"
    """s1's selection, or one of the paper's ablation sets."""
    notebook: bool = False
    """Weight subjects by AIME and GPQA after 700 questions, as the published notebook does."""
    format: Literal["jsonl", "parquet"] = "jsonl"
    """Of the training file."""


def curate(sources: Sequence[Path], output: Path, config: CurateConfig, console: Console) -> Path:
    """Selects and writes the training file, a report, plots and a dataset card to a new folder.

    Raises:
        InputError: malformed rows only, too few questions, or an output folder that exists.
    """
    if config.size < 1:
        raise InputError(f"--size: must be at least 1, got {config.size}")
    if config.seed < 0:
        raise InputError(f"--seed: must be at least 0, got {config.seed}")
    if config.notebook and config.subset != "s1":
        raise InputError(f"--notebook: says how s1's set is drawn, not {config.subset}")
    questions = read_questions(sources, check_features)
    chosen, counts = select(questions.rows, config)
    faults = {r["question_hash"]: fault for r in questions.rows if (fault := trace_fault(r))}
    left_out = questions.skipped + [f"{key}: {fault}" for key, fault in faults.items()]
    counts = {"pool": len(questions.rows) + len(questions.skipped), **counts}
    write_report(output, chosen, questions.rows, counts, left_out, vars(config))
    for fault, count in Counter(faults.values()).items():
        console.print(f"left out: {count:,} {fault}", highlight=False)
    for step, count in counts.items():
        paper = f"{PAPER[step]:>8,}" if step in PAPER else "       -"
        console.print(f"{step:<14}{count:>8,}   paper{paper}", highlight=False)
    return output


def check_features(row: Row, where: str) -> Row:
    """A featurised row. A missing trace or grade is no error: the quality step leaves it out."""
    row = check_question(row, where)
    for name in ("thinking", "answer", "subject", "source_type"):
        if row.get(name) not in (None, ""):
            text_of(row, name, where)
    for name in ("teacher_correct", "solver_correct_0", "solver_correct_1"):
        if row.get(name) is not None and type(row[name]) is not bool:
            raise InputError(f"{where}: field {name} must be true, false or null")
    length = row.get("length")
    if length is not None and (type(length) is not int or length < 0):
        raise InputError(f"{where}: field length must be a count of tokens, got {length!r}")
    return row


def select(rows: Sequence[Row], config: CurateConfig) -> tuple[list[Row], dict[str, int]]:
    """The chosen rows and how many were left after each step.

    Raises:
        InputError: fewer rows are left than --size asks for.
    """
    rng = random.Random(config.seed)
    traced = [row for row in rows if not trace_fault(row)]
    whole = [row for row in traced if _is_whole(row)]
    quality = [row for row in whole if not bad_format(row)]
    counts = {"featurised": len(whole), "quality": len(quality)}
    if config.subset == "all":
        return traced, {"traced": len(traced)}
    if config.subset == "s1":
        hard = [r for r in quality if not (r["solver_correct_0"] or r["solver_correct_1"])]
        first = [row for row in hard if counts_alone(row)]
        counts |= {"difficulty": len(hard), "pre-selected": min(len(first), config.size)}
        _enough(len(hard), config.size, "difficulty")
        chosen = diversify(hard, first, config.size, rng, notebook=config.notebook)
    else:
        _enough(len(quality), config.size, "quality")
        if config.subset == "random":
            chosen = rng.sample(quality, config.size)
        elif config.subset == "longest":
            chosen = sorted(quality, key=_longest_first)[: config.size]
        else:
            chosen = diversify(quality, [], config.size, rng, by_length=False)
    return chosen, {**counts, "selected": len(chosen)}


def _is_whole(row: Row) -> bool:
    needed = ("teacher_correct", "solver_correct_0", "solver_correct_1", "length", "subject")
    return all(row.get(name) is not None for name in needed)


def trace_fault(row: Row) -> str:
    """Why a row's trace cannot be trained on, or nothing."""
    if row.get("refused"):
        return "refused"
    if row.get("finish_reason") in CUT:
        return "cut by the token limit"
    if not str(row.get("answer") or "").strip():
        return "without an answer"
    return "" if str(row.get("thinking") or "").strip() else "without thinking"


def bad_format(row: Row) -> bool:
    """Pictures that are not there, page references, glued bold numbers, drawing code; AIME may
    draw."""
    if _BROKEN.search(row["question"]):
        return not (row.get("source_type") == AIME and "[asy]" in row["question"])
    return "[asy]" in row["question"] and row.get("source_type") != AIME


def counts_alone(row: Row) -> bool:
    """Whether Algorithm 1 takes the question before any draw."""
    source = row.get("source_type") or ""
    if not row["teacher_correct"]:
        return False
    return source in (AIME, GPQA) or (source.startswith(MATH) and row["length"] > LONG_MATH)


def _enough(count: int, size: int, step: str) -> None:
    if count < size:
        raise InputError(f"--size {size}: only {count} questions are left after {step}")


def _longest_first(row: Row) -> tuple[int, str]:
    return -row["length"], row["question_hash"]  # equal lengths: an order that no file order moves


def diversify(
    pool: Sequence[Row],
    first: Sequence[Row],
    size: int,
    rng: random.Random,
    *,
    notebook: bool = False,
    by_length: bool = True,
) -> list[Row]:
    """`first`, then draws of a subject and of a question from it, until there are `size`."""
    ordered = sorted(pool, key=_longest_first)
    buckets: dict[str, list[Row]] = {}
    for row in ordered:
        buckets.setdefault(row["subject"], []).append(row)
    chosen = {row["question_hash"]: row for row in sorted(first, key=_longest_first)[:size]}
    weights = _benchmark_weights(pool)
    while len(chosen) < size:
        subjects = sorted(buckets)
        wanted = [weights.get(subject, 0.0) for subject in subjects]
        if notebook and len(chosen) >= NOTEBOOK_UNIFORM and any(wanted):
            subject = rng.choices(subjects, wanted)[0]
        else:
            subject = rng.choice(subjects)
        bucket = buckets[subject]
        rank = draw_rank(len(bucket), rng) if by_length else rng.randrange(len(bucket))
        row = bucket.pop(rank)
        if not bucket:
            del buckets[subject]
        chosen.setdefault(row["question_hash"], row)  # drawn a second time: only removed
    return list(chosen.values())


def draw_rank(count: int, rng: random.Random) -> int:
    """A rank below count with probability proportional to 2^-rank."""
    while True:
        rank = 0
        while rng.random() < 0.5:
            rank += 1
        if rank < count:
            return rank


def _benchmark_weights(pool: Sequence[Row]) -> dict[str, float]:
    """AIME questions of a subject, and GPQA's scaled to half of AIME's number."""
    aime = Counter(row["subject"] for row in pool if row.get("source_type") == AIME)
    gpqa = Counter(row["subject"] for row in pool if row.get("source_type") == GPQA)
    scale = 0.5 * aime.total() / gpqa.total() if gpqa else 0.0
    return {s: float(aime[s] + int(gpqa[s] * scale)) for s in aime | gpqa}
