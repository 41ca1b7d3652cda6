"""csrc's kernel at real sizes on an H100 (make gpu): results, streams, graphs, repeatability."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gemv_host import EPS, Case, Inputs, exact
from s1fast.matmul import CAPABILITY, gemv, new_workspace, prepare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != CAPABILITY,
        reason="no CUDA device of compute capability 9.0",
    ),
]

DEVICE = torch.device("cuda")
QKV = Case(slots=8, outputs=7168, width=5120, norm=True, bias=True)
GATE_UP = Case(slots=8, outputs=27648, width=5120, norm=True, swiglu=True)
DOWN = Case(slots=8, outputs=5120, width=27648, residual=True)
CASES = {
    "32B/qkv": QKV,
    "32B/o": Case(slots=8, outputs=5120, width=5120, residual=True),
    "32B/gate-up": GATE_UP,
    "32B/down": DOWN,
    "32B/head": Case(slots=8, outputs=152064, width=5120, norm=True),
    "32B/tp8/qkv": replace(QKV, outputs=896),
    "32B/tp8/o": Case(slots=8, outputs=5120, width=640),
    "32B/tp8/gate-up": replace(GATE_UP, outputs=3456),
    "32B/tp8/down": Case(slots=8, outputs=5120, width=3456),
    "72B/tp8/down": Case(slots=8, outputs=8192, width=3696),
    "0.5B/qkv": Case(slots=8, outputs=1152, width=896, norm=True, bias=True),
    "0.5B/gate-up": Case(slots=8, outputs=4864, width=896, norm=True, swiglu=True),
    "ragged": Case(slots=8, outputs=1003, width=1304, norm=True, bias=True, residual=True),
}


@pytest.fixture
def workspace() -> Iterator[Tensor]:
    """Whose counters are back at zero afterwards."""
    made = new_workspace(DEVICE)
    yield made
    processors = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    assert not made[: 4 * processors].any()


def make(case: Case, seed: int = 0) -> Inputs:
    draw = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        x = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
        return x.normal_(mean, std, generator=draw)

    made = Inputs(
        weight_NK=normal(case.outputs * (2 if case.swiglu else 1), case.width),
        x_MK=normal(case.slots, case.width),
        norm_K=normal(case.width, std=0.3, mean=1.0),
        bias_N=normal(case.outputs),
        residual_MN=normal(case.slots, case.outputs),
    )
    torch.cuda.synchronize()
    return made


def launch(
    case: Case, given: Inputs, workspace: Tensor, m: int = 8, live: Tensor | None = None
) -> Tensor:
    return gemv(
        given.x_MK[:m],
        given.weight_NK,
        workspace,
        norm_K=given.norm_K if case.norm else None,
        eps=EPS,
        bias_N=given.bias_N if case.bias else None,
        residual_MN=given.residual_MN[:m] if case.residual else None,
        swiglu=case.swiglu,
        live=live,
    )


@pytest.mark.parametrize("name", CASES)
def test_results(name: str, workspace: Tensor) -> None:
    """Against float64; and any number of tokens gives the bits that eight give."""
    case, given = CASES[name], make(CASES[name])
    found_MN = launch(case, given, workspace)
    exact_MN, bound_MN = exact(case, given)
    assert ((found_MN.double() - exact_MN).abs() <= bound_MN).all()
    for m in (1, 2, 3, 5, 7):
        assert torch.equal(launch(case, given, workspace, m), found_MN[:m])


@pytest.mark.parametrize("name", ["32B/qkv", "32B/tp8/gate-up", "32B/tp8/down", "0.5B/qkv"])
def test_runs_are_bit_identical(name: str, workspace: Tensor) -> None:
    """Blocks share tiles, and arrive in another order every time."""
    case, given = CASES[name], make(CASES[name])
    first = launch(case, given, workspace)
    for _ in range(300):
        assert torch.equal(launch(case, given, workspace), first)


def test_one_stream_after_another(workspace: Tensor) -> None:
    """On a side stream the kernel comes after what is queued there, and waits for nothing else."""
    case, given = CASES["32B/o"], make(CASES["32B/o"])
    wanted = launch(case, given, workspace)
    later = given.x_MK.clone()
    given.x_MK.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # a tenth of a second
            given.x_MK.copy_(later)
            found = launch(case, given, workspace)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not stream.query(), "the call waited for the stream"
    stream.synchronize()
    assert torch.equal(found, wanted)


def test_captured_with_the_live_count_read_at_replay(workspace: Tensor) -> None:
    """Other tokens and another count at each replay; rows beyond the count stay as they were."""
    case, given = GATE_UP, make(GATE_UP)
    live = torch.tensor([8], dtype=torch.int32, device=DEVICE)
    launch(case, given, workspace, live=live)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found_MN = launch(case, given, workspace, live=live)
    for seed, count in enumerate((8, 1, 3, 0, 8)):
        given.x_MK.copy_(make(case, seed + 1).x_MK)
        live.fill_(count)
        found_MN.fill_(7.0)
        graph.replay()
        assert torch.equal(found_MN[:count], launch(case, given, workspace)[:count])
        assert (found_MN[count:] == 7.0).all()


def test_a_chain_that_overlaps_its_launches(workspace: Tensor) -> None:
    """Each kernel starts before the one that makes its x has ended: 40 in a graph, many replays."""
    up, down = CASES["32B/tp8/gate-up"], replace(CASES["32B/tp8/down"], residual=True)
    layers = [(make(up, i), make(down, i)) for i in range(20)]
    for first, second in layers:
        first.weight_NK.mul_(up.width**-0.5)
        second.weight_NK.mul_(down.width**-0.5)
    torch.cuda.synchronize()

    def chain(x_MK: Tensor, wait: bool) -> Tensor:
        for first, second in layers:
            inner_MN = launch(up, replace(first, x_MK=x_MK), workspace)
            if wait:
                torch.cuda.synchronize()
            x_MK = launch(down, replace(second, x_MK=inner_MN, residual_MN=x_MK), workspace)
            if wait:
                torch.cuda.synchronize()
        return x_MK

    x_MK = make(up, 99).x_MK
    wanted_MN = chain(x_MK, wait=True)
    assert wanted_MN.isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found_MN = chain(x_MK, wait=False)
    for _ in range(50):
        found_MN.zero_()
        graph.replay()
        assert torch.equal(found_MN, wanted_MN)


def test_chosen_at_load() -> None:
    case, given = CASES["0.5B/qkv"], make(CASES["0.5B/qkv"])
    chosen = prepare("cuda", DEVICE, {"qkv": given.weight_NK})
    assert chosen.workspace is not None
    found = chosen(given.x_MK, given.weight_NK, norm_K=given.norm_K, eps=EPS, bias_N=given.bias_N)
    assert torch.equal(found, launch(case, given, chosen.workspace))
    many_MK = given.x_MK.repeat(2, 1)
    assert chosen(many_MK, given.weight_NK).shape == (16, case.outputs)
