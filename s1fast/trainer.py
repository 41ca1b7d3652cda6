"""The training loop, on one device or many: fp32 masters, packed streams, exact resume.

A step: split the batch over the ranks and pack it on the host, one forward and backward per stream,
clip, AdamW. Its metrics stay on the device and are read one step later, so the host is never waited
for. On many ranks every one runs this same loop; only the first prints, logs and writes.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor
from torch.distributed import ProcessGroup

from s1fast import snapshot
from s1fast.balance import Split, imbalance, split_step
from s1fast.chat import Chat, Example
from s1fast.checkpoint import (
    check_weights,
    load_weights,
    read_config,
    save_model,
    save_weights,
)
from s1fast.config import TrainConfig, check, differences, load_recipe, to_toml
from s1fast.errors import InputError
from s1fast.files import make_directory, remove_leftovers, write_atomic
from s1fast.hub import find
from s1fast.kernels.packed_attention import Backend, check_backend, default_backend
from s1fast.metrics import RunLog, StepRecord, peak_tflops, plot_loss, train_flops
from s1fast.model import Model, ModelConfig
from s1fast.optimizer import AdamW, learning_rate, learning_rates
from s1fast.packing import (
    PackedBatch,
    cut,
    label_counts,
    pack_batch,
    part_tokens,
    step_indices,
    steps_per_epoch,
)
from s1fast.parallel import Layout, ulysses_attention
from s1fast.recompute import Recompute, activation_budget, choose_recompute, saved_bytes
from s1fast.rows import load_examples
from s1fast.slices import Slice, slice_of
from s1fast.snapshot_writer import SnapshotWriter


@dataclass(frozen=True)
class StepResult:
    """Metrics of a step, still on the device."""

    loss: Tensor
    grad_norm: Tensor
    bad_labels: Tensor
    """How many labels were no token of the vocabulary."""


@dataclass(frozen=True)
class StepPlan:
    """A step's sequences, and which group of ranks trains on which of them."""

    batch: list[Example]
    passes: list[Split]
    """Indices into batch, of each pass, of each group."""
    seqlens: list[int]
    num_labels: int
    costs: list[float]
    """FLOPs a sequence."""


