"""The benches of what does nothing but move memory: RMSNorm, rotary embedding, SwiGLU.

Counted are bytes: every input and every result once, forward and backward, saved tensors again
where backward needs them, for every provider: one that reads or writes a tensor twice gets no
credit for it. R is the number of rows, one for each token.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from s1fast.bench.op import Forward, Normal, Op, Output, Problem, Provider, compiled, joined
from s1fast.kernels import swiglu
from s1fast.kernels.rms_norm import add_rms_norm, rms_norm
from s1fast.kernels.rope import merge, split

EPS = 1e-6
CHUNK_ROWS = 1024
"""Rows that a reference holds at a time in float64."""

Function = Callable[..., Output]


def plain(problem: Problem, function: Function, *, compiling: bool = False) -> Forward:
    if compiling:
        function = compiled(problem, function, dynamic=False)
    return partial(function, *problem.arguments)


def exact(problem: Problem, function: Function) -> tuple[Tensor, dict[str, Tensor]]:
    """Results and gradients by autograd in float64, some rows at a time; kept in fp32.

    Tensors of several dimensions have a row for each token; the gradients of others are summed.
    """
    leaf = next(iter(problem.leaves.values()))
    rows = len(leaf)
    upstream = problem.upstream if isinstance(problem.upstream, tuple) else (problem.upstream,)
    names = {id(x): name for name, x in problem.leaves.items()}
    gradients: dict[str, list[Tensor]] = {name: [] for name in problem.leaves}
    results: list[list[Tensor]] = [[] for _ in upstream]
    for start in range(0, rows, CHUNK_ROWS):
        here = slice(start, min(start + CHUNK_ROWS, rows))

        def cut(x: Any, here: slice = here) -> Any:
            if not isinstance(x, Tensor):
                return x
            return (x[here] if x.ndim > 1 else x).detach().double()

        inputs = [cut(x) for x in problem.arguments]
        pairs = zip(problem.arguments, inputs, strict=True)
        wanted = {names[id(x)]: y for x, y in pairs if id(x) in names}
        for x in wanted.values():
            x.requires_grad_()
        found = function(*inputs)
        found = found if isinstance(found, tuple) else (found,)
        grads = torch.autograd.grad(found, list(wanted.values()), [cut(x) for x in upstream])
        for part, x in zip(results, found, strict=True):
            part.append(x.detach().float())
        for name, grad in zip(wanted, grads, strict=True):
            gradients[name].append(grad.float())
    whole = {
        name: torch.cat(parts) if parts[0].ndim > 1 else torch.stack(parts).sum(0)
        for name, parts in gradients.items()
    }
    outputs = tuple(torch.cat(part) for part in results)
    return joined(outputs if len(outputs) > 1 else outputs[0]), whole


# -- RMSNorm -----------------------------------------------------------------------------------


def make_rms_norm(sizes: Mapping[str, int], device: torch.device) -> Problem:
    """y from x; with `residual` also the sum, normalised, and two gradients that meet in one."""
    random, shape = Normal(device), (sizes["R"], sizes["D"])
    x_RD, weight_D = random(*shape).requires_grad_(), random(sizes["D"]).requires_grad_()
    if not sizes["residual"]:
        return Problem(
            arguments=(x_RD, weight_D),
            leaves={"x": x_RD, "weight": weight_D},
            upstream=random(*shape),
            num_bytes=5 * x_RD.nbytes,  # x, y; dy, x, dx
            forward_bytes=2 * x_RD.nbytes,
        )
    residual_RD = random(*shape).requires_grad_()
    return Problem(
        arguments=(x_RD, weight_D, residual_RD),
        leaves={"x": x_RD, "weight": weight_D, "residual": residual_RD},
        upstream=(random(*shape), random(*shape)),
        num_bytes=8 * x_RD.nbytes,  # x, residual, sum, y; dsum, dy, sum, dx
        forward_bytes=4 * x_RD.nbytes,
    )


def _norm(x_RD: Tensor, weight_D: Tensor, residual_RD: Tensor | None = None) -> Output:
    """As transformers writes it."""
    sum_RD = x_RD if residual_RD is None else x_RD + residual_RD
    wide_RD = sum_RD.to(torch.promote_types(sum_RD.dtype, torch.float32))
    n_RD = wide_RD * torch.rsqrt(wide_RD.square().mean(-1, keepdim=True) + EPS)
    y_RD = n_RD.to(x_RD.dtype) * weight_D
    return y_RD if residual_RD is None else (sum_RD, y_RD)


def _our_norm(x_RD: Tensor, weight_D: Tensor, residual_RD: Tensor | None = None) -> Output:
    if residual_RD is None:
        return rms_norm(x_RD, weight_D, EPS)
    return add_rms_norm(x_RD, residual_RD, weight_D, EPS)


def liger_norm(problem: Problem) -> Forward:
    """Not in place: that would spoil the upstream gradient of the next round."""
    x_RD, weight_D, *residual = problem.arguments
    settings = (EPS, 0.0, "llama", False)  # the last: not in place
    if not residual:
        theirs = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
        return partial(theirs.apply, x_RD, weight_D, *settings)
    module = importlib.import_module("liger_kernel.ops.fused_add_rms_norm")

    def forward() -> Output:
        theirs = module.LigerFusedAddRMSNormFunction
        y_RD, sum_RD = theirs.apply(x_RD, residual[0], weight_D, *settings)
        return sum_RD, y_RD

    return forward


def quack_norm(problem: Problem) -> Forward:
    theirs = importlib.import_module("quack.rmsnorm")
    x_RD, weight_D, *residual = problem.arguments
    if not residual:
        return partial(theirs.rmsnorm, x_RD, weight_D, eps=EPS)

    def forward() -> Output:
        options = {"residual": residual[0], "eps": EPS, "prenorm": True}
        y_RD, sum_RD = theirs.rmsnorm(x_RD, weight_D, **options)
        return sum_RD, y_RD

    return forward


RMS_NORM = Op(
    name="rms_norm",
    gpu_sizes={"R": 4700, "D": 5120, "residual": 0},
    cpu_sizes={"R": 40, "D": 48, "residual": 0},
    gpu_shapes=("R4700", "R32768", "R4700xresidual", "R32768xresidual"),
    cpu_shapes=("R40", "R40xresidual"),
    make=make_rms_norm,
    reference=partial(exact, function=_norm),
    ours=Provider("s1fast", partial(plain, function=_our_norm)),
    peers=(
        Provider("torch eager", partial(plain, function=_norm)),
        Provider("torch.compile", partial(plain, function=_norm, compiling=True)),
        Provider("liger", liger_norm, "liger-kernel"),
        Provider("quack", quack_norm, "quack-kernels"),
    ),
)


# -- rotary embedding --------------------------------------------------------------------------


def make_rope(sizes: Mapping[str, int], device: torch.device) -> Problem:
    """Rotated queries and keys, and values, each by itself, from the fused projection."""
    random, rows, width = Normal(device), sizes["R"], sizes["K"]
    heads, kv_heads = sizes["H"], sizes["N"]
    qkv_RHK = random(rows, heads + 2 * kv_heads, width).requires_grad_()
    freq = 1e6 ** -(torch.arange(0, width, 2, device=device) / width)
    angle = torch.arange(rows, device=device)[:, None] * freq
    once = 2 * qkv_RHK.nbytes + 2 * 4 * angle.numel()
    return Problem(
        arguments=(qkv_RHK, angle.cos(), angle.sin(), heads, kv_heads),
        leaves={"qkv": qkv_RHK},
        upstream=tuple(random(rows, n, width) for n in (heads, kv_heads, kv_heads)),
        num_bytes=2 * once,
        forward_bytes=once,
    )


class _Split(torch.autograd.Function):
    """Ours, as a layer uses it: split forward, merge backward."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, h: int, n: int) -> Any:
        ctx.save_for_backward(cos, sin)
        return split(qkv, cos, sin, h, n)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return merge(*grads, *ctx.saved_tensors), None, None, None, None


