"""The device's draws, in Triton's interpreter, against the reference, which follows softmax."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from s1fast.automaton import Automaton, Program
from s1fast.kernels import advance_triton
from s1fast.kernels.device_rows import Rows, Slots, line_of_state
from s1fast.kernels.sample import distance, gumbel, sample, weight
from test_sample import PLAIN

CPU = torch.device("cpu")
ENDLESS = Program(max_tokens=1 << 20, room=1 << 20, stop_ids=frozenset())
INF = float("inf")

Key = dict[str, Any]


def drawn(logits_BV: Tensor, keys: list[Key], position: int, vocab_size: int, near: int) -> Tensor:
    """What the kernel draws after each row of logits at a position."""
    count = len(keys)
    rows = Rows.empty(count, position + 1, 1, torch.zeros(vocab_size, dtype=torch.uint8), CPU)
    slots = replace(
        Slots.empty(count, count, count, 1, 3, CPU),
        near_BK=torch.full((count, 2 * near), -1, dtype=torch.int32),
        draw_B3=torch.tensor([[i, i, 1] for i in range(count)], dtype=torch.int32),
    )
    rows.program_RZ[:, : len(ENDLESS.table)] = torch.tensor(ENDLESS.table)
    for line, key in enumerate(keys):
        state = line_of_state(
            length=position,
            cached=position,
            limit=position,
            drafts=0,
            state=Automaton(ENDLESS).state,
            **key,
        )
        rows.state_RF[line] = torch.tensor(state, dtype=torch.int32)
    advance_triton.draw_(rows, slots, logits_BV, vocab_size)
    assert slots.ring_DRW[0, :, :2].tolist() == [[1, 1]] * count
    assert torch.equal(slots.ring_DRW[0, :, 2], rows.ids_RX[:, position])
    return rows.ids_RX[:, position]


def check(logits_BV: Tensor, keys: list[Key], vocab_size: int, near: int) -> None:
    wanted = [
        int(sample(logits_V[:vocab_size], **key, position=9))
        for logits_V, key in zip(logits_BV, keys, strict=True)
    ]
    assert drawn(logits_BV, keys, 9, vocab_size, near).tolist() == wanted


SETTINGS: list[Key] = [
    {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for temperature, (top_k, top_p, min_p) in product(
        (0.6, 8.0),
        [
            (0, 1.0, 0.0),
            (1, 1.0, 0.0),
            (9, 0.7, 0.0),
            (90, 1.0, 0.01),
            (0, 0.9, 0.0),
            (999, 0.3, 0.5),
        ],
    )
]


@pytest.mark.parametrize(("near", "coarse"), [(32, False), (128, True)])
def test_every_filter_draws_as_the_reference(near: int, coarse: bool) -> None:
    """Peaked and flat rows, lists that hold all that is asked and lists that overflow."""
    generator = torch.Generator().manual_seed(near + coarse)
    keys = [{**s, "seed": 77 * i + (i << 40), "sample": i} for i, s in enumerate(SETTINGS)]
    logits_BV = torch.randn(len(keys), 211, generator=generator) * 4
    if coarse:
        logits_BV = logits_BV.round()
    logits_BV[:, torch.randperm(200, generator=generator)[:20]] = -INF
    logits_BV[:, 203:] = 60.0  # beyond the vocabulary
    check(logits_BV, keys, 203, near)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_temperature_zero_is_the_lowest_of_the_likeliest(dtype: torch.dtype) -> None:
    """Wherever they lie among whole tiles and the rest."""
    greedy = [{**PLAIN, "temperature": 0.0, "seed": 0, "sample": 0}] * 6
    logits_BV = torch.zeros(6, 100, dtype=dtype)
    for row, equals in enumerate([(0, 99), (31, 32), (95, 96), (99,), (5, 69, 37), ()]):
        logits_BV[row, list(equals)] = 2.0
    assert drawn(logits_BV, greedy, 3, 100, 32).tolist() == [0, 31, 95, 99, 5, 0]


def test_a_wide_range_of_logits_draws_as_the_reference() -> None:
    """Where a rounding of the scores is larger than most differences, and where all are equal."""
    keys: list[Key] = [{**PLAIN, "seed": 5, "sample": i} for i in range(3)]
    keys[1] = {**keys[1], "temperature": 1e-5}
    logits_BV = torch.randn(3, 80, generator=torch.Generator().manual_seed(3))
    logits_BV[0] *= 1e5
    logits_BV[2] = -7.25
    check(logits_BV, keys, 80, 32)


def test_a_long_tail_is_drawn() -> None:
    """4,000 ids 8 nats down win more than half of the draws, by noise alone."""
    keys: list[Key] = [{**PLAIN, "seed": 11, "sample": i} for i in range(6)]
    logits_BV = torch.full((6, 4000), -8.0)
    logits_BV[:, 1234] = 0.0
    check(logits_BV, keys, 4000, 4096)
    assert drawn(logits_BV, keys, 9, 4000, 4096).tolist().count(1234) < 5


def test_ids_too_far_to_be_drawn_still_weigh() -> None:
    """200 ids 20 nats down have 400 units of 2^30; by a share that only they raise above the
    likeliest's own the second stays, 10 nats down. At one position in 22,000 it is drawn."""
    logits_V = torch.full((202,), -20.0)
    logits_V[:2] = torch.tensor([0.0, -10.0])
    own, second, far = weight(distance(logits_V))[:3].tolist()
    share = own / (own + second + 100 * far)
    key: Key = {**PLAIN, "seed": 2, "sample": 0, "top_p": share}
    place = torch.arange(3, 100_000)
    noise = [gumbel(2, 0, place, torch.full_like(place, token)) for token in (0, 1)]
    position = int(place[noise[1] - noise[0] > 10.1][0])
    for top_k, token in ((202, 1), (0, 1), (201, 1), (2, 0)):  # equals stay together
        key = {**key, "top_k": top_k}
        assert int(sample(logits_V, **key, position=position)) == token
        assert drawn(logits_V[None], [key], position, 202, 64).tolist() == [token]
