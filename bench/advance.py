"""The bench of advance: the token loop's step from logits to the next step's slots.

B rows of V ids that draw one token a step, at temperature 1 with top-p 0.95, or `greedy`. What is
timed is a CUDA graph of 16 steps over the same logits, from the same beginning every time.

Counted are the logits, once a step. A row is one program's, so a single one is far from the floor.
The error is that of the ids drawn: all are the reference's, or the result is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from s1fast.automaton import Automaton, Program
from s1fast.bench.gemv import captured
from s1fast.bench.op import Forward, Normal, Op, Problem, Provider
from s1fast.kernels.advance import advance, lay_out
from s1fast.kernels.device_rows import Rows, Slots, line_of_state
from s1fast.kernels.sample import sample

STEPS, START = 16, 8
"""Steps of a graph; ids of a row before them."""


def make(sizes: Mapping[str, int], device: torch.device) -> Problem:
    """Logits as a model's, a few ids far above all others; rows that nothing ends."""
    count, vocab = sizes["B"], sizes["V"]
    endless = Program(max_tokens=1 << 20, room=1 << 20, stop_ids=frozenset())
    rows = Rows.empty(count, 64, 1, torch.zeros(vocab, dtype=torch.uint8), device)
    slots = Slots.empty(count, count, count, STEPS, 1, device)
    rows.program_RZ[:, : len(endless.table)] = torch.tensor(endless.table, device=device)
    keys = [_key(line, bool(sizes["greedy"])) for line in range(count)]
    for line, key in enumerate(keys):
        where = {"length": START, "cached": START - 1, "limit": 64, "drafts": 0}
        state = line_of_state(**where, state=Automaton(endless).state, **key)
        rows.state_RF[line] = torch.tensor(state, dtype=torch.int32)
    lay_out(rows, slots, 0)
    logits_BV = Normal(device)(count, vocab, std=2.0)
    logits_BV[:, :: vocab // 30] += 20.0
    arguments = (logits_BV, rows, slots, keys)
    return Problem(arguments, num_bytes=STEPS * logits_BV.nbytes, backward=False)


def _key(line: int, greedy: bool) -> dict[str, Any]:
    settings = {"temperature": 0.0, "top_p": 1.0} if greedy else {"temperature": 1.0, "top_p": 0.95}
    return {**settings, "top_k": 0, "min_p": 0.0, "seed": 7, "sample": line}


def ours(problem: Problem) -> Forward:
    logits_BV, rows, slots, _ = problem.arguments
    begun = rows.state_RF.clone()

    def run() -> Tensor:
        rows.state_RF.copy_(begun)
        for _ in range(STEPS):
            advance(rows, slots, logits_BV, logits_BV.shape[1], 0)
        return rows.ids_RX[:, START : START + STEPS]

    return captured(run, logits_BV.device)


def reference(problem: Problem) -> tuple[Tensor, dict[str, Tensor]]:
    """The ids by sample.py."""
    logits_BV, _, _, keys = problem.arguments
    pairs = list(zip(logits_BV, keys, strict=True))
    ids = [[sample(x_V, **k, position=START + i) for i in range(STEPS)] for x_V, k in pairs]
    return torch.tensor(ids, device=logits_BV.device), {}


OP = Op(
    name="advance",
    gpu_sizes={"B": 1, "V": 152064, "greedy": 0},
    cpu_sizes={"B": 2, "V": 300, "greedy": 0},
    gpu_shapes=("B1", "B8", "B64", "B1xgreedy", "B64xgreedy"),
    cpu_shapes=("B2", "B2xgreedy"),
    make=make,
    reference=reference,
    ours=Provider("s1fast", ours),
    peers=(),
)
