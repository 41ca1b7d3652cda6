"""Packed attention by our Triton kernels against dense float64 attention, sequence by sequence.

Where there is no GPU the kernels run in Triton's interpreter on CPU tensors. What the other
backends compute is tested in test_kernels_reference.py; here backend "reference" in bf16 is the
measure of what bf16 costs.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from s1fast.kernels import packed_attention as attention
from s1fast.kernels import packed_attention_backward as backward_kernels
from s1fast.kernels import packed_attention_triton as kernels
from s1fast.kernels.packed_attention import packed_attention
from s1fast.model import Model, ModelConfig
from tolerances import check_against_eager

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
ours_only = [pytest.mark.gpu] if ON_GPU else []
MODULE = {"FORWARD": kernels, "DQUERY": backward_kernels, "DKEY": backward_kernels}
SHIPPED = {name: dict(getattr(module, name)) for name, module in MODULE.items()}

# Two sets of small tiles, (query rows, key rows): wide ones and high ones in every kernel, so that
# short sequences take several and a tile's first partner lies before it and after it.
SMALL = {
    "wide": {"FORWARD": (16, 32), "DQUERY": (16, 32), "DKEY": (16, 32)},
    "high": {"FORWARD": (32, 16), "DQUERY": (32, 16), "DKEY": (32, 16)},
}
NAMES = ("out", "dq", "dk", "dv")


def set_tiles(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A GPU keeps those that are shipped: its matrix instructions take no smaller ones."""
    if ON_GPU:
        return
    for kernel, (rows, columns) in SMALL[name].items():
        tile = (rows, columns, 4, 2)
        monkeypatch.setattr(MODULE[kernel], kernel, dict.fromkeys(SHIPPED[kernel], tile))


