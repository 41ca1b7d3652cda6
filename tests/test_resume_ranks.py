"""Runs on several ranks, killed and resumed: the same bits; on other ranks: the same state."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import run_ranks
from run_ranks import Doom, random_doom
from s1fast import snapshot
from s1fast.chat import Chat
from s1fast.checkpoint import read_config
from s1fast.config import load_recipe
from s1fast.model import Model
from s1fast.parallel import Layout, shard_model
from s1fast.ranks import Ranks
from s1fast.rows import load_examples
from s1fast.step import Trainer
from test_slices import mesh_of

STEPS, EVERY = 12, 2
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setup:
    """A recipe, the run of it on two ranks that nobody disturbed, and how long its steps took."""

    recipe: Path
    whole: Path
    wall_s: float


@pytest.fixture(scope="module")
def setup(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("ranks")
    draw = random.Random(0)
    rows = folder / "rows.jsonl"
    with rows.open("w") as file:
        for i in range(11):
            answer = "think " * draw.randrange(25) + str(2 * i)
            text = f"<|im_start|>user\n{i} and {i}?<|im_end|>\n<|im_start|>assistant\n{answer}"
            file.write(json.dumps({"text": text + "<|im_end|>\n"}) + "\n")
    model = make_model("qwen2", tie_word_embeddings=True, intermediate_size=50)
    recipe = folder / "recipe.toml"
    recipe.write_text(
        f'model = "{model}"\noutput = "{folder / "whole"}"\n'
        'epochs = 4\nbatch_size = 4\nmicrobatch_tokens = 60\ndevice = "cpu"\n'
        f'[data]\npath = "{rows}"\n[optim]\nlr = 1e-3\n'
        f'[checkpoint]\nevery = {EVERY}\nkeep = 9\nexport_dtype = "float32"\n'
        "[log]\ntensorboard = false\n"
    )
    done = run_ranks.run(2, ["train", str(recipe)], folder / "log")
    assert done.codes == [0, 0], done.output
    lines = (folder / "whole" / "metrics.jsonl").read_text().splitlines()
    return Setup(recipe, folder / "whole", sum(json.loads(line)["step_s"] for line in lines))


def resume(setup: Setup, output: Path) -> list[str]:
    return ["train", str(setup.recipe), "--output", str(output), "--checkpoint.resume"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


LAST = f"snapshots/step-{STEPS:06}"
TIMING = {"step_s", "tokens_per_s", "tflops", "mfu", "eta_s", "dollars", "exposed_s"}


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


def assert_same_outcome(run: Path, whole: Path, what: object) -> None:
    """Every file of the last snapshot, manifest included, and of the exported model; the losses."""
    assert contents(run / LAST) == contents(whole / LAST), what
    assert contents(run / "hf") == contents(whole / "hf"), what
    assert metrics(run) == metrics(whole), what
    assert not [path for path in run.rglob("*") if path.name.endswith(".tmp")], what


def state(run: Path, step: int = STEPS) -> dict[str, Tensor]:
    """A snapshot's tensors whole again, from what its manifest says."""
    folder = run / "snapshots" / f"step-{step:06}"
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {name: load_file(folder / name) for name in manifest["files"]}
    return {
        name: torch.cat([files[shard["file"]][name] for shard in entry["shards"]])
        for name, entry in manifest["tensors"].items()
    }


def test_the_undisturbed_run(setup: Setup) -> None:
    """It trained, each rank wrote its half, and nothing else is left."""
    losses = [line["loss"] for line in metrics(setup.whole)]
    assert len(losses) == STEPS and losses[-1] < 0.9 * losses[0]
    names = sorted(path.name for path in (setup.whole / "snapshots").iterdir())
    assert names == [f"step-{step:06}" for step in range(EVERY, STEPS + 1, EVERY)]
    sizes = {k: len(v) for k, v in contents(setup.whole / LAST).items() if k.startswith("rank-")}
    assert sizes.keys() == {"rank-00000.safetensors", "rank-00001.safetensors"}
    assert max(sizes.values()) < 1.1 * min(sizes.values())
    assert_same_outcome(setup.whole, setup.whole, "no temporary files")


