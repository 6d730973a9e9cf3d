"""One process at a time works on a run's directory."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from meerkat.errors import RunError

__all__ = ["locked"]

_NAME = "lock"


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory until the block or this process ends, however it ends.

    The lock is that of an empty SQLite file, which every system has and no crash leaves behind.

    Raises:
        RunError: Another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(directory / _NAME, timeout=0, isolation_level=None)
    try:
        try:
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            raise RunError(
                f"{directory}: another process is working on this run ({error}); wait until it "
                "ends, or stop it"
            ) from None
        yield
    finally:
        connection.close()
        if [path.name for path in directory.iterdir()] == [_NAME]:  # nothing has begun
            with suppress(OSError):
                (directory / _NAME).unlink()
                directory.rmdir()