@pytest.fixture(params=[pytest.param(DEVICE, marks=ours_only)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where tensors go; kernels then run with small tiles."""
    set_tiles(monkeypatch, "wide")
    return request.param


@dataclass
class Problem:
    """A packed stream and the gradient that comes from above; values of about one."""

    lengths: tuple[int, ...]
    tail: int = 0
    heads: tuple[int, int] = (4, 2)
    width: int = 64
    device: str = DEVICE
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    scale: float | None = None

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        shapes = [(self.num_tokens, n, self.width) for n in (self.heads[0], *self.heads[1:] * 2)]
        q, k, v, dout = (
            torch.randn(shape, generator=draw).to(self.device, self.dtype)
            for shape in (*shapes, shapes[0])
        )
        self.inputs = [q, k, v]
        self.dout_THK = dout

    @property
    def end(self) -> int:
        return sum(self.lengths)

    @property
    def num_tokens(self) -> int:
        return self.end + self.tail

    @property
    def bounds(self) -> list[int]:
        return [sum(self.lengths[:i]) for i in range(len(self.lengths) + 1)]

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor(self.bounds, dtype=torch.int32)

    def call(self, q_THK: Tensor, k_TNK: Tensor, v_TNK: Tensor, **options: Any) -> Any:
        stated: dict[str, Any] = {
            "backend": "triton",
            "causal": self.causal,
            "softmax_scale": self.scale,
        }
        batch = (self.cu_seqlens, max(self.lengths, default=0))
        return packed_attention(q_THK, k_TNK, v_TNK, *batch, **stated | options)

    def run(self, **options: Any) -> list[Tensor]:
        """Output and the gradients of q, k and v."""
        inputs = [x.detach().clone().requires_grad_() for x in self.inputs]
        out_THK = self.call(*inputs, **options)
        out_THK.backward(self.dout_THK)
        return [out_THK.detach(), *(x.grad for x in inputs if x.grad is not None)]

    def eager(self) -> list[Tensor]:
        """torch's scaled_dot_product_attention in bf16, sequence by sequence."""
        return self.run(backend="reference")

    def exact(self) -> tuple[list[Tensor], Tensor]:
        """The results in float64, all scores held, and the log-sum-exp."""
        inputs = [x.detach().double().requires_grad_() for x in self.inputs]
        out_THK, lse_HT = dense(*inputs, self.bounds, self.causal, self.scale)
        grads = torch.autograd.grad(out_THK, inputs, self.dout_THK.double())
        return [out_THK.detach(), *grads], lse_HT.detach()


def dense(
    q_THK: Tensor,
    k_TNK: Tensor,
    v_TNK: Tensor,
    bounds: list[int],
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """A softmax over all scores of each sequence; zeros and -inf beyond the last."""
    group = q_THK.shape[1] // k_TNK.shape[1]
    k_THK, v_THK = (x.repeat_interleave(group, dim=1) for x in (k_TNK, v_TNK))
    scale = q_THK.shape[2] ** -0.5 if scale is None else scale
    outs, lses = [], []
    for start, stop in pairwise(bounds):
        q, k, v = (x[start:stop].transpose(0, 1) for x in (q_THK, k_THK, v_THK))
        score_HTS = q @ k.transpose(1, 2) * scale
        if causal:
            unseen = torch.ones(score_HTS.shape[1:], dtype=torch.bool, device=q.device).triu(1)
            score_HTS = score_HTS.masked_fill(unseen, -torch.inf)
        outs.append((score_HTS.softmax(-1) @ v).transpose(0, 1))
        lses.append(score_HTS.logsumexp(-1))
    # 0 * q, not zeros: the sum depends on q even where no sequence has a token.
    outs.append(0 * q_THK[bounds[-1] :].nan_to_num(0.0, 0.0, 0.0))
    lses.append(torch.full_like(q_THK[bounds[-1] :, :, 0].T, -torch.inf))
    return torch.cat(outs), torch.cat(lses, dim=1)


def check(problem: Problem) -> list[Tensor]:
    """Ours within the rule of tolerances.py of float64, zeros in the tail; returns ours."""
    found, eager = problem.run(), problem.eager()
    exact, _ = problem.exact()
    for name, a, b, c in zip(NAMES, found, exact, eager, strict=True):
        check_against_eager(a, b, c, name)
        assert a[problem.end :].count_nonzero() == 0, f"{name}: tail"
    return found


def check_equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    for name, a, b in zip(NAMES, found, wanted, strict=True):
        assert torch.equal(a, b), f"{name}: {int((a != b).sum())} elements differ"


# -- values ------------------------------------------------------------------------------------

STREAMS: dict[str, tuple[tuple[int, ...], int]] = {  # lengths, tokens beyond the last of them
    "a tile": ((32,), 0),
    "a tile and one": ((33, 31), 0),
    "length one": ((1, 50, 1, 1), 0),
    "length zero": ((0, 37, 0, 0, 20, 0), 0),
    "tail": ((40, 17), 23),
    "tail of one": ((64, 7), 1),
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("name", STREAMS)
def test_is_float64s(device: str, name: str, causal: bool) -> None:
    """Output, three gradients and log-sum-exp; unwritten memory would show."""
    lengths, tail = STREAMS[name]
    check(Problem(lengths, tail, device=device, causal=causal))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (5, 1), (6, 2), (1, 1)], ids=str)
def test_heads(device: str, heads: tuple[int, int], width: int) -> None:
    check(Problem((21, 34), 5, heads, width, device))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_high_tiles(monkeypatch: pytest.MonkeyPatch, device: str, causal: bool) -> None:
    """More query rows than key rows in a tile, where `device` has it the other way round."""
    set_tiles(monkeypatch, "high")
    check(Problem((70, 1, 33), 9, device=device, causal=causal))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_shipped_tiles(
    monkeypatch: pytest.MonkeyPatch, device: str, width: int, causal: bool
) -> None:
    """The configurations that are launched on a GPU, on lengths around a tile's."""
    for name, configuration in SHIPPED.items():
        monkeypatch.setattr(MODULE[name], name, configuration)
    check(Problem((127, 128, 129, 64, 1), 3, (2, 1), width, device, causal=causal))


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("heads", [(4, 4), (5, 1)], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_shipped_tiles_on_longer_sequences(
    monkeypatch: pytest.MonkeyPatch, device: str, heads: tuple[int, int], width: int, causal: bool
) -> None:
    for name, configuration in SHIPPED.items():
        monkeypatch.setattr(MODULE[name], name, configuration)
    check(Problem((700, 0, 255, 513, 2), 130, heads, width, device, causal=causal))


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("seed", range(16))
def test_random_streams(device: str, seed: int) -> None:
    draw = random.Random(seed)
    around = (0, 1, 15, 16, 17, 32, 33, draw.randrange(150), draw.randrange(150))
    lengths = tuple(draw.choice(around) for _ in range(draw.randrange(1, 9)))
    kv_heads, causal = draw.randrange(1, 4), draw.random() < 0.5
    heads = (kv_heads * draw.randrange(1, 6), kv_heads)
    width = draw.choice([64, 128])
    check(Problem((*lengths, 20), draw.randrange(40), heads, width, device, causal=causal))


@pytest.mark.parametrize("scale", [1.0, 0.03])
def test_softmax_scale(device: str, scale: float) -> None:
    check(Problem((33, 20), scale=scale, device=device))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_log_sum_exp(device: str, causal: bool) -> None:
    """To base e in fp32, -inf in the tail, no gradient through it; the output is the same."""
    problem = Problem((40, 0, 1, 22), 6, device=device, causal=causal)
    out_THK, lse_HT = problem.call(*problem.inputs, return_lse=True)
    _, wanted_HT = problem.exact()
    assert lse_HT.dtype == torch.float32 and lse_HT.shape == (4, 69)
    assert (lse_HT[:, 63:] == -torch.inf).all()
    # A score is a sum of 64 products in fp32, a few dozen roundings of numbers below 10.
    assert (lse_HT[:, :63] - wanted_HT[:, :63]).abs().max() <= 2.0**-17
    assert torch.equal(out_THK, problem.call(*problem.inputs))
    leaves = [x.clone().requires_grad_() for x in problem.inputs]
    out_THK, lse_HT = problem.call(*leaves, return_lse=True)
    assert out_THK.requires_grad and not lse_HT.requires_grad


@pytest.mark.usefixtures("poisoned")
def test_slices_of_one_projection(device: str) -> None:
    """q, k and v as the model has them: heads of one tensor. No bit differs from separate ones."""
    problem = Problem((33, 50), 7, (6, 2), device=device)
    wanted = problem.run()
    fused = torch.cat(problem.inputs, dim=1).requires_grad_()
    slices = fused.split((6, 2, 2), dim=1)
    assert not any(x.is_contiguous() for x in slices)
    out_THK = problem.call(*slices)
    out_THK.backward(problem.dout_THK)
    assert fused.grad is not None
    check_equal([out_THK.detach(), *fused.grad.split((6, 2, 2), dim=1)], wanted)


def misaligned(x: Tensor) -> Tensor:
    """The same values one element past a 16-byte boundary."""
    room = x.new_empty(x.numel() + 1)
    return room[1:].view(x.shape).copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda x: x[:1, :1, :1].expand(x.shape),
    "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "width first": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "slice": lambda x: torch.cat((x, x), dim=1)[:, : x.shape[1]],
    "misaligned": misaligned,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_upstream_gradient(device: str, layout: str) -> None:
    """Whatever autograd hands over; out.sum().backward() sends one number, expanded."""
    problem = Problem((20, 33), 4, device=device)
    dout_THK = LAYOUTS[layout](problem.dout_THK)
    problem.dout_THK = dout_THK.clone(memory_format=torch.contiguous_format)
    wanted = problem.run()
    problem.dout_THK = dout_THK
    check_equal(problem.run(), wanted)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)], ids=str)
