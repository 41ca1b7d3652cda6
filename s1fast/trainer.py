"""A training run from recipe to exported model, on one device or many: fp32 masters, exact resume.

Metrics of a step are read one step later, so that the device always has work. On many ranks every
one runs this same loop; the first alone prints and logs. What one finds wrong, all report.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from s1fast import exposed, selftest
from s1fast.balance import imbalance
from s1fast.chat import Chat, Example
from s1fast.checkpoint import check_weights, load_weights, read_config, save_model, save_weights
from s1fast.config import TrainConfig, check, differences, flat, load_recipe, to_toml
from s1fast.errors import InputError
from s1fast.files import make_directory, remove_leftovers, write_atomic
from s1fast.gauges import Gauges, Measured, Readings
from s1fast.hub import find
from s1fast.metrics import RunLog, StepRecord, peak_tflops, plot_loss, say
from s1fast.model import Model
from s1fast.optimizer import learning_rate
from s1fast.packing import num_steps
from s1fast.parallel import (
    Layout,
    gpus_per_node,
    join,
    leave,
    shard_model,
    share_streams,
    ulysses_degree,
)
from s1fast.profile import Profile, check_steps
from s1fast.ranks import ALONE, Ranks
from s1fast.rows import load_examples
from s1fast.slices import Slice
from s1fast.snapshot import Snapshot, newest
from s1fast.snapshot_writer import SnapshotWriter
from s1fast.step import Trainer, attention_backend, data_sha256


def train(config: TrainConfig, console: Console | None = None) -> Path:
    """Runs a recipe to its end; on every rank that torchrun started, or in this process alone.

    Returns:
        The exported Hugging Face folder, output/hf.

    Raises:
        InputError: whatever is wrong with recipe, model, data or output folder, on whichever rank
            and before anything is written there; a loss that is no longer finite.
    """
    check(config)
    layout = join(_device(config))
    console = console or Console(quiet=layout.rank > 0)
    try:
        result = _train(config, layout, console)
    except InputError:
        # Known to all ranks, or the first's of its log, after a step that all have launched. After
        # another error some may not answer any more.
        leave()
        raise
    except torch.OutOfMemoryError as error:
        error.add_note(
            "s1fast plan tells what a recipe takes; less: a smaller microbatch_tokens or "
            'activation_gb, recompute = "full", optim.moments = "bfloat16"'
        )
        raise
    leave()
    return result


def _train(config: TrainConfig, layout: Layout, console: Console) -> Path:
    ranks = layout.ranks
    with ranks.together():
        run = _prepare(config, layout)
    layout.agree(run.facts)
    if config.data.preview:
        preview(run.examples[: config.data.preview], run.chat, console)
        return run.source
    heads = (run.model.config.num_attention_heads, run.model.config.num_key_value_heads)
    layout = share_streams(layout, ulysses_degree(gpus_per_node(layout), *heads))
    readings = selftest.run(layout)
    shard_model(run.model, layout, config.reduce_dtype)
    with ranks.together():
        run.model.materialise(layout.device, torch.float32)
        if config.init == "random":
            run.model.init_random(config.seed)
        else:
            load_weights(run.model, run.source)
    trainer = Trainer(config, run.model, run.examples, layout)
    with ranks.together():
        if ranks.rank == 0:
            make_directory(config.output)
            remove_leftovers(config.output)
    start = _resume(trainer, console)
    with ranks.together():
        if ranks.rank == 0:
            write_atomic(config.output / "config.toml", to_toml(config))
    _print_facts(trainer, run.num_dropped, console)
    _print_readings(readings, layout, console)
    if start < trainer.num_steps:
        _loop(trainer, start, console)
    target = config.output / "hf"
    _save_trained(trainer, run.source, target)
    with ranks.together():
        if ranks.rank == 0:
            plot_loss(config.output / "metrics.jsonl", config.output / "loss.png")
    say(console, f"model  {target}\nplot   {config.output / 'loss.png'}")
    return target


def _print_readings(readings: Sequence[selftest.Reading], layout: Layout, console: Console) -> None:
    say(console, selftest.line(readings))
    if layout.device.type == "cuda":
        name = torch.cuda.get_device_name(layout.device)
        nodes = layout.world // gpus_per_node(layout)
        for warning in selftest.warnings(readings, name, nodes):
            say(console, f"warning: {warning}", "yellow")


@dataclass(frozen=True)
class _Run:
    """What a run starts from, read and checked; nothing is written or allocated yet."""

    source: Path
    chat: Chat
    model: Model
    """On meta."""
    examples: list[Example]
    num_dropped: int
    facts: dict[str, str]
    """What all ranks must have in common."""


def _prepare(config: TrainConfig, layout: Layout) -> _Run:
    source = find(config.model)
    chat, model_config = Chat.load(source), read_config(source)
    if chat.vocab_size > model_config.vocab_size:
        raise InputError(
            f"{source}: tokenizer.json has ids up to {chat.vocab_size - 1}, but config.json's "
            f"vocab_size is {model_config.vocab_size}"
        )
    examples, num_dropped = load_examples(config.data, chat, model_config.max_position_embeddings)
    steps = num_steps(len(examples), config.batch_size, config.epochs, config.max_steps)
    check_steps(config, steps)
    dtype = _dtype(config, layout.device)
    with torch.device("meta"):
        model = Model(model_config, compute_dtype=dtype)
    if not config.data.preview:
        attention_backend(config, layout.device, dtype, model_config.head_dim)
        if layout.world > 1 and not config.checkpoint.every:
            raise InputError(
                "checkpoint.every: 0 keeps no snapshot, but what several ranks have trained is "
                "exported from the last one; give a number of steps"
            )
        if layout.rank == 0:
            _check_output(config)
        if config.init == "pretrained":
            check_weights(model, source)
    facts = {
        **flat(config),
        "the training data": data_sha256(examples),
        "the model's config.json": repr(model_config),
        "the version of torch": torch.__version__,
        "s1fast's code": _code_sha256(),
    }
    return _Run(source, chat, model, examples, num_dropped, facts)


def _code_sha256() -> str:
    """Of all that a step runs; kernels/ by name, for in a checkout it is a link."""
    digest, here = hashlib.sha256(), Path(__file__).parent
    for pattern in ("*.py", "kernels/*.py"):
        for path in sorted(here.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def export(run: Path, target: Path) -> Path:
    """Writes the newest snapshot of a run as a Hugging Face folder and returns it."""
    recipe = run / "config.toml"
    if not recipe.exists():
        raise InputError(f"{run}: no config.toml there, so it is no training run")
    config = load_recipe(recipe)
    saved, warnings = newest(run / "snapshots", repair=False)
    if saved is None:
        raise InputError(f"{run}: no whole snapshot there{''.join(f'; {w}' for w in warnings[:1])}")
    for warning in warnings:
        say(Console(stderr=True), f"warning: {warning}")
    _save_snapshot(saved, find(config.model), target, config)
    return target


def _exported(config: TrainConfig, ranks: Ranks) -> bool:
    """Whether the trained model is there, which is the last thing that a run writes, as rank 0 sees
    it."""
    return ranks.exchange(str((config.output / "hf").exists()))[0] == "True"


def _save_trained(trainer: Trainer, source: Path, target: Path) -> None:
    """Writes the trained model: its last snapshot, or what is in memory where none is kept."""
    c, ranks = trainer.config, trainer.layout.ranks
    if _exported(c, ranks):
        return
    if not c.checkpoint.every:
        save_model(trainer.model, source, target, getattr(torch, c.checkpoint.export_dtype))
        return
    saved, warnings = newest(c.output / "snapshots", repair=False, ranks=ranks)
    if saved is None or saved.step != trainer.num_steps:
        raise InputError(
            f"{'; '.join(warnings)}; the last snapshot, which the model is exported from, is lost; "
            "to repeat the steps since the one before: --checkpoint.resume"
        )
    _save_snapshot(saved, source, target, c, ranks)


def _save_snapshot(
    saved: Snapshot, source: Path, target: Path, config: TrainConfig, ranks: Ranks = ALONE
) -> None:
    dtype = getattr(torch, config.checkpoint.export_dtype)

    def read(name: str, part: Slice) -> None:
        saved.read(f"param/{name}", part)

    save_weights(read_config(source), read, source, target, dtype, ranks)


def _loop(trainer: Trainer, start: int, console: Console) -> None:
    """Takes the steps that are left; a step is told when the next one has been launched."""
    c, layout = trainer.config, trainer.layout
    log = _open_log(trainer, start, console)
    with contextlib.ExitStack() as stack:
        if log:
            stack.enter_context(log)
        writer = None
        if c.checkpoint.every:
            writer = SnapshotWriter(c.output / "snapshots", c.checkpoint.keep, layout.ranks)
            stack.enter_context(writer)
        if layout.mesh is not None:
            stack.enter_context(exposed.collecting(layout.device))
        profile = stack.enter_context(Profile(layout, c, start, console))
        gauges = Gauges(layout)
        untold: tuple[int, Readings] | None = None
        for step in range(start, trainer.num_steps):
            with profile.step(step + 1):
                gauges.begin()
                readings = gauges.end(trainer.step(step))
            if untold:
                _tell(trainer, log, *untold)
            untold = (step, readings)
            done = step + 1
            if writer and (done % c.checkpoint.every == 0 or done == trainer.num_steps):
                _tell(trainer, log, *untold)  # a snapshot of a diverged run is never written
                untold = None
                writer.save(done, trainer.slices(), trainer.facts)
        if untold:
            _tell(trainer, log, *untold)


def _open_log(trainer: Trainer, start: int, console: Console) -> RunLog | None:
    """The first rank's; None on the others."""
    with trainer.layout.ranks.together():
        if trainer.layout.rank > 0:
            return None
        peak, source = peak_tflops(trainer.layout.device, trainer.model.compute_dtype)
        formula = "(6 P T + 6 V D labels + 6 L H K sum n^2) / seconds / devices"
        say(console, f"MFU = {formula} / {peak:.3g} TFLOP/s ({source})")
        return RunLog(
            trainer.config.output,
            console,
            num_steps=trainer.num_steps,
            start=start,
            every=trainer.config.log.every,
            board=trainer.config.log.tensorboard,
            peak_tflops=peak,
        )


