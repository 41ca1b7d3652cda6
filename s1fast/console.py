"""A generation on the terminal: thinking dimmed, interventions marked, a grid as a table."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from s1fast.decoder import Completion, Piece
from s1fast.request import cost


def print_stream(
    stream: Iterable[Piece | Completion], *, as_json: bool = False
) -> list[Completion]:
    """Prints pieces as they come and totals at the end; returns the Completions."""
    console = Console(highlight=False, soft_wrap=True)
    began, first_s = time.perf_counter(), 0.0
    done: list[Completion] = []
    for item in stream:
        first_s = first_s or time.perf_counter() - began
        if isinstance(item, Completion):
            done.append(item)
        elif not as_json:
            _print_piece(item, console)
    wall_s = time.perf_counter() - began
    if as_json:
        print(json.dumps(_as_json(done, wall_s, first_s)))
    elif len(done) == 1:
        _print_totals(done[0], wall_s, first_s, console)
    else:
        _print_grid(done, wall_s, console)
    return done


STYLES = {"thinking": "dim", "ignore": "bold yellow", "end": "bold cyan", "answer": ""}


def inert(text: str) -> str:
    """Text that moves no cursor and rings no bell, whatever the model wrote."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _print_piece(piece: Piece, console: Console) -> None:
    text = inert(piece.text)
    if piece.kind in ("ignore", "end") and not console.is_terminal:
        text = f"[{text}]"  # without colours the mark is a pair of brackets
    console.print(text, style=STYLES[piece.kind], end="", markup=False)


def _print_totals(done: Completion, wall_s: float, first_s: float, console: Console) -> None:
    count = len(done.token_ids)
    appended = sum(len(p.ids) for p in done.pieces if p.kind in ("ignore", "end"))
    console.print(
        f"\n{count} tokens, {done.thinking_tokens} of them thinking; {done.waits_used} waits, "
        f"{appended} tokens appended; thinking ended: {done.thinking_end}; "
        f"finish: {done.finish_reason}; {count / wall_s:.1f} tok/s, first after {first_s:.2f} s",
        style="italic",
    )


def _print_grid(done: Sequence[Completion], wall_s: float, console: Console) -> None:
    """The curve of one prompt: a line for every budget and number of ignores."""
    table = Table(title="one decode, every budget", title_justify="left")
    for name in ("budget", "ignores", "thinking", "waits", "ended", "answer"):
        left = name in ("ended", "answer")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    room = max(20, console.width - 56)  # what the other columns leave
    for c in done:
        budget, ignores = ("none", "none")
        if c.budget is not None:
            budget, ignores = (
                "none" if x is None else str(x)
                for x in (c.budget.max_thinking_tokens, c.budget.num_ignore)
            )
        forced = c.budget.final_text if c.budget and c.thinking_end == "length" else ""
        answer = inert(" ".join(c.answer.strip().removeprefix(forced).split()))
        if len(answer) > room:
            answer = answer[: room - 1] + "…"
        cells = (budget, ignores, str(c.thinking_tokens), str(c.waits_used), str(c.thinking_end))
        table.add_row(*cells, escape(answer))
    total = cost(done)
    console.print()
    console.print(table)
    console.print(
        f"{total.steps} steps and {total.tokens} tokens in {wall_s:.1f} s; one by one "
        f"{total.separate_steps} steps and {total.separate_tokens} tokens",
        style="italic",
    )


def _as_json(done: Sequence[Completion], wall_s: float, first_s: float) -> dict[str, object]:
    """One completion as it is; several as a list with what they cost."""
    each = []
    for c in done:
        values = dataclasses.asdict(c)
        del values["index"], values["sample"]
        each.append(values)
    times = {"wall_s": wall_s, "first_s": first_s}
    if len(each) == 1:
        return {**each[0], **times}
    return {"completions": each, "cost": dataclasses.asdict(cost(done)), **times}
