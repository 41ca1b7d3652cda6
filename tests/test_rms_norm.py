"""RMSNorm and its gradient against float64 autograd, by the reference and by the Triton kernels.

Where there is no GPU the kernels run in Triton's interpreter on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from s1fast.kernels import rms_norm as op
from s1fast.kernels.rms_norm import add_rms_norm, rms_norm
from tensors import far_apart, random
from tolerances import check_against_eager

ON_GPU = torch.cuda.is_available()
PATHS = ["reference", pytest.param("triton", marks=[pytest.mark.gpu] if ON_GPU else [])]
EPS = 1e-3
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64

# Widths of a power of two, of none, odd; in tiles of 1,024 elements: several rows, one row, rows
# longer than a tile; tiles that eight programs share, a ragged last one.
SHAPES = [(37, 200), (130, 64), (5, 1001), (3, 5120), (1, 96)]


@pytest.fixture(params=PATHS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where tensors go for a path; kernels then run with small tiles and few programs."""
    if request.param == "reference":
        return "cpu"
    monkeypatch.setattr(op, "_TILE", 1024)
    monkeypatch.setattr(op, "num_programs", lambda x: 1)
    if not ON_GPU:
        for name in ("forward", "normalise", "backward"):
            monkeypatch.setattr(op, f"reference_{name}", getattr(op, f"triton_{name}"))
    return "cuda" if ON_GPU else "cpu"


def problem(
    shape: tuple[int, int], dtype: torch.dtype, device: str, weight: torch.dtype | None = None
) -> list[Tensor]:
    """x, residual, weight, dsum, dy. Rows differ in size: one's rstd does not fit another."""
    size_T1 = 0.2 + torch.arange(shape[0])[:, None] % 7
    x_TD, residual_TD, dsum_TD, dy_TD = (random(*shape, seed=i) for i in range(4))
    weight_D = random(shape[1], seed=4).to(device, weight or dtype)
    wide = (x_TD * size_T1, residual_TD * size_T1, dsum_TD, dy_TD)
    x_TD, residual_TD, dsum_TD, dy_TD = (x.to(device, dtype) for x in wide)
    return [x_TD, residual_TD, weight_D, dsum_TD, dy_TD]


def eager(x_TD: Tensor, weight_D: Tensor) -> Tensor:
    """As transformers writes it; in float64 the exact result."""
    wide_TD = x_TD.to(torch.promote_types(x_TD.dtype, FP32))
    n_TD = wide_TD * torch.rsqrt(wide_TD.square().mean(-1, keepdim=True) + EPS)
    return n_TD.to(x_TD.dtype) * weight_D.to(x_TD.dtype)


