"""The plain-PyTorch operations against float64 autograd and against transformers."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from s1fast.kernels import packed_attention as attention
from s1fast.kernels.packed_attention import packed_attention
from s1fast.kernels.rms_norm import rms_norm
from s1fast.kernels.rope import rope
from s1fast.kernels.swiglu import swiglu
from tensors import random

# Half a unit in the last place of each dtype, relative: what one rounding costs.
ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


def gap(found: Tensor, wanted: Tensor) -> float:
    """Relative error in norm."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


# -- packed_attention --------------------------------------------------------------------------


def dense_attention(
    q_THK: Tensor, k_TNK: Tensor, v_TNK: Tensor, bounds: list[int], scale: float
) -> Tensor:
    """One T x T softmax per head under a block-causal mask."""
    num_tokens, heads = q_THK.shape[:2]
    groups = heads // k_TNK.shape[1]
    owner_T = torch.full((num_tokens,), -1)
    for i, (start, stop) in enumerate(pairwise(bounds)):
        owner_T[start:stop] = i
    seen_TT = (owner_T[:, None] == owner_T[None]).tril() & (owner_T >= 0)
    out_THK = torch.zeros_like(q_THK)
    for h in range(heads):
        score_TT = q_THK[:, h] @ k_TNK[:, h // groups].T * scale
        weight_TT = score_TT.masked_fill(~seen_TT, -torch.inf).softmax(-1)
        out_THK[:, h] = weight_TT.nan_to_num() @ v_TNK[:, h // groups]  # a tail row sees nothing
    return out_THK


STREAMS: dict[str, tuple[list[int], int]] = {  # lengths, tokens beyond the last of them
    "one": ([9], 0),
    "several": ([5, 12, 3], 0),
    "length one": ([1, 7, 1, 1], 0),
    "length zero": ([0, 4, 0, 0, 6, 0], 0),
    "tail": ([4, 5], 7),
    "all tail": ([0], 5),
    "long": ([130, 70], 3),
}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2), (5, 1)], ids=str)
def test_attention_is_a_dense_masked_softmax(name: str, heads: tuple[int, int]) -> None:
    lengths, tail = STREAMS[name]
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    num_tokens, (h, n), width = sum(lengths) + tail, heads, 16
    shapes = ((h, 0), (n, 1), (n, 2))
    wide = [random(num_tokens, x, width, seed=seed, dtype=torch.float64) for x, seed in shapes]
    dout_THK = random(num_tokens, h, width, seed=3, dtype=torch.float64)

    def grads(dtype: torch.dtype, attend: Callable[..., Tensor]) -> list[Tensor]:
        inputs = [x.to(dtype).clone().requires_grad_() for x in wide]
        out = attend(*inputs)
        assert out.dtype == dtype and out.shape == (num_tokens, h, width)
        out.backward(dout_THK.to(dtype))
        return [out.detach(), *(x.grad for x in inputs if x.grad is not None)]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q, k, v, cu_seqlens, max(lengths))

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense_attention(q, k, v, cu_seqlens.tolist(), width**-0.5)

    if sum(lengths) == 0:
        assert ours(*(x.float() for x in wide)).count_nonzero() == 0
        return
    wanted = grads(torch.float64, dense)
    for dtype in (torch.float32, torch.float64):
        found = grads(dtype, ours)
        assert len(found) == len(wanted) == 4
        for a, b in zip(found, wanted, strict=True):
            assert gap(a, b) <= 50 * ROUNDING[dtype]  # sums of at most 130 terms
            assert a[sum(lengths) :].count_nonzero() == 0


def test_attention_scale_and_bf16() -> None:
    q, k, v = (random(11, 2, 8, seed=i) for i in range(3))
    cu_seqlens = torch.tensor([0, 4, 11], dtype=torch.int32)
    wanted = dense_attention(q.double(), k.double(), v.double(), [0, 4, 11], 0.7)
    found = packed_attention(q, k, v, cu_seqlens, 7, softmax_scale=0.7)
    assert gap(found, wanted) <= 50 * ROUNDING[torch.float32]
    low = packed_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), cu_seqlens, 7)
    rounded = [x.bfloat16().double() for x in (q, k, v)]
    # Inputs are exact; scores stay fp32, probabilities and the result are rounded to bf16.
    assert low.dtype == torch.bfloat16
    wanted = dense_attention(*rounded, [0, 4, 11], 8**-0.5)
    assert gap(low, wanted) <= 1.5 * ROUNDING[torch.bfloat16]


