"""What a round adds to the log: weights, means, and that the order of arrival cannot matter."""

from __future__ import annotations

import random

import numpy as np
import pytest
from builders import algorithm_of, make_recipe, make_report, make_server_state, plans_of
from hypothesis import given, settings
from hypothesis import strategies as st

from meerkat.federation.aggregation import scalar_matrix, weights
from meerkat.federation.rounds import close_round
from meerkat.federation.schedule import Schedule
from meerkat.zo.directions import DirectionKey
from meerkat.zo.log import Log

finite32 = st.floats(
    width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100
)


@st.composite
def rounds_of_reports(draw_: st.DrawFn) -> tuple[list[list[float]], int]:
    """Scalars of several clients, each stopped after its own number of steps."""
    q = draw_(st.integers(1, 3))
    clients = draw_(st.integers(1, 8))
    steps = [draw_(st.integers(1, 4)) for _ in range(clients)]
    return [draw_(st.lists(finite32, min_size=t * q, max_size=t * q)) for t in steps], q


@settings(max_examples=60, deadline=None)
@given(
    rounds_of_reports(),
    st.sampled_from(["uniform", "examples"]),
    st.sampled_from(["shared", "per-client"]),
    st.sampled_from(["fresh", "pool"]),
    st.sampled_from(["sgd", "momentum", "adam"]),
    st.sampled_from([0.0, 10.0]),
    st.randoms(),
)
def test_the_order_of_arrival_does_not_matter(
    case: tuple[list[list[float]], int],
    weighting: str,
    directions: str,
    keys: str,
    rule: str,
    clip_factor: float,
    order: random.Random,
) -> None:
    scalars, q = case
    federation = {"clients": 10, "weighting": weighting, "clip_factor": clip_factor}
    algorithm = algorithm_of(
        50,
        federation=federation,
        noise={
            "directions": directions,
            "perturbations": q,
            "keys": {"kind": "pool", "size": 5} if keys == "pool" else keys,
        },
        optimizer={"rule": rule},
    )
    schedule = Schedule.of(make_recipe(federation=federation))
    state = make_server_state(algorithm, 10)
    reports = [
        make_report(state.model, client, row, perturbations=q) for client, row in enumerate(scalars)
    ]
    plans = plans_of(reports)
    with np.errstate(over="ignore", invalid="ignore"):
        expected, record = close_round(schedule, state, algorithm, plans, reports, Log())
        for _ in range(2):
            order.shuffle(reports)
            shuffled, same = close_round(schedule, state, algorithm, plans, reports, Log())
            assert same == record
            if not clip_factor:
                assert algorithm.aggregate(reports, 0.1) == record.updates
            assert shuffled.model.to_bytes() == expected.model.to_bytes()
            assert shuffled.steps_taken.tolist() == expected.steps_taken.tolist()


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_the_mean_is_over_all_who_reported(weighting: str) -> None:
    algorithm = algorithm_of(10, federation={"weighting": weighting})
    state = make_server_state(algorithm, 5)
    rows = [[1.0, 2.0, 3.0], [10.0], [100.0, 200.0, 300.0]]
    reports = [
        make_report(state.model, client, row) for client, row in zip((1, 3, 4), rows, strict=True)
    ]
    updates = algorithm.aggregate(reports, 0.25)
    shares = [1 / 3] * 3 if weighting == "uniform" else [2 / 11, 4 / 11, 5 / 11]
    assert weights(reports, weighting).tolist() == pytest.approx(shares)
    # A client that was stopped early adds nothing to later steps, yet counts in the mean.
    expected = [
        sum(p * row[t] for p, row in zip(shares, rows, strict=True) if t < len(row))
        for t in range(3)
    ]
    entries = [entry for update in updates for entry in update.entries]
    assert [entry.coefficient for entry in entries] == pytest.approx(expected)
    assert [entry.key for entry in entries] == [DirectionKey(0, step) for step in range(3)]
    assert {update.learning_rate for update in updates} == {0.25}


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
@pytest.mark.parametrize("directions", ["shared", "per-client"])
def test_weights_of_a_step_may_be_over_those_that_took_it(weighting: str, directions: str) -> None:
    sections: dict[str, Any] = {
        "federation": {"weighting": weighting, "weights_over": "step"},
        "noise": {"directions": directions},
    }
    algorithm = algorithm_of(10, **sections)
    state = make_server_state(algorithm, 5)
    rows = {1: [1.0, 2.0, 3.0], 3: [10.0], 4: [100.0, 200.0, 300.0]}
    reports = [make_report(state.model, client, row) for client, row in rows.items()]
    updates = algorithm.aggregate(reports, 0.25)
    held = {1: 1, 3: 1, 4: 1} if weighting == "uniform" else {1: 2, 3: 4, 4: 5}
    for step, update in enumerate(updates):
        took = [client for client, row in rows.items() if step < len(row)]
        whole = sum(held[client] for client in took)
        shares = [held[client] / whole * rows[client][step] for client in took]
        found = [entry.coefficient for entry in update.entries]
        assert found == pytest.approx([sum(shares)] if directions == "shared" else shares)


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_with_a_direction_for_each_client_each_keeps_its_share(weighting: str) -> None:
    noise = {"directions": "per-client", "perturbations": 2}
    algorithm = algorithm_of(10, federation={"weighting": weighting}, noise=noise)
    state = make_server_state(algorithm, 5)
    rows = {1: [1.0, 2.0, 3.0, 4.0], 4: [10.0, 20.0]}
    reports = [
        make_report(state.model, client, row, round=7, perturbations=2)
        for client, row in rows.items()
    ]
    shares = [1 / 2] * 2 if weighting == "uniform" else [2 / 7, 5 / 7]
    first, second = algorithm.aggregate(reports, 0.25)
    assert [(entry.key, entry.coefficient) for entry in first.entries] == [
        (DirectionKey(7, 0, 0, 1), pytest.approx(shares[0] * 1 / 2)),
        (DirectionKey(7, 0, 1, 1), pytest.approx(shares[0] * 2 / 2)),
        (DirectionKey(7, 0, 0, 4), pytest.approx(shares[1] * 10 / 2)),
        (DirectionKey(7, 0, 1, 4), pytest.approx(shares[1] * 20 / 2)),
    ]
    assert [entry.key for entry in second.entries] == [
        DirectionKey(7, 1, 0, 1),
        DirectionKey(7, 1, 1, 1),
    ]


def test_the_mean_is_rounded_once() -> None:
    algorithm = algorithm_of(10)
    state = make_server_state(algorithm, 4)
    rows = [2.0**90, 1.0, -(2.0**90), 1.0]
    reports = [make_report(state.model, client, [scalar]) for client, scalar in enumerate(rows)]
    (update,) = algorithm.aggregate(reports, 0.1)
    assert [entry.coefficient for entry in update.entries] == [0.5]


def test_scalars_as_a_matrix_with_zeros_where_a_client_was_stopped() -> None:
    state = make_server_state(algorithm_of(10), 3)
    rows = [[1.0, 2.0, 3.0], [4.0], [5.0, 6.0]]
    reports = [make_report(state.model, client, row) for client, row in enumerate(rows)]
    assert scalar_matrix(reports).tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 0]]
