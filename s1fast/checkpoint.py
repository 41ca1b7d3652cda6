"""Hugging Face model folders in and out: config.json, safetensors shards, tokenizer files.

Our weights are theirs with q, k, v and gate, up stacked along the rows; `layout` says how, and both
directions walk it, a tensor at a time. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from s1fast.errors import InputError
from s1fast.files import new_directory, read_json_object, write_atomic
from s1fast.model import Model, ModelConfig

CARRIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
"""Files that travel with the weights, where the source folder has them."""

SHARD_BYTES = 5 << 30
_DTYPES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True)
class Part:
    """A Hugging Face tensor as rows `start` to `stop` of one of our parameters."""

    name: str
    start: int
    stop: int


def layout(config: ModelConfig) -> dict[str, tuple[Part, ...]]:
    """Our parameter name -> the Hugging Face tensors that it stacks, in order."""
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    d, f, vocab = config.hidden_size, config.intermediate_size, config.vocab_size

    def stack(*named: tuple[str, int]) -> tuple[Part, ...]:
        parts, start = [], 0
        for name, rows in named:
            parts.append(Part(name, start, start + rows))
            start += rows
        return tuple(parts)

    table = {"embed": stack(("model.embed_tokens.weight", vocab))}
    for i in range(config.num_hidden_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        attn, mlp = theirs + "self_attn.", theirs + "mlp."
        qkv = ((attn + "q_proj", q), (attn + "k_proj", kv), (attn + "v_proj", kv))
        table[ours + "input_norm"] = stack((theirs + "input_layernorm.weight", d))
        table[ours + "qkv_weight"] = stack(*((name + ".weight", rows) for name, rows in qkv))
        if config.attention_bias:
            table[ours + "qkv_bias"] = stack(*((name + ".bias", rows) for name, rows in qkv))
        table[ours + "o_weight"] = stack((attn + "o_proj.weight", d))
        table[ours + "post_norm"] = stack((theirs + "post_attention_layernorm.weight", d))
        gate_up = ((mlp + "gate_proj.weight", f), (mlp + "up_proj.weight", f))
        table[ours + "gate_up_weight"] = stack(*gate_up)
        table[ours + "down_weight"] = stack((mlp + "down_proj.weight", d))
    table["head.norm"] = stack(("model.norm.weight", d))
    if not config.tie_word_embeddings:
        table["head.weight"] = stack(("lm_head.weight", vocab))
    return table


class Reader:
    """Random access to the tensors of a folder of safetensors files, by name and rows."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        single = folder / "model.safetensors"
        if index.exists():
            files = _weight_map(index)
        elif single.exists():
            files = dict.fromkeys(_open(single).keys(), single.name)
        else:
            raise InputError(f"{folder}: neither {single.name} nor {index.name} is there")
        self.folder, self.file_of = folder, files
        self._handles: dict[str, Any] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def rows(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        columns: tuple[int, int] | None = None,
    ) -> Tensor:
        """Rows start to stop of a tensor, in its stored dtype; only these are read. Of a matrix,
        if asked, a range of columns."""
        part = self._slice(name)
        if part.get_dtype() not in _DTYPES:
            raise InputError(
                f"{self.folder / self.file_of[name]}: {name} is stored as {part.get_dtype()}; "
                f"expected one of {', '.join(_DTYPES)}"
            )
        return part[start:stop] if columns is None else part[start:stop, slice(*columns)]

    def _slice(self, name: str) -> Any:
        file = self.file_of[name]
        if file not in self._handles:
            self._handles[file] = _open(self.folder / file)
        try:
            return self._handles[file].get_slice(name)
        except SafetensorError as error:
            raise InputError(f"{self.folder / file}: no tensor {name}: {error}") from None


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a usable safetensors file: {error}") from None


