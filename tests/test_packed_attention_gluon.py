"""Packed attention's forward in Gluon, in gluon_emulator.py, against dense float64 attention.

What the compiler makes of it is held by tests/compile_kernels.py, and what a GPU computes by
tests/test_gpu_packed_attention.py.
"""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch
from torch import Tensor

from gluon_emulator import Barrier, Block, Deadlock, Launcher, Pointer
from s1fast.kernels import packed_attention as attention
from s1fast.kernels import packed_attention_gluon as kernels
from s1fast.kernels.jit import INTERPRETED
from test_packed_attention import Problem, set_tiles
from tolerances import check_against_eager

KERNEL = "_attention_forward_gluon_kernel"
LENGTHS = (1, 63, 64, 65, 127, 129, 0, 300)


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """On three multiprocessors of a device that would do."""
    monkeypatch.setattr(kernels, KERNEL, Launcher(kernels, KERNEL))
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: 3)
    monkeypatch.setattr(attention, "check_backend", lambda *_: None)


def problem_of(lengths: tuple[int, ...], *arguments: object, **fields: object) -> Problem:
    return Problem(lengths, *arguments, device="cpu", **fields)  # type: ignore[arg-type]


def forward(problem: Problem) -> list[Tensor]:
    """Output and log-sum-exp."""
    return problem.call(*problem.inputs, backend="gluon", return_lse=True)


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(map(torch.equal, found, wanted))


def check(problem: Problem) -> list[Tensor]:
    """Within the rule of tolerances.py of float64, zeros and -inf in the tail; returns ours."""
    out_THK, lse_HT = found = forward(problem)
    (exact_THK, *_), exact_HT = problem.exact()
    eager_THK = problem.call(*problem.inputs, backend="reference")
    check_against_eager(out_THK, exact_THK, eager_THK, "out")
    end = problem.end
    assert out_THK[end:].count_nonzero() == 0 and (lse_HT[:, end:] == -torch.inf).all()
    lse_HT, exact_HT = lse_HT[:, :end], exact_HT[:, :end]
    # A score is a sum of `width` products in fp32: a few dozen roundings of such numbers.
    assert (lse_HT - exact_HT).abs().max() <= 2.0**-20 * max(8.0, float(exact_HT.abs().max()))
    return found


# -- values ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("heads", [(5, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("width", [64, 128])
def test_is_float64s(width: int, heads: tuple[int, int], causal: bool) -> None:
    check(problem_of(LENGTHS, 7, heads, width, causal=causal))


TILES = (
    (2, 128, 2, False),
    (2, 128, 3, True),
    (2, 64, 4, True),
    (3, 64, 3, True),
    (3, 128, 2, True),
)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_other_tiles(monkeypatch: pytest.MonkeyPatch, tile: kernels.Tile, causal: bool) -> None:
    """What a tuning run may try; consumers and producer meet in several orders."""
    monkeypatch.setitem(kernels.FORWARD, 64, tile)
    problem = problem_of((385, 64, 200), 0, (2, 1), causal=causal)
    found = check(problem)
    for seed in range(3):
        monkeypatch.setattr(kernels._attention_forward_gluon_kernel, "seed", seed)
        assert same(forward(problem), found)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_huge_scores(causal: bool) -> None:
    """Of a thousand, either sign: one key wins, and the maximum of a tile alone overflows."""
    problem = problem_of((300, 140), 0, (2, 1), causal=causal)
    for x in problem.inputs[:2]:
        x *= 10.0
    check(problem)


@pytest.mark.parametrize("multiprocessors", [1, 2, 50])
def test_how_many_blocks_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch, multiprocessors: int
) -> None:
    problem = problem_of((300, 1, 129), 5, (4, 2))
    wanted = forward(problem)
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: multiprocessors)
    assert same(forward(problem), wanted)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_neighbours_change_no_bit(causal: bool) -> None:
    """NaN in every second sequence and in the tail."""
    problem = problem_of((70, 129, 1, 127, 200), 150, causal=causal)
    clean = forward(problem)
    for start, stop in ((0, 70), (199, 200), (327, 677)):  # and the last one, with the tail
        for x in problem.inputs:
            x[start:stop] = float("nan")
    dirty = forward(problem)
    for start, stop in ((70, 199), (200, 327)):
        assert torch.equal(dirty[0][start:stop], clean[0][start:stop])
        assert torch.equal(dirty[1][:, start:stop], clean[1][:, start:stop])