def add_eager(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
    sum_TD = x_TD + residual_TD
    return sum_TD, eager(sum_TD, weight_D)


def gradients(function: Callable[..., Any], inputs: list[Tensor], upstream: list[Tensor]) -> Any:
    """Results, then gradients of all inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    found = torch.autograd.grad(results, leaves, upstream)
    return [*(x.detach() for x in results), *found]


# -- values ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_errors_are_eagers(device: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Alone: y, dx, dweight."""
    x_TD, _, weight_D, _, dy_TD = problem(shape, dtype, device)
    found = gradients(lambda x, w: rms_norm(x, w, EPS), [x_TD, weight_D], [dy_TD])
    measure = gradients(eager, [x_TD, weight_D], [dy_TD])
    exact = gradients(eager, [x_TD.double(), weight_D.double()], [dy_TD.double()])
    for name, *three in zip(("y", "dx", "dweight"), found, exact, measure, strict=True):
        check_against_eager(*three, name)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_residual(device: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """The sum is torch's; what is normalised is the rounded sum; both inputs get one gradient."""
    *inputs, dsum_TD, dy_TD = problem(shape, dtype, device)
    upstream = [dsum_TD, dy_TD]
    found = gradients(lambda x, r, w: add_rms_norm(x, r, w, EPS), inputs, upstream)
    measure = gradients(add_eager, inputs, upstream)
    wide, wide_upstream = ([x.double() for x in y] for y in (inputs, upstream))
    exact = gradients(add_eager, wide, wide_upstream)
    names = ("sum", "y", "dx", "dresidual", "dweight")
    for name, *three in zip(names, found, exact, measure, strict=True):
        check_against_eager(*three, name)
    assert torch.equal(found[0], inputs[0] + inputs[1])
    assert torch.equal(found[2], found[3])
    assert torch.equal(found[1], rms_norm(found[0], inputs[2], EPS))


@pytest.mark.parametrize("weight", [BF16, FP32, FP64], ids=str)
def test_weights_of_another_dtype(device: str, weight: torch.dtype) -> None:
    """The weight is rounded to x's dtype and used so; its gradient comes in its own."""
    x_TD, _, weight_D, _, dy_TD = problem((37, 200), BF16, device, weight)
    y, dx, dweight = gradients(lambda x, w: rms_norm(x, w, EPS), [x_TD, weight_D], [dy_TD])
    same = gradients(lambda x, w: rms_norm(x, w, EPS), [x_TD, weight_D.to(BF16)], [dy_TD])
    assert torch.equal(y, same[0]) and torch.equal(dx, same[1])
    assert dweight.dtype == weight_D.dtype and torch.equal(dweight.to(BF16), same[2])
    if weight != BF16:
        assert not torch.equal(dweight, dweight.to(BF16).to(weight))  # summed and handed over wide


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_building_blocks(device: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """They are what the public functions are made of; y can be had again, bit for bit."""
    x_TD, dresidual_TD, weight_D, _, dy_TD = problem(shape, dtype, device)
    y_TD, rstd_T = op.forward(x_TD, weight_D, EPS)
    assert rstd_T.dtype == FP32
    exact_T = (x_TD.double().square().mean(1) + EPS).rsqrt()
    assert ((rstd_T.double() / exact_T - 1).abs() <= 2.0**-21).all()  # sum, mean, root, quotient
    assert torch.equal(op.normalise(x_TD, rstd_T, weight_D), y_TD)

    plain = op.backward(dy_TD, x_TD, rstd_T, weight_D)
    assert plain[2] is None and plain[1].dtype == FP32
    dx_TD, dweight_D, again_TD = op.backward(dy_TD, x_TD, rstd_T, weight_D, want_y=True)
    assert again_TD is not None and torch.equal(again_TD, y_TD)
    assert torch.equal(dx_TD, plain[0]) and torch.equal(dweight_D, plain[1])
    more_TD, dweight_D, again_TD = op.backward(
        dy_TD, x_TD, rstd_T, weight_D, dresidual_TD, want_y=True
    )
    assert again_TD is not None and torch.equal(again_TD, y_TD)
    assert torch.equal(dweight_D, plain[1])
    wide = [x_TD.double(), weight_D.double()]
    exact_TD = gradients(eager, wide, [dy_TD.double()])[1] + dresidual_TD.double()
    measure_TD = gradients(eager, [x_TD, weight_D], [dy_TD])[1] + dresidual_TD
    check_against_eager(more_TD, exact_TD, measure_TD, "dx with a residual's")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_rows_may_lie_apart(device: str, dtype: torch.dtype) -> None:
    """Rows of wider tensors, each by another stride, and expanded ones, give the same bits."""
    tensors = problem((37, 200), dtype, device)
    apart = [random(37, 200 + 8 * i, dtype=dtype, device=device) for i in range(1, 6)]
    for i in (0, 1, 3, 4):
        apart[i][:, :200] = tensors[i]
    x_TD, residual_TD, weight_D, _, dy_TD = tensors
    x, residual, _, _, dy = (y[:, :200] for y in apart)
    assert torch.equal(rms_norm(x, weight_D, EPS), rms_norm(x_TD, weight_D, EPS))
    found = add_rms_norm(x, residual, weight_D, EPS)
    wanted = add_rms_norm(x_TD, residual_TD, weight_D, EPS)
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(found, wanted, strict=True))
    rstd_T = op.forward(x_TD, weight_D, EPS)[1]
    given = op.backward(dy, x, rstd_T, weight_D, residual, want_y=True)
    same = op.backward(dy_TD, x_TD, rstd_T, weight_D, residual_TD, want_y=True)
    assert all(torch.equal(a, b) for a, b in zip(given, same, strict=True))  # type: ignore[arg-type]
    one_TD = dy_TD[:1].expand(37, 200)
    given = op.backward(one_TD, x, rstd_T, weight_D)
    same = op.backward(one_TD.contiguous(), x, rstd_T, weight_D)
    assert torch.equal(given[0], same[0]) and torch.equal(given[1], same[1])
    leaf_TD = x_TD.clone().requires_grad_()
    rms_norm(leaf_TD, weight_D, EPS).sum().backward()  # its gradient has no strides at all
    assert leaf_TD.grad is not None and leaf_TD.grad.isfinite().all()


def test_rows_beyond_int32(device: str) -> None:
    """The third row begins 4 GB behind the first."""
    x_TD, residual_TD, weight_D, _, dy_TD = problem((3, 64), BF16, device)
    far = [far_apart(x) for x in (x_TD, residual_TD, dy_TD)]
    sum_TD, y_TD = add_rms_norm(far[0], far[1], weight_D, EPS)
    wanted = add_rms_norm(x_TD, residual_TD, weight_D, EPS)
    assert torch.equal(sum_TD, wanted[0]) and torch.equal(y_TD, wanted[1])
    rstd_T = op.forward(x_TD, weight_D, EPS)[1]
    found = op.backward(far[2], far[0], rstd_T, weight_D, far[1])
    same = op.backward(dy_TD, x_TD, rstd_T, weight_D, residual_TD)
    assert torch.equal(found[0], same[0]) and torch.equal(found[1], same[1])


@pytest.mark.usefixtures("poisoned")
def test_no_rows(device: str) -> None:
    x_TD, residual_TD, weight_D, dsum_TD, dy_TD = problem((0, 64), BF16, device)
    inputs, upstream = [x_TD, residual_TD, weight_D], [dsum_TD, dy_TD]
    found = gradients(lambda x, r, w: add_rms_norm(x, r, w, EPS), inputs, upstream)
    assert [x.shape for x in found] == [(0, 64)] * 4 + [(64,)]
    assert found[4].count_nonzero() == 0


def test_rows_of_zeros_and_eps(device: str) -> None:
    x_TD = torch.zeros(3, 64, device=device)
    x_TD[1] = 2.0
    weight_D = torch.ones(64, device=device)
    y_TD, rstd_T = op.forward(x_TD, weight_D, 12.0)
    assert torch.equal(rstd_T[1], torch.tensor(0.25, device=device))
    assert torch.equal(y_TD, x_TD / 4)


def test_runs_are_bit_identical(device: str) -> None:
    """Also whatever other rows hold, except d weight."""
    x_TD, _, weight_D, _, dy_TD = problem((130, 64), BF16, device)
    rstd_T = op.forward(x_TD, weight_D, EPS)[1]
    first = op.backward(dy_TD, x_TD, rstd_T, weight_D)
    for _ in range(3):
        again = op.backward(dy_TD, x_TD, rstd_T, weight_D)
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])
    x_TD[50:] = float("nan")
    changed = op.backward(dy_TD, x_TD, rstd_T, weight_D)[0]
    assert torch.equal(changed[:50], first[0][:50]) and changed[50:].isnan().all()


