"""Keys and values in pages, and who holds which page.

`Pages` is the account, on the host alone: a free list, a count of holders per page, and the names
of full pages, so that a prompt whose beginning was computed before takes those pages over. A page
is named by a digest of all token ids up to its end. `KVCache` is the memory: it writes a step's
keys and values into their slots and attends over a row's pages; what a step brings it learns from a
`Step`, which is what a loop on the device is handed as well.

A row's newest entries can be taken back by writing over them: the caller says at which position
each token lies, and nothing beyond a row's last written position is read. Page 0 belongs to nobody:
it is where a page table points beyond a row's end, and where idle slots write.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
import torch.nn.functional as F
from torch import Tensor

from s1fast.kernels.packed_attention import packed_attention
from s1fast.model import ModelConfig

PAGE_SIZE = 16
"""Positions in a page."""

CACHE_BYTES = 2 << 30
"""Default size of the cache on a CPU, where the context is not larger; only what is used of it is
ever touched."""


def num_pages(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_batch: int,
    cache_tokens: int | None,
) -> int:
    """Pages of the cache, the sink included."""
    if cache_tokens is not None:
        return 1 + -(-cache_tokens // PAGE_SIZE)
    heads = config.num_hidden_layers * config.num_key_value_heads
    position_bytes = 2 * heads * config.head_dim * dtype.itemsize
    room = CACHE_BYTES
    if device.type == "cuda":
        room = int(0.9 * torch.cuda.mem_get_info(device)[0])
    context = config.max_position_embeddings + 1
    tokens = min(max_batch * context, max(context, room // position_bytes))
    return 1 + -(-tokens // PAGE_SIZE)


class Pages:
    """The account of pages 1 .. count - 1, each held by any number of rows."""

    def __init__(self, count: int, *, reuse: bool = True) -> None:
        self.count, self._reuse = count, reuse
        self._holders = [0] * count
        self._free = list(range(count - 1, 0, -1))  # the lowest first
        self._kept: OrderedDict[int, None] = OrderedDict()  # named pages of nobody, oldest first
        self._name_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """Pages that can be taken now; named ones of nobody lose their name by that."""
        return len(self._free) + len(self._kept)

    @property
    def held(self) -> int:
        """Pages that somebody holds."""
        return self.count - 1 - self.available

    def take(self) -> int:
        """A page for one holder. There must be one available."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._kept.popitem(last=False)
            del self._page_of[self._name_of.pop(page)]
        self._holders[page] = 1
        return page

    def share(self, page: int) -> int:
        """One more holder for a page that is held, or named."""
        if not self._holders[page]:
            del self._kept[page]
        self._holders[page] += 1
        return page

    def drop(self, pages: Sequence[int]) -> None:
        """A row's pages lose one holder each; of those that end up free, the first is kept longest,
        for the beginning of a text is what others have in common."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._name_of:
                self._kept[page] = None
            else:
                self._free.append(page)

    def name(self, page: int, name: bytes) -> None:
        """A full page whose content stays: whoever has the same ids may share it."""
        if self._reuse and name not in self._page_of and page not in self._name_of:
            self._page_of[name], self._name_of[page] = page, name

    def named(self, name: bytes) -> int | None:
        return self._page_of.get(name)

    def forget(self) -> None:
        """Takes all names away: no later row takes a page over."""
        self._free += self._kept
        for names in (self._kept, self._name_of, self._page_of):
            names.clear()


def page_name(before: bytes, ids: Sequence[int]) -> bytes:
    """Name of a full page: of its ids and, through the name of the page before, of all earlier."""
    return blake2b(before + array("q", ids).tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class Part:
    """One row's share of a step: tokens at positions start, start + 1, ..."""

    line: int
    """The row's line in the page table."""
    start: int
    tokens: list[int]
    pages: list[int]
    wanted: int
    """Logits are wanted after so many of the last tokens."""


