"""The budget automaton on the device: automaton.py's, over the integers of a row's lines.

All threads of a program compute the same scalars; one of them stores them. So a barrier stands
between what all have read and its store, and between the store and what all read next.
"""

from __future__ import annotations

from s1fast.kernels.automaton import PHASES, At, Phase
from s1fast.kernels.device_rows import Field
from s1fast.kernels.jit import constant, jit, tl

LENGTH, PHASE = constant(int(Field.LENGTH)), constant(int(Field.PHASE))
_GENERATED, _THINKING = constant(int(Field.GENERATED)), constant(int(Field.THINKING))
_WAITS, _ROUND = constant(int(Field.WAITS)), constant(int(Field.ROUND))
_MASK_ROUND, _NODE = constant(int(Field.MASK_ROUND)), constant(int(Field.NODE))
_NEWLINES = constant(int(Field.NEWLINES))

THINK, ANSWER, DONE = (constant(PHASES.index(phase)) for phase in Phase)

_MAX_TOKENS, _ROOM = constant(int(At.MAX_TOKENS)), constant(int(At.ROOM))
_MAX_THINKING, _MIN_THINKING = constant(int(At.MAX_THINKING)), constant(int(At.MIN_THINKING))
_NUM_IGNORE, _MASK_FIRST = constant(int(At.NUM_IGNORE)), constant(int(At.MASK_FIRST))
_HARNESS, _LONGEST_END = constant(int(At.HARNESS)), constant(int(At.LONGEST_END))
_STOPS, _NATURAL, _FORCED = map(constant, (int(At.STOPS), int(At.NATURAL), int(At.FORCED)))
_NEWLINE, _IGNORES, _NODES = map(constant, (int(At.NEWLINE), int(At.IGNORES), int(At.NODES)))

_FEW = constant(32)
_MANY = constant(128)
"""Lanes for edges of a node or stop ids, and for ids that are copied."""


# -- reading a program -------------------------------------------------------------------------


@jit
def _follow(program_ptr, node, token):
    """automaton.follow."""
    nodes_ptr = program_ptr + tl.load(program_ptr + _NODES)
    found = -1
    while found < 0:
        first = tl.load(nodes_ptr + 4 * node + 2)
        count = tl.load(nodes_ptr + 4 * node + 3)
        for base in range(0, count, _FEW):
            edge_E = base + tl.arange(0, _FEW)
            edge_ptr_E = program_ptr + first + 2 * edge_E
            token_E = tl.load(edge_ptr_E, mask=edge_E < count, other=-1)
            child_E = tl.load(edge_ptr_E + 1, mask=edge_E < count, other=-1)
            found = tl.maximum(found, tl.max(tl.where(token_E == token, child_E, -1), axis=0))
        if (found < 0) & (node == 0):
            found = node
        node = tl.load(nodes_ptr + 4 * node)
    return found


@jit
def _holds(program_ptr, at, token):
    """Whether a list of the program has an id."""
    start, count = tl.load(program_ptr + at), tl.load(program_ptr + at + 1)
    found = 0
    for base in range(0, count, _FEW):
        at_E = base + tl.arange(0, _FEW)
        token_E = tl.load(program_ptr + start + at_E, mask=at_E < count, other=-1)
        found += tl.sum((token_E == token).to(tl.int32), axis=0)
    return found > 0


@jit
def mask(logits_ptr, program_ptr, state_ptr):
    """Automaton.masked, as -inf in a row's logits. An id may be met again at a failure node: what
    it completes there is shorter, so that it is barred there only if it was before."""
    nodes_ptr = program_ptr + tl.load(program_ptr + _NODES)
    minimum = tl.load(program_ptr + _MIN_THINKING)
    early = tl.load(program_ptr + _LONGEST_END) - 1
    thinking = tl.load(state_ptr + _THINKING)
    since = tl.load(state_ptr + _ROUND)
    bare = tl.load(state_ptr + _MASK_ROUND) != 0
    thinks = tl.load(state_ptr + PHASE) == THINK
    if thinks & ((thinking - early < minimum) | (bare & (since <= early))):
        node = tl.load(state_ptr + _NODE)
        while node >= 0:
            first = tl.load(nodes_ptr + 4 * node + 2)
            count = tl.load(nodes_ptr + 4 * node + 3)
            for base in range(0, count, _FEW):
                edge_E = base + tl.arange(0, _FEW)
                edge_ptr_E = program_ptr + first + 2 * edge_E
                token_E = tl.load(edge_ptr_E, mask=edge_E < count, other=0)
                child_E = tl.load(edge_ptr_E + 1, mask=edge_E < count, other=0)
                match_E = tl.load(nodes_ptr + 4 * child_E + 1, mask=edge_E < count, other=0)
                early_E = (thinking - (match_E - 1) < minimum) | (bare & (since < match_E))
                out_E = tl.full((_FEW,), float("-inf"), logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + token_E, out_E, mask=(match_E > 0) & early_E)
            node = tl.where(node == 0, -1, tl.load(nodes_ptr + 4 * node))
        tl.debug_barrier()


@jit
def _append(ids_ptr, length, program_ptr, start, count):
    """Copies ids of the program behind the row's; returns its new length."""
    for base in range(0, count, _MANY):
        at_T = base + tl.arange(0, _MANY)
        id_T = tl.load(program_ptr + start + at_T, mask=at_T < count, other=0)
        tl.store(ids_ptr + length + at_T, id_T, mask=at_T < count)
    return length + count


