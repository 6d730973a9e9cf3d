"""The interface of an update rule, and what several rules share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from meerkat.zo.arrays import zeros_like
from meerkat.zo.state import ModelState, Theta

__all__ = ["ShapingRule", "Term", "UpdateRule", "estimate", "shaped"]

Term = tuple[float, Theta]
"""A coefficient, and its direction."""


@runtime_checkable
class UpdateRule(Protocol):
    """(state, directions with their coefficients, rate) → state.

    A rule is a pure function of its arguments, and uses only operations that IEEE 754 rounds
    correctly (+, -, *, /, sqrt), each on its own: client, server and replay get the same bits on
    every machine.
    """

    def init(self, theta: Theta) -> ModelState:
        """The state before any update, with this θ."""

    def apply(self, state: ModelState, learning_rate: float, terms: Iterable[Term]) -> ModelState:
        """The state after one update; `terms` can be read once."""


@runtime_checkable
class ShapingRule(UpdateRule, Protocol):
    """A rule whose state decides along what θ is perturbed and moved, as a preconditioner does."""

    def shaped(self, state: ModelState, z: Theta) -> Theta:
        """What stands for the direction z in this state."""


def shaped(rule: UpdateRule, state: ModelState, z: Theta) -> Theta:
    """The direction that losses are taken along in this state: z itself under most rules."""
    return rule.shaped(state, z) if isinstance(rule, ShapingRule) else z


def estimate(terms: Iterable[Term], like: Theta) -> Theta:
    """ĝ = Σ c z in float32, term by term in their order (method.md section 3)."""
    total = zeros_like(like)
    for coefficient, z in terms:
        total += z * float(coefficient)
    return total
