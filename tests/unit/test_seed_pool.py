"""Directions from a finite pool: their keys, what is merged, and FedKSeed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from builders import algorithm_of, make_recipe, make_report, make_server_state
from hypothesis import given, settings
from hypothesis import strategies as st

from meerkat.errors import RecipeError
from meerkat.federation.virtual_path import virtual_path
from meerkat.zo.directions import DirectionKey, FreshKeys, KeyScheme, PerturbationStream
from meerkat.zo.noise import SHARED, NoiseKey, draw, words
from meerkat.zo.seed_pool import POOL, PoolKeys

places = st.builds(
    DirectionKey,
    round=st.integers(0, 2**31 - 1),
    step=st.integers(0, 2**16 - 1),
    perturbation=st.integers(0, 2**8 - 1),
    client=st.one_of(st.integers(0, 2**32 - 4), st.just(SHARED)),
)
seeds = st.integers(0, 2**63 - 1)
TINY = {"kind": "pool", "size": 3}


# Keys


@settings(max_examples=200, deadline=None)
@given(places, seeds, st.integers(1, 2**32 - 1))
def test_keys_lie_in_the_pool(place: DirectionKey, seed: int, size: int) -> None:
    scheme = PoolKeys(size)
    assert isinstance(scheme, KeyScheme)
    key = scheme.key(seed, place)
    assert (key.step, key.perturbation, key.client) == (0, 0, POOL)
    assert 0 <= key.round < size
    assert scheme.key(seed, place) == PoolKeys(size).key(seed, place) == key


def test_keys_depend_on_every_coordinate_of_the_place() -> None:
    scheme = PoolKeys(2**32 - 1)
    found = {
        scheme.key(seed, DirectionKey(round, step, q, client))
        for seed in (0, 1)
        for round in (0, 1)
        for step in (0, 1)
        for q in (0, 1)
        for client in (0, 1, SHARED)
    }
    assert len(found) == 2 * 2 * 2 * 2 * 3


def test_all_directions_of_the_pool_are_used_alike() -> None:
    size, count = 8, 4000
    found = [PoolKeys(size).key(3, DirectionKey(step, 0, 0, 2)).round for step in range(count)]
    used = np.bincount(found, minlength=size)
    assert np.max(np.abs(used - count / size)) < 5 * math.sqrt(count / size)


def test_which_key_is_drawn_shares_no_word_with_any_noise() -> None:
    """Its words are of a domain of their own, so a direction never tells of the choice."""
    place = DirectionKey(4, 5, 6, 7)
    chosen = words(11, [4, 5 | 6 << 32, 7 | 3 << 32], 1)
    assert PoolKeys(2**32 - 1).key(11, place).round == int(chosen[0]) % (2**32 - 1)
    noise = words(11, [4, 5 | 6 << 32, 7], 1000)
    assert chosen[0] not in noise


@settings(max_examples=60, deadline=None)
@given(places, st.integers(0, 50))
def test_the_pool_collides_with_no_fresh_direction(place: DirectionKey, index: int) -> None:
    stream = PerturbationStream(11, 64)
    fresh = FreshKeys().key(11, place)
    pooled = DirectionKey(index, 0, 0, POOL)
    assert fresh == place != pooled
    assert not np.array_equal(stream.z(fresh), stream.z(pooled))
    np.testing.assert_array_equal(stream.z(pooled), draw(NoiseKey(11, index, 0, 0, POOL), 64))


def test_no_client_has_the_number_of_the_pool() -> None:
    most = 2**32 - 3
    assert make_recipe(federation={"clients": most}).federation.clients - 1 < POOL < SHARED
    with pytest.raises(RecipeError, match=r"federation\.clients"):
        make_recipe(federation={"clients": most + 1})


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"size": 0}, r"noise\.keys = 'pool': size = 0 is not between 1 and 4294967295"),
        ({"size": 2**32}, r"size = 4294967296 is not between"),
        ({"size": 2.5}, r"noise\.keys\.size = 2\.5 is no int; give a whole number"),
        ({"seeds": 3}, r"seeds is not one of its options; known are size"),
    ],
    ids=str,
)
def test_a_pool_that_makes_no_sense(options: dict[str, object], line: str) -> None:
    with pytest.raises(RecipeError, match=rf"\A[^\n]*{line}[^\n]*\Z"):
        algorithm_of(5, noise={"keys": {"kind": "pool", **options}})


# What a round adds to the log


@pytest.mark.parametrize("directions", ["shared", "per-client"])
@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_entries_of_one_key_are_added_up(directions: str, weighting: str) -> None:
    """8 clients and 4 perturbations meet in 3 directions; one entry each, correctly rounded."""
    noise = {"keys": TINY, "directions": directions, "perturbations": 4}
    algorithm = algorithm_of(30, noise=noise, federation={"weighting": weighting})
    state = make_server_state(algorithm, 8)
    generator = np.random.default_rng(0)
    reports = [
        make_report(
            state.model,
            client,
            (generator.standard_normal(8) * 10.0 ** generator.integers(-8, 8, 8)).tolist(),
            perturbations=4,
        )
        for client in range(8)
    ]
    examples = sum(report.examples for report in reports)
    updates = algorithm.aggregate(reports, 0.1)
    assert len(updates) == 2
    for step, update in enumerate(updates):
        keys = [entry.key for entry in update.entries]
        assert len(set(keys)) == len(keys) <= 3
        assert {key.client for key in keys} == {POOL}
        single: dict[DirectionKey, list[float]] = {}
        if directions == "per-client":
            for report in reports:
                share = 1 / 8 if weighting == "uniform" else report.examples / examples
                for q, key in enumerate(algorithm.stream.keys(0, step, report.client)):
                    single.setdefault(key, []).append(report.scalars[4 * step + q] * share / 4)
        else:
            for q, key in enumerate(algorithm.stream.keys(0, step, 0)):
                terms = [
                    r.scalars[4 * step + q]
                    * (1 / 8 if weighting == "uniform" else r.examples / examples)
                    for r in reports
                ]
                single.setdefault(key, []).append(math.fsum(terms) / 4)
        assert keys == list(single)  # in the order of their first occurrence
        assert [entry.coefficient for entry in update.entries] == [
            math.fsum(terms) for terms in single.values()
        ]


def test_a_round_moves_as_its_single_entries_would() -> None:
    noise = {"keys": TINY, "directions": "per-client", "perturbations": 2}
    algorithm = algorithm_of(200, noise=noise)
    state = make_server_state(algorithm, 6)
    reports = [
        make_report(state.model, k, [0.5 * k, -1.0, 0.25, k - 3.0], perturbations=2)
        for k in range(6)
    ]
    after = algorithm.apply(state.model, algorithm.aggregate(reports, 0.1))
    theta = state.model.theta.astype(np.float64)
    for report in reports:
        *_, end = virtual_path(state.model, 0.1, report, algorithm)
        theta += (end.theta - state.model.theta.astype(np.float64)) / 6
    np.testing.assert_allclose(after.theta, theta, rtol=1e-5, atol=1e-5)


def test_a_direction_that_a_client_draws_twice_counts_twice() -> None:
    algorithm = algorithm_of(20, noise={"keys": {"kind": "pool", "size": 1}, "perturbations": 3})
    state = make_server_state(algorithm, 1)
    report = make_report(state.model, 0, [1.0, 2.0, 6.0], perturbations=3)
    (update,) = algorithm.steps(report, 0.5)
    (entry,) = update.entries
    assert entry.key == DirectionKey(0, 0, 0, POOL)
    assert entry.coefficient == 3.0
    assert algorithm.aggregate([report], 0.5) == (update,)


# FedKSeed


@pytest.mark.parametrize("keys", ["fresh", "pool", {"kind": "pool", "size": 64}], ids=str)
def test_fedkseed_is_meerkat_with_a_pool_for_each_client(keys: object) -> None:
    others = {"perturbations": 2, "kind": "rademacher"}
    wanted = {"kind": "pool", "size": 64} if isinstance(keys, dict) else "pool"
    named = algorithm_of(30, algorithm="fedkseed", noise={"keys": keys, **others})
    spelled = algorithm_of(30, noise={"keys": wanted, "directions": "per-client", **others})
    assert named == spelled
    assert named.stream.scheme == PoolKeys(64 if isinstance(keys, dict) else 4096)
    state = make_server_state(named, 3)
    reports = [
        make_report(state.model, k, [1.0, 2.0, 3.0 - k, 4.0], perturbations=2) for k in range(3)
    ]
    assert named.aggregate(reports, 0.1) == spelled.aggregate(reports, 0.1)


def test_fedkseed_is_another_run() -> None:
    assert make_recipe(algorithm="fedkseed").fingerprint != make_recipe().fingerprint
    assert algorithm_of(5, algorithm="fedkseed") != algorithm_of(5)
