"""Rotary embedding against complex multiplication in float64, by the reference and by the kernel.

Where there is no GPU the kernel runs in Triton's interpreter on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from s1fast.kernels import rope as op
from s1fast.kernels.rope import merge, rope, split
from tensors import far_apart, random
from tolerances import check_against_eager

ON_GPU = torch.cuda.is_available()
PATHS = ["reference", pytest.param("triton", marks=[pytest.mark.gpu] if ON_GPU else [])]
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64

# (T, H, N, K): whole tiles of rows and ragged ones, halves of a power of two and of none, one
# token, one head of each, none of the tokens.
SHAPES = [(37, 4, 2, 64), (9, 5, 1, 128), (16, 6, 3, 20), (1, 14, 2, 64), (3, 1, 1, 2)]


@pytest.fixture(params=PATHS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where tensors go for a path; the kernel then runs with small tiles."""
    if request.param == "reference":
        return "cpu"
    monkeypatch.setattr(op, "_WARPS", 1)
    if not ON_GPU:
        monkeypatch.setattr(op, "reference_", op.triton_)
    return "cuda" if ON_GPU else "cpu"


def tables(num_tokens: int, width: int, device: str) -> tuple[Tensor, Tensor]:
    """At positions that start again in the middle of the stream."""
    position_T = torch.arange(num_tokens, device=device) % max(num_tokens * 2 // 3, 1)
    freq_R = 10.0 ** -(torch.arange(width // 2, device=device) * 4 / width)
    angle_TR = (position_T + 1)[:, None] * freq_R
    return angle_TR.cos(), angle_TR.sin()


def turned(x_THK: Tensor, cos_TR: Tensor, sin_TR: Tensor, back: bool = False) -> Tensor:
    """In float64: the halves are real and imaginary parts."""
    a_THR, b_THR = x_THK.double().chunk(2, dim=2)
    turn_TR = torch.complex(cos_TR.double(), sin_TR.double() * (-1 if back else 1))
    z_THR = torch.complex(a_THR.contiguous(), b_THR.contiguous()) * turn_TR[:, None]
    return torch.cat((z_THR.real, z_THR.imag), 2)


def eager(x_THK: Tensor, cos_TR: Tensor, sin_TR: Tensor, back: bool = False) -> Tensor:
    """In fp32, rounded once."""
    cos, sin = (torch.cat((x, x), 1)[:, None] for x in (cos_TR, -sin_TR if back else sin_TR))
    a_THR, b_THR = x_THK.float().chunk(2, dim=2)
    return (x_THK.float() * cos + torch.cat((-b_THR, a_THR), 2) * sin).to(x_THK.dtype)


def check(found: Tensor, x_THK: Tensor, *rest: Tensor, back: bool = False, what: str = "") -> None:
    exact_THK, eager_THK = turned(x_THK, *rest, back=back), eager(x_THK, *rest, back=back)
    check_against_eager(found, exact_THK, eager_THK, what)


# -- values ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_rope(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Values and gradient, of heads that are a part of a wider tensor."""
    num_tokens, h, n, width = shape
    cos_TR, sin_TR = tables(num_tokens, width, device)
    qkv_THK = random(num_tokens, h + 2 * n, width, dtype=dtype, device=device)
    x_THK = qkv_THK[:, : h + n]
    leaf_THK = x_THK.detach().requires_grad_()
    out_THK = rope(leaf_THK, cos_TR, sin_TR)
    assert out_THK.is_contiguous()
    check(out_THK, x_THK, cos_TR, sin_TR, what="rope")
    dout_THK = random(num_tokens, h + n, width, seed=1, dtype=dtype, device=device)
    (dx_THK,) = torch.autograd.grad(out_THK, leaf_THK, dout_THK)
    check(dx_THK, dout_THK, cos_TR, sin_TR, back=True, what="its gradient")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_split_and_merge(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    num_tokens, h, n, width = shape
    cos_TR, sin_TR = tables(num_tokens, width, device)
    qkv_THK = random(num_tokens, h + 2 * n, width, dtype=dtype, device=device)
    parts = q_THK, k_TNK, v_TNK = split(qkv_THK, cos_TR, sin_TR, h, n)
    assert all(x.is_contiguous() for x in parts)
    assert len({x.untyped_storage().data_ptr() for x in (*parts, qkv_THK)}) == 4
    check(q_THK, qkv_THK[:, :h], cos_TR, sin_TR, what="q")
    check(k_TNK, qkv_THK[:, h : h + n], cos_TR, sin_TR, what="k")
    assert torch.equal(v_TNK, qkv_THK[:, h + n :])
    assert torch.equal(torch.cat((q_THK, k_TNK), 1), rope(qkv_THK[:, : h + n], cos_TR, sin_TR))

    # Gradients of any strides but that along K: parts of wider tensors, and heads before tokens.
    wide = [random(num_tokens, m + 1, width, seed=i, dtype=dtype) for i, m in enumerate((h, n, n))]
    dq, dk, dv = (x.to(device) for x in wide)
    dq_THK, dk_TNK = dq[:, 1:], dk[:, :n].transpose(0, 1).contiguous().transpose(0, 1)
    dv_TNK = dv[:, :n]
    dqkv_THK = merge(dq_THK, dk_TNK, dv_TNK, cos_TR, sin_TR)
    assert dqkv_THK.is_contiguous()
    check(dqkv_THK[:, :h], dq_THK, cos_TR, sin_TR, back=True, what="dq")
    check(dqkv_THK[:, h : h + n], dk_TNK, cos_TR, sin_TR, back=True, what="dk")
    assert torch.equal(dqkv_THK[:, h + n :], dv_TNK)


def test_tokens_and_heads_beyond_int32(device: str) -> None:
    """The third token begins 4 GB behind the first; then the third head."""
    x_THK = random(3, 3, 64, dtype=BF16, device=device)
    cos_TR, sin_TR = tables(3, 64, device)
    wanted = rope(x_THK, cos_TR, sin_TR)
    heads = far_apart(x_THK.transpose(0, 1).contiguous()).transpose(0, 1)
    for far in (far_apart(x_THK), heads):
        assert torch.equal(rope(far, cos_TR, sin_TR), wanted)


@pytest.mark.usefixtures("poisoned")
def test_no_tokens(device: str) -> None:
    cos_TR, sin_TR = tables(0, 64, device)
    qkv_THK = torch.zeros(0, 4, 64, device=device)
    parts = split(qkv_THK, cos_TR, sin_TR, 2, 1)
    assert [x.shape for x in parts] == [(0, 2, 64), (0, 1, 64), (0, 1, 64)]
    assert merge(*parts, cos_TR, sin_TR).shape == (0, 4, 64)
    assert rope(qkv_THK, cos_TR, sin_TR).shape == (0, 4, 64)


def test_values_are_copied_whatever_they_hold(device: str) -> None:
    """No product with 1 or 0 reaches them, nor do their NaNs reach anybody."""
    cos_TR, sin_TR = tables(9, 64, device)
    qkv_THK = random(9, 6, 64, device=device)
    clean = split(qkv_THK, cos_TR, sin_TR, 4, 1)
    odd = torch.tensor([float("inf"), -0.0, float("nan"), -float("inf")], device=device)
    qkv_THK[:, 5] = odd.repeat(16)
    q_THK, k_TNK, v_TNK = split(qkv_THK, cos_TR, sin_TR, 4, 1)
    assert torch.equal(q_THK, clean[0]) and torch.equal(k_TNK, clean[1])
    assert torch.equal(v_TNK.view(torch.int32), qkv_THK[:, 5:].view(torch.int32))


# -- registration ------------------------------------------------------------------------------


def test_gradcheck_and_opcheck() -> None:
    cos_TR, sin_TR = tables(5, 6, "cpu")
    x_THK = random(5, 2, 6, dtype=FP64).requires_grad_()
    assert torch.autograd.gradcheck(rope, (x_THK, cos_TR.double(), sin_TR.double()))
    assert torch.autograd.gradgradcheck(rope, (x_THK, cos_TR.double(), sin_TR.double()))
    for back in (False, True):
        leaf_THK = random(5, 3, 6)[:, :2].requires_grad_()
        torch.library.opcheck(op._op, (leaf_THK, cos_TR, sin_TR, back))


# -- bad input ---------------------------------------------------------------------------------

X, C = torch.zeros(3, 4, 8), torch.zeros(3, 4)
BAD: dict[str, tuple[str, Callable[[], object]]] = {
    "rank": (r"x_THK has shape \(3, 4\), expected \(T, H, K\)", lambda: rope(C, C, C)),
    "odd width": ("x_THK .* even width", lambda: rope(X[..., :7], C[:, :3], C[:, :3])),
    "no heads": ("x_THK .* even width", lambda: rope(X[:, :0], C, C)),
    "dtype": ("x_THK .* torch.float16, expected", lambda: rope(X.half(), C, C)),
    "device": ("x_THK is on meta", lambda: rope(X.to("meta"), C, C)),
    "columns apart": ("x_THK of shape", lambda: rope(X.transpose(1, 2), C[:, :2], C[:, :2])),
    "tokens": (r"cos_TR has shape \(2, 4\), expected \(3, 4\)", lambda: rope(X, C[:2], C)),
    "half": (r"sin_TR has shape \(3, 3\), expected \(3, 4\)", lambda: rope(X, C, C[:, :3])),
    "table dtype": ("cos_TR .*bfloat16, expected", lambda: rope(X, C.bfloat16(), C)),
    "table strides": (
        r"sin_TR .* sin_TR.contiguous\(\)",
        lambda: rope(X, C, torch.zeros(4, 3).T),
    ),
    "table device": ("sin_TR .* on meta", lambda: rope(X, C, C.to("meta"))),
    "heads": (r"qkv_THK .* expected 3 \+ 2 x 1 heads", lambda: split(X, C, C, 3, 1)),
    "no kv heads": (r"expected 4 \+ 2 x 0 heads", lambda: split(X, C, C, 4, 0)),
    "dk": ("dk_TNK has shape", lambda: merge(X, X[:2], X, C, C)),
    "dk rank": ("dk_TNK has shape", lambda: merge(X, C, X, C, C)),
    "dv": ("dv_TNK has shape", lambda: merge(X, X, X[:, :3], C, C)),
    "dv dtype": ("dv_TNK .* is torch.bfloat16", lambda: merge(X, X, X.bfloat16(), C, C)),
    "dv apart": ("dv_TNK of shape", lambda: merge(X, X, torch.zeros(3, 8, 4).mT, C, C)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    message, call = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
