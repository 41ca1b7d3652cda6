"""The configuration of a training run: frozen dataclasses <- TOML recipe <- command line.

A recipe is a TOML file with the names below; an unknown one is an error that suggests the nearest.
The resolved configuration is written to the run's folder and is itself a recipe.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from s1fast.errors import InputError
from s1fast.files import read_bytes


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on."""

    path: str = ""
    """JSONL or Parquet file, a folder of them, or a Hugging Face dataset id."""
    split: str = "train"
    """Split to take where the file names tell splits apart."""
    teacher: Literal["deepseek", "gemini"] = "deepseek"
    """Whose columns to take where a row has both, as s1K-1.1 does."""
    max_length: int = 32768
    """Longest sequence in tokens; a longer one is an error unless drop_long."""
    drop_long: bool = False
    """Leave out sequences above max_length, and say how many."""
    loss_weight: Literal["sample", "token"] = "sample"
    """Every sequence weighs the same, as in s1's run, or every token does."""
    preview: int = 0
    """Print this many samples with the masked tokens dimmed, and stop."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule; the defaults are s1's."""

    lr: float = 1e-5
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 1e-4
    """Decoupled decay of matrices; biases and norms have none."""
    warmup_ratio: float = 0.05
    """Share of the steps spent in linear warm-up; a cosine to zero follows."""
    clip_norm: float = 1.0
    """Largest global gradient norm."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Precision in which both moments are kept. bfloat16 saves 4 bytes of memory a parameter and
    8 of the 28 that a step moves. It needs betas of at most 0.99: a slower average changes by less
    than bfloat16's spacing in a step, so that it would be rounded back and stay."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept of a run."""

    every: int = 100
    """Steps between snapshots; 0 for none."""
    keep: int = 2
    """How many of the newest snapshots to keep."""
    resume: bool = False
    """Go on from the newest whole snapshot in the output folder, if there is one."""
    export_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the exported Hugging Face folder."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is told of a run."""

    every: int = 1
    """Steps between console lines."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    dollars_per_hour: float = 0.0
    """Price of one device for an hour; shown as cost when given."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Fine-tune all weights of a model on reasoning traces."""

    model: str = ""
    """Folder in Hugging Face format, or a hub id."""
    output: Path = Path("out/run")
    """Folder for snapshots, logs, the resolved recipe and the exported model."""
    init: Literal["pretrained", "random"] = "pretrained"
    """Start from the folder's weights, or from random ones of its config."""
    seed: int = 0
    """Seed of the data order and of random weights."""
    epochs: int = 5
    """Passes over the data."""
    max_steps: int = 0
    """Stop after this many optimizer steps; 0 for all. The schedule is laid over them."""
    batch_size: int = 16
    """Sequences in an optimizer step."""
    microbatch_tokens: int = 32768
    """Tokens of a device in one forward and backward pass; a step takes as many as it needs."""
    recompute: Literal["auto", "none", "full"] = "auto"
    """What backward computes again rather than keep: nothing that costs a matrix product, every
    layer, or, chosen for each pass by its tokens, as little as fits."""
    activation_gb: float = 0.0
    """Memory of a device for what forward keeps, in GB, where recompute is auto; 0 for what is
    free at the start."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which gradients are summed over devices; bfloat16 halves that traffic."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic; weights are fp32 always. auto: bfloat16 on GPU, float32 on CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU if there is one."""
    attention: Literal["auto", "triton", "gluon", "flash", "torch", "reference"] = "auto"
    """Ours, ours with a forward for Hopper alone, flash-attn, torch's varlen attention, or torch's
    sequence by sequence. auto: triton on a GPU in bfloat16 where heads are 64 or 128 wide, else
    reference."""
    dry_run: bool = False
    """Print what the run would take, its memory, minutes and dollars, and stop."""
    profile: str = ""
    """Steps to profile, FIRST:LAST as the log counts them, 10:12 being three. OUTPUT/profile gets a
    trace, the memory's history on a GPU, and a table of where the time went."""
    compile: bool = False
    """Compile the layers. What they do is our own kernels either way, so it saves launch time at
    most; it needs triton attention, and minutes at the start."""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


_LEAST = dict.fromkeys(("max_steps", "data.preview", "checkpoint.every"), 0)
_LEAST |= dict.fromkeys(("epochs", "batch_size", "microbatch_tokens"), 1)
_LEAST |= dict.fromkeys(("checkpoint.keep", "log.every"), 1)
_LEAST["data.max_length"] = 2
_AMOUNTS = ("activation_gb", "optim.lr", "optim.weight_decay", "log.dollars_per_hour")


