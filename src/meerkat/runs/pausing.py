"""When a run pauses, to be resumed later; no torch."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Stops", "never"]

Stops = Callable[[int], bool]
"""Rounds done → does the run pause here? It is evaluated there, and can be resumed."""


def never(rounds: int) -> bool:
    """The run goes on to its end."""
    return False
