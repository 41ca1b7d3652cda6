"""Fused linear cross-entropy against float64 autograd, by the reference and by the Triton kernel.

Where there is no GPU the kernel runs in Triton's interpreter on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from s1fast.kernels import linear_cross_entropy as lce
from s1fast.kernels import softmax_gradient as rows
from s1fast.kernels.linear_cross_entropy import linear_cross_entropy
from tolerances import check_against_eager

ON_GPU = torch.cuda.is_available()
PATHS = ["reference", pytest.param("triton", marks=[pytest.mark.gpu] if ON_GPU else [])]
SMALL_TILES = {torch.bfloat16: (1, 2, 2), torch.float32: (1, 2, 2)}
"""512 columns of bf16 and 256 of fp32 a tile: small vocabularies then take several."""

# Half a unit in the last place, relative: what one rounding costs.
ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
# Sums of at most 1,100 terms, pairwise or in tiles: their errors stay below 50 roundings.
FP32 = 50 * ROUNDING[torch.float32]
# A logit of 24 bf16 products, mostly below 5 in size, is rounded once, so a probability is off by
# up to 5 * 2^-8, half of that in norm; the gradient's own two roundings are small beside it.
BF16 = 2.5 * ROUNDING[torch.bfloat16]
TOLERANCE = {torch.float64: 50 * ROUNDING[torch.float64], torch.float32: FP32, torch.bfloat16: BF16}


def gap(found: Tensor, wanted: Tensor) -> float:
    """Relative error in norm."""
    found, wanted = found.double().cpu(), wanted.double().cpu()
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture(params=PATHS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where tensors go for a path; kernels then run with small tiles, fewer programs than rows."""
    if request.param == "reference":
        yield "cpu"
        return
    monkeypatch.setattr(rows, "_CONFIG", SMALL_TILES)
    monkeypatch.setattr(rows, "num_programs", lambda x: 3)
    monkeypatch.setattr(lce, "num_programs", lambda x: 3)
    if not ON_GPU:
        monkeypatch.setattr(rows, "reference_", rows.triton_)
    yield "cuda" if ON_GPU else "cpu"


