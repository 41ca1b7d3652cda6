"""The loop that runs ahead of its device: the host loop's output, and nothing reused early."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_checks import BUDGETS, check_same, eventually_idle, soak
from no_waiting import READERS, SEARCHERS, NoWaiting, WaitError
from s1fast import captured
from s1fast.budget import Budget
from s1fast.captured import DEPTH, Captured
from s1fast.decoder import Engine, SamplingParams
from s1fast.errors import InputError
from s1fast.handle import Cancelled
from s1fast.kv_cache import PAGE_SIZE
from s1fast.request import Completion, Request, cost
from s1fast.row import Row
from writers import BF16_TIE, Ascii, check_equal, prompts_of, sampled

MakeModel = Callable[..., Path]


@pytest.fixture(scope="module")
def restless(make_model: MakeModel) -> Ascii:
    return Ascii(make_model("qwen2", seed=3), end=1.8)


@pytest.fixture(scope="module")
def writer(make_model: MakeModel) -> Ascii:
    return Ascii(make_model("qwen2", seed=4), end=0.0)


ON: dict[str, Any] = {"device": "cpu"}
"""Where the device's loop runs; test_gpu_decode.py has these tests on a GPU."""


def ahead(writer: Ascii, **fields: Any) -> Engine:
    return Engine(writer.folder, loop="device", **ON, **fields)


def looped(engine: Engine) -> Captured:
    assert isinstance(engine._loop, Captured)
    return engine._loop


# -- the same output --------------------------------------------------------------------------


def test_every_kind_of_request(restless: Ascii) -> None:
    """Greedy, sampled, filtered, stopped; without a budget, ignoring, cut, in rounds, at least."""
    check_same(restless, ahead(restless))


def test_speculation(make_model: MakeModel) -> None:
    babbler = Ascii(make_model("qwen2", seed=6), end=0.7, pairs=2)
    engine = ahead(babbler, speculate=4)
    check_same(babbler, engine)
    assert engine.stats.accepted > 40
    (prompt,) = prompts_of(babbler.chat, 9)
    params = SamplingParams(max_tokens=300)
    plain, drafting = ahead(babbler), ahead(babbler, speculate=7)
    plain.chat.stop_ids = drafting.chat.stop_ids = frozenset()
    (a,), (b,) = (e.generate([prompt], params) for e in (plain, drafting))
    assert check_equal(babbler, a, b, params)
    assert 300 <= plain.stats.steps <= 300 + DEPTH
    assert drafting.stats.steps < 250 and drafting.stats.accepted > 50


def test_preemption(restless: Ascii) -> None:
    """Rows that grow to fourteen pages each, where there are twenty: fewer steps are launched
    ahead, then the youngest give way and compute their tokens anew."""
    engine = ahead(restless, cache_tokens=320, reuse_prompts=False)
    prompts = restless.prompts(3, 20, 9, 30, 5)
    params = SamplingParams(max_tokens=180, temperature=0.6)
    budget = Budget(min_thinking_tokens=150, num_ignore=2)
    wanted = restless.engine.generate(prompts, params, budget)
    done = engine.generate(prompts, params, budget)
    equal = [check_equal(restless, a, b, params) for a, b in zip(wanted, done, strict=True)]
    assert sum(equal) >= 4 and engine.stats.preemptions > 3
    eventually_idle(engine)


def test_chunks_of_prompts(restless: Ascii) -> None:
    check_same(restless, ahead(restless, step_tokens=12, max_batch=5))


def test_shared_beginnings(restless: Ascii) -> None:
    """The first of six rows computes the prompt, in the same chunk as the others' last pages."""
    engine = ahead(restless)
    (long,) = prompts_of(restless.chat, 40)
    start = restless.chat.encode("<|im_start|>think")
    prompts = [long + start, long[:35] + start]
    params, budget = SamplingParams(max_tokens=40, temperature=0.5, n=3), BUDGETS[1]
    wanted = restless.engine.generate(prompts, params, budget)
    done = engine.generate(prompts, params, budget)
    assert [c.cached_tokens for c in done] == [0] + [2 * PAGE_SIZE] * 5
    for a, b in zip(wanted, done, strict=True):
        check_equal(restless, a, b, params)
    (more,) = engine.generate(
        [[*done[0].prompt_ids, *done[0].token_ids, 5, 6, 7]], SamplingParams(max_tokens=4)
    )
    assert more.cached_tokens > 3 * PAGE_SIZE


