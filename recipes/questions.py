"""Questions as all steps of the curation pass them on: one JSON object a row, one hash a question.

A question's hash is the first 16 hex digits of the SHA-256 of its text, as in s1's data. Rows that
cannot be used are left out, counted and listed, never dropped in silence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s1fast.errors import InputError
from s1fast.files import make_directory, write_atomic
from s1fast.rows import read_rows

Row = dict[str, Any]


@dataclass
class Questions:
    """The usable rows of some files, and why the others are not."""

    rows: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """One line a row that was left out: file, row, field and reason."""


def question_hash(question: str) -> str:
    """First 16 hex digits of the question's SHA-256."""
    return hashlib.sha256(question.encode()).hexdigest()[:16]


def text_of(row: Row, name: str, where: str) -> str:
    """A field that must hold text; an InputError names row and field."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        found = "missing" if value is None else f"{type(value).__name__}, not text"
        raise InputError(f"{where}: field {name} is {'empty' if value == '' else found}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: field {name} is not valid Unicode") from None
    return value


def check_question(row: Row, where: str) -> Row:
    """The row with its hash. Raises an InputError that names a malformed field."""
    question = text_of(row, "question", where)
    if row.get("solution") is not None:
        text_of(row, "solution", where)
    expected = question_hash(question)
    if row.get("question_hash", expected) != expected:
        raise InputError(
            f"{where}: field question_hash is {row['question_hash']!r}, but the question's is "
            f"{expected}; leave the field out or mend the question"
        )
    return {**row, "question_hash": expected}


def read_questions(
    paths: Sequence[Path], check: Callable[[Row, str], Row] = check_question
) -> Questions:
    """All usable questions of JSONL and Parquet files or folders, each once; the first one counts.

    Raises:
        InputError: a file that cannot be read, or none of the rows is usable.
    """
    found = Questions()
    first: dict[str, str] = {}
    for path in paths:
        for where, row in read_rows(path, "train"):
            try:
                row = check(row, where)
            except InputError as error:
                found.skipped.append(str(error))
                continue
            key = row["question_hash"]
            if key in first:
                found.skipped.append(f"{where}: duplicate hash {key}: the question of {first[key]}")
                continue
            first[key] = where
            found.rows.append(row)
    if not found.rows:
        why = f"; first of {len(found.skipped)}: {found.skipped[0]}" if found.skipped else ""
        raise InputError(f"{', '.join(map(str, paths))}: no usable row{why}")
    return found


def check_target(target: Path, sources: Sequence[Path]) -> None:
    """Raises an InputError where writing the target would replace what is read."""
    for source in sources:
        if target.resolve() == source.resolve():
            raise InputError(f"{target}: would be overwritten by the result; choose another name")


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes JSON lines at once: afterwards the old file stands there or the whole new one."""
    make_directory(path.parent)
    lines = ((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows)
    write_atomic(path, b"".join(lines))  # bytes, each line encoded by itself: half the memory


def write_skipped(target: Path, skipped: Sequence[str]) -> str:
    """Lists what was left out beside the target; a clause for the console that counts it."""
    path = target.with_name(target.name + ".skipped.txt")
    if not skipped:
        path.unlink(missing_ok=True)  # of an earlier run
        return "no row left out"
    write_atomic(path, "\n".join(skipped) + "\n")
    return f"{len(skipped)} rows left out, listed in {path}"
