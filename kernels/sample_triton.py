"""Drawing the next token on the device: sample.py's draw, called by a kernel for one row.

One pass over the logits finds the likeliest id; at temperature 0 that is all. A second one lists
the ids that are near enough to be drawn: noise lies between -2.9 and 16.7, so where the likeliest
id has noise g, an id more than 16.7 - g below it cannot win, whatever the filters keep. Of a
language model's distribution that leaves a few thousand, and all the rest happens on the list: the
limits of top-k and top-p are bisected on distances, which are integers of 25 bits, and only what is
kept then gets noise. Where the list does not hold what the filters ask for (a flat distribution, a
large top-k), the same code runs over the whole row.

The passes of a row after the first find it in L2. Cost: one program a row, so 304 KB of bf16 logits
through one multiprocessor, about 3 us a pass at the 100 GB/s or so that one can load, whatever the
number of rows. Measured on an H100: not yet.
"""

from __future__ import annotations

import math

from s1fast.kernels import sample
from s1fast.kernels.device_rows import Field
from s1fast.kernels.jit import constant, jit, tl

STAGES = constant(8)
"""Tiles of logits on their way: what one multiprocessor needs to load at its best rate."""

_TEMPERATURE, _TOP_K = constant(int(Field.TEMPERATURE)), constant(int(Field.TOP_K))
_TOP_P, _MIN_P = constant(int(Field.TOP_P)), constant(int(Field.MIN_P))
_SEED_LOW, _SEED_HIGH = constant(int(Field.SEED_LOW)), constant(int(Field.SEED_HIGH))
_SAMPLE = constant(int(Field.SAMPLE))

_ROUND_0, _ROUND_1 = constant(0xD2511F53), constant(0xCD9E8D57)
_KEY_0, _KEY_1 = constant(0x9E3779B9), constant(0xBB67AE85)
_PER_NAT = constant(sample.PER_NAT)
_FAR = constant(sample.FAR)
_OUTSIDE = constant(1 << 26)  # a distance beyond any limit
_ONE = constant(sample.FIXED_POINT)
_POWER_A, _POWER_B, _POWER_C, _POWER_D, _POWER_E = map(constant, sample.POWER)
_MOST_NOISE = constant(-math.log(-math.log1p(-(2.0**-24))) + 0.05)


@jit
def philox(c0, c1, c2, c3, k0, k1):
    """First word of Philox4x32-10; words are uint32, as sample.philox has them."""
    for _ in tl.static_range(10):
        product_0 = c0.to(tl.uint64) * _ROUND_0
        product_1 = c2.to(tl.uint64) * _ROUND_1
        c0 = (product_1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product_0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = product_1.to(tl.uint32)
        c3 = product_0.to(tl.uint32)
        k0 = k0 + _KEY_0
        k1 = k1 + _KEY_1
    return c0


@jit
def gumbel(seed_low, seed_high, sample_index, position, token):
    """sample.gumbel of int32s."""
    c1 = token.to(tl.uint32)
    zero = c1 * 0
    c0 = zero + position.to(tl.uint32)
    c2 = zero + seed_high.to(tl.uint32)
    word = philox(
        c0, c1, c2, zero, zero + seed_low.to(tl.uint32), zero + sample_index.to(tl.uint32)
    )
    u = ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(u))


@jit
def _distance(logits_T, high, temperature):
    """sample.distance of logits, here divided by the temperature as `high`, the largest, is."""
    below_T = (high - tl.div_rn(logits_T, temperature)) * _PER_NAT
    return tl.minimum(below_T, 1.0 * _FAR).to(tl.int32)


@jit
def _weight(distance_T):
    """sample.weight, int32."""
    fraction_T = (distance_T & 0xFFFFF).to(tl.uint64) << 12  # in 2^-32
    power_T = _POWER_D - (fraction_T * _POWER_E >> 32)
    power_T = _POWER_C - (fraction_T * power_T >> 32)
    power_T = _POWER_B - (fraction_T * power_T >> 32)
    power_T = _POWER_A - (fraction_T * power_T >> 32)
    whole_T = _ONE - (fraction_T * power_T >> 34).to(tl.int32)
    return whole_T >> tl.minimum(distance_T >> 20, 31)


# -- the likeliest id --------------------------------------------------------------------------


@jit
def _higher(high_T, token_T, score_T, id_T):
    better_T = score_T > high_T
    return tl.where(better_T, score_T, high_T), tl.where(better_T, id_T, token_T)


@jit
def _first_of_highest(high_T, token_T):
    """(the highest, the lowest id that has it)."""
    high = tl.max(high_T, axis=0)
    return high, tl.min(tl.where(high_T == high, token_T, 0x7FFFFFFF), axis=0)


