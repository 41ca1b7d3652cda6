"""A plan in words and as a picture: what a run takes, what a GPU holds, where else it could run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from s1fast.metrics import duration, save_figure
from s1fast.planner import Estimate
from s1fast.rates import DEVICE_BYTES, Rates

_PARTS = {
    "gemm": "matrix products",
    "recomputed": "computed again",
    "attention": "attention",
    "memory_bound": "norms, rope, activation",
    "head": "head and loss",
    "ulysses": "all-to-all of attention",
    "optimizer": "AdamW",
    "exposed": "exposed communication",
    "host": "host",
}


def headline(one: Estimate) -> str:
    """The plan in one line."""
    low, high = (duration(s) for s in (one.seconds.low, one.seconds.high))
    return (
        f"{one.machine}: {low} to {high}, {one.mfu[0]:.0%} to {one.mfu[1]:.0%} MFU, {_dollars(one)}"
    )


def _dollars(one: Estimate) -> str:
    return " to ".join(
        f"${value:,.0f}" if value >= 100 else f"${value:.2f}" for value in one.dollars
    )


def details(one: Estimate, rates: Rates) -> list[str]:
    """Steps, FLOPs, the parts of a step, and every rate with its source."""
    steps = one.num_steps
    lines = [
        f"run        {steps} steps, {one.tokens / 1e6:,.1f}M tokens, {one.flops:.3g} FLOP",
        f"layout     {one.machine}, {one.machine.world // one.ulysses} streams, each over "
        f"{one.ulysses} GPUs; slowest over mean {one.imbalance:.3f}",
        f"time       {duration(one.seconds.low)} to {duration(one.seconds.high)}, "
        f"{one.seconds.low / steps:.2f} to {one.seconds.high / steps:.2f} s/step, "
        f"{one.mfu[0]:.1%} to {one.mfu[1]:.1%} MFU",
        f"exposed    {one.seconds.exposed / steps:.2f} s/step of communication if what can overlap "
        f"does, {(one.seconds.exposed + one.seconds.contention) / steps:.2f} if "
        f"{rates.overlap.value:.0%} of it does",
        f"price      {_dollars(one)}",
        "seconds of a step:",
    ]
    for name, label in _PARTS.items():
        seconds = getattr(one.seconds, name) / steps
        lines.append(f"  {label:25} {seconds:7.3f}  {seconds * steps / one.seconds.low:6.1%}")
    total = sum(one.layers.values())
    kinds = ", ".join(f"{n / total:.0%} {kind}" for kind, n in sorted(one.layers.items()))
    lines.append(f"recompute  {kinds} (layers of all passes)")
    lines.append("rates:")
    lines += [f"  {name:18} {rate}" for name, rate in rates.items()]
    return lines


def memory_lines(one: Estimate, parts: dict[str, float]) -> list[str]:
    """GB by category on the fullest rank, at its worst pass."""
    total, there = sum(parts.values()), DEVICE_BYTES[one.machine.gpu]
    lines = [f"memory of a GPU at the largest pass, {one.most_tokens:,} tokens:"]
    lines += [f"  {name:25} {value / 1e9:7.2f} GB" for name, value in parts.items()]
    lines.append(f"  {'in all':25} {total / 1e9:7.2f} GB of {there / 1e9:.1f}")
    return lines


def layout_table(estimates: Sequence[Estimate]) -> list[str]:
    """The same run on other machines."""
    head = f"{'machine':14} {'minutes':>13} {'MFU':>11} {'dollars':>13}  {'computed again':16} fits"
    lines = [head]
    for one in estimates:
        minutes = f"{one.seconds.low / 60:.1f}-{one.seconds.high / 60:.1f}"
        mfu = f"{one.mfu[0]:.0%}-{one.mfu[1]:.0%}"
        dollars = f"{one.dollars[0]:,.2f}-{one.dollars[1]:,.2f}"
        total = sum(one.layers.values())
        again = f"{1 - one.layers['none'] / total:.0%} of layers"
        fits = "yes" if one.fits else "no"
        lines.append(f"{one.machine!s:14} {minutes:>13} {mfu:>11} {dollars:>13}  {again:16} {fits}")
    return lines


def plot(estimates: Sequence[Estimate], target: Path) -> None:
    """Minutes by part for each machine, the range as a whisker, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    names = [str(one.machine) + ("" if one.fits else "\ndoes not fit") for one in estimates]
    bottom = [0.0] * len(estimates)
    for part, label in _PARTS.items():
        heights = [getattr(one.seconds, part) / 60 for one in estimates]
        axes.bar(names, heights, bottom=bottom, label=label)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    worse = [one.seconds.contention / 60 for one in estimates]
    none = [0.0] * len(worse)
    axes.errorbar(names, bottom, yerr=[none, worse], fmt="none", ecolor="black", capsize=4)
    axes.set(ylabel="minutes", title="Planned, not measured")
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right upper")
    save_figure(figure, target)
