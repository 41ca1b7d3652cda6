"""What a step on a CUDA device tells of itself, FSDP over one rank included (make gpu)."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from s1fast import exposed
from s1fast.chat import Example
from s1fast.checkpoint import load_weights, read_config
from s1fast.config import DataConfig, LogConfig, OptimConfig, TrainConfig
from s1fast.gauges import Gauges
from s1fast.metrics import records
from s1fast.model import Model
from s1fast.parallel import Layout, join, leave, shard_model
from s1fast.step import Trainer
from s1fast.trainer import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture
def layout() -> Iterator[Layout]:
    """A world of one, by NCCL."""
    found = join(torch.device("cuda", 0))
    yield found
    leave()


def wide(make_model: Callable[..., Path]) -> Path:
    """Heads of 64, which our attention takes."""
    return make_model(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, std=0.05)


def trainer_of(folder: Path, layout: Layout) -> Trainer:
    examples = [
        Example(tuple(3 + (i * t) % 390 for t in range(n)), tuple(t > 9 for t in range(n)), "made")
        for i, n in enumerate((900, 301, 1700, 240, 650, 128, 330, 400), 1)
    ]
    config = TrainConfig(batch_size=4, microbatch_tokens=2000, epochs=4, optim=OptimConfig(lr=1e-3))
    with torch.device("meta"):
        model = Model(read_config(folder), compute_dtype=torch.bfloat16)
    shard_model(model, layout)
    model.materialise(layout.device, torch.float32)
    load_weights(model, folder)
    return Trainer(config, model, examples, layout)


def test_a_step_is_measured_without_waiting(
    layout: Layout, make_model: Callable[..., Path]
) -> None:
    """Each is read when the next has been launched, as the loop does."""
    trainer = trainer_of(wide(make_model), layout)
    trainer.step(0)  # compiles kernels
    weights = sum(p.numel() for p in trainer.model.parameters())
    readings = []
    with exposed.collecting(layout.device):
        gauges = Gauges(layout)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(1, 5):
                gauges.begin()
                readings.append(gauges.end(trainer.step(step)))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    measured = [one.wait() for one in readings]
    for one in measured:
        assert one.loss > 0 and one.grad_norm > 0 and one.bad_labels == 0
        assert one.exposed_s is not None and 0 < one.exposed_s < one.step_s
        # fp32 masters and two moments at least; all that the device has at most.
        assert one.peak_bytes is not None
        assert 12 * weights < one.peak_bytes <= torch.cuda.get_device_properties(0).total_memory
    ends = [one.elapsed_s for one in measured]
    assert ends == sorted(ends) and ends[-1] >= 0.99 * sum(one.step_s for one in measured)


def test_the_peak_is_that_of_the_step(layout: Layout, make_model: Callable[..., Path]) -> None:
    trainer = trainer_of(wide(make_model), layout)
    gauges = Gauges(layout)
    peaks = []
    for step, extra in enumerate((0, 1 << 30, 0)):
        gauges.begin()
        held = torch.empty(extra, dtype=torch.uint8, device=layout.device)
        peaks.append(gauges.end(trainer.step(step)).wait().peak_bytes)
        del held
    assert None not in peaks
    assert peaks[1] - peaks[2] > 0.9 * (1 << 30)


def test_a_wait_on_the_stream_is_exposed() -> None:
    """A span around ten million cycles of another stream's sleep, 5 ms and more, lasts as long, or
    longer where other processes share the device."""
    device, other = torch.device("cuda", 0), torch.cuda.Stream()
    with exposed.collecting(device):
        with exposed.span():
            with torch.cuda.stream(other):
                torch.cuda._sleep(10_000_000)
            torch.cuda.current_stream().wait_stream(other)
        after = exposed.mark(device)
        spans = exposed.take()
    assert isinstance(after, torch.cuda.Event)
    after.synchronize()
    assert spans is not None and len(spans) == 1
    assert 0.003 < exposed.seconds(*spans[0]) < 1.0


def test_a_profiled_run(make_model: Callable[..., Path], tmp_path: Path) -> None:
    turns = "<|im_start|>user\n{}?<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
    lines = [json.dumps({"text": turns.format(i, "is " * 20 * i)}) for i in range(1, 8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    config = TrainConfig(
        model=str(wide(make_model)),
        output=tmp_path / "run",
        epochs=2,
        batch_size=3,
        device="cuda",
        data=DataConfig(path=str(tmp_path / "rows.jsonl")),
        log=LogConfig(tensorboard=False),
    )
    train(replace(config, profile="3:5"), Console(file=io.StringIO()))
    folder = tmp_path / "run" / "profile"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["memory.pickle", "table.json", "table.txt", "trace.json.gz"]
    facts = json.loads((folder / "table.json").read_text())
    spent = facts["rows_s"]
    assert sum(spent.values()) == pytest.approx(facts["whole_s"])
    assert all(spent[name] > 0 for name in ("GEMM", "attention", "loss", "other kernels", "idle"))
    train(replace(config, output=tmp_path / "plain"), Console(file=io.StringIO()))
    told = [
        [(line["loss"], line["grad_norm"]) for line in records(tmp_path / name / "metrics.jsonl")]
        for name in ("run", "plain")
    ]
    assert told[0] == told[1]
