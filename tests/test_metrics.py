"""What a run tells: FLOPs, rates, times, and the files it leaves."""

from __future__ import annotations

import io
import json
import os
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from s1fast.chat import Chat, Example
from s1fast.checkpoint import load_model, read_config
from s1fast.config import CheckpointConfig, DataConfig, LogConfig, OptimConfig, TrainConfig
from s1fast.errors import InputError
from s1fast.metrics import (
    RunLog,
    StepRecord,
    duration,
    layer_parameters,
    peak_tflops,
    plot_loss,
    records,
    train_flops,
)
from s1fast.model import ModelConfig
from s1fast.optimizer import learning_rate
from s1fast.packing import pack, step_indices
from s1fast.rows import load_examples
from s1fast.step import stream_loss
from s1fast.trainer import train

CPU = torch.device("cpu")

# -- FLOPs ---------------------------------------------------------------------------------------

QWEN_32B = ModelConfig(
    model_type="qwen2",
    vocab_size=152064,
    hidden_size=5120,
    intermediate_size=27648,
    num_hidden_layers=64,
    num_attention_heads=40,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=32768,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    rope_scaling=None,
    tie_word_embeddings=False,
    attention_bias=True,
)


def test_flops_by_hand() -> None:
    """Qwen2.5-32B on two sequences: each matrix weight is used in three products of 2 FLOPs."""
    layer = 5120 * 5120 * 2 + 5120 * 1024 * 2 + 3 * 5120 * 27648  # q and o, k and v, gate up down
    assert layer_parameters(QWEN_32B) == layer
    assert abs(64 * layer / 31.0e9 - 1) < 0.01  # the model card: 31.0 B without embeddings
    found = train_flops(QWEN_32B, [3000, 1000], 2500)
    matrices = 6 * 64 * layer * 4000
    head = 6 * 152064 * 5120 * 2500
    # Two products (scores, values) of n^2 / 2 pairs, 2 FLOPs each, 40 heads of 128, times three.
    attention = 3 * 2 * 2 * (3000**2 + 1000**2) / 2 * 40 * 128 * 64
    assert found == matrices + head + attention


@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_flops_are_what_torch_counts(model_type: str, make_model: Callable[..., Path]) -> None:
    """Forward and backward, counted product by product.

    Two things differ from the plain count. Attention: the reference kernel that torch can count
    computes all n^2 pairs, we count the causal half, so the counter has our attention twice. Head:
    rows without a label are not computed, and we do not count them either.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    folder = make_model(model_type, num_key_value_heads=1, head_dim=24)
    config, model = read_config(folder), load_model(folder, CPU, torch.float32)
    lengths, labelled = [30, 17], 20
    examples = [
        Example((5,) * n, tuple(t >= n - labelled // 2 for t in range(n)), "") for n in lengths
    ]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        stream_loss(model, pack(examples, [0.1, 0.1])).backward()
    attention = 6 * 2 * 4 * 24 * (30**2 + 17**2)  # 6 L H K sum(n^2)
    counted = counter.get_total_flops()
    assert counted == train_flops(config, lengths, labelled) + attention
    assert train_flops(config, lengths, 0) == counted - 6 * 512 * 64 * labelled - attention


def test_peak_is_a_rate() -> None:
    peak, source = peak_tflops(CPU, torch.float32)
    assert 1e-3 < peak < 100 and "measured" in source and "1024 x 1024" in source


# -- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.4, "0s"),
        (11.6, "12s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (187, "3m07s"),
        (3599.4, "59m59s"),
        (3599.6, "1h00m"),
        (3720, "1h02m"),
        (360_000, "100h00m"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("num_steps", "ratio"), [(315, 0.05), (40, 0.05), (140, 0.05), (10, 0.0), (7, 1.0), (1, 0.05)]
)
def test_learning_rate_is_transformers(num_steps: int, ratio: float) -> None:
    """Every step of s1's 315, and of odd schedules; both are fp64, so equal to its rounding."""
    import math

    import transformers

    config = OptimConfig(warmup_ratio=ratio)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    warmup = math.ceil(num_steps * ratio)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, num_steps)
    theirs = []
    for _ in range(num_steps):
        theirs.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    ours = [learning_rate(step, num_steps, config) for step in range(num_steps)]
    assert ours == pytest.approx(theirs, rel=1e-12, abs=0)


