"""Decoding by the captured loop, on random weights in the shape of Qwen2.5-32B.

    python -m s1fast.bench.decode [--only step ...] [--batch 1 8] [--context 1024 8192]
        [--matmul torch cuda] [--model 7B | --small] [--fraction 1] [--profile]
        [--all-reduce-us 5]

* step: ms of a step, tokens a second, share of the read roof, launches, the gap between steps.
* intervention: a step that drops a token and appends another, beside one that does not.
* forced: a string of 24 tokens that ends thinking, beside 24 steps.
* tree: budgets 500 to 16,000 with answers of 256 tokens, from one decode and each by itself; the
  largest stands for the natural end, which random weights do not have.
* latency: a question of 200 tokens, 4,000 of thinking, two Waits: first token, last token; and the
  same by a client that appends "Wait" and asks again, its prompt's pages taken over.
* parallel: a step under tensor parallelism of 2, 4 and 8, projected from one GPU: what a rank does
  between its sums over ranks is measured, on a model of a rank's shape; to it come the 2 L sums, by
  a published time. Not in it: logits gathered, ranks that wait for each other.
* peers: a step of a plain torch loop in a graph, and of transformers' static cache, compiled, which
  takes minutes and so runs at the first batch and context alone.

A row's context is made, not decoded (decode_setup.py). Long cases run at `--fraction` of their
lengths, by default a tenth. What the memory has no room for is listed as not fitting.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from s1fast.automaton import Program
from s1fast.bench import decode_peers
from s1fast.bench.decode_setup import (
    FIRST_WORD,
    OneOf,
    Setup,
    config_of,
    made_up_chat,
    most_pages,
    plain,
    random_ids,
    random_model,
    setup,
    step_bytes,
)
from s1fast.bench.environment import save
from s1fast.bench.roofs import read_gb_s
from s1fast.captured import DEPTH
from s1fast.chat import Chat
from s1fast.errors import InputError
from s1fast.graphs import MOST_ROWS
from s1fast.kv_cache import PAGE_SIZE
from s1fast.matmul import Choice
from s1fast.model import Model
from s1fast.request import SamplingParams

CASES = ("step", "intervention", "forced", "tree", "latency", "parallel", "peers")
GREEDY = SamplingParams()
WARM_STEPS, TIMED_STEPS = 8, 32
SHORTEST = 128
"""Context: a row stands that far before it less what is decoded until it is timed."""

ALL_REDUCE_US = {2: 7.0, 4: 10.0, 8: 11.0}
"""Ranks -> one sum over them on H100, published for 512 KiB by kernels that read all parts at once
(vllm-project/vllm #24111, #24532, #42324). A step sends 10 KiB a token, which takes no longer."""

Values = dict[str, Any]
Record = Callable[..., None]


@dataclasses.dataclass
class Times:
    """Of steps: milliseconds from one's end to the next one's, of each by itself, between two."""

    period: list[float]
    busy: list[float]
    gap: list[float]

    def medians(self) -> Values:
        return {f"{name}_ms": statistics.median(v) for name, v in vars(self).items() if v}


@contextmanager
def timed(s: Setup) -> Iterator[Times]:
    """Times every step that is launched inside, on a GPU by events, which are read afterwards."""
    run, times, marks = s.device.graphs.run, Times([], [], []), []
    cuda = s.device.device.type == "cuda"

    def mark() -> Any:
        if not cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def launch(bucket: int) -> None:
        start = mark()
        run(bucket)
        marks.append((start, mark()))

    s.device.graphs.run = launch  # type: ignore[method-assign]
    try:
        yield times
    finally:
        s.device.graphs.run = run  # type: ignore[method-assign]
        if cuda:
            torch.cuda.synchronize()

    def ms(a: Any, b: Any) -> float:
        return a.elapsed_time(b) if cuda else (b - a) * 1e3

    times.busy += [ms(*pair) for pair in marks]
    for (_, end), (start, after) in pairwise(marks):
        times.gap.append(ms(end, start))
        times.period.append(ms(end, after))


def stand(s: Setup, batch: int, context: int, max_tokens: int, **fields: Any) -> None:
    """Rows at a context, with so many tokens to come."""
    for i in range(batch):
        ids = random_ids(context, s.chat.vocab_size, seed=i)
        s.add(ids, [plain(max_tokens, max_tokens, **fields)], GREEDY)


# -- cases -----------------------------------------------------------------------------------------


def step(s: Setup, batch: int, context: int, roof_gb_s: float) -> Values:
    """A steady batch: every row draws a token a step."""
    stand(s, batch, context - WARM_STEPS - 2 * TIMED_STEPS - DEPTH, 1 << 12)
    for _ in range(WARM_STEPS):
        s.loop.step()
    began, drawn = perf_counter(), s.loop.stats.drawn
    for _ in range(TIMED_STEPS):
        s.loop.step()
    wall_ms = (perf_counter() - began) * 1e3
    drawn = s.loop.stats.drawn - drawn
    with timed(s) as times:
        for _ in range(TIMED_STEPS):
            s.loop.step()
    s.clear()
    num_bytes = step_bytes(s.model, batch, context)
    step_ms = wall_ms / TIMED_STEPS
    return {
        "step_ms": step_ms,
        "tokens_s": drawn / wall_ms * 1e3,
        "of_roof": num_bytes / step_ms / 1e6 / roof_gb_s,
        "gb": num_bytes / 1e9,
        **times.medians(),
    }


def launches(s: Setup, bucket: int) -> int | None:
    """Kernels that a step of the bucket launches; None without a GPU."""
    if s.device.device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    s.device.lay_out(bucket)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        s.device._run(bucket)
        torch.cuda.synchronize()
    s.loop._steps += 1
    return sum(event.count for event in found.key_averages() if event.device_time_total)


def intervention(s: Setup, context: int) -> Values:
    """One row. Every token that it draws in a few rounds becomes an end of thinking (as many as a
    program has room for), so that soon most steps drop what they draw and append a Wait."""
    ids, wait = random_ids(context, s.chat.vocab_size, seed=0), (FIRST_WORD + 1,)
    fields: dict[str, Any] = {"think": True, "num_ignore": 1 << 20, "ignore_ids": (wait,)}
    ends: set[int] = set()
    found: Values = {}
    for attempt in range(8):
        program = plain(TIMED_STEPS, 1 << 12, ends=tuple((i,) for i in sorted(ends)), **fields)
        row = s.add(ids, [program], GREEDY)
        with timed(s) as times:
            (done,) = s.run()
        if not attempt:
            found["plain_step_ms"] = statistics.median(times.busy)
        new = set(done.token_ids) - ends - set(wait)
        if done.waits_used > TIMED_STEPS // 2 or not new or len(ends | new) > 120:
            break
        ends |= new
    found |= {
        "step_ms": statistics.median(times.busy),
        "interventions": row.automaton.waits,
        "steps": len(times.busy),
    }
    found["overhead"] = found["step_ms"] / found["plain_step_ms"] - 1
    return found


def forced(s: Setup, context: int, length: int = 24) -> Values:
    """One row whose thinking is cut after eight tokens, by a string of so many."""
    ids = random_ids(context, s.chat.vocab_size, seed=0)
    found: Values = {"tokens": length}
    for name, count in (("short", 1), ("long", length)):
        text = tuple(random_ids(count, s.chat.vocab_size, seed=1))
        program = plain(8 + count + 8, 1 << 12, think=True, max_thinking=8, forced_ids=text)
        for _ in range(2):  # the first compiles
            row = s.add(ids, [program], GREEDY)
            with timed(s) as times:
                s.run()
        ahead = DEPTH - 1  # launched before the end was seen
        found[f"{name}_steps"] = len(times.busy) - ahead
        found[f"{name}_ms"] = sum(times.busy[: len(times.busy) - ahead])
        found["step_ms"] = statistics.median(times.busy)
        assert row.done
    found["forced_ms"] = found["long_ms"] - found["short_ms"]
    found["by_steps_ms"] = (length - 1) * found["step_ms"]
    return found


def tree(s: Setup, fraction: float) -> Values:
    """Six budgets of one question from one decode, and each by itself."""
    budgets = [max(1, int(b * fraction)) for b in (500, 1000, 2000, 4000, 8000, 16000)]
    answer, prompt = 256, random_ids(200, s.chat.vocab_size, seed=0)
    end = tuple(random_ids(6, s.chat.vocab_size, seed=1))

    def program(budget: int) -> Program:
        most = budget + len(end) + answer
        return plain(most, most, think=True, max_thinking=budget, forced_ids=end)

    params = SamplingParams(temperature=1.0)
    found: Values = {"budgets": budgets}
    for name, groups in (
        ("tree", [[program(b) for b in budgets]]),
        ("separate", [[program(b)] for b in budgets]),
    ):
        began = perf_counter()
        done = []
        for programs in groups:
            s.add(prompt, programs, params, cached=False)
            done += s.run()
        found[f"{name}_s"] = perf_counter() - began
        assert len(done) == len(budgets)
    found["speedup"] = found["separate_s"] / found["tree_s"]
    return found


def latency(s: Setup, fraction: float) -> Values:
    """A question of 200 tokens, thinking with two Waits, an answer of 256 tokens: in the loop, and
    by a client that sees an end, appends "Wait" and asks again."""
    budget, answer = max(60, int(4000 * fraction)), 256
    prompt, wait = random_ids(200, s.chat.vocab_size, seed=0), (FIRST_WORD + 1,)
    end = tuple(random_ids(6, s.chat.vocab_size, seed=1))
    params = SamplingParams(temperature=1.0, seed=3)

    def program(ends: list[int], ignores: int) -> Program:
        most = budget + len(end) + answer
        return plain(
            most,
            most,
            think=True,
            max_thinking=budget,
            num_ignore=ignores,
            ignore_ids=(wait,),
            ends=tuple((i,) for i in ends),
            forced_ids=end,
            natural_ids=end,
        )

    ends: list[int] = []
    for third in (1, 2):  # what is drawn at a third and at two thirds ends thinking
        s.add(prompt, [program(ends, len(ends))], params, cached=False)
        (done,) = s.run()
        ends.append(done.token_ids[third * budget // 3])
    first: list[float] = []
    emit = s.loop.emit

    def notes(row: Any, pieces: Any, done: Any) -> None:
        if pieces and not first:
            first.append(perf_counter())
        emit(row, pieces, done)

    s.loop.emit = notes
    s.pages.forget()
    began = perf_counter()
    s.add(prompt, [program(ends, 2)], params, cached=False)
    (done,) = s.run()
    found = {
        "thinking": budget,
        "waits": done.waits_used,
        "first_token_ms": (first[0] - began) * 1e3,
        "last_token_ms": (perf_counter() - began) * 1e3,
    }
    s.loop.emit = emit
    s.pages.forget()
    began = perf_counter()
    rounds = decode_peers.client_side(s, prompt, ends, wait, end, budget, answer, params)
    found |= {"client_ms": (perf_counter() - began) * 1e3, "client_rounds": rounds}
    found["client_over_loop"] = found["client_ms"] / found["last_token_ms"]
    return found


def parallel(options: argparse.Namespace, results: Values) -> None:
    """Steps of every number of ranks that the key-value heads divide by."""
    config = config_of(options.model)
    chat = made_up_chat(config.vocab_size)
    for ranks in (n for n in ALL_REDUCE_US if config.num_key_value_heads % n == 0):
        model = random_model(config, _device(), ranks)
        sum_us = ALL_REDUCE_US[ranks] if options.all_reduce_us is None else options.all_reduce_us
        sums_ms = 2 * config.num_hidden_layers * sum_us / 1e3
        rows = max(options.batch)
        positions = rows * (max(options.context) + 64)
        for choice in options.matmul:
            sizes = {"max_rows": rows, "positions": positions, "ranks": OneOf(ranks)}
            s = setup(model, chat, choice=choice, reuse=True, **sizes)
            for batch, context in _pairs(options, results, s, f"{ranks} ranks"):
                found = step(s, batch, context, results["read_gb_s"])
                projected_ms = found["step_ms"] + sums_ms
                values = {
                    "rank_ms": found["step_ms"],
                    "rank_of_roof": found["of_roof"],
                    "all_reduce_us": sum_us,
                    "projected_step_ms": projected_ms,
                    "projected_tokens_s": batch / projected_ms * 1e3,
                }
                where = {"ranks": ranks, "matmul": choice, "batch": batch, "context": context}
                _record(results, "parallel", where, values)
            del s
        del model
        _free()


def _free() -> None:
    """The device's memory is to be there for the next model."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# -- the run ---------------------------------------------------------------------------------------


def run(options: argparse.Namespace, results: Values) -> None:
    """Adds to the results as they come."""
    results |= {"model": options.model, "read_gb_s": read_gb_s(), "rows": [], "not_fitting": []}
    print(f"read roof {results['read_gb_s']:.0f} GB/s")
    _free()
    if "parallel" in options.only:
        parallel(options, results)
    if {*options.only} - {"parallel"} or options.profile:
        config = config_of(options.model)
        model, chat = random_model(config, _device()), made_up_chat(config.vocab_size)
        for choice in options.matmul:
            by_the_loop(options, results, model, chat, choice)
        if "peers" in options.only:
            by_peers(options, results, model)
    print("not fitting:", results["not_fitting"] or "none")


def by_the_loop(
    options: argparse.Namespace, results: Values, model: Model, chat: Chat, choice: Choice
) -> None:
    """Every case but parallel and peers, on one cache."""
    batches, contexts, longest = (
        options.batch,
        options.context,
        model.config.max_position_embeddings,
    )
    positions = max(int(17000 * options.fraction) + 6 * 512, max(contexts)) + 2048
    if "step" in options.only:
        positions = max(positions, max(batches) * (max(contexts) + 64))
    rows = max(*batches, 8)
    s = setup(model, chat, max_rows=rows, positions=positions, choice=choice, reuse=True)
    where = {"matmul": choice}
    for batch, context in _pairs(options, results, s) if "step" in options.only else ():
        values = step(s, batch, context, results["read_gb_s"])
        values["launches"] = launches(s, s.device.graphs.bucket(batch))
        _record(results, "step", where | {"batch": batch, "context": context}, values)
    longest = min(model.config.max_position_embeddings, s.room) - 512
    at = {"context": min(contexts[-1], longest)}
    cases: dict[str, tuple[Values, Callable[[], Values]]] = {
        "intervention": (at, lambda: intervention(s, at["context"])),
        "forced": (at, lambda: forced(s, at["context"])),
        "tree": ({}, lambda: tree(s, options.fraction)),
        "latency": ({}, lambda: latency(s, options.fraction)),
    }
    for name, (more, case) in cases.items():
        if name in options.only:
            _record(results, name, where | more, case())
    if options.profile:
        print(profile(s, batches[0], contexts[0], options.model))


def by_peers(options: argparse.Namespace, results: Values, model: Model) -> None:
    most = most_pages(model.config, _device(), model.compute_dtype) * PAGE_SIZE
    pairs = [(batch, context) for batch in options.batch for context in options.context]
    runs = [("plain torch, captured", decode_peers.plain_captured, pair) for pair in pairs]
    runs += [("transformers", decode_peers.transformers_static, pairs[0])]
    for name, peer, (batch, context) in runs:
        if batch * context > most:
            results["not_fitting"].append([batch, context, name])
            continue
        try:
            values = peer(model, batch, context)
        except Exception as error:  # why it does not run here
            values = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        _record(results, name, {"batch": batch, "context": context}, values)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _pairs(
    options: argparse.Namespace, results: Values, s: Setup, *what: str
) -> Iterator[tuple[int, int]]:
    """Batches and contexts that the cache has room for; others are noted."""
    for batch in options.batch:
        for context in options.context:
            if batch * (context + 64) <= s.room:
                yield batch, context
            else:
                results["not_fitting"].append([batch, context, *what])


def _record(results: Values, case: str, where: Values, values: Values) -> None:
    results["rows"].append({"case": case, **where, **values})
    print(case, *(f"{k} {_short(v)}" for k, v in (where | values).items()), flush=True)


def profile(s: Setup, batch: int, context: int, name: str) -> str:
    """Ten steady steps as a trace for ui.perfetto.dev; returns its path."""
    from torch.profiler import profile as profiler

    stand(s, batch, context - 64, 1 << 12)
    for _ in range(WARM_STEPS):
        s.loop.step()
    with profiler() as found:
        for _ in range(10):
            s.loop.step()
    s.clear()
    path = Path("out") / f"decode-{name}-{batch}-{context}.trace.json"
    path.parent.mkdir(exist_ok=True)
    found.export_chrome_trace(str(path))
    return str(path)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("s1fast.bench.decode", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--context", nargs="+", type=int, default=[1024, 8192, 32768])
    parser.add_argument("--matmul", nargs="+", choices=("torch", "cuda"), default=["torch"])
    parser.add_argument("--model", default="32B", help="a size of Qwen2.5")
    parser.add_argument("--small", action="store_const", const="small", dest="model")
    parser.add_argument("--fraction", type=float, default=0.1, help="of the long cases' lengths")
    parser.add_argument("--profile", action="store_true", help="save a trace of steady steps")
    parser.add_argument("--all-reduce-us", type=float, help="a sum over ranks; default: published")
    options = parser.parse_args(arguments)
    for name, given, low, high in (
        ("batch", options.batch, 1, MOST_ROWS),
        ("context", options.context, SHORTEST, 1 << 30),
        ("fraction", [options.fraction], 1e-3, 1.0),
        ("all-reduce-us", [options.all_reduce_us or 0.0], 0.0, 1e6),
    ):
        if not all(low <= value <= high for value in given):
            parser.error(f"--{name}: expected {low} to {high}, got {' '.join(map(str, given))}")
    try:
        longest = config_of(options.model).max_position_embeddings
    except KeyError:
        parser.error(f"--model: there is no Qwen2.5 of size {options.model!r}")
    options.context = [min(context, longest) for context in options.context]
    return options


def main() -> None:
    options = parse(sys.argv[1:])
    results: Values = {}
    try:
        with torch.inference_mode():
            run(options, results)
    except InputError as error:
        sys.exit(f"s1fast: error: {error}")
    finally:
        if results.get("rows"):
            print(save("decode", results))


if __name__ == "__main__":
    main()
