"""The bench of the token loop's products: few tokens, weights that come from memory every time.

M tokens, N outputs, K columns; `norm`, `swiglu` and `residual` put that around the product, `live3`
says that three of the M slots hold a token (0: all). What is timed is a CUDA graph of several
products with weights of their own, a gigabyte together, twenty times L2: so every weight is cold, a
launch costs what it does in the loop, and the graph's own few microseconds are a hundredth.

Counted are the bytes of weights, tokens and outputs of all of them: the share of the floor is the
share of the read roof. The error is that of the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from s1fast.bench.op import Forward, MissingError, Normal, Op, Output, Problem, Provider, compiled
from s1fast.matmul import CAPABILITY, by_torch, gemv, new_workspace

EPS = 1e-6
ROTATED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 16}
"""Of weights at least: what was read last is long gone when it is read again."""

Product = Callable[[Tensor], Tensor]
"""Of a weight."""


def make(sizes: Mapping[str, int], device: torch.device) -> Problem:
    """Random bf16 tokens, weights in several copies of their own values, norm and residual."""
    m, n, k = sizes["M"], sizes["N"], sizes["K"]
    rows = n * (2 if sizes["swiglu"] else 1)
    copies = max(2, -(-ROTATED_BYTES[device.type] // (2 * rows * k)))
    normal = Normal(device, torch.bfloat16)
    x_MK = normal(m, k)
    weights = [normal(rows, k, std=k**-0.5) for _ in range(copies)]
    norm_K = normal(k, std=0.1, mean=1.0) if sizes["norm"] else None
    residual_MN = normal(m, n) if sizes["residual"] else None
    count = sizes["live"] or m
    live = torch.tensor([count], dtype=torch.int32, device=device) if sizes["live"] else None
    around = 2 * count * (k + n * (2 if sizes["residual"] else 1))
    flops = 2 * count * rows * k * copies
    return Problem(
        arguments=(x_MK, weights, norm_K, residual_MN, bool(sizes["swiglu"]), live, count),
        num_bytes=copies * (weights[0].nbytes + around),
        forward_flops=flops,
        flops=flops,
        backward=False,
    )


def ours(problem: Problem) -> Forward:
    x_MK, weights, norm_K, residual_MN, swiglu, live, count = problem.arguments
    if not x_MK.is_cuda or torch.cuda.get_device_capability(x_MK.device) != CAPABILITY:
        raise MissingError("csrc needs a CUDA device of compute capability 9.0")
    workspace = new_workspace(x_MK.device)
    torch.cuda.synchronize()  # the weights are read ahead of the stream

    def product(weight_NK: Tensor) -> Tensor:
        return gemv(
            x_MK,
            weight_NK,
            workspace,
            norm_K=norm_K,
            eps=EPS,
            residual_MN=residual_MN,
            swiglu=swiglu,
            live=live,
        )

    return replay(product, weights, count)


def torchs(problem: Problem, *, compiling: bool = False) -> Forward:
    """cuBLAS for the product, our kernels for norm and gate; all slots, live or not."""
    x_MK, weights, norm_K, residual_MN, swiglu, _, count = problem.arguments
    run = compiled(problem, by_torch, fullgraph=True) if compiling else by_torch

    def product(weight_NK: Tensor) -> Tensor:
        return run(x_MK, weight_NK, norm_K=norm_K, eps=EPS, residual_MN=residual_MN, swiglu=swiglu)

    return replay(product, weights, count)


def bare(problem: Problem) -> Forward:
    """cuBLAS's product by itself."""
    x_MK, weights, norm_K, residual_MN, swiglu, _, count = problem.arguments
    if norm_K is not None or residual_MN is not None or swiglu:
        raise MissingError("this shape is more than a product")
    return replay(lambda weight_NK: torch.mm(x_MK, weight_NK.T), weights, count)


def replay(product: Product, weights: list[Tensor], count: int) -> Forward:
    """All products one after another, on a GPU as a graph; the live rows of the last."""

    def run() -> Tensor:
        for weight_NK in weights[:-1]:
            product(weight_NK)
        return product(weights[-1])[:count]

    return captured(run, weights[0].device)


def captured(run: Forward, device: torch.device) -> Forward:
    """What it launches, on a GPU as a graph."""
    if device.type != "cuda":
        return run
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is compiled or chosen on a first call
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()

    def forward() -> Output:
        graph.replay()
        return out

    return forward


def reference(problem: Problem) -> tuple[Tensor, dict[str, Tensor]]:
    """The last product in fp64, a slice of the weight at a time."""
    x_MK, weights, norm_K, residual_MN, swiglu, _, count = problem.arguments
    x_MK = x_MK[:count].double()
    if norm_K is not None:
        x_MK = x_MK * (x_MK.square().mean(1, keepdim=True) + EPS).rsqrt() * norm_K.double()
    y_MN = torch.cat([x_MK @ part.double().T for part in weights[-1].split(8192)], 1)
    if swiglu:
        gate_MN, up_MN = y_MN.chunk(2, 1)
        y_MN = gate_MN * gate_MN.sigmoid() * up_MN
    return y_MN if residual_MN is None else y_MN + residual_MN[:count].double(), {}


_GATE_UP = "N27648xK5120xnormxswiglu"

OP = Op(
    name="gemv",
    gpu_sizes={"M": 1, "N": 5120, "K": 5120, "norm": 0, "swiglu": 0, "residual": 0, "live": 0},
    cpu_sizes={"M": 2, "N": 48, "K": 64, "norm": 0, "swiglu": 0, "residual": 0, "live": 0},
    gpu_shapes=(  # Qwen2.5-32B: a layer and the head; more tokens; a rank of eight
        *("N7168xnorm", "N5120xresidual", _GATE_UP, "K27648xresidual", "N152064xnorm", "N27648"),
        *(f"M{m}x{_GATE_UP}" for m in (2, 4, 8)),
        f"M8x{_GATE_UP}xlive",
        *("N896xnorm", "K640", "N3456xnormxswiglu", "K3456", "N19008xnorm"),
    ),
    cpu_shapes=("M2xnormxresidual", "M8xnormxswigluxlive3"),
    make=make,
    reference=reference,
    ours=Provider("s1fast", ours),
    peers=(
        Provider("torch", torchs),
        Provider("torch.compile", partial(torchs, compiling=True)),
        Provider("torch.mm", bare),
    ),
)
