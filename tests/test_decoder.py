"""The decoder against transformers: greedy, budget-forced by hand, sampled, streamed, stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from s1fast.budget import Budget
from s1fast.chat import CHATML, Chat, TextStream, load_tokenizer
from s1fast.decoder import Completion, Engine, Piece, SamplingParams
from s1fast.errors import InputError
from writers import NEVER, Ascii, Theirs, kinds_of, prompts_of, sampled

MakeModel = Callable[..., Path]


# -- plain greedy decoding ------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_greedy_equals_transformers(model_type: str, make_model: MakeModel) -> None:
    """200 tokens alone; and beside neighbours of other lengths, in one batch."""
    folder = make_model(model_type, eos_token_id=NEVER)
    engine = Engine(folder)
    theirs = Theirs(folder, engine.chat.vocab_size)
    prompts = prompts_of(engine.chat, 9, 1, 40, 17)
    params = SamplingParams(max_tokens=200)
    wanted = theirs.generate(prompts[0], 200)
    (alone,) = engine.generate(prompts[:1], params)
    assert alone.token_ids == wanted
    assert alone.finish_reason == "length" and alone.thinking_end is None
    batched = engine.generate(prompts, params)
    assert batched[0].token_ids == wanted
    for done, prompt in zip(batched, prompts, strict=True):
        assert len(done.token_ids) == 200
        assert done.token_ids == theirs.greedy_after_each(prompt, done.token_ids)


def test_greedy_on_real_weights_equals_transformers(smollm2: Path) -> None:
    engine = Engine(smollm2)
    engine.chat.stop_ids = frozenset()
    theirs = Theirs(smollm2, engine.chat.vocab_size)
    questions = [
        "Write a long story about a fox and a hen.",
        "Hi",
        "List the first twenty prime numbers and say why each of them is one.",
    ]
    prompts = [engine.chat.prompt_ids(question, think=False) for question in questions]
    (alone,) = engine.generate(prompts[:1], SamplingParams(max_tokens=60))
    assert alone.token_ids == theirs.generate(prompts[0], 60)
    batched = engine.generate(questions, SamplingParams(max_tokens=20))
    assert batched[0].token_ids == alone.token_ids[:20]
    for done, prompt in zip(batched, prompts, strict=True):
        assert done.prompt_ids == prompt
        assert done.token_ids == theirs.greedy_after_each(prompt, done.token_ids)


@pytest.mark.slow
def test_greedy_on_real_weights_equals_transformers_in_a_batch(smollm2: Path) -> None:
    """200 tokens each beside ragged neighbours; and under a budget, beside the same in one pass."""
    engine = Engine(smollm2)
    engine.chat.stop_ids = frozenset()
    theirs = Theirs(smollm2, engine.chat.vocab_size)
    prompts = [
        engine.chat.prompt_ids(question, think=True)
        for question in ("Hi", "Write a long story about a fox and a hen.", "What is 17 + 25?")
    ]
    for budget in (None, Budget(max_thinking_tokens=120, num_ignore=2)):
        for done in engine.generate(prompts, SamplingParams(max_tokens=200), budget):
            assert len(done.token_ids) == 200 or done.finish_reason == "stop"
            kinds = [p.kind for p in done.pieces for _ in p.ids]
            wanted = theirs.greedy_after_each(done.prompt_ids, done.token_ids)
            for kind, ours, other in zip(kinds, done.token_ids, wanted, strict=True):
                # Where thinking may not end yet or an end was ignored, theirs may be an end.
                assert kind in ("ignore", "end") or ours == other or other in (1, 2)


def test_the_models_own_stop_id_ends_and_is_left_out(make_model: MakeModel) -> None:
    folder = make_model(eos_token_id=NEVER)
    free = Engine(folder)
    (prompt,) = prompts_of(free.chat, 9)
    ids = free.generate([prompt], SamplingParams(max_tokens=40))[0].token_ids
    stopping = Engine(make_model(eos_token_id=[NEVER, ids[20]]))
    (done,) = stopping.generate([prompt], SamplingParams(max_tokens=40))
    assert done.token_ids == ids[: ids.index(ids[20])]
    assert done.finish_reason == "stop"


# -- budget-forced decoding -----------------------------------------------------------------


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def restless(request: pytest.FixtureRequest, make_model: MakeModel) -> Ascii:
    return Ascii(make_model(request.param, seed=3), end=1.8)


@pytest.fixture(scope="module")
def writer(make_model: MakeModel) -> Ascii:
    return Ascii(make_model("qwen2", seed=4), end=0.0)


BUDGETS = {
    "none ignored": (Budget(max_thinking_tokens=12), 26),
    "zero ignored": (Budget(max_thinking_tokens=12, num_ignore=0), 60),
    "two ignored": (Budget(max_thinking_tokens=40, num_ignore=2), 60),
    "more than fit": (Budget(max_thinking_tokens=20, num_ignore=30), 60),
    "texts in turn": (
        Budget(max_thinking_tokens=40, num_ignore=3, ignore_text=["Wait\n", "", "is"]),
        60,
    ),
    "at least": (Budget(max_thinking_tokens=30, min_thinking_tokens=9, final_text=" is"), 60),
    "none at all": (Budget(max_thinking_tokens=0), 10),
}


def test_forced_decoding_equals_transformers_with_ids_spliced_in(restless: Ascii) -> None:
    """Every budget on a ragged batch; together they end in all ways and ignore 0 to many times."""
    prompts = restless.prompts(3, 30, 11, 6, 19)
    ends, reasons, waits = set(), set(), set()
    for budget, max_tokens in BUDGETS.values():
        params = SamplingParams(max_tokens=max_tokens)
        for done in restless.engine.generate(prompts, params, budget):
            restless.check(done, restless.by_hand(prompts[done.index], budget, max_tokens))
            ends.add(done.thinking_end)
            reasons.add(done.finish_reason)
            waits.add(done.waits_used)
    assert ends == {"natural", "length"}
    assert reasons == {"stop", "length"}
    assert {0, 2, 3} <= waits and max(waits) > 3


def test_harness_rounds_equal_transformers_and_stream_nothing_that_is_cut(restless: Ascii) -> None:
    """Among them natural ends beyond the cut: those get the natural end string."""
    prompts = restless.prompts(3, 30, 11, 6)
    seen = set()
    for maximum in (4, 9, 25):
        for num_ignore in (None, 0, 2, 4):
            budget = Budget(
                max_thinking_tokens=maximum,
                num_ignore=num_ignore,
                ignore_text=["Wait", "is\n"],
                accounting="harness",
            )
            done = restless.engine.generate(prompts, SamplingParams(max_tokens=45), budget)
            for completion in done:
                hand = restless.by_hand(prompts[completion.index], budget, 45)
                restless.check(completion, hand)
                seen.add((hand.thinking_end, hand.cut > 0))
            streamed: list[tuple[str, int]] = []
            for item in restless.engine.stream(prompts[1], SamplingParams(max_tokens=45), budget):
                if isinstance(item, Piece):
                    streamed += kinds_of([item])
                    assert streamed == kinds_of(done[1].pieces)[: len(streamed)]
    assert seen == {("natural", False), ("natural", True), ("length", False), ("length", True)}


def test_questions_and_conversations_go_through_the_template(restless: Ascii) -> None:
    chat, params = restless.chat, SamplingParams(max_tokens=30)
    question, budget = "1 + 1?", Budget(max_thinking_tokens=10)
    ids = chat.prompt_ids(question, think=True)
    prompts = [question, [{"role": "user", "content": question}], ids]
    done = restless.engine.generate(prompts, params, budget)
    assert [c.prompt_ids for c in done] == [ids] * 3
    assert done[0].token_ids == done[1].token_ids == done[2].token_ids
    (plain,) = restless.engine.generate([question], SamplingParams(max_tokens=1))
    assert plain.prompt_ids == chat.prompt_ids(question, think=False)


# -- the end of an answer -------------------------------------------------------------------


def texts(items: Iterator[Piece | Completion]) -> list[str]:
    return [item.text for item in items if isinstance(item, Piece)]


@pytest.mark.parametrize("at", [0, 7, 31])
def test_a_stop_string_over_several_tokens_ends_before_it(writer: Ascii, at: int) -> None:
    """It begins within one token and ends within a later one; no part of it is ever streamed."""
    (prompt,) = prompts_of(writer.chat, 8)
    pieces = texts(writer.engine.stream(prompt, sampled()))
    assert len(pieces) == 60
    whole = "".join(pieces)
    stop = pieces[at][-1] + "".join(pieces[at + 1 : at + 3]) + pieces[at + 3][0]
    wanted = whole[: whole.index(stop)]
    for stops in ([stop], ["\0 never", stop, "neither \0"]):
        (done,) = writer.engine.generate([prompt], sampled(stop=stops))
        assert (done.answer, done.finish_reason) == (wanted, "stop")
        # Its ids go up to the token that completed the stop string.
        decoded = writer.chat.decode(done.token_ids)
        assert stop in decoded and stop not in writer.chat.decode(done.token_ids[:-1])
        assert "".join(texts(writer.engine.stream(prompt, sampled(stop=stops)))) == wanted


def test_the_stop_string_that_is_complete_first_counts(writer: Ascii) -> None:
    """And of those that one token completes, the one that begins first."""
    (prompt,) = prompts_of(writer.chat, 8)
    whole = writer.engine.generate([prompt], sampled())[0].answer
    assert whole.isascii()
    end = next(i for i in range(30, 60) if whole.index(whole[i - 2 : i]) == i - 2)
    short, long, later = whole[end - 2 : end], whole[end - 4 : end], whole[end - 4 : end + 9]
    for stops, wanted in [([later, short, long], end - 4), ([later, short], end - 2)]:
        (done,) = writer.engine.generate([prompt], sampled(stop=stops))
        assert done.answer == whole[:wanted]


def test_what_could_have_begun_a_stop_string_is_released_at_the_end(writer: Ascii) -> None:
    (prompt,) = prompts_of(writer.chat, 8)
    (free,) = writer.engine.generate([prompt], sampled())
    stop = free.answer[-2:] + "\0 never"
    for last in ({}, {"max_tokens": 80, "stop_token_ids": [NEVER]}):
        (done,) = writer.engine.generate([prompt], sampled(stop=[stop], **last))
        assert done.answer.startswith(free.answer)
        assert done.answer == writer.chat.decode(done.token_ids)
    # And where a stop id comes right after it.
    ids = free.token_ids
    at = next(i for i in range(20, 60) if ids[i] not in ids[:i])
    (done,) = writer.engine.generate([prompt], sampled(stop=[stop], stop_token_ids=[ids[at]]))
    assert done.answer == writer.chat.decode(ids[:at])


def test_a_stop_string_in_the_last_token_is_a_stop(writer: Ascii) -> None:
    (prompt,) = prompts_of(writer.chat, 8)
    whole = writer.engine.generate([prompt], sampled())[0].answer
    (done,) = writer.engine.generate([prompt], sampled(stop=[whole[-3:] * 9, whole[-3:]]))
    assert done.finish_reason == "stop"
    assert done.answer == whole[: whole.index(whole[-3:])]


def test_stop_strings_and_ids_leave_thinking_alone(restless: Ascii) -> None:
    """They end the answer; what was thought and appended may hold them."""
    (prompt,) = restless.prompts(11)
    budget = Budget(max_thinking_tokens=12, min_thinking_tokens=6)
    (free,) = restless.engine.generate([prompt], SamplingParams(max_tokens=40), budget)
    stops = SamplingParams(
        max_tokens=40, stop=[free.thinking[1:3]], stop_token_ids=[free.token_ids[2]]
    )
    (done,) = restless.engine.generate([prompt], stops, budget)
    assert free.thinking[1:3] not in free.answer.replace("Final Answer:", "")
    assert done.thinking == free.thinking and len(done.thinking) > 3
    assert done.answer == free.answer[: len(done.answer)]
    assert "<|im_start|>answer" in "".join(p.text for p in done.pieces if p.kind == "end")


def test_stop_token_ids_end_and_are_left_out(writer: Ascii) -> None:
    (prompt,) = prompts_of(writer.chat, 8)
    ids = writer.engine.generate([prompt], sampled())[0].token_ids
    stops = [ids[30], ids[12]]
    (done,) = writer.engine.generate([prompt], sampled(stop_token_ids=stops))
    assert done.token_ids == ids[: min(map(ids.index, stops))]
    assert done.finish_reason == "stop"


def test_max_tokens_counts_exactly_and_defaults_to_the_context(writer: Ascii) -> None:
    (prompt,) = prompts_of(writer.chat, 1000)
    for count in (1, 5):
        (done,) = writer.engine.generate([prompt], sampled(max_tokens=count))
        assert (len(done.token_ids), done.finish_reason) == (count, "length")
    (done,) = writer.engine.generate([prompt], SamplingParams())
    assert (len(done.token_ids), done.finish_reason) == (24, "length")
    assert done.token_ids == writer.theirs.greedy_after_each(prompt, done.token_ids)


# -- sampling -------------------------------------------------------------------------------


def test_samples_depend_on_seed_index_and_prompt_but_not_on_the_batch(restless: Ascii) -> None:
    """Rows think and end at different steps, so that others take their places in the cache."""
    engine, budget = restless.engine, Budget(max_thinking_tokens=30, num_ignore=1)
    prompts = restless.prompts(3, 30, 11, 6)
    params = SamplingParams(n=3, temperature=1.0, seed=7, max_tokens=60)
    together = engine.generate(prompts, params, budget)
    assert [(c.index, c.sample) for c in together] == [(i, j) for i in range(4) for j in range(3)]
    assert len({tuple(c.token_ids) for c in together}) == 12
    assert len({len(c.token_ids) for c in together}) > 3
    for i, prompt in enumerate(prompts):
        alone = engine.generate([prompt], params, budget)
        assert [c.token_ids for c in alone] == [c.token_ids for c in together[3 * i : 3 * i + 3]]
    first = SamplingParams(temperature=1.0, seed=7, max_tokens=60)
    for seed, same in ((7, True), (8, False), (7 + (1 << 32), False)):
        (done,) = engine.generate(
            prompts[:1], SamplingParams(temperature=1.0, seed=seed, max_tokens=60), budget
        )
        assert (done.token_ids == together[0].token_ids) is same
    assert engine.generate(prompts[:1], first, budget)[0].token_ids == together[0].token_ids


def test_more_requests_than_rows_give_the_same_in_order(restless: Ascii) -> None:
    prompts, budget = restless.prompts(3, 30, 11, 6, 19), Budget(max_thinking_tokens=20)
    params = SamplingParams(n=2, temperature=1.0, seed=3, max_tokens=40)
    wide = restless.engine.generate(prompts, params, budget)
    for rows in (1, 3):
        engine = Engine(restless.folder, max_batch=rows)
        assert engine.generate(prompts, params, budget) == wide


def test_a_trace_that_is_resumed_as_a_prompt_goes_on_the_same(writer: Ascii) -> None:
    """Draws depend on the absolute position, so it does not matter where the prompt ended."""
    (prompt,) = prompts_of(writer.chat, 8)
    ids = writer.engine.generate([prompt], sampled(temperature=2.0))[0].token_ids
    for at in (1, 20):
        rest = sampled(temperature=2.0, max_tokens=60 - at)
        (done,) = writer.engine.generate([prompt + ids[:at]], rest)
        assert done.token_ids == ids[at:]


def test_filters_reach_the_sampler(writer: Ascii) -> None:
    """Each of them alone can leave nothing but the likeliest."""
    (prompt,) = prompts_of(writer.chat, 8)
    greedy, hot = (
        writer.engine.generate([prompt], SamplingParams(max_tokens=20, temperature=t))[0]
        for t in (0.0, 2.0)
    )
    assert hot.token_ids != greedy.token_ids
    for only in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        (done,) = writer.engine.generate([prompt], sampled(temperature=2.0, max_tokens=20, **only))
        assert done.token_ids == greedy.token_ids


def test_ids_beyond_the_tokenizer_are_never_sampled(writer: Ascii) -> None:
    """The model has 512 ids, the tokenizer fewer; at temperature 5 all are about equally likely."""
    chat = writer.chat
    assert chat.vocab_size < 400
    prompts = prompts_of(chat, 8) + writer.prompts(8)
    params = SamplingParams(temperature=5.0, max_tokens=150)
    for budget, prompt in zip((None, Budget(max_thinking_tokens=100)), prompts, strict=True):
        for done in writer.engine.generate([prompt], params, budget):
            assert max(done.token_ids) < chat.vocab_size
            assert len(set(done.token_ids)) > 50


def test_masked_end_ids_are_not_sampled_at_any_temperature(restless: Ascii) -> None:
    budget = Budget(max_thinking_tokens=25, min_thinking_tokens=25)
    params = SamplingParams(n=4, temperature=5.0, max_tokens=60)
    for done in restless.engine.generate(restless.prompts(5), params, budget):
        assert (done.thinking_tokens, done.thinking_end) == (25, "length")


# -- streaming ------------------------------------------------------------------------------


def test_a_stream_is_the_completion_piece_by_piece(restless: Ascii) -> None:
    (prompt,) = restless.prompts(11)
    for maximum in (0, 30):
        budget = Budget(max_thinking_tokens=maximum, num_ignore=2)
        *pieces, last = restless.engine.stream(prompt, SamplingParams(max_tokens=50), budget)
        (done,) = restless.engine.generate([prompt], SamplingParams(max_tokens=50), budget)
        assert last == done and pieces == done.pieces
        spoken = [(kind, "".join(p.text for p in g)) for kind, g in groupby(pieces, _kind)]
        end = next(text for kind, text in spoken if kind == "end")
        answer = "".join(text for kind, text in spoken if kind == "answer")
        thinking = "".join(text for kind, text in spoken if kind in ("thinking", "ignore"))
        assert thinking == done.thinking
        assert end.partition("<|im_start|>answer")[2] + answer == done.answer
        assert [i for piece in pieces for i in piece.ids] == done.token_ids


def _kind(piece: Piece) -> str:
    return piece.kind


@pytest.fixture(scope="module")
def chat(tiny_tokenizer: Path) -> Chat:
    return Chat(load_tokenizer(tiny_tokenizer), CHATML, [2], "tiny")


def test_a_character_over_several_tokens_is_held_back(chat: Chat) -> None:
    ids = chat.encode("🙂")
    assert len(ids) == 4
    stream = TextStream(chat)
    assert [stream.push([i]) for i in chat.encode("a") + ids] == ["a", "", "", "", "🙂"]
    assert stream.push(ids[:2]) == ""
    assert stream.push(ids[2:] + chat.encode("b")) == "🙂b"
    assert stream.push([]) == ""


@pytest.mark.parametrize(
    "text",
    [
        "the sum",
        "né 日本語",
        "a🙂\n\n🙃b",
        "<|im_start|>é<|im_end|>",
        "\u200b \U0001f469\u200d\U0001f467 x",  # joined characters, none of them visible alone
    ],
)
def test_streamed_text_is_the_text(chat: Chat, text: str) -> None:
    """One id at a time, and no piece ever shows half a character."""
    stream = TextStream(chat)
    pieces = [stream.push([i]) for i in chat.encode(text)]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


def test_bytes_that_are_no_text_show_as_such_once_that_is_certain(chat: Chat) -> None:
    stream = TextStream(chat)
    broken = chat.encode("🙂")[:3] + chat.encode("a")
    pieces = [stream.push([i]) for i in broken]
    assert pieces[:3] == ["", "", ""]
    assert pieces[3] == chat.decode(broken) and pieces[3].endswith("a")


def test_streamed_bytes_add_up_to_the_text(make_model: MakeModel) -> None:
    """A model that writes any bytes: all is streamed but what the end leaves unfinished."""
    engine = Engine(make_model(eos_token_id=NEVER))
    for seed in range(5):
        prompt = engine.chat.encode("the sum")
        items = list(engine.stream(prompt, sampled(seed=seed)))
        text, done = "".join(texts(iter(items))), items[-1]
        assert isinstance(done, Completion)
        whole = engine.chat.decode(done.token_ids)
        assert done.answer == text == whole[: len(text)]
        assert not whole[len(text) :].strip("\ufffd")
        assert len(text) > 20


# -- the cache ------------------------------------------------------------------------------


def test_decoding_over_many_pages_beside_short_rows(writer: Ascii) -> None:
    """Prompts of several chunks; a page is begun, filled and passed within the twelve tokens."""
    engine = Engine(writer.folder, step_tokens=64)
    prompts = prompts_of(writer.chat, 250, 3, 509, 15, 16, 17)
    done = engine.generate(prompts, SamplingParams(max_tokens=12))
    for prompt, completion in zip(prompts, done, strict=True):
        wanted = writer.theirs.greedy_after_each(prompt, completion.token_ids)
        assert completion.token_ids == wanted and len(wanted) == 12


def test_bfloat16_decodes(make_model: MakeModel) -> None:
    """Weights, arithmetic and cache in bf16; a forced string takes the cache's other path."""
    folder = make_model("qwen2", seed=3)
    engine = Engine(folder, dtype="bfloat16")
    assert engine.model.compute_dtype == torch.bfloat16
    prompt = engine.chat.encode("the sum<|im_start|>think")
    (done,) = engine.generate(
        [prompt], SamplingParams(max_tokens=30), Budget(max_thinking_tokens=8)
    )
    assert done.thinking_tokens <= 8
    assert done.thinking_end is not None