def _tell(trainer: Trainer, log: RunLog | None, step: int, readings: Readings) -> None:
    """Waits until the step is done, the loop's only wait for the device, and logs it."""
    measured = readings.wait()
    loss, grad_norm = measured.loss, measured.grad_norm
    if measured.bad_labels:
        raise InputError(
            f"step {step + 1}: {measured.bad_labels} labels are outside the model's vocabulary; "
            "training stopped, the snapshots are from before; check the tokenizer"
        )
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise InputError(
            f"step {step + 1}: loss {loss}, gradient norm {grad_norm}; training stopped, "
            "the snapshots are from before; a lower optim.lr may help"
        )
    if log:
        log.write(_record(trainer, log, step, measured))


def _record(trainer: Trainer, log: RunLog, step: int, measured: Measured) -> StepRecord:
    plan, world = trainer.plan(step), trainer.layout.world
    num_tokens, step_s, elapsed_s = sum(plan.seqlens), measured.step_s, measured.elapsed_s
    tflops = sum(plan.costs) / step_s / world / 1e12
    price = trainer.config.log.dollars_per_hour * world
    return StepRecord(
        step=step + 1,
        epoch=(step + 1) / trainer.steps_per_epoch,
        loss=measured.loss,
        grad_norm=measured.grad_norm,
        lr=learning_rate(step, trainer.num_steps, trainer.config.optim),
        tokens=num_tokens,
        labels=sum(plan.labels),
        step_s=step_s,
        tokens_per_s=num_tokens / step_s / world,
        tflops=tflops,
        mfu=tflops / log.peak_tflops,
        imbalance=imbalance(plan.passes, plan.costs),
        exposed_s=measured.exposed_s,
        peak_bytes=measured.peak_bytes,
        eta_s=elapsed_s / (step + 1 - log.start) * (trainer.num_steps - step - 1),
        dollars=price * elapsed_s / 3600,
    )


