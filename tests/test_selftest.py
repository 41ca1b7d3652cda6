"""The look at the machine before training: what is measured, and what is said of it."""

from __future__ import annotations

import pytest
import torch

from s1fast import selftest
from s1fast.parallel import Layout
from s1fast.rates import _COMMON
from s1fast.selftest import Reading, line, run, warnings

H100 = "NVIDIA H100 80GB HBM3"
HEALTHY = [
    Reading("gemm", 700.0, "TFLOP/s", 3),
    Reading("host", 53.0, "GB/s", 0),
    Reading("node", 340.0, "GB/s", 1),
    Reading("world", 330.0, "GB/s", 2),
]


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_healthy_machine_is_not_complained_of(nodes: int) -> None:
    assert warnings(HEALTHY, H100, nodes) == []


@pytest.mark.parametrize(
    ("number", "value", "cause"),
    [
        (0, 400.0, "a power limit, heat"),
        (1, 12.0, "wrong NUMA node"),
        (2, 40.0, "NVLink that is not used"),
        (3, 9.0, "NCCL on sockets"),
    ],
)
def test_a_cause_is_named(number: int, value: float, cause: str) -> None:
    """One rate far below the usual: one warning, with figure, rank, expectation and cause."""
    slow = list(HEALTHY)
    one = slow[number]
    slow[number] = Reading(one.axis, value, one.unit, one.rank)
    (text,) = warnings(slow, H100, 2)
    assert f"{value:,.3g} {one.unit} on rank {one.rank}, " in text and cause in text


def test_what_is_usual_depends_on_the_machine() -> None:
    """Between nodes the fabric is what to expect; of other GPUs nothing is known."""
    fabric, nvlink = _COMMON["fabric"].value, _COMMON["nvlink"].value
    assert fabric < nvlink
    between = Reading("world", 0.5 * fabric + 1, "GB/s", 0)
    assert not warnings([between], H100, 2)
    assert warnings([Reading("world", 0.5 * nvlink - 1, "GB/s", 0)], H100, 1)
    hopeless = [Reading(one.axis, 1e-3, one.unit, 0) for one in HEALTHY]
    assert len(warnings(hopeless, "NVIDIA H200", 2)) == 4
    for other in ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 PCIe", "AMD EPYC"):
        assert warnings(hopeless, other, 2) == []


def test_a_cpu_measures_its_products() -> None:
    """Alone it has no links to measure."""
    (one,) = run(Layout(torch.device("cpu")))
    assert one.axis == "gemm" and one.value > 0 and one.rank == 0
    assert line([one]).startswith("self-test  matrix products ")


def test_the_best_of_several_tries_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the first, which warms up, does not."""
    times = iter([0.0, 0.001, 0.0, 5.0, 0.0, 3.0, 0.0, 2.0, 0.0, 4.0, 0.0, 9.0])
    monkeypatch.setattr(selftest.time, "perf_counter", lambda: next(times))
    assert selftest._best_s(torch.device("cpu"), lambda: None) == 2.0
