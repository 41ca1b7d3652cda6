"""Writers leave the old file or the new one, whole, whatever happens in between."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from s1fast import files
from s1fast.errors import InputError
from s1fast.files import new_directory, parse_json, read_bytes, read_json_object, write_atomic

DISK_FULL = OSError(errno.ENOSPC, "No space left on device")
FAILURES = [DISK_FULL, KeyboardInterrupt(), RuntimeError("a bug")]


@pytest.fixture(autouse=True)
def strict_umask() -> Iterator[None]:
    """Modes are the writers' own, not the shell's."""
    old = os.umask(0o077)
    yield
    os.umask(old)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its contents."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


def fail_at(monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException) -> None:
    """Makes a system call of the writers fail."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(os if call != "rename" else Path, call, fail)


# -- write_atomic -------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [None, b"the old contents"])
def test_write_atomic(old: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    if old is not None:
        path.write_bytes(old)
        path.chmod(0o600)
    write_atomic(path, "näive")
    assert tree(tmp_path) == {"config.toml": "näive".encode()}
    assert mode(path) == 0o644
    write_atomic(path, b"\0\xff")
    assert path.read_bytes() == b"\0\xff"


@pytest.mark.parametrize("error", FAILURES, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("call", ["fsync", "replace", "fdopen", "chmod"])
@pytest.mark.parametrize("old", [None, b"the old contents"])
def test_write_atomic_that_fails(
    call: str,
    error: BaseException,
    old: bytes | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "config.toml"
    if old is not None:
        path.write_bytes(old)
    before = tree(tmp_path)
    fail_at(monkeypatch, call, error)
    expected = InputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        write_atomic(path, b"new" * 1000)
    assert tree(tmp_path) == before
    if expected is InputError:
        assert str(caught.value) == f"{path}: cannot be written: No space left on device"


def test_what_cannot_be_encoded_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_atomic(tmp_path / "x", "\ud800")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("parent", ["missing", "a-file"])
def test_write_atomic_without_a_folder(parent: str, tmp_path: Path) -> None:
    (tmp_path / "a-file").write_text("not a folder")
    path = tmp_path / parent / "x"
    with pytest.raises(InputError, match=re.escape(f"{path}: cannot be written: ")):
        write_atomic(path, "x")
    assert tree(tmp_path) == {"a-file": b"not a folder"}


def test_data_is_on_the_disk_before_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut the new name never stands for an empty file."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(handle: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{handle}")).suffix or "folder")
        fsync(handle)

    def record_replace(source: Any, target: Any) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write_atomic(tmp_path / "x", b"new")
    assert calls == [".tmp", "replace", "folder"]


# -- new_directory ------------------------------------------------------------------------------


def fill(folder: Path) -> None:
    (folder / "weights").mkdir()
    (folder / "weights" / "a.bin").write_bytes(b"a" * 1000)
    (folder / "config.json").write_text("{}")


FILLED = {"hf": None, "hf/weights": None, "hf/weights/a.bin": b"a" * 1000, "hf/config.json": b"{}"}


def test_new_directory(tmp_path: Path) -> None:
    target = tmp_path / "hf"
    with new_directory(target) as folder:
        assert folder.parent == tmp_path and not list(folder.iterdir())
        fill(folder)
        assert not target.exists()
    assert tree(tmp_path) == FILLED
    assert mode(target) == mode(target / "weights") == 0o755
    assert mode(target / "config.json") == mode(target / "weights" / "a.bin") == 0o644


def test_new_directory_makes_its_parents(tmp_path: Path) -> None:
    with new_directory(tmp_path / "a" / "b" / "hf") as folder:
        fill(folder)
    assert {f"a/b/{name}" for name in FILLED} <= tree(tmp_path).keys()


@pytest.mark.parametrize(
    "error", [*FAILURES, SafetensorError("I/O error")], ids=lambda e: type(e).__name__
)
def test_new_directory_whose_block_fails(error: BaseException, tmp_path: Path) -> None:
    ours = isinstance(error, OSError | SafetensorError)
    with (
        pytest.raises(InputError if ours else type(error)) as caught,
        new_directory(tmp_path / "hf") as folder,
    ):
        fill(folder)
        raise error
    assert not list(tmp_path.iterdir())
    assert not ours or str(caught.value).startswith(f"{tmp_path / 'hf'}: cannot be written: ")


@pytest.mark.parametrize("error", FAILURES, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("call", ["fsync", "chmod", "rename"])
def test_new_directory_that_cannot_be_finished(
    call: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = InputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), new_directory(tmp_path / "hf") as folder:
        fill(folder)
        fail_at(monkeypatch, call, error)
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


def test_new_directory_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, "mkdir", DISK_FULL)
    with pytest.raises(InputError, match="hf: cannot be created: No space left"):
        new_directory(tmp_path / "hf").__enter__()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "link to nothing"])