def test_s1s_learning_rate() -> None:
    """Sixteen steps up from 0, the peak at the seventeenth, then down to almost 0."""
    rates = [learning_rate(step, 315, OptimConfig()) for step in range(315)]
    assert rates[0] == 0.0 and rates[16] == max(rates) == 1e-5
    assert rates[8] == pytest.approx(0.5e-5)
    assert rates[:17] == sorted(rates[:17]) and rates[16:] == sorted(rates[16:], reverse=True)
    assert 0 < rates[-1] < 1e-9


# -- the log -------------------------------------------------------------------------------------


def record(step: int, **values: Any) -> StepRecord:
    zeros: dict[str, Any] = {field.name: 0 for field in fields(StepRecord)}
    zeros |= {"exposed_s": None, "peak_bytes": None}  # as on one CPU
    return StepRecord(**{**zeros, "step": step, "loss": 1 / step, **values})


@contextmanager
def run_log(folder: Path, **values: Any) -> Iterator[tuple[RunLog, io.StringIO]]:
    out = io.StringIO()
    options = {
        "num_steps": 10,
        "start": 0,
        "every": 1,
        "board": False,
        "peak_tflops": 1.0,
        **values,
    }
    with RunLog(folder, Console(file=out, width=200), **options) as log:
        yield log, out


def test_a_line_for_people(tmp_path: Path) -> None:
    with run_log(tmp_path, every=4) as (log, out):
        for step in range(1, 11):
            log.write(
                record(
                    step,
                    grad_norm=1.234,
                    lr=1e-5,
                    step_s=0.5,
                    tokens_per_s=12345.6,
                    mfu=0.4321,
                    eta_s=187,
                    dollars=0.125 * step,
                )
            )
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["4/10", "8/10", "10/10"]  # every 4, and the last
    assert lines[0] == (
        "step 4/10  loss 0.2500  gnorm 1.23  lr 1.00e-05  0.50 s  12,346 tok/s  MFU 43.2%  "
        "eta 3m07s  $0.50"
    )
    assert "$" not in record(1).line(10)


def test_a_line_of_many_gpus() -> None:
    line = record(1, imbalance=1.0071, exposed_s=0.1249, peak_bytes=63_249_000_000).line(10)
    assert "MFU 0.0%  imbalance 1.007  exposed 0.12 s  63.2 GB  eta" in line


def test_a_resumed_log_has_each_step_once(tmp_path: Path) -> None:
    """Steps after the snapshot are dropped, and a line torn by a crash with them."""
    with run_log(tmp_path) as (log, _):
        for step in range(1, 8):
            log.write(record(step, loss=0.1 + step / 3))
    path = tmp_path / "metrics.jsonl"
    before = path.read_text().splitlines()
    path.write_text("\n".join(before)[:-15])
    assert [line["step"] for line in records(path)] == [1, 2, 3, 4, 5, 6]
    with run_log(tmp_path, start=4) as (log, _):
        assert path.read_text().splitlines() == before[:4]  # to the last digit
        log.write(record(5))
    assert [line["step"] for line in records(path)] == [1, 2, 3, 4, 5]


def test_records_reach_the_file_at_once(tmp_path: Path) -> None:
    with run_log(tmp_path) as (log, _):
        log.write(record(1))
        assert [line["step"] for line in records(tmp_path / "metrics.jsonl")] == [1]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with run_log(tmp_path) as (log, _):
        (tmp_path / "metrics.jsonl").unlink()
        os.dup2(os.open("/dev/full", os.O_WRONLY), log._file.fileno())
        with pytest.raises(InputError, match=r"metrics\.jsonl: cannot be written: No space left"):
            log.write(record(1))


def test_missing_tensorboard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with (
        pytest.raises(InputError, match=r"log\.tensorboard: .*pip install tensorboard"),
        run_log(tmp_path, board=True),
    ):
        pass
    assert not any(tmp_path.iterdir())


def test_plot_is_a_png(tmp_path: Path) -> None:
    with run_log(tmp_path) as (log, _):
        for step in range(1, 5):
            log.write(record(step))
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    width, height, colours = png(tmp_path / "loss.png")
    assert (width, height) == (960, 540)
    assert colours > 10  # lines and letters, no empty sheet


def png(path: Path) -> tuple[int, int, int]:
    """Width, height and the number of colours, each chunk's checksum verified."""
    from matplotlib.image import imread

    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    position, kinds = 8, []
    while position < len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        body = data[position + 4 : position + 8 + length]
        assert zlib.crc32(body) == struct.unpack_from(">I", data, position + 8 + length)[0]
        kinds.append(kind)
        position += 12 + length
    assert kinds[0] == b"IHDR" and kinds[-1] == b"IEND"
    pixels = torch.from_numpy(imread(path))
    width, height = struct.unpack_from(">II", data, 16)
    assert pixels.shape[:2] == (height, width)
    return width, height, len(pixels.flatten(0, 1).unique(dim=0))


