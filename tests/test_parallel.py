"""Training on several ranks, by real processes over gloo, is training on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rank_checks
from s1fast.parallel import Layout, join, share_streams, ulysses_degree
from s1fast.ranks import Ranks

ROOT = Path(__file__).resolve().parent.parent
NAMES = [(world, name) for world, checks in rank_checks.CHECKS.items() for name in checks]


Said = dict[tuple[int, str], list[str | None]]
"""(ranks, check) -> what each rank says: "", an error, or None where it never got there."""


def run(out: Path, checks: dict[int, dict[str, rank_checks.Check]], *words: str) -> Said:
    subprocess.run(
        [sys.executable, rank_checks.__file__, str(out), *words, *map(str, checks)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=500,
        check=True,
    )
    found: Said = {}
    for world, named in checks.items():
        files = [out / f"{world}-{rank}.json" for rank in range(world)]
        said = [json.loads(file.read_text()) if file.exists() else {} for file in files]
        for name in named:
            found[world, name] = [one.get(name) for one in said]
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Said:
    return run(tmp_path_factory.mktemp("ranks"), rank_checks.CHECKS)


@pytest.mark.parametrize(("world", "name"), NAMES, ids=[f"{name}-{world}" for world, name in NAMES])
def test_on_ranks(world: int, name: str, results: Said) -> None:
    """rank_checks.py says what each shows."""
    for rank, said in enumerate(results[world, name]):
        assert said is not None, f"rank {rank} never got there: an earlier check failed"
        assert said == "", f"rank {rank}:\n{said}"


@pytest.mark.slow
def test_slow_checks_on_ranks(tmp_path: Path) -> None:
    for said in run(tmp_path, rank_checks.SLOW, "slow").values():
        assert said == ["", ""], said


@pytest.mark.parametrize(
    ("heads", "kv_heads", "degrees"),
    [
        # Of Qwen2.5's config.json files; the design names 8, 4 and 2 for 32B, 7B and 0.5B.
        (40, 8, {1: 1, 2: 2, 3: 1, 4: 4, 5: 1, 6: 2, 8: 8, 16: 8}),  # 32B: 5 of 40, not of 8
        (28, 4, {1: 1, 2: 2, 4: 4, 6: 2, 7: 1, 8: 4}),  # 7B
        (12, 2, {2: 2, 3: 1, 4: 4, 6: 6, 8: 4}),  # 1.5B
        (14, 2, {1: 1, 2: 2, 4: 2, 7: 1, 8: 2, 14: 14}),  # 0.5B
        (9, 3, {1: 1, 2: 1, 3: 3, 8: 1, 9: 9}),  # SmolLM2-135M
    ],
)
def test_degree_by_the_rule(heads: int, kv_heads: int, degrees: dict[int, int]) -> None:
    assert {n: ulysses_degree(n, heads, kv_heads) for n in degrees} == degrees


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8, 12, 16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(40, 8), (28, 4), (12, 2), (14, 2), (9, 3)])
def test_query_heads_meet_their_own_keys(world: int, heads: int, kv_heads: int) -> None:
    """However heads are dealt, a rank has the key-value head that each of its query heads needs."""
    degree = ulysses_degree(world, heads, kv_heads)
    repeats = max(1, degree // kv_heads)
    per_rank, kv_per_rank = heads // degree, kv_heads * repeats // degree
    for rank in range(degree):
        for i in range(per_rank):
            needed = (rank * per_rank + i) // (heads // kv_heads)
            local = i // (per_rank // kv_per_rank)
            assert (rank * kv_per_rank + local) // repeats == needed


def test_places_in_the_world() -> None:
    places = [Layout(torch.device("cpu"), Ranks(rank, 8), 4) for rank in range(8)]
    assert [place.group_index for place in places] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [place.part for place in places] == [0, 1, 2, 3, 0, 1, 2, 3]
    with pytest.raises(ValueError, match="8 ranks cannot be dealt to groups of 3"):
        share_streams(places[0], 3)


def test_a_laptop_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    alone = join(torch.device("cpu"))
    assert alone == Layout(torch.device("cpu"))
    assert float(alone.sum(torch.tensor(3.0))) == 3 and alone.smallest(5) == 5
