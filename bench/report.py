"""What is made of a result of the kernels bench: tables, CSV, PNG, a comparison of two."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from s1fast.bench.environment import version
from s1fast.errors import InputError
from s1fast.files import read_json_object

Result = dict[str, Any]
Medians = dict[tuple[str, ...], dict[str, float]]

MODES = ("forward", "backward", "full")
HEADER = (
    "provider",
    "forward ms",
    "backward ms",
    "full ms",
    "20-80 %",
    "TFLOP/s of each",
    "of floor",
    "extra GB",
    "error",
)

CSV_COLUMNS = (
    "kernel_name",
    "kernel_provider",
    "kernel_operation_mode",
    "metric_name",
    "metric_unit",
    "x_name",
    "x_label",
    "x_value",
    "y_value_50",
    "y_value_20",
    "y_value_80",
    "extra_benchmark_config_str",
    "gpu_name",
    "timestamp",
    "liger_version",
)
"""Liger's, in its order, so that its tools read ours."""

_LIGER_MODES = {"forward": "no-grad-forward", "backward": "backward", "full": "full"}


def table(result: Result) -> Iterator[str]:
    """Plain text: per shape a heading and a line per provider."""
    for shape in result["shapes"]:
        yield ""
        yield heading(shape)
        rows = [list(HEADER), *cells(shape)]
        # A reason, which takes the place of the numbers, may be longer than its column.
        full_rows = [row for row in rows if len(row) == len(HEADER)]
        widths = [max(len(row[i]) for row in full_rows) for i in range(len(HEADER))]
        widths[0] = max(len(row[0]) for row in rows)
        for row in rows:
            name, *rest = row
            padded = [cell.rjust(widths[i + 1]) for i, cell in enumerate(rest)]
            yield "  ".join([name.ljust(widths[0]), *(padded if len(row) > 2 else rest)])
    if result["roofs"]["void"]:
        yield f"\nVOID: {result['roofs']['void_reason']}"


def heading(shape: dict[str, Any]) -> str:
    return f"{shape['op']} {shape['shape']} {shape['dtype']}, floor {shape['floor_ms']:.3g} ms"


def cells(shape: dict[str, Any]) -> list[list[str]]:
    """A row of HEADER's columns per provider, or its name and why there are no numbers."""
    rows = []
    for one in shape["measurements"]:
        if one["status"] != "ok":
            rows.append([one["provider"], f"{one['status']}: {one['reason']}"])
            continue
        full = one["timings"]["full"]
        rows.append(
            [
                one["provider"],
                *(_median(one, mode) for mode in MODES),
                f"{full['q20_ms']:.3f}-{full['q80_ms']:.3f}",
                _rates(one),
                f"{100 * one['roof_fraction']:.1f} %",
                "" if one["extra_bytes"] is None else f"{one['extra_bytes'] / 1e9:.2f}",
                _error(one),
            ]
        )
    return rows


def _median(one: dict[str, Any], mode: str) -> str:
    """Milliseconds; a dash for what the operation does not have."""
    timing = one["timings"].get(mode)
    return f"{timing['median_ms']:.3f}" if timing else "-"


def _rates(one: dict[str, Any]) -> str:
    """TFLOP/s, or GB/s of an operation that counts bytes alone."""
    rates, unit = (one["gb_s"], " GB/s") if one.get("gb_s") else (one["tflops"], "")
    form = ".0f" if unit else ".3g"
    return " / ".join(f"{rates[mode]:{form}}" for mode in MODES if mode in rates) + unit


def _error(one: dict[str, Any]) -> str:
    """The largest relative norm of an error, marked where the result counts as wrong."""
    norms = [pair["norm"] for pair in one["errors"].values()]
    text = "not finite" if None in norms else f"{max(norms):.1e}"
    return f"{text} WRONG" if one["wrong"] else text


