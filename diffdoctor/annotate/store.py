"""A project's database: transactions, masks, people, and the chain of events."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffdoctor.annotate import masks
from diffdoctor.annotate.schema import OLDEST_SQLITE, ROLES, SCHEMA, VERSION
from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.web.guard import token_hash

DATABASE = "annotate.db"
_NO_CHAIN = b"\0" * 32
# What SQLite says of the disk.
_DISK_ERRORS = {"disk is full": errno.ENOSPC, "disk I/O error": errno.EIO, "readonly database": errno.EROFS}
# Writers of one process take turns at these, by the database's path. SQLite's own writers wait by trying again, and of
# eight that write without a pause one was left out for 30 seconds.
_turns: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)


class Store:
    """The database of an annotation project.

    Every thread has a connection of its own. What is written stands in a transaction that is durable when it ends
    (`synchronous=FULL`), together with the event that records it.

    Args:
        project: the folder, which must be there.
        create: make the database where there is none.

    Raises:
        UserError: there is none, SQLite is too old, the file system cannot hold it, or it is of another version.
    """

    def __init__(self, project: str | Path, *, create: bool = False):
        self.project, self.path = Path(project), Path(project) / DATABASE
        self._local = threading.local()
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            oldest = ".".join(map(str, OLDEST_SQLITE))
            raise UserError(expected("sqlite3", f"SQLite >= {oldest}", sqlite3.sqlite_version))
        if not create and not self.path.is_file():
            what = f"a project with {DATABASE}, as `diffdoctor annotate add` makes it"
            raise UserError(expected(self.project, what, "none"))
        with self._on_disk():
            version = self._version()
            if version == 0 and create:
                try:
                    self.connection.executescript(SCHEMA)
                except sqlite3.OperationalError:
                    self._roll_back()
                    if self._version() == 0:  # else another process made it a moment ago
                        raise
                version = self._version()
        if version != VERSION:
            raise UserError(expected(self.path, f"a project of version {VERSION}", version))

    def _version(self) -> int:
        return self.connection.execute("PRAGMA user_version").fetchone()[0]

    @property
    def connection(self) -> sqlite3.Connection:
        """This thread's connection, in autocommit mode."""
        if not hasattr(self._local, "connection"):
            self._local.connection = self._connected()
        return self._local.connection

    def _connected(self) -> sqlite3.Connection:
        try:
            connection = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            connection.row_factory = sqlite3.Row
            mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
        except sqlite3.DatabaseError as error:
            raise UserError(f"{self.path}: cannot be opened as a database ({error})") from error
        if mode != "wal":
            raise UserError(expected(self.path, "a local disk (network file systems have no WAL)", f"mode {mode}"))
        return connection

    def close(self) -> None:
        """Close this thread's connection."""
        if hasattr(self._local, "connection"):
            self._local.connection.close()
            del self._local.connection

    @contextlib.contextmanager
    def _on_disk(self) -> Iterator[None]:
        """Inside, an error of the disk is the system's, and names the file."""
        try:
            yield
        except sqlite3.OperationalError as error:
            for said, number in _DISK_ERRORS.items():
                if said in str(error):
                    raise OSError(number, str(error), str(self.path)) from error
            raise

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that no other writer interleaves; undone where the block raises."""
        connection = self.connection
        with _turns[os.path.realpath(self.path)], self._on_disk():
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                self._roll_back()
                raise

    def _roll_back(self) -> None:
        if self.connection.in_transaction:  # of a full disk SQLite has undone it already
            self.connection.execute("ROLLBACK")

    def one(self, sql: str, *values: Any) -> sqlite3.Row | None:
        """The first row of a query; None: there is none."""
        with self._on_disk():
            return self.connection.execute(sql, values).fetchone()

    def all(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        """The rows of a query."""
        with self._on_disk():
            return self.connection.execute(sql, values).fetchall()

    def put_mask(self, pixels: np.ndarray, bits: int = 1) -> str:
        """Keep a mask (H, W) uint8, of 0 and 255 alone for one bit; returns its name. Inside `writing`."""
        name = masks.digest(pixels, bits)
        if self.one("SELECT 1 FROM mask WHERE sha = ?", name) is None:
            values = (name, *pixels.shape, bits, masks.pack(pixels, bits))
            self.connection.execute("INSERT INTO mask VALUES (?, ?, ?, ?, ?)", values)
        return name

    def mask(self, name: str) -> np.ndarray:
        """The mask (H, W) uint8 of this name."""
        row = self.one("SELECT data, height, width, bits FROM mask WHERE sha = ?", name)
        return masks.unpack(*row)

    def log(self, kind: str, *, actor: int | None = None, task: int | None = None, **detail: Any) -> None:
        """Add an event to the chain. Inside `writing`."""
        last = self.one("SELECT chain FROM event ORDER BY id DESC LIMIT 1")
        row = (time.time(), actor, task, kind, strict_json.dumps(detail, sort_keys=True))
        chain = _link(last[0] if last else _NO_CHAIN, row)
        self.connection.execute(
            "INSERT INTO event(at, actor, task, kind, detail, chain) VALUES (?, ?, ?, ?, ?, ?)", (*row, chain)
        )

    def verify(self) -> list[str]:
        """What the chain of events does not vouch for, a sentence each: changed events, labels without their event."""
        faults, chain, labels = [], _NO_CHAIN, set()
        for row in self.connection.execute("SELECT id, at, actor, task, kind, detail, chain FROM event ORDER BY id"):
            chain = _link(chain, tuple(row)[1:6])
            if chain != row["chain"]:
                return [*faults, f"event {row['id']} is not what was written"]
            if row["kind"] in ("annotate", "review"):
                detail = json.loads(row["detail"])
                labels.add((row["kind"], detail["id"], detail["digest"]))
        for kind, table in (("annotate", "annotation"), ("review", "review")):
            for row in self.connection.execute(f"SELECT * FROM {table}"):
                if (kind, row["id"], row_digest(row)) not in labels:
                    faults.append(f"{table} {row['id']} is not what was written")
        return faults

    def add_person(self, name: str, role: str) -> str:
        """Add a person, or give one a new token and role.

        Args:
            name: of the person.
            role: annotator, reviewer or admin.

        Returns:
            The token, of which only the hash is kept.

        Raises:
            UserError: no such role, or no such name.
        """
        if role not in ROLES:
            raise UserError(expected("role", f"one of {', '.join(ROLES)}", repr(role)))
        if not name.strip() or len(name) > 80 or not name.isprintable():
            raise UserError(expected("name", "up to 80 printable characters", repr(name)))
        token = secrets.token_urlsafe(32)
        with self.writing() as connection:
            connection.execute(
                "INSERT INTO annotator(name, role, token_hash) VALUES (?1, ?2, ?3) "
                "ON CONFLICT(name) DO UPDATE SET role = ?2, token_hash = ?3, disabled = 0",
                (name, role, token_hash(token)),
            )
            self.log("token", name=name, role=role)
        return token

    def disable(self, name: str) -> bool:
        """Shut a person out; returns whether there is one of this name."""
        with self.writing() as connection:
            found = connection.execute("UPDATE annotator SET disabled = 1 WHERE name = ?", (name,)).rowcount > 0
            if found:
                self.log("disable", name=name)
        return found

    def person_of(self, token: str) -> sqlite3.Row | None:
        """The person of a token; None: of nobody, or of one who was shut out."""
        wanted = token_hash(token)
        row = self.one("SELECT * FROM annotator WHERE token_hash = ? AND disabled = 0", wanted)
        return row if row is not None and secrets.compare_digest(row["token_hash"], wanted) else None

    def backup(self) -> Path:
        """Copy the database into `backup/`, one file a day.

        Returns:
            The copy.
        """
        folder = self.project / "backup"
        folder.mkdir(mode=0o700, exist_ok=True)
        path = folder / f"annotate-{time.strftime('%Y-%m-%d')}.db"
        if not path.exists():
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
            try:
                self.connection.execute("VACUUM INTO ?", (str(temporary),))
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        return path


def row_digest(row: sqlite3.Row) -> str:
    """A hash of a row's values."""
    return hashlib.sha256(strict_json.dumps(dict(row), sort_keys=True).encode()).hexdigest()


def _link(before: bytes, row: tuple) -> bytes:
    return hashlib.sha256(before + strict_json.dumps(row).encode()).digest()
