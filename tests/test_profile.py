"""--profile: the table against numbers counted by hand, and whole runs that write one."""

from __future__ import annotations

import ast
import gzip
import io
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from s1fast import cli, profile
from s1fast.config import CheckpointConfig, DataConfig, LogConfig, TrainConfig, check, to_toml
from s1fast.errors import InputError
from s1fast.metrics import records
from s1fast.parallel import Layout
from s1fast.profile import ROWS, breakdown, kernel_kind, operation_kind, table
from s1fast.trainer import train

ROOT = Path(__file__).resolve().parent.parent
GEMM = "nvjet_hsh_256x128_64x4_2x1_v_bz_coopA_NNT"
GATHER = "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)"

# -- the table -----------------------------------------------------------------------------------


def event(name: str, start_us: float, end_us: float, cat: str = "kernel", tid: int = 7) -> dict:
    span = {"ts": start_us, "dur": end_us - start_us}
    return {"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": tid, **span}


def window(start_us: float, end_us: float) -> dict[str, Any]:
    return event(profile._WINDOW, start_us, end_us, "user_annotation", 1)


def rows(gemm=0, attention=0, loss=0, other=0, exposed=0, idle=0) -> dict[str, float]:
    values = (gemm, attention, loss, other, exposed, idle)
    return {name: us / 1e6 for name, us in zip(ROWS, values, strict=True)}


def test_every_moment_is_counted_once() -> None:
    """By hand, in microseconds, of a window from 100 to 200:

    compute  GEMM 100-120, attention 120-140, other 138-150 on another stream, loss 160-165
    comm     110-130 hidden; 145-160, of which 150-160 exposed; 164-170, of which 165-170 exposed
    """
    found = breakdown(
        [
            window(100, 200),
            event(GEMM, 90, 120),  # it began before
            event("_attention_forward_kernel", 120, 140),
            event("void at::native::elementwise_kernel<4>", 138, 150, tid=8),
            event("_softmax_gradient_kernel", 160, 165),
            event(GATHER, 110, 130, tid=9),
            event(GATHER, 145, 160, tid=9),
            event("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", 150, 155, tid=10),  # two at once
            event(GATHER, 164, 170, tid=9),
            event(GEMM, 195, 230),  # it ends after
            event(GEMM, 300, 400),
            event("aten::mm", 100, 200, "cpu_op", 1),  # where there are kernels these count
            event(profile._WINDOW, 100, 200, "gpu_user_annotation"),
            {"ph": "M", "name": "process_name"},
        ]
    )
    assert found.whole_s == pytest.approx(100e-6)
    assert found.rows_s == pytest.approx(
        rows(gemm=25, attention=20, loss=5, other=10, exposed=15, idle=25)
    )
    assert found.communication_s == pytest.approx(41e-6)


def test_on_a_cpu_operations_count() -> None:
    """Nested ones once; a thread beside the one that trains is not the device."""
    found = breakdown(
        [
            window(0, 100),
            event("s1fast::feed_forward", 0, 20, "cpu_op", 1),
            event("aten::mm", 5, 15, "cpu_op", 1),
            event("s1fast::packed_attention", 20, 30, "cpu_op", 1),
            event("aten::bmm", 22, 28, "cpu_op", 1),  # attention's own
            event("s1fast::linear_cross_entropy", 30, 50, "cpu_op", 1),
            event("aten::addmm", 30, 36, "cpu_op", 1),
            event("autograd::engine::evaluate_function: X", 50, 100, "cpu_op", 1),
            event("s1fast::exchange", 60, 80, "cpu_op", 1),
            event("gloo:all_to_all", 62, 79, "user_annotation", 2),
            event("aten::mul", 62, 79, "cpu_op", 2),
            event("aten::empty", 61, 63, "cpu_op", 1),
        ]
    )
    assert found.rows_s == pytest.approx(
        rows(gemm=16, attention=10, loss=14, other=12, exposed=16, idle=32)
    )


