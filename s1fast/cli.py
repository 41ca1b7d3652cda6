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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from s1fast.errors import InputError
from s1fast.flags import EngineFlags, ThinkingFlags

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
    budgets: str = ""
    """Several maxima, as 500,1000,auto,none: an answer for each from one decode, as a table."""
    num_ignores: str = ""
    """Several numbers of ignores, as 0,2,4: an answer for each of the budgets."""
    accounting: Literal["total", "harness"] = "total"
    """Whether the maximum holds for all thinking, or for each round as in s1's harness."""
    no_thinking: bool = False
    """Answer at once, without budget or markers."""
    top_k: int = 0
    """Sample among the k likeliest; 0 for all."""
    top_p: float = 1.0
    """Sample among the likeliest that together have this probability."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the likeliest."""
    seed: int = 0
    """Seed of the draws."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer."""
    logprobs: int | None = None
    """With --json: log-probabilities of what was drawn, and of so many likeliest beside it."""
    json: bool = False
    """Print one JSON object at the end instead of streaming."""
    thinking: ThinkingFlags = field(default_factory=ThinkingFlags)
    engine: EngineFlags = field(default_factory=EngineFlags)


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


def _split(arguments: list[str], usage: str) -> tuple[list[str], list[str], str]:
    """A command's leading arguments, those behind them, and its name, by its line of usage: what
    stands there before the flags has to be given, unless help is asked for."""
    name = re.split(r" (?:--|\[)", usage)[0]
    count = len(name.split()) - 1
    given = arguments[:count]
    if "-h" in arguments or "--help" in arguments:
        given = [argument for argument in given if not argument.startswith("-")]
    elif len(given) < count or any(argument.startswith("-") for argument in given):
        raise InputError(f"usage: s1fast {usage}")
    return given, arguments[len(given) :], f"s1fast {name}"


def _without_flags(arguments: list[str], usage: str, about: str) -> list[str]:
    """All arguments of a command that has no flags but --help."""
    if "-h" in arguments or "--help" in arguments:
        print(f"usage: s1fast {usage}\n\n{about}")
        sys.exit()
    given, more, _ = _split(arguments, usage)
    if more:
        raise InputError(f"usage: s1fast {usage}; {more[0]!r} is one too many")
    return given


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

    recipe, flags, prog = _split(arguments, "train RECIPE.toml [--key value ...]")
    default = load_recipe(Path(recipe[0])) if recipe else TrainConfig()
    config = _parse(TrainConfig, flags, prog, default)
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

    recipe, flags, prog = _split(arguments, "plan RECIPE.toml [--key value ...]")
    known = load_recipe(Path(recipe[0])) if recipe else TrainConfig()
    plan(_parse(PlanConfig, flags, prog, PlanConfig(**vars(known))))


def _export(arguments: list[str]) -> None:
    about = "Write the newest snapshot of a run as a Hugging Face folder."
    run, target = _without_flags(arguments, "export RUN TARGET", about)
    from s1fast.trainer import export

    print(export(Path(run), Path(target)))


def _generate(arguments: list[str]) -> None:
    given, flags, prog = _split(arguments, "generate MODEL --prompt TEXT")
    config = _parse(GenerateConfig, flags, prog, flat=True)
    limit = _maximum("--max-thinking-tokens", config.max_thinking_tokens)
    budgets = _maxima("--budgets", config.budgets)
    ignores = _maxima("--num-ignores", config.num_ignores)
    if config.no_thinking and (budgets or ignores):
        raise InputError("--no-thinking: without thinking there is no --budgets or --num-ignores")
    from s1fast.budget import Budget
    from s1fast.decoder import Engine, SamplingParams

    values = {**vars(config), **vars(config.thinking), "max_thinking_tokens": limit}

    def asked(cls: Any) -> Any:
        return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})

    budget, params = asked(Budget), asked(SamplingParams)
    (model,) = given
    engine = Engine(model, **vars(config.engine))
    from s1fast.console import print_stream

    chosen = None if config.no_thinking else budget
    stream = engine.stream(config.prompt, params, chosen, budgets=budgets, num_ignores=ignores)
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


def _maxima(flag: str, text: str) -> list[Any] | None:
    """Several of them; None where the flag was not given."""
    return [_maximum(flag, part) for part in text.split(",")] if text else None


def _serve(arguments: list[str]) -> None:
    given, flags, prog = _split(arguments, "serve MODEL [--key value ...]")
    try:
        from s1fast.server import ServeConfig, serve
    except ModuleNotFoundError as error:
        raise InputError(f"serve needs {error.name}: pip install 's1fast[serve]'") from None
    config = _parse(ServeConfig, flags, prog, flat=True)
    serve(given[0], config)


def _demo(arguments: list[str]) -> None:
    config = _parse(DemoConfig, arguments, "s1fast demo")
    from s1fast.demo import run

    run(config.task, seed=config.seed, output=config.output, weights=config.weights)


def _bench(arguments: list[str]) -> None:
    kind, flags, prog = _split(arguments, "bench kernels [--key value ...]")
    if kind not in ([], ["kernels"]):
        raise InputError(f"no bench {kind[0]!r}; there is kernels")
    from s1fast.bench.kernels import KernelsConfig, run

    run(_parse(KernelsConfig, flags, prog))


def _evaluate(arguments: list[str]) -> None:
    from rich.console import Console

    from s1fast.evaluate import EvaluateConfig, evaluate

    given, flags, prog = _split(arguments, "evaluate MODEL --tasks T1,T2")
    config = _parse(EvaluateConfig, flags, prog, flat=True)
    evaluate(given[0], config, Console())


def _compare(arguments: list[str]) -> None:
    about = (
        "Differences of two results folders of s1fast evaluate, cell by cell, with paired\n"
        "bootstrap intervals over the problems that both have."
    )
    a, b = _without_flags(arguments, "compare A B", about)
    from rich.console import Console

    from s1fast.curves import compare

    compare(Path(a), Path(b), Console())


def _distill(arguments: list[str]) -> None:
    from rich.console import Console

    from s1fast.recipes.distill import DistillConfig, distill

    given, flags, prog = _split(arguments, "distill QUESTIONS STORE --model M")
    config = _parse(DistillConfig, flags, prog, flat=True)
    console = Console()
    console.print(str(distill([Path(given[0])], Path(given[1]), config, console)))


def _curate(arguments: list[str]) -> None:
    from rich.console import Console

    from s1fast.recipes.select import CurateConfig, curate

    given, flags, prog = _split(arguments, "curate FEATURES FOLDER [--key value ...]")
    config = _parse(CurateConfig, flags, prog)
    console = Console()
    console.print(str(curate([Path(given[0])], Path(given[1]), config, console)))


def _build(arguments: list[str]) -> None:
    about = (
        "Compile the CUDA kernels and print where they lie: in $S1FAST_CACHE, by default "
        "~/.cache/s1fast."
    )
    _without_flags(arguments, "build", about)
    from s1fast.build import build

    print(build())
