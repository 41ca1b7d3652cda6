"""The resumable state of a training run: one safetensors file a rank and a JSON manifest.

    snapshots/step-000100/manifest.json          step, facts, where each tensor's rows lie
                          rank-00000.safetensors  that rank's rows of every tensor

A tensor is cut along its rows, so a run can go on with another number of ranks. A snapshot appears
whole or not at all, carries checksums, and loading it never unpickles anything.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from s1fast.errors import InputError
from s1fast.files import (
    make_directory,
    new_directory,
    read_json_object,
    remove_leftovers,
    write_atomic,
)

FORMAT = 1


@dataclass(frozen=True)
class Snapshot:
    """A whole snapshot on disk."""

    folder: Path
    step: int
    """Optimizer steps taken."""
    facts: dict[str, Any]
    """What the run must agree on to go on, as it was given to save."""
    tensors: dict[str, Any]

    def read(self, name: str, target: Tensor) -> None:
        """Copies a tensor, all its rows, into target.

        Raises:
            InputError: no such tensor, or one of another shape or dtype.
        """
        entry = self.tensors.get(name)
        if entry is None or entry["shape"] != list(target.shape):
            found = "is missing" if entry is None else f"has shape {entry['shape']}"
            raise InputError(f"{self.folder}: {name} {found}, expected {list(target.shape)}")
        for shard in entry["shards"]:
            path = self.folder / shard["file"]
            with safe_open(path, framework="pt") as file, torch.no_grad():
                rows = file.get_tensor(name)
                if rows.dtype != target.dtype:
                    raise InputError(f"{path}: {name} is {rows.dtype}, expected {target.dtype}")
                target[shard["start"] : shard["stop"]].copy_(rows)


def save(
    folder: Path, step: int, tensors: Mapping[str, Tensor], facts: dict[str, Any], keep: int
) -> None:
    """Writes folder/step-NNNNNN and removes all but the newest `keep` snapshots.

    Args:
        tensors: name -> tensor of at least one dimension.
        facts: JSON values that a resuming run compares with its own.
    """
    target = folder / f"step-{step:06}"
    with new_directory(target) as temporary:
        name = "rank-00000.safetensors"
        held = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(held, temporary / name)
        manifest = {
            "format": FORMAT,
            "step": step,
            "facts": facts,
            "files": {name: {"sha256": _sha256(temporary / name)}},
            "tensors": {
                key: {
                    "shape": list(tensor.shape),
                    "shards": [{"file": name, "start": 0, "stop": len(tensor)}],
                }
                for key, tensor in held.items()
            },
        }
        manifest["sha256"] = _digest(manifest)
        write_atomic(temporary / "manifest.json", json.dumps(manifest))
    for old in _folders(folder)[:-keep]:
        shutil.rmtree(old)


def newest(folder: Path, *, repair: bool) -> tuple[Snapshot | None, list[str]]:
    """The newest undamaged snapshot, and a warning for each damaged one.

    Args:
        repair: set damaged ones aside as step-NNNNNN.damaged and remove what a killed save left.
            Without it nothing is touched: the run may be going on.
    """
    warnings: list[str] = []
    if not folder.is_dir():
        return None, warnings
    if repair:
        make_directory(folder)
        remove_leftovers(folder)
    for candidate in reversed(_folders(folder)):
        try:
            return _open(candidate), warnings
        except InputError as error:
            warnings.append(str(error))
            if repair:
                aside = candidate.with_name(candidate.name + ".damaged")
                if aside.exists():
                    shutil.rmtree(aside)
                candidate.rename(aside)
                warnings[-1] += f"; set aside as {aside.name}"
    return None, warnings


def _folders(folder: Path) -> list[Path]:
    """Snapshots by step: their names sort so only up to a million of them."""
    named = (p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name))
    return sorted(named, key=lambda p: int(p.name.removeprefix("step-")))


def _open(folder: Path) -> Snapshot:
    manifest = read_json_object(folder / "manifest.json")
    if manifest.get("format") != FORMAT:
        raise InputError(f"{folder}: manifest format {manifest.get('format')!r}, expected {FORMAT}")
    try:
        if manifest.pop("sha256") != _digest(manifest):
            raise InputError(f"{folder}/manifest.json: checksum differs, the file is damaged")
        for name, entry in manifest["files"].items():
            if "/" in name or _sha256(folder / name) != entry["sha256"]:
                raise InputError(f"{folder / name}: checksum differs, the file is damaged")
            with safe_open(folder / name, framework="pt"):
                pass
        return Snapshot(folder, manifest["step"], manifest["facts"], manifest["tensors"])
    except (KeyError, TypeError, AttributeError, OSError, SafetensorError) as error:
        raise InputError(f"{folder}: damaged snapshot: {type(error).__name__}: {error}") from None


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
