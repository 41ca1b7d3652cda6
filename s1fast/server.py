"""`s1fast serve`: the engine behind OpenAI's HTTP interface, and a page to watch it think.

POST /v1/chat/completions   POST /v1/completions   GET /v1/models   GET /health   GET /metrics
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request as Http
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from s1fast.decoder import Engine
from s1fast.errors import InputError
from s1fast.files import read_bytes
from s1fast.gate import (
    EventStream,
    Gate,
    JsonLines,
    failure_body,
    is_loopback,
    log,
    logger,
    refusal,
)
from s1fast.protocol import Asked, ChatAsked, CompletionAsked
from s1fast.refusals import Refused, refused_fields
from s1fast.request import SamplingParams
from s1fast.service import ServeConfig, Service

PAGE = Path(__file__).resolve().parent / "page"
PAGE_FILES = {"/": "text/html", "/page.css": "text/css", "/page.js": "text/javascript"}
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
HEAD_S = 20.0
"""Longest time that a connection may be silent at first, and a request's head may take."""
HEAD_BYTES = 1 << 20
"""Most bytes of a head, counted with what comes in the same read."""


# -- the application ----------------------------------------------------------------------------


def make_app(engine: Engine, model: str, config: ServeConfig, keys: list[str]) -> ASGIApp:
    """The server as an ASGI application, on an engine that is there."""
    service = Service(engine, model, config)
    app = FastAPI(title="s1fast", docs_url=None, redoc_url=None)

    async def answer(asked: Asked, http: Http) -> Response:
        job = await service.submit(asked, http.state.request_id)
        if asked.stream:
            ended = functools.partial(service.end, job)
            return EventStream(service.events(job), config.timeout_s, ended)
        return await service.whole(job, http.receive)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(asked: ChatAsked, http: Http) -> Response:
        return await answer(asked, http)

    @app.post("/v1/completions", response_model=None)
    async def completions(asked: CompletionAsked, http: Http) -> Response:
        return await answer(asked, http)

    card = {"id": model, "object": "model", "created": service.created, "owned_by": "s1fast"}
    card |= {"max_model_len": engine.context}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != model:
            message = f"model: there is no {name[:200]!r} here, only {model!r}"
            raise Refused(404, message, "model", "model_not_found")
        return card

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def health(_: Http) -> Response:
        return Response(status_code=200 if engine.alive else 503)

    app.router.routes.append(Route("/health", health, methods=["GET"]))
    same = {}
    for path, kind in PAGE_FILES.items():
        text = (PAGE / (path[1:] or "index.html")).read_bytes()
        same[path] = Response(text, media_type=kind, headers=PAGE_HEADERS)
    app.router.routes += [Route(path, always, methods=["GET"]) for path, always in same.items()]

    @app.exception_handler(Refused)
    async def refused(http: Http, error: Refused) -> Response:
        service.metrics.ended.labels(model, error.status).inc()
        name, path = http.state.request_id, http.url.path[:200]
        log("refused", id=name, status=error.status, path=path, param=error.param)
        return refusal(error)

    @app.exception_handler(RequestValidationError)
    async def wrong_fields(http: Http, error: RequestValidationError) -> Response:
        asked = ChatAsked if "chat" in http.url.path else CompletionAsked
        return await refused(http, refused_fields(error.errors(), asked))

    @app.exception_handler(HTTPException)
    async def wrong_route(http: Http, error: HTTPException) -> Response:
        said = f"{http.method} {http.url.path[:200]}: {error.detail}"
        if error.status_code == 400:
            said = "the body is not valid JSON"
        return await refused(http, Refused(error.status_code, said))

    @app.exception_handler(Exception)
    async def failed(http: Http, error: Exception) -> Response:
        return JSONResponse(failure_body(http.state.request_id), 500)  # the gate logs it

    return Gate(app, keys, config.body_bytes)


# -- the process --------------------------------------------------------------------------------


class _Protocol(HttpToolsProtocol):
    """Closes a connection whose request is not begun, or its head not whole, in time and bytes."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def _await_head(self) -> None:
        self._late = self.loop.call_later(HEAD_S, self.transport.close)
        self._head_bytes = 0

    def data_received(self, data: bytes) -> None:
        if not self._late.cancelled():
            self._head_bytes += len(data)
        if self._head_bytes > HEAD_BYTES:
            self.transport.close()
        else:
            super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._late.cancel()
        self._await_head()

    def on_headers_complete(self) -> None:
        self._late.cancel()
        self._head_bytes = 0
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._late.cancel()
        super().connection_lost(exc)


def uvicorn_config(app: ASGIApp, drain_s: int) -> uvicorn.Config:
    """How the application is run; what our log tells uvicorn need not."""
    return uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=drain_s,
    )


class _Uvicorn(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for bound in sockets or []:
            host, port = bound.getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            log("serving", url=f"http://{host}:{port}", pid=os.getpid())


def serve(model: str, config: ServeConfig) -> None:
    """Serves until SIGTERM or SIGINT, then lets requests that run finish.

    Raises:
        InputError: a public address without a key, an address that is taken, a model that cannot
            be loaded.
    """
    keys = _keys(config)
    if not keys and not is_loopback(config.host):
        raise InputError(
            f"--host {config.host}: whoever reaches it could use the model; set S1FAST_API_KEY or "
            "--api-key-file, or listen on 127.0.0.1"
        )
    with bind(config.host, config.port) as bound:
        engine = Engine(
            model,
            **vars(config.engine),
            max_batch=config.max_batch,
            step_tokens=max(512, config.max_batch),
            cache_tokens=config.cache_tokens,
        )
        _warm(engine)
        name = config.served_model_name or Path(model).name
        settings = uvicorn_config(make_app(engine, name, config, keys), config.drain_s)
        _log_to_stderr()
        _raise_file_limit()
        # uvicorn drains on SIGTERM, then raises it anew: that it was told to end is no failure.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        try:
            _Uvicorn(settings).run(sockets=[bound])
        finally:
            log("ended")
            engine.close()


def _keys(config: ServeConfig) -> list[str]:
    """The keys of the environment and the file. Raises an InputError on a file without any."""
    keys = os.environ.get("S1FAST_API_KEY", "").split(",")
    if config.api_key_file is not None:
        lines = read_bytes(config.api_key_file).decode("utf-8", "replace").split("\n")
        if not any(line.strip() for line in lines):
            raise InputError(f"--api-key-file {config.api_key_file}: holds no key")
        keys += lines
    return [key.strip() for key in keys if key.strip()]


def bind(host: str, port: int) -> socket.socket:
    """A socket that is told its protocol: asyncio sends small chunks at once on no other.

    Raises:
        InputError: an address that is not this machine's, or taken.
    """
    bound = None
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, socket.IPPROTO_TCP)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen()  # two that start at once learn it now, not when their models are loaded
        return bound
    except OSError as error:
        if bound is not None:
            bound.close()
        raise InputError(f"--host {host} --port {port}: {error.strerror}; choose another") from None


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in ((logger.name, "INFO"), ("uvicorn.error", "WARNING"), ("asyncio", "ERROR")):
        each = logging.getLogger(name)
        each.handlers, each.propagate = [handler], False
        each.setLevel(level)


def _raise_file_limit() -> None:
    """As many connections as the system lets us have."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # elsewhere than on Linux
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _warm(engine: Engine) -> None:
    """What the first request would wait for otherwise."""
    ids = engine.chat.prompt_ids("Hi", think=True)
    _ = engine.chat.ends_in_newline
    with contextlib.suppress(InputError):  # a context too small for it is told to who asks
        engine.generate([ids], SamplingParams(max_tokens=1))
