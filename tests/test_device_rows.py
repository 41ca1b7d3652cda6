"""Rows on the device: reference and kernels against one automaton a row, on random programs.

The rows' model is a table: the logits after a token depend on it alone, so that greedy rows repeat
themselves and drafts come true.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from s1fast.automaton import Automaton, Phase, Program
from s1fast.kernels import advance_triton
from s1fast.kernels.advance import advance, lay_out
from s1fast.kernels.device_rows import (
    GRAM,
    Field,
    Rows,
    Slots,
    automaton_state,
    gram_index,
    gram_place,
    line_of_state,
)
from s1fast.kernels.sample import sample
from test_automaton import ALPHABET, WORDS, random_case

VOCAB, WIDTH = 90, 97  # ids of the tokenizer, and of the logits
POSITIONS, RING = 1024, 4
CPU = torch.device("cpu")


@dataclass
class Sample:
    """A row as loop.py and row.py keep it: what the device must agree with."""

    seed: int
    program: Program = field(init=False)
    ids: list[int] = field(init=False)
    cached: int = 0
    params: dict[str, Any] = field(init=False)
    drawn: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = random.Random(self.seed)
        case = random_case(self.seed)
        self.program = case.program
        self.automaton = Automaton(self.program)
        self.ids = [rng.choice(WORDS) for _ in range(rng.choice([1, 2, 3, 30]))] + case.thought
        self.apply(self.automaton.begin())
        self.params = {
            "temperature": rng.choice([0.0, 0.0, 0.0, 0.3, 1.0]),
            "top_k": rng.choice([0] * 9 + [4]),
            "top_p": rng.choice([1.0] * 9 + [0.9]),
            "min_p": rng.choice([0.0, 0.0, 0.1]),
            "seed": rng.getrandbits(64),
            "sample": rng.randrange(5),
        }
        self.drafts = rng.choice([0, 1, 3, 5])
        self.cached = rng.choice([len(self.ids) - 1, max(0, len(self.ids) - 9)])
        generator = torch.Generator().manual_seed(self.seed)
        self.after_VV = torch.randn(VOCAB, WIDTH, generator=generator) * 2
        self.after_VV[:, list(ALPHABET)] += 3
        self.after_VV[:, VOCAB:] = 50.0
        self.fed: list[int] = self.ids[: self.cached]
        """What the cache was told, by position."""

    def draw(self, logits_V: Tensor) -> int:
        logits_V = logits_V[:VOCAB].clone()
        logits_V[list(self.automaton.masked)] = -torch.inf
        return int(sample(logits_V, **self.params, position=len(self.ids)))

    def take(self, token: int) -> bool:
        """Whether the token just stays."""
        self.drawn.append(token)
        move = self.automaton.step(token)
        self.apply(move, token)
        return move.keep and not move.cut and not move.append and not self.done

    def apply(self, move: Any, token: int | None = None) -> None:
        if token is not None and move.keep:
            self.ids.append(token)
        del self.ids[len(self.ids) - move.cut :]
        self.cached = min(self.cached, len(self.ids))
        self.ids += move.append

    @property
    def done(self) -> bool:
        return self.automaton.phase is Phase.DONE

    @property
    def pending(self) -> int:
        return max(1, len(self.ids) - self.cached)


def alone(seed: int, dtype: torch.dtype) -> Sample:
    """The sample to its end, a token after the other, by nothing but the rules."""
    row = Sample(seed)
    while not row.done:
        row.take(row.draw(row.after_VV[row.ids[-1]].to(dtype)))
    return row


class Played:
    """A batch on the device, and what the host knows of it."""

    def __init__(
        self, lines: int, slots: int, spare: int, dtype: torch.dtype, kernels: bool, near: int
    ) -> None:
        self.kernels = kernels
        ender_V = torch.zeros(VOCAB, dtype=torch.uint8)
        ender_V[[3, 4]] = 1
        self.rows = Rows.empty(lines, POSITIONS, 1, ender_V, CPU)
        slots_C = Slots.empty(lines, slots, lines, RING, 6, CPU)
        self.slots = replace(slots_C, near_BK=torch.zeros(lines, 2 * near, dtype=torch.int32))
        self.running: dict[int, Sample] = {}
        self.spare, self.dtype = spare, dtype
        self.steps = self.accepted = 0

    def arm(self, line: int, row: Sample) -> None:
        rows = self.rows
        state = line_of_state(
            length=len(row.ids),
            cached=row.cached,
            limit=len(row.ids) + row.program.longest,
            drafts=row.drafts,
            state=row.automaton.state,
            **row.params,
        )
        rows.state_RF[line] = torch.tensor(state, dtype=torch.int32)
        rows.ids_RX[line, : len(row.ids)] = torch.tensor(row.ids, dtype=torch.int32)
        rows.ids_RX[line, len(row.ids) :] = -1
        table = torch.tensor(row.program.table, dtype=torch.int32)
        rows.program_RZ[line, : len(table)] = table
        rows.gram_RG[line] = gram_index(rows.ids_RX[line], len(row.ids), rows.gram_RG.shape[1])
        self.running[line] = row

    def lay_out(self) -> None:
        for _ in range(2):  # once more changes nothing
            if self.kernels:
                advance_triton.lay_out_(self.rows, self.slots, self.spare, launched=False)
            else:
                lay_out(self.rows, self.slots, self.spare)

    def advance(self, logits_CV: Tensor) -> None:
        if self.kernels:
            advance_triton.draw_(self.rows, self.slots, logits_CV, VOCAB)
            advance_triton.lay_out_(self.rows, self.slots, self.spare, launched=True)
        else:
            advance(self.rows, self.slots, logits_CV, VOCAB, self.spare)

    def check_layout(self) -> None:
        """Slots are packed, a row's side by side and in place; none goes without; room is kept."""
        slots, live = self.slots, int(self.slots.live)
        lines = slots.line_C.tolist()
        assert lines[live:] == [-1] * (len(lines) - live)
        assert not slots.token_C[live:].any() and not slots.position_C[live:].any()
        going = [line for line in sorted(self.running) if not self.running[line].done]
        assert list(dict.fromkeys(lines[:live])) == going
        assert live <= min(len(lines), len(going) + self.spare)
        draws = {line: (at, wanted) for line, at, wanted in slots.draw_B3.tolist() if line >= 0}
        assert list(draws) == sorted(draws)
        assert slots.draw_B3[len(draws) :].tolist() == [[-1, 0, 0]] * (
            len(slots.draw_B3) - len(draws)
        )
        hungry = False
        for line in going:
            row, first, width = self.running[line], lines.index(line), lines.count(line)
            mine = slice(first, first + width)
            assert lines[mine] == [line] * width
            start = len(row.ids) - row.pending
            assert slots.position_C[mine].tolist() == list(range(start, start + width))
            fed = min(width, row.pending)
            tokens = slots.token_C[mine].tolist()
            assert tokens[:fed] == row.ids[start : start + fed]
            assert (line in draws) == (width >= row.pending)
            hungry |= width < row.pending
            if line in draws:
                drafts = width - row.pending
                assert draws[line] == (first + fed - 1, 1 + drafts)
                assert drafts <= row.drafts
                if drafts:  # what followed the same ids before
                    end = tuple(row.ids[-GRAM:])
                    stops = [
                        stop
                        for stop in range(GRAM, len(row.ids))
                        if tuple(row.ids[stop - GRAM : stop]) == end
                    ]
                    assert any(row.ids[s : s + drafts] == tokens[fed:] for s in stops)
        if hungry:  # nobody waits while a slot is spare, nor for a draft
            assert live == min(len(lines), len(going) + self.spare)
            assert all(wanted == 1 for _, wanted in draws.values())

    def step(self) -> None:
        """A launch, and the host's replay of what the ring brings."""
        slots = self.slots
        self.check_layout()
        logits_CV = torch.full((len(slots.token_C), WIDTH), torch.nan, dtype=self.dtype)
        layout = list(zip(slots.line_C.tolist(), slots.position_C.tolist(), strict=True))
        for slot, (line, position) in enumerate(layout):
            if line >= 0:
                row, token = self.running[line], int(slots.token_C[slot])
                logits_CV[slot] = row.after_VV[token].to(self.dtype)
                row.fed[position:] = [token]
        draws = slots.draw_B3.tolist()
        given = logits_CV.clone()
        self.advance(logits_CV)
        for line, row in self.running.items():
            row.cached += lines_fed(layout, line, row)
        for line, slot, wanted in draws:
            if line < 0:
                continue
            stamp, count, *tokens = slots.ring_DRW[self.steps % RING, line].tolist()
            assert stamp == self.steps + 1 and 1 <= count <= wanted
            row = self.running[line]
            row.cached = len(row.ids)
            for number, token in enumerate(tokens[:count]):
                assert token == row.draw(given[slot + number])
                assert row.fed[: len(row.ids)] == row.ids, "a token was drawn after others"
                plain = row.take(token)
                right = number + 1 < wanted and token == row_draft(layout, row, slot, number)
                assert (number + 1 < count) == (plain and right)
                if number + 1 < count:
                    row.cached = len(row.ids)
                    self.accepted += 1
        self.steps += 1
        assert int(slots.step) == self.steps
        for line, row in self.running.items():
            state = self.rows.state_RF[line].tolist()
            assert automaton_state(state) == row.automaton.state
            assert self.rows.ids_RX[line, : len(row.ids)].tolist() == row.ids
            assert state[Field.LENGTH] == len(row.ids) and state[Field.CACHED] == row.cached


