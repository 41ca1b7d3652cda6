"""The bench of packed attention, on a CPU: its batches, its reference, what its peers are given.

Peers that need a GPU are stood in for by functions with the same arguments.
"""

from __future__ import annotations

import json
import sys
import types
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from s1fast.bench import kernels, packed_attention, providers, report
from s1fast.bench.op import Op, Problem, parse_shape
from s1fast.bench.packed_attention import BIN_WIDTH, BINS, MEAN, SHORTEST
from s1fast.bench.roofs import Roofs
from s1fast.errors import InputError
from s1fast.kernels.packed_attention import packed_attention as ours

CPU = torch.device("cpu")
OP = packed_attention.OP
RATES = {"read_gb_s": 100.0, "copy_gb_s": 80.0}
RATES |= {"gemm_bfloat16_tflops": 2.0, "gemm_float32_tflops": 1.0}
CEILINGS = Roofs(
    **RATES, variants={k: {"x": v} for k, v in RATES.items()}, states={}, void=False, void_reason=""
)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def problem(shape: str) -> Problem:
    return OP.make(parse_shape(shape, OP.cpu_sizes), CPU)


def lengths(shape: str) -> list[int]:
    return [stop - start for start, stop in pairwise(problem(shape).arguments[3].tolist())]


# -- batches -------------------------------------------------------------------------------------


def test_bins_are_those_published(shared_data: Path) -> None:
    found = json.loads((shared_data / "s1k_trace_length_histogram.json").read_text())
    counts = [bar["count"] for bar in found["hist"]["gemini"]]
    starts = [bar["lo"] for bar in found["hist"]["gemini"]]
    assert counts == [*BINS, *[0] * (len(counts) - len(BINS))]
    assert starts == pytest.approx([SHORTEST + i * BIN_WIDTH for i in range(50)], abs=0.1)
    assert abs(MEAN - 4699) < 1  # the mean of s1K itself


def test_ragged_lengths_are_spread_as_s1k() -> None:
    """Shares of the bins, the mean that was asked for, and the same lengths every time."""
    many = packed_attention._draw(20000, 4699)
    assert many.double().mean().item() == pytest.approx(4699, rel=0.01)
    assert many.min() >= 356 and many.max() <= 8121
    edges = SHORTEST + BIN_WIDTH * torch.arange(len(BINS) + 1)
    shares = torch.histogram(many.float(), edges).hist / len(many)
    torch.testing.assert_close(shares, torch.tensor(BINS) / sum(BINS), rtol=0, atol=0.01)
    assert lengths("S47xB16xragged") == packed_attention._draw(16, 47).tolist()
    assert min(lengths("S1xB9xragged")) == 1
    assert lengths("S24xB3") == [24] * 3


def test_counts_by_hand() -> None:
    one = problem("S24xB4xH6xN2xK16xragged")
    q, _, _, bounds, longest = one.arguments
    found = lengths("S24xB4xH6xN2xK16xragged")
    assert len(set(found)) > 1 and longest == max(found)
    assert bounds.dtype == torch.int32 and q.shape == (sum(found), 6, 16)
    assert one.forward_flops == sum(2 * 6 * 16 * n * n for n in found)
    assert one.flops == 3.5 * one.forward_flops
    assert one.num_bytes == 4 * sum(found) * 16 * (4 * 6 + 4 * 2)  # fp32; q, out, k, v and theirs


