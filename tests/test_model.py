"""The model against transformers' Qwen2 and Llama: logits, loss and every gradient."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from s1fast.chat import Example
from s1fast.checkpoint import layout, load_model, read_config
from s1fast.errors import InputError
from s1fast.kernels.packed_attention import packed_attention
from s1fast.model import Model, ModelConfig, inverse_frequencies
from s1fast.packing import PackedBatch, pack
from s1fast.step import stream_loss

CPU = torch.device("cpu")

# fp32 rounds to 2^-24 = 6e-8; two implementations that sum thousands of terms in another order
# differ by tens of these, so 1e-5 (168 of them) in norm leaves room for no other formula.
TOLERANCE = 1e-5

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-one-group-per-head": ("qwen2", {"num_key_value_heads": 4}),
    "qwen2-one-kv-head": ("qwen2", {"num_key_value_heads": 1}),
    "qwen2-head-dim": ("qwen2", {"head_dim": 24}),
    "qwen2-theta": (
        "qwen2",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rms_norm_eps": 1e-2},
    ),
    "llama": ("llama", {}),
    "llama-tied-seven-to-one": (
        "llama",
        {"tie_word_embeddings": True, "num_attention_heads": 7, "num_key_value_heads": 1}
        | {"hidden_size": 56, "head_dim": 16},
    ),
    "llama-head-dim": ("llama", {"head_dim": 10, "num_key_value_heads": 4}),
    "llama-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
    ),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3, "head_dim": 32}),
}


def random_config(seed: int) -> tuple[str, dict[str, Any]]:
    """A config drawn from all that is supported."""
    draw = random.Random(seed)
    kv_heads, groups = draw.choice([1, 2, 3]), draw.choice([1, 2, 3, 5])
    model_type = draw.choice(["qwen2", "llama"])
    ropes: list[dict[str, Any]] = [
        {"rope_type": "default", "rope_theta": draw.uniform(1e2, 1e6)},
        {"rope_type": "linear", "factor": draw.uniform(1, 9), "rope_theta": 1e4},
        LLAMA3,
    ]
    return model_type, {
        "vocab_size": draw.randrange(403, 700),
        "hidden_size": kv_heads * groups * draw.choice([4, 8, 12]),
        "intermediate_size": draw.randrange(17, 160),
        "num_hidden_layers": draw.choice([1, 2, 3]),
        "num_attention_heads": kv_heads * groups,
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * draw.randrange(1, 20),
        "rms_norm_eps": 10.0 ** draw.randrange(-8, -2),
        "tie_word_embeddings": draw.random() < 0.5,
        "rope_parameters": draw.choice(ropes),
    }


CONFIGS |= {f"random-{seed}": random_config(seed) for seed in range(6)}


def stream(vocab_size: int, lengths: tuple[int, ...] = (23, 1, 38), seed: int = 0) -> PackedBatch:
    """Sequences of random tokens, about two thirds of them labelled, each weighted differently."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for n in lengths:
        ids = torch.randint(vocab_size, (n,), generator=generator).tolist()
        labelled = (torch.rand(n, generator=generator) < 0.7).tolist()
        examples.append(Example(tuple(ids), tuple(labelled), "random"))
    return pack(examples, [0.01 * (i + 1) for i in range(len(lengths))])


def ours(folder: Path, batch: PackedBatch, dtype: torch.dtype) -> tuple[Tensor, Tensor, Model]:
    """Logits of all rows and loss, backward done."""
    model = load_model(folder, CPU, dtype)

    def attend(layer: int, q_THK: Tensor, k_TNK: Tensor, v_TNK: Tensor) -> Tensor:
        return packed_attention(q_THK, k_TNK, v_TNK, batch.cu_seqlens, batch.max_seqlen)

    with torch.no_grad():
        logits_TV = model.logits(model(batch.ids_T, batch.positions_T, attend))
    loss = stream_loss(model, batch)
    loss.backward()
    return logits_TV, loss.detach(), model


