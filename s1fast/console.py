"""Showing a generation on the terminal: thinking dimmed, interventions marked."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable

from rich.console import Console

from s1fast.decoder import Completion, Piece


def print_stream(stream: Iterable[Piece | Completion], *, as_json: bool = False) -> Completion:
    """Prints pieces as they come and a line of totals at the end; returns the Completion."""
    console = Console(highlight=False, soft_wrap=True)
    began = time.perf_counter()
    for item in stream:
        if isinstance(item, Completion):
            _print_totals(item, time.perf_counter() - began, console, as_json)
            return item
        if not as_json:
            _print_piece(item, console)
    raise AssertionError("a stream ends with its Completion")


STYLES = {"thinking": "dim", "ignore": "bold yellow", "end": "bold cyan", "answer": ""}


def _print_piece(piece: Piece, console: Console) -> None:
    text = piece.text
    if piece.kind in ("ignore", "end") and not console.is_terminal:
        text = f"[{text}]"  # without colours the mark is a pair of brackets
    console.print(text, style=STYLES[piece.kind], end="", markup=False)


def _print_totals(done: Completion, wall_s: float, console: Console, as_json: bool) -> None:
    count = len(done.token_ids)
    if as_json:
        values = dataclasses.asdict(done)
        del values["index"], values["sample"]
        print(json.dumps({**values, "wall_s": wall_s}))
        return
    console.print(
        f"\n{count} tokens, {done.thinking_tokens} of them thinking; {done.waits_used} waits; "
        f"thinking ended: {done.thinking_end}; finish: {done.finish_reason}; "
        f"{count / wall_s:.1f} tok/s",
        style="italic",
    )
