"""Directions that are orthogonal in blocks, and what `auto` means in a subspace."""

from __future__ import annotations

import hashlib
import json
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.builders import algorithm_of, make_recipe

from meerkat.config import Choice, parse_recipe
from meerkat.config.automatic import MOST_ORTHOGONAL, subspace_epsilon, subspace_rate
from meerkat.errors import RecipeError
from meerkat.zo.directions import DirectionKey, PerturbationStream
from meerkat.zo.noise import SHARED
from meerkat.zo.orthogonal import LARGEST, orthogonal_direction


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**40), st.integers(0, 5), st.integers(0, 3))
def test_a_block_is_orthogonal_and_of_length_root_n(
    n: int, seed: int, block: int, lap: int
) -> None:
    rows = np.stack([orthogonal_direction(seed, lap, block * n + j, n) for j in range(n)])
    gram = rows.astype(np.float64) @ rows.T.astype(np.float64)
    np.testing.assert_allclose(gram, n * np.eye(n), atol=1e-5 * n)


def test_blocks_seeds_and_laps_differ() -> None:
    found = [orthogonal_direction(*key, 8) for key in product((0, 1), (0, 1), (0, 1, 8, 16))]
    assert len({z.tobytes() for z in found}) == len(found)


def test_the_bits_are_pinned() -> None:
    """Any machine and any numpy gives these: no matrix product, no sum of numpy's takes part."""
    rows = np.stack([orthogonal_direction(7, 0, place, 33) for place in range(66)])
    digest = hashlib.sha256(rows.astype("<f4").tobytes()).hexdigest()
    assert digest[:16] == "fd7dd134b29e643e"


def test_each_direction_is_uniform_on_the_sphere() -> None:
    """Mean 0, covariance 1, also for the last of a block, over 600 blocks."""
    n = 5
    for row in (0, n - 1):
        z = np.stack([orthogonal_direction(3, 0, block * n + row, n) for block in range(600)])
        # The standard errors of a mean and of a covariance are about 0.04.
        np.testing.assert_allclose(z.mean(axis=0), 0, atol=0.2)
        np.testing.assert_allclose(z.T @ z / len(z), np.eye(n), atol=0.25)


def test_too_many_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 1024"):
        orthogonal_direction(0, 0, 0, LARGEST + 1)
    assert MOST_ORTHOGONAL == LARGEST


@pytest.mark.parametrize("shared", [True, False])
def test_directions_that_follow_each_other_are_orthogonal(shared: bool) -> None:
    """Over rounds, steps, clients and perturbations together, and none comes twice."""
    stream = PerturbationStream(
        1, 24, "orthogonal", shared, perturbations=2, local_steps=2, clients=3
    )
    keys = [
        DirectionKey(round, step, q, client)
        for round in range(2 if not shared else 6)
        for step in range(2)
        for client in ((SHARED,) if shared else range(3))
        for q in range(2)
    ]
    assert len(keys) == 24
    z = np.stack([stream.z(key) for key in keys]).astype(np.float64)
    np.testing.assert_allclose(z @ z.T, 24 * np.eye(24), atol=1e-3)


def test_steps_beyond_those_of_a_round_are_directions_of_their_own() -> None:
    """A calibration takes more steps than a round: they are not those of the rounds after it."""
    stream = PerturbationStream(1, 8, "orthogonal", local_steps=2)
    keys = [DirectionKey(0, step) for step in range(8)] + [DirectionKey(r, 0) for r in (1, 2, 3)]
    assert len({stream.z(key).tobytes() for key in keys}) == len(keys)


# What `auto` means

SUBSPACE = {"dimensions": 32}


TWO_POINT = {"estimator": "two-point"}


def test_auto_in_a_subspace() -> None:
    recipe = make_recipe(subspace=SUBSPACE, optimizer=TWO_POINT)
    assert recipe.noise_kind == "orthogonal"
    assert recipe.schedule == "linear"
    assert recipe.learning_rate == subspace_rate(32, 1)
    assert recipe.epsilon == subspace_epsilon(32)
    stream = algorithm_of(32, subspace=SUBSPACE).stream  # type: ignore[attr-defined]
    assert stream.kind == "orthogonal"


def test_the_rate_counts_the_directions_of_a_round() -> None:
    own = {"noise": {"directions": "per-client", "perturbations": 2}, "federation": {"clients": 4}}
    assert make_recipe(subspace=SUBSPACE, **own).learning_rate == subspace_rate(32, 8)
    sampled = {**own, "federation": {"clients": 9, "clients_per_round": 3}}
    assert make_recipe(subspace=SUBSPACE, **sampled).learning_rate == subspace_rate(32, 6)


def test_auto_elsewhere_is_what_the_method_has() -> None:
    recipe = make_recipe(optimizer={"learning_rate": "auto"})
    found = (recipe.noise_kind, recipe.schedule, recipe.learning_rate)
    assert found == ("gaussian", "constant", 1e-5)
    many = make_recipe(subspace={"dimensions": 2000, "texts": 3000})
    assert many.noise_kind == "gaussian"
    pool = make_recipe(subspace=SUBSPACE, noise={"keys": "pool"})
    assert pool.noise_kind == "gaussian"


def test_auto_and_its_value_are_one_run() -> None:
    """The fingerprint names what is computed, not how it was written."""
    auto = make_recipe(subspace=SUBSPACE, optimizer={"learning_rate": "auto"})
    fields: dict[str, Any] = {"learning_rate": auto.learning_rate, "schedule": "linear"}
    written = make_recipe(subspace=SUBSPACE, optimizer=fields, noise={"kind": "orthogonal"})
    assert auto.fingerprint == written.fingerprint
    other = make_recipe(subspace=SUBSPACE, optimizer=fields, noise={"kind": "gaussian"})
    assert auto.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({}, "without \\[subspace\\]"),
        ({"subspace": SUBSPACE, "noise": {"keys": "pool"}}, "'fresh', which is 'pool'"),
    ],
)
def test_orthogonal_directions_where_they_cannot_be(sections: dict[str, Any], line: str) -> None:
    noise = {**sections.get("noise", {}), "kind": "orthogonal"}
    with pytest.raises(RecipeError, match=line):
        algorithm_of(100, **{**sections, "noise": noise})


def test_a_subspace_has_few_examples_and_many_directions_where_nothing_is_said() -> None:
    recipe = make_recipe(subspace=SUBSPACE)
    found = (recipe.federation.batch_size, recipe.noise.perturbations, recipe.optimizer.estimator)
    assert found == (4, 7, Choice(kind="one-sided"))
    assert recipe.learning_rate == subspace_rate(32, 7)
    written = parse_recipe(json.loads(recipe.to_json()))
    assert written == recipe
    assert written.fingerprint == recipe.fingerprint


@pytest.mark.parametrize(
    "said",
    [
        {"federation": {"batch_size": 9}},
        {"optimizer": TWO_POINT},
        {"noise": {"perturbations": 2}},
    ],
)
def test_what_is_said_of_them_is_all_that_is_changed(said: dict[str, Any]) -> None:
    recipe = make_recipe(subspace=SUBSPACE, **said)
    plain = make_recipe(**said)
    assert recipe.federation == plain.federation
    assert recipe.noise == plain.noise
    assert recipe.optimizer == plain.optimizer


def test_a_subspace_of_kind_none_is_none() -> None:
    assert make_recipe(subspace={"kind": "none"}) == make_recipe()
    assert make_recipe(subspace={"kind": "none"}).fingerprint == make_recipe().fingerprint
