"""One GPU's part of a step of s1-32B on 16, measured; and what it makes of the whole run.

    python -m s1fast.bench.layer_step [--small]
    python -m s1fast.bench.layer_step --result bench/results/layer_step-....json   # no GPU needed

Measured on one GPU: a layer of Qwen2.5-32B, forward and backward, on a rank's share of a step's
tokens, with attention as Ulysses leaves it to a rank of eight: 5 query heads and 1 key-value head
over the packed tokens of a node, their lengths as s1K's. Each policy of recomputation, compiled and
in plain PyTorch; head and loss; AdamW on a sixteenth of the weights.

Not measured, having one GPU: communication. The run is projected by the plan's formulas
(planner.py) with the measured rates in place of the assumed ones, as a range: all that can overlap
does, or the share that the plan assumes. Then each trick is taken away in turn. A saved result is
projected anew by --result.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from s1fast.balance import balanced_split
from s1fast.bench import adamw, imbalance
from s1fast.bench.environment import device_name, save
from s1fast.bench.layer import plain_layer
from s1fast.bench.op import Problem
from s1fast.bench.roofs import roofs
from s1fast.bench.timing import measure
from s1fast.config import DataConfig, OptimConfig
from s1fast.files import read_json_object
from s1fast.kernels.linear_cross_entropy import linear_cross_entropy
from s1fast.kernels.packed_attention import packed_attention as attend_packed
from s1fast.metrics import layer_parameters, train_flops
from s1fast.model import Layer, ModelConfig
from s1fast.plan import PlanConfig, find_sequences
from s1fast.planner import Estimate, Machine, estimate
from s1fast.published import qwen, sequence_lengths
from s1fast.rates import GPU, Rate, Rates, assumed_rates, gpu_kind

DATASET = "simplescaling/s1K"
ULYSSES, WORLD = 8, 16


@dataclass(frozen=True)
class Shape:
    """A model and a rank's share of a step: tokens of each of a node's sequences."""

    model: ModelConfig
    lengths: tuple[int, ...]
    """They add up to a multiple of ULYSSES."""
    adamw: dict[str, int]

    @property
    def tokens(self) -> int:
        """Of a rank."""
        return sum(self.lengths) // ULYSSES


def full_shape() -> Shape:
    """The first step's half of s1K's sequences that one node gets."""
    lengths = sequence_lengths(DATASET)
    assert lengths is not None
    batch = lengths[:: len(lengths) // 16][:16]  # spread as the data are
    half = [batch[i] for i in balanced_split([float(n) for n in batch], 2)[0]]
    half[-1] -= sum(half) % (16 * ULYSSES)  # as whole tiles, which padding would make of it
    return Shape(qwen("32B"), tuple(half), {"P": 2048, "narrow": 1, "clip": 1})


def small_shape() -> Shape:
    """For a CPU: nothing but the code path."""
    model = dataclasses.replace(
        qwen("32B"),
        hidden_size=64,
        intermediate_size=96,
        vocab_size=512,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=8,
    )
    return Shape(model, (40, 30, 58), {"P": 1, "narrow": 1, "clip": 1})


# -- measuring -------------------------------------------------------------------------------------


def measure_all(shape: Shape, device: torch.device) -> dict[str, float]:
    """Milliseconds by name; what a device cannot run is left out."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = {}
    for name, call in [
        *_layers(shape, device, dtype),
        *_attention(shape, device, dtype),
        *_heads(shape, device, dtype),
        *_updates(shape, device),
    ]:
        found[name] = measure(call).median_ms
    return found


Calls = list[tuple[str, Callable[[], object]]]


