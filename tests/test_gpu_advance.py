"""The token loop's step on a CUDA device, captured, against the reference on a CPU (make gpu)."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from s1fast.automaton import Automaton
from s1fast.kernels.advance import advance, lay_out
from s1fast.kernels.device_rows import Rows, Slots, gram_index, line_of_state
from s1fast.kernels.sample import keep_mask, sample
from test_automaton import ALPHABET, WORDS, random_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

VOCAB, WIDTH = 151_665, 152_064  # Qwen2.5's
POSITIONS, LINES, SPARE, STEPS, RING = 512, 16, 8, 10, 4
CUDA, CPU = torch.device("cuda"), torch.device("cpu")

SETTINGS: list[dict[str, Any]] = [
    {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for temperature, top_k, top_p, min_p in [
        (0.0, 0, 1.0, 0.0),
        (1.0, 0, 1.0, 0.0),
        (0.6, 20, 0.95, 0.0),
        (0.7, 0, 0.8, 0.02),
        (1.0, 50_000, 1.0, 0.0),
        (1.5, 0, 0.999, 0.0),
        (40.0, 0, 1.0, 0.0),
        (40.0, 1000, 0.5, 0.0),
    ]
]
"""Lists that hold what is asked, and rows whose lists overflow."""


def armed(device: torch.device) -> tuple[Rows, Slots]:
    """Random programs as rows, some with ids to feed and with drafts to find."""
    rng = random.Random(5)
    ender_V = torch.zeros(VOCAB, dtype=torch.uint8)
    ender_V[[3, 4]] = 1
    rows = Rows.empty(LINES, POSITIONS, 1, ender_V, device)
    slots = Slots.empty(LINES, LINES + SPARE, LINES, RING, 6, device)
    for line in range(LINES):
        program = random_case(line + 50).program
        program = replace(program, max_tokens=program.max_tokens + 30)
        automaton = Automaton(program)
        ids = [rng.choice(WORDS[:2]) for _ in range(40)] + list(automaton.begin().append)
        state = line_of_state(
            length=len(ids),
            cached=len(ids) - rng.choice([1, 1, 12]),
            limit=POSITIONS,
            drafts=line % 4,
            state=automaton.state,
            seed=rng.getrandbits(64),
            sample=line,
            **SETTINGS[line % len(SETTINGS)],
        )
        rows.state_RF[line] = torch.tensor(state, dtype=torch.int32)
        rows.ids_RX[line, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
        table = torch.tensor(program.table, dtype=torch.int32)
        rows.program_RZ[line, : len(table)] = table
        rows.gram_RG[line] = gram_index(rows.ids_RX[line], len(ids), rows.gram_RG.shape[1])
    lay_out(rows, slots, SPARE)
    return rows, slots


def logits(step: int, dtype: torch.dtype) -> Tensor:
    """As peaked as a model's; some of what the programs know is likely, and so is what is not an
    id of the tokenizer."""
    generator = torch.Generator(CUDA).manual_seed(step)
    logits_CV = 3 * torch.randn(LINES + SPARE, WIDTH, generator=generator, device=CUDA)
    logits_CV[:, list(ALPHABET)] += 12
    logits_CV[:, WORDS[0]] += 8 * (step % 3)  # then drafts come true
    logits_CV[:, VOCAB:] = 50
    return logits_CV.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_captured_step_equals_the_reference(dtype: torch.dtype) -> None:
    """Every tensor after every step, the pinned ring too."""
    rows, slots = armed(CUDA)
    wanted_rows, wanted_slots = armed(CPU)
    logits_CV = logits(0, dtype)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):  # compiles, on copies
        copies = [
            type(x)(**{name: value.clone() for name, value in vars(x).items()})
            for x in (rows, slots)
        ]
        copies[1] = replace(copies[1], ring_DRW=slots.ring_DRW.clone().pin_memory())
        advance(*copies, logits_CV.clone(), VOCAB, SPARE)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        advance(rows, slots, logits_CV, VOCAB, SPARE)
    assert slots.ring_DRW.is_pinned()
    drawn = 0
    for step in range(STEPS):
        fresh_CV = logits(step, dtype)
        logits_CV.copy_(fresh_CV)
        graph.replay()
        torch.cuda.synchronize()
        advance(wanted_rows, wanted_slots, fresh_CV.cpu(), VOCAB, SPARE)
        for found, wanted in ((rows, wanted_rows), (slots, wanted_slots)):
            for name, x in vars(wanted).items():
                if name != "near_BK":
                    assert torch.equal(getattr(found, name).cpu(), x), f"{name} in step {step}"
        drawn += int((wanted_slots.draw_B3[:, 0] >= 0).sum())
    assert drawn > 60


def test_the_host_draws_there_as_on_a_cpu() -> None:
    """sample.py on CUDA tensors, which is what the loop's own step on the host does."""
    for step, row in enumerate(logits(1, torch.bfloat16)[: len(SETTINGS), :VOCAB]):
        settings = SETTINGS[step]
        drawn = [sample(x, **settings, seed=7, sample=1, position=step) for x in (row, row.cpu())]
        assert int(drawn[0]) == int(drawn[1])
        if temperature := settings["temperature"]:
            filters = [settings[name] for name in ("top_k", "top_p", "min_p")]
            scaled_V = row.cpu().float() / temperature
            found_V = keep_mask(scaled_V.to(CUDA), *filters)
            assert torch.equal(found_V.cpu(), keep_mask(scaled_V, *filters))
