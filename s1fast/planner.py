"""What a run will take, before any GPU is paid for: seconds, dollars, and where the seconds go.

A step is laid out as the trainer lays it out; its time is a sum over layers of

    forward    max(compute, gather)            compute of the slowest group: all ranks meet there
    backward   max(compute, gather + scatter)

with compute = FLOPs / rate + bytes / bandwidth, and what the first gather and the last
reduce-scatter leave uncovered. That is the better end of the range: in the worse one, a share of
the covered communication costs time nevertheless (it takes multiprocessors and memory bandwidth).
Every rate is shown with its source.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from s1fast.balance import Split, StepPlan, imbalance, plan_step
from s1fast.config import TrainConfig
from s1fast.metrics import layer_parameters
from s1fast.model import ModelConfig, Recompute
from s1fast.packing import num_steps, part_tokens
from s1fast.parallel import ulysses_degree
from s1fast.rates import DEVICE_BYTES, GPU, Rates
from s1fast.recompute import activation_budget, layer_memory

_DTYPE = torch.bfloat16
_SIZE = _DTYPE.itemsize


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind in equal nodes."""

    gpu: GPU
    nodes: int
    gpus_per_node: int = 8

    @property
    def world(self) -> int:
        return self.nodes * self.gpus_per_node

    def __str__(self) -> str:
        return f"{self.nodes} x {self.gpus_per_node} {self.gpu}"


@dataclass(frozen=True)
class Sequences:
    """The data as far as a plan needs it: tokens and labels of each sequence, and their source."""

    lengths: Sequence[int]
    labels: Sequence[int]
    source: str


@dataclass
class Seconds:
    """Of a step or a run, on the slowest rank; the parts add up to `low`."""

    gemm: float = 0.0
    recomputed: float = 0.0
    attention: float = 0.0
    memory_bound: float = 0.0
    head: float = 0.0
    ulysses: float = 0.0
    optimizer: float = 0.0
    exposed: float = 0.0
    """Communication that not even perfect overlap hides."""
    host: float = 0.0
    contention: float = 0.0
    """What imperfect overlap adds in the worse case: high - low."""

    @property
    def low(self) -> float:
        return sum(vars(self).values()) - self.contention

    @property
    def high(self) -> float:
        return self.low + self.contention

    def add(self, other: Seconds, times: float = 1.0) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + times * value)


@dataclass(frozen=True)
class Estimate:
    """A run on a machine."""

    machine: Machine
    ulysses: int
    num_steps: int
    seconds: Seconds
    flops: float
    tokens: int
    imbalance: float
    """Mean over the steps: how much longer they take than if the groups were even."""
    layers: Counter[Recompute]
    """Layers, summed over all passes, by what they compute again."""
    most_tokens: int
    """Of a rank in the pass that needs the most memory."""
    worst: tuple[Recompute, ...]
    """What each layer computes again there."""
    mfu: tuple[float, float]
    """In the worse and in the better case."""
    dollars: tuple[float, float]
    """In the better and in the worse case."""
    first_pass: bool
    """Whether no gradients are there yet."""
    needed_bytes: int
    """For what is kept there and for gradients."""
    budget_bytes: float
    """Memory for it."""

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.budget_bytes


def estimate(
    config: TrainConfig, model: ModelConfig, data: Sequences, machine: Machine, rates: Rates
) -> Estimate:
    """Lays out every step of the run and adds up what they take."""
    ulysses = ulysses_degree(
        machine.gpus_per_node, model.num_attention_heads, model.num_key_value_heads
    )
    budget = config.activation_gb * 1e9 or activation_budget(
        int(free_bytes(config, model, machine)), model, _DTYPE, machine.world
    )
    memory = layer_memory(model, _DTYPE, machine.world, ulysses, budget)
    steps = num_steps(len(data.lengths), config.batch_size, config.epochs, config.max_steps)
    layout = (data.lengths, data.labels, machine.world, ulysses)
    cost = _Cost(model, machine, ulysses, rates, 4 if config.reduce_dtype == "float32" else 2)
    seconds, layers = Seconds(), Counter[Recompute]()
    flops, tokens, uneven, most_tokens, needed_bytes = 0.0, 0, 0.0, 0, 0
    worst: tuple[Recompute, ...] = ()
    worst_first = True
    for step in range(steps):
        plan = plan_step(step, config, model, *layout)
        for number, split in enumerate(plan.passes):
            most = part_tokens(max(plan.stream_tokens(split)), ulysses)
            what = memory.choose(config.recompute, most, first_pass=number == 0)
            layers.update(what)
            if (needed := memory.needed(what, most, number == 0)) > needed_bytes:
                needed_bytes, most_tokens = needed, most
                worst, worst_first = tuple(what), number == 0
            seconds.add(cost.of_pass(plan, split, what))
        seconds.add(cost.of_update(config.optim.moments))
        flops += sum(plan.costs)
        tokens += sum(plan.seqlens)
        uneven += imbalance(plan.passes, plan.costs)
    hours = (seconds.low / 3600, seconds.high / 3600)
    rate = flops / machine.world / 1e12 / rates.peak.value
    return Estimate(
        machine=machine,
        ulysses=ulysses,
        num_steps=steps,
        seconds=seconds,
        flops=flops,
        tokens=tokens,
        imbalance=uneven / steps,
        layers=layers,
        most_tokens=most_tokens,
        worst=worst,
        mfu=(rate / seconds.high, rate / seconds.low),
        dollars=tuple(h * machine.world * rates.price.value for h in hours),  # type: ignore[arg-type]
        first_pass=worst_first,
        needed_bytes=needed_bytes,
        budget_bytes=budget,
    )


