"""The bench of the token loop's products, on a CPU: counts, reference, providers, tables."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from s1fast.bench import gemv, kernels, providers, report
from s1fast.bench.op import MissingError, parse_shape
from s1fast.bench.roofs import Roofs
from s1fast.errors import InputError

CPU = torch.device("cpu")
OP = gemv.OP
RATES = {"read_gb_s": 50.0, "copy_gb_s": 40.0, "gemm_bfloat16_tflops": 2.0}
RATES |= {"gemm_float32_tflops": 1.0}
CEILINGS = Roofs(
    **RATES, variants={k: {"x": v} for k, v in RATES.items()}, states={}, void=False, void_reason=""
)


def test_counts() -> None:
    """2 bytes a weight; tokens in and out, and the residual, of those that are live."""
    problem = OP.make(parse_shape("M8xN48xK64xswigluxlive3", OP.cpu_sizes), CPU)
    copies = len(problem.arguments[1])
    assert copies * 2 * 96 * 64 >= 1 << 16
    assert len({w.data_ptr() for w in problem.arguments[1]}) == copies
    assert problem.num_bytes == copies * (2 * 96 * 64 + 2 * 3 * (64 + 48))
    assert problem.flops == problem.forward_flops == copies * 2 * 3 * 96 * 64
    problem = OP.make(parse_shape("M2xresidual", OP.cpu_sizes), CPU)
    copies = len(problem.arguments[1])
    assert problem.num_bytes == copies * (2 * 48 * 64 + 2 * 2 * (64 + 2 * 48))


@pytest.mark.parametrize("shape", [*OP.cpu_shapes, "M1"])
def test_providers_agree_with_the_reference(shape: str) -> None:
    """A few roundings to bf16 of 2^-8, of values whose largest are a few times the mean."""
    problem = OP.make(parse_shape(shape, OP.cpu_sizes), CPU)
    out, gradients = OP.reference(problem)
    assert not gradients and out.dtype == torch.float64
    forwards = [gemv.torchs(problem)]
    if shape == "M1":
        forwards.append(gemv.bare(problem))
    else:
        with pytest.raises(MissingError, match="more than a product"):
            gemv.bare(problem)
    for forward in forwards:
        assert providers.relative_errors(problem.full(forward), out)["norm"] < 2.0**-7
    with pytest.raises(MissingError, match=r"compute capability 9\.0"):
        OP.ours.build(problem)


def test_a_run_without_backward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only what there is gets timed and told; what ours lacks here is said, also for --once."""
    monkeypatch.setattr(kernels, "roofs", lambda: CEILINGS)
    kernels.run(kernels.KernelsConfig(op="gemv", output=tmp_path))
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert [shape["shape"] for shape in result["shapes"]] == [
        "M2xN48xK64xnormxresidual",
        "M8xN48xK64xnormxswigluxlive3",
    ]
    for shape in result["shapes"]:
        found = {one["provider"]: one for one in shape["measurements"]}
        assert found["s1fast"]["status"] == "missing" and "9.0" in found["s1fast"]["reason"]
        assert found["torch"]["timings"].keys() == {"full"} == found["torch"]["tflops"].keys()
        assert not found["torch"]["wrong"]
        assert shape["floor_ms"] == pytest.approx(shape["num_bytes"] / 50e9 * 1e3)
        (row,) = [row for row in report.cells(shape) if row[0] == "torch"]
        assert len(row) == len(report.HEADER) and row[1:3] == ["-", "-"] and float(row[3]) > 0
    assert "compute capability 9.0" in capsys.readouterr().out
    assert path.with_suffix(".png").exists()
    for line in path.with_suffix(".csv").read_text().splitlines()[1:]:
        assert ",full," in line
    once = dataclasses.replace(kernels.KernelsConfig(op="gemv", output=tmp_path), once=True)
    with pytest.raises(InputError, match=r"--once: gemv: csrc needs"):
        kernels.run(once)
