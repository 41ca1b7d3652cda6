"""A Gemini server on loopback that fails in every way a real one does, and keeps the books.

Run as a program it serves until it is killed, so that a client can be killed and come back.
"""

from __future__ import annotations

import collections
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("429", "500", "slow", "truncated", "short-json", "hang-up", "garbled")


class FakeGemini(ThreadingHTTPServer):
    """`paid` counts whole answers sent for a question; `tokens` what they are billed as."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, *, delay_s: float = 0.0, faults: bool = True, thoughts: str = "raw") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.delay_s, self.faults, self.thoughts = delay_s, faults, thoughts
        self.paid: collections.Counter[str] = collections.Counter()
        self.seen: collections.Counter[str] = collections.Counter()
        self.fault_counts: collections.Counter[str] = collections.Counter()
        self.tokens = [0, 0]
        self.keys: set[str] = set()
        self.active = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no news."""


def answer(question: str, thoughts: str) -> dict[str, Any]:
    """A refusal for one question in twenty, else thinking and an answer that quote it."""
    digest = int(hashlib.sha256(question.encode()).hexdigest(), 16)
    counts = {"promptTokenCount": 10 + digest % 7, "totalTokenCount": 0}
    if digest % 20 == 7:
        return {
            "candidates": [{"finishReason": "RECITATION"}],
            "usageMetadata": counts,
        }
    length = 40 + digest % 60
    text = {"raw": "Then I check it." * (length // 4), "summary": "Checked.", "none": ""}[thoughts]
    parts = [{"text": text, "thought": True}] if text else []
    half = "\ud83d" if question.startswith("Half") else ""  # a character that a limit cut in two
    parts.append({"text": f"It follows that Answer: {digest % 100}{half}"})
    usage = {**counts, "thoughtsTokenCount": length, "candidatesTokenCount": 9}
    content = {"role": "model", "parts": parts}
    return {
        "candidates": [{"content": content, "finishReason": "STOP"}],
        "usageMetadata": usage,
    }


def judge(question: str, role: str) -> dict[str, Any]:
    """What a grader or, else, a classifier says: Yes to half, one of the first eight subjects."""
    digest = int(hashlib.sha256(question.encode()).hexdigest(), 16)
    text = "I compared them.\n" + ("No", "Yes")[digest % 2]
    if "Yes or No" not in role:
        listed = question.split("## Subjects\n")[1].splitlines()
        text = f"Its methods are those of {listed[digest % 8][:2]}"
    content = {"role": "model", "parts": [{"text": text}]}
    usage = {"promptTokenCount": 9, "candidatesTokenCount": 8}
    return {"candidates": [{"content": content, "finishReason": "STOP"}], "usageMetadata": usage}


class Handler(BaseHTTPRequestHandler):
    server: FakeGemini
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        with self.server.lock:
            self.server.active += 1
        try:
            self._serve()
        finally:
            with self.server.lock:
                self.server.active -= 1

    def _serve(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["contents"][0]["parts"][0]["text"]
        server = self.server
        with server.lock:
            server.keys.add(self.headers.get("x-goog-api-key", ""))
            turn = server.seen[question]
            server.seen[question] += 1
        if self.headers.get("x-goog-api-key") != "right-key":
            return self._error(400, "INVALID_ARGUMENT", "API key not valid.")
        if "/models/known:" not in self.path:
            return self._error(404, "NOT_FOUND", "no such model")
        if question.startswith("Down"):
            return self._error(503, "UNAVAILABLE", f"overloaded, come back in {turn} s")
        if question.startswith("Too long"):
            return self._error(400, "INVALID_ARGUMENT", f"{len(question)} tokens are too many")
        first, second = hashlib.sha256(question.encode()).digest()[:2]
        if server.faults and turn == 0 and first % 3 == 0:
            return self._fault(FAULTS[second % len(FAULTS)], question)
        time.sleep(server.delay_s)
        reply = answer(question, server.thoughts)
        if "systemInstruction" in body:
            if "thinkingConfig" in body.get("generationConfig", {}):
                return self._error(400, "INVALID_ARGUMENT", "this model does not think")
            role = body["systemInstruction"]["parts"][0]["text"]
            reply = judge(question, role)
        self._send(200, json.dumps(reply).encode())
        usage = reply["usageMetadata"]
        with server.lock:
            server.paid[question] += 1
            server.tokens[0] += usage["promptTokenCount"]
            server.tokens[1] += usage.get("thoughtsTokenCount", 0)
            server.tokens[1] += usage.get("candidatesTokenCount", 0)

    def _fault(self, fault: str, question: str) -> None:
        with self.server.lock:
            self.server.fault_counts[fault] += 1
        if fault == "429":
            self._error(429, "RESOURCE_EXHAUSTED", "slow down", {"Retry-After": "0.05"})
        elif fault == "500":
            self._error(500, "INTERNAL", "try again")
        elif fault == "slow":
            time.sleep(3.0)  # beyond the client's limit in most tests; nothing is answered
            self.close_connection = True
        else:
            raw = json.dumps(answer(question, "raw")).encode()
            cut = raw[: len(raw) // 2]
            if fault == "hang-up":
                cut = b""
            promised = len(cut) if fault in ("short-json", "garbled") else len(raw)
            coding = {"Content-Encoding": "gzip"} if fault == "garbled" else {}
            self._send(200, cut, coding, length=promised)
            self.close_connection = True

    def _error(self, code: int, status: str, text: str, headers: dict[str, str] = {}) -> None:  # noqa: B006
        error = {"error": {"code": code, "status": status, "message": text}}
        self._send(code, json.dumps(error).encode(), headers)

    def _send(
        self,
        code: int,
        body: bytes,
        headers: dict[str, str] = {},  # noqa: B006
        length: int | None = None,
    ) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        pass
