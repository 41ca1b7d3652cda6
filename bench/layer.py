"""The bench of a decoder layer: Qwen2.5-32B's over a packed stream, forward and backward.

What it shows: how far the layer's own operations are from its GEMMs and attention, what compiling
adds to them, what computing gate and up again costs, and what plain PyTorch takes for the same.
Every provider calls our packed attention, so the rest of the layer is what differs.

Counted are 2 FLOPs for each weight and token, and attention's causal half; twice that backward
(2.5 times for attention). What is computed again gets no credit.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from s1fast.bench import packed_attention as attention
from s1fast.bench.op import Forward, Normal, Op, Problem, Provider, compiled
from s1fast.kernels.packed_attention import packed_attention
from s1fast.model import Layer, ModelConfig

EPS = 1e-6


def make(sizes: Mapping[str, int], device: torch.device) -> Problem:
    """A random layer, bf16 on a GPU, fp32 on a CPU, and COUNT sequences of SEQ tokens."""
    lengths = {"S": sizes["SEQ"], "B": sizes["COUNT"], "ragged": 0}
    stream = attention.make({**sizes, **lengths}, device)  # its boundaries, and the dtype
    *_, bounds, longest = stream.arguments
    num_tokens, dtype = int(bounds[-1]), stream.dtype
    config = ModelConfig(
        model_type="qwen2",
        vocab_size=1,
        hidden_size=sizes["D"],
        intermediate_size=sizes["F"],
        num_hidden_layers=1,
        num_attention_heads=sizes["H"],
        num_key_value_heads=sizes["N"],
        head_dim=sizes["K"],
        max_position_embeddings=longest,
        rms_norm_eps=EPS,
        rope_theta=1e6,
        rope_scaling=None,
        tie_word_embeddings=False,
        attention_bias=True,
    )
    normal, shape = Normal(device), (num_tokens, sizes["D"])
    layer = Layer(config).to(device=device, dtype=dtype)
    for weight in layer.parameters():
        std, mean = (weight.shape[-1] ** -0.5, 0.0) if weight.ndim == 2 else (0.1, 1.0)
        torch.nn.init.normal_(weight, mean, std, generator=normal.random)
    hidden_TD, dout_TD = normal(*shape).requires_grad_(), normal(*shape)
    position_T = torch.cat([torch.arange(n) for n in bounds.diff().tolist()]).to(device)
    freq_R = 1e6 ** -(torch.arange(0, sizes["K"], 2, device=device) / sizes["K"])
    angle_TR = position_T[:, None] * freq_R
    tables = (angle_TR.cos(), angle_TR.sin())
    products = 2 * num_tokens * sum(w.numel() for w in layer.parameters() if w.ndim == 2)
    weights = dict(layer.named_parameters())
    return Problem(
        arguments=(hidden_TD, *tables, bounds, longest, layer),
        leaves={"hidden": hidden_TD, **weights},
        upstream=dout_TD,
        forward_flops=products + stream.forward_flops,
        flops=3 * products + stream.flops,
        num_bytes=4 * hidden_TD.nbytes + 3 * sum(w.nbytes for w in weights.values()),
    )


def ours(problem: Problem, *, recompute: bool = False, compiling: bool = False) -> Forward:
    hidden_TD, cos_TR, sin_TR, bounds, longest, layer = problem.arguments

    def attend(index: int, q_THK: Tensor, k_TNK: Tensor, v_TNK: Tensor) -> Tensor:
        return packed_attention(q_THK, k_TNK, v_TNK, bounds, longest)

    run = layer.forward
    if compiling:
        run = compiled(problem, run, fullgraph=True)
    return lambda: run(0, hidden_TD, cos_TR, sin_TR, attend, None, recompute)


def plain_layer(
    hidden_TD: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    weights: Mapping[str, Tensor],
    heads: tuple[int, int],
    attend: Any,
) -> Tensor:
    """The layer in torch's own functions; attend(q, k, v)."""
    normed_TD = _norm(hidden_TD, weights["input_norm"])
    qkv = F.linear(normed_TD, weights["qkv_weight"], weights["qkv_bias"])
    qkv = qkv.unflatten(1, (heads[0] + 2 * heads[1], -1))
    q_THK, k_TNK, v_TNK = qkv.split((heads[0], heads[1], heads[1]), dim=1)
    q_THK, k_TNK = (_rotate(x, cos_TR, sin_TR) for x in (q_THK, k_TNK))
    out_TQ = attend(q_THK, k_TNK, v_TNK.contiguous()).flatten(1)
    hidden_TD = hidden_TD + F.linear(out_TQ, weights["o_weight"])
    normed_TD = _norm(hidden_TD, weights["post_norm"])
    gate_TF, up_TF = F.linear(normed_TD, weights["gate_up_weight"]).chunk(2, dim=1)
    return hidden_TD + F.linear(F.silu(gate_TF) * up_TF, weights["down_weight"])


