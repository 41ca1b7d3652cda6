"""Attention over pages against float64 through explicit gathers, by the reference and the kernels.

Where there is no GPU the kernels run in Triton's interpreter on CPU tensors. Whatever no query may
see is NaN: pages that nobody holds, page 0, and what lies beyond a row's end in its last page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from s1fast.kernels import decode_attention as op
from s1fast.kernels import decode_attention_triton as kernels
from s1fast.kernels import prefill_attention_triton as prefill_kernels
from s1fast.kernels.decode_attention import decode_attention, decode_workspace, prefill_attention
from tensors import far_apart, random
from tolerances import check_against_eager

ON_GPU = torch.cuda.is_available()
KERNEL = pytest.param("triton", marks=[pytest.mark.gpu] if ON_GPU else [])
BF16, FP32 = torch.bfloat16, torch.float32
SIZE = 16
PROGRAMS, TILE = 6, 32
NAN = float("nan")

# (H, N, K): groups of 1, 5, 7 and 20 heads, one kv head and several, a width of no power of two.
HEADS = [(5, 1, 64), (7, 1, 128), (3, 3, 64), (10, 2, 128), (20, 1, 64), (2, 1, 20)]

Slots = list[tuple[int, int]]
"""(line, position) of each slot."""
IDLE = (-1, 0)
LENGTHS = (1, 15, 16, 17, 33, 64, 65, 130)
"""Of the rows, by line. The last one is cut in several splits."""
STEPS: dict[str, Slots] = {
    "one": [(7, 129)],
    "ends": [(line, length - 1) for line, length in enumerate(LENGTHS)],
    "idle": [IDLE, (7, 129), IDLE, IDLE, (3, 16), IDLE],
    "nobody": [IDLE, IDLE],
    # A split ends behind position 63: of three slots at 62, 63 and 64 two see nothing of the next.
    "string": [(4, 32), *((7, p) for p in range(60, 69)), (6, 64), IDLE],
    "scattered": [(7, 129), (5, 3), (7, 0), (5, 60), (7, 40), (5, 63), (7, 128), (2, 7)],
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs and small tiles, so that short rows are cut."""
    monkeypatch.setattr(kernels, "PROGRAMS", PROGRAMS)
    monkeypatch.setattr(kernels, "SHORTEST", TILE)
    monkeypatch.setattr(kernels, "DECODE", dict.fromkeys((BF16, FP32), (TILE, 4, 3)))
    monkeypatch.setattr(prefill_kernels, "PREFILL", dict.fromkeys((BF16, FP32), (16, 32, 4, 2)))


@pytest.fixture(params=["reference", KERNEL])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, small: None) -> str:
    """Where tensors go for a path."""
    if request.param == "reference":
        return "cpu"
    if not ON_GPU:
        monkeypatch.setattr(op, "reference_decode", kernels.decode)
        monkeypatch.setattr(op, "reference_prefill", prefill_kernels.prefill)
    return "cuda" if ON_GPU else "cpu"


