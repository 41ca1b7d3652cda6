"""The AdamW and norm kernels in Triton's interpreter, their reference, and the optimizer on top."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s1fast.config import OptimConfig, TrainConfig, check
from s1fast.errors import InputError
from s1fast.kernels import adamw
from s1fast.kernels.adamw import (
    CHUNK,
    Gradients,
    Shards,
    adamw_,
    gradients,
    sum_of_squares,
)
from s1fast.kernels.jit import INTERPRETED
from s1fast.optimizer import AdamW, learning_rate, learning_rates, local

FP32, BF16 = torch.float32, torch.bfloat16
BETAS = (0.9, 0.95)
EPS = 1e-3  # so large that it shows
CPU = torch.device("cpu")
# No element, one, less than a tile of 2,048, a tile and a bit, one chunk exactly, several.
SHAPES = ((0,), (), (5, 0), (2047,), (64, 33), (CHUNK,), (2, CHUNK + 1111))
SMALL = ((7,), (40, 33), (2051,))

KERNEL = pytest.param(
    "kernel", marks=pytest.mark.skipif(not INTERPRETED, reason="kernels take no CPU tensors here")
)
both = pytest.mark.parametrize("by", ["reference", KERNEL])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Problem:
    """Shards that lie `gap` elements apart in buffers full of NaN, so that a stray access shows."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]] = SHAPES,
        moments: torch.dtype = FP32,
        grads: torch.dtype = FP32,
        gap: int = 16,
    ) -> None:
        self.draw = torch.Generator().manual_seed(len(shapes))
        self.gap = gap
        self.buffers: list[Tensor] = []
        self.shapes = shapes
        self.params = self.place([self.normal(s) for s in shapes], FP32)
        self.exp_avgs = self.place([self.normal(s, 0.1) for s in shapes], moments)
        squares = [(0.1 + self.normal(s, 0.1).abs()) ** 2 for s in shapes]
        self.exp_avg_sqs = self.place(squares, moments)
        self.grads = self.place([self.normal(s) for s in shapes], grads)
        self.decays = [0.1 if i % 2 else 0.0 for i in range(len(shapes))]

    def normal(self, shape: tuple[int, ...], std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.draw) * std

    def place(self, values: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        step = [-(-x.numel() // 16) * 16 + self.gap for x in values]
        buffer = torch.full((16 + sum(step) + self.gap,), math.nan, dtype=dtype)
        start = -buffer.data_ptr() % 16 // dtype.itemsize + self.gap
        self.buffers.append(buffer)
        placed = []
        for x, size in zip(values, step, strict=True):
            placed.append(buffer[start : start + x.numel()].view(x.shape).copy_(x))
            start += size
        return placed

    def shards(self) -> Shards:
        return Shards(self.params, self.exp_avgs, self.exp_avg_sqs, self.decays)

    def exact(self, lr: float, clip: float, step: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Parameters and moments after a step, in float64."""
        found = []
        for i, decay in enumerate(self.decays):
            p, m, v = (
                x[i].double().clone() for x in (self.params, self.exp_avgs, self.exp_avg_sqs)
            )
            g = clip * self.grads[i].double()
            m = BETAS[0] * m + (1 - BETAS[0]) * g
            v = BETAS[1] * v + (1 - BETAS[1]) * g**2
            m_hat, v_hat = m / (1 - BETAS[0] ** step), v / (1 - BETAS[1] ** step)
            found.append((p - lr * decay * p - lr * m_hat / (v_hat.sqrt() + EPS), m, v))
        return found

    def check_surroundings(self) -> None:
        """Between and around the shards everything is NaN still."""
        for buffer, placed in zip(
            self.buffers,
            (self.params, self.exp_avgs, self.exp_avg_sqs, self.grads),
            strict=True,
        ):
            inside = torch.zeros(len(buffer), dtype=torch.bool)
            for x in placed:
                start = (x.data_ptr() - buffer.data_ptr()) // x.itemsize if x.numel() else 0
                inside[start : start + x.numel()] = True
            assert buffer[~inside].isnan().all()
            assert buffer[inside].isfinite().all()


def sent(shards: Shards, grads: Sequence[Tensor], by: str) -> Gradients:
    """The gradients for either way; the kernel's have the table that a GPU would be sent."""
    found = gradients(shards, grads)
    return replace(found, table=adamw._addresses(grads, CPU)) if by == "kernel" else found


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=FP32)


def run(problem: Problem, by: str, lr: float = 1e-2, clip: float = 0.5, step: int = 3) -> None:
    shards = problem.shards()
    found = sent(shards, problem.grads, by)
    adamw_(shards, found, scalar(lr), scalar(clip), step, BETAS, EPS)


def worst(found: Tensor, exact: Tensor, scale: Tensor) -> float:
    """Largest error in units of scale."""
    return float(((found.double() - exact).abs() / scale).max()) if found.numel() else 0.0


@both
@pytest.mark.parametrize("gap", [16, 1, 3])
@pytest.mark.parametrize("moments", [FP32, BF16])
@pytest.mark.parametrize("grads", [FP32, BF16])
def test_a_step_is_float64s(by: str, gap: int, moments: torch.dtype, grads: torch.dtype) -> None:
    """Whole tiles and ragged ends, on boundaries of 16 bytes (gap 16) and off them.

    A weight is rounded after the decay and after the step, 2^-24 of itself each; the step, at most
    0.2 here, goes through ten roundings of its own, a few of which add up: 4 x 2^-24 of both. A
    moment is rounded four times on the way (2^-24 of its terms each), in bf16 once more (2^-8).
    """
    problem = Problem(moments=moments, grads=grads, gap=gap)
    assert any(x.data_ptr() % 16 for x in problem.params) == (gap != 16)
    exact = problem.exact(lr=1e-2, clip=0.5, step=3)
    kept = [g.clone() for g in problem.grads]
    before = [(m.double(), g.double()) for m, g in zip(problem.exp_avgs, kept, strict=True)]
    run(problem, by)
    problem.check_surroundings()
    for i, (p, m, v) in enumerate(exact):
        old_m, g = before[i]
        assert worst(problem.params[i], p, p.abs() + 0.2) <= 4 * 2.0**-24
        narrow = 2.0**-8 if moments == BF16 else 0.0
        terms = m.abs() * narrow + (old_m.abs() + g.abs()) * 4 * 2.0**-24 + 1e-30
        assert worst(problem.exp_avgs[i], m, terms) <= 1.0
        assert worst(problem.exp_avg_sqs[i], v, v * (narrow + 6 * 2.0**-24) + 1e-30) <= 1.0
        assert problem.grads[i].equal(kept[i])


@pytest.mark.skipif(not INTERPRETED, reason="kernels take no CPU tensors here")
@pytest.mark.parametrize("moments", [FP32, BF16])
def test_kernel_and_reference_agree(moments: torch.dtype) -> None:
    """Step after step: only fused products and the order in which -m/d is scaled differ."""
    ours, theirs = Problem(SMALL, moments), Problem(SMALL, moments)
    for step in range(1, 6):
        run(ours, "kernel", step=step)
        run(theirs, "reference", step=step)
    for a, b in zip(ours.params, theirs.params, strict=True):
        # Five steps of at most 0.2; a bf16 moment that rounds the other way moves one by 2^-8.
        slack = 5 * 0.2 * (2.0**-8 if moments == BF16 else 2.0**-22)
        torch.testing.assert_close(a, b, rtol=5 * 2.0**-23, atol=slack)


@both
def test_two_hundred_steps_are_torchs(by: str) -> None:
    """The same gradients into torch.optim.AdamW, plain loop, in fp32.

    Both do the same operations in the same order, but for: our learning rate is fp32 before it is
    divided by the correction and multiplied with the decay; products are fused or not. So the
    moments agree to a few roundings, since an old one's decays with beta; a weight may be rounded
    the other way, half a unit of its last place, at every step. These add up as a random walk:
    200 of them make sqrt(200) x 0.5 = 7 units, 16 leave room; a mistake in any constant makes
    thousands. A unit is that of the largest value that the weight had, since it may cross 0.
    """
    problem = Problem(SMALL)
    for zeroed in (*problem.exp_avgs, *problem.exp_avg_sqs):
        zeroed.zero_()
    config = OptimConfig(lr=1e-2, betas=BETAS, eps=EPS)
    clones = [nn.Parameter(p.clone()) for p in problem.params]
    pairs = zip(clones, problem.decays, strict=True)
    groups = [{"params": [p], "weight_decay": decay} for p, decay in pairs]
    theirs = torch.optim.AdamW(groups, lr=1e-2, betas=BETAS, eps=EPS, foreach=False)
    shards, lrs = problem.shards(), learning_rates(200, config, CPU)
    largest = [p.detach().abs() for p in clones]
    for step in range(200):
        grads = [problem.normal(s, 10.0 ** (step % 5 - 3)) for s in problem.shapes]
        clip = scalar(0.75 if step % 2 else 1.0)
        adamw_(shards, sent(shards, grads, by), lrs[step], clip, step + 1, BETAS, EPS)
        for group in theirs.param_groups:
            group["lr"] = learning_rate(step, 200, config)
        for parameter, grad in zip(clones, grads, strict=True):
            parameter.grad = grad * clip
        theirs.step()
        largest = [torch.maximum(a, p.detach().abs()) for a, p in zip(largest, clones, strict=True)]
    for i, parameter in enumerate(clones):
        unit = 2.0 ** (largest[i].log2().floor() - 23)
        assert worst(problem.params[i], parameter.detach().double(), unit) <= 16
        state = theirs.state[parameter]
        top = state["exp_avg_sq"].sqrt() + 1e-30
        assert worst(problem.exp_avgs[i], state["exp_avg"].double(), top) <= 8 * 2.0**-24
        assert worst(problem.exp_avg_sqs[i], state["exp_avg_sq"].double(), top**2) <= 8 * 2.0**-24


@both
def test_rate_and_factor_are_read_when_it_runs(by: str) -> None:
    """From the tensors, whose values change after everything was set up."""
    problem, other = Problem(SMALL), Problem(SMALL)
    shards = problem.shards()
    found, lr, clip = sent(shards, problem.grads, by), scalar(7.0), scalar(7.0)
    lr.fill_(1e-2)
    clip.fill_(0.5)
    adamw_(shards, found, lr, clip, 3, BETAS, EPS)
    run(other, by)
    assert all(a.equal(b) for a, b in zip(problem.params, other.params, strict=True))


@both
def test_no_rate_leaves_the_weights(by: str) -> None:
    problem = Problem(SMALL)
    before, moments = copy.deepcopy(problem.params), copy.deepcopy(problem.exp_avgs)
    run(problem, by, lr=0.0)
    assert all(a.equal(b) for a, b in zip(problem.params, before, strict=True))
    assert not any(a.equal(b) for a, b in zip(problem.exp_avgs, moments, strict=True))


# -- the norm ----------------------------------------------------------------------------------


def squares(grads: list[Tensor], by: str) -> Tensor:
    zeros = [torch.zeros(g.shape) for g in grads]
    moments = [[z.clone() for z in zeros] for _ in range(2)]
    shards = Shards(zeros, *moments, [0.0] * len(grads))
    return sum_of_squares(shards, sent(shards, grads, by))


def exact_squares(grads: list[Tensor]) -> float:
    return float(sum(g.double().square().sum() for g in grads))


@both
@pytest.mark.parametrize("gap", [16, 1])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_norm_is_float64s(by: str, gap: int, dtype: torch.dtype) -> None:
    """Within 1e-6: 16 sums in a row and a tree of 11 levels, all terms positive, so at worst
    27 x 2^-24; poison between the shards is not in it."""
    problem = Problem(grads=dtype, gap=gap)
    found = squares(problem.grads, by)
    assert found.shape == () and found.dtype == FP32
    assert float(found) == pytest.approx(exact_squares(problem.grads), rel=1e-6)


@both
def test_norm_of_large_and_small(by: str) -> None:
    """What a running sum in fp32 loses: many equal terms, small ones after a large one."""
    equal = [torch.full((5 * CHUNK + 77,), 0.3)]
    late = [torch.tensor([1e3]), torch.full((9 * CHUNK,), 0.1), torch.full((3,), 1e-12)]
    early = [*reversed(late)]
    for grads in (equal, late, early, [torch.full((3 * CHUNK,), 1e15)]):
        assert float(squares(grads, by)) == pytest.approx(exact_squares(grads), rel=1e-6)
    lost = exact_squares(late) / float(torch.linalg.vector_norm(torch.cat(late))) ** 2 - 1
    assert abs(lost) > 1e-6  # so that this can fail: torch's norm on a CPU is a running sum


@pytest.mark.slow
def test_norm_does_not_lose_with_size() -> None:
    """2^28 equal terms, whose roundings all go one way in a running sum."""
    grads = [torch.full((1 << 28,), 0.3)]
    found = adamw.reference_sum_of_squares(Gradients(grads, None))
    assert float(found) == pytest.approx(float(grads[0][0].double()) ** 2 * 2**28, rel=1e-6)


@both
def test_norm_repeats(by: str) -> None:
    """Bit for bit, also where the gradients lie elsewhere."""
    problem = Problem()
    first = squares(problem.grads, by)
    assert squares(problem.grads, by).equal(first)
    assert squares(Problem(gap=3).grads, by).equal(first)


@both
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_norm_of_what_is_not_finite(by: str, value: float) -> None:
    """In a whole tile, in a ragged end, and beyond fp32 when squared."""
    for at in (0, CHUNK + 2100):
        grads = [torch.ones(CHUNK + 2101)]
        grads[0][at] = value
        found = float(squares(grads, by))
        assert math.isnan(found) if math.isnan(value) else found == math.inf
    assert float(squares([torch.full((3,), 1e20)], by)) == math.inf


@both
def test_norm_of_nothing(by: str) -> None:
    assert float(squares([torch.zeros(0), torch.zeros(3, 0)], by)) == 0.0
    problem = Problem(((0,), (2, 0)))
    run(problem, by)


# -- what is refused ---------------------------------------------------------------------------


def shards_of(**changes: list[Any]) -> Shards:
    fields: dict[str, list[Any]] = {
        name: [torch.zeros(3), torch.zeros(2, 2)] for name in ("params", "exp_avgs", "exp_avg_sqs")
    }
    return Shards(**{**fields, "decays": [0.0, 0.1], **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exp_avgs": [torch.zeros(3)]}, "2 parameters, 1 and 2 moments"),
        ({"decays": [0.0]}, "1 weight decays"),
        ({key: [] for key in ("params", "exp_avgs", "exp_avg_sqs", "decays")}, "at least one"),
        ({"params": [torch.zeros(3), torch.zeros(2, 2).double()]}, "parameter 1 .*float64"),
        ({"params": [torch.zeros(3), torch.zeros(2, 4)[:, ::2]]}, "parameter 1 .*contiguous"),
        ({"exp_avgs": [torch.zeros(4), torch.zeros(2, 2)]}, r"exp_avg 0 \(4,\).*expected \(3,\)"),
        (
            {"exp_avg_sqs": [torch.zeros(3), torch.zeros(2, 2).bfloat16()]},
            "exp_avg_sq 1 .*bfloat16.*float32",
        ),
        ({"exp_avgs": [torch.zeros(3, dtype=torch.float16)] * 2}, "moments are torch.float16"),
        ({"exp_avgs": [torch.zeros(3, device="meta"), torch.zeros(2, 2)]}, "meta"),
        ({"decays": [0.0, -1.0]}, "weight decay 1 is -1.0"),
        ({"decays": [math.nan, 0.0]}, "weight decay 0 is nan"),
    ],
)
def test_shards_that_do_not_match(changes: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shards_of(**changes)


def test_a_shard_given_twice() -> None:
    shared = torch.zeros(3)
    with pytest.raises(ValueError, match="share their memory"):
        shards_of(params=[shared, torch.zeros(2, 2)], exp_avgs=[shared, torch.zeros(2, 2)])


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ([torch.zeros(3)], "1 gradients for 2"),
        ([torch.zeros(3), torch.zeros(4)], r"gradient 1 \(4,\).*\(2, 2\)"),
        ([torch.zeros(3), torch.zeros(2, 2).bfloat16()], "gradient 1 .*bfloat16"),
        ([torch.zeros(3).half(), torch.zeros(2, 2).half()], "gradients are torch.float16"),
        ([torch.zeros(3), torch.zeros(2, 2).mT[:, :1].expand(2, 2)], "contiguous"),
        ([torch.zeros(3), torch.zeros(2, 2, device="meta")], "gradient 1 .*meta"),
    ],
)
def test_gradients_that_do_not_match(grads: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gradients(shards_of(), grads)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": torch.zeros(1)}, r"lr \(1,\)"),
        ({"lr": torch.zeros((), dtype=torch.float64)}, "lr .*float64"),
        ({"clip": torch.zeros((), device="meta")}, "clip .*meta"),
        ({"step": 0}, "step is 0"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": 0.0}, "eps 0.0"),
    ],
)
def test_arguments_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    shards = shards_of()
    found = gradients(shards, [torch.zeros(3), torch.zeros(2, 2)])
    values = {"lr": scalar(1.0), "clip": scalar(1.0), "step": 1, "betas": BETAS, "eps": EPS}
    with pytest.raises(ValueError, match=message):
        adamw_(shards, found, **{**values, **changes})  # type: ignore[arg-type]


# -- the optimizer -----------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 5))


def task() -> tuple[Tensor, Tensor]:
    """Five classes by a random teacher; 512 samples."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(512, 12, generator=draw)
    return x, (x @ torch.randn(12, 5, generator=draw)).argmax(1)


def test_optimizer_is_torchs() -> None:
    """With clipping, decay of matrices only, and a schedule; both differentiate their own weights.

    A first difference of a rounding grows with the steps, as it does between any two orders of the
    same sums: 1e-5 of the weights after 60 steps.
    """
    ours, theirs = network(), network()
    config = OptimConfig(lr=1e-2, weight_decay=0.5)
    optimizer = AdamW(ours.named_parameters(), config)
    decayed = [p for p in theirs.parameters() if p.ndim > 1]
    others = [p for p in theirs.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.5}, {"params": others, "weight_decay": 0.0}]
    peer = torch.optim.AdamW(groups, lr=1e-2, betas=config.betas, foreach=False)
    rates, (x, y), clipped = learning_rates(60, config, CPU), task(), 0
    for step in range(60):
        F.cross_entropy(ours(x), y).backward()
        norm = optimizer.step(rates[step], 0.3)
        optimizer.zero_grad()
        F.cross_entropy(theirs(x), y).backward()
        wanted = nn.utils.clip_grad_norm_(theirs.parameters(), 0.3)
        for group in peer.param_groups:
            group["lr"] = learning_rate(step, 60, config)
        peer.step()
        peer.zero_grad()
        assert float(norm) == pytest.approx(float(wanted), rel=1e-5)
        clipped += float(norm) > 0.3
    assert 0 < clipped < 60 and optimizer.steps == 60
    assert all(p.grad is None for p in ours.parameters())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def final_loss(moments: str, dtypes: set[torch.dtype]) -> tuple[float, float]:
    """First and last loss of 300 steps; adds the moments' dtypes to the set."""
    model, (x, y) = network(), task()
    config = OptimConfig(lr=1e-2, moments=moments)  # type: ignore[arg-type]
    optimizer, rates = AdamW(model.named_parameters(), config), learning_rates(300, config, CPU)
    losses = []
    for step in range(300):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step(rates[step], 1.0)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    dtypes |= {x.dtype for kept in (optimizer.exp_avg, optimizer.exp_avg_sq) for x in kept.values()}
    return losses[0], losses[-1]


def test_bf16_moments_learn_as_well() -> None:
    """A moment's rounding, 2^-8, has either sign and is renewed every 10 to 20 steps; the losses at
    the end lie within 5 % of each other, after a fall to less than a tenth."""
    dtypes: set[torch.dtype] = set()
    first, wanted = final_loss("float32", set())
    _, found = final_loss("bfloat16", dtypes)
    assert dtypes == {BF16}
    assert wanted < 0.1 * first
    assert found == pytest.approx(wanted, rel=0.05)


def test_slow_averages_need_fp32() -> None:
    """What the recipe's rule keeps off: with beta2 0.999 a bf16 moment never falls again."""
    v = [torch.ones(1, dtype=BF16)]
    shards = Shards([torch.zeros(1)], [torch.zeros(1)], [torch.ones(1)], [0.0])
    narrow = Shards([torch.zeros(1)], [torch.zeros(1, dtype=BF16)], v, [0.0])
    for step in range(1, 100):
        for each in (shards, narrow):
            found = gradients(each, [torch.zeros(1)])
            adamw_(each, found, scalar(0.0), scalar(1.0), step, (0.9, 0.999), EPS)
    assert float(v[0]) == 1.0 and float(shards.exp_avg_sqs[0]) < 0.91
    for betas in ((0.9, 0.999), (0.995, 0.9)):
        config = TrainConfig(
            model="m", data=replace(TrainConfig().data, path="d"), optim=OptimConfig(betas=betas)
        )
        check(config)
        with pytest.raises(InputError, match=r"optim\.moments: bfloat16 needs optim\.betas"):
            check(replace(config, optim=replace(config.optim, moments="bfloat16")))


def test_norm_over_ranks() -> None:
    """What the hook makes of the sum decides norm and clipping: as of four equal ranks."""
    alone, one_of_four = network(), network()
    x, y = task()
    weights = []
    for model, factor, hook in (
        (alone, 2.0, None),
        (one_of_four, 1.0, lambda total: total.mul_(4)),
    ):
        (factor * F.cross_entropy(model(x), y)).backward()
        optimizer = AdamW(model.named_parameters(), OptimConfig(), hook)
        norm = optimizer.step(scalar(1e-2), 1e9)
        weights.append((float(norm), float(optimizer.exp_avg["0.weight"].norm())))
    assert weights[0][0] == pytest.approx(weights[1][0], rel=1e-6)
    assert weights[0][1] == pytest.approx(2 * weights[1][1], rel=1e-6)


@pytest.fixture
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_dtensors_are_updated_by_their_local_part(one_rank: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    plain = {"w": nn.Parameter(torch.ones(4, 3)), "b": nn.Parameter(torch.ones(3))}
    for parameter in plain.values():
        parameter.grad = torch.full_like(parameter, 2.0)
    sharded = {}
    for name, p in plain.items():
        sharded[name] = nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)]))
        sharded[name].grad = distribute_tensor(p.grad.clone(), mesh, [Shard(0)])  # type: ignore[union-attr]
    assert isinstance(local(sharded["w"]), Tensor) and isinstance(sharded["w"].data, DTensor)
    assert not isinstance(local(sharded["w"]), DTensor)
    config = OptimConfig(weight_decay=0.5)
    norms = [AdamW(x.items(), config).step(scalar(0.1), 1.0) for x in (plain, sharded)]
    assert norms[0].equal(norms[1]) and not isinstance(norms[1], DTensor)
    for name, p in plain.items():
        assert local(sharded[name].data).equal(p.data)
    assert bool(plain["w"][0, 0] < plain["b"][0])  # only the matrix decays


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_told(value: float) -> None:
    model = network()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model[0].bias.grad[3] = value  # type: ignore[index, union-attr]
    optimizer = AdamW(model.named_parameters(), OptimConfig())
    assert not optimizer.step(scalar(1e-2), 1.0).isfinite()


def broken(change: Callable[[nn.Sequential], None]) -> None:
    model = network()
    optimizer = AdamW(model.named_parameters(), OptimConfig())
    F.cross_entropy(model(task()[0]), task()[1]).backward()
    before = copy.deepcopy(model.state_dict())
    change(model)
    try:
        optimizer.step(scalar(1e-2), 1.0)
    finally:
        assert optimizer.steps == 0
        assert all(x.equal(before[name]) for name, x in model.state_dict().items())


def test_optimizer_refuses_by_name() -> None:
    def forget(model: nn.Sequential) -> None:
        model[3].weight.grad = None  # type: ignore[union-attr]

    def move(model: nn.Sequential) -> None:
        model[1].weight.data = model[1].weight.data.clone()

    with pytest.raises(ValueError, match=r"3\.weight has no gradient"):
        broken(forget)
    with pytest.raises(ValueError, match=r"1\.weight was moved"):
        broken(move)
    with pytest.raises(ValueError, match=r"parameter 0 .*bfloat16"):
        AdamW(network().bfloat16().named_parameters(), OptimConfig())
