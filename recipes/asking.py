"""Asking many questions and paying for each once: concurrency, pace, retries, limits, the meter.

What was answered is in the store and is not asked again; what is to be asked runs `concurrency` at
a time. A run that must stop (a fatal error, a full disk, the money, Ctrl-C) sends nothing more but
waits for the answers under way, because they will be billed.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import math
import re
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from s1fast.errors import InputError
from s1fast.recipes.store import Store
from s1fast.recipes.teachers import Rejected, Reply, Teacher, Unavailable

PROBES = 5
"""Answers that are looked at before the rest is asked; so many rejections at first end the run."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How hard a teacher is pressed, and when to give up. Raises an InputError naming a flag."""

    concurrency: int = 32
    """Questions under way at a time."""
    requests_per_minute: float = 0.0
    """Most requests sent in a minute, evenly spaced; 0 for no limit."""
    attempts: int = 8
    """Attempts at a question in one run, after which it waits for the next run."""
    request_seconds: float = 600.0
    """Longest wait for one answer."""
    question_seconds: float = 3600.0
    """Longest time for a question, all attempts and waits together."""
    first_wait_seconds: float = 2.0
    """Longest wait before the second attempt; it doubles, and the wait is drawn below it."""
    longest_wait_seconds: float = 60.0
    """Bound on that doubling."""
    input_price: float | None = None
    """Dollars for a million prompt tokens."""
    output_price: float | None = None
    """Dollars for a million tokens of thinking and answer."""
    max_dollars: float | None = None
    """Stop before all answers, of earlier runs too, cost more than this."""

    def __post_init__(self) -> None:
        rules = [
            ("concurrency", self.concurrency >= 1, "at least 1"),
            ("requests_per_minute", 0 <= self.requests_per_minute < math.inf, "a number from 0"),
            ("attempts", self.attempts >= 1, "at least 1"),
            ("request_seconds", self.request_seconds > 0, "positive"),
            ("question_seconds", self.question_seconds > 0, "positive"),
            ("first_wait_seconds", 0 <= self.first_wait_seconds < math.inf, "a number from 0"),
            ("longest_wait_seconds", 0 <= self.longest_wait_seconds < math.inf, "a number from 0"),
            ("input_price", _price(self.input_price), "a number from 0"),
            ("output_price", _price(self.output_price), "a number from 0"),
            ("max_dollars", _price(self.max_dollars), "a number from 0"),
        ]
        for name, holds, rule in rules:
            if not holds:
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{flag}: must be {rule}, got {getattr(self, name)!r}")
        if self.max_dollars is not None and None in (self.input_price, self.output_price):
            raise InputError(
                "--max-dollars: needs --input-price and --output-price, the model's dollars for a "
                "million tokens; prices change, so none are built in"
            )


def _price(value: float | None) -> bool:
    return value is None or 0 <= value < math.inf


@dataclass(frozen=True, kw_only=True)
class Task:
    """A question to be asked, and what is stored beside its answer."""

    key: str
    question: str
    system: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Meter:
    """What the store's answers have cost, over all runs, and how this run goes."""

    input_price: float | None
    output_price: float | None
    answered: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    dearest: float = 0.0
    """Dollars of the dearest answer."""
    unanswered: int = 0
    """Requests of this run that ended without an answer; they may be billed all the same."""
    failed: dict[str, str] = field(default_factory=dict)
    """Question -> why every attempt failed, or why the server rejects it."""
    elsewhere: float = 0.0
    """Dollars of other stores that count, too."""

    def add(self, record: dict[str, Any]) -> None:
        self.answered += not record["refused"]
        self.refused += bool(record["refused"])
        output = record["answer_tokens"] + (record["thoughts_tokens"] or 0)
        self.prompt_tokens += record["prompt_tokens"]
        self.output_tokens += output
        self.dearest = max(self.dearest, self._price(record["prompt_tokens"], output))

    @property
    def dollars(self) -> float:
        return self.elsewhere + self._price(self.prompt_tokens, self.output_tokens)

    def _price(self, prompt_tokens: int, output_tokens: int) -> float:
        prompt = prompt_tokens * (self.input_price or 0.0)
        return (prompt + output_tokens * (self.output_price or 0.0)) / 1e6

    def line(self, total: int, limit: float | None) -> str:
        text = f"{self.answered} of {total} answered"
        text += f", {self.refused} refused" if self.refused else ""
        text += f", {len(self.failed)} failed" if self.failed else ""
        text += f", {self.unanswered} requests unanswered" if self.unanswered else ""
        text += f"; {self.prompt_tokens + self.output_tokens:,} tokens"
        if self.input_price is not None or self.output_price is not None:
            text += f", ${self.dollars:.4f}" + (f" of ${limit:g}" if limit is not None else "")
        return text