def pages(
    kv_heads: int, width: int, dtype: torch.dtype, device: str, lengths: tuple[int, ...] = LENGTHS
) -> tuple[Tensor, Tensor, Tensor]:
    """(k, v, table) of rows of these lengths; pages lie anywhere, the last two rows share one."""
    counts = [-(-length // SIZE) for length in lengths]
    total = sum(counts) + 5
    draw = torch.Generator().manual_seed(1)
    free = (torch.randperm(total - 1, generator=draw) + 1).tolist()
    table_RP = torch.zeros(len(lengths), max(counts) + 2, dtype=torch.int32)
    seen_PS = torch.zeros(total, SIZE, dtype=torch.bool)
    for line, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        table_RP[line, :count] = torch.tensor([free.pop() for _ in range(count)])
        if line == len(lengths) - 1 and min(counts[-2:]) > 1:
            table_RP[line, 0] = table_RP[line - 1, 0]
        place_X = torch.arange(length)
        seen_PS[table_RP[line, place_X // SIZE].long(), place_X % SIZE] = True
    hidden_PS11 = ~seen_PS.to(device)[:, :, None, None]
    shape = (total, SIZE, kv_heads, width)
    k, v = (random(*shape, dtype=dtype, device=device, seed=seed) for seed in (2, 3))
    return k.masked_fill_(hidden_PS11, NAN), v.masked_fill_(hidden_PS11, NAN), table_RP.to(device)


def step(slots: Slots, device: str) -> tuple[Tensor, Tensor]:
    """(line_C, position_C)."""
    lines, positions = zip(*slots, strict=True)
    return tuple(torch.tensor(x, dtype=torch.int32, device=device) for x in (lines, positions))


def expected(
    q_CHK: Tensor, k_PSNK: Tensor, v_PSNK: Tensor, table_RP: Tensor, slots: Slots
) -> tuple[Tensor, Tensor]:
    """(in float64, in q's dtype by torch, whose kernel for bf16 keeps fp32 inside)."""
    group = q_CHK.shape[1] // k_PSNK.shape[2]
    exact_CHK, eager_CHK = torch.zeros_like(q_CHK, dtype=torch.float64), torch.zeros_like(q_CHK)
    for slot, (line, position) in enumerate(slots):
        if line < 0:
            continue
        place_X = torch.arange(position + 1, device=q_CHK.device)
        page_X = table_RP[line, place_X // SIZE].long()
        k_HXK, v_HXK = (
            x[page_X, place_X % SIZE].repeat_interleave(group, 1).transpose(0, 1)
            for x in (k_PSNK, v_PSNK)
        )
        exact_CHK[slot] = formula(q_CHK[slot].double(), k_HXK.double(), v_HXK.double())
        if q_CHK.dtype == BF16:
            q_H1K = q_CHK[slot, :, None]
            eager_CHK[slot] = F.scaled_dot_product_attention(q_H1K, k_HXK, v_HXK)[:, 0]
        else:
            eager_CHK[slot] = formula(q_CHK[slot], k_HXK, v_HXK)
    return exact_CHK, eager_CHK


def formula(q_HK: Tensor, k_HXK: Tensor, v_HXK: Tensor) -> Tensor:
    p_HX = (torch.einsum("hk,hxk->hx", q_HK, k_HXK) * q_HK.shape[1] ** -0.5).softmax(1)
    return torch.einsum("hx,hxk->hk", p_HX, v_HXK)


def check(found: Tensor, exact: Tensor, eager: Tensor, what: str) -> None:
    """Twice torch's error. In fp32 2^-20 more, of values of about 1: scores to base 2, of a few
    units, are rounded once more than torch's, and a GPU's exp2 is two units of the last place off.
    """
    if found.dtype == BF16:
        check_against_eager(found, exact, eager, what)
        return
    error, allowed = ((x.double() - exact).abs().max().item() for x in (found, eager))
    assert error <= 2 * allowed + 2**-20, f"{what}: {error:.3g}, torch's is {allowed:.3g}"


def attend(
    q_CHK: Tensor,
    k_PSNK: Tensor,
    v_PSNK: Tensor,
    table_RP: Tensor,
    slots: Slots,
    invariant: bool = False,
) -> Tensor:
    """With a workspace whose numbers are NaN; checks that its counters are left at zero."""
    num_slots, heads, width = q_CHK.shape
    kv_heads = k_PSNK.shape[2]
    workspace = decode_workspace(num_slots, heads, kv_heads, width, q_CHK.device)
    for x in (workspace.partial, workspace.lse2):
        x.fill_(NAN)
    line_C, position_C = step(slots, q_CHK.device.type)
    arguments = (q_CHK, k_PSNK, v_PSNK, table_RP, line_C, position_C)
    options = {"workspace": workspace, "batch_invariant": invariant}
    out_CHK = decode_attention(*arguments, **options)
    assert not workspace.counter.any()
    assert torch.equal(out_CHK, decode_attention(*arguments, **options))  # the same bits again
    assert not workspace.counter.any()
    return out_CHK


def attend_once(
    q_CHK: Tensor,
    k_PSNK: Tensor,
    v_PSNK: Tensor,
    table_RP: Tensor,
    slots: Slots,
    invariant: bool = False,
) -> Tensor:
    num_slots, heads, width = q_CHK.shape
    device = q_CHK.device
    workspace = decode_workspace(num_slots, heads, k_PSNK.shape[2], width, device)
    row = k_PSNK, v_PSNK, table_RP, *step(slots, device.type)
    return decode_attention(q_CHK, *row, workspace=workspace, batch_invariant=invariant)


# -- decoding ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("invariant", [False, True], ids=["", "invariant"])
@pytest.mark.parametrize("slots", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_steps(device: str, dtype: torch.dtype, slots: Slots, invariant: bool) -> None:
    """Rows of every kind together; a group of 5, so that three slots share a program."""
    h, n, width = 10, 2, 64
    row = pages(n, width, dtype, device)
    q_CHK = random(len(slots), h, width, dtype=dtype, device=device)
    out_CHK = attend(q_CHK, *row, slots, invariant)
    assert out_CHK.is_contiguous()
    check(out_CHK, *expected(q_CHK, *row, slots), "out")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_heads(device: str, dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
    """Pages that are a layer of a cache, and queries that are a part of a wider tensor."""
    h, n, width = heads
    k, v, table_RP = pages(n, width, dtype, device)
    k_PSNK, v_PSNK = torch.stack((v, k, v), 1)[:, 1], torch.stack((k, v), 3)[:, :, :, 1]
    slots = STEPS["string"]
    q_CHK = random(len(slots), h + 1, width + 3, dtype=dtype, device=device)[:, 1:, :width]
    row = k_PSNK, v_PSNK, table_RP
    check(attend(q_CHK, *row, slots), *expected(q_CHK, *row, slots), "out")


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_batch_invariant(device: str, dtype: torch.dtype) -> None:
    """A slot's bits among others, at another place, and with more slots of its row are its own."""
    row = pages(1, 64, dtype, device)
    slots = [*STEPS["string"][:5], IDLE, (7, 129)]
    q_CHK = random(len(slots), 5, 64, dtype=dtype, device=device)
    together_CHK = attend_once(q_CHK, *row, slots, True)
    for slot in (0, 3, 6):
        alone_CHK = attend_once(q_CHK[slot : slot + 1], *row, slots[slot : slot + 1], True)
        assert torch.equal(alone_CHK[0], together_CHK[slot])
    order = [6, 4, 3, 5, 2, 1, 0]
    moved_CHK = attend_once(q_CHK[order], *row, [slots[i] for i in order], True)
    assert torch.equal(moved_CHK, together_CHK[order])


def test_order_of_slots_is_free(device: str) -> None:
    """Slots of a row may lie anywhere."""
    row = pages(1, 64, FP32, device)
    slots = STEPS["string"] + STEPS["scattered"]
    q_CHK = random(len(slots), 5, 64, dtype=FP32, device=device)
    order = torch.randperm(len(slots), generator=torch.Generator().manual_seed(0)).tolist()
    exact_CHK, eager_CHK = expected(q_CHK, *row, slots)
    moved_CHK = attend(q_CHK[order], *row, [slots[i] for i in order])
    check(moved_CHK, exact_CHK[order], eager_CHK[order], "out")


def test_large_scores_and_a_row_of_nan(device: str) -> None:
    """exp2 of nothing but differences; and a row that has a NaN keeps it to itself."""
    k_PSNK, v_PSNK, table_RP = pages(1, 64, FP32, device)
    slots = STEPS["ends"]
    q_CHK = random(len(slots), 5, 64, dtype=FP32, device=device) * 1000
    row = k_PSNK, v_PSNK, table_RP
    exact_CHK, eager_CHK = expected(q_CHK, *row, slots)
    check(attend(q_CHK, *row, slots), exact_CHK, eager_CHK, "out")
    k_PSNK[table_RP[6, 4], 0] = NAN
    out_CHK = attend_once(q_CHK, *row, slots)
    assert out_CHK[6].isnan().all()
    others = [0, 1, 2, 3, 4, 5, 7]
    check(out_CHK[others], exact_CHK[others], eager_CHK[others], "others")


# -- how a step is cut -------------------------------------------------------------------------


def parts_written(
    device: str, slots: Slots, lengths: tuple[int, ...], heads: int, invariant: bool = False
) -> int:
    """Rows of partial results of a launch; none lies beyond what the workspace has."""
    row = pages(1, 16, FP32, device, lengths)
    need = kernels.partial_rows(len(slots), heads, 1)
    lse2 = torch.full((need + 64,), NAN, device=device)
    partial = torch.full(((need + 64) * 16,), NAN, device=device)
    counter = torch.zeros(len(slots), dtype=torch.int32, device=device)
    q_CHK = random(len(slots), heads, 16, dtype=FP32, device=device)
    out_CHK = torch.empty_like(q_CHK)
    kernels.decode(q_CHK, *row, *step(slots, device), out_CHK, partial, lse2, counter, invariant)
    assert lse2[need:].isnan().all() and partial[need * 16 :].isnan().all()
    assert not counter.any()
    check(out_CHK, *expected(q_CHK, *row, slots), "out")
    return int((~lse2.isnan()).sum())


@pytest.fixture(params=[KERNEL])
def kernel_device(small: None) -> str:
    """For what only the kernel does."""
    return "cuda" if ON_GPU else "cpu"


def test_a_row_fills_all_programs_whatever_else_is_idle(
    kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six programs: six splits of one row, however many slots there are; three slots of it share.

    Rows that are many get at most three splits each, and no split is shorter than the shortest.
    """
    lengths = (PROGRAMS * TILE,) * 4
    last = lengths[0] - 1

    def parts(slots: Slots, invariant: bool = False) -> float:
        return parts_written(kernel_device, slots, lengths, 5, invariant) / 5

    assert parts([(0, last)]) == PROGRAMS
    assert parts([(0, last)] + [IDLE] * 7) == PROGRAMS
    string = [(0, last - i) for i in (2, 1, 0)]
    assert parts(string + [IDLE] * 5) == PROGRAMS * 3
    assert parts([IDLE, *string[1:]]) == PROGRAMS * 2
    rows = [(line, last) for line in range(4)]
    assert 4 * 2 <= parts(rows) <= 4 * 3
    assert parts([(0, TILE - 1), (1, TILE - 1)]) == 0
    assert parts([(0, TILE), rows[1], IDLE], True) == 2 + PROGRAMS
    monkeypatch.setattr(kernels, "SHORTEST", 3 * TILE)
    assert parts([(0, last)]) == PROGRAMS / 3


@pytest.mark.parametrize("seed", range(6))
def test_any_mixture_stays_within_the_workspace(
    kernel_device: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(seed)

    def number(below: int) -> int:
        return int(torch.randint(below, (), generator=draw))

    monkeypatch.setattr(kernels, "PROGRAMS", 1 + number(9))
    monkeypatch.setattr(kernels, "SPLITS", 1 + number(4))
    lengths = tuple(1 + number((250, 40)[number(2)]) for _ in range(6))
    slots: Slots = []
    for _ in range(1 + number(9)):
        line = number(7) - 1
        slots.append((line, number(lengths[line])) if line >= 0 else IDLE)
    for invariant in (False, True):
        parts_written(kernel_device, slots, lengths, (1, 5, 3)[seed % 3], invariant)


# -- prefill -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize(
    ("start", "count"), [(0, 1), (0, 17), (0, 48), (15, 20), (16, 33), (33, 16), (120, 23)]
)
def test_prefill(device: str, dtype: torch.dtype, start: int, count: int) -> None:
    for h, n, width in ((10, 2, 64), (3, 3, 20)) if start == 16 else ((7, 1, 128),):
        k_PSNK, v_PSNK, table_RP = pages(n, width, dtype, device, (5, start + count))
        q_THK = random(count, h + 2, width, dtype=dtype, device=device)[:, 1:-1]
        row = k_PSNK, v_PSNK
        out_THK = prefill_attention(q_THK, *row, table_RP[1], start)
        assert out_THK.is_contiguous()
        slots = [(1, start + i) for i in range(count)]
        check(out_THK, *expected(q_THK, *row, table_RP, slots), "out")


# -- sizes -------------------------------------------------------------------------------------


def test_pages_beyond_int32(device: str) -> None:
    """The third page begins 4 GB behind the first."""
    k_PSNK, v_PSNK = (random(4, SIZE, 1, 64, dtype=BF16, device=device, seed=i) for i in (2, 3))
    table_RP = torch.tensor([[3, 2, 1]], dtype=torch.int32, device=device)
    q_CHK = random(2, 5, 64, dtype=BF16, device=device)
    far = far_apart(k_PSNK), far_apart(v_PSNK)
    slots = [(0, 46), (0, 47)]
    wanted_CHK = attend(q_CHK, k_PSNK, v_PSNK, table_RP, slots)
    assert torch.equal(attend(q_CHK, *far, table_RP, slots), wanted_CHK)
    wanted_CHK = prefill_attention(q_CHK, k_PSNK, v_PSNK, table_RP[0], 46)
    assert torch.equal(prefill_attention(q_CHK, *far, table_RP[0], 46), wanted_CHK)


def test_no_slots(device: str) -> None:
    k_PSNK, v_PSNK, table_RP = pages(1, 64, FP32, device)
    q_CHK = torch.zeros(0, 5, 64, device=device)
    none_C = torch.zeros(0, dtype=torch.int32, device=device)
    workspace = decode_workspace(1, 5, 1, 64, q_CHK.device)
    arguments = q_CHK, k_PSNK, v_PSNK, table_RP, none_C, none_C
    assert decode_attention(*arguments, workspace=workspace).shape == (0, 5, 64)
    assert prefill_attention(q_CHK, k_PSNK, v_PSNK, table_RP[0], 0).shape == (0, 5, 64)


# -- bad input ---------------------------------------------------------------------------------

Q, CACHE = torch.zeros(3, 4, 8), torch.zeros(5, SIZE, 2, 8)
TABLE, LINE = torch.zeros(2, 3, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
SPACE = decode_workspace(3, 4, 2, 8, torch.device("cpu"))


def bad(**changed: object) -> Callable[[], object]:
    given = {"q": Q, "k": CACHE, "v": CACHE, "table": TABLE, "line": LINE, "position": LINE}
    options = {"workspace": SPACE, "batch_invariant": False}
    for name, value in changed.items():
        (given if name in given else options)[name] = value
    return lambda: decode_attention(*given.values(), **options)  # type: ignore[arg-type]


def bad_prefill(q: Tensor = Q, table: Tensor = TABLE[0], start: int = 0) -> Callable[[], object]:
    return lambda: prefill_attention(q, CACHE, CACHE, table, start)


BAD: dict[str, tuple[str, Callable[[], object]]] = {
    "rank": (r"q_CHK has shape \(3, 4\), expected \(slots, H, K\)", bad(q=Q[..., 0])),
    "dtype": ("q_CHK .* torch.float16, expected", bad(q=Q.half())),
    "pages' dtype": (
        "k_PSNK .* is torch.bfloat16, expected torch.float32",
        bad(k=CACHE.bfloat16()),
    ),
    "width": (r"k_PSNK has shape .*, expected \(P, S, N, 8\)", bad(k=CACHE[..., :4])),
    "v": (r"v_PSNK has shape .*, expected \(5, 16, 2, 8\)", bad(v=CACHE[:4])),
    "heads": ("3 query heads over pages .* multiple", bad(q=Q[:, :3])),
    "columns apart": ("q_CHK of shape .* q_CHK.contiguous", bad(q=torch.zeros(3, 8, 4).mT)),
    "lines": (r"line_C has shape \(2,\), expected \(3\)", bad(line=LINE[:2])),
    "line's dtype": ("line_C .* torch.int64, expected torch.int32", bad(line=LINE.long())),
    "position apart": ("position_C has strides", bad(position=torch.stack((LINE, LINE), 1)[:, 0])),
    "table": ("table_RP .* torch.int64, expected torch.int32", bad(table=TABLE.long())),
    "table apart": (
        "table_RP .* table_RP.contiguous",
        bad(table=torch.stack((TABLE, TABLE), 2)[..., 0]),
    ),
    "slots": (
        "workspace: too small for 3 slots",
        bad(workspace=decode_workspace(2, 4, 2, 8, torch.device("cpu"))),
    ),
    "partial results": (
        "workspace: too small for 3 slots",
        bad(workspace=replace(SPACE, partial=SPACE.partial[:-1])),
    ),
    "log-sum-exps": (
        "workspace: too small for 3 slots",
        bad(workspace=replace(SPACE, lse2=SPACE.lse2[:-1])),
    ),
    "counters": (
        "workspace: too small for 3 slots",
        bad(workspace=replace(SPACE, counter=SPACE.counter[:5])),
    ),
    "workspace's heads": (
        "multiple|divide",
        lambda: decode_workspace(3, 4, 3, 8, torch.device("cpu")),
    ),
    "few pages": ("table_P has 3 pages of 16; start 46 and 3 tokens need 4", bad_prefill(start=46)),
    "start": ("start -1", bad_prefill(start=-1)),
    "pages apart": (
        "table_P has strides",
        bad_prefill(table=torch.stack((TABLE, TABLE), 2)[0, :, 0]),
    ),
    "queries": ("q_THK has shape", bad_prefill(q=Q[0])),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    message, call = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
