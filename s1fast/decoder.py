"""The decoding engine: prompts, sampling parameters and thinking budgets in, text out.

Any number of threads and coroutines may ask at once. One thread of the engine's own runs all
requests together while there are any: a step at a time (loop.py), or ahead of a device that decides
for itself (captured.py), which is what a GPU gets.

Floor of a step at batch 1: the weights are read once, 2 bytes a parameter in bf16; 32.8e9 of them
at 3.0 TB/s: 22 ms. On an H200, at 4.5 TB/s, a step of the device's loop takes 19 ms at 8K.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from s1fast import matmul as products
from s1fast.budget import Budget
from s1fast.captured import Captured
from s1fast.chat import Chat
from s1fast.checkpoint import load_model
from s1fast.errors import InputError
from s1fast.graphs import buckets_for, num_slots
from s1fast.handle import Cancelled, Handle
from s1fast.hub import find
from s1fast.kv_cache import PAGE_SIZE, KVCache, Pages, num_pages
from s1fast.loop import Loop, Stats
from s1fast.markers import MarkersName
from s1fast.model import Model
from s1fast.request import (
    Cell,
    Completion,
    Piece,
    Prompt,
    Request,
    SamplingParams,
    compile_request,
)
from s1fast.row import Row
from s1fast.tensor_parallel import Ranks, load_shard
from s1fast.tree import trunk_first

_CPU = torch.device("cpu")

_CHOICES = {
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16"),
    "loop": ("auto", "host", "device"),
    "matmul": ("cuda", "torch"),
}

Budgets = Sequence[int | Literal["auto"] | None]


@dataclass(frozen=True)
class _Sample:
    """What the loop is told of one sample of a request."""

    job: int
    index: int
    sample: int
    prompt_ids: list[int]
    params: SamplingParams
    cells: list[Cell]


class Engine:
    """A loaded model that generates.

    Args:
        model: folder in Hugging Face format, or a hub id.
        device: "auto" takes a GPU if there is one.
        dtype: of weights and arithmetic; "auto" is bfloat16 on GPU and float32 on CPU.
        markers: between which the model thinks; "auto" goes by the vocabulary (markers.py).
        loop: "host" draws and decides on the host after every step; "device" does so on the device,
            a few steps ahead, with at most 64 rows; "auto" is "device" on a GPU.
        matmul: of the device's loop, "torch" or, for up to 8 tokens on an H100, "cuda" (csrc);
            never one for the other.
        max_batch: rows that run together; more wait for a place in order.
        step_tokens: token slots of a step; rows first, then prompts, a chunk of them each step. Of
            the device's loop, tokens of a chunk.
        cache_tokens: positions of the cache; None: 2 GiB of them on a CPU, most of what is free on
            a GPU, and one whole context at least.
        preempt: whether a row may take pages from one that came later, which then computes its
            tokens anew; without it a request is refused unless there are pages for all that it and
            those before it may ever need.
        reuse_prompts: whether prompts take over what was computed of an equal beginning before.
        speculate: most draft tokens a row brings to a step, out of its own text; never changes
            what is drawn.
        ranks: tensor parallelism; every rank of the process group makes the same Engine, rank 0
            is asked and the others call `follow`.

    Raises:
        InputError: whatever is wrong with the folder or an argument.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        markers: MarkersName = "auto",
        loop: Literal["auto", "host", "device"] = "auto",
        matmul: products.Choice = "torch",
        max_batch: int = 64,
        step_tokens: int = 512,
        cache_tokens: int | None = None,
        preempt: bool = True,
        reuse_prompts: bool = True,
        speculate: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        counts = {
            "max_batch": (max_batch, 1),
            "step_tokens": (step_tokens, max_batch if type(max_batch) is int else 1),
            "speculate": (speculate, 0),
            "cache_tokens": (PAGE_SIZE if cache_tokens is None else cache_tokens, PAGE_SIZE),
        }
        choices = {"device": device, "dtype": dtype, "loop": loop, "matmul": matmul}
        cuda, ahead = _checked(counts, choices)
        folder = find(str(model))
        self.chat = Chat.load(folder)
        self.chat.choose_markers(markers)
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else _CPU
        if dtype == "auto":
            dtype = "bfloat16" if cuda else "float32"
        kind = getattr(torch, dtype)
        self.model: Model = (
            load_model(folder, self.device, kind)
            if ranks is None
            else load_shard(folder, self.device, kind, ranks)
        )
        self.model.requires_grad_(False)
        config = self.model.config
        if self.chat.vocab_size > config.vocab_size:
            raise InputError(f"{folder}: tokenizer.json has more ids than config.json's vocab_size")
        self.max_batch, self.context = max_batch, config.max_position_embeddings
        self._ranks, self._preempt = ranks, preempt
        count = num_pages(config, kind, self.device, max_batch, cache_tokens)
        self.pages = Pages(count, reuse=reuse_prompts)
        arguments: dict[str, Any] = {
            "model": self.model,
            "chat": self.chat,
            "pages": self.pages,
            "cache": KVCache(config, count, max_batch, self.device, kind),
            "max_rows": max_batch,
            "max_slots": step_tokens,
            "speculate": speculate,
            "emit": self._emit,
            "fail": self._fail,
            "ranks": ranks,
        }
        if ahead:
            chosen = products.prepare(matmul, self.device, _matrices(self.model))
            self._loop: Loop = Captured(chosen, **arguments)
            if cuda:
                print(chosen.describe(num_slots(buckets_for(max_batch)[-1])), file=sys.stderr)
        else:
            self._loop = Loop(**arguments)
        self._lock = threading.Lock()
        self._handles: dict[int, Handle] = {}
        self._reserved: dict[int, int] = {}  # pages of each job, where none is preempted
        self._fresh: list[_Sample] = []
        self._cancelled: list[int] = []
        self._thread: threading.Thread | None = None
        self._lost: BaseException | None = None  # what ended the thread for good
        self._jobs = 0

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compiles and captures what the device's loop will launch, before the first request. With
        ranks, all of them call it."""
        with self._lock:
            if self._thread is not None:
                raise InputError("warm_up: requests are running")
            if isinstance(self._loop, Captured):
                self._loop.warm_up()

    @property
    def stats(self) -> Stats:
        """What the engine has done since it was made."""
        return self._loop.stats

    # -- asking -----------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | None = None,
        budget: Budget | None = None,
        *,
        budgets: Budgets | None = None,
        num_ignores: Sequence[int | None] | None = None,
    ) -> list[Completion]:
        """Completes every prompt, n samples each.

        Args:
            prompts: questions, conversations, or token ids that are taken as they are. Questions
                and conversations go through the chat template, and with a budget end with the
                start-of-thinking marker.
            params, budget: see there; no budget is plain generation.
            budgets, num_ignores: values of max_thinking_tokens and num_ignore: one completion for
                every pair, with the rest of `budget`, from one decode (tree.py). `cost` tells what
                that saved.

        Returns:
            Completions in the order (prompt, sample, budgets, num_ignores), each with the budget
            of its own cell.

        Raises:
            InputError: a prompt or budget that cannot be honoured, naming it, before any work.
        """
        with self._asked(prompts, params, budget, budgets, num_ignores) as handles:
            return [done for handle in handles for done in handle.result()]

    async def generate_async(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | None = None,
        budget: Budget | None = None,
        *,
        budgets: Budgets | None = None,
        num_ignores: Sequence[int | None] | None = None,
    ) -> list[Completion]:
        """As generate, without blocking the event loop; cancelled with its task."""
        with self._asked(prompts, params, budget, budgets, num_ignores) as handles:
            return [done for handle in handles for done in await handle.aresult()]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        budget: Budget | None = None,
        *,
        budgets: Budgets | None = None,
        num_ignores: Sequence[int | None] | None = None,
    ) -> Iterator[Piece | Completion]:
        """Completes one prompt piece by piece; the finished Completions come last. Of a grid the
        pieces of its longest cell are shown. Whoever stops reading cancels."""
        with self._asked([prompt], params, budget, budgets, num_ignores, True) as (handle,):
            yield from handle

    async def stream_async(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        budget: Budget | None = None,
        *,
        budgets: Budgets | None = None,
        num_ignores: Sequence[int | None] | None = None,
    ) -> AsyncIterator[Piece | Completion]:
        """As stream, for an async for."""
        with self._asked([prompt], params, budget, budgets, num_ignores, True) as (handle,):
            async for item in handle:
                yield item

    def submit(self, request: Request) -> Handle:
        """Queues a request and returns at once; any thread may.

        Raises:
            InputError: a request that cannot be honoured, naming what.
        """
        return self._submit_all([request], streaming=True)[0]

    def cancel(self, handle: Handle) -> None:
        """Stops a request, if it is not done: its pages are free after the step that runs now."""
        with self._lock:
            if self._handles.pop(handle.job, None) is not None:
                self._cancelled.append(handle.job)
        handle.fail(Cancelled(f"request {handle.job} was cancelled"))

    @contextlib.contextmanager
    def _asked(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | None,
        budget: Budget | None,
        budgets: Budgets | None,
        num_ignores: Sequence[int | None] | None,
        streaming: bool = False,
    ) -> Iterator[list[Handle]]:
        """Requests of all prompts, for as long as somebody reads them."""
        what: dict[str, Any] = {"budget": budget, "budgets": budgets, "num_ignores": num_ignores}
        what["params"] = params or SamplingParams()
        requests = [Request(prompt=prompt, **what) for prompt in prompts]
        handles = self._submit_all(requests, streaming)
        try:
            yield handles
        finally:
            for handle in handles:
                handle.cancel()

    @property
    def alive(self) -> bool:
        """Whether it takes requests: no more once a device or a rank is lost."""
        return self._lost is None

    def _submit_all(self, requests: Sequence[Request], streaming: bool = False) -> list[Handle]:
        """All of them or, where one cannot be honoured, none."""
        if self._ranks is not None and self._ranks.rank:
            raise InputError("ranks: only rank 0 is asked; the others call Engine.follow")
        if self._ranks is not None and self._ranks.group is None:
            raise InputError("ranks: this engine was closed; make another")
        compiled = [compile_request(request, self.chat, self.context) for request in requests]
        needs = [self._pages_of(r, *what) for r, what in zip(requests, compiled, strict=True)]
        handles = []
        with self._lock:
            if self._lost is not None:
                raise RuntimeError(f"this engine has stopped, make another: {self._lost}")
            if not self._preempt:
                self._reserve(needs)
            for index, (request, (ids, cells)) in enumerate(zip(requests, compiled, strict=True)):
                self._jobs += 1
                job, n = self._jobs, request.params.n
                ordered = trunk_first(cells)
                longest = ordered[0].number
                handle = Handle(job, n, len(cells), longest, self.cancel, streaming)
                self._handles[job] = handle
                handles.append(handle)
                what = ids, request.params, ordered
                self._fresh += [_Sample(job, index, i, *what) for i in range(n)]
            if self._thread is None and handles:
                thread = threading.Thread(target=self._run, name="s1fast")
                thread.start()
                self._thread = thread
        return handles

    def _pages_of(self, request: Request, ids: list[int], cells: list[Cell]) -> int:
        """Most pages that its rows can hold. Refuses what could never run at all."""
        longest = max(cell.program.longest for cell in cells)
        pages, have = -(-(len(ids) + longest + 1) // PAGE_SIZE), self.pages.count - 1
        if pages > have:
            raise InputError(
                f"max_tokens {request.params.max_tokens}: with the prompt up to "
                f"{pages * PAGE_SIZE} positions, the cache has {have * PAGE_SIZE}; ask for fewer, "
                "or make the engine with more cache_tokens"
            )
        return pages * request.params.n * len(cells)

    def _reserve(self, needs: list[int]) -> None:
        """Notes the pages of the jobs to come, or refuses them all."""
        going = {job for job, handle in self._handles.items() if not handle.finished}
        reserved = {job: n for job, n in self._reserved.items() if job in going}
        others, have = sum(reserved.values()), self.pages.count - 1
        if sum(needs) + others > have:
            raise InputError(
                f"preempt: without it {sum(needs)} pages of {PAGE_SIZE} positions are kept for "
                f"this request beside {others} for others, and the cache has {have}; wait, ask for "
                "fewer max_tokens, or make the engine with more cache_tokens"
            )
        jobs = range(self._jobs + 1, self._jobs + 1 + len(needs))
        self._reserved = reserved | dict(zip(jobs, needs, strict=True))

    # -- the engine's own thread ---------------------------------------------------------------

    def follow(self) -> None:
        """Runs a rank above 0 along with rank 0, until that one calls `close`."""
        if self._ranks is None or not self._ranks.rank:
            raise InputError("ranks: follow is for the ranks above 0")
        self._run()
        self._ranks.close()

    def close(self) -> None:
        """Ends the group of ranks: the others' `follow` returns, and no rank decodes any more. An
        engine of one rank needs no closing."""
        if self._ranks is not None and not self._ranks.rank and self._ranks.group is not None:
            while (thread := self._thread) is not None:
                thread.join()
            self._ranks.share(None)
            self._ranks.close()

    @torch.inference_mode()
    def _run(self) -> None:
        """Works until there is nothing to do. A request that fails ends alone, a step that fails
        ends all that run; a device or ranks that are lost end the engine, and nobody waits on."""
        try:
            if self.device.type == "cuda":  # each thread has its own
                torch.cuda.set_device(self.device)
            while (orders := self._orders()) is not None:
                try:
                    self._iterate(*orders)
                except Exception as error:
                    with self._lock:
                        waiting = {s.job for s in self._fresh}
                        running = [job for job in self._handles if job not in waiting]
                    self._loop.clear()
                    for job in running:
                        self._fail(job, error)
        except BaseException as error:
            with self._lock:
                self._lost, self._thread, self._fresh = error, None, []
                left = list(self._handles)
            for job in left:
                self._fail(job, error)
            if self._ranks is not None and self._ranks.rank:
                raise

    def _iterate(self, fresh: list[_Sample], cancelled: list[int]) -> None:
        for job in cancelled:
            self._loop.remove(job)
        gone = set(cancelled)
        for s in fresh:
            if s.job in gone:
                continue
            what = s.index, s.sample, s.prompt_ids, s.params, s.cells
            try:
                self._loop.add(Row(s.job, (s.job, s.sample), *what, self.chat))
            except Exception as error:  # what is wrong with one request's text is its own
                gone.add(s.job)
                self._loop.remove(s.job)
                self._fail(s.job, error)
        if not self._loop.idle:
            self._loop.step()

    def _fail(self, job: int, error: BaseException) -> None:
        with self._lock:
            handle = self._handles.pop(job, None)
        if handle is not None:
            handle.fail(error)

    def _orders(self) -> tuple[list[_Sample], list[int]] | None:
        """What to do before the next step; None where the thread's work is done. Rank 0 decides
        and tells the others."""
        ranks = self._ranks
        if ranks is not None and ranks.rank:
            return ranks.share(None)
        if not threading.main_thread().is_alive():  # the program ends: so do its requests
            for handle in list(self._handles.values()):
                self.cancel(handle)
        with self._lock:
            fresh, self._fresh = self._fresh, []
            cancelled, self._cancelled = self._cancelled, []
            if self._loop.idle and not fresh and not cancelled:
                self._thread = None
                return None
        orders = fresh, cancelled
        return orders if ranks is None else ranks.share(orders)

    def _emit(self, row: Row, pieces: list[Piece], done: list[tuple[int, Completion]]) -> None:
        handle = self._handles.get(row.job)
        if handle is None:
            return
        first = row.sample * handle.cells
        told = row.told(pieces) if handle.streaming else []
        if told or done:
            handle.put(
                [(first + number, piece) for number, piece in told],
                [(first + number, made) for number, made in done],
            )
        if handle.finished:
            with self._lock:
                self._handles.pop(row.job, None)


def _checked(
    counts: Mapping[str, tuple[Any, int]], choices: Mapping[str, Any]
) -> tuple[bool, bool]:
    """Whether an engine of these arguments runs on CUDA, and whether ahead of its device. Raises
    an InputError naming an argument that cannot be."""
    for name, (value, least) in counts.items():
        if type(value) is not int or value < least:
            raise InputError(f"{name} must be at least {least}, got {value!r}")
    for name, accepted in _CHOICES.items():
        if choices[name] not in accepted:
            raise InputError(f"{name} must be one of {', '.join(accepted)}, got {choices[name]!r}")
    cuda = torch.cuda.is_available() and choices["device"] != "cpu"
    if choices["device"] == "cuda" and not cuda:
        raise InputError("device: cuda was asked for, but torch sees no CUDA device")
    ahead = choices["loop"] == "device" or (choices["loop"] == "auto" and cuda)
    if ahead:
        buckets_for(counts["max_batch"][0])
    elif choices["matmul"] == "cuda":
        raise InputError('matmul = "cuda" is of the device\'s loop, on CUDA; take matmul = "torch"')
    return cuda, ahead


def _matrices(model: Model) -> dict[str, Tensor]:
    """The weights that are multiplied, by name."""
    matrices: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.ndim == 2}
    if model.head.weight is not None:
        del matrices["embed.weight"]
    return matrices
