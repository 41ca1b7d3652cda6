"""What is asked of every engine: the same output as another's, and nothing left behind."""

from __future__ import annotations

import gc
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from s1fast.budget import Budget
from s1fast.decoder import Engine, SamplingParams
from s1fast.handle import Handle
from s1fast.request import Completion, Request
from s1fast.row import Row
from writers import Ascii, check_equal

BUDGETS: list[Budget | None] = [
    None,
    Budget(max_thinking_tokens=30, num_ignore=2),
    Budget(max_thinking_tokens=12),
    Budget(max_thinking_tokens=9, num_ignore=3, accounting="harness"),
    Budget(min_thinking_tokens=20, ignore_text=["Wait, the sum of the two", "is\n"], num_ignore=1),
]
PARAMS = [
    SamplingParams(max_tokens=50),
    SamplingParams(max_tokens=50, temperature=0.6, seed=9),
    SamplingParams(max_tokens=50, temperature=0.8, top_k=8, top_p=0.9, min_p=0.01, stop=["e"]),
]


WANTED: dict[tuple[Path, int, int], list[Completion]] = {}
"""What each writer's own engine gave, made once."""


def check_same(writer: Ascii, engine: Engine) -> None:
    """The engine gives what the writer's own gives, for every kind of request, up to ties."""
    prompts, equal = writer.prompts(3, 70, 25), []
    for b, budget in enumerate(BUDGETS):
        for p, params in enumerate(PARAMS):
            key = writer.folder, b, p
            if key not in WANTED:
                WANTED[key] = writer.engine.generate(prompts, params, budget)
            found = engine.generate(prompts, params, budget)
            assert len(found) == len(WANTED[key])
            pairs = zip(WANTED[key], found, strict=True)
            equal += [check_equal(writer, *pair, params) for pair in pairs]
    assert sum(equal) >= 0.95 * len(equal), "too many ties to prove anything"
    eventually_idle(engine)


def eventually_idle(engine: Engine) -> None:
    for _ in range(2000):
        if engine.pages.held == 0 and engine._thread is None:
            return
        time.sleep(0.005)
    raise AssertionError(f"{engine.pages.held} pages are still held")


def soak(writer: Ascii, requests: int, seed: int, **fields: Any) -> None:
    """Random requests in random order, a third of them cancelled at random; nothing is left."""
    sizes = {"cache_tokens": 800, "max_batch": 12, "step_tokens": 48, "speculate": seed % 3}
    engine = Engine(writer.folder, **sizes, **fields)
    rng = random.Random(seed)
    open_: list[tuple[Handle, int]] = []
    finished = cancelled = most_held = 0
    for number in range(requests):
        budget = rng.choice(BUDGETS)
        tree = budget is not None and rng.random() < 0.2
        params = SamplingParams(
            max_tokens=rng.choice((45, 60)),
            temperature=rng.choice((0.0, 0.7)),
            n=rng.choice((1, 1, 2)),
            seed=number,
            logprobs=rng.choice((None, None, 1)),
        )
        (prompt,) = writer.prompts(rng.choice((2, 5, 20, 60)))
        request = Request(
            prompt=prompt,
            params=params,
            budget=budget,
            budgets=[20, 33] if tree else None,
            num_ignores=[0, 1] if tree and rng.random() < 0.5 else None,
        )
        cells = len(request.grid())
        open_.append((engine.submit(request), params.n * cells))
        if rng.random() < 0.35:
            handle, _ = open_.pop(rng.randrange(len(open_)))
            handle.cancel()
            cancelled += 1
        while len(open_) > 24:
            handle, count = open_.pop(0)
            assert len(handle.result()) == count
            finished += 1
        most_held = max(most_held, engine.pages.held)
    for handle, count in open_:
        assert len(handle.result()) == count
    eventually_idle(engine)
    assert finished > requests // 3 and cancelled > requests // 5
    assert 0 < most_held <= 50
    scheduler = engine._loop.scheduler
    assert not (scheduler.waiting or scheduler.running or engine._handles or engine._cancelled)
    assert sorted(scheduler._lines) == list(range(12))
    assert not scheduler.cache.table.any()
    assert engine.pages.available == engine.pages.count - 1
    assert sum(engine.pages._holders) == 0 and len(engine.pages._page_of) <= 50
    del open_, handle
    gc.collect()
    alive = [x for x in gc.get_objects() if isinstance(x, Row | Handle)]
    assert len(alive) <= 2, "finished rows are still in memory"


def run_ranks(code: str, arguments: list[str]) -> None:
    """Runs a script as two ranks of torch.distributed, processes of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        env = os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        env |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code, *arguments]
        ranks.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    try:
        for process in ranks:
            _, said = process.communicate(timeout=300)
            assert process.returncode == 0, said
    finally:
        for process in ranks:
            process.kill()
