"""The server without model or data: virtual paths, aggregation, GradIP, rounds."""

from __future__ import annotations

import math
import random
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import tiny_model
from meerkat.client import Client, Worker
from meerkat.data.encoding import Encoded
from meerkat.descent import descend, digest, follow
from meerkat.errors import ProtocolError
from meerkat.mask.making import eligible_parameters, random_mask
from meerkat.noise import SHARED, Directions, NoiseKey, draw
from meerkat.objective import Objective
from meerkat.protocol import DIGEST_BYTES, ClientReport, LogEntry, RoundPlan
from meerkat.recipe import MaskSection, Optimizer, Recipe, parse_recipe
from meerkat.rounds import check_report, close_round, learning_rate, plan_round
from meerkat.server.aggregation import aggregate, weights
from meerkat.server.gradip import Compass, magnitudes
from meerkat.server.state import Log, ServerState, initial_state
from meerkat.server.virtual_path import virtual_path
from meerkat.space import MaskedSpace

SEED = 11


def make_recipe(clients: int, weighting: str = "uniform", **federation: int) -> Recipe:
    return parse_recipe(
        {
            "seed": SEED,
            "model": {"name": "tiny"},
            "task": {"name": "sst2"},
            "federation": {"clients": clients, "rounds": 8, "weighting": weighting, **federation},
        }
    )


def make_state(n: int, clients: int, local_steps: int = 100) -> ServerState:
    theta = draw(NoiseKey(99, 0, 0), n)
    return initial_state(theta, digest(theta), clients, local_steps)


def make_report(state: ServerState, client: int, scalars: list[float], q: int = 1) -> ClientReport:
    return ClientReport(
        round=state.round,
        client=client,
        examples=1 + client % 7,
        steps=len(scalars) // q,
        perturbations=q,
        theta_digest=bytes.fromhex(state.theta_digest)[:DIGEST_BYTES],
        scalars=tuple(float(np.float32(scalar)) for scalar in scalars),
    )


def answered(
    state: ServerState, reports: list[ClientReport], rate: float = 0.1
) -> dict[int, RoundPlan]:
    """The plans that these reports answer."""
    return {r.client: RoundPlan(state.round, r.steps, rate, 0, 0) for r in reports}


# The virtual path


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("perturbations", [1, 3])
def test_virtual_path_is_the_clients_own(kind: str, shared: bool, perturbations: int) -> None:
    loaded = tiny_model("llama")
    section = MaskSection(kind="random", density=0.01)
    mask = random_mask(eligible_parameters(loaded.model, section), section, "")
    directions = Directions(SEED, mask.size, kind, shared, perturbations)
    worker = Worker(MaskedSpace(loaded.model, mask), Objective(loaded, 10_000), directions, 1e-3)
    start = worker.theta.copy()
    plan = RoundPlan(round=4, steps=5, learning_rate=0.03, first_step=2, log_start=0)
    examples = [Encoded((i + 3, i + 4), ((5,), (6,)), i % 2) for i in range(9)]
    paths = []
    for number in (0, 6):
        client = Client(number, examples, 4, SEED)
        own = [step.theta.copy() for step in client.local_steps(plan, worker)]
        report, _ = client.answer(plan, worker)
        rebuilt = [
            theta.copy() for theta in virtual_path(start, plan.learning_rate, report, directions)
        ]
        assert len(own) == len(rebuilt) == 5
        for theirs, ours in zip(own, rebuilt, strict=True):
            assert theirs.tobytes() == ours.tobytes()
        assert not np.array_equal(own[0], start)
        paths.append(own[-1])
    assert not np.array_equal(*paths)
    np.testing.assert_array_equal(start, worker.theta)


@pytest.mark.parametrize(("rate", "scalar"), [(0.1, 0.7), (1e-4, 633.3), (0.03, -0.77)])
def test_descent_rounds_the_step_once(rate: float, scalar: float) -> None:
    theta = np.array([1.0, -2.0, 1e-8, 3e7], np.float32)
    z = np.array([0.3, -1.7, 2.5, 1.1], np.float32)
    moved = theta.copy()
    descend(moved, rate, scalar, z)
    step = np.float32(rate * scalar)
    assert moved.tolist() == [float(t - step * w) for t, w in zip(theta, z, strict=True)]