def test_attention_keeps_sequences_apart() -> None:
    """Another sequence's content, NaN included, changes no bit of this one's output."""
    q, k, v = (random(12, 2, 8, seed=i) for i in range(3))
    cu_seqlens = torch.tensor([0, 5, 9], dtype=torch.int32)
    before = packed_attention(q, k, v, cu_seqlens, 5)
    for x in (q, k, v):
        x[5:9] = float("nan")
        x[9:] = float("nan")  # the tail
    after = packed_attention(q, k, v, cu_seqlens, 5)
    assert torch.equal(before[:5], after[:5])
    assert after[5:9].isnan().all() and after[9:].count_nonzero() == 0


def test_attention_is_causal() -> None:
    q, k, v = (random(9, 2, 8, seed=i) for i in range(3))
    cu_seqlens = torch.tensor([0, 9], dtype=torch.int32)
    before = packed_attention(q, k, v, cu_seqlens, 9)
    k[6], v[6] = 5.0, 5.0
    after = packed_attention(q, k, v, cu_seqlens, 9)
    assert torch.equal(before[:6], after[:6])
    assert (before[6:] != after[6:]).flatten(1).any(1).all()


@pytest.mark.parametrize(
    ("bounds", "max_seqlen", "kv_heads", "message"),
    [
        ([], 9, 2, "cu_seqlens must start at 0"),
        ([1, 9], 9, 2, "cu_seqlens must start at 0"),
        ([0, 5, 4, 9], 9, 2, "never fall"),
        ([0, 10], 10, 2, "cu_seqlens ends at 10 but there are 9"),
        ([0, 3, 9], 5, 2, "max_seqlen 5 is below the longest sequence, 6"),
        ([0, 9], 9, 3, "4 query heads are no multiple of 3"),
    ],
)
def test_attention_names_bad_arguments(
    bounds: list[int], max_seqlen: int, kv_heads: int, message: str
) -> None:
    q, k = torch.zeros(9, 4, 8), torch.zeros(9, kv_heads, 8)
    with pytest.raises(ValueError, match=message):
        packed_attention(q, k, k, torch.tensor(bounds, dtype=torch.int32), max_seqlen)


def test_attention_refuses_boundaries_on_a_device() -> None:
    q = torch.zeros(9, 4, 8)
    with pytest.raises(ValueError, match="cu_seqlens is on meta"):
        packed_attention(q, q, q, torch.zeros(2, dtype=torch.int32, device="meta"), 9)


