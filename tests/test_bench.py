"""The bench, on a CPU: what it times, in which order, what it concludes, writes and refuses."""

from __future__ import annotations

import copy
import csv
import itertools
import json
import os
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from s1fast import cli
from s1fast.bench import (
    environment,
    kernels,
    linear_cross_entropy,
    providers,
    report,
    tables,
    timing,
)
from s1fast.bench import roofs as roofs_module
from s1fast.bench.op import parse_shape, shape_name
from s1fast.bench.roofs import Roofs, judge, lines, roofs
from s1fast.bench.timing import Call, balanced_order, interleaved
from s1fast.errors import InputError

CPU = torch.device("cpu")
OP = linear_cross_entropy.OP
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# -- timing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 8))
def test_order_is_balanced(n: int) -> None:
    """Everybody in every place equally often, and behind everybody else equally often."""
    names = [f"p{i}" for i in range(n)]
    orders = [balanced_order(names, r) for r in range(2 * n)]
    assert all(sorted(order) == names for order in orders)
    places = Counter((name, i) for order in orders for i, name in enumerate(order))
    assert set(places.values()) == {2} and len(places) == n * n
    pairs = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert len(pairs) == n * (n - 1) and len(set(pairs.values())) <= 1


class Clock:
    """Stands still but for what calls add to it, in seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.seen: list[str] = []
        monkeypatch.setattr(timing, "perf_counter", lambda: self.now)

    def call(self, name: str, durations: list[float], before: float = 0.0) -> Call:
        left = iter(durations)

        def prepare() -> str:
            self.now += before
            return f"state of {name}"

        def run(state: str) -> None:
            assert state == f"state of {name}"
            self.seen.append(name)
            self.now += next(left)

        return Call(run, prepare)


def test_quantiles_on_a_fake_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Preparing takes a second and is not counted; quantiles are numpy's linear ones."""
    clock = Clock(monkeypatch)
    durations = {"a": [0.004, 0.001, 0.010, 0.002, 0.003, 0.007], "b": [0.5] * 6}
    calls = {name: clock.call(name, d, before=1.0) for name, d in durations.items()}
    found = interleaved(calls, {"a": 6, "b": 6})
    for name, seconds in durations.items():
        want = np.quantile(np.array(seconds) * 1e3, [0.5, 0.2, 0.8])
        one = found[name]
        assert [one.median_ms, one.q20_ms, one.q80_ms] == pytest.approx(list(want), rel=1e-9)
        assert one.rounds == 6
    assert [clock.seen[i : i + 2] for i in range(0, 12, 2)] == [
        balanced_order(["a", "b"], r) for r in range(6)
    ]


def test_slow_calls_sit_out_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    calls = {"fast": clock.call("fast", [0.1] * 9), "slow": clock.call("slow", [1.0] * 3)}
    found = interleaved(calls, {"fast": 9, "slow": 3})
    assert (found["fast"].rounds, found["slow"].rounds) == (9, 3)
    fast_before = [clock.seen[:i].count("fast") for i, n in enumerate(clock.seen) if n == "slow"]
    gaps = [b - a for a, b in itertools.pairwise(fast_before)]
    assert len(gaps) == 2 and all(2 <= gap <= 4 for gap in gaps)
    assert interleaved({}, {}) == {}


def test_measure_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    call = clock.call("x", [9.0, 9.0, 0.1, 0.3, 0.2])
    found = timing.measure(lambda: call.run("state of x"), warmup=2, repeats=3)
    assert found.median_ms == pytest.approx(200) and found.rounds == 3
    assert timing.summary([0.5]) == timing.Timing(500, 500, 500, 1)


# -- roofs ---------------------------------------------------------------------------------------


