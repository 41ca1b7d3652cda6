"""Hugging Face model folders in and out: config.json, safetensors shards, tokenizer files.

Our weights are theirs with q, k, v and gate, up stacked along the rows; `layout` says how, and both
directions walk it, a few rows at a time. Nothing is ever unpickled.
"""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from s1fast.errors import InputError
from s1fast.files import new_directory, read_json_object, write_atomic
from s1fast.model import Model, ModelConfig
from s1fast.ranks import ALONE, Ranks
from s1fast.slices import Slice, slice_of
from s1fast.tensor_files import DTYPES, TensorFiles, open_tensors, write_tensors

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

SHARD_BYTES = 5 * 10**9
PIECE_BYTES = 64 << 20


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

    table = {"embed.weight": stack(("model.embed_tokens.weight", vocab))}
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
            files = dict.fromkeys(open_tensors(single).keys(), single.name)
        else:
            raise InputError(f"{folder}: neither {single.name} nor {index.name} is there")
        self.folder, self.file_of = folder, files
        self._files = TensorFiles(folder)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files.part(self.file_of[name], name).get_shape())

    def rows(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        columns: tuple[int, int] | None = None,
    ) -> Tensor:
        """Rows start to stop of a tensor, in its stored dtype; only these are read. Of a matrix,
        if asked, a range of columns."""
        self.check_dtype(name)
        part = self._files.part(self.file_of[name], name)
        return part[start:stop] if columns is None else part[start:stop, slice(*columns)]

    def check_dtype(self, name: str) -> None:
        found = self._files.part(self.file_of[name], name).get_dtype()
        if found not in DTYPES.values():
            raise InputError(
                f"{self.folder / self.file_of[name]}: {name} is stored as {found}; "
                f"expected one of {', '.join(DTYPES.values())}"
            )


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

    Where they are cut along their rows, as FSDP2 cuts them, only this rank's rows are read.

    Raises:
        InputError: tensors that are missing, left over, or of another shape or dtype, by name; the
            same on all ranks.
    """
    reader = check_weights(model, folder)
    parameters = dict(model.named_parameters())
    for ours, stacked in layout(model.config).items():
        target = slice_of(parameters[ours])
        for part in stacked:
            target.fill(part.start, part.stop, functools.partial(reader.rows, part.name))


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
            reader.check_dtype(part.name)
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


Read = Callable[[str, Slice], None]
"""Fills rows of one of our parameters, named, from wherever it lies, casting."""


def save_model(
    model: Model, source: Path, target: Path, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES
) -> None:
    """save_weights of a model that this one process holds, by FSDP of one rank too.

    Raises:
        ValueError: it holds some rows only.
    """
    held = {name: slice_of(parameter) for name, parameter in model.named_parameters()}
    for name, rows in held.items():
        if len(rows.tensor) != rows.shape[0]:
            raise ValueError(f"{name}: this rank has {len(rows.tensor)} rows of {rows.shape}")

    def read(name: str, part: Slice) -> None:
        whole = held[name].tensor
        part.fill(0, len(whole), lambda start, stop: whole[start:stop])

    save_weights(model.config, read, source, target, dtype, shard_bytes=shard_bytes)


def save_weights(
    config: ModelConfig,
    read: Read,
    source: Path,
    target: Path,
    dtype: torch.dtype,
    ranks: Ranks = ALONE,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a folder that transformers and s1fast load: whole, or not at all.

    Holds PIECE_BYTES of the model at a time. Several ranks share out the files among them, which
    are the same whatever their number.

    Args:
        read: gives any rows of the model, on every rank.
        source: folder that config.json, tokenizer and generation files are taken from.
        target: must not exist.
        dtype: of the stored weights.
        shard_bytes: most bytes in one file, unless a tensor alone is larger.
    """
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Model(config).named_parameters()}
    shards = list(_shards(shapes, layout(config), dtype, shard_bytes))
    names = _shard_names(len(shards))
    where = {part.name: n for n, shard in zip(names, shards, strict=True) for _, part in shard}
    with new_directory(target, ranks) as folder:
        for name, shard in list(zip(names, shards, strict=True))[ranks.rank :: ranks.world]:
            tensors = {
                part.name: (dtype, (part.stop - part.start, *shapes[ours][1:]))
                for ours, part in shard
            }
            pieces = _pieces(read, shard, shapes, dtype)
            write_tensors(folder / name, tensors, pieces, {"format": "pt"})
        if ranks.rank == 0:
            total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
            _write_companions(folder, source, dtype, where if len(shards) > 1 else {}, total)


def _pieces(
    read: Read,
    shard: list[tuple[str, Part]],
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
) -> Iterator[Tensor]:
    """A file's tensors, some rows at a time."""
    for ours, part in shard:
        step = max(1, PIECE_BYTES // (math.prod(shapes[ours][1:]) * dtype.itemsize))
        for start in range(part.start, part.stop, step):
            rows = min(step, part.stop - start)
            piece = torch.empty(rows, *shapes[ours][1:], dtype=dtype)
            read(ours, Slice(piece, start, shapes[ours]))
            yield piece


def _write_companions(
    folder: Path, source: Path, dtype: torch.dtype, where: dict[str, str], total: int
) -> None:
    """What lies beside the weights: index, config.json, tokenizer."""
    if where:
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
    shapes: dict[str, tuple[int, ...]],
    table: dict[str, tuple[Part, ...]],
    dtype: torch.dtype,
    shard_bytes: int,
) -> Iterator[list[tuple[str, Part]]]:
    shard: list[tuple[str, Part]] = []
    held = 0
    for ours, stacked in table.items():
        row_bytes = math.prod(shapes[ours][1:]) * dtype.itemsize
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
