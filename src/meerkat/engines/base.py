"""The interface of an engine: it runs clients and returns their reports."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from meerkat.federation.algorithm import Algorithm
from meerkat.federation.messages import ClientReport, RoundPlan
from meerkat.federation.rounds import check_report
from meerkat.spaces.mask_file import Mask
from meerkat.zo.log import Log
from meerkat.zo.state import ModelState

__all__ = ["Assignment", "Engine", "Outcome"]


@dataclass(frozen=True)
class Assignment:
    """Plans for clients, and what the server needs to check their reports and to update them."""

    plans: Mapping[int, RoundPlan]
    """By client."""
    start: str
    """Digest of the state that the local steps start from."""
    algorithm: Algorithm
    log: Log
    state: ModelState
    """After all updates of the log."""

    def judge(self, report: ClientReport) -> None:
        """Check that a report answers one of the plans.

        Raises:
            ProtocolError: It does not; the line names the client and what differs.
        """
        check_report(report, self.plans.get(report.client), self.start, self.algorithm)


@dataclass(frozen=True)
class Outcome:
    """Reports of the clients that answered, in any order, and what was measured on the way."""

    reports: tuple[ClientReport, ...]
    bytes_up: int
    """Encoded size of all reports."""
    bytes_down: int
    """Encoded size of all plans."""
    loss: float
    """Mean training loss; NaN where the clients do not send it."""


@runtime_checkable
class Engine(Protocol):
    """Runs the clients of a run."""

    def present(self) -> Collection[int]:
        """Numbers of the clients that can be given a plan now."""

    def able(self) -> Collection[int]:
        """Numbers of those of them that can report the exact gradient."""

    def renew(self, mask: Mask, begins: int, state: ModelState, position: int) -> None:
        """Go on in the subspace of another mask over the same coordinates.

        Args:
            begins: Position of the log at which that subspace starts.
            state, position: Where the run stands: at that start, or later where it is resumed.
        """

    def run(self, assignment: Assignment) -> Outcome:
        """Give each client its plan and return the reports."""
