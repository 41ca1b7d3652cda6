"""`s1fast plan`: a recipe's minutes, dollars and memory on GPUs that nobody has paid for yet."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console

from s1fast import plan_report, published
from s1fast.checkpoint import read_config
from s1fast.config import TrainConfig, check
from s1fast.errors import InputError
from s1fast.fake_ranks import peak
from s1fast.files import make_directory, read_bytes
from s1fast.kernels.linear_cross_entropy import CHUNK_BYTES
from s1fast.metrics import say
from s1fast.model import ModelConfig
from s1fast.planner import Estimate, Machine, Sequences, estimate, free_bytes, state_bytes
from s1fast.rates import DEVICE_BYTES, GPU, Rates, find_rates, gpu_kind
from s1fast.recompute import layer_memory, reserve_bytes

RESULTS = Path(__file__).resolve().parent / "bench" / "results"
OTHER_MACHINES = tuple(Machine(gpu, nodes) for gpu in ("H100", "H200") for nodes in (1, 2, 4))
PROMPT_TOKENS = 150
"""Tokens of a sequence without label, where only its length is known: template and question."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig):
    """Predict a recipe's time, price and memory. Its fields are those of the recipe, and these."""

    gpu: GPU = "H100"
    """Kind of GPU."""
    nodes: int = 2
    """Nodes; s1 had two."""
    gpus_per_node: int = 8
    """GPUs in each, connected by NVLink."""
    lengths: Path | None = None
    """File with the tokens of one sequence a line, where the data are not at hand."""
    results: Path = RESULTS
    """Folder with result files of `s1fast bench kernels`: rates measured there replace assumed
    ones."""
    png: Path | None = None
    """Picture of the run on this machine and on others."""

    @property
    def machine(self) -> Machine:
        return Machine(self.gpu, self.nodes, self.gpus_per_node)


def plan(config: PlanConfig, console: Console | None = None) -> Estimate:
    """Prints the plan.

    Raises:
        InputError: a model, data or a machine that there is nothing known of; a run that does not
            fit, after printing it, with the remedy.
    """
    console = console or Console()
    check(config)
    for name in ("nodes", "gpus_per_node"):
        if getattr(config, name) < 1:
            raise InputError(f"{name}: must be at least 1, got {getattr(config, name)}")
    if config.dtype == "float32":
        raise InputError("dtype: only bfloat16 can be planned; float32 is many times slower")
    if config.results != RESULTS and not config.results.is_dir():
        raise InputError(f"results: {config.results} is no folder")
    model = find_model(config.model)
    data = find_sequences(config, model)
    one, rates = _estimate(config, model, data, config.machine)
    parts = memory(config, model, one)
    others = [_estimate(config, model, data, m)[0] for m in OTHER_MACHINES if m != config.machine]
    everywhere = sorted([one, *others], key=lambda e: (e.machine.gpu, e.machine.world))
    for line in [
        f"model      {config.model}, {model.num_weights:,} weights",
        f"data       {data.source}",
        *plan_report.details(one, rates),
        *plan_report.memory_lines(one, parts),
        "elsewhere:",
        *plan_report.layout_table(everywhere),
        f"plan       {plan_report.headline(one)}",
    ]:
        say(console, line)
    if config.png is not None:
        make_directory(config.png.parent)
        plan_report.plot(everywhere, config.png)
        say(console, f"picture    {config.png}")
    _refuse(config, one, sum(parts.values()), everywhere)
    return one


def outlook(recipe: TrainConfig) -> str:
    """The plan's last line alone, on s1's machine; without the memory, so it takes no time."""
    config = PlanConfig(**vars(recipe))
    model = find_model(config.model)
    one, rates = _estimate(config, model, find_sequences(config, model), config.machine)
    measured = sum(rate.measured for _, rate in rates.items())
    kind = f"{measured} rates measured, the others assumed" if measured else "every rate assumed"
    return f"{plan_report.headline(one)}; planned, {kind}"


def _estimate(
    config: PlanConfig, model: ModelConfig, data: Sequences, machine: Machine
) -> tuple[Estimate, Rates]:
    rates = find_rates(machine.gpu, config.results, config.log.dollars_per_hour)
    return estimate(config, model, data, machine, rates), rates


def find_model(name: str) -> ModelConfig:
    """From a local folder's config.json, or of a published model: nothing is downloaded."""
    if Path(name).is_dir():
        return read_config(Path(name))
    known = published.model_config(name)
    if known is None:
        raise InputError(
            f"model: {name!r} is no local folder, and its config is not among the known ones "
            f"({', '.join(published.known_models())}); download its config.json and name the folder"
        )
    return known


