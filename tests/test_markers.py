"""Other models' markers, delimiters of several tokens, and characters of several."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from s1fast.automaton import Automaton, Phase
from s1fast.budget import Budget, compile_program
from s1fast.chat import CHATML, Chat, TextStream, load_tokenizer
from s1fast.decoder import Engine, SamplingParams
from s1fast.errors import InputError
from s1fast.loop import Loop
from s1fast.request import Cell, Kind
from s1fast.row import Row
from writers import Ascii, check_equal

MakeModel = Callable[..., Path]


@pytest.fixture(scope="module")
def plain(tiny_tokenizer: Path) -> Path:
    return tiny_tokenizer


@pytest.fixture(scope="module")
def tagged(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny tokenizer with <think> and </think>, as R1's distillations, QwQ and Qwen3 have."""
    tokenizer = Tokenizer.from_file(str(tiny_tokenizer))
    tokenizer.add_special_tokens(["<think>", "</think>"])
    path = tmp_path_factory.mktemp("tagged") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def chat_of(path: Path, template: str = CHATML) -> Chat:
    return Chat(load_tokenizer(path), template, [2], "tiny")


def program(chat: Chat, prompt: str, budget: Budget, **limits: int):  # type: ignore[no-untyped-def]
    values = {"context": 500, "max_tokens": None, **limits}
    return compile_program(budget, chat, chat.encode(prompt), stop_ids=chat.stop_ids, **values)


def test_the_vocabulary_chooses(plain: Path, tagged: Path) -> None:
    assert chat_of(plain).markers.answer == "<|im_start|>answer"
    chat = chat_of(tagged)
    assert (chat.markers.start, chat.markers.answer) == ("<think>", "</think>")
    chat.choose_markers("s1.1")
    assert chat.markers.start == "<|im_start|>think"
    with pytest.raises(InputError, match=r"markers 'r1': there are auto, s1, s1\.1, think"):
        chat.choose_markers("r1")


def test_prompts_open_thinking_once(tagged: Path) -> None:
    """Some templates write the start themselves."""
    opens = CHATML.replace(
        "<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>\n{% endif"
    )
    for template in (CHATML, opens):
        chat = chat_of(tagged, template)
        assert chat.decode(chat.prompt_ids("Hi", think=True)).endswith("assistant\n<think>\n")
    ids = chat_of(tagged).prompt_ids("Hi", think=False)
    assert chat_of(tagged).decode(ids).endswith("assistant\n")


def test_think_tags_compile(tagged: Path) -> None:
    chat = chat_of(tagged)
    budget = Budget(max_thinking_tokens=9, num_ignore=1)
    p = program(chat, "<think>\n", budget)
    close = chat.marker_id("</think>")
    assert p.ends == ((close,), (2,))  # a stop of the model's own ends thinking too
    assert (p.natural_ids, p.thought, p.mask_first) == ((close,), 0, True)
    assert chat.decode(p.forced_ids) == "</think>\nFinal Answer:"
    # The line break behind the start belongs to the marker; what follows is thinking.
    assert program(chat, "<think>\nthe sum", budget).thought == len(chat.encode("the sum"))
    assert program(chat, "<think>the sum", budget).thought == len(chat.encode("the sum"))
    assert not program(chat, "<think>\n</think>\n", budget).think
    assert program(chat, "<think>\n</think>\n<think>\n", budget).think
    with pytest.raises(InputError, match="start-of-thinking marker <think>"):
        program(chat, "the sum", budget)
    with pytest.raises(InputError, match=r"ignore_text .* </think>"):
        program(chat, "<think>\n", Budget(num_ignore=1, ignore_text="no</think>"))


def test_a_delimiter_of_several_tokens_is_matched(plain: Path) -> None:
    chat = chat_of(plain)
    chat.choose_markers("think")
    close = chat.encode("</think>")
    assert len(close) > 2
    p = program(chat, "<think>\n", Budget(max_thinking_tokens=40, num_ignore=1))
    assert p.ends[0] == tuple(close)
    automaton = Automaton(p)
    automaton.begin()
    said = chat.encode("the sum")
    moves = [automaton.step(i) for i in [*said, *close]]
    assert all(move.keep and not move.append for move in moves[:-1])
    assert moves[-1].cut == len(close) - 1 and moves[-1].ignore == p.ignore_ids[0]
    assert automaton.thinking == len(said) + len(p.ignore_ids[0])
    moves = [automaton.step(i) for i in [*said, *close]]
    assert moves[-1].end == tuple(close) and automaton.phase is Phase.ANSWER


def test_a_delimiter_that_does_not_come_back_is_refused(plain: Path) -> None:
    tokenizer = json.loads(plain.read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "/"}, "content": ""}
    chat = Chat(Tokenizer.from_str(json.dumps(tokenizer)), CHATML, [2], "tiny")
    chat.choose_markers("think")
    with pytest.raises(InputError, match=r"</think> must be 1 to 16 tokens that decode to it"):
        program(chat, "<think>\n", Budget())