def test_rows_are_the_whole() -> None:
    """Random overlaps: against a count of every microsecond."""
    generator = torch.Generator().manual_seed(0)
    names = [GEMM, "_attention_dkey_kernel", "_scale_kernel", "Memcpy DtoD", GATHER]
    spans = torch.randint(0, 300, (60, 2), generator=generator).sort(dim=1).values.tolist()
    events = [event(names[i % 5], *span, tid=i) for i, span in enumerate(spans)]
    counted = dict.fromkeys(ROWS, 0)
    order = ("attention", "GEMM", "loss", "other kernels", "communication")
    for us in range(50, 250):
        running = {kernel_kind(e["name"]) for e in events if e["ts"] <= us < e["ts"] + e["dur"]}
        first = next((kind for kind in order if kind in running), "idle")
        counted["exposed communication" if first == "communication" else first] += 1
    found = breakdown([window(50, 250), *events])
    assert found.rows_s == pytest.approx({name: us / 1e6 for name, us in counted.items()})
    assert sum(found.rows_s.values()) == pytest.approx(found.whole_s)


def test_a_trace_has_one_window() -> None:
    for windows in ([], [window(0, 1), window(2, 3)]):
        with pytest.raises(ValueError, match=f"{len(windows)} windows"):
            breakdown(windows)


def test_a_table_for_people() -> None:
    found = profile.Breakdown(6.0, {name: float(i) for i, name in enumerate(ROWS[:4])}, 1.5)
    found.rows_s.update({"exposed communication": 0.0, "idle": 0.0})
    text = table(found, range(10, 13), "NVIDIA H100, rank 0 of 16")
    assert text.splitlines()[0] == "profile of steps 10 to 12 on NVIDIA H100, rank 0 of 16"
    assert "other kernels           1.0000   50.0%\n" in text
    assert "all                     2.0000  100.0%\n" in text
    assert text.endswith("communication beside compute: 0.5000 s a step more\n")


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("communication", [GATHER, "ncclKernel_AllReduce_RING_LL_Sum_float(ncclWork*)"]),
        (
            "GEMM",
            [
                GEMM,
                "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16>(Params)",
                "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64",
                "ampere_sgemm_128x64_tn",
                "void cublasLt::splitKreduce_kernel<32, 16, int, float>",
                "void gemv2T_kernel_val<int, int, float>",
            ],
        ),
        (
            "attention",
            [
                "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>",
                "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<...>>>",
                "fmha_cutlassF_bf16_aligned_64x128_rf_sm80",
            ],
        ),
        ("other kernels", ["Memcpy HtoD (Pinned -> Device)", "Memset (Device)", "_adamw_kernel"]),
    ],
)
def test_kernels_by_name(kind: str, names: list[str]) -> None:
    assert {name: kernel_kind(name) for name in names} == dict.fromkeys(names, kind)


def test_our_own_kernels_by_name() -> None:
    """Every one that kernels/ launches; a new file's kernels are others unless it is named here."""
    kinds = dict.fromkeys(
        (f"packed_attention_{part}" for part in ("triton", "gluon", "backward")), "attention"
    )
    kinds |= dict.fromkeys(("softmax_gradient", "linear_cross_entropy"), "loss")
    found = 0
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and re.fullmatch("_.*_kernel", node.name):
                assert kernel_kind(node.name) == kinds.get(path.stem, "other kernels"), node.name
                found += 1
    assert found >= 12


def test_operations_by_name() -> None:
    assert operation_kind("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"
    assert operation_kind("s1fast::packed_attention_backward") == "attention"
    assert operation_kind("fsdp::chunk_cat") == "other kernels"
    for name in ("s1fast::exchange", "c10d::_allgather_base_", "AddmmBackward0", "FSDP::x"):
        assert operation_kind(name) is None, name


# -- the flag --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["3", "0:2", "5:4", "-1:2", "1:2:3", "a:b", " 1:2", "1:2\n", "1-2", "\u0661:\u0662", "\udcff"],
)
def test_bad_values_are_named(text: str) -> None:
    config = TrainConfig(model="m", data=DataConfig(path="p"), profile=text)
    with pytest.raises(InputError, match=r"^profile: must be FIRST:LAST"):
        check(config)


