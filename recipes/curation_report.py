"""What is written beside a curated set: counts beside the paper's, two plots, a dataset card."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s1fast.errors import InputError
from s1fast.files import new_directory
from s1fast.recipes.questions import Row

PAPER = {
    "pool": 59029,
    "featurised": 54116,
    "quality": 51581,
    "difficulty": 24496,
    "pre-selected": 384,
    "selected": 1000,
    "traced": 59029,
}
"""Counts of arXiv 2501.19393, section 2; the notebook that was published later: 54,116, 51,607,
24,517, 393, 1,000."""


def write_report(
    output: Path,
    chosen: Sequence[Row],
    pool: Sequence[Row],
    counts: Mapping[str, int],
    skipped: Sequence[str],
    config: Mapping[str, Any],
) -> None:
    """Writes train.jsonl or train.parquet, report.json, skipped.txt, README.md and the plots.

    Raises:
        InputError: the folder exists or cannot be written; it appears whole or not at all.
    """
    with new_directory(output) as folder:
        rows = [_flat(row) for row in chosen]
        if config["format"] == "parquet":
            import pyarrow
            import pyarrow.parquet

            names = sorted({name for row in rows for name in row})
            columns = {name: [row.get(name) for row in rows] for name in names}
            try:
                table = pyarrow.table(columns)
            except (pyarrow.ArrowException, OverflowError) as error:
                raise InputError(f"--format parquet: {error}; take --format jsonl") from None
            pyarrow.parquet.write_table(table, folder / "train.parquet")
        else:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
        report = {"config": dict(config), "counts": dict(counts), "paper": PAPER}
        (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        (folder / "skipped.txt").write_text("".join(f"{x}\n" for x in skipped), encoding="utf-8")
        (folder / "README.md").write_text(_card(chosen, counts, config), encoding="utf-8")
        _plot(folder, chosen, pool)


def _flat(row: Row) -> Row:
    """The row with nested values as JSON text, which every reader types alike."""
    return {k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in row.items()}


def _card(chosen: Sequence[Row], counts: Mapping[str, int], config: Mapping[str, Any]) -> str:
    steps = "\n".join(f"| {k} | {v:,} | {PAPER.get(k, 0):,} |" for k, v in counts.items())
    sources = Counter(str(row.get("source_type") or "not stated") for row in chosen)
    listed = "\n".join(f"| {name} | {count} |" for name, count in sources.most_common())
    models = ", ".join(sorted({str(row.get("model") or "not stated") for row in chosen}))
    kinds = Counter(str(row.get("thoughts_kind") or "not stated") for row in chosen)
    kinds_text = ", ".join(f"{name} {count}" for name, count in kinds.items())
    return f"""---
configs:
- config_name: default
  data_files: train.{config["format"]}
task_categories:
- text-generation
---
# {len(chosen):,} questions with reasoning traces

Selected by s1fast after the recipe of s1 (arXiv 2501.19393): {json.dumps(dict(config))}.
Teacher: {models}; thoughts: {kinds_text}. Fields that training takes: question, thinking, answer.

The licence of each question is that of its source below; state yours before you publish.

| left after | rows | paper |
|---|---|---|
{steps}

| source | questions |
|---|---|
{listed}
"""


def _plot(folder: Path, chosen: Sequence[Row], pool: Sequence[Row]) -> None:
    """subjects.png, the commonest thirty, and lengths.png, chosen beside the pool."""
    from matplotlib.figure import Figure

    subjects = Counter(str(row.get("subject") or "none") for row in chosen).most_common(30)[::-1]
    figure = Figure(figsize=(8, 1.5 + 0.22 * len(subjects)), layout="constrained")
    axes = figure.add_subplot()
    names = [name.replace("$", r"\$")[:48] for name, _ in subjects]
    axes.barh(names, [count for _, count in subjects], color="tab:blue")
    axes.set(xlabel="questions", title="Subjects of the selected questions")
    figure.savefig(folder / "subjects.png", dpi=120)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    for rows, label in ((pool, "pool"), (chosen, "selected")):
        values = [row["length"] for row in rows if row.get("length") is not None]
        if values:
            axes.hist(values, bins=50, density=True, alpha=0.6, label=label)
    axes.set(xlabel="thinking tokens", ylabel="share", title="Trace lengths")
    axes.legend()
    figure.savefig(folder / "lengths.png", dpi=120)
