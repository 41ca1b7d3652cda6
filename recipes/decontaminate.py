"""Leaves out questions that share eight words in a row with a test question, or with each other.

Words are what stands between white space after Unicode compatibility folding (NFKC), case folding
and trimming. A question with fewer than eight words has no 8-gram; the original lets it always
pass, here it is flagged when the whole of it equals a whole test or earlier question so folded.
One pass: a source's questions are compared with the tests and the sources before it, whose n-grams
are then added, as 8-byte hashes; two of 59K questions' 4 million n-grams would meet with
probability 4e-7. AIME, which s1 added after this step, loses exact duplicates only.

    python -m s1fast.recipes.decontaminate pool.jsonl out/clean.jsonl --against math500.jsonl
"""

from __future__ import annotations

import argparse
import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
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
REASONS = {
    "test": "shares eight words with a test question",
    "source": "shares eight words with an earlier source",
    "duplicate": "the same question stands there before",
}


def normalise(text: str) -> list[str]:
    """The text's words, folded."""
    return unicodedata.normalize("NFKC", text).casefold().split()


def ngrams(text: str) -> set[int]:
    """Hashes of all runs of eight words; of the whole text where it is shorter."""
    words = normalise(text)
    last = max(len(words) - NGRAM, 0)
    return {_hash(" ".join(words[i : i + NGRAM])) for i in range(last + 1)}


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
    rows: Iterable[Row], tests: set[int], flagged: Collection[str] = ()
) -> Iterator[tuple[Row, str]]:
    """Every row with the reason to leave it out, or "", source after source as they first come.

    Args:
        tests: n-grams of the test questions.
        flagged: hashes of questions that were compared with the tests elsewhere, and met them.
    """
    places: dict[str, int] = {}
    rows = sorted(rows, key=lambda row: places.setdefault(_source(row), len(places)))
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
        elif source != AIME:
            if row.get("question_hash") in flagged or not tests.isdisjoint(grams):
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
        flagged = set()
        if given.ray_workers:
            flags = flag_with_ray(rows, tests, given.ray_workers)
            flagged = {r["question_hash"] for r, flag in zip(rows, flags, strict=True) if flag}
            tests = set()
        pairs = list(decontaminate(rows, tests, flagged))
        write_rows(given.target, (row for row, reason in pairs if not reason))
        lines = [
            f"{row['question_hash']}: {REASONS[reason]}: {row['question'][:200]!r}"
            for row, reason in pairs
            if reason
        ]
        skipped = write_skipped(given.target, questions.skipped + lines)
    counts = Counter(reason for _, reason in pairs)
    told = json.dumps({reason: counts[reason] for reason in REASONS})
    print(f"{counts['']} of {len(rows)} kept; left out {told}; {skipped}: {given.target}")


if __name__ == "__main__":
    main()
