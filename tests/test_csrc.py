"""csrc: its kernel run on a CPU against float64, and compiled for sm_90a within its budgets."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gemv_host
from gemv_host import UNTOUCHED, Case, Inputs, constant, exact, make_inputs

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = ROOT / "tests" / "csrc_budgets.json"

FORMS = [
    {"norm": norm, "swiglu": swiglu, "residual": residual, "bias": bias}
    for norm, swiglu, residual, bias in (
        (False, False, False, False),  # head of a tied model, products before a reduction
        (False, False, True, False),  # o, down
        (True, False, False, True),  # qkv
        (True, False, False, False),  # head
        (True, True, False, False),  # gate-up
        (False, True, False, False),
    )
]

Run = Callable[[list[Case]], list[Tensor]]


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++; unproven: that csrc's kernel computes what it should")
    return gemv_host.build(tmp_path_factory.mktemp("gemv"))


@pytest.fixture(scope="session")
def run(program: Path) -> Run:
    """Runs cases, checks every output against float64 and that nothing else was written."""

    def run(cases: list[Case]) -> list[Tensor]:
        inputs = [make_inputs(case) for case in cases]
        outputs = gemv_host.run(program, cases, inputs)
        for case, given, found_MN in zip(cases, inputs, outputs, strict=True):
            check(case, given, found_MN)
        return outputs

    return run


def check(case: Case, inputs: Inputs, found_MN: Tensor) -> None:
    exact_MN, bound_MN = exact(case, inputs)
    live = case.num_live
    off_MN = (found_MN.double() - exact_MN).abs()[:live]
    assert (off_MN <= bound_MN[:live]).all(), f"{case}: {(off_MN / bound_MN[:live]).max()} bounds"
    assert (found_MN[live:] == UNTOUCHED).all(), f"{case}: wrote rows that are not live"


# -- what it computes --------------------------------------------------------------------------


def test_the_bound_is_tight() -> None:
    """It admits a rounding and not two; nor one missing term, nor a missing epsilon."""
    case = Case(slots=2, outputs=64, width=256, residual=True)
    inputs = make_inputs(case)
    exact_MN, bound_MN = exact(case, inputs)
    check(case, inputs, exact_MN.bfloat16())
    for wrong_MN in (
        exact_MN * (1 + 2.0**-6),
        exact_MN - (inputs.x_MK[:, :1].double() * inputs.weight_NK[:, 0].double()),
        exact_MN - inputs.residual_MN.double(),
    ):
        with pytest.raises(AssertionError, match="bounds"):
            check(case, inputs, wrong_MN.bfloat16())
    assert (bound_MN <= 2.0**-7 * exact_MN.abs() + 0.02).all()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "+".join(k for k, v in form.items() if v))
def test_every_number_of_tokens(form: dict[str, bool], run: Run) -> None:
    """M 1 ... 8 at ragged N and K; and a token's bits are the same in every company."""
    cases = [
        Case(slots=m, outputs=43, width=296, processors=3, seed=m, early=m % 2 == 0, **form)
        for m in range(1, 9)
    ]
    *fewer, most = run(cases)
    for found_MN in fewer:
        assert torch.equal(found_MN, most[: len(found_MN)])


@pytest.mark.parametrize("form", FORMS[2:5], ids=("qkv", "head", "gate-up"))
def test_live_tokens_are_counted_on_the_device(form: dict[str, bool], run: Run) -> None:
    """Rows beyond are neither read nor written; counts out of range are brought into it."""
    case = Case(slots=8, outputs=24, width=136, processors=3, **form)
    counts = (8, 1, 3, 0, 11, -2)
    whole, *others = run([replace(case, live=n, early=n % 2 == 1) for n in counts])
    for count, found_MN in zip(counts[1:], others, strict=True):
        live = max(0, min(count, 8))
        assert torch.equal(found_MN[:live], whole[:live])
    (fewer_slots,) = run([replace(case, slots=3, live=11)])
    assert torch.equal(fewer_slots, whole[:3])


