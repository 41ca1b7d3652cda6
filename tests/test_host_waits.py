"""A training step never asks the device for a value: the host only launches."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from s1fast.chat import Example
from s1fast.checkpoint import load_model
from s1fast.config import OptimConfig, TrainConfig
from s1fast.parallel import Layout
from s1fast.step import Trainer

CPU = torch.device("cpu")


class WaitError(Exception):
    """Raised where the host would wait for a device."""


READERS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")
"""Methods that hand a tensor's values to Python."""
SEARCHERS = ("nonzero", "equal", "unique", "masked_select")
"""Methods and functions; a mode does not see those that run inside our own operations."""
SIZED_BY_DATA = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "nonzero_numpy",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
    "_unique2",
}
"""Operations whose result, or its shape, the host must learn from the device."""


class NoWaiting(TorchDispatchMode):
    """Refuses every such operation, forward and backward."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if name in SIZED_BY_DATA or masks:
            raise WaitError(name)
        return func(*args, **(kwargs or {}))


def examples() -> list[Example]:
    return [
        Example(tuple(3 + (i * t) % 390 for t in range(n)), tuple(t > 2 for t in range(n)), "made")
        for i, n in enumerate((9, 30, 17, 24), 1)
    ]


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's tensors may not be read; the boundaries of sequences, int32, lie on the host.

    Replaced is what the head does on a CPU alone, after asking for the device: it looks whether the
    labelled rows are in range and whether the upstream gradient is 1.
    """

    def forbidden(owner: Any, name: str) -> Callable[..., Any]:
        original = getattr(owner, name)

        def read(x: Tensor, *arguments: Any, **options: Any) -> Any:
            if x.dtype == torch.int32:
                return original(x, *arguments, **options)
            raise WaitError(name)

        return read

    for owner, names in ((torch.Tensor, READERS + SEARCHERS), (torch, SEARCHERS)):
        for name in names:
            monkeypatch.setattr(owner, name, forbidden(owner, name))
    head = importlib.import_module("s1fast.kernels.linear_cross_entropy")
    monkeypatch.setattr(head, "_check_rows", lambda *arguments: None)
    monkeypatch.setattr(head, "_scaled", lambda x, scale: x * scale)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_a_step_reads_nothing(
    moments: Any, make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two streams and the update, on the code path that a GPU takes up to the kernels."""
    config = TrainConfig(
        batch_size=4, microbatch_tokens=60, optim=OptimConfig(lr=1e-2, moments=moments)
    )
    trainer = Trainer(config, load_model(make_model(), CPU, torch.float32), examples(), Layout(CPU))
    with monkeypatch.context() as patch, NoWaiting():
        forbid_reading(patch)
        results = [trainer.step(step) for step in range(2)]
    assert all(float(r.loss) > 0 and float(r.grad_norm) > 0 for r in results)
    assert trainer.optimizer.steps == 2


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool(x[0] > 0),
        lambda x: range(3)[x[0].long()],
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.nonzero(x),
        lambda x: torch.equal(x, x),
        lambda x: torch.repeat_interleave(x.long()),
        lambda x: x.unique(),
        lambda x: x.cpu(),
    ],
)
def test_what_waits_is_noticed(
    wait: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.ones(3)
    wait(x)
    with pytest.raises(WaitError), monkeypatch.context() as patch, NoWaiting():
        forbid_reading(patch)
        wait(x)
