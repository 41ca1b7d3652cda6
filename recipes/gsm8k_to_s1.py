"""GSM8K rows {question, answer} to s1's form {question, thinking, answer}.

The worked solution becomes the thinking, without its <<calculator>> notes; what follows "####" the
answer. GSM8K is openai/grade-school-math, grade_school_math/data/train.jsonl (MIT).

    python -m s1fast.recipes.gsm8k_to_s1 train.jsonl out/gsm8k-s1.jsonl --rows 512
"""

from __future__ import annotations

import argparse
import itertools
import re
from pathlib import Path

from s1fast.errors import InputError, exit_on_input_error
from s1fast.recipes.questions import check_target, write_rows
from s1fast.rows import read_rows


def convert(row: dict[str, object], where: str) -> dict[str, str]:
    """One row in s1's form. Raises an InputError that names the row and the field."""
    for field in ("question", "answer"):
        if not isinstance(row.get(field), str):
            raise InputError(f"{where}: field {field} is missing or no text")
    thinking, mark, answer = str(row["answer"]).rpartition("####")
    if not mark or not thinking.strip() or not answer.strip():
        raise InputError(f"{where}: field answer has no '#### result' after a solution")
    thinking = re.sub(r"<<.*?>>", "", thinking).strip()
    return {"question": str(row["question"]), "thinking": thinking, "answer": answer.strip()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="GSM8K as .jsonl or .parquet")
    parser.add_argument("target", type=Path, help="the .jsonl to write")
    parser.add_argument(
        "--rows", type=int, default=None, help="take the first so many; all if unset"
    )
    arguments = parser.parse_args()
    with exit_on_input_error():
        if arguments.rows is not None and arguments.rows < 1:
            raise InputError(f"--rows: must be at least 1, got {arguments.rows}")
        check_target(arguments.target, [arguments.source])
        rows = itertools.islice(read_rows(arguments.source, "train"), arguments.rows)
        converted = [convert(row, where) for where, row in rows]
        if not converted:
            raise InputError(f"{arguments.source}: no rows")
        write_rows(arguments.target, converted)
    print(f"{len(converted)} rows: {arguments.target}")


if __name__ == "__main__":
    main()
