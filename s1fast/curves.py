"""What an evaluation shows: the table, the scaling curves beside the paper's, two runs compared."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from s1fast.errors import InputError
from s1fast.files import parse_json, read_bytes, read_json_object
from s1fast.scaling import paired


def table(name: str, task: dict[str, Any]) -> Table:
    """A row for every cell. cut: share of thinking that was ended at its budget."""
    shown = Table(title=f"{name}: {task['cells'][0]['problems']} problems")
    voted = any("at_k" in cell for cell in task["cells"])
    drawn = any("tries" in cell for cell in task["cells"])
    heads = ["cell", "accuracy", "95 %", "thinking", "answer", "cut", "waits"]
    heads += ["maj@k"] if voted else []
    heads += ["tries"] if drawn else []
    for head in heads:
        shown.add_column(head, justify="left" if head == "cell" else "right")
    for cell in task["cells"]:
        low, high = cell["interval95"]
        columns = [
            cell["cell"],
            f"{cell['accuracy']:.1f}",
            f"{low:.1f} to {high:.1f}",
            _tokens(cell["thinking_tokens"]),
            _tokens(cell["answer_tokens"]),
            "?" if cell["forced_ends"] is None else f"{cell['forced_ends']:.0%}",
            "?" if cell["waits"] is None else f"{cell['waits']:.1f}",
        ]
        if voted:
            best = cell["at_k"][-1]
            columns.append(f"{best['majority']['accuracy']:.1f} (k = {best['k']})")
        columns += [f"{cell['tries']:.1f}"] if drawn else []
        shown.add_row(*columns)
    return shown


def _tokens(spread: dict[str, float] | None) -> str:
    return "?" if spread is None else f"{spread['mean']:,.0f}"


def measures(method: dict[str, Any]) -> str:
    """The paper's measures of one method, as a line."""

    def shown(value: float | None, form: str = ".1f") -> str:
        return "-" if value is None else format(value, form)

    return (
        f"{method['method']}, {method['runs']} runs: control {shown(method['control'], '.0f')} %, "
        f"scaling {shown(method['scaling_per_doubling'])} % per doubling (as the paper's numbers), "
        f"{shown(method['scaling_per_token'], '.2g')} % per token (as its formula), "
        f"performance {shown(method['performance'])} %"
    )


def paper_points(task: str) -> list[tuple[float, float]]:
    """s1-32B's (mean thinking tokens, accuracy) on a task, as published; none for other tasks."""
    paper = read_json_object(Path(__file__).with_name("s1_paper.json"))
    return [(x, y) for x, y in paper.get(task, [])]


