"""The bench of adamw: a step over P million parameters, cut as a GPU of 16 holds a 32B model's.

Counted are 28 bytes a parameter, 20 with `narrow` moments, which are bf16; with `clip`, the norm of
all gradients comes first and reads them once more, 4. That norm is half of the one allowed, since
some peers scale gradients in memory: the factor is 1, the traffic the same. There is no backward.
Every call starts the first shard, a small one, from the same values: what it becomes is compared
with float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as torch_adamw

from s1fast.bench.op import Forward, MissingError, Op, Problem, Provider, compiled
from s1fast.kernels.adamw import Shards, adamw_, gradients, sum_of_squares

LAYERS = 64
PROBE = 1 << 16
PARTS = {"qkv": 36.7, "o": 26.2, "gate_up": 283.1, "down": 141.6, "norm": 0.005, "bias": 0.007}
"""Millions of parameters in a layer of Qwen2.5-32B."""
LR, BETAS, EPS, DECAY, MAX_NORM = 1e-5, (0.9, 0.95), 1e-8, 1e-4, 1.0


class State:
    """What a step works on, and how its first shard began; all providers share the memory."""

    def __init__(
        self,
        params: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        grads: list[Tensor],
        clip: bool,
    ) -> None:
        self.params, self.exp_avgs, self.exp_avg_sqs = params, exp_avgs, exp_avg_sqs
        self.grads, self.clip = grads, clip
        self.probe = [x[0] for x in (params, exp_avgs, exp_avg_sqs)]
        self.start = [x.clone() for x in self.probe]

    def restart(self) -> None:
        for probe, start in zip(self.probe, self.start, strict=True):
            probe.copy_(start)


def shard_sizes(millions: int) -> list[int]:
    """The probe, then layer by layer; ragged, as shards are."""
    share = 1e6 * millions / LAYERS / sum(PARTS.values())
    return [PROBE, *[max(1, round(share * part)) for part in PARTS.values()] * LAYERS]


def make(sizes: Mapping[str, int], device: torch.device) -> Problem:
    """Random weights and gradients; moments as in the middle of a run."""
    counts = shard_sizes(sizes["P"])
    random = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": random, "device": device}
    moments = torch.bfloat16 if sizes["narrow"] else torch.float32
    params = [torch.randn(n, **options) for n in counts]
    std = 0.5 * MAX_NORM / sum(counts) ** 0.5
    grads = [torch.randn(n, **options).mul_(std) for n in counts]
    exp_avgs = [g.to(moments, copy=True).mul_(0.5) for g in grads]
    exp_avg_sqs = [g.to(moments, copy=True).square_() for g in grads]
    state = State(params, exp_avgs, exp_avg_sqs, grads, bool(sizes["clip"]))
    a_parameter = (20 if sizes["narrow"] else 28) + (4 if sizes["clip"] else 0)
    return Problem((params[0], state), num_bytes=a_parameter * sum(counts), backward=False)


def reference(problem: Problem) -> tuple[Tensor, dict[str, Tensor]]:
    """The probe after a first step, in fp64."""
    state: State = problem.arguments[1]
    g = state.grads[0].double()
    if state.clip:
        norm = torch.stack([x.double().square().sum() for x in state.grads]).sum().sqrt()
        g *= (MAX_NORM / (norm + 1e-6)).clamp(max=1.0)
    p, m, v = (x.double() for x in state.start)
    m_hat = (BETAS[0] * m + (1 - BETAS[0]) * g) / (1 - BETAS[0])
    v_hat = (BETAS[1] * v + (1 - BETAS[1]) * g**2) / (1 - BETAS[1])
    return p * (1 - LR * DECAY) - LR * m_hat / (v_hat.sqrt() + EPS), {}


def _each_call(state: State, step: Callable[[], object]) -> Forward:
    """The step from the probe's first values; what it becomes."""

    @torch.no_grad()
    def forward() -> Tensor:
        state.restart()
        step()
        return state.params[0]

    return forward


def ours(problem: Problem) -> Forward:
    state: State = problem.arguments[1]
    device = state.params[0].device
    decays = [DECAY] * len(state.params)
    shards = Shards(state.params, state.exp_avgs, state.exp_avg_sqs, decays)
    rate, whole = torch.tensor(LR, device=device), torch.ones((), device=device)

    def step() -> None:
        found = gradients(shards, state.grads)
        clip = whole
        if state.clip:
            norm = sum_of_squares(shards, found).sqrt()
            clip = (MAX_NORM / (norm + 1e-6)).clamp(max=1.0)
        adamw_(shards, found, rate, clip, 1, BETAS, EPS)

    return _each_call(state, step)


# -- the peers ---------------------------------------------------------------------------------


def theirs(problem: Problem, **implementation: Any) -> Forward:
    """torch.optim.AdamW's functional form and torch's clipping, which multiplies in memory."""
    state: State = problem.arguments[1]
    if state.exp_avgs[0].dtype != torch.float32:
        raise MissingError("its moments have the parameters' dtype")
    steps = [torch.zeros((), device=p.device) for p in state.params]
    parameters = [nn.Parameter(p) for p in state.params]  # the same memory
    for parameter, grad in zip(parameters, state.grads, strict=True):
        parameter.grad = grad

    def step() -> None:
        if state.clip:
            nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        torch._foreach_zero_(steps)
        torch_adamw(
            state.params,
            state.grads,
            state.exp_avgs,
            state.exp_avg_sqs,
            [],
            steps,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=LR,
            weight_decay=DECAY,
            eps=EPS,
            maximize=False,
            **implementation,
        )

    return _each_call(state, step)


def _plain(state: State) -> None:
    """As one writes it; a compiler fuses a shard's operations, the factor included."""
    clip = 1.0
    if state.clip:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(state.grads)))
        clip = (MAX_NORM / (norm + 1e-6)).clamp(max=1.0)
    arrays = zip(state.params, state.exp_avgs, state.exp_avg_sqs, state.grads, strict=True)
    for p, exp_avg, exp_avg_sq, grad in arrays:
        g = grad * clip
        m = exp_avg.float().lerp(g, 1 - BETAS[0])
        v = exp_avg_sq.float() * BETAS[1] + (1 - BETAS[1]) * g * g
        root = (v / (1 - BETAS[1])).sqrt() + EPS
        p.copy_(p * (1 - LR * DECAY) - LR / (1 - BETAS[0]) * m / root)
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)


def plain(problem: Problem, *, compiling: bool = False) -> Forward:
    state: State = problem.arguments[1]
    step = compiled(problem, _plain, dynamic=False) if compiling else _plain
    return _each_call(state, partial(step, state))


OP = Op(
    name="adamw",
    gpu_sizes={"P": 2000, "narrow": 0, "clip": 0},
    cpu_sizes={"P": 2, "narrow": 0, "clip": 0},
    gpu_shapes=("P2000", "P2000xnarrow", "P2000xclip", "P2000xnarrowxclip"),
    cpu_shapes=("P2", "P2xnarrow", "P2xclip"),
    make=make,
    reference=reference,
    ours=Provider("s1fast", ours),
    peers=(
        Provider("torch fused", partial(theirs, fused=True)),
        Provider("torch foreach", partial(theirs, foreach=True)),
        Provider("torch eager", plain),
        Provider("torch.compile", partial(plain, compiling=True)),
    ),
)
