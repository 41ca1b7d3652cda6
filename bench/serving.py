"""What the server adds to a token: streams over HTTP beside the same streams from the engine here.

    overhead of a token = (time between tokens over HTTP - the engine's own) / streams at once

Both have the same prompts, as token ids, and take turns, so that whatever else the machine does
falls on both; each stream's times are taken where its reader gets them. The server is a process of
its own, as `s1fast serve` starts it, and this one is its client.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

from s1fast.bench.environment import save
from s1fast.decoder import Engine
from s1fast.request import Piece, SamplingParams

PROMPT = 32
"""Tokens of a prompt."""


@dataclass
class Times:
    """Of some streams: to their first tokens, and between the following."""

    first_s: list[float] = field(default_factory=list)
    gap_s: list[float] = field(default_factory=list)

    def add(self, began_s: float, came_s: list[float]) -> None:
        self.first_s.append(came_s[0] - began_s)
        self.gap_s += [b - a for a, b in pairwise(came_s)]


Stream = Callable[[list[int], int], Awaitable[list[float]]]
"""Runs a prompt for so many tokens; when each came."""


def of_engine(engine: Engine) -> Stream:
    async def stream(prompt: list[int], tokens: int) -> list[float]:
        pieces = engine.stream_async(prompt, SamplingParams(max_tokens=tokens))
        return [time.perf_counter() async for item in pieces if isinstance(item, Piece)]

    return stream


def of_server(port: int) -> Stream:
    async def stream(prompt: list[int], tokens: int) -> list[float]:
        body = json.dumps({"prompt": prompt, "max_tokens": tokens, "stream": True}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        came_s = []
        while line := await reader.readline():
            if b'"kind":' in line:
                came_s.append(time.perf_counter())
        writer.close()
        await writer.wait_closed()
        return came_s

    return stream


async def together(stream: Stream, prompts: list[list[int]], tokens: int) -> Times:
    """All prompts at once."""
    times = Times()

    async def one(prompt: list[int]) -> None:
        began_s = time.perf_counter()
        times.add(began_s, await stream(prompt, tokens))

    await asyncio.gather(*map(one, prompts))
    return times


def measure(model: str, streams: list[int], tokens: int, rounds: int) -> dict[str, Any]:
    """By number of streams at once: milliseconds to the first token and between tokens, over HTTP
    and of the engine, and what the server adds to a token, in microseconds."""
    engine = Engine(model)
    rng = random.Random(0)
    found: dict[str, Any] = {}
    command = [sys.executable, "-m", "s1fast", "serve", model, "--port", "0"]
    command += ["--queue", str(max(streams))]
    with tempfile.NamedTemporaryFile() as log, subprocess.Popen(command, stderr=log) as server:
        try:
            while not (told := Path(log.name).read_text()).endswith("\n"):
                assert server.poll() is None, told
                time.sleep(0.05)
            port = int(json.loads(told.splitlines()[0])["url"].rpartition(":")[2])
            ways = {"http": of_server(port), "engine": of_engine(engine)}
            for count in streams:
                taken: dict[str, list[Times]] = {name: [] for name in ways}
                for number in range(rounds + 1):
                    ids = range(3, engine.chat.vocab_size)
                    prompts = [rng.choices(ids, k=PROMPT) for _ in range(count)]
                    for name, stream in ways.items():
                        times = asyncio.run(together(stream, prompts, tokens))
                        if number:  # the first round warms up
                            taken[name].append(times)
                found[str(count)] = _row(taken, count)
        finally:
            server.terminate()
    return found


def _row(taken: dict[str, list[Times]], count: int) -> dict[str, float]:
    row = {}
    for name, rounds in taken.items():
        row[f"{name} first ms"] = 1e3 * median(mean(times.first_s) for times in rounds)
        row[f"{name} between ms"] = 1e3 * median(mean(times.gap_s) for times in rounds)
    row["added us a token"] = 1e3 * (row["http between ms"] - row["engine between ms"]) / count
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default=".models/smollm2-135m")
    parser.add_argument("--streams", default="1,8", help="streams at once, several with commas")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    streams = [int(count) for count in asked.streams.split(",")]
    found = measure(asked.model, streams, asked.tokens, asked.rounds)
    for count, row in found.items():
        print(f"{count:>4} streams" + "".join(f"  {name} {x:.2f}" for name, x in row.items()))
    name = Path(asked.model).name
    print(save("serving", {"model": name, "tokens": asked.tokens, "streams": found}))


if __name__ == "__main__":
    main()