TREES: list[tuple[list[Any], list[int | None], Budget]] = [
    ([0, 1, 7, 16, 40], [None, 0, 1, 3], Budget()),
    ([None, 40], [0, 1], Budget(min_thinking_tokens=38)),
    (
        [4, 9, 25],
        [0, 2, 4],
        Budget(max_thinking_tokens=9, accounting="harness", ignore_text=["Wait", "is\n"]),
    ),
]


@pytest.mark.parametrize("number", range(len(TREES)))
def test_trees(restless: Ascii, number: int) -> None:
    """Branches leave while the trunk's device is ahead; masks are compared by the host's step."""
    budgets, num_ignores, base = TREES[number]
    prompts = restless.prompts(3, 11)
    params = SamplingParams(max_tokens=90, n=2, temperature=0.7 * (number == 0), seed=5)
    axes: dict[str, Any] = {"budgets": budgets, "num_ignores": num_ignores}
    wanted = restless.engine.generate(prompts, params, base, **axes)
    engine = ahead(restless)
    done = engine.generate(prompts, params, base, **axes)
    equal = [check_equal(restless, a, b, params) for a, b in zip(wanted, done, strict=True)]
    assert sum(equal) >= 0.95 * len(equal)
    if all(equal):
        assert cost(done) == cost(wanted)
    tight = ahead(restless, cache_tokens=192, max_batch=9)
    for a, b in zip(wanted, tight.generate(prompts, params, base, **axes), strict=True):
        check_equal(restless, a, b, params)
    for e in (engine, tight):
        eventually_idle(e)


def test_delimiters_of_several_ids(make_model: MakeModel) -> None:
    """<think> and </think> are texts to this tokenizer: matched token by token, and taken back."""
    restless = Ascii(make_model("qwen2", seed=3), end=0.0)
    host = Engine(restless.folder, markers="think", device="cpu")
    device = ahead(restless, markers="think")
    close = host.chat.encode("</think>")
    assert len(close) > 1
    prompts = [p + host.chat.encode("<think>\n") for p in prompts_of(host.chat, 3, 20, 9)]
    ended = 0
    for seed in range(4):
        params = SamplingParams(max_tokens=60, temperature=1.5, top_k=3, seed=seed)
        for budget in (Budget(max_thinking_tokens=20, num_ignore=1), Budget()):
            wanted = host.generate(prompts, params, budget)
            for a, b in zip(wanted, device.generate(prompts, params, budget), strict=True):
                check_equal(restless, a, b, params)
                ended += a.thinking_end is not None
    assert ended


def test_logprobs_and_their_neighbours(restless: Ascii) -> None:
    """A row that asks for them, beside rows that do not and go on before and after it."""
    engine = ahead(restless)
    prompts = restless.prompts(5, 11)
    plain = SamplingParams(max_tokens=150, temperature=0.6, stop_token_ids=[])
    telling = SamplingParams(max_tokens=40, logprobs=2)
    budget = Budget(min_thinking_tokens=100)
    (a,) = restless.engine.generate(prompts[:1], plain, budget)
    (b,) = restless.engine.generate(prompts[1:], telling, BUDGETS[1])
    items = iter(engine.submit(Request(prompt=prompts[0], params=plain, budget=budget)))
    next(items)
    (found,) = engine.generate(prompts[1:], telling, BUDGETS[1])
    assert check_equal(restless, b, found, telling)
    assert found.logprobs is not None and b.logprobs is not None
    for mine, theirs in zip(found.logprobs, b.logprobs, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-3)
    (other,) = [item for item in items if isinstance(item, Completion)]
    assert check_equal(restless, a, other, plain)