# -- killed ---------------------------------------------------------------------------------------


SAVING = (
    Doom(1, event=2, of="snapshot_writer.write_tensors"),
    Doom(1, event=1, of="snapshot_writer.write_atomic"),  # its part is there, the note is not
    Doom(0, event=4, of="snapshot_writer.write_atomic"),  # all parts are, the manifest is not
    Doom(0, event=1, of="checkpoint.write_tensors"),  # the model is being exported
)


def survive(setup: Setup, folder: Path, world: int, dooms: list[Doom], draw: random.Random) -> int:
    """Runs killed by the dooms, each resumed by the next, and at last to the end; a run that is
    done is compared and another begun. Returns how many were killed."""
    folder.mkdir(exist_ok=True)
    kills = runs = 0
    for doom in [*dooms, None]:
        arguments = resume(setup, folder / str(runs))
        done = run_ranks.run(world, arguments, folder / "log", doom, draw.uniform(0, 0.3))
        if done.codes == [0] * world:
            assert_same_outcome(folder / str(runs), setup.whole, (runs, doom))
            runs += 1
        else:
            assert doom is not None, done.output
            assert done.codes[doom.rank] == -signal.SIGKILL, (doom, done.output)
            kills += 1
    return kills


def test_killed_while_saving(setup: Setup, tmp_path: Path) -> None:
    """One of two ranks, at the moments that matter: each leaves what must not be mistaken."""
    assert survive(setup, tmp_path, 2, list(SAVING), random.Random(0)) == len(SAVING)


