"""Plan + data → report: all that a client does in a round (method.md section 4, step 2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from meerkat.data.batch_order import batch_indices
from meerkat.errors import ProtocolError, RecipeError
from meerkat.federation.algorithm import Algorithm, RememberingAlgorithm
from meerkat.federation.messages import CALIBRATION, DIGEST_BYTES, ClientReport, RoundPlan
from meerkat.spaces.base import DifferentiableSpace, OverlaidSpace, ParameterSpace
from meerkat.tasks.objective import (
    CopyingObjective,
    DifferentiableObjective,
    Objective,
    ReferringObjective,
)
from meerkat.zo.arrays import Place
from meerkat.zo.estimators import LossesAt
from meerkat.zo.log import Update
from meerkat.zo.state import ModelState, Theta

__all__ = ["Client", "LocalStep", "Worker", "refer"]


def refer(objective: Any, restore: Callable[[], None], batch: Sequence[Any]) -> None:
    """Have losses of these examples compare with the model as it was loaded, where they do.

    Args:
        restore: Puts the loaded weights back, which are left where they are needed.
    """
    if isinstance(objective, ReferringObjective) and (new := objective.unreferred(batch)):
        restore()
        objective.refer(new)


class Worker:
    """A model and one copy of the training state, brought up to date by the log.

    One worker serves any number of clients in turn, since a client keeps nothing from round to
    round: a process that simulates a thousand clients holds one model and one state.

    Args:
        place: Takes θ to the device that the algorithm's directions are drawn on; none leaves it.
    """

    def __init__(
        self,
        space: ParameterSpace,
        objective: Objective,
        algorithm: Algorithm,
        place: Place | None = None,
    ):
        self.space = space
        self.objective = objective
        self.algorithm = algorithm
        self._place = place
        self.initial: ModelState = self._placed(algorithm.init(space.read()))
        """The state before any round, which calibration plans start from."""
        self.state = self.initial
        self.position = 0
        """Updates of the log that the state contains."""
        self.memories: dict[int, Theta] = {}
        """What clients of a `RememberingAlgorithm` carry from round to round, by number."""

    def enter(self, space: ParameterSpace, position: int) -> None:
        """Go on in another space, from its own start, which follows so many updates.

        The former space must have been restored before this one was made.
        """
        self.space = space
        self.initial = self.state = self._placed(self.algorithm.init(space.read()))
        self.position = position

    def synchronise(self, state: ModelState, position: int) -> None:
        """Take the state as it is after `position` updates, instead of applying them."""
        self.state = self._placed(state)
        self.position = position

    def catch_up(self, start: int, updates: Sequence[Update]) -> None:
        """Apply what of the log from `start` on the state does not contain yet.

        Raises:
            ProtocolError: That begins after what this worker has.
        """
        if start > self.position:
            raise ProtocolError(
                f"the log is given from update {start} on, this worker has {self.position}; it "
                "must be sent the log from there"
            )
        fresh = updates[self.position - start :]
        self.state = self.algorithm.apply(self.state, fresh)
        self.position += len(fresh)

    def refer(self, batch: Sequence[Any]) -> None:
        """As `refer`, of this worker's model."""
        refer(self.objective, self.space.restore, batch)

    def remember(self, report: ClientReport, learning_rate: float) -> None:
        """Bring what a client carries up to date by its report, where the algorithm needs that."""
        if isinstance(self.algorithm, RememberingAlgorithm):
            held = self.memories.get(report.client)
            found = self.algorithm.remembered(held, report, learning_rate)
            self.memories[report.client] = found

    def _placed(self, state: ModelState) -> ModelState:
        return state if self._place is None else state.placed(self._place)

    def start(self, plan: RoundPlan) -> ModelState:
        """The state that a plan's local steps start from."""
        return self.initial if plan.round == CALIBRATION else self.state


@dataclass(frozen=True)
class LocalStep:
    """One local step, as only the client sees it."""

    scalars: tuple[float, ...]
    """The coefficient of each direction: what is reported is what is applied."""
    loss: float
    state: ModelState
    """After the step."""


