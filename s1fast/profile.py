"""A profile of some steps: a trace, the memory's history, and one table of where the time went.

Every rank records, so that all are slowed alike; the first writes to OUTPUT/profile:

    trace.json.gz   Chrome's format: ui.perfetto.dev, chrome://tracing
    memory.pickle   on a GPU: allocations with their stacks, for docs.pytorch.org/memory_viz
    table.txt, table.json

The device is waited for before the first of the steps and after the last, and recording slows the
host; what is computed stays the same.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import dumps
from typing import Any

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, record_function

from s1fast.config import TrainConfig, profiled_steps
from s1fast.errors import InputError
from s1fast.files import make_directory, remove_leftovers, write_atomic
from s1fast.metrics import say
from s1fast.parallel import Layout

# -- where the time went ---------------------------------------------------------------------------

COMPUTE = ("attention", "GEMM", "loss", "other kernels")
"""A moment belongs to the first of these that is at work, else to communication, else to nobody."""
ROWS = ("GEMM", "attention", "loss", "other kernels", "exposed communication", "idle")

_KERNELS = (  # what a name holds, the first that fits; the loss's products are GEMMs like others
    ("communication", "^nccl"),
    ("attention", "(?i)attention|attn|flash|fmha"),
    ("loss", "^_softmax_gradient_kernel|^_scale_kernel"),
    ("GEMM", "(?i)gemm|gemv|nvjet|cutlass|cublas|xmma"),
    ("other kernels", ""),
)
_OPERATIONS = (  # on a CPU; the others only enclose these, and what waits for ranks is no compute
    ("communication", "^gloo:"),
    ("attention", "^(aten|s1fast)::.*attention"),
    ("loss", "^s1fast::linear_cross_entropy"),
    ("GEMM", r"^aten::(add|b|badd)?mm$"),
    ("other kernels", "^(aten|fsdp)::|^s1fast::(?!exchange)"),
)
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_WINDOW = "s1fast: profiled steps"


def kernel_kind(name: str) -> str:
    """Which kind of work a GPU's kernel is, by its name."""
    return _kind(name, _KERNELS) or "other kernels"


def operation_kind(name: str) -> str | None:
    """The same for an operation on a CPU; None where it is neither compute nor communication."""
    return _kind(name, _OPERATIONS)


def _kind(name: str, table: tuple[tuple[str, str], ...]) -> str | None:
    return next((kind for kind, holds in table if re.search(holds, name)), None)


@dataclass(frozen=True)
class Breakdown:
    """Seconds between the beginning of the profiled steps and the end of their last kernel."""

    whole_s: float
    rows_s: dict[str, float]
    """One of ROWS -> seconds; together they are whole_s."""
    communication_s: float
    """Exposed or not."""


