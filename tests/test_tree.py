"""The budget tree: every cell equals a run of its own, from fewer steps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from s1fast.budget import Budget
from s1fast.decoder import Completion, Engine, Piece, SamplingParams
from s1fast.errors import InputError
from s1fast.kv_cache import PAGE_SIZE
from s1fast.request import Request, cost, joined
from writers import Ascii, check_equal

MakeModel = Callable[..., Path]


@pytest.fixture(scope="module")
def restless(make_model: MakeModel) -> Ascii:
    return Ascii(make_model("qwen2", seed=3), end=1.8)


def grid(
    writer: Ascii,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    budgets: list[Any],
    num_ignores: list[int | None],
    base: Budget | None = None,
) -> list[Completion]:
    """A tree, every cell held against a run of its own on an engine that remembers nothing."""
    base = base or Budget()
    done = writer.engine.generate(prompts, params, base, budgets=budgets, num_ignores=num_ignores)
    cells = [
        replace(base, max_thinking_tokens=b, num_ignore=n) for b in budgets for n in num_ignores
    ]
    assert len(done) == len(prompts) * params.n * len(cells)
    fresh = Engine(writer.folder, reuse_prompts=False)
    alone = [fresh.generate(prompts, params, cell) for cell in cells]
    at, equal = 0, 0
    for i in range(len(prompts)):
        for j in range(params.n):
            for cell, separate in zip(cells, alone, strict=True):
                one, other = done[at], separate[i * params.n + j]
                assert (one.index, one.sample, one.budget) == (i, j, cell)
                assert other.budget == cell
                equal += check_equal(writer, one, other, params)
                assert one.steps == other.steps or one.token_ids != other.token_ids
                at += 1
    assert equal >= 0.95 * len(done), "too many ties to prove anything"
    assert writer.engine.pages.held == 0
    total = cost(done)
    assert total.separate_steps == sum(c.steps for s in alone for c in s) or equal < len(done)
    assert total.steps <= total.separate_steps and total.tokens <= total.separate_tokens
    return done


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_tree_equals_separate_runs(restless: Ascii, temperature: float) -> None:
    prompts = restless.prompts(3, 11)
    params = SamplingParams(temperature=temperature, n=2, seed=5, max_tokens=60)
    done = grid(restless, prompts, params, [0, 1, 7, 16, 40], [None, 0, 1, 3])
    assert {c.thinking_end for c in done} == {"natural", "length"}
    assert {c.waits_used for c in done} >= {0, 1, 3} or temperature
    total = cost(done)
    assert total.steps < 0.7 * total.separate_steps


def test_budgets_beyond_a_natural_stop_are_one_branch(restless: Ascii) -> None:
    (prompt,) = restless.prompts(11)
    params = SamplingParams(max_tokens=80)
    (free,) = restless.engine.generate([prompt], params, Budget(max_thinking_tokens=60))
    assert free.thinking_end == "natural"
    before = restless.engine.stats.drawn
    budgets = [free.thinking_tokens + more for more in range(1, 40)]
    done = restless.engine.generate([prompt], params, Budget(), budgets=budgets)
    assert restless.engine.stats.drawn - before == free.steps
    assert all(c.token_ids == free.token_ids for c in done)
    assert cost(done).steps == free.steps and cost(done).separate_steps == 39 * free.steps


def test_every_budget_around_a_stop_and_inside_an_appended_text(restless: Ascii) -> None:
    """A stop exactly at b, one before and after it; every length of a text of many tokens."""
    base = Budget(ignore_text=["Wait, the sum of the two numbers", "is\n"])
    prompts = restless.prompts(11)
    params = SamplingParams(max_tokens=80)
    (free,) = restless.engine.generate(
        prompts, params, replace(base, num_ignore=2, max_thinking_tokens=60)
    )
    assert free.waits_used >= 1
    done = grid(restless, prompts, params, list(range(46)), [0, 2], base)
    assert {(c.thinking_end, c.waits_used) for c in done} >= {
        ("length", 0),
        ("length", 1),
        ("natural", 0),
    }


def test_budgets_at_the_edges_of_pages(restless: Ascii) -> None:
    """Absolute positions: the prompt counts too."""
    prompts = restless.prompts(13, 14)
    edges = [b for b in range(48) if (len(prompts[0]) + b) % PAGE_SIZE in (0, 1, PAGE_SIZE - 1)]
    assert len(edges) >= 8
    grid(restless, prompts, SamplingParams(max_tokens=70), edges, [4])


def test_a_stop_at_the_first_token_separates_none_from_zero(restless: Ascii) -> None:
    """There the mask of counted ignores changes the draw, so None has a trace of its own."""
    prompts = restless.prompts(*range(2, 90))
    first = restless.engine.generate(prompts, SamplingParams(max_tokens=10), Budget())
    stops = [p for p, c in zip(prompts, first, strict=True) if c.thinking_tokens == 0]
    assert len(stops) >= 2
    chosen = [*stops[:2], prompts[0]]
    for ignores in ([None, 0], [2, None], [None]):
        done = grid(restless, chosen, SamplingParams(max_tokens=40), [0, 5, 20], ignores)
        empty = [c for c in done if c.budget and c.budget.num_ignore is None and c.index == 0]
        assert all(c.thinking_tokens == 0 for c in empty)
    # Where a minimum masks it anyway, nothing differs and nothing runs twice.
    before = restless.engine.stats.drawn
    base = Budget(min_thinking_tokens=1)
    done = grid(restless, chosen[:1], SamplingParams(max_tokens=40), [20], [None, 0], base)
    assert restless.engine.stats.drawn - before == done[0].steps


def test_harness_rounds_are_a_tree_too(restless: Ascii) -> None:
    base = Budget(max_thinking_tokens=9, accounting="harness", ignore_text=["Wait", "is\n"])
    prompts = restless.prompts(3, 30, 11)
    done = grid(restless, prompts, SamplingParams(max_tokens=45), [4, 9, 25], [0, 2, 4], base)
    assert {c.thinking_end for c in done} == {"natural", "length"}


def test_no_maximum_and_auto_are_cells(restless: Ascii) -> None:
    prompts = restless.prompts(3, 11)
    params = SamplingParams(max_tokens=150)
    done = grid(
        restless, prompts, params, ["auto", None, 40], [0, 1], Budget(min_thinking_tokens=38)
    )
    assert {c.thinking_end for c in done} == {"natural", "length"}


def test_a_minimum_holds_in_every_cell(restless: Ascii) -> None:
    base = Budget(min_thinking_tokens=9)
    done = grid(
        restless,
        restless.prompts(3, 11),
        SamplingParams(max_tokens=60),
        [9, 10, 40],
        [None, 1],
        base,
    )
    assert min(c.thinking_tokens for c in done) >= 9


def test_trees_are_many_samples_under_pressure(restless: Ascii) -> None:
    """A cache so small that trunks and branches take pages from each other all the time."""
    prompts = restless.prompts(3, 30, 11, 19)
    params = SamplingParams(temperature=0.5, n=3, max_tokens=60)
    axes: dict[str, Any] = {"budgets": [5, 17, 40], "num_ignores": [0, 2]}
    wide = restless.engine.generate(prompts, params, Budget(), **axes)
    tight = Engine(restless.folder, cache_tokens=144, max_batch=9)
    done = tight.generate(prompts, params, Budget(), **axes)
    equal = [check_equal(restless, a, b, params) for a, b in zip(wide, done, strict=True)]
    assert sum(equal) >= 0.95 * len(equal)
    assert tight.stats.preemptions > 0 and tight.pages.held == 0


def test_a_stream_shows_the_trunk_and_then_every_cell(restless: Ascii) -> None:
    (prompt,) = restless.prompts(11)
    params = SamplingParams(max_tokens=60)
    axes: dict[str, Any] = {"budgets": [5, 40], "num_ignores": [0, 2]}
    items = list(restless.engine.stream(prompt, params, Budget(), **axes))
    done = [item for item in items if isinstance(item, Completion)]
    assert items[-4:] == done == restless.engine.generate([prompt], params, Budget(), **axes)
    assert items[:-4] == done[-1].pieces


@pytest.mark.parametrize("loop", ["host", "device"])
@pytest.mark.parametrize("ignores", [[0, 2], [None, 0, 1, 3]])
def test_every_cell_is_told_as_it_is_drawn(
    restless: Ascii, ignores: list[int | None], loop: Any
) -> None:
    """Its pieces are those of its completion, in as few as join them, and come before it."""
    engine = Engine(restless.folder, loop=loop, max_batch=32, speculate=2)
    params = SamplingParams(max_tokens=60, temperature=0.4, n=2)
    axes: dict[str, Any] = {"budgets": [0, 5, 17, 38, 39], "num_ignores": ignores}
    request = Request(prompt=restless.prompts(11)[0], params=params, budget=Budget(), **axes)

    async def told() -> list[tuple[int, Piece | Completion]]:
        return [item async for item in engine.submit(request).live()]

    items = asyncio.run(told())
    ends = [at for at, (_, item) in enumerate(items) if isinstance(item, Completion)]
    assert len(ends) == 2 * 5 * len(ignores)
    for at in ends:
        place, done = items[at]
        before = [item for number, item in items if number == place and isinstance(item, Piece)]
        assert [number for number, _ in items[at + 1 :]].count(place) == 0
        assert isinstance(done, Completion) and joined(before) == joined(done.pieces)
    assert ends[0] < len(items) - 2 * len(ends), "all were told at the end"


def test_logprobs_follow_their_branches(restless: Ascii) -> None:
    (prompt,) = restless.prompts(11)
    params = SamplingParams(max_tokens=60, logprobs=2)
    done = restless.engine.generate(
        [prompt], params, Budget(), budgets=[3, 7, 40], num_ignores=[0, 2]
    )
    for c in done:
        (alone,) = restless.engine.generate([prompt], params, c.budget)
        assert c.logprobs is not None and alone.logprobs is not None
        assert len(c.logprobs) == len(c.token_ids) == len(alone.logprobs)
        for mine, theirs in zip(c.logprobs, alone.logprobs, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None and theirs is not None:
                assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-3)


@pytest.mark.parametrize(
    ("axes", "named"),
    [
        ({"budgets": []}, "budgets must be a list"),
        ({"budgets": 500}, "budgets must be a list"),
        ({"budgets": [5, -1]}, "max_thinking_tokens"),
        ({"budgets": [5, 1 << 30]}, "max_thinking_tokens"),
        ({"num_ignores": []}, "num_ignores must be a list"),
        ({"num_ignores": [0, "2"]}, "num_ignore"),
        ({"budgets": [2], "base": {"min_thinking_tokens": 3}}, "min_thinking_tokens"),
    ],
)
def test_a_grid_that_cannot_be_honoured_is_named(
    restless: Ascii, axes: dict[str, Any], named: str
) -> None:
    base = Budget(**axes.pop("base", {}))
    with pytest.raises(InputError, match=named):
        restless.engine.generate(restless.prompts(3), SamplingParams(max_tokens=60), base, **axes)