def test_bf16(make_model: MakeModel) -> None:
    """Roundings decide often here, between a token and an end of thinking too."""
    fields = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    model = Ascii(make_model("qwen2", seed=7, std=0.1, **fields), end=1.8)
    prompts, budget = model.prompts(*range(3, 80, 7)), Budget(max_thinking_tokens=30, num_ignore=2)
    engines = [
        Engine(model.folder, device="cpu", dtype="bfloat16", **more)
        for more in ({}, {"loop": "device", "speculate": 2})
    ]
    for params in (SamplingParams(max_tokens=45), SamplingParams(max_tokens=45, temperature=0.7)):
        done = [engine.generate(prompts, params, budget) for engine in engines]
        equal = [check_equal(model, a, b, params, tie=BF16_TIE) for a, b in zip(*done, strict=True)]
        assert any(equal) and not all(equal)


# -- many callers ------------------------------------------------------------------------------


def test_rows_come_while_others_run(writer: Ascii) -> None:
    """Their prompts are computed in chunks, and the row that runs draws a token every step."""
    engine = ahead(writer, step_tokens=64)
    short, long = prompts_of(writer.chat, 3, 600)
    params = SamplingParams(max_tokens=200)
    wanted = writer.engine.generate([short, long], params)
    first = engine.submit(Request(prompt=short, params=params))
    items = iter(first)
    next(items)
    (second,) = engine.submit(Request(prompt=long, params=params)).result()
    (finished,) = [i for i in items if isinstance(i, Completion)]
    assert check_equal(writer, wanted[0], finished, params)
    assert check_equal(writer, wanted[1], second, params)
    chunks = -(-600 // 64)
    assert engine.stats.steps <= 400 + chunks + 2 * DEPTH


def test_more_rows_than_places(restless: Ascii) -> None:
    """Buckets grow and shrink as rows of all lengths come and go."""
    engine = ahead(restless, max_batch=10)
    prompts = restless.prompts(*range(3, 33))
    params = SamplingParams(max_tokens=40, temperature=0.6)
    wanted = restless.engine.generate(prompts, params, BUDGETS[1])
    done = engine.generate(prompts, params, BUDGETS[1])
    equal = [check_equal(restless, a, b, params) for a, b in zip(wanted, done, strict=True)]
    assert sum(equal) >= 0.95 * len(equal)


def test_cancellation(writer: Ascii) -> None:
    engine = ahead(writer, max_batch=2)
    prompts = prompts_of(writer.chat, 30, 9, 12, 7)
    params = SamplingParams(max_tokens=100)
    wanted = writer.engine.generate(prompts, params)
    handles = [engine.submit(Request(prompt=p, params=params)) for p in prompts]
    next(iter(handles[0]))
    engine.cancel(handles[0])
    engine.cancel(handles[3])
    for i in (0, 3):
        with pytest.raises(Cancelled, match="was cancelled"):
            handles[i].result()
    for i in (1, 2):
        assert check_equal(writer, handles[i].result()[0], wanted[i], params)
    eventually_idle(engine)
    assert not looped(engine)._armed and not looped(engine)._resident
    assert not looped(engine)._flying and not looped(engine)._leaving


def test_a_request_that_fails(writer: Ascii, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends alone; a device that fails ends all that run, and the next are served."""
    engine = ahead(writer)
    prompts = prompts_of(writer.chat, 9, 12)
    take = Row.take

    def fails(self: Row, *rest: Any) -> Any:
        if self.params.seed == 77 and self.steps == 5:
            raise RuntimeError("no such token")
        return take(self, *rest)

    monkeypatch.setattr(Row, "take", fails)
    good = engine.submit(Request(prompt=prompts[1], params=sampled()))
    worse = engine.submit(Request(prompt=prompts[0], params=sampled(seed=77, n=3)))
    assert len(good.result()[0].token_ids) == 60
    with pytest.raises(RuntimeError, match="no such token"):
        worse.result()
    graphs, calls = looped(engine).device.graphs, []
    run = graphs.run

    def breaks(bucket: int) -> None:
        calls.append(bucket)
        run(bucket if len(calls) < 6 else 1 // 0)

    monkeypatch.setattr(graphs, "run", breaks)
    with pytest.raises(ZeroDivisionError):
        engine.generate(prompts)
    monkeypatch.undo()
    params = sampled()
    wanted = writer.engine.generate(prompts, params)
    for a, b in zip(wanted, engine.generate(prompts, params), strict=True):
        assert check_equal(writer, a, b, params)
    eventually_idle(engine)


def test_warm_up(writer: Ascii) -> None:
    """The steps that it launches are counted here as there; it is refused while rows run."""
    engine = ahead(writer, max_batch=3)
    engine.warm_up()
    assert list(looped(engine).device.graphs._graphs) == [1, 2, 4]
    prompts, params = prompts_of(writer.chat, 9, 30, 12), sampled()
    wanted = writer.engine.generate(prompts, params)
    for a, b in zip(wanted, engine.generate(prompts, params), strict=True):
        assert check_equal(writer, a, b, params)
    handle = engine.submit(Request(prompt=prompts[0], params=sampled(max_tokens=900)))
    next(iter(handle))
    with pytest.raises(InputError, match="warm_up: requests are running"):
        engine.warm_up()
    handle.cancel()


def test_soak(restless: Ascii) -> None:
    soak(restless, 150, seed=1, loop="device", **ON)


def test_extremes_of_sampling(writer: Ascii) -> None:
    """What a line on the device could not hold ends nobody's request."""
    (prompt,) = prompts_of(writer.chat, 9)
    for fields in ({"top_k": 1 << 40}, {"temperature": 1e6, "seed": (1 << 64) - 1}):
        params = sampled(max_tokens=9, **fields)
        (a,) = writer.engine.generate([prompt], params)
        (b,) = ahead(writer).generate([prompt], params)
        assert check_equal(writer, a, b, params)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_soak_at_length(restless: Ascii, seed: int) -> None:
    soak(restless, 1500, seed, loop="device", **ON)


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_batch": 65}, 'max_batch 65: .* at most 64 rows .* loop = "host"'),
        ({"matmul": "cuda"}, 'matmul = "cuda" runs on a CUDA device'),
        ({"matmul": "cuda", "loop": "host"}, 'take matmul = "torch"'),
        ({"loop": "gpu"}, "loop must be one of auto, host, device, got 'gpu'"),
        ({"matmul": "cublas"}, "matmul must be one of cuda, torch"),
    ],
)
def test_what_cannot_be_is_named(writer: Ascii, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        Engine(writer.folder, **{"loop": "device", **fields})


# -- nothing early -----------------------------------------------------------------------------


class Late:
    """An event that has come when it was asked for a third time."""

    def __init__(self, *_: Any) -> None:
        self.asked = 0
        self.lines: set[int] = set()
        self.pages: set[int] = set()
        self.written: set[int] = set()

    def query(self) -> bool:
        self.asked += 1
        return self.asked >= 3


class Watch:
    """Knows, of every launch whose event has not come, the lines and pages that its slots name, and
    the lines that were written before it."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.late: list[Late] = []
        self.checked = 0
        device, pages = looped(engine).device, engine.pages
        run, load, take = device.graphs.run, device.load, pages.take
        written: set[int] = set()
        named: list[tuple[set[int], set[int]]] = []

        def launches(bucket: int) -> None:
            slots = device._slots[bucket]
            lines = set(slots.line_C.tolist()) - {-1}
            table = device.rows.table_RP[sorted(lines)]
            named.append((lines, set(table.flatten().tolist()) - {0}))
            run(bucket)

        def event(*_: Any) -> Late:
            late = Late()
            if named:
                late.lines, late.pages = named.pop()
            late.written |= written
            written.clear()
            self.late.append(late)
            return late

        def takes() -> int:
            page = take()
            self.check(page, {p for late in self.open() for p in late.pages}, "page")
            return page

        def loads(row: Row) -> None:
            self.check(row.line, {x for late in self.open() for x in late.lines}, "line")
            unread = {x for late in self.open() for x in late.written}
            self.check(row.line, unread | written, "memory of line")
            written.add(row.line)
            load(row)

        monkeypatch.setattr(captured, "record", event)
        monkeypatch.setattr(device.graphs, "run", launches)
        monkeypatch.setattr(device, "load", loads)
        monkeypatch.setattr(pages, "take", takes)

    def open(self) -> list[Late]:
        self.late = [late for late in self.late if late.asked < 3]
        assert len(self.late) <= DEPTH
        return self.late

    def check(self, found: int, seen: set[int], what: str) -> None:
        self.checked += bool(seen)
        assert found not in seen, f"{what} {found} is reused too early"


def crowd(engine: Engine, writer: Ascii) -> list[Completion]:
    """Rows that end by themselves, by texts and by cancellation, in a cache that is too small."""
    prompts = writer.prompts(3, 20, 9, 30, 5, 12)
    params = sampled(max_tokens=90, stop=["e", "t"], temperature=1.0)
    dropped = [engine.submit(Request(prompt=p, params=params)) for p in prompts[:3]]
    next(iter(dropped[0]))
    for handle in dropped:
        handle.cancel()
    done = engine.generate(prompts, params, Budget(max_thinking_tokens=40, num_ignore=1))
    return done + engine.generate(prompts, sampled(max_tokens=90))


def test_nothing_is_reused_before_its_last_launch_is_done(
    writer: Ascii, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ahead(writer, cache_tokens=400, max_batch=4, reuse_prompts=False)
    watch = Watch(engine, monkeypatch)
    found = crowd(engine, writer)
    assert watch.checked > 50 and engine.stats.preemptions
    eventually_idle(engine)
    monkeypatch.undo()
    wanted = crowd(Engine(writer.folder), writer)
    for a, b in zip(wanted, found, strict=True):
        check_equal(writer, a, b, sampled())


def test_what_is_reused_early_is_noticed(writer: Ascii, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ahead(writer, cache_tokens=400, max_batch=4, reuse_prompts=False)
    Watch(engine, monkeypatch)
    loop = looped(engine)

    def at_once(pages: list[int], line: int) -> None:
        loop._resident.pop(line, None)
        loop._retire(pages, line)

    loop.scheduler.retire = at_once
    with pytest.raises(AssertionError, match="is reused too early"):
        for _ in range(5):
            crowd(engine, writer)


def test_a_row_that_goes_before_its_first_launch(
    writer: Ascii, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one on its line waits until what was written of it has been read."""
    engine = ahead(writer, max_batch=1)
    Watch(engine, monkeypatch)
    loop, failed = looped(engine), []
    fill = loop._fill

    def fails() -> None:
        fill()
        if not failed:
            failed.append(loop._resident[0].job)
            loop.remove(failed[0])
            loop.fail(failed[0], RuntimeError("gone"))

    monkeypatch.setattr(loop, "_fill", fails)
    requests = [Request(prompt=p, params=sampled()) for p in prompts_of(writer.chat, 30, 9)]
    first, second = engine._submit_all(requests)
    with pytest.raises(RuntimeError, match="gone"):
        first.result()
    assert len(second.result()[0].token_ids) == 60


def test_the_host_reads_no_tensor(writer: Ascii, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an iteration all but what stands for the device: chunks, layouts, steps."""
    engine = ahead(writer, cache_tokens=256, max_batch=4, speculate=3)
    inside: list[str] = []
    for owner, name in (
        (looped(engine).device, "prefill"),
        (looped(engine).device, "lay_out"),
        (looped(engine).device.graphs, "run"),
    ):
        monkeypatch.setattr(owner, name, _within(inside, getattr(owner, name)))
    prompts = writer.prompts(3, 20, 9, 30, 5, 12)
    request = [
        Request(prompt=p, params=sampled(max_tokens=60, stop=["e"], n=2), budget=BUDGETS[1])
        for p in prompts
    ]
    engine._thread = threading.current_thread()  # no other: the modes are this thread's
    handles = engine._submit_all(request)
    engine.cancel(handles[1])
    with monkeypatch.context() as patch, NoWaiting(lambda: not inside):
        for name in (*READERS, *SEARCHERS):
            patch.setattr(torch.Tensor, name, _forbidden(inside, getattr(torch.Tensor, name), name))
        engine._run()
    assert all(len(h.result()) == 2 for i, h in enumerate(handles) if i != 1)
    assert engine.stats.preemptions and engine.stats.drawn > 300


def _within(inside: list[str], function: Callable[..., Any]) -> Callable[..., Any]:
    def called(*arguments: Any) -> Any:
        inside.append("")
        try:
            return function(*arguments)
        finally:
            inside.pop()

    return called


def _forbidden(inside: list[str], method: Callable[..., Any], name: str) -> Callable[..., Any]:
    def read(x: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if not inside:
            raise WaitError(name)
        return method(x, *arguments, **options)

    return read
