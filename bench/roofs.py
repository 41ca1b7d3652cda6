"""The two ceilings of a device: bytes a second from memory, FLOPs a second in matrix products.

Every other measurement is a fraction of these, taken in the same session.

    python -m s1fast.bench.roofs
"""

from __future__ import annotations

from functools import partial

import torch

from s1fast.bench.environment import save
from s1fast.bench.timing import measure


def roofs() -> dict[str, float]:
    """The best of a few sizes each: read_gb_s, copy_gb_s, gemm_tflops in bf16 and fp32."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gib = 4.0 if device.type == "cuda" else 0.5
    x = torch.ones(int(gib * 2**30 / 4), device=device)
    y = torch.empty_like(x)
    num_bytes = x.numel() * 4
    found = {
        "read_gb_s": num_bytes / measure(x.sum)["median_s"] / 1e9,
        "copy_gb_s": 2 * num_bytes / measure(lambda: y.copy_(x))["median_s"] / 1e9,
    }
    sizes = (4096, 8192, 16384) if device.type == "cuda" else (512, 1024, 2048)
    for dtype in (torch.bfloat16, torch.float32):
        rates = []
        for n in sizes:
            a = torch.randn(n, n, device=device).to(dtype)
            b = torch.randn(n, n, device=device).to(dtype)
            rates.append(2 * n**3 / measure(partial(torch.mm, a, b))["median_s"] / 1e12)
        found[f"gemm_{str(dtype).removeprefix('torch.')}_tflops"] = max(rates)
    return found


def main() -> None:
    found = roofs()
    for name, value in found.items():
        print(f"{name:24} {value:10.2f}")
    print(save("roofs", {"roofs": found}))


if __name__ == "__main__":
    main()
