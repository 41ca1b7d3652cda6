"""The sixteen sources of s1's pool of 59K questions, in one form.

    python -m s1fast.recipes.collect out/pool [--local FOLDER] [--only NAME ...]

Every row becomes {question, solution, source_type, metadata, question_hash}, metadata being the
other columns as JSON text. A source is streamed from Hugging Face, or read from FOLDER/NAME.jsonl
or .parquet with --local, and appears as one whole file out/pool/NN-NAME.jsonl; a finished one is
not read again, so an interrupted collection goes on with the source it was at. The numbers order
the files as s1 compared them with each other; decontamination takes the folder as it is.

Where this departs from s1's collect_data.py: the questions that it kept by hand from NuminaMath,
SciEval and the crosswords are not listed here, the crosswords' instruction has another wording, and
GPQA's choices are shuffled by a seed of the question's hash instead of the row's place, so that no
filter before it changes them.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from s1fast.errors import InputError, exit_on_input_error
from s1fast.recipes.questions import Row, check_question, question_hash, write_rows, write_skipped
from s1fast.rows import read_rows

Split = tuple[str | None, str]
"""A dataset's configuration, if it has several, and split."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A dataset and how its rows become questions."""

    name: str
    dataset: str
    splits: tuple[Split, ...]
    question: Callable[[Row], Any] = lambda row: row["question"]
    solution: Callable[[Row], Any] = lambda row: row.get("solution")
    kind: Callable[[Row], str] = lambda row: ""
    """What follows the dataset's id in source_type."""
    keep: Callable[[Row], Any] = lambda row: True
    sample: int = 0
    """How many to draw, spread over the kinds, with seed 42; 0 for all."""
    within: tuple[str, str, Split] | None = None
    """Another dataset: its name here, its id and split. For NuminaMath's chosen 500 and GPQA's
    diamond, with which a row's question is compared."""
    paper: int = 0
    """Questions in the paper's pool, after decontamination."""


def _splits(configs: str, splits: str) -> tuple[Split, ...]:
    return tuple((config, split) for config in configs.split() for split in splits.split())


def _passage(row: Row) -> str:
    lead = f"{row['passage']}\n\n" if (row.get("passage") or "").strip() else ""
    options = row.get("options") or []
    return "\n".join([lead + row["question"], *options])


def _agieval_keep(row: Row) -> bool:
    return row.get("level") in (None, 5, "5", "Level 5")


def _scieval(row: Row) -> str:
    text = row["question"].split("\n\nAnswer:")[0]
    for part in ("solvent", "ligand", "reactant"):
        text = text.replace(f"\nOptimal {part}:", f"\nWhat is the optimal {part}?")
    return text


CROSSWORD = "Find the word of a crossword. Its clue ends with its number of letters.\n\n"


def _choices(row: Row) -> tuple[str, str]:
    """GPQA's question with its four choices shuffled, and its explanation with the letter."""
    names = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3", "Correct Answer")
    choices = [str(row[name]).strip("\n") for name in names]
    right = choices[3]
    random.Random(question_hash(row["Question"])).shuffle(choices)
    lettered = zip("ABCD", choices, strict=True)
    listed = "\n".join(f"({letter}) {choice}" for letter, choice in lettered)
    answer = "ABCD"[choices.index(right)]
    question = f"{row['Question']}\nAnswer Choices:\n{listed}"
    return question, f"{row['Explanation']}\n\nAnswer: {answer}"


