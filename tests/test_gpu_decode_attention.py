"""Decode attention, prefill attention and append at real sizes on a CUDA device (make gpu)."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from s1fast.kernels.decode_attention import (
    Workspace,
    decode_attention,
    decode_workspace,
    prefill_attention,
)
from s1fast.kernels.page_append import append_qkv
from tolerances import check_against_eager

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE = torch.device("cuda")
SIZE = 16
BF16 = torch.bfloat16


@dataclass
class Rows:
    """Pages of rows of these lengths, scattered; whatever no row holds is NaN."""

    lengths: list[int]
    heads: tuple[int, int] = (40, 8)
    width: int = 128
    room: int = 0
    """Positions that a row may still grow by."""

    def __post_init__(self) -> None:
        counts = [-(-(length + self.room) // SIZE) for length in self.lengths]
        draw = torch.Generator(DEVICE).manual_seed(0)
        shape = (sum(counts) + 1, SIZE, self.heads[1], self.width)
        self.k, self.v = (
            torch.randn(shape, generator=draw, device=DEVICE, dtype=BF16) for _ in "kv"
        )
        self.k[0] = self.v[0] = torch.nan
        order = (torch.randperm(sum(counts), generator=draw, device=DEVICE) + 1).int()
        self.table = torch.zeros(len(counts), max(counts) + 3, dtype=torch.int32, device=DEVICE)
        for line, pages in enumerate(order.split(counts)):
            self.table[line, : len(pages)] = pages
            length = self.lengths[line]
            for cache in (self.k, self.v):
                cache[pages[-(-length // SIZE) :].long()] = torch.nan
                if length % SIZE:
                    cache[pages[length // SIZE].long(), length % SIZE :] = torch.nan

    def queries(self, count: int, seed: int = 1) -> Tensor:
        draw = torch.Generator(DEVICE).manual_seed(seed)
        shape = (count, self.heads[0], self.width)
        return torch.randn(shape, generator=draw, device=DEVICE, dtype=BF16)

    def workspace(self, slots: int) -> Workspace:
        return decode_workspace(slots, *self.heads, self.width, DEVICE)

    def gathered(self, line: int, count: int) -> tuple[Tensor, Tensor]:
        """(N, count, K) keys and values of a row."""
        pages = self.table[line, : -(-count // SIZE)].long()
        k, v = (x[pages].flatten(0, 1)[:count].transpose(0, 1) for x in (self.k, self.v))
        return k, v

    def check(self, out_CHK: Tensor, q_CHK: Tensor, slots: list[tuple[int, int]]) -> None:
        """Against float64 and torch's own bf16, a row at a time."""
        exact, eager = torch.zeros_like(out_CHK, dtype=torch.float64), torch.zeros_like(out_CHK)
        for slot, (line, position) in enumerate(slots):
            if line < 0:
                continue
            k_NXK, v_NXK = self.gathered(line, position + 1)
            q_NGK = q_CHK[slot].unflatten(0, (self.heads[1], -1))
            score_NGX = q_NGK.double() @ k_NXK.double().mT * self.width**-0.5
            exact[slot] = (score_NGX.softmax(-1) @ v_NXK.double()).flatten(0, 1)
            eager[slot] = F.scaled_dot_product_attention(q_NGK, k_NXK, v_NXK).flatten(0, 1)
        check_against_eager(out_CHK, exact, eager, "out")