def test_following_the_log_in_parts_is_following_it() -> None:
    directions = Directions(SEED, 300, shared=False)
    entries = [
        LogEntry(r, t, 0, k, 0.1, 0.5 * r - t) for r in (0, 1) for t in (0, 1) for k in (0, 5)
    ]
    whole, parts = (draw(NoiseKey(1, 1, 1), 300) for _ in range(2))
    follow(whole, entries, directions)
    follow(parts, entries[:3], directions)
    follow(parts, entries[3:], directions)
    assert digest(whole) == digest(parts)
    assert digest(whole) != digest(draw(NoiseKey(1, 1, 1), 300))


# Aggregation

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


@settings(max_examples=40, deadline=None)
@given(rounds_of_reports(), st.sampled_from(["uniform", "examples"]), st.booleans(), st.randoms())
def test_the_order_of_arrival_does_not_matter(
    case: tuple[list[list[float]], int], weighting: str, shared: bool, order: random.Random
) -> None:
    scalars, q = case
    recipe = make_recipe(10, weighting)
    state = make_state(50, 10)
    directions = Directions(SEED, 50, shared=shared, perturbations=q)
    reports = [make_report(state, client, row, q) for client, row in enumerate(scalars)]
    plans = answered(state, reports)
    with np.errstate(over="ignore", invalid="ignore"):
        expected, record = close_round(recipe, state, directions, plans, reports, Log())
        for _ in range(2):
            order.shuffle(reports)
            shuffled, same = close_round(recipe, state, directions, plans, reports, Log())
            assert same == record
            assert aggregate(reports, 0.1, weighting, directions) == record.entries
            assert shuffled.theta.tobytes() == expected.theta.tobytes()
            assert shuffled.steps_taken.tolist() == expected.steps_taken.tolist()


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_the_mean_is_over_all_who_reported(weighting: str) -> None:
    state = make_state(10, 5)
    rows = [[1.0, 2.0, 3.0], [10.0], [100.0, 200.0, 300.0]]
    reports = [make_report(state, client, row) for client, row in zip((1, 3, 4), rows, strict=True)]
    entries = aggregate(reports, 0.25, weighting, Directions(SEED, 10))
    shares = [1 / 3] * 3 if weighting == "uniform" else [2 / 11, 4 / 11, 5 / 11]
    assert weights(reports, weighting).tolist() == pytest.approx(shares)
    # A client that was stopped early adds nothing to later steps, yet counts in the mean.
    expected = [
        sum(p * row[t] for p, row in zip(shares, rows, strict=True) if t < len(row))
        for t in range(3)
    ]
    assert [entry.scalar for entry in entries] == pytest.approx(expected)
    assert [(e.round, e.step, e.perturbation, e.client) for e in entries] == [
        (0, step, 0, SHARED) for step in range(3)
    ]
    assert {entry.learning_rate for entry in entries} == {0.25}


def test_the_mean_is_rounded_once() -> None:
    state = make_state(10, 4)
    rows = [2.0**90, 1.0, -(2.0**90), 1.0]
    reports = [make_report(state, client, [scalar]) for client, scalar in enumerate(rows)]
    assert aggregate(reports, 0.1, "uniform", Directions(SEED, 10))[0].scalar == 0.5


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("q", [1, 2])
def test_a_round_is_the_mean_of_the_virtual_paths(shared: bool, q: int) -> None:
    state = make_state(400, 6)
    directions = Directions(SEED, 400, shared=shared, perturbations=q)
    generator = np.random.default_rng(0)
    reports = [
        make_report(state, client, generator.standard_normal(steps * q).tolist(), q)
        for client, steps in ((0, 3), (2, 1), (5, 3))
    ]
    recipe = make_recipe(6, "examples")
    after, record = close_round(recipe, state, directions, answered(state, reports), reports, Log())
    ends = [list(virtual_path(state.theta, 0.1, report, directions))[-1] for report in reports]
    mean = np.average(ends, axis=0, weights=[report.examples for report in reports])
    np.testing.assert_allclose(after.theta, mean, rtol=1e-5, atol=1e-6)
    assert len(record.entries) == (3 * q if shared else 7 * q)
    assert after.theta_digest == record.theta_digest == digest(after.theta)
    replayed = state.theta.copy()
    follow(replayed, record.entries, directions)
    assert replayed.tobytes() == after.theta.tobytes()


