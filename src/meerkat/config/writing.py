"""A recipe's sections → TOML."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["to_toml"]

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def to_toml(sections: Mapping[str, Any]) -> str:
    """Sections of fields as TOML; a field that is None is left out.

    >>> print(to_toml({"seed": 1, "model": {"name": "m", "file": None}, "a": {"b": {"1": [2.5]}}}))
    seed = 1
    <BLANKLINE>
    [model]
    name = "m"
    <BLANKLINE>
    [a]
    b = { 1 = [2.5] }
    <BLANKLINE>
    """
    top = [_line(name, value) for name, value in _given(sections) if not isinstance(value, Mapping)]
    parts = ["".join(top)] if top else []
    for name, value in _given(sections):
        if isinstance(value, Mapping):
            lines = "".join(_line(*pair) for pair in _given(value))
            parts.append(f"[{_key(name)}]\n{lines}")
    return "\n".join(parts)


def _given(fields: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in fields.items() if value is not None]


def _line(name: str, value: Any) -> str:
    return f"{_key(name)} = {_inline(value)}\n"


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _inline(name)


def _inline(value: Any) -> str:
    """A value on one line; JSON's scalars are TOML's, but for pairs of surrogates and DEL."""
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_key(name)} = {_inline(one)}" for name, one in _given(value))
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_inline, value))}]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("\x7f", "\\u007f")