SOURCES = (
    Source(
        name="math",
        dataset="simplescaling/openaimath",
        splits=((None, "train"),),
        question=lambda row: row["problem"],
        kind=lambda row: row["subject"],
        paper=11999,
    ),
    Source(
        name="olympic-arena",
        dataset="GAIR/OlympicArena",
        splits=_splits("Math Physics Chemistry Biology Geography Astronomy CS", "test val"),
        question=lambda row: row["problem"],
        kind=lambda row: row["subject"],
        keep=lambda row: row["language"] == "EN" and row["modality"] == "text-only",
        paper=4250,
    ),
    Source(
        name="theoremqa",
        dataset="TIGER-Lab/TheoremQA",
        splits=((None, "test"),),
        question=lambda row: row["Question"],
        solution=lambda row: row["Answer"],
        kind=lambda row: row["Answer_type"],
        keep=lambda row: row.get("Picture") is None,
        paper=747,
    ),
    Source(
        name="numinamath",
        dataset="AI-MO/NuminaMath-CoT",
        splits=((None, "train"),),
        question=lambda row: row["problem"],
        kind=lambda row: row["source"],
        keep=lambda row: row["source"] == "aops_forum" or row["_within"],
        within=("numinamath_500", "simplescaling/numinamath_500", (None, "train")),
        paper=30660,
    ),
    Source(
        name="omni-math",
        dataset="KbsdJames/Omni-MATH",
        splits=((None, "test"),),
        question=lambda row: row["problem"],
        paper=4238,
    ),
    Source(
        name="scieval",
        dataset="OpenDFM/SciEval",
        splits=((None, "test"), (None, "validation")),
        question=_scieval,
        solution=lambda row: row["answer"][0],
        kind=lambda row: f"{row['category']}/{row['type']}/{row['task_name']}",
        keep=lambda row: row.get("answer"),
        sample=250,
        paper=227,
    ),
    Source(
        name="olympiad-bench",
        dataset="Hothan/OlympiadBench",
        splits=_splits(
            "OE_TO_maths_en_COMP OE_TO_physics_en_COMP TP_TO_maths_en_COMP TP_TO_physics_en_COMP",
            "train",
        ),
        solution=lambda row: row["solution"][0],
        kind=lambda row: f"{row['question_type']}/{row['subject']}",
        paper=896,
    ),
    Source(
        name="jeebench",
        dataset="daman1209arora/jeebench",
        splits=((None, "test"),),
        solution=lambda row: row["gold"],
        kind=lambda row: row["subject"],
        paper=515,
    ),
    Source(
        name="agieval",
        dataset="baber/agieval",
        splits=_splits(
            "sat_en sat_math lsat_ar lsat_lr lsat_rc logiqa aqua_rat math_agieval", "test few_shot"
        ),
        question=_passage,
        kind=lambda row: row["_config"],
        keep=_agieval_keep,
        paper=2385,
    ),
    Source(name="s1-prob", dataset="simplescaling/s1-prob", splits=((None, "train"),), paper=182),
    Source(
        name="gpqa",
        dataset="Idavidrein/gpqa",
        splits=(("gpqa_extended", "train"),),
        question=lambda row: _choices(row)[0],
        solution=lambda row: _choices(row)[1],
        keep=lambda row: not row["_within"],
        within=("gpqa_diamond", "Idavidrein/gpqa", ("gpqa_diamond", "train")),
        paper=348,
    ),
    Source(
        name="xword",
        dataset="0xharib/xword1",
        splits=((None, "train"),),
        question=lambda row: CROSSWORD + row["input"].split("### Clue: ")[1],
        solution=lambda row: row["output"],
        sample=1000,
        paper=999,
    ),
    Source(
        name="usaco",
        dataset="codegenning/usacobench_formatted",
        splits=((None, "test"),),
        question=lambda row: row["question"].strip(),
        solution=lambda row: None,
        paper=519,
    ),
    Source(
        name="s1-teasers",
        dataset="simplescaling/s1-teasers",
        splits=((None, "train"),),
        question=lambda row: row["Question"].strip(),
        solution=lambda row: row["Answer"],
        paper=23,
    ),
    Source(
        name="livecodebench",
        dataset="livecodebench/code_generation_lite",
        splits=_splits("release_v1 release_v2 release_v3", "test"),
        question=lambda row: row["question_content"].strip(),
        solution=lambda row: None,
        kind=lambda row: row["_config"],
        keep=lambda row: row["difficulty"] == "hard",
        paper=151,
    ),
    Source(
        name="aime",
        dataset="qq8933/AIME_1983_2024",
        splits=((None, "train"),),
        question=lambda row: row["Question"],
        solution=lambda row: str(row["Answer"]),
        keep=lambda row: int(row["ID"].split("-")[0]) <= 2022,  # the paper's text says 2021
        paper=890,
    ),
)