def test_ragged_shapes(run: Run) -> None:
    """N around a tile, K around a load, a step, a step of each warp; rows apart, NaN between."""
    sizes = [(n, k) for n in (1, 16, 17, 32, 65) for k in (8, 24, 40, 256, 264, 1032)]
    run(
        [
            Case(
                slots=1 + i % 3,
                outputs=n,
                width=k,
                padding=8 * (i % 4),
                processors=1 + i % 5,
                seed=i,
                early=i % 2 == 0,
                **FORMS[i % len(FORMS)],
            )
            for i, (n, k) in enumerate(sizes)
        ]
    )


@pytest.mark.parametrize("form", FORMS[1:5:3], ids=("down", "gate-up"))
def test_tiles_shared_by_blocks(form: dict[str, bool], run: Run) -> None:
    """From none to all shared, by two or by many blocks: and the same bits in whatever order the
    blocks and copies come."""
    case = Case(slots=3, outputs=72, width=392, **form)
    for processors in (1, 4, 19):
        first, *others = run(
            [
                replace(case, processors=processors, seed=seed, early=early)
                for seed, early in ((0, False), (1, False), (2, True))
            ]
        )
        assert all(torch.equal(found, first) for found in others)


def test_long_stretches(run: Run) -> None:
    """Many more steps of a warp than its ring has places; and many tiles, one warp well ahead of
    another, each with columns for some of the warps only."""
    run(
        [
            Case(slots=8, outputs=64, width=2048, processors=1, early=e, norm=e)
            for e in (False, True)
        ]
    )
    run([Case(slots=8, outputs=640, width=96, processors=1, seed=s, early=s == 0) for s in (0, 1)])


@pytest.mark.slow
def test_at_length(run: Run) -> None:
    """Random cases; and a real shard's shape, the gate-up of 0.5B."""
    draw = torch.Generator().manual_seed(7)

    def up_to(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=draw))

    cases = [
        Case(
            slots=up_to(8),
            outputs=up_to(70),
            width=8 * up_to(200),
            live=None if i % 3 else up_to(9) - 1,
            padding=8 * (up_to(3) - 1),
            processors=up_to(20),
            seed=i,
            early=i % 4 < 2,
            **FORMS[i % len(FORMS)],
        )
        for i in range(120)
    ]
    for start in range(0, len(cases), 20):
        run(cases[start : start + 20])
    run([Case(slots=2, outputs=608, width=896, norm=True, swiglu=True, processors=132)])


def test_the_emulation_is_strict(program: Path) -> None:
    """Columns that end on no multiple of 16 bytes: a copy refuses them."""
    case = Case(slots=1, outputs=16, width=20)
    done = gemv_host.ask(program, gemv_host.encode(case, make_inputs(case)))
    assert done.returncode == 3 and not done.stdout
    assert b"a copy whose ends do not divide by 16" in done.stderr


# -- what it compiles to -----------------------------------------------------------------------


def cuobjdump(*arguments: str) -> str:
    triton = pytest.importorskip("triton")
    assert triton
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