@dataclass(frozen=True)
class Client:
    """A client's name and data."""

    number: int
    examples: Sequence[Any]
    batch_size: int
    seed: int

    def batch(self, step: int) -> list[Any]:
        """The examples behind the client's step number `step`."""
        chosen = batch_indices(self.seed, self.number, len(self.examples), self.batch_size, step)
        return [self.examples[index] for index in chosen]

    def answer(self, plan: RoundPlan, worker: Worker) -> tuple[ClientReport, float]:
        """Take T_k local steps; the report, and the mean training loss, which is not sent.

        The worker's weights are left at its own state.

        Raises:
            DivergedError: A loss or a coefficient is not finite.
            ProtocolError: The worker lacks updates that the plan does not bring.
        """
        worker.catch_up(plan.log_start, plan.updates)
        steps = [(step.scalars, step.loss) for step in self.local_steps(plan, worker)]
        worker.space.write(worker.state.theta)
        report = ClientReport(
            round=plan.round,
            client=self.number,
            examples=len(self.examples),
            steps=plan.steps,
            perturbations=worker.algorithm.stream.count(plan.along),
            state_digest=bytes.fromhex(worker.start(plan).digest)[:DIGEST_BYTES],
            scalars=tuple(scalar for scalars, _ in steps for scalar in scalars),
            along=plan.along,
        )
        return report, sum(loss for _, loss in steps) / len(steps)

    def local_steps(self, plan: RoundPlan, worker: Worker) -> Iterator[LocalStep]:
        """T_k local steps from the plan's state (method.md section 3)."""
        state, algorithm = worker.start(plan), worker.algorithm
        for step in range(plan.steps):
            batch = self.batch(plan.first_step + step)
            worker.refer(batch)
            losses_at: LossesAt = _Losses(worker, state.theta, batch)
            if isinstance(algorithm, RememberingAlgorithm):
                start, memory = worker.start(plan).theta, worker.memories.get(self.number)
                losses_at = algorithm.regularised(losses_at, state.theta, start, memory)
            update, estimate = algorithm.local_step(
                losses_at, state, plan.round, step, self.number, plan.learning_rate, plan.along
            )
            state = algorithm.apply(state, [update])
            yield LocalStep(estimate.coefficients, estimate.loss, state)


@dataclass(frozen=True)
class _Losses:
    """Losses of a batch near θ. The weights are left where the last call put them."""

    worker: Worker
    theta: Theta
    batch: Sequence[Any]

    def __call__(self, offset: Theta | None) -> Float64[np.ndarray, " S"]:
        self.worker.space.write(self.theta if offset is None else self.theta + offset)
        return self.worker.objective.losses(self.batch)

    def each(self, offsets: Sequence[Theta | None]) -> list[Float64[np.ndarray, " S"]]:
        """Losses at each offset: several in one pass where space and objective know how.

        Then the weights are left at θ.
        """
        space, objective = self.worker.space, self.worker.objective
        if not (isinstance(space, OverlaidSpace) and isinstance(objective, CopyingObjective)):
            return [self(offset) for offset in offsets]
        most = objective.copies_per_pass(self.batch) if space.overlays else 1
        if min(most, len(offsets)) < 2:
            return [self(offset) for offset in offsets]
        space.write(self.theta)
        places = [self.theta if offset is None else self.theta + offset for offset in offsets]
        passes = math.ceil(len(places) / most)
        found: list[Float64[np.ndarray, " S"]] = []
        for number in range(passes):
            some = places[number * len(places) // passes : (number + 1) * len(places) // passes]
            with space.overlaid(some):
                found.extend(objective.losses_of_copies(self.batch, len(some)))
        return found

    def slope(
        self, direction: Theta
    ) -> tuple[Float64[np.ndarray, " S"], Float64[np.ndarray, " S"]]:
        space, objective = self._differentiable()
        space.write(self.theta)
        return space.slopes(objective.losses_with_graph(self.batch), direction)

    def gradient(self) -> tuple[Float64[np.ndarray, " S"], Float64[np.ndarray, " n"]]:
        space, objective = self._differentiable()
        space.write(self.theta)
        return space.gradient(objective.losses_with_graph(self.batch), len(self.batch))

    def _differentiable(self) -> tuple[DifferentiableSpace, DifferentiableObjective]:
        space, objective = self.worker.space, self.worker.objective
        if not isinstance(space, DifferentiableSpace) or not isinstance(
            objective, DifferentiableObjective
        ):
            raise RecipeError(
                f"{type(objective).__name__} over {type(space).__name__} has no gradient; set "
                "optimizer.estimator = 'two-point'"
            )
        return space, objective
