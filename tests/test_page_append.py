"""Bias, rotation and append against complex numbers in float64, by the reference and the kernel.

Where there is no GPU the kernel runs in Triton's interpreter on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from s1fast.kernels import decode_attention as attention
from s1fast.kernels import decode_attention_triton as attention_kernels
from s1fast.kernels import page_append as op
from s1fast.kernels.decode_attention import decode_attention, decode_workspace
from s1fast.kernels.page_append import append_qkv
from tensors import far_apart, random
from tolerances import check_against_eager

ON_GPU = torch.cuda.is_available()
BF16, FP32 = torch.bfloat16, torch.float32
SIZE, LAST = 16, 40
NAN = float("nan")

# (H, N, K): groups of 5, 7, 1 and 3, halves of a power of two and of none.
HEADS = [(10, 2, 64), (7, 1, 128), (2, 2, 2), (3, 1, 20)]

TABLE = [[3, 8, 5], [3, 4, 0], [7, 0, 0]]
"""The first page of two rows is one and the same."""
SLOTS = [(0, 15), (0, 16), (1, 31), (-1, 0), (2, 0), (0, LAST), (-1, 0), (1, 18)]
"""(line, position) of each slot."""


@pytest.fixture(
    params=["reference", pytest.param("triton", marks=[pytest.mark.gpu] if ON_GPU else [])]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where tensors go for a path."""
    if request.param == "reference":
        return "cpu"
    if not ON_GPU:
        monkeypatch.setattr(op, "reference_", op.triton_)
        monkeypatch.setattr(attention, "reference_decode", attention_kernels.decode)
        monkeypatch.setattr(attention_kernels, "PROGRAMS", 4)  # of which most would be idle here
    return "cuda" if ON_GPU else "cpu"


