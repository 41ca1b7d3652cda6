"""Leaves out questions that share eight words in a row with a test question, or with each other.

Words are what stands between white space after Unicode compatibility folding (NFKC), case folding
and trimming. A question with fewer than eight words has no 8-gram; the original lets it always
pass, here it is flagged when the whole of it equals a whole test or earlier question so folded.
One pass: a source's questions are compared with the tests and the sources before it, whose n-grams
are then added, as 8-byte hashes; two of 59K questions' 4 million n-grams would meet with
probability 4e-7. Sources in `exempt` (s1 added AIME after this step) lose exact duplicates only.

    python -m s1fast.recipes.decontaminate pool.jsonl out/clean.jsonl --against math500.jsonl
"""

from __future__ import annotations

import argparse
import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from s1fast.errors import InputError, exit_on_input_error
from s1fast.recipes.questions import (
    Row,
    check_target,
    read_questions,
    text_of,
    write_rows,
    write_skipped,
)
from s1fast.rows import read_rows

NGRAM = 8
AIME = "qq8933/AIME_1983_2024"


def normalise(text: str) -> list[str]:
    """The text's words, folded."""
    return unicodedata.normalize("NFKC", text).casefold().split()


def ngrams(text: str, size: int = NGRAM) -> set[int]:
    """Hashes of all runs of `size` words; of the whole text where it is shorter."""
    words = normalise(text)
    last = max(len(words) - size, 0)
    return {_hash(" ".join(words[i : i + size])) for i in range(last + 1)}


def _hash(text: str) -> int:
    # Stable over processes, unlike hash(): workers must agree with each other.
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def read_ngrams(paths: Sequence[Path]) -> set[int]:
    """N-grams of all test questions, in a field called question, problem or Question."""
    found: set[int] = set()
    for path in paths:
        for where, row in read_rows(path, ""):
            name = next((n for n in ("question", "problem", "Question") if n in row), "question")
            found |= ngrams(text_of(row, name, where))
    return found


def decontaminate(
    rows: Iterable[Row], tests: set[int], exempt: frozenset[str] = frozenset({AIME})
) -> Iterator[tuple[Row, str]]:
    """Every row with the reason to leave it out, or "". Rows of a source stand together."""
    seen: set[str] = set()
    earlier: set[int] = set()  # of the sources before this one
    current: set[int] = set()
    source = None
    for row in rows:
        if _source(row) != source:
            earlier |= current
            current, source = set(), _source(row)
        grams = ngrams(row["question"])
        reason = ""
        if row["question"] in seen:
            reason = "duplicate"
        elif source not in exempt:
            if not tests.isdisjoint(grams):
                reason = "test"
            elif not earlier.isdisjoint(grams):
                reason = "source"
        if not reason:
            seen.add(row["question"])
            current |= grams
        yield row, reason


def _source(row: Row) -> str:
    """The dataset: without the subject that its source_type may add."""
    return "/".join(str(row.get("source_type") or "").split("/")[:2])


def flag_batch(batch: dict[str, Any], tests: set[int]) -> dict[str, Any]:
    """The comparison with the tests as a stage of Ray Data's map_batches, one flag a row."""
    flags = [not tests.isdisjoint(ngrams(str(text))) for text in batch["question"]]
    return {**batch, "contaminated": flags}


def flag_with_ray(rows: Sequence[Row], tests: set[int], workers: int) -> list[bool]:
    """flag_batch over Ray workers, in the rows' order. Cross-source order needs one process."""
    try:
        import ray
    except ImportError:
        raise InputError("--ray-workers: needs Ray: pip install 's1fast[ray]'") from None
    data = ray.data.from_items([{"i": i, "question": r["question"]} for i, r in enumerate(rows)])
    pool = ray.data.TaskPoolStrategy(size=workers)
    stage = data.repartition(workers).map_batches(
        flag_batch, fn_kwargs={"tests": tests}, batch_format="numpy", compute=pool
    )
    found = {int(row["i"]): bool(row["contaminated"]) for row in stage.take_all()}
    return [found[i] for i in range(len(rows))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", type=Path, nargs="+")
    parser.add_argument("target", type=Path)
    parser.add_argument("--against", type=Path, nargs="+", required=True, help="test questions")
    parser.add_argument("--ray-workers", type=int, default=0, help="compare with tests on Ray")
    given = parser.parse_args()
    with exit_on_input_error():
        check_target(given.target, [*given.sources, *given.against])
        questions = read_questions(given.sources)
        rows, tests = questions.rows, read_ngrams(given.against)
        flagged = [False] * len(rows)
        if given.ray_workers:
            flagged, tests = flag_with_ray(rows, tests, given.ray_workers), set()
        left_out: dict[str, list[Row]] = {"test": [], "source": [], "duplicate": []}
        rest: list[Row] = []
        kept: list[Row] = []
        for row, bad in zip(rows, flagged, strict=True):
            (left_out["test"] if bad and _source(row) != AIME else rest).append(row)
        for row, reason in decontaminate(rest, tests):
            (left_out[reason] if reason else kept).append(row)
        write_rows(given.target, kept)
        lines = [
            f"{row['question_hash']}: {_REASONS[reason]}: {row['question'][:200]!r}"
            for reason, some in left_out.items()
            for row in some
        ]
        skipped = write_skipped(given.target, questions.skipped + lines)
    counts = json.dumps({reason: len(some) for reason, some in left_out.items()})
    print(f"{len(kept)} of {len(rows)} kept; left out {counts}; {skipped}: {given.target}")


_REASONS = {
    "test": "shares eight words with a test question",
    "source": "shares eight words with an earlier source",
    "duplicate": "the same question stands there before",
}


if __name__ == "__main__":
    main()
