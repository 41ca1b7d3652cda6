"""s1fast generate: what the terminal shows, and the JSON of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from s1fast.cli import main
from s1fast.console import inert
from s1fast.decoder import Engine
from writers import Ascii

MakeModel = Callable[..., Path]
Say = Callable[..., str]


@pytest.fixture(scope="module")
def restless(make_model: MakeModel) -> Ascii:
    return Ascii(make_model("qwen2", seed=3), end=1.8)


@pytest.fixture
def say(
    restless: Ascii, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Say:
    """Runs the command on the model; its output."""

    def run(*flags: str) -> str:
        command = ["s1fast", "generate", str(restless.folder), "--prompt", "1 + 1?", *flags]
        monkeypatch.setattr(sys, "argv", command)
        main()
        return capsys.readouterr().out

    return run


def test_interventions_are_marked_and_totals_come_last(say: Say) -> None:
    flags = ("--max-thinking-tokens", "20", "--num-ignore", "8", "--max-tokens", "40")
    values = json.loads(say(*flags, "--json"))
    shown, last = say(*flags).rstrip("\n").rsplit("\n", 1)
    wanted = "".join(
        f"[{p['text']}]" if p["kind"] in ("ignore", "end") else p["text"] for p in values["pieces"]
    )
    assert shown == inert(wanted)
    appended = sum(len(p["ids"]) for p in values["pieces"] if p["kind"] in ("ignore", "end"))
    assert values["waits_used"] > 0 and "[Wait]" in shown
    assert last.startswith(
        f"{len(values['token_ids'])} tokens, {values['thinking_tokens']} of them thinking; "
        f"{values['waits_used']} waits, {appended} tokens appended; "
        f"thinking ended: {values['thinking_end']}; finish: {values['finish_reason']}; "
    )
    assert "tok/s, first after " in last
    assert values["budget"]["num_ignore"] == 8 and values["wall_s"] >= values["first_s"] > 0


def test_a_grid_is_drawn_as_a_table(say: Say, restless: Ascii) -> None:
    flags = ("--budgets", "5,20,none", "--num-ignores", "0,2", "--max-tokens", "40")
    values = json.loads(say(*flags, "--json"))
    made = values["completions"]
    grid = [(b, n) for b in (5, 20, None) for n in (0, 2)]
    found = [(c["budget"]["max_thinking_tokens"], c["budget"]["num_ignore"]) for c in made]
    assert found == grid
    prompt, engine = made[0]["prompt_ids"], Engine(restless.folder)
    for c in made:
        cell = restless.engine.generate([prompt], _params(), _budget(c["budget"]))[0]
        assert c["token_ids"] == cell.token_ids
    assert engine.chat.prompt_ids("1 + 1?", think=True) == prompt
    table = say(*flags)
    rows = [line for line in table.splitlines() if line.startswith("│")]
    assert len(rows) == 6
    for (b, n), c, row in zip(grid, made, rows, strict=True):
        budget, ignores, thinking, waits, ended = (x.strip() for x in row.split("│")[1:6])
        assert (budget, ignores) == (str(b).lower(), str(n))
        assert (thinking, waits) == (str(c["thinking_tokens"]), str(c["waits_used"]))
        assert ended == str(c["thinking_end"])
    cost = values["cost"]
    assert cost["steps"] < cost["separate_steps"] and cost["tokens"] < cost["separate_tokens"]
    counts = f"one by one {cost['separate_steps']} steps and {cost['separate_tokens']} tokens"
    assert f"{cost['steps']} steps and {cost['tokens']} tokens in " in table and counts in table


def _params():  # type: ignore[no-untyped-def]
    from s1fast import SamplingParams

    return SamplingParams(max_tokens=40)


def _budget(values: dict[str, object]):  # type: ignore[no-untyped-def]
    from s1fast import Budget

    return Budget(**values)  # type: ignore[arg-type]


def test_drafts_and_logprobs_by_flag(say: Say) -> None:
    plain = json.loads(say("--max-tokens", "130", "--json"))
    other = json.loads(say("--max-tokens", "130", "--json", "--speculate", "3", "--logprobs", "1"))
    assert other["token_ids"] == plain["token_ids"] and plain["logprobs"] is None
    drawn = [p for p in other["logprobs"] if p is not None]
    assert drawn and all(p["logprob"] <= 0 and len(p["top"]) == 1 for p in drawn)


@pytest.mark.parametrize(
    ("flags", "naming"),
    [
        ("--budgets 5,x", "--budgets: 'x' is no count, nor auto, nor none"),
        ("--budgets 5,", "--budgets: '' is no count, nor auto, nor none"),
        ("--num-ignores ,", "--num-ignores: '' is no count, nor none"),
        ("--budgets 5,-1", "max_thinking_tokens must be a count, 'auto' or None, got -1"),
        ("--num-ignores auto", "--num-ignores: 'auto' is no count, nor none"),
        ("--budgets 5 --no-thinking", "--no-thinking: without thinking"),
        ("--budgets 900,2000", "max_thinking_tokens 2000"),
        ("--budgets 5 --min-thinking-tokens 6", "min_thinking_tokens 6 is above"),
        ("--markers r1", "'r1'"),
        ("--device cpu --matmul cuda", 'matmul = "cuda" is of the device'),
        ("--speculate -1", "speculate must be at least 0"),
        ("--logprobs 1000", "logprobs must be None or in 0..100"),
    ],
)
def test_flags_that_cannot_be_honoured_are_named(
    say: Say, capsys: pytest.CaptureFixture[str], flags: str, naming: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        say(*flags.split())
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == ""
    assert said.err.count("\n") == 1 and naming in said.err
