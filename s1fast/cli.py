"""The command s1fast: parses, prints and calls; no logic of its own.

Torch is imported inside the commands only, so that --help answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from s1fast.errors import InputError

HELP = """\
s1fast: the s1 recipe for test-time scaling, made fast

usage: s1fast COMMAND [arguments]      s1fast COMMAND --help

Train
  train RECIPE.toml [--key value ...]  fine-tune all weights on reasoning traces
  plan RECIPE.toml [--nodes 2 ...]     predict minutes, dollars and memory on GPUs not yet paid for
  export RUN TARGET                    write the newest snapshot of a run as a Hugging Face folder

Make data
  distill QUESTIONS STORE --model M    ask a teacher every question once and keep its thinking
  curate FEATURES FOLDER               select a small training set: quality, difficulty, diversity

Generate
  generate MODEL --prompt TEXT         think under a budget, then answer; streams
  demo                                 train a tiny reasoning model and watch accuracy rise with
                                       thinking, then decode real weights: two minutes on a laptop
  serve MODEL                          OpenAI-compatible server, with a page to watch it think

Measure
  evaluate MODEL --tasks math500       accuracy over budgets and Waits: the paper's curves
  compare A B                          two results folders, with paired intervals
  bench kernels                        time our kernels beside their peers and the device's ceilings

Set up
  build                                compile the CUDA kernels of the token loop now, not on first
                                       use; needs nvcc and no GPU

Examples
  s1fast train recipes/smollm2-gsm8k-cpu.toml --data.preview 2
  s1fast train recipes/smollm2-gsm8k-cpu.toml --output out/mine --optim.lr 2e-5
  s1fast plan recipes/s1-32b.toml --nodes 2 --png out/plan.png
  s1fast distill questions.jsonl out/traces.sqlite --model MODEL --input-price 0.3 \\
      --output-price 2.5 --max-dollars 50
  s1fast curate out/features.jsonl out/s1K --size 1000
  s1fast evaluate out/mine/hf --tasks aime24,math500 --budgets 500,1000,2000,auto
  s1fast generate out/mine/hf --prompt "What is 17 + 25?" --max-thinking-tokens 200 \\
      --num-ignore 2 --ignore-text Wait
  s1fast serve out/mine/hf --port 8000

MODEL is a folder in Hugging Face format (Qwen2, Qwen2.5 or Llama architecture) or a hub id.
Bad input ends with one line on stderr and exit code 2, before anything is overwritten.
"""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Think under a budget, then answer. Thinking is dimmed, interventions are marked."""

    prompt: str
    """The user's question."""
    max_thinking_tokens: str = "auto"
    """Most thinking tokens: a count, auto (what the context leaves), or none."""
    min_thinking_tokens: int = 0
    """Thinking cannot end before this many tokens."""
    num_ignore: int | None = None
    """How many times the end of thinking is ignored."""
    budgets: str = ""
    """Several maxima, as 500,1000,auto,none: an answer for each from one decode, as a table."""
    num_ignores: str = ""
    """Several numbers of ignores, as 0,2,4: an answer for each of the budgets."""
    ignore_text: tuple[str, ...] = ("Wait",)
    """Appended for each ignored end; several are used in turn."""
    final_text: str = "Final Answer:"
    """Appended after the answer marker when thinking is cut."""
    accounting: Literal["total", "harness"] = "total"
    """Whether the maximum holds for all thinking, or for each round as in s1's harness."""
    no_thinking: bool = False
    """Answer at once, without budget or markers."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """Sample among the k likeliest; 0 for all."""
    top_p: float = 1.0
    """Sample among the likeliest that together have this probability."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the likeliest."""
    seed: int = 0
    """Seed of the draws."""
    max_tokens: int | None = None
    """Most tokens generated in all; the whole context unless given."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer."""
    logprobs: int | None = None
    """With --json: log-probabilities of what was drawn, and of so many likeliest beside it."""
    markers: Literal["auto", "s1", "s1.1", "think"] = "auto"
    """Between which the model thinks: s1's, or <think> and </think>; auto: by the vocabulary."""
    speculate: int = 0
    """Draft up to so many tokens a step from what was written before; changes no token."""
    matmul: Literal["torch", "cuda"] = "torch"
    """Products of a GPU's steps: cuBLAS, or for up to 8 tokens on an H100 or H200 ours (csrc)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision; auto is bfloat16 on GPU and float32 on CPU."""
    json: bool = False
    """Print one JSON object at the end instead of streaming."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Train a tiny reasoning model, decode it under budgets, then decode real weights."""

    task: Literal["map", "search"] = "map"
    """map takes seconds to learn, search minutes."""
    seed: int = 0
    """Seed of the problems and the weights."""
    output: Path = Path("out/demo")
    """Folder that is made anew, for the run and the scaling curve."""
    weights: Path = Path(".models/smollm2-135m")
    """Model folder for the second act."""