def tables(width: int, device: str) -> tuple[Tensor, Tensor]:
    freq_R = 10.0 ** -(torch.arange(width // 2, device=device) * 4 / width)
    angle_XR = (torch.arange(LAST + 1, device=device) + 1)[:, None] * freq_R
    return angle_XR.cos(), angle_XR.sin()


def step(device: str, slots: list[tuple[int, int]] = SLOTS) -> tuple[Tensor, Tensor, Tensor]:
    """(position_C, line_C, table_RP)."""
    lines, positions = zip(*slots, strict=True)
    return tuple(
        torch.tensor(x, dtype=torch.int32, device=device) for x in (positions, lines, TABLE)
    )


def turned(x_HK: Tensor, cos_R: Tensor, sin_R: Tensor) -> Tensor:
    """In float64: the halves are real and imaginary parts."""
    a_HR, b_HR = x_HK.double().chunk(2, dim=-1)
    z_HR = torch.complex(a_HR, b_HR) * torch.complex(cos_R.double(), sin_R.double())
    return torch.cat((z_HR.real, z_HR.imag), -1)


def eager(x_HK: Tensor, cos_R: Tensor, sin_R: Tensor) -> Tensor:
    """In fp32."""
    a_HR, b_HR = x_HK.float().chunk(2, dim=-1)
    rotated_HK = torch.cat((-b_HR, a_HR), -1)
    return x_HK.float() * torch.cat((cos_R, cos_R)) + rotated_HK * torch.cat((sin_R, sin_R))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("biased", [True, False], ids=["bias", ""])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_append(device: str, dtype: torch.dtype, heads: tuple[int, int, int], biased: bool) -> None:
    """Into pages that are a layer of a cache; what no slot writes keeps its bits, the sink is zero.

    Idle slots carry NaN.
    """
    h, n, width = heads
    columns = (h + 2 * n) * width
    qkv_CQ = random(len(SLOTS), columns + 5, dtype=dtype, device=device)[:, :columns]
    bias_Q = random(columns, dtype=dtype, device=device, seed=1) if biased else None
    cos_XR, sin_XR = tables(width, device)
    cache = random(10, 3, SIZE, n, width, 2, dtype=dtype, device=device, seed=2)
    before = k_PSNK, v_PSNK = [cache[:, 1, ..., i].contiguous() for i in (0, 1)]
    wide_k, wide_v = torch.stack((v_PSNK, k_PSNK), 1), torch.cat((v_PSNK, v_PSNK), 3)
    after = wide_k[:, 1], wide_v[..., width:]
    position_C, line_C, table_RP = step(device)
    qkv_CQ[line_C < 0] = NAN
    q_CHK = append_qkv(
        qkv_CQ, bias_Q, cos_XR, sin_XR, position_C, line_C, table_RP, *after, num_heads=h
    )
    assert q_CHK.shape == (len(SLOTS), h, width) and q_CHK.is_contiguous()
    assert torch.equal(wide_k[:, 0], v_PSNK) and torch.equal(wide_v[..., :width], v_PSNK)

    exact, plain = (
        torch.zeros(len(SLOTS), h + 2 * n, width, dtype=t) for t in (torch.float64, FP32)
    )
    found = torch.zeros_like(plain, dtype=dtype)
    for slot, (line, position) in enumerate(SLOTS):
        found[slot, :h] = q_CHK[slot]
        page, offset = (TABLE[line][position // SIZE], position % SIZE) if line >= 0 else (0, 0)
        for i, (new, old) in enumerate(zip(after, before, strict=True)):
            found[slot, h + i * n : h + (i + 1) * n] = new[page, offset]
            old[page, offset] = new[page, offset]
        if line >= 0:
            x_HK = qkv_CQ[slot].double() + (bias_Q.double() if biased else 0.0)
            x_HK = x_HK.unflatten(0, (-1, width)).cpu()
            angle = cos_XR[position].cpu(), sin_XR[position].cpu()
            exact[slot] = torch.cat((turned(x_HK[: h + n], *angle), x_HK[h + n :]))
            plain[slot] = torch.cat((eager(x_HK[: h + n], *angle), x_HK[h + n :].float()))
    check_against_eager(found, exact, plain.to(dtype), "q, k, v")
    for new, old in zip(after, before, strict=True):
        assert torch.equal(new, old)


def test_appended_is_what_is_attended_to(device: str) -> None:
    """Forty positions, by one to eight slots a step: each attends to all before it and itself."""
    h, n, width, count = 4, 2, 16, LAST + 1
    columns = (h + 2 * n) * width
    qkv_CQ = random(count, columns, dtype=FP32, device=device)
    bias_Q = random(columns, dtype=FP32, device=device, seed=1)
    cos_XR, sin_XR = tables(width, device)
    k_PSNK, v_PSNK = (torch.full((10, SIZE, n, width), NAN, device=device) for _ in "kv")
    workspace = decode_workspace(10, h, n, width, qkv_CQ.device)
    outs, at = [], 0
    for size in (1, 8, 6, 2, 8, 7, 8, 1):
        slots = [(0, at + i) for i in range(size)] + [(-1, 0)] * 2
        position_C, line_C, table_RP = step(device, slots)
        some_CQ = torch.cat((qkv_CQ[at : at + size], qkv_CQ[:2]))
        tables_ = position_C, line_C, table_RP
        cache = k_PSNK, v_PSNK
        q_CHK = append_qkv(some_CQ, bias_Q, cos_XR, sin_XR, *tables_, *cache, h)
        out_CHK = decode_attention(q_CHK, *cache, table_RP, line_C, position_C, workspace=workspace)
        outs.append(out_CHK[:size])
        at += size
    assert at == count
    x_CJK = (qkv_CQ.double() + bias_Q.double()).unflatten(1, (-1, width))
    angle = cos_XR[:, None], sin_XR[:, None]
    q_HCK, k_HCK = (turned(x, *angle).transpose(0, 1) for x in x_CJK[:, : h + n].split((h, n), 1))
    v_HCK = x_CJK[:, h + n :].transpose(0, 1)
    k_HCK, v_HCK = (x.repeat_interleave(h // n, 0) for x in (k_HCK, v_HCK))
    hidden_CC = torch.ones(count, count, dtype=torch.bool, device=device).triu_(1)
    score_HCC = q_HCK @ k_HCK.mT * width**-0.5
    exact_HCK = score_HCC.masked_fill_(hidden_CC, -torch.inf).softmax(-1) @ v_HCK
    # A few dozen roundings of fp32, 6e-8 each, of numbers of about 1.
    torch.testing.assert_close(
        torch.cat(outs).double(), exact_HCK.transpose(0, 1), rtol=0, atol=1e-5
    )


def test_pages_beyond_int32(device: str) -> None:
    """The last page begins 16 GB behind the first. Virtual memory only, so on a CPU alone."""
    if device == "cuda":
        return
    cos_XR, sin_XR = tables(64, device)
    qkv_CQ = random(len(SLOTS), 5 * 64, dtype=BF16, device=device)
    near = [torch.zeros(9, SIZE, 1, 64, dtype=BF16) for _ in "kv"]
    far = [far_apart(x) for x in near]
    for cache in (near, far):
        append_qkv(qkv_CQ, None, cos_XR, sin_XR, *step(device), *cache, num_heads=3)
    for a, b in zip(near, far, strict=True):
        assert torch.equal(a, b)


def test_no_slots(device: str) -> None:
    cos_XR, sin_XR = tables(64, device)
    none_C = torch.zeros(0, dtype=torch.int32, device=device)
    cache = torch.zeros(2, SIZE, 1, 64, device=device)
    table_RP = torch.zeros(1, 1, dtype=torch.int32, device=device)
    qkv_CQ = torch.zeros(0, 5 * 64, device=device)
    arguments = qkv_CQ, None, cos_XR, sin_XR, none_C, none_C, table_RP, cache, cache, 3
    assert append_qkv(*arguments).shape == (0, 3, 64)


# -- bad input ---------------------------------------------------------------------------------

GOOD = {
    "qkv": torch.zeros(3, 40),
    "bias": torch.zeros(40),
    "cos": torch.zeros(9, 4),
    "sin": torch.zeros(9, 4),
    "position": torch.zeros(3, dtype=torch.int32),
    "line": torch.zeros(3, dtype=torch.int32),
    "table": torch.zeros(2, 3, dtype=torch.int32),
    "k": torch.zeros(5, SIZE, 1, 8),
    "v": torch.zeros(5, SIZE, 1, 8),
    "num_heads": 3,
}


def apart(x: Tensor) -> Tensor:
    """The same numbers, two elements apart."""
    return torch.stack((x, x), -1)[..., 0]


# What is changed, and what is said of it.
BAD: dict[str, tuple[dict[str, object], str]] = {
    "columns": ({"num_heads": 4}, r"qkv_CQ has shape \(3, 40\), expected \(C, 48\)"),
    "no heads": ({"num_heads": 0}, "num_heads 0"),
    "dtype": ({"qkv": GOOD["qkv"].half()}, "qkv_CQ .* torch.float16, expected"),
    "bias": ({"bias": torch.zeros(39)}, r"bias_Q has shape \(39,\), expected \(40\)"),
    "bias' dtype": ({"bias": torch.zeros(40, dtype=BF16)}, "bias_Q .* torch.bfloat16, expected"),
    "bias apart": ({"bias": apart(GOOD["bias"])}, "bias_Q has strides"),
    "cos": ({"cos": torch.zeros(9, 8)}, r"cos_XR has shape \(9, 8\), expected \(X, 4\)"),
    "sin": ({"sin": torch.zeros(8, 4)}, r"sin_XR has shape \(8, 4\), expected \(9, 4\)"),
    "cos' dtype": ({"cos": torch.zeros(9, 4, dtype=BF16)}, "cos_XR .* torch.bfloat16, expected"),
    "sin apart": ({"sin": apart(GOOD["sin"])}, r"sin_XR has strides .* sin_XR.contiguous\(\)"),
    "positions": ({"position": GOOD["position"][:2]}, r"position_C has shape \(2,\)"),
    "lines": ({"line": GOOD["line"].long()}, "line_C .* torch.int64, expected torch.int32"),
    "line apart": ({"line": apart(GOOD["line"])}, "line_C has strides"),
    "table": ({"table": GOOD["table"].long()}, "table_RP .* torch.int64, expected torch.int32"),
    "table apart": ({"table": apart(GOOD["table"])}, r"table_RP of .* table_RP.contiguous\(\)"),
    "k": ({"k": torch.zeros(5, SIZE, 8)}, r"k_PSNK has shape .* expected \(P, S, N, K\)"),
    "width": ({"k": torch.zeros(5, SIZE, 1, 7), "v": torch.zeros(5, SIZE, 1, 7)}, "even width"),
    "v": ({"v": torch.zeros(5, SIZE, 2, 8)}, r"v_PSNK has shape .* expected \(5, 16, 1, 8\)"),
    "v's dtype": ({"v": GOOD["v"].bfloat16()}, "v_PSNK .* torch.bfloat16, expected torch.float32"),
    "k apart": ({"k": apart(GOOD["k"])}, r"k_PSNK of .* k_PSNK.contiguous\(\)"),
    "device": ({"sin": GOOD["sin"].to("meta")}, "sin_XR .* on meta"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    changed, message = BAD[name]
    call: Callable[..., object] = append_qkv
    with pytest.raises(ValueError, match=message):
        call(*(GOOD | changed).values())
