"""SwiGLU and its gradient against float64 autograd, by the reference and by the Triton kernels.

Where there is no GPU the kernels run in Triton's interpreter on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from s1fast.kernels import swiglu as op
from s1fast.kernels.swiglu import swiglu
from tensors import far_apart
from tolerances import check_against_eager

ON_GPU = torch.cuda.is_available()
PATHS = ["reference", pytest.param("triton", marks=[pytest.mark.gpu] if ON_GPU else [])]
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64

# (T, F): in blocks of 256 or 128 columns: whole ones and a rest, less than one, an odd number.
SHAPES = [(5, 512), (7, 600), (9, 40), (3, 1001), (1, 300)]


@pytest.fixture(params=PATHS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where tensors go for a path; kernels then run with small blocks."""
    if request.param == "reference":
        return "cpu"
    monkeypatch.setattr(op, "_CONFIG", dict.fromkeys((BF16, FP32), (1, 1)))
    if not ON_GPU:
        monkeypatch.setattr(op, "reference_forward", op.triton_forward)
        monkeypatch.setattr(op, "reference_backward", op.triton_backward)
    return "cuda" if ON_GPU else "cpu"


def problem(
    shape: tuple[int, int], dtype: torch.dtype, device: str, size: float = 2.0
) -> tuple[Tensor, Tensor]:
    """gate_up, dy."""
    draw = torch.Generator().manual_seed(0)
    num_tokens, width = shape
    gate_up_TF2 = torch.randn(num_tokens, 2 * width, generator=draw, dtype=FP64) * size
    dy_TF = torch.randn(num_tokens, width, generator=draw, dtype=FP64)
    return gate_up_TF2.to(device, dtype), dy_TF.to(device, dtype)


def eager(gate_up_TF2: Tensor) -> Tensor:
    gate_TF, up_TF = gate_up_TF2.chunk(2, dim=1)
    return F.silu(gate_TF) * up_TF


def gradients(function: Callable[[Tensor], Tensor], x: Tensor, dy_TF: Tensor) -> list[Tensor]:
    leaf = x.detach().clone().requires_grad_()
    y_TF = function(leaf)
    return [y_TF.detach(), *torch.autograd.grad(y_TF, leaf, dy_TF)]


# -- values ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_errors_are_eagers(device: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Halves apart, so that a small error of one does not hide behind the other."""
    gate_up_TF2, dy_TF = problem(shape, dtype, device)
    found, measure = (gradients(f, gate_up_TF2, dy_TF) for f in (swiglu, eager))
    exact = gradients(eager, gate_up_TF2.double(), dy_TF.double())
    check_against_eager(found[0], exact[0], measure[0], "y")
    halves = (x[1].chunk(2, dim=1) for x in (found, exact, measure))
    for name, *three in zip(("dgate", "dup"), *halves, strict=True):
        check_against_eager(*three, name)


def test_bf16_errors_are_below_eagers(device: str) -> None:
    """One rounding where eager has two: in the mean the kernel's y is nearer to float64."""
    gate_up_TF2, _ = problem((64, 600), BF16, device)
    exact_TF = eager(gate_up_TF2.double())
    error, allowed = (
        float((x.double() - exact_TF).norm()) for x in (swiglu(gate_up_TF2), eager(gate_up_TF2))
    )
    assert error <= allowed


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_building_blocks(device: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """y comes again bit for bit; the gradient may take gate_up's place."""
    gate_up_TF2, dy_TF = problem(shape, dtype, device)
    y_TF, wanted = gradients(swiglu, gate_up_TF2, dy_TF)
    assert torch.equal(op.forward(gate_up_TF2), y_TF)
    dgate_up_TF2, again_TF = op.backward(dy_TF, gate_up_TF2)
    assert torch.equal(again_TF, y_TF) and torch.equal(dgate_up_TF2, wanted)
    out = torch.empty_like(gate_up_TF2)
    assert op.backward(dy_TF, gate_up_TF2, out=out)[0] is out
    assert torch.equal(out, wanted)
    taken = gate_up_TF2.clone()
    given, again_TF = op.backward(dy_TF, taken, out=taken)
    assert given is taken and torch.equal(taken, wanted) and torch.equal(again_TF, y_TF)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_rows_may_lie_apart(device: str, dtype: torch.dtype) -> None:
    """Rows of wider tensors, each by another stride: the same bits, and nothing beside them."""
    gate_up_TF2, dy_TF = problem((7, 300), dtype, device)
    wide, wide_dy = problem((7, 400), dtype, device)
    wide[:, :600], wide_dy[:, :300] = gate_up_TF2, dy_TF
    assert torch.equal(op.forward(wide[:, :600]), op.forward(gate_up_TF2))
    wanted = op.backward(dy_TF, gate_up_TF2)
    found = op.backward(wide_dy[:, :300], wide[:, :600])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    rest = wide[:, 600:].clone()
    found = op.backward(wide_dy[:, :300], wide[:, :600], out=wide[:, :600])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert torch.equal(wide[:, 600:], rest)
    leaf = gate_up_TF2.clone().requires_grad_()
    swiglu(leaf).sum().backward()  # its gradient has no strides at all
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, op.backward(torch.ones_like(dy_TF), gate_up_TF2)[0])


