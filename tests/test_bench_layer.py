"""The bench of the decoder layer, on a CPU: what it counts, its reference, its providers."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from s1fast.bench import layer
from s1fast.bench.op import MissingError, Problem, parse_shape

CPU = torch.device("cpu")
OP = layer.OP


@pytest.fixture
def problem() -> Problem:
    return OP.make(parse_shape("SEQ24xCOUNT3", OP.cpu_sizes), CPU)


def test_counts_are_torchs_own_plus_the_causal_half_of_attention(problem: Problem) -> None:
    attention = problem.forward_flops
    *_, bounds, _, module = problem.arguments
    matrices = sum(p.numel() for p in module.parameters() if p.ndim == 2)
    lengths = bounds.diff().tolist()
    attention -= 2 * sum(lengths) * matrices
    assert attention == sum(2 * 4 * 16 * n * n for n in lengths)
    with FlopCounterMode(display=False) as counter:
        problem.full(OP.ours.build(problem))
    counted = counter.get_flop_counts()["Global"]
    products = sum(v for k, v in counted.items() if "s1fast" in str(k))
    assert problem.flops == products + 3.5 * attention


@pytest.mark.parametrize("name", ["s1fast", "s1fast, gate and up again", "torch eager"])
def test_providers_agree_with_the_reference(problem: Problem, name: str) -> None:
    """fp32 against fp64: sums of 80 terms, each rounding 6e-8, over a chain of seven products."""
    out, gradients = OP.reference(problem)
    (provider,) = (p for p in (OP.ours, *OP.peers) if p.name == name)
    found = problem.full(provider.build(problem))
    for what, a, b in [("out", found, out)] + [
        (leaf, problem.leaves[leaf].grad, gradients[leaf]) for leaf in problem.leaves
    ]:
        assert a is not None and b.dtype == torch.float64
        assert float((a.detach() - b).abs().max()) <= 2e-6 * float(b.abs().max()), what


@pytest.mark.parametrize("name", ["s1fast, compiled", "torch.compile"])
def test_compiled_providers_need_a_gpu(problem: Problem, name: str) -> None:
    (provider,) = (p for p in OP.peers if p.name == name)
    with pytest.raises(MissingError, match="timed on a GPU only"):
        provider.build(problem)