def test_slices_of_one_projection() -> None:
    """q, k and v as the model has them: heads of one tensor. No bit differs from separate ones."""
    problem = problem_of((133, 50), 7, (6, 2))
    wanted = forward(problem)
    problem.inputs = list(torch.cat(problem.inputs, dim=1).split((6, 2, 2), dim=1))
    assert not any(x.is_contiguous() for x in problem.inputs)
    assert same(forward(problem), wanted)


def test_one_token_and_none() -> None:
    problem = problem_of((1,), heads=(1, 1))
    assert torch.equal(forward(problem)[0], problem.inputs[2])
    out_THK, lse_HT = forward(problem_of((), 5))
    assert out_THK.count_nonzero() == 0 and (lse_HT == -torch.inf).all()


@pytest.mark.skipif(not INTERPRETED, reason="backward runs in Triton's interpreter")
def test_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's backward takes this forward's output and log-sum-exp."""
    set_tiles(monkeypatch, "wide")
    problem = problem_of((33, 70), 3)
    exact, _ = problem.exact()
    names = ("out", "dq", "dk", "dv")
    for name, *results in zip(
        names, problem.run(backend="gluon"), exact, problem.eager(), strict=True
    ):
        check_against_eager(*results, name)


# -- the emulator itself -----------------------------------------------------------------------


def copied(wait: bool) -> Tensor:
    """Four numbers, copied to shared memory."""
    block = Block(0, 1, 0)
    gl, hopper = block.language(), block.hopper()
    memory, barrier = gl.allocate_shared_memory(gl.float32, [1, 4], None), Barrier()
    desc = hopper.tma.make_tensor_descriptor(
        Pointer.to(torch.ones(3)), [1, 3], [3, 1], [1, 4], None
    )
    barrier.init(1)
    hopper.mbarrier.expect(barrier, desc.block_type.nbytes)
    hopper.tma.async_copy_global_to_shared(desc, [0, 0], barrier, memory)
    if wait:
        hopper.mbarrier.wait(barrier, 0)
    return memory.load(None)


def test_a_copy_arrives_at_the_wait() -> None:
    assert copied(wait=True).tolist() == [[1.0, 1.0, 1.0, 0.0]]
    assert copied(wait=False).isnan().all()


def test_a_product_reads_at_the_wait() -> None:
    """What was overwritten meanwhile, and the result before the wait."""
    block = Block(0, 1, 0)
    gl, hopper = block.language(), block.hopper()
    memory = gl.allocate_shared_memory(gl.float32, [1, 1], None)
    found = []

    def multiply(fenced: bool) -> None:
        memory.store(torch.ones(1, 1))
        if fenced:
            hopper.fence_async_shared()
        one = torch.ones(1, 1)
        product = hopper.warpgroup_mma(one, memory, one, is_async=True)
        found.append(hopper.warpgroup_mma_wait(1, [product]))
        memory.data.fill_(5.0)
        found.append(hopper.warpgroup_mma_wait(0, [product]))

    gl.warp_specialize([(multiply, (True,))], [], [])
    assert found[0].isnan() and found[1] == 6.0
    with pytest.raises(AssertionError, match="without a fence"):
        gl.warp_specialize([(multiply, (False,))], [], [])


@pytest.mark.parametrize("count", [1, 2])
def test_who_waits_for_ever_is_told(count: int) -> None:
    block = Block(0, 1, 0)
    gl, hopper = block.language(), block.hopper()
    barrier, threads = Barrier(), threading.active_count()
    barrier.init(count)
    calls = [(partial(hopper.mbarrier.wait, barrier), (0,)), (barrier.arrive, (1,))]
    if count == 1:
        gl.warp_specialize(calls, [], [])
    else:
        with pytest.raises(Deadlock, match=r"partitions \[0\] wait for ever"):
            gl.warp_specialize(calls, [], [])
    with pytest.raises(AssertionError, match="an arrival too many"):
        barrier.arrive(3)
    assert threading.active_count() == threads


def test_gluon_is_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real check
    heads = (torch.device("cuda"), torch.bfloat16, 64)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match="'gluon' is for Hopper, not for an A100; choose 'triton'"):
        attention.check_backend("gluon", *heads)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    attention.check_backend("gluon", *heads)
    monkeypatch.setattr(attention, "gluon", None)
    with pytest.raises(ValueError, match=r"'gluon' needs Triton 3\.6 or newer; or choose"):
        attention.check_backend("gluon", *heads)
