"""Rounds without model or data: who is asked for what, and the state after their reports."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from builders import algorithm_of, make_recipe, make_report, make_server_state, plans_of
from hypothesis import given, settings
from hypothesis import strategies as st

from meerkat.errors import ProtocolError
from meerkat.federation.algorithm import Algorithm
from meerkat.federation.messages import DIGEST_BYTES
from meerkat.federation.rounds import check_report, close_round, plan_round
from meerkat.federation.schedule import Schedule, learning_rate
from meerkat.federation.virtual_path import virtual_path
from meerkat.zo.log import Log

RULES = ("sgd", "momentum", "adam")


def make_schedule(clients: int, **federation: object) -> Schedule:
    return Schedule.of(make_recipe(federation={"clients": clients, **federation}))


def per_client(shared: bool) -> str:
    return "shared" if shared else "per-client"


# The state after a round


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("q", [1, 2])
def test_a_round_is_the_mean_of_the_virtual_paths(shared: bool, q: int) -> None:
    noise = {"directions": per_client(shared), "perturbations": q}
    algorithm = algorithm_of(400, noise=noise, federation={"weighting": "examples"})
    state = make_server_state(algorithm, 6)
    generator = np.random.default_rng(0)
    reports = [
        make_report(
            state.model, client, generator.standard_normal(steps * q).tolist(), perturbations=q
        )
        for client, steps in ((0, 3), (2, 1), (5, 3))
    ]
    plans = plans_of(reports)
    after, record = close_round(make_schedule(6), state, algorithm, plans, reports, Log())
    ends = [list(virtual_path(state.model, 0.1, report, algorithm))[-1] for report in reports]
    mean = np.average(
        [end.theta for end in ends], axis=0, weights=[report.examples for report in reports]
    )
    np.testing.assert_allclose(after.model.theta, mean, rtol=1e-5, atol=1e-6)
    assert len(record.updates) == 3
    assert sum(len(update.entries) for update in record.updates) == (3 * q if shared else 7 * q)
    assert after.model.digest == record.state_digest
    replayed = algorithm.apply(state.model, record.updates)
    assert replayed.to_bytes() == after.model.to_bytes()


@pytest.mark.parametrize("rule", RULES)
def test_one_client_alone_moves_the_server_along_its_own_path(rule: str) -> None:
    """Its mean is its own scalar, so the state after the round is the client's, slots and all."""
    algorithm = algorithm_of(300, optimizer={"rule": rule}, noise={"perturbations": 2})
    state = make_server_state(algorithm, 1)
    for round in range(3):
        scalars = np.random.default_rng(round).standard_normal(8).tolist()
        report = make_report(state.model, 0, scalars, round, perturbations=2)
        *_, own = virtual_path(state.model, 0.1, report, algorithm)
        plans = plans_of([report])
        state, record = close_round(make_schedule(1), state, algorithm, plans, [report], Log())
        assert state.model.digest == record.state_digest == own.digest


def test_memory_does_not_grow_with_clients_times_parameters() -> None:
    n, peaks = 20_000, []
    algorithm, log = algorithm_of(n), Log()
    for clients in (10, 1000):
        schedule, state = make_schedule(clients), make_server_state(algorithm, clients)
        reports = [make_report(state.model, client, [0.5, -0.5, 0.25]) for client in range(clients)]
        plans = plans_of(reports)
        tracemalloc.start()
        close_round(schedule, state, algorithm, plans, reports, log)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 1000 * n * 4 / 50


# Reports that do not answer their plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"client": 2}, "client 2: it was not asked in round 0"),
        ({"round": 1}, "client 1: it is for round 1, this is 0"),
        ({"steps": 3}, "3 steps of 1 perturbations, asked were 2 of 1"),
        ({"perturbations": 2}, "2 steps of 2 perturbations, asked were 2 of 1"),
        ({"scalars": (1.0,)}, "1 scalars for 2 steps"),
        ({"state_digest": b"another!"}, "another state.*must be resynchronised"),
        ({"examples": 0}, "no examples"),
        ({"scalars": (1.0, math.nan)}, "not finite"),
        ({"scalars": (-math.inf, 1.0)}, "not finite"),
    ],
    ids=str,
)
def test_a_report_that_answers_another_plan_is_refused(
    change: dict[str, object], message: str
) -> None:
    algorithm = algorithm_of(10)
    state = make_server_state(algorithm, 3)
    good = make_report(state.model, 1, [1.0, 2.0])
    plans = plans_of([good])
    check_report(good, plans[1], state.model.digest, algorithm)
    bad = replace(good, **change)
    with pytest.raises(ProtocolError, match=message):
        check_report(bad, plans.get(bad.client), state.model.digest, algorithm)
    with pytest.raises(ProtocolError, match=message):
        close_round(make_schedule(3), state, algorithm, plans, [bad], Log())


@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_a_report_from_other_slots_is_refused(rule: str) -> None:
    """A client whose θ is right and whose momentum is not would walk another path."""
    algorithm = algorithm_of(10, optimizer={"rule": rule})
    state = make_server_state(algorithm, 3)
    moved = algorithm.apply(
        state.model, algorithm.aggregate([make_report(state.model, 1, [1.0])], 1.0)
    )
    other = replace(state.model, slots=moved.slots)
    report = make_report(other, 1, [1.0])
    with pytest.raises(ProtocolError, match=r"another state.*must be resynchronised"):
        check_report(report, plans_of([report])[1], state.model.digest, algorithm)


