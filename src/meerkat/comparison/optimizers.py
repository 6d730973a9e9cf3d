"""Local optimizers of first-order clients, which step in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from meerkat.comparison.vectors import Vector, add_scaled, blocks

__all__ = ["OPTIMIZERS", "SGD", "Adam", "LocalOptimizer"]


class LocalOptimizer(Protocol):
    """Steps along gradients. What it remembers begins with the object."""

    def step(self, theta: Vector, gradient: Vector, rate: float) -> None:
        """One step of θ, in place.

        Args:
            rate: η, which may change from step to step.
        """


@dataclass
class SGD:
    """θ ← θ - η g."""

    def step(self, theta: Vector, gradient: Vector, rate: float) -> None:
        add_scaled(theta, -rate, gradient)


@dataclass
class Adam:
    """Adam (Kingma and Ba, arXiv 1412.6980, Algorithm 1), without weight decay.

    m ← β_1 m + (1 - β_1) g;  v ← β_2 v + (1 - β_2) g²;
    θ ← θ - η (m / (1 - β_1^t)) / (√(v / (1 - β_2^t)) + ε), t from 1.
    """

    first_decay: float = 0.9
    """β_1."""
    second_decay: float = 0.999
    """β_2."""
    epsilon: float = 1e-8
    """ε, which keeps the divisor from zero; no perturbation."""
    _steps: int = field(default=0, init=False)
    _moments: tuple[Vector, Vector] | None = field(default=None, init=False, repr=False)

    def step(self, theta: Vector, gradient: Vector, rate: float) -> None:
        if self._moments is None:
            self._moments = np.zeros_like(theta), np.zeros_like(theta)
        self._steps += 1
        first_scale = rate / (1.0 - self.first_decay**self._steps)
        second_scale = 1.0 / math.sqrt(1.0 - self.second_decay**self._steps)
        for block in blocks(len(theta)):
            g, first, second = gradient[block], self._moments[0][block], self._moments[1][block]
            first += (1.0 - self.first_decay) * (g - first)
            second += (1.0 - self.second_decay) * (g * g - second)
            theta[block] -= first_scale * first / (np.sqrt(second) * second_scale + self.epsilon)


OPTIMIZERS: Mapping[str, Callable[[], LocalOptimizer]] = {"adam": Adam, "sgd": SGD}