def lines_fed(layout: list[tuple[int, int]], line: int, row: Sample) -> int:
    """Ids, not drafts, that the step fed of a row."""
    return min(sum(at == line for at, _ in layout), row.pending)


def row_draft(layout: list[tuple[int, int]], row: Sample, slot: int, number: int) -> int:
    """The draft behind a slot's number-th token."""
    return row.fed[layout[slot + number + 1][1]]


def play(
    seeds: list[int],
    lines: int,
    slots: int,
    spare: int,
    dtype: torch.dtype,
    kernels: bool,
    near: int = 128,
) -> Played:
    """All samples to their ends, armed as lines become free."""
    played = Played(lines, slots, spare, dtype, kernels, near)
    waiting = [row for row in map(Sample, seeds) if not row.done]
    finished: list[Sample] = []
    while waiting or played.running:
        free = [line for line in range(lines) if line not in played.running]
        if free and waiting:
            for line in free[: len(waiting)]:
                played.arm(line, waiting.pop(0))
            played.lay_out()
        played.step()
        for line, row in list(played.running.items()):
            if row.done:
                finished.append(played.running.pop(line))
                played.rows.state_RF[line, Field.ACTIVE] = 0
    for row in finished:
        wanted = alone(row.seed, dtype)
        assert (row.drawn, row.ids) == (wanted.drawn, wanted.ids), row.seed
    return played


