"""What one report may do: aggregators, clipping, weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
from builders import algorithm_of, make_recipe, make_report
from hypothesis import given
from hypothesis import strategies as st

from meerkat.errors import RecipeError
from meerkat.federation.aggregation import clipped, usual_size, weights
from meerkat.federation.aggregators.mean import Mean
from meerkat.federation.aggregators.median import Median
from meerkat.federation.aggregators.trimmed_mean import TrimmedMean
from meerkat.federation.rounds import WINDOW, close_round, plan_round
from meerkat.federation.schedule import Schedule
from meerkat.federation.state import ServerState, initial_state
from meerkat.zo.log import Log

N = 40


def even(count: int) -> np.ndarray:
    return np.full(count, 1 / count)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=30))
def test_aggregators_of_equal_weights_against_numpy(values: list[float]) -> None:
    array = np.array(values)
    assert Median()(array, even(len(values))) == pytest.approx(np.median(array))
    assert Mean()(array, even(len(values))) == pytest.approx(array.mean(), abs=1e-9)
    cut = min(math.ceil(0.2 * len(values)), (len(values) - 1) // 2) if len(values) > 2 else 0
    kept = np.sort(array)[cut : len(values) - cut]
    found = TrimmedMean(0.2)(array, even(len(values)))
    assert found == pytest.approx(kept.mean(), abs=1e-9)


@given(
    st.lists(st.floats(-10, 10, width=32), min_size=7, max_size=7),
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=3, max_size=3),
    st.sampled_from([Median(), TrimmedMean(0.3)]),
)
def test_three_liars_of_ten_stay_between_the_honest(
    honest: list, liars: list, rule: object
) -> None:
    found = rule(np.array(honest + liars), even(10))  # type: ignore[operator]
    assert min(honest) <= found <= max(honest)


def test_the_weighted_median_follows_the_weight() -> None:
    values = np.array([1.0, 2.0, 9.0])
    assert Median()(values, np.array([0.2, 0.2, 0.6])) == 9.0
    assert Median()(values, np.array([0.5, 0.25, 0.25])) == 1.5


@pytest.mark.parametrize("share", [-0.1, 0.5, 1.0])
def test_a_trimmed_share_is_less_than_half(share: float) -> None:
    with pytest.raises(RecipeError, match=r"trimmed-mean.*share = "):
        algorithm_of(N, federation={"aggregator": {"kind": "trimmed-mean", "share": share}})


def test_counts_are_capped_by_the_median() -> None:
    state = algorithm_of(N).init(np.zeros(N, np.float32))
    reports = [make_report(state, k, [1.0], examples=e) for k, e in enumerate((10, 12, 4_000_000))]
    assert weights(reports, "examples")[2] > 0.99
    assert weights(reports, "examples", 10.0)[2] == pytest.approx(120 / 142)
    recipe = {"weighting": "examples"}
    (update,) = algorithm_of(N, federation=recipe).aggregate(reports, 0.1)
    assert update.entries[0].coefficient == pytest.approx(1.0)


def test_clipping_leaves_what_is_small_as_it_is() -> None:
    state = algorithm_of(N).init(np.zeros(N, np.float32))
    report = make_report(state, 0, [1.0, -3.0, 0.5])
    assert clipped(report, 3.0) is report
    assert clipped(report, 2.0).scalars == (1.0, -2.0, 0.5)


def run(scalars: list[list[float]], **federation: object) -> tuple[ServerState, float]:
    """Rounds of one step, scalars by round and client; the last state and its last coefficient."""
    clients = len(scalars[0])
    recipe = make_recipe(federation={"clients": clients, "rounds": len(scalars), **federation})
    schedule, algorithm = (
        Schedule.of(recipe),
        algorithm_of(N, federation={"clients": clients, **federation}),
    )
    log, state = Log(), initial_state(algorithm.init(np.zeros(N, np.float32)), clients, 1)
    for row in scalars:
        plans = plan_round(schedule, state, log)
        reports = [make_report(state.model, k, [g], state.round) for k, g in enumerate(row)]
        state, record = close_round(schedule, state, algorithm, plans, reports, log)
        assert [report.scalars[0] for report in record.reports] == pytest.approx(row)
        log.append(record.updates)
    return state, record.updates[0].entries[0].coefficient


def test_one_report_moves_the_model_no_further_than_the_bound() -> None:
    honest = [[1.0, -2.0, 1.5, 1e6]]
    _, coefficient = run(honest)
    usual = float(np.median([1.0, 2.0, 1.5, 1e6]))
    assert coefficient == pytest.approx((1.0 - 2.0 + 1.5 + 10 * usual) / 4)
    assert run(honest, clip_factor=0)[1] == pytest.approx(sum(honest[0]) / 4)


def test_what_is_usual_is_remembered_over_rounds() -> None:
    """Where z is nearly orthogonal to all gradients, an honest |g| may be many times the median."""
    quiet = [[2.0, -1.0, 1.0]] * 10 + [[0.001, 0.001, 3.0]]
    assert run(quiet)[1] == pytest.approx((0.002 + 3.0) / 3)
    alone = [[0.001, 0.001, 3.0]]
    assert run(alone)[1] == pytest.approx((0.002 + 0.01) / 3)


def test_the_memory_is_short_and_part_of_the_state() -> None:
    state, _ = run([[float(r + 1)] * 3 for r in range(WINDOW + 5)])
    assert state.usual == tuple(float(r + 6) for r in range(WINDOW))


def test_two_clients_are_not_clipped() -> None:
    assert run([[1.0, 1e5]])[1] == pytest.approx((1 + 1e5) / 2)


def test_usual_is_the_median_of_the_largest() -> None:
    state = algorithm_of(N).init(np.zeros(N, np.float32))
    reports = [make_report(state, k, [0.1, -float(k)]) for k in (1, 2, 9)]
    assert usual_size(reports) == 2.0
