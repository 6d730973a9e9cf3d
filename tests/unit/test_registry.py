"""Choices of a recipe by name: what is built, and one line for everything that does not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest

from meerkat.algorithms import ALGORITHMS
from meerkat.errors import RecipeError
from meerkat.federation.aggregators import AGGREGATORS, Aggregator
from meerkat.federation.transforms import TRANSFORMS, Transform
from meerkat.registry import build, look_up
from meerkat.tasks.metrics import METRICS, Metric
from meerkat.zo.directions import KeyScheme
from meerkat.zo.estimators import ESTIMATORS, Estimator
from meerkat.zo.key_schemes import KEY_SCHEMES
from meerkat.zo.update_rules import UPDATE_RULES
from meerkat.zo.update_rules.base import UpdateRule


@dataclass(frozen=True)
class Plain:
    """No options."""


@dataclass(frozen=True)
class Tuned:
    """Options of several types, one without a default."""

    strength: float
    count: int = 3
    mode: str = "soft"
    parts: tuple[str, ...] = field(default_factory=tuple)
    shared: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count = {self.count} is less than 1")


# As a module without `from __future__ import annotations` has them: types, not their names.
Typed = dataclass(frozen=True)(
    type("Typed", (), {"__annotations__": {"rate": float, "count": int}, "rate": 0.5, "count": 1})
)

TABLE: Mapping[str, Callable[..., Any]] = {"plain": Plain, "tuned": Tuned, "typed": Typed}


def refused(name: str, options: Mapping[str, Any]) -> str:
    with pytest.raises(RecipeError, match=r"\A[^\n]*\Z") as caught:
        build(TABLE, name, options, "section.field")
    assert caught.value.__cause__ is None
    return str(caught.value)


def test_what_is_registered_is_found() -> None:
    assert look_up(TABLE, "plain", "section.field") is Plain
    assert look_up({"a": 1, "b": 2}, "b", "x") == 2


def test_what_is_not_registered_is_answered_with_what_is() -> None:
    line = "section.field = 'none' is not known; known are plain, tuned, typed"
    with pytest.raises(RecipeError) as caught:
        look_up(TABLE, "none", "section.field")
    assert str(caught.value) == refused("none", {}) == line


@pytest.mark.parametrize(
    ("name", "options", "made"),
    [
        ("plain", {}, Plain()),
        ("tuned", {"strength": 0.5}, Tuned(0.5)),
        ("tuned", {"strength": 1, "count": 2, "mode": "hard"}, Tuned(1.0, 2, "hard")),
        ("tuned", {"strength": -1e308}, Tuned(-1e308)),
        ("typed", {"rate": 2, "count": 4}, Typed(2.0, 4)),
    ],
    ids=str,
)
def test_options_become_fields(name: str, options: dict[str, Any], made: Any) -> None:
    found = build(TABLE, name, options, "section.field")
    assert found == made
    assert all(type(value) is type(getattr(made, key)) for key, value in vars(found).items())


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("plain", {"a": 1}, "section.field = 'plain': a is not one of its options; it takes none"),
        (
            "tuned",
            {"strength": 1.0, "shared": 2},
            "section.field = 'tuned': shared is not one of its options; "
            "known are strength, count, mode, parts",
        ),
        ("tuned", {}, "section.field = 'tuned': its option strength is missing; add it"),
        ("tuned", {"strength": "1"}, "section.field.strength = '1' is no float"),
        ("tuned", {"strength": False}, "section.field.strength = False is no float"),
        ("tuned", {"strength": float("inf")}, "strength = inf is no float; give a finite number"),
        ("tuned", {"strength": -float("inf")}, "strength = -inf is no float; give a finite"),
        ("tuned", {"strength": float("nan")}, "strength = nan is no float; give a finite number"),
        ("tuned", {"strength": 2**1024}, "is no float; give a finite number"),
        ("tuned", {"strength": 1.0, "count": 2.0}, "count = 2.0 is no int; give a whole number"),
        ("tuned", {"strength": 1.0, "count": True}, "count = True is no int; give a whole"),
        ("tuned", {"strength": 1.0, "count": 0}, "section.field = 'tuned': count = 0 is less"),
        ("typed", {"rate": "fast"}, "section.field.rate = 'fast' is no float"),
        ("typed", {"count": 1.5}, "section.field.count = 1.5 is no int"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_does_not_fit_is_one_line(name: str, options: dict[str, Any], line: str) -> None:
    assert line in refused(name, options)


REGISTRIES: list[tuple[Mapping[str, Callable[..., Any]], type, dict[str, dict[str, Any]]]] = [
    (UPDATE_RULES, UpdateRule, {}),
    (ESTIMATORS, Estimator, {}),
    (KEY_SCHEMES, KeyScheme, {}),
    (AGGREGATORS, Aggregator, {}),
    (TRANSFORMS, Transform, {"clip": {"bound": 1.0}}),
]


@pytest.mark.parametrize(
    ("table", "face", "needed"), REGISTRIES, ids=[face.__name__ for _, face, _ in REGISTRIES]
)
def test_everything_that_is_registered_can_be_built(
    table: Mapping[str, Callable[..., Any]], face: type, needed: dict[str, dict[str, Any]]
) -> None:
    """By name alone, or with the options that have no default; all names are written alike."""
    assert set(needed) <= set(table)
    for name in table:
        made = build(table, name, needed.get(name, {}), "section.field")
        assert isinstance(made, face)
        assert made == build(table, name, needed.get(name, {}), "section.field")
        assert name == name.lower()
        assert "_" not in name


def test_metrics_and_algorithms_are_named_too() -> None:
    assert all(isinstance(metric, Metric) for metric in METRICS.values())
    assert {"meerkat", "fedkseed"} <= set(ALGORITHMS)
