"""What one rank finds out all know. That texts go over gloo as they are is in rank_checks.py."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch.distributed as dist

from rank_threads import all_ranks, on_ranks
from s1fast import trainer
from s1fast.errors import InputError
from s1fast.parallel import own_part
from s1fast.ranks import ALONE, Ranks


def test_one_rank_alone() -> None:
    assert ALONE.exchange("x") == ["x"]
    with ALONE.together():
        pass
    with pytest.raises(InputError, match=r"^as it is$"), ALONE.together():
        raise InputError("as it is")
    with pytest.raises(KeyError), ALONE.together():
        raise KeyError("x")


def test_a_block_fails_on_all_ranks_or_none() -> None:
    """Who it was is said where not all say the same; a bug stays what it is where it happened."""

    def run(ranks: Ranks) -> str:
        for _ in range(3):
            with ranks.together():
                pass
        with ranks.together():
            if ranks.rank in failing:
                raise failing[ranks.rank]
        return "ended"

    failing: dict[int, Exception] = {}
    assert all_ranks(3, run) == ["ended"] * 3
    cases: list[tuple[dict[int, Exception], str]] = [
        ({1: InputError("full")}, "rank 1: full"),
        ({0: InputError("full"), 2: InputError("full")}, "ranks 0, 2: full"),
        ({0: InputError("a"), 2: InputError("b")}, "rank 0: a; rank 2: b"),
        (dict.fromkeys(range(3), InputError("all")), "all"),
        ({2: InputError("")}, "rank 2: no message"),
    ]
    for case, message in cases:
        failing = case
        errors = on_ranks(3, run)
        assert {(type(e), str(e)) for e in errors} == {(InputError, message)}
    failing = {1: ZeroDivisionError("bug")}
    first, bug, last = on_ranks(3, run)
    assert isinstance(bug, ZeroDivisionError)
    assert isinstance(first, InputError) and str(first) == "rank 1: ZeroDivisionError: bug"
    assert str(last) == str(first)


def test_every_life_has_its_own_part_of_a_store() -> None:
    """Nobody reads what a dead rank left, however far it had come; a rank that comes late is
    waited for."""
    store = dist.HashStore()
    for life in range(4):
        if life == 2:  # ranks 1 and 2 of a life that ended before rank 0's began
            store.set("asked/1", "dead")
            store.set("asked/2", "dead too")

        def meet(ranks: Ranks, life: int = life) -> str:
            if ranks.rank == life % 3:
                time.sleep(0.1)
            part = dist.PrefixStore(own_part(store, ranks.rank, ranks.world), store)
            part.set(f"address/{ranks.rank}", f"{life}")
            return ",".join(part.get(f"address/{rank}").decode() for rank in range(3))

        assert all_ranks(3, meet) == [",".join(3 * [str(life)])] * 3


def test_ranks_with_other_kernels_have_other_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a checkout s1fast/kernels is a link, which a search from above does not follow."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "s1fast").mkdir()
    (tmp_path / "s1fast" / "kernels").symlink_to("../kernels")
    kernel = tmp_path / "kernels" / "rope.py"
    monkeypatch.setattr(trainer, "__file__", str(tmp_path / "s1fast" / "trainer.py"))
    found = set()
    for text in ("a = 1", "a = 2"):
        kernel.write_text(text)
        found.add(trainer._code_sha256())
    assert len(found) == 2
