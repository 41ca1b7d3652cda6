"""The plan: its layout is the trainer's, its sums add up, its sources are told, it refuses well."""

from __future__ import annotations

import dataclasses
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from s1fast import fake_ranks, plan_report, published
from s1fast.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    OptimConfig,
    TrainConfig,
    load_recipe,
)
from s1fast.errors import InputError
from s1fast.fake_ranks import in_process, peak
from s1fast.metrics import layer_parameters, train_flops
from s1fast.model import ModelConfig, kept_bytes
from s1fast.plan import PlanConfig, dry_run, find_model, find_sequences, memory, outlook, plan
from s1fast.planner import Estimate, Machine, Sequences, estimate
from s1fast.rates import find_rates

QWEN = "Qwen/Qwen2.5-32B-Instruct"
S1 = PlanConfig(model=QWEN, data=DataConfig(path="simplescaling/s1K_tokenized"))
TWO_NODES = Machine("H100", 2)


def config32() -> ModelConfig:
    found = published.model_config(QWEN)
    assert found is not None
    return found


def estimated(config: PlanConfig = S1, machine: Machine = TWO_NODES, **rates: Any) -> Estimate:
    model = find_model(config.model)
    found = dataclasses.replace(find_rates(machine.gpu, Path("/nowhere")), **rates)
    return estimate(config, model, find_sequences(config, model), machine, found)


def said(config: PlanConfig) -> str:
    out = io.StringIO()
    plan(config, Console(file=out, width=200))
    return out.getvalue()


# -- what is published ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "billions"),
    [("0.5B", 0.49), ("1.5B", 1.54), ("3B", 3.09), ("7B", 7.62), ("14B", 14.77), ("32B", 32.76)],
)
def test_known_models_have_their_published_sizes(size: str, billions: float) -> None:
    """As the model cards state them; matrices only, so a few millions of biases are missing."""
    config = published.model_config(f"Qwen/Qwen2.5-{size}-Instruct")
    assert config is not None
    assert config.num_weights / 1e9 == pytest.approx(billions, rel=1e-2)


def test_published_lengths_are_those_of_the_histogram(shared_data: Path) -> None:
    found = json.loads((shared_data / "s1k_trace_length_histogram.json").read_text())["hist"]
    for dataset, name in (("simplescaling/s1K", "gemini"), ("simplescaling/s1K-1.1", "r1")):
        bars = [bar["count"] for bar in found[name]]
        counts = published.TRACES[dataset]
        assert list(counts) == bars[: len(counts)] and not any(bars[len(counts) :])
        lengths = published.sequence_lengths(f"{dataset}_tokenized")
        assert lengths is not None and len(lengths) == 1000
        mean = sum(b["count"] * (b["lo"] + b["hi"]) / 2 for b in found[name]) / 1000
        assert sum(lengths) / 1000 == pytest.approx(mean + published.AROUND_A_TRACE, abs=1)


# -- the sums ------------------------------------------------------------------------------------


def test_flops_are_the_formula_over_every_sequence_seen() -> None:
    """315 steps of 16: five epochs, each filled up with its first eight sequences."""
    one = estimated()
    assert (one.num_steps, one.ulysses) == (315, 8)
    data = find_sequences(S1, config32())
    epoch = train_flops(config32(), data.lengths, sum(data.labels))
    assert one.flops == pytest.approx(5 * epoch * 1.008, rel=2e-3)
    assert one.tokens == pytest.approx(27.7e6, rel=2e-3)
    assert one.imbalance < 1.01


