"""The engine as a whole: many callers, few pages, drafts, cancellation, ranks; the output stays."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_checks import BUDGETS, check_same, eventually_idle, soak
from s1fast.budget import Budget
from s1fast.chat import Chat
from s1fast.decoder import Engine, SamplingParams
from s1fast.errors import InputError
from s1fast.handle import Cancelled, Handle
from s1fast.kv_cache import PAGE_SIZE
from s1fast.loop import Loop
from s1fast.request import Completion, Piece, Request
from s1fast.row import Row
from writers import Ascii, check_equal, prompts_of, sampled

MakeModel = Callable[..., Path]


@pytest.fixture(scope="module")
def restless(make_model: MakeModel) -> Ascii:
    return Ascii(make_model("qwen2", seed=3), end=1.8)


@pytest.fixture(scope="module")
def writer(make_model: MakeModel) -> Ascii:
    return Ascii(make_model("qwen2", seed=4), end=0.0)


# -- what must not change the output --------------------------------------------------------


@pytest.fixture(scope="module")
def babbler(make_model: MakeModel) -> Ascii:
    return Ascii(make_model("qwen2", seed=6), end=0.7, pairs=2)


def test_speculation_changes_nothing(babbler: Ascii) -> None:
    engine = Engine(babbler.folder, speculate=4)
    check_same(babbler, engine)
    assert engine.stats.accepted > 40
    assert engine.stats.drafted > engine.stats.accepted + 100  # and wrong drafts were rejected


def test_right_drafts_save_steps(babbler: Ascii) -> None:
    (prompt,) = prompts_of(babbler.chat, 9)
    params = SamplingParams(max_tokens=300)
    plain, drafting = Engine(babbler.folder), Engine(babbler.folder, speculate=8)
    plain.chat.stop_ids = drafting.chat.stop_ids = frozenset()
    (a,), (b,) = (e.generate([prompt], params) for e in (plain, drafting))
    assert check_equal(babbler, a, b, params)
    assert plain.stats.steps == len(a.token_ids) == 300
    assert drafting.stats.steps + drafting.stats.accepted == 300
    assert drafting.stats.accepted > 50


def test_preempted_rows_go_on_as_if_nothing_had_been(restless: Ascii) -> None:
    engine = Engine(restless.folder, cache_tokens=176, reuse_prompts=False)
    check_same(restless, engine)
    assert engine.stats.preemptions > 3


def test_chunks_of_prompts_change_nothing(restless: Ascii) -> None:
    check_same(restless, Engine(restless.folder, step_tokens=7, max_batch=5))


def test_shared_beginnings_change_nothing_and_are_counted(restless: Ascii) -> None:
    engine = Engine(restless.folder)
    (long,) = prompts_of(restless.chat, 40)
    start = restless.chat.encode("<|im_start|>think")
    prompts = [long + start, long[:35] + start, long[:33] + start]
    params, budget = SamplingParams(max_tokens=40, temperature=0.5, n=3), BUDGETS[1]
    done = engine.generate(prompts, params, budget)
    # The first computes everything; the others begin with two full pages of it.
    assert [c.cached_tokens for c in done] == [0] + [2 * PAGE_SIZE] * 8
    again = engine.generate(prompts, params, budget)
    assert all(c.cached_tokens == len(c.prompt_ids) // PAGE_SIZE * PAGE_SIZE for c in again)
    none = Engine(restless.folder, reuse_prompts=False).generate(prompts, params, budget)
    assert all(c.cached_tokens == 0 for c in none)
    for a, b, c in zip(done, again, none, strict=True):
        check_equal(restless, a, c, params)
        check_equal(restless, b, c, params)
    # What was answered is a beginning as well.
    followed = [*done[0].prompt_ids, *done[0].token_ids, 5, 6, 7]
    (more,) = engine.generate([followed], SamplingParams(max_tokens=4))
    assert more.cached_tokens > 3 * PAGE_SIZE


def test_a_forced_string_is_one_step(restless: Ascii) -> None:
    """However long: 24 tokens of final text cost no more steps than one."""
    (prompt,) = restless.prompts(11)
    engine = Engine(restless.folder)
    for text in ("Answer:", "the sum of the two numbers is " * 4):
        before = engine.stats.steps
        budget = Budget(max_thinking_tokens=5, min_thinking_tokens=5, final_text=text)
        params = SamplingParams(max_tokens=90, stop_token_ids=list(range(restless.chat.vocab_size)))
        (done,) = engine.generate([prompt], params, budget)
        assert done.finish_reason == "stop"
        assert engine.stats.steps - before == 6  # five of thinking, one that stops the answer


def test_a_stop_text_inside_a_forced_string_stops_nothing(restless: Ascii) -> None:
    """It ends the answer, and the answer begins behind what was appended."""
    (prompt,) = restless.prompts(11)
    budget = Budget(max_thinking_tokens=5, min_thinking_tokens=5)
    params = [SamplingParams(max_tokens=30, stop=stop) for stop in ([], ["Final", "wer:"])]
    free, stopped = (restless.engine.generate([prompt], p, budget)[0] for p in params)
    assert stopped.answer.startswith("\nFinal Answer:")
    assert (stopped.token_ids, stopped.answer) == (free.token_ids, free.answer)


# -- logprobs -------------------------------------------------------------------------------


def test_logprobs_are_transformers(restless: Ascii) -> None:
    (prompt,) = restless.prompts(11)
    for params in (
        SamplingParams(max_tokens=40, logprobs=3),
        SamplingParams(max_tokens=40, logprobs=0, temperature=1.5, top_p=0.9),
    ):
        (done,) = restless.engine.generate([prompt], params, BUDGETS[1])
        assert done.logprobs is not None and len(done.logprobs) == len(done.token_ids)
        kinds = [p.kind for p in done.pieces for _ in p.ids]
        for at, (kind, found) in enumerate(zip(kinds, done.logprobs, strict=True)):
            assert (found is None) == (kind in ("ignore", "end"))
            if found is None:
                continue
            logits_V = restless.theirs.logits(prompt + done.token_ids[:at])
            wanted_V = logits_V[: restless.chat.vocab_size].log_softmax(-1)
            # fp32 logits of size 10 agree to some 1e-5.
            assert found.logprob == pytest.approx(float(wanted_V[done.token_ids[at]]), abs=1e-3)
            top = wanted_V.topk(params.logprobs or 0).values.tolist() if params.logprobs else []
            assert [p for _, p in found.top] == pytest.approx(top, abs=1e-3)
    (plain,) = restless.engine.generate([prompt], SamplingParams(max_tokens=4))
    assert plain.logprobs is None


# -- many callers ---------------------------------------------------------------------------


def test_threads_share_the_engine(restless: Ascii) -> None:
    prompts = restless.prompts(*range(3, 15))
    params = SamplingParams(max_tokens=40, temperature=0.5)
    wanted = restless.engine.generate(prompts, params, BUDGETS[1])
    engine = Engine(restless.folder)

    def ask(i: int) -> Completion:
        time.sleep(0.002 * (i % 5))
        (done,) = engine.generate([prompts[i]], params, BUDGETS[1])
        return done

    with ThreadPoolExecutor(12) as pool:
        for a, b in zip(wanted, pool.map(ask, range(12)), strict=True):
            check_equal(restless, a, b, params)
    assert engine.pages.held == 0
    assert engine.stats.steps < sum(c.steps for c in wanted) // 2  # they ran together


def test_coroutines_share_the_engine(restless: Ascii) -> None:
    prompts = restless.prompts(*range(3, 11))
    params = SamplingParams(max_tokens=40)
    wanted = restless.engine.generate(prompts, params, BUDGETS[1])
    engine = Engine(restless.folder)

    async def read(prompt: list[int]) -> list[Piece | Completion]:
        return [item async for item in engine.stream_async(prompt, params, BUDGETS[1])]

    async def all_of_them() -> tuple[list[list[Piece | Completion]], list[Completion]]:
        streams = asyncio.gather(*map(read, prompts))
        return await streams, await engine.generate_async(prompts, params, BUDGETS[1])

    streams, done = asyncio.run(all_of_them())
    for a, items, c in zip(wanted, streams, done, strict=True):
        b = items[-1]
        assert isinstance(b, Completion) and items[:-1] == b.pieces
        assert check_equal(restless, a, b, params) and check_equal(restless, a, c, params)
    assert engine.pages.held == 0


def test_a_long_prompt_does_not_stop_those_that_decode(writer: Ascii) -> None:
    """While it is computed in chunks, the other row draws a token every step."""
    engine = Engine(writer.folder, step_tokens=16, max_batch=4)
    short, long = prompts_of(writer.chat, 3, 600)
    counts: list[int] = []
    first = engine.submit(Request(prompt=short, params=SamplingParams(max_tokens=200)))
    items = iter(first)
    next(items)
    second = engine.submit(Request(prompt=long, params=SamplingParams(max_tokens=2)))
    began = engine.stats.steps
    done = second.result()
    counts.append(engine.stats.steps - began)
    assert len(done) == 1 and counts[0] >= 600 // 16
    (finished,) = [i for i in items if isinstance(i, Completion)]
    assert finished.steps == 200
    assert engine.stats.steps <= 202 + 2


def test_the_first_to_come_is_the_first_to_be_served(writer: Ascii) -> None:
    """With room for one row at a time, and a request that needs nearly the whole cache between."""
    engine = Engine(writer.folder, max_batch=1)
    order: list[int] = []
    lock = threading.Lock()
    handles = [
        engine.submit(Request(prompt=prompt, params=SamplingParams(max_tokens=8)))
        for prompt in prompts_of(writer.chat, 3, 900, 4, 5)
    ]

    def wait(i: int, handle: Handle) -> None:
        handle.result()
        with lock:
            order.append(i)

    threads = [threading.Thread(target=wait, args=pair) for pair in enumerate(handles)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3]


# -- cancellation and failure ---------------------------------------------------------------


def test_whoever_stops_reading_frees_the_pages(writer: Ascii) -> None:
    engine = Engine(writer.folder)
    (prompt,) = prompts_of(writer.chat, 30)
    stream = engine.stream(prompt, SamplingParams(max_tokens=900))
    assert isinstance(next(stream), Piece) and engine.pages.held > 0
    stream.close()  # type: ignore[attr-defined]
    eventually_idle(engine)
    assert engine.stats.steps < 900

    async def read_a_little() -> None:
        async for item in engine.stream_async(prompt, SamplingParams(max_tokens=900)):
            assert isinstance(item, Piece)
            break
        task = asyncio.create_task(engine.generate_async([prompt], SamplingParams(max_tokens=900)))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(read_a_little())
    eventually_idle(engine)
    assert engine.stats.steps < 2700


def test_a_cancelled_request_tells_whoever_waits_and_leaves_the_others(writer: Ascii) -> None:
    engine = Engine(writer.folder, max_batch=2)
    prompts = prompts_of(writer.chat, 30, 9, 12, 7)
    params = SamplingParams(max_tokens=200)
    wanted = writer.engine.generate(prompts, params)
    handles = [engine.submit(Request(prompt=p, params=params)) for p in prompts]
    engine.cancel(handles[0])  # one that runs, or is about to
    engine.cancel(handles[3])  # one that waits
    handles[3].cancel()  # twice is once
    for i in (0, 3):
        with pytest.raises(Cancelled, match="was cancelled"):
            handles[i].result()
    for i in (1, 2):
        assert check_equal(writer, handles[i].result()[0], wanted[i], params)
    eventually_idle(engine)
    engine.cancel(handles[1])  # what is done cannot be undone
    assert engine.generate(prompts[1:2], params)[0].token_ids == wanted[1].token_ids


def test_a_tree_is_cancelled_with_its_branches(restless: Ascii) -> None:
    engine = Engine(restless.folder)
    stream = engine.stream(
        restless.prompts(11)[0],
        SamplingParams(max_tokens=900),
        Budget(min_thinking_tokens=500),
        budgets=[500, 600, 700],
    )
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    eventually_idle(engine)


def test_one_request_that_fails_does_not_end_the_others(
    writer: Ascii, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(writer.folder)
    prompts = prompts_of(writer.chat, 9, 12)
    bad = engine.submit(Request(prompt=prompts[0], params=sampled(seed=77)))
    draw = Loop._draw

    def fails(self: Loop, row: Any, *rest: Any) -> int:
        if row.params.seed == 77:
            raise RuntimeError("no such token")
        return draw(self, row, *rest)

    monkeypatch.setattr(Loop, "_draw", fails)
    good = engine.submit(Request(prompt=prompts[1], params=sampled()))
    worse = engine.submit(Request(prompt=prompts[0], params=sampled(seed=77, n=3)))
    assert len(good.result()[0].token_ids) == 60
    with pytest.raises(RuntimeError, match="no such token"):
        worse.result()
    monkeypatch.setattr(engine.model, "logits", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.generate(prompts)
    monkeypatch.undo()
    assert len(engine.generate(prompts, sampled())) == 2
    with pytest.raises((RuntimeError, AssertionError)):
        bad.result()
        raise AssertionError("it was done before the fault")
    eventually_idle(engine)


def test_an_idle_engine_has_no_thread_and_can_be_forgotten(writer: Ascii) -> None:
    engine = Engine(writer.folder)
    engine.generate(prompts_of(writer.chat, 9), SamplingParams(max_tokens=3))
    eventually_idle(engine)
    assert not [t for t in threading.enumerate() if t.name == "s1fast"]
    weights = engine.model.embed
    del engine
    gc.collect()
    assert len(gc.get_referrers(weights)) <= 2


@pytest.mark.parametrize("loop", ["host", "device"])
def test_an_engine_that_is_lost_leaves_nobody_waiting(
    writer: Ascii, monkeypatch: pytest.MonkeyPatch, loop: Any
) -> None:
    """A device that fails for good fails when the loop is cleared as well."""
    engine = Engine(writer.folder, loop=loop)
    handles = [
        engine.submit(Request(prompt=p, params=SamplingParams(max_tokens=900)))
        for p in prompts_of(writer.chat, 9, 12)
    ]
    next(iter(handles[0]))
    for name in ("step", "clear"):
        monkeypatch.setattr(engine._loop, name, lambda: 1 / 0)
    for handle in handles:
        with pytest.raises(ZeroDivisionError):
            handle.result()
    with pytest.raises(RuntimeError, match="has stopped, make another: division by zero"):
        engine.generate(["Hi"])
    assert engine._thread is None and not engine._handles


def test_a_request_that_cannot_begin_ends_with_all_its_samples(
    writer: Ascii, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Row.begin

    def fails(self: Row) -> list[Piece]:
        if self.sample == 1:
            raise RuntimeError("no such text")
        return begin(self)

    monkeypatch.setattr(Row, "begin", fails)
    engine = Engine(writer.folder)
    (prompt,) = prompts_of(writer.chat, 9)
    with pytest.raises(RuntimeError, match="no such text"):
        engine.generate([prompt], SamplingParams(max_tokens=900, n=3))
    eventually_idle(engine)
    assert engine.stats.steps == 0


END = """
import sys, threading
from s1fast import Engine, SamplingParams
from s1fast.request import Request

