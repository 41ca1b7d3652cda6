"""The command on several ranks, processes forked from one that has imported torch already.

What torchrun does, without its minutes: the same variables, and when a rank dies the others are
killed. A rank can be told to die by SIGKILL at a moment of its own.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import random
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

EVENTS = (
    "step.Trainer.step",
    "snapshot_writer.SnapshotWriter._copy",
    "snapshot_writer.write_tensors",
    "snapshot_writer.write_atomic",
    "snapshot_writer.shutil.rmtree",
    "checkpoint.write_tensors",
    "files.os.fsync",
    "files.os.rename",
    "ranks.Ranks.together",
)
"""What a doomed rank counts: it dies before the n-th of these calls."""


@dataclass(frozen=True)
class Doom:
    """Which rank dies, and when: before an event, or so long after its first step began."""

    rank: int
    event: int = 0
    after_s: float = 0.0


@dataclass(frozen=True)
class Done:
    """How the ranks ended, and what they printed."""

    codes: list[int]
    output: str


def run(
    world: int, arguments: list[str], log: Path, doom: Doom | None = None, linger_s: float = 0.0
) -> Done:
    """Runs `s1fast arguments` to its end; one rank is run as without a launcher.

    Args:
        log: a file for what they print.
        linger_s: how long the others live on when a rank has died.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["s1fast.trainer", "s1fast.cli"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log.write_bytes(b"")
    ranks = [
        context.Process(target=_rank, args=(rank, world, port, arguments, log, doom))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    give_up = time.monotonic() + 240
    while any(p.is_alive() for p in ranks):
        if any(p.exitcode not in (None, 0) for p in ranks) or time.monotonic() > give_up:
            time.sleep(linger_s)
            for process in ranks:
                process.kill()
        ranks[0].join(0.02)
    for process in ranks:
        process.join()
    codes = [-999 if p.exitcode is None else p.exitcode for p in ranks]
    return Done(codes, log.read_text(errors="replace"))


def _rank(
    rank: int, world: int, port: int, arguments: list[str], log: Path, doom: Doom | None
) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)
    if world > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    import torch

    torch.set_num_threads(1)
    if doom is not None and doom.rank == rank:
        _doom(doom)
    from s1fast import cli

    sys.argv = ["s1fast", *arguments]
    cli.main()


def _doom(doom: Doom) -> None:
    """Wraps what is counted."""
    lock = threading.Lock()
    left = [doom.event]

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def count() -> None:
        with lock:
            left[0] -= 1
            if left[0] == 0:
                die()

    def begin(once: list[bool] = []) -> None:  # noqa: B006
        if not once:
            once.append(True)
            timer = threading.Timer(doom.after_s, die)
            timer.daemon = True
            timer.start()

    for target in EVENTS if doom.event else ("step.Trainer.step",):
        module, *path, name = target.split(".")
        owner: Any = importlib.import_module("s1fast." + module)
        for part in path:
            owner = getattr(owner, part)

        def wrapper(*args: Any, real: Any = getattr(owner, name), **kwargs: Any) -> Any:
            (count if doom.event else begin)()
            return real(*args, **kwargs)

        setattr(owner, name, wrapper)


def random_doom(draw: random.Random, world: int, events: int, wall_s: float) -> Doom:
    """A moment of a run with about so many events a rank, or of such a length."""
    rank = draw.randrange(world)
    if draw.random() < 0.5:
        return Doom(rank, event=draw.randint(1, events))
    return Doom(rank, after_s=draw.uniform(0, wall_s))
