"""Whole runs under torchrun, on gloo: as one process trains, killed and restarted, exported."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from s1fast.chat import Example
from s1fast.checkpoint import load_model
from s1fast.packing import pack
from s1fast.step import stream_loss

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")

# The command; in its first life, rank 1 gets the signal argv[1] as step argv[2] begins, or goes
# its own way with the flags of argv[3].
DOOMED = """
import os, signal, sys
sent, at, flags = sys.argv.pop(1), int(sys.argv.pop(1)), sys.argv.pop(1).split()
import s1fast.heartbeat
s1fast.heartbeat.BEAT_S, s1fast.heartbeat.SILENCE_S = 0.5, 6.0
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    sys.argv += flags
    import s1fast.step
    real = s1fast.step.Trainer.step
    def step(self, step):
        if step == at:
            os.kill(os.getpid(), signal.Signals[sent])
        return real(self, step)
    s1fast.step.Trainer.step = step
from s1fast.cli import main
main()
"""


@dataclass(frozen=True)
class Setup:
    recipe: Path
    doomed: Path
    whole: Path
    """The run on two ranks that nobody disturbed."""


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its ranks
        process.wait()
        raise
    return subprocess.CompletedProcess(command, process.returncode, *said)


def torchrun(ranks: int, *command: str) -> subprocess.CompletedProcess[str]:
    options = ["--standalone", "--nproc-per-node", str(ranks), "--monitor-interval", "0.1"]
    return run(["torch.distributed.run", *options, *command])


@pytest.fixture(scope="module")
def setup(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("torchrun")
    draw = random.Random(0)
    rows = folder / "rows.jsonl"
    with rows.open("w") as file:
        for i in range(14):
            text = (
                f"<|im_start|>user\nthe sum of {i} and {i}?<|im_end|>\n"
                f"<|im_start|>assistant\n{'think ' * draw.randrange(30)}{2 * i}<|im_end|>\n"
            )
            file.write(json.dumps({"text": text}) + "\n")
    recipe = folder / "recipe.toml"
    recipe.write_text(
        f'model = "{make_model("qwen2", std=0.1)}"\noutput = "{folder / "whole"}"\n'
        'epochs = 3\nbatch_size = 4\nmicrobatch_tokens = 100\ndevice = "cpu"\n'
        f'[data]\npath = "{rows}"\n[optim]\nlr = 1e-3\n'
        '[checkpoint]\nevery = 2\nexport_dtype = "float32"\n[log]\ntensorboard = false\n'
    )
    doomed = folder / "doomed.py"
    doomed.write_text(DOOMED)
    done = torchrun(2, "-m", "s1fast", "train", str(recipe))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 12/12") == 1, "one rank prints, the other does not"
    assert "over 2 ranks: streams 1 x 2" in done.stdout
    assert " exposed " in done.stdout
    assert "deprecated" not in done.stderr
    return Setup(recipe, doomed, folder / "whole")


def test_ranks_tell_what_they_wait_for(setup: Setup) -> None:
    told = [json.loads(line) for line in (setup.whole / "metrics.jsonl").read_text().splitlines()]
    assert len(told) == 12
    assert all(0 < line["exposed_s"] < line["step_s"] for line in told)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "hf" / "model.safetensors")


def distance(found: Path, wanted: Path) -> float:
    """Largest relative distance of a tensor, in norm."""
    ours, theirs = weights(found), weights(wanted)
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - theirs[n]).norm() / theirs[n].norm()) for n in ours)


def test_ranks_train_as_one_process_does(setup: Setup, tmp_path: Path) -> None:
    """fp32 sums in another order; a step hands its rounding on, and Adam divides by small
    gradients: 2e-5 after twelve steps that move weights by a percent and more."""
    done = run(["s1fast", "train", str(setup.recipe), "--output", str(tmp_path / "one")])
    assert done.returncode == 0, done.stderr
    pairs = list(zip(losses(setup.whole), losses(tmp_path / "one"), strict=True))
    assert len(pairs) == 12 and all(abs(a / b - 1) <= 2e-5 for a, b in pairs)
    assert distance(setup.whole, tmp_path / "one") <= 1e-4


def test_what_ranks_export_loads_in_transformers(setup: Setup) -> None:
    import transformers

    ids = tuple(range(3, 40))
    folder = setup.whole / "hf"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).float()
    with torch.no_grad():
        wanted = theirs(torch.tensor([ids]), labels=torch.tensor([ids])).loss
        stream = pack([Example(ids, (True,) * len(ids), "test")], [1 / (len(ids) - 1)])
        found = stream_loss(load_model(folder, CPU, torch.float32), stream)
    assert abs(float(found / wanted) - 1) <= 1e-5


def test_a_killed_rank_and_torchruns_restart(setup: Setup, tmp_path: Path) -> None:
    """Rank 1 dies as step 5 begins: all start anew from the last snapshot, to the same bits."""
    command = ["train", str(setup.recipe), "--output", str(tmp_path / "run"), "--checkpoint.resume"]
    restarts = ("--max-restarts", "1")
    done = torchrun(2, *restarts, str(setup.doomed), "SIGKILL", "5", "", *command)
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stdout
    wanted = weights(setup.whole)
    assert all(torch.equal(x, wanted[name]) for name, x in weights(tmp_path / "run").items())
    assert losses(tmp_path / "run") == losses(setup.whole)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_going_on_with_other_ranks(setup: Setup, tmp_path: Path, ranks: int) -> None:
    """A rank dies, nobody restarts it, and as many as there are go on."""
    command = ["train", str(setup.recipe), "--output", str(tmp_path / "run"), "--checkpoint.resume"]
    done = torchrun(2, str(setup.doomed), "SIGKILL", "7", "", *command)
    assert done.returncode != 0 and not (tmp_path / "run" / "hf").exists()
    done = torchrun(ranks, "-m", "s1fast", *command)
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stdout
    assert distance(tmp_path / "run", setup.whole) <= 1e-4


@pytest.mark.slow
def test_two_ranks_profiled(setup: Setup, tmp_path: Path) -> None:
    """All record, the first writes; gloo's collectives are found, and part of them is exposed."""
    flags = ["--output", str(tmp_path / "run"), "--profile", "3:4"]
    done = torchrun(2, "-m", "s1fast", "train", str(setup.recipe), *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("profile of steps 3 to 4 on CPU, rank 0 of 2") == 1
    facts = json.loads((tmp_path / "run" / "profile" / "table.json").read_text())
    assert 0 < facts["rows_s"]["exposed communication"] <= facts["communication_s"]
    assert losses(tmp_path / "run") == losses(setup.whole)


@pytest.mark.slow
def test_ranks_that_disagree_write_nothing(setup: Setup, tmp_path: Path) -> None:
    flags = "--optim.lr 0.5"
    command = ["train", str(setup.recipe), "--output", str(tmp_path / "run")]
    done = torchrun(2, str(setup.doomed), "SIGKILL", "-1", flags, *command)
    assert done.returncode != 0
    assert "the ranks disagree on optim.lr: 0.5 on rank 1, 0.001 on rank 0" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_rank_that_falls_silent_ends_all(setup: Setup, tmp_path: Path) -> None:
    """Rank 1 is stopped, not dead: torchrun sees nothing amiss, and its connections stay open."""
    command = ["train", str(setup.recipe), "--output", str(tmp_path / "run")]
    done = torchrun(2, str(setup.doomed), "SIGSTOP", "3", "", *command)
    assert done.returncode != 0
    assert "rank 0: nothing heard from rank 1 for 6 s" in done.stderr


def test_slurm_starts_a_rank_a_gpu(tmp_path: Path) -> None:
    """Whose cores srun must be told of; scontrol goes on listing nodes after the first."""
    for name, body in (
        ("scontrol", "echo n1; sleep 0.1; echo n2"),
        ("srun", 'printf "%s\\n" "$@"'),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    given = {"JOB_NODELIST": "n[1-2]", "JOB_NUM_NODES": "2", "JOB_ID": "7", "CPUS_PER_TASK": "64"}
    done = subprocess.run(
        ["bash", str(ROOT / "recipes" / "s1-32b.slurm"), "mine.toml", "--optim.lr", "2e-5"],
        env={f"SLURM_{name}": value for name, value in given.items()}
        | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    said = done.stdout.split()
    for flag, value in (("--cpus-per-task", "64"), ("--nnodes", "2"), ("--nproc-per-node", "8")):
        assert said[said.index(flag) + 1] == value
    assert said[said.index("--rdzv-endpoint") + 1] == "n1:29500"
    run = ["-m", "s1fast", "train", "mine.toml", "--checkpoint.resume", "--optim.lr", "2e-5"]
    assert said[-len(run) :] == run
