"""The JSON Schema of a recipe, for completion in editors and for the page of its fields.

Types, bounds, defaults and descriptions are those of `config.sections`. What a field chooses by
name comes from its registry, with the options of each choice.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from meerkat.algorithms import ALGORITHMS
from meerkat.config import Recipe
from meerkat.federation.aggregators import AGGREGATORS
from meerkat.federation.transforms import TRANSFORMS
from meerkat.models.demo_models import DEMO_MODELS
from meerkat.tasks.losses import LOSSES
from meerkat.tasks.metrics import METRICS, TEXT_METRICS, WITH_OPTIONS
from meerkat.tasks.registry import TASKS
from meerkat.zo.estimators import ESTIMATORS
from meerkat.zo.key_schemes import KEY_SCHEMES
from meerkat.zo.update_rules import UPDATE_RULES

__all__ = ["CHOICES", "recipe_schema"]

CHOICES: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "algorithm": ALGORITHMS,
    "evaluation.metrics": {
        **{name: type(metric) for name, metric in {**METRICS, **TEXT_METRICS}.items()},
        **WITH_OPTIONS,
    },
    "federation.aggregator": AGGREGATORS,
    "federation.transforms": TRANSFORMS,
    "noise.keys": KEY_SCHEMES,
    "optimizer.estimator": ESTIMATORS,
    "optimizer.rule": UPDATE_RULES,
    "task.objective": LOSSES,
}
"""Registries by the field that names one of their entries."""

_OWN_FUNCTIONS = ("evaluation.metrics", "task.objective")
"""Fields that also take a function of one's own, `module:function`."""

_KNOWN = {
    "model.name": DEMO_MODELS,
    "task.name": [*TASKS, "custom"],
}
"""Names that come with the package, of fields that take others, too, or check them later."""

_TYPES = {"bool": "boolean", "float": "number", "int": "integer", "str": "string"}


def recipe_schema() -> dict[str, Any]:
    """A recipe's JSON Schema (draft 2020-12).

    It says what holds of each field alone; what holds between fields, `Recipe` checks.
    """
    schema = Recipe.model_json_schema()
    for field, registry in CHOICES.items():
        found = _field(schema, field)
        found = found.get("items", found)
        del found["$ref"]
        found["anyOf"] = [
            *_alternatives(registry),
            *(_own_functions() if field in _OWN_FUNCTIONS else ()),
        ]
    for field, names in _KNOWN.items():
        found = _field(schema, field)
        found.get("items", found)["examples"] = sorted(names)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return {**head, **schema, "title": "Recipe of Meerkat"}


def _field(schema: dict[str, Any], name: str) -> dict[str, Any]:
    """Schema of a field by its name in a recipe."""
    found = schema
    for part in name.split("."):
        section = found.get("$ref", "").rpartition("/")[2]
        found = (schema["$defs"][section] if section else found)["properties"][part]
    return found


def _alternatives(registry: Mapping[str, Callable[..., Any]]) -> Iterator[dict[str, Any]]:
    """A name alone, where no option has to be given, or a table with the options of a kind."""
    tables, bare = [], []
    for name, kind in registry.items():
        options = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
        needed = [option.name for option in options if not _has_default(option)]
        if not needed:
            bare.append(name)
        tables.append(
            {
                "type": "object",
                "description": inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0],
                "properties": {
                    "kind": {"const": name},
                    **{option.name: _option(option) for option in options},
                },
                "required": ["kind", *needed],
                "additionalProperties": False,
            }
        )
    if bare:
        yield {"enum": bare}
    yield from tables


def _own_functions() -> Iterator[dict[str, Any]]:
    """`module:function`, or a table with it and its arguments by name."""
    named = {"type": "string", "pattern": "^[^:]+:[^:]+$"}
    yield named
    yield {
        "type": "object",
        "description": "A function of your own; its arguments by name.",
        "properties": {"kind": named},
        "required": ["kind"],
        "additionalProperties": {"type": ["boolean", "number", "string"]},
    }


def _has_default(option: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return option.default is not missing or option.default_factory is not missing


def _option(option: dataclasses.Field[Any]) -> dict[str, Any]:
    types = [_TYPES[name] for name in str(option.type).split(" | ") if name in _TYPES]
    found: dict[str, Any] = {"type": types[0]} if len(types) == 1 else {}
    if option.default is not dataclasses.MISSING:
        found["default"] = option.default
    return found
