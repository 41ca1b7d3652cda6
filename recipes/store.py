"""Answers that were paid for: an SQLite file that survives kill -9, a full disk and a second run.

One transaction a record, written ahead and flushed (synchronous=FULL): once `put` returns, the
record is on the disk. A request is noted before it is sent, so that the next run can say how many
were under way when this one was killed. Beside the file lie a lock, which keeps a second process
from paying for the same questions, and a reserve, which is given up when the disk is full, so that
answers already paid for still find room.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from s1fast.errors import InputError
from s1fast.files import make_directory

SCHEMA = "1"
RESERVE_BYTES = 32 << 20
"""Room for every answer under way: 64 of 200 KB, in the log and again in the file."""

_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE records (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE under_way (key TEXT PRIMARY KEY);
"""


class Store:
    """Records by key, for one run identity; a context manager that closes the file.

    Args:
        path: the SQLite file; its folder is made.
        identity: what all records have in common, as teacher and model. A file with records of
            another identity is an error: its answers would be mixed with these.

    Raises:
        InputError: another identity or schema, no SQLite file, in use, or no room.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        make_directory(path.parent)
        self.path, self.full = path, False
        self._stack = contextlib.ExitStack()
        try:
            self._open(identity)
        except BaseException:
            self._stack.close()
            raise

    def _open(self, identity: dict[str, Any]) -> None:
        self._reserve = self.path.with_name(self.path.name + ".reserve")
        with self._named_errors():
            self._stack.callback(os.close, self._locked())
            self._stack.callback(self._reserve.unlink, missing_ok=True)
            self._make_reserve()
            self._db = sqlite3.connect(self.path, isolation_level=None)
            self._stack.callback(self._db.close)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._prepare(identity)
            self.abandoned = self._count_abandoned()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def __len__(self) -> int:
        return self._db.execute("SELECT count(*) FROM records").fetchone()[0]

    def __contains__(self, key: str) -> bool:
        return bool(self._db.execute("SELECT 1 FROM records WHERE key=?", (key,)).fetchone())

    def get(self, key: str) -> dict[str, Any] | None:
        found = self._db.execute("SELECT value FROM records WHERE key=?", (key,)).fetchone()
        return json.loads(found[0]) if found else None

    def records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(key, record) in the order in which they were stored."""
        for key, value in self._db.execute("SELECT key, value FROM records ORDER BY rowid"):
            yield key, json.loads(value)

    def begin(self, key: str) -> None:
        """Notes a request that is about to be sent."""
        with self._named_errors():
            self._db.execute("INSERT OR REPLACE INTO under_way VALUES (?)", (key,))

    def release(self, key: str) -> None:
        """Takes the note back: the request ended, without an answer."""
        with self._named_errors():
            self._db.execute("DELETE FROM under_way WHERE key=?", (key,))

    def put(self, key: str, record: dict[str, Any]) -> None:
        """Stores a record, once; when it returns the record is on the disk.

        On a full disk the reserve is given up and `full` is set: the caller should stop.
        """
        value = json.dumps(record, ensure_ascii=False)
        with self._named_errors():
            try:
                self._put(key, value)
            except sqlite3.OperationalError:
                if self.full:  # the reserve is gone already
                    raise
                self.full = True
                self._reserve.unlink(missing_ok=True)
                self._put(key, value)

    def _put(self, key: str, value: str) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.execute("INSERT INTO records VALUES (?, ?)", (key, value))
            self._db.execute("DELETE FROM under_way WHERE key=?", (key,))
            self._db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.OperationalError):  # rolled back by itself
                self._db.execute("ROLLBACK")
            raise

    def _locked(self) -> int:
        """An open lock file, which the kernel releases however this process ends."""
        name = self.path.with_name(self.path.name + ".lock")
        handle = os.open(name, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise InputError(
                f"{self.path}: another run is writing to this store; wait for it or choose another"
            ) from None
        return handle

    def _make_reserve(self) -> None:
        with self._reserve.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)

    def _prepare(self, identity: dict[str, Any]) -> None:
        names = {name for (name,) in self._db.execute("SELECT name FROM sqlite_master")}
        ours = json.dumps(identity, sort_keys=True)
        if not names:
            self._db.executescript(f"BEGIN; {_TABLES}")
            rows = [("schema", SCHEMA), ("identity", ours), ("abandoned", "0")]
            self._db.executemany("INSERT INTO meta VALUES (?, ?)", rows)
            self._db.execute("COMMIT")
            return
        meta = dict(self._db.execute("SELECT name, value FROM meta")) if "meta" in names else {}
        if meta.get("schema") != SCHEMA or not {"records", "under_way"} <= names:
            raise InputError(
                f"{self.path}: a store of schema {meta.get('schema', 'unknown')}, expected "
                f"{SCHEMA}; choose another file"
            )
        if meta["identity"] != ours and not len(self):  # the run that made it got no answer
            self._db.execute("UPDATE meta SET value=? WHERE name='identity'", (ours,))
        elif meta["identity"] != ours:
            raise InputError(
                f"{self.path}: a store of another run, {meta['identity']}, not {ours}; choose "
                "another file for this one"
            )

    def _count_abandoned(self) -> int:
        """How many requests, over all runs, were under way when a process was killed."""
        self._db.execute("BEGIN IMMEDIATE")
        self._db.execute(
            "UPDATE meta SET value = value + (SELECT count(*) FROM under_way) "
            "WHERE name = 'abandoned'"
        )
        self._db.execute("DELETE FROM under_way")
        self._db.execute("COMMIT")
        return int(self._db.execute("SELECT value FROM meta WHERE name='abandoned'").fetchone()[0])

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Turns the system's and SQLite's errors into one that names the file."""
        try:
            yield
        except sqlite3.IntegrityError:
            raise  # a record stored twice: our bug
        except sqlite3.Error as error:
            raise InputError(f"{self.path}: {error}; {_REMEDY}") from None
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror or error}; {_REMEDY}") from None


def peek(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A store's identity and records, read beside whoever uses it; none of one that a kill left
    without its tables.

    Raises:
        InputError: the file is no store.
    """
    try:
        with contextlib.closing(sqlite3.connect(path)) as db:
            if not db.execute("SELECT 1 FROM sqlite_master").fetchone():
                return {}, []
            rows = db.execute("SELECT value FROM meta WHERE name='identity'").fetchall()
            records = [json.loads(value) for (value,) in db.execute("SELECT value FROM records")]
    except sqlite3.Error as error:
        raise InputError(f"{path}: {error}; choose another folder") from None
    return json.loads(rows[0][0]), records


_REMEDY = "what was stored is kept: free space or choose another file, and run again"
