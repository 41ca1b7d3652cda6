"""Fused linear cross-entropy at its real sizes on a CUDA device (make gpu)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from s1fast.kernels.linear_cross_entropy import linear_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

WIDTH, VOCAB = 5120, 152064
SLICE = 1024  # rows of logits that the oracles hold at a time: 1.2 GB in float64
DEVICE = "cuda"

Result = tuple[Tensor, Tensor, Tensor]
"""Loss, d hidden, d weight."""


class Problem:
    """Qwen2.5-32B's head on random hidden states; logits of a few units, as trained ones have."""

    def __init__(self, num_rows: int, masked: bool, dtype: torch.dtype = torch.bfloat16) -> None:
        draw = torch.Generator(DEVICE).manual_seed(num_rows)

        def normal(*shape: int, std: float) -> Tensor:
            return (torch.randn(*shape, generator=draw, device=DEVICE) * std).to(dtype)

        self.hidden_TD = normal(num_rows, WIDTH, std=1.0)
        self.weight_VD = normal(VOCAB, WIDTH, std=2.0 * WIDTH**-0.5)
        self.label_T = torch.randint(VOCAB, (num_rows,), generator=draw, device=DEVICE)
        # Half of the rows learn a class that they favour, as in a trained model.
        self.hidden_TD[::2] += (8 * self.weight_VD[self.label_T[::2]].float()).to(dtype)
        if masked:
            lost = torch.rand(num_rows, generator=draw, device=DEVICE) < 0.5
            self.label_T[lost] = -100
            self.hidden_TD[lost] = float("nan")
        self.valid_rows = (self.label_T != -100).nonzero()[:, 0]
        self.loss_weight_T = torch.rand(num_rows, generator=draw, device=DEVICE) + 0.5
        self.loss_weight_T *= (self.label_T != -100) / len(self.valid_rows)

    def inputs(self) -> tuple[Tensor, Tensor]:
        return self.hidden_TD.detach().requires_grad_(), self.weight_VD.detach().requires_grad_()

    def ours(self, **options: int | torch.dtype) -> Result:
        hidden_TD, weight_VD = self.inputs()
        targets = (self.label_T, self.loss_weight_T, self.valid_rows)
        loss = linear_cross_entropy(hidden_TD, weight_VD, *targets, **options)  # type: ignore[call-overload]
        loss.backward()
        assert hidden_TD.grad is not None and weight_VD.grad is not None
        return loss.detach(), hidden_TD.grad, weight_VD.grad

    def slices(self) -> Iterator[Tensor]:
        yield from self.valid_rows.split(SLICE)

    def exact(self) -> Result:
        """In float64, slice by slice."""
        wide_VD = self.weight_VD.double()
        loss = torch.zeros((), dtype=torch.float64, device=DEVICE)
        dhidden_TD = torch.zeros_like(self.hidden_TD, dtype=torch.float64)
        dweight_VD = torch.zeros_like(wide_VD)
        for rows in self.slices():
            hidden_CD = self.hidden_TD[rows].double()
            grad_CV = hidden_CD @ wide_VD.T
            lse_C1 = grad_CV.logsumexp(1, keepdim=True)
            label_C1, weight_C1 = self.label_T[rows, None], self.loss_weight_T[rows, None].double()
            loss += (weight_C1 * (lse_C1 - grad_CV.gather(1, label_C1))).sum()
            grad_CV.sub_(lse_C1).exp_()
            grad_CV.scatter_add_(1, label_C1, torch.full_like(lse_C1, -1.0))
            grad_CV.mul_(weight_C1)
            dhidden_TD[rows] = grad_CV @ wide_VD
            dweight_VD.addmm_(grad_CV.T, hidden_CD)
        return loss, dhidden_TD, dweight_VD

    def eager(self) -> Result:
        """torch's own cross_entropy on bf16 logits, slice by slice; d weight summed in fp32."""
        dhidden_TD = torch.zeros_like(self.hidden_TD)
        dweight_VD = torch.zeros_like(self.weight_VD, dtype=torch.float32)
        loss = torch.zeros((), device=DEVICE)
        for rows in self.slices():
            hidden_CD = self.hidden_TD[rows].detach().requires_grad_()
            weight_VD = self.weight_VD.detach().requires_grad_()
            nll_C = F.cross_entropy(
                F.linear(hidden_CD, weight_VD).float(), self.label_T[rows], reduction="none"
            )
            partial = (nll_C * self.loss_weight_T[rows]).sum()
            partial.backward()
            assert hidden_CD.grad is not None and weight_VD.grad is not None
            loss += partial.detach()
            dhidden_TD[rows] = hidden_CD.grad
            dweight_VD += weight_VD.grad
        return loss, dhidden_TD, dweight_VD.to(self.weight_VD.dtype)