@pytest.mark.parametrize("tail", [0, 5])
def test_no_tokens(device: str, lengths: tuple[int, ...], tail: int) -> None:
    """All tail, or nothing at all."""
    problem = Problem(lengths, tail, device=device)
    found = problem.run()
    for x, like in zip(found, (problem.inputs[0], *problem.inputs), strict=True):
        assert x.shape == like.shape and x.count_nonzero() == 0
    _, lse_HT = problem.call(*problem.inputs, return_lse=True)
    assert lse_HT.shape == (4, tail) and (lse_HT == -torch.inf).all()


def test_one_token(device: str) -> None:
    """It attends to itself: exactly its value, and nothing to learn for query and key."""
    problem = Problem((1,), heads=(2, 2), device=device)
    out_THK, dq_THK, dk_THK, dv_THK = problem.run()
    assert torch.equal(out_THK, problem.inputs[2]) and torch.equal(dv_THK, problem.dout_THK)
    # dp - delta: two sums of the same 64 products, in orders of their own.
    assert max(dq_THK.abs().max(), dk_THK.abs().max()) <= 64 * 2.0**-24 * 20


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_short_sequences(device: str, count: int) -> None:
    draw = torch.Generator().manual_seed(0)
    lengths = tuple(torch.randint(0, 20, (count,), generator=draw).tolist())
    check(Problem(lengths, 3, (2, 1), device=device))


