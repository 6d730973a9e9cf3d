"""The page of a recipe's fields, from its JSON Schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

__all__ = ["recipe_page"]

_HEAD = """# Recipe

All fields of a recipe, section by section. This page is made of the JSON Schema that
`meerkat schema` prints; it is [here](recipe.schema.json), too.

An editor completes and checks a recipe by it. For Even Better TOML in VS Code, and other editors
that use Taplo, write the schema beside the recipe, and name it in the recipe's first line:

    meerkat schema > recipe.schema.json

```toml
#:schema ./recipe.schema.json
```

What holds between fields is checked when a recipe is read.
"""


def recipe_page(schema: dict[str, Any]) -> str:
    """Markdown with a heading for each section and each field."""
    top, parts = [], []
    for name, found in schema["properties"].items():
        section = _section(schema, found)
        if section is None:
            top += _field(name, found, name in schema["required"])
        else:
            needed = " (required)" if name in schema["required"] else ""
            parts += [f"## [{name}]{needed}" + _anchor(name), *_texts(found, section)]
            parts += _fields(schema, section, name)
    return "\n\n".join([_HEAD, "## Above the sections", *top, *parts]) + "\n"


def _fields(schema: dict[str, Any], section: dict[str, Any], prefix: str) -> Iterator[str]:
    for name, found in section["properties"].items():
        yield from _field(f"{prefix}.{name}", found, name in section.get("required", ()))
        below = _section(schema, found)
        if below is not None:
            yield from _fields(schema, below, f"{prefix}.{name}")


def _field(name: str, found: dict[str, Any], required: bool) -> Iterator[str]:
    yield f"### {name}" + _anchor(name)
    facts = [_type(found)]
    if required:
        facts.append("required")
    elif not isinstance(found.get("default"), dict):
        facts.append(f"default {_code(found.get('default'))}")
    yield ", ".join(facts)
    if "description" in found:
        yield found["description"]
    choice = found.get("items", found)
    yield from _choices(choice.get("anyOf", ()))
    if "examples" in choice:
        yield "Known: " + ", ".join(map(_code, choice["examples"])) + "."


def _choices(alternatives: list[dict[str, Any]]) -> Iterator[str]:
    """The kinds of a choice, each with its options."""
    rows = []
    for kind in alternatives:
        if "kind" not in kind.get("properties", {}):
            continue
        options = [
            f"`{name}` ({_type(option)}"
            + (f", default {_code(option['default'])})" if "default" in option else ", required)")
            for name, option in kind["properties"].items()
            if name != "kind"
        ]
        told = " ".join(kind["description"].split()).replace("|", "\\|")
        name = kind["properties"]["kind"].get("const", "module:function")
        if kind["additionalProperties"]:
            options.append("any others")
        rows.append(f"| `{name}` | {told} | {', '.join(options) or '–'} |")
    if rows:
        yield "\n".join(["| kind | what | options |", "|---|---|---|", *rows])


def _texts(found: dict[str, Any], section: dict[str, Any]) -> list[str]:
    return [text for text in (found.get("description"), section.get("description")) if text]


def _section(schema: dict[str, Any], found: dict[str, Any]) -> dict[str, Any] | None:
    """The section that a property is, if it is one."""
    for one in (found, *found.get("anyOf", ())):
        if "$ref" in one:
            target: dict[str, Any] = schema["$defs"][one["$ref"].rpartition("/")[2]]
            return target if "properties" in target else None
    return None


def _type(found: dict[str, Any]) -> str:
    """What values there are, in words.

    >>> _type({"type": "integer", "minimum": 1, "exclusiveMaximum": 256})
    'integer, ≥ 1, < 256'
    >>> _type({"anyOf": [{"const": "auto", "type": "string"}, {"type": "number"}]})
    '`"auto"` or number'
    """
    if "$ref" in found:
        return "table"
    if "anyOf" in found:
        names = [_type(one) for one in found["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(names))
    if "const" in found:
        return _code(found["const"])
    if "enum" in found:
        return " or ".join(map(_code, found["enum"]))
    if found.get("type") == "array":
        return f"array of ({_type(found.get('items', {'type': 'anything'}))})"
    if found.get("type") == "object":
        return "table"
    bounds = [
        f"{sign} {found[key]:,}"
        for key, sign in (
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("maximum", "≤"),
            ("exclusiveMaximum", "<"),
        )
        if key in found
    ]
    return ", ".join([str(found["type"]), *bounds])


def _code(value: Any) -> str:
    return "none" if value is None else f"`{json.dumps(value, ensure_ascii=False)}`"


def _anchor(name: str) -> str:
    return f" {{ #{name.replace('_', '-')} }}"
