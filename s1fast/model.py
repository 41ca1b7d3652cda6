"""The decoder-only transformer of Qwen2, Qwen2.5 and Llama, over one packed stream of tokens.

Written once for training and decoding: the loops own what differs and hand it in. `attend(layer,
q_THK, k_TNK, v_TNK)` is varlen attention or a KV cache; `reduce(x_TD)` sums partial results of
tensor parallel ranks. There is no batch axis and no padding.

Shape letters, everywhere: T packed tokens, B sequences, D model width, H query heads, N key-value
heads, K head width, R = K / 2, F feed-forward width, V vocabulary, L layers, C chunk rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from s1fast.errors import InputError
from s1fast.kernels.feed_forward import feed_forward
from s1fast.kernels.linear import linear_residual
from s1fast.kernels.linear_cross_entropy import linear_cross_entropy
from s1fast.kernels.norm_qkv import norm_qkv
from s1fast.kernels.rms_norm import rms_norm
from s1fast.kernels.swiglu import swiglu
from s1fast.slices import slice_of

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
Reduce = Callable[[Tensor], Tensor]
Recompute = Literal["none", "gate_up", "full"]
"""What backward computes again, from least to most: norms and the gated product; the gate and up
projections too (feed_forward.py); the whole layer from its input."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The fields of a Hugging Face config.json that the model computes with, under its names."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    """None, or {"rope_type": "linear" | "llama3", ...} with that type's fields."""
    tie_word_embeddings: bool
    attention_bias: bool
    """Bias of the q, k and v projections: Qwen2 has one, Llama none."""

    @staticmethod
    def from_json(config: dict[str, Any], where: str) -> ModelConfig:
        """Checks and converts the object in a config.json; `where` names it in errors.

        Raises:
            InputError: an unsupported model type or feature, a missing, ill-typed or impossible
                field.
        """
        model_type = config.get("model_type")
        if model_type not in ("qwen2", "llama"):
            raise InputError(
                f"{where}: model_type {_short(model_type)} is not supported; s1fast runs 'qwen2' "
                "(Qwen2, Qwen2.5) and 'llama'"
            )
        field = _Fields(config, where)
        for name, accepted in _UNSUPPORTED.items():
            if config.get(name, accepted) not in (accepted, None):
                raise InputError(f"{where}: {name} = {_short(config[name])} is not supported")
        if "sliding_attention" in str(config.get("layer_types")):
            raise InputError(f"{where}: layer_types with sliding_attention are not supported")
        heads = field.count("num_attention_heads")
        hidden = field.count("hidden_size")
        kv_heads = field.count("num_key_value_heads", default=heads)
        head_dim = field.count("head_dim", default=max(1, hidden // heads))
        if heads % kv_heads:
            raise InputError(
                f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads "
                f"{kv_heads}"
            )
        if head_dim % 2:
            raise InputError(f"{where}: head_dim {head_dim} is odd, rotary embedding needs pairs")
        theta, scaling = field.rope()
        made = ModelConfig(
            model_type=model_type,
            vocab_size=field.count("vocab_size"),
            hidden_size=hidden,
            intermediate_size=field.count("intermediate_size"),
            num_hidden_layers=field.count("num_hidden_layers", most=1024),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=field.count("max_position_embeddings"),
            rms_norm_eps=field.positive("rms_norm_eps", default=1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=field.boolean("tie_word_embeddings", default=False),
            attention_bias=model_type == "qwen2",
        )
        if made.num_weights > _MOST_WEIGHTS:
            raise InputError(f"{where}: implies {made.num_weights:,} weights: too many")
        return made

    @property
    def num_weights(self) -> int:
        """Elements of all matrices."""
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads
        layer = self.hidden_size * (heads * self.head_dim + 3 * self.intermediate_size)
        embeddings = self.vocab_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + embeddings * self.hidden_size


_MOST_WEIGHTS = 10**13
"""Far above any model, far below where a tensor's size in bytes overflows."""


_UNSUPPORTED = {  # field: the one value that is supported
    "hidden_act": "silu",
    "use_sliding_window": False,
    "mlp_bias": False,
    "attention_bias": False,  # as a config field it exists for Llama and biases o_proj as well
    "pretraining_tp": 1,
    "quantization_config": None,
}


class _Fields:
    """Typed access to a JSON object: every complaint names the file and the field."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        value = default if value is None else value
        if value is None:
            raise InputError(f"{self.where}: field {name} is missing")
        return value

    def count(self, name: str, *, default: int | None = None, most: int = 1 << 24) -> int:
        value = self._get(name, default)
        if type(value) is not int or not 0 < value <= most:
            raise InputError(f"{self.where}: {name} must be in 1..{most}, got {_short(value)}")
        return value

    def positive(self, name: str, *, default: float | None = None) -> float:
        value = self._get(name, default)
        if type(value) not in (int, float) or not 0.0 < value < 1e30:
            raise InputError(f"{self.where}: {name} must be a positive number, got {_short(value)}")
        return float(value)

    def boolean(self, name: str, *, default: bool) -> bool:
        value = self._get(name, default)
        if type(value) is not bool:
            raise InputError(f"{self.where}: {name} must be true or false, got {_short(value)}")
        return value

    def rope(self) -> tuple[float, dict[str, Any] | None]:
        """Base and scaling, from transformers 5's rope_parameters or the older two fields."""
        table = self.values.get("rope_parameters") or self.values.get("rope_scaling") or {}
        if not isinstance(table, dict):
            name = "rope_parameters" if self.values.get("rope_parameters") else "rope_scaling"
            raise InputError(f"{self.where}: {name} must be an object")
        inner = _Fields({"rope_theta": self.values.get("rope_theta"), **table}, self.where)
        theta = inner.positive("rope_theta", default=10000.0)
        kind = table.get("rope_type", table.get("type", "default"))
        needs = {
            "default": (),
            "linear": ("factor",),
            "llama3": (
                "factor",
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            ),
        }
        if not isinstance(kind, str) or kind not in needs:
            raise InputError(
                f"{self.where}: rope_type {_short(kind)} is not supported; use 'default', "
                "'linear' or 'llama3'"
            )
        if kind == "default":
            return theta, None
        return theta, {"rope_type": kind, **{name: inner.positive(name) for name in needs[kind]}}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Rotation per position and pair, (R,) fp32, with the config's scaling applied.

    "llama3" stretches long wavelengths by `factor`, keeps short ones and blends between; formula of
    transformers' modeling_rope_utils.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    freq_R = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None:
        return freq_R
    if scaling["rope_type"] == "linear":
        return freq_R / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns_R = scaling["original_max_position_embeddings"] * freq_R / (2 * math.pi)
    blend_R = ((turns_R - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend_R) * freq_R / scaling["factor"] + blend_R * freq_R


def kept_bytes(config: ModelConfig, recompute: Recompute, dtype: torch.dtype) -> int:
    """Bytes that a layer keeps for backward, for each token.

    "full" keeps its input; "gate_up" also q, k, v, what attention returns with its log-sum-exp, the
    input of the feed-forward block, and the fp32 rstd of both norms; "none" also gate and up. For
    Qwen2.5-32B in bf16: 10, 45 and 156 KB. Tables shared by the layers are not counted.
    """
    c, size = config, dtype.itemsize
    if recompute == "full":
        return c.hidden_size * size
    heads = 2 * c.num_attention_heads + 2 * c.num_key_value_heads
    kept = (2 * c.hidden_size + heads * c.head_dim) * size + 4 * c.num_attention_heads + 2 * 4
    return kept if recompute == "gate_up" else kept + 2 * c.intermediate_size * size


class Layer(nn.Module):
    """One decoder layer: norm + qkv, attention, o + residual, norm + feed-forward + residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, f, k = config.hidden_size, config.intermediate_size, config.head_dim
        h, n = config.num_attention_heads, config.num_key_value_heads
        self.config = config
        self.input_norm = nn.Parameter(torch.empty(d))
        self.qkv_weight = nn.Parameter(torch.empty((h + 2 * n) * k, d))
        self.qkv_bias = (
            nn.Parameter(torch.empty((h + 2 * n) * k)) if config.attention_bias else None
        )
        self.o_weight = nn.Parameter(torch.empty(d, h * k))
        self.post_norm = nn.Parameter(torch.empty(d))
        self.gate_up_weight = nn.Parameter(torch.empty(2 * f, d))
        self.down_weight = nn.Parameter(torch.empty(d, f))

    def forward(
        self,
        layer: int,
        hidden_TD: Tensor,
        cos_TR: Tensor,
        sin_TR: Tensor,
        attend: Attend,
        reduce: Reduce | None = None,
        recompute_gate_up: bool = False,
    ) -> Tensor:
        c = self.config
        hidden_TD, q_THK, k_TNK, v_TNK = norm_qkv(
            hidden_TD,
            self.input_norm,
            self.qkv_weight,
            self.qkv_bias,
            cos_TR,
            sin_TR,
            eps=c.rms_norm_eps,
            num_heads=c.num_attention_heads,
            num_kv_heads=c.num_key_value_heads,
        )
        out_TQ = attend(layer, q_THK, k_TNK, v_TNK).flatten(1)
        if reduce is not None:
            hidden_TD = hidden_TD + reduce(_linear(out_TQ, self.o_weight))
            return hidden_TD + reduce(_linear(self._gated(hidden_TD), self.down_weight))
        hidden_TD = linear_residual(out_TQ, self.o_weight, hidden_TD)
        return feed_forward(
            hidden_TD,
            self.post_norm,
            self.gate_up_weight,
            self.down_weight,
            eps=c.rms_norm_eps,
            recompute_gate_up=recompute_gate_up,
        )

    def _gated(self, hidden_TD: Tensor) -> Tensor:
        normed_TD = rms_norm(hidden_TD, self.post_norm, self.config.rms_norm_eps)
        return swiglu(_linear(normed_TD, self.gate_up_weight))


class Embedding(nn.Module):
    """Token embeddings: a module of their own, so that they are a unit of sharding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, ids_T: Tensor) -> Tensor:
        return F.embedding(ids_T, self.weight)


class Head(nn.Module):
    """Final norm and vocabulary projection, with the loss: one unit, so that logits need not exist.

    With tied embeddings `weight` is None and the model passes its embedding in.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.norm = nn.Parameter(torch.empty(config.hidden_size))
        shape = (config.vocab_size, config.hidden_size)
        self.weight = None if config.tie_word_embeddings else nn.Parameter(torch.empty(shape))

    def forward(
        self,
        hidden_TD: Tensor,
        tied_VD: Tensor | None,
        label_T: Tensor,
        loss_weight_T: Tensor,
        valid_rows: Tensor,
        bad_labels: Tensor | None,
    ) -> Tensor:
        """The loss, weighted; tied_VD is the embedding where `weight` is None."""
        weight_VD = self.weight if tied_VD is None else tied_VD
        assert weight_VD is not None
        normed_TD = rms_norm(hidden_TD, self.norm, self.eps)
        return linear_cross_entropy(
            normed_TD, weight_VD, label_T, loss_weight_T, valid_rows, bad_labels=bad_labels
        )


class Model(nn.Module):
    """Embedding, layers and head.

    Build under `torch.device("meta")`, then `materialise` and load: nothing is allocated twice.
    Weights may be kept wider than they are used: every product is taken in `compute_dtype`, fp32
    masters under bf16 arithmetic being the training case.
    """

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.embed = Embedding(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.head = Head(config)
        self.compiled = False

    def materialise(self, device: torch.device, dtype: torch.dtype) -> Model:
        """Allocates uninitialised weights of the given dtype in place of meta ones."""
        try:
            return self.to(dtype).to_empty(device=device)
        except RuntimeError as error:  # the CPU's and the GPU's allocator
            count = sum(p.numel() for p in self.parameters())
            reason = str(error).splitlines()[0]
            raise InputError(f"no memory for {count:,} weights on {device}: {reason}") from None

    def compile_layers(self, backend: str = "inductor") -> None:
        """Compiles the layers, one graph for all of them and for any number of tokens.

        A second one is built at the first layer that computes gate and up again, none afterwards.
        What `attend` calls must be traceable; a stream has two tokens at least.
        """
        self.compiled = True
        for layer in self.layers:  # the method: hooks around the module stay outside
            layer.forward = torch.compile(layer.forward, fullgraph=True, backend=backend)

    def init_random(self, seed: int, std: float = 0.02) -> Model:
        """Normal(0, std) matrices, unit norms, zero biases; the same weights on every device."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if weight.ndim == 2:
                    drawn = torch.randn(weight.shape, generator=generator) * std
                    slice_of(weight).fill(0, len(drawn), partial(_rows, drawn))
                else:
                    weight.fill_(0.0 if name.endswith("bias") else 1.0)
        return self

    def forward(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        attend: Attend,
        reduce: Reduce | None = None,
        recompute: Sequence[Recompute] | None = None,
    ) -> Tensor:
        """Hidden states after the last layer, before the final norm.

        Args:
            ids_T: int64 token ids of the packed stream.
            positions_T: int64 position of each token in its own sequence.
            attend, reduce: see the module's docstring.
            recompute: what each layer computes again in backward; None for nothing.

        Returns:
            hidden_TD in compute_dtype.
        """
        hidden_TD = self.embed(ids_T).to(self.compute_dtype)
        freq_R = inverse_frequencies(self.config).to(positions_T.device, non_blocking=True)
        angle_TR = positions_T[:, None].float() * freq_R
        cos_TR, sin_TR = angle_TR.cos(), angle_TR.sin()
        if self.compiled:
            for x in (hidden_TD, cos_TR, sin_TR):
                torch._dynamo.mark_dynamic(x, 0)
        for index, layer in enumerate(self.layers):
            what = recompute[index] if recompute else "none"
            arguments = (index, hidden_TD, cos_TR, sin_TR, attend, reduce, what == "gate_up")
            if what == "full":
                hidden_TD = checkpoint(
                    layer, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden_TD = layer(*arguments)
        return hidden_TD

    @property
    def head_weight(self) -> Tensor:
        """(V, D) vocabulary projection, tied or not."""
        return self.embed.weight if self.head.weight is None else self.head.weight

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """(T, V) logits of the given rows in compute_dtype."""
        return _linear(rms_norm(hidden_TD, self.head.norm, self.head.eps), self.head_weight)

    def loss(
        self,
        hidden_TD: Tensor,
        label_T: Tensor,
        loss_weight_T: Tensor,
        valid_rows: Tensor,
        bad_labels: Tensor | None = None,
    ) -> Tensor:
        """Weighted cross-entropy; arguments as linear_cross_entropy takes them."""
        tied_VD = self.embed.weight if self.head.weight is None else None
        return self.head(hidden_TD, tied_VD, label_T, loss_weight_T, valid_rows, bad_labels)


def _rows(x: Tensor, start: int, stop: int) -> Tensor:
    return x[start:stop]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias in x's dtype; the cast is free where the weight has it already."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
