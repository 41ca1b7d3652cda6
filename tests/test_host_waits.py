"""A training step never asks the device for a value: the host only launches."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from no_waiting import READERS, SEARCHERS, NoWaiting, WaitError
from s1fast.chat import Example
from s1fast.checkpoint import load_model
from s1fast.config import OptimConfig, TrainConfig
from s1fast.parallel import Layout
from s1fast.step import Trainer

CPU = torch.device("cpu")


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
