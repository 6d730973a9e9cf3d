"""Who runs the clients."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from meerkat.descent import Theta
from meerkat.noise import Directions
from meerkat.protocol import ClientReport, RoundPlan
from meerkat.rounds import check_report
from meerkat.server.state import Log

__all__ = ["Assignment", "Engine", "Outcome"]


@dataclass(frozen=True)
class Assignment:
    """What is asked of clients, and what the server needs to judge and to help them."""

    plans: Mapping[int, RoundPlan]
    """By client."""
    start: str
    """Digest of the θ that their steps start from."""
    directions: Directions
    log: Log
    theta: Theta
    """θ after all entries of the log."""

    def judge(self, report: ClientReport) -> None:
        """Is this an answer to one of the plans?

        Raises:
            ProtocolError: It is not; the line names the client and what differs.
        """
        check_report(report, self.plans.get(report.client), self.start, self.directions)


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

    def run(self, assignment: Assignment) -> Outcome:
        """Have each client answer its plan."""
