"""The plain path on a CUDA device against the same on the CPU (make gpu)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from s1fast.chat import Example
from s1fast.checkpoint import load_model
from s1fast.decoder import Engine, SamplingParams
from s1fast.packing import pack_batch
from s1fast.step import stream_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def _loss_and_gradients(
    folder: Path, device: str, master: torch.dtype, compute: torch.dtype
) -> tuple[float, dict[str, torch.Tensor]]:
    model = load_model(folder, torch.device(device), master)
    model.compute_dtype = compute
    generator = torch.Generator().manual_seed(0)
    examples = []
    for n in (5, 130, 64):
        ids = torch.randint(3, 400, (n,), generator=generator).tolist()
        examples.append(Example(tuple(ids), (False,) + (True,) * (n - 1), "test"))
    loss = 0.0
    for stream in pack_batch(examples, "sample", [[0, 1], [2]]):
        partial = stream_loss(model, stream.to(torch.device(device)))
        partial.backward()
        loss += partial.item()
    return loss, {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    # fp32: reductions in another order, 2^-23 each, over a few hundred terms. bf16: 2^-8 per
    # rounding of activations, a handful of which add up along two layers.
    ("compute", "tolerance"),
    [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)],
)
def test_step_agrees_with_cpu(
    make_model: Callable[..., Path], compute: torch.dtype, tolerance: float
) -> None:
    """Loss and every gradient of a packed, accumulated step."""
    folder = make_model("qwen2", std=0.05)
    torch.backends.cuda.matmul.allow_tf32 = False
    expected, want = _loss_and_gradients(folder, "cpu", torch.float32, torch.float32)
    found, grads = _loss_and_gradients(folder, "cuda", torch.float32, compute)
    assert found == pytest.approx(expected, rel=tolerance)
    assert grads.keys() == want.keys()
    for name, grad in grads.items():
        error = (grad - want[name]).norm() / want[name].norm()
        assert error < tolerance, f"{name}: {error}"


def test_greedy_decoding_agrees_with_cpu(make_model: Callable[..., Path]) -> None:
    """fp32 tokens of ragged rows; the logits of this model lie far apart."""
    folder = make_model("llama")
    prompts = [list(range(3, 3 + n)) for n in (4, 11, 30)]
    params = SamplingParams(max_tokens=40)
    cpu = Engine(folder, device="cpu").generate(prompts, params)
    cuda = Engine(folder, device="cuda", dtype="float32").generate(prompts, params)
    assert [c.token_ids for c in cuda] == [c.token_ids for c in cpu]