def test_seconds_by_hand_for_one_sequence_on_one_gpu() -> None:
    """No network, nothing recomputed: FLOPs and bytes over rates, term by term."""
    model = published.model_config("Qwen/Qwen2.5-0.5B")
    assert model is not None
    one = PlanConfig(model="Qwen/Qwen2.5-0.5B", data=DataConfig(path="x"), batch_size=1, epochs=1)
    rates = find_rates("H100", Path("/nowhere"))
    n, labels = 3000, 2900
    found = estimate(one, model, Sequences([n], [labels], ""), Machine("H100", 1, 1), rates)
    s, layers = found.seconds, model.num_hidden_layers
    gemm, byte_s = rates.gemm.value * 1e12, n * 2 / rates.memory.value / 1e9
    assert s.gemm == pytest.approx(layers * 6 * layer_parameters(model) * n / gemm)
    assert s.head == pytest.approx(6 * model.vocab_size * model.hidden_size * labels / gemm)
    scores = 2 * 14 * 64 * n * n * layers / 1e12
    both = scores / rates.attention_forward.value + 2.5 * scores / rates.attention_backward.value
    assert s.attention == pytest.approx(both)
    numbers = 2 * (2 + 5) * 896 + 2 * 2 * 18 * 64 + 9 * 4864
    assert s.memory_bound == pytest.approx(layers * numbers * byte_s)
    update = 32 * model.num_weights / rates.memory.value / 1e9  # 28 bytes, and 4 for the norm
    assert s.optimizer == pytest.approx(update)
    assert s.ulysses == s.exposed == s.contention == s.recomputed == 0
    assert s.low == s.high == pytest.approx(sum(vars(s).values()))
    assert found.mfu[0] == pytest.approx(found.flops / s.high / 989e12)
    assert found.dollars[0] == pytest.approx(s.low / 3600 * rates.price.value)


def test_a_slower_network_shows_where_compute_no_longer_hides_it() -> None:
    fast = estimated()
    rates = find_rates("H100", Path("/nowhere"))
    slow = estimated(fabric=dataclasses.replace(rates.fabric, value=20.0))
    assert slow.seconds.gemm == fast.seconds.gemm
    moved = 64 * layer_parameters(config32()) * 15 / 16 * (2 + 2 + 4) / 20e9  # gathers and scatter
    step = slow.seconds.low / 315
    assert step == pytest.approx(moved, rel=0.1)  # the network alone sets the time


def test_recomputing_costs_what_it_computes() -> None:
    full = estimated(dataclasses.replace(S1, recompute="full"))
    none = estimated(dataclasses.replace(S1, recompute="none"))
    assert set(full.layers) == {"full"} and set(none.layers) == {"none"}
    forward = (full.seconds.gemm - 0) / 3
    assert full.seconds.recomputed > forward  # the products, and the rest of the layer
    assert full.seconds.low > 1.25 * none.seconds.low
    auto = estimated()
    assert none.seconds.low < auto.seconds.low < full.seconds.low
    assert auto.fits and full.fits and not none.fits


# -- rates ---------------------------------------------------------------------------------------


def result(device: str, copy_gb_s: float, stamp: str, **more: Any) -> dict[str, Any]:
    shape = {
        "op": "packed_attention",
        "shape": "S4700",
        "flops": 35e12,
        "forward_flops": 10e12,
        "measurements": [
            {
                "provider": "s1fast",
                "status": "ok",
                "tflops": {"forward": 500.0, "backward": 250.0, "full": 292.0},
            }
        ],
    }
    roofs = {"copy_gb_s": copy_gb_s, "void": False, **more}
    environment = {"device": device, "timestamp": stamp}
    return {"environment": environment, "roofs": roofs, "shapes": [shape]}


def test_measured_rates_replace_assumed_ones(tmp_path: Path) -> None:
    """The newest of that GPU; a run that was too slow to say anything is passed over."""
    files = {
        "b.json": result("NVIDIA H100 80GB HBM3", 2900.0, "2026-01-01"),
        "a.json": result("NVIDIA H100 80GB HBM3", 2950.0, "2026-01-02"),
        "void.json": result("NVIDIA H100 80GB HBM3", 100.0, "2026-01-03", void=True),
        "other.json": result("NVIDIA H200", 4100.0, "2026-01-04"),
        "pcie.json": result("NVIDIA H100 PCIe", 1800.0, "2026-01-07"),
        "cpu.json": {"environment": {"device": "CPU", "timestamp": "2026-01-05"}},
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    rates = find_rates("H100", tmp_path, dollars_per_hour=2.0)
    assert rates.memory.value == 2950.0 and rates.memory.measured and "a.json" in str(rates.memory)
    assert (rates.attention_forward.value, rates.attention_backward.value) == (500.0, 250.0)
    assert not rates.gemm.measured and "assumed" in str(rates.gemm)
    steps = result("NVIDIA H100 80GB HBM3", 2960.0, "2026-01-06")
    (tmp_path / "step.json").write_text(json.dumps(steps | {"rates": {"gemm": 612.0}}))
    gemm = find_rates("H100", tmp_path).gemm
    assert (gemm.value, gemm.measured) == (612.0, True) and "layer step, step.json" in str(gemm)
    assert rates.price.value == 2.0
    assert find_rates("H200", tmp_path).memory.value == 4100.0


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    torn = result("NVIDIA H100 80GB HBM3", 2900.0, "2026-01-01")
    del torn["shapes"][0]["measurements"][0]["tflops"]["backward"]
    (tmp_path / "torn.json").write_text(json.dumps(torn))
    with pytest.raises(InputError, match=r"torn\.json: no result of the bench: .*backward"):
        find_rates("H100", tmp_path)
    assert not find_rates("H200", tmp_path).memory.measured
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match=r"broken\.json: no result of the bench"):
        find_rates("H100", tmp_path)