def csv_text(result: Result) -> str:
    """A line per time and per peak of memory."""
    env = result["environment"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for shape in result["shapes"]:
        sizes = dict(shape["sizes"])
        x_name = next(iter(sizes))
        x_value = sizes.pop(x_name)
        x = (x_name, x_name, x_value)
        extra = json.dumps({**sizes, "dtype": shape["dtype"]})
        end = (extra, env["device"], env["timestamp"], version("liger-kernel") or "")
        for one in shape["measurements"]:
            who = (shape["op"], one["provider"])
            for mode, t in one["timings"].items():
                y = (t["median_ms"], t["q20_ms"], t["q80_ms"])
                writer.writerow((*who, _LIGER_MODES[mode], "speed", "ms", *x, *y, *end))
            if one["timings"] and one["extra_bytes"] is not None:
                mb = one["extra_bytes"] / 1e6
                writer.writerow((*who, "full", "memory", "MB", *x, mb, mb, mb, *end))
    return text.getvalue()


def plot(result: Result) -> bytes:
    """PNG: milliseconds of forward and backward, and the share of the floor, per shape."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    shapes = result["shapes"]
    working: dict[str, dict[str, None]] = {}  # operation -> its providers, in order
    for shape in shapes:
        fine = (m["provider"] for m in shape["measurements"] if m["status"] == "ok")
        working.setdefault(shape["op"], {}).update(dict.fromkeys(fine))
    names = list(dict.fromkeys(name for own in working.values() for name in own))
    figure = Figure(figsize=(max(8.0, 2.0 * len(shapes)), 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for i, name in enumerate(names):
        places, widths, ms, shares = [], [], [], []
        for x, shape in enumerate(shapes):
            own = list(working[shape["op"]])
            one = next((m for m in shape["measurements"] if m["provider"] == name), None)
            if one and one["status"] == "ok":
                widths.append(0.8 / len(own))
                places.append(x + (own.index(name) - (len(own) - 1) / 2) * widths[-1])
                ms.append(one["timings"]["full"]["median_ms"])
                shares.append(100 * one["roof_fraction"])
        color = colormaps["tab20"](i % 20)
        upper.bar(places, ms, widths, color=color, label=name)
        lower.bar(places, shares, widths, color=color)
    floors = [shape["floor_ms"] for shape in shapes]
    starts = [x - 0.45 for x in range(len(shapes))]
    ends = [x + 0.45 for x in range(len(shapes))]
    upper.hlines(floors, starts, ends, colors="black", linestyles="dotted", label="floor")
    upper.set(ylabel="forward + backward, ms", yscale="log", title=result["environment"]["device"])
    lower.set(ylabel="floor / time, %")
    names = ["\n".join([*s["op"].split("_"), *s["shape"].split("x")]) for s in shapes]
    lower.set_xticks(range(len(shapes)), names, fontsize=8)
    for axes in (upper, lower):
        axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    return buffer.getvalue()


def compare(a: Path, b: Path) -> Iterator[str]:
    """Every median of one result beside the other's, the change in percent and its noise.

    The noise of a median is taken as half of what lies between its 20 and 80 % quantiles; those of
    both results count.
    """
    (old_title, old_device, old), (new_title, new_device, new) = _read(a), _read(b)
    yield from (old_title, new_title)
    if old_device != new_device:
        yield "two devices: the change is not the code's alone"
    for key in sorted(old.keys() ^ new.keys()):
        yield f"{' '.join(key)}: only in {a if key in old else b}"
    for key in [key for key in old if key in new]:
        change, noise = _change(old[key], new[key])
        word = "same" if abs(change) <= noise else "faster" if change < 0 else "slower"
        yield (
            f"{' '.join(key)}: {old[key]['median_ms']:.4g} -> {new[key]['median_ms']:.4g} ms, "
            f"{100 * change:+.1f} % ± {100 * noise:.1f} %, {word}"
        )


def _read(path: Path) -> tuple[str, str, Medians]:
    """Device, date and commit of a result as one line, the device alone, its medians."""
    try:
        result = read_json_object(path)
        env, roofs = result["environment"], result["roofs"]
        void = f", VOID: {roofs['void_reason']}" if roofs["void"] else ""
        title = f"{env['device']}, {env['date']}, commit {env['commit']}{void}"
        return title, env["device"], _medians(result)
    except InputError as error:
        raise InputError(f"--compare: {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"--compare: {path} is no result of s1fast.bench.kernels") from None


def _medians(result: Result) -> Medians:
    return {
        (shape["op"], shape["shape"], one["provider"], mode): timing
        for shape in result["shapes"]
        for one in shape["measurements"]
        for mode, timing in one["timings"].items()
    }


def _change(old: dict[str, float], new: dict[str, float]) -> tuple[float, float]:
    """Relative change of the median, and its noise."""
    ratio = new["median_ms"] / old["median_ms"]
    spreads = [(t["q80_ms"] - t["q20_ms"]) / 2 / t["median_ms"] for t in (old, new)]
    return ratio - 1, ratio * math.hypot(*spreads)