# -- the automaton -----------------------------------------------------------------------------


@jit
def step(token, program_ptr, ender_ptr, ids_ptr, state_ptr):
    """Automaton.step, and what Row.apply does with the move; `since` is its _round.

    Returns:
        (whether the token just stays, the least length on the way, the length).
    """
    length = tl.load(state_ptr + LENGTH)
    phase = tl.load(state_ptr + PHASE)
    generated = tl.load(state_ptr + _GENERATED)
    thinking = tl.load(state_ptr + _THINKING)
    waits = tl.load(state_ptr + _WAITS)
    since = tl.load(state_ptr + _ROUND)
    newlines = tl.load(state_ptr + _NEWLINES)
    mask_round = tl.load(state_ptr + _MASK_ROUND)
    harness = tl.load(program_ptr + _HARNESS) != 0
    maximum = tl.load(program_ptr + _MAX_THINKING)
    max_tokens = tl.load(program_ptr + _MAX_TOKENS)
    room = tl.load(program_ptr + _ROOM)
    thinks = phase == THINK

    node = _follow(program_ptr, tl.load(state_ptr + _NODE), token)
    match = tl.load(program_ptr + tl.load(program_ptr + _NODES) + 4 * node + 1)
    delimiter = match > 0
    stops = (phase == ANSWER) & (match == 0) & _holds(program_ptr, _STOPS, token)
    plain = (match == 0) & (stops == 0)
    kept = plain.to(tl.int32)
    cut = tl.where(delimiter, tl.minimum(match - 1, since), 0)
    tl.store(ids_ptr + length, token, mask=plain)
    low = length - cut
    length += kept - cut
    generated += kept - cut
    since += kept
    if thinks:
        thinking += kept - cut
        ender = tl.load(ender_ptr + token).to(tl.int32)
        newlines = tl.where(plain, ((newlines << 1) | ender) & 0xFFFF, newlines >> cut)

    ignores = thinks & delimiter & (waits < tl.load(program_ptr + _NUM_IGNORE))
    if ignores:
        texts = tl.load(program_ptr + _IGNORES + 1)
        text_ptr = program_ptr + tl.load(program_ptr + _IGNORES) + 2 * (waits % texts)
        start, count = tl.load(text_ptr), tl.load(text_ptr + 1)
        left = tl.where(harness, room, max_tokens) - generated
        capped = (maximum >= 0) & (harness == 0)
        left = tl.where(capped, tl.minimum(left, maximum - thinking), left)
        count = tl.maximum(tl.minimum(count, left), 0)
        length = _append(ids_ptr, length, program_ptr, start, count)
        generated += count
        thinking += count
        waits += 1
        since = since * 0
        node = node * 0
        mask_round = tl.load(program_ptr + _MASK_FIRST)
        if count > 0:
            last = tl.load(program_ptr + start + count - 1)
            newlines = tl.load(ender_ptr + last).to(tl.int32)

    full = tl.where(harness, (since >= maximum) | (generated >= room), thinking >= maximum)
    by_length = thinks & (plain | ignores) & full & (maximum >= 0)
    natural = thinks & delimiter & (ignores == 0)
    if by_length | natural:
        since = since * 0
        node = node * 0
        beyond = tl.minimum(tl.maximum(thinking - maximum, 0), generated)
        beyond = tl.where(harness, beyond, 0)
        length -= beyond
        low = tl.minimum(low, length)
        thinking -= beyond
        generated -= beyond
        break_count = tl.where(
            by_length & (newlines & 1 == 0), tl.load(program_ptr + _NEWLINE + 1), 0
        )
        text_ptr = program_ptr + tl.where(by_length, _FORCED, _NATURAL)
        count = tl.load(text_ptr + 1)
        if generated + break_count + count <= max_tokens:
            phase = phase * 0 + ANSWER
            break_start = tl.load(program_ptr + _NEWLINE)
            length = _append(ids_ptr, length, program_ptr, break_start, break_count)
            length = _append(ids_ptr, length, program_ptr, tl.load(text_ptr), count)
            generated += break_count + count
            plain = plain & (beyond + break_count + count == 0)
        else:
            phase = phase * 0 + DONE
    over = (generated >= max_tokens) & ((phase == ANSWER) | (harness == 0))
    finished = stops | (delimiter & (thinks == 0)) | over
    phase = tl.where(finished, DONE, phase)
    plain = plain & (phase != DONE)
    tl.debug_barrier()
    tl.store(state_ptr + LENGTH, length)
    tl.store(state_ptr + PHASE, phase)
    tl.store(state_ptr + _GENERATED, generated)
    tl.store(state_ptr + _THINKING, thinking)
    tl.store(state_ptr + _WAITS, waits)
    tl.store(state_ptr + _ROUND, since)
    tl.store(state_ptr + _MASK_ROUND, mask_round)
    tl.store(state_ptr + _NODE, node)
    tl.store(state_ptr + _NEWLINES, newlines)
    tl.debug_barrier()
    return plain, low, length


COMPILE_CASES: list[tuple[object, ...]] = []
"""None of its own: a part of advance_triton.py's."""