# -- registration ------------------------------------------------------------------------------


def test_gradcheck() -> None:
    x_TD, residual_TD, weight_D, _, _ = problem((5, 6), FP64, "cpu")
    leaves = [x.requires_grad_() for x in (x_TD, residual_TD, weight_D)]
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS), leaves[::2])
    assert torch.autograd.gradcheck(lambda x, r, w: add_rms_norm(x, r, w, EPS), leaves)


def test_opcheck() -> None:
    x_TD, residual_TD, weight_D, _, dy_TD = problem((5, 6), FP32, "cpu")
    rstd_T = op.forward(x_TD, weight_D, EPS)[1]
    torch.library.opcheck(op._backward_op, (dy_TD, x_TD, rstd_T, weight_D, residual_TD))
    leaves = [x.requires_grad_() for x in (x_TD, residual_TD, weight_D)]
    torch.library.opcheck(op._op, (leaves[0], None, leaves[2], EPS))
    torch.library.opcheck(op._op, (*leaves, EPS))


# -- bad input ---------------------------------------------------------------------------------

X, W, R = torch.zeros(3, 8), torch.zeros(8), torch.zeros(3)
BAD: dict[str, tuple[str, Callable[[], object]]] = {
    "rank": (r"x_TD has shape \(8,\), expected \(T, D\)", lambda: rms_norm(W, W, EPS)),
    "no width": ("expected D from 1 to 8192", lambda: rms_norm(X[:, :0], W[:0], EPS)),
    "width": (
        "expected D from 1 to 8192",
        lambda: rms_norm(torch.zeros(1, 8193), torch.zeros(8193), EPS),
    ),
    "dtype": ("x_TD .* torch.float16, expected", lambda: rms_norm(X.half(), W, EPS)),
    "device": ("x_TD is on meta", lambda: rms_norm(X.to("meta"), W, EPS)),
    "columns apart": (r"x_TD .* pass x_TD.contiguous\(\)", lambda: rms_norm(X.T, W[:3], EPS)),
    "weight": (r"weight_D has shape \(7,\), expected \(8\)", lambda: rms_norm(X, W[:7], EPS)),
    "weight dtype": ("weight_D .* torch.int64", lambda: rms_norm(X, W.long(), EPS)),
    "weight device": ("weight_D .* on meta", lambda: rms_norm(X, W.to("meta"), EPS)),
    "residual": ("residual_TD has shape", lambda: add_rms_norm(X, X[:2], W, EPS)),
    "residual dtype": (
        "residual_TD .* is torch.bfloat16",
        lambda: add_rms_norm(X, X.bfloat16(), W, EPS),
    ),
    "rstd": ("rstd_T has shape", lambda: op.normalise(X, R[:2], W)),
    "rstd dtype": ("rstd_T .*is torch.float64", lambda: op.normalise(X, R.double(), W)),
    "rstd of backward": ("rstd_T has shape", lambda: op.backward(X, X, R[:2], W)),
    "dy": ("dy_TD has shape", lambda: op.backward(X[:, :7], X, R, W)),
    "dy apart": ("dy_TD of shape", lambda: op.backward(torch.zeros(8, 3).T, X, R, W)),
    "dresidual": ("dresidual_TD has shape", lambda: op.backward(X, X, R, W, X[:1])),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    message, call = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
