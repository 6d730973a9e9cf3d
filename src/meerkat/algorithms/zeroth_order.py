"""Zeroth-order local steps whose coefficients a server aggregates: what such methods share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from meerkat.errors import DivergedError
from meerkat.federation.aggregation import scalar_matrix, weights
from meerkat.federation.aggregators import Aggregator
from meerkat.federation.messages import ClientReport
from meerkat.federation.transforms import Place, Transform
from meerkat.zo.directions import DirectionKey, PerturbationStream
from meerkat.zo.estimators import Estimate, Estimator, LossesAt
from meerkat.zo.log import LogEntry, Update, apply_log
from meerkat.zo.state import ModelState, Theta
from meerkat.zo.update_rules import UpdateRule

__all__ = ["ZerothOrder"]


@dataclass(frozen=True)
class ZerothOrder:
    """An `Algorithm` from a stream of directions, an estimator, a rule and an aggregator."""

    stream: PerturbationStream
    rule: UpdateRule
    estimator: Estimator
    epsilon: float
    transforms: tuple[Transform, ...]
    aggregator: Aggregator
    weighting: str
    weight_cap: float = math.inf
    """A count of examples counts up to so many times the median count."""

    def init(self, theta: Theta) -> ModelState:
        return self.rule.init(theta)

    def local_step(
        self, losses_at: LossesAt, round: int, step: int, client: int, learning_rate: float
    ) -> tuple[Update, Estimate]:
        keys = self.stream.keys(round, step, client)
        drawn = [self.stream.z(key) for key in keys]
        estimate = self.estimator.estimate(losses_at, drawn, self.epsilon)
        coefficients = np.array(estimate.coefficients, np.float64)
        for transform in self.transforms:
            coefficients = transform(coefficients, Place(self.stream.seed, round, step, client))
        rounded = tuple(_float32(value) for value in coefficients.tolist())
        update = self._update(keys, rounded, learning_rate)
        return update, replace(estimate, coefficients=rounded)

    def steps(self, report: ClientReport, learning_rate: float) -> Iterator[Update]:
        count = report.perturbations
        for step in range(report.steps):
            scalars = report.scalars[step * count : (step + 1) * count]
            keys = self.stream.keys(report.round, step, report.client)
            yield self._update(keys, scalars, learning_rate)

    def aggregate(
        self, reports: Sequence[ClientReport], learning_rate: float
    ) -> tuple[Update, ...]:
        """ḡ^{r,t} for each direction of the round (method.md section 4, step 4).

        With a direction for each client there is nothing to aggregate: each keeps an entry of its
        own, p_k g_k, and those of one key are added up. Reports are sorted, so the order of arrival
        cannot matter. Several perturbations are averaged: each entry is divided by Q.
        """
        reports = sorted(reports, key=lambda report: report.client)
        shares = weights(reports, self.weighting, self.weight_cap)
        matrix = scalar_matrix(reports)
        count, number = self.stream.perturbations, reports[0].round
        updates = []
        for step in range(matrix.shape[1] // count):
            columns = matrix[:, step * count : (step + 1) * count]
            if self.stream.shared:
                keys = self.stream.keys(number, step, reports[0].client)
                values = [self.aggregator(column, shares) / count for column in columns.T]
                found = list(zip(keys, values, strict=True))
            else:
                found = [
                    (key, float(columns[row, q] * shares[row]) / count)
                    for row, report in enumerate(reports)
                    if step < report.steps
                    for q, key in enumerate(self.stream.keys(number, step, report.client))
                ]
            updates.append(Update(learning_rate, _merged(found)))
        return tuple(updates)

    def apply(self, state: ModelState, updates: Iterable[Update]) -> ModelState:
        return apply_log(state, updates, self.rule, self.stream)

    def _update(
        self, keys: Sequence[DirectionKey], scalars: Sequence[float], learning_rate: float
    ) -> Update:
        """One client's local step: ĝ = (1/Q) Σ_q g_q z_q."""
        pairs = zip(keys, (scalar / len(keys) for scalar in scalars), strict=True)
        return Update(learning_rate, _merged(pairs))


def _merged(found: Iterable[tuple[DirectionKey, float]]) -> tuple[LogEntry, ...]:
    """One entry a key, in the order of their first occurrence; a pool may give a key twice."""
    values: dict[DirectionKey, list[float]] = {}
    for key, value in found:
        values.setdefault(key, []).append(value)
    return tuple(LogEntry(key, math.fsum(parts)) for key, parts in values.items())


def _float32(value: float) -> float:
    """What is reported is what is applied."""
    with np.errstate(over="ignore"):
        rounded = float(np.float32(value))
    if not np.isfinite(rounded):
        raise DivergedError(
            f"projected gradient {value} is out of range; lower optimizer.learning_rate"
        )
    return rounded
