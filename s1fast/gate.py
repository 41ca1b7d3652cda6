"""What stands before the server's routes: keys, limits, and an end for whatever goes wrong.

A body is read here, whole, before anything else sees it: within a limit of bytes and of time. What
an exception says may quote a prompt, so it is logged by its type and its places in the code alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import json
import logging
import time
import traceback
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from s1fast.refusals import Refused, error_body
from s1fast.replies import event

OPEN_PATHS = ("/", "/page.css", "/page.js", "/health", "/metrics")
"""What needs no key: it tells nothing of what anybody asked."""

READ_S = 30.0
"""Longest time that a body may take to arrive."""

READ_ON = 8
"""So many times its limit a body is read and dropped: who is still sending sees no answer."""

CLIENT_LEFT = 499
"""Status of a request whose client left, for the log and the metrics; nobody reads it."""

logger = logging.getLogger("s1fast.server")


def log(what: str, **fields: Any) -> None:
    """One line of JSON; never a prompt, an answer or a key."""
    logger.info({"event": what, **fields})


class JsonLines(logging.Formatter):
    """Our records, which are dicts, and the libraries' as JSON; of theirs the first line alone, for
    what follows may quote."""

    def format(self, record: logging.LogRecord) -> str:
        fields = record.msg
        if not isinstance(fields, dict):
            said = record.getMessage().partition("\n")[0]
            fields = {"event": "library", "logger": record.name, "text": said}
        now = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        return json.dumps({"time": f"{now}.{int(record.msecs):03d}Z", **fields})


def log_failure(name: str, error: BaseException) -> None:
    """An error of ours, by type and place."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno} {f.name}" for f in frames[-12:]]
    log("failure", id=name, error=type(error).__name__, at=places)


def failure_body(name: str) -> dict[str, Any]:
    """What the client is told of it."""
    message = f"the server failed on this request; its log has the reason under {name}"
    return error_body(500, message, code="internal_error")


def late_body(timeout_s: float) -> dict[str, Any]:
    """What the client is told whose time is up."""
    return error_body(504, f"the answer took over {timeout_s:g} s and was ended")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Gate:
    """The outermost layer of the application.

    Args:
        keys: any of them opens; with none the server must be bound to loopback, and then answers
            to no other name, so that no page of the web reaches it by one of its own.
        body_bytes: most bytes of a body.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], body_bytes: int) -> None:
        self._app, self._body_bytes = app, body_bytes
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = name
        started = False

        async def tagged(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode())]
            await send(message)

        try:
            headers = Headers(scope=scope)
            self._check(scope["path"], headers)
            body = await self._read(headers, receive)
            await self._app(scope, _replay(body, receive), tagged)
        except Refused as refused:
            log("refused", id=name, status=refused.status, path=scope["path"][:200])
            await refusal(refused)(scope, receive, tagged)
        except ConnectionResetError:  # the client left before its body was here
            return
        except Exception as error:
            log_failure(name, error)
            if not started:
                await JSONResponse(failure_body(name), 500)(scope, receive, tagged)

    def _check(self, path: str, headers: Headers) -> None:
        if path in OPEN_PATHS and (self._keys or path == "/health"):
            return
        if not self._keys:
            host = headers.get("host", "localhost")
            if not is_loopback(host.rpartition(":")[0] if _has_port(host) else host):
                raise Refused(403, f"without a key this server is localhost, not {host[:100]!r}")
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).digest()
        found = [hmac.compare_digest(digest, key) for key in self._keys]  # every one, always
        if scheme.lower() != "bearer" or not any(found):
            said = "the key is wrong" if given else "a key is needed"
            message = f"{said}: send Authorization: Bearer KEY"
            wanted = {"www-authenticate": "Bearer"}
            raise Refused(401, message, code="invalid_api_key", headers=wanted)

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        limit = self._body_bytes
        close = {"connection": "close"}
        refused = Refused(413, f"the body is above {limit} bytes", headers=close)
        declared = headers.get("content-length", "")
        waits = "expect" in headers  # for our word before it sends
        if declared.isdigit() and int(declared) > (1 if waits else READ_ON) * limit:
            raise refused
        chunks, size = [], 0
        try:
            async with asyncio.timeout(READ_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ConnectionResetError
                    chunk, more = message.get("body", b""), message.get("more_body", False)
                    size += len(chunk)
                    if size <= limit:
                        chunks.append(chunk)
                    elif not more or size > READ_ON * limit:
                        raise refused
                    if not more:
                        return b"".join(chunks)
        except TimeoutError:
            raise Refused(408, f"the body took over {READ_S:g} s", headers=close) from None


def _has_port(host: str) -> bool:
    return ":" in host and not host.endswith("]")


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once more, and then what really comes: the end of the connection."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return first.pop() if first else await receive()

    return again


def refusal(refused: Refused) -> Response:
    """As ASCII: what it quotes of a request may be no valid Unicode."""
    text = json.dumps(refused.body)
    return Response(text, refused.status, refused.headers, "application/json")


async def gone(receive: Receive) -> None:
    """Returns when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events until they end, the client leaves, or the time is up.

    Args:
        events: closed in every case, at once, whatever it is waiting for.
        ended: told of the status that it came to, 499 where the client left.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes], timeout_s: float, ended: Callable[[int], None]
    ) -> None:
        self._events, self._timeout_s, self._ended = events, timeout_s, ended
        super().__init__(events, headers={"cache-control": "no-store"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        late = False
        try:
            async with asyncio.timeout(self._timeout_s):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            late = True
        finally:
            await self._events.aclose()
            self._ended(504 if late else CLIENT_LEFT)
        if late:
            last = event(late_body(self._timeout_s))
            with contextlib.suppress(Exception):
                async with asyncio.timeout(5):
                    await send({"type": "http.response.body", "body": last, "more_body": False})
