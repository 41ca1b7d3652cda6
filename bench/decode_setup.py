"""What bench/decode.py measures: a model of random weights, its cache, the captured loop, and rows
that stand at any context without having decoded it.

A row of 8K tokens is put together from random ids and random keys and values: a step costs the
same. The tokenizer knows the bytes, the markers, and as many made-up words as the vocabulary has.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from s1fast.automaton import Program
from s1fast.captured import Captured
from s1fast.chat import CHATML, Chat
from s1fast.device import Device
from s1fast.kv_cache import PAGE_SIZE, KVCache, Pages
from s1fast.matmul import Choice, prepare
from s1fast.model import Model, ModelConfig
from s1fast.published import qwen
from s1fast.request import Cell, Completion, SamplingParams
from s1fast.row import Row
from s1fast.tensor_parallel import Ranks, shard_model
from s1fast.tree import trunk_first

MARKERS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
FIRST_WORD = 300
"""Ids from here on are words: no byte, no marker."""


def config_of(size: str) -> ModelConfig:
    """Qwen2.5 of a size, or "small": its shape in little, for a CPU."""
    if size != "small":
        return qwen(size)
    return replace(
        qwen("32B"),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=512,
    )


class OneOf(Ranks):
    """One of `count` ranks, whose others do nothing and take no time."""

    def __init__(self, count: int) -> None:
        self.rank, self.count = 0, count

    def sum_small(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        pass

    def reduce(self, partial_TD: Tensor) -> Tensor:
        return partial_TD

    def join(self, part_TV: Tensor, vocab_size: int) -> Tensor:
        return part_TV.repeat(1, vocab_size // part_TV.shape[1])


def random_model(config: ModelConfig, device: torch.device, ranks: int = 1) -> Model:
    """Weights drawn on the device, one rank's: bf16 on a GPU, else fp32."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device("meta"):
        model = Model(config, compute_dtype=dtype)
    if ranks > 1:
        model = shard_model(config, ranks, "model", dtype)
    model.materialise(device, dtype).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            weight.normal_(0.0, 0.02, generator=generator)
        else:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def made_up_chat(vocab_size: int) -> Chat:
    """A tokenizer of so many ids, with ChatML's markers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"word{i}" for i in range(vocab_size - len(alphabet) - len(MARKERS)))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in MARKERS])
    return Chat(tokenizer, CHATML, [], "made up")


@dataclass
class Setup:
    """The loop with its memory; `done` fills with completions as rows end."""

    model: Model
    chat: Chat
    pages: Pages
    cache: KVCache
    loop: Captured
    device: Device
    done: list[Completion] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.loop.emit = lambda row, pieces, done: self.done.extend(c for _, c in done)
        self._jobs = 0

    @property
    def room(self) -> int:
        """Positions that the cache has."""
        return (self.pages.count - 1) * PAGE_SIZE

    def add(
        self,
        ids: Sequence[int],
        programs: Sequence[Program],
        params: SamplingParams,
        *,
        cached: bool = True,
    ) -> Row:
        """A row of one cell for each program; cached: all but its last id are computed already."""
        self._jobs += 1
        cells = trunk_first([Cell(i, None, program) for i, program in enumerate(programs)])
        row = Row(self._jobs, (self._jobs,), 0, 0, ids, params, cells, self.chat)
        if cached:
            row.pages = [self.pages.take() for _ in range(-(-len(ids) // PAGE_SIZE))]
            row.cached = row.taken_over = len(ids) - 1
        self.loop.add(row)
        return row

    def run(self) -> list[Completion]:
        """Until all rows are done; returns their completions."""
        while not self.loop.idle:
            self.loop.step()
        done, self.done = self.done, []
        return done

    def clear(self) -> None:
        """No rows, and none under way."""
        self.loop.clear()
        self.done.clear()


def setup(
    model: Model,
    chat: Chat,
    *,
    max_rows: int,
    positions: int,
    choice: Choice,
    speculate: int = 0,
    reuse: bool = False,
    ranks: Ranks | None = None,
) -> Setup:
    """The loop over a cache of so many positions, or of what the device has room for."""
    device, dtype = model.embed.weight.device, model.compute_dtype
    pages_wanted = 1 + -(-positions // PAGE_SIZE) + 4 * max_rows
    count = min(pages_wanted, most_pages(model.config, device, dtype))
    pages = Pages(count, reuse=reuse)
    cache = KVCache(model.config, count, max_rows, device, dtype)
    cache.reach(count - 1)
    for pages_LPSNK in (cache.k, cache.v):
        for layer_PSNK in pages_LPSNK:
            layer_PSNK.normal_()
    matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2}
    loop = Captured(
        prepare(choice, device, matrices),
        model=model,
        chat=chat,
        pages=pages,
        cache=cache,
        max_rows=max_rows,
        max_slots=512,
        speculate=speculate,
        emit=lambda *_: None,
        fail=_fail,
        ranks=ranks,
    )
    return Setup(model, chat, pages, cache, loop, loop.device)


def _fail(job: int, error: Exception) -> None:
    raise error


def position_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Keys and values of one position, all layers."""
    heads = config.num_hidden_layers * config.num_key_value_heads
    return 2 * heads * config.head_dim * dtype.itemsize


def most_pages(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> int:
    """Pages that the device has room for beside a step's own tensors."""
    free = 1 << 30
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        free = int(0.85 * torch.cuda.mem_get_info(device)[0])
    return free // (position_bytes(config, dtype) * PAGE_SIZE)


def step_bytes(model: Model, batch: int, context: int) -> int:
    """What a step must read: every matrix but the embedding once, keys and values once."""
    dtype = model.compute_dtype
    weights = sum(p.numel() for p in model.parameters())
    if model.head.weight is not None:
        weights -= model.embed.weight.numel()
    return weights * dtype.itemsize + batch * context * position_bytes(model.config, dtype)


def random_ids(length: int, vocab_size: int, seed: int) -> list[int]:
    """Words alone."""
    rng = random.Random(seed)
    return [rng.randrange(FIRST_WORD, vocab_size) for _ in range(length)]


def plain(max_tokens: int, room: int, stop_ids: Sequence[int] = (), **fields: Any) -> Program:
    """A program without thinking that ends after so many tokens, or at a stop id."""
    return Program(max_tokens=max_tokens, room=room, stop_ids=frozenset(stop_ids), **fields)