class Trainer:
    """Model, optimizer and data of a run; `step` advances all three."""

    def __init__(
        self, config: TrainConfig, model: Model, examples: list[Example], layout: Layout
    ) -> None:
        """The model is sharded already where layout.mesh says so."""
        self.config, self.model, self.examples, self.layout = config, model, examples, layout
        device, dtype = layout.device, model.compute_dtype
        self.device = device
        self.optimizer = AdamW(model.named_parameters(), config.optim, layout.sum)
        self.attention = _attention(config, device, dtype, model.config.head_dim)
        self.saved_bytes = saved_bytes(model.config, dtype.itemsize, layout.ulysses)
        self.activation_bytes = _activation_bytes(config, model, layout)
        self.steps_per_epoch = steps_per_epoch(len(examples), config.batch_size)
        total = self.steps_per_epoch * config.epochs
        self.num_steps = min(total, config.max_steps) if config.max_steps else total
        self.learning_rates = learning_rates(self.num_steps, config.optim, device)

    def batch(self, step: int) -> list[Example]:
        """The sequences of optimizer step 0, 1, ..."""
        chosen = step_indices(len(self.examples), self.config.batch_size, self.config.seed, step)
        return [self.examples[i] for i in chosen]

    def plan(self, step: int) -> StepPlan:
        """Who trains on what in a step: the same on every rank."""
        c, batch = self.config, self.batch(step)
        seqlens, counts = [len(example.ids) for example in batch], label_counts(batch)
        costs = [
            train_flops(self.model.config, [n], labels)
            for n, labels in zip(seqlens, counts, strict=True)
        ]
        most_tokens = c.microbatch_tokens * self.layout.ulysses
        passes = split_step(seqlens, costs, self.layout.num_groups, most_tokens)
        return StepPlan(batch, passes, seqlens, sum(counts), costs)

    def step(self, step: int) -> StepResult:
        """Trains on one batch and updates the weights."""
        c, layout, plan = self.config, self.layout, self.plan(step)
        loss = torch.zeros((), device=self.device)
        bad_labels = torch.zeros((), dtype=torch.int64, device=self.device)
        ours = [streams[layout.group_index] for streams in plan.passes]
        packed = pack_batch(plan.batch, c.data.loss_weight, ours)
        for stream, streams in zip(packed, plan.passes, strict=True):
            part = cut(stream, layout.part, layout.ulysses).to(self.device)
            recompute = self.recompute([sum(plan.seqlens[i] for i in ids) for ids in streams])
            partial = stream_loss(
                self.model, part, bad_labels, self.attention, layout.group, recompute
            )
            partial.backward()
            loss += partial.detach()
        totals = layout.sum(torch.stack((loss, bad_labels.to(loss.dtype))))
        grad_norm = self.optimizer.step(self.learning_rates[step], c.optim.clip_norm)
        self.optimizer.zero_grad()
        return StepResult(totals[0], grad_norm, totals[1])

    def recompute(self, stream_tokens: Sequence[int]) -> list[Recompute]:
        """What each layer computes again in a pass of such streams, so that the longest fits."""
        most = max(part_tokens(n, self.layout.ulysses) for n in stream_tokens)
        layers = self.model.config.num_hidden_layers
        mode, budget = self.config.recompute, self.activation_bytes
        return choose_recompute(mode, layers, self.saved_bytes, most, budget)

    # -- resumable state --------------------------------------------------------------------

    def slices(self) -> dict[str, Slice]:
        """This rank's rows of every tensor of the state; the rest is the number of steps taken."""
        named = {}
        for name, parameter in self.model.named_parameters():
            rows = slice_of(parameter)
            named[f"param/{name}"] = rows
            for moment in ("exp_avg", "exp_avg_sq"):
                held = getattr(self.optimizer, moment)[name]
                named[f"{moment}/{name}"] = Slice(held, rows.start, rows.shape)
        return named

    def restore(self, saved: snapshot.Snapshot) -> None:
        """Takes weights, moments and step count from a snapshot."""
        saved.restore(self.slices())
        self.optimizer.steps = saved.step

    def facts(self) -> dict[str, object]:
        """What a resuming run must have in common with the saved one, beyond its recipe."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(np.asarray(example.ids, np.int64).tobytes())
            digest.update(np.asarray(example.labelled, bool).tobytes())
        return {"data_sha256": digest.hexdigest(), "num_steps": self.num_steps}


def stream_loss(
    model: Model,
    stream: PackedBatch,
    bad_labels: Tensor | None = None,
    attention: Backend | None = None,
    group: ProcessGroup | None = None,
    recompute: Sequence[Recompute] | None = None,
) -> Tensor:
    """Weighted loss of one packed stream, or of this rank's part of it.

    bad_labels as in linear_cross_entropy, attention as packed_attention's backend, group as in
    ulysses_attention, recompute as in Model.forward.
    """

    def attend(layer: int, q_THK: Tensor, k_TNK: Tensor, v_TNK: Tensor) -> Tensor:
        boundaries = (stream.cu_seqlens, stream.max_seqlen)
        return ulysses_attention(q_THK, k_TNK, v_TNK, *boundaries, backend=attention, group=group)

    hidden_TD = model(stream.ids_T, stream.positions_T, attend)
    return model.loss(
        hidden_TD, stream.label_T, stream.loss_weight_T, stream.valid_rows, bad_labels
    )


def train(config: TrainConfig, console: Console | None = None) -> Path:
    """Runs a recipe to its end.

    Returns:
        The exported Hugging Face folder, output/hf.

    Raises:
        InputError: whatever is wrong with recipe, model, data or output folder, before anything is
            written there; a loss that is no longer finite.
    """
    console = console or Console()
    check(config)
    device, dtype = _device(config), _dtype(config)
    source = find(config.model)
    chat, model_config = Chat.load(source), read_config(source)
    if chat.vocab_size > model_config.vocab_size:
        raise InputError(
            f"{source}: tokenizer.json has ids up to {chat.vocab_size - 1}, but config.json's "
            f"vocab_size is {model_config.vocab_size}"
        )
    examples, num_dropped = load_examples(config.data, chat, model_config.max_position_embeddings)
    if config.data.preview:
        preview(examples[: config.data.preview], chat, console)
        return source
    _attention(config, device, dtype, model_config.head_dim)
    _check_output(config)
    with torch.device("meta"):
        model = Model(model_config, compute_dtype=dtype)
    if config.init == "pretrained":
        check_weights(model, source)
    model.materialise(device, torch.float32)
    if config.init == "random":
        model.init_random(config.seed)
    else:
        load_weights(model, source)
    trainer = Trainer(config, model, examples, Layout(device))
    make_directory(config.output)
    remove_leftovers(config.output)
    start = _resume(trainer, console)
    write_atomic(config.output / "config.toml", to_toml(config))
    _print_facts(trainer, num_dropped, console)
    if start < trainer.num_steps:
        _loop(trainer, start, console)
    plot_loss(config.output / "metrics.jsonl", config.output / "loss.png")
    target = config.output / "hf"
    if not target.exists():
        _save_trained(trainer, source, target)
    facts = f"model  {target}\nplot   {config.output / 'loss.png'}"
    console.print(facts, highlight=False, markup=False, soft_wrap=True)
    return target


def export(run: Path, target: Path) -> Path:
    """Writes the newest snapshot of a run as a Hugging Face folder and returns it."""
    recipe = run / "config.toml"
    if not recipe.exists():
        raise InputError(f"{run}: no config.toml there, so it is no training run")
    config = load_recipe(recipe)
    saved, warnings = snapshot.newest(run / "snapshots", repair=False)
    if saved is None:
        raise InputError(f"{run}: no whole snapshot there{''.join(f'; {w}' for w in warnings[:1])}")
    for warning in warnings:
        Console(stderr=True).print(f"warning: {warning}", markup=False, soft_wrap=True)
    source = find(config.model)
    _save_snapshot(saved, read_config(source), source, target, config)
    return target


def _save_trained(trainer: Trainer, source: Path, target: Path) -> None:
    """Writes the trained model: its last snapshot, or what is in memory where none is kept."""
    c = trainer.config
    if not c.checkpoint.every:
        save_model(trainer.model, source, target, getattr(torch, c.checkpoint.export_dtype))
        return
    saved, warnings = snapshot.newest(c.output / "snapshots", repair=False)
    if saved is None or saved.step != trainer.num_steps:
        raise InputError(
            f"{'; '.join(warnings)}; the last snapshot, which the model is exported from, is lost; "
            "to repeat the steps since the one before: --checkpoint.resume"
        )
    _save_snapshot(saved, trainer.model.config, source, target, c)


def _save_snapshot(
    saved: snapshot.Snapshot,
    model: ModelConfig,
    source: Path,
    target: Path,
    config: TrainConfig,
) -> None:
    def read(name: str, part: Slice) -> None:
        saved.read(f"param/{name}", part)

    save_weights(model, read, source, target, getattr(torch, config.checkpoint.export_dtype))


def _loop(trainer: Trainer, start: int, console: Console) -> None:
    c = trainer.config
    peak, source = peak_tflops(trainer.device, trainer.model.compute_dtype)
    console.print(
        f"MFU = (6 P T + 6 V D labels + 6 L H K sum n^2) / seconds / {peak:.3g} TFLOP/s ({source})",
        highlight=False,
        soft_wrap=True,
    )
    log = RunLog(
        c.output,
        console,
        num_steps=trainer.num_steps,
        start=start,
        every=c.log.every,
        board=c.log.tensorboard,
    )
    writer = None
    if c.checkpoint.every:
        writer = SnapshotWriter(c.output / "snapshots", c.checkpoint.keep)
    with log, writer or contextlib.nullcontext():
        began = launched = time.perf_counter()
        pending: tuple[int, StepResult, float] | None = None  # step, metrics, when it began

        def report() -> None:
            """Reads the pending step's metrics: the loop's only wait for the device."""
            if pending is None:
                return
            step, result, started = pending
            ended = launched  # the host runs one step ahead, so launches are a step apart
            loss, grad_norm = float(result.loss), float(result.grad_norm)
            if num_bad := int(result.bad_labels):
                raise InputError(
                    f"step {step + 1}: {num_bad} labels are outside the model's vocabulary; "
                    "training stopped, the snapshots are from before; check the tokenizer"
                )
            if not (np.isfinite(loss) and np.isfinite(grad_norm)):
                raise InputError(
                    f"step {step + 1}: loss {loss}, gradient norm {grad_norm}; training stopped, "
                    "the snapshots are from before; a lower optim.lr may help"
                )
            if ended == started:  # nothing was launched after it
                ended = time.perf_counter()
            elapsed_s = ended - began
            timing = (ended - started, elapsed_s / (step + 1 - start), elapsed_s)
            log.write(_record(trainer, step, loss, grad_norm, timing, peak))

        for step in range(start, trainer.num_steps):
            launched = time.perf_counter()
            result = trainer.step(step)
            report()
            pending = (step, result, launched)
            done = step + 1
            if writer and (done % c.checkpoint.every == 0 or done == trainer.num_steps):
                report()  # a snapshot of a diverged run is never written
                pending = None
                writer.save(done, trainer.slices(), trainer.facts())
        report()


def _record(
    trainer: Trainer,
    step: int,
    loss: float,
    grad_norm: float,
    timing: tuple[float, float, float],
    peak: float,
) -> StepRecord:
    step_s, mean_s, elapsed_s = timing
    plan, world = trainer.plan(step), trainer.layout.world
    num_tokens = sum(plan.seqlens)
    tflops = sum(plan.costs) / step_s / world / 1e12
    price = trainer.config.log.dollars_per_hour * world
    return StepRecord(
        step=step + 1,
        epoch=(step + 1) / trainer.steps_per_epoch,
        loss=loss,
        grad_norm=grad_norm,
        lr=learning_rate(step, trainer.num_steps, trainer.config.optim),
        tokens=num_tokens,
        labels=plan.num_labels,
        step_s=step_s,
        tokens_per_s=num_tokens / step_s / world,
        tflops=tflops,
        mfu=tflops / peak,
        imbalance=imbalance(plan.passes, plan.costs),
        eta_s=mean_s * (trainer.num_steps - step - 1),
        dollars=price * elapsed_s / 3600,
    )


def _device(config: TrainConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device: cuda was asked for, but torch sees no CUDA device")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(found if config.device == "auto" else config.device)


def _dtype(config: TrainConfig) -> torch.dtype:
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return torch.bfloat16 if _device(config).type == "cuda" else torch.float32


def _activation_bytes(config: TrainConfig, model: Model, layout: Layout) -> float:
    """Memory for what forward keeps: as configured, or the least that any rank has free."""
    if config.activation_gb:
        return config.activation_gb * 1e9
    if layout.device.type == "cpu":
        return math.inf
    device = layout.device
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    itemsize = model.compute_dtype.itemsize
    return layout.smallest(activation_budget(free, model.config, itemsize, layout.world))


def _attention(
    config: TrainConfig, device: torch.device, dtype: torch.dtype, width: int
) -> Backend:
    if config.attention == "auto":
        return default_backend(device, dtype, width)
    try:
        check_backend(config.attention, device, dtype, width)
    except ValueError as error:
        raise InputError(f"attention: {error}") from None
    return config.attention


def _check_output(config: TrainConfig) -> None:
    """Refuses a folder that holds anything but this very run, resumed."""
    output = config.output
    if not os.path.lexists(output):
        return
    if not output.is_dir():
        raise InputError(f"output: {output} is a file; name a folder")
    if all(path.name.startswith(".config.toml.") for path in output.iterdir()):
        return  # empty, or of a run that was killed while its recipe was being written
    saved = output / "config.toml"
    if not saved.exists():
        raise InputError(f"output: {output} holds other files; choose a new or empty folder")
    if not config.checkpoint.resume:
        raise InputError(
            f"output: {output} holds a run already; choose another folder, or go on with it: "
            "--checkpoint.resume"
        )
    changed = differences(config, load_recipe(saved))
    if changed:
        raise InputError(f"output: {output} holds a run of another recipe: {'; '.join(changed)}")


def _resume(trainer: Trainer, console: Console) -> int:
    """Steps already taken: those of the newest whole snapshot, when resuming."""
    config = trainer.config
    if not config.checkpoint.resume:
        return 0
    saved, warnings = snapshot.newest(config.output / "snapshots", repair=True)
    for warning in warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    if saved is None:
        return 0
    facts = trainer.facts()
    for name, value in facts.items():
        if saved.facts.get(name) != value:
            raise InputError(
                f"{saved.folder}: {name} was {saved.facts.get(name)}, now it is {value}; the data "
                "or the schedule has changed, so this would be another run"
            )
    trainer.restore(saved)
    console.print(f"resuming after step {saved.step}", highlight=False)
    return saved.step


def _print_facts(trainer: Trainer, num_dropped: int, console: Console) -> None:
    c, examples = trainer.config, trainer.examples
    tokens = sum(len(example.ids) for example in examples)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    left_out = f", {num_dropped} left out as too long" if num_dropped else ""
    console.print(
        f"model  {c.model}, {parameters:,} parameters, {trainer.device} "
        f"{trainer.model.compute_dtype}, {trainer.attention} attention\n"
        f"data   {len(examples):,} sequences, {tokens:,} tokens, "
        f"{sum(label_counts(examples)):,} with loss{left_out}\n"
        f"run    {trainer.num_steps} steps of {c.batch_size}, {trainer.steps_per_epoch} an epoch",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def preview(examples: list[Example], chat: Chat, console: Console) -> None:
    """Prints samples as the model sees them, the tokens without loss dimmed."""
    for example in examples:
        text = Text()
        start = 0
        for i in range(1, len(example.ids) + 1):
            if i == len(example.ids) or example.labelled[i] != example.labelled[start]:
                style = "" if example.labelled[start] else "dim"
                text.append(chat.decode(example.ids[start:i]), style=style)
                start = i
        console.rule(Text(example.where))
        console.print(text, soft_wrap=True)
        labels = sum(example.labelled)
        console.print(f"{len(example.ids)} tokens, {labels} with loss", style="italic")
