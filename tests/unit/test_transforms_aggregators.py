"""What happens to coefficients between a client's losses and the log, and how to add to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from builders import algorithm_of, make_recipe, make_report, make_server_state, plans_of

from meerkat.errors import DivergedError, RecipeError
from meerkat.federation.aggregators import AGGREGATORS, Aggregator
from meerkat.federation.aggregators.mean import Mean
from meerkat.federation.client import Client, Worker
from meerkat.federation.messages import RoundPlan
from meerkat.federation.rounds import close_round
from meerkat.federation.schedule import Schedule
from meerkat.federation.transforms import TRANSFORMS, Place, Transform
from meerkat.federation.transforms.clip import Clip
from meerkat.federation.virtual_path import virtual_path
from meerkat.tasks.objective import Predictions
from meerkat.zo.log import Log

SIZE = 60
PLAN = RoundPlan(round=2, steps=6, learning_rate=0.03, first_step=0, log_start=0)
SEED = 11
"""That of `builders.make_recipe`."""


class Vector:
    """A space without a model: the values are all there is."""

    size, fingerprint = SIZE, "vector"

    def __init__(self) -> None:
        self.values = self.read()

    def read(self) -> np.ndarray:
        return np.linspace(-1, 1, SIZE, dtype=np.float32)

    def write(self, theta: np.ndarray) -> None:
        self.values = theta.copy()

    def restore(self) -> None:
        self.values = self.read()


@dataclass
class Bowl:
    """Examples are numbers; the loss is ½ |θ - example|²."""

    space: Vector

    def losses(self, examples: list[float]) -> np.ndarray:
        theta = self.space.values.astype(np.float64)
        return np.array([float(((theta - x) ** 2).sum()) / 2 for x in examples])

    def predict(self, examples: list[float]) -> Predictions:
        none = np.zeros(len(examples), np.int64)
        return Predictions(self.losses(examples), none, none, 1)


def make_worker(**sections: Any) -> Worker:
    space = Vector()
    return Worker(space, Bowl(space), algorithm_of(SIZE, **sections))


def answer(worker: Worker, number: int = 0) -> tuple[list[tuple[float, ...]], list[Any]]:
    """A client's scalars and states step by step, checked against its report and its path."""
    client = Client(number, [1.0 + number, 2.0, 3.0, -4.0], 2, SEED)
    steps = list(client.local_steps(PLAN, worker))
    report, _ = client.answer(PLAN, worker)
    assert report.scalars == tuple(scalar for step in steps for scalar in step.scalars)
    path = list(virtual_path(worker.state, PLAN.learning_rate, report, worker.algorithm))
    assert [state.digest for state in path] == [step.state.digest for step in steps]
    assert [state.to_bytes() for state in path] == [step.state.to_bytes() for step in steps]
    return [step.scalars for step in steps], [step.state for step in steps]


def clip(bound: float) -> dict[str, Any]:
    return {"transforms": [{"kind": "clip", "bound": bound}]}


# Clipping


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("perturbations", [1, 3])
def test_a_clip_that_bites_acts_before_the_clients_own_update(
    rule: str, perturbations: int
) -> None:
    """`answer` compares the path that the server sees with the client's own states."""
    sections = {"noise": {"perturbations": perturbations}, "optimizer": {"rule": rule}}
    free, free_states = answer(make_worker(**sections))
    bound = float(np.median(np.abs(free)))
    clipped, states = answer(make_worker(**sections, federation=clip(bound)))
    assert np.max(np.abs(clipped)) == np.float32(bound)
    assert np.max(np.abs(free)) > bound
    # The first step starts from the same θ, so there it is the free one, clipped.
    expected = np.clip(np.array(free[0]), -bound, bound).astype(np.float32)
    assert clipped[0] == tuple(expected.tolist())
    assert states[-1].digest != free_states[-1].digest


def test_a_clip_that_is_wide_changes_nothing() -> None:
    free, states = answer(make_worker())
    wide, same = answer(make_worker(federation=clip(1e6)))
    assert wide == free
    assert [state.digest for state in same] == [state.digest for state in states]