def breakdown(events: Iterable[dict[str, Any]]) -> Breakdown:
    """Splits the window of a trace, moment by moment; events as in Chrome's format.

    Where there are kernels these count, on all streams; else the operations on the thread that
    trains. Communication that runs beside compute is hidden; a moment when neither runs is idle.

    Raises:
        ValueError: no window, or more than one.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    windows = [
        e for e in complete if e["name"] == _WINDOW and not e.get("cat", "").startswith("gpu")
    ]
    if len(windows) != 1:
        raise ValueError(f"a trace of {len(windows)} windows")
    start, end = _nanoseconds(windows[0])
    changes: list[tuple[int, str, int]] = []
    for kind, event in _work(complete, windows[0]["tid"]):
        first, last = _nanoseconds(event)
        first, last = max(first, start), min(last, end)
        if first < last:
            changes += [(first, kind, 1), (last, kind, -1)]
    spent, communicating, running, now = Counter[str](), 0, Counter[str](), start
    for moment, kind, change in [*sorted(changes), (end, "idle", 0)]:
        at_work = next((name for name in COMPUTE if running[name]), None)
        waits = "exposed communication" if running["communication"] else "idle"
        spent[at_work or waits] += moment - now
        communicating += (moment - now) * bool(running["communication"])
        running[kind] += change
        now = moment
    rows = {name: spent[name] / 1e9 for name in ROWS}
    return Breakdown((end - start) / 1e9, rows, communicating / 1e9)


def _work(events: list[dict[str, Any]], thread: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    kernels = [event for event in events if event.get("cat") in _DEVICE]
    for event in kernels:
        yield kernel_kind(event["name"]), event
    if not kernels:
        for event in events:
            kind = operation_kind(event["name"])
            if kind == "communication" or (kind and event["tid"] == thread):
                yield kind, event


def _nanoseconds(event: dict[str, Any]) -> tuple[int, int]:
    start = round(event["ts"] * 1000)
    return start, start + round(event["dur"] * 1000)


def table(found: Breakdown, steps: range, device: str) -> str:
    """For people; seconds are those of one step, the mean of all."""
    lines = [f"profile of steps {steps[0]} to {steps[-1]} on {device}"]
    lines += [f"{'':22}s a step   share"]
    for name, total_s in [*found.rows_s.items(), ("all", found.whole_s)]:
        share = total_s / found.whole_s
        lines.append(f"{name:22}{total_s / len(steps):8.4f}{share:8.1%}")
    hidden_s = found.communication_s - found.rows_s["exposed communication"]
    lines.append(f"communication beside compute: {hidden_s / len(steps):.4f} s a step more")
    return "\n".join(lines) + "\n"


# -- recording -------------------------------------------------------------------------------------


def check_steps(config: TrainConfig, num_steps: int) -> None:
    """Raises InputError where steps are to be profiled that the run does not have."""
    steps = profiled_steps(config)
    if steps and steps[-1] > num_steps:
        raise InputError(f"profile: {config.profile} goes beyond the run's {num_steps} steps")


class Profile:
    """Records the steps that the recipe names, as far as they are still to come; all ranks."""

    def __init__(
        self, layout: Layout, config: TrainConfig, num_done: int, console: Console
    ) -> None:
        steps = profiled_steps(config)
        self._steps = range(max(steps.start, num_done + 1), steps.stop)
        self._layout, self._folder, self._console = layout, config.output / "profile", console
        self._recording: contextlib.ExitStack | None = None
        if steps and not self._steps:
            text = f"warning: profile: steps {config.profile} were taken before; none is profiled"
            say(console, text, "yellow")

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._recording is not None:  # a step failed
            self._recording.close()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """A step, counted from 1."""
        if self._steps and number == self._steps[0]:
            self._begin()
        yield
        if self._steps and number == self._steps[-1]:
            self._end()

    def _begin(self) -> None:
        cuda = self._layout.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with contextlib.ExitStack() as stack:
            if cuda:
                history = torch.cuda.memory._record_memory_history
                history(stacks="python", max_entries=200_000)
                stack.callback(history, enabled=None)
                torch.cuda.synchronize()
            self._trace = stack.enter_context(contextlib.ExitStack())
            profiler = torch.profiler.profile(activities=activities)
            self._profiler = self._trace.enter_context(profiler)
            self._trace.enter_context(record_function(_WINDOW))
            self._recording = stack.pop_all()

    def _end(self) -> None:
        assert self._recording is not None
        cuda = self._layout.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
        self._trace.close()
        memory = torch.cuda.memory._snapshot() if cuda and self._layout.rank == 0 else None
        self._recording.close()
        self._recording = None
        with self._layout.ranks.together():
            if self._layout.rank == 0:
                self._write(memory)
        del self._profiler

    def _write(self, memory: Any) -> None:
        make_directory(self._folder)
        remove_leftovers(self._folder)
        if memory is not None:
            write_atomic(self._folder / "memory.pickle", dumps(memory))
        found, device = breakdown(self._write_trace()["traceEvents"]), self._layout.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        text = table(found, self._steps, f"{name}, rank 0 of {self._layout.world}")
        facts = {"first": self._steps[0], "last": self._steps[-1], "device": name}
        facts |= {"world": self._layout.world, **asdict(found)}
        write_atomic(self._folder / "table.json", json.dumps(facts, indent=1) + "\n")
        write_atomic(self._folder / "table.txt", text)
        say(self._console, f"{text}profile  {self._folder}")

    def _write_trace(self) -> Any:
        target = self._folder / "trace.json.gz"
        try:
            with tempfile.TemporaryDirectory(dir=self._folder, prefix=".", suffix=".tmp") as name:
                path = Path(name) / "trace.json"
                self._profiler.export_chrome_trace(str(path))
                raw = path.read_bytes()
            trace = json.loads(raw)
        except (OSError, ValueError) as error:  # a full disk leaves torch's file torn
            raise InputError(f"{target}: cannot be written: {error}") from None
        write_atomic(target, gzip.compress(raw, 5))
        return trace
