"""Update rules: what they compute, that they are pure, and what a recipe may ask of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from builders import algorithm_of
from hypothesis import given, settings
from hypothesis import strategies as st

from meerkat.errors import RecipeError
from meerkat.registry import build
from meerkat.zo.directions import DirectionKey, PerturbationStream
from meerkat.zo.log import LogEntry, Update, apply_log, apply_update
from meerkat.zo.noise import SHARED, NoiseKey, draw
from meerkat.zo.state import ModelState
from meerkat.zo.update_rules import UPDATE_RULES
from meerkat.zo.update_rules.adam import Adam
from meerkat.zo.update_rules.base import UpdateRule, estimate, shaped
from meerkat.zo.update_rules.hiso import HiSo
from meerkat.zo.update_rules.momentum import Momentum
from meerkat.zo.update_rules.sgd import SGD

RULES: list[UpdateRule] = [
    SGD(),
    Momentum(),
    Momentum(0.5),
    Adam(),
    Adam(0.8, 0.95, 1e-6),
    HiSo(),
    HiSo(0.5, 1e-3),
]
SIZE, Q, ETA = 40, 3, 0.05
THETA = draw(NoiseKey(1, 0, 0), SIZE)
CURVATURE = np.linspace(0.5, 2, SIZE)


def name(rule: UpdateRule) -> str:
    return type(rule).__name__


# Against plain float64, on a quadratic

Step = Callable[[np.ndarray, dict[str, Any], np.ndarray], np.ndarray]
"""(θ, what the rule remembers, ĝ) → θ."""


def plain_sgd(theta: np.ndarray, memory: dict[str, Any], g: np.ndarray) -> np.ndarray:
    return theta - ETA * g


def plain_momentum(theta: np.ndarray, memory: dict[str, Any], g: np.ndarray) -> np.ndarray:
    memory["m"] = 0.7 * memory.get("m", 0) + g
    return theta - ETA * memory["m"]


def plain_adam(theta: np.ndarray, memory: dict[str, Any], g: np.ndarray) -> np.ndarray:
    t = memory["t"] = memory.get("t", 0) + 1
    m = memory["m"] = 0.8 * memory.get("m", 0) + 0.2 * g
    v = memory["v"] = 0.95 * memory.get("v", 0) + 0.05 * g**2
    return theta - ETA * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-6)


def test_hiso_perturbs_and_moves_along_shaped_directions() -> None:
    """Against the pseudo-code of arXiv 2506.02370 in float64, T = 1, Q directions."""
    rule = HiSo(0.9, 1e-4)
    state, theta, h = rule.init(THETA), THETA.astype(np.float64), np.ones(SIZE)
    for step in range(30):
        drawn = [draw(NoiseKey(5, 0, step, q), SIZE) for q in range(Q)]
        along = [z.astype(np.float64) / np.sqrt(h) for z in drawn]
        for z, own in zip(drawn, along, strict=True):
            np.testing.assert_allclose(shaped(rule, state, z), own, rtol=1e-4)
        slopes = [float(CURVATURE * theta @ u) / Q for u in along]
        state = rule.apply(state, ETA, list(zip(slopes, drawn, strict=True)))
        moved = np.sum([c * u for c, u in zip(slopes, along, strict=True)], axis=0)
        theta, h = theta - ETA * moved, 0.9 * h + 0.1 * (moved**2 + 1e-4)
        np.testing.assert_allclose(state.theta, theta, rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(state.slots["curvature"], h, rtol=1e-3)
    assert h.max() / h.min() > 2


def test_other_rules_leave_directions_as_they_are() -> None:
    for rule in (SGD(), Momentum(), Adam()):
        assert shaped(rule, rule.init(THETA), THETA) is THETA


@pytest.mark.parametrize(
    ("rule", "plain"),
    [(SGD(), plain_sgd), (Momentum(0.7), plain_momentum), (Adam(0.8, 0.95, 1e-6), plain_adam)],
    ids=["sgd", "momentum", "adam"],
)
def test_it_is_the_textbook_rule_on_a_quadratic(rule: UpdateRule, plain: Step) -> None:
    """Slopes of ½ Σ h θ² along Q directions a step, as a client would find them."""
    state, theta = rule.init(THETA), THETA.astype(np.float64)
    memory: dict[str, Any] = {}
    for step in range(30):
        drawn = [draw(NoiseKey(5, 0, step, q), SIZE) for q in range(Q)]
        slopes = [float(CURVATURE * theta @ z) / Q for z in drawn]
        state = rule.apply(state, ETA, list(zip(slopes, drawn, strict=True)))
        g = np.sum([c * z.astype(np.float64) for c, z in zip(slopes, drawn, strict=True)], axis=0)
        theta = plain(theta, memory, g)
        np.testing.assert_allclose(state.theta, theta, rtol=2e-4, atol=2e-5)
    assert state.theta.dtype == np.float32
    moved = np.linalg.norm(state.theta - THETA)
    assert moved > 0.1 * np.linalg.norm(THETA)


def test_a_constant_estimate_ends_with_the_step_that_is_documented() -> None:
    """SGD: η c z. Momentum: that over 1 - μ. Adam: η, whatever the size of the estimate."""
    z = np.where(np.arange(SIZE) % 2, 1, -1).astype(np.float32)
    last = {}
    for rule in (SGD(), Momentum(0.75), Adam()):
        state = rule.init(np.zeros(SIZE, np.float32))
        for _ in range(60):
            before, state = state, rule.apply(state, 2.0**-10, [(8.0, z)])
        last[name(rule)] = (before.theta - state.theta) / z
    np.testing.assert_allclose(last["SGD"], 2.0**-7, rtol=1e-3)
    np.testing.assert_allclose(last["Momentum"], 2.0**-7 / 0.25, rtol=1e-3)
    np.testing.assert_allclose(last["Adam"], 2.0**-10, rtol=1e-3)


def test_the_first_step_of_momentum_is_that_of_sgd() -> None:
    z = draw(NoiseKey(2, 0, 0), SIZE)
    first = Momentum().apply(Momentum().init(THETA), 0.25, [(0.5, z)])
    np.testing.assert_array_equal(
        first.theta, SGD().apply(SGD().init(THETA), 0.25, [(0.5, z)]).theta
    )


@pytest.mark.parametrize(("rate", "scalar"), [(0.1, 0.7), (1e-4, 633.3), (0.03, -0.77)])
def test_sgd_rounds_the_step_once(rate: float, scalar: float) -> None:
    theta = np.array([1.0, -2.0, 1e-8, 3e7], np.float32)
    z = np.array([0.3, -1.7, 2.5, 1.1], np.float32)
    state = SGD().apply(SGD().init(theta), rate, [(scalar, z)])
    step = np.float32(rate * scalar)
    assert state.theta.tolist() == [float(t - step * w) for t, w in zip(theta, z, strict=True)]


def test_an_estimate_is_added_up_in_the_order_of_its_terms() -> None:
    one = np.ones(1, np.float32)
    terms = [(2.0**24, one), (1.0, one), (-(2.0**24), one)]
    assert estimate(iter(terms), one).tolist() == [0.0]
    assert estimate(reversed(terms), one).tolist() == [1.0]  # not 0: float32 rounds after each
    assert estimate(iter([]), one).tolist() == [0.0]


# Pure functions of their arguments


@pytest.mark.parametrize("rule", RULES, ids=name)
def test_a_rule_changes_nothing_that_it_is_given(rule: UpdateRule) -> None:
    theta = THETA.copy()
    assert isinstance(rule, UpdateRule)
    state = rule.init(theta)
    theta += 1  # what a run starts from is its own
    np.testing.assert_array_equal(state.theta, THETA)
    assert theta.flags.writeable
    z = draw(NoiseKey(2, 0, 0), SIZE)
    kept = z.copy()
    states = [state]
    for step in range(4):
        before = [one.to_bytes() for one in states]
        states.append(rule.apply(states[-1], 0.25, [(0.5 - step, z), (0.125, z)]))
        again = rule.apply(states[-2], 0.25, [(0.5 - step, z), (0.125, z)])
        assert again.to_bytes() == states[-1].to_bytes()
        assert [one.to_bytes() for one in states[:-1]] == before
    np.testing.assert_array_equal(z, kept)
    for one in states:
        for array in (one.theta, *one.slots.values()):
            assert not array.flags.writeable
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1
    assert len({one.digest for one in states}) == 5
    assert all(one.slots.keys() == state.slots.keys() for one in states)


@pytest.mark.parametrize("rule", RULES, ids=name)
def test_terms_may_be_a_generator(rule: UpdateRule) -> None:
    """z is drawn when its turn comes, and read once."""
    z = [draw(NoiseKey(2, 0, 0, q), SIZE) for q in range(3)]
    terms = [(0.5, z[0]), (-0.25, z[1]), (2.0, z[2])]
    listed = rule.apply(rule.init(THETA), 0.5, terms)
    assert rule.apply(rule.init(THETA), 0.5, iter(terms)).digest == listed.digest


# The log, in parts and as a whole

# Numbers alone: the types of an `Update` are checked at random, which no strategy may do.
entries = st.tuples(
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from([0, 5, SHARED]),
    st.floats(-1e4, 1e4),
)
updates = st.tuples(st.floats(2.0**-20, 1.0, width=32), st.lists(entries, min_size=1, max_size=3))


def made(rate: float, some: list[tuple[int, int, int, float]]) -> Update:
    return Update(
        rate, tuple(LogEntry(DirectionKey(r, t, 0, client), c) for r, t, client, c in some)
    )


@pytest.mark.parametrize("rule", RULES, ids=name)
@settings(max_examples=40, deadline=None)
@given(drawn=st.lists(updates, max_size=8), cuts=st.lists(st.integers(0, 8), max_size=3))
def test_a_log_in_parts_is_the_log(
    rule: UpdateRule, drawn: list[tuple[float, list[Any]]], cuts: list[int]
) -> None:
    log = [made(*one) for one in drawn]
    stream = PerturbationStream(11, SIZE, shared=False)
    whole = apply_log(rule.init(THETA), log, rule, stream)
    parts = rule.init(THETA)
    borders = [0, *sorted(min(cut, len(log)) for cut in cuts), len(log)]
    for begin, end in itertools.pairwise(borders):
        parts = apply_log(parts, log[begin:end], rule, stream)
        # A snapshot on the way is as good as the log before it.
        parts = rule.init(THETA).from_bytes(parts.to_bytes())
    one_by_one = rule.init(THETA)
    for update in log:
        one_by_one = apply_update(one_by_one, update, rule, stream)
    assert parts.to_bytes() == whole.to_bytes() == one_by_one.to_bytes()
    assert parts.digest == whole.digest == one_by_one.digest


# Slots as bytes, and in the digest


@pytest.mark.parametrize("rule", RULES, ids=name)
def test_slots_go_through_bytes(rule: UpdateRule) -> None:
    state = rule.init(THETA)
    for step in range(3):
        state = rule.apply(state, 0.1, [(1.0 + step, draw(NoiseKey(2, 0, step), SIZE))])
    data = state.to_bytes()
    assert len(data) == state.nbytes
    again = rule.init(np.zeros(SIZE, np.float32)).from_bytes(data)
    assert again.to_bytes() == data
    assert again.digest == state.digest
    assert {k: v.dtype for k, v in again.slots.items()} == {
        k: v.dtype for k, v in state.slots.items()
    }
    for one, other in ((again, state), (state, again)):
        moved = [rule.apply(s, 0.1, [(0.5, THETA)]).digest for s in (one, other)]
        assert moved[0] == moved[1]


@pytest.mark.parametrize("rule", RULES, ids=name)
def test_the_digest_sees_every_slot(rule: UpdateRule) -> None:
    state = rule.apply(rule.init(THETA), 0.1, [(1.0, draw(NoiseKey(2, 0, 0), SIZE))])
    for slot, values in state.slots.items():
        for place in (0, len(values) - 1):
            changed = values.copy()
            changed[place] = np.nextafter(changed[place], np.inf, dtype=values.dtype)
            other = replace(state, slots={**state.slots, slot: changed})
            assert other.digest != state.digest
            np.testing.assert_array_equal(other.theta, state.theta)


# Options


@pytest.mark.parametrize(
    ("kind", "options", "rule"),
    [
        ("sgd", {}, SGD()),
        ("momentum", {}, Momentum(0.9)),
        ("momentum", {"decay": 0.5}, Momentum(0.5)),
        ("momentum", {"decay": 0}, Momentum(0.0)),
        ("adam", {}, Adam(0.9, 0.999, 1e-8)),
        ("adam", {"beta1": 0.0, "delta": 1}, Adam(0.0, 0.999, 1.0)),
    ],
)
def test_a_rule_of_a_recipe(kind: str, options: dict[str, Any], rule: UpdateRule) -> None:
    assert build(UPDATE_RULES, kind, options, "optimizer.rule") == rule
    written = {"kind": kind, **options} if options else kind
    assert algorithm_of(5, optimizer={"rule": written}).rule == rule


@pytest.mark.parametrize(
    ("kind", "options", "parts"),
    [
        ("lion", {}, ["optimizer.rule = 'lion' is not known", "adam, hiso, momentum, sgd"]),
        ("sgd", {"decay": 0.5}, ["'sgd': decay is not one of its options", "it takes none"]),
        ("momentum", {"beta": 0.5}, ["beta is not one of its options", "known are decay"]),
        ("adam", {"decay": 0.5}, ["decay is not one", "known are beta1, beta2, delta"]),
        ("momentum", {"decay": "0.5"}, ["optimizer.rule.decay = '0.5' is no float"]),
        ("momentum", {"decay": True}, ["optimizer.rule.decay = True is no float"]),
        ("adam", {"delta": float("inf")}, ["delta = inf is no float", "give a finite number"]),
        ("adam", {"beta1": float("nan")}, ["beta1 = nan is no float", "give a finite number"]),
        ("adam", {"delta": 10**400}, ["optimizer.rule.delta = 1000", "give a finite number"]),
        ("momentum", {"decay": 1.0}, ["'momentum': decay = 1.0 is not in [0, 1)"]),
        ("momentum", {"decay": -0.1}, ["decay = -0.1 is not in [0, 1)"]),
        ("adam", {"beta1": 1.5}, ["'adam': beta1 = 1.5 is not in [0, 1)"]),
        ("adam", {"beta2": -1}, ["beta2 = -1.0 is not in [0, 1)"]),
        ("adam", {"delta": 0}, ["delta = 0.0 is not positive"]),
    ],
    ids=str,
)
def test_options_that_do_not_fit(kind: str, options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(RecipeError, match=r"\A[^\n]*\Z") as caught:
        build(UPDATE_RULES, kind, options, "optimizer.rule")
    for part in parts:
        assert part in str(caught.value)
    with pytest.raises(RecipeError) as again:
        algorithm_of(5, optimizer={"rule": {"kind": kind, **options}})
    assert str(again.value) == str(caught.value)


def test_states_of_two_rules_are_told_apart() -> None:
    """Their slots have other names and sizes, so bytes of one are no state of the other."""
    sgd, momentum = SGD().init(THETA), Momentum().init(THETA)
    assert sgd.digest != momentum.digest
    with pytest.raises(ValueError, match="bytes, not"):
        momentum.from_bytes(sgd.to_bytes())
    renamed = ModelState(momentum.theta, {"other": momentum.slots["momentum"]})
    assert renamed.digest != momentum.digest
