"""The benches of whole steps, on a CPU: their code path, and what they make of measurements."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from s1fast.bench import layer_step, single_gpu_sft
from s1fast.bench.layer_step import full_shape, measured_rates, project, small_shape, step_mfu
from s1fast.bench.single_gpu_sft import MEASURED, WARM_UP, Variant, make, ours, outcome, theirs
from s1fast.kernels.packed_attention import packed_attention
from s1fast.metrics import layer_parameters, train_flops
from s1fast.parallel import leave
from s1fast.rates import assumed_rates

CPU = torch.device("cpu")


# -- the step of one GPU of sixteen ----------------------------------------------------------------


def test_a_gpus_share_of_a_step() -> None:
    """About 5K tokens of linears, 40K of attention, in whole tiles."""
    shape = full_shape()
    assert 4500 < shape.tokens < 6000
    assert sum(shape.lengths) == 8 * shape.tokens and shape.tokens % 16 == 0
    assert min(shape.lengths) > 0 and len(shape.lengths) in range(6, 11)


def test_the_whole_path_on_a_cpu() -> None:
    lines = layer_step.report(small_shape(), CPU, save_result=False)
    text = "\n".join(lines)
    for name in ("layer none", "layer gate_up", "layer full", "layer plain", "attention", "update"):
        assert name in text
    assert "not projected: the rates of" in text


def made_up(shape: layer_step.Shape) -> dict[str, float]:
    """Milliseconds of a GPU with round rates: 700, 600, 500 and 400 TFLOP/s, 3,000 GB/s."""
    m, t = shape.model, shape.tokens
    scores = 2 * 5 * 128 * sum(n * n for n in shape.lengths)
    forward, backward = scores / 500e9, 2.5 * scores / 400e9
    numbers = 14 * 5120 + 9 * 27648 + 4 * 56 * 128
    layer = 6 * layer_parameters(m) * t / 700e9 + forward + backward + 2 * numbers * t / 3000e6
    return {
        "attention forward": forward,
        "attention": forward + backward,
        "layer none": layer,
        "layer plain": layer + 1.0,
        "layer compiled": layer - 0.1,
        "head": 6 * 152064 * 5120 * t / 600e9,
        "head plain": 60.0,
        "update": 16.0,
        "update torch": 25.0,
    }


def test_rates_are_those_that_the_measurements_had() -> None:
    shape = full_shape()
    found = measured_rates(shape, made_up(shape), 3000.0)
    expected = {"gemm": 700, "head": 600, "attention_forward": 500, "attention_backward": 400}
    assert found == pytest.approx({**expected, "memory": 3000})


def test_what_is_projected_from_them() -> None:
    """Each trick taken away costs what it measured, 315 steps long; compiling gains here."""
    shape = full_shape()
    ms = made_up(shape)
    base = assumed_rates("H100")
    named = {
        name: dataclasses.replace(getattr(base, name), value=value)
        for name, value in measured_rates(shape, ms, 3000.0).items()
    }
    one, without = project(shape, ms, dataclasses.replace(base, **named), "H100")
    low, high = without["as it is"]
    assert (low, high) == (one.seconds.low / 60, one.seconds.high / 60) and 8 < low < high < 14
    assert without["one sequence a rank, no balance"][0] / low == pytest.approx(1.42, abs=0.02)
    assert 1.2 < without["everything computed again"][0] / low < 1.34
    for name, ms_a_step in (
        ("plain norms, rope, activation", 64 * 1.0),
        ("plain head and loss", 60.0 - ms["head"]),
        ("torch's fused AdamW", 9.0),
        ("compiled layers", -64 * 0.1),
    ):
        assert without[name][0] - low == pytest.approx(315 * ms_a_step / 60e3)
        assert without[name][1] - high == pytest.approx(315 * ms_a_step / 60e3)


def test_mfu_counts_what_training_counts() -> None:
    """64 layers, head and update on a rank: an eighth of what the node's sequences cost."""
    shape = full_shape()
    ms = made_up(shape)
    flops = train_flops(shape.model, shape.lengths, sum(shape.lengths)) / 8
    total_ms = 64 * ms["layer none"] + ms["head"] + ms["update"]
    assert step_mfu(shape, ms, 989.0) == pytest.approx(flops / total_ms / 1e9 / 989.0)


