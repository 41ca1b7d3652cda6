"""The bench of decode attention, on a CPU: counts, reference, providers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from s1fast.bench import decode_attention, kernels, providers
from s1fast.bench.op import MissingError, parse_shape
from s1fast.bench.roofs import Roofs
from s1fast.errors import InputError

CPU = torch.device("cpu")
OP = decode_attention.OP
RATES = {"read_gb_s": 50.0, "copy_gb_s": 40.0, "gemm_bfloat16_tflops": 2.0}
RATES |= {"gemm_float32_tflops": 1.0}
CEILINGS = Roofs(
    **RATES, variants={k: {"x": v} for k, v in RATES.items()}, states={}, void=False, void_reason=""
)


def test_counts() -> None:
    """A row's keys and values once for all of its slots; 4 bytes a number on a CPU."""
    problem = OP.make(parse_shape("L40xB2xH4xN2xK16xstring3xidle2", OP.cpu_sizes), CPU)
    q_CHK, caches, table_RP, line_C, position_C, *_ = problem.arguments
    copies, positions = len(caches), 2 * 40
    assert copies * 2 * positions * 2 * 16 * 4 >= 1 << 16
    assert len({cache.data_ptr() for cache in caches}) == copies
    assert problem.num_bytes == copies * 4 * 16 * (2 * positions * 2 + 2 * 8 * 4)
    assert problem.flops == problem.forward_flops == copies * 3 * 4 * positions * 4 * 16
    assert line_C.tolist() == [0] * 3 + [1] * 3 + [-1] * 2
    assert position_C.tolist() == [37, 38, 39] * 2 + [0] * 2
    assert q_CHK.shape == (8, 4, 16) and sorted(table_RP.flatten().tolist()) == [*range(1, 7)]
    length_B = OP.make(parse_shape("B9xspread", OP.cpu_sizes), CPU).arguments[-1]
    assert length_B.min() >= 20 and length_B.max() <= 60 and len(set(length_B.tolist())) > 4


@pytest.mark.parametrize("shape", [*OP.cpu_shapes, "B3xspreadxinvariant"])
def test_providers_agree_with_the_reference(shape: str) -> None:
    problem = OP.make(parse_shape(shape, OP.cpu_sizes), CPU)
    out, gradients = OP.reference(problem)
    assert not gradients and out.dtype == torch.float64
    for provider in (OP.ours, *OP.peers[:2]):
        found = problem.full(provider.build(problem))
        assert providers.relative_errors(found, out)["norm"] < 1e-6
    with pytest.raises(MissingError, match="on a GPU only"):
        OP.peers[2].build(problem)


@pytest.mark.parametrize("shape", ["H5xN2", "L5xstring3"])
def test_bad_shapes(shape: str) -> None:
    with pytest.raises(InputError, match=r"--shape: (H5 is no|L5 is too short)"):
        OP.make(parse_shape(shape, OP.cpu_sizes), CPU)


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "roofs", lambda: CEILINGS)
    monkeypatch.setattr(providers, "ROUNDS", 2)
    kernels.run(kernels.KernelsConfig(op="decode_attention", output=tmp_path))
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert [shape["shape"] for shape in result["shapes"]] == [
        "L40xB2xH4xN2xK16xspreadxstring3xidle2",
        "L40xB1xH4xN2xK16",
    ]
    for shape in result["shapes"]:
        found = {one["provider"]: one for one in shape["measurements"]}
        assert found["s1fast"]["status"] == "ok" and not found["s1fast"]["wrong"]
        assert found["s1fast"]["timings"].keys() == {"full"}
        assert shape["floor_ms"] == pytest.approx(shape["num_bytes"] / 50e9 * 1e3)
