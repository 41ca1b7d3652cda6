"""How running rows and a step's token slots lie on the device: what the host writes and the kernels
of the token loop read.

`Rows` are the running samples, a line each; `Slots` the tokens of one step. advance.py takes both
from one step to the next. Who writes what: the host arms and disarms lines and writes the page
table, in stream order between two launches, and calls `lay_out` after it; all else is the
device's. Sizes: R lines, X positions, F state fields, Z a program's integers, G places of an n-gram
index, V ids, P pages a row; C slots, B drawing rows, D places of the ring, W integers of an entry.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from s1fast.kernels.automaton import TABLE_SIZE, State
from s1fast.kernels.sample import fixed_point

GRAM = 3
"""Tokens that must agree before what followed them is a draft."""
MIXERS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
"""Odd factors of a gram's ids in its place of the index."""


class Field(IntEnum):
    """Where a row's integers lie in its line of state."""

    ACTIVE = 0  # 1 while the line holds a row that goes on
    LENGTH = 1  # ids so far
    CACHED = 2  # ids whose keys and values are in the cache
    FED = 3  # ids that the step laid out last adds to them
    INDEXED = 4  # ends of GRAM ids below it are in the n-gram index
    LIMIT = 5  # positions that the row may use; drafts stay below
    DRAFTS = 6  # most drafts a step
    PHASE = 8  # from here on State's, in its order
    GENERATED = 9
    THINKING = 10
    WAITS = 11
    ROUND = 12
    MASK_ROUND = 13
    NODE = 14
    NEWLINES = 15
    TEMPERATURE = 16  # the bits of an fp32
    TOP_K = 17
    TOP_P = 18  # of sample.FIXED_POINT
    MIN_P = 19  # likewise
    SEED_LOW = 20
    SEED_HIGH = 21
    SAMPLE = 22
    SIZE = 24


def line_of_state(
    *,
    length: int,
    cached: int,
    limit: int,
    drafts: int,
    state: State,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    sample: int,
) -> list[int]:
    """A line of `state_RF` for a row to be armed.

    Args:
        length: its ids; cached: those whose keys and values are in the cache, at least length - 1
            unless more are to be fed.
        limit: positions that it may ever use.
        drafts: most drafts a step.
        state: of its automaton, begun.
        temperature, top_k, top_p, min_p, seed, sample: as for kernels/sample.py.

    Returns:
        Field.SIZE integers of 32 bits. INDEXED is `length`: the caller writes `gram_index`.
    """
    line = [0] * Field.SIZE
    line[Field.ACTIVE] = 1
    line[Field.LENGTH], line[Field.CACHED] = length, cached
    line[Field.INDEXED], line[Field.LIMIT], line[Field.DRAFTS] = length, limit, drafts
    line[Field.PHASE : Field.TEMPERATURE] = state
    line[Field.TEMPERATURE] = struct.unpack("<i", struct.pack("<f", temperature))[0]
    line[Field.TOP_K], line[Field.TOP_P] = top_k, fixed_point(top_p)
    line[Field.MIN_P] = fixed_point(min_p)
    line[Field.SEED_LOW], line[Field.SEED_HIGH] = signed(seed), signed(seed >> 32)
    line[Field.SAMPLE] = sample
    return line


def automaton_state(line: Sequence[int]) -> State:
    """What a line of `state_RF` holds of it."""
    return State(*line[Field.PHASE : Field.PHASE + len(State._fields)])


def signed(word: int) -> int:
    """The low 32 bits as an int32."""
    return (word & 0xFFFFFFFF ^ 0x80000000) - 0x80000000


# -- n-gram index ------------------------------------------------------------------------------


def gram_place(gram_N3: Tensor, places: int) -> Tensor:
    """Places of GRAM ids (int64) each in an index of 2^n places."""
    terms = [id_N * mixer for id_N, mixer in zip(gram_N3.unbind(-1), MIXERS, strict=True)]
    word_N = sum(terms[1:], terms[0]) & 0xFFFFFFFF
    return (word_N ^ (word_N >> 15)) & (places - 1)