# -- full fine-tuning on one GPU -------------------------------------------------------------------


@pytest.fixture
def problem() -> Iterator[single_gpu_sft.Problem]:
    yield make(True, CPU)
    leave()


def test_every_variant_is_listed_with_its_time_or_its_reason() -> None:
    lines = single_gpu_sft.report(make(True, CPU), save_result=False)
    assert sum("transformers, " in line for line in lines) == 16
    timed = [line for line in lines if "s/step" in line]
    assert len(timed) == 5 and "s1fast" in timed[0]
    assert all("RuntimeError: timed on a GPU only" in line for line in lines[6:18])
    assert "ours over the best of theirs" in lines[-1]


def test_ligers_kernels_reach_only_their_own_variants() -> None:
    """They are put into transformers' classes and stay there, so whoever has them comes last."""
    with_liger = [variant.liger for variant in single_gpu_sft.variants(liger=True)]
    assert with_liger == [False] * 16 + [True] * 16
    assert not any(variant.liger for variant in single_gpu_sft.variants(liger=False))


def test_peers_can_be_chosen() -> None:
    problem = make(True, CPU, "1.5B", "full")
    assert (problem.config.recompute, problem.model.num_attention_heads) == ("full", 4)
    lines = single_gpu_sft.report(problem, ["sdpa, one sequence, recompute"], save_result=False)
    assert [line for line in lines if "s/step" in line][1].split("  ")[1].endswith("recompute")
    lines = single_gpu_sft.report(problem, [], save_result=False)
    assert not any("transformers" in line for line in lines)


def test_transformers_keeps_packed_sequences_apart(problem: single_gpu_sft.Problem) -> None:
    """So packed and one at a time are the same training: the first losses agree to fp32."""
    losses = []
    for packed in (True, False):
        step = theirs(problem, Variant("sdpa", False, False, packed, False))
        losses.append([step(number) for number in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_varlen_attention_is_told_of_boundaries_and_groups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its kernel needs a GPU: a stand-in shows that what it is given means the same attention."""
    from transformers import AttentionInterface

    def stand_in(q, k, v, cu_q, cu_k, max_q, max_k, window_size):
        assert torch.equal(cu_q, cu_k) and max_q == max_k == 4 and window_size == (-1, 0)
        return packed_attention(q, k, v, cu_q, max_q, backend="reference")

    module = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(module, "varlen_attn", stand_in)
    bounds = [torch.tensor([0, 3, 7], dtype=torch.int32), 4]
    name = single_gpu_sft._register_varlen(bounds)
    q, k, v = torch.randn(1, 4, 7, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    out, _ = AttentionInterface()[name](None, q, k, v, None)
    rows = [x[0].transpose(0, 1).bfloat16() for x in (q, k, v)]
    expected = packed_attention(*rows, *bounds, backend="reference")
    assert torch.equal(out[0], expected)


def test_a_variant_that_fails_gives_its_reason(problem: single_gpu_sft.Problem) -> None:
    def build():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB\nmore")

    found = outcome("x", problem, build)
    assert found.step_s is None
    assert found.reason == "OutOfMemoryError: CUDA out of memory. Tried to allocate 80 GiB"


def test_ours_is_the_trainers_own_step(problem: single_gpu_sft.Problem) -> None:
    found = outcome("s1fast", problem, lambda: ours(problem))
    assert found.reason == "" and found.step_s is not None
    assert found.loss == pytest.approx(torch.tensor(128.0).log().item(), rel=0.02)
    assert WARM_UP >= 1 and MEASURED >= 1
