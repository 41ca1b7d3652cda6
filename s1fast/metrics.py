"""What a training run tells: FLOPs, MFU, the console line, metrics.jsonl, TensorBoard, a plot."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from s1fast.errors import InputError
from s1fast.files import write_atomic
from s1fast.model import ModelConfig

PEAK_TFLOPS = {  # dense bf16 of the data sheets; the longest name that fits wins
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100": 989.0,
    "NVIDIA H200": 989.0,
    "NVIDIA A100": 312.0,
}


def layer_parameters(c: ModelConfig) -> int:
    """Weights of one layer's matrices."""
    heads = 2 * c.num_attention_heads + 2 * c.num_key_value_heads
    return c.hidden_size * (heads * c.head_dim + 3 * c.intermediate_size)


def train_flops(config: ModelConfig, seqlens: Sequence[int], num_labels: int) -> float:
    """FLOPs of forward and backward, nothing recomputed, causal attention counted as half.

    6 P_layers T + 6 V D labels + 6 L H K sum(n^2): the rows without a label skip the head.
    """
    layers = config.num_hidden_layers
    matrices = 6.0 * layers * layer_parameters(config) * sum(seqlens)
    head = 6.0 * config.vocab_size * config.hidden_size * num_labels
    width = config.num_attention_heads * config.head_dim
    return matrices + head + 6.0 * layers * width * sum(n * n for n in seqlens)


def peak_tflops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """The rate that MFU is relative to, and where it comes from.

    A known GPU's data sheet for bf16; elsewhere the best of a few matrix products, measured now.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        known = [key for key in PEAK_TFLOPS if name.startswith(key)]
        if known:
            return PEAK_TFLOPS[max(known, key=len)], f"data sheet of {name}"
    n = 8192 if device.type == "cuda" else 1024
    a = torch.ones(n, n, device=device, dtype=dtype)
    best_s = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best_s = min(best_s, time.perf_counter() - start)
    return 2 * n**3 / best_s / 1e12, f"measured: a {n} x {n} matrix product in {dtype}"


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step, as written to metrics.jsonl."""

    step: int
    """Steps taken, counted from 1."""
    epoch: float
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    labels: int
    step_s: float
    tokens_per_s: float
    """Of one device, as are tflops and mfu."""
    tflops: float
    mfu: float
    imbalance: float
    """FLOPs of the slowest group of ranks over the mean, 1 if all work alike."""
    exposed_s: float | None
    """Of step_s, what the first rank spent on communication with nothing beside it (exposed.py);
    None where one process has its weights whole."""
    peak_bytes: int | None
    """Most memory that torch had given out, on the fullest device; None on a CPU."""
    eta_s: float
    dollars: float

    def line(self, num_steps: int) -> str:
        cost = f"  ${self.dollars:.2f}" if self.dollars else ""
        uneven = f"  imbalance {self.imbalance:.3f}" if self.imbalance > 1 else ""
        waited = "" if self.exposed_s is None else f"  exposed {self.exposed_s:.2f} s"
        memory = "" if self.peak_bytes is None else f"  {self.peak_bytes / 1e9:.1f} GB"
        return (
            f"step {self.step}/{num_steps}  loss {self.loss:.4f}  gnorm {self.grad_norm:.3g}  "
            f"lr {self.lr:.2e}  {self.step_s:.2f} s  {self.tokens_per_s:,.0f} tok/s  "
            f"MFU {self.mfu:.1%}{uneven}{waited}{memory}  eta {duration(self.eta_s)}{cost}"
        )


def say(console: Console, text: str, style: str | None = None) -> None:
    """Prints a text as it is: brackets are no markup, lines are not broken."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """1h02m, 3m07s or 12s."""
    whole = int(seconds + 0.5)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{whole % 60:02}s" if minutes else f"{whole}s"


class RunLog:
    """Sinks of a run's records; a context manager that closes them."""

    def __init__(
        self,
        folder: Path,
        console: Console,
        *,
        num_steps: int,
        start: int,
        every: int,
        board: bool,
        peak_tflops: float,
    ) -> None:
        self._console, self._num_steps, self._every = console, num_steps, every
        self.start, self.peak_tflops = start, peak_tflops
        self._board = _tensorboard(folder / "tensorboard", start) if board else None
        self.path = folder / "metrics.jsonl"
        keep = [line for line in records(self.path) if line["step"] <= start]
        write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in keep))
        self._stack = contextlib.ExitStack()
        self._file = self._stack.enter_context(self.path.open("ab", buffering=0))
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (BarColumn(bar_width=24), TextColumn("{task.description}"))
            self._bar = self._stack.enter_context(Progress(*columns, console=console))
            self._task = self._bar.add_task("", total=num_steps, completed=start)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()
        if self._board is not None:
            self._board.close()

    def write(self, record: StepRecord) -> None:
        values = asdict(record)
        try:
            self._file.write(json.dumps(values).encode() + b"\n")
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {error.strerror}") from None
        if self._board is not None:
            for name, value in values.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(f"train/{name}", value, record.step)
        line = record.line(self._num_steps)
        if self._bar is not None:
            self._bar.update(self._task, completed=record.step, description=line)
        elif record.step % self._every == 0 or record.step == self._num_steps:
            say(self._console, line)


def _tensorboard(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError(
            "log.tensorboard: the package tensorboard is not installed; pip install tensorboard, "
            "or set log.tensorboard = false"
        ) from None
    return SummaryWriter(str(folder), purge_step=start + 1)


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; a line torn by a crash ends it."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return


def plot_loss(metrics: Path, target: Path) -> None:
    """Draws loss and learning rate over steps as a PNG."""
    from matplotlib.figure import Figure

    lines = list(records(metrics))
    steps = [line["step"] for line in lines]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, [line["loss"] for line in lines], color="tab:blue", label="loss")
    axes.set(xlabel="step", ylabel="loss", title="Training loss")
    axes.grid(alpha=0.3)
    rate = axes.twinx()
    rate.plot(steps, [line["lr"] for line in lines], color="tab:gray", linestyle=":", label="lr")
    rate.set(ylabel="learning rate")
    figure.legend(loc="outside upper right", ncols=2)
    save_figure(figure, target)


def save_figure(figure: Any, target: Path) -> None:
    """Writes a matplotlib figure as a PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    write_atomic(target, buffer.getvalue())
