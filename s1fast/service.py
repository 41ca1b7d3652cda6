"""Requests in, answers out: what lies between the server's routes and the engine.

Texts become ids on threads beside the event loop; the engine's own thread decodes. A request is
cancelled, and its pages are free after the step that runs, when its client leaves, streaming or
not, when its time is up, and when the server ends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive

from s1fast.decoder import Engine
from s1fast.errors import InputError
from s1fast.flags import EngineFlags
from s1fast.gate import CLIENT_LEFT, failure_body, gone, late_body, log, log_failure
from s1fast.handle import Handle
from s1fast.protocol import MOST_CHOICES, Asked, ChatAsked, Defaults, to_requests
from s1fast.refusals import Refused, refused_input
from s1fast.replies import DONE, Writer, event, usage
from s1fast.request import Completion, Piece
from s1fast.server_metrics import ServerMetrics, Timing

RETRY_AFTER_S = 2


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Serve a model over OpenAI's HTTP interface, with a page at / on which one watches it think.

    Keys are read from the environment variable S1FAST_API_KEY (several with commas) or from a file.
    """

    host: str = "127.0.0.1"
    """Address to listen on; one that other machines reach needs a key."""
    port: int = 8000
    """0 takes any that is free; the first line of the log tells it."""
    api_key_file: Path | None = None
    """File with a key a line."""
    served_model_name: str = ""
    """Name of the model for clients; the last part of MODEL unless given."""
    defaults: Defaults = field(default_factory=Defaults)
    queue: int = 256
    """Most choices that run or wait; who comes then is told to come again (429)."""
    body_bytes: int = 4 << 20
    """Largest body of a request (413)."""
    timeout_s: float = 1800.0
    """Longest time that a request may take."""
    drain_s: int = 30
    """After SIGTERM: how long requests that run may take to finish."""
    max_batch: int = 64
    """Choices that are decoded together."""
    cache_tokens: int | None = None
    """Positions of the KV cache; unless given, 2 GiB of them on a CPU, what is free on a GPU."""
    engine: EngineFlags = field(default_factory=EngineFlags)

    def __post_init__(self) -> None:
        rules = [
            ("port", 0 <= self.port < 1 << 16, "in 0..65535"),
            ("queue", self.queue >= 1, "at least 1"),
            ("body_bytes", self.body_bytes >= 1024, "at least 1024"),
            ("timeout_s", self.timeout_s > 0, "above 0"),
            ("drain_s", self.drain_s >= 0, "0 or more"),
        ]
        for name, holds, rule in rules:
            if not holds:
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{flag}: must be {rule}, got {getattr(self, name)!r}")


@dataclass
class _Job:
    """A request on its way."""

    name: str
    asked: Asked
    writer: Writer
    handles: list[Handle]
    timing: Timing
    choices: int
    done: dict[int, Completion] = field(default_factory=dict)
    """By choice, as they come."""
    open: bool = True

    @property
    def completions(self) -> list[Completion]:
        """All of them, once they are done."""
        return [self.done[index] for index in range(self.choices)]