def check(config: TrainConfig) -> None:
    """Raises an InputError that names the first field whose value cannot work."""
    o = config.optim
    rules = [
        ("model", bool(config.model), "a folder or hub id is needed"),
        ("data.path", bool(config.data.path), "a file, folder or hub id is needed"),
        ("seed", 0 <= config.seed < 1 << 63, "must be in 0..2^63-1"),
        ("optim.betas", all(0 <= b < 1 for b in o.betas), "must lie in [0, 1)"),
        ("optim.eps", 0 < o.eps < math.inf, "must be positive"),
        ("optim.warmup_ratio", 0 <= o.warmup_ratio <= 1, "must lie in [0, 1]"),
        ("optim.clip_norm", o.clip_norm > 0, "must be positive"),
        (
            "optim.moments",
            o.moments == "float32" or max(o.betas) <= 0.99,
            "bfloat16 needs optim.betas of at most 0.99; take float32",
        ),
        (
            "profile",
            not config.profile or bool(profiled_steps(config)),
            "must be FIRST:LAST, steps counted from 1, such as 10:12",
        ),
    ]
    for name, least in _LEAST.items():
        rules.append((name, _value(config, name) >= least, f"must be at least {least}"))
    for name in _AMOUNTS:
        rules.append((name, 0 <= _value(config, name) < math.inf, "must be a number from 0"))
    for name in ("model", "output", "data.path", "data.split"):  # the run's own recipe is UTF-8
        found = re.search(r"[\ud800-\udfff]", str(_value(config, name)))
        rules.append((name, found is None, "must be valid Unicode"))
    for name, holds, rule in rules:
        if not holds:
            raise InputError(f"{name}: {rule}, got {_value(config, name)!r}")


def profiled_steps(config: TrainConfig) -> range:
    """Those to profile, counted from 1; empty for none, and where the field says no such thing."""
    found = re.fullmatch("([1-9][0-9]{0,8}):([1-9][0-9]{0,8})", config.profile)
    return range(int(found[1]), int(found[2]) + 1) if found else range(0)


def load_recipe(path: Path) -> TrainConfig:
    """Reads a TOML recipe. Raises an InputError that names the file and the key."""
    data = read_bytes(path)
    try:
        tree = tomllib.loads(data.decode())
    except (RecursionError, ValueError) as error:  # TOMLDecodeError and the like are ValueErrors
        raise InputError(f"{path}: not valid TOML: {error}") from None
    return _build(TrainConfig, tree, str(path), "")


def to_toml(config: TrainConfig) -> str:
    """The configuration as a recipe: reading it back gives an equal one."""
    top, tables = [], []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            lines = [
                f"{g.name} = {_literal(getattr(value, g.name))}" for g in dataclasses.fields(value)
            ]
            tables.append("\n".join([f"[{f.name}]", *lines]))
        else:
            top.append(f"{f.name} = {_literal(value)}")
    return "\n\n".join(["\n".join(top), *tables]) + "\n"


_FREE = {
    "output",
    "log",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.resume",
    "data.preview",
    "dry_run",
    "profile",
}
"""Fields that may differ between a run and its resumption: they do not change the mathematics."""


def differences(ours: TrainConfig, theirs: TrainConfig) -> list[str]:
    """Lines 'field: ours, was theirs' for fields that change the result of a run."""
    lines = []
    for name in field_names(TrainConfig):
        a, b = _value(ours, name), _value(theirs, name)
        if a != b and name not in _FREE and name.split(".")[0] not in _FREE:
            lines.append(f"{name}: {a!r}, was {b!r}")
    return lines


def flat(config: TrainConfig) -> dict[str, str]:
    """Dotted name -> value of every field, for people to compare."""
    return {name: str(_value(config, name)) for name in field_names(TrainConfig)}


def field_names(cls: type, prefix: str = "") -> list[str]:
    """Dotted names of all fields of a configuration class."""
    names = []
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            names += field_names(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


_SPELLINGS = {  # names that other trainers use
    "learning_rate": "optim.lr",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "microbatch_tokens",
    "max_grad_norm": "optim.clip_norm",
    "output_dir": "output",
    "train_file_path": "data.path",
    "block_size": "data.max_length",
    "max_seq_length": "data.max_length",
    "save_steps": "checkpoint.every",
    "model_name": "model",
}


def _build(cls: Any, tree: dict[str, Any], where: str, prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            raise InputError(f"{where}: unknown key {prefix}{key}; {_suggest(key, prefix)}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise InputError(f"{where}: {prefix}{key} must be a table")
            values[key] = _build(hints[key], value, where, f"{prefix}{key}.")
        else:
            values[key] = _convert(hints[key], value, f"{where}: {prefix}{key}")
    return cls(**values)


def _suggest(key: str, prefix: str) -> str:
    names = field_names(TrainConfig)
    if key in _SPELLINGS:
        return f"did you mean {_SPELLINGS[key]}?"
    near = [name for name in names if name.split(".")[-1] == key]
    near = near or difflib.get_close_matches(prefix + key, names, 1, 0.5)
    return f"did you mean {near[0]}?" if near else f"known keys: {', '.join(names)}"


def _convert(hint: Any, value: Any, where: str) -> Any:
    """The TOML value as the field's type; whole numbers pass as floats, nothing else is bent."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in arguments or type(value) is not str:
            raise InputError(f"{where} must be one of {', '.join(arguments)}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list) or len(value) != len(arguments):
            raise InputError(f"{where} must be a list of {len(arguments)}, got {value!r}")
        pairs = zip(arguments, value, strict=True)
        return tuple(_convert(inner, item, where) for inner, item in pairs)
    if hint is Path and isinstance(value, str) and "\0" not in value:
        return Path(value)
    if hint is float and type(value) is int and abs(value) < 1 << 53:
        return float(value)
    if type(value) is not hint:
        name = getattr(hint, "__name__", str(hint))
        raise InputError(f"{where} must be of type {name}, got {value!r}")
    if hint is str and "\0" in value:
        raise InputError(f"{where} holds a NUL character")
    return value


def _value(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def _literal(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    if isinstance(value, str | Path):  # TOML escapes as JSON does, and one character more
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower()
