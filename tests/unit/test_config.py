"""Fingerprints of recipes: those of existing runs stay what they were."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from builders import MINIMAL, make_recipe, merged
from pydantic import BaseModel

from meerkat.config import Federation, Optimizer, Partition, Recipe, load_recipe
from meerkat.config.parts import Choice, Neutral, Section
from meerkat.errors import RecipeError

RECIPES = Path(__file__).parents[2] / "recipes"
RECORDED = {
    "demo.toml": "71be513577b1c031",
    "meerkat-vp.toml": "745f01a2096806a6",
    "smollm2.toml": "28e66802331b648b",
    "vision.toml": "2115ad33e76103c9",
    "deploy.toml": "82ed1bdf19a65306",
    "chat.toml": "675bd369454a94c1",
}
"""First digits of fingerprints, as version 0.1 gave them, or the one that a recipe came with."""
PLAIN_DEMO = "cd18db9c9d855ada"
"""Of the demo without its subspace."""


@pytest.mark.parametrize("name", RECORDED)
def test_fingerprints_are_those_of_the_first_version(name: str) -> None:
    """If one changes, runs of before cannot be resumed: mark the new field as `Neutral`."""
    assert load_recipe(RECIPES / name).fingerprint[:16] == RECORDED[name]


def test_the_plain_method_is_one_setting_away_from_the_demo() -> None:
    plain = load_recipe(RECIPES / "demo.toml", ["subspace.kind=none"])
    assert plain.fingerprint[:16] == PLAIN_DEMO
    assert (plain.learning_rate, plain.optimizer.estimator.kind) == (1e-5, "two-point")


def test_all_recipes_have_a_recorded_fingerprint() -> None:
    assert {path.name for path in RECIPES.glob("*.toml")} == set(RECORDED)


@pytest.mark.parametrize(
    "sections",
    [
        {"algorithm": "meerkat"},
        {"optimizer": {"rule": "sgd", "estimator": {"kind": "two-point"}}},
        {"federation": {"aggregator": "mean", "transforms": []}},
        {"noise": {"keys": "fresh"}},
        {"evaluation": {"metrics": [], "max_new_tokens": 64, "stop": None}},
        {"task": {"format": "columns", "chat_template": None}},
        {"evaluation": {"validation": 0, "patience": 0}, "task": {"validation_split": None}},
        {"runtime": {"threads": 3, "mask_passes": 2}, "network": {"quorum": 1}},
    ],
)
def test_a_later_field_spelled_out_with_its_neutral_value_changes_nothing(
    sections: dict[str, Any],
) -> None:
    assert make_recipe(**sections).fingerprint == make_recipe().fingerprint


@pytest.mark.parametrize(
    "sections",
    [
        {"algorithm": "fedkseed"},
        {"optimizer": {"rule": "momentum"}},
        {"optimizer": {"estimator": "one-sided"}},
        {"federation": {"aggregator": "median"}},
        {"federation": {"transforms": [{"kind": "clip", "bound": 1.0}]}},
        {"noise": {"keys": {"kind": "pool", "size": 5}}},
        {"evaluation": {"metrics": ["accuracy"]}},
        {"evaluation": {"examples": 511}},
    ],
)
def test_another_value_gives_another_fingerprint(sections: dict[str, Any]) -> None:
    assert make_recipe(**sections).fingerprint != make_recipe().fingerprint


def test_options_are_part_of_the_fingerprint() -> None:
    decays = [make_recipe(optimizer={"rule": {"kind": "momentum", "decay": d}}) for d in (0.8, 0.9)]
    assert len({recipe.fingerprint for recipe in decays}) == 2


# A field that is added: what a maintainer does, in a subclass


class LaterPartition(Partition):
    skew: Annotated[float, Neutral(0.0)] = 0.0


class LaterFederation(Federation):
    partition: LaterPartition = LaterPartition()


class LaterOptimizer(Optimizer):
    colour: Annotated[str, Neutral("grey")] = "grey"
    mixer: Annotated[Choice, Neutral("none")] = Choice(kind="none")
    steps: Annotated[tuple[int, ...], Neutral([1, 2])] = (1, 2)
    """Neutral values are compared as JSON has them: a tuple is a list."""


class Later(Recipe):
    federation: LaterFederation
    optimizer: LaterOptimizer = LaterOptimizer()


class Unmarked(Recipe):
    colour: str = "grey"


def later(kind: type[Recipe] = Later, **sections: Any) -> Recipe:
    return kind.model_validate_json(json.dumps(merged(MINIMAL, **sections)), strict=True)


def test_a_new_field_with_a_neutral_default_leaves_fingerprints_as_they_were() -> None:
    before = make_recipe().fingerprint
    assert later().fingerprint == before
    assert "colour" in later().to_json(), "it is in the recipe, and not in the fingerprint"
    spelled = {"colour": "grey", "mixer": {"kind": "none"}, "steps": [1, 2]}
    assert later(optimizer=spelled).fingerprint == before
    assert later(federation={"partition": {"skew": 0.0}}).fingerprint == before
    older = {"alpha": 0.25, "skew": 0.0}
    assert (
        later(federation={"partition": older}).fingerprint
        == make_recipe(federation={"partition": {"alpha": 0.25}}).fingerprint
    )


@pytest.mark.parametrize(
    "sections",
    [
        {"optimizer": {"colour": "red"}},
        {"optimizer": {"mixer": "all"}},
        {"optimizer": {"mixer": {"kind": "none", "share": 0.5}}},
        {"optimizer": {"steps": [2, 1]}},
        {"federation": {"partition": {"skew": 0.5}}},
    ],
)
def test_a_new_field_with_another_value_gives_another_fingerprint(sections: dict[str, Any]) -> None:
    assert later(**sections).fingerprint != later().fingerprint


def test_a_new_field_without_the_mark_changes_all_fingerprints() -> None:
    """So the tests above would notice."""
    assert later(Unmarked).fingerprint != make_recipe().fingerprint


def test_a_field_that_is_marked_after_the_fact_is_left_out_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mark alone decides, not the order in which fields came."""
    field = Optimizer.model_fields["schedule"]
    before = make_recipe().fingerprint
    other = make_recipe(optimizer={"schedule": "linear"}).fingerprint
    monkeypatch.setattr(field, "metadata", [*field.metadata, Neutral("constant")])
    assert make_recipe().fingerprint != before
    assert make_recipe(optimizer={"schedule": "linear"}).fingerprint == other


