"""RMSNorm, rotary embedding and SwiGLU at their real sizes on a CUDA device (make gpu)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from s1fast.kernels import rms_norm as norm
from s1fast.kernels import swiglu
from s1fast.kernels.rope import merge, rope, split
from tolerances import check_against_eager

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE, EPS = "cuda", 1e-6
BF16, FP32 = torch.bfloat16, torch.float32
TOKENS = [1, 64, 4700, 32768]
SLICE = 2048  # rows that the oracles hold at a time in float64


def normal(*shape: int, seed: int, dtype: torch.dtype = BF16) -> Tensor:
    draw = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=draw, device=DEVICE, dtype=dtype)


def check_rows(found: Tensor, function: Callable[..., Tensor], *inputs: Tensor, what: str) -> None:
    """A function of rows, against float64 and against itself in the inputs' dtype."""
    for start in range(0, len(found), SLICE):
        rows = slice(start, start + SLICE)
        parts = [x[rows] if x.ndim > 1 else x for x in inputs]
        exact = function(*(x.double() for x in parts))
        check_against_eager(found[rows], exact, function(*parts), f"{what} from row {start}")


def normalised(x_TD: Tensor, weight_D: Tensor) -> Tensor:
    wide_TD = x_TD.to(torch.promote_types(x_TD.dtype, FP32))
    n_TD = wide_TD * torch.rsqrt(wide_TD.square().mean(-1, keepdim=True) + EPS)
    return n_TD.to(x_TD.dtype) * weight_D


def dx(dy_TD: Tensor, x_TD: Tensor, dresidual_TD: Tensor, weight_D: Tensor) -> Tensor:
    leaf_TD = x_TD.detach().requires_grad_()
    (found,) = torch.autograd.grad(normalised(leaf_TD, weight_D), leaf_TD, dy_TD)
    return found + dresidual_TD


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("width", [5120, 1536, 8192, 577])
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_rms_norm(num_tokens: int, width: int, dtype: torch.dtype) -> None:
    """Values, every gradient, y again, twice the same bits."""
    x_TD, residual_TD, dy_TD, dsum_TD = (
        normal(num_tokens, width, seed=i, dtype=dtype) for i in range(4)
    )
    weight_D = normal(width, seed=4, dtype=dtype)
    y_TD, rstd_T = norm.forward(x_TD, weight_D, EPS)
    check_rows(y_TD, normalised, x_TD, weight_D, what="y")
    assert torch.equal(norm.normalise(x_TD, rstd_T, weight_D), y_TD)
    sum_TD, after_TD = norm.add_rms_norm(x_TD, residual_TD, weight_D, EPS)
    assert torch.equal(sum_TD, x_TD + residual_TD)
    assert torch.equal(after_TD, norm.forward(sum_TD, weight_D, EPS)[0])
    arguments = (dy_TD, x_TD, rstd_T, weight_D, dsum_TD)
    dx_TD, dweight_D, again_TD = norm.backward(*arguments, want_y=True)
    assert again_TD is not None and torch.equal(again_TD, y_TD)
    check_rows(dx_TD, dx, dy_TD, x_TD, dsum_TD, weight_D, what="dx")
    exact_D = torch.zeros(width, device=DEVICE, dtype=torch.float64)
    terms_D = exact_D.clone()  # of which dweight is the sum
    for rows in torch.arange(num_tokens, device=DEVICE).split(SLICE):
        term_TD = dy_TD[rows].double() * x_TD[rows].double() * rstd_T[rows, None].double()
        exact_D += term_TD.sum(0)
        terms_D += term_TD.square().sum(0)
    # Each term is off by a rounding of the normalised row, at most a quarter of eps in the mean and
    # at random, so four times their deviation; an fp32 sum of few thousand adds little.
    bound_D = (torch.finfo(dtype).eps + 2.0**-20) * terms_D.sqrt()
    assert ((dweight_D - exact_D).abs() <= bound_D).all()
    for _ in range(3):
        found = norm.backward(*arguments)
        assert torch.equal(found[0], dx_TD) and torch.equal(found[1], dweight_D)