BATCHES = [(8, 16, 8), (5, 9, 4), (3, 3, 8), (1, 8, 7)]
"""(lines, slots, spare)."""


def test_random_programs_draw_as_they_would_alone() -> None:
    accepted = 0
    for at, batch in enumerate(BATCHES * 2):
        seeds = list(range(40 * at, 40 * at + 40))
        accepted += play(seeds, *batch, (torch.float32, torch.bfloat16)[at % 2], False).accepted
    assert accepted > 100


@pytest.mark.parametrize("at", range(len(BATCHES)))
def test_kernels_draw_as_the_reference(at: int) -> None:
    dtype = (torch.float32, torch.bfloat16)[at % 2]
    seeds = list(range(1000 + 25 * at, 1015 + 25 * at))
    played = play(seeds, *BATCHES[at], dtype, True, near=(128, 32)[at == 1])
    assert played.accepted > 0 or at == 2  # where no slot is spare for a draft


# -- what random programs do not have ----------------------------------------------------------


def long_texts() -> Sample:
    """A greedy row whose lists are all longer than what a kernel looks at together, and whose
    ignore text and end take many steps; drafts do not fit beside them."""
    row = Sample(7)
    words = [token for token in range(5, VOCAB) if token not in (30, 31)]
    row.program = replace(
        row.program,
        max_tokens=700,
        room=800,
        stop_ids=frozenset(words[:40]),
        thought=0,
        half_end=(),
        max_thinking=400,
        min_thinking=0,
        num_ignore=1,
        mask_first=True,
        ends=tuple((token,) for token in words[40:]),
        ignore_ids=((31,) * 299 + (3,),),
        natural_ids=(30,) * 200,
        forced_ids=(30,) * 131,
        newline_ids=(4,),
        harness=False,
    )
    row.automaton = Automaton(row.program)
    row.ids, row.fed, row.cached, row.drafts = [40, 41], [40], 1, 5
    row.params = {**row.params, "temperature": 0.0}
    row.after_VV[30, words[45]] = 40.0  # ends thinking at once, where that is not masked
    row.after_VV[3, words[46]] = 40.0
    row.after_VV[words[44], words[45]] = 40.0
    return row


@pytest.mark.parametrize("kernels", [False, True], ids=["reference", "kernels"])
def test_long_texts_and_lists(kernels: bool) -> None:
    played = Played(2, 40, 36, torch.float32, kernels, 128)
    row = long_texts()
    played.arm(1, row)
    played.lay_out()
    while not row.done:
        played.step()
    assert row.automaton.waits == 1 and len(row.ids) > 450
    assert played.steps > 10


@pytest.mark.parametrize("kernels", [False, True], ids=["reference", "kernels"])
def test_a_disarmed_line_is_left_alone(kernels: bool) -> None:
    """Also where the step was laid out before: nothing is drawn for it, nothing of it changes."""
    played = Played(3, 6, 3, torch.float32, kernels, 128)
    for line, seed in enumerate([2, 3, 9]):
        played.arm(line, Sample(seed))
    played.lay_out()
    rows, slots = played.rows, played.slots
    rows.state_RF[1, Field.ACTIVE] = 0
    slots.ring_DRW.fill_(-1)
    before = [x[1].clone() for x in (rows.state_RF, rows.ids_RX, rows.gram_RG)]
    played.advance(torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(0)))
    assert (slots.ring_DRW[:, 1] == -1).all() and (slots.ring_DRW[0, [0, 2], 0] == 1).all()
    before[0][Field.CACHED] += before[0][Field.FED]
    before[0][Field.FED] = 0
    for was, now in zip(before, (rows.state_RF, rows.ids_RX, rows.gram_RG), strict=True):
        assert torch.equal(was, now[1])
    assert 1 not in slots.line_C


