"""The automaton on the device against automaton.py's, a launch a token, on random programs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from playing import END, START, THINKS
from s1fast.automaton import TABLE_SIZE, Automaton, Phase, Program
from s1fast.kernels.automaton_triton import mask, step
from s1fast.kernels.device_rows import Field, automaton_state, line_of_state
from test_automaton import Draws, random_case

triton = pytest.importorskip("triton")
tl = triton.language

IDS, POSITIONS = 64, 512


@triton.jit
def step_kernel(
    token_ptr,
    logits_ptr,
    state_ptr,
    program_ptr,
    ender_ptr,
    ids_ptr,
    told_ptr,
    IDS: tl.constexpr,
    POSITIONS: tl.constexpr,
    TABLE: tl.constexpr,
    FIELDS: tl.constexpr,
):
    line = tl.program_id(0)
    token = tl.load(token_ptr + line)
    if token >= 0:
        state_ptr += line * FIELDS
        program_ptr += line * TABLE
        mask(logits_ptr + line * IDS, program_ptr, state_ptr)
        plain, low, length = step(
            token, program_ptr, ender_ptr, ids_ptr + line * POSITIONS, state_ptr
        )
        tl.store(told_ptr + 3 * line, plain.to(tl.int32))
        tl.store(told_ptr + 3 * line + 1, low)
        tl.store(told_ptr + 3 * line + 2, length)


@dataclass
class Line:
    program: Program
    draw: Draws

    def __post_init__(self) -> None:
        self.automaton = Automaton(self.program)
        self.ids = [40, *self.automaton.begin().append]

    def take(self, token: int) -> tuple[int, int, int]:
        """(whether the token just stays, the least length on the way, the length)."""
        before = len(self.ids)
        move = self.automaton.step(token)
        if move.keep:
            self.ids.append(token)
        del self.ids[len(self.ids) - move.cut :]
        low = min(before, len(self.ids))
        self.ids += move.append
        done = self.automaton.phase is Phase.DONE
        plain = move.keep and not move.cut and not move.append and not done
        return int(plain), low, len(self.ids)


def play(lines: list[Line]) -> None:
    """All lines to their ends; after every token everything is compared."""
    count = len(lines)
    state_RF = torch.zeros(count, Field.SIZE, dtype=torch.int32)
    ids_RX = torch.zeros(count, POSITIONS, dtype=torch.int32)
    program_RZ = torch.zeros(count, TABLE_SIZE, dtype=torch.int32)
    ender_V = torch.zeros(IDS, dtype=torch.uint8)
    ender_V[list(THINKS.newline_enders)] = 1
    for at, line in enumerate(lines):
        table = line.program.table
        program_RZ[at, : len(table)] = torch.tensor(table)
        ids_RX[at, : len(line.ids)] = torch.tensor(line.ids)
        state = line_of_state(
            length=len(line.ids),
            cached=0,
            limit=0,
            drafts=0,
            state=line.automaton.state,
            temperature=0.0,
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            seed=0,
            sample=0,
        )
        state_RF[at] = torch.tensor(state)
    while any(line.automaton.phase is not Phase.DONE for line in lines):
        going = [at for at, line in enumerate(lines) if line.automaton.phase is not Phase.DONE]
        masked = {at: set(lines[at].automaton.masked) for at in going}
        token_R = torch.full((count,), -1, dtype=torch.int32)
        for at in going:
            automaton = lines[at].automaton
            token_R[at] = lines[at].draw(automaton.generated, tuple(automaton.masked))
        logits_RV = torch.zeros(count, IDS)
        told_R3 = torch.zeros(count, 3, dtype=torch.int32)
        step_kernel[(count,)](
            token_R,
            logits_RV,
            state_RF,
            program_RZ,
            ender_V,
            ids_RX,
            told_R3,
            IDS=IDS,
            POSITIONS=POSITIONS,
            TABLE=TABLE_SIZE,
            FIELDS=int(Field.SIZE),
        )
        for at in going:
            line = lines[at]
            assert set(logits_RV[at].isinf().nonzero()[:, 0].tolist()) == masked[at]
            plain, low, length = line.take(int(token_R[at]))
            assert told_R3[at].tolist() == [plain, low, length]
            assert automaton_state(state_RF[at].tolist()) == line.automaton.state
            assert state_RF[at, Field.LENGTH] == length
            assert ids_RX[at, :length].tolist() == line.ids


def test_random_programs_step_as_the_automaton() -> None:
    """Delimiters of several ids, ignore texts, harness rounds, cuts: 40 programs."""
    cases = [random_case(seed) for seed in range(3000, 3040)]
    lines = [Line(case.program, case.draw) for case in cases]
    play(lines)
    assert {len(line.program.ends[0]) for line in lines} >= {1, 3, 4}
    assert {line.program.harness for line in lines} == {False, True}
    assert sum(line.automaton.waits > 1 for line in lines) > 3


class Script:
    """Given tokens, whatever is masked."""

    def __init__(self, *tokens: int) -> None:
        self.tokens = tokens

    def __call__(self, position: int, masked: object) -> int:
        return self.tokens[position]


def test_lists_longer_than_the_lanes() -> None:
    """Stop ids and edges on both sides of 32, failure nodes, a text of 300 ids, a
    delimiter that began in the prompt."""
    stops = THINKS.stop_ids | set(range(20, 60))
    answers = replace(THINKS, think=False, stop_ids=frozenset(stops), ends=())
    ends = tuple((token,) for token in range(5, 60))
    plain = replace(THINKS, ends=ends, natural_ids=(7,) * 300, max_tokens=400, stop_ids=stops)
    nested = replace(THINKS, ends=((30, 31, 32), (31, 33)), min_thinking=3)
    begun = replace(THINKS, ends=((30, 31, 32),), thought=2, half_end=(30, 31))
    scripts: list[tuple[Program, tuple[int, ...]]] = [
        (answers, (4, 4, 21)),
        (answers, (4, 59)),
        (replace(plain, stop_ids=frozenset()), (3, 5)),
        (replace(plain, max_tokens=200), (3, 58)),
        (begun, (32, 40)),
        (nested, (40, 30, 31, 33, 41, 2)),
        (nested, (40, 40, 40, 30, 31, 33, 41, 2)),
        (nested, (40, 41, 30, 31, 30, 31, 32)),
        (replace(THINKS, max_thinking=2, newline_ids=(3,)), (4, 3)),
        (replace(THINKS, max_thinking=3, max_tokens=12, ends=((30, 31), (END,))), (4, 30, 31)),
        (replace(THINKS, max_thinking=3, max_tokens=9, ends=((30, 31), (START,))), (4, 30, 35)),
    ]
    for program, tokens in scripts:
        line = Line(program, Script(*tokens, *[2] * 400))  # type: ignore[arg-type]
        play([line])
