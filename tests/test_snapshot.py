"""Snapshots: cut over any number of ranks, written behind the loop, whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import resource
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rank_threads import all_ranks, on_ranks
from s1fast import snapshot, snapshot_writer
from s1fast.errors import InputError
from s1fast.ranks import ALONE, Ranks
from s1fast.slices import Slice
from s1fast.snapshot import newest
from s1fast.snapshot_writer import SnapshotWriter

State = dict[str, Tensor]


def state(seed: int = 0) -> State:
    """Odd sizes, both precisions, fewer rows than ranks, and values that only bits tell apart."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {
        "param/a": torch.randn(7, 5, generator=draw),
        "param/b": torch.randn(3, generator=draw),
        "exp_avg/a": torch.randn(7, 5, generator=draw).bfloat16(),
        "exp_avg/b": torch.randn(1, generator=draw).bfloat16(),
        "param/c": torch.randn(12, 2, 3, generator=draw),
    }
    tensors["param/a"][0, :3] = torch.tensor([-0.0, float("nan"), 1e-45])
    return tensors


def cut(tensors: State, ranks: Ranks) -> dict[str, Slice]:
    """A rank's rows, as torch.chunk and so FSDP2 deal them; a copy."""
    slices = {}
    for name, x in tensors.items():
        chunks = x.chunk(ranks.world)
        start = sum(len(chunk) for chunk in chunks[: ranks.rank])
        ours = chunks[ranks.rank] if ranks.rank < len(chunks) else x[:0]
        slices[name] = Slice(ours.clone(), start, tuple(x.shape))
    return slices


def empty(tensors: State, ranks: Ranks) -> dict[str, Slice]:
    return cut({name: torch.full_like(x, 77) for name, x in tensors.items()}, ranks)


def assert_same(found: dict[str, Slice], wanted: dict[str, Slice]) -> None:
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        a, b = found[name].tensor, x.tensor
        assert a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name


def save(
    folder: Path, step: int, tensors: State, ranks: Ranks = ALONE, *, keep: int = 2, facts: Any = 0
) -> None:
    with SnapshotWriter(folder, keep, ranks) as writer:
        writer.save(step, cut(tensors, ranks), {"fact": facts})


def read(folder: Path, ranks: Ranks = ALONE) -> tuple[int, dict[str, Slice]]:
    found, warnings = newest(folder, repair=True, ranks=ranks)
    assert found is not None and not warnings
    slices = empty(state(), ranks)
    found.restore(slices)
    return found.step, slices


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("readers", [1, 2, 3, 5])
@pytest.mark.parametrize("writers", [1, 2, 3, 4])
def test_any_number_of_ranks_reads_what_any_wrote(
    writers: int, readers: int, tmp_path: Path
) -> None:
    """Bit for bit, empty ranks included."""
    all_ranks(writers, lambda ranks: save(tmp_path, 3, state(), ranks))
    for found, wanted in zip(
        all_ranks(readers, lambda ranks: read(tmp_path, ranks)),
        all_ranks(readers, lambda ranks: cut(state(), ranks)),
        strict=True,
    ):
        assert found[0] == 3
        assert_same(found[1], wanted)


def test_the_files_are_what_the_documentation_says(tmp_path: Path) -> None:
    """Safetensors that their library reads, hashed, in a manifest that says where each row lies."""
    all_ranks(3, lambda ranks: save(tmp_path, 12, state(), ranks, facts={"a": [1]}))
    assert names(tmp_path) == ["step-000012"]
    folder = tmp_path / "step-000012"
    files = [f"rank-{rank:05}.safetensors" for rank in range(3)]
    assert names(folder) == ["manifest.json", *files]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"], manifest["facts"]) == (
        2,
        12,
        {"fact": {"a": [1]}},
    )
    for name in files:
        data = (folder / name).read_bytes()
        assert manifest["files"][name]["sha256"] == hashlib.sha256(data).hexdigest()
    tensors = {name: load_file(folder / name) for name in files}
    assert manifest["tensors"].keys() == state().keys()
    for name, x in state().items():
        entry = manifest["tensors"][name]
        assert entry["shape"] == list(x.shape)
        assert entry["dtype"] == {torch.float32: "F32", torch.bfloat16: "BF16"}[x.dtype]
        rows = [tensors[shard["file"]][name] for shard in entry["shards"]]
        assert [len(r) for r in rows] == [s["stop"] - s["start"] for s in entry["shards"]]
        assert torch.equal(torch.cat(rows).view(torch.uint8), x.view(torch.uint8))
        assert all(r.data_ptr() % r.itemsize == 0 for r in rows)


