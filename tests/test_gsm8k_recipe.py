"""Real weights on real rows: the CPU recipe, shortened, from GSM8K to a decoded answer."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from s1fast.budget import Budget
from s1fast.config import load_recipe
from s1fast.decoder import Engine, SamplingParams
from s1fast.errors import InputError
from s1fast.recipes import gsm8k_to_s1
from s1fast.trainer import train

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "smollm2-gsm8k-cpu.toml"


def test_a_few_steps_and_a_budgeted_answer(
    smollm2: Path, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    arguments = [str(shared_data / "gsm8k_train.jsonl"), str(rows), "--rows", "6"]
    monkeypatch.setattr(sys, "argv", ["gsm8k_to_s1", *arguments])
    gsm8k_to_s1.main()
    recipe = load_recipe(RECIPE)
    config = dataclasses.replace(
        recipe,
        model=str(smollm2),
        output=tmp_path / "run",
        epochs=3,
        batch_size=2,
        max_steps=4,
        data=dataclasses.replace(recipe.data, path=str(rows)),
        checkpoint=dataclasses.replace(recipe.checkpoint, every=0),
    )
    folder = train(config, Console(quiet=True))
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert lines[3]["loss"] < 0.8 * lines[0]["loss"]  # six rows, and the first step has lr 0
    engine = Engine(folder)
    budget = Budget(max_thinking_tokens=12, num_ignore=1)
    done = engine.generate(["What is 2 + 3?"], SamplingParams(max_tokens=40), budget)[0]
    assert 0 < done.thinking_tokens <= 12
    assert done.thinking_end is not None and done.finish_reason is not None


def test_conversion() -> None:
    row = {"question": "How many?", "answer": "48/2 = <<48/2=24>>24.\n24 it is.\n#### 24"}
    expected = {"question": "How many?", "thinking": "48/2 = 24.\n24 it is.", "answer": "24"}
    assert gsm8k_to_s1.convert(row, "rows.jsonl: row 1") == expected


@pytest.mark.parametrize(
    ("target", "rows", "naming"),
    [("a.jsonl", "0", "--rows: must be"), ("q.jsonl", "1", "overwrit")],
)
def test_mistakes(
    target: str,
    rows: str,
    naming: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    source = tmp_path / "q.jsonl"
    source.write_text(json.dumps({"question": "q", "answer": "a #### 1"}))
    arguments = [str(source), str(tmp_path / target), "--rows", rows]
    monkeypatch.setattr(sys, "argv", ["gsm8k_to_s1", *arguments])
    with pytest.raises(SystemExit, match="2"):
        gsm8k_to_s1.main()
    assert naming in capsys.readouterr().err and list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("row", "field"),
    [({"answer": "a #### 1"}, "question"), ({"question": "q", "answer": "no mark"}, "answer")],
)
def test_bad_rows_are_named(row: dict[str, object], field: str) -> None:
    with pytest.raises(InputError, match=f"rows.jsonl: row 3: field {field}"):
        gsm8k_to_s1.convert(row, "rows.jsonl: row 3")
