"""The interface of an algorithm: what client, server and replay must do alike.

`init` makes an opaque state, `apply` advances it, as in fedjax. What differs between methods is in
one short file of `algorithms` each; rounds, transports, journal and engines know this alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from meerkat.federation.messages import ClientReport
from meerkat.zo.axes import Along
from meerkat.zo.directions import PerturbationStream
from meerkat.zo.estimators import Estimate, LossesAt
from meerkat.zo.log import Update
from meerkat.zo.state import ModelState, Theta

__all__ = ["Algorithm", "RememberingAlgorithm"]


@runtime_checkable
class Algorithm(Protocol):
    """One method. All but `local_step` are pure functions of their arguments."""

    @property
    def stream(self) -> PerturbationStream:
        """The directions of the run."""

    def init(self, theta: Theta) -> ModelState:
        """The state before round 0."""

    def with_stream(self, stream: PerturbationStream) -> Algorithm:
        """The same algorithm, with the same directions from elsewhere: a client's device."""

    def local_step(
        self,
        losses_at: LossesAt,
        state: ModelState,
        round: int,
        step: int,
        client: int,
        learning_rate: float,
        along: Along = "drawn",
    ) -> tuple[Update, Estimate]:
        """On the client: one local step's update, from losses near the state's θ.

        The coefficients of the estimate are those that are reported; the update is made from them.

        Args:
            along: The axes for the exact gradient, which `losses_at` must then have.

        Raises:
            DivergedError: A loss or a coefficient is not finite.
        """

    def steps(self, report: ClientReport, learning_rate: float) -> Iterator[Update]:
        """On the server: the updates of a client's local steps, from its report."""

    def aggregate(
        self, reports: Sequence[ClientReport], learning_rate: float
    ) -> tuple[Update, ...]:
        """On the server: what a round adds to the log."""

    def apply(self, state: ModelState, updates: Iterable[Update]) -> ModelState:
        """Everywhere: the state after some updates."""


@runtime_checkable
class RememberingAlgorithm(Algorithm, Protocol):
    """A method whose clients carry a vector from round to round.

    It is a function of their reports, so whoever has these has it. Only an engine in one process
    keeps it (`engines.local`).
    """

    def regularised(
        self, losses_at: LossesAt, theta: Theta, start: Theta, memory: Theta | None
    ) -> LossesAt:
        """The client's local losses near θ, in a round that started from `start`."""

    def remembered(self, memory: Theta | None, report: ClientReport, learning_rate: float) -> Theta:
        """What a client carries after a report."""
