"""Asking many questions and paying for each once: concurrency, pace, retries, limits, the meter.

What was answered is in the store and is not asked again; what is to be asked runs `concurrency` at
a time. A run that must stop (an error, a full disk, the money, Ctrl-C, SIGTERM) sends nothing more
but waits for the answers under way, because they will be billed.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from s1fast.errors import InputError
from s1fast.recipes.store import Store
from s1fast.recipes.teachers import CUT, Rejected, Reply, Teacher, Unavailable

PROBES = 5
"""Answers that are looked at before the rest is asked; so many failures at first end the run."""


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
    """No further attempt at a question later than this."""
    first_wait_seconds: float = 2.0
    """Longest wait before the second attempt; it doubles, and the wait is drawn below it."""
    longest_wait_seconds: float = 60.0
    """Bound on that doubling."""
    input_price: float | None = None
    """Dollars for a million prompt tokens."""
    output_price: float | None = None
    """Dollars for a million tokens of thinking and answer."""
    max_dollars: float | None = None
    """Stop before all answers, of earlier runs too, cost more than this. Until it is known what
    answers cost, no more are under way than have come."""

    def __post_init__(self) -> None:
        rules = [
            ("concurrency", self.concurrency >= 1, "at least 1"),
            ("requests_per_minute", 0 <= self.requests_per_minute < math.inf, "a number from 0"),
            ("attempts", self.attempts >= 1, "at least 1"),
            ("request_seconds", self.request_seconds > 0, "positive"),
            ("question_seconds", self.question_seconds > 0, "positive"),
            ("first_wait_seconds", 0 <= self.first_wait_seconds < math.inf, "a number from 0"),
            ("longest_wait_seconds", 0 <= self.longest_wait_seconds < math.inf, "a number from 0"),
            ("input_price", _is_price(self.input_price), "a number from 0"),
            ("output_price", _is_price(self.output_price), "a number from 0"),
            ("max_dollars", _is_price(self.max_dollars), "a number from 0"),
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


def _is_price(value: float | None) -> bool:
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
    cut: int = 0
    """Answers that the token limit ended."""
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

    def add(self, record: dict[str, Any], *, asked: bool = True) -> None:
        """Counts a record's price and, if this run's questions are its, the answer."""
        self.answered += asked and not record["refused"]
        self.refused += asked and bool(record["refused"])
        self.cut += asked and record["finish_reason"] in CUT
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
        text += f", {self.cut} of them cut by the token limit" if self.cut else ""
        text += f", {self.refused} refused" if self.refused else ""
        text += f", {len(self.failed)} failed" if self.failed else ""
        text += f", {self.unanswered} requests unanswered" if self.unanswered else ""
        text += f"; {self.prompt_tokens + self.output_tokens:,} tokens"
        if self.input_price is not None or self.output_price is not None:
            text += f", ${self.dollars:.4f}" + (f" of ${limit:g}" if limit is not None else "")
        return text


class Status:
    """A line about work under way: beside a bar on a terminal, every ten seconds elsewhere.

    Args:
        total: how much is to be done; None where nobody knows.
    """

    def __init__(self, console: Console, total: int | None) -> None:
        columns = (BarColumn(bar_width=24), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=console) if console.is_terminal else None
        self._console, self._total, self._printed = console, total, time.monotonic()

    def __enter__(self) -> Status:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, done: int, line: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=line)
        elif time.monotonic() - self._printed >= 10:
            self._printed = time.monotonic()
            self._console.print(line, highlight=False, soft_wrap=True)


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
        InputError: the key or model is wrong, the first questions all fail alike, the disk is full,
            the probe objects, or a limit was reached. Everything answered until then is stored.
    """
    asking = _Asking(teacher, tasks, store, pace, console)
    asking.meter.elsewhere = elsewhere
    return asyncio.run(asking.run(probe))


