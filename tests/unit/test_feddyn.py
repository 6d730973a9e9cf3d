"""FedDyn over scalars, against the paper's rule in float64 on quadratics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from builders import algorithm_of
from quadratic import BEST, K, N, gradient, local_steps, trained

from meerkat.algorithms.feddyn import DynamicRegularisation
from meerkat.zo.state import ModelState

T, ETA, ALPHA = 4, 0.01, 0.3
SECTIONS: dict[str, Any] = {
    "federation": {"clients": K, "rounds": 300, "local_steps": T},
    "optimizer": {"learning_rate": ETA, "epsilon": 1e-3},
    "noise": {"perturbations": 6},
}


def feddyn() -> DynamicRegularisation:
    found = algorithm_of(N, algorithm={"kind": "feddyn", "alpha": ALPHA}, **SECTIONS)
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
                slope = gradient(client, local) - own[client] + ALPHA * (local - theta)
                keys = algorithm.stream.keys(number, step, client)
                drawn = [algorithm.stream.z(key).astype(np.float64) for key in keys]
                local = local - ETA * sum((slope @ z) * z for z in drawn) / len(drawn)
            own[client] -= ALPHA * (local - theta)
            ends.append(local)
        h = h - ALPHA * (np.mean(ends, axis=0) - theta)
        theta = np.mean(ends, axis=0) - h / ALPHA
    found = trained(algorithm, rounds, T, ETA).theta
    np.testing.assert_allclose(found, theta, rtol=1e-2, atol=1e-3)
    assert np.abs(theta).max() > 0.1


def test_it_reaches_the_common_minimum_where_local_steps_alone_do_not() -> None:
    """Clients differ in curvature and minimum: the mean of their local optima is not the best."""
    plain = trained(algorithm_of(N, **SECTIONS), 300, T, ETA).theta
    corrected = trained(feddyn(), 300, T, ETA).theta
    assert np.linalg.norm(corrected - BEST) < 0.3 * np.linalg.norm(plain - BEST)


def test_what_a_client_carries_follows_from_its_reports_alone() -> None:
    algorithm = feddyn()
    state = algorithm.init(np.zeros(N, np.float32))
    report = local_steps(algorithm, state, 1, 0, T, ETA)
    once = algorithm.remembered(None, report, ETA)
    assert once.dtype == np.float32
    end = state
    for update in algorithm.steps(report, ETA):
        moved = sum(
            update.learning_rate * e.coefficient * algorithm.stream.z(e.key).astype(np.float64)
            for e in update.entries
        )
        end = ModelState((end.theta - np.asarray(moved)).astype(np.float32))
    assert once == pytest.approx(-ALPHA * end.theta, rel=1e-4, abs=1e-6)
    twice = algorithm.remembered(once, report, ETA)
    assert twice == pytest.approx(2 * once, rel=1e-5)
