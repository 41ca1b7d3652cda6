"""The rule that results are judged by, and the poison that shows what nobody wrote."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tolerances import check_against_eager


def exact() -> Tensor:
    return torch.randn(6, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_rounding_passes_and_more_does_not(dtype: torch.dtype, scale: float) -> None:
    """At any scale: two roundings more than eager's one pass, a coarser result does not."""
    values = exact() * scale
    eager, eps = values.to(dtype), torch.finfo(dtype).eps
    check_against_eager(eager, values, eager, "itself")
    check_against_eager((values * (1 + 0.9 * eps)).to(dtype), values, eager, "two roundings more")
    for name, wrong in {
        "coarse": values * (1 + 4 * eps),
        "zeros": values * 0,
        "negative": -values,
        "one wrong element": values.index_put((torch.tensor(3), torch.tensor(7)), values.max()),
    }.items():
        with pytest.raises(AssertionError, match=f"{name}: error"):
            check_against_eager(wrong.to(dtype), values, eager, name)


def test_an_exact_eager_allows_two_roundings() -> None:
    values = exact().bfloat16().double()
    eager = values.bfloat16()
    check_against_eager((values * (1 + 2.0**-8)).bfloat16(), values, eager, "one off")
    with pytest.raises(AssertionError, match=r"0 \(eager's error\)"):
        check_against_eager((values * (1 + 2.0**-5)).bfloat16(), values, eager, "four off")


def test_message_tells_where_and_how_much() -> None:
    values, eager = exact(), exact().float()
    found = eager.clone()
    found[2, 11] = 7.5
    with pytest.raises(AssertionError) as caught:
        check_against_eager(found, values, eager, "d weight")
    message = str(caught.value)
    assert "d weight: error" in message and "at [2, 11], where 7.5 was found" in message
    assert f"{float(values[2, 11]):.8g} is exact" in message
    assert "1 of 300 elements are beyond" in message


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite(value: float) -> None:
    values, eager = exact(), exact().float()
    spoilt = eager.clone()
    spoilt[5, 49] = value
    with pytest.raises(AssertionError, match=r"x: found is .* at \[5, 49\].* so are 1 of 300"):
        check_against_eager(spoilt, values, eager, "x")
    with pytest.raises(AssertionError, match="x: eager, the measure, is"):
        check_against_eager(eager, values, spoilt, "x")
    with pytest.raises(AssertionError, match="x: found is"):
        check_against_eager(eager, spoilt.double(), spoilt, "x")
    check_against_eager(spoilt, spoilt.double(), spoilt, "where it belongs")


def test_shapes_and_dtypes() -> None:
    values, eager = exact(), exact().float()
    for found, against, message in (
        (eager[:5], values, "found has shape"),
        (eager.bfloat16(), values, "found torch.bfloat16, eager torch.float32"),
        (eager, eager, "the exact result is torch.float32"),
    ):
        with pytest.raises(AssertionError, match=message):
            check_against_eager(found, against, eager, "x")
    check_against_eager(eager[:0], values[:0], eager[:0], "nothing")
    check_against_eager(eager.new_tensor(2.0), values.new_tensor(2.0), eager.new_tensor(2.0), "x")


# -- poison ------------------------------------------------------------------------------------


@torch.library.custom_op("s1fast_test::forgetful", mutates_args=())
def forgetful(x: Tensor) -> Tensor:
    """Writes every element but the last."""
    out = torch.empty_like(x)
    out[:-1] = x[:-1]
    return out


@pytest.mark.usefixtures("poisoned")
def test_poison() -> None:
    like = torch.zeros(3, 4, dtype=torch.bfloat16)
    for x in (
        torch.empty(1000),
        torch.empty(7, dtype=torch.float64),
        torch.empty_like(like),
        like.new_empty(5),
        torch.empty_strided((2, 3), (3, 1)),
        torch.zeros(2).resize_(100)[2:],
    ):
        assert x.isnan().all()
    for dtype in (torch.int32, torch.int64, torch.uint8):
        assert (torch.empty(100, dtype=dtype) == torch.iinfo(dtype).max).all()
    assert torch.empty(9, dtype=torch.bool).all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_poison_within_a_custom_operation(dtype: torch.dtype) -> None:
    out = forgetful(torch.ones(40, dtype=dtype))
    assert (out[:-1] == 1).all()
    last = out[-1]
    assert last.isnan() if dtype.is_floating_point else last == torch.iinfo(dtype).max


def test_poison_ends_with_its_test() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