class Step:
    """What the device is told of one step: C token slots, in the order of the parts.

    token_C, position_C, place_C (page * S + offset) int64; wanted, the slots whose logits are
    wanted. How the parts lie in it: `alone` for rows that bring one token, whose slots are
    alone_B, and `longer` for the rest.
    """

    def __init__(self, parts: Sequence[Part], table: Tensor, device: torch.device) -> None:
        tokens: list[int] = []
        positions: list[int] = []
        places: list[int] = []
        wanted: list[int] = []
        alone: list[tuple[int, Part]] = []
        self.longer: list[tuple[int, Part]] = []
        for part in parts:
            at = len(tokens)
            tokens += part.tokens
            stop = part.start + len(part.tokens)
            positions += range(part.start, stop)
            pages = part.pages
            places += [
                pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in range(part.start, stop)
            ]
            wanted += range(len(tokens) - part.wanted, len(tokens))
            (alone if len(part.tokens) == 1 else self.longer).append((at, part))
        slots = torch.tensor([tokens, positions, places], dtype=torch.int64).to(device)
        self.token_C, self.position_C, self.place_C = slots
        self.wanted = torch.tensor(wanted, dtype=torch.int64).to(device)
        self.num_alone = len(alone)
        if not alone:
            return
        lines, stops = (
            torch.tensor(x) for x in zip(*((p.line, p.start + 1) for _, p in alone), strict=True)
        )
        longest = int(stops.max())
        count = -(-longest // PAGE_SIZE)
        self.alone_B = torch.tensor([at for at, _ in alone]).to(device)
        self.table_BP = table[lines, :count].to(device)
        self.seen_BS = None  # positions that each row sees, where they differ
        if count * PAGE_SIZE > int(stops.min()):
            self.seen_BS = (torch.arange(count * PAGE_SIZE) < stops[:, None]).to(device)


class KVCache:
    """The memory of all pages, (L, P, S, N, K) for keys and for values, and the page table.

    Before each forward pass `begin` tells what it brings. Memory that no page was taken from yet is
    not touched, so on a CPU a large cache costs what is used of it.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        num_lines: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        heads, width = config.num_key_value_heads, config.head_dim
        shape = (config.num_hidden_layers, num_pages, PAGE_SIZE, heads, width)
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        per_row = -(-config.max_position_embeddings // PAGE_SIZE)
        pinned = device.type == "cuda"
        self.table = torch.zeros((num_lines, per_row), dtype=torch.int32, pin_memory=pinned)
        """On the host: page of every PAGE_SIZE positions of every running row, by its line."""
        self._clean = 0  # pages below hold numbers; memory never written may hold NaN
        self.reach(0)

    def reach(self, page: int) -> None:
        """Tells that pages up to this one are used."""
        if page >= self._clean:
            stop = min(self.k.shape[1], max(page + 1, 2 * self._clean))
            self.k[:, self._clean : stop] = 0
            self.v[:, self._clean : stop] = 0
            self._clean = stop

    def copy(self, source: int, target: int) -> None:
        """Copies a page."""
        self.reach(target)
        self.k[:, target] = self.k[:, source]
        self.v[:, target] = self.v[:, source]

    def begin(self, parts: Sequence[Part]) -> Step:
        """Lays out the next step."""
        self._step = Step(parts, self.table, self.k.device)
        return self._step

    def attend(self, layer: int, q_CHK: Tensor, k_CNK: Tensor, v_CNK: Tensor) -> Tensor:
        """Stores the step's keys and values, then attends over all that each row has before."""
        step = self._step
        for cache, fresh_CNK in ((self.k, k_CNK), (self.v, v_CNK)):
            cache[layer].flatten(0, 1).index_copy_(0, step.place_C, fresh_CNK)
        if not step.longer:
            return self._attend_alone(layer, q_CHK)
        out_CHK = torch.empty_like(q_CHK)
        if step.num_alone:
            out_CHK[step.alone_B] = self._attend_alone(layer, q_CHK[step.alone_B])
        for at, part in step.longer:
            stop = at + len(part.tokens)
            q = q_CHK[at:stop]
            if part.start:
                out_CHK[at:stop] = self._attend_longer(layer, q, part)
            else:
                ends, count = torch.tensor([0, stop - at], dtype=torch.int32), stop - at
                k, v = k_CNK[at:stop], v_CNK[at:stop]
                out_CHK[at:stop] = packed_attention(q, k, v, ends, count)
        return out_CHK

    def _attend_alone(self, layer: int, q_BHK: Tensor) -> Tensor:
        """One query a row, all rows in one call."""
        step = self._step
        k, v = (_rows(cache[layer], step.table_BP) for cache in (self.k, self.v))
        # The query heads of a group share keys and masks: they are a row of queries.
        q_BNGK = q_BHK.unflatten(1, (k.shape[1], -1))
        seen = None if step.seen_BS is None else step.seen_BS[:, None, None]
        return F.scaled_dot_product_attention(q_BNGK, k, v, attn_mask=seen).flatten(1, 2)

    def _attend_longer(self, layer: int, q_QHK: Tensor, part: Part) -> Tensor:
        """Several queries of one row over what it has before, its own included."""
        count, stop = len(q_QHK), part.start + len(q_QHK)
        table_1P = self.table[part.line, None, : -(-stop // PAGE_SIZE)].to(q_QHK.device)
        k, v = (_rows(cache[layer], table_1P)[:, :, :stop] for cache in (self.k, self.v))
        q_1NGQK = q_QHK.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3)[None]
        groups = q_1NGQK.shape[2]
        last_Q = torch.arange(part.start, stop, device=q_QHK.device)
        seen_QS = torch.arange(stop, device=q_QHK.device) <= last_Q[:, None]
        seen = seen_QS.repeat(groups, 1)
        out = F.scaled_dot_product_attention(q_1NGQK.flatten(2, 3), k, v, attn_mask=seen)
        return out[0].unflatten(1, (groups, count)).permute(2, 0, 1, 3).flatten(1, 2)


def _rows(cache_PSNK: Tensor, table_BP: Tensor) -> Tensor:
    """Pages of rows as (B, N, positions, K)."""
    return cache_PSNK[table_BP].flatten(1, 2).transpose(1, 2)
