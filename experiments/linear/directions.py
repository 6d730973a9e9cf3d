"""Directions z of a run, and estimates from losses along them, of our method and of others.

Others, inside the same subspace, by their formulas as public summaries of the papers have them:

- HiSo (arXiv 2506.02370): z = H^-1/2 u, H ← (1 - ν) H + ν (Δ² + δ) from the round's update Δ.
  H is scaled to a mean of one, so that rates mean the same.
- FZOO (2506.09034): Rademacher z, one-sided, the estimate over the losses' standard deviation.
- ConMeZO (2511.02757): z = √k (cos a · m / |m| + sin a · u), u uniform on the unit sphere,
  m ← β m + (1 - β) ĝ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from meerkat.config.automatic import subspace_rate

from .world import Part


@dataclass(frozen=True)
class Arm:
    """What a run is made of; by default as the recipe of the demo has it."""

    batch: int = 4
    directions: int = 7
    sides: Literal["one", "two", "others", "each", "each-two"] = "one"
    """g from a point and w, from both sides, or from a point and the mean of the other points; or
    each example has a direction of its own, from one side or both."""
    own: bool = False
    """Directions of each client's own."""
    kind: Literal["orthogonal", "gaussian", "rademacher"] = "orthogonal"
    exact: bool = False
    loaded: bool = False
    """Start at w = 0."""
    factor: float = 1.0
    """On η."""
    decay: Literal["linear", "cosine", "constant"] = "linear"
    momentum: float = 0.0
    local_steps: int = 1
    steps: int = 60
    """Local steps in all."""
    clients: int = 4
    sampled: int | None = None
    alpha: float = 0.5
    single: int = 0
    method: Literal["ours", "hiso", "fzoo", "conmezo"] = "ours"
    angle: float = 1.35
    """a of ConMeZO."""
    memory: float = 0.9
    """1 - ν of HiSo, β of ConMeZO."""

    def rate(self, k: int) -> float:
        """η of the first round."""
        clients = self.sampled or self.clients
        number = np.inf if self.exact else self.directions * (clients if self.own else 1)
        return self.factor * subspace_rate(k, number)


class Directions:
    """Draws z, from what all know of the run."""

    def __init__(self, arm: Arm, k: int, draw: np.random.Generator):
        self._arm, self._k, self._draw = arm, k, draw
        self._queue: list[np.ndarray] = []
        self._curvature = np.ones(k)
        self._momentum = np.zeros(k)

    def step(self) -> np.ndarray:
        """Directions of a step, a row each."""
        k, arm = self._k, self._arm
        z = np.array([self._one() for _ in range(arm.directions)])
        if arm.method == "hiso":
            z = z / np.sqrt(self._curvature / self._curvature.mean())
        if arm.method == "conmezo" and (length := np.linalg.norm(self._momentum)) > 0:
            z *= np.sqrt(k) / np.linalg.norm(z, axis=1, keepdims=True)
            centre = np.sqrt(k) * self._momentum / length
            z = np.cos(arm.angle) * centre + np.sin(arm.angle) * z
        return np.asarray(z)

    def _one(self) -> np.ndarray:
        if self._arm.kind == "gaussian":
            return self._draw.standard_normal(self._k)
        if self._arm.kind == "rademacher":
            return self._draw.choice([-1.0, 1.0], self._k)
        if not self._queue:
            q, r = np.linalg.qr(self._draw.standard_normal((self._k, self._k)))
            self._queue.extend((q * np.sign(np.diag(r))).T * np.sqrt(self._k))
        return self._queue.pop()

    def learn(self, estimate: np.ndarray) -> None:
        """Take the round's aggregated estimate, which all have."""
        old = self._arm.memory
        self._curvature = old * self._curvature + (1 - old) * (estimate**2 + 1e-3)
        self._momentum = old * self._momentum + (1 - old) * estimate


def estimated(batch: Part, w: np.ndarray, z: np.ndarray, arm: Arm) -> tuple[np.ndarray, np.ndarray]:
    """ĝ of a local step, and the scalars that are reported for it."""
    if arm.exact:
        gradient = batch.gradient(w)
        return gradient, gradient
    epsilon = 0.6 / np.sqrt(len(w))
    losses = batch.losses(w[:, None] + epsilon * z.T)
    above = losses.mean(axis=0)
    if arm.sides == "each":
        scalars = (losses.diagonal() - batch.losses(w)) / epsilon
    elif arm.sides == "each-two":
        below = batch.losses(w[:, None] - epsilon * z.T).diagonal()
        scalars = (losses.diagonal() - below) / (2 * epsilon)
    elif arm.sides == "two":
        below = batch.losses(w[:, None] - epsilon * z.T).mean(axis=0)
        scalars = (above - below) / (2 * epsilon)
    elif arm.sides == "others":
        scalars = (above - (above.sum() - above) / (len(z) - 1)) / epsilon
    else:
        scalars = (above - batch.losses(w).mean()) / epsilon
    estimate = scalars @ z / len(z)
    if arm.method == "fzoo":
        # ε, so that a rate means here what it means elsewhere where |g| is one.
        estimate = estimate * epsilon / max(float(above.std()), 1e-6)
    return estimate, scalars
