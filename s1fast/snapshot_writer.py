"""Saves snapshots behind the training loop's back: whole or not at all, one at a time.

The loop pays for a copy of the state to the host. A thread of each rank then writes its file into a
temporary folder, and beside it a note, rank-00001.json, that says what is in it. Rank 0's thread
waits for all notes, writes the manifest and renames the folder. The threads meet through files
alone: collectives are the loop's, and a thread's would mix with them. What a thread could not do
is an error of the loop's next save, on all ranks.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from s1fast.errors import InputError
from s1fast.files import fsync, make_directory, read_json_object, write_atomic
from s1fast.ranks import ALONE, Ranks
from s1fast.slices import Slice
from s1fast.snapshot import FORMAT, check_shared, entry_of, manifest_digest, step_folders
from s1fast.tensor_files import write_tensors

BLOCK_BYTES = 1 << 30
"""The host's copy lies in blocks of so many bytes: torch rounds pinned ones up to powers of two."""
STRAGGLER_S = 600.0
"""How long rank 0, its own file written, waits for the others'."""
LEAVING_S = 30.0
"""How long a run that has failed waits for the snapshot in flight: it must end within a minute."""


class SnapshotWriter:
    """The snapshots of a run that is going on.

    All ranks build it, and call save and finish at the same steps. As a context it finishes at the
    end of its block; a block that fails waits for the snapshot in flight no longer than LEAVING_S.

    What a save costs the loop is the copy. Its floor is bytes over the PCIe rate: for 32B on 16
    GPUs with bf16 moments 16.4 GB a rank, 0.3 s at 55 GB/s. The first save also takes the pinned
    memory. Measured on an H100: not yet.
    """

    def __init__(self, folder: Path, keep: int, ranks: Ranks = ALONE) -> None:
        """
        Args:
            folder: holds the snapshots; made if need be.
            keep: how many of the newest are kept.

        Raises:
            InputError: the folder cannot be written to, or the ranks see different ones.
        """
        self.folder, self.keep, self.ranks = folder, keep, ranks
        with ranks.together():
            make_directory(folder)
        self._word = check_shared(folder, ranks)
        self._blocks: list[Tensor] = []
        self._thread: Thread | None = None

    def save(self, step: int, slices: Mapping[str, Slice], facts: dict[str, Any]) -> None:
        """Begins folder/step-NNNNNN, after finishing the one before.

        What is enqueued on the current stream afterwards may change the state at once.

        Args:
            slices: name -> this rank's rows; the same names on all ranks.
            facts: JSON values that a resuming run compares with its own.

        Raises:
            InputError: the snapshot before could not be written, on whichever rank.
        """
        self.finish()
        held = [(name, part) for name, part in slices.items() if len(part.tensor)]
        held.sort(key=lambda item: -item[1].tensor.itemsize)  # so all are aligned in the file
        copied = self._copy([part.tensor for _, part in held])
        parts: Parts = {
            name: (
                part.tensor.dtype,
                tuple(part.tensor.shape),
                {**entry_of(part), "start": part.start, "stop": part.stop},
            )
            for name, part in held
        }
        self._written, self._cancelled = Event(), Event()
        self._error: Exception | None = None
        self._temporary = self.folder / f".step-{step:06}.{self._word}.tmp"
        self._thread = Thread(target=self._run, args=(step, parts, facts, copied), daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Waits until the snapshot in flight, if there is one, is whole.

        Raises:
            InputError: it could not be written, on whichever rank; nothing of it is left.
        """
        if self._thread is None:
            return
        try:
            self._written.wait()
            self._agree()  # all files are there: rank 0's thread waits for none in vain
            self._thread.join()
            self._agree()
        except Exception:
            self._cancelled.set()
            self._thread.join()
            if self.ranks.rank == 0:
                shutil.rmtree(self._temporary, ignore_errors=True)
            raise
        finally:
            self._thread = None

    def _agree(self) -> None:
        with self.ranks.together():
            if self._error is not None:
                raise self._error

    def __enter__(self) -> SnapshotWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.finish()
        elif self._thread is not None:
            # The others may be gone, so nothing is exchanged with them.
            self._thread.join(LEAVING_S)
            self._cancelled.set()
            if self._error is None:
                return
            if isinstance(error, InputError):  # whose line is all that the user sees
                raise InputError(f"{error}; besides: {self._error}") from error
            error.add_note(f"besides: {self._error}")

    def _copy(self, tensors: list[Tensor]) -> torch.cuda.Event | None:
        """Copies the tensors' bytes to the blocks, one after the other; the event is its end."""
        total = sum(x.nbytes for x in tensors)
        pinned = any(x.is_cuda for x in tensors)
        if sum(len(block) for block in self._blocks) != total:
            self._blocks = [
                torch.empty(min(BLOCK_BYTES, total - at), dtype=torch.uint8, pin_memory=pinned)
                for at in range(0, total, BLOCK_BYTES)
            ]
        at = 0
        for x in tensors:
            data = x.detach().reshape(-1).view(torch.uint8)
            while len(data):
                room = self._blocks[at // BLOCK_BYTES][at % BLOCK_BYTES :][: len(data)]
                room.copy_(data[: len(room)], non_blocking=True)
                data, at = data[len(room) :], at + len(room)
        if not pinned:
            return None
        # On the loop's own stream, so that its next kernels wait and the host does not.
        event = torch.cuda.Event()
        event.record()
        return event

    # -- in the thread ----------------------------------------------------------------------

    def _run(self, step: int, parts: Parts, facts: dict[str, Any], copied: Any) -> None:
        target = self.folder / f"step-{step:06}"
        self._error = _failure(target, lambda: self._write_part(parts, copied))
        self._written.set()
        if self._error is None and self.ranks.rank == 0:
            self._error = _failure(target, lambda: self._make_whole(target, step, facts))

    def _write_part(self, parts: Parts, copied: Any) -> None:
        """This rank's file and the note on it."""
        if copied is not None:
            copied.synchronize()
        self._temporary.mkdir(exist_ok=True)
        path = self._temporary / _part_name(self.ranks.rank)
        try:
            layout = {name: (dtype, shape) for name, (dtype, shape, _) in parts.items()}
            sha256 = write_tensors(path, layout, self._blocks)
        except BaseException:
            path.unlink(missing_ok=True)  # the room is needed
            raise
        note = {"sha256": sha256, "tensors": {name: entry for name, (_, _, entry) in parts.items()}}
        write_atomic(path.with_suffix(".json"), json.dumps(note))

    def _make_whole(self, target: Path, step: int, facts: dict[str, Any]) -> None:
        """Waits for all notes and makes the folder a snapshot; rank 0's part."""
        if not self._all_written():
            return
        paths = [self._temporary / _part_name(rank) for rank in range(self.ranks.world)]
        notes = [read_json_object(path.with_suffix(".json")) for path in paths]
        names = [path.name for path in paths]
        manifest = {
            "format": FORMAT,
            "step": step,
            "facts": facts,
            "files": {n: {"sha256": note["sha256"]} for n, note in zip(names, notes, strict=True)},
            "tensors": _table({n: note["tensors"] for n, note in zip(names, notes, strict=True)}),
        }
        manifest["sha256"] = manifest_digest(manifest)
        write_atomic(self._temporary / "manifest.json", json.dumps(manifest))
        for path in paths:
            path.with_suffix(".json").unlink()
        fsync(self._temporary)
        self._temporary.rename(target)
        fsync(self.folder)
        for old in step_folders(self.folder)[: -self.keep]:
            # Renamed first: one that is half removed would look like a damaged snapshot.
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.old.tmp")))

    def _all_written(self) -> bool:
        """Waits for the notes of all ranks; False when the loop does not wait any more."""
        missing = {
            _part_name(r).replace(".safetensors", ".json"): r for r in range(self.ranks.world)
        }
        give_up = time.monotonic() + STRAGGLER_S
        while True:
            # Listing the folder, unlike asking for a file, is not answered from an old cache.
            for name in os.listdir(self._temporary):
                missing.pop(name, None)
            if not missing:
                return True
            if time.monotonic() > give_up:
                late = ", ".join(str(rank) for rank in missing.values())
                raise InputError(
                    f"{self._temporary}: no part of rank {late} within {STRAGGLER_S:.0f} s"
                )
            if self._cancelled.wait(0.05):
                return False


Parts = dict[str, tuple[torch.dtype, tuple[int, ...], dict[str, Any]]]
"""name -> dtype and shape of a rank's rows, and the note's entry: the whole tensor's, and which."""


def _part_name(rank: int) -> str:
    return f"rank-{rank:05}.safetensors"


def _failure(target: Path, action: Callable[[], None]) -> Exception | None:
    try:
        action()
    except OSError as error:
        return InputError(f"{target}: cannot be written: {error.strerror or error}")
    except Exception as error:
        return error
    return None


def _table(files: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The manifest's tensors from what each file holds: every row once, and in order."""
    tensors: dict[str, Any] = {}
    for file, entries in files.items():
        for name, entry in entries.items():
            whole = {"dtype": entry["dtype"], "shape": entry["shape"]}
            known = tensors.setdefault(name, {**whole, "shards": []})
            known["shards"].append({"file": file, "start": entry["start"], "stop": entry["stop"]})
            if {**known, **whole} != known:
                raise ValueError(f"{name}: ranks hold rows of {known} and of {whole}")
    for name, entry in tensors.items():
        edges = [0, *(shard["stop"] for shard in entry["shards"])]
        starts = [shard["start"] for shard in entry["shards"]]
        if starts != edges[:-1] or edges[-1] != entry["shape"][0]:
            raise ValueError(f"{name}: the ranks' rows are not those of {entry}")
    return tensors
