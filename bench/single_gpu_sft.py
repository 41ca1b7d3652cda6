"""Full fine-tuning on one GPU, ours beside the best loop that transformers makes possible.

    python -m s1fast.bench.single_gpu_sft
    python -m s1fast.bench.single_gpu_sft --model 1.5B --recompute full --only
    python -m s1fast.bench.single_gpu_sft --only "varlen, one sequence"

A random model of Qwen2.5's shape, 3B unless told otherwise, sequences as long as s1K's, 16 a step,
fp32 weights under bf16 arithmetic, AdamW: the same data and the same GPU, one after the other. Of
transformers every combination of {sdpa, varlen} x {compile} x {recompute} x {packed, one sequence
at a time} is tried, with Liger's kernels too where they are installed, and each is listed: with its
time, or why it has none. Before ours starts the plan's prediction is printed, after it the truth.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from s1fast.bench.environment import RESULTS, device_name, save
from s1fast.chat import Example
from s1fast.config import DataConfig, TrainConfig
from s1fast.metrics import peak_tflops, train_flops
from s1fast.model import Model, ModelConfig
from s1fast.packing import pack_batch, step_indices
from s1fast.parallel import join, leave, shard_model
from s1fast.plan import PROMPT_TOKENS, memory
from s1fast.planner import Machine, Sequences, estimate
from s1fast.published import qwen, sequence_lengths
from s1fast.rates import find_rates, gpu_kind
from s1fast.step import Trainer

Recompute = Literal["auto", "none", "full"]
SIZES = ("0.5B", "1.5B", "3B", "7B")
WARM_UP, MEASURED = 2, 3
"""Steps; every variant takes the same ones."""


@dataclass(frozen=True)
class Problem:
    model: ModelConfig
    examples: list[Example]
    config: TrainConfig
    device: torch.device

    def batch(self, step: int) -> list[Example]:
        chosen = step_indices(len(self.examples), self.config.batch_size, self.config.seed, step)
        return [self.examples[i] for i in chosen]


@dataclass
class Outcome:
    """Of one variant: seconds a step and peak bytes, or why there are none."""

    name: str
    step_s: float | None = None
    peak_bytes: int | None = None
    loss: float | None = None
    reason: str = ""


def make(
    small: bool, device: torch.device, size: str = "3B", recompute: Recompute = "auto"
) -> Problem:
    lengths = sequence_lengths("simplescaling/s1K")
    assert lengths is not None
    model, prompt = qwen(size), PROMPT_TOKENS
    if small:
        model = dataclasses.replace(
            model, hidden_size=32, intermediate_size=48, vocab_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        )  # fmt: skip
        lengths, prompt = [n // 200 for n in lengths[::10]], 2
    random = torch.Generator().manual_seed(0)
    examples = []
    for n in lengths:
        ids = torch.randint(model.vocab_size, (n,), generator=random).tolist()
        examples.append(Example(tuple(ids), (*[False] * prompt, *[True] * (n - prompt)), ""))
    data = DataConfig(path="random")
    batch_size = 4 if small else 16
    config = TrainConfig(model=size, data=data, batch_size=batch_size, recompute=recompute)
    return Problem(model, examples, config, device)


def timed(problem: Problem, step: Callable[[int], float]) -> tuple[float, float]:
    """Mean seconds of the measured steps, and the first step's loss."""
    first = 0.0
    for number in range(WARM_UP):
        loss = step(number)
        first = loss if number == 0 else first
    _wait(problem.device)
    start = time.perf_counter()
    for number in range(WARM_UP, WARM_UP + MEASURED):
        step(number)
    _wait(problem.device)
    return (time.perf_counter() - start) / MEASURED, first


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def outcome(name: str, problem: Problem, build: Callable[[], Callable[[int], float]]) -> Outcome:
    """Builds and times a variant; whatever it raises becomes the reason."""
    found = Outcome(name)
    cuda = problem.device.type == "cuda"
    try:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        found.step_s, found.loss = timed(problem, build())
        found.peak_bytes = torch.cuda.max_memory_allocated() if cuda else None
    except Exception as error:  # out of memory, a package that is missing, a compiler's refusal
        first = (str(error).strip().splitlines() or [""])[0][:200]
        found.reason = f"{type(error).__name__}: {first}"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return found