def test_a_rank_opens_only_files_that_hold_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the check of its share of the files; and of these it asks for its rows alone."""
    all_ranks(4, lambda ranks: save(tmp_path, 1, {"x": torch.arange(16.0).view(8, 2)}, ranks))
    found, _ = newest(tmp_path, repair=False)
    assert found is not None
    opened, part = [], snapshot.TensorFiles.part

    def spy(self: Any, file: str, name: str) -> Any:
        rows = part(self, file, name)

        class Asked:
            def __getitem__(self, asked: slice) -> Tensor:
                opened.append((file, asked.start, asked.stop))
                return rows[asked]

        return Asked()

    monkeypatch.setattr(snapshot.TensorFiles, "part", spy)
    target = Slice(torch.zeros(3, 2), 3, (8, 2))
    found.restore({"x": target})
    assert target.tensor.flatten().tolist() == [6, 7, 8, 9, 10, 11]
    assert opened == [("rank-00001.safetensors", 1, 2), ("rank-00002.safetensors", 0, 2)]


@pytest.mark.parametrize("keep", [1, 3])
def test_only_the_newest_are_kept(keep: int, tmp_path: Path) -> None:
    """By number, not by name: a million steps have a digit more."""
    steps = [2, 999_998, 999_999, 1_000_000, 1_000_001]
    for i, step in enumerate(steps, start=1):
        save(tmp_path, step, state(step), keep=keep)
        assert set(names(tmp_path)) == {f"step-{s:06}" for s in steps[max(0, i - keep) : i]}
        found, slices = read(tmp_path)
        assert found == step
        assert_same(slices, cut(state(step), ALONE))


MISFITS: dict[str, tuple[Callable[[State], Any], str]] = {
    "missing": (lambda s: s.update(new=torch.ones(2)), r"new: none in .*, F32 \[2\] in this run"),
    "left over": (lambda s: s.pop("param/b"), r"param/b: F32 \[3\] in .*, none in this run"),
    "shape": (
        lambda s: s.update({"param/b": torch.ones(4)}),
        r"param/b: F32 \[3\] in the snapshot, F32 \[4\] in this run",
    ),
    "dtype": (
        lambda s: s.update({"exp_avg/b": torch.ones(1)}),
        r"exp_avg/b: BF16 \[1\] in the snapshot, F32 \[1\] in this run",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_another_state_is_refused_by_name(name: str, tmp_path: Path) -> None:
    change, message = MISFITS[name]
    save(tmp_path, 1, state())
    found, _ = newest(tmp_path, repair=False)
    assert found is not None
    other = {key: torch.full_like(x, 77) for key, x in state().items()}
    change(other)
    slices = cut(other, ALONE)
    with pytest.raises(InputError, match=rf"step-000001: 1 tensors do not fit: {message}"):
        found.restore(slices)
    assert_same(slices, cut(other, ALONE))  # nothing was filled


# -- behind the loop ------------------------------------------------------------------------------


class Gate:
    """Holds the writing of files back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        write = snapshot_writer.write_tensors

        def gated(*arguments: Any) -> str:
            self.reached.set()
            assert self.open.wait(60)
            return write(*arguments)

        monkeypatch.setattr(snapshot_writer, "write_tensors", gated)


