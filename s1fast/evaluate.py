"""`s1fast evaluate`: a model over the paper's benchmarks, at every budget and number of Waits.

    out/eval/run.json            what was asked; another run's folder is refused
             samples.0.sqlite    every finished sample, flushed to the disk; one file a rank
             samples.jsonl       the same with their grades
             summary.json        accuracies with intervals, tokens, Control, Scaling, Performance
             scaling-TASK.png    the curve beside the paper's

Run again, it goes on where it was killed. Under torchrun every rank takes a slice of the problems.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from s1fast.answers import (
    Ask,
    Cell,
    Endpoint,
    Finished,
    How,
    Local,
    Record,
    key_of,
    weights_digest,
)
from s1fast.errors import InputError
from s1fast.files import make_directory, read_json_object, write_atomic
from s1fast.metrics import duration
from s1fast.ranks import ALONE, Ranks, process_group
from s1fast.recipes.asking import Pace, Status, Task, ask_all
from s1fast.recipes.features import check_teacher
from s1fast.recipes.store import Store, peek
from s1fast.results import finish
from s1fast.tasks import STYLES, Problem, fingerprint, load

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure a model on benchmarks, over budgets and ignored ends of thinking."""

    tasks: str = "aime24,math500,gpqa"
    """Of aime24, aime25, math500, gpqa, gsm8k; NAME=PATH reads a local file of that set."""
    output: Path = Path("out/evaluate")
    """Folder of the results; an interrupted run goes on in it."""
    rows: int | None = None
    """Only the first so many problems of each task."""
    budgets: str = "auto"
    """Most thinking tokens, several with commas: counts, auto (what the context leaves), none."""
    num_ignores: str = "none"
    """How many ends of thinking are ignored, several with commas: counts, or none."""
    styles: str = "plain"
    """Words below the problem: plain, short, long; the last two are class-conditional control."""
    reject_above: str = ""
    """Rejection sampling instead of budgets: draw until thinking is within so many tokens."""
    max_tries: int = 1000
    """Draws for a problem under one limit, after which it counts as wrong."""
    no_thinking: bool = False
    """Answer at once, without budget or markers."""
    samples: int = 1
    """Samples of each problem; with several, majority voting is reported, too."""
    separate: bool = False
    """Decode every cell of the grid by itself, not all from one budget tree."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision; auto is bfloat16 on GPU and float32 on CPU."""
    matmul: Literal["torch", "cuda"] = "torch"
    """Products of a GPU's steps: cuBLAS, or for up to 8 tokens on an H100 or H200 ours (csrc)."""
    max_batch: int = 64
    """Samples that are decoded together."""
    dollars_per_hour: float = 0.0
    """Price of one device for an hour; shown as cost when given."""
    endpoint: str = ""
    """URL of an OpenAI-compatible server that answers; MODEL is its name for the model."""
    tokenizer: str = ""
    """Model folder or hub id that counts thinking where the endpoint does not."""
    grader: str = ""
    """Teacher, as openai:MODEL@URL, that is asked about answers the rules reject."""
    grading_workers: int = 2
    """Processes that grade."""
    how: How = field(default_factory=How)
    pace: Pace = field(default_factory=Pace)

    def __post_init__(self) -> None:
        sampled = self.how.temperature > 0
        rules = [
            ("samples", self.samples >= 1, "at least 1"),
            ("samples", self.samples == 1 or sampled, "1 without --temperature: all are equal"),
            ("samples", self.samples == 1 or not self.reject_above, "1 with --reject-above"),
            ("reject_above", not self.reject_above or sampled, "given with --temperature"),
            ("max_tries", self.max_tries >= 1, "at least 1"),
            ("max_batch", self.max_batch >= 1, "at least 1"),
            ("grading_workers", self.grading_workers >= 1, "at least 1"),
            ("dollars_per_hour", self.dollars_per_hour >= 0, "0 or more"),
        ]
        for name, holds, rule in rules:
            if not holds:
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{flag}: must be {rule}, got {getattr(self, name)!r}")