@pytest.mark.parametrize("count", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random(count: int, setup: Setup, tmp_path: Path) -> None:
    """Either of two ranks, at any call that matters or any time; the run ends in the same bits."""
    draw = random.Random(count)
    dooms = [random_doom(draw, 2, 150, setup.wall_s) for _ in range(count)]
    kills = survive(setup, tmp_path, 2, dooms, draw)
    while kills < count:  # some struck after the end
        dooms = [random_doom(draw, 2, 60, setup.wall_s / 2) for _ in range(count - kills)]
        kills += survive(setup, tmp_path / str(kills), 2, dooms, draw)


def test_a_full_disk_ends_every_rank(setup: Setup, tmp_path: Path) -> None:
    """Rank 1 cannot write its third part: both end with the message, and the run can go on."""
    doom = Doom(1, event=3, of="snapshot_writer.write_tensors", full=True)
    began = time.monotonic()
    output = tmp_path / "run"
    done = run_ranks.run(2, resume(setup, output), tmp_path / "log", doom, linger_s=30)
    assert done.codes == [2, 2] and time.monotonic() - began < 60 + 30
    where = output / "snapshots" / "step-000006"
    assert f"rank 1: {where}: cannot be written: No space left on device" in done.output
    names = sorted(path.name for path in (output / "snapshots").iterdir())
    assert names == ["step-000002", "step-000004"]
    done = run_ranks.run(2, resume(setup, output), tmp_path / "log")
    assert done.codes == [0, 0] and "resuming after step 4" in done.output
    assert_same_outcome(output, setup.whole, done.output)


# -- on other ranks -------------------------------------------------------------------------------


def run_of(setup: Setup, folder: Path, step: int) -> Path:
    """A copy of the undisturbed run as it was after a step."""
    folder.mkdir(parents=True)
    for name in ("config.toml", "metrics.jsonl"):
        shutil.copy(setup.whole / name, folder)
    name = f"snapshots/step-{step:06}"
    shutil.copytree(setup.whole / name, folder / name)
    return folder


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_other_ranks_restore_the_same_state(world: int, setup: Setup) -> None:
    """Bit for bit: weights and moments in the memory of FSDP and optimizer, and the step count."""
    config, wanted = load_recipe(setup.recipe), state(setup.whole)
    source = Path(config.model)
    examples, _ = load_examples(config.data, Chat.load(source), 1024)
    saved, _ = snapshot.newest(setup.whole / "snapshots", repair=False)
    assert saved is not None
    found: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for rank in range(world):
        with mesh_of(rank, world) as mesh:
            layout = Layout(CPU, Ranks(rank, world), mesh=mesh)
            with torch.device("meta"):
                model = Model(read_config(source))
            shard_model(model, layout)
            model.materialise(CPU, torch.float32)
            trainer = Trainer(config, model, examples, layout)
            trainer.restore(saved)
            assert trainer.optimizer.steps == STEPS
            for name, parameter in model.named_parameters():
                local: Any = parameter
                found[f"param/{name}"].append(local.to_local().detach())
                for moment in ("exp_avg", "exp_avg_sq"):
                    found[f"{moment}/{name}"].append(getattr(trainer.optimizer, moment)[name])
    for name, x in wanted.items():
        assert torch.cat(found[name]).equal(x), name


CLOSE = 2e-6
"""Relative, in norm, of a tensor after six steps on other ranks: fp32 sums in another order, each
rounded to 2^-24, so 1e-6 of a gradient; AdamW may double that in a moment. The steps themselves
move every tensor a hundred times as far and more."""


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("world", [1, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_other_ranks(world: int, setup: Setup, tmp_path: Path) -> None:
    """Half the steps on two ranks, the rest on others: the same losses and weights but for
    rounding, which a run that began anew, or with other moments, does not show."""
    run = run_of(setup, tmp_path / "run", STEPS // 2)
    done = run_ranks.run(world, resume(setup, run), tmp_path / "log")
    assert done.codes == [0] * world, done.output
    assert f"resuming after step {STEPS // 2}" in done.output
    assert len(contents(run / LAST)) == world + 1
    found, wanted, half = state(run), state(setup.whole), state(setup.whole, STEPS // 2)
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert distance(found[name], x) <= CLOSE and distance(half[name], x) > 100 * CLOSE, name
    losses = [[line["loss"] for line in metrics(folder)] for folder in (run, setup.whole)]
    assert losses[0] == pytest.approx(losses[1], rel=CLOSE)


# -- exported -------------------------------------------------------------------------------------


def test_two_ranks_export_what_transformers_loads(setup: Setup) -> None:
    """Logits of the exported folder are those of the snapshot's weights, put in place by hand."""
    import transformers

    found = transformers.AutoModelForCausalLM.from_pretrained(setup.whole / "hf")
    assert found.dtype == torch.float32
    source = transformers.AutoModelForCausalLM.from_pretrained(load_recipe(setup.recipe).model)
    before = source(torch.arange(40)[None]).logits
    weights = {n.removeprefix("param/"): x for n, x in state(setup.whole).items() if "param" in n}
    with torch.no_grad():
        source.model.embed_tokens.weight.copy_(weights["embed.weight"])
        source.model.norm.weight.copy_(weights["head.norm"])
        for i, layer in enumerate(source.model.layers):
            ours = {n.split(".")[-1]: x for n, x in weights.items() if n.startswith(f"layers.{i}.")}
            attn, mlp = layer.self_attn, layer.mlp
            heads = (attn.q_proj, attn.k_proj, attn.v_proj)
            for kind in ("weight", "bias"):
                parts = ours[f"qkv_{kind}"].split([64, 32, 32])
                for theirs, part in zip(heads, parts, strict=True):
                    getattr(theirs, kind).copy_(part)
            attn.o_proj.weight.copy_(ours["o_weight"])
            gate, up = ours["gate_up_weight"].split([50, 50])
            mlp.gate_proj.weight.copy_(gate)
            mlp.up_proj.weight.copy_(up)
            mlp.down_proj.weight.copy_(ours["down_weight"])
            layer.input_layernorm.weight.copy_(ours["input_norm"])
            layer.post_attention_layernorm.weight.copy_(ours["post_norm"])
        logits = [model(torch.arange(40)[None]).logits for model in (found, source)]
    assert logits[0].equal(logits[1]) and not logits[0].allclose(before)


def test_one_process_exports_what_two_ranks_saved(setup: Setup, tmp_path: Path) -> None:
    target = tmp_path / "out"
    done = run_ranks.run(1, ["export", str(setup.whole), str(target)], tmp_path / "log")
    assert done.codes == [0], done.output
    assert contents(target) == contents(setup.whole / "hf")