def _device(config: TrainConfig) -> torch.device:
    """This process's: of a node's GPUs, the one of its number."""
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count, index = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    if not count:
        raise InputError("device: cuda was asked for, but torch sees no CUDA device")
    if index >= count:
        raise InputError(
            f"device: process {index + 1} of this node finds {count} GPUs; start one a GPU, by "
            f"torchrun --nproc-per-node {count}"
        )
    return torch.device("cuda", index)


def _dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return torch.bfloat16 if device.type == "cuda" else torch.float32


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
    config, ranks = trainer.config, trainer.layout.ranks
    if not config.checkpoint.resume:
        return 0
    saved, warnings = newest(config.output / "snapshots", repair=True, ranks=ranks)
    for warning in warnings:
        say(console, f"warning: {warning}", "yellow")
    if saved is None:
        return trainer.num_steps if _exported(config, ranks) else 0
    for name, value in trainer.facts.items():
        if saved.facts.get(name) != value:
            raise InputError(
                f"{saved.folder}: {name} was {saved.facts.get(name)}, now it is {value}; the data "
                "or the schedule has changed, so this would be another run"
            )
    with ranks.together():
        trainer.restore(saved)
    say(console, f"resuming after step {saved.step}")
    return saved.step


def _print_facts(trainer: Trainer, num_dropped: int, console: Console) -> None:
    c = trainer.config
    parameters = sum(p.numel() for p in trainer.model.parameters())
    layout = trainer.layout
    over = ""
    if layout.world > 1:
        over = f", over {layout.world} ranks: streams {layout.num_groups} x {layout.ulysses}"
    left_out = f", {num_dropped} left out as too long" if num_dropped else ""
    say(
        console,
        f"model  {c.model}, {parameters:,} parameters, {trainer.device} "
        f"{trainer.model.compute_dtype}, {trainer.attention} attention\n"
        f"data   {len(trainer.seqlens):,} sequences, {sum(trainer.seqlens):,} tokens, "
        f"{sum(trainer.labels):,} with loss{left_out}\n"
        f"run    {trainer.num_steps} steps of {c.batch_size}, {trainer.steps_per_epoch} an epoch"
        f"{over}",
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
