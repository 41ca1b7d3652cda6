"""From one step of the token loop to the next without the host: draws, budget automata, layout.

    advance    for every row that draws: the next token, what its automaton makes of it, drafts
               checked; then lay_out
    lay_out    which tokens the next step has

A CUDA device runs two launches, advance_triton.py's, which read nothing that the host would have to
wait for, so a graph may hold them. A CPU runs this reference: kernels/automaton.py and
kernels/sample.py over the same tensors, so it equals the loop of s1fast/loop.py by construction.

Bytes: the logits of the drawn slots once, the rest is a few KB. Floor for 64 rows of V 152,064 in
bf16: 19.5 MB, 6.5 us at 3.0 TB/s. Measured on an H100: not yet.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from s1fast.kernels import advance_triton, arguments
from s1fast.kernels.automaton import PHASES, Automaton, Phase
from s1fast.kernels.device_rows import GRAM, Field, Rows, Slots, automaton_state, gram_place
from s1fast.kernels.sample import FIXED_POINT, sample


def advance(rows: Rows, slots: Slots, logits_CV: Tensor, vocab_size: int, spare: int) -> None:
    """Draws after the slots that want it and lays out the next step, all in place.

    For every row of `draw_B3`, and for each of its slots in turn: ids that the automaton masks are
    out of the question, those from vocab_size on too; a token is drawn with the noise of (seed,
    sample, its position); the automaton decides what stays, goes and follows. The row goes on to
    its next slot only where that holds the very token, and nothing else happened. `ring_DRW` tells
    the host what was drawn.

    Args:
        logits_CV: bf16 or fp32, of every slot, unit stride along V; overwritten at masked ids.
        vocab_size: ids of the tokenizer, at most V.
        spare: slots beyond one a row that the next step may have.

    Raises:
        ValueError: shape, dtype, device or stride is not as stated.
    """
    _check(rows, slots, spare)
    arguments.expect(
        "logits_CV",
        logits_CV,
        (len(slots.token_C), "V"),
        (torch.bfloat16, torch.float32),
        slots.token_C.device,
    )
    arguments.expect_unit_stride("logits_CV", logits_CV)
    if not 0 < vocab_size <= min(logits_CV.shape[1], len(rows.ender_V)):
        raise ValueError(
            f"vocab_size {vocab_size}, but logits_CV has {logits_CV.shape[1]} ids and ender_V "
            f"{len(rows.ender_V)}"
        )
    if logits_CV.is_cuda:
        advance_triton.draw_(rows, slots, logits_CV, vocab_size)
        advance_triton.lay_out_(rows, slots, spare, launched=True)
    else:
        draw_reference_(rows, slots, logits_CV, vocab_size)
        lay_out_reference_(rows, slots, spare, launched=True)


def lay_out(rows: Rows, slots: Slots, spare: int) -> None:
    """Lays out the next step: to be called before the first one, after lines were armed or disarmed
    and after a change of bucket. Doing it twice changes nothing.

    Every line that is active and not done gets a slot, in line order, the first B of them if there
    are more (C is B at least). Up to `spare` more go to rows with more to feed, the shortest first,
    then to drafts of rows that have all they feed in the step and so draw after it. A row whose ids
    are all cached feeds its last one again. A draft is what followed the last GRAM ids before.

    Raises:
        ValueError: shape, dtype or device is not as stated in device_rows.py.
    """
    _check(rows, slots, spare)
    if rows.state_RF.is_cuda:
        advance_triton.lay_out_(rows, slots, spare, launched=False)
    else:
        lay_out_reference_(rows, slots, spare, launched=False)


def _check(rows: Rows, slots: Slots, spare: int) -> None:
    device = rows.state_RF.device
    integers = (torch.int32,)
    lines = len(rows.state_RF)
    expect = arguments.expect
    expect("state_RF", rows.state_RF, (lines, Field.SIZE), integers, device)
    expect("ids_RX", rows.ids_RX, (lines, "X"), integers, device)
    expect("program_RZ", rows.program_RZ, (lines, "Z"), integers, device)
    expect("gram_RG", rows.gram_RG, (lines, "G"), integers, device)
    expect("ender_V", rows.ender_V, ("V",), (torch.uint8,), device)
    size = len(slots.token_C)
    for name in ("token_C", "position_C", "line_C"):
        expect(name, getattr(slots, name), (size,), integers, device)
    expect("draw_B3", slots.draw_B3, ("B", 3), integers, device)
    expect("step", slots.step, (1,), (torch.int64,), device)
    expect("ring_DRW", slots.ring_DRW, ("D", lines, "W"), integers, torch.device("cpu"))
    expect("near_BK", slots.near_BK, (len(slots.draw_B3), "K"), integers, device)
    for part in (rows, slots):
        for name, x in vars(part).items():
            if not x.is_contiguous():
                raise ValueError(f"{name} has strides {x.stride()}; pass {name}.contiguous()")
    for name, x in (("gram_RG", rows.gram_RG), ("near_BK", slots.near_BK)):
        if x.shape[1].bit_count() != 1:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, whose places are no power of 2")
    if spare < 0:
        raise ValueError(f"spare {spare} is less than 0")


_DONE = PHASES.index(Phase.DONE)


# -- reference ---------------------------------------------------------------------------------


class _Rules:
    """A line's program and the vocabulary's newlines, as an automaton wants them."""

    def __init__(self, rows: Rows, line: int) -> None:
        self.table = tuple(rows.program_RZ[line].tolist())
        self.newline_enders = _Enders(rows.ender_V)


class _Enders:
    def __init__(self, ender_V: Tensor) -> None:
        self.ender_V = ender_V

    def __contains__(self, token: object) -> bool:
        return isinstance(token, int) and bool(self.ender_V[token])


def draw_reference_(rows: Rows, slots: Slots, logits_CV: Tensor, vocab_size: int) -> None:
    """The first half of `advance`."""
    for line, slot, wanted in slots.draw_B3.tolist():
        if line >= 0 and rows.state_RF[line, Field.ACTIVE]:
            drafts = slots.token_C[slot + 1 : slot + wanted].tolist()
            _draw_row(rows, slots, line, logits_CV[slot : slot + wanted, :vocab_size], drafts)


def _draw_row(
    rows: Rows, slots: Slots, line: int, logits_NV: Tensor, drafts: Sequence[int]
) -> None:
    state = rows.state_RF[line].tolist()
    automaton = Automaton.resume(_Rules(rows, line), automaton_state(state))
    length = cached = state[Field.LENGTH]
    ids_X = rows.ids_RX[line]
    drawn = []
    for number, logits_V in enumerate(logits_NV):
        token = _draw(logits_V, list(automaton.masked), state, length)
        drawn.append(token)
        move = automaton.step(token)
        if move.keep:
            ids_X[length] = token
            length += 1
        length -= move.cut
        cached = min(cached, length)
        for followed in move.append:
            ids_X[length] = followed
            length += 1
        right = number < len(drafts) and drafts[number] == token
        if automaton.phase is Phase.DONE or not move.keep or move.cut or move.append or not right:
            break
        cached = length
    _index(rows, line, min(state[Field.INDEXED], cached), length)
    state[Field.PHASE : Field.TEMPERATURE] = automaton.state
    state[Field.LENGTH], state[Field.CACHED], state[Field.FED] = length, cached, 0
    state[Field.INDEXED] = length
    rows.state_RF[line] = torch.tensor(state, dtype=torch.int32)
    step = int(slots.step)
    entry = [step + 1 & 0x7FFFFFFF, len(drawn), *drawn]
    place_W = slots.ring_DRW[step % len(slots.ring_DRW), line]
    place_W[: len(entry)] = torch.tensor(entry, dtype=torch.int32)


def _draw(logits_V: Tensor, masked: list[int], state: list[int], position: int) -> int:
    if masked:
        logits_V = logits_V.clone()
        logits_V[masked] = -torch.inf
    (temperature,) = struct.unpack("<f", struct.pack("<i", state[Field.TEMPERATURE]))
    low, high = state[Field.SEED_LOW] & 0xFFFFFFFF, state[Field.SEED_HIGH] & 0xFFFFFFFF
    token = sample(
        logits_V,
        temperature=temperature,
        top_k=state[Field.TOP_K],
        top_p=state[Field.TOP_P] / FIXED_POINT,
        min_p=state[Field.MIN_P] / FIXED_POINT,
        seed=high << 32 | low,
        sample=state[Field.SAMPLE],
        position=position,
    )
    return int(token)


def _index(rows: Rows, line: int, first: int, length: int) -> None:
    """Enters the ends of GRAM ids from `first` on, that of the row left out."""
    gram_G, ids = rows.gram_RG[line], rows.ids_RX[line]
    for stop in range(max(first, GRAM), length):
        place = gram_place(ids[stop - GRAM : stop].long(), len(gram_G))
        gram_G[place] = max(int(gram_G[place]), stop)


def lay_out_reference_(rows: Rows, slots: Slots, spare: int, launched: bool) -> None:
    """`lay_out`; `launched`: the step laid out last was run."""
    state_RF = rows.state_RF
    if launched:
        state_RF[:, Field.CACHED] += state_RF[:, Field.FED]
        slots.step.add_(1)
    state_RF[:, Field.FED] = 0
    lines = [
        line
        for line, state in enumerate(state_RF.tolist())
        if state[Field.ACTIVE] and state[Field.PHASE] != _DONE
    ][: len(slots.draw_B3)]
    length = {line: int(state_RF[line, Field.LENGTH]) for line in lines}
    pending = {line: max(1, length[line] - int(state_RF[line, Field.CACHED])) for line in lines}
    left = min(spare, len(slots.token_C) - len(lines))
    count = dict.fromkeys(lines, 1)
    for line in sorted(lines, key=pending.__getitem__):
        more = min(pending[line] - 1, left)
        count[line] += more
        left -= more
    slots.token_C.zero_()
    slots.position_C.zero_()
    slots.line_C.fill_(-1)
    slots.draw_B3.zero_()
    slots.draw_B3[:, 0] = -1
    at = drawing = 0
    for line in lines:
        start, drafts = length[line] - pending[line], []
        if count[line] == pending[line]:
            drafts = _draft(rows, line, min(left, slots.ring_DRW.shape[2] - 3))
            left -= len(drafts)
            slots.draw_B3[drawing] = torch.tensor([line, at + count[line] - 1, 1 + len(drafts)])
            drawing += 1
        fed_X = rows.ids_RX[line, start : start + count[line]]
        tokens = torch.cat([fed_X, fed_X.new_tensor(drafts)])
        slots.token_C[at : at + len(tokens)] = tokens
        slots.position_C[at : at + len(tokens)] = torch.arange(start, start + len(tokens))
        slots.line_C[at : at + len(tokens)] = line
        state_RF[line, Field.FED] = count[line]
        at += len(tokens)
    slots.live.fill_(at)


def _draft(rows: Rows, line: int, most: int) -> list[int]:
    """Up to `most` ids that may follow the row's."""
    state, ids_X, gram_G = rows.state_RF[line].tolist(), rows.ids_RX[line], rows.gram_RG[line]
    length = state[Field.LENGTH]
    if length <= GRAM:
        return []
    last = ids_X[length - GRAM : length]
    stop = int(gram_G[gram_place(last.long(), len(gram_G))])
    if not GRAM <= stop < length or ids_X[stop - GRAM : stop].tolist() != last.tolist():
        return []
    most = max(0, min(most, state[Field.DRAFTS], state[Field.LIMIT] - length))
    return ids_X[stop : min(stop + most, length)].tolist()
