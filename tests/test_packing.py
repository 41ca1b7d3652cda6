"""Order, batches, labels and weights; and that packing changes nothing that it should not."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from s1fast.chat import Example
from s1fast.checkpoint import load_model
from s1fast.kernels.packed_attention import packed_attention
from s1fast.model import Model
from s1fast.packing import (
    LossWeight,
    PackedBatch,
    cut,
    epoch_order,
    label_counts,
    pack,
    pack_batch,
    part_tokens,
    step_indices,
    steps_per_epoch,
)
from s1fast.step import stream_loss

CPU = torch.device("cpu")
Streams = list[list[int]] | None


def example(ids: list[int], labelled: str) -> Example:
    """labelled: one character a token, x where there is loss."""
    return Example(tuple(ids), tuple(c == "x" for c in labelled), "test")


def random_examples(lengths: list[int], seed: int = 0) -> list[Example]:
    """Tokens of a 512-token vocabulary, the first third of each without loss."""
    draw = random.Random(seed)
    return [
        Example(
            tuple(draw.randrange(512) for _ in range(n)), tuple(t >= n // 3 for t in range(n)), "r"
        )
        for n in lengths
    ]


# -- order -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_examples", [1, 2, 17, 1000])
def test_an_epoch_is_a_seeded_permutation(num_examples: int) -> None:
    order = epoch_order(num_examples, 3, 1)
    assert sorted(order) == list(range(num_examples))
    assert order == epoch_order(num_examples, 3, 1)


def test_epochs_and_seeds_differ() -> None:
    orders = [epoch_order(100, seed, epoch) for seed in range(4) for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 16
    # Two random permutations of 100 agree in 1 place on average, in 9 with odds of 1e-6.
    agreeing = [
        sum(x == y for x, y in zip(a, b, strict=True))
        for i, a in enumerate(orders)
        for b in orders[:i]
    ]
    assert max(agreeing) < 9
    assert epoch_order(100, 1 << 62, 0) != epoch_order(100, 0, 0)


def test_order_is_recorded() -> None:
    """A resumed run must find the order of the run it resumes: it is not to change."""
    assert epoch_order(10, 0, 0) == [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]
    assert step_indices(10, 4, 0, 2) == [8, 1, 4, 6]


def test_s1s_schedule() -> None:
    """1,000 examples in batches of 16: 63 steps an epoch, 315 in five, the last batch filled."""
    assert steps_per_epoch(1000, 16) == 63
    assert 5 * steps_per_epoch(1000, 16) == 315
    for epoch in (0, 4):
        order = epoch_order(1000, 0, epoch)
        steps = [step_indices(1000, 16, 0, 63 * epoch + i) for i in range(63)]
        assert all(len(chosen) == 16 for chosen in steps)
        assert [i for chosen in steps for i in chosen] == order + order[:8]
    assert step_indices(1000, 16, 0, 62) != step_indices(1000, 16, 0, 62 + 63)


@pytest.mark.parametrize(
    ("num_examples", "batch_size", "steps"),
    [(16, 16, 1), (17, 16, 2), (15, 16, 1), (1, 1, 1), (5, 1, 5), (3, 8, 1)],
)
def test_every_example_is_in_every_epoch(num_examples: int, batch_size: int, steps: int) -> None:
    assert steps_per_epoch(num_examples, batch_size) == steps
    for epoch in range(3):
        chosen = [
            i
            for step in range(epoch * steps, (epoch + 1) * steps)
            for i in step_indices(num_examples, batch_size, 7, step)
        ]
        assert len(chosen) == steps * batch_size
        order = epoch_order(num_examples, 7, epoch)
        assert chosen == [order[i % num_examples] for i in range(len(chosen))]


# -- layout ------------------------------------------------------------------------------------

SMALL = [  # 1, 3 and 0 labels: what a first token would be predicted from does not exist
    example([10, 11, 12], "..x"),
    example([20, 21, 22, 23], "xxxx"),
    example([30, 31], "x."),
]


def test_a_stream_by_hand() -> None:
    batch = pack(SMALL, [0.5, 0.25, 0.125])
    assert batch.ids_T.tolist() == [10, 11, 12, 20, 21, 22, 23, 30, 31]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1]
    assert batch.label_T.tolist() == [-100, 12, -100, 21, 22, 23, -100, -100, -100]
    assert batch.loss_weight_T.tolist() == [0, 0.5, 0, 0.25, 0.25, 0.25, 0, 0, 0]
    assert batch.valid_rows.tolist() == [1, 3, 4, 5]
    assert batch.cu_seqlens.tolist() == [0, 3, 7, 9]
    assert batch.max_seqlen == 4
    dtypes = {name: x.dtype for name, x in vars(batch).items() if isinstance(x, Tensor)}
    assert dtypes == {
        "ids_T": torch.int64,
        "positions_T": torch.int64,
        "label_T": torch.int64,
        "loss_weight_T": torch.float32,
        "valid_rows": torch.int64,
        "cu_seqlens": torch.int32,
    }
    assert label_counts(SMALL) == [1, 3, 0]


@pytest.mark.parametrize(
    ("loss_weight", "weights"),
    [
        # B counts the two sequences that have a label.
        ("sample", [0, 1 / 2, 0, 1 / 6, 1 / 6, 1 / 6, 0, 0, 0]),
        ("token", [0, 1 / 4, 0, 1 / 4, 1 / 4, 1 / 4, 0, 0, 0]),
    ],
)
@pytest.mark.parametrize("streams", [None, [[0, 1, 2]], [[0], [1, 2]], [[0, 1], [2]]])
def test_weights_by_hand(loss_weight: LossWeight, weights: list[float], streams: Streams) -> None:
    """However the batch is cut, a label's weight is the same, and all of them make 1."""
    packed = list(pack_batch(SMALL, loss_weight, streams))
    found = torch.cat([stream.loss_weight_T for stream in packed])
    assert torch.equal(found, torch.tensor(weights, dtype=torch.float32))
    assert abs(float(found.double().sum()) - 1) < 4 * 2**-24  # four weights, each rounded