@jit
def _likeliest(logits_ptr, vocab_size, TILE: tl.constexpr):
    """(largest logit, the lowest id that has it)."""
    at_T = tl.arange(0, TILE)
    high_T = tl.full((TILE,), float("-inf"), tl.float32)
    token_T = tl.zeros((TILE,), tl.int32)
    whole = vocab_size // TILE * TILE  # ids in whole tiles, whose loads need no mask
    for start in tl.range(0, whole, TILE, num_stages=STAGES):
        logits_T = tl.load(logits_ptr + start + at_T).to(tl.float32)
        high_T, token_T = _higher(high_T, token_T, logits_T, start + at_T)
    rest_T = whole + at_T
    logits_T = tl.load(logits_ptr + rest_T, mask=rest_T < vocab_size, other=float("-inf"))
    high_T, token_T = _higher(high_T, token_T, logits_T.to(tl.float32), rest_T)
    return _first_of_highest(high_T, token_T)


# -- the list of near ids ----------------------------------------------------------------------


@jit
def _list_tile(near_ptr, count, mass_T, id_T, distance_T, reach, sums, NEAR: tl.constexpr):
    """Appends a tile's near ids and their distances; adds up all weights."""
    near_T = (distance_T <= reach).to(tl.int32)
    found = tl.sum(near_T, axis=0)
    if found > 0:
        place_T = count + tl.cumsum(near_T, axis=0) - 1
        inside_T = (near_T > 0) & (place_T < NEAR)
        tl.store(near_ptr + place_T, id_T, mask=inside_T)
        tl.store(near_ptr + NEAR + place_T, distance_T, mask=inside_T)
    if sums:
        mass_T += _weight(distance_T).to(tl.int64)
    return count + found, mass_T


@jit
def _list(
    near_ptr,
    logits_ptr,
    vocab_size,
    high,
    temperature,
    reach,
    sums,
    TILE: tl.constexpr,
    NEAR: tl.constexpr,
):
    """Lists the ids within reach; returns (their number, the mass of all ids if it is asked for).
    Of more than NEAR it lists the first NEAR."""
    at_T = tl.arange(0, TILE)
    count = 0
    mass_T = tl.zeros((TILE,), tl.int64)
    whole = vocab_size // TILE * TILE
    for start in tl.range(0, whole, TILE, num_stages=STAGES):
        logits_T = tl.load(logits_ptr + start + at_T).to(tl.float32)
        distance_T = _distance(logits_T, high, temperature)
        count, mass_T = _list_tile(
            near_ptr, count, mass_T, start + at_T, distance_T, reach, sums, NEAR
        )
    rest_T = whole + at_T
    logits_T = tl.load(logits_ptr + rest_T, mask=rest_T < vocab_size, other=float("-inf"))
    distance_T = _distance(logits_T.to(tl.float32), high, temperature)
    distance_T = tl.where(rest_T < vocab_size, distance_T, _OUTSIDE)
    count, mass_T = _list_tile(near_ptr, count, mass_T, rest_T, distance_T, reach, sums, NEAR)
    return count, tl.sum(mass_T, axis=0)


@jit
def _look(
    near_ptr,
    logits_ptr,
    start,
    num,
    listed,
    high,
    temperature,
    TILE: tl.constexpr,
    NEAR: tl.constexpr,
):
    """(ids, distances) of a tile of the list, or of the row where it is not listed."""
    at_T = start + tl.arange(0, TILE)
    if listed:
        id_T = tl.load(near_ptr + at_T, mask=at_T < num, other=0)
        distance_T = tl.load(near_ptr + NEAR + at_T, mask=at_T < num, other=_OUTSIDE)
    else:
        id_T = at_T
        logits_T = tl.load(logits_ptr + at_T, mask=at_T < num, other=0.0).to(tl.float32)
        distance_T = tl.where(at_T < num, _distance(logits_T, high, temperature), _OUTSIDE)
    return id_T, distance_T


@jit
def _total(
    near_ptr,
    logits_ptr,
    num,
    listed,
    high,
    temperature,
    limit,
    WEIGH: tl.constexpr,
    TILE: tl.constexpr,
    NEAR: tl.constexpr,
):
    """Number of the ids up to a distance, or their weight."""
    total_T = tl.zeros((TILE,), tl.int64)
    for start in range(0, num, TILE):
        _, distance_T = _look(
            near_ptr, logits_ptr, start, num, listed, high, temperature, TILE, NEAR
        )
        value_T = distance_T * 0 + 1
        if WEIGH:
            value_T = _weight(distance_T)
        total_T += tl.where(distance_T <= limit, value_T, 0).to(tl.int64)
    return tl.sum(total_T, axis=0)


