"""AdamW and the global norm at real sizes on a CUDA device (make gpu)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from s1fast.kernels.adamw import Shards, adamw_, gradients, sum_of_squares

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

BETAS, EPS, LR, CLIP, DECAY = (0.9, 0.95), 1e-3, 1e-2, 0.5, 0.1
SLICE = 1 << 24
# One shard of more than 2^31 elements would need 34 GB; this one is beyond 2^31 bytes in fp32.
SIZES = (550_000_000, 5120, 1, 0, 131_075)


def problem(moments: torch.dtype, grads: torch.dtype, skew: int) -> list[list[Tensor]]:
    """Parameters, moments, gradients; `skew` elements off the allocator's boundaries."""
    draw = torch.Generator("cuda").manual_seed(0)

    def normal(n: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(n + skew, generator=draw, device="cuda", dtype=dtype)[skew:]

    return [
        [normal(n, torch.float32) for n in SIZES],
        [normal(n, moments).mul_(0.1) for n in SIZES],
        [normal(n, moments).abs_().add_(0.1) for n in SIZES],
        [normal(n, grads) for n in SIZES],
    ]


def run(params: list[Tensor], ms: list[Tensor], vs: list[Tensor], grads: list[Tensor]) -> None:
    shards = Shards(params, ms, vs, [DECAY] * len(params))
    lr, clip = (torch.tensor(x, device="cuda") for x in (LR, CLIP))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = gradients(shards, grads)
        sum_of_squares(shards, found)
        adamw_(shards, found, lr, clip, 3, BETAS, EPS)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("skew", [0, 1])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grads", [torch.float32, torch.bfloat16])
def test_a_step_is_float64s(moments: torch.dtype, grads: torch.dtype, skew: int) -> None:
    """The bounds of tests/test_adamw.py; without a wait, and gradients untouched."""
    arrays = problem(moments, grads, skew)
    before = [[x.clone() for x in kind] for kind in arrays]
    run(*arrays)
    narrow = 2.0**-8 if moments == torch.bfloat16 else 0.0
    for i in range(len(SIZES)):
        pieces = (kind[i].split(SLICE) for kind in (*arrays, *before))
        for p, m, v, g, old_p, old_m, old_v, old_g in zip(*pieces, strict=True):
            assert g.equal(old_g)
            wide_g = CLIP * g.double()
            exact_m = BETAS[0] * old_m.double() + (1 - BETAS[0]) * wide_g
            exact_v = BETAS[1] * old_v.double() + (1 - BETAS[1]) * wide_g**2
            root = (exact_v / (1 - BETAS[1] ** 3)).sqrt() + EPS
            exact_p = old_p.double() * (1 - LR * DECAY) - LR * exact_m / (1 - BETAS[0] ** 3) / root
            assert ((p - exact_p).abs() <= 4 * 2.0**-24 * (exact_p.abs() + 0.2)).all()
            terms = exact_m.abs() * narrow + (old_m.double().abs() + wide_g.abs()) * 4 * 2.0**-24
            assert ((m - exact_m).abs() <= terms + 1e-30).all()
            assert ((v - exact_v).abs() <= exact_v * (narrow + 6 * 2.0**-24)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_of_two_billion(dtype: torch.dtype) -> None:
    """Within 1e-6 of float64, also where all roundings go one way; the same bits every time."""
    params = torch.zeros(2_000_000_000, device="cuda")
    shards = Shards([params], [params.bfloat16()], [params.bfloat16()], [0.0])
    grad = torch.full_like(params, 0.3, dtype=dtype)
    for _ in range(2):
        found = gradients(shards, [grad])
        norm = sum_of_squares(shards, found)
        exact = sum(float(x.double().square().sum()) for x in grad.split(SLICE))
        assert float(norm) == pytest.approx(exact, rel=1e-6)
        assert all(sum_of_squares(shards, found).equal(norm) for _ in range(20))
        grad.normal_()
