"""Budgets as they are asked for: what compiles to which ids, and what is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from playing import play
from s1fast.automaton import Program
from s1fast.budget import ANSWER_ROOM, Budget, compile_program
from s1fast.chat import CHATML, Chat, load_tokenizer
from s1fast.errors import InputError

# -- Budget: values that cannot hold --------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_thinking_tokens": -1}, "max_thinking_tokens"),
        ({"max_thinking_tokens": "most"}, "max_thinking_tokens"),
        ({"max_thinking_tokens": 2.0}, "max_thinking_tokens"),
        ({"max_thinking_tokens": True}, "max_thinking_tokens"),
        ({"min_thinking_tokens": -1}, "min_thinking_tokens"),
        ({"min_thinking_tokens": None}, "min_thinking_tokens"),
        ({"num_ignore": -1}, "num_ignore"),
        ({"num_ignore": "2"}, "num_ignore"),
        ({"max_thinking_tokens": 5, "min_thinking_tokens": 6}, "min_thinking_tokens 6"),
        ({"accounting": "sum"}, "accounting"),
        ({"accounting": "harness"}, "max_thinking_tokens"),
        ({"ignore_text": []}, "ignore_text"),
        ({"ignore_text": 5}, "ignore_text"),
        ({"ignore_text": None}, "ignore_text"),
        ({"ignore_text": ["Wait", 3]}, "ignore_text"),
        ({"final_text": None}, "final_text"),
    ],
)
def test_a_budget_names_the_field_that_cannot_hold(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        Budget(**fields)


def test_harness_has_no_run_with_ignores_and_a_minimum() -> None:
    fields: dict[str, Any] = {"max_thinking_tokens": 9, "accounting": "harness"}
    with pytest.raises(InputError, match="min_thinking_tokens 2"):
        Budget(**fields, num_ignore=0, min_thinking_tokens=2)
    Budget(**fields, num_ignore=0, min_thinking_tokens=1)  # what its rounds ask for anyway
    Budget(**fields, min_thinking_tokens=2)


@pytest.fixture(scope="module")
def chat(tiny_tokenizer: Path) -> Chat:
    return Chat(load_tokenizer(tiny_tokenizer), CHATML, [2], "tiny")


def compiled(
    chat: Chat, budget: Budget | None, prompt: str, *, context: int = 500, **limits: Any
) -> Program:
    return compile_program(
        budget,
        chat,
        chat.encode(prompt),
        context=context,
        max_tokens=limits.get("max_tokens"),
        stop_ids=chat.stop_ids,
    )


PROMPT = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n<|im_start|>think"


def test_texts_become_ids_once(chat: Chat) -> None:
    budget = Budget(
        max_thinking_tokens=9,
        min_thinking_tokens=4,
        num_ignore=2,
        ignore_text=["Wait", " the sum"],
        final_text="Answer:",
    )
    p = compiled(chat, budget, PROMPT)
    assert p.think and p.thought == 0 and not p.newline_ended and not p.harness
    assert (p.max_thinking, p.min_thinking, p.num_ignore, p.mask_first) == (9, 4, 2, True)
    assert p.ends == ((chat.marker_id("<|im_start|>"),), (chat.marker_id("<|im_end|>"),))
    assert [chat.decode(ids) for ids in p.ignore_ids] == ["Wait", " the sum"]
    assert p.natural_ids == tuple(chat.encode("<|im_start|>answer"))
    assert p.forced_ids == tuple(chat.encode("<|im_start|>answer\nAnswer:"))
    assert p.newline_ids == tuple(chat.encode("\n"))
    assert p.stop_ids == chat.stop_ids
    assert (p.max_tokens, p.room) == (500 - len(chat.encode(PROMPT)),) * 2


def test_s1s_final_text_is_the_default(chat: Chat) -> None:
    p = compiled(chat, Budget(max_thinking_tokens=9, accounting="harness"), PROMPT)
    assert chat.decode(p.forced_ids) == "<|im_start|>answer\nFinal Answer:"
    assert chat.decode(p.ignore_ids[0]) == "Wait"
    assert p.harness


def test_num_ignore_none_masks_nothing_and_zero_masks_the_first(chat: Chat) -> None:
    none, zero = (compiled(chat, Budget(num_ignore=n), PROMPT) for n in (None, 0))
    assert (none.num_ignore, none.mask_first) == (0, False)
    assert (zero.num_ignore, zero.mask_first) == (0, True)


def test_newline_table_knows_every_id_whose_text_ends_in_one(chat: Chat) -> None:
    texts = {i: chat.decode([i]) for i in range(chat.vocab_size)}
    enders = compiled(chat, Budget(), PROMPT).newline_enders
    assert enders == {i for i, text in texts.items() if text.endswith("\n")}
    assert chat.encode("\n")[0] in enders
    assert 0 < len(enders) < 10


@pytest.mark.parametrize("limit", [None, 300])
def test_auto_leaves_100_tokens_for_the_answer(chat: Chat, limit: int | None) -> None:
    """Of the context, and where max_tokens allows less than that, of max_tokens."""
    p = compiled(chat, Budget(max_thinking_tokens="auto"), PROMPT, max_tokens=limit)
    room = limit or 500 - len(chat.encode(PROMPT))
    assert p.max_thinking == room - len(p.forced_ids) - ANSWER_ROOM
    words = [30] * p.max_thinking
    trace = play(replace(p, stop_ids=frozenset()), lambda *_: words.pop() if words else 40)
    assert abs(len(trace.of("answer")) - ANSWER_ROOM) <= 1  # one less where a newline was needed
    assert len(trace.ids) == room


def test_auto_counts_the_requests_own_prompt(chat: Chat) -> None:
    """Thinking that stands in the prompt counts, so the sum of both does not depend on it."""
    short = compiled(chat, Budget(max_thinking_tokens="auto"), PROMPT)
    long = compiled(chat, Budget(max_thinking_tokens="auto"), PROMPT + "\nthe sum of")
    assert long.thought == len(chat.encode("\nthe sum of"))
    assert long.max_thinking == short.max_thinking
    other = compiled(chat, Budget(max_thinking_tokens="auto"), "the sum " + PROMPT)
    assert other.max_thinking == (short.max_thinking or 0) - len(chat.encode("the sum "))


def test_auto_that_leaves_nothing_is_refused(chat: Chat) -> None:
    with pytest.raises(InputError, match="max_thinking_tokens 'auto'"):
        compiled(chat, Budget(max_thinking_tokens="auto"), PROMPT, max_tokens=ANSWER_ROOM)


def test_auto_below_the_minimum_is_refused(chat: Chat) -> None:
    budget = Budget(max_thinking_tokens="auto", min_thinking_tokens=200)
    compiled(chat, budget, PROMPT)
    with pytest.raises(InputError, match="min_thinking_tokens 200"):
        compiled(chat, budget, PROMPT, max_tokens=250)


def test_max_tokens_must_hold_the_forced_end(chat: Chat) -> None:
    budget = Budget(max_thinking_tokens=20)
    needed = 20 + len(chat.encode("\n")) + len(chat.encode("<|im_start|>answer\nFinal Answer:"))
    program = compiled(chat, budget, PROMPT, max_tokens=needed)
    with pytest.raises(InputError, match=rf"max_tokens {needed - 1} cannot hold .* needs {needed}"):
        compiled(chat, budget, PROMPT, max_tokens=needed - 1)
    # And the least that is accepted does hold it.
    trace = play(program, lambda *_: 30)
    assert trace.of("end") == program.newline_ids + program.forced_ids
    assert len(trace.ids) == needed


def test_thinking_of_the_prompt_lowers_what_max_tokens_must_hold(chat: Chat) -> None:
    budget, said = Budget(max_thinking_tokens=20), "\nthe sum of the two"
    needed = 20 + len(chat.encode("\n")) + len(chat.encode("<|im_start|>answer\nFinal Answer:"))
    needed -= len(chat.encode(said))
    assert compiled(chat, budget, PROMPT + said, max_tokens=needed).max_thinking == 20
    with pytest.raises(InputError, match="max_tokens"):
        compiled(chat, budget, PROMPT + said, max_tokens=needed - 1)


def test_minimum_above_max_tokens_is_refused(chat: Chat) -> None:
    with pytest.raises(InputError, match="min_thinking_tokens 30"):
        compiled(chat, Budget(min_thinking_tokens=30), PROMPT, max_tokens=29)


def test_an_ignore_text_that_ends_thinking_is_refused(chat: Chat) -> None:
    with pytest.raises(InputError, match=r"ignore_text .* holds a marker"):
        compiled(chat, Budget(num_ignore=1, ignore_text=["Wait", "no<|im_end|>"]), PROMPT)


def test_open_thinking_in_the_prompt_counts(chat: Chat) -> None:
    p = compiled(chat, Budget(max_thinking_tokens=50), PROMPT + "\nthe sum")
    assert p.think and p.thought == len(chat.encode("\nthe sum"))
    assert not p.newline_ended
    assert compiled(chat, Budget(), PROMPT + "\nthe sum\n").newline_ended


def test_only_the_last_start_marker_counts(chat: Chat) -> None:
    """Earlier thinking, closed or not, is of no account."""
    earlier = "<|im_start|>think\nthe sum\n<|im_start|>answer\nis<|im_end|>\n<|im_start|>think\nof "
    p = compiled(chat, Budget(max_thinking_tokens=50), earlier + PROMPT + "\nthe")
    assert p.think and p.thought == len(chat.encode("\nthe"))


@pytest.mark.parametrize("closed", ["<|im_start|>answer\nthe", "<|im_end|>\n"])
def test_closed_thinking_is_not_entered_again(chat: Chat, closed: str) -> None:
    p = compiled(chat, Budget(max_thinking_tokens=50, num_ignore=3), PROMPT + "\nthe\n" + closed)
    assert not p.think and p.num_ignore == 0 and p.max_thinking is None
    start = chat.marker_id("<|im_start|>")
    tokens = [30, start]
    trace = play(p, lambda *_: tokens.pop(0))
    assert trace.kinds == ["answer"]  # an END delimiter ends it
    assert trace.automaton.finish_reason == "stop"


def test_no_budget_is_plain_generation(chat: Chat) -> None:
    p = compiled(chat, None, PROMPT)
    assert not p.think and p.stop_ids == chat.stop_ids
    tokens = [chat.marker_id("<|im_start|>"), 30, chat.marker_id("<|im_end|>")]
    assert play(p, lambda *_: tokens.pop(0)).ids == [chat.marker_id("<|im_start|>"), 30]


@pytest.mark.parametrize(
    ("prompt", "fields", "named"),
    [
        ("", {}, "prompt: empty"),
        ("the sum", {}, "prompt: .*start-of-thinking marker"),
        (PROMPT, {"max_tokens": 0}, "max_tokens"),
        (PROMPT, {"max_tokens": -3}, "max_tokens"),
        (PROMPT, {"max_tokens": 5.0}, "max_tokens"),
        (PROMPT, {"max_tokens": True}, "max_tokens"),
        (PROMPT, {"max_tokens": 500}, "context of 500"),
        (PROMPT, {"context": 10}, "context of 10"),
    ],
)
def test_a_request_that_cannot_be_honoured_is_named(
    chat: Chat, prompt: str, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(InputError, match=named):
        compiled(chat, Budget(), prompt, **fields)


def test_the_markers_must_be_single_tokens() -> None:
    from tokenizers import Tokenizer, models

    plain = Chat(Tokenizer(models.BPE({"a": 0, "b": 1}, [])), CHATML, [], "plain")
    with pytest.raises(InputError, match=r"<\|im_start\|> is not a single token"):
        compiled(plain, Budget(), "ab")