def plan(config: EvaluateConfig) -> list[Cell]:
    """The cells that the flags ask for, budgets outermost. Raises an InputError naming the flag."""
    styles = _listed("--styles", config.styles, dict.fromkeys(STYLES))
    names = [name for name, _ in styles]
    grid = (config.budgets, config.num_ignores) != ("auto", "none")
    flags = (("--reject-above", config.reject_above), ("--no-thinking", config.no_thinking))
    alone = [name for name, given in flags if given]
    if len(alone) > 1 or (alone and grid):
        others = "--budgets or --num-ignores" if grid else alone[1]
        raise InputError(f"{alone[0]}: cannot go with {others}; make it a run of its own")
    if config.no_thinking:
        if config.endpoint:
            raise InputError("--no-thinking: an endpoint decides itself whether to think")
        return [Cell(style=style, budget=None, think=False) for style in names]
    if config.reject_above:
        limits = _listed("--reject-above", config.reject_above, {})
        return [Cell(style, None, reject=limit) for style in names for _, limit in limits]
    budgets = _listed("--budgets", config.budgets, {"auto": "auto", "none": None})
    if config.endpoint and {("auto", "auto"), ("none", None)} <= set(budgets):
        raise InputError("--budgets: to an endpoint auto and none are the same; leave out one")
    ignores = _listed("--num-ignores", config.num_ignores, {"none": None})
    return [
        Cell(style, budget, ignore)
        for style, (_, budget), (_, ignore) in itertools.product(names, budgets, ignores)
    ]


def _listed(flag: str, text: str, words: dict[str, Any]) -> list[tuple[str, Any]]:
    """The entries of a list with commas: one of the words, or, unless all are words, a count."""
    found: list[tuple[str, Any]] = []
    for part in (part.strip() for part in text.split(",")):
        if part in words:
            found.append((part, words[part]))
        elif part.isascii() and part.isdigit() and flag != "--styles":
            found.append((str(int(part)), int(part)))
        else:
            counts = [] if flag == "--styles" else ["a count"]
            raise InputError(f"{flag}: {part!r} is none of {', '.join([*counts, *words])}")
    names = [name for name, _ in found]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"{flag}: {twice[0]} stands there twice")
    return found


