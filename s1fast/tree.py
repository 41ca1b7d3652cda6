"""The budget tree: every cell of a grid of budgets and ignore counts from one decode.

A draw depends on (seed, sample, position) and the text before it alone. So the thinking cut at b is
a prefix of that cut at b' > b, and the one with N ignores is a prefix of that with N' > N: the
longest cell is decoded, the trunk, and the others leave it where their own rules part from its. An
automaton walks the trunk's draws once more; where a draw could end a cell's thinking, a copy of it
goes on under the cell's limits, and if that ends it, the cell becomes a branch with the trunk's
tokens up to there and its own end string. Branches with the same tokens are one row: all budgets
beyond a natural stop share one.

Under harness accounting the same holds: every round draws what the trunk's draws, and the cut
afterwards is part of the copy's move.

num_ignore None masks nothing where a count masks the end of thinking for one token. Where that
mask changed a draw of the trunk, the cells with None are decoded on their own, as a second tree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from s1fast.automaton import Automaton, Move, Phase
from s1fast.request import Cell, Kind, Logprob, Piece
from s1fast.row import Row


def trunk_first(cells: Sequence[Cell]) -> list[Cell]:
    """The cell whose thinking holds all others' comes first: most ignores, largest maximum."""

    def reach(cell: Cell) -> tuple[int, float, bool]:
        return cell.program.num_ignore, _maximum(cell), cell.program.mask_first

    return sorted(cells, key=reach, reverse=True)


_Token = tuple[int, Kind, Logprob | None]


@dataclass(frozen=True)
class _Leaf:
    """Where a cell leaves the trunk: its state, the tokens that it has before, its own move."""

    cell: Cell
    automaton: Automaton
    text: list[_Token]
    steps: int
    move: Move
    token: int | None = None
    logprob: Logprob | None = None


def branches(trunk: Row) -> list[Row]:
    """The rows that the waiting cells become, now that the trunk's thinking has ended.

    A cell whose tokens are the trunk's joins it instead. The first `taken_over` tokens of a row are
    the trunk's too: the caller forks their pages.
    """
    cells, apart = trunk.waiting_cells, []
    trunk.waiting_cells = []
    if trunk.mask_changed:
        apart = [c for c in cells if not c.program.mask_first]
        cells = [c for c in cells if c.program.mask_first]
    rows = {_key(trunk): trunk}
    made: list[Row] = []
    for leaf in _walk(trunk, cells):
        row = _branch(trunk, leaf, len(made))
        same = rows.setdefault(_key(row), row)
        if same is row:
            made.append(row)
        else:
            same.cells.append((leaf.cell, leaf.automaton, leaf.steps))
    trunk.draws = []
    if apart:
        made.append(_sibling(trunk, trunk_first(apart), len(made)))
        made[-1].begin()
    return made


def _key(row: Row) -> tuple[tuple[int, ...], tuple[Kind, ...], Phase]:
    """What rows must share to be one. The same ids may be said otherwise: a newline may end an
    ignore text, or precede the answer's marker."""
    return tuple(row.ids), tuple(row.kinds), row.automaton.phase


def _walk(trunk: Row, cells: Sequence[Cell]) -> Iterator[_Leaf]:
    """Every cell's leaf, by one pass over the trunk's draws."""
    program = trunk.cells[0][0].program
    left = []
    for cell in cells:  # a maximum of 0 ends before the first draw
        under = Automaton(cell.program)
        move = under.begin()
        if under.phase is Phase.THINK:
            left.append(cell)
        else:
            yield _Leaf(cell, under, [], 0, move)
    state = Automaton(program)
    text: list[_Token] = []
    state.begin()
    for steps, (token, logprob) in enumerate(trunk.draws, 1):
        if not left:
            return
        nearest = min(map(_maximum, left))
        before, state = state, state.under(program)
        move = state.step(token)
        # Only the end of a delimiter or of a budget can end a cell's thinking.
        if not move.keep or state.phase is not Phase.THINK or state.thinking >= nearest:
            for cell in list(left):
                under = before.under(cell.program)
                own = under.step(token)
                if under.phase is not Phase.THINK:
                    left.remove(cell)
                    yield _Leaf(cell, under, list(text), steps, own, token, logprob)
        if move.keep:
            text.append((token, "thinking", logprob))
        del text[len(text) - move.cut :]
        text += [(i, "ignore", None) for i in move.ignore]
    assert not left, "a cell's thinking is longer than the trunk's"


def _maximum(cell: Cell) -> float:
    longest = cell.program.max_thinking
    return math.inf if longest is None else longest


def _sibling(trunk: Row, cells: Sequence[Cell], number: int) -> Row:
    """A fresh row of the same sample. It stands right behind the trunk in the order of rows."""
    order = (*trunk.order, number)
    what = trunk.index, trunk.sample, trunk.prompt_ids, trunk.params, cells, trunk.chat
    return Row(trunk.job, order, *what)


def _branch(trunk: Row, leaf: _Leaf, number: int) -> Row:
    """A row with the trunk's tokens up to the leaf, and the leaf's move applied."""
    row = _sibling(trunk, [leaf.cell], number)
    row.automaton, row.steps = leaf.automaton, leaf.steps
    row.cells = [(leaf.cell, leaf.automaton, leaf.steps)]
    row.ids += [i for i, _, _ in leaf.text]
    row.kinds = [kind for _, kind, _ in leaf.text]
    if trunk.params.logprobs is not None:
        row.logprobs = [logprob for _, _, logprob in leaf.text]
    stays = len(row.kinds) + (leaf.token is not None and leaf.move.keep) - leaf.move.cut
    stays = min(stays, len(row.kinds))
    row.continue_from(*_released(trunk.pieces, _common(row, trunk, stays)))
    row.apply(leaf.move, leaf.token, "thinking", leaf.logprob)
    row.taken_over = len(row.prompt_ids) + _common(row, trunk, len(row.kinds))
    return row


def _common(row: Row, trunk: Row, most: int) -> int:
    """How many ids after the prompt, of `most`, are the same."""
    first = len(row.prompt_ids)
    stop = first + most
    pairs = zip(row.ids[first:stop], trunk.ids[first:stop], strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _released(pieces: Sequence[Piece], most: int) -> tuple[list[Piece], int]:
    """The first pieces that hold no more than `most` ids, and how many they do hold."""
    count = 0
    for number, piece in enumerate(pieces):
        if count == most or count + len(piece.ids) > most:
            return list(pieces[:number]), count
        count += len(piece.ids)
    return list(pieces), count