engine = Engine(sys.argv[1])
request = Request(prompt=[3, 4, 5], params=SamplingParams(max_tokens=1000, n=64))
handles = [engine.submit(request) for _ in range(2)]

def wait():
    try:
        handles[1].result()
    except BaseException as error:
        print(type(error).__name__)

threading.Thread(target=wait).start()
next(iter(handles[0]))
"""


def test_a_program_ends_with_its_main_thread(writer: Ascii) -> None:
    """Whoever waits for a request is told; none keeps the process."""
    command = [sys.executable, "-c", END, str(writer.folder)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout.split()) == (0, ["Cancelled"]), ended.stderr


# -- a soak ---------------------------------------------------------------------------------


def test_soak(restless: Ascii) -> None:
    soak(restless, 300, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_soak_at_length(restless: Ascii, seed: int) -> None:
    soak(restless, 2000, seed)


# -- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_batch": 0}, "max_batch must be at least 1, got 0"),
        ({"max_batch": 2.5}, "max_batch must be at least 1"),
        ({"step_tokens": 8}, "step_tokens must be at least 64, got 8"),
        ({"speculate": -1}, "speculate must be at least 0"),
        ({"cache_tokens": 3}, "cache_tokens must be at least 16"),
        ({"device": "gpu"}, "device must be one of auto, cpu, cuda, got 'gpu'"),
        ({"dtype": "float16"}, "dtype must be one of auto, float32, bfloat16"),
        ({"markers": "s2"}, "markers 's2': there are auto, s1, s1.1, think"),
    ],
)
def test_an_engine_names_the_field_that_cannot_hold(
    writer: Ascii, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(InputError, match=named):
        Engine(writer.folder, **fields)


def test_what_can_never_fit_the_cache_is_refused(writer: Ascii) -> None:
    engine = Engine(writer.folder, cache_tokens=64)
    prompts = prompts_of(writer.chat, 9)
    with pytest.raises(InputError, match=r"max_tokens None: .* the cache has 64; .* cache_tokens"):
        engine.generate(prompts)
    with pytest.raises(InputError, match="max_tokens 60"):
        engine.generate(prompts, SamplingParams(max_tokens=60))
    assert len(engine.generate(prompts, SamplingParams(max_tokens=54))[0].token_ids) == 54


@pytest.mark.parametrize("loop", ["host", "device"])
def test_without_preemption_what_may_not_fit_is_refused(writer: Ascii, loop: Any) -> None:
    """Before it is begun, and until others are done; what is taken runs to its end undisturbed."""
    engine = Engine(writer.folder, cache_tokens=160, preempt=False, loop=loop)
    params = SamplingParams(max_tokens=54)
    prompts = prompts_of(writer.chat, 9, 9, 9)
    with pytest.raises(InputError, match=r"preempt: without it 12 pages .* beside 0 .* has 10"):
        engine.generate(prompts, params)
    first = engine.submit(Request(prompt=prompts[0], params=params))
    second = engine.submit(Request(prompt=prompts[1], params=params))
    with pytest.raises(InputError, match=r"4 pages .* beside 8 for others, and the cache has 10"):
        engine.submit(Request(prompt=prompts[2], params=params))
    for handle in (first, second):
        assert len(handle.result()[0].token_ids) == 54
    assert len(engine.generate(prompts[2:], params)[0].token_ids) == 54
    assert engine.stats.preemptions == 0


@pytest.mark.parametrize("logprobs", [-1, 101, 2.0, True])
def test_logprobs_that_cannot_hold_are_named(logprobs: Any) -> None:
    with pytest.raises(InputError, match="logprobs must be"):
        SamplingParams(logprobs=logprobs)


def test_an_empty_question_is_refused(writer: Ascii) -> None:
    with pytest.raises(InputError, match="prompt: empty"):
        writer.engine.generate([""])
    with pytest.raises(InputError, match="prompt: empty"):
        writer.engine.submit(Request(prompt=[]))


def test_a_program_above_its_size_is_refused(writer: Ascii) -> None:
    budget = Budget(max_thinking_tokens=9, num_ignore=1, ignore_text="Wait! " * 600)
    with pytest.raises(InputError, match=r"ignore_text, final_text .* at most 1024"):
        writer.engine.generate(["Hi"], SamplingParams(), budget)


def test_chat_is_shared_by_engines(writer: Ascii) -> None:
    """Choosing markers for one engine leaves another's alone."""
    other = Engine(writer.folder, markers="think")
    assert other.chat.markers.start == "<think>"
    assert isinstance(writer.chat, Chat) and writer.engine.chat.markers.start != "<think>"
    assert torch.equal(other.model.embed.weight, writer.engine.model.embed.weight)