def collect(
    output: Path, local: Path | None, only: tuple[str, ...], console: Console
) -> dict[str, int]:
    """Writes a file for every source that has none yet; returns all sources' counts.

    Raises:
        InputError: an unknown name, a source that cannot be reached or has no usable row.
    """
    names = [source.name for source in SOURCES]
    unknown = sorted(set(only) - set(names))
    if unknown:
        raise InputError(f"--only {unknown[0]}: no such source; there are {', '.join(names)}")
    counts = {}
    for number, source in enumerate(SOURCES, start=1):
        if only and source.name not in only:
            continue
        path = output / f"{number:02}-{source.name}.jsonl"
        clause = "there already"
        if not path.exists():
            rows, skipped = convert(source, local)
            write_rows(path, rows)
            clause = write_skipped(path, skipped)
        counts[source.name] = path.read_bytes().count(b"\n")
        console.print(
            f"{source.name:<16}{counts[source.name]:>7,}   paper{source.paper:>7,}   {clause}",
            highlight=False,
        )
    return counts


def convert(source: Source, local: Path | None) -> tuple[list[Row], list[str]]:
    """The source's questions, and a line for each malformed row."""
    others: set[str] = set()
    if source.within is not None:
        name, dataset, split = source.within
        pairs = _raw(name, dataset, (split,), local)
        others = {str(row.get("problem") or row.get("Question")) for _, row in pairs}
    rows, skipped = [], []
    for where, row in _raw(source.name, source.dataset, source.splits, local):
        row["_within"] = (row.get("problem") or row.get("Question")) in others
        try:
            if source.keep(row):
                rows.append(_question(source, row, where))
        except InputError as error:
            skipped.append(str(error))
        except KeyError as error:
            skipped.append(f"{where}: field {error.args[0]} is missing")
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            skipped.append(f"{where}: not as {source.dataset} has it: {error}")
    if source.sample:
        rows = _spread(rows, source.sample)
    if not rows:
        first = f"; first of {len(skipped)} left out: {skipped[0]}" if skipped else ""
        raise InputError(f"{source.name} ({source.dataset}): no usable row{first}")
    return rows, skipped


def _question(source: Source, row: Row, where: str) -> Row:
    kind = source.kind(row)
    made = {
        "question": source.question(row),
        "solution": source.solution(row),
        "source_type": f"{source.dataset}/{kind}" if kind else source.dataset,
        "metadata": json.dumps(
            {k: v for k, v in row.items() if not k.startswith("_")}, default=str
        ),
    }
    return check_question(made, where)


def _spread(rows: list[Row], count: int) -> list[Row]:
    """So many rows, the kinds in turn, each shuffled with s1's seed."""
    rng = random.Random(42)
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row["source_type"], []).append(row)
    for group in kinds.values():
        rng.shuffle(group)
    chosen: list[Row] = []
    while len(chosen) < min(count, len(rows)):
        for group in kinds.values():
            if group and len(chosen) < count:
                chosen.append(group.pop())
    return chosen


def _raw(
    name: str, dataset: str, splits: Iterable[Split], local: Path | None
) -> Iterator[tuple[str, Row]]:
    """(place, row) of a dataset; _config is the configuration where the row came from."""
    if local is not None:
        paths = [local / f"{name}{suffix}" for suffix in (".jsonl", ".parquet")]
        path = next((path for path in paths if path.exists()), None)
        if path is None:
            raise InputError(f"--local {local}: no {name}.jsonl or {name}.parquet there")
        for where, row in read_rows(path, ""):
            yield where, {"_config": "", **row}
        return
    for config, split in splits:
        for number, row in enumerate(_stream(name, dataset, config, split), start=1):
            yield f"{dataset} {config or ''} {split}: row {number}", {**row, "_config": config}


def _stream(name: str, dataset: str, config: str | None, split: str) -> Iterator[Row]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError("streaming needs datasets: pip install 's1fast[data]'") from None
    try:
        yield from load_dataset(dataset, config, split=split, streaming=True)
    except Exception as error:  # the hub's, the network's and the formats' errors are many
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{name} ({dataset}): Hugging Face did not deliver it: {reason}; run again to go on, "
            "or give the files with --local"
        ) from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="the folder of the pool")
    parser.add_argument("--local", type=Path, help="read NAME.jsonl or NAME.parquet from here")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    given = parser.parse_args()
    with exit_on_input_error():
        counts = collect(given.output, given.local, tuple(given.only), Console())
    print(f"{sum(counts.values()):,} questions of {len(counts)} sources: {given.output}")


if __name__ == "__main__":
    main()