def tensors(slots: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """(line_C, position_C)."""
    lines, positions = zip(*slots, strict=True)
    line_C, position_C = (
        torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (lines, positions)
    )
    return line_C, position_C


def ends(rows: Rows) -> list[tuple[int, int]]:
    return [(line, length - 1) for line, length in enumerate(rows.lengths)]


def ragged(count: int, longest: int) -> list[int]:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(1, longest + 1, (count,), generator=draw).tolist()


STEPS = {
    "8K": ([8192], (40, 8), 128, 7),
    "32K": ([32768], (40, 8), 128, 7),
    "64 rows": (ragged(64, 3000), (40, 8), 128, 8),
    "short": ([1, 15, 16, 17, 255, 256, 257, 4097], (28, 4), 128, 0),
    "a rank of eight": ([8000, 20000], (5, 1), 128, 6),
    "width 64": (ragged(8, 5000), (14, 2), 64, 8),
    "no groups": (ragged(8, 2000), (16, 16), 128, 3),
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("invariant", [False, True], ids=["", "invariant"])
@pytest.mark.parametrize("name", STEPS)
def test_steps(name: str, invariant: bool) -> None:
    """Values, the same bits in 20 launches, counters back at zero."""
    lengths, heads, width, idle = STEPS[name]
    rows = Rows(lengths, heads, width)
    slots = ends(rows) + [(-1, 0)] * idle
    q_CHK, workspace = rows.queries(len(slots)), rows.workspace(len(slots))
    arguments = (q_CHK, rows.k, rows.v, rows.table, *tensors(slots))
    outs = [
        decode_attention(*arguments, workspace=workspace, batch_invariant=invariant)
        for _ in range(20)
    ]
    rows.check(outs[0], q_CHK, slots)
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert not workspace.counter.any()


def test_strings() -> None:
    """Eight slots of a row, and rows of several slots among others."""
    rows = Rows([8200, 515, 2100])
    alone = [(0, 8192 + i) for i in range(8)]
    mixed = [*alone[:3], *((1, 508 + i) for i in range(7)), (2, 2099), (-1, 0)]
    for slots in (alone, mixed):
        q_CHK, workspace = rows.queries(len(slots)), rows.workspace(len(slots))
        arguments = (q_CHK, rows.k, rows.v, rows.table, *tensors(slots))
        rows.check(decode_attention(*arguments, workspace=workspace), q_CHK, slots)


def test_batch_invariant() -> None:
    """A slot's bits are the same alone, among 64 rows, and beside more slots of its row."""
    rows = Rows([*ragged(63, 3000), 9000])
    slots = [*ends(rows), *((63, 8990 + i) for i in range(8))]
    q_CHK, workspace = rows.queries(len(slots)), rows.workspace(len(slots))
    row = rows.k, rows.v, rows.table
    options = {"workspace": workspace, "batch_invariant": True}
    out_CHK = decode_attention(q_CHK, *row, *tensors(slots), **options)
    for slot in (0, 17, 63, 64, 71):
        for more in (0, 7):
            some = [slots[slot]] + [(-1, 0)] * more
            alone_CHK = decode_attention(
                q_CHK[slot : slot + 1 + more].repeat(1 + more, 1, 1)[: 1 + more],
                *row,
                *tensors(some),
                **options,
            )
            assert torch.equal(alone_CHK[0], out_CHK[slot])


def test_a_captured_step_follows_its_slots() -> None:
    """Append and attention in a graph: every replay sees new positions, lines and pages."""
    rows = Rows([8192 - 5, 31, 700, 4000], room=40)
    h, n, width, count = *rows.heads, rows.width, 8
    line_C, position_C = tensors([(-1, 0)] * count)
    columns = (h + 2 * n) * width
    qkv_CQ = torch.zeros(count, columns, device=DEVICE, dtype=BF16)
    bias_Q = torch.randn(columns, device=DEVICE).to(BF16)
    angle_XR = torch.rand(9000, width // 2, device=DEVICE)
    workspace = rows.workspace(count)

    def step() -> tuple[Tensor, Tensor]:
        q_CHK = append_qkv(
            qkv_CQ,
            bias_Q,
            angle_XR.cos(),
            angle_XR.sin(),
            position_C,
            line_C,
            rows.table,
            rows.k,
            rows.v,
            h,
        )
        where = rows.table, line_C, position_C
        return q_CHK, decode_attention(q_CHK, rows.k, rows.v, *where, workspace=workspace)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q_CHK, out_CHK = step()
    lengths = list(rows.lengths)
    for counts in ([1, 1, 1, 1], [4, 1, 3, 0], [0, 8, 0, 0], [1, 0, 0, 7], [0, 0, 0, 1]):
        slots = [(line, lengths[line] + i) for line, c in enumerate(counts) for i in range(c)]
        slots += [(-1, 0)] * (count - len(slots))
        for static, new in zip((line_C, position_C), tensors(slots), strict=True):
            static.copy_(new)
        qkv_CQ.normal_()
        graph.replay()
        rows.check(out_CHK, q_CHK, slots)
        lengths = [length + c for length, c in zip(lengths, counts, strict=True)]
        at = [slot for slot, (line, _) in enumerate(slots) if line >= 0]
        v_ANK = (
            (qkv_CQ.float() + bias_Q.float())
            .to(BF16)[at, (h + n) * width :]
            .unflatten(1, (n, width))
        )
        for (line, position), v_NK in zip([slots[i] for i in at], v_ANK, strict=True):
            page = int(rows.table[line, position // SIZE])
            assert torch.equal(rows.v[page, position % SIZE], v_NK)
    assert not workspace.counter.any()


@pytest.mark.parametrize(
    ("start", "count", "heads", "width"),
    [
        (0, 2048, (40, 8), 128),
        (8192, 1000, (40, 8), 128),
        (31, 17, (28, 4), 128),
        (30000, 512, (5, 1), 128),
        (500, 700, (14, 2), 64),
    ],
)
def test_prefill(start: int, count: int, heads: tuple[int, int], width: int) -> None:
    rows = Rows([start + count], heads, width)
    q_THK = rows.queries(count)
    out_THK = prefill_attention(q_THK, rows.k, rows.v, rows.table[0], start)
    assert torch.equal(out_THK, prefill_attention(q_THK, rows.k, rows.v, rows.table[0], start))
    some = [*range(0, count, 37), count - 1]
    rows.check(out_THK[some], q_THK[some], [(0, start + i) for i in some])


def test_nothing_waits() -> None:
    """No launch looks at a tensor on the host."""
    rows = Rows([300, 4000])
    slots = ends(rows)
    where, workspace = tensors(slots), rows.workspace(2)
    q_CHK, qkv_CQ = rows.queries(2), torch.zeros(2, 56 * 128, device=DEVICE, dtype=BF16)
    angle_XR = torch.zeros(4096, 64, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode_attention(q_CHK, rows.k, rows.v, rows.table, *where, workspace=workspace)
        prefill_attention(q_CHK, rows.k, rows.v, rows.table[0], 298)
        tables = angle_XR, angle_XR, where[1], where[0], rows.table
        append_qkv(qkv_CQ, None, *tables, rows.k, rows.v, 40)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_heads_that_do_not_fit_are_named() -> None:
    for heads, width in (((4, 2), 256), ((33, 1), 64)):
        rows = Rows([5], heads, width)
        with pytest.raises(ValueError, match="at most 128 wide and 32 to a kv head"):
            prefill_attention(rows.queries(1), rows.k, rows.v, rows.table[0], 4)
