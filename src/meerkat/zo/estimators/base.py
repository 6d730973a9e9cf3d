"""The interface of an estimator: from losses at a few points to one coefficient a direction."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Float64

from meerkat.errors import DivergedError
from meerkat.zo.state import Theta

__all__ = [
    "DifferentiableLosses",
    "Estimate",
    "Estimator",
    "JointLosses",
    "LossesAt",
    "differentiable",
    "losses_at_each",
    "mean_loss",
]

LossesAt: TypeAlias = Callable[[Theta | None], Float64[np.ndarray, " S"]]
"""Offset from θ (None is θ itself) → the loss of each example of the batch."""


@runtime_checkable
class JointLosses(Protocol):
    """Losses of a batch that can be had at several offsets at once."""

    def each(self, offsets: Sequence[Theta | None]) -> list[Float64[np.ndarray, " S"]]:
        """The loss of each example at each offset."""


@runtime_checkable
class DifferentiableLosses(Protocol):
    """Losses of a batch that can be differentiated, which exact estimators need."""

    def __call__(self, offset: Theta | None) -> Float64[np.ndarray, " S"]:
        """As `LossesAt`."""

    def slope(
        self, direction: Theta
    ) -> tuple[Float64[np.ndarray, " S"], Float64[np.ndarray, " S"]]:
        """The loss of each example at θ, and its exact slope along a direction."""

    def gradient(self) -> tuple[Float64[np.ndarray, " S"], Float64[np.ndarray, " n"]]:
        """The loss of each example at θ, and the gradient of their mean."""


@dataclass(frozen=True)
class Estimate:
    """Result of the forward passes of one local step."""

    coefficients: tuple[float, ...]
    """g, the projected gradient along each direction: the slope of the loss."""
    loss: float
    """About the mean loss at θ; it stays on the client."""


@runtime_checkable
class Estimator(Protocol):
    """Losses near θ → the slopes along some directions (method.md section 3)."""

    fewest_directions: ClassVar[int]
    """Directions that it needs at least."""

    def forward_passes(self, directions: int) -> int:
        """Forward passes over the batch for so many directions."""

    def estimate(
        self, losses_at: LossesAt, directions: Sequence[Theta], epsilon: float
    ) -> Estimate:
        """The slopes along the directions.

        Raises:
            DivergedError: A loss is not finite.
        """


def losses_at_each(
    losses_at: LossesAt, offsets: Sequence[Theta | None]
) -> list[Float64[np.ndarray, " S"]]:
    """The losses at each offset, at once where that is possible."""
    if isinstance(losses_at, JointLosses):
        return losses_at.each(offsets)
    return [losses_at(offset) for offset in offsets]


def differentiable(losses_at: Any) -> DifferentiableLosses:
    """Losses as an exact estimator needs them.

    Raises:
        TypeError: They cannot be differentiated.
    """
    if not isinstance(losses_at, DifferentiableLosses):
        raise TypeError(f"losses of type {type(losses_at).__name__} have no gradient")
    return losses_at


def mean_loss(losses: Float64[np.ndarray, " S"], where: str) -> float:
    """f(θ; batch), the mean over the examples, correctly rounded whatever their order.

    Raises:
        DivergedError: It is not finite.
    """
    try:
        mean = math.fsum(losses.tolist()) / len(losses)
    except (OverflowError, ValueError):  # too large, or infinities of both signs
        mean = math.nan
    if not math.isfinite(mean):
        raise DivergedError(
            f"the loss is not finite at {where}; lower optimizer.learning_rate or "
            "optimizer.epsilon, or set model.dtype = 'float32'"
        )
    return mean