def theirs(folder: Path, batch: PackedBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The same of transformers in fp32, a sequence at a time, with its gradients by name.

    The cross-entropy of its logits is taken in float64: torch's fp32 log_softmax over 49,152
    classes is itself off by 3e-6, and by 3e-4 in some gradients of SmolLM2.
    """
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loss, logits = torch.zeros((), dtype=torch.float64), []
    bounds = batch.cu_seqlens.tolist()
    for start, stop in pairwise(bounds):
        ids, labels = batch.ids_T[start:stop], batch.label_T[start:stop]
        row = model(input_ids=ids[None], use_cache=False).logits[0]
        logits.append(row.detach())
        nll = F.cross_entropy(row.double(), labels, ignore_index=-100, reduction="none")
        loss = loss + (nll * batch.loss_weight_T[start:stop]).sum()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return torch.cat(logits), loss.detach(), grads


def gap(found: Tensor, wanted: Tensor) -> float:
    """Relative error in norm."""
    far = torch.linalg.vector_norm(found - wanted, dtype=torch.float64)
    return float(far / torch.linalg.vector_norm(wanted, dtype=torch.float64))


def grads_by_name(model: Model) -> dict[str, Tensor]:
    """Our gradients under the names of Hugging Face's tensors."""
    named = dict(model.named_parameters())
    found = {}
    for name, parts in layout(model.config).items():
        grad = named[name].grad
        assert grad is not None, name
        found |= {part.name: grad[part.start : part.stop] for part in parts}
    return found


def assert_same_grads(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    errors = {name: gap(found[name], grad) for name, grad in wanted.items()}
    far = {name: error for name, error in errors.items() if not error <= TOLERANCE}  # NaN too
    assert not far


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_loss_and_gradients_are_transformers(
    name: str, make_model: Callable[..., Path]
) -> None:
    model_type, fields = CONFIGS[name]
    folder = make_model(model_type, seed=len(name), **fields)
    batch = stream(read_config(folder).vocab_size)
    logits_TV, loss, model = ours(folder, batch, torch.float32)
    want_logits, want_loss, want_grads = theirs(folder, batch)
    assert gap(logits_TV, want_logits) <= TOLERANCE
    assert gap(loss, want_loss) <= TOLERANCE
    assert_same_grads(grads_by_name(model), want_grads)


@pytest.mark.parametrize("name", CONFIGS)
def test_fp32_is_float64_rounded(name: str, make_model: Callable[..., Path]) -> None:
    """The same model in float64 (norms and rotations stay fp32) moves nothing by more than fp32."""
    model_type, fields = CONFIGS[name]
    folder = make_model(model_type, seed=len(name), **fields)
    batch = stream(read_config(folder).vocab_size)
    logits_TV, loss, model = ours(folder, batch, torch.float32)
    wide_logits, wide_loss, wide = ours(folder, batch, torch.float64)
    assert wide_logits.dtype == wide_loss.dtype == torch.float64
    assert gap(logits_TV, wide_logits) <= TOLERANCE
    assert gap(loss, wide_loss) <= TOLERANCE
    assert_same_grads(grads_by_name(model), grads_by_name(wide))


def smollm2_text(folder: Path) -> PackedBatch:
    import transformers

    text = (
        "A train leaves the station at noon and travels 60 miles an hour. Another leaves an hour "
        "later at 80 miles an hour. When does the second train overtake the first? Let the time be "
        "t hours after noon; then 60 t = 80 (t - 1), so t = 4, and it is four o'clock."
    )
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text).input_ids
    assert 50 <= len(ids) <= 90
    return pack([Example(tuple(ids), (True,) * len(ids), "text")], [1 / (len(ids) - 1)])


def test_smollm2_logits_loss_and_gradients(smollm2: Path) -> None:
    """Real weights, real text: 30 layers, tied head, nine heads on three."""
    batch = smollm2_text(smollm2)
    logits_TV, loss, model = ours(smollm2, batch, torch.float32)
    want_logits, want_loss, want_grads = theirs(smollm2, batch)
    assert 1.0 < want_loss < 4.0  # it is a language model, and it reads English
    assert gap(logits_TV, want_logits) <= TOLERANCE
    assert gap(loss, want_loss) <= TOLERANCE
    assert_same_grads(grads_by_name(model), want_grads)


@pytest.mark.slow
def test_smollm2_is_as_close_to_float64_as_transformers(smollm2: Path) -> None:
    """Over all gradients together; a single norm weight of 30 fp32 layers may be off by 1.1e-5."""
    batch = smollm2_text(smollm2)
    logits_TV, loss, model = ours(smollm2, batch, torch.float32)
    wide_logits, wide_loss, wide = ours(smollm2, batch, torch.float64)
    _, _, their_grads = theirs(smollm2, batch)
    assert gap(logits_TV, wide_logits) <= TOLERANCE
    assert gap(loss, wide_loss) <= TOLERANCE
    exact, found = grads_by_name(wide), grads_by_name(model)

    def total(grads: dict[str, Tensor]) -> float:
        return sum(float((grads[n].double() - exact[n]).norm()) ** 2 for n in exact) ** 0.5

    assert total(found) <= 1.2 * total(their_grads)
    assert max(gap(found[name], exact[name]) for name in exact) <= 2 * TOLERANCE


# Of a config.json from before transformers 5, and what they mean.
OLD_FIELDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "theta": ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
    "none": ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_theta": 5e5}),
    "linear": (
        {"rope_theta": 300.0, "rope_scaling": {"type": "linear", "factor": 2.5}},
        {"rope_type": "linear", "factor": 2.5, "rope_theta": 300.0},
    ),
    "llama3": (
        {
            "rope_theta": 10000.0,
            "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"},
        },
        LLAMA3,
    ),
}


