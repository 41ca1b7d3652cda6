from __future__ import annotations
from collections.abc import Callable
from pathlib import Path
import pytest
from s1fast.budget import Budget
from s1fast.decoder import Engine, SamplingParams
from writers import Ascii, check_equal, prompts_of, sampled


@pytest.fixture(scope="module")
def restless(make_model) -> Ascii:
    return Ascii(make_model("qwen2", seed=3), end=1.8)


def test_first(restless):
    engine = Engine(restless.folder, loop="device")
    prompts = restless.prompts(3, 70, 25)
    for params in (
        SamplingParams(max_tokens=50),
        SamplingParams(max_tokens=50, temperature=0.6, seed=9),
    ):
        a = restless.engine.generate(prompts, params)
        b = engine.generate(prompts, params)
        print([check_equal(restless, x, y, params) for x, y in zip(a, b, strict=True)])
    assert engine.pages.held == 0
    print(engine.stats)