def test_roofs_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of each kind, in plausible units; a smaller product keeps this short."""
    monkeypatch.setattr(roofs_module, "_CPU_GEMMS", ((96, 64, 32), (256, 256, 256)))
    found = roofs()
    for name, rate in found.rates().items():
        assert rate == max(found.variants[name].values())
    assert len(found.rates()) == 4
    assert set(found.variants["gemm_float32_tflops"]) == {"96 x 64 x 32", "256 x 256 x 256"}
    assert 0.2 < found.read_gb_s < 2000 and 0.2 < found.copy_gb_s < 2000
    assert 1e-4 < found.gemm_float32_tflops < 100
    assert found.gemm_tflops(torch.float32) == found.gemm_float32_tflops
    assert found.states == {"before": None, "loaded": None, "after": None}
    assert not found.void and "not applicable" in found.void_reason
    text = list(lines(found))
    assert len(text) == 5 and text[-1].startswith("not void: not applicable")


SXM = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    ("device", "read", "gemm", "void", "reason"),
    [
        (SXM, 2700, 720, False, "at least 2700 GB/s"),
        (SXM, 2699, 720, True, "reads 2699 GB/s, below 2700"),
        (SXM, 2700, 719, True, "bf16 GEMM 719 TFLOP/s, below 720"),
        (SXM, 1, 1, True, "reads 1 GB/s, below 2700; bf16 GEMM 1 TFLOP/s"),
        ("NVIDIA H100 PCIe", 1, 1, False, "not applicable"),
        ("NVIDIA H100 NVL", 1, 1, False, "not applicable"),
        ("NVIDIA H200", 1, 1, False, "not applicable"),
        ("AMD EPYC, 2 cores", 1, 1, False, "not applicable"),
    ],
)
def test_void_rule(device: str, read: float, gemm: float, void: bool, reason: str) -> None:
    found, text = judge(device, read, gemm)
    assert found is void and reason in text


def test_state_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers, what is not told as None, reasons by name; an old driver's name for them too."""
    assert environment.gpu_state() is None
    answers = {
        "clocks_event_reasons.active": None,  # unknown to an old driver
        "clocks_throttle_reasons.active": ["1755", "2619", "698.1", "[N/A]", "64", "0x0000000024"],
    }
    monkeypatch.setattr(environment, "_query_gpu", lambda fields: answers[fields[-1]])
    assert environment.gpu_state() == {
        "sm_clock_mhz": 1755.0,
        "memory_clock_mhz": 2619.0,
        "power_w": 698.1,
        "power_limit_w": None,
        "temperature_c": 64.0,
        "throttle_reasons": ["power cap", "thermal (software)"],
    }


STREAMS = """
import functools, operator, torch
from s1fast.bench import streams
words = torch.Generator().manual_seed(0)
for variant in streams.VARIANTS[:2]:
    x = torch.zeros(19 * variant[0], dtype=torch.int32)  # several turns of each program
    places = torch.randperm(len(x), generator=words)[:32]
    x[places] = 1 << torch.arange(32, dtype=torch.int32)  # every bit once, somewhere
    y = torch.zeros_like(x)
    streams.copy(x, y, variant)
    assert torch.equal(x, y)
    assert functools.reduce(operator.or_, streams.read(x, variant).tolist()) == -1
    x[places[7]] = 0
    assert functools.reduce(operator.or_, streams.read(x, variant).tolist()) == ~(1 << 7)
"""