@pytest.mark.parametrize("name", OLD_FIELDS)
def test_old_rope_fields(name: str, make_model: Callable[..., Path]) -> None:
    """rope_theta and rope_scaling mean what rope_parameters means, to us and to transformers."""
    import transformers

    old, new = OLD_FIELDS[name]
    folder = make_model("llama", num_hidden_layers=1)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    path.write_text(json.dumps(config | old))
    read = read_config(folder)
    assert read == ModelConfig.from_json(config | {"rope_parameters": new}, "new")
    assert read.rope_theta == old["rope_theta"]
    assert (read.rope_scaling is None) == (name in ("theta", "none"))
    rotary = transformers.AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb
    torch.testing.assert_close(inverse_frequencies(read), rotary.inv_freq, rtol=1e-6, atol=0)
    batch = stream(read.vocab_size)
    assert gap(ours(folder, batch, torch.float32)[0], theirs(folder, batch)[0]) <= TOLERANCE


def test_llama3_scaling_has_all_three_bands(make_model: Callable[..., Path]) -> None:
    """Kept, stretched and blended wavelengths all occur in the config that the tests use."""
    plain = read_config(make_model("llama", head_dim=32))
    scaled = read_config(make_model("llama", head_dim=32, rope_parameters=LLAMA3))
    ratio_R = inverse_frequencies(scaled) / inverse_frequencies(plain)
    assert ratio_R.min() == 1 / 8 and ratio_R.max() == 1.0
    assert ((ratio_R > 1 / 8) & (ratio_R < 1.0)).any()


GOOD: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}


def rope_with(**fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {**LLAMA3, **fields}}


