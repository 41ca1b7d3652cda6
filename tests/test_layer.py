"""The decoder layer's own operations: their gradients, what they keep for backward, and compiling.

Attention is ours, by Triton's interpreter, where the dtype is bfloat16; in float64 it is torch's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from s1fast.chat import Example
from s1fast.config import OptimConfig, TrainConfig
from s1fast.errors import InputError
from s1fast.kernels.feed_forward import feed_forward
from s1fast.kernels.linear import linear_residual
from s1fast.kernels.norm_qkv import norm_qkv
from s1fast.kernels.packed_attention import packed_attention
from s1fast.model import Attend, Layer, Model, ModelConfig, Recompute, kept_bytes
from s1fast.parallel import Layout
from s1fast.step import Trainer
from tolerances import check_against_eager

CPU = torch.device("cpu")
EPS = 1e-6
POLICIES: list[Recompute] = ["none", "gate_up", "full"]


def config(**changes) -> ModelConfig:
    fields = {
        "model_type": "qwen2",
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "rms_norm_eps": EPS,
        "rope_theta": 1e4,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "attention_bias": True,
    }
    return ModelConfig(**{**fields, **changes})


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def tables(
    num_tokens: int, width: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    angle_TR = drawn(num_tokens, width // 2, seed=99) * 3
    return angle_TR.cos().to(dtype), angle_TR.sin().to(dtype)


# -- against plain PyTorch -----------------------------------------------------------------------


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight


def plain_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, -1)
    c, s = cos[:, None], sin[:, None]
    return torch.cat((a * c - b * s, b * c + a * s), -1).to(x.dtype)


def plain_norm_qkv(hidden, norm, weight, bias, cos, sin) -> tuple[Tensor, ...]:
    qkv = F.linear(plain_norm(hidden, norm), weight, bias).unflatten(1, (4, -1))
    q, k, v = qkv.split((2, 1, 1), 1)
    return hidden, plain_rope(q, cos, sin), plain_rope(k, cos, sin), v


def plain_feed_forward(hidden, norm, gate_up, down) -> Tensor:
    gate, up = F.linear(plain_norm(hidden, norm), gate_up).chunk(2, -1)
    return hidden + F.linear(F.silu(gate) * up, down)


def fused_norm_qkv(*arguments: Tensor) -> tuple[Tensor, ...]:
    return norm_qkv(*arguments, eps=EPS, num_heads=2, num_kv_heads=1)


def inputs_of_norm_qkv(num_tokens: int, dtype: torch.dtype) -> list[Tensor]:
    d, k = 24, 8
    shapes = [(num_tokens, d), (d,), (4 * k, d), (4 * k,)]
    inputs = [drawn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    wide = torch.promote_types(dtype, torch.float32)
    return [x.requires_grad_() for x in inputs] + list(tables(num_tokens, k, wide))


def inputs_of_feed_forward(num_tokens: int, dtype: torch.dtype) -> list[Tensor]:
    d, f = 24, 20
    shapes = [(num_tokens, d), (d,), (2 * f, d), (d, f)]
    return [drawn(*s, dtype=dtype, seed=i).requires_grad_() for i, s in enumerate(shapes)]


def inputs_of_linear(num_tokens: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = [(num_tokens, 20), (24, 20), (num_tokens, 24)]
    return [drawn(*s, dtype=dtype, seed=i).requires_grad_() for i, s in enumerate(shapes)]


OPERATIONS = {
    "norm_qkv": (inputs_of_norm_qkv, fused_norm_qkv, plain_norm_qkv),
    "linear": (inputs_of_linear, linear_residual, lambda x, w, r: r + F.linear(x, w)),
    "feed_forward": (
        inputs_of_feed_forward,
        lambda *x: feed_forward(*x, eps=EPS),
        plain_feed_forward,
    ),
    "feed_forward/recompute": (
        inputs_of_feed_forward,
        lambda *x: feed_forward(*x, eps=EPS, recompute_gate_up=True),
        plain_feed_forward,
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    make, operation, _ = OPERATIONS[name]
    torch.autograd.gradcheck(operation, make(5, torch.float64), fast_mode=False)


def results(operation: Callable, inputs: list[Tensor]) -> list[Tensor]:
    """Outputs, then the gradients of a fixed weighting of them."""
    leaves = [x for x in inputs if x.requires_grad]
    outputs = operation(*inputs)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    # The input that comes back has no gradient of its own where plain PyTorch hands it on.
    weighting = [drawn(*x.shape, seed=50 + i).to(x.dtype) for i, x in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, leaves, weighting)
    return [*outputs, *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_results_are_as_close_to_exact_as_plain_pytorch(name: str, dtype: torch.dtype) -> None:
    make, operation, plain = OPERATIONS[name]
    inputs = make(37, dtype)
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    found, eager, exact = results(operation, inputs), results(plain, inputs), results(plain, wide)
    for i, (a, b, c) in enumerate(zip(found, exact, eager, strict=True)):
        check_against_eager(a, b, c, f"{name}: result {i}")


def test_a_projection_may_have_no_bias() -> None:
    *inputs, cos, sin = inputs_of_norm_qkv(5, torch.float64)
    inputs[3] = torch.zeros_like(inputs[3])
    with_zero = results(fused_norm_qkv, [*inputs, cos, sin])
    without = results(
        lambda h, n, w, c, s: fused_norm_qkv(h, n, w, None, c, s), [*inputs[:3], cos, sin]
    )
    for a, b in zip(without, with_zero, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", OPERATIONS)
def test_master_weights_are_cast_and_their_gradients_cast_back(name: str) -> None:
    """fp32 weights under bf16 give what their bf16 copies give, in fp32."""
    make, operation, _ = OPERATIONS[name]
    inputs = make(9, torch.bfloat16)
    weights = [i for i, x in enumerate(inputs) if x.requires_grad and len(x) != 9]
    masters = [
        x.detach().float().requires_grad_() if i in weights else x for i, x in enumerate(inputs)
    ]
    for a, b in zip(results(operation, masters), results(operation, inputs), strict=True):
        torch.testing.assert_close(a.to(b.dtype), b, rtol=0, atol=0)
    assert all(
        x.dtype == torch.float32
        for x in results(operation, masters)[-len(weights) :]
        if x.ndim == 2 and len(x) != 9
    )


# -- the layer -----------------------------------------------------------------------------------


def make(dtype: torch.dtype = torch.bfloat16, **changes) -> Model:
    model = Model(config(**changes), compute_dtype=dtype)
    return model.materialise(torch.device("cpu"), dtype).init_random(0, std=0.05)


def attention(lengths: list[int]) -> Attend:
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    torch._dynamo.mark_dynamic(cu_seqlens, 0)
    longest = max(lengths)

    def attend(layer: int, q_THK: Tensor, k_TNK: Tensor, v_TNK: Tensor) -> Tensor:
        backend = "triton" if q_THK.dtype == torch.bfloat16 else "reference"
        return packed_attention(q_THK, k_TNK, v_TNK, cu_seqlens, longest, backend=backend)

    return attend


def positions(lengths: list[int]) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths])


def run(model: Model, lengths: list[int], what: Recompute | None) -> Tensor:
    ids_T = torch.arange(sum(lengths)) * 7 % 97
    recompute = None if what is None else [what] * len(model.layers)
    return model(ids_T, positions(lengths), attention(lengths), recompute=recompute)


def gradients(model: Model, lengths: list[int], what: Recompute | None) -> list[Tensor]:
    model.zero_grad()
    run(model, lengths, what).float().square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("what", ["gate_up", "full"])
def test_computing_again_changes_no_bit(what: Recompute, dtype: torch.dtype) -> None:
    model = make(dtype)
    kept = gradients(model, [5, 12], "none")
    assert len(kept) == 1 + 7 * 3  # the head has no part in it
    for a, b in zip(gradients(model, [5, 12], what), kept, strict=True):
        assert torch.equal(a, b)


def test_layers_may_differ_in_what_they_compute_again() -> None:
    model = make()
    mixed = model(
        torch.arange(17),
        positions([5, 12]),
        attention([5, 12]),
        recompute=["full", "gate_up", "none"],
    )
    mixed.float().square().sum().backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model(
        torch.arange(17), positions([5, 12]), attention([5, 12])
    ).float().square().sum().backward()
    plain = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(map(torch.equal, found, plain))


def kept_by(model: Model, lengths: list[int], what: Recompute) -> int:
    """Bytes of everything that the graph holds, weights and shared tables apart."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        hidden_TD = run(model, lengths, what)
    assert hidden_TD.requires_grad
    return sum(held.values())


