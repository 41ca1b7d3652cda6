"""The command on several ranks, processes forked from one that has imported torch already.

What torchrun does, in seconds: the same variables, and when a rank dies the others are killed. A
rank can be doomed to die by SIGKILL at a moment of its own, or to find the disk full.
"""

from __future__ import annotations

import errno
import importlib
import multiprocessing
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

PRELOADED = [
    *("s1fast.cli", "s1fast.trainer", "torch._dynamo", "torch.distributed.tensor", "tyro"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "tokenizers", "rich.console"),
]

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
"""What a doomed rank counts."""


@dataclass(frozen=True)
class Doom:
    """What befalls which rank, and when."""

    rank: int
    event: int = 0
    """Before which call of EVENTS, counted from 1; 0: of none."""
    of: str = ""
    """Which of EVENTS is counted; empty: all."""
    after_s: float = 0.0
    """Without an event: so long after its first step began."""
    full: bool = False
    """The call finds the disk full; else the rank dies."""


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
    context.set_forkserver_preload(PRELOADED)
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
            for process in ranks:
                process.join(linger_s)
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
        befall(doom)
    from s1fast import cli

    sys.argv = ["s1fast", *arguments]
    cli.main()


def befall(doom: Doom) -> None:
    """Arranges for this process what it is doomed to."""
    lock = threading.Lock()
    count = 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def before() -> None:
        nonlocal count
        with lock:
            count += 1
            if doom.event and count == doom.event:
                if doom.full:
                    raise OSError(errno.ENOSPC, "No space left on device")
                die()
            elif not doom.event and count == 1:
                timer = threading.Timer(doom.after_s, die)
                timer.daemon = True
                timer.start()

    counted = EVENTS if doom.event else ("step.Trainer.step",)
    for target in (doom.of,) if doom.of else counted:
        module, *path, name = target.split(".")
        owner: Any = importlib.import_module("s1fast." + module)
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, name, _preceded(getattr(owner, name), before))


def _preceded(real: Callable[..., Any], before: Callable[[], None]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        before()
        return real(*args, **kwargs)

    return wrapper


def random_doom(draw: random.Random, world: int, events: int, wall_s: float) -> Doom:
    """A moment of a run with about so many events a rank, or of such a length."""
    rank = draw.randrange(world)
    if draw.random() < 0.6:
        return Doom(rank, event=draw.randint(1, events))
    return Doom(rank, after_s=draw.uniform(0, wall_s))