# -- sequences keep apart ----------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_neighbours_change_no_bit(device: str, causal: bool, value: float) -> None:
    """What stands in another sequence and in the tail, in the upstream gradient as well.

    The spoilt sequence ends in the middle of a tile of its neighbours and begins in one.
    """
    problem = Problem((41, 23, 50), 20, (2, 1), device=device, causal=causal)
    clean = problem.run()
    clean_lse_HT = problem.call(*problem.inputs, return_lse=True)[1]
    for x in (*problem.inputs, problem.dout_THK):
        x[41:64] = value
        x[114:] = value
    dirty = problem.run()
    lse_HT = problem.call(*problem.inputs, return_lse=True)[1]
    for mine in (slice(0, 41), slice(64, 114)):
        check_equal([x[mine] for x in dirty], [x[mine] for x in clean])
        assert torch.equal(lse_HT[:, mine], clean_lse_HT[:, mine])
    assert all(x[114:].count_nonzero() == 0 for x in dirty)


def test_boundary_tokens_change_no_bit(device: str) -> None:
    """The last token before a sequence and the first after it, by finite values; and of a later
    token in the sequence, no bit of the earlier ones' output."""
    problem = Problem((20, 33, 12), device=device)
    clean = problem.run()
    for x in (*problem.inputs, problem.dout_THK):
        x[19] += 3.0
        x[53] += 3.0
    dirty = problem.run()
    check_equal([x[20:53] for x in dirty], [x[20:53] for x in clean])
    for x in problem.inputs[1:]:
        x[52] += 3.0
    assert torch.equal(problem.run()[0][20:52], dirty[0][20:52])
    assert not torch.equal(problem.run()[0][52], dirty[0][52])


def test_a_nan_in_the_sequence_shows(device: str) -> None:
    problem = Problem((33, 20), device=device)
    problem.inputs[1][5] = float("nan")
    out_THK = problem.run()[0]
    assert out_THK[5:33].isnan().all() and out_THK[33:].isfinite().all()


# -- hard values -------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("size", [30.0, -30.0])
def test_huge_scores(device: str, causal: bool, size: float) -> None:
    """Scores of thousands, either sign: exp overflows unless the maximum is taken out first.

    All keys have the same large part, the rest tells them apart; beyond a sequence's end stands 0.
    """
    problem = Problem((50, 7), causal=causal, device=device)
    q_THK, k_TNK, _ = problem.inputs
    q_THK[..., 0], k_TNK[..., 0] = 30.0, size * 10
    found = check(problem)
    assert all(x.isfinite().all() for x in found)


def test_one_winner(device: str) -> None:
    """Scores of a thousand and their negatives: the softmax picks one key for each query."""
    problem = Problem((50, 20), device=device)
    for x in problem.inputs[:2]:
        x *= 10.0
    check(problem)


def test_equal_scores(device: str) -> None:
    """The mean of the values so far; a maximum that never rises."""
    problem = Problem((70,), device=device, heads=(2, 1))
    problem.inputs[0].zero_()
    found = check(problem)
    _, lse_HT = problem.call(*problem.inputs, return_lse=True)
    count_T = torch.arange(1, 71, device=device, dtype=torch.float64)
    assert (lse_HT - count_T.log()).abs().max() <= 2.0**-19  # four roundings at 6
    assert torch.equal(found[0][0], problem.inputs[2][:1].expand(1, 2, 64)[0])


def test_scores_that_rise_and_fall(device: str) -> None:
    """A maximum in the first tile, and one that every tile outdoes."""
    problem = Problem((96, 96), device=device, heads=(1, 1), causal=False)
    q_THK, k_TNK, _ = problem.inputs
    q_THK[..., 0] = 8.0
    ramp_T = torch.arange(96, device=device) / 4.0
    k_TNK[:96, 0, 0], k_TNK[96:, 0, 0] = ramp_T.bfloat16(), ramp_T.flip(0).bfloat16()
    check(problem)