def test_streams_hold_what_they_are_told_to() -> None:
    """An empty one is two tokens of weight 0: its rank has something to run."""
    examples = random_examples([5, 3, 9])
    first, empty, last = pack_batch(examples, "sample", [[2, 0], [], [1]])
    assert first.cu_seqlens.tolist() == [0, 9, 14]
    assert tuple(first.ids_T.tolist()) == examples[2].ids + examples[0].ids
    assert empty.cu_seqlens.tolist() == [0, 2] and empty.valid_rows.tolist() == []
    assert tuple(last.ids_T.tolist()) == examples[1].ids


@pytest.mark.parametrize("num_parts", [1, 2, 3, 8])
def test_parts_make_the_stream(num_parts: int) -> None:
    """Of equal size; the padding is in no sequence and has no label."""
    (stream,) = pack_batch(random_examples([31, 5, 2, 60, 17]), "sample")
    parts = [cut(stream, i, num_parts) for i in range(num_parts)]
    size = part_tokens(115, num_parts)
    assert {len(part.ids_T) for part in parts} == {size}
    if num_parts > 1:
        assert size % 16 == 0 and 115 <= size * num_parts < 115 + num_parts * 16
    for name, filler in (("ids_T", 0), ("positions_T", 0), ("label_T", -100), ("loss_weight_T", 0)):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined[:115], getattr(stream, name))
        assert (joined[115:] == filler).all()
    rows = torch.cat([part.valid_rows + i * size for i, part in enumerate(parts)])
    assert torch.equal(rows, stream.valid_rows)
    assert all(part.cu_seqlens is stream.cu_seqlens for part in parts)


def test_a_batch_without_labels_has_no_weight() -> None:
    (stream,) = pack_batch([example([1, 2, 3], "x.."), example([4], "x")], "sample")
    assert stream.valid_rows.tolist() == []
    assert stream.loss_weight_T.count_nonzero() == 0


