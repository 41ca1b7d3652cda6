"""Requests at the edges of all that may be asked, on every loop, in a cache that is too small: each
gives what it gives alone, each cell of a tree what it gives by itself, and nothing is left."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine_checks import eventually_idle
from s1fast.budget import Budget
from s1fast.chat import Chat
from s1fast.decoder import Engine, SamplingParams
from s1fast.errors import InputError
from writers import Ascii, check_equal

Draw = Callable[..., Any]


def odd_prompt(chat: Chat, rng: random.Random) -> list[int]:
    """Of any length up to the context's, its thinking open, begun, half closed or closed."""
    start = chat.encode(chat.markers.opening)
    begun = [rng.randrange(3, 90) for _ in range(rng.randrange(1, 20))]
    tails = [[], [], [], begun, start[:1], chat.encode(chat.markers.answer)]
    length = rng.choice([1, 5, 15, 16, 17, 40, 960, 1000])
    return [rng.randrange(3, chat.vocab_size) for _ in range(length)] + start + rng.choice(tails)


def odd_budget(one: Draw) -> Budget:
    return Budget(
        max_thinking_tokens=one(None, "auto", 0, 1, 2, 7, 15, 16, 17, 30),
        min_thinking_tokens=one(0, 0, 0, 1, 7, 15),
        num_ignore=one(None, 0, 1, 2, 30),
        ignore_text=one("Wait", "", ["Wait\n", "", "is"], "Wait, the sum of the two numbers is"),
        final_text=one("Final Answer:", "", "the sum " * 4),
        accounting=one("total", "total", "harness"),
    )


def odd_params(one: Draw) -> SamplingParams:
    return SamplingParams(
        temperature=one(0.0, 0.5, 1.5),
        top_k=one(0, 0, 3),
        top_p=one(1.0, 0.8),
        min_p=one(0.0, 0.0, 0.05),
        seed=one(0, 1, 2, (1 << 64) - 1),
        n=one(1, 1, 2),
        max_tokens=one(None, 1, 5, 13, 20, 40, 60),
        stop=one([], [], ["e"], ["th", "zz", "n 1"]),
        stop_token_ids=one([], [], [33]),
        logprobs=one(None, None, None, None, 1),
    )


def odd_grid(one: Draw) -> dict[str, Any]:
    grid: dict[str, Any] = {"budgets": [one(0, 1, 7, 7, 16, 30, None, "auto") for _ in range(3)]}
    if one(True, False):
        grid["num_ignores"] = [one(None, 0, 0, 2, 5) for _ in range(2)]
    return grid


def check_odd(writer: Ascii, markers: Any, requests: int, seed: int) -> None:
    rng = random.Random(seed)

    def one(*values: Any) -> Any:
        return rng.choice(values)

    engine = {"markers": markers, "device": "cpu"}
    base = Engine(writer.folder, reuse_prompts=False, **engine)
    tight = {"cache_tokens": 1056, "speculate": 3, **engine}  # one whole context and a page
    others = [
        Engine(writer.folder, loop="device", max_batch=5, **tight),
        Engine(writer.folder, loop="host", max_batch=4, step_tokens=9, **tight),
    ]
    honoured = 0
    while honoured < requests:
        prompt, params = odd_prompt(base.chat, rng), odd_params(one)
        prompts = [prompt, one(prompt, prompt[1:])]
        try:
            budget = one(None, *[odd_budget(one)] * 6)
            grid = odd_grid(one) if budget is not None and one(True, False, False) else {}
            wanted = base.generate(prompts, params, budget, **grid)
        except InputError:
            continue
        honoured += 1
        for other in others:
            found = other.generate(prompts, params, budget, **grid)
            for a, b in zip(wanted, found, strict=True):
                assert not check_equal(writer, a, b, params) or a.steps == b.steps
            eventually_idle(other)
        for c in wanted if grid else []:
            alone = base.generate([c.prompt_ids], replace(params, n=c.sample + 1), c.budget)
            check_equal(writer, alone[-1], c, params)


@pytest.mark.parametrize("markers", ["s1", "think"])
def test_odd_requests(make_model: Callable[..., Path], markers: str) -> None:
    check_odd(Ascii(make_model("qwen2", seed=3), end=1.8), markers, 12, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("markers", ["s1", "think"])
def test_odd_requests_at_length(make_model: Callable[..., Path], markers: str) -> None:
    check_odd(Ascii(make_model("qwen2", seed=6), end=0.9, pairs=2), markers, 300, seed=2)
