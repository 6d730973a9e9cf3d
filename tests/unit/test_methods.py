"""Methods as recipes: each against a few lines of its paper in float64, on quadratics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from builders import MINIMAL
from quadratic import BEST, K, N, gradient, trained

from meerkat.algorithms import make_algorithm
from meerkat.comparison.methods import METHODS
from meerkat.config import Recipe, parse_recipe
from meerkat.config.reading import with_settings
from meerkat.federation.algorithm import Algorithm

ROUNDS, ETA, EPSILON = 6, 0.02, 1e-4
Draw = Callable[[int, int, int, int], np.ndarray]
"""Round, step, client, perturbation → z in float64."""


def recipe_of(method: str, steps: int, **changes: Any) -> Recipe:
    settings = {
        "federation.clients": K,
        "federation.rounds": ROUNDS,
        "federation.local_steps": steps,
        **METHODS[method].settings,
        "optimizer.learning_rate": ETA,
        "optimizer.epsilon": EPSILON,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    return parse_recipe(with_settings(MINIMAL, settings))


def drawn_by(algorithm: Algorithm) -> Draw:
    def z(round: int, step: int, client: int, perturbation: int) -> np.ndarray:
        key = algorithm.stream.keys(round, step, client)[perturbation]
        return algorithm.stream.z(key).astype(np.float64)

    return z


def decomfl(z: Draw, steps: int, perturbations: int) -> np.ndarray:
    """Li et al., arXiv 2405.15861, Algorithm 1: scalars along shared directions, averaged."""
    theta = np.zeros(N)
    for number in range(ROUNDS):
        scalars = np.zeros((K, steps, perturbations))
        for client in range(K):
            local = theta.copy()
            for step in range(steps):
                for p in range(perturbations):
                    scalars[client, step, p] = gradient(client, local) @ z(number, step, client, p)
                for p in range(perturbations):
                    g = scalars[client, step, p] / perturbations
                    local = local - ETA * g * z(number, step, client, p)
        for step in range(steps):
            for p in range(perturbations):
                mean = scalars[:, step, p].mean() / perturbations
                theta = theta - ETA * mean * z(number, step, 0, p)
    return theta


def fedkseed(z: Draw, steps: int) -> np.ndarray:
    """Qin et al., arXiv 2312.06353: each client its own seeds, the server the mean of the moves."""
    theta = np.zeros(N)
    for number in range(ROUNDS):
        moved = []
        for client in range(K):
            local = theta.copy()
            for step in range(steps):
                direction = z(number, step, client, 0)
                local = local - ETA * (gradient(client, local) @ direction) * direction
            moved.append(local - theta)
        theta = theta + np.mean(moved, axis=0)
    return theta


@pytest.mark.parametrize(("steps", "perturbations"), [(1, 1), (3, 5)])
def test_decomfl(steps: int, perturbations: int) -> None:
    algorithm = make_algorithm(recipe_of("decomfl", steps, noise__perturbations=perturbations), N)
    assert algorithm.stream.shared
    found = trained(algorithm, ROUNDS, steps, ETA).theta
    expected = decomfl(drawn_by(algorithm), steps, perturbations)
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=2e-3)
    assert np.linalg.norm(expected - BEST) < np.linalg.norm(BEST)


def test_decomfl_of_one_perturbation_is_meerkat_with_a_full_mask() -> None:
    changes = {"noise__perturbations": 1, "optimizer__estimator": "two-point"}
    recipes = [recipe_of("decomfl", 1, **changes), recipe_of("full", 1)]
    assert recipes[0].fingerprint == recipes[1].fingerprint
    digests = {trained(make_algorithm(r, N), ROUNDS, 1, ETA).digest for r in recipes}
    assert len(digests) == 1


@pytest.mark.parametrize("steps", [1, 3])
def test_fedkseed(steps: int) -> None:
    algorithm = make_algorithm(recipe_of("fedkseed", steps), N)
    found = trained(algorithm, ROUNDS, steps, ETA).theta
    np.testing.assert_allclose(found, fedkseed(drawn_by(algorithm), steps), rtol=1e-2, atol=2e-3)


def test_fedkseed_with_a_pool_as_large_as_a_run_is_meerkat_with_its_own_directions() -> None:
    """Where no seed comes twice, coefficients are those that Meerkat has along the same z."""
    pool = {"kind": "fedkseed"}
    large = {"kind": "pool", "size": 2**31}
    of_pool = make_algorithm(recipe_of("fedkseed", 2, algorithm=pool, noise__keys=large), N)
    changes = {"noise__keys": large, "noise__directions": "per-client"}
    meerkat = make_algorithm(recipe_of("full", 2, **changes), N)
    keys = [
        key
        for number in range(ROUNDS)
        for step in range(2)
        for client in range(K)
        for key in of_pool.stream.keys(number, step, client)
    ]
    assert len(set(keys)) == len(keys)
    states = [trained(algorithm, ROUNDS, 2, ETA) for algorithm in (of_pool, meerkat)]
    assert states[0].digest == states[1].digest


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].bound is None])
def test_every_method_is_a_recipe_that_can_be_assembled(method: str) -> None:
    recipe = recipe_of(method, 2)
    algorithm = make_algorithm(recipe, N)
    assert algorithm.stream.n == N
    assert Recipe.model_validate_json(recipe.to_json()).fingerprint == recipe.fingerprint