class Service:
    """Requests in, answers out, between the routes and the engine."""

    def __init__(self, engine: Engine, model: str, config: ServeConfig) -> None:
        self.engine, self.model, self.config = engine, model, config
        self.metrics = ServerMetrics(engine, model)
        self.created = int(time.time())
        self._open = 0
        """Choices that run or wait."""

    # -- in ---------------------------------------------------------------------------------

    async def submit(self, asked: Asked, name: str) -> _Job:
        """Queues what is asked.

        Raises:
            Refused: what cannot be honoured, or not now.
        """
        if asked.model not in (None, self.model):
            message = f"model: there is no {asked.model[:200]!r} here, only {self.model!r}"
            raise Refused(404, message, "model", "model_not_found")
        choices, most = asked.choices, min(MOST_CHOICES, self.config.queue)
        if choices > most:
            param = next(iter(asked.given(("n", "budgets", "num_ignores"))), asked.prompt_field)
            parts = "n for each of prompts, budgets and num_ignores"
            raise Refused(400, f"{param}: {choices} choices ({parts}), at most {most}", param)
        if self._open + choices > self.config.queue:
            again = {"retry-after": str(RETRY_AFTER_S)}
            message = f"the queue of {self.config.queue} is full; come again in {RETRY_AFTER_S} s"
            raise Refused(429, message, code="queue_full", headers=again)
        self._open += choices
        timing = Timing(self.metrics)
        work = asyncio.get_running_loop().run_in_executor(None, self._submit, asked)
        try:
            handles = await asyncio.shield(work)
        except BaseException as error:
            work.add_done_callback(_cancel_made)  # where the wait alone ended
            self._open -= choices
            timing.end(whole=False)
            if isinstance(error, InputError):
                raise refused_input(error, asked, self.engine.chat) from None
            raise
        prefix = "chatcmpl" if isinstance(asked, ChatAsked) else "cmpl"
        marker = self.engine.chat.markers.answer
        writer = Writer(asked, f"{prefix}-{name}", marker, self.model, int(time.time()))
        return _Job(name, asked, writer, handles, timing, choices)

    def _submit(self, asked: Asked) -> list[Handle]:
        """Texts to ids, and ids to the engine; on a thread."""
        engine = self.engine
        requests = to_requests(asked, engine.chat, engine.context, self.config.defaults)
        handles: list[Handle] = []
        try:
            for request in requests:
                handles.append(engine.submit(request))
        except BaseException:
            _cancel_all(handles)
            raise
        return handles

    # -- out --------------------------------------------------------------------------------

    async def whole(self, job: _Job, receive: Receive) -> Response:
        """The answer in one piece."""
        work = asyncio.create_task(self._collect(job))
        left = asyncio.create_task(gone(receive))
        status = 500
        try:
            done, _ = await asyncio.wait(
                (work, left), timeout=self.config.timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if work in done:
                work.result()
                body = job.writer.whole(job.completions, len(job.handles))
                status = 200
                return JSONResponse(body)
            status = CLIENT_LEFT if done else 504
            return JSONResponse(late_body(self.config.timeout_s), status)  # or to nobody
        finally:
            self.end(job, status)
            for task in (work, left):
                task.cancel()

    async def _collect(self, job: _Job) -> None:
        async def one(number: int) -> None:
            async for _ in self._read(job, number):
                pass

        await asyncio.gather(*map(one, range(len(job.handles))))

    async def events(self, job: _Job) -> AsyncGenerator[bytes]:
        """The answer as a stream of chunks."""
        writer = job.writer
        untold: dict[int, int] = {}
        try:
            for chunk in writer.opening(job.choices):
                yield chunk
            async for index, item in self._read(job, 0):
                if isinstance(item, Completion):
                    yield writer.closing(index, item)
                    continue
                untold[index] = untold.get(index, 0) + len(item.ids)
                if item.text or item.kind in ("ignore", "end"):
                    yield writer.piece(index, item, untold.pop(index))
            options = job.asked.stream_options
            if options is not None and options.include_usage:
                yield writer.usage(job.completions)
            self.end(job, 200)
            yield DONE
        except Exception as error:
            self.end(job, 500)
            log_failure(job.name, error)
            yield event(failure_body(job.name))

    async def _read(self, job: _Job, number: int) -> AsyncIterator[tuple[int, Piece | Completion]]:
        """What the engine gives for a prompt, by choice, counted on the way."""
        count = job.choices // len(job.handles)
        first = number * count
        async for place, item in job.handles[number].live():
            index = first + place
            if isinstance(item, Piece):
                job.timing.piece(index)
            else:
                job.done[index] = item
                self.metrics.finished(item, job.timing.since_first_s(index))
            yield index, item
        self.metrics.prompt_done([job.done[first + place] for place in range(count)])

    def end(self, job: _Job, status: int) -> None:
        """The end of a request, of whatever kind; once."""
        if not job.open:
            return
        job.open = False
        _cancel_all(job.handles)
        job.timing.end(whole=status == 200)
        self._open -= job.choices
        self.metrics.ended.labels(self.model, status).inc()
        fields: dict[str, Any] = {"choices": job.choices, "stream": bool(job.asked.stream)}
        if len(job.done) == job.choices:
            counts = usage(job.completions, len(job.handles))
            fields |= {"prompt_tokens": counts["prompt_tokens"], **counts["s1"]}
            fields |= {"completion_tokens": counts["completion_tokens"]}
        if job.timing.first_s:
            fields["first_token_s"] = round(job.timing.first_s - job.timing.began_s, 4)
        wall_s = round(time.perf_counter() - job.timing.began_s, 4)
        log("request", id=job.name, status=status, wall_s=wall_s, **fields)


def _cancel_all(handles: list[Handle]) -> None:
    for handle in handles:
        handle.cancel()


def _cancel_made(work: asyncio.Future[list[Handle]]) -> None:
    if not work.cancelled() and work.exception() is None:
        _cancel_all(work.result())
