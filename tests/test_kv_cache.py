"""Pages: who holds which, what is shared, what attention reads of them."""

from __future__ import annotations

import random

import pytest
import torch

from s1fast.kv_cache import PAGE_SIZE, KVCache, Pages, Part, page_name
from s1fast.model import ModelConfig

HEADS, KV_HEADS, WIDTH = 6, 2, 8
CONFIG = ModelConfig.from_json(
    {
        "model_type": "llama",
        "vocab_size": 8,
        "hidden_size": HEADS * WIDTH,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 1024,
    },
    "test",
)


# -- the account ----------------------------------------------------------------------------


def test_a_page_is_free_again_when_its_last_holder_drops_it() -> None:
    pages = Pages(4)
    a, b = pages.take(), pages.take()
    assert (a, b, pages.held, pages.available) == (1, 2, 2, 1)
    pages.share(a)
    pages.drop([a, b])
    assert (pages.held, pages.available) == (1, 2)
    pages.drop([a])
    assert (pages.held, pages.available) == (0, 3)
    assert sorted(pages.take() for _ in range(3)) == [1, 2, 3]  # never page 0


def test_named_pages_wait_for_others_until_room_is_needed() -> None:
    """The one that was dropped first goes first, and of one row its last page."""
    pages = Pages(5)
    taken = [pages.take() for _ in range(4)]
    for page in taken:
        pages.name(page, bytes([page]))
    pages.drop(taken[2:])
    pages.drop(taken[:2])
    assert pages.available == 4 and all(pages.named(bytes([p])) == p for p in taken)
    shared = pages.share(taken[3])
    assert pages.held == 1
    assert [pages.take() for _ in range(3)] == [taken[2], taken[1], taken[0]]
    assert pages.named(bytes([taken[2]])) is None and pages.named(bytes([shared])) == shared
    assert pages.available == 0


def test_a_name_is_of_all_ids_so_far() -> None:
    a, b = list(range(PAGE_SIZE)), list(range(1, PAGE_SIZE + 1))
    assert page_name(page_name(b"", a), b) == page_name(page_name(b"", list(a)), list(b))
    names = {page_name(b"", a), page_name(b"", b), page_name(page_name(b"", b), a)}
    names |= {page_name(page_name(b"", a), a), page_name(page_name(b"", a), b)}
    assert len(names) == 5


def test_the_account_is_exact_whatever_happens() -> None:
    """10,000 random moves beside a plain count of holders."""
    rng = random.Random(0)
    pages, rows, names = Pages(40), [], 0
    for _ in range(10_000):
        what = rng.random()
        if what < 0.4 and pages.available:
            rows.append([pages.take() for _ in range(min(rng.randrange(1, 5), pages.available))])
        elif what < 0.6 and rows:
            rows.append([pages.share(p) for p in rng.choice(rows)])
        elif what < 0.7 and rows:
            names += 1
            pages.name(rng.choice(rng.choice(rows)), str(names).encode())
        elif what < 0.72:
            pages.forget()
        elif rows:
            pages.drop(rows.pop(rng.randrange(len(rows))))
        held = {p for row in rows for p in row}
        assert pages.held == len(held) and pages.available == 39 - len(held)
        named = pages._page_of.values()
        assert sorted(named) == sorted(pages._name_of) and set(pages._kept) <= set(named)
        assert not held & (set(pages._free) | set(pages._kept))
    assert names > 100
    while rows:
        pages.drop(rows.pop())
    assert pages.held == 0


def test_without_reuse_nothing_is_named() -> None:
    pages = Pages(4, reuse=False)
    pages.name(pages.take(), b"a")
    assert pages.named(b"a") is None


# -- the memory -----------------------------------------------------------------------------