def _weight_map(index: Path) -> dict[str, str]:
    files = read_json_object(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise InputError(f"{index}: weight_map must be an object that names a file per tensor")
    for name, file in files.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise InputError(f"{index}: {name} lies in {file!r}, which is no file of this folder")
        if not (index.parent / file).is_file():
            raise InputError(f"{index.parent / file}: missing, but {index.name} names it")
    return files


def read_config(folder: Path) -> ModelConfig:
    """The ModelConfig of a folder's config.json."""
    path = folder / "config.json"
    if not path.exists():
        raise InputError(f"{folder}: no config.json there, so it is no Hugging Face model folder")
    return ModelConfig.from_json(read_json_object(path), str(path))


def load_weights(model: Model, folder: Path) -> None:
    """Fills the model's parameters from a folder, casting to their dtype.

    Raises:
        InputError: tensors that are missing, left over or of another shape, by name.
    """
    reader = check_weights(model, folder)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for ours, stacked in layout(model.config).items():
            for part in stacked:
                parameters[ours][part.start : part.stop].copy_(reader.rows(part.name))


def check_weights(model: Model, folder: Path) -> Reader:
    """Opens a folder whose tensors fit the model, which may be on meta still.

    Called before memory is taken for weights that a damaged config.json makes too large.
    """
    reader = Reader(folder)
    table = layout(model.config)
    parts = [part for stacked in table.values() for part in stacked]
    _same_names(folder, {p.name for p in parts}, set(reader.file_of), model.config)
    parameters = dict(model.named_parameters())
    for ours, stacked in table.items():
        for part in stacked:
            wanted = [part.stop - part.start, *parameters[ours].shape[1:]]
            found = list(reader.shape(part.name))
            if found != wanted:
                raise InputError(
                    f"{folder / reader.file_of[part.name]}: {part.name} has shape {found}, "
                    f"config.json implies {wanted}"
                )
    return reader


def _same_names(folder: Path, wanted: set[str], found: set[str], config: ModelConfig) -> None:
    # Older exports also hold what can be derived: the tied head, the rotary frequencies.
    derived = {name for name in found if name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        derived.add("lm_head.weight")
    for kind, names in (("missing", wanted - found), ("not part", found - wanted - derived)):
        if names:
            shown = ", ".join(sorted(names)[:5]) + (" ..." if len(names) > 5 else "")
            raise InputError(f"{folder}: {len(names)} tensors are {kind} of this model: {shown}")


def load_model(folder: Path, device: torch.device, dtype: torch.dtype) -> Model:
    """The folder's model with weights of the given dtype, computing in it."""
    config = read_config(folder)
    with torch.device("meta"):
        model = Model(config, compute_dtype=dtype)
    check_weights(model, folder)
    model.materialise(device, dtype)
    load_weights(model, folder)
    return model


def save_model(
    model: Model, source: Path, target: Path, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes a folder that transformers and s1fast load: whole, or not at all.

    Args:
        source: folder that config.json, tokenizer and generation files are taken from.
        target: must not exist.
        dtype: of the stored weights.
        shard_bytes: most bytes in one file; one shard at a time is held in memory.
    """
    parameters = dict(model.named_parameters())
    table = layout(model.config)
    shards = list(_shards(parameters, table, dtype, shard_bytes))
    names = _shard_names(len(shards))
    with new_directory(target) as folder:
        for name, shard in zip(names, shards, strict=True):
            tensors = {}
            for ours, part in shard:
                rows = parameters[ours].detach()[part.start : part.stop]
                # A copy always: safetensors refuses tensors that share memory.
                tensors[part.name] = rows.to(device="cpu", dtype=dtype, copy=True).contiguous()
            save_file(tensors, folder / name, metadata={"format": "pt"})
        if len(shards) > 1:
            where = {p.name: n for n, shard in zip(names, shards, strict=True) for _, p in shard}
            total = sum(p.numel() for p in parameters.values()) * dtype.itemsize
            index = {"metadata": {"total_size": total}, "weight_map": where}
            write_atomic(folder / "model.safetensors.index.json", json.dumps(index, indent=2))
        config = read_json_object(source / "config.json")
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
        write_atomic(folder / "config.json", json.dumps(config, indent=2))
        for name in CARRIED:
            if (source / name).exists():
                shutil.copyfile(source / name, folder / name)


def _shards(
    parameters: dict[str, torch.nn.Parameter],
    table: dict[str, tuple[Part, ...]],
    dtype: torch.dtype,
    shard_bytes: int,
) -> Iterator[list[tuple[str, Part]]]:
    shard: list[tuple[str, Part]] = []
    held = 0
    for ours, stacked in table.items():
        row_bytes = parameters[ours][0].numel() * dtype.itemsize
        for part in stacked:
            size = (part.stop - part.start) * row_bytes
            if shard and held + size > shard_bytes:
                yield shard
                shard, held = [], 0
            shard.append((ours, part))
            held += size
    yield shard


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