def test_runs_are_bit_identical(device: str) -> None:
    problem = Problem((33, 1, 50), 7, (4, 1), device=device)
    first = problem.run()
    for _ in range(3):
        check_equal(problem.run(), first)


# -- offsets beyond 32 bits --------------------------------------------------------------------

FAR = (1 << 30) + 64
"""Elements: a stride that fits in 32 bits; twice as much does not. A CPU backs what is used."""


def spread(x: Tensor, strides: tuple[int, int, int]) -> Tensor:
    """The same values with other strides, in memory of their own."""
    room = sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True)) + 1
    return x.new_empty(room).as_strided(x.shape, strides).copy_(x)


def test_heads_beyond_int32(device: str) -> None:
    """Three heads, the third 4 GB beyond the first; also as members of one group."""
    small = torch.randn(40, 3, 64, generator=torch.Generator().manual_seed(0))
    small = small.to(device, torch.bfloat16)
    far = spread(small, (64, FAR, 1))
    for heads in (slice(None), slice(2, 3)):
        problem = Problem((23, 17), heads=(3, 3), device=device)
        problem.inputs, problem.dout_THK = [small, small[:, heads], small[:, heads]], small
        wanted = problem.run()
        problem.inputs, problem.dout_THK = [far, far[:, heads], far[:, heads]], far
        check_equal(run_in_place(problem), wanted)


