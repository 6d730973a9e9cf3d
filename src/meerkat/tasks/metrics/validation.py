"""Names of what is measured on validation examples, which stands beside what the test gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

__all__ = ["VALIDATION", "VALIDATION_EXAMPLES", "of_validation", "on_validation"]

VALIDATION = "validation_"
"""Before the name of a metric, where it is over validation examples."""
VALIDATION_EXAMPLES = f"{VALIDATION}examples"
"""Beside the sums of a client's metrics: of how many validation examples they are."""

_Value = TypeVar("_Value")


def on_validation(values: Mapping[str, _Value]) -> dict[str, _Value]:
    """Values by metric, under the names that they have on validation examples.

    >>> on_validation({"loss": 0.5})
    {'validation_loss': 0.5}
    """
    return {VALIDATION + name: value for name, value in values.items()}


def of_validation(values: Mapping[str, _Value]) -> dict[str, _Value]:
    """The values on validation examples among these, by metric.

    >>> of_validation({"loss": 0.4, "validation_loss": 0.5})
    {'loss': 0.5}
    """
    return {
        name.removeprefix(VALIDATION): value
        for name, value in values.items()
        if name.startswith(VALIDATION)
    }