@pytest.mark.parametrize("kernels", [False, True], ids=["reference", "kernels"])
def test_a_bucket_serves_its_first_rows_and_fills_no_more(kernels: bool) -> None:
    played = Played(5, 12, 4, torch.float32, kernels, 128)
    seeds = [seed for seed in range(20) if not Sample(seed).done][:5]
    for line, seed in enumerate(seeds):
        played.arm(line, Sample(seed))
    whole = played.slots
    for x in (whole.token_C, whole.position_C, whole.line_C, whole.draw_B3):
        x.fill_(99)
    played.slots = whole.narrow(2, 6)
    played.lay_out()
    assert set(whole.line_C[:6].tolist()) - {-1} == {0, 1}
    assert (whole.line_C[6:] == 99).all() and (whole.draw_B3[2:] == 99).all()
    played.slots = whole
    played.lay_out()
    played.check_layout()


def test_a_ring_entry_bounds_the_drafts() -> None:
    """However many drafts a row may have."""
    for kernels in (False, True):
        played = Played(1, 8, 7, torch.float32, kernels, 128)
        row = Sample(1)
        row.ids = [30, 31, 32, 33] * 6
        row.cached, row.drafts, row.fed = 23, 1000, row.ids[:23]
        played.arm(0, row)
        played.slots = replace(played.slots, ring_DRW=torch.zeros(1, 1, 5, dtype=torch.int32))
        played.lay_out()
        assert played.slots.draw_B3.tolist() == [[0, 0, 3]]
        assert played.slots.token_C.tolist() == [33, 30, 31, 0, 0, 0, 0, 0]


BAD: list[tuple[str, dict[str, Any]]] = [
    ("logits_CV has shape .5, 97., expected .6, V", {"logits": torch.zeros(5, WIDTH)}),
    ("logits_CV .6, 97. is torch.float64", {"logits": torch.zeros(6, WIDTH).double()}),
    ("logits_CV of shape .6, 97. has strides", {"logits": torch.zeros(WIDTH, 6).T}),
    ("vocab_size 98, but logits_CV has 97 ids and ender_V 90", {"vocab_size": 98}),
    ("vocab_size 0", {"vocab_size": 0}),
    ("state_RF has shape .3, 9., expected .3, 24.", {"state_RF": torch.zeros(3, 9).int()}),
    ("ids_RX .3, 4. is torch.int64", {"ids_RX": torch.zeros(3, 4).long()}),
    ("gram_RG has shape .3, 63., whose places are no power of 2", {"gram_RG": torch.zeros(3, 63)}),
    ("ring_DRW has shape .1, 2, 9., expected .D, 3, W.", {"ring_DRW": torch.zeros(1, 2, 9).int()}),
    ("draw_B3 has strides", {"draw_B3": torch.zeros(3, 3).int().T}),
    ("spare -1", {"spare": -1}),
]


@pytest.mark.parametrize(("message", "change"), BAD, ids=[message for message, _ in BAD])
def test_bad_input_is_named(message: str, change: dict[str, Any]) -> None:
    change = {name: x.int() if name == "gram_RG" else x for name, x in change.items()}
    played = Played(3, 6, 3, torch.float32, False, 128)
    logits_CV = change.pop("logits", torch.zeros(6, WIDTH))
    vocab_size, spare = change.pop("vocab_size", VOCAB), change.pop("spare", 3)
    rows, slots = (
        replace(x, **{name: value for name, value in change.items() if hasattr(x, name)})
        for x in (played.rows, played.slots)
    )
    with pytest.raises(ValueError, match=message):
        advance(rows, slots, logits_CV, vocab_size, spare)


def test_an_index_finds_what_it_was_told() -> None:
    """A row that was indexed at once has the places of one indexed as it grew."""
    rng = random.Random(0)
    ids_X = torch.tensor([rng.choice(WORDS) for _ in range(300)], dtype=torch.int32)
    grown = gram_index(ids_X, 2, 64)
    assert not grown.any()
    for stop in range(GRAM, 300):
        place = gram_place(ids_X[stop - GRAM : stop].long(), 64)
        grown[place] = stop
    assert torch.equal(gram_index(ids_X, 300, 64), grown)
    large = torch.tensor([151_935, 151_934, 151_933])
    assert 0 <= int(gram_place(large, 1 << 15)) < 1 << 15