# -- ours ------------------------------------------------------------------------------------------


def ours(problem: Problem) -> Callable[[int], float]:
    layout = join(problem.device)
    dtype = torch.bfloat16 if problem.device.type == "cuda" else torch.float32
    with torch.device("meta"):
        model = Model(problem.model, compute_dtype=dtype)
    shard_model(model, layout)
    model.materialise(problem.device, torch.float32).init_random(0)
    trainer = Trainer(problem.config, model, problem.examples, layout)
    return lambda number: float(trainer.step(number).loss)


def predict(problem: Problem) -> tuple[float, float] | None:
    """The plan's seconds a step and GB at the peak, of this GPU alone; None of an unknown one."""
    gpu = gpu_kind(device_name())
    if gpu is None:
        return None
    lengths = [len(e.ids) for e in problem.examples]
    data = Sequences(lengths, [sum(e.labelled) for e in problem.examples], "")
    machine = Machine(gpu, 1, 1)
    rates = find_rates(gpu, RESULTS)
    config = dataclasses.replace(problem.config, max_steps=WARM_UP + MEASURED)
    one = estimate(config, problem.model, data, machine, rates)
    parts = memory(config, problem.model, one)
    return one.seconds.low / one.num_steps, sum(parts.values()) / 1e9


# -- transformers ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    attention: str
    compiled: bool
    recompute: bool
    packed: bool
    liger: bool

    def __str__(self) -> str:
        parts = [self.attention, "packed" if self.packed else "one sequence"]
        parts += [n for n in ("compiled", "recompute", "liger") if getattr(self, n)]
        return "transformers, " + ", ".join(parts)


def variants(liger: bool) -> Iterator[Variant]:
    """All without Liger come first: its kernels, once in transformers, stay there."""
    flags = (False, True)
    for with_liger in flags if liger else (False,):
        for values in itertools.product(("sdpa", "varlen"), flags, flags, flags):
            yield Variant(*values, with_liger)


def theirs(problem: Problem, variant: Variant) -> Callable[[int], float]:
    """A plain loop around a transformers model: autocast, fused AdamW, loss as s1 weighed it."""
    import transformers

    if problem.device.type != "cuda" and (variant.compiled or variant.attention == "varlen"):
        raise RuntimeError("timed on a GPU only")
    m = problem.model
    fields: dict[str, Any] = {
        name: getattr(m, name)
        for name in (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
            *("rms_norm_eps", "tie_word_embeddings"),
        )
    }
    if variant.liger:
        liger: Any = importlib.import_module("liger_kernel.transformers")
        liger.apply_liger_kernel_to_qwen2()
    implementation = variant.attention
    bounds: list[Any] = []
    if variant.attention == "varlen":
        implementation = _register_varlen(bounds)
    config = transformers.Qwen2Config(**fields, attn_implementation=implementation)
    torch.manual_seed(0)
    with torch.device(problem.device):
        model: Any = transformers.Qwen2ForCausalLM(config).float().train()
    if variant.recompute:
        model.gradient_checkpointing_enable()
    if variant.compiled:
        torch.compiler.reset()
        model.forward = torch.compile(model.forward, dynamic=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=True)
    half = torch.autocast(problem.device.type, torch.bfloat16, problem.device.type == "cuda")

    def step(number: int) -> float:
        batch, total = problem.batch(number), 0.0
        streams = None if variant.packed else [[i] for i in range(len(batch))]
        for stream in pack_batch(batch, "sample", streams):
            bounds[:] = [stream.cu_seqlens.to(problem.device), stream.max_seqlen]
            stream = stream.to(problem.device)
            inputs = {"input_ids": stream.ids_T[None], "position_ids": stream.positions_T[None]}
            with half:
                logits = model(**inputs, use_cache=False).logits[0].float()
                losses = F.cross_entropy(logits, stream.label_T, reduction="none")
            loss = (losses * stream.loss_weight_T).sum()
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def _register_varlen(bounds: list[Any]) -> str:
    """torch's variable-length attention as one that transformers can be told to use.

    bounds: where sequences begin, and tokens of the longest, as they are when it is called.
    """
    from transformers import AttentionInterface

    varlen: Any = importlib.import_module("torch.nn.attention.varlen")

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **_: Any) -> Any:
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        rows = [x[0].transpose(0, 1).to(torch.bfloat16) for x in (q, k, v)]
        starts, longest = bounds
        boundaries = (starts, starts, longest, longest)
        out = varlen.varlen_attn(*rows, *boundaries, window_size=(-1, 0))
        return out[None], None

    AttentionInterface.register("s1fast_varlen", attend)
    return "s1fast_varlen"


