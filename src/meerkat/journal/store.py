"""The file of a journal: its tables, its header, its transactions, and what finds damage."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Self
from urllib.parse import quote

import numpy as np

from meerkat.errors import JournalError
from meerkat.journal.records import Header
from meerkat.zo.state import ModelState, Theta

__all__ = ["FORMAT", "Store", "chain_digest", "check_damage"]

_SCHEMA = """
CREATE TABLE header (key TEXT PRIMARY KEY, value BLOB NOT NULL);
CREATE TABLE rounds (round INTEGER PRIMARY KEY, updates BLOB NOT NULL, digest TEXT NOT NULL,
                     metrics TEXT NOT NULL, chain BLOB NOT NULL);
CREATE TABLE reports (round INTEGER, client INTEGER, payload BLOB NOT NULL,
                      PRIMARY KEY (round, client)) WITHOUT ROWID;
CREATE TABLE evaluations (round INTEGER PRIMARY KEY, content TEXT NOT NULL);
CREATE TABLE calibrations (client INTEGER PRIMARY KEY, payload BLOB NOT NULL, seal BLOB NOT NULL);
CREATE TABLE checkpoints (round INTEGER PRIMARY KEY, content BLOB NOT NULL, chain BLOB NOT NULL,
                          seal BLOB NOT NULL);
