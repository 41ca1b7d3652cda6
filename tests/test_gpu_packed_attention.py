"""Packed attention at its real sizes on a CUDA device (make gpu)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from s1fast.kernels.packed_attention import packed_attention
from s1fast.model import Model, ModelConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE = "cuda"
SCORES = 1 << 27  # that the float64 oracle holds at a time: 1 GB
NAMES = ("out", "dq", "dk", "dv")


@pytest.fixture(params=["triton", "gluon"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each of ours that the device takes."""
    if request.param == "gluon" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("backend 'gluon' is for Hopper")
    return request.param


def lengths(count: int, low: int, high: int, seed: int = 0) -> tuple[int, ...]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(low, high + 1, (count,), generator=draw).tolist())


@dataclass
class Problem:
    """A packed stream with room behind its sequences."""

    lengths: tuple[int, ...]
    heads: tuple[int, int] = (8, 2)
    width: int = 128
    tail: int = 0
    causal: bool = True
    backend: str = "triton"

    def __post_init__(self) -> None:
        draw = torch.Generator(DEVICE).manual_seed(0)

        def normal(heads: int) -> Tensor:
            shape = (sum(self.lengths) + self.tail, heads, self.width)
            return torch.randn(shape, generator=draw, device=DEVICE, dtype=torch.bfloat16)

        h, n = self.heads
        self.inputs, self.dout_THK = [normal(h), normal(n), normal(n)], normal(h)

    @property
    def bounds(self) -> list[int]:
        return [0, *torch.tensor(self.lengths).cumsum(0).tolist()]

    def batch(self) -> tuple[Tensor, int]:
        return torch.tensor(self.bounds, dtype=torch.int32), max(self.lengths)

    def run(self, backend: str | None = None) -> list[Tensor]:
        """Output and the gradients of q, k and v."""
        inputs = [x.detach().requires_grad_() for x in self.inputs]
        options: dict[str, Any] = {"causal": self.causal, "backend": backend or self.backend}
        out_THK = packed_attention(*inputs, *self.batch(), **options)
        grads = torch.autograd.grad(out_THK, inputs, self.dout_THK)
        return [out_THK.detach(), *grads]

    def exact(self) -> list[Tensor]:
        """In float64: a sequence and a key head at a time, queries in blocks of rows."""
        results = [torch.zeros_like(x, dtype=torch.float64) for x in (self.dout_THK, *self.inputs)]
        group = self.heads[0] // self.heads[1]
        for n in range(self.heads[1]):
            members = slice(n * group, (n + 1) * group)
            for start, stop in pairwise(self.bounds):
                q, k, v, dout = (
                    x[start:stop, here].transpose(0, 1).double()
                    for x, here in zip(
                        (*self.inputs, self.dout_THK),
                        (members, slice(n, n + 1), slice(n, n + 1), members),
                        strict=True,
                    )
                )
                out, dq, dk, dv = attention_of_one(q, k[0], v[0], dout, self.causal)
                results[0][start:stop, members] = out.transpose(0, 1)
                results[1][start:stop, members] = dq.transpose(0, 1)
                results[2][start:stop, n], results[3][start:stop, n] = dk, dv
        return results


def attention_of_one(
    q_GTK: Tensor, k_TK: Tensor, v_TK: Tensor, dout_GTK: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, dq, dk, dv) of one sequence and the query heads that share one key head."""
    group, num_tokens, width = q_GTK.shape
    scale = width**-0.5
    out_GTK, dq_GTK = torch.zeros_like(q_GTK), torch.zeros_like(q_GTK)
    dk_TK, dv_TK = torch.zeros_like(k_TK), torch.zeros_like(v_TK)
    step = max(1, SCORES // max(1, group * num_tokens))
    for start in range(0, num_tokens, step):
        rows = slice(start, min(start + step, num_tokens))
        seen = slice(0, rows.stop if causal else num_tokens)
        q_GRK, dout_GRK, k_SK, v_SK = q_GTK[:, rows], dout_GTK[:, rows], k_TK[seen], v_TK[seen]
        p_GRS = q_GRK @ k_SK.T * scale
        if causal:
            unseen_RS = torch.ones(p_GRS.shape[1:], dtype=torch.bool, device=q_GTK.device)
            p_GRS.masked_fill_(unseen_RS.triu_(1 + start), -torch.inf)
        p_GRS = p_GRS.softmax(-1)
        out_GTK[:, rows] = p_GRS @ v_SK
        dv_TK[seen] += torch.einsum("grs,grk->sk", p_GRS, dout_GRK)
        delta_GR1 = (dout_GRK * out_GTK[:, rows]).sum(-1, keepdim=True)
        ds_GRS = (dout_GRK @ v_SK.T).sub_(delta_GR1).mul_(p_GRS).mul_(scale)
        dq_GTK[:, rows] = ds_GRS @ k_SK
        dk_TK[seen] += torch.einsum("grs,grk->sk", ds_GRS, q_GRK)
    return out_GTK, dq_GTK, dk_TK, dv_TK


def error(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest and mean absolute error."""
    off = (found.double() - exact).abs_()
    return off.max().item(), off.mean().item()


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# -- values ------------------------------------------------------------------------------------