BOUNDS = (0, 5, 5, 11)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("installed", ["flash_attn.cute", "flash_attn_interface", "flash_attn"])
def test_flash_is_asked_what_we_were(
    installed: str, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in of the signature that all three versions share; the newest that is there is taken,
    what it returns beside the output is dropped, gradients flow through it."""
    asked: dict[str, object] = {}

    def varlen(q: Tensor, k: Tensor, v: Tensor, **options: object) -> tuple[Tensor, None]:
        asked.update(options)
        return attention._reference(q, k, v, BOUNDS, causal, 0.3), None

    stand_in = types.ModuleType(installed)
    stand_in.flash_attn_varlen_func = varlen  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, installed, stand_in)
    there = attention._FLASH[attention._FLASH.index(installed) :]  # and all the older ones
    monkeypatch.setattr(attention, "_found", lambda module: module in there)
    attention._flash_module.cache_clear()
    q, k, v = (random(11, n, 8, seed=n).requires_grad_() for n in (4, 2, 2))
    boundaries = torch.tensor(BOUNDS, dtype=torch.int32)
    out = attention._flash(q, k, v, boundaries, 6, causal, 0.3)
    attention._flash_module.cache_clear()
    assert torch.equal(out, attention._reference(q, k, v, BOUNDS, causal, 0.3))
    out.sum().backward()
    assert all(x.grad is not None for x in (q, k, v))
    assert asked.pop("cu_seqlens_q") is boundaries and asked.pop("cu_seqlens_k") is boundaries
    longest = {"max_seqlen_q": 6, "max_seqlen_k": 6}
    assert asked == {**longest, "causal": causal, "softmax_scale": 0.3}


@pytest.mark.parametrize("causal", [True, False])
def test_torchs_varlen_is_asked_what_we_were(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that takes ungrouped heads, as torch 2.11's does."""
    from torch.nn.attention import varlen

    asked: list[object] = []

    def varlen_attn(
        q: Tensor, k: Tensor, v: Tensor, *boundaries: object, **options: object
    ) -> Tensor:
        asked.extend((*boundaries, options))
        assert q.shape == k.shape == v.shape
        return attention._reference(q, k, v, BOUNDS, causal, 0.3)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    q, k, v = (random(11, n, 8, seed=n) for n in (4, 2, 2))
    boundaries = torch.tensor(BOUNDS, dtype=torch.int32)
    out = attention._torch_varlen(q, k, v, boundaries, 6, causal, 0.3)
    assert torch.equal(out, attention._reference(q, k, v, BOUNDS, causal, 0.3))
    assert asked[0] is boundaries and asked[1] is boundaries and asked[2:4] == [6, 6]
    assert asked[4] == {"scale": 0.3, "window_size": (-1, 0 if causal else -1)}


def test_boundaries_are_copied_once_for_a_batch() -> None:
    """However many layers ask; another batch gets its own."""
    device = torch.device("cpu")
    first = attention._on_device(BOUNDS, device)
    assert first.dtype == torch.int32 and first.tolist() == list(BOUNDS)
    assert attention._on_device(tuple(BOUNDS), device) is first
    assert attention._on_device((0, 11), device).tolist() == [0, 11]


# -- rms_norm, rope, swiglu --------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_norm(eps: float) -> None:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    x_TD, weight_D = 3 * random(13, 40), random(40, seed=1)
    wide_TD = x_TD.double()
    wanted = wide_TD / (wide_TD.square().mean(1, keepdim=True) + eps).sqrt() * weight_D
    # The mean of 40 squares, a root and two products.
    assert gap(rms_norm(x_TD, weight_D, eps), wanted) <= 5 * ROUNDING[torch.float32]
    for dtype in (torch.float32, torch.bfloat16):
        theirs = Qwen2RMSNorm(40, eps)
        theirs.weight.data = weight_D.to(dtype)
        found = rms_norm(x_TD.to(dtype), weight_D, eps)  # an fp32 weight, cast as theirs was
        assert found.dtype == dtype
        assert torch.equal(found, theirs(x_TD.to(dtype)))


def test_rms_norm_gradient() -> None:
    x_TD, weight_D = random(7, 12).requires_grad_(), random(12, seed=1).requires_grad_()
    wide_TD, wide_D = (x.detach().double().requires_grad_() for x in (x_TD, weight_D))
    dy_TD = random(7, 12, seed=2)
    rms_norm(x_TD, weight_D, 1e-3).backward(dy_TD)
    y_TD = wide_TD / (wide_TD.square().mean(1, keepdim=True) + 1e-3).sqrt() * wide_D
    y_TD.backward(dy_TD.double())
    for found, wanted in ((x_TD, wide_TD), (weight_D, wide_D)):
        assert found.grad is not None and wanted.grad is not None
        assert gap(found.grad, wanted.grad) <= 20 * ROUNDING[torch.float32]


def test_rope() -> None:
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    x_THK = random(11, 3, 16)
    angle_TR = torch.arange(11.0)[:, None] * torch.logspace(0, -2, 8)
    cos_TR, sin_TR = angle_TR.cos(), angle_TR.sin()
    pairs = torch.complex(x_THK[..., :8].double(), x_THK[..., 8:].double())
    turned = pairs * torch.polar(torch.ones(11, 8).double(), angle_TR.double())[:, None]
    wanted = torch.cat((turned.real, turned.imag), -1)
    found = rope(x_THK, cos_TR, sin_TR)
    assert gap(found, wanted) <= 4 * ROUNDING[torch.float32]  # cos or sin, product, sum
    assert gap(found, x_THK) > 0.1  # it did turn something
    assert torch.equal(found[0], x_THK[0])  # position 0 stays
    cos, sin = (torch.cat((x, x), -1)[None] for x in (cos_TR, sin_TR))
    theirs, _ = apply_rotary_pos_emb(*[x_THK.transpose(0, 1)[None]] * 2, cos, sin)
    assert gap(found, theirs[0].transpose(0, 1)) <= 4 * ROUNDING[torch.float32]
    low = rope(x_THK.bfloat16(), cos_TR, sin_TR)  # one rounding, of the result
    assert torch.equal(low, rope(x_THK.bfloat16().float(), cos_TR, sin_TR).bfloat16())


def test_swiglu() -> None:
    gate_up_TF2 = random(9, 30)
    gate_TF, up_TF = gate_up_TF2.double().split(15, dim=1)
    wanted = gate_TF / (1 + (-gate_TF).exp()) * up_TF
    assert gap(swiglu(gate_up_TF2), wanted) <= 5 * ROUNDING[torch.float32]
    # transformers' feed-forward block is down(silu(gate(x)) * up(x)).
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Config, Qwen2MLP

    mlp = Qwen2MLP(Qwen2Config(hidden_size=6, intermediate_size=15, num_attention_heads=2))
    x_TD = random(9, 6, seed=1)
    with torch.no_grad():
        fused = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
        found = F.linear(swiglu(F.linear(x_TD, fused)), mlp.down_proj.weight)
        # One product of both halves and two of one each may sum in another order.
        assert gap(found, mlp(x_TD)) <= 20 * ROUNDING[torch.float32]
    assert swiglu(gate_up_TF2.bfloat16()).dtype == torch.bfloat16
