"""The choice between csrc and torch: who multiplies what, what is refused, and the operation.

The kernel's results are test_csrc.py's and, on a GPU, test_gpu_csrc.py's.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gemv_host
from s1fast import matmul
from s1fast.errors import InputError
from s1fast.matmul import Matmul, by_torch, gemv, prepare

BF16 = torch.bfloat16
CPU = torch.device("cpu")


def zeros(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


WORKSPACE = zeros(8, dtype=torch.uint8)


@pytest.mark.parametrize("swiglu", [False, True])
def test_by_torch(swiglu: bool) -> None:
    """torch's path against float64. It rounds in between: after the norm twice, after the product,
    and after each of the steps behind it, 2^-8 of the magnitudes each."""
    case = gemv_host.Case(
        slots=5,
        outputs=24,
        width=64,
        norm=True,
        swiglu=swiglu,
        bias=not swiglu,
        residual=not swiglu,
    )
    given = gemv_host.make_inputs(case)
    added = {} if swiglu else {"residual_MN": given.residual_MN, "bias_N": given.bias_N}
    around = {"norm_K": given.norm_K, "eps": gemv_host.EPS, "swiglu": swiglu, **added}
    found_MN = by_torch(given.x_MK, given.weight_NK, **around)
    exact_MN, bound_MN = gemv_host.exact(case, given)
    assert ((found_MN.double() - exact_MN).abs() <= 4 * bound_MN + 2.0**-6).all()


# -- the choice --------------------------------------------------------------------------------


def test_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """One and eight tokens go to csrc, nine do not; torch's choice has no other."""
    asked = []
    monkeypatch.setattr(matmul, "gemv", lambda x, *_, **__: asked.append(len(x)))
    for choice in (Matmul("cuda", WORKSPACE), Matmul("torch")):
        for m in (1, 8, 9):
            choice(zeros(m, 16), zeros(8, 16))
    assert asked == [1, 8]
    assert Matmul("cuda", WORKSPACE).describe(64) == (
        "matmul: 1 to 8 tokens by csrc, 9 to 64 tokens by torch"
    )
    assert Matmul("cuda", WORKSPACE).describe(1) == "matmul: 1 token by csrc"
    assert Matmul("torch").describe(64) == "matmul: 1 to 64 tokens by torch"
    assert prepare("torch", CPU, {}) == Matmul("torch")


def test_an_unfit_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r'runs on a CUDA device, and this is cpu; .*"torch"'):
        prepare("cuda", CPU, {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an A100")
    with pytest.raises(InputError, match=r'capability 9\.0 .* an A100 has 8\.0; take .*"torch"'):
        prepare("cuda", torch.device("cuda"), {})


def test_an_unfit_weight_is_named_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(matmul, "new_workspace", lambda device: WORKSPACE)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    good = {"layers.0.qkv_weight": zeros(48, 64), "padded": zeros(48, 72)[:, :64]}
    assert prepare("cuda", torch.device("cuda"), good).workspace is WORKSPACE
    for bad, fault in (
        (zeros(48, 60), "60 columns, expected a multiple of 8"),
        (zeros(48, 64, dtype=torch.float32), "float32, expected torch.bfloat16"),
        (zeros(64, 48).T, "strides .* expected 1"),
        (zeros(48, 68)[:, :64], "rows 68 elements apart"),
        (zeros(48 * 64 + 1)[1:].view(48, 64), "begins at no multiple of 16 bytes"),
    ):
        with pytest.raises(InputError, match=f'layers.1.o_weight.*{fault}.*take matmul = "torch"'):
            prepare("cuda", torch.device("cuda"), {**good, "layers.1.o_weight": bad})


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"x_MK": zeros(9, 64)}, r"x_MK has shape \(9, 64\), expected 1 to 8 rows"),
        ({"x_MK": zeros(0, 64)}, "expected 1 to 8 rows"),
        ({"x_MK": zeros(64)}, "expected 1 to 8 rows"),
        ({"x_MK": zeros(2, 64).float()}, "x_MK .* is torch.float32"),
        ({"x_MK": zeros(2, 128)[:, ::2]}, "x_MK .* has strides"),
        ({"x_MK": zeros(1, 64).expand(2, 64)}, "x_MK .* rows 0 elements apart"),
        ({"weight_NK": zeros(48, 72)}, r"weight_NK has shape \(48, 72\), expected \(N, 64\)"),
        ({"weight_NK": zeros(0, 64)}, "nothing to multiply"),
        ({"weight_NK": zeros(48, 64).to("meta")}, "weight_NK .* is on meta, expected cpu"),
        ({"workspace": zeros(8)}, "workspace .* is torch.bfloat16, expected torch.uint8"),
        ({"norm_K": zeros(72)}, r"norm_K has shape \(72,\), expected \(64\)"),
        ({"norm_K": zeros(65)[1:]}, "norm_K begins at no multiple of 16 bytes"),
        ({"bias_N": zeros(47)}, r"bias_N has shape \(47,\)"),
        ({"bias_N": zeros(96)[::2]}, "bias_N .* has strides"),
        ({"residual_MN": zeros(3, 48)}, r"residual_MN has shape \(3, 48\), expected \(2, 48\)"),
        ({"residual_MN": zeros(48, 2).T}, "residual_MN .* has strides"),
        ({"live": zeros(1, dtype=torch.int64)}, "live .* is torch.int64, expected torch.int32"),
        ({"live": zeros(2, dtype=torch.int32)}, "live has shape"),
        ({"swiglu": True, "weight_NK": zeros(47, 64)}, "47 rows, expected gate rows and as many"),
        ({"swiglu": True, "bias_N": zeros(48)}, "swiglu takes neither bias_N nor residual_MN"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(changed: dict[str, Any], fault: str) -> None:
    """Before any launch, and before anything is compiled."""
    given = {"x_MK": zeros(2, 64), "weight_NK": zeros(48, 64), "workspace": WORKSPACE}
    with pytest.raises(ValueError, match=fault):
        gemv(**{**given, **changed})


# -- the operation -----------------------------------------------------------------------------


def test_operation_loads_without_cuda(csrc_library: Path) -> None:
    """In a torch that has none: shapes without data, the reference on a CPU, and no stream."""
    assert csrc_library.exists()
    library = matmul.library()
    x_MK, weight_NK = torch.randn(3, 64).to(BF16), torch.randn(48, 64).to(BF16)
    found_MN = gemv(x_MK, weight_NK, WORKSPACE, norm_K=zeros(64) + 1, eps=1e-6, swiglu=True)
    wanted_MN = by_torch(x_MK, weight_NK, norm_K=zeros(64) + 1, eps=1e-6, swiglu=True)
    assert torch.equal(found_MN, wanted_MN) and found_MN.shape == (3, 24)
    optional = (None, None, None, None, 0.0)
    torch.library.opcheck(torch.ops.s1fast.gemv, (x_MK, weight_NK, WORKSPACE, *optional, False))
    meta = (x_MK.to("meta"), weight_NK.to("meta"), WORKSPACE.to("meta"))
    assert torch.ops.s1fast.gemv(*meta, *optional, True).shape == (3, 24)
    blocks, rows = 132 * gemv_host.constant("BLOCKS"), 16 * gemv_host.constant("FRAGMENTS")
    assert library.s1fast_workspace_bytes(132) == blocks * (2 * (8 * rows + 8) * 4 + 4)
    if torch.version.cuda is None:
        stream = ctypes.c_void_p()
        fault = library.s1fast_current_stream(0, ctypes.byref(stream))
        assert fault == b"libtorch_cuda.so is not loaded: this torch has no CUDA"