# -- through the real model ----------------------------------------------------------------------


def logits(model: Model, batch: PackedBatch) -> list[Tensor]:
    """Logits of each sequence of the stream."""

    def attend(layer: int, q_THK: Tensor, k_TNK: Tensor, v_TNK: Tensor) -> Tensor:
        return packed_attention(q_THK, k_TNK, v_TNK, batch.cu_seqlens, batch.max_seqlen)

    with torch.no_grad():
        logits_TV = model.logits(model(batch.ids_T, batch.positions_T, attend))
    return list(logits_TV.split(batch.cu_seqlens.diff().tolist()))


@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_sequences_do_not_see_each_other(model_type: str, make_model: Callable[..., Path]) -> None:
    """Equal lengths, one sequence's content changed: no bit of any other's logits moves."""
    model = load_model(make_model(model_type), CPU, torch.float32)
    lengths = [7, 20, 1, 33]
    before = random_examples(lengths)
    others = random_examples(lengths, seed=1)
    first = logits(model, pack(before, [0.0] * 4))
    for changed in range(4):
        mixed = [others[i] if i == changed else e for i, e in enumerate(before)]
        second = logits(model, pack(mixed, [0.0] * 4))
        for i in range(4):
            assert torch.equal(first[i], second[i]) == (i != changed)


def loss_and_grads(
    model: Model, examples: list[Example], loss_weight: LossWeight, streams: Streams = None
) -> tuple[float, Tensor]:
    """A step's loss and gradients, summed over its streams as the trainer does."""
    model.zero_grad(set_to_none=True)
    loss = torch.zeros(())
    for stream in pack_batch(examples, loss_weight, streams):
        partial = stream_loss(model, stream)
        partial.backward()
        loss += partial.detach()
    return float(loss), torch.cat(
        [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    )


@pytest.mark.parametrize("loss_weight", ["sample", "token"])
def test_loss_and_gradients_do_not_depend_on_packing(
    loss_weight: LossWeight, make_model: Callable[..., Path]
) -> None:
    """Any order, any cut. The sums have up to 141 fp32 terms of 6e-8 each, in another order:
    2e-6 in norm holds with room, and one sequence left out or weighed wrongly moves percents."""
    model = load_model(make_model("qwen2"), CPU, torch.float32)
    examples = random_examples([31, 5, 2, 60, 17, 26])
    loss, grads = loss_and_grads(model, examples, loss_weight)
    assert len(grads) == sum(p.numel() for p in model.parameters())
    draw = random.Random(0)
    for num_streams in (1, 2, 3, 6, 8):
        shuffled = draw.sample(examples, len(examples))
        streams: list[list[int]] = [[] for _ in range(num_streams)]
        for i in range(len(shuffled)):
            streams[draw.randrange(num_streams)].append(i)
        again, again_grads = loss_and_grads(model, shuffled, loss_weight, streams)
        assert abs(again - loss) <= 2e-6 * abs(loss)
        assert float((again_grads - grads).norm()) <= 2e-6 * float(grads.norm())


def test_sample_and_token_weights_differ(make_model: Callable[..., Path]) -> None:
    """With unequal lengths the two losses are different means, each by its definition."""
    model = load_model(make_model("qwen2"), CPU, torch.float32)
    examples = random_examples([31, 5, 2, 60])
    alone = [loss_and_grads(model, [e], "sample")[0] for e in examples]
    counts = label_counts(examples)
    by_sample = sum(alone) / 4
    by_token = sum(a * n for a, n in zip(alone, counts, strict=True)) / sum(counts)
    assert abs(by_sample / by_token - 1) > 1e-2
    for loss_weight, wanted in (("sample", by_sample), ("token", by_token)):
        found, _ = loss_and_grads(model, examples, loss_weight)
        assert abs(found - wanted) <= 2e-6 * wanted  # fp32, as above