class Mirror:
    """The cache beside plain lists of keys and values per row."""

    def __init__(self, seed: int) -> None:
        self.pages = Pages(80)
        self.cache = KVCache(CONFIG, 80, 6, torch.device("cpu"), torch.float32)
        self.generator = torch.Generator().manual_seed(seed)
        self.rows: dict[int, list[int]] = {}
        self.said: dict[int, list[list[tuple[torch.Tensor, torch.Tensor]]]] = {}

    def start(self, line: int) -> None:
        self.rows[line], self.said[line] = [], [[], []]

    def stop(self, line: int) -> None:
        self.pages.drop(self.rows.pop(line))
        del self.said[line]
        self.cache.table[line] = 0

    def fork(self, source: int, line: int, length: int) -> None:
        self.start(line)
        full, rest = divmod(length, PAGE_SIZE)
        self.rows[line] = [self.pages.share(p) for p in self.rows[source][:full]]
        if rest:
            self.rows[line].append(self.pages.take())
            self.cache.copy(self.rows[source][full], self.rows[line][-1])
        self.said[line] = [list(layer[:length]) for layer in self.said[source]]

    def step(self, bring: dict[int, tuple[int, int]]) -> None:
        """Lines with (start, count); checks both layers' attention against the lists."""
        parts = []
        for line, (start, count) in bring.items():
            pages = self.rows[line]
            while len(pages) * PAGE_SIZE < start + count:
                pages.append(self.pages.take())
                self.cache.reach(pages[-1])
            self.cache.table[line, : len(pages)] = torch.tensor(pages)
            parts.append(Part(line, start, [7] * count, pages, wanted=1))
        step = self.cache.begin(parts)
        total = sum(count for _, count in bring.values())
        ends = torch.tensor([c for _, c in bring.values()]).cumsum(0) - 1
        assert step.wanted.tolist() == ends.tolist() and len(step.token_C) == total
        for layer in range(2):
            q = torch.randn(total, HEADS, WIDTH, generator=self.generator)
            k, v = torch.randn(2, total, KV_HEADS, WIDTH, generator=self.generator)
            got, at = self.cache.attend(layer, q, k, v), 0
            for line, (start, count) in bring.items():
                said = self.said[line][layer]
                for i in range(count):
                    assert int(step.position_C[at]) == start + i
                    said[start + i :] = [(k[at], v[at])]
                    torch.testing.assert_close(got[at], attention(q[at], said))
                    at += 1


def attention(q_HK: torch.Tensor, said: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    k, v = (torch.stack(x).repeat_interleave(HEADS // KV_HEADS, 1) for x in zip(*said, strict=True))
    score = torch.einsum("hk,shk->hs", q_HK, k) / WIDTH**0.5
    return torch.einsum("hs,shk->hk", score.softmax(-1), v)


def test_attention_reads_what_each_row_wrote_last(poisoned: None) -> None:
    """Ragged steps, entries taken back, forks at and inside pages, lines used again."""
    m = Mirror(0)
    for line in range(3):
        m.start(line)
    m.step({0: (0, 5), 1: (0, 1), 2: (0, 9)})
    m.step({0: (5, 1), 1: (1, 1), 2: (9, 1)})  # plain decoding
    m.step({0: (6, 1), 1: (2, 7), 2: (10, 3)})  # forced strings of different lengths
    m.step({0: (4, 2), 1: (9, 1), 2: (8, 1)})  # rows 0 and 2 take entries back
    m.step({0: (6, 60), 1: (10, 1), 2: (9, 1)})  # over pages
    m.fork(0, 3, 48)  # at the edge of a page
    m.fork(0, 4, 37)  # within one
    m.step({0: (66, 1), 3: (48, 1), 4: (37, 2), 1: (11, 1)})
    m.step({4: (39, 1), 3: (49, 20), 0: (67, 1)})
    m.stop(0)
    m.step({3: (69, 1), 4: (40, 1)})
    m.start(0)
    m.step({0: (0, 1), 3: (70, 1), 4: (41, 1), 2: (10, 1)})
    m.step({0: (1, 40)})
    for line in list(m.rows):
        m.stop(line)
    assert m.pages.held == 0


@pytest.mark.parametrize("seed", range(3))
def test_random_steps(seed: int) -> None:
    rng, m = random.Random(seed), Mirror(seed)
    for _ in range(60):
        free = [line for line in range(6) if line not in m.rows]
        busy = [line for line in m.rows if m.said[line][0]]
        what = rng.random()
        if free and (what < 0.2 or not m.rows):
            m.start(free[0])
        elif free and busy and what < 0.4:
            source = rng.choice(busy)
            m.fork(source, free[0], rng.randrange(1, len(m.said[source][0]) + 1))
        elif what < 0.5:
            m.stop(rng.choice(list(m.rows)))
        bring = {}
        for line in m.rows:
            length = len(m.said[line][0])
            if length < 150 and rng.random() < 0.7:
                back = rng.choice((0, 0, 0, min(2, length))) if line not in shared(m) else 0
                bring[line] = (length - back, rng.choice((1, 1, 1, 3, 20)))
        if bring:
            m.step(bring)


def shared(m: Mirror) -> set[int]:
    """Lines that hold a page of somebody else's: what stands in those is never taken back."""
    count: dict[int, int] = {}
    for pages in m.rows.values():
        for page in pages:
            count[page] = count.get(page, 0) + 1
    return {line for line, pages in m.rows.items() if any(count[p] > 1 for p in pages)}
