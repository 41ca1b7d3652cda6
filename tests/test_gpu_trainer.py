"""The trainer's step on a CUDA device: it waits for nothing, and resumes bit for bit (make gpu)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from s1fast import snapshot
from s1fast.chat import Example
from s1fast.checkpoint import load_model
from s1fast.config import OptimConfig, TrainConfig
from s1fast.parallel import Layout
from s1fast.snapshot_writer import SnapshotWriter
from s1fast.step import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def trainer_of(folder: Path, device: str, moments: Any, compute: torch.dtype) -> Trainer:
    examples = [
        Example(tuple(3 + (i * t) % 390 for t in range(n)), tuple(t > 9 for t in range(n)), "made")
        for i, n in enumerate((90, 301, 170, 240, 65, 128, 33, 400), 1)
    ]
    optim = OptimConfig(lr=1e-3, moments=moments)
    config = TrainConfig(batch_size=4, microbatch_tokens=600, epochs=4, optim=optim)
    model = load_model(folder, torch.device(device), torch.float32)
    model.compute_dtype = compute
    return Trainer(config, model, examples, Layout(torch.device(device)))


def wide(make_model: Callable[..., Path]) -> Path:
    """Heads of 64, which our attention takes."""
    return make_model(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, std=0.05)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_a_step_waits_for_nothing(moments: str, make_model: Callable[..., Path]) -> None:
    """After a first step, which compiles kernels."""
    trainer = trainer_of(wide(make_model), "cuda", moments, torch.bfloat16)
    results = [trainer.step(0)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        results += [trainer.step(step) for step in range(1, 5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(float(r.grad_norm) > 0 and int(r.bad_labels) == 0 for r in results)


def test_sync_debug_mode_sees_a_wait() -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(3, device="cuda").sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_steps_agree_with_cpu(moments: str, make_model: Callable[..., Path]) -> None:
    """Eight steps in fp32: losses and norms to 1e-3, as roundings grow with the steps."""
    torch.backends.cuda.matmul.allow_tf32 = False
    curves = []
    for device in ("cpu", "cuda"):
        trainer = trainer_of(make_model("qwen2", std=0.05), device, moments, torch.float32)
        results = [trainer.step(step) for step in range(8)]
        curves.append([(float(r.loss), float(r.grad_norm)) for r in results])
    torch.testing.assert_close(torch.tensor(curves[1]), torch.tensor(curves[0]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_resume_is_exact(moments: str, make_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = wide(make_model)
    whole = trainer_of(folder, "cuda", moments, torch.bfloat16)
    for step in range(3):
        whole.step(step)
    with SnapshotWriter(tmp_path, keep=1) as writer:
        writer.save(3, whole.slices(), {})
    resumed = trainer_of(folder, "cuda", moments, torch.bfloat16)
    saved, _ = snapshot.newest(tmp_path, repair=False)
    assert saved is not None
    resumed.restore(saved)
    for trainer in (whole, resumed):
        for step in range(3, 6):
            trainer.step(step)
    theirs = resumed.slices()
    for name, ours in whole.slices().items():
        assert ours.tensor.equal(theirs[name].tensor), name
