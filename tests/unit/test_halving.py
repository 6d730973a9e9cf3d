"""Successive halving: budgets add up, and a recipe is written as TOML that loads as it was."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from builders import MINIMAL, merged
from hypothesis import given
from hypothesis import strategies as st

from meerkat.comparison.halving import plan_halving, read_tries
from meerkat.config import parse_recipe
from meerkat.config.writing import to_toml
from meerkat.errors import RecipeError


@given(st.integers(2, 9), st.integers(5_000, 200_000), st.integers(1, 64), st.integers(1, 3))
def test_all_trials_together_stay_within_the_budget(
    count: int, passes: int, validation: int, steps: int
) -> None:
    """And rungs of fewer trials get more rounds each; no trial is longer than the recipe's run."""
    data = merged(MINIMAL, federation={"rounds": 900, "batch_size": 4})
    tries = {"federation.local_steps": [steps], "optimizer.learning_rate": [*range(1, count + 1)]}
    try:
        plan = plan_halving(data, tries, passes, validation)
    except RecipeError as error:
        least = int(str(error).partition("at least ")[2].partition(":")[0])
        assert least > passes
        return
    assert plan.sizes[0] == count
    assert all(
        -(-one // 2) == other for one, other in zip(plan.sizes, plan.sizes[1:], strict=False)
    )
    assert -(-plan.sizes[-1] // 2) == 1
    ends = [*plan.sizes[1:], 1]
    leaving = [size - end for size, end in zip(plan.sizes, ends, strict=True)]
    trial = plan.trials[0]
    paid = sum(plan.passes(trial, rung + 1) * gone for rung, gone in enumerate(leaving))
    assert paid + plan.passes(trial, len(plan.sizes)) <= passes
    assert list(trial.rounds) == sorted(trial.rounds)
    assert trial.recipe.federation.rounds == trial.rounds[-1] <= 900 // steps


def test_by_default_the_rates_of_the_kind_of_mask_are_tried() -> None:
    assert read_tries([], parse_recipe(MINIMAL)) == {
        "optimizer.learning_rate": [3e-6, 1e-5, 3e-5, 1e-4]
    }
    full = parse_recipe(merged(MINIMAL, mask={"kind": "full"}))
    assert max(read_tries([], full)["optimizer.learning_rate"]) == 1e-6
    named = read_tries(["mask.density=[1e-3, 1e-2]"], full)
    assert named == {"mask.density": [1e-3, 1e-2]}


VALUES = st.recursive(
    st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=5), inner, max_size=3
        )
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.text("abc_-1", min_size=1, max_size=4), VALUES, max_size=4))
def test_what_is_written_is_read_as_it_was(sections: dict[str, Any]) -> None:
    assert tomllib.loads(to_toml(sections)) == sections


def test_a_recipe_is_written_whole() -> None:
    data = merged(MINIMAL, task={"verbalizers": {"1": 'bad "one"', "5": "gut ☃"}, "cut": None})
    again = tomllib.loads(to_toml(data))
    assert parse_recipe(again) == parse_recipe(data)


def test_an_empty_list_of_values_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"--try 'mask\.density=\[\]'"):
        read_tries(["mask.density=[]"], parse_recipe(MINIMAL))