def fields_of(section: type[BaseModel], path: str = "") -> Iterator[tuple[str, Any]]:
    """All fields of a section and of those in it, by their names in a recipe."""
    for name, field in section.model_fields.items():
        yield f"{path}{name}", field
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section) and kind is not Choice:
            yield from fields_of(kind, f"{path}{name}.")


MARKED = {
    name: (field, mark)
    for name, field in fields_of(Recipe)
    for mark in field.metadata
    if isinstance(mark, Neutral)
}


def test_marked_fields_are_found() -> None:
    assert {"algorithm", "optimizer.rule", "federation.transforms", "noise.keys"} <= set(MARKED)


@pytest.mark.parametrize("name", MARKED)
def test_defaults_of_marked_fields_are_their_neutral_values(name: str) -> None:
    """A recipe of before says nothing of the field, so its default must compute what was."""
    _, mark = MARKED[name]
    value = json.loads(make_recipe().to_json())
    for part in name.split("."):
        value = value[part]
    assert value == mark.value


@pytest.mark.parametrize(
    ("evaluation", "missing"),
    [
        ({"patience": 3}, "validation"),
        ({"patience": 3, "every": 5}, "validation"),
        ({"patience": 3, "validation": 20}, "every"),
    ],
)
def test_patience_needs_validation_scores_in_mid_run(
    evaluation: dict[str, Any], missing: str
) -> None:
    line = (
        "evaluation.patience = 3 needs validation scores in mid-run, and "
        f"evaluation.{missing} = 0; set it, or leave patience out"
    )
    with pytest.raises(RecipeError, match=re.escape(line)):
        make_recipe(evaluation=evaluation)
    make_recipe(evaluation={"patience": 3, "validation": 20, "every": 5})


def test_validation_is_part_of_what_a_run_computes() -> None:
    plain, kept = make_recipe(), make_recipe(evaluation={"validation": 20, "every": 5})
    patient = make_recipe(evaluation={"validation": 20, "every": 5, "patience": 1})
    split = make_recipe(task={"validation_split": "validation"})
    assert len({recipe.fingerprint for recipe in (plain, kept, patient, split)}) == 4