@pytest.mark.parametrize("chunk", [1, 100, 1 << 26])
@pytest.mark.parametrize("shape", ["S9xB3xH4xN2xK8xragged", "S7xB2xH3xN1xK5"])
def test_reference_is_exact(chunk: int, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd in fp64 through a mask over everything, whatever the size of a chunk."""
    monkeypatch.setattr(packed_attention, "CHUNK_ELEMENTS", chunk)
    one = problem(shape)
    q, k, v = (x.detach().double().requires_grad_() for x in one.arguments[:3])
    group = q.shape[1] // k.shape[1]
    sequence = torch.repeat_interleave(torch.tensor(lengths(shape)))
    seen = (sequence[:, None] == sequence) & torch.ones(len(q), len(q), dtype=torch.bool).tril()
    wide = [x.repeat_interleave(group, 1) for x in (k, v)]
    score = torch.einsum("thk,shk->hts", q, wide[0]) * q.shape[2] ** -0.5
    p = score.masked_fill(~seen, -torch.inf).softmax(-1)
    out = torch.einsum("hts,shk->thk", p, wide[1])
    assert one.upstream is not None
    out.backward(one.upstream.double())
    found, gradients = OP.reference(one)
    torch.testing.assert_close(found, out.detach().float(), rtol=1e-6, atol=1e-7)
    for name, leaf in (("q", q), ("k", k), ("v", v)):
        assert leaf.grad is not None
        torch.testing.assert_close(gradients[name], leaf.grad.float(), rtol=1e-6, atol=1e-7)


# -- peers ---------------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
    return ours(q, k, v, bounds, longest, backend="reference")


class Stand:
    """Stands for torch's and flash-attn's functions; notes heads, and torch's mode backward."""

    def __init__(self) -> None:
        self.heads: set[tuple[int, int]] = set()
        self.modes: set[tuple[bool, bool]] = set()

    def note(self, gradient: Tensor) -> None:
        fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        self.modes.add((torch.are_deterministic_algorithms_enabled(), fill))

    def run(self, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
        self.heads.add((q.shape[1], k.shape[1]))
        out = attend(q, k, v, bounds, longest)
        if out.requires_grad:
            out.register_hook(self.note)
        return out

    def varlen(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        window_size: tuple[int, int],
        enable_gqa: bool = False,
    ) -> Tensor:
        assert window_size == (-1, 0) and cu_seq_q is cu_seq_k and max_q == max_k
        assert enable_gqa == (query.shape[1] != key.shape[1])
        return self.run(query, key, value, cu_seq_q, max_q)

    def flash(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, None]:
        assert options["causal"] and options["cu_seqlens_q"] is options["cu_seqlens_k"]
        assert options["max_seqlen_q"] == options["max_seqlen_k"]
        return self.run(q, k, v, options["cu_seqlens_q"], options["max_seqlen_q"]), None


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Stand:
    """Peers think that they are on a GPU, where torch's varlen and flash-attn 3 are installed."""
    found = Stand()
    monkeypatch.setattr(packed_attention, "_on_gpu", lambda one: one.arguments)
    for module, name, function in (
        ("torch.nn.attention.varlen", "varlen_attn", found.varlen),
        ("flash_attn_interface", "flash_attn_varlen_func", found.flash),
        ("flash_attn", "something_else", None),
        ("flash_attn.cute", "something_else", None),
    ):
        made = types.ModuleType(module)
        setattr(made, name, function)
        monkeypatch.setitem(sys.modules, module, made)
    return found


def measured(
    monkeypatch: pytest.MonkeyPatch, *names: str, shape: str = "S9xB3xH4xN2xK8xragged"
) -> dict[str, Any]:
    """Measurements of ours and the peers that are named, by name."""
    monkeypatch.setattr(providers, "ROUNDS", 2)
    chosen = [(p, None) for p in (OP.ours, *OP.peers) if p.name in ("s1fast", *names)]
    assert len(chosen) == 1 + len(names)
    sizes = parse_shape(shape, OP.cpu_sizes)
    result = providers.measure_shape(OP, sizes, chosen, CEILINGS, CPU)
    return {one["provider"]: one for one in result["measurements"]}


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("torch varlen (FA2)", (4, 2)),
        ("torch varlen (FA2), k/v repeated", (4, 4)),
        ("torch varlen (FA2), k/v repeated, deterministic", (4, 4)),
        ("flash-attn 3", (4, 2)),
    ],
)
def test_peers_are_given_the_problem(
    name: str, heads: tuple[int, int], stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = measured(monkeypatch, name)[name]
    assert one["status"] == "ok" and not one["wrong"], one["reason"]
    assert set(one["errors"]) == {"output", "d q", "d k", "d v"}
    assert set(one["tflops"]) == {"forward", "backward", "full"} == set(one["timings"])
    assert stand.heads == {heads}


def test_deterministic_mode_is_its_own(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    """In force backward, without filling memory, and for no other provider."""
    name = "torch varlen (FA2), k/v repeated"
    before = torch.are_deterministic_algorithms_enabled()
    measured(monkeypatch, f"{name}, deterministic")
    assert stand.modes == {(True, False)}
    stand.modes.clear()
    measured(monkeypatch, name)
    assert {mode for mode, _ in stand.modes} == {before}
    assert torch.are_deterministic_algorithms_enabled() == before


def test_missing_peers_say_why(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("torch varlen (FA2)", "flash-attn 4", "flash-attn 2", "s1fast, forward in Gluon")

    def old(query: Tensor, key: Tensor) -> None:
        """torch 2.11's, which knows no grouped heads."""

    monkeypatch.setattr(sys.modules["torch.nn.attention.varlen"], "varlen_attn", old)
    found = measured(monkeypatch, *names)
    assert {found[name]["status"] for name in names} == {"missing"}
    assert "takes no grouped heads" in found[names[0]]["reason"]
    assert "'gluon' needs tensors on CUDA" in found[names[3]]["reason"]
    assert found["flash-attn 2"]["reason"] == "flash_attn has no flash_attn_varlen_func"


def test_document_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention, not compiled here, sees what it should; it has no backward on a CPU."""
    monkeypatch.setattr(packed_attention, "_on_gpu", lambda one: one.arguments)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    one = problem("S150xB3xH4xN2xK16xragged")
    forward = packed_attention.flex(one)
    found: list[Tensor] = []
    one.inference(lambda: found.append(forward()) or found[0])
    wanted, _ = OP.reference(one)
    torch.testing.assert_close(found[0], wanted, rtol=1e-4, atol=1e-5)


def test_cudnn_is_called_as_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments bind to the operator's schema in the right places."""
    monkeypatch.setattr(packed_attention, "_on_gpu", lambda one: one.arguments)
    schema = torch.ops.aten._cudnn_attention_forward.default._schema
    seen: dict[str, Any] = {}

    def note(*arguments: Any) -> list[Tensor]:
        seen.update(zip((a.name for a in schema.arguments), arguments, strict=False))
        return [attend(arguments[0], *arguments[1:3], arguments[4], arguments[6])]

    monkeypatch.setattr(torch.ops.aten, "_cudnn_attention_forward", note)
    one = problem("S9xB3xH4xN2xK8xragged")
    out = packed_attention.cudnn(one)()
    torch.testing.assert_close(out.detach(), OP.reference(one)[0], rtol=1e-4, atol=1e-5)
    assert seen["is_causal"] is True and seen["compute_log_sumexp"] is True
    assert seen["dropout_p"] == 0 and seen["attn_bias"] is None
    assert seen["cum_seq_q"] is seen["cum_seq_k"] and seen["max_q"] == seen["max_k"]
    assert seen["key"].shape == seen["query"].shape


# -- the command ---------------------------------------------------------------------------------


def test_shapes_find_their_operation() -> None:
    def taken(*texts: str) -> list[tuple[str, int]]:
        return [(op.name, next(iter(s.values()))) for op, s in given(*texts)]

    def given(*texts: str) -> list[tuple[Op, dict[str, int]]]:
        return kernels._given(texts, kernels.OPS, CPU)

    assert taken("T8", "S16xB2", "peaked", "K32xragged") == [
        ("linear_cross_entropy", 8),
        ("packed_attention", 16),
        ("linear_cross_entropy", 96),
        ("packed_attention", 24),
    ]
    for text, naming in (
        ("S16xQ5", "'Q5' is no size of S, B, H, N, K, ragged"),
        ("S16xT5", "'S16' is no size of T, D, V"),
        ("Q5", "'Q5' is no size of T, D, V"),
        ("S16xH0", "H must be at least 1"),
    ):
        with pytest.raises(InputError, match=naming):
            given(text)


@pytest.mark.parametrize(
    ("shape", "naming"),
    [("H5xN2", "H5 is no multiple of N2"), ("S999999999999", "cannot be made")],
)
def test_bad_shapes(shape: str, naming: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=naming):
        kernels.run(kernels.KernelsConfig(shape=(shape,), once=True))


@pytest.fixture
def result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run of every operation on its first shape, as without flags."""
    monkeypatch.setattr(kernels, "roofs", lambda: CEILINGS)
    monkeypatch.setattr(providers, "ROUNDS", 2)
    monkeypatch.setattr(Op, "shapes", lambda op, _: op.cpu_shapes[:1])
    kernels.run(kernels.KernelsConfig(output=tmp_path / "all"))
    (path,) = (tmp_path / "all").glob("*.json")
    assert path.with_suffix(".png").stat().st_size > 10_000
    return json.loads(path.read_text())


def test_operations_share_a_result(result: dict[str, Any]) -> None:
    """One file and one picture, though the operations have different providers."""
    assert result["complete"]
    assert [shape["op"] for shape in result["shapes"]] == [op.name for op in kernels.OPS]
    for shape in result["shapes"]:
        one = shape["measurements"][0]
        if shape["op"] == "gemv":  # csrc needs a GPU; its own bench tests say the rest
            assert one["status"] == "missing"
            continue
        assert one["status"] == "ok" and not one["wrong"]
        row = report.cells(shape)[0]
        assert len(row) == len(report.HEADER)
        if shape["flops"]:
            modes = ("forward", "backward", "full") if "forward" in one["timings"] else ("full",)
            rates = [f"{one['tflops'][mode]:.3g}" for mode in modes]
            assert row[5] == " / ".join(rates)
