"""The rates that a plan computes with: measured on that GPU where a result says so, else assumed.

Measured rates come from result files of `s1fast bench kernels` (bench/results). Every rate carries
its source, and a plan prints it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from s1fast.errors import InputError
from s1fast.files import read_bytes

GPU = Literal["H100", "H200"]


def gpu_kind(device: str) -> GPU | None:
    """Of a device as torch names it; None of one that there are no rates for.

    PCIe and NVL boards bear the same numbers, but have other clocks, memory and links.
    """
    if "PCIe" in device or "NVL" in device:
        return None
    return next((gpu for gpu in get_args(GPU) if device.startswith(f"NVIDIA {gpu}")), None)


@dataclass(frozen=True)
class Rate:
    """A number, its unit, where it is from, and whether it was measured."""

    value: float
    unit: str
    source: str
    measured: bool = False

    def __str__(self) -> str:
        kind = "measured" if self.measured else "assumed"
        return f"{self.value:,.4g} {self.unit}, {kind}: {self.source}"


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of one kind of GPU and the network between them."""

    peak: Rate
    """Of the data sheet, dense bf16: what MFU is relative to."""
    gemm: Rate
    """Matrix products of a layer, at some thousand rows."""
    head: Rate
    """Those of the head, with the loss between them."""
    attention_forward: Rate
    attention_backward: Rate
    memory: Rate
    """Kernels that move bytes: norms, activations, AdamW."""
    nvlink: Rate
    """A GPU's share of a collective within a node, bytes received a second."""
    fabric: Rate
    """The same across nodes."""
    overlap: Rate
    """Share of the communication that compute can hide which it does hide, in the worse case."""
    host: Rate
    """A step's launches and reading of metrics that the GPU waits for."""
    price: Rate

    def items(self) -> list[tuple[str, Rate]]:
        return [(f.name, getattr(self, f.name)) for f in fields(self)]


_TFLOPS, _GB_S = "TFLOP/s", "GB/s"
_SHEET = "NVIDIA's data sheet of the SXM board"
_TRITON = "what is reported of Triton on H100 for heads of 128: 450-520 forward, 330-400 backward"
_COMMON: dict[str, Rate] = {
    "peak": Rate(989.0, _TFLOPS, _SHEET),
    "gemm": Rate(680.0, _TFLOPS, "cuBLAS is reported to sustain 650-800 on H100"),
    "head": Rate(680.0, _TFLOPS, "as the products of a layer"),
    "attention_forward": Rate(450.0, _TFLOPS, _TRITON),
    "attention_backward": Rate(330.0, _TFLOPS, _TRITON),
    "nvlink": Rate(360.0, _GB_S, "NCCL on 450 GB/s of NVLink, 80 %"),
    "fabric": Rate(340.0, _GB_S, "NCCL's ring over eight 400 Gb/s adapters a node"),
    "overlap": Rate(0.7, "of 1", "a guess, for the worse end of the range"),
    "host": Rate(0.01, "s", "a guess"),
    "price": Rate(3.0, "$ a GPU-hour", "a guess; log.dollars_per_hour states yours"),
}
_MEMORY: dict[str, Rate] = {
    "H100": Rate(3000.0, _GB_S, "90 % of the data sheet's 3,350, as well-made kernels reach"),
    "H200": Rate(4300.0, _GB_S, "90 % of the data sheet's 4,800"),
}

DEVICE_BYTES: dict[str, float] = {"H100": 79.1 * 2**30, "H200": 139.8 * 2**30}
"""What torch may take of 80 GB and 141 GB boards, the CUDA context apart."""


def assumed_rates(gpu: GPU) -> Rates:
    """As published or guessed, nothing measured."""
    return Rates(**_COMMON, memory=_MEMORY[gpu])


def find_rates(gpu: GPU, results: Path, dollars_per_hour: float = 0.0) -> Rates:
    """Assumed rates, replaced by what the newest result of that GPU in the folder measured.

    Raises:
        InputError: a result file that is damaged.
    """
    values = vars(assumed_rates(gpu)) | _newest(gpu, results)
    if dollars_per_hour:
        values["price"] = Rate(dollars_per_hour, "$ a GPU-hour", "log.dollars_per_hour")
    return Rates(**values)


def _newest(gpu: GPU, folder: Path) -> dict[str, Rate]:
    """Of all that results of such a GPU hold, the newest each."""
    found: list[tuple[str, str, dict[str, Rate]]] = []
    for path in folder.glob("*.json"):
        try:
            result = json.loads(read_bytes(path))
            environment, roofs = result["environment"], result.get("roofs")
            if gpu_kind(environment["device"]) == gpu and roofs and not roofs.get("void"):
                found.append((environment["timestamp"], path.name, _measured(result, path.name)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: no result of the bench: {error!r}") from None
    found.sort(key=lambda one: one[:2])
    return {name: rate for *_, rates in found for name, rate in rates.items()}


def _measured(result: dict[str, Any], file: str) -> dict[str, Rate]:
    """The rates that one result file holds."""
    roofs = result["roofs"]
    values = {"memory": Rate(roofs["copy_gb_s"], _GB_S, f"copy roof, {file}", True)}
    for shape in result.get("shapes", []):
        ours = next((m for m in shape["measurements"] if m["provider"] == "s1fast"), None)
        if ours is None or ours["status"] != "ok" or not ours.get("tflops"):
            continue
        source = f"{shape['op']} {shape['shape']}, {file}"
        rates = {mode: Rate(v, _TFLOPS, source, True) for mode, v in ours["tflops"].items()}
        if shape["op"] == "packed_attention" and "attention_forward" not in values:
            values["attention_forward"] = rates["forward"]
            values["attention_backward"] = rates["backward"]
        if shape["op"] == "linear_cross_entropy" and "head" not in values:
            values["head"] = rates["full"]
    for name, value in result.get("rates", {}).items():  # of bench.layer_step
        unit = _GB_S if name == "memory" else _TFLOPS
        values[name] = Rate(value, unit, f"layer step, {file}", True)
    return values
