"""The resumable state of a training run: one safetensors file a rank and a JSON manifest.

    snapshots/step-000100/manifest.json          format, step, facts, where each tensor's rows lie
                          rank-00000.safetensors  that rank's rows of every tensor
                          rank-00001.safetensors  ...

The manifest holds a SHA-256 of every file and, without that entry, of itself. A tensor is cut along
its rows, so a run can go on with another number of ranks: each reads the rows that it needs from
whichever files hold them. Nothing is ever unpickled.

A snapshot appears whole or not at all (snapshot_writer.py). A folder with a temporary name is what
a killed save left; the next start removes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from s1fast.errors import InputError
from s1fast.files import make_directory, read_json_object, remove_leftovers, write_atomic
from s1fast.ranks import ALONE, Ranks
from s1fast.slices import Slice
from s1fast.tensor_files import DTYPES, TensorFiles, open_tensors

FORMAT = 2

SHARED_S = 15.0
"""How long a file may take to show on another node of a shared file system."""


@dataclass(frozen=True)
class Snapshot:
    """A whole snapshot on disk."""

    folder: Path
    step: int
    """Optimizer steps taken."""
    facts: dict[str, Any]
    """What the run must agree on to go on, as it was given to save."""
    tensors: dict[str, Any]
    """name -> dtype, shape, and shards: which rows lie in which file."""
    _files: TensorFiles = field(repr=False, compare=False)

    def restore(self, slices: Mapping[str, Slice]) -> None:
        """Fills a state that has the snapshot's tensors, cut in whatever way.

        Raises:
            InputError: names, shapes or dtypes differ; nothing is filled then.
        """
        self._check(slices)
        for name, target in slices.items():
            self.read(name, target)

    def read(self, name: str, target: Slice) -> None:
        """Fills the slice with its rows of a tensor, cast to its dtype; only these are read.

        Raises:
            InputError: there is no such tensor, or one of another shape.
        """
        entry = self.tensors.get(name)
        if entry is None or entry["shape"] != list(target.shape):
            found = "is missing" if entry is None else f"has shape {entry['shape']}"
            raise InputError(f"{self.folder}: {name} {found}, expected {list(target.shape)}")
        for shard in entry["shards"]:

            def rows(first: int, last: int, file: str = shard["file"]) -> Tensor:
                return self._files.part(file, name)[first:last]

            target.fill(shard["start"], shard["stop"], rows)

    def _check(self, slices: Mapping[str, Slice]) -> None:
        wrong = []
        for name in sorted(self.tensors.keys() | slices.keys()):
            saved = _described(self.tensors.get(name))
            ours = _described(entry_of(slices[name]) if name in slices else None)
            if saved != ours:
                wrong.append(f"{name}: {saved} in the snapshot, {ours} in this run")
        if wrong:
            shown = "; ".join(wrong[:3]) + (" ..." if len(wrong) > 3 else "")
            raise InputError(f"{self.folder}: {len(wrong)} tensors do not fit: {shown}")


def _described(entry: dict[str, Any] | None) -> str:
    return "none" if entry is None else f"{entry['dtype']} {list(entry['shape'])}"


def entry_of(part: Slice) -> dict[str, Any]:
    """What the manifest says of a whole tensor."""
    if part.tensor.dtype not in DTYPES:
        raise ValueError(f"{part.tensor.dtype}: a snapshot's tensors are {list(DTYPES)}")
    return {"dtype": DTYPES[part.tensor.dtype], "shape": list(part.shape)}


class _OtherFormat(InputError):
    """A whole snapshot of another version: not damaged, so it is not set aside."""


def newest(
    folder: Path, *, repair: bool, ranks: Ranks = ALONE
) -> tuple[Snapshot | None, list[str]]:
    """The newest undamaged snapshot, and a warning for each damaged one; the same on all ranks.

    All ranks call it. Each checks its share of the files.

    Args:
        repair: set damaged ones aside as step-NNNNNN.damaged and remove what a killed save left.
            Without it nothing is touched: the run may be going on.

    Raises:
        InputError: the ranks see different folders, or the newest is of another format.
    """
    warnings: list[str] = []
    names: list[str] = []
    with ranks.together():
        if ranks.rank == 0 and folder.is_dir():
            if repair:
                make_directory(folder)
                remove_leftovers(folder)
            names = [path.name for path in step_folders(folder)]
    names = json.loads(ranks.exchange(json.dumps(names))[0])
    if names:
        check_shared(folder, ranks)
    for candidate in (folder / name for name in reversed(names)):
        try:
            return _open(candidate, ranks), warnings
        except _OtherFormat:
            raise
        except InputError as error:
            warnings.append(str(error))
        if repair:
            warnings[-1] += f"; set aside as {candidate.name}.damaged"
            with ranks.together():
                if ranks.rank == 0:
                    _set_aside(candidate)
    return None, warnings


def step_folders(folder: Path) -> list[Path]:
    """Snapshots by step: their names sort so only up to a million of them."""
    numbers = {p: p.name.removeprefix("step-") for p in folder.glob("step-*")}
    found = (p for p, number in numbers.items() if len(number) >= 6 and number.isdecimal())
    return sorted(found, key=lambda p: int(numbers[p]))


def _set_aside(folder: Path) -> None:
    aside = folder.with_name(folder.name + ".damaged")
    if aside.exists():
        shutil.rmtree(aside)
    folder.rename(aside)


def _open(folder: Path, ranks: Ranks) -> Snapshot:
    """The snapshot, every file of which one of the ranks has checked."""
    with ranks.together():
        manifest = read_json_object(folder / "manifest.json")
        if manifest.pop("sha256", None) != manifest_digest(manifest):
            raise InputError(f"{folder}/manifest.json: checksum differs, the file is damaged")
    if manifest.get("format") != FORMAT:
        raise _OtherFormat(
            f"{folder}: snapshot format {manifest.get('format')!r}, this version of s1fast reads "
            f"{FORMAT}; go on with the version that wrote it, or start anew in another folder"
        )
    with ranks.together():
        names = sorted(manifest["files"])[ranks.rank :: ranks.world]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            checks = [
                pool.submit(_check_file, folder / n, manifest["files"][n]["sha256"]) for n in names
            ]
        for check in checks:
            check.result()
    files = TensorFiles(folder)
    return Snapshot(folder, manifest["step"], manifest["facts"], manifest["tensors"], files)


def _check_file(path: Path, sha256: str) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    if found != sha256:
        raise InputError(f"{path}: checksum differs, the file is damaged")
    open_tensors(path)


def manifest_digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest without that entry."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def check_shared(folder: Path, ranks: Ranks) -> str:
    """Makes sure that all ranks see the same folder; returns a word that is theirs alone.

    Raises:
        InputError: naming the ranks that do not see a file which rank 0 has written there.
    """
    word = json.loads(ranks.exchange(json.dumps(secrets.token_hex(4)))[0])
    if ranks.world == 1:
        return word
    mark = folder / f".shared.{word}.tmp"
    with ranks.together():
        if ranks.rank == 0:
            write_atomic(mark, "")
    try:
        with ranks.together():
            _await(mark)
    finally:
        if ranks.rank == 0:
            mark.unlink()
    return word


def _await(mark: Path) -> None:
    give_up = time.monotonic() + SHARED_S
    # Listing the folder, unlike asking for the file, is not answered from an old cache.
    while not mark.parent.is_dir() or mark.name not in os.listdir(mark.parent):
        if time.monotonic() > give_up:
            raise InputError(
                f"{mark.parent} on {socket.gethostname()} is not the folder that rank 0 writes to; "
                "name one on a file system that all nodes share"
            )
        time.sleep(0.1)