def main() -> None:
    """Entry point: dispatches to a command and turns the user's mistakes into one line."""
    arguments = sys.argv[1:]
    commands: dict[str, Callable[[list[str]], None]] = {
        "train": _train,
        "plan": _plan,
        "export": _export,
        "generate": _generate,
        "serve": _serve,
        "demo": _demo,
        "bench": _bench,
        "evaluate": _evaluate,
        "compare": _compare,
        "distill": _distill,
        "curate": _curate,
        "build": _build,
    }
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(HELP, flush=True)  # a closed pipe shows here, not at the interpreter's end
            sys.exit(0 if arguments else 2)
        if arguments[0] == "--version":
            from s1fast import __version__

            print(__version__, flush=True)
            return
        command = commands.get(arguments[0])
        if command is None:
            raise InputError(f"no command {arguments[0]!r}; there are {', '.join(commands)}")
        command(arguments[1:])
    except InputError as error:
        line = "".join(c if c.isprintable() else " " for c in str(error))
        if len(line) > 1000:  # a whole file, quoted: what and why stand at the two ends
            line = f"{line[:500]} ... {line[-500:]}"
        print(f"s1fast: error: {line}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except KeyboardInterrupt:
        print("s1fast: interrupted", file=sys.stderr)
        sys.exit(130)


def _positional(arguments: list[str], count: int, usage: str) -> list[str]:
    """Takes the leading arguments that are no flags; tyro parses the rest."""
    wanted = arguments[:count]
    if "-h" in arguments or "--help" in arguments:
        return [argument for argument in wanted if not argument.startswith("-")]
    if len(wanted) < count or any(argument.startswith("-") for argument in wanted):
        raise InputError(f"usage: s1fast {usage}")
    return wanted


def _parse(
    cls: Any, arguments: list[str], prog: str, default: Any = None, *, flat: bool = False
) -> Any:
    """An object of that dataclass; of tyro's boxed complaint, the first paragraphs as one line.

    flat: the flags of inner dataclasses go without their prefix.
    """
    import tyro

    known = {} if default is None else {"default": default}
    config = (tyro.conf.OmitArgPrefixes,) if flat else ()
    boxed = io.StringIO()
    try:
        with contextlib.redirect_stderr(boxed):
            return tyro.cli(cls, args=arguments, prog=prog, config=config, **known)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    text = re.sub(r"\x1b\[[\d;]*m", "", boxed.getvalue())
    lines = [line.strip("│ ") for line in text.splitlines()[1:-1]]  # without the box's edges
    said = " ".join("; " if set(line) == {"─"} else line for line in lines)
    said = re.split(" ; +(?:Argument helptext|For full helptext)", said)[0].replace(" ; ", ";")
    raise InputError(f"{said}; {prog} --help lists the flags")


def _train(arguments: list[str]) -> None:
    from s1fast.config import TrainConfig, load_recipe

    usage = "train RECIPE.toml [--key value ...]"
    recipe = _positional(arguments, 1, usage)
    default = load_recipe(Path(recipe[0])) if recipe else TrainConfig()
    prog = f"s1fast {usage.split(' [')[0]}"
    config = _parse(TrainConfig, arguments[len(recipe) :], prog, default)
    if config.dry_run:
        from s1fast.plan import dry_run

        dry_run(config)
        return
    # Every step has another number of tokens: blocks that cannot grow would not fit the next one's.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    from s1fast.trainer import train

    train(config)


def _plan(arguments: list[str]) -> None:
    from s1fast.config import TrainConfig, load_recipe
    from s1fast.plan import PlanConfig, plan

    usage = "plan RECIPE.toml [--key value ...]"
    recipe = _positional(arguments, 1, usage)
    known = load_recipe(Path(recipe[0])) if recipe else TrainConfig()
    prog = f"s1fast {usage.split(' [')[0]}"
    plan(_parse(PlanConfig, arguments[len(recipe) :], prog, PlanConfig(**vars(known))))


def _export(arguments: list[str]) -> None:
    usage = "export RUN TARGET"
    if "-h" in arguments or "--help" in arguments:
        print(
            f"usage: s1fast {usage}\n\nWrite the newest snapshot of a run as a Hugging Face folder."
        )
        return
    run, target = _positional(arguments, 2, usage)
    if arguments[2:]:
        raise InputError(f"usage: s1fast {usage}; {arguments[2]!r} is one too many")
    from s1fast.trainer import export

    print(export(Path(run), Path(target)))


def _generate(arguments: list[str]) -> None:
    usage = "generate MODEL --prompt TEXT"
    model = _positional(arguments, 1, usage)
    prog = f"s1fast {usage.split(' --')[0]}"
    config = _parse(GenerateConfig, arguments[len(model) :], prog)
    limit = _maximum("--max-thinking-tokens", config.max_thinking_tokens)
    budgets = [_maximum("--budgets", x) for x in config.budgets.split(",") if x] or None
    ignores = [_maximum("--num-ignores", x) for x in config.num_ignores.split(",") if x] or None
    if config.no_thinking and (budgets or ignores):
        raise InputError("--no-thinking: without thinking there is no --budgets or --num-ignores")
    from s1fast.budget import Budget
    from s1fast.decoder import Engine, SamplingParams

    budget = Budget(
        max_thinking_tokens=limit,
        min_thinking_tokens=config.min_thinking_tokens,
        num_ignore=config.num_ignore,
        ignore_text=config.ignore_text,
        final_text=config.final_text,
        accounting=config.accounting,
    )
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    values = {k: v for k, v in dataclasses.asdict(config).items() if k in names}
    params = SamplingParams(**values)
    engine = Engine(
        model[0],
        device=config.device,
        dtype=config.dtype,
        markers=config.markers,
        speculate=config.speculate,
        matmul=config.matmul,
    )
    from s1fast.console import print_stream

    asked = None if config.no_thinking else budget
    stream = engine.stream(config.prompt, params, asked, budgets=budgets, num_ignores=ignores)
    print_stream(stream, as_json=config.json)


def _maximum(flag: str, text: str) -> Any:
    """A count, "auto" or None, as it is written on the command line."""
    text = text.strip()
    if text == "none":
        return None
    if text == "auto" and flag != "--num-ignores":
        return text
    try:
        return int(text)
    except ValueError:
        words = "nor none" if flag == "--num-ignores" else "nor auto, nor none"
        raise InputError(f"{flag}: {text!r} is no count, {words}") from None


def _serve(arguments: list[str]) -> None:
    usage = "serve MODEL"
    model = _positional(arguments, 1, f"{usage} [--key value ...]")
    try:
        from s1fast.server import ServeConfig, serve
    except ModuleNotFoundError as error:
        raise InputError(f"serve needs {error.name}: pip install 's1fast[serve]'") from None
    config = _parse(ServeConfig, arguments[len(model) :], f"s1fast {usage}", flat=True)
    serve(model[0], config)


def _demo(arguments: list[str]) -> None:
    config = _parse(DemoConfig, arguments, "s1fast demo")
    from s1fast.demo import run

    run(config.task, seed=config.seed, output=config.output, weights=config.weights)


def _bench(arguments: list[str]) -> None:
    kind = _positional(arguments, 1, "bench kernels [--key value ...]")
    if kind not in ([], ["kernels"]):
        raise InputError(f"no bench {kind[0]!r}; there is kernels")
    from s1fast.bench.kernels import KernelsConfig, run

    run(_parse(KernelsConfig, arguments[len(kind) :], "s1fast bench kernels"))


def _evaluate(arguments: list[str]) -> None:
    from rich.console import Console

    from s1fast.evaluate import EvaluateConfig, evaluate

    usage = "evaluate MODEL --tasks T1,T2"
    given = _positional(arguments, 1, usage)
    prog = f"s1fast {usage.split(' --')[0]}"
    config = _parse(EvaluateConfig, arguments[len(given) :], prog, flat=True)
    evaluate(given[0], config, Console())


def _compare(arguments: list[str]) -> None:
    from rich.console import Console

    from s1fast.curves import compare

    usage = "compare A B"
    if "-h" in arguments or "--help" in arguments:
        print(
            f"usage: s1fast {usage}\n\nDifferences of two results folders of s1fast evaluate, cell "
            "by cell, with paired\nbootstrap intervals over the problems that both have."
        )
        return
    a, b = _positional(arguments, 2, usage)
    if arguments[2:]:
        raise InputError(f"usage: s1fast {usage}; {arguments[2]!r} is one too many")
    compare(Path(a), Path(b), Console())


def _distill(arguments: list[str]) -> None:
    from rich.console import Console

    from s1fast.recipes.distill import DistillConfig, distill

    usage = "distill QUESTIONS STORE --model M"
    given = _positional(arguments, 2, usage)
    prog = f"s1fast {usage.split(' --')[0]}"
    config = _parse(DistillConfig, arguments[len(given) :], prog, flat=True)
    console = Console()
    console.print(str(distill([Path(given[0])], Path(given[1]), config, console)))


def _curate(arguments: list[str]) -> None:
    from rich.console import Console

    from s1fast.recipes.select import CurateConfig, curate

    usage = "curate FEATURES FOLDER"
    given = _positional(arguments, 2, usage)
    config = _parse(CurateConfig, arguments[len(given) :], f"s1fast {usage}")
    console = Console()
    console.print(str(curate([Path(given[0])], Path(given[1]), config, console)))


def _build(arguments: list[str]) -> None:
    if "-h" in arguments or "--help" in arguments:
        print(
            "usage: s1fast build\n\nCompile the CUDA kernels and print where they lie: in "
            "$S1FAST_CACHE, by default ~/.cache/s1fast."
        )
        return
    if arguments:
        raise InputError(f"usage: s1fast build; it takes no {arguments[0]!r}")
    from s1fast.build import build

    print(build())