def test_clip_by_itself() -> None:
    values = np.array([-3.0, -0.5, 0.0, 0.5, 3.0])
    place = Place(0, 0, 0, 0)
    assert Clip(0.75)(values, place).tolist() == [-0.75, -0.5, 0, 0.5, 0.75]
    assert values.tolist() == [-3, -0.5, 0, 0.5, 3]
    assert isinstance(Clip(1.0), Transform)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, r"federation\.transforms = 'clip': its option bound is missing; add it"),
        ({"bound": 0}, r"bound = 0\.0 is not positive"),
        ({"bound": -1.5}, r"bound = -1\.5 is not positive"),
        ({"bound": "tight"}, r"federation\.transforms\.bound = 'tight' is no float"),
        ({"bound": 1.0, "norm": 2}, r"norm is not one of its options; known are bound"),
    ],
    ids=str,
)
def test_a_clip_that_makes_no_sense(options: dict[str, Any], line: str) -> None:
    with pytest.raises(RecipeError, match=rf"\A[^\n]*{line}[^\n]*\Z"):
        algorithm_of(SIZE, federation={"transforms": [{"kind": "clip", **options}]})


# One more, by its name alone


@dataclass(frozen=True)
class Scale:
    """g ← factor g; keeps where it was called."""

    factor: float = 0.5

    def __call__(self, coefficients: np.ndarray, place: Place) -> np.ndarray:
        CALLS.append(place)
        return self.factor * coefficients


CALLS: list[Place] = []


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    monkeypatch.setitem(TRANSFORMS, "scale", Scale)  # type: ignore[arg-type]


def test_a_further_transform_is_one_line_in_the_registry(scale: None) -> None:
    worker = make_worker(
        federation={"transforms": ["scale"]}, noise={"perturbations": 2, "directions": "per-client"}
    )
    halves, _ = answer(worker, 5)
    free, _ = answer(make_worker(noise={"perturbations": 2, "directions": "per-client"}), 5)
    assert halves[0] == tuple(float(np.float32(g)) / 2 for g in free[0])
    # Once a step, for both runs of the client in `answer`: never for the server.
    assert [Place(SEED, 2, step, 5) for step in range(6)] * 2 == CALLS


def test_transforms_act_in_the_order_of_the_recipe(scale: None) -> None:
    bound = {"kind": "clip", "bound": 1.0}
    large = {"kind": "scale", "factor": 1000.0}
    first, _ = answer(make_worker(federation={"transforms": [bound, large]}))
    last, _ = answer(make_worker(federation={"transforms": [large, bound]}))
    assert {abs(g) for (g,) in first} == {1000.0}
    assert {abs(g) for (g,) in last} == {1.0}


def test_transforms_are_part_of_the_fingerprint(scale: None) -> None:
    recipes = [
        make_recipe(),
        make_recipe(federation={"transforms": ["scale"]}),
        make_recipe(federation={"transforms": [{"kind": "scale", "factor": 0.25}]}),
        make_recipe(federation=clip(1.0)),
    ]
    assert len({recipe.fingerprint for recipe in recipes}) == 4
    assert make_recipe(federation={"transforms": []}).fingerprint == recipes[0].fingerprint


@pytest.mark.parametrize("factor", [1e300, -1e300])
def test_what_a_transform_makes_too_large_ends_the_run(scale: None, factor: float) -> None:
    transforms = [{"kind": "scale", "factor": factor}]
    with pytest.raises(DivergedError, match=r"projected gradient .* out of range; lower"):
        answer(make_worker(federation={"transforms": transforms}))


def test_an_unknown_transform_is_answered_with_those_there_are() -> None:
    with pytest.raises(
        RecipeError, match=r"\Afederation\.transforms = 'noise' is not known; known are clip\Z"
    ):
        algorithm_of(SIZE, federation={"transforms": ["noise"]})


# Aggregators