def gram_index(ids_X: Tensor, length: int, places: int) -> Tensor:
    """The n-gram index of a row's first `length` ids, their end left out.

    Every place holds where the last GRAM ids of that place stop, 0 for none: int32 (places,) on the
    ids' device.
    """
    index_G = ids_X.new_zeros(places, dtype=torch.int32)
    if length > GRAM:
        place_N = gram_place(ids_X[: length - 1].long().unfold(0, GRAM, 1), places)
        stop_N = torch.arange(GRAM, length, dtype=torch.int32, device=ids_X.device)
        index_G.scatter_reduce_(0, place_N, stop_N, "amax")
    return index_G


# -- tensors -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The running rows."""

    state_RF: Tensor
    """int32, see Field."""
    ids_RX: Tensor
    """int32: the prompt and all that came after it. What is appended stands here at once."""
    program_RZ: Tensor
    """int32: Program.table, then anything."""
    gram_RG: Tensor
    """int32, see gram_index."""
    ender_V: Tensor
    """uint8: 1 for ids whose text ends in a newline."""
    table_RP: Tensor
    """int32: page of every so many positions, written by the host alone; page 0 is a sink."""

    @classmethod
    def empty(
        cls, rows: int, positions: int, pages: int, ender_V: Tensor, device: torch.device
    ) -> Rows:
        """Lines without rows.

        Args:
            rows: lines; positions: most ids of a row; pages: most pages of a row.
            ender_V: uint8, on any device.
        """

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        places = 1 << max(6, (positions - 1).bit_length())
        return cls(
            zeros(rows, Field.SIZE),
            zeros(rows, positions),
            zeros(rows, TABLE_SIZE),
            zeros(rows, places),
            ender_V.to(device),
            zeros(rows, pages),
        )


@dataclass(frozen=True)
class Slots:
    """The tokens of one step, and where what is drawn after them goes."""

    token_C: Tensor
    """int32; 0 where idle. Slots in use are packed at the front, a row's side by side."""
    position_C: Tensor
    """int32: index of the slot's id among its row's; 0 where idle."""
    line_C: Tensor
    """int32: the slot's row; -1 where idle."""
    live: Tensor
    """int32 (1,): slots in use."""
    draw_B3: Tensor
    """int32: of every row that draws its line, the first slot after which a token is wanted, and
    how many are, one and the drafts; (-1, 0, 0) behind them."""
    step: Tensor
    """int64 (1,): launches so far."""
    ring_DRW: Tensor
    """int32, in the host's memory, pinned where there is a GPU: the launch that finds `step` at n
    writes ring[n % D, line] = (low 31 bits of n + 1, tokens drawn, they themselves). An entry with
    another stamp was not written: its row drew nothing. The host reads it after the launch's
    event."""
    near_BK: Tensor
    """int32, for K / 2 ids that may be drawn and their distances while a launch runs."""

    @classmethod
    def empty(
        cls, rows: int, slots: int, lines: int, ring: int, draws: int, device: torch.device
    ) -> Slots:
        """Idle slots.

        Args:
            rows: most rows of a step; slots: most tokens of a step.
            lines: of the Rows; ring: launches whose tokens the ring holds.
            draws: most tokens that a row draws in a step.
        """

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        pinned = device.type == "cuda"
        draw_B3 = zeros(rows, 3)
        draw_B3[:, 0] = -1
        return cls(
            zeros(slots),
            zeros(slots),
            zeros(slots) - 1,
            zeros(1),
            draw_B3,
            zeros(1, dtype=torch.int64),
            torch.zeros(ring, lines, 2 + draws, dtype=torch.int32, pin_memory=pinned),
            zeros(rows, 2 * NEAR),
        )

    def narrow(self, rows: int, slots: int) -> Slots:
        """A bucket: the first `rows` drawing rows and `slots` slots, in the same memory. `lay_out`
        fills it anew."""
        return Slots(
            self.token_C[:slots],
            self.position_C[:slots],
            self.line_C[:slots],
            self.live,
            self.draw_B3[:rows],
            self.step,
            self.ring_DRW,
            self.near_BK[:rows],
        )


NEAR = 8192
"""Most ids near enough to be drawn that a row lists."""
