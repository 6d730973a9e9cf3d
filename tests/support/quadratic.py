"""Clients whose losses are quadratics: whole rounds of an algorithm in memory, and what is best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from meerkat.federation.algorithm import Algorithm, RememberingAlgorithm
from meerkat.federation.messages import ClientReport
from meerkat.zo.state import ModelState

N, K = 12, 3
TARGETS = np.random.default_rng(0).normal(size=(K, N)) * 3
CURVATURES = np.random.default_rng(1).uniform(0.5, 2, size=(K, N))
BEST = (CURVATURES * TARGETS).sum(0) / CURVATURES.sum(0)
"""Where the mean of the clients' losses is least."""


def loss(client: int, theta: np.ndarray) -> float:
    """½ Σ h (θ - b)² of a client."""
    return float(CURVATURES[client] @ (theta - TARGETS[client]) ** 2 / 2)


def gradient(client: int, theta: np.ndarray) -> np.ndarray:
    return CURVATURES[client] * (theta - TARGETS[client])


def losses_near(client: int, theta: np.ndarray) -> Callable[[Any], np.ndarray]:
    """As a client has them: of one example."""

    def losses_at(offset: Any) -> np.ndarray:
        there = theta.astype(np.float64) + (0 if offset is None else offset.astype(np.float64))
        return np.array([loss(client, there)])

    return losses_at


def local_steps(
    algorithm: Algorithm, start: ModelState, client: int, number: int, steps: int, rate: float,
    memory: Any = None,
) -> ClientReport:  # fmt: skip
    """A client's report of a round."""
    state, scalars = start, list[float]()
    for step in range(steps):
        losses_at: Any = losses_near(client, state.theta)
        if isinstance(algorithm, RememberingAlgorithm):
            losses_at = algorithm.regularised(losses_at, state.theta, start.theta, memory)
        update, estimate = algorithm.local_step(losses_at, state, number, step, client, rate)
        state = algorithm.apply(state, [update])
        scalars += estimate.coefficients
    count = algorithm.stream.perturbations
    return ClientReport(number, client, 10, steps, count, bytes(8), tuple(scalars))


def trained(
    algorithm: Algorithm, rounds: int, steps: int, rate: float, clients: Sequence[int] = range(K)
) -> ModelState:
    """The state after so many rounds from θ = 0."""
    state, memories = algorithm.init(np.zeros(N, np.float32)), dict[int, Any]()
    for number in range(rounds):
        reports = []
        for client in clients:
            memory = memories.get(client)
            report = local_steps(algorithm, state, client, number, steps, rate, memory)
            reports.append(report)
            if isinstance(algorithm, RememberingAlgorithm):
                memories[client] = algorithm.remembered(memory, report, rate)
        state = algorithm.apply(state, algorithm.aggregate(reports, rate))
    return state
