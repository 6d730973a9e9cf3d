"""What a journal holds, as it is in the file."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

__all__ = ["content"]


def content(directory: Path) -> dict[str, Any]:
    """Rounds, reports, calibrations and renewals as they are in a journal."""
    queries = {
        "rounds": "SELECT round, updates, digest FROM rounds ORDER BY 1",
        "reports": "SELECT round, client, payload FROM reports ORDER BY 1, 2",
        "calibrations": "SELECT client, payload FROM calibrations ORDER BY 1",
        "renewals": "SELECT round, content FROM renewals ORDER BY 1",
    }
    with closing(sqlite3.connect(directory / "journal.sqlite")) as connection:
        return {table: connection.execute(query).fetchall() for table, query in queries.items()}
