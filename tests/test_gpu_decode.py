"""The captured loop on a CUDA device (make gpu): the tests of test_captured.py, in fp32 against the
loop of the host on a CPU; graphs, csrc, and that nothing is waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import test_captured
from s1fast.budget import Budget
from s1fast.decoder import Engine, SamplingParams
from s1fast.matmul import CAPABILITY
from s1fast.request import Request
from test_captured import (  # noqa: F401  (collected here)
    ahead,
    looped,
    restless,
    test_a_request_that_fails,
    test_cancellation,
    test_chunks_of_prompts,
    test_delimiters_of_several_ids,
    test_every_kind_of_request,
    test_extremes_of_sampling,
    test_logprobs_and_their_neighbours,
    test_more_rows_than_places,
    test_preemption,
    test_rows_come_while_others_run,
    test_shared_beginnings,
    test_soak,
    test_speculation,
    test_trees,
    test_warm_up,
    writer,
)
from writers import BF16_TIE, Ascii, check_equal, prompts_of, sampled

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(test_captured, "ON", {"device": "cuda", "dtype": "float32"})
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    yield
    torch.cuda.synchronize()


def test_steps_are_captured_and_replayed(writer: Ascii) -> None:  # noqa: F811
    """Buckets of one row and of many, warmed up and not."""
    prompts = prompts_of(writer.chat, *range(3, 23))
    params = sampled()
    wanted = writer.engine.generate(prompts, params)
    lazy, warm = ahead(writer), ahead(writer, max_batch=20)
    warm.warm_up()
    graphs = looped(warm).device.graphs
    assert list(graphs._graphs) == [1, 2, 4, 8, 16, 24] and all(graphs._graphs.values())
    for engine in (lazy, warm):
        found = engine.generate(prompts, params) + engine.generate(prompts[:1], params)
        for a, b in zip([*wanted, wanted[0]], found, strict=True):
            check_equal(writer, a, b, params)
    assert looped(lazy).device.graphs._graphs[24] is not None


def test_an_iteration_waits_for_nothing(writer: Ascii) -> None:  # noqa: F811
    """Rows come, think, are cut, drafted for and stopped, all in sync debug mode."""
    engine = ahead(writer, max_batch=8, speculate=3)
    engine.warm_up()
    prompts = writer.prompts(3, 20, 9, 300, 5, 12)
    budget = Budget(max_thinking_tokens=30, num_ignore=1)
    params = sampled(max_tokens=120, stop=["e"], n=2, top_p=0.9)
    engine.generate(prompts, params, budget)  # what a chunk launches is compiled
    engine._thread = threading.current_thread()  # no other: the mode is for what runs here
    fresh = [[*p[:2], *p] for p in prompts]
    requests = [Request(prompt=p, params=params, budget=budget) for p in fresh]
    handles = engine._submit_all(requests)
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine._run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(len(handle.result()) == 2 for handle in handles)


@pytest.mark.parametrize("matmul", ["torch", "cuda"])
@pytest.mark.parametrize("count", [1, 4, 11])
def test_bf16(matmul: Any, count: int, make_model: Callable[..., Path]) -> None:
    """Both products, live slots and more than csrc takes, against the CPU's loop in bf16."""
    if matmul == "cuda" and torch.cuda.get_device_capability() != CAPABILITY:
        pytest.skip("csrc needs compute capability 9.0")
    fields = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    restless = Ascii(make_model("qwen2", seed=3, std=0.1, **fields), end=1.8)  # noqa: F811
    prompts = restless.prompts(*range(3, 3 + 7 * count, 7))
    budget = Budget(max_thinking_tokens=30, num_ignore=2)
    cpu = Engine(restless.folder, device="cpu", dtype="bfloat16")
    engine = Engine(restless.folder, device="cuda", matmul=matmul, speculate=2)
    for params in (SamplingParams(max_tokens=45), SamplingParams(max_tokens=45, temperature=0.7)):
        wanted = cpu.generate(prompts, params, budget)
        for _ in range(3):  # as it is, captured, replayed
            for a, b in zip(wanted, engine.generate(prompts, params, budget), strict=True):
                check_equal(restless, a, b, params, tie=BF16_TIE)