# -- whole runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(
    make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> TrainConfig:
    """Six steps."""
    folder = tmp_path_factory.mktemp("profile")
    turns = "<|im_start|>user\n{}?<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
    lines = [json.dumps({"text": turns.format(i, "is " * i)}) for i in range(1, 8)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return TrainConfig(
        model=str(make_model("llama")),
        output=folder / "plain",
        epochs=2,
        batch_size=3,
        device="cpu",
        data=DataConfig(path=str(folder / "rows.jsonl")),
        checkpoint=CheckpointConfig(every=2, export_dtype="float32"),
        log=LogConfig(tensorboard=False),
    )


@pytest.fixture(scope="module")
def plain(config: TrainConfig) -> Path:
    train(config, Console(file=io.StringIO()))
    return config.output


def same(run: Path, wanted: Path) -> bool:
    ours, theirs = (load_file(folder / "hf" / "model.safetensors") for folder in (run, wanted))
    lines = [list(records(folder / "metrics.jsonl")) for folder in (run, wanted)]
    told = [[(line["loss"], line["grad_norm"]) for line in one] for one in lines]
    return told[0] == told[1] and all(torch.equal(ours[name], x) for name, x in theirs.items())


def test_a_profiled_run(
    config: TrainConfig,
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the command: the same bits, a trace of these steps alone, a table that adds up."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(config))
    flags = ["--output", str(tmp_path / "run"), "--profile", "2:4"]
    monkeypatch.setattr(sys, "argv", ["s1fast", "train", str(recipe), *flags])
    cli.main()
    said = capsys.readouterr().out
    folder = tmp_path / "run" / "profile"
    assert sorted(p.name for p in folder.iterdir()) == ["table.json", "table.txt", "trace.json.gz"]
    assert (folder / "table.txt").read_text() in said
    assert "profile of steps 2 to 4 on CPU, rank 0 of 1" in said
    facts = json.loads((folder / "table.json").read_text())
    assert (facts["first"], facts["last"]) == (2, 4)
    spent = facts["rows_s"]
    assert sum(spent.values()) == pytest.approx(facts["whole_s"])
    assert all(spent[name] > 0 for name in ROWS if name != "exposed communication")
    assert spent["exposed communication"] == facts["communication_s"] == 0
    events = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
    losses = [e for e in events if e["name"] == "s1fast::linear_cross_entropy"]
    assert len(losses) == 3  # one a step
    steps = [line["step_s"] for line in records(tmp_path / "run" / "metrics.jsonl")]
    assert sum(steps[1:4]) <= facts["whole_s"] * 1.001
    assert same(tmp_path / "run", plain)


def test_a_resumed_run(config: TrainConfig, plain: Path, tmp_path: Path) -> None:
    """Of the named steps those that are still to come; none is left, and a warning says so."""
    run = replace(config, output=tmp_path / "run")
    real = profile.Profile.step

    def dies(self: profile.Profile, number: int) -> Any:
        if number == 4:
            raise KeyboardInterrupt
        return real(self, number)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(profile.Profile, "step", dies)
        train(replace(run, profile="3:5"), Console(file=io.StringIO()))
    assert not (run.output / "profile").exists()  # the third was under way; nothing half-written
    resume = replace(config.checkpoint, resume=True)
    out = io.StringIO()
    train(replace(run, profile="2:4", checkpoint=resume), Console(file=out, width=200))
    assert "resuming after step 2" in out.getvalue()
    assert "profile of steps 3 to 4 on CPU" in out.getvalue()
    assert same(run.output, plain)


def test_steps_taken_before_are_said(config: TrainConfig) -> None:
    """As when torchrun restarts a run with the same flags."""
    out = io.StringIO()
    late = replace(config, profile="2:4")
    with profile.Profile(Layout(torch.device("cpu")), late, 4, Console(file=out)) as nothing:
        for number in (5, 6):
            with nothing.step(number):
                pass
    assert out.getvalue() == "warning: profile: steps 2:4 were taken before; none is profiled\n"


def test_a_trace_that_cannot_be_written(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch tells nobody of a full disk: its file just ends."""

    def torn(self: Any, path: str) -> None:
        Path(path).write_text('{"traceEvents": [')

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", torn)
    full = replace(config, output=tmp_path / "run", profile="1:1")
    with pytest.raises(InputError, match=r"profile/trace\.json\.gz: cannot be written"):
        train(full, Console(file=io.StringIO()))
    assert not list((tmp_path / "run" / "profile").iterdir())


def test_steps_beyond_the_run(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before the weights are loaded, which may take minutes."""
    monkeypatch.delattr("s1fast.trainer.load_weights")
    beyond = replace(config, output=tmp_path / "run", profile="6:7")
    with pytest.raises(InputError, match="profile: 6:7 goes beyond the run's 6 steps"):
        train(beyond, Console(file=io.StringIO()))
    assert not (tmp_path / "run").exists()
