"""Who runs the clients."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from meerkat.protocol import ClientReport, RoundPlan

__all__ = ["Engine", "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """What came back from the clients of a round, in any order."""

    reports: tuple[ClientReport, ...]
    bytes_up: int
    """Encoded size of all reports."""
    bytes_down: int
    """Encoded size of all plans."""
    loss: float
    """Mean training loss, where the engine can see it; else NaN."""


@runtime_checkable
class Engine(Protocol):
    """Carries plans to clients and reports back."""

    def present(self) -> Collection[int]:
        """Numbers of the clients that can be asked now."""

    def run(self, plans: Mapping[int, RoundPlan]) -> Outcome:
        """Have each client answer its plan."""
