"""How even a step's work is over the ranks: batches of 16 sequences as long as s1K's, on 16 GPUs.

    imbalance = FLOPs of the slowest / mean

Under FSDP a step lasts as long as its slowest rank, so a step that is perfectly even is that much
faster. Beside our split over two nodes, each of which shares one stream: a sequence for every rank,
as s1's run had it; a random half of the batch for each node; and over more, smaller groups.
Needs no GPU: nothing is trained.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from statistics import mean, quantiles

from s1fast.balance import balanced_split, imbalance
from s1fast.bench.environment import save
from s1fast.metrics import train_flops
from s1fast.published import qwen, sequence_lengths

BATCH = 16
QWEN_32B = qwen("32B")

Split = Callable[[list[float]], list[list[int]]]


def batches(count: int, seed: int = 0) -> list[list[float]]:
    """FLOPs of the sequences of each batch, drawn from s1K's."""
    draw = random.Random(seed)
    lengths = sequence_lengths("simplescaling/s1K")
    assert lengths is not None
    costs = [train_flops(QWEN_32B, [n], n) for n in lengths]
    return [draw.sample(costs, BATCH) for _ in range(count)]


def splits(seed: int = 0) -> dict[str, Split]:
    draw = random.Random(seed)

    def halves(costs: list[float]) -> list[list[int]]:
        order = draw.sample(range(BATCH), BATCH)
        return [order[: BATCH // 2], order[BATCH // 2 :]]

    return {
        "one sequence a rank": lambda costs: [[i] for i in range(BATCH)],
        "two groups, random halves": halves,
        "two groups, balanced": lambda costs: balanced_split(costs, 2),
        "four groups, balanced": lambda costs: balanced_split(costs, 4),
        "eight groups, balanced": lambda costs: balanced_split(costs, 8),
    }


def measure(count: int) -> dict[str, dict[str, float]]:
    """name -> mean, p95 and worst imbalance over so many batches."""
    drawn = batches(count)
    found = {}
    for name, split in splits().items():
        ratios = [imbalance([split(costs)], costs) for costs in drawn]
        p95 = quantiles(ratios, n=20)[-1]
        found[name] = {"mean": mean(ratios), "p95": p95, "worst": max(ratios)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batches", type=int, default=1000)
    count = parser.parse_args().batches
    found = measure(count)
    print(f"slowest / mean over {count} batches of {BATCH} as long as s1K's")
    for name, values in found.items():
        print(f"{name:26}" + "".join(f"  {kind} {x:.4f}" for kind, x in values.items()))
    print(save("imbalance", {"batches": count, "imbalance": found}))


if __name__ == "__main__":
    main()
