"""The sampler: its noise against Random123, its draws against softmax, its filters against sets."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from s1fast.kernels.sample import (
    FAR,
    FIXED_POINT,
    distance,
    fixed_point,
    gumbel,
    keep_mask,
    philox,
    sample,
    share_of,
    weight,
)

PLAIN: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


# -- Philox ---------------------------------------------------------------------------------

# kat_vectors of Random123, philox4x32 with 10 rounds: counter, key, first word of the output.
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], [0, 0], 0x6627E8D5),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, 0x408F276D),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0], 0xD16CFE09),
]


@pytest.mark.parametrize(("counter", "key", "word"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter: list[int], key: list[int], word: int) -> None:
    out = philox(tuple(counter), (key[0], key[1]), torch.zeros(3, dtype=torch.int64))
    assert out.tolist() == [word] * 3


def philox_by_hand(counter: list[int], key: list[int]) -> int:
    """Philox4x32-10 with Python's unbounded integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 % 2**32, (p0 >> 32) ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c[0]


def test_philox_equals_unbounded_integers() -> None:
    """Tensors in every place of the counter, extreme words included."""
    rng = random.Random(0)
    words = [0, 1, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
    for _ in range(20):
        key = [rng.choice(words), rng.getrandbits(32)]
        rows = [
            [rng.choice(words) if rng.random() < 0.3 else rng.getrandbits(32) for _ in range(4)]
            for _ in range(16)
        ]
        c0, c1, c2, c3 = torch.tensor(rows).unbind(1)
        got = philox((c0, c1, c2, c3), (key[0], key[1]), c0)
        assert got.tolist() == [philox_by_hand(row, key) for row in rows]


# -- noise ----------------------------------------------------------------------------------


def test_gumbel_is_the_documented_function_of_seed_sample_position_and_token() -> None:
    """Both words of the seed count, and no argument stands in for another."""
    tokens = torch.tensor([0, 1, 77, 151_642])
    for seed, index, position in [(0, 0, 0), (5, 3, 40_000), ((7 << 32) + 5, 3, 40_000)]:
        words = [
            philox_by_hand([position, token, seed >> 32, 0], [seed % 2**32, index])
            for token in tokens.tolist()
        ]
        u = [((word >> 9) + 0.5) / 2**23 for word in words]
        expected = torch.tensor([-math.log(-math.log(x)) for x in u])
        # fp32 rounds log u to 2^-24 of itself; near u = 1 that is all the error there is.
        torch.testing.assert_close(
            gumbel(seed, index, position, tokens), expected, rtol=1e-5, atol=1e-6
        )


def test_gumbel_is_finite_at_the_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest and the largest word keep u inside (0, 1)."""
    ends = torch.tensor([0, 0xFFFFFFFF])
    monkeypatch.setattr("s1fast.kernels.sample.philox", lambda *_: ends)
    low, high = gumbel(0, 0, 0, torch.arange(2)).tolist()
    assert low == pytest.approx(-math.log(24 * math.log(2)), rel=1e-5)
    assert high == pytest.approx(24 * math.log(2), rel=1e-5)


def test_a_filter_does_not_move_the_noise() -> None:
    """A draw that the filter keeps is the draw without it: noise goes by id, not by rank."""
    generator = torch.Generator().manual_seed(1)
    kept = 0
    for position in range(200):
        logits_V = torch.randn(50, generator=generator)
        free = int(sample(logits_V, **PLAIN, seed=9, sample=0, position=position))
        if logits_V[free] < logits_V.topk(10).values[-1]:
            continue
        kept += 1
        limited = sample(logits_V, **PLAIN | {"top_k": 10}, seed=9, sample=0, position=position)
        assert int(limited) == free
    assert kept > 50


def test_every_part_of_the_key_changes_the_draws() -> None:
    flat_V = torch.zeros(1000)

    def draws(**change: int) -> list[int]:
        at = {"seed": 1, "sample": 0, "position": 100, **change}
        rest = {name: value for name, value in at.items() if name != "position"}
        return [int(sample(flat_V, **PLAIN, **rest, position=at["position"] + i)) for i in range(8)]

    assert draws() == draws()
    changed = [draws(), draws(seed=2), draws(seed=1 + (1 << 32)), draws(sample=1)]
    changed.append(draws(position=200))
    assert len(set(map(tuple, changed))) == len(changed)


# -- distribution ---------------------------------------------------------------------------


def chi_square_p(counts: Tensor, probability_V: Tensor) -> float:
    """Chance of a fit at least this bad if the draws do follow the probabilities."""
    expected_V = probability_V.double() * counts.sum()
    assert expected_V.min() >= 5  # below, the statistic is not chi-square distributed
    statistic = ((counts - expected_V) ** 2 / expected_V).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2), statistic / 2))


@pytest.mark.parametrize(
    ("temperature", "axis"), [(0.7, "seed"), (1.0, "position"), (2.5, "sample")]
)
def test_draws_follow_softmax(temperature: float, axis: str) -> None:
    """1,500 draws along each part of the key. The seeds are fixed, so p > 1e-4 always holds or
    never; of right samplers, one of 10,000 would miss it."""
    logits_V = torch.tensor([1.5, 0.0, -0.8, 2.0, 0.3, -1.0])
    at = {"seed": 1234, "sample": 3, "position": 17}
    counts = torch.zeros(len(logits_V), dtype=torch.int64)
    for i in range(1500):
        key = at | {axis: at[axis] + i}
        counts[sample(logits_V, **PLAIN | {"temperature": temperature}, **key)] += 1
    assert chi_square_p(counts, (logits_V / temperature).softmax(0)) > 1e-4


def test_draws_of_neighbouring_positions_are_independent() -> None:
    """Pairs of draws fill the square of their product distribution; p > 1e-4 as above."""
    logits_V = torch.tensor([0.5, 0.0, -0.5])
    draws = [int(sample(logits_V, **PLAIN, seed=5, sample=0, position=i)) for i in range(2001)]
    counts = torch.zeros(9, dtype=torch.int64)
    for a, b in pairwise(draws):
        counts[3 * a + b] += 1
    p_V = logits_V.softmax(0)
    assert chi_square_p(counts, (p_V[:, None] * p_V).flatten()) > 1e-4


def test_draws_after_a_filter_follow_what_it_leaves() -> None:
    logits_V = torch.tensor([1.5, 0.0, -0.8, 2.0, 0.3, -1.0])
    counts = torch.zeros(len(logits_V), dtype=torch.int64)
    for i in range(1500):
        counts[sample(logits_V, **PLAIN | {"top_k": 3}, seed=8, sample=0, position=i)] += 1
    kept = logits_V.topk(3).indices
    assert counts.sum() == counts[kept].sum()
    assert chi_square_p(counts[kept], logits_V[kept].softmax(0)) > 1e-4


# -- temperature 0, ties, forbidden ids -----------------------------------------------------


def test_temperature_zero_is_the_lowest_of_the_likeliest() -> None:
    logits_V = torch.tensor([0.0, 3.0, -1.0, 3.0, 3.0])
    for position in range(5):
        token = sample(
            logits_V, **PLAIN | {"temperature": 0.0}, seed=position, sample=0, position=position
        )
        assert token.shape == () and token.dtype == torch.int64
        assert int(token) == 1


def test_forbidden_ids_are_never_drawn() -> None:
    logits_V = torch.full((40,), 5.0)
    logits_V[3:] = -math.inf
    for settings in ({}, {"top_k": 30}, {"top_p": 0.99}, {"min_p": 1e-6}):
        hot = PLAIN | {"temperature": 50.0} | settings
        drawn = {int(sample(logits_V, **hot, seed=0, sample=0, position=i)) for i in range(60)}
        assert drawn == {0, 1, 2}


def test_bf16_logits_draw_as_their_fp32_values() -> None:
    logits_V = torch.randn(300, generator=torch.Generator().manual_seed(2)).bfloat16()
    for i in range(20):
        key: dict[str, Any] = {**PLAIN, "seed": 3, "sample": 0, "position": i}
        assert sample(logits_V, **key) == sample(logits_V.float(), **key)


# -- filters --------------------------------------------------------------------------------


def kept_by_hand(logits: Tensor, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The documented set, one id after another, shares compared as exact fractions."""
    values = logits.numpy()
    ids = [i for i in range(len(values)) if values[i] > -np.inf]
    if top_k and top_k < len(values):
        kth = sorted((values[i] for i in ids), reverse=True)[: max(1, top_k)][-1]
        ids = [i for i in ids if values[i] >= kth]
    # Weights by exp: the polynomial's are as good, and no share here is nearer to a sum.
    relative = (logits - logits.max()).exp().double()
    weight = {i: int(Fraction(float(relative[i])) * FIXED_POINT) for i in ids}
    kept = set(ids)
    if top_p < 1.0:
        total, mass, last = sum(weight.values()), 0, None
        nucleus: set[int] = set()
        for i in sorted(ids, key=lambda i: -weight[i]):
            if mass >= Fraction(top_p) * total and weight[i] != last:
                break
            nucleus.add(i)
            mass, last = mass + weight[i], weight[i]
        kept &= nucleus
    if min_p > 0.0:
        kept = {i for i in kept if Fraction(weight[i], FIXED_POINT) >= Fraction(min_p)}
    return kept


def test_weights_are_powers_of_two() -> None:
    """Every fraction of a bit, and every whole one: within the polynomial's 1.3e-7 and a rounding
    down; less at every step within 2^-20 of a bit, so that order is kept."""
    fraction = torch.arange(1 << 20)
    exact = torch.exp2(30 - fraction.double() / (1 << 20))
    assert ((weight(fraction) - exact).abs() / exact).max() < 1.4e-7
    assert (weight(fraction).diff() < 0).all() and int(weight(fraction[-1])) > FIXED_POINT // 2
    for bits in range(32):
        assert int(weight(torch.tensor(bits << 20))) == FIXED_POINT >> bits
        part = fraction[:: 1 << 12] + (bits << 20)
        assert torch.equal(weight(part), weight(fraction[:: 1 << 12]) >> bits)
    assert int(weight(torch.tensor(FAR))) == 0


def test_distances_are_whole_parts_of_a_bit() -> None:
    logits_V = torch.tensor([3.0, 3.0 - math.log(2), -math.inf, 2.0, 3.0 - 32 * math.log(2), 3.0])
    found = distance(logits_V).tolist()
    assert (found[0], found[2], found[4], found[5]) == (0, FAR, FAR, 0)
    # fp32 logits near 3 are 2.4e-7 apart, a third of a distance.
    assert abs(found[1] - (1 << 20)) <= 1 and found[3] == int((1 << 20) / math.log(2))


@pytest.mark.parametrize("total", [0, 1, 5, (1 << 30) - 1, 1 << 30, 152_064 << 30])
def test_a_share_is_rounded_up(total: int) -> None:
    for share in (0.0, 1e-9, 0.3, 0.95, 1.0):
        exact = Fraction(fixed_point(share), FIXED_POINT) * total
        assert share_of(total, fixed_point(share)) == math.ceil(exact)


SETTINGS = [
    (top_k, top_p, min_p)
    for top_k in (0, 1, 7, 200)
    for top_p in (1.0, 0.95, 0.5, 0.01)
    for min_p in (0.0, 0.02, 0.5, 1.0)
]


@pytest.mark.parametrize("seed", range(6))
def test_filters_keep_the_documented_set(seed: int) -> None:
    """Continuous logits, and coarse ones where many are equal and stay or go together."""
    generator = torch.Generator().manual_seed(seed)
    logits_V = torch.randn(150, generator=generator) * (1 + seed % 3)
    if seed % 2:
        logits_V = logits_V.round()
    logits_V[torch.randperm(150, generator=generator)[:20]] = -math.inf
    sizes = set()
    for settings in SETTINGS:
        kept = set(keep_mask(logits_V, *settings).nonzero()[:, 0].tolist())
        assert kept == kept_by_hand(logits_V, *settings), settings
        sizes.add(len(kept))
    assert len(sizes) >= 5  # the settings do differ on these logits


def test_a_share_is_reached_by_the_fewest_of_the_likeliest() -> None:
    """Probabilities 4/8, 2/8, 1/8, 1/8, and shares on both sides of each sum; equals together."""
    logits_V = torch.tensor([0.0, 2.0, 0.0, 1.0]) * math.log(2)
    for top_p, kept in [(0.49, 1), (0.51, 2), (0.74, 2), (0.76, 4), (0.99, 4)]:
        assert int(keep_mask(logits_V, 0, top_p, 0.0).sum()) == kept, top_p


def test_top_p_after_top_k_shares_what_top_k_left() -> None:
    """Of 4/8, 2/8, 1/8, 1/8 top-k 2 leaves 2/3 and 1/3, so a share of 0.6 needs the first only."""
    logits_V = torch.tensor([2.0, 1.0, 0.0, 0.0]) * math.log(2)
    assert keep_mask(logits_V, 2, 0.6, 0.0).tolist() == [True, False, False, False]
    assert keep_mask(logits_V, 0, 0.6, 0.0).tolist() == [True, True, False, False]
