"""Reading and writing files so that nothing is half written, clobbered or trusted blindly.

Writers go to a temporary name beside the target, are flushed to the disk, and are renamed: after a
crash at any moment either the old file stands there or the new one, whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from s1fast.errors import InputError
from s1fast.ranks import ALONE, Ranks


def read_bytes(path: Path) -> bytes:
    """The file's bytes; an InputError that names it when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def parse_json(data: bytes | str, where: str) -> Any:
    """JSON value in data; an InputError that starts with `where` when it is none.

    NaN and Infinity are refused: they are not JSON, and no field of ours may hold them.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(data, parse_constant=refuse)
    except RecursionError:
        raise InputError(f"{where}: not usable JSON: nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, over-long integers
        raise InputError(f"{where}: not valid JSON: {error}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file; anything else is an InputError that names the file."""
    value = parse_json(read_bytes(path), str(path))
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def fsync(path: Path) -> None:
    """Forces a file or directory entry to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replaces the file at once: temporary file beside it, fsync, rename."""
    raw = data.encode() if isinstance(data, str) else data
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp makes 0600; an exported model is meant to be read
        temporary.replace(path)
        fsync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_directory(target: Path, ranks: Ranks = ALONE) -> Iterator[Path]:
    """Yields an empty folder that becomes `target` when the block ends without an error.

    Every file in it is flushed first. An existing target is an InputError before anything is
    written; on an error the folder is removed and `target` never appears.

    Where there are several ranks all of them write to the folder, and it is made when the block has
    ended without an error on each. There is no exchange within the block.
    """
    temporary = None
    try:
        with ranks.together():
            if ranks.rank == 0:
                temporary = _temporary_directory(target)
        name = ranks.exchange("" if temporary is None else str(temporary))[0]
        with ranks.together(), _errors_name(target):
            yield Path(name)
        with ranks.together(), _errors_name(target):
            if temporary is not None:
                _put_in_place(temporary, target)
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _temporary_directory(target: Path) -> Path:
    if os.path.lexists(target):
        raise InputError(f"{target}: exists already; choose another folder or remove this one")
    make_directory(target.parent)
    try:
        name = tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    except OSError as error:
        raise InputError(f"{target}: cannot be created: {error.strerror or error}") from None
    return Path(name)


@contextlib.contextmanager
def _errors_name(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{target}: cannot be written: {reason}") from None


def _put_in_place(temporary: Path, target: Path) -> None:
    for file in temporary.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)  # some writers make files private
        fsync(file)
    temporary.chmod(0o755)
    fsync(temporary)
    temporary.rename(target)
    fsync(target.parent)


def remove_leftovers(folder: Path) -> None:
    """Removes what the writers above left in a folder when their process was killed."""
    for path in folder.glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def make_directory(path: Path) -> None:
    """Creates the folder and its parents; an InputError when it cannot be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be created: {error.strerror or error}") from None
    if not os.access(path, os.W_OK):
        raise InputError(f"{path}: no permission to write there")
