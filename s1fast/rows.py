"""Rows of training data from JSONL and Parquet files, folders of them, and hub datasets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from s1fast.chat import Chat, Example
from s1fast.config import DataConfig
from s1fast.errors import InputError
from s1fast.files import parse_json, read_bytes
from s1fast.hub import find


def read_rows(path: Path, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (file and row number, row) for every row of a file or of all files of a folder.

    Raises:
        InputError: no data files, an unreadable file, a row that is no object.
    """
    for file in _files(path, split):
        reader = _read_parquet if file.suffix == ".parquet" else _read_jsonl
        yield from reader(file)


def load_examples(config: DataConfig, chat: Chat, context: int) -> tuple[list[Example], int]:
    """All examples of the configured data, tokenised, and how many were left out as too long.

    Args:
        context: the model's longest sequence; data.max_length may be shorter.

    Raises:
        InputError: no rows, a malformed row, or one that is too long when drop_long is off.
    """
    limit = min(config.max_length, context)
    examples, num_dropped = [], 0
    path = find(config.path, "dataset")
    for where, row in read_rows(path, config.split):
        example = chat.example(row, where, config.teacher)
        if len(example.ids) <= limit:
            examples.append(example)
        elif config.drop_long:
            num_dropped += 1
        else:
            raise InputError(
                f"{where}: {len(example.ids)} tokens, above the limit of {limit} (the smaller of "
                "data.max_length and the model's context); data.drop_long leaves such rows out"
            )
    if not examples:
        left_out = f", {num_dropped} rows were too long" if num_dropped else ""
        raise InputError(f"{path}: no rows to train on{left_out}")
    return examples, num_dropped


def _files(path: Path, split: str) -> list[Path]:
    if not path.is_dir():
        if path.suffix not in (".jsonl", ".parquet"):
            raise InputError(f"{path}: expected a .jsonl or .parquet file, or a folder of them")
        return [path]
    files = sorted(p for p in path.rglob("*") if p.suffix in (".jsonl", ".parquet"))
    if not files:
        raise InputError(f"{path}: no .jsonl or .parquet files there")
    chosen = [file for file in files if split in file.name]
    if chosen:
        return chosen
    if any(name in file.name for file in files for name in ("train", "test", "valid")):
        names = ", ".join(file.name for file in files[:5])
        raise InputError(f"{path}: data.split {split!r} names none of its files, {names}")
    return files


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(read_bytes(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}: row {number}"
        row = parse_json(line, where)
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected an object, found {type(row).__name__}")
        yield where, row


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except Exception as error:  # Arrow's, and those of values that Python cannot hold
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: not a usable Parquet file: {reason}") from None