def plot(name: str, task: dict[str, Any], model: str, path: Path) -> None:
    """Accuracy over mean thinking tokens with intervals, the paper's points beside ours."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    paper = paper_points(name)
    if paper:
        label = "s1-32B, arXiv 2501.19393"
        axes.plot(*zip(*paper, strict=True), "o--", color="tab:gray", alpha=0.7, label=label)
    series: dict[str, list[dict[str, Any]]] = {}
    for cell in task["cells"]:
        if (cell["thinking_tokens"] or {}).get("mean"):
            series.setdefault(cell["cell"].partition(" ")[2], []).append(cell)
    for asked, cells in series.items():
        _draw_cells(axes, sorted(cells, key=_mean_thinking), f"{Path(model).name} {asked}".strip())
    votes = [at for cell in task["cells"] for at in cell.get("at_k", ()) if at["thinking_tokens"]]
    if votes:
        points = [(at["thinking_tokens"], at["majority"]["accuracy"]) for at in votes]
        axes.plot(*zip(*points, strict=True), "s:", label="majority of k, all tokens")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set(xlabel="mean thinking tokens", ylabel="accuracy, %", title=name, ylim=(-6, 106))
    axes.margins(x=0.1)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize=8)
    figure.savefig(path, dpi=120)


def _mean_thinking(cell: dict[str, Any]) -> float:
    return cell["thinking_tokens"]["mean"]


def _draw_cells(axes: Any, cells: list[dict[str, Any]], label: str) -> None:
    """One line: cells that differ in their budget alone, each named by it."""
    xs, ys = [_mean_thinking(cell) for cell in cells], [cell["accuracy"] for cell in cells]
    below = [max(0.0, y - cell["interval95"][0]) for y, cell in zip(ys, cells, strict=True)]
    above = [max(0.0, cell["interval95"][1] - y) for y, cell in zip(ys, cells, strict=True)]
    axes.errorbar(xs, ys, (below, above), fmt="o-", capsize=3, label=label)
    for x, y, cell in zip(xs, ys, cells, strict=True):
        budget = cell["cell"].partition(" ")[0]
        axes.annotate(budget, (x, y), textcoords="offset points", xytext=(5, -11), fontsize=7)


# -- comparing two runs -------------------------------------------------------------------------


def compare(a: Path, b: Path, console: Console) -> list[dict[str, Any]]:
    """Differences A - B of every cell that both runs have, over the problems that both have.

    Raises:
        InputError: no results there, nothing in common, or rows of one number that ask other
            questions.
    """
    scores = [_scores(folder) for folder in (a, b)]
    shared = [place for place in scores[0] if place in scores[1]]
    if not shared:
        cells = [", ".join(f"{task} {cell}" for task, cell in found) for found in scores]
        raise InputError(f"compare: no cell in common; {a} has {cells[0]}; {b} has {cells[1]}")
    shown = Table(title=f"A {a}  -  B {b}")
    for head in ("task", "cell", "problems", "A", "B", "A - B", "95 %", ""):
        shown.add_column(head, justify="left" if head in ("task", "cell", "") else "right")
    found = []
    for place in shared:
        ours, theirs = scores[0][place], scores[1][place]
        common = [problem for problem in ours if problem in theirs]
        for problem in common:
            if ours[problem][0] != theirs[problem][0]:
                raise InputError(
                    f"compare: problem {problem} of {place[0]} is another question in {b} than in "
                    f"{a}; evaluate both on the same data"
                )
        if not common:
            raise InputError(f"compare: no problem of {place[0]} is in both {a} and {b}")
        xs, ys = ([100.0 * side[p][1] for p in common] for side in (ours, theirs))
        d = paired(xs, ys)
        found.append({"task": place[0], "cell": place[1], "problems": len(common), **asdict(d)})
        shown.add_row(
            *place,
            str(len(common)),
            f"{sum(xs) / len(xs):.1f}",
            f"{sum(ys) / len(ys):.1f}",
            f"{d.mean:+.1f}",
            f"{d.low:+.1f} to {d.high:+.1f}",
            "differ" if d.significant else "may be equal",
        )
    console.print(shown)
    for name, ours, theirs in _asked_otherwise(a, b):
        console.print(f"{name} is {ours} in A and {theirs} in B", highlight=False, soft_wrap=True)
    return found


def _asked_otherwise(a: Path, b: Path) -> list[tuple[str, Any, Any]]:
    """What beside the models was not the same: an equal cell may then mean another thing."""
    paths = [folder / "run.json" for folder in (a, b)]
    if not all(path.exists() for path in paths):
        return []
    ours, theirs = (read_json_object(path) for path in paths)
    own = ("model", "weights", "endpoint", "tasks", "cells")
    names = [name for name in ours if name in theirs and name not in own]
    return [(name, ours[name], theirs[name]) for name in names if ours[name] != theirs[name]]


def _scores(folder: Path) -> dict[tuple[str, str], dict[str, tuple[str, float]]]:
    """(task, cell) -> problem -> (hash of the question, mean score) of a results folder."""
    path = folder / "samples.jsonl"
    if not path.exists():
        raise InputError(f"{folder}: no samples.jsonl there; is it the folder of a finished run?")
    sums: dict[tuple[str, str], dict[str, tuple[str, list[bool]]]] = {}
    for number, line in enumerate(read_bytes(path).splitlines(), start=1):
        where = f"{path}: row {number}"
        row = parse_json(line, where)
        try:
            if row["counted"]:
                cell = sums.setdefault((row["task"], row["cell"]), {})
                group = cell.setdefault(row["problem"], (row["question_hash"], []))
                group[1].append(bool(row["correct"]))
        except (KeyError, TypeError) as error:
            raise InputError(f"{where}: no sample of an evaluation: {error} is missing") from None
    return {
        place: {
            problem: (asked, sum(scores) / len(scores)) for problem, (asked, scores) in cell.items()
        }
        for place, cell in sums.items()
    }