CREATE TABLE decisions (made INTEGER PRIMARY KEY, content BLOB NOT NULL, seal BLOB NOT NULL);
CREATE TABLE renewals (round INTEGER PRIMARY KEY, content BLOB NOT NULL, seal BLOB NOT NULL);
"""
FORMAT = 5
"""Version of the journal: its tables, header and codec."""


class Store:
    """An SQLite file with the tables and header of a journal; `Journal` adds rounds."""

    def __init__(self, path: Path, connection: sqlite3.Connection):
        self.path = path
        self._connection = connection
        self._header: tuple[Header, Theta] | None = None
        self._own: bytes | None = None
        self._chain = b""
        self._durable = False

    @classmethod
    def create(cls, path: Path, header: Header, theta: Theta) -> Self:
        """A journal with its header and θ_0, whole or not at all.

        Raises:
            JournalError: It cannot be written.
        """
        journal = cls(path, sqlite3.connect(path, isolation_level=None))
        with journal._writing() as connection:
            for statement in _SCHEMA.split(";"):
                connection.execute(statement)
            content = json.dumps({"format": FORMAT, **asdict(header)})
            rows = [("header", content), ("theta", theta.astype("<f4").tobytes())]
            connection.executemany("INSERT INTO header VALUES (?, ?)", rows)
        journal._chain = journal._header_digest()
        return journal

    @classmethod
    def connect(cls, path: Path, read_only: bool = False) -> sqlite3.Connection:
        """A connection to an existing journal.

        Args:
            read_only: Write nothing. The file may be on a read-only disk; elsewhere SQLite makes
                files beside it to share it with a writer, and removes them again.
        """
        if not read_only:
            return sqlite3.connect(path, isolation_level=None)
        mode = "mode=rw"
        if not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)):
            shared = path.with_name(path.name + "-wal").exists()
            mode = "mode=ro" if shared else "immutable=1"
        where = f"file:{quote(str(path.absolute()))}?{mode}"
        connection = sqlite3.connect(where, uri=True, isolation_level=None)
        connection.execute("PRAGMA query_only = ON")
        return connection

    @staticmethod
    def exists(path: Path) -> bool:
        """Is there a journal with a header, damaged or not?"""
        if not path.is_file() or path.stat().st_size == 0:
            return False
        connection = Store.connect(path, read_only=True)
        try:
            tables = "SELECT count(*) FROM sqlite_master WHERE name = 'header'"
            return bool(connection.execute(tables).fetchone()[0])
        except sqlite3.DatabaseError as error:
            check_damage(error, path)
            return True
        finally:
            connection.close()

    @classmethod
    def check_version(cls, path: Path) -> None:
        """Was a journal, if there is one, written by this version? Looks for no damage.

        Raises:
            JournalError: By another one.
        """
        if not cls.exists(path):
            return
        with (
            closing(cls(path, sqlite3.connect(path, isolation_level=None))) as journal,
            suppress(sqlite3.DatabaseError, KeyError, TypeError, ValueError),
        ):
            journal._read_header()

    def close(self) -> None:
        self._connection.close()

    @property
    def header(self) -> Header:
        return self._read_header()[0]

    @property
    def theta0(self) -> Theta:
        """θ before round 0."""
        return self._read_header()[1].copy()

    # Within

    def _sealed(self, query: str) -> Iterator[bytes]:
        """Rows outside of the chain of rounds; those that are damaged are left out."""
        try:
            for content, seal in self._connection.execute(query):
                if isinstance(content, bytes) and seal == self._seal(content):
                    yield content
        except sqlite3.DatabaseError:
            return

    def _seal(self, content: bytes) -> bytes:
        """Binds a row outside of the chain of rounds to this journal."""
        return hashlib.sha256(self._header_digest() + content).digest()

    def _read_header(self) -> tuple[Header, Theta]:
        if self._header is None:
            rows = dict(self._connection.execute("SELECT key, value FROM header").fetchall())
            content = json.loads(rows["header"])
            self._check_format(content.pop("format"))
            theta = np.frombuffer(rows["theta"], "<f4").astype(np.float32)
            self._header = Header(**content), theta
        return self._header

    def _check_format(self, found: object) -> None:
        if found == FORMAT:
            return
        if type(found) is not int:
            raise ValueError(f"its format is {found!r}")
        age = "an older" if found < FORMAT else "a newer"
        raise JournalError(
            f"{self.path} was written by {age} version of meerkat-fl (its format is {found}, this "
            f"one reads {FORMAT}); go on with that version, or start the run again in another "
            "directory"
        )

    def _header_digest(self) -> bytes:
        if self._own is None:
            header, theta = self._read_header()
            content = json.dumps(asdict(header), sort_keys=True) + ModelState(theta).digest
            self._own = hashlib.sha256(content.encode()).digest()
        return self._own

    def _count(self, table: str) -> int:
        count: int = self._connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
        return count

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that is durable at its end, or has not happened."""
        try:
            if not self._durable:
                self._connection.execute("PRAGMA journal_mode = WAL")
                self._connection.execute("PRAGMA synchronous = FULL")
                self._durable = True
            self._connection.execute("BEGIN IMMEDIATE")
            yield self._connection
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise JournalError(
                f"{self.path} cannot be written ({error}); all complete rounds are kept: make "
                "room, then `meerkat resume`"
            ) from None


_OPERATIONAL = frozenset(
    (
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_INTERRUPT,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_READONLY,
    )
)


def check_damage(error: Exception, path: Path) -> None:
    """Return if an error of reading means that the file is damaged.

    Raises:
        JournalError: It does not: the file is locked, may not be read, or the disk failed.
    """
    code = getattr(error, "sqlite_errorcode", None)
    if code is not None and code & 0xFF in _OPERATIONAL:
        raise JournalError(
            f"{path} cannot be read now ({error}); it is not known to be damaged: check its "
            "permissions, the disk, and whether another process holds it"
        ) from None


def chain_digest(
    chain: bytes, number: int, updates: bytes, digest: str, payloads: list[tuple[int, bytes]]
) -> bytes:
    """The chained digest of a round: over that before, its updates, its digest and its reports."""
    content = hashlib.sha256(chain)
    content.update(f"{number} {digest} {len(updates)}\n".encode())
    content.update(updates)
    for client, payload in payloads:
        content.update(f"{client} {len(payload)}\n".encode())
        content.update(payload)
    return content.digest()
