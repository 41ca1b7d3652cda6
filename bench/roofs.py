"""The two ceilings of a device: bytes a second from memory, FLOPs a second in matrix products.

Every other measurement is a fraction of these, taken in the same session. Each is the best of
several variants and sizes, torch's own included. Data are random: zeros draw less power and run
faster.

    python -m s1fast.bench.roofs
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from s1fast.bench.environment import device_name, gpu_state, save
from s1fast.bench.timing import measure

H100_READ_GB_S = 2700
H100_GEMM_TFLOPS = 720
"""What a healthy H100 SXM reaches; below, something slows it, and the run says nothing."""

# (M, N, K) of products of which the middle ones are those of a head with 152,064 classes.
_GPU_GEMMS = {
    torch.bfloat16: (
        (4096, 4096, 4096),
        (8192, 8192, 8192),
        (16384, 8192, 8192),
        (4224, 152064, 5120),
        (4224, 5120, 152064),
        (16384, 16384, 16384),
    ),
    torch.float32: ((4096, 4096, 4096), (8192, 8192, 8192)),
}
_CPU_GEMMS = ((512, 512, 512), (1024, 1024, 1024))


@dataclass(frozen=True)
class Roofs:
    """The best rates, every rate that was tried, and the GPU's state before, during and after.

    State is None without nvidia-smi. `void` means that the device was too slow to say anything.
    """

    read_gb_s: float
    copy_gb_s: float
    gemm_bfloat16_tflops: float
    gemm_float32_tflops: float
    variants: dict[str, dict[str, float]]
    states: dict[str, dict[str, Any] | None]
    void: bool
    void_reason: str

    def rates(self) -> dict[str, float]:
        """The four best rates by name."""
        return {k: v for k, v in dataclasses.asdict(self).items() if isinstance(v, float)}

    def gemm_tflops(self, dtype: torch.dtype) -> float:
        """The ceiling of products in that dtype."""
        return self.rates()[f"gemm_{_name(dtype)}_tflops"]


def roofs() -> Roofs:
    """Measures all of them: about ten seconds on an H100, two on a CPU."""
    states: dict[str, dict[str, Any] | None] = {"before": gpu_state()}
    variants = _streams()
    for dtype in (torch.bfloat16, torch.float32):
        variants[f"gemm_{_name(dtype)}_tflops"] = _gemms(dtype)
    states["loaded"] = _state_under_load()
    states["after"] = gpu_state()
    best = {name: max(rates.values()) for name, rates in variants.items()}
    void, reason = judge(device_name(), best["read_gb_s"], best["gemm_bfloat16_tflops"])
    return Roofs(**best, variants=variants, states=states, void=void, void_reason=reason)


def read_gb_s() -> float:
    """The first of them alone."""
    return max(_streams()["read_gb_s"].values())


def judge(device: str, read_gb_s: float, gemm_tflops: float) -> tuple[bool, str]:
    """Whether the rates void a run on that device, and why or why not."""
    if "H100" not in device or "PCIe" in device or "NVL" in device:
        return False, f"not applicable: the rule is for an H100 SXM, this is {device}"
    low = []
    if read_gb_s < H100_READ_GB_S:
        low.append(f"reads {read_gb_s:.0f} GB/s, below {H100_READ_GB_S}")
    if gemm_tflops < H100_GEMM_TFLOPS:
        low.append(f"bf16 GEMM {gemm_tflops:.0f} TFLOP/s, below {H100_GEMM_TFLOPS}")
    healthy = f"reads at least {H100_READ_GB_S} GB/s, bf16 GEMM at least {H100_GEMM_TFLOPS} TFLOP/s"
    return bool(low), "; ".join(low) or healthy


def _streams() -> dict[str, dict[str, float]]:
    """GB/s of reading, and of copying (bytes read + bytes written), per variant."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    rates: dict[str, dict[str, float]] = {"read_gb_s": {}, "copy_gb_s": {}}
    for mib in (1024, 4096) if gpu else (256,):
        num_bytes = mib << 20
        x = torch.randn(num_bytes // 4, device=device)
        y = torch.empty_like(x)
        calls: list[tuple[str, str, Callable[[], object]]] = [
            ("read_gb_s", "torch sum", x.sum),
            ("copy_gb_s", "torch copy_", partial(y.copy_, x)),
        ]
        if gpu:
            from s1fast.bench import streams

            for variant in streams.VARIANTS:
                name = "triton " + "-".join(map(str, variant))
                calls.append(("read_gb_s", name, partial(streams.read, x, variant)))
                calls.append(("copy_gb_s", name, partial(streams.copy, x, y, variant)))
        for kind, name, call in calls:
            moved = num_bytes * (1 if kind == "read_gb_s" else 2)
            rates[kind][f"{name}, {mib} MiB"] = moved / _seconds(call) / 1e9
    return rates


def _gemms(dtype: torch.dtype) -> dict[str, float]:
    """TFLOP/s of (M, K) @ (N, K)^T per shape."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    rates = {}
    for m, n, k in _GPU_GEMMS[dtype] if gpu else _CPU_GEMMS:
        a = torch.randn(m, k, device=device, dtype=dtype)
        b = torch.randn(n, k, device=device, dtype=dtype)
        rates[f"{m} x {n} x {k}"] = 2 * m * n * k / _seconds(partial(torch.mm, a, b.T)) / 1e12
    return rates


def _seconds(call: Callable[[], object]) -> float:
    return measure(call, repeats=10 if torch.cuda.is_available() else 3).median_ms * 1e-3


def _state_under_load() -> dict[str, Any] | None:
    """What the GPU says of itself in the middle of a second of bf16 products."""
    if not torch.cuda.is_available():
        return None
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(700):
        torch.mm(a, a)
    state = gpu_state()
    torch.cuda.synchronize()
    return state


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def lines(found: Roofs) -> Iterator[str]:
    """The rates, which variant reached each, and whether they void the run."""
    for name, rate in found.rates().items():
        variant = max(found.variants[name], key=lambda v: found.variants[name][v])
        yield f"{name:24} {rate:10.2f}   {variant}"
    yield f"{'VOID' if found.void else 'not void'}: {found.void_reason}"


def main() -> None:
    found = roofs()
    for line in lines(found):
        print(line)
    print(save("roofs", {"roofs": dataclasses.asdict(found)}))


if __name__ == "__main__":
    main()
