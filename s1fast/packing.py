"""From examples to packed streams: order, batches, labels, weights, all on the host.

A step's batch is `batch_size` sequences in a seeded order; it is laid out as one or more packed
streams, and a stream may be cut evenly over ranks. `loss_weight_T` holds mask and normalisation,
computed over the whole batch, so the summed loss does not depend on streams or ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from s1fast.chat import Example

LossWeight = Literal["sample", "token"]


@dataclass(frozen=True)
class PackedBatch:
    """One packed stream of T tokens, B sequences back to back.

    ids_T, positions_T, label_T: int64, label -100 where there is no loss. loss_weight_T: fp32.
    valid_rows: int64 indices of the labelled rows. cu_seqlens: (B + 1,) int32, stays on the host.
    Of a stream cut over ranks, all but cu_seqlens and max_seqlen is this rank's part.
    """

    ids_T: Tensor
    positions_T: Tensor
    label_T: Tensor
    loss_weight_T: Tensor
    valid_rows: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    def to(self, device: torch.device) -> PackedBatch:
        """The same with its per-token tensors on the device; copies do not wait."""
        if device.type == "cpu":
            return self
        moved = {
            name: value.pin_memory().to(device, non_blocking=True)
            for name, value in vars(self).items()
            if name.endswith(("_T", "_rows"))
        }
        return replace(self, **moved)


def epoch_order(num_examples: int, seed: int, epoch: int) -> list[int]:
    """The epoch's order of examples: a function of its arguments alone, so it needs no saving."""
    generator = np.random.Generator(np.random.PCG64([seed, epoch]))
    return generator.permutation(num_examples).tolist()


# Every step of an epoch asks for its order, once to train and once to report.
_order_of_epoch = lru_cache(maxsize=2)(epoch_order)


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    return -(-num_examples // batch_size)


def num_steps(num_examples: int, batch_size: int, epochs: int, max_steps: int = 0) -> int:
    """Optimizer steps of a run; max_steps as in its recipe."""
    total = steps_per_epoch(num_examples, batch_size) * epochs
    return min(total, max_steps) if max_steps else total


def step_indices(num_examples: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Which examples a step trains on; the last batch of an epoch is filled from its first samples.

    That filling is what s1's 16 ranks did: 1,000 examples make 63 steps an epoch, 315 in five.
    """
    epoch, i = divmod(step, steps_per_epoch(num_examples, batch_size))
    order = _order_of_epoch(num_examples, seed, epoch)
    return [order[j % num_examples] for j in range(i * batch_size, (i + 1) * batch_size)]


def label_counts(examples: Sequence[Example]) -> list[int]:
    """Labels per sequence: the first token has nothing to be predicted from."""
    return [sum(example.labelled[1:]) for example in examples]


def pack_batch(
    examples: Sequence[Example],
    loss_weight: LossWeight,
    streams: Iterable[Sequence[int]] | None = None,
) -> Iterator[PackedBatch]:
    """Lays a step's sequences out as packed streams.

    Args:
        examples: the batch; B counts those with a label.
        loss_weight: "sample" gives a label of sequence i the weight 1 / (B n_i), "token" gives
            every label 1 / sum_i n_i.
        streams: indices of each stream's sequences; None for one stream of all. An empty one
            becomes two tokens of weight 0, so that its rank takes part in every collective.
    """
    counts = label_counts(examples)
    num_labelled = sum(count > 0 for count in counts)
    weights = [
        1.0 / (num_labelled * count)
        if loss_weight == "sample" and count
        else 1.0 / max(1, sum(counts))
        for count in counts
    ]
    for stream in [range(len(examples))] if streams is None else streams:
        chosen = [examples[i] for i in stream] or [_DUMMY]
        yield pack(chosen, [weights[i] for i in stream] or [0.0])


_DUMMY = Example((0, 0), (False, False), "dummy")


def pack(examples: Sequence[Example], weights: Sequence[float]) -> PackedBatch:
    """One stream; a row's label is the next token of its own sequence."""
    lengths = [len(example.ids) for example in examples]
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids_T = np.concatenate([np.asarray(example.ids, np.int64) for example in examples])
    labels, positions, row_weights = [], [], []
    for example, weight in zip(examples, weights, strict=True):
        labelled = np.append(np.asarray(example.labelled[1:], bool), False)
        following = np.append(np.asarray(example.ids[1:], np.int64), -100)
        labels.append(np.where(labelled, following, -100))
        row_weights.append(np.where(labelled, weight, 0.0).astype(np.float32))
        positions.append(np.arange(len(example.ids), dtype=np.int64))
    label_T = np.concatenate(labels)
    return PackedBatch(
        ids_T=torch.from_numpy(ids_T),
        positions_T=torch.from_numpy(np.concatenate(positions)),
        label_T=torch.from_numpy(label_T),
        loss_weight_T=torch.from_numpy(np.concatenate(row_weights)),
        valid_rows=torch.from_numpy(np.flatnonzero(label_T != -100)),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=max(lengths),
    )


ALIGNMENT = 16
"""Tokens of a rank's part are a multiple of it: Triton compiles a kernel once more for others."""


def part_tokens(num_tokens: int, num_parts: int) -> int:
    """Tokens in each part of a stream; the only part of an uncut one needs no padding."""
    if num_parts == 1:
        return num_tokens
    return -(-num_tokens // (num_parts * ALIGNMENT)) * ALIGNMENT


def cut(stream: PackedBatch, index: int, num_parts: int) -> PackedBatch:
    """Part `index` of a stream cut evenly over ranks, wherever that falls within a sequence.

    The stream is padded to equal parts with tokens that belong to no sequence and have no label.
    """
    if num_parts == 1:
        return stream
    size = part_tokens(len(stream.ids_T), num_parts)
    start = index * size
    parts = {}
    for name, filler in (("ids_T", 0), ("positions_T", 0), ("label_T", -100), ("loss_weight_T", 0)):
        whole = getattr(stream, name)
        part = whole.new_full((size,), filler)
        held = whole[start : start + size]
        part[: len(held)] = held
        parts[name] = part
    return replace(stream, valid_rows=(parts["label_T"] != -100).nonzero()[:, 0], **parts)
