"""Ranks that watch each other: who dies, who notices, what all are told."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from s1fast import heartbeat
from s1fast.heartbeat import Heartbeat

# A thread that has ended itself, where a whole process would have.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Beats in no time; the exit codes of ranks that ended themselves."""
    ended: list[int] = []
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.02)
    monkeypatch.setattr(heartbeat, "SILENCE_S", 0.5)

    def end(code: int) -> None:
        ended.append(code)
        raise SystemExit  # the thread only

    monkeypatch.setattr(os, "_exit", end)
    yield ended


def ranks(count: int) -> list[Heartbeat]:
    store = dist.HashStore()
    return [Heartbeat(store, rank, count) for rank in range(count)]


def test_nobody_dies_while_all_beat(quick: list[int]) -> None:
    beating = ranks(3)
    beating[0]._thread.join(1.5)  # three times as long as silence may last
    for one in beating:
        one.stop()
    assert quick == []


@pytest.mark.parametrize("dead", [1, 2])
def test_all_are_told_who_fell_silent(
    dead: int, quick: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 2 does not look after rank 1: rank 0 leaves word."""
    beating = ranks(3)
    beating[dead].stop()
    for one in beating:
        one._thread.join(20)
    assert quick == [1, 1]
    said = capsys.readouterr().err.splitlines()
    assert sorted(said) == [
        f"s1fast: error: rank {rank}: nothing heard from rank {dead} for 0 s"
        for rank in range(3)
        if rank != dead
    ]


def test_all_miss_rank_0(quick: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    beating = ranks(3)
    beating[0].stop()
    for one in beating[1:]:
        one._thread.join(20)
    assert quick == [1, 1]
    assert capsys.readouterr().err.count("nothing heard from rank 0 for 0 s") == 2


def test_a_store_that_is_gone(quick: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    class Gone(dist.Store):
        def set(self, key: str, value: str) -> None:
            raise RuntimeError("Broken pipe")

    Heartbeat(Gone(), 1, 2)._thread.join(20)
    assert quick == [1]
    assert "the store of torchrun's first node is gone: Broken pipe" in capsys.readouterr().err
