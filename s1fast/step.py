"""A step of training: who trains on what, forward, backward and update.

The batch is split over the ranks and packed on the host; a forward and backward for each stream,
clip, AdamW. Loss and norm stay on the device: the host waits for nothing. Every rank runs the same
step; its gradients, weights and moments are its own rows alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from s1fast import snapshot
from s1fast.balance import StepPlan, plan_step
from s1fast.chat import Example
from s1fast.config import TrainConfig
from s1fast.errors import InputError
from s1fast.kernels.packed_attention import OURS, Backend, check_backend, default_backend
from s1fast.model import Model, Recompute
from s1fast.optimizer import AdamW, learning_rates
from s1fast.packing import (
    ALIGNMENT,
    PackedBatch,
    cut,
    label_counts,
    num_steps,
    pack,
    pack_batch,
    part_tokens,
    steps_per_epoch,
)
from s1fast.parallel import Layout
from s1fast.recompute import activation_budget, layer_memory
from s1fast.slices import Slice, slice_of
from s1fast.ulysses import ulysses_attention


@dataclass(frozen=True)
class StepResult:
    """Metrics of a step, still on the device."""

    loss: Tensor
    grad_norm: Tensor
    bad_labels: Tensor
    """How many labels were no token of the vocabulary."""


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
        self.attention = attention_backend(config, device, dtype, model.config.head_dim)
        budget = _activation_budget(config, model, layout)
        self.memory = layer_memory(model.config, dtype, layout.world, layout.ulysses, budget)
        self.seqlens = [len(example.ids) for example in examples]
        self.labels = label_counts(examples)
        sizes = (len(examples), config.batch_size)
        self.steps_per_epoch = steps_per_epoch(*sizes)
        self.num_steps = num_steps(*sizes, config.epochs, config.max_steps)
        self.learning_rates = learning_rates(self.num_steps, config.optim, device)
        if config.compile:
            self._compile()

    def plan(self, step: int) -> StepPlan:
        """Who trains on what in optimizer step 0, 1, ...: the same on every rank."""
        data, ranks = (self.seqlens, self.labels), (self.layout.world, self.layout.ulysses)
        return plan_step(step, self.config, self.model.config, *data, *ranks)

    def step(self, step: int) -> StepResult:
        """Trains on one batch and updates the weights."""
        loss, bad_labels = self.backward(self.plan(step))
        grad_norm = self.optimizer.step(self.learning_rates[step], self.config.optim.clip_norm)
        self.optimizer.zero_grad()
        return StepResult(loss, grad_norm, bad_labels)

    def backward(self, plan: StepPlan) -> tuple[Tensor, Tensor]:
        """Leaves a step's gradients; returns its loss and number of bad labels over all ranks."""
        layout = self.layout
        loss = torch.zeros((), device=self.device)
        bad_labels = torch.zeros((), dtype=torch.int64, device=self.device)
        ours = [streams[layout.group_index] for streams in plan.passes]
        batch = [self.examples[i] for i in plan.batch]
        packed = pack_batch(batch, self.config.data.loss_weight, ours)
        for number, (stream, split) in enumerate(zip(packed, plan.passes, strict=True)):
            part = cut(stream, layout.part, layout.ulysses).to(self.device)
            recompute = self.recompute(plan.stream_tokens(split), first_pass=number == 0)
            partial = stream_loss(self.model, part, bad_labels, self.attention, recompute, layout)
            partial.backward()
            loss += partial.detach()
        totals = layout.sum(torch.stack((loss, bad_labels.to(loss.dtype))))
        return totals[0], totals[1]

    def recompute(self, stream_tokens: Sequence[int], first_pass: bool) -> list[Recompute]:
        """What each layer computes again in a pass of such streams, so that the longest fits."""
        most = max(part_tokens(n, self.layout.ulysses) for n in stream_tokens)
        return self.memory.choose(self.config.recompute, most, first_pass)

    def _compile(self) -> None:
        """Compiles the layers and builds every graph that a step may need, before the first one."""
        if self.attention not in OURS:
            raise InputError(
                f"compile: attention {self.attention!r} cannot be compiled with the layer; choose "
                "'triton', or leave compile away"
            )
        layout = self.layout
        self.model.compile_layers()
        # Two lengths: FSDP's hooks hand on a hidden_TD of their own, without the mark that its
        # length varies, which the compiler then learns from the second.
        for num_tokens in (ALIGNMENT * layout.ulysses, 2 * ALIGNMENT * layout.ulysses):
            row = Example((0,) * num_tokens, (False,) + (True,) * (num_tokens - 1), "warm-up")
            stream = pack([row, row], [0.0, 0.0])
            part = cut(stream, layout.part, layout.ulysses).to(self.device)
            for what in get_args(Recompute):
                policy = [what] * len(self.model.layers)
                stream_loss(self.model, part, None, self.attention, policy, layout).backward()
        self.optimizer.zero_grad()

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

    @cached_property
    def facts(self) -> dict[str, object]:
        """What a resuming run must have in common with the saved one, beyond its recipe."""
        return {"data_sha256": data_sha256(self.examples), "num_steps": self.num_steps}


def data_sha256(examples: Sequence[Example]) -> str:
    """Of all token ids and labels, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(np.asarray(example.ids, np.int64).tobytes())
        digest.update(np.asarray(example.labelled, bool).tobytes())
    return digest.hexdigest()


def stream_loss(
    model: Model,
    stream: PackedBatch,
    bad_labels: Tensor | None = None,
    attention: Backend | None = None,
    recompute: Sequence[Recompute] | None = None,
    layout: Layout | None = None,
) -> Tensor:
    """Weighted loss of one packed stream, or of this rank's part of it.

    bad_labels as in linear_cross_entropy, attention as the backend of packed_attention, recompute
    as in Model; layout says who has the other parts.
    """
    if model.compiled:
        torch._dynamo.mark_dynamic(stream.cu_seqlens, 0)
    group = layout.group if layout else None

    def attend(layer: int, q_THK: Tensor, k_TNK: Tensor, v_TNK: Tensor) -> Tensor:
        boundaries = (stream.cu_seqlens, stream.max_seqlen)
        return ulysses_attention(q_THK, k_TNK, v_TNK, *boundaries, backend=attention, group=group)

    hidden_TD = model(stream.ids_T, stream.positions_T, attend, recompute=recompute)
    return model.loss(
        hidden_TD, stream.label_T, stream.loss_weight_T, stream.valid_rows, bad_labels
    )


def _activation_budget(config: TrainConfig, model: Model, layout: Layout) -> float:
    """Memory for what forward keeps: as configured, or the least that any rank has free."""
    if config.activation_gb:
        return config.activation_gb * 1e9
    if layout.device.type == "cpu":
        return math.inf
    device = layout.device
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    budget = activation_budget(free, model.config, model.compute_dtype, layout.world)
    return layout.smallest(budget)


def attention_backend(
    config: TrainConfig, device: torch.device, dtype: torch.dtype, width: int
) -> Backend:
    """The configured one; InputError where it cannot run or take such heads."""
    if config.attention == "auto":
        return default_backend(device, dtype, width)
    try:
        check_backend(config.attention, device, dtype, width)
    except ValueError as error:
        raise InputError(f"attention: {error}") from None
    return config.attention