BAD: list[tuple[str, dict[str, Any]]] = [  # the word that the message must hold, the change
    ("model_type", {"model_type": "mistral"}),
    ("model_type", {"model_type": None}),
    ("model_type", {"model_type": ["llama"]}),
    ("hidden_act", {"hidden_act": "gelu"}),
    ("use_sliding_window", {"use_sliding_window": True}),
    ("mlp_bias", {"mlp_bias": True}),
    ("attention_bias", {"attention_bias": True}),
    ("pretraining_tp", {"pretraining_tp": 2}),
    ("quantization_config", {"quantization_config": {"bits": 4}}),
    ("quantization_config", {"quantization_config": {}}),
    ("layer_types", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("num_attention_heads", {"num_key_value_heads": 3}),
    ("head_dim", {"head_dim": 15}),
    ("rope_type", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}),
    ("rope_type", {"rope_parameters": {"rope_type": ["linear"], "factor": 4.0}}),
    ("rope_type", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}),
    ("rope_parameters", {"rope_parameters": "linear"}),
    ("rope_scaling", {"rope_scaling": ["linear", 2.0]}),
    ("rope_theta", {"rope_theta": -1.0}),
    ("rope_theta", {"rope_parameters": {"rope_theta": "1e6"}}),
    ("factor", {"rope_scaling": {"type": "linear"}}),
    ("factor", {"rope_scaling": {"type": "linear", "factor": 0}}),
    *((name, rope_with(**{name: None})) for name in LLAMA3 if not name.startswith("rope_")),
    *((name, {name: None}) for name in GOOD if name not in ("model_type", "num_key_value_heads")),
    *((name, {name: 0}) for name in GOOD if name != "model_type"),
    ("vocab_size", {"vocab_size": "512"}),
    ("vocab_size", {"vocab_size": 512.0}),
    ("vocab_size", {"vocab_size": True}),
    ("vocab_size", {"vocab_size": 1 << 60}),
    ("num_hidden_layers", {"num_hidden_layers": 100_000}),
    ("head_dim", {"head_dim": -2}),
    ("rms_norm_eps", {"rms_norm_eps": 0.0}),
    ("rms_norm_eps", {"rms_norm_eps": True}),
    ("rms_norm_eps", {"rms_norm_eps": "1e-6"}),
    ("tie_word_embeddings", {"tie_word_embeddings": "yes"}),
]


def test_good_config_is_accepted() -> None:
    """So that each refusal below is due to its one change."""
    assert ModelConfig.from_json(GOOD, "config.json").head_dim == 16


@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_fields_left_out_are_what_transformers_takes_them_for(
    model_type: str, tmp_path: Path
) -> None:
    import transformers

    needed = {name: value for name, value in GOOD.items() if name != "num_key_value_heads"}
    values = {**needed, "model_type": model_type, "num_key_value_heads": None}
    (tmp_path / "config.json").write_text(json.dumps(values))
    ours, theirs = read_config(tmp_path), transformers.AutoConfig.from_pretrained(tmp_path)
    for name in ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert theirs.rope_parameters == {"rope_theta": ours.rope_theta, "rope_type": "default"}
    assert ours.rope_scaling is None
    assert ours.head_dim == 16


@pytest.mark.parametrize(("word", "change"), BAD, ids=[f"{w}-{c}"[:60] for w, c in BAD])
def test_unsupported_config_names_file_and_field(
    word: str, change: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(InputError) as caught:
        read_config(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert word in message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"vocab_size": NaN}', "nul\0"])
def test_broken_config_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        read_config(tmp_path)


def test_random_init_is_reproducible_and_seeded() -> None:
    config = ModelConfig.from_json({**GOOD, "model_type": "qwen2"}, "config.json")

    def weights(seed: int) -> dict[str, Tensor]:
        return Model(config).init_random(seed).state_dict()

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])
    assert first["layers.0.qkv_bias"].count_nonzero() == 0
    assert (first["layers.0.input_norm"] == 1).all() and (first["head.norm"] == 1).all()
    # 512 x 64 draws: their standard deviation is off by at most 4 / sqrt(2 n) = 1.6 %.
    assert abs(first["embed.weight"].std() / 0.02 - 1) < 0.016