def test_a_save_does_not_see_later_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the next one overwrite what is still to be written."""
    gate = Gate(monkeypatch)
    slices = cut(state(1), ALONE)
    with SnapshotWriter(tmp_path, 2) as writer:
        writer.save(1, slices, {})
        assert gate.reached.wait(60)
        assert not (tmp_path / "step-000001").exists()  # save has returned, nothing is written
        for part in slices.values():
            part.tensor.fill_(5)
        gate.open.set()
        writer.save(2, slices, {})
        assert names(tmp_path)[-1] == "step-000001"  # one at a time: the first is whole by now
        for part in slices.values():
            part.tensor.fill_(6)
    shutil.rmtree(tmp_path / "step-000002")
    assert_same(read(tmp_path)[1], cut(state(1), ALONE))


def test_the_second_is_as_right_as_the_first(tmp_path: Path) -> None:
    """The host's copy is one piece of memory, used again and again."""
    with SnapshotWriter(tmp_path, 1) as writer:
        for step in range(1, 6):
            writer.save(step, cut(state(step), ALONE), {})
    assert_same(read(tmp_path)[1], cut(state(5), ALONE))


def test_a_second_save_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with SnapshotWriter(tmp_path, 2) as writer:
        writer.save(1, cut(state(1), ALONE), {})
        second = threading.Thread(target=writer.save, args=(2, cut(state(2), ALONE), {}))
        second.start()
        second.join(0.3)
        assert second.is_alive()
        assert [name[:12] for name in names(tmp_path)] == [".step-000001"]
        gate.open.set()
        second.join(60)
        assert not second.is_alive()
    assert names(tmp_path) == ["step-000001", "step-000002"]