def test_an_engine_thinks_between_tags(make_model: MakeModel, tagged: Path) -> None:
    """Against the same run with s1's markers: only the texts differ."""
    folder = make_model("qwen2", seed=3)
    (folder / "tokenizer.json").write_bytes(tagged.read_bytes())
    engine = Engine(folder)
    budget = Budget(max_thinking_tokens=12, num_ignore=1)
    (done,) = engine.generate(["1 + 1?"], SamplingParams(max_tokens=40), budget)
    text = engine.chat.decode(done.prompt_ids + done.token_ids)
    assert "<think>\n" in text and done.thinking_tokens <= 12 and done.thinking_end
    assert text.count("</think>") == 1
    assert done.answer and done.answer in text.partition("</think>")[2]


def test_a_long_delimiter_is_held_back_until_it_is_none(plain: Path) -> None:
    chat = chat_of(plain)
    chat.choose_markers("think")
    said, close, other = chat.encode("the sum"), chat.encode("</think>"), chat.encode(" is")
    row = row_of(chat, Budget(num_ignore=1), "<think>\n")
    for i in [*said, *close[:-1]]:
        row.take(i)
    assert spoken(row) == [("thinking", "the sum")]
    for i in [*other, *close]:
        row.take(i)
    first = "the sum" + chat.decode(close[:-1]) + " is"
    assert spoken(row) == [("thinking", first), ("ignore", "Wait")]


def test_the_cache_takes_a_long_delimiter_back(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokens are drawn from a script; what the model then writes is transformers' again. Also
    as a tree, whose cells leave the trunk at the delimiter."""
    writer = Ascii(make_model("qwen2", seed=3), end=0.0)
    engine = Engine(writer.folder, markers="think")
    said, close = writer.chat.encode("the sum of"), writer.chat.encode("</think>")
    script = [*said, *close, *said, *close[:-1], *said, *close]
    draw = Loop._draw

    def scripted(self: Loop, row: Row, *rest: Any) -> int:
        return script[row.steps] if row.steps < len(script) else draw(self, row, *rest)

    monkeypatch.setattr(Loop, "_draw", scripted)
    prompt = [5, 6, 7, *writer.chat.encode("<think>\n")]
    params, budget = SamplingParams(max_tokens=110), Budget(max_thinking_tokens=80, num_ignore=1)
    (done,) = engine.generate([prompt], params, budget)
    wait = writer.chat.encode("Wait")
    thought = [*said, *wait, *said, *close[:-1], *said]
    assert done.token_ids[: len(thought) + len(close)] == [*thought, *close]
    assert (done.waits_used, done.thinking_tokens) == (1, len(thought))
    answered = done.token_ids[len(thought) + len(close) :]
    before = prompt + done.token_ids[: -len(answered)]
    assert len(answered) > 20 and answered == writer.theirs.greedy_after_each(before, answered)
    budgets = [len(said), len(said) + 2, len(said) + len(close), len(thought) + 3, 80]
    tree = engine.generate([prompt], params, Budget(), budgets=budgets, num_ignores=[0, 1])
    for cell in tree:
        (alone,) = engine.generate([prompt], params, cell.budget)
        assert check_equal(writer, cell, alone, params)
    assert {c.thinking_end for c in tree} == {"natural", "length"}
    assert engine.pages.held == 0


# -- characters over several tokens ---------------------------------------------------------


def row_of(chat: Chat, budget: Budget | None, prompt: str) -> Row:
    ids = chat.encode(prompt)
    p = compile_program(budget, chat, ids, context=500, max_tokens=60, stop_ids=chat.stop_ids)
    row = Row(1, (1, 0), 0, 0, ids, SamplingParams(), [Cell(0, budget, p)], chat)
    row.begin()
    return row


def spoken(row: Row) -> list[tuple[Kind, str]]:
    said: list[tuple[Kind, str]] = []
    for p in row.pieces:
        if said and said[-1][0] == p.kind:
            said[-1] = p.kind, said[-1][1] + p.text
        else:
            said.append((p.kind, p.text))
    return said


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_an_appended_text_never_completes_half_a_character(plain: Path, cut: int) -> None:
    """Thinking is cut at exactly the maximum; bytes without their end show as such, in thinking."""
    chat = chat_of(plain)
    ids = chat.encode("🙂")
    assert len(ids) == 4
    for budget in (
        Budget(max_thinking_tokens=1 + cut, final_text="é"),
        Budget(num_ignore=1, ignore_text="\u0301é"),
    ):
        row = row_of(chat, budget, "<|im_start|>think")
        for i in [*chat.encode("a"), *ids[:cut]]:
            row.take(i)
        if budget.num_ignore:
            row.take(chat.marker_id("<|im_start|>"))
        broken = "a🙂" if cut == 4 else "a\ufffd"
        appended = "\u0301é" if budget.num_ignore else "\n<|im_start|>answer\né"
        kinds = ("thinking", "ignore" if budget.num_ignore else "end")
        assert spoken(row) == list(zip(kinds, (broken, appended), strict=True))
        # And the model's next bytes begin a character of their own.
        for i in chat.encode("ñ"):
            row.take(i)
        assert spoken(row)[-1][1].endswith("ñ")


def test_flush_gives_what_was_held_and_begins_anew(plain: Path) -> None:
    chat = chat_of(plain)
    smile = chat.encode("🙂")
    stream = TextStream(chat)
    assert stream.push([*chat.encode("a"), *smile[:2]]) == "a"
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""
    assert stream.push(smile) == "🙂" and stream.flush() == ""