# -- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 1e-40}, "temperature"),
        ({"temperature": 1e300}, "temperature"),
        ({"temperature": False}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 1 << 64}, "seed"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"stop": "text"}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": [3]}, "stop"),
        ({"stop_token_ids": 3}, "stop_token_ids"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"),
    ],
)
def test_a_sampling_field_that_cannot_hold_is_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=f"^{named} must be"):
        SamplingParams(**fields)


def test_the_extremes_that_can_hold_do() -> None:
    SamplingParams(temperature=0, top_k=0, top_p=1, min_p=0, seed=0, stop=(), stop_token_ids=())
    SamplingParams(temperature=1e6, top_k=1 << 40)
    SamplingParams(temperature=1e-6, top_p=1e-9, min_p=1.0, seed=(1 << 64) - 1, stop=["a"])


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "named"),
    [
        ([], 5, "prompt: empty"),
        ([3] * 1024, None, "context of 1024"),
        ([3] * 1000, 25, "context of 1024"),
        ([3, -1], 5, "prompt: -1 is no token id"),
        ([3, NEVER], 5, f"prompt: {NEVER} is no token id"),
        ([3, "a"], 5, "prompt: 'a' is no token id"),
        ([True, 3], 5, "prompt: True is no token id"),
        ([3], 0, "max_tokens must be at least 1"),
        ([3], "5", "max_tokens must be at least 1"),
    ],
)
def test_a_prompt_that_cannot_be_honoured_is_named(
    writer: Ascii, prompt: list[Any], max_tokens: Any, named: str
) -> None:
    """Also behind a good one."""
    for prompts in ([prompt], [[3, 4, 5], prompt]):
        with pytest.raises(InputError, match=named):
            writer.engine.generate(prompts, SamplingParams(max_tokens=max_tokens))


def test_no_prompts_give_nothing(writer: Ascii) -> None:
    assert writer.engine.generate([]) == []


def test_an_engine_that_cannot_run_says_why(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model()
    with pytest.raises(InputError, match="max_batch must be at least 1, got 0"):
        Engine(folder, max_batch=0)
    with pytest.raises(InputError, match="vocab_size"):
        Engine(make_model(vocab_size=100))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="device: cuda"):
        Engine(folder, device="cuda")