def join_ranks() -> Ranks:
    """This process among those that torchrun started; they talk over gloo, and only to wait."""
    names = (("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
    world, local = (int(os.environ.get(name, default)) for name, default in names)
    if world == 1:
        return ALONE
    import torch

    choose_device(local, torch.cuda.device_count())
    if not torch.distributed.is_initialized():
        # A rank may wait for another's whole slice.
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    return process_group()


def choose_device(local: int, count: int) -> None:
    """Lets this process see its own GPU alone, whichever thread asks."""
    if not count:
        return
    if local >= count:
        raise InputError(f"torchrun: local rank {local}, but only {count} GPUs are there")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else [str(i) for i in range(count)]
    os.environ["CUDA_VISIBLE_DEVICES"] = names[local]


def evaluate(model: str, config: EvaluateConfig, console: Console) -> Path:
    """Asks what the folder does not hold yet, grades and reports; returns the summary's path.

    Args:
        model: folder or hub id; with an endpoint, the server's name for it.

    Raises:
        InputError: bad flags or rows, before any work; a folder of another run, naming what
            differs; a server that cannot be reached; samples that failed. What was finished is
            kept.
    """
    cells = plan(config)
    config.how.params(config.samples, config.how.seed)
    if config.grader:
        check_teacher(config.grader, "--grader")
    specs = [spec.strip() for spec in config.tasks.split(",")]
    problems = [p for spec in specs for p in load(spec, config.rows)]
    names = [spec.partition("=")[0] for spec in specs]
    if len(set(names)) < len(names):
        raise InputError(f"--tasks: one stands there twice: {config.tasks}")
    identity = _identity(model, config, cells, problems)
    if config.endpoint and os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError("--endpoint: one process asks, all at a time: leave torchrun out")
    ranks = join_ranks()
    if ranks.rank == 0:
        _prepare(config.output, identity)
    ranks.exchange("")  # a barrier: now the folder is there
    _prepare(config.output, identity)
    mine = problems[ranks.rank :: ranks.world]
    with _store(config.output, ranks.rank, identity) as store:
        ranks.exchange("")  # now every rank's store can be read
        _Run(model, config, cells, mine, store, ranks, console).answer()
    ranks.exchange("")
    if ranks.rank == 0:
        records = [record for _, record in _stored(config.output)]
        return finish(config.output, identity, problems, cells, records, config, console)
    return config.output / "summary.json"


def _identity(
    model: str, config: EvaluateConfig, cells: Sequence[Cell], problems: Sequence[Problem]
) -> dict[str, Any]:
    """Everything that a sample depends on; grading is not part of it."""
    by_task: dict[str, list[Problem]] = {}
    for problem in problems:
        by_task.setdefault(problem.task, []).append(problem)
    source = {"endpoint": config.endpoint}
    if not config.endpoint:
        source = {"weights": weights_digest(model), "dtype": config.dtype}
    identity = {
        "schema": SCHEMA,
        "model": model,
        **source,
        "tasks": {name: f"{len(rows)} rows, {fingerprint(rows)}" for name, rows in by_task.items()},
        "cells": [cell.label for cell in cells],
        "samples": config.samples,
        "max_tries": config.max_tries if config.reject_above else None,
        **asdict(config.how),
    }
    return json.loads(json.dumps(identity))


def _store(folder: Path, rank: int, identity: dict[str, Any]) -> Store:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return Store(folder / f"samples.{rank}.sqlite", {"step": "evaluate", "run": digest})


def _prepare(folder: Path, identity: dict[str, Any]) -> None:
    """Makes the folder, or checks that it is this run's; one without samples is anybody's."""
    path = folder / "run.json"
    if not path.exists():
        make_directory(folder)
        if any(not entry.name.startswith(".run.json.") for entry in folder.iterdir()):  # a kill's
            raise InputError(f"{folder}: holds other files; choose another --output")
        write_atomic(path, json.dumps(identity, indent=1) + "\n")
        return
    there = read_json_object(path)
    names = [n for n in there | identity if there.get(n) != identity.get(n)]
    if names and next(_stored(folder), None) is None:
        with _store(folder, 0, identity):  # its lock tells that no other run is under way
            write_atomic(path, json.dumps(identity, indent=1) + "\n")
    elif names:
        listed = "; ".join(
            f"{n} is {str(there.get(n))[:100]} there and {str(identity.get(n))[:100]} now"
            for n in names
        )
        raise InputError(f"{folder}: holds another run: {listed}; choose another --output")


def _stored(folder: Path) -> Iterator[tuple[str, Record]]:
    """Every rank's records, of runs on any number of ranks, each once."""
    seen = set()
    for path in sorted(folder.glob("samples.*.sqlite")):
        for record in peek(path)[1]:
            key = key_of(record["task"], record["problem"], record["cell"], record["sample"])
            if key not in seen:
                seen.add(key)
                yield key, record


class _Run:
    """One rank's share: its problems, its store, whoever answers."""

    def __init__(
        self,
        model: str,
        config: EvaluateConfig,
        cells: Sequence[Cell],
        problems: Sequence[Problem],
        store: Store,
        ranks: Ranks,
        console: Console,
    ) -> None:
        self._model, self._config, self._cells = model, config, cells
        self._problems, self._store, self._ranks = problems, store, ranks
        self._console = console if ranks.rank == 0 else Console(quiet=True)
        self._done = dict(_stored(config.output))

    def answer(self) -> None:
        """Everything that is still missing of this rank's share."""
        if self._config.reject_above:
            for cell in self._cells:
                self._reject(cell)
            return
        samples = range(self._config.samples)
        asks = [
            Ask(problem, cell, sample)
            for cell in self._cells
            for problem in self._problems
            for sample in samples
        ]
        self._ask([ask for ask in asks if ask.key not in self._done])

    def _reject(self, cell: Cell) -> None:
        """Draws again and again for every problem whose thinking was too long so far."""
        if self._config.endpoint:
            while asks := self._next_draws(cell):
                self._ask(asks)
        elif problems := [ask.problem for ask in self._next_draws(cell)]:
            tries = self._config.max_tries
            with self._meter(None) as meter:
                self._engine.draw(problems, cell, self._done, tries, self._finished(meter))

    def _next_draws(self, cell: Cell) -> list[Ask]:
        """The first draw that is not there yet of each problem of which none was accepted."""
        found = []
        for problem in self._problems:
            for attempt in range(self._config.max_tries):
                ask = Ask(problem, cell, attempt)
                if ask.key not in self._done:
                    found.append(ask)
                    break
                if cell.accepts(self._done[ask.key]):
                    break
        return found

    def _ask(self, asks: Sequence[Ask]) -> None:
        if asks and self._config.endpoint:
            self._ask_endpoint(asks)
        elif asks:
            with self._meter(len(asks)) as meter:
                self._engine.answer(asks, self._finished(meter))

    @cached_property
    def _engine(self) -> Local:
        from s1fast.decoder import Engine

        config = self._config
        engine = Engine(
            self._model,
            device=config.device,
            dtype=config.dtype,
            matmul=config.matmul,
            max_batch=config.max_batch,
        )
        how, samples = config.how, config.samples
        return Local(engine, how, self._cells, samples=samples, separate=config.separate)

    def _meter(self, todo: int | None) -> _Meter:
        price = self._config.dollars_per_hour * self._ranks.world
        return _Meter(self._engine, todo, price, self._console)

    def _finished(self, meter: _Meter) -> Finished:
        def finished(key: str, record: Record) -> None:
            if key in self._done:  # of a problem that a kill left half stored
                return
            self._store.put(key, record)
            self._done[key] = record
            meter.advance()
            if self._store.full:
                raise InputError(
                    f"{self._store.path}: the disk is full; what was finished is stored: free "
                    "space and run again"
                )

        return finished

    def _ask_endpoint(self, asks: Sequence[Ask]) -> None:
        config = self._config
        endpoint = Endpoint(self._model, config.endpoint, config.how, config.tokenizer, asks)
        tasks = [Task(key=ask.key, question=ask.key, extra=ask.record({})) for ask in asks]
        meter = ask_all(endpoint, tasks, self._store, config.pace, self._console)
        self._done |= dict(self._store.records())
        if meter.failed:
            key, reason = next(iter(meter.failed.items()))
            raise InputError(
                f"{len(meter.failed)} of {len(asks)} samples failed, the first, {key}, because: "
                f"{reason}; what was answered is kept in {self._store.path}: run again for the rest"
            )


class _Meter:
    """Samples done, tokens a second, time and money to go.

    Args:
        todo: samples to come; None where nobody knows, as with rejection sampling.
    """

    def __init__(self, engine: Local, todo: int | None, price: float, console: Console) -> None:
        self._engine, self._todo, self._price, self._console = engine, todo, price, console
        self._count, self._before = 0, engine.drawn
        self._began = time.monotonic()
        self._status = Status(console, todo)

    def __enter__(self) -> _Meter:
        self._status.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._status.__exit__()
        if self._count and not self._console.is_terminal:
            self._console.print(self._line(), highlight=False, soft_wrap=True)

    def advance(self) -> None:
        self._count += 1
        self._status.show(self._count, self._line())

    def _line(self) -> str:
        elapsed = max(time.monotonic() - self._began, 1e-9)
        drawn = self._engine.drawn - self._before
        line = f"{self._count} samples"
        if self._todo is not None:
            eta = duration(elapsed / self._count * (self._todo - self._count))
            line = f"{self._count} of {self._todo} samples, eta {eta}"
        line += f", {drawn:,} tokens drawn, {drawn / elapsed:,.0f} tok/s"
        if self._engine.drawn_separately > self._engine.drawn:
            line += f" ({self._engine.drawn_separately / self._engine.drawn:.1f} times fewer drawn "
            line += "than cell by cell)"
        return line + (f", ${self._price * elapsed / 3600:.2f}" if self._price else "")
