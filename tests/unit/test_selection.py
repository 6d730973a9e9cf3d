"""Who is stopped early: verdicts on made-up paths with known answers, and what a recipe may ask."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from builders import make_recipe, merged
from hypothesis import given, settings
from hypothesis import strategies as st

from meerkat.config import Federation, Partition, Selection, parse_recipe
from meerkat.data.partition import label_counts, partition
from meerkat.errors import DataError, RecipeError
from meerkat.federation.selection import (
    Decision,
    Thresholds,
    Verdict,
    decide_by_paths,
    decide_without_paths,
)
from meerkat.federation.selection import merged as merged_verdicts
from meerkat.tasks import Example

STEPS = 100
LOCAL_STEPS = 10


def selection(**fields: Any) -> Selection:
    return make_recipe(selection={"kind": "gradip", **fields}).selection


def decide(
    signals: dict[int, np.ndarray], local_steps: int = LOCAL_STEPS, **fields: Any
) -> Decision:
    return decide_by_paths(selection(**fields), local_steps, 0, "calibration", signals)


def loud(generator: np.random.Generator, scale: float = 1.0, steps: int = STEPS) -> np.ndarray:
    """|g| of a client whose gradient keeps its norm."""
    return np.abs(generator.normal(0, scale, steps))


def decaying(generator: np.random.Generator, life: float = 20, steps: int = STEPS) -> np.ndarray:
    """|g| of a client whose gradient dies away."""
    return loud(generator, steps=steps) * np.exp(-np.arange(steps) / life)


def cohort(seed: int, louds: int, quiets: int, steps: int = STEPS) -> dict[int, np.ndarray]:
    """The quiet clients have the last numbers."""
    generator = np.random.default_rng(seed)
    paths = [loud(generator, 3.0, steps) for _ in range(louds)]
    paths += [3.0 * decaying(generator, steps / 5, steps) for _ in range(quiets)]
    return dict(enumerate(paths))


def by_client(decision: Decision) -> dict[int, Verdict]:
    return {verdict.client: verdict for verdict in decision.verdicts}


# Known answers


@pytest.mark.parametrize(("louds", "quiets"), [(6, 2), (2, 6), (7, 1), (1, 7), (1, 1)])
def test_decaying_clients_are_flagged(louds: int, quiets: int) -> None:
    decision = decide(cohort(1, louds, quiets))
    assert decision.flagged == tuple(range(louds, louds + quiets))
    assert decision.source == "calibration"
    for client, verdict in by_client(decision).items():
        assert verdict.steps == (LOCAL_STEPS if client < louds else 1)
        assert verdict.judged == decision.round == 0
        assert verdict.rho_later is not None
        assert verdict.rho_quiet is not None
        assert (verdict.rho_later > 5) == verdict.flagged


def test_the_figures_of_the_paper_task() -> None:
    """Two single-label clients and an IID one that learns: method.md section 5."""
    generator, progress = np.random.default_rng(0), np.linspace(-0.1, 1.1, STEPS)
    ends = [(633, 83), (3286, 96), (2721, 1073)]
    paths = [a * (b / a) ** np.clip(progress, 0, 1) * loud(generator) for a, b in ends]
    assert decide(dict(enumerate(paths))).flagged == (0, 1)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 40])
def test_nobody_is_flagged_where_all_oscillate(count: int) -> None:
    decision = decide(cohort(2, count, 0))
    assert decision.flagged == ()
    assert decision.thresholds == Thresholds(None, None, None)
    assert {verdict.steps for verdict in decision.verdicts} == {LOCAL_STEPS}
    assert all(verdict.rho_quiet is verdict.margin is None for verdict in decision.verdicts)


@pytest.mark.parametrize("values", [[1.0] * 4, [1.0, 1.1, 0.9, 1.2], [0.0] * 4, [5e-324] * 3])
def test_constant_paths_flag_nobody(values: list[float]) -> None:
    decision = decide({client: np.full(STEPS, value) for client, value in enumerate(values)})
    assert decision.flagged == ()
    assert all(verdict.rho_later == 1 for verdict in decision.verdicts)


@pytest.mark.parametrize("loud_clients", [1, 2, 7])
def test_a_silent_client_has_not_fallen_and_spares_the_others(loud_clients: int) -> None:
    signals = {**cohort(3, loud_clients, 0), loud_clients: np.zeros(STEPS)}
    decision = decide(signals)
    assert not set(decision.flagged) - {loud_clients}
    assert by_client(decision)[loud_clients].rho_later == 1
    assert Decision.from_json(decision.to_json()) == decision


@pytest.mark.parametrize("loud_clients", [1, 2, 7])
def test_a_client_that_falls_to_exactly_zero_is_flagged(loud_clients: int) -> None:
    signals = cohort(4, loud_clients, 1)
    signals[loud_clients][STEPS // 2 :] = 0
    decision = decide(signals)
    assert decision.flagged == (loud_clients,)
    verdict = by_client(decision)[loud_clients]
    assert verdict.rho_quiet == 1
    assert verdict.rho_later is not None
    assert np.isfinite([verdict.rho_later, verdict.margin]).all()


@pytest.mark.parametrize("path", ["loud", "decaying", "zero"])
def test_one_client_alone_is_not_flagged(path: str) -> None:
    generator = np.random.default_rng(5)
    signal = {"loud": loud(generator), "decaying": decaying(generator), "zero": np.zeros(STEPS)}
    assert decide({0: signal[path]}).flagged == ()


def test_no_client_at_all() -> None:
    assert decide({}) == Decision(0, "calibration", Thresholds(None, None, None), ())


def test_the_sign_of_a_signal_does_not_matter() -> None:
    signals, generator = cohort(6, 5, 2), np.random.default_rng(0)
    signed = {k: s * generator.choice([-1.0, 1.0], len(s)) for k, s in signals.items()}
    assert decide(signed) == decide(signals)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, STEPS // 2, -1])
def test_a_value_that_is_not_finite_moves_nothing(bad: float, place: int) -> None:
    """Client 3 of eight, and a decaying one too."""
    signals = cohort(7, 6, 2)
    broken = {k: s.copy() for k, s in signals.items()}
    for client in (3, 7):
        broken[client][place] = bad
        del signals[client]
    found, without = decide(broken), decide(signals)
    assert found.thresholds == without.thresholds
    assert found.flagged == without.flagged == (6,)
    for client in (3, 7):
        assert by_client(found)[client] == Verdict(client, False, LOCAL_STEPS, 0, "calibration")
    assert [v for v in found.verdicts if v.client not in (3, 7)] == list(without.verdicts)


def test_only_broken_paths() -> None:
    decision = decide({0: np.full(STEPS, np.nan), 1: np.array([])})
    assert [verdict.rho_later for verdict in decision.verdicts] == [None, None]
    assert decision.flagged == ()


# What cannot matter


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(0, 4), st.randoms())
def test_the_order_of_clients_does_not_matter(
    seed: int, louds: int, quiets: int, order: random.Random
) -> None:
    signals = cohort(seed, louds, quiets, steps=50)
    if seed % 3 == 0:
        signals[louds // 2][7] = np.nan
    if seed % 2 == 0:  # equal levels
        signals = {k: np.round(s) for k, s in signals.items()}
    clients = list(signals)
    order.shuffle(clients)
    shuffled = decide({client: signals[client] for client in clients})
    expected = decide(signals)
    assert shuffled == expected
    assert shuffled.to_json() == expected.to_json()
    assert [verdict.client for verdict in shuffled.verdicts] == sorted(signals)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(0, 4), st.integers(-60, 60))
def test_the_unit_of_the_signal_does_not_matter(
    seed: int, louds: int, quiets: int, power: int
) -> None:
    signals = cohort(seed, louds, quiets, steps=60)
    found, scaled = (
        by_client(decide({k: s * factor for k, s in signals.items()}))
        for factor in (1.0, 2.0**power)
    )
    for client in signals:
        one, other = found[client], scaled[client]
        assert (one.flagged, one.steps) == (other.flagged, other.steps)
        assert (one.rho_later, one.rho_quiet) == (other.rho_later, other.rho_quiet)


# Thresholds of the recipe

paths_of_few_values = st.lists(
    st.lists(st.integers(0, 4), min_size=8, max_size=8), min_size=1, max_size=5
)


@settings(max_examples=300, deadline=None)
@given(
    paths_of_few_values,
    st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 3.0]),
    st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]),
    st.sampled_from([0.5, 1.0, 2.0, 3.0, 4.0]),
)
def test_given_thresholds_are_obeyed_to_the_letter(
    rows: list[list[int]], later: float, quiet: float, sigma: float
) -> None:
    """Strictly beyond both, and strictly below σ; in exact fractions, many of them on the edge."""
    decision = decide(
        {client: np.array(row, float) for client, row in enumerate(rows)},
        first_window=4,
        later_window=4,
        rho_later=later,
        rho_quiet=quiet,
        sigma=sigma,
    )
    assert decision.thresholds == Thresholds(later, quiet, sigma)
    for row, verdict in zip(rows, decision.verdicts, strict=True):
        first, last = sum(row[:4]), sum(row[4:])
        share = Fraction(sum(value < sigma for value in row[4:]), 4)
        if last:
            fallen = Fraction(first, last) > Fraction(later)
            assert verdict.rho_later == pytest.approx(first / last)
        else:  # a path of zeros has not fallen, any other has fallen without bound
            fallen = bool(first) or later < 1
        assert verdict.rho_quiet == share
        assert verdict.flagged == (fallen and share > quiet)
        assert verdict.steps == (1 if verdict.flagged else LOCAL_STEPS)
        assert verdict.margin is not None
        assert verdict.flagged == (verdict.margin > 0)


@pytest.mark.parametrize(("nudge", "flagged"), [(-1, True), (0, False), (1, False)])
@pytest.mark.parametrize("field", ["rho_later", "rho_quiet"])
def test_a_threshold_to_the_last_bit(field: str, nudge: int, flagged: bool) -> None:
    signals = cohort(8, 0, 1)
    free = {"rho_later": 0.0, "rho_quiet": 0.0, "sigma": float(np.median(signals[0][-20:]))}
    ratio = getattr(decide(signals, **free).verdicts[0], field)
    beside = ratio if not nudge else float(np.nextafter(ratio, nudge * np.inf))
    verdict = decide(signals, **{**free, field: beside}).verdicts[0]
    assert verdict.flagged == flagged
    assert verdict.margin is not None
    assert (verdict.margin > 0) == flagged
    assert (verdict.margin == 0) == (nudge == 0)


def test_sigma_itself_is_not_quiet() -> None:
    signals = {0: np.array([8.0, 8, 8, 8, 2, 2, 1, 2])}
    windows = {"first_window": 4, "later_window": 4, "rho_later": 0.0, "rho_quiet": 0.0}
    assert decide(signals, **windows, sigma=2.0).verdicts[0].rho_quiet == 0.25
    above = float(np.nextafter(2.0, 3))
    assert decide(signals, **windows, sigma=above).verdicts[0].rho_quiet == 1


@pytest.mark.parametrize(
    ("given", "flagged"),
    [
        ({}, {6, 7}),
        ({"sigma": 0.5}, {6, 7}),
        ({"sigma": 1e-9}, set()),
        ({"rho_later": 1e6}, set()),
        ({"rho_quiet": 1.0}, set()),
        ({"rho_later": 0.0, "rho_quiet": 0.0}, set(range(8))),
    ],
    ids=str,
)
def test_given_and_found_thresholds_together(given: dict[str, float], flagged: set[int]) -> None:
    """What is given holds; what is not given is what it is without, but for shares of another σ."""
    signals, sigma = cohort(9, 6, 2), 0.5
    found = decide(signals).thresholds
    decision = decide(signals, **given)
    assert found is not None
    assert decision.thresholds is not None
    for field, name in (("rho_later", "later"), ("rho_quiet", "quiet"), ("sigma", "sigma")):
        if name == "quiet" and "sigma" in given:
            continue
        expected = given.get(field, getattr(found, name))
        assert getattr(decision.thresholds, name) == expected
    if flagged == set(range(8)):  # all that have a quiet step at all
        sigma = found.sigma or 0
        flagged = {k for k, s in signals.items() if (s[-20:] < sigma).any()}
    assert set(decision.flagged) == flagged
    assert all((v.margin is not None and v.margin > 0) == v.flagged for v in decision.verdicts)


@pytest.mark.parametrize("given", [{"sigma": 1e9}, {"rho_later": 0.0}, {"rho_quiet": 0.0}], ids=str)
def test_what_is_found_stays_open_where_all_oscillate(given: dict[str, float]) -> None:
    decision = decide(cohort(10, 8, 0), **given)
    assert decision.flagged == ()
    assert decision.thresholds is not None
    held = {"later": "rho_later", "quiet": "rho_quiet", "sigma": "sigma"}
    for name, field in held.items():
        assert getattr(decision.thresholds, name) == given.get(field)
    quiet = {verdict.rho_quiet for verdict in decision.verdicts}
    assert quiet == ({1.0} if "sigma" in given else {None})
    assert {verdict.margin for verdict in decision.verdicts} == {None}


# Windows


@pytest.mark.parametrize(("length", "half"), [(10, 5), (11, 5), (39, 19), (2, 1), (3, 1), (1, 1)])
def test_windows_are_at_most_half_of_the_path(length: int, half: int) -> None:
    signal = np.random.default_rng(length).uniform(1, 2, length)
    chosen = {"rho_later": 0.0, "rho_quiet": 0.0, "sigma": 1.5}
    verdict = decide({0: signal}, **chosen, calibration_steps=2).verdicts[0]
    first, last = signal[:half], signal[-half:]
    assert verdict.rho_later == pytest.approx(first.mean() / last.mean(), rel=1e-12)
    assert verdict.rho_quiet == np.mean(last < 1.5)


def test_windows_of_the_recipe() -> None:
    signal = np.array([9.0, 9, 9, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 5])
    chosen = {"rho_later": 0.0, "rho_quiet": 0.0, "sigma": 3.0}
    verdict = decide({0: signal}, **chosen, first_window=4, later_window=2).verdicts[0]
    assert verdict.rho_later == 2
    assert verdict.rho_quiet == 0.5


@pytest.mark.parametrize("later", [1e-6, 1e-3])
def test_a_calibration_of_two_steps(later: float) -> None:
    """One step a window is little to go by; a fall by three decimals shows all the same."""
    signals = {client: np.array([1.0, 1 + client / 10]) for client in range(4)}
    decision = decide({**signals, 4: np.array([1.0, later])}, calibration_steps=2)
    assert decision.flagged == (4,)
    assert decide(signals, calibration_steps=2).flagged == ()


def test_paths_of_different_lengths() -> None:
    signals = {k: s[: 100 - 8 * k] for k, s in cohort(11, 5, 2).items()}
    assert decide(signals).flagged == (5, 6)


# What is done with those that are flagged


def by_quiet_steps(counts: list[int]) -> dict[int, np.ndarray]:
    """Clients of 40 steps, of whose last 20 so many are quiet."""
    tails = [np.where(np.arange(20) < count, 0.5, 2.0) for count in counts]
    return {client: np.concatenate([np.full(20, 9.0), tail]) for client, tail in enumerate(tails)}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2000), st.floats(0, 1), st.sampled_from(["stop", "taper"]))
def test_steps_by_action(local_steps: int, threshold: float, action: str) -> None:
    chosen = {"rho_later": 1.0, "rho_quiet": threshold, "sigma": 1.0, "action": action}
    verdicts = decide(by_quiet_steps(list(range(21))), local_steps, **chosen).verdicts
    for count, verdict in enumerate(verdicts):
        assert verdict.rho_quiet == count / 20
        assert verdict.flagged == (count / 20 > threshold)
        assert 1 <= verdict.steps <= local_steps
        if not verdict.flagged:
            assert verdict.steps == local_steps
        elif action == "stop" or count == 20:
            assert verdict.steps == 1
    steps = [verdict.steps for verdict in verdicts]
    assert steps == sorted(steps, reverse=True)


def test_taper_goes_by_degree() -> None:
    chosen = {"rho_later": 1.0, "rho_quiet": 0.5, "sigma": 1.0, "action": "taper"}
    verdicts = decide(by_quiet_steps([10, 12, 15, 18, 20]), 100, **chosen).verdicts
    assert verdicts[0].steps == 100
    assert [v.steps for v in verdicts[1:]] == pytest.approx([80, 50, 20, 1], abs=1)


@pytest.mark.parametrize("action", ["stop", "taper"])
def test_high_frequency_has_nothing_to_stop(action: str) -> None:
    decision = decide(cohort(12, 5, 2), local_steps=1, action=action)
    assert decision.flagged == (5, 6)
    assert {verdict.steps for verdict in decision.verdicts} == {1}


# Decisions without paths, on paper, and together


@pytest.mark.parametrize("stopped", [(), (2,), (4, 0), (0, 1, 2, 3, 4)])
def test_without_paths(stopped: tuple[int, ...]) -> None:
    decision = decide_without_paths(5, LOCAL_STEPS, stopped)
    assert decision.round == 0
    assert decision.source == "recipe"
    assert decision.thresholds is None
    assert decision.flagged == tuple(sorted(stopped))
    steps = [1 if client in stopped else LOCAL_STEPS for client in range(5)]
    assert [(v.client, v.steps) for v in decision.verdicts] == list(enumerate(steps))
    assert {(v.source, v.rho_later, v.rho_quiet, v.margin) for v in decision.verdicts} == {
        ("recipe", None, None, None)
    }


def silent_end() -> dict[int, np.ndarray]:
    signals = cohort(13, 4, 2)
    signals[5][50:] = 0
    signals[1][0] = np.nan
    return signals


@pytest.mark.parametrize(
    "decision",
    [
        decide(cohort(13, 5, 3)),
        decide(cohort(13, 5, 0)),
        decide(silent_end(), action="taper"),
        decide(silent_end(), rho_later=0, rho_quiet=0, sigma=1e9),
        decide({}),
        decide_without_paths(5, LOCAL_STEPS, (3, 1)),
        decide_without_paths(5, LOCAL_STEPS, ()),
        decide_by_paths(selection(), LOCAL_STEPS, 12, "rounds", cohort(13, 5, 3)),
    ],
    ids=["two-groups", "one-group", "zeros", "given", "empty", "recipe", "nobody", "rounds"],
)
def test_json_keeps_every_bit(decision: Decision) -> None:
    text = decision.to_json()
    again = Decision.from_json(text)
    assert again == decision
    assert again.to_json() == text
    assert isinstance(again.verdicts, tuple)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads(text, parse_constant=refuse)


def test_newer_verdicts_replace_older_ones() -> None:
    old = [Verdict(k, True, 1, 0, "calibration", 9.0, 1.0, 0.5) for k in (4, 1, 2)]
    new = [
        Verdict(2, False, LOCAL_STEPS, 6, "rounds", 1.0, 0.0, -0.5),
        Verdict(1, False, LOCAL_STEPS, 6, "rounds"),  # not judged: it keeps the older one
        Verdict(0, False, LOCAL_STEPS, 6, "rounds"),  # not judged, and there is none
        Verdict(7, True, 1, 6, "rounds", 8.0, 1.0, 0.5),
    ]
    fresh = Decision(6, "rounds", Thresholds(2.0, 0.5, 1.0), tuple(new))
    both = merged_verdicts(fresh, old, new)
    assert both == replace(fresh, verdicts=(new[2], old[1], new[0], old[0], new[3]))
    assert both.flagged == (1, 4, 7)
    assert merged_verdicts(fresh, (), ()).verdicts == ()


# Many cohorts


def ramped(generator: np.random.Generator, scale: float, times: float) -> np.ndarray:
    """|g| of a client that is so many times quieter at the end of its path."""
    progress = np.clip((np.arange(STEPS) - 20) / 60, 0, 1)
    return loud(generator, scale) * times**-progress


def scales(generator: np.random.Generator, count: int) -> np.ndarray:
    """Clients that differ by 10 to 20 percent."""
    return np.exp(generator.normal(0, generator.uniform(0.1, 0.2), count))


def test_iid_clients_are_left_alone_in_99_of_100_cohorts() -> None:
    generator = np.random.default_rng(14)
    wrong = 0
    for _ in range(200):
        sizes = scales(generator, 8)
        wrong += bool(decide({k: loud(generator, s) for k, s in enumerate(sizes)}).flagged)
    assert wrong <= 2


@pytest.mark.parametrize("spread", [0.4, 0.7, 1.0])
def test_one_wide_group_is_not_taken_for_two(spread: float) -> None:
    """Clients whose levels differ by a factor of two or more, without a gap."""
    generator = np.random.default_rng(18)
    split = 0
    for _ in range(50):
        sizes = np.exp(generator.normal(0, spread, 40))
        split += bool(decide({k: loud(generator, s) for k, s in enumerate(sizes)}).flagged)
    assert split <= 2


@pytest.mark.parametrize("extreme", [1, 3])
def test_clients_six_times_quieter_at_the_end_are_found(extreme: int) -> None:
    generator = np.random.default_rng(15)
    found: Counter[str] = Counter()
    for _ in range(200):
        sizes = scales(generator, 8)
        times = [6.0 if client < extreme else 1.0 for client in range(8)]
        signals = {k: ramped(generator, sizes[k], times[k]) for k in range(8)}
        flagged = set(decide(signals).flagged)
        found["right"] += len(flagged & set(range(extreme)))
        found["flagged"] += len(flagged)
    assert found["right"] >= 0.97 * 200 * extreme
    assert found["right"] >= 0.97 * found["flagged"]


def test_a_thousand_clients() -> None:
    decision = decide(cohort(16, 900, 100))
    assert decision.flagged == tuple(range(900, 1000))
    generator = np.random.default_rng(17)
    sizes = scales(generator, 1000)
    assert decide({k: loud(generator, s) for k, s in enumerate(sizes)}).flagged == ()


# A repeated selection, by the paths of rounds


def judge_again(
    signals: dict[int, np.ndarray], stopped: tuple[int, ...] = (), **fields: Any
) -> Decision:
    return decide_by_paths(selection(**fields), LOCAL_STEPS, 6, "rounds", signals, stopped)


def falling(*times: float) -> dict[int, np.ndarray]:
    """Clients whose signal falls so many times half-way, and else is constant."""
    halves = [np.full(20, 1.0)] * len(times)
    return {k: np.concatenate([halves[k], 1.0 / np.full(20, fall)]) for k, fall in enumerate(times)}


@pytest.mark.parametrize("common", [0.25, 1.0, 5.0])
@pytest.mark.parametrize(
    ("fall", "before", "after"),
    [
        (20, False, True),
        (20, True, True),
        (1.5, False, False),
        (1.5, True, True),
        (1.0, False, False),
        (1.0, True, False),
        (0.5, True, False),
    ],
)
def test_caught_far_above_the_others_and_released_at_their_median(
    common: float, fall: float, before: bool, after: bool
) -> None:
    """What all clients share, learning, does not matter."""
    signals = falling(common, common, common * fall, common)
    decision = judge_again(signals, (2,) if before else ())
    assert decision.flagged == ((2,) if after else ())
    assert (decision.round, decision.source) == (6, "rounds")
    for client, verdict in by_client(decision).items():
        assert verdict.steps == (1 if after and client == 2 else LOCAL_STEPS)
        assert (verdict.judged, verdict.source) == (6, "rounds")
        assert verdict.margin is not None
        assert verdict.flagged == (verdict.margin > 0)


def test_stopped_clients_do_not_move_the_median() -> None:
    signals = falling(1, 1, 30, 30, 30, 30, 1.5)
    assert judge_again(signals, (2, 3, 4, 5)).flagged == (2, 3, 4, 5)
    assert judge_again(signals, (2, 3, 4, 6)).flagged == (2, 3, 4, 5, 6)


@pytest.mark.parametrize("level", [1e-12, 1.0, 1e6])
def test_how_quiet_a_client_is_plays_no_part_in_rounds(level: float) -> None:
    signals = falling(1, 1, 1, 20)
    signals[0], signals[3] = signals[0] / 1000, signals[3] * 1000
    assert judge_again({k: s * level for k, s in signals.items()}).flagged == (3,)


@pytest.mark.parametrize("before", [(), (0,), (0, 1, 2)], ids=str)
def test_given_thresholds_hold_for_stopped_clients_too(before: tuple[int, ...]) -> None:
    signals = falling(2, 3, 4, 1)
    decision = judge_again(signals, before, rho_later=3.0)
    assert decision.flagged == (2,)
    decision = judge_again(signals, before, rho_later=2.0, rho_quiet=0.5, sigma=0.3)
    assert decision.flagged == (2,)


def test_taper_by_fall() -> None:
    falls = (1.0, 1.0, 1.0, 1.0, 1.2, 1.6, 2.5, 10, 50, 1e6)
    before = (4, 5, 6, 7, 8, 9)
    verdicts = judge_again(falling(*falls), before, action="taper").verdicts
    steps = [verdict.steps for verdict in verdicts]
    assert steps == sorted(steps, reverse=True)
    assert set(steps[:4]) == {LOCAL_STEPS}
    assert steps[-1] == 1
    assert len(set(steps)) >= 4
    fresh = judge_again(falling(*falls), action="taper").verdicts
    assert all(1 <= verdict.steps <= LOCAL_STEPS for verdict in fresh)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sets(st.integers(0, 6)), st.integers(-60, 20), st.randoms())
def test_order_and_unit_do_not_matter_in_rounds(
    seed: int, stopped: set[int], power: int, order: random.Random
) -> None:
    signals = cohort(seed, 5, 2, steps=40)
    expected = judge_again(signals, tuple(stopped))
    clients, held = list(signals), list(stopped)
    order.shuffle(clients)
    order.shuffle(held)
    assert judge_again({client: signals[client] for client in clients}, tuple(held)) == expected
    scaled = judge_again({k: s * 2.0**power for k, s in signals.items()}, tuple(stopped))
    assert scaled.verdicts == expected.verdicts


def test_iid_clients_are_left_alone_in_rounds_too() -> None:
    generator = np.random.default_rng(19)
    wrong, right = 0, 0
    for _ in range(200):
        sizes = scales(generator, 8)
        signals = {k: ramped(generator, sizes[k], 1.0) for k in range(8)}
        wrong += bool(judge_again(signals).flagged)
        signals[5] = ramped(generator, sizes[5], 12.0)
        right += 5 in judge_again(signals).flagged
    assert wrong <= 2
    assert right >= 194


def test_json_of_a_repeated_selection() -> None:
    decision = judge_again({**falling(1, 1, 20, 1), 4: np.r_[np.ones(20), np.zeros(20)]}, (0,))
    assert Decision.from_json(decision.to_json()) == decision
    assert decision.thresholds is not None
    assert decision.thresholds.release is not None


def test_nobody_is_released_for_lack_of_others() -> None:
    """Where few clients are sampled it is a matter of chance whether others are there."""
    assert judge_again(falling(30, 30), stopped=(0, 1)).flagged == (0, 1)
    assert judge_again({3: falling(30)[0]}, stopped=(3,)).flagged == (3,)


# What a recipe may not ask

ONE_LINE = r"\A[^\n]*\Z"


FOUR_CLIENTS = {"clients": 4, "rounds": 2}


def refused(data: dict[str, Any], *parts: str) -> None:
    """In one line that has all these parts."""
    with pytest.raises(RecipeError, match=ONE_LINE) as caught:
        make_recipe(**merged({"federation": FOUR_CLIENTS}, **data))
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("selection", "parts"),
    [
        ({"count": 2}, ["selection.count", "selection.kind = 'random'", "'none'", "leave it out"]),
        ({"kind": "gradip", "count": 2}, ["selection.count", "'gradip'", "leave it out"]),
        ({"kind": "list", "clients": [1], "count": 2}, ["selection.count", "'list'", "leave"]),
        ({"kind": "random"}, ["selection.count", "selection.kind = 'random'", "add it"]),
        ({"kind": "random", "count": 0}, ["selection.count = 0", "greater than or equal to 1"]),
        ({"clients": [1]}, ["selection.clients", "selection.kind = 'list'", "'none'", "leave"]),
        (
            {"kind": "random", "count": 1, "clients": [1]},
            ["selection.clients", "'random'", "leave"],
        ),
        ({"kind": "list"}, ["selection.clients", "selection.kind = 'list'", "add it"]),
        ({"kind": "list", "clients": [-1]}, ["selection.clients.0 = -1", "greater than or equal"]),
        ({"action": "taper"}, ["selection.action = 'taper'", "set selection.kind = 'gradip'"]),
        ({"every": 2}, ["selection.every = 2", "set selection.kind = 'gradip'"]),
        (
            {"kind": "random", "count": 1, "every": 2},
            ["selection.every = 2", "set selection.kind = 'gradip'"],
        ),
        (
            {"kind": "list", "clients": [1], "action": "taper"},
            ["selection.action = 'taper'", "set selection.kind = 'gradip'"],
        ),
        (
            {"kind": "gradip", "rho_quiet": 2},
            ["selection.rho_quiet = 2", "less than or equal to 1"],
        ),
        (
            {"kind": "gradip", "rho_later": -1},
            ["selection.rho_later = -1", "greater than or equal"],
        ),
        ({"kind": "gradip", "rho_later": "some"}, ["selection.rho_later = 'some'", "'auto'"]),
        ({"kind": "gradip", "sigma": 0}, ["selection.sigma = 0", "greater than 0"]),
        ({"kind": "gradip", "calibration_steps": 1}, ["selection.calibration_steps = 1", "2"]),
        ({"kind": "gradip", "later_window": 0}, ["selection.later_window = 0", "1"]),
        ({"kind": "gradip", "signal": "norm"}, ["selection.signal = 'norm'", "projected-gradient"]),
        ({"kind": "extreme"}, ["selection.kind = 'extreme'", "'none', 'gradip', 'random'"]),
        ({"kinds": "gradip"}, ["selection.kinds", "not a known key"]),
    ],
    ids=str,
)
def test_a_selection_that_makes_no_sense(selection: dict[str, Any], parts: list[str]) -> None:
    refused({"selection": selection}, *parts)


@pytest.mark.parametrize(
    ("selection", "parts"),
    [
        ({"kind": "list", "clients": [0, 4]}, ["selection.clients", "4", "federation.clients = 4"]),
        ({"kind": "list", "clients": [11]}, ["selection.clients", "11", "federation.clients = 4"]),
        ({"kind": "random", "count": 5}, ["selection.count = 5", "federation.clients = 4"]),
    ],
    ids=str,
)
def test_more_clients_than_there_are(selection: dict[str, Any], parts: list[str]) -> None:
    refused({"selection": selection}, *parts)


@pytest.mark.parametrize(
    "selection",
    [
        {"kind": "random", "count": 4},
        {"kind": "list", "clients": [3, 0]},
        {"kind": "gradip", "every": 3, "action": "taper", "rho_quiet": 1, "rho_later": 0},
        {"kind": "none", "calibration_steps": 2, "apply": True},
    ],
    ids=str,
)
def test_selections_that_make_sense(selection: dict[str, Any]) -> None:
    plain = make_recipe(federation=FOUR_CLIENTS)
    chosen = make_recipe(federation=FOUR_CLIENTS, selection=selection)
    assert chosen.fingerprint != plain.fingerprint
    assert parse_recipe(json.loads(chosen.to_json())) == chosen


@pytest.mark.parametrize("extreme", [4, 5])
def test_extreme_clients_leave_one_for_the_partition(extreme: int) -> None:
    refused(
        {"federation": {"partition": {"extreme": extreme}}},
        f"federation.partition.extreme = {extreme}",
        "federation.clients = 4",
        "lower it",
    )
    refused(
        {"federation": {"partition": {"extreme": -1}}},
        "federation.partition.extreme = -1",
        "greater than or equal to 0",
    )


# Extreme clients of a partition


def make_examples(count: int, labels: int = 3) -> list[Example]:
    generator = np.random.default_rng(0)
    return [Example({"text": str(i)}, int(generator.integers(labels))) for i in range(count)]


def federation(clients: int, extreme: int, **fields: Any) -> Federation:
    return Federation(clients=clients, rounds=1, partition=Partition(extreme=extreme, **fields))


@pytest.mark.parametrize(
    "chosen",
    [
        {"kind": "iid"},
        {"kind": "dirichlet", "alpha": 0.5},
        {"kind": "pathological", "labels_per_client": 2},
        {"kind": "single-label"},
    ],
    ids=lambda chosen: str(chosen["kind"]),
)
@pytest.mark.parametrize("extreme", [1, 2, 4])
@pytest.mark.parametrize("seed", [0, 1, 5])
def test_extreme_clients_are_the_last_and_hold_one_label(
    chosen: dict[str, Any], extreme: int, seed: int
) -> None:
    examples, clients = make_examples(307), 10
    parts = partition(examples, federation(clients, extreme, **chosen), seed)
    assert len(parts) == clients
    assert sorted(index for part in parts for index in part) == list(range(307))
    counts = label_counts(examples, parts, 3)
    for turn, row in enumerate(counts[clients - extreme :]):
        expected = [0, 0, 0]
        expected[(seed + turn) % 3] = 307 // clients
        assert row == expected
    others = counts[: clients - extreme]
    if chosen["kind"] == "iid":
        sizes = [sum(row) for row in others]
        assert max(sizes) - min(sizes) <= 1
        assert all(all(row) for row in others)
    if chosen["kind"] == "single-label":
        assert all(sum(count > 0 for count in row) == 1 for row in others)


def test_extreme_partition_follows_the_seed() -> None:
    examples = make_examples(200)
    one, same, other = (partition(examples, federation(6, 3), seed) for seed in (3, 3, 6))
    assert one == same
    # The same labels, other examples of them.
    assert all(set(ours) != set(theirs) for ours, theirs in zip(one, other, strict=True))
    assert any(list(part) != sorted(part) for part in one[-3:])


def test_without_extreme_clients_a_partition_is_what_it_was() -> None:
    examples = make_examples(60)
    assert partition(examples, federation(4, 0), 7) == partition(
        examples, Federation(clients=4, rounds=1), 7
    )


def test_more_extreme_clients_than_a_label_has_examples_for() -> None:
    examples = [Example({}, int(i < 4)) for i in range(40)]
    with pytest.raises(
        DataError, match=r"\Afederation\.partition\.extreme = 2: label 1 .*lower it"
    ):
        partition(examples, federation(4, 2), seed=0)
    kept = partition(examples, federation(4, 1), seed=0)
    assert label_counts(examples, kept, 2)[-1] == [10, 0]
    with pytest.raises(DataError, match="label 1 has too few"):
        partition(examples, federation(4, 1), seed=1)


def test_free_text_has_one_label() -> None:
    examples = [Example({}, answer="yes") for _ in range(30)]
    parts = partition(examples, federation(3, 2), seed=4)
    assert [len(part) for part in parts] == [10, 10, 10]


def test_too_few_others_for_single_labels_is_said_with_the_number_of_clients() -> None:
    with pytest.raises(DataError, match=r"\Afederation\.clients = 3\b.*single-label"):
        partition(make_examples(60, 2), federation(3, 2, kind="single-label"), seed=0)
