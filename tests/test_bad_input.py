"""Every mistake a user can make: one line that names it, exit code 2, and nothing touched."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s1fast import cli
from s1fast.config import TrainConfig, check, field_names, load_recipe, to_toml

ROOT = Path(__file__).resolve().parent.parent
ROW = {"question": "q", "thinking": "t", "answer": "a"}
RECIPE = """\
model = "model"
output = "out/run"
epochs = 1
max_steps = 1
batch_size = 2
data.path = "rows.jsonl"
checkpoint.every = 1
log.tensorboard = false
"""


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


Command = Callable[..., Done]
Refused = Callable[..., None]


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below the folder with its contents."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Path:
    return make_model("qwen2", hidden_size=16, intermediate_size=16, num_hidden_layers=1)


@pytest.fixture
def work(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a recipe, rows and a model that work."""
    folder = tmp_path / "work"
    shutil.copytree(model, folder / "model")
    (folder / "rows.jsonl").write_text((json.dumps(ROW) + "\n") * 3)
    (folder / "recipe.toml").write_text(RECIPE)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command line inside this process."""

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["s1fast", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = typing.cast(int, stop.code or 0)
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run


@pytest.fixture
def refused(command: Command, work: Path) -> Refused:
    """Runs a command that must be refused, with a message that matches the pattern."""

    def run(*arguments: object, naming: str) -> None:
        before = tree(work)
        done = command(*arguments)
        assert done.err.startswith("s1fast: error: ") and done.err.endswith("\n")
        assert done.err.count("\n") == 1 and len(done.err) < 1100
        assert re.search(naming, done.err), done.err
        assert done.code == 2 and done.out == ""
        assert tree(work) == before

    return run


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- what works ---------------------------------------------------------------------------------


def test_without_mistakes_it_works(command: Command, work: Path) -> None:
    """So each refusal below is of its mistake; and flags go before recipe before defaults."""
    done = command("train", "recipe.toml", "--optim.lr", "2e-5", "--data.drop-long")
    assert (done.code, done.err) == (0, "")
    config = load_recipe(work / "out" / "run" / "config.toml")
    assert (config.optim.lr, config.epochs, config.seed) == (2e-5, 1, 0) and config.data.drop_long
    assert (work / "out" / "run" / "hf" / "model.safetensors").exists()
    generate = ["generate", "out/run/hf", "--prompt", "Hi", "--max-tokens", "30", "--json"]
    done = command(*generate, "--max-thinking-tokens", "5", "--num-ignore", "1")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["thinking_tokens"] <= 5
    assert command("export", "out/run", "exported").code == 0
    assert (work / "exported" / "config.json").exists()


# -- data ---------------------------------------------------------------------------------------

SYSTEM, USER = {"role": "system", "content": "s"}, {"role": "user", "content": "u"}
TRACES = {"question": "q", "attempt": "a"}
GEMINI = {"question": "q", "gemini_thinking_trajectory": "t", "gemini_attempt": "a"}


@pytest.mark.parametrize(
    ("line", "naming"),
    [
        ('{"question": "q"', "not valid JSON: .*column"),
        ("no JSON", "not valid JSON"),
        ('{"question": NaN}', "NaN is not JSON"),
        ("[1]", "expected an object, found list"),
        ("{}", "fits no known schema .*it has no fields"),
        ({"prompt": "q", "completion": "a"}, "no known schema .*has fields prompt, completion"),
        ({"question": "q", "thinking": "t"}, "field answer is missing; the row has .*thinking"),
        ({"thinking": "t", "answer": "a"}, "field question is missing"),
        (ROW | {"question": 5}, "field question must be text, found int"),
        (ROW | {"thinking": ["t"]}, "field thinking must be text, found list"),
        (ROW | {"answer": " \n"}, "field answer is empty"),
        (ROW | {"question": "\ud800"}, "field question is not valid Unicode"),
        (TRACES | {"thinking_trajectories": "t"}, "thinking_trajectories must be a list of texts"),
        (TRACES | {"thinking_trajectories": ["t", 5]}, "thinking_trajectories must be a list"),
        (TRACES | {"thinking_trajectories": []}, "field thinking_trajectories is empty"),
        ({"question": "q", "thinking_trajectories": ["t"]}, "field attempt is missing"),
        (GEMINI, "deepseek_thinking_trajectory, deepseek_attempt.*has fields question, gemini"),
        ({"messages": "Hi"}, "field messages must be a list"),
        ({"messages": []}, "field messages must be a list"),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, r"messages\[1\] must have a role"),
        ({"messages": [USER, "x"]}, r"messages\[1\] must have a role"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]: field content is missing"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, r"messages\[0\] is the assistant"),
        ({"messages": [SYSTEM, USER]}, "no token of an assistant turn"),
        ({"text": "no markers"}, "no token of an assistant turn"),
        ({"text": 7}, "field text must be text, found int"),
        ({"a\nb \x1b[31m": 1}, r"fields a b  \[31m"),  # still one line, and no colours
    ],
)
def test_bad_row(line: Any, naming: str, work: Path, refused: Refused) -> None:
    text = line if isinstance(line, str) else json.dumps(line)
    (work / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n{text}\n{json.dumps(ROW)}\n")
    refused("train", "recipe.toml", naming=rf"rows\.jsonl: row 2: .*{naming}")


@pytest.mark.parametrize(
    ("name", "data", "naming"),
    [
        ("rows.jsonl", b"", "rows.jsonl: no rows to train on$"),
        ("rows.jsonl", b"\xff\xfe\xff", "rows.jsonl: row 1: not valid JSON"),
        ("rows.parquet", b"", "rows.parquet: not a usable Parquet file"),
        ("rows.csv", b"question\n", "rows.csv: expected a .jsonl or .parquet file"),
        ("data/notes.txt", b"", "data: no .jsonl or .parquet files there"),
        ("a\nb.jsonl", b"[]", r"a b\.jsonl: row 1: expected an object"),
    ],
)
def test_bad_data_file(name: str, data: bytes, naming: str, work: Path, refused: Refused) -> None:
    path = work / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    chosen = path if path.suffix != ".txt" else path.parent
    refused("train", "recipe.toml", "--data.path", chosen, naming=naming)


@pytest.mark.parametrize(
    ("path", "naming"),
    [
        ("gone.jsonl", "dataset 'gone.jsonl': no such path"),
        ("nobody/nothing", "dataset 'nobody/nothing': no such path .*hub did not deliver it"),
        ("", "data.path: a file, folder or hub id is needed"),
        ("x" * 300, "no such path"),
    ],
)
def test_data_that_is_not_there(path: str, naming: str, refused: Refused) -> None:
    refused("train", "recipe.toml", "--data.path", path, naming=naming)


def test_long_rows(command: Command, work: Path, refused: Refused) -> None:
    rows = [ROW, ROW | {"thinking": "t " * 500}, ROW]
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    limit = ("--data.max-length", 400)
    above = r"rows\.jsonl: row 2: \d+ tokens, above the limit of "
    refused("train", "recipe.toml", *limit, naming=above + "400 .*data.drop_long leaves")
    edit_json(work / "model" / "config.json", max_position_embeddings=300)
    refused("train", "recipe.toml", *limit, naming=above + "300 ")
    none = "no rows to train on, 3 rows were too long"
    refused("train", "recipe.toml", "--data.max-length", 9, "--data.drop-long", naming=none)
    done = command("train", "recipe.toml", *limit, "--data.drop-long")
    assert done.code == 0
    assert "2 sequences" in done.out and "1 left out as too long" in done.out


# -- recipes and flags --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "naming"),
    [
        ("learning_rate = 1e-5", "unknown key learning_rate; did you mean optim.lr?"),
        ("optim.learning_rate = 1e-5", "optim.learning_rate; did you mean optim.lr?"),
        ("num_train_epochs = 3", "did you mean epochs?"),
        ("per_device_train_batch_size = 1", "did you mean batch_size?"),
        ("max_seq_length = 1", "did you mean data.max_length?"),
        ("output_dir = 'x'", "did you mean output?"),
        ("sed = 1", "unknown key sed; did you mean seed?"),
        ("eps = 1e-8", "unknown key eps; did you mean optim.eps?"),
        ("data.max_len = 5", "unknown key data.max_len; did you mean data.max_length?"),
        ("zzz = 1", "unknown key zzz; known keys: model, output"),
        ("epochs = '5'", "epochs must be of type int, got '5'"),
        ("epochs = 1.5", "epochs must be of type int, got 1.5"),
        ("seed = true", "seed must be of type int, got True"),
        ("optim.lr = 'fast'", "optim.lr must be of type float"),
        ("optim.lr = true", "optim.lr must be of type float"),
        ("optim.betas = [0.9]", "optim.betas must be a list of 2"),
        ("optim.betas = [0.9, 'x']", "optim.betas must be of type float"),
        ("optim.betas = 0.9", "optim.betas must be a list of 2"),
        ("data = 3", "data must be a table"),
        ("data.drop_long = 1", "data.drop_long must be of type bool"),
        ("output = 5", "output must be of type Path"),
        ("init = 'guess'", "init must be one of pretrained, random, got 'guess'"),
        ("data.loss_weight = 1", "data.loss_weight must be one of sample, token"),
        ('model = "a\\u0000b"', "model holds a NUL character"),
        ("epochs =", "not valid TOML"),
        (f"seed = {'9' * 5000}", "not valid TOML"),
        (f"seed = {'[' * 5000}", "not valid TOML"),
    ],
)
def test_bad_recipe(line: str, naming: str, work: Path, refused: Refused) -> None:
    (work / "bad.toml").write_text(line + "\n")
    refused("train", "bad.toml", naming=f"error: bad.toml: .*{naming}".replace("?", r"\?"))


# The last is what an argument that is no UTF-8 becomes.
BAD_VALUES = (
    "model= data.path= seed=-1 seed=9223372036854775808 epochs=0 max_steps=-1 batch_size=0 "
    "microbatch_tokens=0 data.max_length=1 data.preview=-1 optim.lr=-1e-5 optim.lr=nan "
    "optim.betas=1.0,0.9 optim.betas=0.9,-0.1 optim.betas=nan,0.9 optim.eps=0 "
    "optim.weight_decay=inf optim.warmup_ratio=1.5 optim.clip_norm=0 checkpoint.every=-1 "
    "checkpoint.keep=0 log.every=0 log.dollars_per_hour=-2 log.dollars_per_hour=inf "
    "profile=12:10 output=\udcff"
)


@pytest.mark.parametrize("assignment", BAD_VALUES.split(), ids=ascii)
def test_bad_value(assignment: str, refused: Refused) -> None:
    name, _, value = assignment.partition("=")
    flag = "--" + name.replace("_", "-")
    refused("train", "recipe.toml", flag, *value.split(","), naming=f"error: {re.escape(name)}: ")


@pytest.mark.parametrize(
    ("arguments", "naming"),
    [
        (["fly"], "no command 'fly'; there are train, plan, export, generate, serve, demo"),
        (["--train"], "no command '--train'"),
        (["build", "csrc"], "usage: s1fast build; 'csrc' is one too many"),
        (["train"], "usage: s1fast train RECIPE.toml"),
        (["train", "gone.toml"], "gone.toml: cannot be read: No such file"),
        (["train", "model"], "model: cannot be read: Is a directory"),
        (["train", "recipe.toml", "--optim.rl", "1"], "--optim.rl.*meant.*--optim.lr"),
        (["train", "recipe.toml", "--optim.lr", "fast"], "--optim.lr: could not convert .*'fast'"),
        (["train", "recipe.toml", "--epochs", "1.5"], "--epochs: invalid literal.*'1.5'"),
        (["train", "recipe.toml", "--init", "guess"], "'guess'.*pretrained"),
        (["train", "recipe.toml", "--attention", "flash"], "attention: .*'flash' needs .* CUDA"),
        (["train", "recipe.toml", "--attention", "torch"], "attention: .*'torch' needs .* CUDA"),
        (["train", "recipe.toml", "--attention", "fast"], "'fast'.*triton"),
        (["train", "recipe.toml", "--seed"], "Missing value for argument '--seed'"),
        (["train", "recipe.toml", "other.toml"], "Unrecognized options: other.toml"),
        (["generate", "model"], "--prompt"),
        (["generate", "model", "--prompt", "x", "--wait", "2"], "Unrecognized options: --wait"),
        (["demo", "--task", "chess"], "'chess'"),
        (["demo", "--output", "model"], "model holds other files"),
        (["export"], "usage: s1fast export RUN TARGET"),
        (["export", "a", "b", "c"], "'c' is one too many"),
        (["export", "model", "target"], "model: no config.toml there"),
    ],
)
def test_bad_command_line(arguments: list[str], naming: str, refused: Refused) -> None:
    refused(*arguments, naming=naming)


# -- models -------------------------------------------------------------------------------------


def remove(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


def rewrite(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda model: (model / name).write_bytes(data)


def configure(**changes: Any) -> Callable[[Path], None]:
    return lambda model: edit_json(model / "config.json", **changes)


def cut(name: str) -> Callable[[Path], None]:
    return lambda model: os.truncate(model / name, (model / name).stat().st_size - 100)


BAD_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (remove("config.json"), "model: no config.json there"),
    "no tokenizer": (remove("tokenizer.json"), "model: no tokenizer.json there"),
    "no weights": (remove("model.safetensors"), "model: neither model.safetensors nor"),
    "config": (rewrite("config.json", b"{"), "config.json: not valid JSON"),
    "type": (configure(model_type="mamba"), "config.json: model_type 'mamba' is not supported"),
    "long type": (configure(model_type="x" * 10**6), "config.json: model_type 'xxx.* not supp"),
    "heads": (configure(num_attention_heads="4"), "config.json: num_attention_heads must be"),
    "quantised": (configure(quantization_config={}), "config.json: quantization_config = {}"),
    "size": (configure(hidden_size=1 << 20), "model.safetensors: .* has shape .* config.json impl"),
    "sizes": (
        configure(hidden_size=1 << 24, num_hidden_layers=1024, intermediate_size=1 << 24),
        "config.json: implies .* weights: too many",
    ),
    "layers": (configure(num_hidden_layers=2), "model: 12 tensors are missing of this model: mod"),
    "tokenizer": (rewrite("tokenizer.json", b"{}"), "tokenizer.json: not a usable tokenizer"),
    "cut tokenizer": (cut("tokenizer.json"), "tokenizer.json: not a usable tokenizer"),
    "cut weights": (cut("model.safetensors"), "model.safetensors: not a usable safetensors file"),
    "template": (rewrite("chat_template.jinja", b"{% if %}"), "model: the chat template failed"),
    "settings": (rewrite("tokenizer_config.json", b"x"), "tokenizer_config.json: not valid JSON"),
    "stop": (rewrite("generation_config.json", b'{"eos_token_id": "x"}'), "eos_token_id must be"),
}


@pytest.mark.parametrize("name", list(BAD_MODELS))
def test_bad_model(name: str, work: Path, refused: Refused) -> None:
    damage, naming = BAD_MODELS[name]
    damage(work / "model")
    refused("train", "recipe.toml", naming=naming)
    budget = ("--max-thinking-tokens", 5)
    refused("generate", "model", "--prompt", "Hi", *budget, naming=naming)


@pytest.mark.parametrize(
    ("name", "naming"),
    [
        ("gone/there/model", "model 'gone/there/model': no such path"),
        ("nobody/nothing", "model 'nobody/nothing': .*the hub did not deliver it"),
        ("recipe.toml", "recipe.toml: no tokenizer.json there"),
        ("rows.jsonl/x", "no such path"),
    ],
)
def test_model_that_is_not_there(name: str, naming: str, refused: Refused) -> None:
    refused("train", "recipe.toml", "--model", name, naming=naming)
    refused("generate", name, "--prompt", "Hi", naming=naming)


def test_tokenizer_with_more_ids_than_the_model(
    make_model: Callable[..., Path], refused: Refused
) -> None:
    small = make_model("qwen2", vocab_size=200)
    refused("train", "recipe.toml", "--model", small, naming="has ids up to .* vocab_size is 200")
    refused("generate", small, "--prompt", "Hi", naming="more ids than config.json's vocab_size")


def test_weights_that_do_not_fit_into_memory(work: Path, refused: Refused) -> None:
    configure(hidden_size=1 << 16)(work / "model")  # 34 GB
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (2 << 30), limits[1]))
    try:
        refused("train", "recipe.toml", "--init", "random", naming=r"no memory for [\d,]+ weights")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_cuda_without_one(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused("train", "recipe.toml", "--device", "cuda", naming="device: cuda was asked for")
    arguments = ("generate", "model", "--prompt", "Hi", "--device", "cuda")
    refused(*arguments, naming="device: cuda was asked for")


# -- output folders -----------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
def test_output_that_is_taken(resume: bool, work: Path, refused: Refused) -> None:
    (work / "thesis").mkdir()
    (work / "thesis" / "thesis.tex").write_text("precious")
    (work / "link").symlink_to(work / "nowhere")
    flags = ["--checkpoint.resume"] if resume else []
    for output, naming in [
        ("thesis", "output: thesis holds other files"),
        ("thesis/thesis.tex", "output: thesis/thesis.tex is a file"),
        ("rows.jsonl/below/run", "rows.jsonl.*: cannot be created: Not a directory"),
        ("x" * 3000, "error: xxx.*xxx: cannot be created: File name too long"),
        ("link", "output: link is a file"),
        ("/proc/run", "/proc/run: cannot be created"),  # where not even root can write
    ]:
        refused("train", "recipe.toml", "--output", output, *flags, naming=naming)


def test_output_of_a_run(command: Command, work: Path, refused: Refused) -> None:
    assert command("train", "recipe.toml").code == 0
    again = ("train", "recipe.toml")
    refused(*again, naming="out/run holds a run already.*--checkpoint.resume")
    other = ("--checkpoint.resume", "--optim.lr", "5e-5", "--epochs", "7")
    changed = r"of another recipe: epochs: 7, was 1; optim.lr: 5e-05, was 1e-05"
    refused(*again, *other, naming=changed)
    (work / "rows.jsonl").write_text(json.dumps(ROW | {"answer": "other"}) + "\n")
    refused(*again, "--checkpoint.resume", naming="data_sha256 was .*would be another run")
    refused("export", "out/run", "out/run/hf", naming="out/run/hf: exists already")
    refused("export", "out/run", "rows.jsonl/x", naming="rows.jsonl: cannot be created")
    (work / "out" / "run" / "config.toml").write_text("epochs = 'x'")
    refused(*again, "--checkpoint.resume", naming="run/config.toml: epochs must be of type int")


# -- generation ---------------------------------------------------------------------------------

HARNESS = "--accounting harness --max-thinking-tokens"
LIMITED = "--max-thinking-tokens none --min-thinking-tokens 40"


@pytest.mark.parametrize(
    ("flags", "naming"),
    [
        ("--max-thinking-tokens many", "--max-thinking-tokens: 'many' is no count, nor auto"),
        ("--max-thinking-tokens 1.5", "--max-thinking-tokens: '1.5' is no count"),
        ("--max-thinking-tokens -5", "max_thinking_tokens must be a count"),
        ("--min-thinking-tokens -1", "min_thinking_tokens must be a count"),
        ("--num-ignore -1", "num_ignore must be a count"),
        ("--max-thinking-tokens 5 --min-thinking-tokens 6", "6 is above max_thinking_tokens 5"),
        (f"{HARNESS} none", "'harness' needs max_thinking_tokens"),
        (f"{HARNESS} 9 --num-ignore 1 --min-thinking-tokens 2", "min_thinking_tokens 2 with num_i"),
        ("--max-thinking-tokens 50 --max-tokens 20", "max_tokens 20 cannot hold max_thinking"),
        ("--max-tokens 30", "max_thinking_tokens 'auto': max_tokens 30 leaves none"),
        (f"{LIMITED} --max-tokens 30", "min_thinking_tokens 40 is above max_tokens 30"),
        ("--max-tokens 0", "max_tokens must be at least 1"),
        ("--max-tokens 5000", "pass the model's context of 1024"),
        ("--temperature -1", "temperature must be"),
        ("--temperature nan", "temperature must be"),
        ("--top-p 0", "top_p must be"),
        ("--top-p 1.5", "top_p must be"),
        ("--min-p 2", "min_p must be"),
        ("--top-k -1", "top_k must be"),
        ("--seed -1", "seed must be"),
        ("--stop ''", "stop must be a list of non-empty texts"),
        ("--device tpu", "'tpu'"),
    ],
)
def test_bad_generation(flags: str, naming: str, refused: Refused) -> None:
    arguments = [flag.strip("'") for flag in flags.split(" ")]
    refused("generate", "model", "--prompt", "Hi", *arguments, naming=naming)


def test_prompt_longer_than_the_context(refused: Refused) -> None:
    refused("generate", "model", "--prompt", "x " * 2000, naming="pass the model's context of 1024")


# -- in processes of their own ------------------------------------------------------------------


def spawn(*arguments: object) -> Done:
    command = [sys.executable, "-m", "s1fast", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(
    ("arguments", "naming"),
    [
        (["fly"], "no command 'fly'"),
        (["train", "recipe.toml", "--data.path", "bad.jsonl"], "bad.jsonl: row 1: not valid JSON"),
        (["generate", "model", "--prompt", "x", "--max-tokens", "0"], "max_tokens must be"),
    ],
)
def test_as_a_user_sees_it(arguments: list[str], naming: str, work: Path) -> None:
    """Nothing that is imported adds a line of its own."""
    (work / "bad.jsonl").write_text("{")
    before = tree(work)
    done = spawn(*arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("s1fast: error: ") and done.err.count("\n") == 1
    assert naming in done.err
    assert tree(work) == before


def test_help_is_quick_and_complete(work: Path) -> None:
    """Medians, because other programs run here too."""
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        done = spawn("--help")
        seconds.append(time.perf_counter() - began)
        assert (done.code, done.err) == (0, "")
    assert statistics.median(seconds) < 0.5
    for name in ("train", "export", "generate", "demo", "distill", "curate", "build"):
        assert f"\n  {name} " in done.out
    assert spawn().code == 2


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "recipe.toml", "--help"], ["curate", "a", "b", "--help"]]
)
def test_help_does_not_import_torch(arguments: list[str], work: Path) -> None:
    code = f"""