def test_memory_does_not_grow_with_clients_times_parameters() -> None:
    n, peaks = 20_000, []
    for clients in (10, 1000):
        recipe, state = make_recipe(clients), make_state(n, clients)
        reports = [make_report(state, client, [0.5, -0.5, 0.25]) for client in range(clients)]
        plans, directions, log = answered(state, reports), Directions(SEED, n), Log()
        tracemalloc.start()
        close_round(recipe, state, directions, plans, reports, log)
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
        ({"theta_digest": b"another!"}, "another θ.*must be resynchronised"),
        ({"examples": 0}, "no examples"),
        ({"scalars": (1.0, math.nan)}, "not finite"),
        ({"scalars": (-math.inf, 1.0)}, "not finite"),
    ],
    ids=str,
)
def test_a_report_that_answers_another_plan_is_refused(
    change: dict[str, object], message: str
) -> None:
    state = make_state(10, 3)
    recipe, directions = make_recipe(3), Directions(SEED, 10)
    good = make_report(state, 1, [1.0, 2.0])
    plans = answered(state, [good])
    check_report(good, plans[1], state.theta_digest, directions)
    bad = replace(good, **change)
    with pytest.raises(ProtocolError, match=message):
        check_report(bad, plans.get(bad.client), state.theta_digest, directions)
    with pytest.raises(ProtocolError, match=message):
        close_round(recipe, state, directions, plans, [bad], Log())


def test_no_report_and_two_of_one_client_are_refused() -> None:
    state = make_state(10, 3)
    recipe, directions = make_recipe(3), Directions(SEED, 10)
    report = make_report(state, 1, [1.0])
    plans = answered(state, [report])
    for reports in ([], [report, report]):
        with pytest.raises(ProtocolError, match="reported twice, or none did"):
            close_round(recipe, state, directions, plans, reports, Log())


def test_a_refused_round_leaves_the_state_alone() -> None:
    state = make_state(10, 3)
    recipe, directions = make_recipe(3), Directions(SEED, 10)
    report = make_report(state, 1, [1.0])
    before = state.theta.tobytes()
    close_round(recipe, state, directions, answered(state, [report]), [report], Log())
    assert state.theta.tobytes() == before
    assert state.known.tolist() == state.steps_taken.tolist() == [0, 0, 0]
    for array in (state.theta, state.known, state.steps_taken):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


# GradIP


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("q", [1, 3])
def test_gradip_equals_a_double_loop(shared: bool, q: int) -> None:
    n = 700
    state = make_state(n, 9)
    directions = Directions(SEED, n, shared=shared, perturbations=q)
    generator = np.random.default_rng(1)
    gradient = generator.standard_normal(n).astype(np.float32)
    reports = [
        make_report(state, client, generator.standard_normal(steps * q).tolist(), q)
        for client, steps in ((7, 4), (0, 1), (3, 4), (4, 2))
    ]
    found = Compass(gradient, directions).trajectories(reports)
    estimate = np.zeros((4, 4, n))
    square = np.zeros((4, 4))
    for row, report in enumerate(reports):
        for step in range(report.steps):
            for i in range(q):
                owner = SHARED if shared else report.client
                z = draw(NoiseKey(SEED, 0, step, i, owner), n).astype(np.float64)
                estimate[row, step] += report.scalars[step * q + i] * z / q
                square[row, step] += report.scalars[step * q + i] ** 2 / q
    product, norm = estimate @ gradient.astype(np.float64), np.linalg.norm(estimate, axis=2)
    length = np.linalg.norm(gradient.astype(np.float64))
    cosine = np.divide(product, norm * length, out=np.zeros((4, 4)), where=norm > 0)
    assert found.clients.tolist() == [7, 0, 3, 4]
    assert found.steps.tolist() == [4, 1, 4, 2]
    np.testing.assert_allclose(found.gradip, product, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.norm, norm, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.cosine, cosine, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(magnitudes(reports), np.sqrt(square), rtol=1e-9)


def test_gradip_draws_each_shared_direction_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[int, int]] = []
    original = Directions.z

    def counted(self: Directions, round: int, step: int, q: int, owner: int) -> np.ndarray:
        drawn.append((round, step))
        return original(self, round, step, q, owner)

    monkeypatch.setattr(Directions, "z", counted)
    state = make_state(50, 40)
    compass = Compass(np.ones(50, np.float32), Directions(SEED, 50))
    reports = [make_report(state, k, [1.0, -2.0, 3.0]) for k in range(40)]
    whole = compass.trajectories(reports)
    parts = [compass.trajectories(reports[i : i + 7]) for i in range(0, 40, 7)]
    np.testing.assert_array_equal(np.concatenate([p.gradip for p in parts]), whole.gradip)
    assert drawn == [(0, 0), (0, 1), (0, 2)]