def turned(x_THK: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    wide_THK = x_THK.to(torch.promote_types(x_THK.dtype, FP32))
    a_THR, b_THR = wide_THK.chunk(2, dim=2)
    cos, sin = cos_TR[:, None], sin_TR[:, None]
    out_THK = torch.cat((a_THR * cos - b_THR * sin, b_THR * cos + a_THR * sin), 2)
    return out_THK.to(x_THK.dtype)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("heads", [(40, 8, 128), (14, 2, 64)], ids=str)
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_rope(num_tokens: int, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    h, n, width = heads
    freq_R = 1e6 ** -(torch.arange(0, width, 2, device=DEVICE) / width)
    angle_TR = torch.arange(num_tokens, device=DEVICE)[:, None] * freq_R
    cos_TR, sin_TR = angle_TR.cos(), angle_TR.sin()
    qkv_THK = normal(num_tokens, h + 2 * n, width, seed=0, dtype=dtype)
    parts = split(qkv_THK, cos_TR, sin_TR, h, n)
    check_rows(parts[0], turned, qkv_THK[:, :h], cos_TR, sin_TR, what="q")
    check_rows(parts[1], turned, qkv_THK[:, h : h + n], cos_TR, sin_TR, what="k")
    assert torch.equal(parts[2], qkv_THK[:, h + n :])
    dqkv_THK = merge(*parts, cos_TR, sin_TR)
    joint_THK = torch.cat(parts[:2], 1)
    check_rows(dqkv_THK[:, : h + n], turned, joint_THK, cos_TR, -sin_TR, what="dq, dk")
    assert torch.equal(dqkv_THK[:, h + n :], parts[2])
    assert torch.equal(rope(qkv_THK[:, : h + n], cos_TR, sin_TR), joint_THK)


def product(gate_up: Tensor) -> Tensor:
    gate_TF, up_TF = gate_up.chunk(2, dim=1)
    return F.silu(gate_TF) * up_TF


def dproduct(dy_TF: Tensor, gate_up: Tensor) -> Tensor:
    leaf = gate_up.detach().requires_grad_()
    return torch.autograd.grad(product(leaf), leaf, dy_TF)[0]


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("width", [27648, 8960, 1001])
@pytest.mark.parametrize("num_tokens", TOKENS[:3])
def test_swiglu(num_tokens: int, width: int, dtype: torch.dtype) -> None:
    gate_up = 2 * normal(num_tokens, 2 * width, seed=0, dtype=dtype)
    dy_TF = normal(num_tokens, width, seed=1, dtype=dtype)
    y_TF = swiglu.forward(gate_up)
    check_rows(y_TF, product, gate_up, what="y")
    dgate_up, again_TF = swiglu.backward(dy_TF, gate_up)
    assert torch.equal(again_TF, y_TF)
    check_rows(dgate_up, dproduct, dy_TF, gate_up, what="dgate_up")
    assert torch.equal(swiglu.backward(dy_TF, gate_up, out=gate_up)[0], dgate_up)
    assert torch.equal(gate_up, dgate_up)


def test_nothing_waits() -> None:
    """Neither the public functions nor their gradients wait for the device."""
    x_TD = normal(4700, 5120, seed=0).requires_grad_()
    weight_D = normal(5120, seed=1).requires_grad_()
    gate_up = normal(4700, 4096, seed=2).requires_grad_()
    for debug in ("default", "error"):  # compiled by the first turn
        torch.cuda.set_sync_debug_mode(debug)
        try:
            sum_TD, y_TD = norm.add_rms_norm(x_TD, x_TD, weight_D, EPS)
            torch.autograd.backward((sum_TD, y_TD), (y_TD.detach(), sum_TD.detach()))
            y_TF = swiglu.swiglu(gate_up)
            y_TF.backward(y_TF.detach())
        finally:
            torch.cuda.set_sync_debug_mode("default")
