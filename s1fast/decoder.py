"""The decoding engine: prompts, sampling parameters and a thinking budget in, text out.

Every step is one packed stream: each running row brings the tokens that the cache does not hold
yet, one in plain decoding, a whole forced string at once after an intervention. A row's automaton
(budget.py) decides what becomes of the token that is sampled.

Floor of a step at batch 1: the weights are read once, 2 bytes a parameter in bf16; 32.8e9 of them
at 3.0 TB/s: 22 ms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from s1fast.budget import Automaton, Budget, Move, Phase, compile_program
from s1fast.chat import Chat, Message, TextStream
from s1fast.checkpoint import load_model
from s1fast.errors import InputError
from s1fast.hub import find
from s1fast.kernels.sample import sample
from s1fast.kv_cache import KVCache
from s1fast.model import Model

COLDEST = 1e-6
"""Least temperature above 0: logits divided by it stay far inside fp32."""

Prompt = str | Sequence[int] | Sequence[Message]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn, under vLLM's names. Raises an InputError naming a bad field."""

    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """Sample among the k likeliest; 0 for all."""
    top_p: float = 1.0
    """Sample among the likeliest that together have this probability."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the likeliest."""
    seed: int = 0
    """A request's draws depend on this, the sample's index and the position alone."""
    n: int = 1
    """Samples per prompt."""
    max_tokens: int | None = None
    """Most tokens generated, thinking and appended texts included; None for the whole context."""
    stop: Sequence[str] = ()
    """Texts that end the answer; they are not part of it."""
    stop_token_ids: Sequence[int] = ()
    """Further ids that end the answer, beside the model's own."""

    def __post_init__(self) -> None:
        rules = [
            (
                "temperature",
                _number(self.temperature, 0, math.inf) and not 0 < self.temperature < COLDEST,
                f"0 or a number from {COLDEST}",
            ),
            ("top_k", type(self.top_k) is int and self.top_k >= 0, "a count"),
            ("top_p", _number(self.top_p, 0, 1) and self.top_p > 0, "in (0, 1]"),
            ("min_p", _number(self.min_p, 0, 1), "in [0, 1]"),
            ("seed", type(self.seed) is int and 0 <= self.seed < 1 << 64, "in 0..2^64-1"),
            ("n", type(self.n) is int and self.n >= 1, "at least 1"),
            ("stop", _all_are(self.stop, str) and all(self.stop), "a list of non-empty texts"),
            ("stop_token_ids", _all_are(self.stop_token_ids, int), "a list of ids"),
        ]
        for name, holds, rule in rules:
            if not holds:
                raise InputError(f"{name} must be {rule}, got {getattr(self, name)!r}")