# -- of a real run -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(
    make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> TrainConfig:
    folder = tmp_path_factory.mktemp("metrics")
    turns = "<|im_start|>user\n{}?<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
    rows = [{"text": turns.format(i, "is " * i)} for i in range(1, 8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TrainConfig(
        model=str(make_model("llama")),
        output=folder / "run",
        epochs=2,
        batch_size=3,
        device="cpu",
        data=DataConfig(path=str(folder / "rows.jsonl")),
        checkpoint=CheckpointConfig(every=0),
        log=LogConfig(dollars_per_hour=3600.0),
    )


@pytest.fixture(scope="module")
def run(config: TrainConfig) -> Path:
    """A run of six steps, with everything it can write."""
    return train(config, Console(file=io.StringIO(), width=200)).parent


def test_metrics_of_a_run(run: Path, config: TrainConfig) -> None:
    """Every field of every step, against what can be computed from the others."""
    source, lines = Path(config.model), list(records(run / "metrics.jsonl"))
    examples, _ = load_examples(config.data, Chat.load(source), 1024)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for i, line in enumerate(lines):
        assert list(line) == [field.name for field in fields(StepRecord)]
        assert line["epoch"] == pytest.approx((i + 1) / 3)
        assert line["lr"] == learning_rate(i, 6, config.optim)
        batch = [examples[j] for j in step_indices(7, 3, config.seed, i)]  # filled up at 2 and 5
        seqlens = [len(example.ids) for example in batch]
        assert line["tokens"] == sum(seqlens)
        assert line["labels"] == sum(sum(example.labelled) for example in batch)
        assert 0 < line["loss"] < 20 and line["grad_norm"] > 0 and line["step_s"] > 0
        assert line["tokens_per_s"] == pytest.approx(line["tokens"] / line["step_s"])
        flops = train_flops(read_config(source), seqlens, line["labels"])
        assert line["tflops"] == pytest.approx(flops / line["step_s"] / 1e12)
        assert 0 < line["mfu"] < 1
        assert line["exposed_s"] is None and line["peak_bytes"] is None  # one CPU: nothing to tell
    peaks = [line["tflops"] / line["mfu"] for line in lines]
    assert peaks == pytest.approx([peaks[0]] * 6)
    assert lines[-1]["eta_s"] == 0 and lines[0]["eta_s"] > 0
    spent = [line["dollars"] for line in lines]  # a dollar a second
    assert spent == sorted(spent)
    assert spent[-1] >= 0.99 * sum(line["step_s"] for line in lines)


def test_tensorboard_has_the_same_numbers(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    lines = list(records(run / "metrics.jsonl"))
    absent = ("step", "exposed_s", "peak_bytes")  # None on one CPU
    names = [field.name for field in fields(StepRecord) if field.name not in absent]
    assert sorted(board.Tags()["scalars"]) == sorted(f"train/{name}" for name in names)
    for name in names:
        events = board.Scalars(f"train/{name}")
        assert [event.step for event in events] == [1, 2, 3, 4, 5, 6]
        # TensorBoard stores fp32.
        assert [event.value for event in events] == pytest.approx(
            [line[name] for line in lines], rel=2**-23
        )


def test_a_run_draws_its_loss(run: Path) -> None:
    assert png(run / "loss.png")[2] > 10


def test_tensorboard_can_be_left_out(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run without it does not need the package."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    out = io.StringIO()
    quiet = replace(config, output=tmp_path / "run", max_steps=1, log=LogConfig(tensorboard=False))
    train(quiet, Console(file=out, width=200))
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert "step 1/1" in out.getvalue() and "MFU = " in out.getvalue()
    loud = replace(quiet, output=tmp_path / "loud", log=LogConfig())
    with pytest.raises(InputError, match=r"log\.tensorboard"):
        train(loud, Console(file=out))
    # And what it left behind does not stand in the way of the remedy it names.
    again = replace(
        loud, log=LogConfig(tensorboard=False), checkpoint=CheckpointConfig(every=0, resume=True)
    )
    assert (train(again, Console(file=out)) / "config.json").exists()


def test_running_out_of_memory_names_the_remedies(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, step: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("s1fast.step.Trainer.step", full)
    quiet = replace(config, output=tmp_path / "run", log=LogConfig(tensorboard=False))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        train(quiet, Console(file=io.StringIO()))
    assert "a smaller microbatch_tokens" in caught.value.__notes__[0]