@dataclass(frozen=True)
class Median:
    """The middle one, or the lower of the two, of those with a weight above a least one."""

    least: float = 0.0

    def __call__(self, coefficients: np.ndarray, weights: np.ndarray) -> float:
        kept = np.sort(coefficients[weights > self.least])
        return float(kept[(len(kept) - 1) // 2])


@pytest.fixture
def median(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AGGREGATORS, "lower-median", Median)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["lower-median", {"kind": "lower-median", "least": 0.1}], ids=str)
def test_a_further_aggregator_is_one_line_in_the_registry(median: None, kind: Any) -> None:
    """Three clients of 1, 2 and 9 examples; with `least` the first one is left out."""
    federation = {"aggregator": kind, "weighting": "examples"}
    algorithm = algorithm_of(SIZE, federation=federation, noise={"perturbations": 2})
    assert isinstance(algorithm.aggregator, Median)
    assert isinstance(algorithm.aggregator, Aggregator)
    state = make_server_state(algorithm, 3)
    rows = {0: [1.0, 8.0, 3.0, -4.0], 1: [5.0, -2.0, 100.0, 2.0], 2: [3.0, 4.0]}
    reports = [
        make_report(state.model, k, row, perturbations=2, examples=(1, 2, 9)[k])
        for k, row in rows.items()
    ]
    schedule = Schedule.of(make_recipe(federation=federation))
    after, record = close_round(schedule, state, algorithm, plans_of(reports), reports, Log())
    # Client 2 was stopped after one step: a zero afterwards.
    expected = [[3.0, 4.0], [3.0, 0.0]] if kind == "lower-median" else [[3.0, -2.0], [0.0, 0.0]]
    found = [[2 * entry.coefficient for entry in update.entries] for update in record.updates]
    assert found == expected
    assert algorithm.apply(state.model, record.updates).digest == after.model.digest


def test_the_aggregator_of_a_recipe() -> None:
    assert algorithm_of(SIZE).aggregator == Mean()
    known = "mean, median, trimmed-mean"
    with pytest.raises(
        RecipeError, match=rf"\Afederation\.aggregator = 'krum' is not known; known are {known}\Z"
    ):
        algorithm_of(SIZE, federation={"aggregator": "krum"})


@pytest.mark.parametrize("make", [Mean, Median])
def test_an_aggregator_of_one_client_is_that_client(make: Callable[[], Aggregator]) -> None:
    assert make()(np.array([0.375]), np.array([1.0])) == 0.375


def test_the_mean_is_correctly_rounded() -> None:
    values, weights = np.array([2.0**60, 1.0, -(2.0**60), 1.0]), np.full(4, 0.25)
    assert Mean()(values, weights) == 0.5
    assert Mean()(values[::-1].copy(), weights) == 0.5


@pytest.mark.parametrize("method", [{}, {"algorithm": "fedkseed"}], ids=str)
def test_an_aggregator_needs_a_direction_that_clients_share(
    median: None, method: dict[str, Any]
) -> None:
    """Else each client's coefficient stays its own, and the choice would mean nothing."""
    sections = {"noise": {"directions": "per-client"}, **method}
    line = r"\Afederation\.aggregator = 'lower-median' [^\n]*noise\.directions[^\n]*'mean'[^\n]*\Z"
    with pytest.raises(RecipeError, match=line):
        algorithm_of(SIZE, federation={"aggregator": "lower-median"}, **sections)
    algorithm_of(SIZE, federation={"aggregator": "mean"}, **sections)


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_what_an_aggregator_is_given(monkeypatch: pytest.MonkeyPatch, weighting: str) -> None:
    """Clients sorted, zeros for who was stopped, and weights that add up to 1."""
    seen: list[tuple[list[float], list[float]]] = []

    @dataclass(frozen=True)
    class Watching:
        def __call__(self, coefficients: np.ndarray, weights: np.ndarray) -> float:
            seen.append((coefficients.tolist(), weights.tolist()))
            return 0.0

    monkeypatch.setitem(AGGREGATORS, "watching", Watching)  # type: ignore[arg-type]
    algorithm = algorithm_of(SIZE, federation={"aggregator": "watching", "weighting": weighting})
    state = algorithm.init(Vector().read())
    rows = {4: [8.0, 1.0], 0: [1.0, -1.0], 1: [3.0]}
    algorithm.aggregate([make_report(state, client, row) for client, row in rows.items()], 0.1)
    assert [coefficients for coefficients, _ in seen] == [[1.0, 3.0, 8.0], [-1.0, 0.0, 1.0]]
    # They hold 1, 2 and 5 examples (`builders.make_report`).
    shares = [1 / 3] * 3 if weighting == "uniform" else [1 / 8, 2 / 8, 5 / 8]
    assert all(given == pytest.approx(shares) for _, given in seen)


def test_a_transform_is_given_the_place_of_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[Place] = []

    @dataclass(frozen=True)
    class Watching:
        def __call__(self, coefficients: np.ndarray, place: Place) -> np.ndarray:
            assert coefficients.shape == (2,)
            places.append(place)
            return coefficients

    monkeypatch.setitem(TRANSFORMS, "watching", Watching)  # type: ignore[arg-type]
    federation = {"transforms": ["watching"]}
    answer(make_worker(federation=federation, noise={"perturbations": 2}), 3)
    expected = [Place(SEED, PLAN.round, step, 3) for step in range(PLAN.steps)]
    assert places == expected * 2  # the steps, and the answer