def free_bytes(config: TrainConfig, model: ModelConfig, machine: Machine) -> float:
    """Of a GPU once this rank's weights and moments are there."""
    return DEVICE_BYTES[machine.gpu] - state_bytes(config, model) / machine.world


def state_bytes(config: TrainConfig, model: ModelConfig) -> int:
    """fp32 weights and both moments of the whole model."""
    moment = 4 if config.optim.moments == "float32" else 2
    return (4 + 2 * moment) * model.num_weights


class _Cost:
    """Seconds of a pass and of an update, by the rates."""

    def __init__(
        self, model: ModelConfig, machine: Machine, ulysses: int, rates: Rates, reduce_bytes: int
    ) -> None:
        self.model, self.ulysses, self.rates = model, ulysses, rates
        self.world = machine.world
        network = rates.nvlink if machine.nodes == 1 else rates.fabric
        share = (self.world - 1) / self.world / (network.value * 1e9)
        layer = layer_parameters(model)
        head = model.vocab_size * model.hidden_size
        self.gather_s, self.scatter_s = _SIZE * layer * share, reduce_bytes * layer * share
        self.head_gather_s, self.head_scatter_s = _SIZE * head * share, reduce_bytes * head * share

    def of_pass(self, plan: StepPlan, split: Split, what: Sequence[Recompute]) -> Seconds:
        """A forward and backward of one stream a group; the costliest group sets the time."""
        candidates = [self._compute([plan.seqlens[i] for i in s]) for s in split if s]
        forward, backward = max(candidates, key=lambda pair: pair[0].low + pair[1].low)
        total = Seconds()
        for policy, count in Counter(what).items():
            again = self._again(forward, policy)
            total.add(forward, count)
            total.add(backward, count)
            total.recomputed += count * again
            self._communicate(total, forward.low, self.gather_s, count)
            both_s = self.gather_s + self.scatter_s
            self._communicate(total, backward.low + again, both_s, count)
        labels = max(sum(plan.labels[i] for i in s) for s in split) / self.ulysses
        products = 6 * self.model.vocab_size * self.model.hidden_size * labels
        head_s = products / (self.rates.head.value * 1e12)
        total.head += head_s
        # The embedding's and the first layer's gathers have nothing before them to hide behind, the
        # embedding's and the first layer's reduce-scatters nothing after.
        total.exposed += self.head_gather_s + self.gather_s
        total.exposed += self.head_scatter_s + self.scatter_s
        self._communicate(total, head_s, self.head_gather_s + self.head_scatter_s, 1)
        return total

    def _communicate(self, total: Seconds, compute_s: float, transfer_s: float, count: int) -> None:
        covered_s = min(compute_s, transfer_s)
        total.exposed += count * (transfer_s - covered_s)
        total.contention += count * (1 - self.rates.overlap.value) * covered_s

    def _compute(self, lengths: Sequence[int]) -> tuple[Seconds, Seconds]:
        """Forward and backward of one layer on a rank of the group that has this stream."""
        m, rates = self.model, self.rates
        tokens = part_tokens(sum(lengths), self.ulysses)
        heads, width = m.num_attention_heads, m.head_dim
        kv_heads = m.num_key_value_heads
        products = 2 * layer_parameters(m) * tokens / (rates.gemm.value * 1e12)
        scores = 2 * heads * width * sum(n * n for n in lengths) / self.ulysses
        d, q = m.hidden_size, (heads + 2 * kv_heads) * width
        byte_s = tokens * _SIZE / (rates.memory.value * 1e9)
        sent = heads * 2 + 2 * max(kv_heads, self.ulysses)  # q and out; k and v
        exchange_s = (
            tokens * sent * width * _SIZE * (1 - 1 / self.ulysses) / (rates.nvlink.value * 1e9)
        )
        forward = Seconds(
            gemm=products,
            attention=scores / (rates.attention_forward.value * 1e12),
            memory_bound=(2 * 2 * d + 2 * q + 3 * m.intermediate_size) * byte_s,
            ulysses=exchange_s,
        )
        backward = Seconds(
            gemm=2 * products,
            attention=2.5 * scores / (rates.attention_backward.value * 1e12),
            memory_bound=(2 * 5 * d + 2 * q + 6 * m.intermediate_size) * byte_s,
            ulysses=exchange_s,
        )
        return forward, backward

    def _again(self, forward: Seconds, policy: Recompute) -> float:
        """What backward computes a second time, beyond norms and the gated product."""
        if policy == "none":
            return 0.0
        if policy == "full":
            return forward.low
        m = self.model
        share = 2 * m.intermediate_size * m.hidden_size / layer_parameters(m)
        return share * forward.gemm

    def of_update(self, moments: str) -> Seconds:
        """Global norm and AdamW over this rank's shard, and the host's share of a step."""
        update = 4 + 4 + 4 + 4 * (4 if moments == "float32" else 2)  # gradient; weight; moments
        num_bytes = (update + 4) * self.model.num_weights / self.world
        return Seconds(
            optimizer=num_bytes / (self.rates.memory.value * 1e9), host=self.rates.host.value
        )