# -- memory --------------------------------------------------------------------------------------


def small() -> ModelConfig:
    return dataclasses.replace(
        config32(),
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
    )


def test_few_layers_foretell_many() -> None:
    """The extrapolated peak is that of the whole model, to one part in 200: allocations are rounded
    up to whole blocks, and a layer's place among the others decides what is in flight beside it."""
    config, tokens = small(), 4096
    policies: tuple[Any, ...] = ("gate_up",) * 3 + ("none",) * 5
    foretold = sum(peak(config, 4, 2, tokens, policies).values())
    (whole,) = in_process(config, 4, 2, tokens, [policies])
    assert foretold == pytest.approx(sum(whole.values()), rel=5e-3)


def test_what_a_layer_keeps_is_what_is_tracked() -> None:
    """From two and from four layers: the bytes that the trainer's choice of recomputation uses."""
    config, tokens = small(), 4096
    two, four = in_process(config, 4, 1, tokens, [["none"] * 2, ["none"] * 4])
    layer = (four["act"] - two["act"]) / 2 / tokens
    assert layer == pytest.approx(kept_bytes(config, "none", torch.bfloat16), rel=0.01)


@pytest.mark.slow
def test_few_layers_foretell_the_whole_32b() -> None:
    one = estimated()
    foretold = sum(peak(config32(), 16, 8, one.most_tokens, one.worst).values())
    (whole,) = in_process(config32(), 16, 8, one.most_tokens, [one.worst])
    assert foretold == pytest.approx(sum(whole.values()), rel=5e-3)


