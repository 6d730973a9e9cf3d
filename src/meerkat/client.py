"""Plan + data → report: all that a client does in a round (method.md section 4, step 2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from meerkat.data.encoding import Encoded
from meerkat.data.pointer import batch_indices
from meerkat.descent import Theta, descend, digest, follow
from meerkat.errors import DivergedError, ProtocolError
from meerkat.noise import Directions
from meerkat.objective import Objective
from meerkat.protocol import CALIBRATION, DIGEST_BYTES, ClientReport, RoundPlan
from meerkat.space import MaskedSpace
from meerkat.zeroth_order import projected_gradient

__all__ = ["Client", "LocalStep", "Worker"]


class Worker:
    """A model and one copy of θ, brought up to date by the log.

    One worker serves any number of clients in turn, since a client keeps nothing from round to
    round: a process that simulates a thousand clients holds one model and one θ.
    """

    def __init__(
        self, space: MaskedSpace, objective: Objective, directions: Directions, epsilon: float
    ):
        self.space = space
        self.objective = objective
        self.directions = directions
        self.epsilon = epsilon
        self.initial: Theta = space.read()
        """θ before any round, which calibration plans start from."""
        self.theta: Theta = self.initial.copy()
        self.position = 0
        """Log entries that θ contains."""

    def synchronise(self, theta: Theta, position: int) -> None:
        """Take θ as it is after `position` log entries, instead of following them."""
        self.theta = theta.copy()
        self.position = position

    def catch_up(self, plan: RoundPlan) -> None:
        """Apply the plan's log entries that θ does not contain yet.

        Raises:
            ProtocolError: The plan starts after the entries that this worker has.
        """
        if plan.log_start > self.position:
            raise ProtocolError(
                f"round {plan.round}: the plan's log starts at entry {plan.log_start}, this "
                f"worker has {self.position}; it must be sent the log from there"
            )
        fresh = plan.entries[self.position - plan.log_start :]
        follow(self.theta, fresh, self.directions)
        self.position += len(fresh)

    def start(self, plan: RoundPlan) -> Theta:
        """The θ that a plan's local steps start from."""
        return self.initial if plan.round == CALIBRATION else self.theta


@dataclass(frozen=True)
class LocalStep:
    """One local step, as only the client sees it."""

    scalars: tuple[float, ...]
    """g of each perturbation, rounded to float32: what is reported is what is applied."""
    loss: float
    theta: Theta
    """θ after the step; the same array at each step."""


@dataclass(frozen=True)
class Client:
    """A client's name and data."""

    number: int
    examples: Sequence[Encoded]
    batch_size: int
    seed: int

    def batch(self, step: int) -> list[Encoded]:
        """The examples behind the client's step number `step`."""
        chosen = batch_indices(self.seed, self.number, len(self.examples), self.batch_size, step)
        return [self.examples[index] for index in chosen]

    def answer(self, plan: RoundPlan, worker: Worker) -> tuple[ClientReport, float]:
        """Take T_k local steps; the report, and the mean training loss, which is not sent.

        The worker's weights are left at cast(θ) of the round's start.

        Raises:
            DivergedError: A loss or a scalar is not finite.
            ProtocolError: The worker lacks log entries that the plan does not bring.
        """
        worker.catch_up(plan)
        steps = [(step.scalars, step.loss) for step in self.local_steps(plan, worker)]
        worker.space.write(worker.theta)
        report = ClientReport(
            round=plan.round,
            client=self.number,
            examples=len(self.examples),
            steps=plan.steps,
            perturbations=worker.directions.perturbations,
            theta_digest=bytes.fromhex(digest(worker.start(plan)))[:DIGEST_BYTES],
            scalars=tuple(scalar for scalars, _ in steps for scalar in scalars),
        )
        return report, sum(loss for _, loss in steps) / len(steps)

    def local_steps(self, plan: RoundPlan, worker: Worker) -> Iterator[LocalStep]:
        """θ_k^{t+1} = θ_k^t - η (1/Q) Σ_q g_q z_q, from the plan's θ."""
        theta = worker.start(plan).copy()
        directions = worker.directions
        owner, count = directions.owner(self.number), directions.perturbations
        for step in range(plan.steps):
            batch = self.batch(plan.first_step + step)
            drawn = [directions.z(plan.round, step, q, owner) for q in range(count)]
            probes = [
                projected_gradient(worker.space, worker.objective, theta, z, worker.epsilon, batch)
                for z in drawn
            ]
            scalars = tuple(_float32(probe.gradient) for probe in probes)
            for scalar, z in zip(scalars, drawn, strict=True):
                descend(theta, plan.learning_rate, scalar / count, z)
            yield LocalStep(scalars, sum(probe.loss for probe in probes) / count, theta)


def _float32(value: float) -> float:
    with np.errstate(over="ignore"):
        rounded = float(np.float32(value))
    if not np.isfinite(rounded):
        raise DivergedError(
            f"projected gradient {value} is out of range; lower optimizer.learning_rate"
        )
    return rounded