def fresh(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    env = {**os.environ, **variables}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def test_streams_read_every_word() -> None:
    """In Triton's interpreter: no word is left out of a read or a copy."""
    pytest.importorskip("triton")
    done = fresh(STREAMS, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


# -- the operation -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["T40xD8xV50", "T40xD8xV50xmasked30xpeaked"])
def test_reference_is_the_mean(shape: str) -> None:
    """Loss and gradients of torch's own cross-entropy in fp64; gradients were rounded to fp32."""
    problem = OP.make(parse_shape(shape, OP.cpu_sizes), CPU)
    hidden, weight, label, loss_weight, valid = problem.arguments
    assert (label == -100).sum() == (12 if "masked" in shape else 0)
    assert torch.equal(valid, (label != -100).nonzero()[:, 0])
    assert loss_weight.sum().item() == pytest.approx(1)
    assert problem.flops == 6 * len(valid) * 50 * 8
    loss, gradients = OP.reference(problem)
    x, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    expected = F.cross_entropy(x @ w.T, label)
    expected.backward()
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)
    for found, leaf in ((gradients["hidden"], x), (gradients["weight"], w)):
        assert leaf.grad is not None
        torch.testing.assert_close(found.double(), leaf.grad, rtol=1e-5, atol=1e-8)


def test_peaked_logits_are_peaked() -> None:
    """Labels come from the model's own distribution: its loss is its entropy, well below log V."""
    sizes = parse_shape("T2000xD64xV500", OP.cpu_sizes)
    losses = {}
    for peaked in (0, 1):
        hidden, weight, label, _, _ = OP.make({**sizes, "peaked": peaked}, CPU).arguments
        logprob = (hidden @ weight.T).log_softmax(-1).detach()
        losses[peaked] = F.nll_loss(logprob, label).item()
        entropy = -(logprob.exp() * logprob).sum(-1).mean().item()
        if peaked:
            assert losses[peaked] == pytest.approx(entropy, abs=0.15)
    assert losses[1] < 3 < np.log(500) < losses[0]


def test_shapes_by_name() -> None:
    defaults = {"T": 4, "D": 2, "masked": 0, "peaked": 0}
    assert parse_shape("T7", defaults) == {"T": 7, "D": 2, "masked": 0, "peaked": 0}
    assert parse_shape("D3xpeakedxmasked50", defaults)["masked"] == 50
    for sizes in ({**defaults, "peaked": 1}, {**defaults, "masked": 25}, defaults):
        assert parse_shape(shape_name(sizes), defaults) == sizes
    assert shape_name({**defaults, "peaked": 1, "masked": 50}) == "T4xD2xmasked50xpeaked"
    for op in kernels.OPS:
        for text in op.gpu_shapes + op.cpu_shapes:
            parse_shape(text, op.cpu_sizes)


def test_relative_errors_by_hand() -> None:
    wanted = torch.tensor([3.0, -4.0, 0.0])
    found = providers.relative_errors(torch.tensor([3.0, -4.5, 1.0]), wanted)
    assert found == {"max": pytest.approx(1 / 4), "norm": pytest.approx(1.25**0.5 / 5)}
    lost = providers.relative_errors(torch.tensor([3.0, float("nan"), 0.0]), wanted)
    assert lost == {"max": None, "norm": None}
    assert providers.is_wrong({"x": lost}, torch.float32)
    assert not providers.is_wrong({"x": {"max": 1e-4, "norm": 0.0}}, torch.float32)
    assert providers.is_wrong({"x": {"max": 1.1e-4, "norm": 0.0}}, torch.float32)
    with pytest.raises(ValueError, match=r"shape \(1,\), expected \(3,\)"):
        providers.relative_errors(torch.zeros(1), wanted)


# -- whole runs ----------------------------------------------------------------------------------

PLUGIN = """
import torch

def good(hidden, weight, label, loss_weight, valid_rows):
    logprob = (hidden @ weight.T).log_softmax(-1)[valid_rows]
    picked = logprob.gather(1, label[valid_rows, None])[:, 0]
    return -(loss_weight[valid_rows] * picked).sum()

def forgets_a_row(hidden, weight, label, loss_weight, valid_rows):
    return good(hidden, weight, label, loss_weight, valid_rows[1:])

def not_a_number(*arguments):
    return good(*arguments) * torch.nan

def detached(*arguments):
    return good(*arguments).detach()

def out_of_memory(*arguments):
    raise torch.OutOfMemoryError("CUDA out of memory.\\nTried to allocate")

calls = 0
def fails_when_timed(*arguments):
    global calls
    calls += 1
    if calls > 8:
        raise RuntimeError("tired")
    return good(*arguments)

number = 3
"""
FUNCTIONS = ("good", "forgets_a_row", "not_a_number", "detached", "out_of_memory")
RATES = {"read_gb_s": 1e2, "copy_gb_s": 80.0, "gemm_bfloat16_tflops": 2.0}
RATES |= {"gemm_float32_tflops": 1.0}
CEILINGS = Roofs(
    **RATES, variants={k: {"x": v} for k, v in RATES.items()}, states={}, void=False, void_reason=""
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a module of providers; peers that are not there; few rounds; roofs given."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "plugin.py").write_text(PLUGIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(kernels, "roofs", lambda: CEILINGS)
        patch.setattr(kernels, "OPS", (OP,))
        patch.setattr(providers, "ROUNDS", 6)
        for name in ("liger_kernel", "cut_cross_entropy"):
            patch.setitem(sys.modules, name, None)
        broken = types.ModuleType("quack.linear_cross_entropy")  # without the function
        patch.setitem(sys.modules, "quack", types.ModuleType("quack"))
        patch.setitem(sys.modules, broken.__name__, broken)
        yield folder


@pytest.fixture(scope="module")
def whole(work: Path) -> Path:
    """The JSON of a run without flags."""
    kernels.run(kernels.KernelsConfig(output=work / "whole"))
    (path,) = (work / "whole").glob("*.json")
    return path


@pytest.fixture(scope="module")
def narrow(work: Path) -> dict[str, Any]:
    """A run of one shape against every function of the plugin: its result, and its CSV."""
    against = tuple(f"plugin:{name}" for name in (*FUNCTIONS, "fails_when_timed"))
    shape = ("T24xD16xV40xmasked25",)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "plot", lambda _: b"")  # half a second
        kernels.run(kernels.KernelsConfig(shape=shape, against=against, output=work / "narrow"))
    (path,) = (work / "narrow").glob("*.json")
    assert path.name.startswith("kernels-")
    return json.loads(path.read_text())


def by_provider(result: dict[str, Any], shape: int = 0) -> dict[str, dict[str, Any]]:
    return {one["provider"]: one for one in result["shapes"][shape]["measurements"]}


def test_whole_run(whole: Path) -> None:
    """Every default shape; what works is timed in three modes, right, and rated by hand here."""
    result = json.loads(whole.read_text())
    assert result["complete"] and [s["shape"] for s in result["shapes"]] == [
        "T96xD32xV500",
        "T96xD32xV500xmasked50",
        "T96xD32xV500xpeaked",
    ]
    env = result["environment"]
    assert {"device", "driver", "cuda", "triton", "torch", "commit", "date"} <= env.keys()
    assert env["gpu"] is False and env["driver"] is None
    name = f"{env['device']}-{env['date']}-{env['commit']}"
    assert whole.stem == "".join(c if c.isalnum() or c in "-._" else "_" for c in name).replace(
        "__", "_"
    )
    for i, rows in enumerate((96, 48, 96)):
        shape = result["shapes"][i]
        assert shape["flops"] == 6 * rows * 500 * 32
        assert shape["floor_ms"] == pytest.approx(shape["flops"] / 1e9)  # at one TFLOP/s
        for provider in ("s1fast", "torch eager", "trl-style 256-row chunks"):
            one = by_provider(result, i)[provider]
            assert one["status"] == "ok" and not one["wrong"]
            assert set(one["errors"]) == {"output", "d hidden", "d weight"}
            assert set(one["timings"]) == {"forward", "backward", "full"}
            full_ms = one["timings"]["full"]["median_ms"]
            assert one["tflops"]["full"] == pytest.approx(shape["flops"] / full_ms / 1e9)
            for mode, part in (("forward", 1 / 3), ("backward", 2 / 3)):
                wanted = part * shape["flops"] / one["timings"][mode]["median_ms"] / 1e9
                assert one["tflops"][mode] == pytest.approx(wanted)
            assert one["roof_fraction"] == pytest.approx(shape["floor_ms"] / full_ms)
            assert one["extra_bytes"] is None
        found = by_provider(result, i)
        assert found["torch.compile"]["reason"] == "timed on a GPU only"
        for peer in ("torch.compile", "liger", "liger fp32, chunk_mem_const 8"):
            assert found[peer]["status"] == "missing" and found[peer]["timings"] == {}
        assert found["cut-cross-entropy"]["status"] == "missing"
        assert found["quack"]["status"] == "error"
        assert found["quack"]["reason"].startswith("AttributeError: module 'quack")


def test_csv_has_ligers_columns(whole: Path) -> None:
    result = json.loads(whole.read_text())
    lines = list(csv.reader(whole.with_suffix(".csv").read_text().splitlines()))
    assert ",".join(lines[0]) == (
        "kernel_name,kernel_provider,kernel_operation_mode,metric_name,metric_unit,x_name,x_label,"
        "x_value,y_value_50,y_value_20,y_value_80,extra_benchmark_config_str,gpu_name,timestamp,"
        "liger_version"
    )
    assert len(lines) == 1 + 3 * 3 * 3  # shapes, providers that work, modes; a CPU has no peaks
    first = dict(zip(lines[0], lines[1], strict=True))
    t = by_provider(result)["s1fast"]["timings"]["forward"]
    assert (first["kernel_name"], first["kernel_provider"]) == (OP.name, "s1fast")
    assert (first["kernel_operation_mode"], first["metric_unit"]) == ("no-grad-forward", "ms")
    assert (first["x_name"], first["x_value"]) == ("T", "96")
    values = [float(first[f"y_value_{q}"]) for q in (50, 20, 80)]
    assert values == [t["median_ms"], t["q20_ms"], t["q80_ms"]]
    assert json.loads(first["extra_benchmark_config_str"])["V"] == 500
    by_provider(result)["s1fast"]["extra_bytes"] = 2_000_000
    memory = [line for line in csv.reader(report.csv_text(result).splitlines()) if "MB" in line]
    assert [line[:5] for line in memory] == [[OP.name, "s1fast", "full", "memory", "MB"]]
    assert memory[0][8] == "2.0"


def test_png_is_one(whole: Path) -> None:
    from matplotlib.image import imread

    pixels = imread(whole.with_suffix(".png"))
    assert pixels.shape[0] > 400 and pixels.shape[1] > 400 and pixels.std() > 0.05


@pytest.mark.parametrize(
    ("peers", "names"),
    [
        (("none",), ["s1fast"]),
        (("eager", "liger fp32"), ["s1fast", "torch eager", "liger fp32, "]),
        (("liger",), ["s1fast", "liger"]),  # a whole name: not also the one that begins with it
        (("torch",), ["s1fast", "torch eager", "torch.compile"]),
    ],
)
def test_peers_can_be_chosen(peers: tuple[str, ...], names: list[str], work: Path) -> None:
    output = work / f"peers-{peers[0]}"
    kernels.run(kernels.KernelsConfig(shape=("T96",), peers=peers, output=output))
    (path,) = output.glob("kernels-*.json")
    found = by_provider(json.loads(path.read_text()))
    assert len(found) == len(names)
    assert all(name.startswith(start) for name, start in zip(found, names, strict=True))


def test_no_result_is_replaced(work: Path) -> None:
    """Two commands of one commit and one day."""
    output = work / "twice"
    for shape in ("T24xD16xV40", "T16xD16xV40"):
        kernels.run(kernels.KernelsConfig(shape=(shape,), peers=("none",), output=output))
    first, second = sorted(output.glob("*.json"), key=lambda path: len(path.name))
    assert second.name == first.name.replace(".json", "-2.json")
    found = [json.loads(path.read_text())["shapes"][0]["shape"] for path in (first, second)]
    assert found == ["T24xD16xV40", "T16xD16xV40"]
    assert len([*output.glob("*.csv")]) == len([*output.glob("*.png")]) == 2


def test_a_shape_that_cannot_be_made_ends_nothing(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, shapes = work / "large", ("T999999999999", "T24xD16xV40")
    with pytest.raises(InputError, match=r"T999999999999xD32xV500 cannot be made: [^;]*$"):
        kernels.run(kernels.KernelsConfig(shape=shapes, peers=("none",), output=output))
    (path,) = output.glob("*.json")
    assert [s["shape"] for s in json.loads(path.read_text())["shapes"]] == ["T24xD16xV40"]
    assert path.with_suffix(".csv").exists() and str(path) in capsys.readouterr().out


def test_against_shows_errors(narrow: dict[str, Any]) -> None:
    """A right function is right, one wrong row is seen, and no failure ends the run."""
    found = by_provider(narrow)
    assert not narrow["complete"]
    assert found["s1fast"]["timings"] and not found["s1fast"]["wrong"]
    good = found["plugin:good"]
    assert good["timings"] and not good["wrong"]
    assert all(value < 1e-5 for pair in good["errors"].values() for value in pair.values())
    wrong = found["plugin:forgets_a_row"]
    assert wrong["timings"] and wrong["wrong"]
    assert wrong["errors"]["d hidden"]["max"] > 0.3
    lost = found["plugin:not_a_number"]
    assert lost["wrong"] and lost["errors"]["output"] == {"max": None, "norm": None}
    for name, reason in (
        ("detached", "RuntimeError: element 0 of tensors does not require grad"),
        ("out_of_memory", "OutOfMemoryError: CUDA out of memory."),
        ("fails_when_timed", "RuntimeError: tired"),
    ):
        one = found[f"plugin:{name}"]
        assert one["status"] == "error" and one["reason"].startswith(reason)
        assert "\n" not in one["reason"] and one["timings"] == {} == one["tflops"]


def test_table(narrow: dict[str, Any]) -> None:
    text = list(report.table(narrow))
    lines = {line.split("  ")[0]: line for line in text}
    assert "linear_cross_entropy T24xD16xV40xmasked25 float32, floor" in text[1]
    assert "WRONG" not in lines["plugin:good"] + lines["s1fast"]
    assert lines["plugin:forgets_a_row"].endswith(" WRONG")
    assert lines["plugin:not_a_number"].endswith("not finite WRONG")
    assert "error: RuntimeError: tired" in lines["plugin:fails_when_timed"]
    assert "missing: " in lines["liger"]
    full = by_provider(narrow)["s1fast"]["timings"]["full"]
    assert f" {full['median_ms']:.3f} " in lines["s1fast"]
    narrow = {**narrow, "roofs": {"void": True, "void_reason": "reads too slowly"}}
    assert list(report.table(narrow))[-1] == "\nVOID: reads too slowly"


def test_slow_providers_are_not_timed(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(providers, "LONGEST_CALL_S", 0.0)
    kernels.run(kernels.KernelsConfig(shape=("T4xD4xV8",), output=work / "slow"))
    assert "error: TimeoutError: one call takes 0.0 s: not timed" in capsys.readouterr().out


def test_rounds_follow_the_budget(whole: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = by_provider(json.loads(whole.read_text()))["s1fast"]
    assert {t["rounds"] for t in ours["timings"].values()} == {6}
    monkeypatch.setattr(providers, "BUDGET_S", 0.0)
    monkeypatch.setattr(kernels, "plot", lambda _: b"")
    kernels.run(kernels.KernelsConfig(shape=("T4xD4xV8",), output=work / "hurried"))
    (path,) = (work / "hurried").glob("*.json")
    ours = by_provider(json.loads(path.read_text()))["s1fast"]
    assert {t["rounds"] for t in ours["timings"].values()} == {providers.FEWEST_ROUNDS}


def test_once_launches_ours_and_nothing_else(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def counted(hidden: Tensor, *rest: Tensor) -> Tensor:
        seen.append((len(hidden), torch.is_grad_enabled()))
        return hidden.sum()

    def refuse(*_: object) -> None:
        raise AssertionError("launched")

    monkeypatch.setattr(linear_cross_entropy, "linear_cross_entropy", counted)
    monkeypatch.setattr(linear_cross_entropy, "_mean", refuse)
    monkeypatch.setattr(kernels, "roofs", refuse)
    before = sorted(work.rglob("*"))
    kernels.run(kernels.KernelsConfig(once=True, output=work / "once"))
    assert seen == [(96, True)] * 2  # to warm up, and to be profiled
    assert capsys.readouterr().out == f"launched {OP.name} T96xD32xV500 once, warm\n"
    assert sorted(work.rglob("*")) == before


# -- what is made of results ---------------------------------------------------------------------


@pytest.fixture
def pair(whole: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Lines of --compare between two results, the second of which a function may change."""

    def compared(change: Callable[[dict[str, Any]], object]) -> list[str]:
        old = json.loads(whole.read_text())
        for shape in old["shapes"]:
            for one in shape["measurements"]:
                for t in one["timings"].values():
                    t.update(median_ms=10.0, q20_ms=9.8, q80_ms=10.4)  # 3 % of noise
        new = copy.deepcopy(old)
        change(new)
        for name, result in (("a", old), ("b", new)):
            (tmp_path / f"{name}.json").write_text(json.dumps(result))
        return list(report.compare(tmp_path / "a.json", tmp_path / "b.json"))

    return compared


def test_compare(pair: Callable[..., list[str]]) -> None:
    """Change of the median, noise of both in quadrature: sqrt(3^2 + 2.5^2) % of 12 / 10."""

    def change(new: dict[str, Any]) -> None:
        found = by_provider(new)
        timings = found["s1fast"]["timings"]
        timings["full"].update(median_ms=12.0, q20_ms=11.9, q80_ms=12.5)
        timings["forward"].update(median_ms=10.3)
        timings["backward"].update(median_ms=5.0, q20_ms=5.0, q80_ms=5.0)
        del found["torch eager"]["timings"]["full"]

    lines = pair(change)
    where = f"{OP.name} T96xD32xV500 s1fast"
    noise = 1.2 * (3**2 + 2.5**2) ** 0.5
    assert f"{where} full: 10 -> 12 ms, +20.0 % ± {noise:.1f} %, slower" in lines
    assert f"{where} backward: 10 -> 5 ms, -50.0 % ± 1.5 %, faster" in lines
    assert f"{where} forward: 10 -> 10.3 ms, +3.0 % ± 4.3 %, same" in lines
    gone = [line for line in lines if "only in" in line]
    assert len(gone) == 1 and gone[0].startswith(f"{OP.name} T96xD32xV500 torch eager full: only")
    assert gone[0].endswith("a.json")
    assert len(lines) == 2 + 27


def test_compare_tells_of_devices_and_void(pair: Callable[..., list[str]]) -> None:
    lines = pair(lambda new: new["environment"].update(device="NVIDIA H200"))
    assert lines[2] == "two devices: the change is not the code's alone"
    lines = pair(lambda new: new["roofs"].update(void=True, void_reason="slow"))
    assert lines[1].endswith(", VOID: slow") and "VOID" not in lines[0]


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(f"before\n\n{tables.BEGIN}\nold\n{tables.END}\n\nafter\n")
    return path


def put(folder: Path, whole: Path, name: str, **changes: Any) -> None:
    """A result as a GPU would leave it, changed."""
    result = json.loads(whole.read_text())
    result["environment"].update(device=SXM, gpu=True, driver="580.1", timestamp="2026-01-02")
    for key in ("device", "gpu", "timestamp", "commit"):
        if key in changes:
            result["environment"][key] = changes.pop(key)
    result["roofs"]["void"] = changes.pop("void", False)
    (folder / f"{name}.json").write_text(json.dumps({**result, **changes}))


def test_tables_from_the_newest_results(whole: Path, readme: Path, tmp_path: Path) -> None:
    """One table a shape, of the newest whole run that is not void, or else of a narrowed one."""
    folder = tmp_path / "results"
    folder.mkdir()
    tables.update(readme, folder)
    empty = readme.read_text()
    assert empty == f"before\n\n{tables.BEGIN}\n\n{tables.NONE}\n\n{tables.END}\n\nafter\n"
    put(folder, whole, "void", commit="voided", timestamp="2027-01-01", void=True)
    put(folder, whole, "cpu", commit="slow", device="Some CPU", gpu=False)
    (folder / "first_light.json").write_text("{}")
    tables.update(readme, folder)
    assert readme.read_text() == empty
    put(folder, whole, "narrow", commit="narrowed", timestamp="2027-01-01", complete=False)
    tables.update(readme, folder)
    assert "Commit narrowed" in readme.read_text()
    put(folder, whole, "a", commit="older", timestamp="2026-01-01")
    put(folder, whole, "b", commit="newest", timestamp="2026-03-01")
    put(folder, whole, "c", commit="middle", timestamp="2026-02-01")
    put(folder, whole, "d", commit="other", device="NVIDIA H200")
    tables.update(readme, folder)
    text = readme.read_text()
    assert text.startswith("before\n\n<!--") and text.endswith("-->\n\nafter\n")
    assert "Commit newest, driver 580.1" in text and "Commit other" in text
    assert "results/b.json" in text and "results/b.png" in text
    for left_out in ("older", "middle", "voided", "narrowed", "slow", tables.NONE, "old\n"):
        assert left_out not in text
    assert text.count("| --- | ---: |") == 6  # two devices, three shapes
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {row.count("|") for row in rows} == {len(report.HEADER) + 1}
    once = tables.update(readme, folder)
    assert once is None and readme.read_text() == text


def test_readme_is_generated(tmp_path: Path) -> None:
    """What bench/README.md says of results is what its command writes."""
    path = tmp_path / "README.md"
    path.write_bytes(tables.README.read_bytes())
    tables.update(path, environment.RESULTS)
    assert path.read_text() == tables.README.read_text()
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(InputError, match="to write between"):
        tables.update(path, environment.RESULTS)


# -- flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "naming"),
    [
        (["--op", "nope"], "--op: no 'nope'; there are all, linear_cross_entropy"),
        (["--shape", "T12y"], "--shape: 'T12y': 'T12y' is no size of T, D, V, masked, peaked"),
        (["--shape", "T4xQ5"], "--shape: 'T4xQ5': 'Q5' is no size"),
        (["--shape", "T4xD0"], "--shape: 'T4xD0': D must be at least 1"),
        (["--shape", "T4xmasked101"], "--shape: 'T4xmasked101': masked is a percentage"),
        (["--shape", "T999999999999", "--once"], "--shape: T999999999999xD32xV500 cannot be made"),
        (
            ["--peers", "eager", "nope"],
            "--peers: none is called 'nope'; there are cut-cross",
        ),
        (["--against", "plugin"], "--against: 'plugin' is not of the form module:function"),
        (["--against", "no_such:f"], "--against: no_such:f: ModuleNotFoundError"),
        (["--against", "plugin:nope"], "--against: plugin:nope: AttributeError"),
        (["--against", "plugin:number"], "--against: plugin:number is no function but int"),
        (["--once", "--against", "plugin:good"], "--once: launches ours and nothing else"),
        (["--compare", "a.json"], "--compare: two result files, not 1"),
        (["--compare", "a.json", "b.json"], "--compare: a.json: cannot be read"),
        (["--compare", "plugin.py", "b.json"], "--compare: plugin.py: not valid JSON"),
        (["--compare", "list.json", "b.json"], "--compare: list.json is no result"),
        (["--output", "plugin.py/x"], "--output: plugin.py/x: cannot be created"),
        (["--foo"], "--foo"),
        (["--once", "yes"], "yes"),
    ],
)
@pytest.mark.parametrize("command", ["module", "s1fast"])
def test_bad_flags(
    command: str,
    arguments: list[str],
    naming: str,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line on stderr that names the flag, before anything is measured."""
    (work / "list.json").write_text('{"environment": [], "roofs": {}, "shapes": 3}')

    def refuse() -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(kernels, "roofs", refuse)
    start = ["kernels.py"] if command == "module" else ["s1fast", "bench", "kernels"]
    monkeypatch.setattr(sys, "argv", [*start, *arguments])
    with pytest.raises(SystemExit) as stop:
        (kernels if command == "module" else cli).main()
    done = capsys.readouterr()
    assert stop.value.code == 2 and done.out == ""
    assert done.err.startswith("s1fast: error: ") and done.err.count("\n") == 1
    assert naming in done.err


def test_both_parsers_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """argparse, which the module uses, and tyro, which the command uses."""
    seen = []
    monkeypatch.setattr(kernels, "run", seen.append)
    for text in (
        "",
        "--op linear_cross_entropy --shape T4 D5xV6 --against a:b c:d --output out",
        "--once --shape T4xmasked50",
        "--peers eager liger --op gemv",
        "--compare a.json b.json",
    ):
        for start in (["kernels.py"], ["s1fast", "bench", "kernels"]):
            monkeypatch.setattr(sys, "argv", [*start, *text.split()])
            (cli if start[0] == "s1fast" else kernels).main()
        ours, theirs = seen[-2:]
        assert ours == theirs, text
    assert seen[0] == kernels.KernelsConfig() and seen[2].against == ("a:b", "c:d")


@pytest.mark.parametrize("arguments", ["bench --help", "bench kernels -h", "bench fly", "bench"])
def test_command(
    arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["s1fast", *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    done = capsys.readouterr()
    if "-h" in arguments:
        assert not stop.value.code and "--against" in done.out and "s1fast bench" in done.out
    else:
        expected = "no bench 'fly'; there is kernels" if "fly" in arguments else "usage: s1fast"
        assert stop.value.code == 2 and expected in done.err


BLOCKED = """
import runpy, sys
for name in ("tyro", "triton", "transformers"):
    sys.modules[name] = None
sys.argv = ["kernels", "--once", "--shape", "T8xD8xV16"]
runpy.run_module("s1fast.bench.kernels", run_name="__main__")
assert "matplotlib" not in sys.modules
"""


def test_runs_without_tyro_and_triton() -> None:
    done = fresh(BLOCKED, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"launched {OP.name} T8xD8xV16 once, warm\n"
