"""FedDyn (Acar et al., arXiv 2111.04263) over scalars.

Local losses lean to the global optimum: client k minimises f_k(θ) - < h_k, θ > + (α/2) |θ - θ_r|².
It measures the differences of that along a direction as those of f_k, and h_k follows from the
scalars that it reported. The server's correction is an update rule (`zo.update_rules.feddyn`). So a
step still sends one scalar a direction.

h_k is kept where the client runs, so all clients run in one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Float64

from meerkat.algorithms.meerkat import assembled
from meerkat.algorithms.zeroth_order import ZerothOrder
from meerkat.config import Recipe
from meerkat.errors import RecipeError
from meerkat.federation.messages import ClientReport
from meerkat.zo.arrays import on_host
from meerkat.zo.estimators import LossesAt
from meerkat.zo.estimators.base import losses_at_each
from meerkat.zo.state import Theta
from meerkat.zo.update_rules.feddyn import ServerCorrection

__all__ = ["DynamicRegularisation", "FedDyn"]


@dataclass(frozen=True)
class FedDyn:
    """Dynamic regularisation of the local losses.

    Raises:
        ValueError: α is not positive.
    """

    alpha: float = 0.01
    """α, in units of the loss by those of θ squared."""

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ValueError(f"alpha = {self.alpha} is not positive")

    def algorithm(self, recipe: Recipe, n: int) -> DynamicRegularisation:
        """The algorithm of a recipe, for a state of n values.

        Raises:
            RecipeError: The recipe has a rule of its own, takes derivatives, asks for other local
                steps than T, or renews its subspace, in which h_k would stand for nothing.
        """
        optimizer = recipe.optimizer
        for name, value, wanted in (
            ("optimizer.rule", optimizer.rule.kind, "sgd"),
            ("optimizer.exact_clients", list(optimizer.exact_clients), []),
            ("selection.kind", recipe.selection.kind, "none"),
            ("subspace.renew_every", recipe.subspace.renew_every if recipe.subspace else 0, 0),
        ):
            if value != wanted:
                raise RecipeError(f"algorithm = 'feddyn' goes with {name} = {wanted!r} alone")
        if optimizer.estimator.kind in ("backward", "forward-mode"):
            raise RecipeError(
                "algorithm = 'feddyn' needs losses along drawn directions, and "
                f"optimizer.estimator = {optimizer.estimator.kind!r} takes derivatives; take "
                "'two-point'"
            )
        plain = assembled(recipe, n)
        share = recipe.clients_per_round / recipe.federation.clients
        parts = {found.name: getattr(plain, found.name) for found in fields(plain)}
        parts["rule"] = ServerCorrection(recipe.federation.local_steps, share)
        return DynamicRegularisation(**parts, alpha=self.alpha)


@dataclass(frozen=True, kw_only=True)
class DynamicRegularisation(ZerothOrder):
    """Zeroth-order local steps on regularised losses (method.md Eq. 26)."""

    alpha: float

    def regularised(
        self, losses_at: LossesAt, theta: Theta, start: Theta, memory: Theta | None
    ) -> LossesAt:
        """The local losses of a client near θ.

        Args:
            start: θ_r, where the round's local steps started.
            memory: h_k; none before the client's first report.
        """
        pull = self.alpha * (on_host(theta).astype(np.float64) - on_host(start))
        if memory is not None:
            pull -= memory
        return _Regularised(losses_at, pull, self.alpha)

    def remembered(self, memory: Theta | None, report: ClientReport, learning_rate: float) -> Theta:
        """h_k ← h_k - α (θ_k^T - θ_r), after a report."""
        found = np.zeros(self.stream.n, np.float32) if memory is None else memory.copy()
        for update in self.steps(report, learning_rate):
            for entry in update.entries:
                moved = self.alpha * update.learning_rate * entry.coefficient
                found += self.stream.z(entry.key) * np.float32(moved)
        return found


@dataclass(frozen=True)
class _Regularised:
    """Losses of a batch with what the regulariser adds, up to a constant."""

    losses_at: LossesAt
    pull: Float64[np.ndarray, " n"]
    """Its gradient at θ."""
    alpha: float

    def __call__(self, offset: Theta | None) -> Float64[np.ndarray, " S"]:
        return self.losses_at(offset) + self._added(offset)

    def each(self, offsets: Sequence[Theta | None]) -> list[Float64[np.ndarray, " S"]]:
        found = losses_at_each(self.losses_at, offsets)
        return [losses + self._added(offset) for losses, offset in zip(found, offsets, strict=True)]

    def _added(self, offset: Theta | None) -> float:
        if offset is None:
            return 0.0
        by = on_host(offset).astype(np.float64)
        return float(self.pull @ by + self.alpha * (by @ by) / 2)
