"""A second of measuring at the start of training: is every GPU, link and network what it should be?

Most runs that were many times too slow had one cause that such a look finds: traffic between nodes
that goes over sockets, a GPU held back by its power limit, a process on the wrong side of the host.
Each rate is the slowest rank's. Far below what is expected, a warning names the likely cause, and
training goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from s1fast.parallel import Layout
from s1fast.rates import assumed_rates, gpu_kind

TRIES = 5
"""Each measurement is the best of these, after one that is not counted."""

Axis = Literal["gemm", "host", "node", "world"]


@dataclass(frozen=True)
class Reading:
    """One rate, the slowest rank's."""

    axis: Axis
    value: float
    unit: str
    rank: int
    """The slowest."""


_WHAT: dict[Axis, str] = {
    "gemm": "matrix products",
    "host": "host to device",
    "node": "all-to-all of attention",
    "world": "all-gather of weights",
}
_FAR_BELOW: dict[Axis, float] = {"gemm": 0.7, "host": 0.4, "node": 0.5, "world": 0.5}
"""Share of the expected rate under which something is wrong."""
_HOST_GB_S = 50.0
"""Pinned memory over PCIe 5.0 with 16 lanes: 63 GB/s in theory, 50 to 55 in practice."""
_CAUSES: dict[Axis, str] = {
    "gemm": "a power limit, heat, or another process on the GPU: look at nvidia-smi -q -d "
    "PERFORMANCE,POWER,CLOCK",
    "host": "a process on the wrong NUMA node, or a slot with fewer lanes: nvidia-smi topo -m; "
    "bind each rank with numactl",
    "node": "NVLink that is not used: nvidia-smi nvlink -s, and NCCL_DEBUG=INFO for the transport",
    "world": "NCCL on sockets in place of the fabric: NCCL_DEBUG=INFO says NET/Socket or NET/IB; "
    "see NCCL_IB_HCA, NCCL_SOCKET_IFNAME and the container's access to /dev/infiniband",
}


def run(layout: Layout) -> list[Reading]:
    """Measures; collective. On a CPU at sizes that take no time, for the sake of the code path."""
    cuda = layout.device.type == "cuda"
    size, num_bytes = (8192, 256 << 20) if cuda else (128, 1 << 16)
    readings = [("gemm", _gemm_tflops(layout.device, size), "TFLOP/s")]
    if cuda:
        readings.append(("host", _host_gb_s(layout.device, num_bytes), "GB/s"))
    if layout.group is not None:
        readings.append(("node", _all_to_all_gb_s(layout, num_bytes), "GB/s"))
    if layout.world > 1:
        readings.append(("world", _all_gather_gb_s(layout, num_bytes), "GB/s"))
    found = []
    for axis, value, unit in readings:
        everyone = [float(text) for text in layout.ranks.exchange(repr(value))]
        slowest = min(everyone)
        found.append(Reading(axis, slowest, unit, everyone.index(slowest)))  # type: ignore[arg-type]
    return found


def line(readings: Sequence[Reading]) -> str:
    """All readings in one line."""
    return "self-test  " + ", ".join(
        f"{_WHAT[one.axis]} {one.value:,.3g} {one.unit}" for one in readings
    )


def warnings(readings: Sequence[Reading], device_name: str, nodes: int) -> list[str]:
    """What is far below expectation, with its likely cause.

    Args:
        device_name: as torch.cuda.get_device_name tells it; of an unknown GPU nothing is expected.
        nodes: how many the run has.
    """
    expected = _expected(device_name, nodes)
    found = []
    for one in readings:
        usual = expected.get(one.axis)
        if usual is not None and one.value < _FAR_BELOW[one.axis] * usual:
            found.append(
                f"{_WHAT[one.axis]}: {one.value:,.3g} {one.unit} on rank {one.rank}, {usual:,.3g} "
                f"are usual on {device_name}; a likely cause: {_CAUSES[one.axis]}"
            )
    return found


def _expected(device_name: str, nodes: int) -> dict[Axis, float]:
    gpu = gpu_kind(device_name)
    if gpu is None:
        return {}
    rates = assumed_rates(gpu)
    return {
        "gemm": rates.gemm.value,
        "host": _HOST_GB_S,
        "node": rates.nvlink.value,
        "world": (rates.fabric if nodes > 1 else rates.nvlink).value,
    }


# -- measuring -------------------------------------------------------------------------------------


def _best_s(device: torch.device, call: Callable[[], object]) -> float:
    """Seconds of the fastest call."""
    best = float("inf")
    for number in range(TRIES + 1):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        elapsed_s = time.perf_counter() - start
        if number:
            best = min(best, elapsed_s)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _gemm_tflops(device: torch.device, size: int) -> float:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _best_s(device, lambda: torch.mm(a, b, out=out)) / 1e12


def _host_gb_s(device: torch.device, num_bytes: int) -> float:
    host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    return num_bytes / _best_s(device, lambda: there.copy_(host, non_blocking=True)) / 1e9


def _all_to_all_gb_s(layout: Layout, num_bytes: int) -> float:
    assert layout.group is not None
    group = _resolve_process_group(layout.group.name)  # type: ignore[arg-type]
    size = layout.group.size
    sent = _bytes(layout, num_bytes // size * size)
    received = torch.empty_like(sent)
    best_s = _best_s(layout.device, lambda: dist.all_to_all_single(received, sent, group=group))
    return len(sent) * (size - 1) / size / best_s / 1e9


def _all_gather_gb_s(layout: Layout, num_bytes: int) -> float:
    part = _bytes(layout, num_bytes // layout.world)
    whole = torch.empty(layout.world * len(part), dtype=part.dtype, device=layout.device)
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # from torch 2.13 on
    best_s = _best_s(layout.device, lambda: gather(whole, part))
    return len(part) * (layout.world - 1) / best_s / 1e9


def _bytes(layout: Layout, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.uint8, device=layout.device)