def find_sequences(config: PlanConfig, model: ModelConfig) -> Sequences:
    """Lengths from --lengths, from the data and the model's tokenizer, or as published."""
    limit = min(config.data.max_length, model.max_position_embeddings)
    if config.lengths is not None:
        lengths = _read_lengths(config.lengths)
        return _without_labels(lengths, config, limit, str(config.lengths))
    if Path(config.data.path).exists() and Path(config.model).is_dir():
        from s1fast.chat import Chat
        from s1fast.packing import label_counts
        from s1fast.rows import load_examples

        chat = Chat.load(Path(config.model))
        examples, _ = load_examples(config.data, chat, model.max_position_embeddings)
        lengths = [len(example.ids) for example in examples]
        return Sequences(lengths, label_counts(examples), config.data.path)
    found = published.sequence_lengths(config.data.path)
    if found is None:
        raise InputError(
            f"data.path: {config.data.path!r} with the tokenizer of {config.model!r} is not at "
            f"hand, and only the lengths of {', '.join(published.TRACES)} are published; name "
            "local folders of both, or give a file with one length a line: --lengths"
        )
    source = f"{config.data.path}, published trace lengths + {published.AROUND_A_TRACE} tokens"
    return _without_labels(found, config, limit, source)


def _read_lengths(path: Path) -> list[int]:
    lengths = []
    for number, line in enumerate(read_bytes(path).decode(errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        if not re.fullmatch("0*[1-9][0-9]{0,8}", line.strip()):
            raise InputError(f"{path}: line {number}: expected a count of tokens, got {line!r}")
        lengths.append(int(line))
    if not lengths:
        raise InputError(f"{path}: no lengths there")
    return lengths


def _without_labels(
    lengths: Sequence[int], config: PlanConfig, limit: int, source: str
) -> Sequences:
    kept = [n for n in lengths if n <= limit]
    if len(kept) < len(lengths) and not config.data.drop_long:
        raise InputError(
            f"{source}: {len(lengths) - len(kept)} sequences are above the limit of {limit} "
            "tokens; training would stop there: raise data.max_length, or set data.drop_long"
        )
    if not kept:
        raise InputError(f"{source}: every sequence is above the limit of {limit} tokens")
    tokens = f"{len(kept):,} sequences, {sum(kept):,} tokens"
    return Sequences(kept, [max(1, n - PROMPT_TOKENS) for n in kept], f"{source}: {tokens}")


_NAMES = {  # of torch's tracker
    "act": "kept for backward",
    "temp": "layer at work",
    "unsharded_param": "gathered weights",
    "all_gather": "weights being gathered",
    "unsharded_grad": "gradients of a layer",
    "reduce_scatter": "gradients being reduced",
    "sharded_grad": "gradients",
}


def memory(config: TrainConfig, model: ModelConfig, one: Estimate) -> dict[str, float]:
    """Bytes by category on a rank in the run's largest pass.

    The larger of two moments: the head's backward, when everything is kept, and the first layer's,
    when all gradients are there. The first is tracked (fake_ranks), the second put together of the
    same parts.
    """
    machine = one.machine
    tracked = peak(model, machine.world, one.ulysses, one.most_tokens, one.worst)
    start = {label: tracked.get(name, 0.0) for name, label in _NAMES.items()}
    layers, gradients = model.num_hidden_layers, 4 * model.num_weights / machine.world
    end = start | {
        "gradients": gradients,
        "kept for backward": start["kept for backward"] / layers,
    }
    if not one.first_pass:
        start["gradients"] = gradients
    at_work = layer_memory(model, torch.bfloat16, machine.world, one.ulysses, 0.0).at_work
    working = max(start, end, key=lambda parts: sum(parts.values()))
    return {
        "weights, fp32": 4 * model.num_weights / machine.world,
        f"moments, {config.optim.moments}": (state_bytes(config, model) - 4 * model.num_weights)
        / machine.world,
        **working,
        "inside an operation": max(CHUNK_BYTES["cuda"], at_work * one.most_tokens),
        **reserve_bytes(int(free_bytes(config, model, machine))),
    }


def _refuse(
    config: PlanConfig, one: Estimate, needed: float, everywhere: Sequence[Estimate]
) -> None:
    there = DEVICE_BYTES[one.machine.gpu]
    if one.fits and needed <= there:
        return
    remedies = []
    if config.optim.moments == "float32":
        remedies.append('optim.moments = "bfloat16"')
    if config.recompute != "auto":
        remedies.append('recompute = "auto"')
    fitting = [str(e.machine) for e in everywhere if e.fits and e.machine != one.machine]
    if fitting:
        remedies.append("other machines: " + ", ".join(fitting))
    remedies.append("a smaller microbatch_tokens or data.max_length")
    raise InputError(
        f"does not fit: {needed / 1e9:.0f} GB are needed on a GPU that has {there / 1e9:.0f}; try "
        + "; ".join(remedies)
    )


def dry_run(config: TrainConfig, console: Console | None = None) -> None:
    """The plan of `train --dry-run`: on the GPUs that the command would have used.

    Those of torchrun's ranks, or the one that a bare command takes; where there is none, on the
    machine that `plan` assumes. Of several ranks the first alone speaks.
    """
    if int(os.environ.get("RANK", 0)):
        return
    machine: dict[str, Any] = {}
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        kind = gpu_kind(name)
        if kind is None:
            raise InputError(
                f"--dry-run: no rates are known of {name}; s1fast plan RECIPE --gpu "
                f"{' or '.join(get_args(GPU))} plans for those"
            )
        world, local = (int(os.environ.get(n, 1)) for n in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        machine = {"gpu": kind, "nodes": world // local, "gpus_per_node": local}
    plan(PlanConfig(**vars(config), **machine), console)