# -- the report ------------------------------------------------------------------------------------


def report(
    problem: Problem, only: Sequence[str] | None = None, save_result: bool = True
) -> list[str]:
    """Ours, then the variants whose name contains one of `only`'s texts, all if it is None."""
    device = problem.device
    predicted = predict(problem)
    if predicted:
        print(f"plan: {predicted[0]:.2f} s/step, {predicted[1]:.1f} GB at the peak", flush=True)
    found = [outcome("s1fast", problem, lambda: ours(problem))]
    leave()
    for variant in variants(_has_liger()):
        if only is not None and not any(text in str(variant) for text in only):
            continue
        found.append(outcome(str(variant), problem, partial(theirs, problem, variant)))
    steps = [problem.batch(n) for n in range(WARM_UP, WARM_UP + MEASURED)]
    tokens = sum(len(e.ids) for batch in steps for e in batch) / MEASURED
    labels = sum(sum(e.labelled[1:]) for batch in steps for e in batch)
    flops = train_flops(problem.model, [len(e.ids) for b in steps for e in b], labels) / MEASURED
    peak, _ = peak_tflops(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    lines = [f"{device_name()}: {tokens:,.0f} tokens a step"]
    for one in found:
        if one.step_s is None:
            lines.append(f"  {one.name:55} {one.reason}")
            continue
        held = "" if one.peak_bytes is None else f"{one.peak_bytes / 1e9:6.1f} GB"
        mfu = flops / one.step_s / peak / 1e12
        lines.append(
            f"  {one.name:55} {one.step_s:8.3f} s/step {tokens / one.step_s:9,.0f} tok/s "
            f"{mfu:6.1%} MFU {held}"
        )
    times = [one.step_s for one in found[1:] if one.step_s is not None]
    if found[0].step_s is not None and times:
        lines.append(f"  ours over the best of theirs: {min(times) / found[0].step_s:.2f} x")
    if predicted and found[0].step_s is not None and found[0].peak_bytes is not None:
        lines.append(
            f"  plan: {predicted[0]:.2f} s/step against {found[0].step_s:.2f}, "
            f"{predicted[1]:.1f} GB against {found[0].peak_bytes / 1e9:.1f}"
        )
    if save_result:
        values: dict[str, Any] = {"model": problem.config.model}
        values |= {"recompute": problem.config.recompute, "predicted": predicted}
        values["variants"] = [dataclasses.asdict(one) for one in found]
        lines.append(str(save("single_gpu_sft", {**values, "tokens": tokens, "flops": flops})))
    return lines


def _has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m s1fast.bench.single_gpu_sft")
    parser.add_argument("--small", action="store_true", help="a tiny model: the code path alone")
    parser.add_argument("--model", choices=SIZES, default="3B", help="whose shape of Qwen2.5")
    parser.add_argument("--recompute", choices=get_args(Recompute), default="auto")
    parser.add_argument("--only", nargs="*", help="peers whose name has one of these, or none")
    given = parser.parse_args()
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not given.small:
        raise SystemExit(f"a model of {given.model} needs a GPU; --small runs a tiny one anywhere")
    for text in report(make(given.small, device, given.model, given.recompute), given.only):
        print(text)


if __name__ == "__main__":
    main()
