"""First-order methods as functions of vectors: a round's θ_r and gradients → θ_{r+1}.

Nothing here knows a model. Vectors are not copied where that can be avoided; each class says which
ones it keeps beside the arguments, in units of n values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeAlias

import numpy as np

from meerkat.comparison.optimizers import SGD, LocalOptimizer
from meerkat.comparison.vectors import Vector, add_scaled

__all__ = ["Central", "FedAvg", "FedAvgM", "GradientAt", "Rule", "Scaffold"]

GradientAt: TypeAlias = Callable[[int, int, Vector], Vector]
"""(client, local step from 0, θ) → the gradient of the client's loss on its batch of that step, in
θ's type. It may be overwritten, and need not outlive the next call."""


class Rule(Protocol):
    """One method. What it keeps from round to round begins with the object."""

    def round(
        self, theta: Vector, shares: Mapping[int, float], gradient_at: GradientAt, rate: float
    ) -> Vector:
        """θ_{r+1}, a vector of its own; θ_r is not changed.

        Args:
            theta: θ_r.
            shares: p_k of the clients of this round, which sum to one.
            rate: η of this round.
        """


def _local_steps(
    theta: Vector,
    gradient_at: Callable[[int, Vector], Vector],
    steps: int,
    rate: float,
    optimizer: LocalOptimizer,
    correction: Vector | None = None,
) -> Vector:
    """θ_k after T local steps from θ_r, with a correction added to each gradient."""
    moved = theta.copy()
    for step in range(steps):
        gradient = gradient_at(step, moved)
        if correction is not None:
            gradient += correction
        optimizer.step(moved, gradient, rate)
    return moved


@dataclass
class FedAvg:
    """Federated averaging (McMahan et al., arXiv 1602.05629, Algorithm 1).

    θ_k ← θ_r, then T times θ_k ← θ_k - η ∇f_k(θ_k);  θ_{r+1} = θ_r + Σ_k p_k (θ_k - θ_r).

    With another local optimizer its state is fresh in each round and at each client. Keeps θ_k and
    the mean change.
    """

    steps: int
    """T."""
    optimizer: Callable[[], LocalOptimizer] = SGD

    def round(
        self, theta: Vector, shares: Mapping[int, float], gradient_at: GradientAt, rate: float
    ) -> Vector:
        after = self.change(theta, shares, gradient_at, rate)
        after += theta
        return after

    def change(
        self, theta: Vector, shares: Mapping[int, float], gradient_at: GradientAt, rate: float
    ) -> Vector:
        """Σ_k p_k (θ_k - θ_r)."""
        change = np.zeros_like(theta)
        for client, share in shares.items():
            at = partial(gradient_at, client)
            moved = _local_steps(theta, at, self.steps, rate, self.optimizer())
            moved -= theta
            add_scaled(change, share, moved)
        return change


@dataclass
class FedAvgM:
    """FedAvg with momentum at the server (Hsu et al., arXiv 1909.06335).

    Δ_r = Σ_k p_k (θ_r - θ_k);  v ← β v + Δ_r;  θ_{r+1} = θ_r - v.

    Steps are up to 1 / (1 - β) times as long as FedAvg's at the same η. Keeps v beside what FedAvg
    keeps.
    """

    steps: int
    """T."""
    momentum: float = 0.9
    """β."""
    optimizer: Callable[[], LocalOptimizer] = SGD
    _velocity: Vector | None = field(default=None, init=False, repr=False)
    """-v."""

    def round(
        self, theta: Vector, shares: Mapping[int, float], gradient_at: GradientAt, rate: float
    ) -> Vector:
        averaging = FedAvg(self.steps, self.optimizer)
        after = averaging.change(theta, shares, gradient_at, rate)
        if self._velocity is None:
            self._velocity = np.zeros_like(theta)
        self._velocity *= self.momentum
        self._velocity += after
        np.add(theta, self._velocity, out=after)
        return after


@dataclass
class Scaffold:
    """SCAFFOLD (Karimireddy et al., arXiv 1910.06378, Algorithm 1 with option II, η_g = 1).

    θ_k ← θ_r, then T times θ_k ← θ_k - η (∇f_k(θ_k) - c_k + c);
    c_k⁺ = c_k - c + (θ_r - θ_k) / (T η);
    θ_{r+1} = θ_r + Σ_k p_k (θ_k - θ_r);  c ← c + (1/K) Σ_k (c_k⁺ - c_k), both over this round's
    clients, c_k of the others stay.

    Keeps c and a c_k for each client that took part so far, and meanwhile θ_k, two mean changes and
    a correction. The paper weighs clients equally: p_k = 1 / |S|, and K are all clients.
    """

    steps: int
    """T."""
    clients: int
    """K."""
    _common: Vector | None = field(default=None, init=False, repr=False)
    """c."""
    _own: dict[int, Vector] = field(default_factory=dict, init=False, repr=False)
    """c_k; zeros where there is none."""

    def round(
        self, theta: Vector, shares: Mapping[int, float], gradient_at: GradientAt, rate: float
    ) -> Vector:
        common = np.zeros_like(theta) if self._common is None else self._common
        after, common_change = np.zeros_like(theta), np.zeros_like(theta)
        for client, share in shares.items():
            if client not in self._own:
                self._own[client] = np.zeros_like(theta)
            own, at = self._own[client], partial(gradient_at, client)
            moved = _local_steps(theta, at, self.steps, rate, SGD(), common - own)
            moved -= theta
            add_scaled(after, share, moved)
            # What is in `moved` becomes c_k⁺ - c_k = (θ_r - θ_k) / (T η) - c.
            moved *= -1.0 / (self.steps * rate)
            moved -= common
            own += moved
            add_scaled(common_change, 1.0 / self.clients, moved)
        # Only now: all clients of a round are sent the same c.
        common += common_change
        self._common = common
        after += theta
        return after


@dataclass
class Central:
    """Training on all clients' data in one place: no federation, and what federation is up against.

    T times θ ← θ - η Σ_k p_k ∇f_k(θ): each step takes a batch of every client. The optimizer's
    state stays over the whole run. Keeps the mean gradient.
    """

    steps: int
    """T, the steps of what is a round elsewhere."""
    optimizer: LocalOptimizer = field(default_factory=SGD)

    def round(
        self, theta: Vector, shares: Mapping[int, float], gradient_at: GradientAt, rate: float
    ) -> Vector:
        after = theta.copy()
        mean = np.empty_like(theta)
        for step in range(self.steps):
            mean.fill(0.0)
            for client, share in shares.items():
                add_scaled(mean, share, gradient_at(client, step, after))
            self.optimizer.step(after, mean, rate)
        return after