def _split(qkv_RHK: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> Output:
    q, k, v = qkv_RHK.split((heads, kv_heads, kv_heads), dim=1)
    return _turned(q, cos, sin), _turned(k, cos, sin), v.contiguous()


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.to(cos.dtype).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def liger_rope(problem: Problem) -> Forward:
    """It turns gradients in place, so it gets copies: they are part of its time."""
    theirs = importlib.import_module("liger_kernel.ops.rope").LigerRopeFunction
    qkv_RHK, cos, sin, heads, kv_heads = problem.arguments
    cos, sin = (torch.cat((x, x), -1)[None] for x in (cos, sin))

    def forward() -> Output:
        q, k, v = qkv_RHK.split((heads, kv_heads, kv_heads), dim=1)
        turned = theirs.apply(*(x.transpose(0, 1)[None] for x in (q, k)), cos, sin)
        for x in turned:
            if x.requires_grad:
                x.register_hook(torch.clone)
        q, k = (x[0].transpose(0, 1) for x in turned)
        return q, k, v

    return forward


ROPE = Op(
    name="rope",
    gpu_sizes={"R": 4700, "H": 40, "N": 8, "K": 128},
    cpu_sizes={"R": 40, "H": 4, "N": 2, "K": 16},
    gpu_shapes=("R4700", "R32768"),
    cpu_shapes=("R40",),
    make=make_rope,
    reference=partial(exact, function=_split),
    ours=Provider("s1fast", partial(plain, function=_Split.apply)),
    peers=(
        Provider("torch eager", partial(plain, function=_split)),
        Provider("torch.compile", partial(plain, function=_split, compiling=True)),
        Provider("liger, gradients copied", liger_rope, "liger-kernel"),
    ),
)


# -- SwiGLU ------------------------------------------------------------------------------------


def make_swiglu(sizes: Mapping[str, int], device: torch.device) -> Problem:
    """y again in backward is counted for all: one that leaves it out moves 8 tensors, not 9."""
    random, rows, width = Normal(device), sizes["R"], sizes["F"]
    gate_up, dy_RF = random(rows, 2 * width).requires_grad_(), random(rows, width)
    return Problem(
        arguments=(gate_up,),
        leaves={"gate_up": gate_up},
        upstream=dy_RF,
        num_bytes=9 * dy_RF.nbytes,  # gate, up, y; dy, gate, up, dgate, dup, y again
        forward_bytes=3 * dy_RF.nbytes,
    )


def _product(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _Swiglu(torch.autograd.Function):
    """Ours, as a layer uses it: backward makes y again, for the next weight's gradient."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return swiglu.forward(gate_up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return swiglu.backward(grads[0], *ctx.saved_tensors)[0]


def liger_swiglu(problem: Problem) -> Forward:
    theirs = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
    (gate_up,) = problem.arguments
    return lambda: theirs.apply(*gate_up.chunk(2, dim=-1))


SWIGLU = Op(
    name="swiglu",
    gpu_sizes={"R": 4700, "F": 27648},
    cpu_sizes={"R": 40, "F": 96},
    gpu_shapes=("R4700", "R32768"),
    cpu_shapes=("R40",),
    make=make_swiglu,
    reference=partial(exact, function=_product),
    ours=Provider("s1fast", partial(plain, function=_Swiglu.apply)),
    peers=(
        Provider("torch eager", partial(plain, function=_product)),
        Provider("torch.compile", partial(plain, function=_product, compiling=True)),
        Provider("liger", liger_swiglu, "liger-kernel"),
    ),
)
