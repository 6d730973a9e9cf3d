"""FedDyn over scalars, against the paper's rule in float64 on quadratics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from builders import algorithm_of

from meerkat.algorithms.feddyn import DynamicRegularisation
from meerkat.federation.algorithm import Algorithm, RememberingAlgorithm
from meerkat.federation.messages import ClientReport
from meerkat.zo.state import ModelState

N, K, T, ETA, ALPHA = 12, 3, 4, 0.01, 0.3
TARGETS = np.random.default_rng(0).normal(size=(K, N)) * 3
CURVATURES = np.random.default_rng(1).uniform(0.5, 2, size=(K, N))
SECTIONS: dict[str, Any] = {
    "federation": {"clients": K, "rounds": 300, "local_steps": T},
    "optimizer": {"learning_rate": ETA, "epsilon": 1e-3},
    "noise": {"perturbations": 6},
}


def loss(client: int, theta: np.ndarray) -> float:
    return float(CURVATURES[client] @ (theta - TARGETS[client]) ** 2 / 2)


def losses_near(client: int, theta: np.ndarray) -> Callable[[Any], np.ndarray]:
    def losses_at(offset: Any) -> np.ndarray:
        there = theta.astype(np.float64) + (0 if offset is None else offset.astype(np.float64))
        return np.array([loss(client, there)])

    return losses_at


def local_steps(
    algorithm: Algorithm, state: ModelState, client: int, number: int, memory: Any
) -> ClientReport:
    start, scalars = state.theta, list[float]()
    for step in range(T):
        losses_at: Any = losses_near(client, state.theta)
        if isinstance(algorithm, RememberingAlgorithm):
            losses_at = algorithm.regularised(losses_at, state.theta, start, memory)
        update, estimate = algorithm.local_step(losses_at, state, number, step, client, ETA)
        state = algorithm.apply(state, [update])
        scalars += estimate.coefficients
    count = algorithm.stream.perturbations
    return ClientReport(number, client, 10, T, count, bytes(8), tuple(scalars))


def trained(algorithm: Algorithm, clients: list[int], rounds: int) -> np.ndarray:
    state, memories = algorithm.init(np.zeros(N, np.float32)), dict[int, Any]()
    for number in range(rounds):
        reports = []
        for client in clients:
            report = local_steps(algorithm, state, client, number, memories.get(client))
            reports.append(report)
            if isinstance(algorithm, RememberingAlgorithm):
                memories[client] = algorithm.remembered(memories.get(client), report, ETA)
        state = algorithm.apply(state, algorithm.aggregate(reports, ETA))
    return state.theta.astype(np.float64)


def feddyn(**sections: Any) -> DynamicRegularisation:
    found = algorithm_of(N, algorithm={"kind": "feddyn", "alpha": ALPHA}, **SECTIONS, **sections)
    assert isinstance(found, DynamicRegularisation)
    return found


def test_it_is_the_papers_rule() -> None:
    """Acar et al., Algorithm 1, whose local solver takes the same steps along the same z."""
    algorithm, rounds = feddyn(), 5
    theta, h, own = np.zeros(N), np.zeros(N), np.zeros((K, N))
    for number in range(rounds):
        ends = []
        for client in range(K):
            local = theta.copy()
            for step in range(T):
                gradient = CURVATURES[client] * (local - TARGETS[client])
                gradient = gradient - own[client] + ALPHA * (local - theta)
                keys = algorithm.stream.keys(number, step, client)
                drawn = [algorithm.stream.z(key).astype(np.float64) for key in keys]
                local = local - ETA * sum((gradient @ z) * z for z in drawn) / len(drawn)
            own[client] -= ALPHA * (local - theta)
            ends.append(local)
        h = h - ALPHA * (np.mean(ends, axis=0) - theta)
        theta = np.mean(ends, axis=0) - h / ALPHA
    np.testing.assert_allclose(trained(algorithm, [0, 1, 2], rounds), theta, rtol=1e-2, atol=1e-3)
    assert np.abs(theta).max() > 0.1


def test_it_reaches_the_common_minimum_where_local_steps_alone_do_not() -> None:
    """Clients differ in curvature and minimum: the mean of their local optima is not the best."""
    best = (CURVATURES * TARGETS).sum(0) / CURVATURES.sum(0)
    sections = {**SECTIONS, "federation": {**SECTIONS["federation"], "local_steps": T}}
    plain = trained(algorithm_of(N, **sections), [0, 1, 2], 300)
    corrected = trained(feddyn(), [0, 1, 2], 300)
    assert np.linalg.norm(corrected - best) < 0.3 * np.linalg.norm(plain - best)


def test_what_a_client_carries_follows_from_its_reports_alone() -> None:
    algorithm = feddyn()
    state = algorithm.init(np.zeros(N, np.float32))
    report = local_steps(algorithm, state, 1, 0, None)
    once = algorithm.remembered(None, report, ETA)
    assert once.dtype == np.float32
    path = state
    for update in algorithm.steps(report, ETA):
        moved = -ALPHA * sum(
            -update.learning_rate * e.coefficient * algorithm.stream.z(e.key).astype(np.float64)
            for e in update.entries
        )
        path = ModelState((path.theta + np.asarray(moved, np.float32)).astype(np.float32))
    assert once == pytest.approx(path.theta, rel=1e-4, abs=1e-6)
    twice = algorithm.remembered(once, report, ETA)
    assert twice == pytest.approx(2 * once, rel=1e-5)