def test_a_simulation_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_ranks.sys, "executable", "/bin/false")
    with pytest.raises(InputError, match="16 ranks could not be simulated"):
        in_process(small(), 16, 8, 128, [["none"]])


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture
def tracked(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What the tracker would have found, without asking it."""
    found = {"act": 40e9, "temp": 1e9, "all_gather": 1e9, "sharded_grad": 0.2e9}
    monkeypatch.setattr("s1fast.plan.peak", lambda *_: found)
    return found


def test_the_whole_plan_in_under_a_minute(tmp_path: Path) -> None:
    start = time.perf_counter()
    config = dataclasses.replace(S1, png=tmp_path / "out" / "plan.png")
    config = dataclasses.replace(config, optim=OptimConfig(moments="bfloat16"))
    text = said(config)
    assert time.perf_counter() - start < 60
    assert "32,762,757,120 weights" in text and "315 steps" in text
    for part in ("matrix products", "exposed communication", "kept for backward", "4 x 8 H200"):
        assert part in text
    rates = find_rates("H100", Path("/nowhere"))
    for name, rate in rates.items():
        assert any(name in line and rate.source in line for line in text.splitlines())
    assert "plan       2 x 8 H100: " in text
    assert (tmp_path / "out" / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_memory_counts_states_and_the_fuller_moment(tracked: dict[str, float]) -> None:
    one = estimated()
    parts = memory(S1, config32(), one)
    share = config32().num_weights / 16
    assert parts["weights, fp32"] == 4 * share and parts["moments, float32"] == 8 * share
    assert parts["kept for backward"] == 40e9 and parts["gradients"] == 0.2e9
    tracked["act"] = 64e6  # what is kept is next to nothing: gradients fill the other moment
    parts = memory(S1, config32(), one)
    assert parts["kept for backward"] == 1e6 and parts["gradients"] == 4 * share


def test_what_does_not_fit_is_refused_with_the_remedy(tracked: dict[str, float]) -> None:
    tracked["act"] = 90e9
    out = io.StringIO()
    with pytest.raises(
        InputError, match=r"does not fit: .* try optim\.moments = \"bfloat16\""
    ) as e:
        plan(S1, Console(file=out, width=200))
    assert "other machines: " in str(e.value) and "4 x 8 H100" in str(e.value)
    assert "kept for backward" in out.getvalue()  # the plan is shown all the same


@pytest.mark.parametrize(
    ("changes", "naming"),
    [
        ({"model": "someone/else"}, r"model: 'someone/else' is no local folder.*config\.json"),
        ({"data": DataConfig(path="some/data")}, "data.path: 'some/data'.*--lengths"),
        ({"nodes": 0}, "nodes: must be at least 1"),
        ({"gpus_per_node": -1}, "gpus_per_node: must be at least 1"),
        ({"batch_size": 0}, "batch_size: must be at least 1"),
        ({"lengths": Path("/nowhere/lengths")}, "/nowhere/lengths"),
        ({"dtype": "float32"}, "dtype: only bfloat16 can be planned"),
        ({"results": Path("/nowhere")}, "results: /nowhere is no folder"),
        (
            {"data": DataConfig(path="simplescaling/s1K", max_length=4096)},
            "862 sequences are above the limit of 4096",
        ),
    ],
)
def test_what_is_missing_is_named(changes: dict[str, Any], naming: str) -> None:
    with pytest.raises(InputError, match=naming):
        plan(dataclasses.replace(S1, **changes), Console(file=io.StringIO()))


def test_lengths_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text("5000\n\n 700 \n")
    config = dataclasses.replace(S1, lengths=path)
    assert list(find_sequences(config, config32()).lengths) == [5000, 700]
    for wrong in ("many", "0", "-3", "9" * 5000):
        path.write_text(f"5000\n{wrong}\n")
        with pytest.raises(InputError, match=r"lengths\.txt: line 2: expected a count"):
            find_sequences(config, config32())
    path.write_text("\n")
    with pytest.raises(InputError, match="no lengths"):
        find_sequences(config, config32())


def test_real_data_are_tokenised(
    make_model: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    folder = make_model()
    rows = write_rows(
        [{"text": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"}]
    )
    config = PlanConfig(model=str(folder), data=DataConfig(path=str(rows)))
    found = find_sequences(config, find_model(str(folder)))
    assert len(found.lengths) == 1 and 0 < found.labels[0] < found.lengths[0]


def test_dry_run_prints_the_plan(
    tracked: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, however many ranks there are."""
    recipe = TrainConfig(
        model=QWEN,
        data=S1.data,
        dry_run=True,
        checkpoint=CheckpointConfig(every=5),
        log=LogConfig(dollars_per_hour=1.5),
    )
    out = io.StringIO()
    dry_run(recipe, Console(file=out, width=200))
    assert "plan       2 x 8 H100: " in out.getvalue()
    assert "1.5 $ a GPU-hour, assumed: log.dollars_per_hour" in out.getvalue()
    monkeypatch.setenv("RANK", "1")
    dry_run(recipe, Console(file=(silent := io.StringIO())))
    assert not silent.getvalue()


def test_the_outlook_is_the_plans_last_line() -> None:
    """What the demo ends with: the same figures, and that nothing was measured."""
    recipe = load_recipe(Path(__file__).parent.parent / "recipes" / "s1-32b.toml")
    text = outlook(recipe)
    one = estimated(dataclasses.replace(S1, optim=recipe.optim, log=recipe.log))
    assert text == f"{plan_report.headline(one)}; planned, every rate assumed"
    assert text.startswith("2 x 8 H100: 10m")


def test_parts_of_the_report_are_those_of_the_sum() -> None:
    parts = set(plan_report._PARTS)
    assert parts | {"contention"} == set(vars(estimated().seconds))