def _norm(x_TD: Tensor, weight_D: Tensor) -> Tensor:
    return F.rms_norm(x_TD, x_TD.shape[1:], weight_D, EPS)


def _rotate(x_THK: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    a, b = x_THK.to(torch.promote_types(x_THK.dtype, torch.float32)).chunk(2, dim=-1)
    cos, sin = cos_TR[:, None], sin_TR[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x_THK.dtype)


def plain(problem: Problem, *, compiling: bool = False) -> Forward:
    hidden_TD, cos_TR, sin_TR, bounds, longest, layer = problem.arguments
    c = layer.config

    def attend(q_THK: Tensor, k_TNK: Tensor, v_TNK: Tensor) -> Tensor:
        return packed_attention(q_THK, k_TNK, v_TNK, bounds, longest)

    run = compiled(problem, plain_layer, fullgraph=True) if compiling else plain_layer
    heads = (c.num_attention_heads, c.num_key_value_heads)
    weights = dict(layer.named_parameters())
    return lambda: run(hidden_TD, cos_TR, sin_TR, weights, heads, attend)


def reference(problem: Problem) -> tuple[Tensor, dict[str, Tensor]]:
    """In fp64; attention by the reference of its own bench."""
    _, cos_TR, sin_TR, bounds, longest, layer = problem.arguments
    c = layer.config
    leaves = {k: x.detach().double().requires_grad_() for k, x in problem.leaves.items()}

    def attend(*qkv: Tensor) -> Tensor:
        return _ExactAttention.apply(*qkv, bounds, longest)

    heads = (c.num_attention_heads, c.num_key_value_heads)
    tables = cos_TR.double(), sin_TR.double()
    out_TD = plain_layer(leaves["hidden"], *tables, leaves, heads, attend)
    assert isinstance(problem.upstream, Tensor)
    found = torch.autograd.grad(out_TD, list(leaves.values()), problem.upstream.double())
    return out_TD.detach(), dict(zip(leaves, found, strict=True))


class _ExactAttention(torch.autograd.Function):
    """Attention's reference gives output and gradients at once, so forward runs it twice."""

    @staticmethod
    def forward(ctx, q_THK, k_TNK, v_TNK, bounds, longest):
        ctx.save_for_backward(q_THK, k_TNK, v_TNK)
        ctx.boundaries = (bounds, longest)
        out_THK, _ = _exact(q_THK, k_TNK, v_TNK, bounds, longest, torch.zeros_like(q_THK))
        return out_THK.double()

    @staticmethod
    def backward(ctx, dout_THK):
        q_THK, k_TNK, v_TNK = ctx.saved_tensors
        bounds, longest = ctx.boundaries
        _, gradients = _exact(q_THK, k_TNK, v_TNK, bounds, longest, dout_THK)
        return *(gradients[name].double() for name in "qkv"), None, None


def _exact(
    q_THK: Tensor, k_TNK: Tensor, v_TNK: Tensor, bounds: Tensor, longest: int, dout_THK: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    arguments = (q_THK, k_TNK, v_TNK, bounds, longest)
    out_THK, gradients = attention.reference(Problem(arguments, upstream=dout_THK))
    assert isinstance(out_THK, Tensor)
    return out_THK, gradients


OP = Op(
    name="layer",
    gpu_sizes={"SEQ": 4700, "COUNT": 1, "H": 40, "N": 8, "K": 128, "D": 5120, "F": 27648},
    cpu_sizes={"SEQ": 24, "COUNT": 4, "H": 4, "N": 2, "K": 16, "D": 48, "F": 80},
    gpu_shapes=(
        "SEQ4700",  # a GPU's share of a step of s1
        "SEQ8192xCOUNT4xH28xN4xD3584xF18944",  # Qwen2.5-7B
    ),
    cpu_shapes=("SEQ24",),
    make=make,
    reference=reference,
    ours=Provider("s1fast", ours),
    peers=(
        Provider("s1fast, compiled", partial(ours, compiling=True)),
        Provider("s1fast, gate and up again", partial(ours, recompute=True)),
        Provider("torch eager", plain),
        Provider("torch.compile", partial(plain, compiling=True)),
    ),
)
