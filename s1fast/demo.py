"""The demo: a tiny model learns to reason with the real trainer, and is decoded under budgets.

Act one trains from scratch on a toy task and measures accuracy on held-out problems when thinking
is cut, left alone, and extended by one to six forced "Wait"s. Act two decodes real weights.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from s1fast.budget import Budget
from s1fast.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    OptimConfig,
    TrainConfig,
    load_recipe,
)
from s1fast.console import print_stream
from s1fast.decoder import Completion, Engine, SamplingParams
from s1fast.demo_tasks import TASKS, Task, write_model, write_rows
from s1fast.errors import InputError
from s1fast.metrics import duration
from s1fast.plan import outlook
from s1fast.trainer import train

BATCH_SIZE = 16
MOST_WAITS = 6
QUESTION = "A farmer has 17 sheep. All but 9 run away. How many are left?"


@dataclass(frozen=True)
class Point:
    """Accuracy over the held-out problems under one setting."""

    setting: str
    waits: int
    thinking_tokens: float
    accuracy: float


def run(name: str, *, seed: int, output: Path, weights: Path) -> None:
    """Both acts. `output` is made anew: it may only hold an earlier demo.

    Raises:
        InputError: an output folder that holds something else.
    """
    console = Console(highlight=False)
    began = time.perf_counter()
    task = TASKS[name]
    _clear(output)
    console.rule(f"Act one: {task.title}")
    model, problems = learn(task, seed, output, console)
    engine = Engine(model, loop="host", max_batch=256)  # more rows than the device's loop takes
    points = measure(engine, task, problems)
    console.print(_table(points))
    _show_trace(engine, task, problems, console)
    path = output / "scaling.png"
    plot(points, task, path)
    console.print(
        f"scaling curve: {path}\nThe early stop comes from the training traces: after a round of "
        "three steps, stopping is their likeliest next word. A forced Wait makes the model go on "
        "where it stopped: it continues its work, it does not repair it."
    )
    console.rule("Act two: real weights, SmolLM2-135M-Instruct")
    if (weights / "config.json").exists():
        _decode_real(weights, console)
    else:
        console.print(f"no weights at {weights}: make weights fetches them (98 MB)")
    console.print(f"\ndemo finished in {duration(time.perf_counter() - began)}")
    recipe = Path(__file__).resolve().parent / "recipes" / "s1-32b.toml"
    console.print(
        f"s1-32B ({recipe.name}) would take on {outlook(load_recipe(recipe))}",
        highlight=False,
        soft_wrap=True,
    )


def _clear(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise InputError(f"output: {output} is a file; choose a folder")
    if output.exists() and any(output.iterdir()):
        if not (output / "init" / "config.json").exists():
            raise InputError(f"output: {output} holds other files; choose another folder")
        shutil.rmtree(output)


def learn(task: Task, seed: int, output: Path, console: Console) -> tuple[Path, list[Any]]:
    """Trains the task's model; returns its folder and the held-out problems."""
    training, held_out = task.split(random.Random(seed))
    write_model(task, output / "init")
    write_rows(task, training, task.num_steps * BATCH_SIZE, seed, output / "rows.jsonl")
    config = TrainConfig(
        model=str(output / "init"),
        output=output / "run",
        init="random",
        seed=seed,
        epochs=1,
        batch_size=BATCH_SIZE,
        dtype="float32",
        data=DataConfig(path=str(output / "rows.jsonl"), loss_weight="token"),
        optim=OptimConfig(lr=3e-3, weight_decay=0.1, warmup_ratio=0.1),
        checkpoint=CheckpointConfig(every=0, export_dtype="float32"),
        log=LogConfig(every=max(1, task.num_steps // 10), tensorboard=False),
    )
    return train(config, console), held_out


def measure(engine: Engine, task: Task, problems: Sequence[Any]) -> list[Point]:
    """Accuracy with thinking cut, left alone, and extended by 1 to MOST_WAITS Waits: two budget
    trees a problem."""
    questions = [task.question(p) for p in problems]
    auto = Budget(max_thinking_tokens="auto")
    maxima: list[Any] = [*task.budgets, "auto"]
    waits = list(range(1, MOST_WAITS + 1))
    cut = engine.generate(questions, budget=auto, budgets=maxima)
    extended = engine.generate(questions, budget=auto, num_ignores=waits)
    settings = [(f"cut at {b} tokens", 0) for b in task.budgets] + [("natural stop", 0)]
    settings += [(f"{n} x Wait", n) for n in waits]
    runs = [cut[i :: len(maxima)] for i in range(len(maxima))]
    runs += [extended[i :: len(waits)] for i in range(len(waits))]
    points = []
    for (label, n), done in zip(settings, runs, strict=True):
        right = sum(
            final_answer(c) == task.solution(p) for c, p in zip(done, problems, strict=True)
        )
        mean = sum(c.thinking_tokens for c in done) / len(done)
        points.append(Point(label, n, mean, right / len(done)))
    return points


def final_answer(done: Completion) -> str:
    """What follows "Final Answer:", whoever wrote it."""
    return done.answer.rpartition("Final Answer:")[2].strip()


def _table(points: Sequence[Point]) -> Table:
    table = Table(title="accuracy on held-out problems")
    for name in ("setting", "thinking tokens", "accuracy", ""):
        table.add_column(name, justify="left" if name in ("setting", "") else "right")
    for p in points:
        bar = "█" * round(24 * p.accuracy)
        table.add_row(p.setting, f"{p.thinking_tokens:.1f}", f"{p.accuracy:.1%}", bar)
    return table


def _show_trace(engine: Engine, task: Task, problems: Sequence[Any], console: Console) -> None:
    """Streams the problem with the longest reasoning, three ends of thinking ignored."""
    problem = max(problems, key=lambda p: len(task.trace(p, ["Wait"] * MOST_WAITS)[0]))
    console.print(
        f"\n{task.question(problem)}   (solution: {task.solution(problem)})", style="bold"
    )
    budget = Budget(max_thinking_tokens="auto", num_ignore=3)
    print_stream(engine.stream(task.question(problem), SamplingParams(), budget))


def plot(points: Sequence[Point], task: Task, path: Path) -> None:
    """The scaling curve as a PNG: accuracy over mean thinking tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    ordered = sorted(points, key=lambda p: p.thinking_tokens)
    x, y = [p.thinking_tokens for p in ordered], [100 * p.accuracy for p in ordered]
    axes.plot(x, y, color="tab:gray", linewidth=1, zorder=1)
    groups = (("cut", "tab:blue"), ("natural", "tab:green"), ("Wait", "tab:orange"))
    for word, color in groups:
        chosen = [p for p in points if word in p.setting]
        xs, ys = [p.thinking_tokens for p in chosen], [100 * p.accuracy for p in chosen]
        axes.scatter(xs, ys, color=color, label=word, zorder=2)
    for p in points:
        where = (p.thinking_tokens, 100 * p.accuracy)
        axes.annotate(p.setting, where, textcoords="offset points", xytext=(5, -12), fontsize=8)
    axes.set(xlabel="mean thinking tokens", ylabel="accuracy, %", title=f"Demo: {task.title}")
    axes.set_ylim(-6, 108)
    axes.margins(x=0.12)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _decode_real(weights: Path, console: Console) -> None:
    """One question under two budgets and two Waits."""
    engine = Engine(weights)
    console.print(
        "It was never trained to think in s1's format, so expect plumbing, not insight.",
        style="dim",
    )
    params = SamplingParams(max_tokens=120)
    for title, budget in (
        ("budget of 16 thinking tokens", Budget(max_thinking_tokens=16)),
        ("budget of 48 thinking tokens", Budget(max_thinking_tokens=48)),
        ("two Waits", Budget(max_thinking_tokens=64, num_ignore=2)),
    ):
        console.print(f"\n{QUESTION}   ({title})", style="bold")
        print_stream(engine.stream(QUESTION, params, budget))