Probe = Callable[[list[dict[str, Any]]], None]
"""Looks at the first answers of a store and raises an InputError to stop."""


def ask_all(
    teacher: Teacher,
    tasks: Sequence[Task],
    store: Store,
    pace: Pace,
    console: Console,
    probe: Probe | None = None,
    elsewhere: float = 0.0,
) -> Meter:
    """Asks what the store does not hold yet; every answer is in it before the next is asked.

    Args:
        elsewhere: dollars of other stores that count towards pace.max_dollars.

    Raises:
        InputError: the key or model is wrong, the first questions are all rejected alike, the disk
            is full, the probe objects, or a limit was reached. Everything answered until then is
            stored.
    """
    asking = _Asking(teacher, tasks, store, pace, console)
    asking.meter.elsewhere = elsewhere
    return asyncio.run(asking.run(probe))


class _Asking:
    def __init__(
        self, teacher: Teacher, tasks: Sequence[Task], store: Store, pace: Pace, console: Console
    ) -> None:
        self._teacher, self._store, self._pace, self._console = teacher, store, pace, console
        self._queue = deque(task for task in tasks if task.key not in store)
        self._first = [task.key for task in self._queue][:PROBES]
        self._total = len(self._queue) + len(store)
        self.meter = Meter(pace.input_price, pace.output_price)
        for _, record in store.records():
            self.meter.add(record)
        self._began, self._before = time.monotonic(), (len(store), self.meter.output_tokens)
        self._num_under_way = 0
        self._next_turn = 0.0
        self._stop: InputError | None = None
        self._stopped = asyncio.Event()

    async def run(self, probe: Probe | None) -> Meter:
        try:
            with self._drain_on_interrupt(), self._progress():
                await self._stages(probe)
        finally:
            await self._teacher.aclose()
        if self._stop is not None:
            raise self._stop
        return self.meter

    async def _stages(self, probe: Probe | None) -> None:
        """The first answers alone, as long as the probe has not seen enough; then the rest."""
        while probe is not None:
            first = self._first_answers()
            try:
                probe(first)
            except InputError as error:
                self._halt(error)
            missing = min(PROBES - len(first), len(self._queue))
            if missing <= 0 or self._stop:
                break
            await self._ask([self._queue.popleft() for _ in range(missing)])
        rest, self._queue = list(self._queue), deque()
        if not self._stop:
            await self._ask(rest)

    def _first_answers(self) -> list[dict[str, Any]]:
        records = (record for _, record in self._store.records() if not record["refused"])
        return [record for record, _ in zip(records, range(PROBES), strict=False)]

    async def _ask(self, tasks: Sequence[Task]) -> None:
        waiting = deque(tasks)

        async def work() -> None:
            while waiting and self._may_send():
                await self._answer(waiting.popleft())

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._pace.concurrency, len(waiting))):
                group.create_task(work())

    def _may_send(self) -> bool:
        """Whether another question can be afforded, should all under way be as dear as the dearest.

        A worker that must not send ends; the last one alone has nothing else under way.
        """
        limit = self._pace.max_dollars
        if self._stop is None and limit is not None:
            likely = self.meter.dollars + self.meter.dearest * (self._num_under_way + 1)
            if self.meter.dollars >= limit or likely > limit:
                if not self._num_under_way:
                    self._halt(
                        InputError(
                            f"--max-dollars {limit:g}: reached, the next answer might cost more "
                            f"than is left of it ({self.meter.line(self._total, limit)}); all "
                            f"answers are kept in {self._store.path}"
                        )
                    )
                return False
        return self._stop is None

    async def _answer(self, task: Task) -> None:
        """One question to its end: stored, failed, or the run's end."""
        self._num_under_way += 1
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._pace.question_seconds):
                reply, attempts = await self._attempts(task)
            record = {**task.extra, **vars(reply), "attempts": attempts}
            record["seconds"] = round(time.monotonic() - began, 3)
            self._store.put(task.key, record)
            self.meter.add(record)
            if self._store.full:
                self._halt(
                    InputError(
                        f"{self._store.path}: the disk is full; every answer received is stored: "
                        "free space and run again"
                    )
                )
        except Unavailable as error:
            self._fail(task, str(error))
        except Rejected as error:
            self._fail(task, str(error))
            self._stop_if_all_are_rejected()
        except TimeoutError:
            self._fail(task, f"not answered within {self._pace.question_seconds:g} s")
        except InputError as error:
            self._halt(error)
        finally:
            self._num_under_way -= 1
            self._show()

    async def _attempts(self, task: Task) -> tuple[Reply, int]:
        from tenacity import (
            AsyncRetrying,
            retry_if_exception_type,
            stop_after_attempt,
            wait_random_exponential,
        )

        drawn = wait_random_exponential(
            self._pace.first_wait_seconds, self._pace.longest_wait_seconds
        )

        last = stop_after_attempt(self._pace.attempts)

        def wait(state: Any) -> float:
            return max(drawn(state), state.outcome.exception().retry_after_s)

        retrying = AsyncRetrying(
            stop=lambda state: self._stop is not None or last(state),
            wait=wait,
            retry=retry_if_exception_type(Unavailable),
            sleep=self._sleep,
            reraise=True,
        )
        async for attempt in retrying:
            with attempt:
                return await self._attempt(task), attempt.retry_state.attempt_number
        raise AssertionError("tenacity returns or raises")

    async def _attempt(self, task: Task) -> Reply:
        await self._turn()
        if self._stop is not None:  # while it waited
            raise Unavailable("the run is stopping")
        self._store.begin(task.key)
        try:
            async with asyncio.timeout(self._pace.request_seconds):
                return await self._teacher.ask(task.question, task.system)
        except TimeoutError:
            self._count_unanswered(task)
            raise Unavailable(f"no answer within {self._pace.request_seconds:g} s") from None
        except BaseException:
            self._count_unanswered(task)
            raise

    def _count_unanswered(self, task: Task) -> None:
        self.meter.unanswered += 1
        self._store.release(task.key)

    async def _turn(self) -> None:
        """Waits until the pace allows another request."""
        if self._pace.requests_per_minute:
            now = time.monotonic()
            turn = max(now, self._next_turn)
            self._next_turn = turn + 60.0 / self._pace.requests_per_minute
            await self._sleep(turn - now)

    async def _sleep(self, seconds: float) -> None:
        """A pause that the end of the run cuts short."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopped.wait(), seconds)

    def _fail(self, task: Task, reason: str) -> None:
        if self._stop is None:
            self.meter.failed[task.key] = reason

    def _stop_if_all_are_rejected(self) -> None:
        """The first questions all rejected alike: what is wrong is wrong for every question.

        A store that holds an answer shows that its model can be asked.
        """
        reasons = [self.meter.failed.get(key, "") for key in self._first]
        alike = {re.sub(r"\d+", "", reason) for reason in reasons}
        if len(reasons) < PROBES or len(alike) > 1 or "" in alike:
            return
        if not self.meter.answered + self.meter.refused:
            self._halt(
                InputError(
                    f"the first {PROBES} questions failed alike: {reasons[0]}; check --model and "
                    "the sampling flags, or take these questions out"
                )
            )

    def _halt(self, error: InputError) -> None:
        self._stop = self._stop or error
        self._stopped.set()

    # -- the terminal -----------------------------------------------------------------------

    @contextlib.contextmanager
    def _drain_on_interrupt(self) -> Iterator[None]:
        """The first Ctrl-C lets the answers under way arrive; a second one ends at once."""
        loop = asyncio.get_running_loop()

        def interrupted() -> None:
            loop.remove_signal_handler(signal.SIGINT)
            self._console.print(
                f"waiting for {self._num_under_way} answers under way, which will be billed; "
                "Ctrl-C again to lose them"
            )
            self._halt(InputError(f"interrupted; all answers are kept in {self._store.path}"))

        try:
            loop.add_signal_handler(signal.SIGINT, interrupted)
        except (RuntimeError, ValueError):  # not the main thread: Ctrl-C is somebody else's
            yield
            return
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    @contextlib.contextmanager
    def _progress(self) -> Iterator[None]:
        self._bar: Progress | None = None
        self._printed = time.monotonic()
        if not self._console.is_terminal:
            yield
            return
        columns = (BarColumn(bar_width=24), TextColumn("{task.description}"))
        with Progress(*columns, console=self._console) as bar:
            self._bar, self._bar_task = bar, bar.add_task("", total=self._total)
            yield

    def _show(self) -> None:
        """The meter: as a bar on a terminal, as a line every ten seconds elsewhere."""
        done = self.meter.answered + self.meter.refused
        elapsed = time.monotonic() - self._began
        line = self.meter.line(self._total, self._pace.max_dollars)
        line += f", {(self.meter.output_tokens - self._before[1]) / elapsed:,.0f} tok/s"
        if done > self._before[0]:
            left = elapsed / (done - self._before[0]) * (self._total - done)
            line += f", eta {datetime.timedelta(seconds=round(left))}"
        if self._bar is not None:
            self._bar.update(self._bar_task, completed=done, description=line)
        elif time.monotonic() - self._printed >= 10:
            self._printed = time.monotonic()
            self._console.print(line, highlight=False, soft_wrap=True)
