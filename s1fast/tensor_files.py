"""Safetensors files, written as a stream and read by rows.

The format is a length, a JSON header and the bytes. It is written by hand because a state of many
gigabytes is hashed in the same pass, never copied, and written without holding Python's lock, so
that a training loop goes on meanwhile. Reading is the safetensors library's.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from s1fast.errors import InputError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
"""What weights and moments may be stored as, and its name in a file."""


def write_tensors(
    path: Path,
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    pieces: Iterable[Tensor],
    metadata: dict[str, str] | None = None,
) -> str:
    """Writes a file and flushes it to the disk.

    Args:
        tensors: name -> dtype and shape, wider dtypes first so that all are aligned.
        pieces: contiguous CPU tensors whose bytes, one after the other, are those of `tensors`.

    Returns:
        The file's SHA-256 in hexadecimal.

    Raises:
        OSError: as writing does.
        ValueError: there are more or fewer bytes in the pieces.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for data in (struct.pack("<Q", len(text)), text):
            digest.update(data)
            file.write(data)
        written = 0
        for piece in pieces:
            view = piece.reshape(-1).view(torch.uint8).numpy().data
            digest.update(view)
            file.write(view)
            written += len(view)
        if written != end:
            raise ValueError(f"{path}: {written} bytes were given for {end}")
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def open_tensors(path: Path) -> Any:
    """The library's handle of a file; an InputError that names it when it is not usable."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a usable safetensors file: {error}") from None


class TensorFiles:
    """A folder's files, each opened when it is first needed and once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handles: dict[str, Any] = {}

    def part(self, file: str, name: str) -> Any:
        """The library's slice of a tensor: get_shape(), get_dtype(), and [a:b], which reads."""
        if file not in self._handles:
            self._handles[file] = open_tensors(self.folder / file)
        try:
            return self._handles[file].get_slice(name)
        except SafetensorError as error:
            raise InputError(f"{self.folder / file}: no tensor {name}: {error}") from None