import sys
from s1fast import cli
sys.argv = ["s1fast", *{arguments}]
try:
    cli.main()
except SystemExit as stop:
    assert not stop.code
sys.exit(sorted({{"torch", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == "[]\n"


@pytest.mark.parametrize(
    "name", ["train", "generate", "export", "demo", "distill", "curate", "build"]
)
def test_help_of_commands(name: str, command: Command, work: Path) -> None:
    before = tree(work)
    for arguments in ([name, "--help"], [name, "model", "-h"], [name, "a", "b", "--help"]):
        if name == "train" and len(arguments) > 2:
            arguments[1] = "recipe.toml"
        done = command(*arguments)
        assert (done.code, done.err) == (0, "") and f"s1fast {name}" in done.out
    assert tree(work) == before


def test_help_shows_the_recipes_defaults(command: Command, work: Path) -> None:
    (work / "recipe.toml").write_text("optim.lr = 0.123\ndata.path = 'my-rows.jsonl'\n")
    flat = " ".join(command("train", "recipe.toml", "--help").out.replace("│", " ").split())
    assert "Peak learning rate. (default: 0.123)" in flat and "my-rows.jsonl" in flat
    for name in field_names(TrainConfig):
        assert re.search(rf"--{re.escape(name.replace('_', '-'))}[ ,]", flat), name


# -- the configuration itself -------------------------------------------------------------------


def configs(cls: type) -> st.SearchStrategy[Any]:
    """Any instance of a configuration class."""
    texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
    kinds: dict[Any, st.SearchStrategy[Any]] = {
        str: texts,
        Path: texts.map(Path),
        int: st.integers(),
        float: st.floats(allow_nan=False),
        bool: st.booleans(),
        tuple[float, float]: st.tuples(st.floats(0, 1), st.floats(0, 1)),
    }
    fields = {}
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            fields[name] = configs(typing.cast(type, hint))
        elif typing.get_origin(hint) is typing.Literal:
            fields[name] = st.sampled_from(typing.get_args(hint))
        else:
            fields[name] = kinds[hint]
    return st.builds(cls, **fields)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(config=configs(TrainConfig))
def test_config_is_its_own_recipe(
    config: TrainConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "recipe.toml"
    path.write_bytes(to_toml(config).encode())
    assert load_recipe(path) == config


def test_memory_grows_unless_told_otherwise(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch reads it when it first takes memory of a GPU; what the user has set stays."""
    found = []
    name = "PYTORCH_ALLOC_CONF"
    monkeypatch.delenv(name, raising=False)  # another test's
    monkeypatch.setattr("s1fast.trainer.train", lambda config: found.append(os.environ.get(name)))
    for environment in ({}, {name: "mine"}, {"PYTORCH_CUDA_ALLOC_CONF": "mine"}):
        with patch.dict(os.environ, environment):
            cli._train([str(work / "recipe.toml")])
    assert found == ["expandable_segments:True", "mine", None]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_recipes_parse(path: Path) -> None:
    check(load_recipe(path))


def test_there_are_few_fields() -> None:
    names = field_names(TrainConfig)
    assert len(set(names)) == len(names) < 60
    assert {"model", "data.path", "optim.lr", "checkpoint.resume"} <= set(names)