def bytes_a_layer(what: Recompute, compiled: bool) -> float:
    """From models of two and five layers: what every further one adds, for each token."""
    lengths = [40, 88]
    kept = []
    for num_layers in (2, 5):
        model = make(num_hidden_layers=num_layers)
        if compiled:
            model.compile_layers("aot_eager_decomp_partition")
        kept.append(kept_by(model, lengths, what))
    return (kept[1] - kept[0]) / 3 / sum(lengths)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("what", POLICIES)
def test_what_is_kept_for_backward(what: Recompute, compiled: bool, fresh_dynamo: None) -> None:
    """The compiler's partitioner decides nothing: our operations are opaque to it."""
    assert bytes_a_layer(what, compiled) == kept_bytes(config(), what, torch.bfloat16)


def test_kept_bytes_of_qwen_32b() -> None:
    """The figures that the plan of the 16-GPU run rests on, in KB a token and layer."""
    qwen = config(
        hidden_size=5120,
        intermediate_size=27648,
        num_attention_heads=40,
        num_key_value_heads=8,
        head_dim=128,
    )
    kept = [kept_bytes(qwen, what, torch.bfloat16) / 1000 for what in POLICIES]
    assert kept == pytest.approx([155.8, 45.2, 10.24], abs=0.1)


def test_flops_are_counted_inside_the_operations() -> None:
    """torch's counter sees the products of the layers' operations, backward twice the forward."""
    model, num_tokens = make(torch.float32), 16
    layer = sum(p.numel() for p in model.layers[0].parameters() if p.ndim == 2)
    with FlopCounterMode(display=False) as counter:
        run(model, [num_tokens], "none").sum().backward()
    found = {
        str(k): v for k, v in counter.get_flop_counts()["Global"].items() if "s1fast" in str(k)
    }
    assert sum(found.values()) == 6 * num_tokens * layer * len(model.layers)
    with FlopCounterMode(display=False) as counter:
        run(model, [num_tokens], "gate_up").sum().backward()
    again = {
        str(k): v for k, v in counter.get_flop_counts()["Global"].items() if "s1fast" in str(k)
    }
    extra = sum(again.values()) - sum(found.values())
    assert extra == 2 * num_tokens * model.layers[0].gate_up_weight.numel() * len(model.layers)