def test_sequences_beyond_int32(device: str) -> None:
    """The second sequence begins 4 GB behind the first."""
    small = torch.randn(6, 2, 64, generator=torch.Generator().manual_seed(0))
    small = small.to(device, torch.bfloat16)
    far = spread(small, (FAR // 2, 64, 1))
    problem = Problem((4, 2), heads=(2, 2), device=device)
    problem.inputs, problem.dout_THK = [small, small, small], small
    wanted = problem.run()
    problem.inputs, problem.dout_THK = [far, far, far], far
    check_equal(run_in_place(problem), wanted)


def run_in_place(problem: Problem) -> list[Tensor]:
    """As Problem.run, but on the very memory of the inputs and of the upstream gradient."""
    q, k, v = problem.inputs
    batch = (problem.cu_seqlens, max(problem.lengths))
    scale = problem.width**-0.5
    out_THK, lse2_HT = attention.forward(q, k, v, batch[0], True, scale)
    saved = (q, k, v, attention.delta(problem.dout_THK, out_THK), lse2_HT, batch[0])
    return [out_THK, *attention.backward(problem.dout_THK, *saved, True, scale)]


# -- the list of tiles -------------------------------------------------------------------------


def tiles(bounds: list[int], rows: int, growing: bool) -> list[list[int]]:
    return kernels.tiles(tuple(bounds), rows, growing, torch.device("cpu")).tolist()


def test_tiles_of_a_batch() -> None:
    """(start, length, row), the heaviest first: late queries, early keys."""
    bounds = [0, 5, 5, 15, 16]
    late = [[5, 10, 8], [0, 5, 4], [5, 10, 4], [0, 5, 0], [5, 10, 0], [15, 1, 0]]
    early = [[5, 10, 0], [5, 10, 4], [0, 5, 0], [5, 10, 8], [0, 5, 4], [15, 1, 0]]
    assert tiles(bounds, 4, growing=True) == late
    assert tiles(bounds, 4, growing=False) == early
    for empty in ([0], [0, 0, 0]):
        assert kernels.tiles(tuple(empty), 4, True, torch.device("cpu")).shape == (0, 3)


@given(
    lengths=st.lists(st.integers(0, 300), max_size=20),
    rows=st.sampled_from([1, 16, 64, 128]),
    growing=st.booleans(),
)
def test_tiles_cover_every_row_once(lengths: list[int], rows: int, growing: bool) -> None:
    """None is empty, and none is heavier than the one before it."""
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    table = tiles(bounds, rows, growing)
    sequences = {(start, stop - start) for start, stop in pairwise(bounds) if stop > start}
    assert {(start, length) for start, length, _ in table} == sequences
    covered = [
        start + row + i for start, length, row in table for i in range(min(rows, length - row))
    ]
    assert sorted(covered) == list(range(bounds[-1]))
    assert all(row % rows == 0 and 0 <= row < length for _, length, row in table)
    work = [row if growing else length - row for _, length, row in table]
    assert work == sorted(work, reverse=True)


def test_tiles_are_built_once_for_a_batch(device: str) -> None:
    """Layers after the first, the backward and the next micro-step find the same tensors."""
    problem = Problem((33, 20), device=device)
    kernels.tiles.cache_clear()
    problem.run()
    built = kernels.tiles.cache_info().misses
    assert built <= 3
    problem.run()
    assert kernels.tiles.cache_info().misses == built


# -- in the model ------------------------------------------------------------------------------

CONFIG = ModelConfig(
    model_type="qwen2",
    vocab_size=67,
    hidden_size=96,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=256,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    rope_scaling=None,
    tie_word_embeddings=False,
    attention_bias=True,
)
LENGTHS, PADDED = (33, 1, 40), 96


def gradients(device: str, dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    """Of every weight, after a step on a stream that is longer than its sequences."""
    model = Model(CONFIG, dtype).to(device).init_random(seed=0, std=0.1)
    model = model.double() if dtype == torch.float64 else model
    problem = Problem(LENGTHS, PADDED - sum(LENGTHS))

    def attend(layer: int, q_THK: Tensor, k_TNK: Tensor, v_TNK: Tensor) -> Tensor:
        return problem.call(q_THK, k_TNK, v_TNK, backend=backend)

    draw = torch.Generator().manual_seed(0)
    ids_T = torch.randint(67, (PADDED,), generator=draw).to(device)
    label_T = torch.randint(67, (PADDED,), generator=draw).to(device)
    label_T[sum(LENGTHS) :] = -100
    weight_T = (label_T >= 0).float() / sum(LENGTHS)
    positions_T = torch.cat([torch.arange(n) for n in (*LENGTHS, PADDED - sum(LENGTHS))])
    hidden_TD = model(ids_T, positions_T.to(device), attend)
    model.loss(hidden_TD, label_T, weight_T, (label_T >= 0).nonzero()[:, 0]).backward()
    return {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.usefixtures("poisoned")
def test_a_padded_model_learns_from_its_sequences_alone(device: str) -> None:
    """Every weight gradient: a NaN left in a layer's tail, out or dq, would reach them all."""
    exact = gradients("cpu", torch.float64, "reference")
    eager = gradients(device, torch.bfloat16, "reference")
    found = gradients(device, torch.bfloat16, "triton")
    assert found.keys() == exact.keys() and len(found) == 2 * 7 + 3
    for name, grad in found.items():
        assert grad.isfinite().all(), name
        error, theirs = ((x.double() - exact[name]).norm() for x in (grad, eager[name]))
        # Both are roundings of the same sums in bf16; two such errors differ by less than twice.
        assert error <= 2 * theirs, f"{name}: {error:.3g} beside eager's {theirs:.3g}"


# -- compilers and torch.library ---------------------------------------------------------------


@pytest.mark.parametrize("tail", [0, 3])
def test_opcheck(device: str, tail: int) -> None:
    problem = Problem((20, 1), tail, (2, 1), device=device)
    inputs = [x.requires_grad_() for x in problem.inputs]
    batch = (problem.cu_seqlens, 20)
    torch.library.opcheck(attention.forward, (*inputs, batch[0], True, 0.125))
    q, k, v = (x.detach() for x in inputs)
    out_THK, lse2_HT = attention.forward(q, k, v, batch[0], True, 0.125)
    delta_HT = attention.delta(problem.dout_THK, out_THK)
    torch.library.opcheck(attention.delta, (problem.dout_THK, out_THK))
    saved = (q, k, v, delta_HT, lse2_HT, batch[0])
    torch.library.opcheck(attention.backward, (problem.dout_THK, *saved, True, 0.125))


def test_compiles_whole(device: str) -> None:
    """fullgraph, with other lengths later, equal to eager bit for bit."""

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        return packed_attention(q, k, v, cu_seqlens, longest, backend="triton") * 2.0

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=True)
    for lengths, tail in (((20, 33), 4), ((5, 0, 40, 2), 7), ((50,), 0)):
        problem = Problem(lengths, tail, device=device)
        results = []
        for call in (attend, compiled):
            inputs = [x.clone().requires_grad_() for x in problem.inputs]
            out_THK = call(*inputs, problem.cu_seqlens, max(lengths))
            out_THK.backward(problem.dout_THK)
            results.append([out_THK.detach(), *(x.grad for x in inputs if x.grad is not None)])
        check_equal(*results)


def test_without_gradients(device: str) -> None:
    """Under no_grad, and with only the values wanting one."""
    problem = Problem((20, 33), device=device)
    wanted = problem.run()
    with torch.no_grad():
        assert torch.equal(problem.call(*problem.inputs), wanted[0])
    q, k, v = problem.inputs
    v = v.clone().requires_grad_()
    problem.call(q, k, v).backward(problem.dout_THK)
    assert v.grad is not None and torch.equal(v.grad, wanted[3])


# -- bad input ---------------------------------------------------------------------------------

Bad = dict[str, Any]
"""The arguments of a call, by name."""


def good(device: str) -> Bad:
    problem = Problem((4, 7), 2, device=device)
    names = ("q_THK", "k_TNK", "v_TNK")
    return {
        **dict(zip(names, problem.inputs, strict=True)),
        "cu_seqlens": problem.cu_seqlens,
        "max_seqlen": 7,
        "backend": "triton",
    }


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[Bad], Bad]:
    return lambda bad: {**bad, name: change(bad[name])}


def stated(**values: Any) -> Callable[[Bad], Bad]:
    return lambda bad: {**bad, **values}


def every(change: Callable[[Tensor], Tensor]) -> Callable[[Bad], Bad]:
    """Of q, k and v."""
    return lambda bad: {n: change(x) if n.endswith("K") else x for n, x in bad.items()}


def bounds(*values: int) -> Callable[[Bad], Bad]:
    return stated(cu_seqlens=torch.tensor(values, dtype=torch.int32))


BAD: dict[str, tuple[str, Callable[[Bad], Bad]]] = {
    "q 1-d": (r"q_THK has shape \(64,\).*\(T, heads, K\)", changed("q_THK", lambda x: x[0, 0])),
    "k 2-d": (r"k_TNK has shape \(13, 64\).*\(T, heads, K\)", changed("k_TNK", lambda x: x[:, 0])),
    "dtypes differ": (
        r"k_TNK \(13, 2, 64\) is torch.float32.*q_THK is torch.bfloat16",
        changed("k_TNK", lambda x: x.float()),
    ),
    "devices differ": (
        r"v_TNK \(13, 2, 64\) .*on meta, q_THK .*on",
        changed("v_TNK", lambda x: x.to("meta")),
    ),
    "integers": (r"q_THK \(13, 4, 64\) is torch.int64.*floating", every(lambda x: x.long())),
    "fp32": ("'triton' takes torch.bfloat16, .*torch.float32", every(lambda x: x.float())),
    "width 96": (
        "'triton' takes heads 64 or 128 wide, .*96",
        every(lambda x: torch.cat((x, x[..., :32]), 2)),
    ),
    "3 kv heads": (
        "4 query heads are no multiple of 3",
        lambda bad: {**bad, **{n: bad[n][:, [0, 1, 1]] for n in ("k_TNK", "v_TNK")}},
    ),
    "no kv heads": (
        "4 query heads are no multiple of 0",
        lambda bad: {**bad, **{n: bad[n][:, :0] for n in ("k_TNK", "v_TNK")}},
    ),
    "k and v differ": (
        r"k_TNK \(13, 2, 64\) and v_TNK \(13, 1, 64\): .*\(13, N, 64\)",
        changed("v_TNK", lambda x: x[:, :1]),
    ),
    "fewer keys": (
        r"k_TNK \(12, 2, 64\) and v_TNK \(12, 2, 64\): .*\(13, N, 64\)",
        lambda bad: {**bad, **{n: bad[n][1:] for n in ("k_TNK", "v_TNK")}},
    ),
    "cu_seqlens elsewhere": (
        "cu_seqlens is on meta; pass the host copy",
        changed("cu_seqlens", lambda x: x.to("meta")),
    ),
    "cu_seqlens int64": (
        r"cu_seqlens \(3,\) is torch.int64.*\(B \+ 1,\) int32",
        changed("cu_seqlens", lambda x: x.long()),
    ),
    "cu_seqlens 2-d": (
        r"cu_seqlens \(1, 3\) .*\(B \+ 1,\) int32",
        changed("cu_seqlens", lambda x: x[None]),
    ),
    "cu_seqlens empty": (r"cu_seqlens must start at 0.*got \[\]", bounds()),
    "cu_seqlens starts late": (r"cu_seqlens must start at 0.*got \[1, 4\]", bounds(1, 4)),
    "cu_seqlens falls": (r"never fall, got \[0, 7, 4, 11\]", bounds(0, 7, 4, 11)),
    "cu_seqlens negative": (r"never fall, got \[0, -4, 3\]", bounds(0, -4, 3)),
    "cu_seqlens beyond": ("cu_seqlens ends at 14 but there are 13 tokens", bounds(0, 7, 14)),
    "max_seqlen": ("max_seqlen 6 is below the longest sequence, 7", stated(max_seqlen=6)),
    "strided width": (
        r"q_THK \(13, 4, 64\) has strides .*pass q_THK.contiguous\(\)",
        changed("q_THK", lambda x: x.repeat_interleave(2, dim=2)[..., ::2]),
    ),
    "heads of one row": (
        r"v_TNK \(13, 2, 64\) has strides .*pass v_TNK.contiguous\(\)",
        changed("v_TNK", lambda x: x[:, :1].expand(-1, 2, -1)),
    ),
    "odd token stride": (
        r"k_TNK \(13, 2, 64\) has strides \(132, .*multiples of 16 bytes",
        changed(
            "k_TNK",
            lambda x: torch.cat((x.flatten(1), x[:, 0, :4]), 1).as_strided_(
                (13, 2, 64), (132, 64, 1)
            ),
        ),
    ),
    "misaligned": (r"q_THK \(13, 4, 64\) .*multiples of 16 bytes", changed("q_THK", misaligned)),
    "no such backend": (
        "backend 'cudnn': there are triton, gluon, flash, torch, reference",
        stated(backend="cudnn"),
    ),
    "lse of another backend": (
        "return_lse: backend 'reference' does not return it, 'triton' does",
        stated(backend="reference", return_lse=True),
    ),
    "zero scale": ("softmax_scale", stated(softmax_scale=0.0)),
    "negative scale": ("softmax_scale", stated(softmax_scale=-0.1)),
    "NaN scale": ("softmax_scale", stated(softmax_scale=float("nan"))),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(device: str, name: str) -> None:
    message, spoil = BAD[name]
    with pytest.raises(ValueError, match=message):
        packed_attention(**spoil(good(device)))


@pytest.mark.parametrize("backend", ["triton", "gluon", "flash", "torch"])
def test_backends_that_need_cuda(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "INTERPRETED", False)
    problem = Problem((4, 7), device="cpu")
    with pytest.raises(ValueError, match=f"'{backend}' needs tensors on CUDA.*cpu; 'reference'"):
        problem.call(*problem.inputs, backend=backend)


def test_what_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn is looked for under all of its names."""
    asked: list[str] = []
    monkeypatch.setattr(attention, "_found", asked.append)
    monkeypatch.setattr(attention, "triton", None)
    attention._flash_module.cache_clear()
    heads = (torch.device("cuda"), torch.bfloat16, 64)
    with pytest.raises(ValueError, match="flash-attn is not installed; pip install flash-attn-4"):
        attention.check_backend("flash", *heads)
    assert asked == ["flash_attn.cute", "flash_attn_interface", "flash_attn"]
    with pytest.raises(ValueError, match="'triton': not installed; pip install triton"):
        attention.check_backend("triton", *heads)


def test_default_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours on a GPU where it takes the heads; on a CPU not even where it is interpreted."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert attention.default_backend(cuda, torch.bfloat16, 64) == "triton"
    for device, dtype, width in (
        (cpu, torch.bfloat16, 64),
        (cuda, torch.float32, 64),
        (cuda, torch.bfloat16, 96),
    ):
        assert attention.default_backend(device, dtype, width) == "reference"
    problem = Problem((4, 7), device="cpu", dtype=torch.float32)
    found = problem.call(*problem.inputs, backend=None)
    assert torch.equal(found, problem.call(*problem.inputs, backend="reference"))
    monkeypatch.setattr(attention, "triton", None)
    assert attention.default_backend(cuda, torch.bfloat16, 64) == "reference"


def test_modules_are_found_without_an_error() -> None:
    assert attention._found("torch.nn")
    assert not attention._found("no_such_package") and not attention._found("no_such.part")
