"""Tensor-parallel decoding: heads and feed-forward split over the ranks of a process group.

Rank r of n keeps H/n query heads with their N/n key-value heads and F/n feed-forward units of every
layer, so two sums over ranks a layer (after o and after down) make its output whole; and V/n rows
of the head, whose logits are gathered (a vocabulary that n does not divide stays whole). Embedding
and norms are on every rank. Rank 0 decides what runs; before each step it tells the others, and
what it draws holds for all. A step of T tokens sends 2 L T D elements through the sums, and V for
each token drawn.

Floor at 8 ranks, Qwen2.5-32B in bf16, one token: 8.0 GB of weights a rank at 3.0 TB/s, 2.7 ms, and
128 sums of 10 KB, a gathering of 38 KB. Measured on a GPU: not yet.
"""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from s1fast.checkpoint import Part, Reader, check_weights, layout, read_config
from s1fast.errors import InputError
from s1fast.model import Model, ModelConfig


class Ranks:
    """The ranks that share a model: all of torch.distributed's default group, set up before.

    Args:
        one_shot: the sums of a decoding step by symmetric memory, each rank reading all others'
            parts at once, which for a few KB is faster than NCCL. GPUs of one node alone.

    Raises:
        InputError: torch.distributed is not set up, or one_shot without NCCL.
    """

    def __init__(self, *, one_shot: bool = False) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise InputError("ranks: torch.distributed is not set up; start with torchrun")
        # An idle engine waits for its next request as long as that takes.
        forever = timedelta(days=365)
        self.group: Any = dist.new_group(timeout=forever)
        # Orders go from host to host: over NCCL they would wait for the steps that are under way.
        alike = dist.get_backend(self.group) == "gloo"
        self._hosts: Any = self.group if alike else dist.new_group(timeout=forever, backend="gloo")
        if one_shot and alike:
            raise InputError("ranks: one_shot sums are of GPUs; the process group is gloo's")
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self._one_shot = one_shot
        self._part: Tensor | None = None

    def sum_small(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        """Makes ready for one-shot sums of up to so many elements, if they were asked for."""
        if self._one_shot:
            from torch.distributed import _symmetric_memory as symmetric

            self._part = symmetric.empty(numel, dtype=dtype, device=device)
            symmetric.rendezvous(self._part, self.group.group_name)

    def reduce(self, partial_TD: Tensor) -> Tensor:
        """Sum over all ranks, the same bits on each."""
        if self._part is not None and partial_TD.numel() <= self._part.numel():
            return torch.ops.symm_mem.one_shot_all_reduce_copy(
                self._part, partial_TD, "sum", self.group.group_name
            )
        dist.all_reduce(partial_TD, group=self.group)
        return partial_TD

    def join(self, part_TV: Tensor, vocab_size: int) -> Tensor:
        """(T, vocab_size) logits of every rank's (T, vocab_size / n), the same bits on each; those
        of a whole head as they are."""
        if part_TV.shape[1] == vocab_size:
            return part_TV
        part_NTV = part_TV.new_empty(self.count, *part_TV.shape)
        if len(part_TV):
            dist.all_gather_into_tensor(part_NTV.flatten(0, 1), part_TV, group=self.group)
        return part_NTV.transpose(0, 1).flatten(1)

    def agree(self, drawn: Tensor) -> Tensor:
        """Rank 0's tokens."""
        dist.broadcast(drawn, 0, group=self.group)
        return drawn

    def share(self, orders: Any) -> Any:
        """Rank 0's orders."""
        box = [orders]
        dist.broadcast_object_list(box, 0, group=self._hosts)
        return box[0]

    def close(self) -> None:
        """Ends the group with its threads: one that Python's own end meets would abort it."""
        if self.group is not None:
            for group in {self.group, self._hosts}:
                dist.destroy_process_group(group)
            self.group = self._hosts = None


def shard_config(config: ModelConfig, count: int, where: str) -> ModelConfig:
    """The config of one rank's part.

    Raises:
        InputError: heads or feed-forward units that do not divide by the number of ranks.
    """
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    for name in names:
        if getattr(config, name) % count:
            raise InputError(
                f"{where}: {name} {getattr(config, name)} does not divide by {count} ranks"
            )
    return dataclasses.replace(config, **{name: getattr(config, name) // count for name in names})


def shard_model(config: ModelConfig, count: int, where: str, dtype: torch.dtype) -> Model:
    """One rank's part of a model, without memory. Its head is its own, tied elsewhere or not.

    Raises:
        InputError: see shard_config.
    """
    local = dataclasses.replace(shard_config(config, count, where), tie_word_embeddings=False)
    with torch.device("meta"):
        model = Model(local, compute_dtype=dtype)
        if config.vocab_size % count == 0:
            shape = (config.vocab_size // count, config.hidden_size)
            model.head.weight = torch.nn.Parameter(torch.empty(shape))
    return model


def load_shard(folder: Path, device: torch.device, dtype: torch.dtype, ranks: Ranks) -> Model:
    """One rank's part of a folder's model; nothing else of it is ever in memory."""
    config = read_config(folder)
    model = shard_model(config, ranks.count, str(folder / "config.json"), dtype)
    with torch.device("meta"):
        reader = check_weights(Model(config, compute_dtype=dtype), folder)
    model.materialise(device, dtype)
    parameters = dict(model.named_parameters())
    whole, mine = layout(config), layout(model.config)
    whole.setdefault("head.weight", whole["embed.weight"])  # tied
    with torch.no_grad():
        for ours, parts in mine.items():
            for part, full in zip(parts, whole[ours], strict=True):
                target = parameters[ours][part.start : part.stop]
                target.copy_(_slice(reader, full, target, ranks.rank))
    return model


def _slice(reader: Reader, full: Part, target: Tensor, rank: int) -> Tensor:
    """This rank's rows or columns of a tensor, whichever the target has fewer of."""
    rows = len(target)
    if rows < full.stop - full.start:
        return reader.rows(full.name, rank * rows, (rank + 1) * rows)
    shape = reader.shape(full.name)
    if len(shape) == 1 or target.shape[1] == shape[1]:
        return reader.rows(full.name)
    columns = target.shape[1]
    return reader.rows(full.name, columns=(rank * columns, (rank + 1) * columns))