# -- compiled ------------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled_against_eager(backend: str) -> None:
    """Every length, both variants: two graphs in all, and the results of the eager layer."""
    model, plain = make(num_hidden_layers=2), make(num_hidden_layers=2)
    model.compile_layers(backend)
    graphs = []
    for lengths in ([9, 13], [20], [5, 1, 14]):
        for what in POLICIES:
            found, expected = (gradients(m, lengths, what) for m in (model, plain))
            assert all(map(torch.equal, found, expected)), f"{lengths} {what}"
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [2, 2, 2]
    assert not counters["graph_break"]


def test_compiled_layers_are_whole_and_never_compiled_again(fresh_dynamo: None) -> None:
    compiled_against_eager("aot_eager_decomp_partition")


@pytest.mark.slow
def test_compiled_by_inductor(fresh_dynamo: None) -> None:
    compiled_against_eager("inductor")


class Steps:
    """A trainer of three sequences, two a step."""

    def __init__(self, **fields: object) -> None:
        text = [7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
        examples = [
            Example(ids=tuple(text[:n]), labelled=(False, *[True] * (n - 1)), where=f"row {n}")
            for n in (10, 7, 4)
        ]
        recipe = TrainConfig(
            batch_size=2, attention="triton", optim=OptimConfig(lr=1e-2, warmup_ratio=0.0), **fields
        )
        model = Model(config(num_hidden_layers=2), compute_dtype=torch.bfloat16)
        model.materialise(torch.device("cpu"), torch.float32).init_random(0, std=0.05)
        self.trainer = Trainer(recipe, model, examples, Layout(CPU))

    def take(self) -> list[Tensor]:
        losses = [self.trainer.step(step).loss for step in range(4)]
        return [*losses, *(p.detach() for p in self.trainer.model.parameters())]


def test_training_compiled_is_training(fresh_dynamo: None) -> None:
    """To the bit; every graph is built before the first step, and the warm-up leaves no trace."""
    compiled = Steps(compile=True)
    warm = counters["stats"]["unique_graphs"]
    found = compiled.take()
    assert counters["stats"]["unique_graphs"] == warm == 2
    for a, b in zip(found, Steps().take(), strict=True):
        assert torch.equal(a, b)


def test_attention_that_cannot_be_compiled_is_refused() -> None:
    with pytest.raises(InputError, match="compile: attention 'reference' cannot"):
        recipe = TrainConfig(compile=True, attention="reference")
        Trainer(recipe, make(torch.float32), [Example((1, 2), (False, True), "")] * 16, Layout(CPU))


def test_a_layer_is_traced_whole(fresh_dynamo: None) -> None:
    """fullgraph: an attend that the compiler cannot see through is an error, not a break."""
    model = make()
    model.compile_layers("aot_eager_decomp_partition")

    def attend(layer: int, q_THK: Tensor, k_TNK: Tensor, v_TNK: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return q_THK

    with pytest.raises(torch._dynamo.exc.Unsupported):
        model(torch.arange(8), torch.arange(8), attend)


def test_a_layer_of_a_tensor_parallel_rank_equals_the_fused_one() -> None:
    """`reduce` stands where ranks are summed; with one rank it changes nothing beyond rounding."""
    torch.manual_seed(0)
    layer = Layer(config()).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.1)
    hidden_TD = drawn(7, 48)
    cos, sin = tables(7, 64, torch.float64)
    fused = layer(0, hidden_TD, cos, sin, attention([7]))
    split = layer(0, hidden_TD, cos, sin, attention([7]), lambda partial_TD: partial_TD)
    torch.testing.assert_close(split, fused, rtol=1e-12, atol=1e-12)