@jit
def _limit(
    near_ptr,
    logits_ptr,
    num,
    listed,
    high,
    temperature,
    need,
    WEIGH: tl.constexpr,
    TILE: tl.constexpr,
    NEAR: tl.constexpr,
):
    """The least distance up to which the number or the weight of ids reaches what is needed."""
    limit = 0
    step = 1 << 24
    while step > 0:
        total = _total(
            near_ptr,
            logits_ptr,
            num,
            listed,
            high,
            temperature,
            limit + step - 1,
            WEIGH,
            TILE,
            NEAR,
        )
        limit = tl.where(total < need, limit + step, limit)
        step = step >> 1
    return limit


@jit
def _share_of(total, share):
    """sample.share_of, int64."""
    return (total >> 30) * share + (((total & (_ONE - 1)) * share + _ONE - 1) >> 30)


@jit
def draw(
    logits_ptr,
    vocab_size,
    near_ptr,
    state_ptr,
    position,
    TILE: tl.constexpr,
    NEAR: tl.constexpr,
):
    """One id of a row of logits, as sample.sample draws it by the row's line of state.

    Args:
        near_ptr: int32 memory for 2 NEAR values.
    """
    temperature = tl.load(state_ptr + _TEMPERATURE).to(tl.float32, bitcast=True)
    high, token = _likeliest(logits_ptr, vocab_size, TILE)
    if temperature > 0.0:
        top_k = tl.load(state_ptr + _TOP_K)
        top_p = tl.load(state_ptr + _TOP_P)
        min_p = tl.load(state_ptr + _MIN_P)
        seed_low = tl.load(state_ptr + _SEED_LOW)
        seed_high = tl.load(state_ptr + _SEED_HIGH)
        sample_index = tl.load(state_ptr + _SAMPLE)
        high = tl.div_rn(high, temperature)
        # A rounding of the largest scores is added, since it may bring two of them together.
        reach = _MOST_NOISE - gumbel(seed_low, seed_high, sample_index, position, token)
        reach = tl.minimum((reach + tl.abs(high) * 2.4e-7) * _PER_NAT, 1.0 * _FAR).to(tl.int32)
        top_k = tl.where(top_k < vocab_size, top_k, 0)
        shares = top_p < _ONE
        num, mass = _list(
            near_ptr,
            logits_ptr,
            vocab_size,
            high,
            temperature,
            reach,
            shares & (top_k == 0),
            TILE,
            NEAR,
        )
        tl.debug_barrier()  # the list is there
        listed = (num <= NEAR) & (num >= top_k)
        if listed & shares & (top_k == 0):
            near = _total(
                near_ptr, logits_ptr, num, True, high, temperature, _FAR, True, TILE, NEAR
            )
            listed = near >= _share_of(mass, top_p)
        num = tl.where(listed, num, vocab_size)
        limit = _FAR
        if top_k > 0:
            limit = _limit(
                near_ptr, logits_ptr, num, listed, high, temperature, top_k, False, TILE, NEAR
            )
            if shares:
                mass = _total(
                    near_ptr, logits_ptr, num, listed, high, temperature, limit, True, TILE, NEAR
                )
        if shares:
            need = _share_of(mass, top_p)
            limit = tl.minimum(
                limit,
                _limit(
                    near_ptr, logits_ptr, num, listed, high, temperature, need, True, TILE, NEAR
                ),
            )
        limit = tl.minimum(limit, reach)
        high_T = tl.full((TILE,), float("-inf"), tl.float32)
        token_T = tl.zeros((TILE,), tl.int32)
        for start in range(0, num, TILE):
            id_T, distance_T = _look(
                near_ptr, logits_ptr, start, num, listed, high, temperature, TILE, NEAR
            )
            kept_T = (distance_T <= limit) & (_weight(distance_T) >= min_p)
            if tl.max(kept_T.to(tl.int32), axis=0) > 0:
                logits_T = tl.load(logits_ptr + id_T, mask=kept_T, other=float("-inf"))
                score_T = tl.div_rn(logits_T.to(tl.float32), temperature)
                score_T += gumbel(seed_low, seed_high, sample_index, position, id_T)
                high_T, token_T = _higher(high_T, token_T, score_T, id_T)
        _, token = _first_of_highest(high_T, token_T)
        tl.debug_barrier()  # the list has been read
    return token


COMPILE_CASES: list[tuple[object, ...]] = []
"""None of its own: a part of advance_triton.py's."""
