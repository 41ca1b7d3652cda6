"""The benches of RMSNorm, rotary embedding and SwiGLU, on a CPU: bytes, references, peers.

Peers that need a GPU are stood in for by functions with the same arguments.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from s1fast.bench import kernels, memory_bound, providers, report
from s1fast.bench.memory_bound import RMS_NORM, ROPE, SWIGLU
from s1fast.bench.op import Op, joined, parse_shape
from s1fast.bench.roofs import Roofs

CPU = torch.device("cpu")
RATES = {"read_gb_s": 100.0, "copy_gb_s": 80.0}
RATES |= {"gemm_bfloat16_tflops": 2.0, "gemm_float32_tflops": 1.0}
CEILINGS = Roofs(
    **RATES, variants={k: {"x": v} for k, v in RATES.items()}, states={}, void=False, void_reason=""
)
CASES = [(RMS_NORM, "R40"), (RMS_NORM, "R40xresidual"), (ROPE, "R40"), (SWIGLU, "R40")]
IDS = [f"{op.name} {shape}" for op, shape in CASES]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(providers, "ROUNDS", 5)
    for name in ("liger_kernel", "quack"):
        monkeypatch.setitem(sys.modules, name, None)


def measured(op: Op, shape: str) -> dict[str, Any]:
    chosen = [(provider, None) for provider in (op.ours, *op.peers)]
    return providers.measure_shape(op, parse_shape(shape, op.cpu_sizes), chosen, CEILINGS, CPU)


@pytest.mark.parametrize(("op", "shape"), CASES, ids=IDS)
def test_measurements(op: Op, shape: str) -> None:
    """Ours and eager are right and are rated in bytes, against the copy roof."""
    result = measured(op, shape)
    found = {one["provider"]: one for one in result["measurements"]}
    assert result["flops"] == 0
    assert result["floor_ms"] == pytest.approx(result["num_bytes"] / 80e6)
    for name in ("s1fast", "torch eager"):
        one = found.pop(name)
        assert one["status"] == "ok" and not one["wrong"], one["reason"]
        assert set(one["errors"]) == {"output", *(f"d {n}" for n in leaves(op, shape))}
        ms = {mode: timing["median_ms"] for mode, timing in one["timings"].items()}
        assert one["gb_s"]["full"] == pytest.approx(result["num_bytes"] / ms["full"] / 1e6)
        assert one["roof_fraction"] == pytest.approx(one["gb_s"]["full"] / 80)
        parts = [one["gb_s"][mode] * ms[mode] for mode in ("forward", "backward")]
        assert sum(parts) == pytest.approx(result["num_bytes"] / 1e6) and min(parts) > 0
        (cells,) = [row for row in report.cells(result) if row[0] == name]
        assert f"{one['gb_s']['forward']:.0f} / {one['gb_s']['backward']:.0f} / " in cells[5]
        assert cells[5].endswith(" GB/s")
    assert {one["status"] for one in found.values()} == {"missing"}


def leaves(op: Op, shape: str) -> dict[str, Tensor]:
    return op.make(parse_shape(shape, op.cpu_sizes), CPU).leaves


def test_bytes_by_hand() -> None:
    def counted(op: Op, shape: str) -> tuple[int, int]:
        one = op.make(parse_shape(shape, op.cpu_sizes), CPU)
        return one.forward_bytes, one.num_bytes

    assert counted(RMS_NORM, "R7xD10") == (2 * 280, 5 * 280)
    assert counted(RMS_NORM, "R7xD10xresidual") == (4 * 280, 8 * 280)
    once = 2 * 4 * 7 * (3 + 2 * 2) * 8 + 2 * 4 * 7 * 4
    assert counted(ROPE, "R7xH3xN2xK8") == (once, 2 * once)
    assert counted(SWIGLU, "R7xF10") == (3 * 280, 9 * 280)


@pytest.mark.parametrize("chunk", [7, 40, 1000])
@pytest.mark.parametrize(("op", "shape"), CASES, ids=IDS)
def test_references_are_exact(
    op: Op, shape: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autograd in float64 over everything at once, whatever the size of a chunk."""
    monkeypatch.setattr(memory_bound, "CHUNK_ROWS", chunk)
    one = op.make(parse_shape(shape, op.cpu_sizes), CPU)
    output, gradients = op.reference(one)
    wide = [
        x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for x in one.arguments
    ]
    function = op.peers[0].build(dataclasses.replace(one, arguments=tuple(wide)))
    found = function()
    upstream = one.upstream if isinstance(one.upstream, tuple) else (one.upstream,)
    torch.autograd.backward(found, [x.double() for x in upstream if x is not None])
    torch.testing.assert_close(output, joined(found).float(), rtol=1e-6, atol=1e-6)
    grads = [x.grad for x in wide if isinstance(x, Tensor) and x.requires_grad]
    for name, grad in zip(gradients, grads, strict=True):
        assert grad is not None
        torch.testing.assert_close(gradients[name], grad.float(), rtol=1e-5, atol=1e-5)


def test_peers_are_given_the_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with Liger's and QuACK's arguments, computing what those mean."""

    class Stand:
        def __init__(self, function: Any) -> None:
            self.apply = function

    def norm(x: Tensor, w: Tensor, eps: float, offset: float, mode: str, in_place: bool) -> Tensor:
        assert (eps, offset, mode, in_place) == (memory_bound.EPS, 0.0, "llama", False)
        return memory_bound._norm(x, w)  # type: ignore[return-value]

    def add_norm(x: Tensor, residual: Tensor, w: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
        return norm(x + residual, w, *settings), x + residual

    def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        assert cos.shape == (1, q.shape[2], q.shape[3])
        half = tuple(x[0, :, : q.shape[3] // 2] for x in (cos, sin))
        turned = (memory_bound._turned(x[0].transpose(0, 1), *half) for x in (q, k))
        q, k = (x.transpose(0, 1)[None] for x in turned)
        return q, k

    def rmsnorm(
        x: Tensor, w: Tensor, *, eps: float, residual: Any = None, prenorm: bool = False
    ) -> Any:
        assert eps == memory_bound.EPS and prenorm == (residual is not None)
        found = memory_bound._norm(x, w, residual)
        return found[::-1] if prenorm else found

    modules = {
        "liger_kernel.ops.rms_norm": {"LigerRMSNormFunction": Stand(norm)},
        "liger_kernel.ops.fused_add_rms_norm": {"LigerFusedAddRMSNormFunction": Stand(add_norm)},
        "liger_kernel.ops.rope": {"LigerRopeFunction": Stand(turn)},
        "liger_kernel.ops.swiglu": {
            "LigerSiLUMulFunction": Stand(lambda a, b: torch.nn.functional.silu(a) * b)
        },
        "quack.rmsnorm": {"rmsnorm": rmsnorm},
    }
    for name in ("liger_kernel", "liger_kernel.ops", "quack"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, contents in modules.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    for op, shape in CASES:
        for one in measured(op, shape)["measurements"]:
            if one["provider"] != "torch.compile":
                assert one["status"] == "ok" and not one["wrong"], (one["provider"], one["reason"])


def test_shapes_go_where_they_belong() -> None:
    """R alone to all three, and no shape of the others to any of them."""
    assert [op.name for op, _ in kernels._given(("R9",), kernels.OPS, CPU)] == [
        "rms_norm",
        "rope",
        "swiglu",
    ]
    for text in ("T9", "S9", "T4700xD5120"):
        (taken,) = kernels._given((text,), kernels.OPS, CPU)
        assert taken[0] not in (RMS_NORM, ROPE, SWIGLU)