class _Asking:
    def __init__(
        self, teacher: Teacher, tasks: Sequence[Task], store: Store, pace: Pace, console: Console
    ) -> None:
        self._billed = teacher.identity["teacher"] != "engine"
        if not self._billed:  # it costs nothing, and takes the time it takes
            pace = replace(pace, request_seconds=math.inf, question_seconds=math.inf)
            pace = replace(pace, input_price=None, output_price=None, max_dollars=None)
        self._teacher, self._store, self._pace, self._console = teacher, store, pace, console
        self._queue = deque(task for task in tasks if task.key not in store)
        self._first = [task.key for task in self._queue][:PROBES]
        self._total, keys = len(tasks), {task.key for task in tasks}
        self.meter = Meter(pace.input_price, pace.output_price)
        for key, record in store.records():
            self.meter.add(record, asked=key in keys)
        self._before = self._total - len(self._queue), self.meter.output_tokens
        self._began = time.monotonic()
        self._num_under_way, self._num_stored = 0, len(store)
        self._next_turn = 0.0
        self._stop: Exception | None = None
        self._ended = asyncio.Event()  # an answer under way, or the run
        self._stopped = asyncio.Event()
        self._status = Status(console, self._total)

    async def run(self, probe: Probe | None) -> Meter:
        try:
            with self._drain_on_interrupt(), self._status:
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
        await self._ask(self._queue)

    def _first_answers(self) -> list[dict[str, Any]]:
        records = (record for _, record in self._store.records() if not record["refused"])
        return [record for record, _ in zip(records, range(PROBES), strict=False)]

    async def _ask(self, tasks: Iterable[Task]) -> None:
        """Sends them as the pace and the money allow; returns when all of it has ended."""
        async with asyncio.TaskGroup() as group:
            for task in tasks:
                while not self._may_send():
                    if self._stop:
                        return
                    self._ended.clear()
                    await self._ended.wait()
                self._num_under_way += 1
                group.create_task(self._answer(task))

    def _may_send(self) -> bool:
        """Whether one more question may be under way.

        The money must suffice if all of them are as dear as the dearest so far. Few answers tell
        little of that, so no more are under way than are stored.
        """
        pace, meter, limit = self._pace, self.meter, self._pace.max_dollars
        if self._stop or self._num_under_way >= pace.concurrency:
            return False
        if limit is None or not (pace.input_price or pace.output_price):
            return True
        likely = meter.dollars + meter.dearest * (self._num_under_way + 1)
        if not self._num_under_way and (meter.dollars >= limit or likely > limit):
            self._halt(
                InputError(
                    f"--max-dollars {limit:g}: reached, the next answer might cost more than is "
                    f"left of it ({meter.line(self._total, limit)}); all answers are kept in "
                    f"{self._store.path}"
                )
            )
        return likely <= limit and self._num_under_way < max(1, self._num_stored)

    async def _answer(self, task: Task) -> None:
        """One question to its end: stored, failed, or the run's end."""
        began = time.monotonic()
        try:
            reply, attempts = await self._attempts(task)
            record = {**task.extra, **vars(reply), "attempts": attempts}
            record["seconds"] = round(time.monotonic() - began, 3)
            self._store.put(task.key, record)
            self._num_stored += 1
            self.meter.add(record)
            if self._store.full:
                self._halt(
                    InputError(
                        f"{self._store.path}: the disk is full; every answer received is stored: "
                        "free space and run again"
                    )
                )
        except (Unavailable, Rejected) as error:
            self._fail(task, str(error))
        except Exception as error:  # the user's to mend, or our bug: the others' answers are paid
            self._halt(error)
        finally:
            self._num_under_way -= 1
            self._ended.set()
            self._show()

    async def _attempts(self, task: Task) -> tuple[Reply, int]:
        import tenacity

        pace = self._pace
        # question_seconds never cuts off an attempt under way, which will be billed.
        late = tenacity.stop_before_delay(pace.question_seconds)
        last = late | tenacity.stop_after_attempt(pace.attempts)
        drawn = tenacity.wait_random_exponential(pace.first_wait_seconds, pace.longest_wait_seconds)

        def wait(state: Any) -> float:
            return max(drawn(state), state.outcome.exception().retry_after_s)

        retrying = tenacity.AsyncRetrying(
            stop=lambda state: self._stop is not None or last(state),
            wait=wait,
            retry=tenacity.retry_if_exception_type(Unavailable),
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
        except Exception:  # but after a second Ctrl-C the note of the request stays
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
        """Notes why; the first questions all failing alike, what is wrong is wrong for every one.

        A store that holds an answer shows that its model can be asked.
        """
        if self._stop is not None:
            return
        self.meter.failed[task.key] = reason
        reasons = [self.meter.failed.get(key, "") for key in self._first]
        alike = {re.sub(r"\d+", "", reason) for reason in reasons}
        if len(reasons) == PROBES and len(alike) == 1 and reasons[0] and not self._num_stored:
            self._halt(
                InputError(
                    f"the first {PROBES} questions failed alike: {reasons[0]}; check the server, "
                    "--model and the sampling flags, or take these questions out"
                )
            )

    def _halt(self, error: Exception) -> None:
        self._stop = self._stop or error
        self._stopped.set()
        self._ended.set()

    # -- the terminal -----------------------------------------------------------------------

    @contextlib.contextmanager
    def _drain_on_interrupt(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM lets the answers under way arrive; a second ends at once."""
        loop = asyncio.get_running_loop()

        def as_before() -> None:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

        def interrupted() -> None:
            as_before()
            self._console.print(
                f"waiting for {self._num_under_way} answers under way, which will be billed; "
                "Ctrl-C again to lose them"
            )
            self._halt(InputError(f"interrupted; all answers are kept in {self._store.path}"))

        if not self._billed:
            yield
            return
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, interrupted)
        except (RuntimeError, ValueError):  # not the main thread: Ctrl-C is somebody else's
            yield
            return
        try:
            yield
        finally:
            as_before()

    def _show(self) -> None:
        done = self.meter.answered + self.meter.refused
        elapsed = time.monotonic() - self._began
        line = self.meter.line(self._total, self._pace.max_dollars)
        line += f", {(self.meter.output_tokens - self._before[1]) / elapsed:,.0f} tok/s"
        if done > self._before[0]:
            left = elapsed / (done - self._before[0]) * (self._total - done)
            line += f", eta {datetime.timedelta(seconds=round(left))}"
        self._status.show(done, line)