def test_rows_beyond_int32(device: str) -> None:
    """The third row begins 4 GB behind the first."""
    gate_up_TF2, dy_TF = problem((3, 40), BF16, device)
    far, far_dy = far_apart(gate_up_TF2), far_apart(dy_TF)
    wanted = op.backward(dy_TF, gate_up_TF2)
    assert torch.equal(op.forward(far), wanted[1])
    found = op.backward(far_dy, far, out=far)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_large_gates(device: str, dtype: torch.dtype) -> None:
    """exp overflows for one sign, and underflows for the other."""
    gate_up_TF2, dy_TF = problem((5, 300), dtype, device, size=200.0)
    found, measure = (gradients(f, gate_up_TF2, dy_TF) for f in (swiglu, eager))
    exact = gradients(eager, gate_up_TF2.double(), dy_TF.double())
    for name, *three in zip(("y", "dgate_up"), found, exact, measure, strict=True):
        assert three[0].isfinite().all()
        check_against_eager(*three, name)


@pytest.mark.usefixtures("poisoned")
def test_no_rows(device: str) -> None:
    gate_up_TF2, dy_TF = problem((0, 40), BF16, device)
    dgate_up_TF2, y_TF = op.backward(dy_TF, gate_up_TF2)
    assert dgate_up_TF2.shape == (0, 80) and y_TF.shape == (0, 40)
    assert swiglu(gate_up_TF2).shape == (0, 40)


def test_elements_do_not_touch_each_other(device: str) -> None:
    gate_up_TF2, dy_TF = problem((4, 300), BF16, device)
    wanted = op.backward(dy_TF, gate_up_TF2)
    gate_up_TF2[2, 100] = float("nan")
    found = op.backward(dy_TF, gate_up_TF2)
    for a, b in zip(found, wanted, strict=True):
        off = ~(a == b)
        assert off[2, 100] and off.sum() == (2 if a.shape[1] == 600 else 1)


# -- registration ------------------------------------------------------------------------------


def test_gradcheck_and_opcheck() -> None:
    gate_up_TF2, dy_TF = problem((5, 6), FP64, "cpu")
    assert torch.autograd.gradcheck(swiglu, gate_up_TF2.clone().requires_grad_())
    torch.library.opcheck(op._op, (gate_up_TF2.float().requires_grad_(),))
    torch.library.opcheck(op._backward_op, (dy_TF.float(), gate_up_TF2.float()))


# -- bad input ---------------------------------------------------------------------------------

X, Y = torch.zeros(3, 8), torch.zeros(3, 4)
BAD: dict[str, tuple[str, Callable[[], object]]] = {
    "rank": (r"gate_up_TF2 has shape \(8,\), expected \(T, 2F\)", lambda: swiglu(X[0])),
    "odd": (r"gate_up_TF2 has shape \(3, 7\), expected \(T, 2F\)", lambda: swiglu(X[:, :7])),
    "no width": (r"gate_up_TF2 has shape \(3, 0\)", lambda: swiglu(X[:, :0])),
    "dtype": ("gate_up_TF2 .* torch.float16, expected", lambda: swiglu(X.half())),
    "device": ("gate_up_TF2 is on meta", lambda: op.forward(X.to("meta"))),
    "columns apart": ("gate_up_TF2 of shape", lambda: swiglu(torch.zeros(8, 4).T)),
    "dy": (r"dy_TF has shape \(3, 8\), expected \(3, 4\)", lambda: op.backward(X, X)),
    "dy dtype": ("dy_TF .* is torch.bfloat16", lambda: op.backward(Y.bfloat16(), X)),
    "dy apart": ("dy_TF of shape", lambda: op.backward(torch.zeros(4, 3).T, X)),
    "out": (r"out has shape \(3, 4\)", lambda: op.backward(Y, X, out=Y)),
    "out dtype": ("out .* is torch.bfloat16", lambda: op.backward(Y, X, out=X.bfloat16())),
    "out apart": ("out of shape", lambda: op.backward(Y, X, out=torch.zeros(8, 3).T)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    message, call = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
