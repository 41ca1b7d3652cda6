"""Ranks that are threads of one process: files are shared, texts are exchanged at a barrier."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from s1fast.ranks import Ranks

Result = TypeVar("Result")


def ranks_of(world: int) -> list[Ranks]:
    """As many ranks as asked for; one that waits a minute for the others fails."""
    barrier = threading.Barrier(world, timeout=60)
    texts = [""] * world

    def rank(number: int) -> Ranks:
        def exchange(text: str) -> list[str]:
            texts[number] = text
            barrier.wait()
            found = list(texts)
            barrier.wait()
            return found

        return Ranks(number, world, exchange)

    return [rank(number) for number in range(world)]


def on_ranks(world: int, action: Callable[[Ranks], Result]) -> list[Result | Exception]:
    """What the action returns or raises on each of `world` ranks."""

    def attempt(ranks: Ranks) -> Result | Exception:
        try:
            return action(ranks)
        except Exception as error:
            return error

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(attempt, ranks_of(world)))


def all_ranks(world: int, action: Callable[[Ranks], Result]) -> list[Result]:
    """The same where none may fail."""
    found = []
    for result in on_ranks(world, action):
        if isinstance(result, Exception):
            raise result
        found.append(result)
    return found