# Rounds


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
    optimizer = Optimizer(learning_rate=3e-4, schedule=schedule)
    rates = [learning_rate(optimizer, round, 10) for round in (0, 5, 9, 10)]
    expected = [3e-4 * factor for factor in (first, middle, last, end)]
    assert rates == pytest.approx(expected, rel=1e-6, abs=1e-15)
    assert all(float(np.float32(rate)) == rate for rate in rates)
    all_rates = [learning_rate(optimizer, round, 10) for round in range(11)]
    assert all_rates == sorted(all_rates, reverse=True)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.data(), st.integers(0, 7))
def test_sampling_is_distinct_and_in_range(clients: int, data: st.DataObject, round: int) -> None:
    count = data.draw(st.integers(1, clients))
    recipe = make_recipe(clients, clients_per_round=count)
    state = replace(make_state(3, clients), round=round)
    plans = plan_round(recipe, state, Log())
    assert list(plans) == sorted(set(plans))
    assert len(plans) == count
    assert set(plans) <= set(range(clients))
    assert list(plan_round(recipe, state, Log())) == list(plans)


def test_sampling_reaches_everyone_and_changes() -> None:
    recipe = make_recipe(10, clients_per_round=3)
    sampled = [
        tuple(plan_round(recipe, replace(make_state(3, 10), round=round), Log()))
        for round in range(300)
    ]
    assert len(set(sampled)) > 80  # of 120
    counts = np.bincount(np.concatenate(sampled), minlength=10)
    assert np.max(np.abs(counts - 90)) < 5 * math.sqrt(90 * 0.7)


@pytest.mark.parametrize("shared", [True, False])
def test_clients_that_come_and_go_stay_in_step(shared: bool) -> None:
    """Over rounds: what each client is sent brings it to exactly the server's θ."""
    clients, n = 7, 40
    recipe = make_recipe(clients, clients_per_round=3, local_steps=2)
    directions = Directions(SEED, n, shared=shared)
    state, log = make_state(n, clients, 2), Log()
    thetas = [state.theta.copy() for _ in range(clients)]
    held = [0] * clients
    taken = [0] * clients
    generator = np.random.default_rng(0)
    for round in range(8):
        plans = plan_round(recipe, state, log)
        reports = []
        for client, plan in plans.items():
            assert (plan.round, plan.steps) == (round, 2)
            assert plan.first_step == taken[client]
            assert plan.log_start == held[client]
            assert plan.log_start + len(plan.entries) == len(log)
            follow(thetas[client], plan.entries, directions)
            held[client] = len(log)
            taken[client] += 2
            report = make_report(state, client, generator.standard_normal(2).tolist())
            started = bytes.fromhex(digest(thetas[client]))[:DIGEST_BYTES]
            reports.append(replace(report, theta_digest=started))
        state, record = close_round(recipe, state, directions, plans, reports, log)
        assert record.round == round
        log.append(record.entries)
        assert state.round == round + 1
        assert state.known.tolist() == held
        assert state.steps_taken.tolist() == taken
    assert len(log) == 8 * (2 if shared else 6)
    assert log.since(len(log)) == ()
    assert log.since(3) == log.since(0)[3:]
