"""What a caller of a local run brings beside its recipe: a model in memory, when to pause."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from meerkat.runs.pausing import Stops, never

if TYPE_CHECKING:
    from meerkat.models.loading import LoadedModel
    from meerkat.runs.assembly import Assembly

__all__ = ["Given"]


def _nothing(assembly: Assembly) -> dict[str, float]:
    return {}


@dataclass(frozen=True)
class Given:
    """None of it is part of the run: θ after a round is the same with and without."""

    loaded: LoadedModel | None = None
    """The model, loaded already; it must be the one that the run began with."""
    stops: Stops = never
    measure: Callable[[Assembly], dict[str, float]] = _nothing
    """Further metrics of each evaluation, at the weights as they then are in the model."""
    tests: bool = True
    """Are the test examples evaluated, too, and not those of the validation alone?"""
