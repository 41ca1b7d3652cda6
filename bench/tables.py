"""Writes the tables of README.md anew, from the newest whole result of each GPU.

    python -m s1fast.bench.tables

Of a GPU that has none the newest one that flags narrowed stands in. Results that are void or of a
CPU are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from s1fast.bench.environment import RESULTS
from s1fast.bench.report import HEADER, cells, heading
from s1fast.errors import InputError
from s1fast.files import read_bytes, read_json_object, write_atomic

README = RESULTS.parent / "README.md"
BEGIN = "<!-- begin: written by python -m s1fast.bench.tables -->"
END = "<!-- end -->"
NONE = "No result yet: nothing here has run on a GPU."


def newest(folder: Path) -> list[dict[str, Any]]:
    """The newest usable result of each GPU, by device name."""
    found: dict[str, dict[str, Any]] = {}
    for path in folder.glob("*.json"):
        result = read_json_object(path)
        # Other benches leave results of their own here.
        if not result.get("shapes") or result["roofs"]["void"] or not result["environment"]["gpu"]:
            continue
        device = result["environment"]["device"]
        if device not in found or _rank(found[device]) < _rank(result):
            found[device] = {**result, "stem": path.stem}
    return [found[device] for device in sorted(found)]


def _rank(result: dict[str, Any]) -> tuple[bool, str]:
    return result["complete"], result["environment"]["timestamp"]


def markdown(results: list[dict[str, Any]]) -> Iterator[str]:
    """Per device its versions and roofs, and a table per shape; or that there is nothing."""
    if not results:
        yield NONE
    for result in results:
        env, roofs, stem = result["environment"], result["roofs"], result["stem"]
        yield f"### {env['device']}, {env['date']}"
        yield (
            f"Commit {env['commit']}, driver {env['driver']}, CUDA {env['cuda']}, torch "
            f"{env['torch']}, triton {env['triton']}. Roofs: read {roofs['read_gb_s']:.0f} GB/s, "
            f"copy {roofs['copy_gb_s']:.0f} GB/s, bf16 GEMM {roofs['gemm_bfloat16_tflops']:.0f} "
            f"TFLOP/s, fp32 GEMM {roofs['gemm_float32_tflops']:.0f} TFLOP/s. "
            f"[Raw](results/{stem}.json), [CSV](results/{stem}.csv)."
        )
        yield f"![Times and shares of the floor](results/{stem}.png)"
        for shape in result["shapes"]:
            yield f"**{heading(shape)}**"
            rows = [HEADER, ("---",) + ("---:",) * (len(HEADER) - 1), *cells(shape)]
            padded = ((*row, *("",) * (len(HEADER) - len(row))) for row in rows)
            lines = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in padded)
            yield "\n".join(f"| {line} |" for line in lines)


def update(readme: Path, folder: Path) -> None:
    """Replaces what stands between the markers."""
    text = read_bytes(readme).decode()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise InputError(f"{readme}: holds no {BEGIN!r} and {END!r} to write between")
    generated = "\n\n".join(markdown(newest(folder)))
    write_atomic(readme, f"{before}{BEGIN}\n\n{generated}\n\n{END}{after}")


if __name__ == "__main__":
    update(README, RESULTS)