def test_existing_target_is_refused(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "hf"
    if kind == "file":
        target.write_text("precious")
    elif kind == "link to nothing":
        target.symlink_to(tmp_path / "nothing")
    else:
        target.mkdir()
    if kind == "folder":
        (target / "config.json").write_text("precious")
    before, entries = tree(tmp_path), len(list(tmp_path.iterdir()))
    with (
        pytest.raises(InputError, match=re.escape(f"{target}: exists already")),
        new_directory(target),
    ):
        pytest.fail("the block ran")
    assert tree(tmp_path) == before and len(list(tmp_path.iterdir())) == entries


def test_folder_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "a-file").write_text("precious")
    with pytest.raises(InputError, match="a-file: cannot be created: File exists"):
        new_directory(tmp_path / "a-file" / "hf").__enter__()
    assert tree(tmp_path) == {"a-file": b"precious"}


def test_everything_is_flushed_before_the_folder_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    fsync = files.fsync

    def record(path: Path) -> None:
        flushed.append(f"{path.name if path != tmp_path else 'parent'} {target.exists()}")
        fsync(path)

    target = tmp_path / "hf"
    monkeypatch.setattr(files, "fsync", record)
    with new_directory(target) as folder:
        fill(folder)
    inside = ["a.bin False", "config.json False", f"{folder.name} False", "weights False"]
    assert sorted(flushed[:-1]) == sorted(inside)
    assert flushed[-1] == "parent True"


# -- killed ------------------------------------------------------------------------------------

WRITE_FOREVER = """
import itertools, sys
from pathlib import Path
from s1fast.files import write_atomic
for i in itertools.count():
    write_atomic(Path(sys.argv[1]), bytes([65 + i % 26]) * 400_000)
"""

EXPORT_FOREVER = """
import itertools, sys
from pathlib import Path
from s1fast.files import new_directory
for i in itertools.count():
    with new_directory(Path(sys.argv[1]) / f"run-{i}") as folder:
        for name in "abc":
            (folder / name).write_bytes(name.encode() * 200_000)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Starts a program that writes without end; whatever happens, it is killed."""
    running: list[subprocess.Popen[bytes]] = []

    def popen(program: str, target: Path) -> subprocess.Popen[bytes]:
        running.append(subprocess.Popen([sys.executable, "-c", program, str(target)]))
        return running[-1]

    yield popen
    for process in running:
        process.kill()
        process.wait()


def wait_for(found: Any, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not found():
        assert process.poll() is None and time.monotonic() < deadline, "the writer wrote nothing"
        time.sleep(0.005)


def test_killed_while_replacing_a_file(tmp_path: Path, start: Any) -> None:
    path = tmp_path / "state"
    for _ in range(4):
        path.unlink(missing_ok=True)
        process = start(WRITE_FOREVER, path)
        wait_for(path.exists, process)
        for _ in range(30):  # a reader at any moment sees what a crash would leave
            data = path.read_bytes()
            assert len(data) == 400_000 and len(set(data)) == 1
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        data = path.read_bytes()
        assert len(data) == 400_000 and len(set(data)) == 1


def test_killed_while_writing_a_folder(tmp_path: Path, start: Any) -> None:
    for round_ in range(4):
        parent = tmp_path / str(round_)
        process = start(EXPORT_FOREVER, parent)
        wait_for(lambda parent=parent: (parent / "run-3").exists(), process)
        for i in range(4, 24):  # what stands there at any moment is what a crash would leave
            folder = parent / f"run-{i}"
            while not folder.exists():
                assert process.poll() is None
            assert sorted(p.stat().st_size for p in folder.iterdir()) == [200_000] * 3
        process.send_signal(signal.SIGKILL)
        process.wait()
        whole = sorted(parent.glob("run-*"))
        assert len(whole) >= 4
        for folder in whole:
            assert tree(folder) == {name: name.encode() * 200_000 for name in "abc"}
        # What the killed writer left is hidden, and does not stop the next one.
        left = [p for p in parent.iterdir() if p not in whole]
        assert len(left) <= 1 and all(p.name.startswith(".run-") for p in left)
        with new_directory(parent / f"run-{len(whole)}") as folder:
            fill(folder)


# -- readers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 5000, "not valid JSON"),
        (b"", "not valid JSON"),
    ],
    ids=lambda value: str(value[:12]),
)
def test_json_that_is_none(data: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=rf"^config\.json: .*{reason}"):
        parse_json(data, "config.json")


def test_json_object(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": [1]}')  # some editors put a byte order mark in front
    assert read_json_object(path) == {"a": [1]}
    path.write_text("[1]")
    with pytest.raises(InputError, match=re.escape(f"{path}: expected a JSON object, found list")):
        read_json_object(path)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{re.escape(str(tmp_path))}: cannot be read: Is a dir"):
        read_bytes(tmp_path)
    with pytest.raises(InputError, match="x: cannot be read: No such file"):
        read_bytes(tmp_path / "x")