def _number(value: object, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high and value != math.inf  # type: ignore[operator]


def _all_are(values: object, kind: type) -> bool:
    return isinstance(values, list | tuple) and all(type(value) is kind for value in values)


Kind = Literal["thinking", "answer", "ignore", "end"]
"""Of a piece of output: what the model thought or answered, an appended ignore text, and the marker
(with the final text, when thinking was cut) that leads from thinking to the answer."""


@dataclass(frozen=True)
class Piece:
    """Text of one kind, as it is streamed."""

    index: int
    """Which prompt."""
    sample: int
    """Which of its n samples."""
    kind: Kind
    text: str
    ids: tuple[int, ...]


@dataclass
class Completion:
    """One finished sample."""

    index: int
    sample: int
    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    """Everything after the prompt, appended ids included, the final stop id not."""
    thinking: str = ""
    """What was thought, ignore texts included."""
    answer: str = ""
    """What follows the answer marker, final text included."""
    thinking_tokens: int = 0
    waits_used: int = 0
    thinking_end: Literal["natural", "length"] | None = None
    """How thinking ended; None if it never began or never ended."""
    finish_reason: Literal["stop", "length"] | None = None
    pieces: list[Piece] = field(default_factory=list)


class _Row:
    """A running sample: its tokens, its automaton, and the text made of them so far."""

    def __init__(
        self,
        index: int,
        sample: int,
        prompt_ids: list[int],
        automaton: Automaton,
        chat: Chat,
        params: SamplingParams,
    ) -> None:
        self.automaton, self.params = automaton, params
        self.ids = list(prompt_ids)
        self.cached = 0
        """So many of ids have their keys and values in the cache."""
        self.done = Completion(index, sample, list(prompt_ids))
        self._text = TextStream(chat)
        self._text.push(prompt_ids[-8:])  # the seam between prompt and output decodes as one text
        self._held: list[tuple[Kind, int]] = []
        self._unstopped = ""
        self._apply(automaton.begin(), None, "thinking")

    @property
    def pending(self) -> list[int]:
        """Tokens that the next step feeds: at least one, the last, to sample after it."""
        return self.ids[min(self.cached, len(self.ids) - 1) :]

    def take(self, token: int) -> list[Piece]:
        """Lets the automaton judge a sampled token; returns the output that is certain now."""
        self.cached = len(self.ids)
        kind: Kind = "thinking" if self.automaton.phase is Phase.THINK else "answer"
        return self._apply(self.automaton.step(token), token, kind)

    def _apply(self, move: Move, token: int | None, kind: Kind) -> list[Piece]:
        if token is not None and move.keep:
            self.ids.append(token)
            self._held.append((kind, token))
        if move.cut:
            del self.ids[-move.cut :], self._held[-move.cut :]
        self.cached = min(self.cached, len(self.ids))
        self.ids += move.append
        self._held += [("ignore", i) for i in move.ignore] + [("end", i) for i in move.end]
        return self._release()

    def _release(self) -> list[Piece]:
        """Turns held tokens into pieces. In thinking under harness accounting, those beyond the
        maximum may yet be cut and stay held."""
        p = self.automaton.program
        count = len(self._held)
        if p.harness and p.max_thinking is not None and self.automaton.phase is Phase.THINK:
            released = len(self.ids) - len(self.done.prompt_ids) - len(self._held)
            count = max(0, min(count, p.max_thinking - p.thought - released))
        ready, self._held = self._held[:count], self._held[count:]
        pieces: list[Piece] = []
        while ready:
            kind = ready[0][0]
            ids = []
            while ready and ready[0][0] == kind:
                ids.append(ready.pop(0)[1])
            pieces += self._piece(kind, ids)
        if self.automaton.phase is Phase.DONE and self._unstopped:
            pieces += self._emit("answer", [], self._unstopped)
            self._unstopped = ""
        return pieces

    def _piece(self, kind: Kind, ids: list[int]) -> list[Piece]:
        text = self._text.push(ids)
        if kind != "answer" or not self.params.stop:
            return self._emit(kind, ids, text)
        # Hold back what may be the beginning of a stop text.
        self._unstopped += text
        found = [i for stop in self.params.stop if (i := self._unstopped.find(stop)) >= 0]
        if found:
            text, self._unstopped = self._unstopped[: min(found)], ""
            self.automaton.finish()
            return self._emit(kind, ids, text)
        keep = max(len(stop) for stop in self.params.stop) - 1
        cut = max(0, len(self._unstopped) - keep)
        text, self._unstopped = self._unstopped[:cut], self._unstopped[cut:]
        return self._emit(kind, ids, text)

    def _emit(self, kind: Kind, ids: list[int], text: str) -> list[Piece]:
        piece = Piece(self.done.index, self.done.sample, kind, text, tuple(ids))
        self.done.pieces.append(piece)
        self.done.token_ids += ids
        return [piece]

    def completion(self) -> Completion:
        """The finished sample."""
        done, automaton = self.done, self.automaton
        done.thinking = "".join(p.text for p in done.pieces if p.kind in ("thinking", "ignore"))
        ended = "".join(p.text for p in done.pieces if p.kind == "end")
        answer = "".join(p.text for p in done.pieces if p.kind == "answer")
        done.answer = ended.partition("<|im_start|>answer")[2] + answer
        done.thinking_tokens = automaton.thinking
        done.waits_used = automaton.waits
        done.thinking_end = automaton.thinking_end
        done.finish_reason = automaton.finish_reason
        return done


class Engine:
    """A loaded model that generates.

    Args:
        model: folder in Hugging Face format, or a hub id.
        device: "auto" takes a GPU if there is one.
        dtype: of weights and arithmetic; "auto" is bfloat16 on GPU and float32 on CPU.
        max_batch: rows that run together; more wait for a place in order.

    Raises:
        InputError: whatever is wrong with the folder.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        max_batch: int = 64,
    ) -> None:
        if max_batch < 1:
            raise InputError(f"max_batch must be at least 1, got {max_batch}")
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("device: cuda was asked for, but torch sees no CUDA device")
        cuda = torch.cuda.is_available() and device != "cpu"
        if dtype == "auto":
            dtype = "bfloat16" if cuda else "float32"
        folder = find(str(model))
        self.chat = Chat.load(folder)
        self.device = torch.device("cuda" if cuda else "cpu")
        self.model: Model = load_model(folder, self.device, getattr(torch, dtype))
        self.model.requires_grad_(False)
        self.max_batch = max_batch
        if self.chat.vocab_size > self.model.config.vocab_size:
            raise InputError(f"{folder}: tokenizer.json has more ids than config.json's vocab_size")

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | None = None,
        budget: Budget | None = None,
    ) -> list[Completion]:
        """Completes every prompt, n samples each, in the prompts' order.

        Args:
            prompts: questions, conversations, or token ids that are taken as they are. Questions
                and conversations go through the chat template, and with a budget end with the
                start-of-thinking marker.
            params, budget: see there; no budget is plain generation.

        Raises:
            InputError: a prompt or budget that cannot be honoured, naming it, before any work.
        """
        run = _Run(self, prompts, params or SamplingParams(), budget)
        for _ in run.pieces():
            pass
        return sorted(run.finished, key=lambda c: (c.index, c.sample))

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        budget: Budget | None = None,
    ) -> Iterator[Piece | Completion]:
        """Completes one prompt piece by piece; the finished Completion comes last."""
        run = _Run(self, [prompt], params or SamplingParams(), budget)
        yield from run.pieces()
        yield from run.finished


class _Run:
    """One call of generate: waiting rows, running rows, the cache."""

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        budget: Budget | None,
    ) -> None:
        self.engine, self.params = engine, params
        self.finished: list[Completion] = []
        self.waiting: list[_Row] = []
        self._first: list[Piece] = []
        for index, prompt in enumerate(prompts):
            ids = self._prompt_ids(prompt, think=budget is not None)
            program = compile_program(
                budget,
                engine.chat,
                ids,
                context=engine.model.config.max_position_embeddings,
                max_tokens=params.max_tokens,
                stop_ids=engine.chat.stop_ids | frozenset(params.stop_token_ids),
            )
            for sample_index in range(params.n):
                automaton = Automaton(program)
                self.waiting.append(_Row(index, sample_index, ids, automaton, engine.chat, params))

    def _prompt_ids(self, prompt: Prompt, think: bool) -> list[int]:
        chat = self.engine.chat
        if isinstance(prompt, str):
            return chat.prompt_ids(prompt, think=think)
        if prompt and isinstance(prompt[0], dict):
            return chat.prompt_ids(prompt, think=think)  # type: ignore[arg-type]
        ids = list(prompt)
        bad = [i for i in ids if type(i) is not int or not 0 <= i < chat.vocab_size]
        if bad:
            raise InputError(f"prompt: {bad[0]!r} is no token id below {chat.vocab_size}")
        return ids  # type: ignore[return-value]

    @torch.inference_mode()
    def pieces(self) -> Iterator[Piece]:
        """Runs everything to its end, a full batch at a time."""
        limit = self.engine.max_batch
        while self.waiting:
            rows, self.waiting = self.waiting[:limit], self.waiting[limit:]
            for row in rows:
                yield from row.done.pieces
            yield from self._run_together(rows)

    def _run_together(self, rows: list[_Row]) -> Iterator[Piece]:
        model = self.engine.model
        cache = KVCache(model.config, len(rows), self.engine.device, model.compute_dtype)
        rows = self._retire(rows, cache)
        while rows:
            logits_BV = self._forward(rows, cache)
            tokens = self._sample(rows, logits_BV)
            for row, token in zip(rows, tokens, strict=True):
                yield from row.take(token)
            rows = self._retire(rows, cache)

    def _forward(self, rows: list[_Row], cache: KVCache) -> Tensor:
        """Feeds every row's pending tokens; logits after each row's last one."""
        pending = [row.pending for row in rows]
        lengths = [len(ids) for ids in pending]
        cache.plan([len(row.ids) - n for row, n in zip(rows, lengths, strict=True)], lengths)
        ids_T = torch.tensor([i for ids in pending for i in ids], device=self.engine.device)
        hidden_TD = self.engine.model(ids_T, cache.positions_T, cache.attend)
        last_B = torch.tensor(lengths, device=self.engine.device).cumsum(0) - 1
        return self.engine.model.logits(hidden_TD[last_B])

    def _sample(self, rows: list[_Row], logits_BV: Tensor) -> list[int]:
        logits_BV[:, self.engine.chat.vocab_size :] = -math.inf
        for b, row in enumerate(rows):
            if row.automaton.end_masked:
                logits_BV[b, list(row.automaton.program.end_ids)] = -math.inf
        p = self.params
        if p.temperature == 0.0:
            return logits_BV.argmax(-1).tolist()
        draws = [
            sample(
                logits_BV[b],
                temperature=p.temperature,
                top_k=p.top_k,
                top_p=p.top_p,
                min_p=p.min_p,
                seed=p.seed,
                sample=row.done.sample,
                position=len(row.ids),
            )
            for b, row in enumerate(rows)
        ]
        return torch.stack(draws).tolist()

    def _retire(self, rows: list[_Row], cache: KVCache) -> list[_Row]:
        """Moves finished rows out, filling their places in the cache from the end."""
        running = list(rows)
        for b in range(len(rows) - 1, -1, -1):
            if running[b].automaton.phase is not Phase.DONE:
                continue
            self.finished.append(running[b].completion())
            last = running.pop()
            if b < len(running):
                running[b] = last
                cache.move(len(running), b)
        return running
