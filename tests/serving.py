"""A server for tests: in this process, where its engine can be looked at, or in one of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from s1fast.decoder import Engine
from s1fast.server import bind, make_app, uvicorn_config
from s1fast.service import ServeConfig

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 60.0
"""After so long a request counts as hung."""


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    data: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def events(self) -> list[Any]:
        """The chunks of a stream; its [DONE] is the text "[DONE]"."""
        datas = [d.removeprefix("data: ") for d in self.data.decode().split("\n\n") if d]
        return [d if d == "[DONE]" else json.loads(d) for d in datas]


class Client:
    """Bare HTTP, a connection a request."""

    def __init__(self, port: int, key: str = "") -> None:
        self.port, self.key = port, key

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            connection.request(method, path, body, {**self._headers(), **(headers or {})})
            response = connection.getresponse()
            found = {k.lower(): v for k, v in response.getheaders()}
            return Answer(response.status, found, response.read())

    def _headers(self) -> dict[str, str]:
        known = {"Content-Type": "application/json"}
        return {**known, "Authorization": f"Bearer {self.key}"} if self.key else known

    def get(self, path: str) -> Answer:
        return self.send("GET", path)

    def post(self, path: str, body: Any) -> Answer:
        return self.send("POST", path, json.dumps(body).encode())

    def chat(self, text: str = "1 + 1?", **fields: Any) -> Answer:
        messages = [{"role": "user", "content": text}]
        return self.post("/v1/chat/completions", {"messages": messages, **fields})

    def begin(self, text: str = "1 + 1?", **fields: Any) -> socket.socket:
        """Sends a chat and returns its connection without reading the answer."""
        body = json.dumps({"messages": [{"role": "user", "content": text}], **fields}).encode()
        head = "".join(f"{k}: {v}\r\n" for k, v in self._headers().items())
        asked = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)
        asked.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n{head}"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        return asked

    def metric(self, name: str) -> float:
        """The sum over labels of a metric."""
        text = self.get("/metrics").data.decode()
        found = re.findall(rf"^s1fast:{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        assert found, f"no metric {name}"
        return sum(map(float, found))


class InProcess(Client):
    """A server on a thread of this process."""

    def __init__(self, engine: Engine, keys: Sequence[str] = (), **config: Any) -> None:
        self.engine = engine
        app = make_app(engine, "tiny", ServeConfig(**config), list(keys))
        bound = bind("127.0.0.1", 0)
        super().__init__(bound.getsockname()[1], keys[0] if keys else "")
        self.server = uvicorn.Server(uvicorn_config(app, drain_s=5))
        self._thread = threading.Thread(target=self.server.run, args=([bound],))
        self._thread.start()
        wait_until(lambda: self.server.started)

    def idle(self) -> None:
        """Waits until nothing is decoded any more; no page may be held then."""
        wait_until(lambda: self.engine.pages.held == 0 and self.engine._thread is None)

    def close(self) -> None:
        self.server.should_exit = True
        self._thread.join()


@contextlib.contextmanager
def in_process(engine: Engine, keys: Sequence[str] = (), **config: Any) -> Iterator[InProcess]:
    served = InProcess(engine, keys, **config)
    try:
        yield served
    finally:
        served.close()


class Process(Client):
    """`s1fast serve` as a user starts it."""

    def __init__(self, model: Path, log: Path, *flags: str, port: int = 0, **environ: str) -> None:
        command = [sys.executable, "-m", "s1fast", "serve", str(model), "--port", str(port), *flags]
        self.log = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=file, env={**os.environ, **environ}
            )
        wait_until(lambda: self._said("serving") or self.process.poll() is not None)
        said = self._said("serving")
        assert said, log.read_text()
        super().__init__(int(said[-1]["url"].rpartition(":")[2]), environ.get("S1FAST_API_KEY", ""))

    def _said(self, event: str) -> list[dict[str, Any]]:
        lines = [line for line in self.log.read_text().splitlines() if line.startswith("{")]
        found = [json.loads(line) for line in lines]
        return [f for f in found if f["event"] == event and f.get("pid") in (None, self.pid)]

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def resident_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise
        self.process.wait()


def wait_until(holds: Any, seconds: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it does not come to hold"
        time.sleep(0.01)