@pytest.mark.parametrize("block", [1, 64, 1000])
def test_the_host_copy_lies_in_blocks(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose edges fall within tensors and elements, and whose last is smaller."""
    monkeypatch.setattr(snapshot_writer, "BLOCK_BYTES", block)
    save(tmp_path, 1, state())
    assert_same(read(tmp_path)[1], cut(state(), ALONE))


# -- what goes wrong ------------------------------------------------------------------------------


FULL = OSError(errno.ENOSPC, "No space left on device")


def fail(
    monkeypatch: pytest.MonkeyPatch, name: str, error: Exception, when: Callable[[Path], bool]
) -> None:
    """Makes a function of the writer raise at paths that fit; one not atomic has written half."""
    real = getattr(snapshot_writer, name)

    def failing(path: Path, *arguments: Any) -> Any:
        if when(path):
            if name == "write_tensors":
                path.write_bytes(b"half")
            raise error
        return real(path, *arguments)

    monkeypatch.setattr(snapshot_writer, name, failing)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize(
    ("function", "file"),
    [
        ("write_tensors", "rank-{last}.safetensors"),
        ("write_atomic", "rank-{last}.json"),
        ("write_atomic", "manifest.json"),
    ],
)
@pytest.mark.parametrize("at", ["the next save", "the end"])
def test_a_full_disk_ends_all_ranks_and_leaves_nothing(
    at: str, function: str, file: str, world: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the snapshot, and the rank where there are several; the one before stays."""
    all_ranks(world, lambda ranks: save(tmp_path, 1, state(), ranks))
    last = f"{world - 1:05}"
    fail(monkeypatch, function, FULL, lambda path: path.name == file.format(last=last))

    def run(ranks: Ranks) -> None:
        with SnapshotWriter(tmp_path, 2, ranks) as writer:
            writer.save(2, cut(state(2), ranks), {})
            if at == "the next save":
                writer.save(3, cut(state(2), ranks), {})
                pytest.fail("the error is lost")

    errors = on_ranks(world, run)
    where = rf"{re.escape(str(tmp_path))}/step-000002: cannot be written: No space left on device"
    if world > 1:
        where = rf"rank {0 if file == 'manifest.json' else world - 1}: {where}"
    for error in errors:
        assert isinstance(error, InputError) and re.fullmatch(where, str(error))
    assert names(tmp_path) == ["step-000001"]
    assert_same(read(tmp_path)[1], cut(state(), ALONE))


def test_a_real_full_disk(tmp_path: Path) -> None:
    """The system refuses to let a file grow."""
    save(tmp_path, 1, {"x": torch.ones(4)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(InputError, match="step-000002: cannot be written: File too large"):
            save(tmp_path, 2, {"x": torch.ones(1 << 20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["step-000001"]


def test_the_room_of_a_part_that_failed_is_given_back_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run may go on for many steps before it saves again."""
    fail(monkeypatch, "write_tensors", FULL, lambda path: True)
    writer = SnapshotWriter(tmp_path, 1)
    writer.save(1, cut(state(), ALONE), {})
    assert writer._written.wait(60)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_bug_in_the_thread_is_not_lost_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, "write_tensors", ZeroDivisionError("bug"), lambda p: "rank-00001" in p.name)
    errors = on_ranks(2, lambda ranks: save(tmp_path, 1, state(), ranks))
    assert isinstance(errors[1], ZeroDivisionError)
    assert isinstance(errors[0], InputError) and str(errors[0]) == "rank 1: ZeroDivisionError: bug"


def test_rows_that_are_nobodys_or_two_ranks_make_no_snapshot(tmp_path: Path) -> None:
    for start in (2, 4):

        def run(ranks: Ranks, start: int = start) -> None:
            part = Slice(torch.ones(3), start * ranks.rank, (6,))
            with SnapshotWriter(tmp_path, 1, ranks) as writer:
                writer.save(1, {"x": part}, {})

        first, second = on_ranks(2, run)
        assert isinstance(first, ValueError) and str(first).startswith("x: the ranks' rows are not")
        assert isinstance(second, InputError)
        assert names(tmp_path) == []


def test_a_rank_that_writes_nothing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread hangs; rank 0's gives up, and no rank waits for ever."""
    monkeypatch.setattr(snapshot_writer, "STRAGGLER_S", 0.2)
    real = SnapshotWriter._write_part

    def absent(self: SnapshotWriter, *arguments: Any) -> None:
        if self.ranks.rank != 1:
            real(self, *arguments)

    monkeypatch.setattr(SnapshotWriter, "_write_part", absent)
    for error in on_ranks(3, lambda ranks: save(tmp_path, 1, state(), ranks)):
        assert isinstance(error, InputError) and "rank 0: " in str(error)
        assert "no part of rank 1 within" in str(error)
    assert names(tmp_path) == []


def test_a_run_that_fails_keeps_the_snapshot_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says both where that fails too."""
    gate = Gate(monkeypatch)
    threading.Timer(0.3, gate.open.set).start()
    with pytest.raises(InputError, match=r"^loss nan$"), SnapshotWriter(tmp_path, 2) as writer:
        writer.save(1, cut(state(), ALONE), {})
        raise InputError("loss nan")
    assert read(tmp_path)[0] == 1
    fail(monkeypatch, "write_tensors", FULL, lambda path: True)
    message = r"^loss nan; besides: .*step-000002: cannot be written"
    with pytest.raises(InputError, match=message), SnapshotWriter(tmp_path, 2) as writer:
        writer.save(2, cut(state(), ALONE), {})
        raise InputError("loss nan")


def test_a_run_that_fails_alone_does_not_wait_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 is gone: what rank 0 has begun is no snapshot, and the next start removes it."""
    monkeypatch.setattr(snapshot_writer, "LEAVING_S", 0.2)
    began = time.monotonic()

    def run(ranks: Ranks) -> None:
        with SnapshotWriter(tmp_path, 2, ranks) as writer:
            if ranks.rank == 1:
                raise InputError("gone")
            writer.save(1, cut(state(), ranks), {})
            raise InputError("rank 1 does not answer")

    errors = on_ranks(2, run)
    assert [str(error) for error in errors] == ["rank 1 does not answer", "gone"]
    assert time.monotonic() - began < 30
    assert [name[:12] for name in names(tmp_path)] == [".step-000001"]
    assert newest(tmp_path, repair=False) == (None, []) and names(tmp_path) != []
    assert newest(tmp_path, repair=True) == (None, []) and names(tmp_path) == []


def test_what_an_earlier_start_left_is_not_mixed_in(tmp_path: Path) -> None:
    """A rank of a run that was killed may still be writing when the next one saves that step."""
    old = tmp_path / ".step-000001.0ld.tmp"
    old.mkdir(parents=True)
    (old / "rank-00001.json").write_text("{}")
    all_ranks(2, lambda ranks: save(tmp_path, 1, state(), ranks))
    assert names(tmp_path) == [old.name, "step-000001"]


# -- damaged and foreign --------------------------------------------------------------------------


def flip(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: os.truncate(path, 50),
    "gone": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "one bit": flip,
}


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("file", ["rank-00000.safetensors", "rank-00002.safetensors"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_ranks_file_is_found_by_all(
    damage: str, file: str, world: int, tmp_path: Path
) -> None:
    """Whichever rank checks it: all use the snapshot before, and warn alike."""
    for step in (1, 2):
        all_ranks(3, lambda ranks, step=step: save(tmp_path, step, state(step), ranks))
    DAMAGES[damage](tmp_path / "step-000002" / file)

    def look(ranks: Ranks) -> tuple[int, list[str]]:
        found, warnings = newest(tmp_path, repair=True, ranks=ranks)
        assert found is not None
        slices = empty(state(), ranks)
        found.restore(slices)
        assert_same(slices, cut(state(1), ranks))
        return found.step, warnings

    results = all_ranks(world, look)
    assert all(result == results[0] for result in results)
    step, (warning,) = results[0]
    assert step == 1 and str(tmp_path / "step-000002" / file) in warning
    assert warning.endswith("; set aside as step-000002.damaged")
    assert names(tmp_path) == ["step-000001", "step-000002.damaged"]


def test_another_format_is_refused_and_kept(tmp_path: Path) -> None:
    """A whole snapshot of another version is not damaged: it is worth a run."""
    save(tmp_path, 1, state())
    for other in (1, 3):
        path = tmp_path / "step-000001" / "manifest.json"
        manifest = json.loads(path.read_text())
        del manifest["sha256"]
        manifest["format"] = other
        manifest["sha256"] = snapshot.manifest_digest(manifest)
        path.write_text(json.dumps(manifest))
        with pytest.raises(InputError, match=rf"step-000001: snapshot format {other}, .* reads 2"):
            newest(tmp_path, repair=True)
        assert names(tmp_path) == ["step-000001"]


def test_nodes_must_share_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 2 has a disk of its own: named at the start, before anything is trained or set aside."""
    monkeypatch.setattr(snapshot, "SHARED_S", 0.3)
    save(tmp_path / "shared", 1, state())

    def folder(ranks: Ranks) -> Path:
        return tmp_path / ("own" if ranks.rank == 2 else "shared")

    def write(ranks: Ranks) -> None:
        SnapshotWriter(folder(ranks), 1, ranks)

    def look(ranks: Ranks) -> None:
        newest(folder(ranks), repair=True, ranks=ranks)

    for action in (write, look):
        for error in on_ranks(3, action):
            assert isinstance(error, InputError)
            assert re.fullmatch(r"rank 2: .*own on .* is not the folder that rank 0 .*", str(error))
    assert names(tmp_path / "shared") == ["step-000001"]
    assert all_ranks(3, lambda ranks: read(tmp_path / "shared", ranks)[0]) == [1, 1, 1]
