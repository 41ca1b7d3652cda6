"""s1fast evaluate from end to end: grids, baselines, kill -9, two ranks, other runs' folders."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from s1fast import cli, results
from s1fast import evaluate as evaluate_module
from s1fast.answers import Cell, How
from s1fast.errors import InputError
from s1fast.evaluate import EvaluateConfig, _Meter, choose_device, evaluate, plan
from s1fast.grading import Graders
from s1fast.tasks import STYLES

pytest.importorskip("math_verify", reason="no math-verify; unproven: evaluation")
ROOT = Path(__file__).resolve().parent.parent
Run = Callable[..., Path]
Row = dict[str, Any]
HOT = {"temperature": 1.0, "top_k": 8}


@pytest.fixture(scope="module")
def tiny(make_model: Callable[..., Path]) -> Path:
    """Random weights that, with top_k 8, write twelve tokens, of which two end thinking."""
    folder = make_model("qwen2", hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors")
    head = tensors["lm_head.weight"]
    head[12:] /= 10
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "gsm8k.jsonl"
    rows = [
        {"question": f"What is {i} + {i * i}?", "answer": f"So\n#### {i + i * i}"} for i in range(5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def graders() -> Iterator[Graders]:
    with Graders(1) as made:
        yield made


@pytest.fixture
def run(
    tiny: Path,
    questions: Path,
    tmp_path: Path,
    graders: Graders,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """Evaluates the tiny model on the questions, into a folder of that name.

    One grading worker serves all tests of this file: a second of start-up each, otherwise.
    """
    monkeypatch.setattr(results, "Graders", lambda workers: contextlib.nullcontext(graders))

    def go(name: str = "out", *, how: dict[str, Any] | None = None, **values: Any) -> Path:
        config = EvaluateConfig(
            tasks=values.pop("tasks", f"gsm8k={questions}"),
            output=tmp_path / name,
            how=How(**{"max_tokens": 40, **(how or {})}),
            grading_workers=1,
            **values,
        )
        evaluate(values.pop("model", str(tiny)), config, Console(file=io.StringIO()))
        return tmp_path / name

    return go


def samples(folder: Path) -> list[Row]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


# -- real weights, killed -----------------------------------------------------------------------

REAL = ("--budgets", "2,4", "--max-tokens", "16", "--max-batch", "1")


def test_gsm8k_killed_and_resumed(
    smollm2: Path, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after its first problem and run again, it ends with the same results."""
    lines = (shared_data / "gsm8k_test.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "short.jsonl").write_text("".join(sorted(lines, key=len)[:2]))
    arguments = ["evaluate", str(smollm2), *REAL, "--tasks"]
    arguments += [f"gsm8k={tmp_path / 'short.jsonl'}", "--output"]
    command = [sys.executable, "-m", "s1fast", *arguments, str(tmp_path / "killed")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    store = tmp_path / "killed" / "samples.0.sqlite"
    deadline = time.monotonic() + 120
    while stored(store) < 1 and time.monotonic() < deadline:
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = stored(store)
    assert 1 <= kept < 4 and not (tmp_path / "killed" / "samples.jsonl").exists()
    for name in ("killed", "whole"):
        monkeypatch.setattr(sys, "argv", ["s1fast", *arguments, str(tmp_path / name)])
        cli.main()
    assert stored(store) == 4
    whole = samples(tmp_path / "whole")
    assert samples(tmp_path / "killed") == whole
    assert summary(tmp_path / "killed") == summary(tmp_path / "whole")
    assert [row["cell"] for row in whole] == ["2"] * 2 + ["4"] * 2
    for row in whole:
        assert row["thoughts_tokens"] == int(row["cell"]) and row["thinking_end"] == "length"
        assert "Final Answer:" in row["answer"] and row["why"] and row["gold"]
        assert row["thinking"].strip() and row["prompt"]
    assert (tmp_path / "whole" / "scaling-gsm8k.png").read_bytes().startswith(b"\x89PNG")


def stored(path: Path) -> int:
    """Records in a store that may not be there yet."""
    if not path.exists():
        return 0
    try:
        db = sqlite3.connect(path)
        try:
            return db.execute("SELECT count(*) FROM records").fetchone()[0]
        finally:
            db.close()
    except sqlite3.OperationalError:
        return 0


# -- the grid -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {**HOT, "seed": 3}, {"accounting": "harness"}])
def test_tree_equals_separate_runs(how: dict[str, Any], run: Run) -> None:
    grid = {"budgets": "0,7,30", "num_ignores": "none,0,2", "rows": 2}
    grid["how"] = {"max_tokens": 45, **how}
    several = {"samples": 3} if how.get("temperature") else {}
    tree = samples(run("tree", **grid, **several))
    separate = samples(run("separate", **grid, **several, separate=True))
    assert tree == separate
    assert len(tree) == 2 * 9 * several.get("samples", 1)
    if how.get("temperature"):
        ends = {(row["cell"], row["thinking_end"]) for row in tree}
        assert ("30", "natural") in ends and ("7", "length") in ends
        assert max(row["waits_used"] for row in tree) == 2


@pytest.mark.slow
def test_tree_equals_separate_runs_on_real_weights(
    smollm2: Path, shared_data: Path, tmp_path: Path
) -> None:
    """Up to ties; none is met here."""
    config = EvaluateConfig(
        tasks=f"gsm8k={shared_data / 'gsm8k_test.jsonl'}",
        rows=3,
        budgets="8,24,auto",
        num_ignores="none,1",
        how=How(max_tokens=150),
    )
    found = []
    for name, separate in (("tree", False), ("separate", True)):
        settings = replace(config, output=tmp_path / name, separate=separate)
        evaluate(str(smollm2), settings, Console(file=io.StringIO()))
        found.append(samples(tmp_path / name))
    assert found[0] == found[1]


def test_cells() -> None:
    def labels(**values: Any) -> list[str]:
        return [cell.label for cell in plan(EvaluateConfig(**values))]

    assert labels() == ["auto"]
    assert labels(budgets="500,auto", num_ignores="none,2") == [
        "500",
        "500 ignore=2",
        "auto",
        "auto ignore=2",
    ]
    assert labels(styles="plain,short,long") == ["auto", "auto short", "auto long"]
    assert labels(no_thinking=True) == ["no-thinking"]
    hot = How(temperature=1.0)
    assert labels(reject_above="16000,4000", how=hot) == ["reject>16000", "reject>4000"]
    assert plan(EvaluateConfig(budgets="none"))[0] == Cell(budget=None)


def test_what_was_finished_is_not_asked_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records taken out of the store come back the same; with all there, no model is loaded."""
    grid = {"budgets": "4,9", "how": {**HOT, "max_tokens": 24}, "samples": 2}
    folder = run(**grid)
    whole = samples(folder)
    with sqlite3.connect(folder / "samples.0.sqlite") as db:
        db.execute("DELETE FROM records WHERE rowid % 3 = 0")
    for name in ("samples.jsonl", "summary.json", "scaling-gsm8k.png"):
        (folder / name).unlink()
    assert samples(run(**grid)) == whole
    monkeypatch.setattr(evaluate_module, "Local", None)
    sqlite3.connect(folder / "samples.1.sqlite").execute("PRAGMA journal_mode=WAL").close()
    assert samples(run(**grid)) == whole, "of another rank, killed before its store had tables"


def test_killed_while_the_folder_is_made(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".run.json.x1.tmp").write_text("{")
    assert len(samples(run(budgets="4"))) == 5


def test_flags_are_mended_where_no_sample_is(run: Run) -> None:
    with pytest.raises(InputError, match="max_tokens 40 cannot hold"):
        run(budgets="50")
    assert len(samples(run(budgets="4"))) == 5


# -- baselines ----------------------------------------------------------------------------------


def test_class_conditional(run: Run, questions: Path) -> None:
    folder = run(budgets="12", styles="plain,short,long")
    rows = samples(folder)
    asked = {row["cell"]: row["prompt"] for row in rows if row["problem"] == "2"}
    assert asked["12"] == "What is 1 + 1?"
    assert asked["12 short"] == "What is 1 + 1?" + STYLES["short"]
    assert asked["12 long"].endswith("that you have the correct answer.")
    methods = {m["method"]: m for m in summary(folder)["tasks"]["gsm8k"]["methods"]}
    assert methods["budget forcing"]["control"] == 100
    assert methods["class-conditional"]["runs"] == 2


def test_rejection_sampling(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every problem is drawn until its thinking ends by itself within the limit, no further."""
    settings = {"reject_above": "4,10", "how": {**HOT, "max_tokens": 24}}
    folder = run(**settings, max_tries=60)
    rows = samples(folder)
    for cell, limit in (("reject>4", 4), ("reject>10", 10)):
        for problem in "12345":
            draws = [r for r in rows if (r["cell"], r["problem"]) == (cell, problem)]
            assert [r["sample"] for r in draws] == list(range(len(draws)))
            short = [
                r["thinking_end"] == "natural" and r["thoughts_tokens"] <= limit for r in draws
            ]
            assert short == [False] * (len(draws) - 1) + [True]
            assert [r["counted"] for r in draws] == short and draws[-1]["tries"] == len(draws)
    assert any(row["sample"] > 1 for row in rows)
    cells = summary(folder)["tasks"]["gsm8k"]["cells"]
    assert cells[0]["thinking_tokens"]["max"] <= 4 and cells[0]["samples"] == 5
    (method,) = summary(folder)["tasks"]["gsm8k"]["methods"]
    assert method["method"] == "rejection" and method["control"] == 100
    with sqlite3.connect(folder / "samples.0.sqlite") as db:
        db.execute("DELETE FROM records WHERE rowid > 4")
    assert samples(run(**settings, max_tries=60)) == rows, "resumed, the same draws"
    monkeypatch.setattr(evaluate_module, "Local", None)
    assert samples(run(**settings, max_tries=60)) == rows, "with all there, no model is loaded"


def test_rejection_gives_up(run: Run) -> None:
    rows = samples(run(reject_above="0", how=HOT, max_tries=2, rows=2))
    counted = [row for row in rows if row["counted"]]
    assert len(rows) == 4 and len(counted) == 2
    assert {row["why"] for row in counted} == {"no thinking within 0 tokens in 2 tries"}
    assert not any(row["correct"] for row in counted)


def test_samples_are_voted_on(run: Run) -> None:
    folder = run(budgets="6", samples=4, how={**HOT, "max_tokens": 24})
    (cell,) = summary(folder)["tasks"]["gsm8k"]["cells"]
    assert [at["k"] for at in cell["at_k"]] == [2, 4]
    assert cell["at_k"][1]["thinking_tokens"] == 4 * cell["thinking_tokens"]["mean"]
    texts = {row["sample"]: row["answer"] for row in samples(folder) if row["problem"] == "1"}
    assert len(set(texts.values())) == 4, "the samples are draws of their own"


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_tells_rate_rest_and_cost(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half done after 60 s: as long again, at 2 tokens a second, for 5 dollars an hour."""
    clock = [1000.0]
    monkeypatch.setattr(evaluate_module.time, "monotonic", lambda: clock[0])
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    engine = SimpleNamespace(drawn=7, drawn_separately=7)
    with _Meter(engine, 4, 5.0, console) as meter:  # type: ignore[arg-type]
        for _ in range(2):
            clock[0] += 30
            engine.drawn += 60
            engine.drawn_separately += 180
            meter.advance()
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "2 of 4 samples, eta 1m00s, 120 tokens drawn, 2 tok/s" in shown
    assert "2.9 times fewer drawn than cell by cell), $0.08" in shown


def test_no_thinking(run: Run) -> None:
    folder = run(no_thinking=True, how={"max_tokens": 8})
    assert {row["thinking"] for row in samples(folder)} == {""}
    assert summary(folder)["tasks"]["gsm8k"]["methods"] == []


# -- ranks --------------------------------------------------------------------------------------


def test_two_ranks_equal_one(run: Run, tiny: Path, questions: Path, tmp_path: Path) -> None:
    """torchrun's two processes, each its own file of samples, merge to what one makes. A run on
    one rank takes over what two have done."""
    alone = samples(run("one", budgets="5,11"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "s1fast", "evaluate", str(tiny), "--tasks"]
    command += [f"gsm8k={questions}", "--budgets", "5,11", "--max-tokens", "40"]
    command += ["--output", str(tmp_path / "two")]
    ranks = []
    for rank in (0, 1):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks.append(subprocess.Popen(command, cwd=ROOT, env={**os.environ, **place}))
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    assert samples(tmp_path / "two") == alone
    assert [stored(tmp_path / "two" / f"samples.{rank}.sqlite") for rank in (0, 1)] == [6, 4]
    (tmp_path / "two" / "samples.jsonl").unlink()
    assert samples(run("two", budgets="5,11")) == alone
    assert stored(tmp_path / "two" / "samples.0.sqlite") == 6, "nothing was decoded again"


def test_every_rank_sees_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    choose_device(1, 2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    choose_device(1, 0)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ, "no GPU, nothing to choose"
    choose_device(3, 8)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    with pytest.raises(InputError, match="local rank 2, but only 2 GPUs"):
        choose_device(2, 2)


# -- mistakes -----------------------------------------------------------------------------------


def test_another_runs_folder_is_refused(run: Run, tiny: Path, questions: Path) -> None:
    grid = {"budgets": "4", "how": {"max_tokens": 40}}
    folder = run(**grid)
    before = (folder / "samples.jsonl").read_bytes()
    others: list[tuple[str, dict[str, Any]]] = [
        ("cells", {**grid, "budgets": "4,5"}),
        ("tasks", {**grid, "rows": 2}),
        ("temperature", {**grid, "how": {"max_tokens": 40, "temperature": 0.5}}),
        ("ignore_text", {**grid, "how": {"max_tokens": 40, "ignore_text": ("Hmm",)}}),
        ("dtype", {**grid, "dtype": "float32"}),
    ]
    for field, values in others:
        with pytest.raises(InputError, match=rf"out: holds another run: {field} is .* there and"):
            run(**values)
    text = questions.read_text()
    questions.write_text(text.replace("What", "what"))
    with pytest.raises(InputError, match="tasks is"):
        run(**grid)
    questions.write_text(text)
    weights = tiny / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-4] + b"\0\0\1\0")
    try:
        with pytest.raises(InputError, match="weights is"):
            run(**grid)
    finally:
        weights.write_bytes(kept)
    assert (folder / "samples.jsonl").read_bytes() == before
    run(**grid)


def test_a_folder_of_other_things_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="out: holds other files"):
        run()
    assert os.listdir(tmp_path / "out") == ["thesis.tex"]


@pytest.mark.parametrize(
    ("flags", "naming"),
    [
        ("--tasks math50", r"no task 'math50' \(did you mean math500\?\)"),
        ("--tasks gsm8k=no.jsonl", "no such path"),
        ("--tasks gsm8k=Q,gsm8k=Q", "--tasks: one stands there twice"),
        ("--budgets 5,5", "--budgets: 5 stands there twice"),
        ("--budgets 5,many", "--budgets: 'many' is none of a count, auto, none"),
        ("--num-ignores -1", "num-ignores"),
        ("--num-ignores auto", "--num-ignores: 'auto' is none of a count, none"),
        ("--styles plain,terse", "--styles: 'terse' is none of plain, short, long"),
        ("--rows 0", "--rows: must be at least 1"),
        ("--samples 4", "--samples: must be 1 without --temperature"),
        ("--reject-above 9", "--reject-above: must be given with --temperature"),
        (
            "--reject-above 9 --temperature 1 --budgets 4",
            "--reject-above: cannot go with --budgets",
        ),
        ("--no-thinking --num-ignores 1", "--no-thinking: cannot go with"),
        ("--temperature -1", "temperature must be"),
        ("--temperature nan", "temperature must be"),
        ("--grader foo", "--grader 'foo': expected gemini:MODEL, openai:MODEL@URL or"),
        ("--grader engine:./nowhere", "no such path"),
        ("--budgets 5000 --max-tokens 100", "max_tokens 100 cannot hold max_thinking_tokens 5000"),
        ("--max-batch 0", "--max-batch: must be at least 1"),
        ("--acounting total", "acounting"),
    ],
)
def test_mistakes(
    flags: str,
    naming: str,
    tiny: Path,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line that names it, exit code 2, and no sample stored."""
    import re

    words = flags.replace("Q", str(questions)).split()
    words += [] if "--tasks" in words else ["--tasks", f"gsm8k={questions}"]
    output = tmp_path / "out"
    argv = ["s1fast", "evaluate", str(tiny), *words, "--output", str(output)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith("s1fast: error: ") and re.search(naming, error), error
    assert not (output / "samples.jsonl").exists() and stored(output / "samples.0.sqlite") == 0


def test_help_names_every_flag(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["s1fast", "evaluate", "--help"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    for flag in (
        "--tasks",
        "--budgets",
        "--num-ignores",
        "--temperature",
        "--endpoint",
        "--grader",
    ):
        assert flag in shown