INSTRUCTIONS = {  # pattern, how many at least
    "copies_of_weights": (
        r"\bLDGSTS\.E\.BYPASS\.LTC256B\.128\b",
        constant("FRAGMENTS") * constant("COLUMNS") // 16,
    ),
    "copies_through_l1": (r"\bLDGSTS\.E\.128\b", constant("COLUMNS") // 32),
    "groups_awaited": (r"\bDEPBAR\.LE SB0, 0x[1-9]\b", 1),
    "matrices_loaded": (
        r"\bLDSM\.16\.M88\.4\b",
        (2 * constant("FRAGMENTS") + 1) * constant("COLUMNS") // 32,
    ),
    "tensor_products": (
        r"\bHMMA\.16816\.F32\.BF16\b",
        constant("FRAGMENTS") * constant("COLUMNS") // 16,
    ),
    "waits_for_predecessor": (r"\bACQBULK\b", 1),
    "releases_successor": (r"\bPREEXIT\b", 1),
}
PRIVATE = r"\b(?:LDL|STL)\b"
"""Loads and stores of a thread's private memory: an array that found no registers."""


def measured(library: Path) -> dict[str, dict[str, int]]:
    """Kernel -> registers, stack, and how many of each instruction."""
    found = {}
    usage = cuobjdump("-res-usage", str(library))
    for name, registers, stack in re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", usage):
        norm, swiglu = re.findall(r"Lb([01])E", name)
        key = f"gemv/{'norm' if norm == '1' else 'plain'}{'/swiglu' if swiglu == '1' else ''}"
        sass = cuobjdump("-sass", "-fun", name, str(library))
        assert not re.search(PRIVATE, sass), key
        counts = {k: len(re.findall(pattern, sass)) for k, (pattern, _) in INSTRUCTIONS.items()}
        found[key] = {"registers": int(registers), "stack_bytes": int(stack), **counts}
    return found


def test_kernels_keep_to_their_budgets(csrc_library: Path) -> None:
    """Registers as recorded at most; nothing on the stack, where spilled registers would go; the
    instructions that make it what it is."""
    budgets = json.loads(BUDGETS.read_text())
    found = measured(csrc_library)
    assert found.keys() == budgets.keys()
    for name, numbers in found.items():
        assert numbers["registers"] <= budgets[name]["registers"], name
        assert numbers["stack_bytes"] == 0, name
        for instruction, (_, least) in INSTRUCTIONS.items():
            assert numbers[instruction] >= least, f"{name}: {instruction}"


class Plan(ctypes.Structure):
    """csrc/gemv.cuh's."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in ("steps_of_tile", "grid", "share", "over", "tiles_apart", "steps_apart")
    ]


MODELS = {  # width, feed-forward, query heads, kv heads, head width, vocabulary
    "0.5B": (896, 4864, 14, 2, 64, 151936),
    "1.5B": (1536, 8960, 12, 2, 128, 151936),
    "7B": (3584, 18944, 28, 4, 128, 152064),
    "14B": (5120, 13824, 40, 8, 128, 152064),
    "32B": (5120, 27648, 40, 8, 128, 152064),
    "72B": (8192, 29568, 64, 8, 128, 152064),
}


def shapes() -> Iterator[tuple[str, int, int, bool, bool]]:
    """(name, outputs, width, norm, swiglu) of every product on a rank."""
    for model, (d, f, h, n, k, v) in MODELS.items():
        for ranks in (1, 2, 4, 8):
            if h % ranks:
                continue
            heads, kv = h // ranks, max(1, n // ranks)
            name = f"{model}/tp{ranks}"
            yield f"{name}/qkv", (heads + 2 * kv) * k, d, True, False
            yield f"{name}/o", d, heads * k, False, False
            yield f"{name}/gate-up", f // ranks, d, True, True
            yield f"{name}/down", d, f // ranks, False, False
            yield f"{name}/head", v // ranks, d, True, False


def test_plans_of_real_shapes(csrc_library: Path) -> None:
    """All columns of all rows, every block as busy as the next, for a rank of any model.

    Busy: the mean block's share of the real weights over the longest one's stretch. What is lost is
    a step a block, of all steps, and a hundredth: the last tile's rows and the last step's columns
    that are not there.
    """
    plan_of = ctypes.CDLL(str(csrc_library)).s1fast_plan
    plan_of.restype = Plan
    processors, warps, columns = 132, constant("WARPS"), constant("COLUMNS")
    tile, most = 16 * constant("FRAGMENTS"), 132 * constant("BLOCKS")
    for name, outputs, width, _, swiglu in shapes():
        plan = plan_of(outputs, width, swiglu, processors)
        rows = outputs * (2 if swiglu else 1)
        assert plan.steps_of_tile == -(-width // columns), name
        steps = -(-rows // tile) * plan.steps_of_tile
        assert plan.grid == min(steps, most), name
        assert plan.grid * plan.share + plan.over == steps and plan.over < plan.grid, name
        assert plan.tiles_apart * plan.steps_of_tile + plan.steps_apart == warps, name
        assert 0 <= plan.steps_apart < plan.steps_of_tile, name
        step = tile * columns
        busy = rows * width / (-(-steps // plan.grid) * step * most)
        assert busy >= 0.99 / (1 + most * step / (rows * width)), (name, busy)


def test_room_for_its_kernels() -> None:
    """Blocks of as many kernels as KERNELS says lie on a multiprocessor together: their registers
    do, which each of its quarters deals to a quarter of the warps. (Shared memory: a
    static_assert.)"""
    warps = -(-constant("KERNELS") * constant("BLOCKS") * (constant("WARPS") + 1) // 4)
    for name, budget in json.loads(BUDGETS.read_text()).items():
        assert warps * 32 * budget["registers"] <= 65_536 // 4, name