def test_no_report_and_two_of_one_client_are_refused() -> None:
    algorithm = algorithm_of(10)
    state = make_server_state(algorithm, 3)
    report = make_report(state.model, 1, [1.0])
    for reports in ([], [report, report]):
        with pytest.raises(ProtocolError, match="reported twice, or none did"):
            close_round(make_schedule(3), state, algorithm, plans_of([report]), reports, Log())


@pytest.mark.parametrize("rule", RULES)
def test_a_round_leaves_the_state_before_it_alone(rule: str) -> None:
    algorithm = algorithm_of(10, optimizer={"rule": rule})
    state = make_server_state(algorithm, 3)
    report = make_report(state.model, 1, [1.0])
    before = state.model.to_bytes()
    after, _ = close_round(make_schedule(3), state, algorithm, plans_of([report]), [report], Log())
    assert after.model.to_bytes() != state.model.to_bytes() == before
    assert state.known.tolist() == state.steps_taken.tolist() == [0, 0, 0]
    for one in (state, after):
        arrays = (one.model.theta, *one.model.slots.values(), one.known, one.steps_taken)
        for array in (*arrays, one.local_steps):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1


# Learning rates


@pytest.mark.parametrize(
    ("schedule", "first", "middle", "last", "end"),
    [
        ("constant", 1.0, 1.0, 1.0, 1.0),
        ("linear", 1.0, 0.5, 0.1, 0.0),
        ("cosine", 1.0, 0.5, 0.5 * (1 + math.cos(0.9 * math.pi)), 0.0),
    ],
)
def test_learning_rate_schedules(
    schedule: str, first: float, middle: float, last: float, end: float
) -> None:
    rates = [learning_rate(3e-4, schedule, round, 10) for round in (0, 5, 9, 10)]
    expected = [3e-4 * factor for factor in (first, middle, last, end)]
    assert rates == pytest.approx(expected, rel=1e-6, abs=1e-15)
    assert all(float(np.float32(rate)) == rate for rate in rates)
    all_rates = [learning_rate(3e-4, schedule, round, 10) for round in range(11)]
    assert all_rates == sorted(all_rates, reverse=True)
    fields = {"learning_rate": 3e-4, "schedule": schedule}
    made = Schedule.of(make_recipe(federation={"rounds": 10}, optimizer=fields))
    assert [made.learning_rate(round) for round in range(11)] == all_rates


# Plans


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.data(), st.integers(0, 7))
def test_sampling_is_distinct_and_in_range(clients: int, data: st.DataObject, round: int) -> None:
    count = data.draw(st.integers(1, clients))
    schedule = make_schedule(clients, clients_per_round=count)
    state = replace(make_server_state(algorithm_of(3), clients), round=round)
    plans = plan_round(schedule, state, Log())
    assert list(plans) == sorted(set(plans))
    assert len(plans) == count == schedule.clients_per_round
    assert set(plans) <= set(range(clients))
    assert list(plan_round(schedule, state, Log())) == list(plans)


def test_sampling_reaches_everyone_and_changes() -> None:
    schedule, state = make_schedule(10, clients_per_round=3), make_server_state(algorithm_of(3), 10)
    sampled = [
        tuple(plan_round(schedule, replace(state, round=round), Log())) for round in range(300)
    ]
    assert len(set(sampled)) > 80  # of 120
    counts = np.bincount(np.concatenate(sampled), minlength=10)
    assert np.max(np.abs(counts - 90)) < 5 * math.sqrt(90 * 0.7)


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(0, 9), min_size=1), st.integers(1, 10))
def test_of_those_who_are_present_the_first_in_the_order_are_asked(
    present: set[int], count: int
) -> None:
    """Who is away leaves room for the next, and changes nothing for those before."""
    schedule = make_schedule(10, clients_per_round=count)
    state = make_server_state(algorithm_of(3), 10)
    plans = plan_round(schedule, state, Log(), present)
    assert set(plans) <= present
    assert len(plans) == min(count, len(present))
    assert set(plan_round(schedule, state, Log())) & present <= set(plans)


def rounds_of_clients_that_come_and_go(algorithm: Algorithm) -> None:
    """Over rounds: what each client is sent brings it to exactly the server's state."""
    clients = 7
    schedule = make_schedule(clients, clients_per_round=3, local_steps=2)
    state, log = make_server_state(algorithm, clients, 2), Log()
    states = [state.model] * clients
    held, taken = [0] * clients, [0] * clients
    generator = np.random.default_rng(0)
    for round in range(8):
        plans = plan_round(schedule, state, log)
        reports = []
        for client, plan in plans.items():
            assert (plan.round, plan.steps) == (round, 2)
            assert plan.first_step == taken[client]
            assert plan.log_start == held[client]
            assert plan.log_start + len(plan.updates) == len(log)
            states[client] = algorithm.apply(states[client], plan.updates)
            held[client] = len(log)
            taken[client] += 2
            scalars = generator.standard_normal(2).tolist()
            reports.append(make_report(states[client], client, scalars, round))
            assert reports[-1].state_digest == bytes.fromhex(state.model.digest)[:DIGEST_BYTES]
        state, record = close_round(schedule, state, algorithm, plans, reports, log)
        assert record.round == round
        log.append(record.updates)
        assert state.round == round + 1
        assert state.known.tolist() == held
        assert state.steps_taken.tolist() == taken
    assert len(log) == 8 * 2
    assert log.entries_since(0) == 8 * (2 if algorithm.stream.shared else 6)
    assert log.since(len(log)) == ()
    assert log.since(3) == log.since(0)[3:]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shared", [True, False])
def test_clients_that_come_and_go_stay_in_step(shared: bool, rule: str) -> None:
    rounds_of_clients_that_come_and_go(
        algorithm_of(40, noise={"directions": per_client(shared)}, optimizer={"rule": rule})
    )