def _layers(shape: Shape, device: torch.device, dtype: torch.dtype) -> Calls:
    model, t = shape.model, shape.tokens
    bounds = torch.tensor([0, *shape.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    longest = max(shape.lengths)
    random = torch.Generator(device).manual_seed(0)
    layer = Layer(model).to(device=device, dtype=dtype)
    for weight in layer.parameters():
        std, mean = (weight.shape[-1] ** -0.5, 0.0) if weight.ndim == 2 else (0.1, 1.0)
        torch.nn.init.normal_(weight, mean, std, generator=random)
    hidden_TD, dout_TD = (
        torch.randn(t, model.hidden_size, device=device, dtype=dtype, generator=random)
        for _ in range(2)
    )
    hidden_TD.requires_grad_()
    angle_TR = torch.rand(t, model.head_dim // 2, device=device, generator=random) * 6.0
    tables = (angle_TR.cos(), angle_TR.sin())

    def attend(_: int, *qkv: Tensor) -> Tensor:
        """A rank's tokens with all heads hold as many numbers as all tokens with its heads: the
        all-to-all is left out, the shapes are those behind it."""
        q, k, v = (x.reshape(ULYSSES * t, x.shape[1] // ULYSSES, -1) for x in qkv)
        return attend_packed(q, k, v, bounds, longest).reshape(t, -1, model.head_dim)

    def step(run: Callable[..., Tensor], *arguments: Any) -> Callable[[], None]:
        def call() -> None:
            layer.zero_grad()
            hidden_TD.grad = None
            run(*arguments).backward(dout_TD)

        return call

    inputs = (0, hidden_TD, *tables, attend, None)
    again: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    heads = (model.num_attention_heads, model.num_key_value_heads)
    weights = dict(layer.named_parameters())
    plain = (hidden_TD, *tables, weights, heads, lambda *qkv: attend(0, *qkv))
    calls: Calls = [
        ("layer none", step(layer, *inputs, False)),
        ("layer gate_up", step(layer, *inputs, True)),
        ("layer full", step(lambda *a: checkpoint(layer, *a, **again), *inputs, False)),
        ("layer plain", step(plain_layer, *plain)),
    ]
    if device.type == "cuda":
        torch.compiler.reset()
        calls.append(("layer compiled", step(torch.compile(layer, fullgraph=True), *inputs, False)))
    return calls


def _attention(shape: Shape, device: torch.device, dtype: torch.dtype) -> Calls:
    model = shape.model
    bounds = torch.tensor([0, *shape.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    counts = [n // ULYSSES for n in (model.num_attention_heads, model.num_key_value_heads)]
    q, k, v = (
        torch.randn(sum(shape.lengths), n, model.head_dim, device=device, dtype=dtype)
        for n in (counts[0], counts[1], counts[1])
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    dout = torch.randn_like(q)

    def both() -> None:
        for x in leaves:
            x.grad = None
        attend_packed(q, k, v, bounds, max(shape.lengths)).backward(dout)

    @torch.no_grad()
    def forward() -> None:
        attend_packed(q, k, v, bounds, max(shape.lengths))

    return [("attention forward", forward), ("attention", both)]


def _heads(shape: Shape, device: torch.device, dtype: torch.dtype) -> Calls:
    t, d, v = shape.tokens, shape.model.hidden_size, shape.model.vocab_size
    hidden_TD = torch.randn(t, d, device=device, dtype=dtype, requires_grad=True)
    weight_VD = (torch.randn(v, d, device=device, dtype=dtype) * d**-0.5).requires_grad_()
    label_T = torch.randint(v, (t,), device=device)
    weight_T = torch.full((t,), 1.0 / t, device=device)

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def call() -> None:
            hidden_TD.grad = weight_VD.grad = None
            loss().backward()

        return call

    def eager() -> Tensor:
        return F.cross_entropy((hidden_TD @ weight_VD.T).float(), label_T)

    ours = step(lambda: linear_cross_entropy(hidden_TD, weight_VD, label_T, weight_T))
    return [("head", ours), ("head plain", step(eager))]


def _updates(shape: Shape, device: torch.device) -> Calls:
    """Ours, with bf16 moments; torch's fused one, which has none, with fp32 ones."""
    narrow = adamw.make(shape.adamw, device)
    calls: Calls = [("update", adamw.ours(narrow))]
    wide: Problem = adamw.make(shape.adamw | {"narrow": 0}, device)
    calls.append(("update torch", adamw.theirs(wide, fused=True, foreach=False)))
    return calls


# -- what it makes of the run ----------------------------------------------------------------------


def measured_rates(shape: Shape, ms: dict[str, float], copy_gb_s: float) -> dict[str, float]:
    """The plan's rates that reproduce what was measured: TFLOP/s, and GB/s of memory."""
    m, t = shape.model, shape.tokens
    heads = m.num_attention_heads // ULYSSES
    scores = 2 * heads * m.head_dim * sum(n * n for n in shape.lengths)
    backward_ms = ms["attention"] - ms["attention forward"]
    numbers = 14 * m.hidden_size + 9 * m.intermediate_size
    numbers += 4 * (m.num_attention_heads + 2 * m.num_key_value_heads) * m.head_dim
    moved_ms = 2 * numbers * t / copy_gb_s / 1e6
    products_ms = ms["layer none"] - ms["attention"] - moved_ms
    return {
        "gemm": 6 * layer_parameters(m) * t / products_ms / 1e9,
        "head": 6 * m.vocab_size * m.hidden_size * t / ms["head"] / 1e9,
        "attention_forward": scores / ms["attention forward"] / 1e9,
        "attention_backward": 2.5 * scores / backward_ms / 1e9,
        "memory": copy_gb_s,
    }


def project(
    shape: Shape, ms: dict[str, float], rates: Rates, gpu: GPU
) -> tuple[Estimate, dict[str, tuple[float, float]]]:
    """The run on 2 nodes of 8 such GPUs, and its minutes (better, worse) without each trick."""
    config = PlanConfig(
        model="32B", data=DataConfig(path=DATASET), optim=OptimConfig(moments="bfloat16")
    )
    data = find_sequences(config, shape.model)
    machine = Machine(gpu, WORLD // ULYSSES, ULYSSES)

    def run(**changes: Any) -> Estimate:
        changed = dataclasses.replace(config, **changes)
        return estimate(changed, shape.model, data, machine, rates)

    one = run()
    minutes = (one.seconds.low / 60, one.seconds.high / 60)

    def later(step_ms: float) -> tuple[float, float]:
        more = one.num_steps * step_ms / 60e3
        return minutes[0] + more, minutes[1] + more

    layers = shape.model.num_hidden_layers
    alone = imbalance.measure(1000)["one sequence a rank"]["mean"] / one.imbalance
    full = run(recompute="full")
    without = {
        "as it is": minutes,
        "one sequence a rank, no balance": (minutes[0] * alone, minutes[1] * alone),
        "everything computed again": (full.seconds.low / 60, full.seconds.high / 60),
        "plain norms, rope, activation": later(layers * (ms["layer plain"] - ms["layer none"])),
        "plain head and loss": later(ms["head plain"] - ms["head"]),
        "torch's fused AdamW": later(ms["update torch"] - ms["update"]),
    }
    if "layer compiled" in ms:
        without["compiled layers"] = later(layers * (ms["layer compiled"] - ms["layer none"]))
    return one, without


def step_mfu(shape: Shape, ms: dict[str, float], peak_tflops: float) -> float:
    """Of all layers, head, loss and update on one GPU, nothing computed again counted."""
    flops = train_flops(shape.model, shape.lengths, sum(shape.lengths)) / ULYSSES
    total_ms = shape.model.num_hidden_layers * ms["layer none"] + ms["head"] + ms["update"]
    return flops / total_ms / 1e9 / peak_tflops


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="tiny shapes: the code path alone")
    parser.add_argument("--result", type=Path, help="a saved result to project, not a new one")
    given = parser.parse_args()
    if given.result:
        found = read_json_object(given.result)
        told = told_of(full_shape(), found, found["environment"]["device"])
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cpu" and not given.small:
            raise SystemExit("a layer of 32B needs a GPU; --small runs tiny shapes anywhere")
        told = report(small_shape() if given.small else full_shape(), device)
    for text in told:
        print(text)


def report(shape: Shape, device: torch.device, save_result: bool = True) -> list[str]:
    """Measures and saves; the lines to print."""
    ceilings = roofs()
    ms = measure_all(shape, device)
    values: dict[str, Any] = {
        "roofs": dataclasses.asdict(ceilings),
        "tokens": shape.tokens,
        "lengths": shape.lengths,
        "ms": ms,
        "rates": measured_rates(shape, ms, ceilings.copy_gb_s),
    }
    lines = told_of(shape, values, device_name())
    return [*lines, str(save("layer_step", values))] if save_result else lines


def told_of(shape: Shape, values: dict[str, Any], device: str) -> list[str]:
    """What a result says, and what it makes of the run on GPUs like this one."""
    ms = values["ms"]
    lines = [f"{device}: {shape.tokens:,} tokens a GPU, {sum(shape.lengths):,} a node"]
    lines += [f"  {name:20} {value:10.3f} ms" for name, value in ms.items()]
    gpu = gpu_kind(device)
    if gpu is None:
        return [*lines, f"not projected: the rates of {device} say nothing of 16 H100 or H200"]
    base = assumed_rates(gpu)
    rates = dataclasses.replace(
        base,
        **{
            k: Rate(v, getattr(base, k).unit, "this measurement", True)
            for k, v in values["rates"].items()
        },
    )
    one, without = project(shape, ms, rates, gpu)
    mfu = step_mfu(shape, ms, rates.peak.value)
    lines.append(f"layers, head, loss and update: {mfu:.1%} MFU")
    lines.append(f"projected, {one.machine}; communication by the plan's assumptions:")
    return lines + [f"  {k:34} {low:6.2f} to {high:6.2f} min" for k, (low, high) in without.items()]


if __name__ == "__main__":
    main()