def error(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest and mean absolute error."""
    off = (found.double() - exact).abs_()
    return off.max().item(), off.mean().item()


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("num_rows", [4700, 32768])
def test_errors_are_eagers(num_rows: int, masked: bool) -> None:
    """At most twice eager's in the same dtype, plus a rounding of the largest value.

    Both round logits and their gradients to bf16, in their own order. Eager's d weight is summed in
    fp32, so ours is too here.
    """
    problem = Problem(num_rows, masked)
    found = problem.ours(accum_dtype=torch.float32)
    eager, exact = problem.eager(), problem.exact()
    for name, a, b, c in zip(("loss", "dhidden", "dweight"), found, eager, exact, strict=True):
        (ours, ours_mean), (theirs, theirs_mean) = error(a, c), error(b, c)
        rounding = (2.0**-22 if name == "loss" else 2.0**-8) * c.abs().max().item()
        assert ours <= 2 * theirs + rounding, f"{name}: {ours} beside eager's {theirs}"
        assert ours_mean <= 2 * theirs_mean + 2.0**-22 * c.abs().max().item(), name
    if masked:
        assert found[1][problem.label_T == -100].count_nonzero() == 0


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("num_rows", [4700, 32768])
@pytest.mark.parametrize("train", [True, False], ids=["train", "evaluate"])
def test_extra_memory_and_no_waiting(num_rows: int, masked: bool, train: bool) -> None:
    """Peak above inputs and returned gradients stays within 2 GB, and nothing waits for the GPU."""
    problem = Problem(num_rows, masked)
    problem.ours()  # cuBLAS's workspace and the kernels are there from now on
    torch.cuda.synchronize()
    hidden_TD, weight_VD = problem.inputs()
    targets = (problem.label_T, problem.loss_weight_T, problem.valid_rows)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.set_grad_enabled(train):
            loss = linear_cross_entropy(hidden_TD, weight_VD, *targets)
        if train:
            loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    returned = hidden_TD.nbytes + weight_VD.nbytes if train else 0
    extra = torch.cuda.max_memory_allocated() - before - returned
    assert extra <= 2_000_000_000
    assert torch.cuda.memory_allocated() - before <= returned + (1 << 20)


def test_one_chunk_beyond_int32() -> None:
    """2.5e9 logits at once: offsets pass 2^31, and the answer is that of smaller chunks."""
    problem = Problem(16384, masked=False)
    whole = problem.ours(max_chunk_bytes=6_000_000_000, accum_dtype=torch.float32)
    chunked = problem.ours(accum_dtype=torch.float32)
    assert torch.allclose(whole[0], chunked[0], rtol=2.0**-20)
    for a, b in zip(whole[1:], chunked[1:], strict=True):
        # Roundings of bf16 in another order of sums: 2^-8 of the value, or of the terms summed.
        assert (a.float() - b.float()).norm() <= 2.0**-8 * b.float().norm()


def test_runs_are_bit_identical() -> None:
    problem = Problem(4700, masked=True)
    first = problem.ours()
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(problem.ours(), first, strict=True))


def test_fp32_head() -> None:
    """An fp32 head under bf16 hidden states: d weight comes in fp32, summed in the GEMM."""
    problem = Problem(4700, masked=True)
    exact = problem.exact()
    problem.weight_VD = problem.weight_VD.float()
    found = problem.ours(max_chunk_bytes=500_000_000)
    assert found[2].dtype == torch.float32
    for a, b in zip(found, exact, strict=True):
        assert (a.double() - b).norm() <= 2.0**-7 * b.norm()


def test_upstream_gradient_scales_in_place() -> None:
    problem = Problem(2048, masked=True)
    once = problem.ours()
    hidden_TD, weight_VD = problem.inputs()
    targets = (problem.label_T, problem.loss_weight_T, problem.valid_rows)
    (0.25 * linear_cross_entropy(hidden_TD, weight_VD, *targets)).backward()
    assert hidden_TD.grad is not None and torch.equal(hidden_TD.grad, once[1] * 0.25)
    assert weight_VD.grad is not None and torch.equal(weight_VD.grad, once[2] * 0.25)
