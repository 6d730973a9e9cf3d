"""The JSON Schema of a recipe: what it takes and refuses, beside what `Recipe` does."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
from commands import invoke

from meerkat.config import Recipe, parse_recipe
from meerkat.config.parts import Choice, Section
from meerkat.config.reading import with_overrides
from meerkat.errors import RecipeError
from meerkat.runs.recipe_schema import CHOICES, recipe_schema

ROOT = Path(__file__).parents[2]
VALIDATOR = jsonschema.Draft202012Validator(recipe_schema())


def is_recipe(data: dict[str, Any]) -> bool:
    return "methods" not in data and "cases" not in data


def shipped() -> list[Path]:
    """Every file under recipes/ that is a recipe, and no grid."""
    found = sorted((ROOT / "recipes").rglob("*.toml"))
    return [path for path in found if is_recipe(tomllib.loads(path.read_text()))]


def sections(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        name: schema["$defs"][prop.get("$ref", prop.get("anyOf", [{}])[0].get("$ref"))[8:]]
        for name, prop in schema["properties"].items()
        if "$defs" in json.dumps(prop)
    }


@pytest.fixture
def demo() -> dict[str, Any]:
    return tomllib.loads((ROOT / "recipes/demo.toml").read_text())


def test_it_is_a_json_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(recipe_schema())


@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_shipped_recipes_are_valid(path: Path) -> None:
    data = tomllib.loads(path.read_text())
    # What several recipes of a grid have in common says no rounds.
    data["federation"].setdefault("rounds", 1)
    VALIDATOR.validate(data)
    # And what is written of a recipe: all fields, also those that are null.
    VALIDATOR.validate(json.loads(parse_recipe(data).to_json()))


@pytest.mark.parametrize(
    "change",
    [
        "federation.round=3",
        "nonsense.key=1",
        "federation.rounds=0",
        "federation.rounds='3'",
        "mask.density=1.5",
        "mask.kind=sensitive",
        "optimizer.rule=sgdd",
        "optimizer.rule={kind='momentum', decoy=0.5}",
        "optimizer.rule={kind='momentum', decay='much'}",
        "optimizer.rule={decay=0.5}",
        "optimizer.learning_rate=0",
        "optimizer.learning_rate=fast",
        "federation.transforms=['clip']",
        "federation.transforms=[{kind='clip'}]",
        "federation.aggregator=3",
        "noise.keys={kind='pool', size=1.5}",
        "algorithm=nonsense",
        "federation.partition={kind='iid', part=1}",
        "seed=-1",
        "task.objective=macro-f1",
        "task.objective={kind='macro_f1', temprature=1}",
        "evaluation.metrics=['acuracy']",
        "evaluation.metrics=[{kind='regex'}]",
        "evaluation.metrics=[{kind='accuracy', weight=1}]",
    ],
)
def test_a_wrong_field_is_refused_by_schema_and_recipe(demo: dict[str, Any], change: str) -> None:
    wrong = with_overrides(demo, [change])
    assert not VALIDATOR.is_valid(wrong)
    with pytest.raises(RecipeError):
        build_choices(parse_recipe(wrong))


@pytest.mark.parametrize(
    "change",
    [
        "optimizer.rule=momentum",
        "optimizer.rule={kind='momentum', decay=0.5}",
        "optimizer.rule={kind='adam', beta1=0}",
        "optimizer.learning_rate=1e-3",
        "optimizer.learning_rate=1",
        "optimizer.exact_clients=[0, 1]",
        "optimizer.exact_clients=able",
        "federation.transforms=[{kind='clip', bound=100}]",
        "federation.aggregator={kind='trimmed-mean', share=0.3}",
        "noise.keys={kind='pool', size=4096}",
        "algorithm=fedkseed",
        "task.verbalizers={'1'='bad', '5'='good'}",
        "task.verbalizers=['bad', 'good']",
        "subspace.kind=none",
        "mask.corpus=['a.txt', 'b.txt']",
        "evaluation.metrics=['accuracy', 'macro_f1']",
        "evaluation.metrics=[{kind='accuracy'}]",
        "task.objective=macro_f1",
        "task.objective={kind='accuracy', temperature=0.5}",
        "task.objective={kind='mine:focal', gamma=2}",
    ],
)
def test_what_a_recipe_takes_the_schema_takes(demo: dict[str, Any], change: str) -> None:
    changed = with_overrides(demo, [change])
    build_choices(parse_recipe(changed))
    VALIDATOR.validate(changed)


def build_choices(recipe: Recipe) -> None:
    """Make what the recipe chooses by name, as a run does."""
    from meerkat.registry import build
    from meerkat.tasks.functions import is_function
    from meerkat.tasks.metrics import metrics_of

    metrics_of(recipe.evaluation.metrics, has_classes=True)
    for field, registry in CHOICES.items():
        if field == "evaluation.metrics":
            continue
        value: Any = recipe
        for part in field.split("."):
            value = getattr(value, part)
        for choice in value if isinstance(value, tuple) else (value,):
            if not is_function(choice.kind):
                build(registry, choice.kind, choice.options, field)


def test_each_choice_by_name_has_its_registry() -> None:
    """A field that is added with a registry of its own needs a line in `CHOICES`."""

    def walk(section: type[Section], prefix: str = "") -> set[str]:
        found = set()
        for name, field in section.model_fields.items():
            kinds = {field.annotation, *get_args(field.annotation)}
            if Choice in kinds:
                found.add(prefix + name)
            for kind in kinds - {Choice}:
                if isinstance(kind, type) and issubclass(kind, Section):
                    found |= walk(kind, f"{prefix}{name}.")
        return found

    assert walk(Recipe) == set(CHOICES)


def test_each_field_says_what_it_is() -> None:
    schema = recipe_schema()
    told = {
        f"{name}.{field}": found.get("description", "")
        for name, section in sections(schema).items()
        for field, found in section["properties"].items()
        if "$ref" not in found
    }
    assert len(told) > 100
    assert [field for field, text in told.items() if not text] == []
    metrics = schema["$defs"]["Evaluation"]["properties"]["metrics"]["items"]
    assert {"macro_f1", "rouge_l"} <= set(metrics["anyOf"][0]["enum"])


def test_pydantics_own_schema_takes_names_and_tables() -> None:
    plain = jsonschema.Draft202012Validator(Recipe.model_json_schema())
    data = tomllib.loads((ROOT / "recipes/demo.toml").read_text())
    data["optimizer"] = {"rule": {"kind": "momentum", "decay": 0.9}, "estimator": "two-point"}
    plain.validate(data)
    data["optimizer"]["rule"] = {"decay": 0.9}
    assert not plain.is_valid(data)


def test_the_command_prints_it() -> None:
    assert json.loads(invoke("schema").stdout) == recipe_schema()