@dataclass
class Problem:
    """Hidden states, head, labels on some rows only, and positive weights."""

    num_rows: int = 37
    width: int = 24
    vocab: int = 101
    labelled: int = 20
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype | None = None
    device: str = "cpu"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(self.num_rows)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        self.hidden_TD = normal(self.num_rows, self.width).to(self.device, self.dtype)
        self.weight_VD = normal(self.vocab, self.width).to(
            self.device, self.weight_dtype or self.dtype
        )
        chosen = torch.randperm(self.num_rows, generator=draw)[: self.labelled].sort().values
        label_T = torch.full((self.num_rows,), -100)
        label_T[chosen] = torch.randint(self.vocab, (self.labelled,), generator=draw)
        loss_weight_T = torch.zeros(self.num_rows)
        loss_weight_T[chosen] = torch.rand(self.labelled, generator=draw) + 0.1
        self.valid_rows: Tensor | None = chosen.to(self.device)
        self.label_T, self.loss_weight_T = label_T.to(self.device), loss_weight_T.to(self.device)

    @property
    def masked(self) -> Tensor:
        return self.label_T == -100

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """With hidden states and head that want gradients."""
        hidden_TD, weight_VD = (
            x.detach().clone().requires_grad_() for x in (self.hidden_TD, self.weight_VD)
        )
        return hidden_TD, weight_VD, self.label_T, self.loss_weight_T, self.valid_rows

    def ours(self, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, d hidden and d weight of `scale` times the loss."""
        arguments = self.arguments()
        loss = linear_cross_entropy(*arguments, **self.options)
        (loss * scale).backward()
        hidden_TD, weight_VD, *_ = arguments
        assert hidden_TD.grad is not None and weight_VD.grad is not None
        return loss.detach(), hidden_TD.grad, weight_VD.grad

    def exact(
        self, scale: float = 1.0, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same by torch's autograd, in float64 unless asked otherwise, all logits held."""
        hidden_TD, weight_VD = (
            x.to(dtype).clone().requires_grad_() for x in (self.hidden_TD, self.weight_VD)
        )
        logits_TV = hidden_TD @ weight_VD.T
        wide_TV = logits_TV.to(torch.promote_types(dtype, torch.float32))
        nll_T = F.cross_entropy(wide_TV, self.label_T, reduction="none")
        loss = (nll_T * self.loss_weight_T).sum()
        (loss * scale).backward()
        assert hidden_TD.grad is not None and weight_VD.grad is not None
        return loss.detach(), hidden_TD.grad, weight_VD.grad


def chunk_bytes(problem: Problem, num_rows: int) -> int:
    return num_rows * lce._row_bytes(problem.hidden_TD, problem.weight_VD)


# -- values ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("chunk_rows", [1, 7, 20, 1000])
@pytest.mark.parametrize("vocab", [101, 1024, 1100], ids="V{}".format)
@pytest.mark.parametrize("labelled", [20, 37], ids=["masked", "unmasked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_float64s(
    device: str, dtype: torch.dtype, labelled: int, vocab: int, chunk_rows: int
) -> None:
    """Values and both gradients; chunks of one row, of a ragged number, of exactly all, of more;
    a vocabulary less than a tile, of whole tiles, of whole tiles and a rest."""
    problem = Problem(dtype=dtype, labelled=labelled, vocab=vocab, device=device)
    # d weight is rounded once in each chunk's sum: in bf16 that shows, so it is summed in fp32.
    problem.options = {
        "max_chunk_bytes": chunk_bytes(problem, chunk_rows),
        "accum_dtype": torch.float32,
    }
    found, wanted = problem.ours(scale=3.0), problem.exact(scale=3.0)
    assert found[0].dtype == torch.float32
    for a, b in zip(found, wanted, strict=True):
        assert gap(a, b) <= TOLERANCE[dtype]
    assert found[1].dtype == found[2].dtype == dtype


@pytest.mark.parametrize("labelled", [20, 37], ids=["masked", "unmasked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_errors_are_eagers(device: str, dtype: torch.dtype, labelled: int) -> None:
    """Element by element no further from float64 than twice torch's own in the same dtype."""
    problem = Problem(dtype=dtype, labelled=labelled, vocab=1100, device=device)
    results = problem.ours(), problem.exact(), problem.exact(dtype=dtype)
    for name, found, exact, eager in zip(("loss", "dhidden", "dweight"), *results, strict=True):
        check_against_eager(found, exact, eager, name)


@pytest.mark.parametrize("labelled", [20, 37], ids=["masked", "unmasked"])
def test_float64(labelled: int) -> None:
    problem = Problem(dtype=torch.float64, labelled=labelled)
    problem.options = {"max_chunk_bytes": chunk_bytes(problem, 7)}
    for a, b in zip(problem.ours(3.0), problem.exact(3.0), strict=True):
        assert a.dtype == torch.float64
        assert gap(a, b) <= TOLERANCE[torch.float64]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("accum_dtype", [None, torch.float32], ids=str)
def test_bf16_sums_over_chunks(device: str, accum_dtype: torch.dtype | None) -> None:
    """Twenty chunks summed in bf16 cost up to twenty roundings of d weight; in fp32, one."""
    problem = Problem(dtype=torch.bfloat16, device=device)
    whole = problem.ours()[2]
    problem.options = {"max_chunk_bytes": chunk_bytes(problem, 1), "accum_dtype": accum_dtype}
    error = gap(problem.ours()[2], whole)
    if accum_dtype is None:
        assert ROUNDING[torch.bfloat16] / 2 < error <= 20 * ROUNDING[torch.bfloat16]
    else:
        # A GPU's product of one row sums in another order than that of all: logits round otherwise.
        assert error <= ROUNDING[torch.bfloat16] * (1 if device == "cuda" else 0.5)


@pytest.mark.usefixtures("poisoned")
def test_fp32_head_under_bf16(device: str) -> None:
    """The head is used in bf16, its gradient comes in fp32, without a rounding at the end."""
    problem = Problem(dtype=torch.bfloat16, weight_dtype=torch.float32, device=device)
    problem.options = {"max_chunk_bytes": chunk_bytes(problem, 7)}
    found, wanted = problem.ours(), problem.exact()
    assert [x.dtype for x in found] == [torch.float32, torch.bfloat16, torch.float32]
    for a, b in zip(found, wanted, strict=True):
        assert gap(a, b) <= BF16
    assert not torch.equal(found[2], found[2].bfloat16().float())


@pytest.mark.usefixtures("poisoned")
def test_log_probabilities(device: str) -> None:
    """Those of the labels, 0 where masked; no gradient flows back from them."""
    problem = Problem(device=device)
    hidden_TD, weight_VD, *rest = problem.arguments()
    loss, logprob_T = linear_cross_entropy(hidden_TD, weight_VD, *rest, return_logprobs=True)
    logits_TV = hidden_TD.detach().double() @ weight_VD.detach().double().T
    wanted_T = -F.cross_entropy(logits_TV, problem.label_T, reduction="none")
    assert logprob_T.shape == (37,) and not logprob_T.requires_grad
    assert gap(logprob_T, wanted_T) <= FP32
    assert logprob_T[problem.masked].count_nonzero() == 0
    assert loss.requires_grad
    assert gap(loss.detach(), -(wanted_T * problem.loss_weight_T).sum()) <= FP32


def test_row_index_may_be_left_out(device: str) -> None:
    """Then rows of weight 0 and of a label outside the vocabulary are found to be masked too."""
    problem = Problem(device=device)
    with_index = problem.ours()
    problem.valid_rows = None
    assert all(torch.equal(a, b) for a, b in zip(problem.ours(), with_index, strict=True))
    light = problem.label_T.clone()
    first = (~problem.masked).nonzero()[0, 0]
    problem.loss_weight_T[first] = 0.0
    problem.hidden_TD[first] = float("nan")
    weightless = problem.ours()
    problem.label_T[first] = -100
    assert all(torch.equal(a, b) for a, b in zip(problem.ours(), weightless, strict=True))
    problem.label_T = light
    problem.label_T[first], problem.loss_weight_T[first] = 101, 1.0
    assert all(torch.equal(a, b) for a, b in zip(problem.ours(), weightless, strict=True))


def test_runs_are_bit_identical(device: str) -> None:
    problem = Problem(dtype=torch.bfloat16, device=device)
    first = problem.ours()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(problem.ours(), first, strict=True))


def test_rows_do_not_touch_each_other(device: str) -> None:
    """Another row's content changes no bit of this one's gradient or log-probability."""
    one, other = Problem(labelled=37, device=device), Problem(labelled=37, device=device)
    other.hidden_TD[20:] *= 7
    other.label_T[20:] = 0
    logprobs = [linear_cross_entropy(*p.arguments(), return_logprobs=True)[1] for p in (one, other)]
    assert torch.equal(logprobs[0][:20], logprobs[1][:20])
    assert torch.equal(one.ours()[1][:20], other.ours()[1][:20])


# -- hard cases --------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned")
def test_masked_rows_reach_nothing(device: str) -> None:
    """NaN, labels and weights in rows without a label."""
    clean, dirty = Problem(device=device), Problem(device=device)
    masked = clean.masked
    dirty.hidden_TD[masked] = float("nan")
    dirty.label_T[masked] = 1 << 40
    dirty.loss_weight_T[masked] = float("inf")
    found, wanted = dirty.ours(), clean.ours()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert found[1][masked].count_nonzero() == 0
    assert (found[1][~masked].abs().sum(1) > 0).all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("num_rows", [0, 37])
@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
def test_no_rows_give_zero(device: str, num_rows: int, index: bool) -> None:
    problem = Problem(num_rows=num_rows, labelled=0, device=device)
    if not index:
        problem.valid_rows = None
    loss, dhidden_TD, dweight_VD = problem.ours()
    assert loss == 0.0
    assert dhidden_TD.shape == (num_rows, 24) and dhidden_TD.count_nonzero() == 0
    assert dweight_VD.shape == (101, 24) and dweight_VD.count_nonzero() == 0


def test_huge_logits(device: str) -> None:
    """Thousands: exp overflows unless the maximum is taken out first."""
    problem = Problem(device=device)
    problem.hidden_TD *= 1e3
    # The softmax is 0 or 1 here: nothing of the logits' absolute error reaches the gradients.
    for a, b in zip(problem.ours(), problem.exact(), strict=True):
        assert gap(a, b) <= FP32


def test_a_nan_in_a_used_row_shows(device: str) -> None:
    problem = Problem(device=device)
    assert problem.valid_rows is not None
    problem.hidden_TD[problem.valid_rows[3]] = float("nan")
    assert problem.ours()[0].isnan()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
@pytest.mark.parametrize("labelled", [20, 37], ids=["masked", "unmasked"])
def test_bad_labels_count_as_masked(device: str, index: bool, labelled: int) -> None:
    problem = Problem(labelled=labelled, device=device)
    assert problem.valid_rows is not None
    spoilt = problem.valid_rows[[1, 5, 9]]
    wanted = Problem(labelled=labelled, device=device)
    wanted.loss_weight_T[spoilt] = 0.0
    problem.label_T[spoilt] = torch.tensor([101, -1, 1 << 40], device=device)
    if not index:
        problem.valid_rows = None
    counter = torch.tensor(4, device=device)
    problem.options = {"bad_labels": counter}
    found = problem.ours()
    assert counter == 7
    for a, b in zip(found, wanted.exact(), strict=True):
        assert gap(a, b) <= FP32
    assert found[1][spoilt].count_nonzero() == 0


def logits_and_gradient(
    device: str, logits_CV: Tensor, label_C: Tensor, weight_C: Tensor
) -> tuple[Tensor, Tensor]:
    """(gradient, logprob) of the row operation."""
    grad_CV = logits_CV.clone().to(device)
    logprob_C = rows.softmax_gradient_(grad_CV, label_C.to(device), weight_C.to(device))
    return grad_CV.cpu(), logprob_C.cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saturated_true_class(device: str, dtype: torch.dtype) -> None:
    """p - 1 and log p keep their relative precision however close p comes to 1."""
    lead_C = torch.tensor([0.0, 5.0, 10.0, 20.0, 40.0, 60.0])
    logits_CV = torch.randn(6, 700, generator=torch.Generator().manual_seed(0)).to(dtype)
    label_C = torch.tensor([0, 255, 256, 511, 512, 699])
    logits_CV[torch.arange(6), label_C] = (8 + lead_C).to(dtype)
    weight_C = torch.linspace(0.5, 2.0, 6)
    grad_CV, logprob_C = logits_and_gradient(device, logits_CV, label_C, weight_C)
    exact_CV = logits_CV.double()
    own_C = exact_CV.gather(1, label_C[:, None])[:, 0]
    others_C = exact_CV.scatter(1, label_C[:, None], -torch.inf).logsumexp(1)
    ratio_C = (others_C - own_C).exp()
    wanted_C = -weight_C * ratio_C / (1 + ratio_C)
    found_C = grad_CV.gather(1, label_C[:, None])[:, 0]
    assert ((found_C - wanted_C) / wanted_C).abs().max() <= max(ROUNDING[dtype], FP32) * 1.01
    assert ((logprob_C + ratio_C.log1p()) / ratio_C.log1p()).abs().max() <= FP32
    # The row sums to 0 as well as its dtype can hold.
    assert grad_CV.double().sum(1).abs().max() <= 2 * ROUNDING[dtype] + FP32


def test_extreme_rows(device: str) -> None:
    """One class alone, classes of -inf, a true class far below: finite and right."""
    inf = float("inf")
    one = logits_and_gradient(device, torch.tensor([[3.0]]), torch.tensor([0]), torch.tensor([2.0]))
    assert one[0] == 0.0 and one[1] == 0.0
    logits_CV = torch.tensor([[0.0, -inf, -inf, 0.0], [200.0, 0.0, -inf, 0.0]])
    grad_CV, logprob_C = logits_and_gradient(
        device, logits_CV, torch.tensor([3, 1]), torch.tensor([1.0, 0.5])
    )
    assert torch.allclose(logprob_C, torch.tensor([-(2.0**0.5) * 0.4901291, -200.0]), rtol=1e-6)
    wanted_CV = torch.tensor([[0.5, 0.0, 0.0, -0.5], [0.5, -0.5, 0.0, 0.0]])
    assert torch.allclose(grad_CV, wanted_CV, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_weight_zero_are_not_looked_at(device: str, dtype: torch.dtype) -> None:
    logits_CV = torch.full((5, 1100), float("nan"), dtype=dtype)
    logits_CV[1::2] = 0.0
    weight_C = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0])
    grad_CV, logprob_C = logits_and_gradient(
        device, logits_CV, torch.zeros(5, dtype=torch.int64), weight_C
    )
    assert grad_CV[::2].count_nonzero() == 0 and logprob_C[::2].count_nonzero() == 0
    assert grad_CV[1::2].isfinite().all() and (grad_CV[1::2] != 0).all()


def test_rows_beyond_int32(device: str) -> None:
    """The stride fits in 32 bits, the third row's offset does not; a CPU backs what is used."""
    vocab, stride = 600, (1 << 30) + 64
    storage = torch.empty(2 * stride + vocab, dtype=torch.bfloat16, device=device)
    logits_CV = storage.as_strided((3, vocab), (stride, 1))
    small_CV = torch.randn(3, vocab, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits_CV.copy_(small_CV)
    label_C, weight_C = torch.tensor([3, 599, 0]), torch.tensor([1.0, 0.25, 2.0])
    wanted_CV, wanted_C = logits_and_gradient(device, small_CV, label_C, weight_C)
    logprob_C = rows.softmax_gradient_(logits_CV, label_C.to(device), weight_C.to(device))
    assert torch.equal(logits_CV.cpu(), wanted_CV)
    # Rows that are no multiple of 16 apart are read by other vectors, so summed in another order.
    torch.testing.assert_close(logprob_C.cpu(), wanted_C, rtol=2**-21, atol=0)


def test_first_and_last_class(device: str) -> None:
    problem = Problem(device=device)
    assert problem.valid_rows is not None
    problem.label_T[problem.valid_rows[:2]] = torch.tensor([0, 100], device=device)
    counter = torch.zeros((), dtype=torch.int64, device=device)
    problem.options = {"bad_labels": counter}
    for a, b in zip(problem.ours(), problem.exact(), strict=True):
        assert gap(a, b) <= FP32
    assert counter == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shipped_tiles(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    """The configurations that are launched on a GPU, on rows of a tile and a rest."""
    monkeypatch.setattr(rows, "_CONFIG", SHIPPED)
    constants, _ = rows._launch_options(dtype)
    vocab = constants["J"] * constants["LANES"] + 1001
    logits_CV = torch.randn(4, vocab, generator=torch.Generator().manual_seed(0)).to(dtype)
    label_C = torch.tensor([0, vocab - 1, vocab - 1001, vocab - 1002])
    weight_C = torch.tensor([1.0, 0.5, 2.0, 1.0])
    grad_CV, logprob_C = logits_and_gradient(device, logits_CV, label_C, weight_C)
    exact_CV = logits_CV.double().requires_grad_()
    nll_C = F.cross_entropy(exact_CV, label_C, reduction="none")
    (nll_C * weight_C).sum().backward()
    assert exact_CV.grad is not None
    assert gap(logprob_C, -nll_C.detach()) <= FP32
    assert gap(grad_CV, exact_CV.grad) <= max(ROUNDING[dtype], FP32)


SHIPPED = dict(rows._CONFIG)


# -- what is computed and kept -----------------------------------------------------------------


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """(M, N, K) of every matrix product that is taken from now on."""
    taken: list[tuple[int, int, int]] = []
    mm, addmm = torch.mm, torch.addmm

    def count_mm(a: Tensor, b: Tensor, **options: Any) -> Tensor:
        taken.append((a.shape[0], b.shape[1], a.shape[1]))
        return mm(a, b, **options)

    def count_addmm(c: Tensor, a: Tensor, b: Tensor, **options: Any) -> Tensor:
        taken.append((a.shape[0], b.shape[1], a.shape[1]))
        return addmm(c, a, b, **options)

    monkeypatch.setattr(torch, "mm", count_mm)
    monkeypatch.setattr(torch, "addmm", count_addmm)
    return taken


def test_masked_rows_are_in_no_product(products: list[tuple[int, int, int]]) -> None:
    problem = Problem()
    problem.options = {"max_chunk_bytes": chunk_bytes(problem, 7)}
    problem.ours()
    logits = [size for size in products if size[1:] == (101, 24)]
    assert [size[0] for size in logits] == [7, 7, 6]
    assert len(products) == 9
    assert sum(m * n * k for m, n, k in products) == 3 * 20 * 101 * 24


def test_only_what_is_asked_for_is_computed(products: list[tuple[int, int, int]]) -> None:
    """Under no_grad or with nothing to differentiate: the logits; with a frozen side, two."""
    hidden_TD, weight_VD, *rest = Problem().arguments()
    frozen = hidden_TD.detach(), weight_VD.detach()
    logits, dhidden, dweight = (20, 101, 24), (20, 24, 101), (101, 24, 20)

    def taken(hidden_TD: Tensor, weight_VD: Tensor) -> tuple[list[tuple[int, int, int]], Tensor]:
        products.clear()
        loss = linear_cross_entropy(hidden_TD, weight_VD, *rest)
        return list(products), loss

    with torch.no_grad():
        assert taken(hidden_TD, weight_VD)[0] == [logits]
    sizes, loss = taken(*frozen)
    assert sizes == [logits] and not loss.requires_grad
    sizes, with_grad = taken(hidden_TD, weight_VD)
    assert sizes == [logits, dhidden, dweight]
    assert torch.equal(loss, with_grad)
    with_grad.backward()
    whole = hidden_TD.grad, weight_VD.grad
    hidden_TD.grad = weight_VD.grad = None
    sizes, loss = taken(frozen[0], weight_VD)
    assert sizes == [logits, dweight]
    loss.backward()
    assert whole[1] is not None and torch.equal(weight_VD.grad, whole[1])  # type: ignore[arg-type]
    sizes, loss = taken(hidden_TD, frozen[1])
    assert sizes == [logits, dhidden]
    loss.backward()
    assert whole[0] is not None and torch.equal(hidden_TD.grad, whole[0])  # type: ignore[arg-type]


def test_gradients_are_handed_on_without_a_copy(device: str) -> None:
    """What forward computed is what .grad holds, unscaled, when the upstream gradient is 1."""
    hidden_TD, weight_VD, *rest = Problem(device=device).arguments()
    outputs = lce._op(hidden_TD, weight_VD, *rest, True, True, torch.float32, 1 << 20)
    addresses = [x.data_ptr() for x in outputs[3:]]
    before = outputs[4].clone()
    loss = outputs[0]
    del outputs
    loss.backward()
    assert hidden_TD.grad is not None and weight_VD.grad is not None
    assert [hidden_TD.grad.data_ptr(), weight_VD.grad.data_ptr()] == addresses
    assert torch.equal(weight_VD.grad, before)


def test_backward_walks_once(device: str) -> None:
    loss = linear_cross_entropy(*Problem(device=device).arguments())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once: compute the loss again"):
        loss.backward()


@pytest.mark.parametrize("numel", [1, 4096, 3 * 3 * 4096 * 8 + 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", [pytest.param("triton", marks=PATHS[1].marks)], indirect=True)
def test_scale_kernel(device: str, dtype: torch.dtype, numel: int) -> None:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    found = x.clone()
    lce.scale_(found, torch.tensor(1.0, device=device))
    assert torch.equal(found, x)
    lce.scale_(found, torch.tensor(-0.3, device=device))
    assert torch.equal(found, (x.float() * -0.3).to(dtype))


# -- chunks ------------------------------------------------------------------------------------


@given(num_rows=st.integers(0, 100_000), most=st.integers(1, 40_000))
def test_chunks_cover_all_rows_within_the_limit(num_rows: int, most: int) -> None:
    chunks = list(lce._chunks(num_rows, most))
    assert [i for c in chunks[:3] for i in (c.start, c.stop)] == sorted(
        i for c in chunks[:3] for i in (c.start, c.stop)
    )
    assert [c.start for c in chunks] == [0, *[c.stop for c in chunks[:-1]]][: len(chunks)]
    assert (chunks[-1].stop if chunks else 0) == num_rows
    sizes = [c.stop - c.start for c in chunks]
    assert all(0 < size <= most for size in sizes)
    assert len(set(sizes[:-1])) <= 1
    if len(sizes) > 1:
        assert sizes[0] == (lce.CHUNK_ROWS if most >= lce.CHUNK_ROWS else sizes[0])
        assert sizes[0] % 128 == 0 or most < 128


def test_chunks_of_qwen() -> None:
    """At V 152,064 and D 5,120 in bf16: one chunk where it fits, else five exact waves."""
    hidden_TD = torch.empty(1, 5120, dtype=torch.bfloat16, device="meta")
    weight_VD = torch.empty(152064, 5120, dtype=torch.bfloat16, device="meta")
    most = lce.CHUNK_BYTES["cuda"] // lce._row_bytes(hidden_TD, weight_VD)
    sizes = {n: [c.stop - c.start for c in lce._chunks(n, most)] for n in (4700, 32768)}
    assert sizes == {4700: [4700], 32768: [4224] * 7 + [3200]}
    assert lce.CHUNK_ROWS / 128 * (5120 / 256) == 5 * 132


# -- compilers and torch.library ---------------------------------------------------------------


@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
@pytest.mark.parametrize("needs_grad", [True, False], ids=["train", "evaluate"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(index: bool, needs_grad: bool, weight_dtype: torch.dtype) -> None:
    problem = Problem(dtype=torch.bfloat16, weight_dtype=weight_dtype)
    hidden_TD, weight_VD, label_T, loss_weight_T, valid_rows = problem.arguments()
    if not needs_grad:
        hidden_TD, weight_VD = hidden_TD.detach(), weight_VD.detach()
    rest = (label_T, loss_weight_T, valid_rows if index else None)
    flags = (needs_grad, needs_grad, weight_dtype, 1 << 20)
    torch.library.opcheck(lce._op, (hidden_TD, weight_VD, *rest, *flags))


def test_compiles_whole(device: str) -> None:
    """fullgraph, with another number of tokens and rows later, equal to eager bit for bit."""

    def loss(*arguments: Any) -> Tensor:
        return linear_cross_entropy(*arguments) * 2.5

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for num_rows, labelled in ((37, 20), (41, 41), (23, 9)):
        problem = Problem(num_rows=num_rows, labelled=labelled, device=device)
        results = []
        for call in (loss, compiled):
            arguments = problem.arguments()
            value = call(*arguments)
            value.backward()
            results.append((value.detach(), arguments[0].grad, arguments[1].grad))
        for a, b in zip(*results, strict=True):
            assert a is not None and b is not None and torch.equal(a, b)


# -- bad input ---------------------------------------------------------------------------------


def replaced(name: str, change: Callable[[Any], Any]) -> Callable[[Problem], None]:
    return lambda problem: setattr(problem, name, change(getattr(problem, name)))


BAD: dict[str, tuple[str, Callable[[Problem], None]]] = {
    "hidden 1-d": (r"hidden_TD has shape \(24,\).*\(T, D\)", replaced("hidden_TD", lambda x: x[0])),
    "hidden int": ("hidden_TD .*int64.*bfloat16", replaced("hidden_TD", lambda x: x.long())),
    "hidden fp16": ("hidden_TD .*float16.*bfloat16", replaced("hidden_TD", lambda x: x.half())),
    "hidden meta": ("hidden_TD is on meta", replaced("hidden_TD", lambda x: x.to("meta"))),
    "hidden strided": (
        r"hidden_TD .*strides.*contiguous\(\)",
        replaced("hidden_TD", lambda x: x.T.contiguous().T),
    ),
    "hidden expanded": (
        r"hidden_TD .*strides.*contiguous\(\)",
        replaced("hidden_TD", lambda x: x[:1].expand(37, 24)),
    ),
    "weight 1-d": (r"weight_VD has shape .*\(V, 24\)", replaced("weight_VD", lambda x: x[0])),
    "widths differ": (r"weight_VD .*\(101, 23\).*24", replaced("weight_VD", lambda x: x[:, 1:])),
    "no class": (r"weight_VD has shape \(0, 24\)", replaced("weight_VD", lambda x: x[:0])),
    "head narrower": (
        "weight_VD .*bfloat16.*float32",
        replaced("weight_VD", lambda x: x.bfloat16()),
    ),
    "head meta": ("weight_VD .*meta.*cpu", replaced("weight_VD", lambda x: x.to("meta"))),
    "head strided": ("weight_VD .*strides", replaced("weight_VD", lambda x: x.T.contiguous().T)),
    "too few labels": (r"label_T .*\(36,\).*37", replaced("label_T", lambda x: x[1:])),
    "labels 2-d": (r"label_T .*\(37, 1\).*37", replaced("label_T", lambda x: x[:, None])),
    "int32 labels": ("label_T .*int32.*int64", replaced("label_T", lambda x: x.int())),
    "labels meta": ("label_T .*meta.*cpu", replaced("label_T", lambda x: x.to("meta"))),
    "too few weights": (r"loss_weight_T .*36.*37", replaced("loss_weight_T", lambda x: x[1:])),
    "bf16 weights": (
        "loss_weight_T .*bfloat16.*float32",
        replaced("loss_weight_T", lambda x: x.bfloat16()),
    ),
    "int32 rows": ("valid_rows .*int32.*int64", replaced("valid_rows", lambda x: x.int())),
    "mask for rows": ("valid_rows .*bool.*int64", replaced("valid_rows", lambda x: x > 0)),
    "rows 2-d": (r"valid_rows .*\(R\)", replaced("valid_rows", lambda x: x[:, None])),
    "too many rows": ("valid_rows .*at most.*37", replaced("valid_rows", lambda x: x.repeat(2))),
    "a row twice": ("valid_rows .*once", replaced("valid_rows", lambda x: x[[0, 1, 1]])),
    "a row too high": (r"valid_rows .*\[0, 37\)", replaced("valid_rows", lambda x: x + 17)),
    "a row below": (r"valid_rows .*\[0, 37\)", replaced("valid_rows", lambda x: x - 37)),
    "bad_labels int32": (
        "bad_labels .*int32.*int64",
        replaced("options", lambda x: {"bad_labels": torch.zeros((), dtype=torch.int32)}),
    ),
    "bad_labels 1-d": (
        r"bad_labels .*\(1,\)",
        replaced("options", lambda x: {"bad_labels": torch.zeros(1, dtype=torch.int64)}),
    ),
    "accum narrower": (
        "accum_dtype torch.bfloat16",
        replaced("options", lambda x: {"accum_dtype": torch.bfloat16}),
    ),
    "no memory": ("max_chunk_bytes 100", replaced("options", lambda x: {"max_chunk_bytes": 100})),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    message, spoil = BAD[name]
    problem = Problem()
    spoil(problem)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(
            problem.hidden_TD,
            problem.weight_VD,
            problem.label_T,
            problem.loss_weight_T,
            problem.valid_rows,
            **problem.options,
        )
