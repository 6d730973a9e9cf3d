"""Metrics against scikit-learn; sums that add up over clients; sums that no examples can have."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from meerkat.errors import RecipeError
from meerkat.runs.evaluation import evaluate_objective, evaluation_sums
from meerkat.tasks.metrics import METRICS, Metric, metric_names, metric_values
from meerkat.tasks.objective import Predictions


@st.composite
def predictions(draw: st.DrawFn, most: int = 60) -> Predictions:
    """Of 1 to `most` examples; some classes may have none, or never be predicted."""
    classes = draw(st.integers(2, 6))
    count = draw(st.integers(1, most))
    known = st.integers(0, draw(st.integers(0, classes - 1)))
    return Predictions(
        losses=np.array(draw(st.lists(st.floats(0, 50), min_size=count, max_size=count))),
        labels=np.array(draw(st.lists(known, min_size=count, max_size=count))),
        predicted=np.array(
            draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count))
        ),
        classes=classes,
        margins=np.array(draw(st.lists(st.floats(-50, 50), min_size=count, max_size=count))),
    )


def some(found: Predictions, chosen: np.ndarray) -> Predictions:
    assert found.margins is not None
    return Predictions(
        found.losses[chosen],
        found.labels[chosen],
        found.predicted[chosen],
        found.classes,
        found.margins[chosen],
    )


def value(name: str, found: Predictions) -> float:
    return metric_values({name: METRICS[name].sums(found)}, len(found.labels))[name]


def by_sklearn(name: str, found: Predictions) -> float:
    both = found.labels, found.predicted
    with warnings.catch_warnings():
        # Of classes that are predicted and have no example.
        warnings.simplefilter("ignore")
        match name:
            case "accuracy" | "preference_accuracy":
                return float(sklearn.metrics.accuracy_score(*both))
            case "macro_f1":
                labels = range(found.classes)
                return float(
                    sklearn.metrics.f1_score(*both, labels=labels, average="macro", zero_division=0)
                )
            case "balanced_accuracy":
                return float(sklearn.metrics.balanced_accuracy_score(*both))
            case "loss":
                return float(np.mean(found.losses))
            case "margin":
                assert found.margins is not None
                return float(np.mean(found.margins))
    raise AssertionError(f"{name} has no counterpart here; add one")


# Values


@pytest.mark.parametrize("name", METRICS)
@settings(max_examples=150, deadline=None)
@given(found=predictions())
def test_a_metric_is_that_of_scikit_learn(name: str, found: Predictions) -> None:
    assert value(name, found) == pytest.approx(by_sklearn(name, found), rel=1e-12, abs=1e-12)


def test_loss_is_the_log_loss_of_scikit_learn() -> None:
    """With the cross-entropy of known probabilities as losses."""
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet(np.ones(3), size=40)
    labels = generator.integers(3, size=40)
    losses = -np.log(probabilities[np.arange(40), labels])
    found = Predictions(losses, labels, probabilities.argmax(1), 3)
    expected = sklearn.metrics.log_loss(labels, probabilities, labels=range(3))
    assert value("loss", found) == pytest.approx(expected, rel=1e-12)


def test_figures_that_are_worked_out_by_hand() -> None:
    labels, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 0])
    margins = np.array([1.0, 2, -3, 4, -5, -6])
    found = Predictions(np.array([1.0, 2, 3, 4, 5, 6]), labels, predicted, 4, margins)
    assert value("margin", found) == pytest.approx(-7 / 6)
    assert value("preference_accuracy", found) == 3 / 6
    assert value("loss", found) == 3.5
    assert value("accuracy", found) == 3 / 6
    # F1 of the classes: 4/7, 2/4, 0 (never right), 0 (neither there nor predicted).
    assert value("macro_f1", found) == pytest.approx((4 / 7 + 2 / 4) / 4)
    # Recall of those that are there: 2/3, 1/2, 0.
    assert value("balanced_accuracy", found) == pytest.approx((2 / 3 + 1 / 2) / 3)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_says_what_it_is(name: str) -> None:
    metric = METRICS[name]
    assert isinstance(metric, Metric)
    assert metric.title
    assert {metric.percent, metric.lower_is_better, metric.of_classes} <= {True, False}


def test_without_examples_there_is_no_value() -> None:
    found = metric_values({name: np.zeros(1) for name in METRICS}, 0)
    assert found.keys() == METRICS.keys()
    assert all(np.isnan(value) for value in found.values())


# Sums


@pytest.mark.parametrize("name", METRICS)
@settings(max_examples=100, deadline=None)
@given(data=st.data(), found=predictions())
def test_sums_of_clients_add_up_to_the_sums_of_all(
    name: str, data: st.DataObject, found: Predictions
) -> None:
    count = len(found.labels)
    owners = np.array(data.draw(st.lists(st.integers(0, 4), min_size=count, max_size=count)))
    metric = METRICS[name]
    parts = [metric.sums(some(found, owners == client)) for client in np.unique(owners)]
    whole = metric.sums(found)
    if metric.of_classes:  # counts
        assert np.array_equal(sum(parts), whole)
    else:
        assert sum(parts) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("name", METRICS)
@settings(max_examples=100, deadline=None)
@given(found=predictions())
def test_sums_of_real_examples_are_possible(name: str, found: Predictions) -> None:
    metric, count = METRICS[name], len(found.labels)
    sums = metric.sums(found)
    assert metric.is_possible(sums, count, found.classes)
    # Not with one number more or less, and not if one of them is negative or no number.
    assert not metric.is_possible(sums[:-1], count, found.classes)
    assert not metric.is_possible(np.append(sums, 0.0), count, found.classes)
    for place in range(len(sums)):
        for wrong in (-1.0, np.nan, np.inf):
            changed = sums.copy()
            changed[place] = wrong
            assert not metric.is_possible(changed, count, found.classes), (place, wrong)


@pytest.mark.parametrize(
    ("name", "sums"),
    [
        ("accuracy", [11]),  # more hits than examples
        ("accuracy", [0.5]),  # half a hit
        ("loss", [1e32]),  # so large that sums over clients would not stay finite
        # Hits of two classes, their examples, their predictions.
        ("macro_f1", [3, 4, 6, 4, 5, 5.5]),  # half a prediction
        ("macro_f1", [3, 4, 6, 5, 5, 5]),  # 11 examples
        ("macro_f1", [3, 4, 6, 4, 5, 6]),  # 11 predictions
        ("macro_f1", [3, 5, 6, 4, 5, 5]),  # more hits than examples of the class
        ("macro_f1", [6, 3, 6, 4, 5, 5]),  # more hits than predictions of the class
        ("balanced_accuracy", [3, 5, 6, 4, 5, 5]),
        ("balanced_accuracy", [3, 4, 6, 4, 10]),
    ],
)
def test_sums_that_ten_examples_of_two_classes_cannot_have(name: str, sums: list[float]) -> None:
    assert not METRICS[name].is_possible(np.array(sums, np.float64), 10, 2)


def test_sums_at_the_edge_of_what_is_possible() -> None:
    assert METRICS["accuracy"].is_possible(np.array([10.0]), 10, 2)
    assert METRICS["loss"].is_possible(np.array([1e31]), 10, 2)
    assert METRICS["macro_f1"].is_possible(np.array([5.0, 4, 6, 4, 5, 5]), 10, 2)


class Scripted:
    """An objective that says what it was given."""

    def __init__(self, found: Predictions):
        self._found = found

    def losses(self, examples: list[int]) -> np.ndarray:
        return self._found.losses[examples]

    def predict(self, examples: list[int]) -> Predictions:
        return some(self._found, np.array(examples))


@settings(max_examples=50, deadline=None)
@given(found=predictions(), batch_size=st.integers(1, 70))
def test_batches_do_not_change_an_evaluation(found: Predictions, batch_size: int) -> None:
    names, examples = tuple(METRICS), list(range(len(found.labels)))
    metrics = {name: METRICS[name] for name in names}
    scripted = Scripted(found)
    evaluated = evaluate_objective(scripted, examples, metrics, round=3, batch_size=batch_size)
    assert tuple(evaluated.metrics) == names
    assert (evaluated.round, evaluated.examples) == (3, len(examples))
    for name in names:
        assert evaluated.metrics[name] == pytest.approx(value(name, found), rel=1e-12)
    sums = evaluation_sums(Scripted(found), examples, metrics, batch_size=batch_size)
    assert metric_values(sums, len(examples)) == evaluated.metrics


# Names in a recipe


def test_the_loss_comes_first_and_is_always_there() -> None:
    assert metric_names((), has_classes=True) == ("loss", "accuracy", "macro_f1")
    assert metric_names((), has_classes=False) == ("loss",)
    assert metric_names(("balanced_accuracy",), True) == ("loss", "balanced_accuracy")
    assert metric_names(("accuracy", "loss", "accuracy"), True) == ("loss", "accuracy")
    assert metric_names(("loss",), False) == ("loss",)
    assert metric_names((), False, has_pairs=True) == ("loss", "preference_accuracy", "margin")


@pytest.mark.parametrize(
    ("wanted", "has_classes", "message"),
    [
        (("acuracy",), True, r"evaluation\.metrics = 'acuracy' is not known; known are .*macro_f1"),
        (("macro_f1",), False, r"evaluation\.metrics: 'macro_f1' is about classes, .*leave it out"),
        (("margin",), True, r"evaluation\.metrics: 'margin' is about pairs, .*task\.chosen"),
    ],
)
def test_a_metric_that_is_not_to_be_had(
    wanted: tuple[str, ...], has_classes: bool, message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        metric_names(wanted, has_classes)
    assert "\n" not in str(caught.value)
