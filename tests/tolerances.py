"""How far a result in some dtype may lie from the exact one: no further than PyTorch's own, twice.

    max|found - exact| <= 2 max|eager - exact| + eps(dtype) max|exact|

The eager error is what that dtype, those shapes and those values cost anybody; two of them, since
another order of the same sums rounds differently. The last term, two roundings of the largest
element, is there for the case in which eager happens to be exact. It grows with the values, so it
never admits zeros where small numbers belong.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_against_eager(found: Tensor, exact: Tensor, eager: Tensor, what: str) -> None:
    """Asserts the rule above.

    Args:
        found: what is tested.
        exact: the same in float64.
        eager: plain PyTorch's result in the dtype of `found`.
        what: name of the result, for the message.
    """
    assert exact.dtype == torch.float64, f"{what}: the exact result is {exact.dtype}"
    for name, x in (("found", found), ("eager", eager)):
        shapes = f"{name} has shape {tuple(x.shape)}, exact {tuple(exact.shape)}"
        assert x.shape == exact.shape, f"{what}: {shapes}"
    assert found.dtype == eager.dtype, f"{what}: found {found.dtype}, eager {eager.dtype}"
    if not exact.numel():
        return
    exact = exact.detach()
    wide, measure = (x.detach().to(exact.device).double() for x in (found, eager))
    _check_not_finite(measure, exact, f"{what}: eager, the measure,")
    _check_not_finite(wide, exact, f"{what}: found")
    error, allowed = _error(wide, exact), _error(measure, exact)
    slack = torch.finfo(found.dtype).eps * float(exact.where(exact.isfinite(), 0.0).abs().max())
    bound = 2 * float(allowed.max()) + slack
    where, at = _worst(error)
    assert float(error.max()) <= bound, (
        f"{what}: error {float(error.max()):.3g} at {where}, where {float(wide.flatten()[at]):.8g} "
        f"was found and {float(exact.flatten()[at]):.8g} is exact; at most {bound:.3g} = "
        f"2 x {float(allowed.max()):.3g} (eager's error) + {slack:.3g}; "
        f"{int((error > bound).sum())} of {error.numel()} elements are beyond"
    )


def _check_not_finite(x: Tensor, exact: Tensor, what: str) -> None:
    """NaN and infinities belong exactly where the exact result has the same ones."""
    special = ~exact.isfinite() | ~x.isfinite()
    wrong = special & ~((x == exact) | (x.isnan() & exact.isnan()))
    where, at = _worst(wrong)
    assert not wrong.any(), (
        f"{what} is {float(x.flatten()[at])} at {where}, where {float(exact.flatten()[at]):.8g} is "
        f"exact; so are {int(wrong.sum())} of {wrong.numel()} elements"
    )


def _error(x: Tensor, exact: Tensor) -> Tensor:
    return (x - exact).abs().where(exact.isfinite(), 0.0)


def _worst(error: Tensor) -> tuple[list[int], int]:
    """Where the largest element lies: its index, and its index in the flattened tensor."""
    at = error.flatten().double().argmax()
    return [int(i) for i in torch.unravel_index(at, error.shape)], int(at)