EDGES = (1, 63, 64, 65, 127, 128, 129, 0, 300, 383)

CASES: dict[str, dict[str, Any]] = {  # edges: seen within seconds
    "edges": {"lengths": EDGES, "heads": (5, 1), "tail": 3},
    "edges, width 64": {"lengths": EDGES, "heads": (4, 2), "width": 64},
    "edges, full": {"lengths": EDGES, "heads": (2, 2), "causal": False, "tail": 200},
    "s1K": {"lengths": lengths(16, 1200, 8600), "heads": (40, 8), "tail": 100},
    "Ulysses": {"lengths": lengths(8, 2500, 7000), "heads": (5, 1)},
    "width 64": {"lengths": lengths(12, 1, 3000), "heads": (9, 3), "width": 64, "tail": 1},
    "full": {"lengths": lengths(8, 1, 4000), "heads": (8, 8), "causal": False},
    "full, width 64": {
        "lengths": lengths(8, 0, 4000),
        "heads": (6, 2),
        "width": 64,
        "causal": False,
    },
    "1,000 short": {"lengths": lengths(1000, 0, 200), "heads": (8, 2), "tail": 77},
    "256K": {"lengths": (262_144,), "heads": (1, 1)},
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", CASES)
def test_errors_are_eagers(name: str, backend: str) -> None:
    """At most twice that of torch's own bf16 kernels, plus a rounding of the largest value.

    Measured against the larger error of varlen_attn and scaled_dot_product_attention: orders of the
    same sums, each as good as another.
    """
    problem = Problem(**CASES[name], backend=backend)
    exact, found = problem.exact(), problem.run()
    peers = [problem.run(peer) for peer in ("torch", "reference")]
    for i, what in enumerate(NAMES):
        ours, ours_mean = error(found[i], exact[i])
        theirs, theirs_mean = map(max, zip(*(error(x[i], exact[i]) for x in peers), strict=True))
        largest = exact[i].abs().max().item()
        assert ours <= 2 * theirs + 2.0**-8 * largest, f"{what}: {ours} beside eager's {theirs}"
        assert ours_mean <= 2 * theirs_mean + 2.0**-22 * largest, f"{what}: mean {ours_mean}"
        assert found[i][problem.bounds[-1] :].count_nonzero() == 0, f"{what}: tail"
    assert same(problem.run(), found)


def test_log_sum_exp(backend: str) -> None:
    problem = Problem(lengths(4, 1, 5000), tail=9)
    q_THK, k_TNK, v_TNK = problem.inputs
    batch = problem.batch()
    options: dict[str, Any] = {"backend": backend, "return_lse": True}
    _, lse_HT = packed_attention(q_THK, k_TNK, v_TNK, *batch, **options)
    for start, stop in pairwise(problem.bounds):
        for head in range(8):
            score_TT = q_THK[start:stop, head].double() @ k_TNK[start:stop, head // 4].double().T
            unseen_TT = torch.ones_like(score_TT, dtype=torch.bool).triu_(1)
            score_TT.mul_(128**-0.5).masked_fill_(unseen_TT, -torch.inf)
            off_T = lse_HT[head, start:stop] - score_TT.logsumexp(1)
            # exp2 and log2 of the hardware are good to 2^-22; scores of about 5 in fp32 likewise.
            assert off_T.abs().max() <= 2.0**-17
    assert (lse_HT[:, problem.bounds[-1] :] == -torch.inf).all()


def test_tensors_beyond_int32(backend: str) -> None:
    """2.5e9 elements of q: the last sequence is bit for bit what it is alone."""
    problem = Problem((1000,) * 300, heads=(64, 8), backend=backend)
    alone = Problem((1000,), heads=(64, 8), backend=backend)
    alone.inputs = [x[-1000:].clone() for x in problem.inputs]
    alone.dout_THK = problem.dout_THK[-1000:].clone()
    assert problem.inputs[0].numel() > 1 << 31
    assert same([x[-1000:] for x in problem.run()], alone.run())


# -- same bits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [64, 128])
def test_a_thousand_runs_are_bit_identical(width: int, backend: str) -> None:
    problem = Problem((1000, 3001, 17, 700), (8, 2), width, tail=5, backend=backend)
    first = problem.run()
    differences = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(1000):
        for a, b in zip(problem.run(), first, strict=True):
            differences += (a != b).sum()
    assert differences == 0


def test_neighbours_change_no_bit(backend: str) -> None:
    """NaN in every second sequence and in the tail."""
    problem = Problem(lengths(16, 1, 2000), heads=(8, 2), tail=300, backend=backend)
    clean = problem.run()
    spans = [*pairwise(problem.bounds)]
    for start, stop in [*spans[1::2], (problem.bounds[-1], None)]:
        for x in (*problem.inputs, problem.dout_THK):
            x[start:stop] = float("nan")
    dirty = problem.run()
    for start, stop in spans[::2]:
        assert same([x[start:stop] for x in dirty], [x[start:stop] for x in clean])


def test_compiled_is_bit_identical(backend: str) -> None:
    """By inductor, in one graph, with other lengths later."""

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        options: dict[str, Any] = {"backend": backend}
        return packed_attention(q, k, v, cu_seqlens, longest, **options) * 2.0

    compiled = torch.compile(attend, fullgraph=True, dynamic=True)
    for seed in range(3):
        problem = Problem(lengths(4 + seed, 1, 2000, seed), tail=seed)
        results = []
        for call in (attend, compiled):
            inputs = [x.detach().requires_grad_() for x in problem.inputs]
            out_THK = call(*inputs, *problem.batch())
            grads = torch.autograd.grad(out_THK, inputs, problem.dout_THK)
            results.append([out_THK.detach(), *grads])
        assert same(*results)


# -- waiting -----------------------------------------------------------------------------------


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within it, whatever makes the host wait for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_waits_for_the_device(backend: str) -> None:
    """Neither for a batch that was seen before nor for a new one."""
    seen, new = (Problem(x, backend=backend) for x in ((3000, 1001, 95), (2000, 2000, 96)))
    seen.run()  # the kernels are there from now on
    for problem in (seen, new):
        with no_waiting():
            problem.run()
    assert same(new.run(), new.run())


def test_a_queued_device_is_not_waited_for(backend: str) -> None:
    """The call returns while the device is still busy with what was there before."""
    problem = Problem((3000, 1001, 95), backend=backend)
    problem.run()
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # cycles: about a second
    done.record()
    problem.run()
    assert not done.query()


# -- in the model ------------------------------------------------------------------------------

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=1009,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=3,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    max_position_embeddings=8192,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    rope_scaling=None,
    tie_word_embeddings=True,
    attention_bias=False,
)


def gradients(problem: Problem, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of every weight, after a step on a stream that is longer than its sequences."""
    model = Model(CONFIG, dtype).to(DEVICE).init_random(seed=0, std=0.05)
    num_tokens = problem.bounds[-1] + problem.tail
    draw = torch.Generator().manual_seed(0)
    ids_T, label_T = torch.randint(1009, (2, num_tokens), generator=draw).to(DEVICE)
    label_T[problem.bounds[-1] :] = -100
    weight_T = (label_T >= 0).float() / problem.bounds[-1]
    positions_T = torch.cat([torch.arange(n) for n in (*problem.lengths, problem.tail)])

    def attend(layer: int, q_THK: Tensor, k_TNK: Tensor, v_TNK: Tensor) -> Tensor:
        options: dict[str, Any] = {"backend": backend}
        return packed_attention(q_THK, k_TNK, v_TNK, *problem.batch(), **options)

    hidden_TD = model(ids_T, positions_T.to(DEVICE), attend)
    model.loss(hidden_TD, label_T, weight_T, (label_T >= 0).nonzero()[:, 0]).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.usefixtures("poisoned")
def test_a_training_step(backend: str) -> None:
    """SmolLM2's layers in bf16 on a padded stream, beside torch's attention; fp32 is the measure:
    its roundings are 2^-16 of bf16's."""
    problem = Problem(lengths(6, 1, 2000), heads=(9, 3), width=64, tail=130)
    exact = gradients(problem, "reference", torch.float32)
    eager = gradients(problem, "reference", torch.bfloat16)
    found = gradients(problem, backend, torch.bfloat16)
    assert found.keys() == exact.keys() == eager.keys()
    for name, grad in found.items():
        assert grad.isfinite().all(), name
        error, theirs = ((x - exact[name]).norm().item() for x in (grad, eager[name]))
        assert error <= 2 * theirs, f"{name}: {error:.3g} beside eager's {theirs:.3g}"
