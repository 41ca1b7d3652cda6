"""What the captured loop is measured against: a plain torch loop in a graph, transformers' static
cache under torch.compile, and a client that forces budgets from outside.

The first two take our model's own weights, without a copy, and their own caches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from s1fast.automaton import Program
from s1fast.bench.decode_setup import Setup, plain
from s1fast.bench.timing import measure
from s1fast.checkpoint import layout
from s1fast.model import Layer, Model, inverse_frequencies
from s1fast.request import SamplingParams

STEPS = 16
"""In one timed call."""


def client_side(
    s: Setup,
    prompt: Sequence[int],
    ends: Sequence[int],
    wait: Sequence[int],
    end: Sequence[int],
    budget: int,
    answer: int,
    params: SamplingParams,
) -> int:
    """s1's loop from outside: asks for thinking, appends a Wait where it ended, asks again with all
    that there is as the prompt, at last for the answer. Returns how often it asked."""
    ids, rounds = list(prompt), 0
    for last in (False, False, True):
        left = budget - (len(ids) - len(prompt))
        if left <= 0:
            break
        ids += _asked(s, ids, plain(left, left, stop_ids=ends), params)
        rounds += 1
        if not last and len(ids) - len(prompt) < budget:
            ids += wait
    _asked(s, [*ids, *end], plain(answer, answer), params)
    return rounds + 1


def _asked(s: Setup, ids: list[int], program: Program, params: SamplingParams) -> list[int]:
    s.add(ids, [program], params, cached=False)
    (done,) = s.run()
    return done.token_ids


# -- a plain loop ----------------------------------------------------------------------------------


class PlainLoop:
    """Greedy decoding as one writes it: norm, products and attention by torch, a static cache."""

    def __init__(self, model: Model, batch: int, context: int) -> None:
        self.model, c = model, model.config
        self._layers = cast(list[Layer], list(model.layers))
        device, dtype = model.embed.weight.device, model.compute_dtype
        self.length = -(-(context + 8 * STEPS) // 64) * 64
        shape = (c.num_hidden_layers, batch, c.num_key_value_heads, self.length, c.head_dim)
        self.k, self.v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
        self.token_B = torch.full((batch,), 7, device=device)
        self.position = torch.full((1,), context, device=device)
        self._freq_R = inverse_frequencies(c).to(device)
        self._at_X = torch.arange(self.length, device=device)

    def step(self) -> None:
        c, model = self.model.config, self.model
        hidden_BD = F.embedding(self.token_B, model.embed.weight)
        angle = self.position.float()[:, None] * self._freq_R
        cos, sin = (x.repeat(1, 2).to(hidden_BD.dtype) for x in (angle.cos(), angle.sin()))
        seen_X = (self._at_X <= self.position)[None, None, None]
        for i, layer in enumerate(self._layers):
            x_BD = F.rms_norm(hidden_BD, layer.input_norm.shape, layer.input_norm, c.rms_norm_eps)
            qkv = F.linear(x_BD, layer.qkv_weight, layer.qkv_bias).unflatten(1, (-1, c.head_dim))
            heads = (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)
            q, k, v = qkv.split(heads, 1)
            self.k[i].index_copy_(2, self.position, _turned(k, cos, sin)[:, :, None])
            self.v[i].index_copy_(2, self.position, v[:, :, None])
            # The heads of a group as rows of queries: else torch repeats keys and values.
            q_BNGK = _turned(q, cos, sin).unflatten(1, (c.num_key_value_heads, -1))
            out = F.scaled_dot_product_attention(q_BNGK, self.k[i], self.v[i], attn_mask=seen_X)
            hidden_BD = hidden_BD + F.linear(out.flatten(1), layer.o_weight)
            x_BD = F.rms_norm(hidden_BD, layer.post_norm.shape, layer.post_norm, c.rms_norm_eps)
            gate, up = F.linear(x_BD, layer.gate_up_weight).chunk(2, 1)
            hidden_BD = hidden_BD + F.linear(F.silu(gate) * up, layer.down_weight)
        x_BD = F.rms_norm(hidden_BD, model.head.norm.shape, model.head.norm, model.head.eps)
        self.token_B.copy_(F.linear(x_BD, model.head_weight).argmax(-1))
        self.position += 1


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def plain_captured(model: Model, batch: int, context: int) -> dict[str, Any]:
    """The plain loop in a CUDA graph; as it is on a CPU."""
    loop = PlainLoop(model, batch, context)
    run: Callable[[], Any] = loop.step
    if loop.k.is_cuda:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loop.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loop.step()
        run = graph.replay
    return _per_step(run, loop.position, context)


# -- transformers ----------------------------------------------------------------------------------


def transformers_static(model: Model, batch: int, context: int) -> dict[str, Any]:
    """transformers' Qwen2 with a static cache, its step under torch.compile on a GPU."""
    import transformers
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    c, device = model.config, model.embed.weight.device
    config = transformers.Qwen2Config(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=c.tie_word_embeddings,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        theirs = transformers.Qwen2ForCausalLM(config)
    theirs.load_state_dict(_their_names(model), assign=True)
    theirs.model.rotary_emb = Qwen2RotaryEmbedding(config=config).to(device)
    theirs.eval()
    length = -(-(context + 8 * STEPS) // 64) * 64
    cache = transformers.StaticCache(config, max_cache_len=length)
    token_B1 = torch.full((batch, 1), 7, device=device)
    position = torch.full((1,), context, device=device)

    def forward() -> Tensor:
        ids = position.expand(batch, 1)
        out = theirs(token_B1, position_ids=ids, past_key_values=cache, use_cache=True)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    forward()  # makes the cache
    for layer in cache.layers:
        layer.cumulative_length.fill_(context)
    run = forward
    if device.type == "cuda":
        torch.compiler.reset()
        run = torch.compile(forward, mode="reduce-overhead", fullgraph=True)

    def step() -> None:
        token_B1.copy_(run())
        position.add_(1)

    return _per_step(step, position, context)


def _their_names(model: Model) -> dict[str, Tensor]:
    """Our weights under Hugging Face's names: views, no copies."""
    weights = dict(model.named_parameters())
    found = {
        part.name: weights[ours][part.start : part.stop]
        for ours, parts in layout(model.config).items()
        for part in parts
    }
    found["lm_head.weight"] = model.head_weight
    return {name: torch.nn.Parameter(x, requires_grad=False) for name, x in found.items()}


def _per_step(run: Callable[[], Any], position: Tensor, context: int) -> dict[str, Any]:
    def several() -> None:
        position.fill_(context)
        for _ in range(STEPS):
            run()

    return {"step_ms": measure(several, warmup=2, repeats=3).median_ms / STEPS}
