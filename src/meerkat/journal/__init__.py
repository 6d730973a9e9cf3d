"""The append-only record of a run (SQLite, write-ahead log): replay and resume read it."""

from meerkat.journal.journal import Journal
from meerkat.journal.replaying import origin, replay

__all__ = ["Journal", "origin", "replay"]
