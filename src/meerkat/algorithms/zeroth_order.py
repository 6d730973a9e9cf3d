"""Zeroth-order local steps whose coefficients a server aggregates: what such methods share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64

from meerkat.errors import DivergedError
from meerkat.federation.aggregation import by_precision, scalar_matrix, weights
from meerkat.federation.aggregators import Aggregator
from meerkat.federation.messages import ClientReport
from meerkat.federation.transforms import Place, Transform
from meerkat.zo.axes import Along
from meerkat.zo.directions import DirectionKey, PerturbationStream
from meerkat.zo.estimators import Estimate, Estimator, LossesAt
from meerkat.zo.estimators.backward import Backward
from meerkat.zo.log import LogEntry, Update, apply_log
from meerkat.zo.state import ModelState, Theta
from meerkat.zo.update_rules.base import UpdateRule, shaped

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
    over_step: bool = False
    """Do the weights of a step add up to one over the clients that took it?"""

    def init(self, theta: Theta) -> ModelState:
        return self.rule.init(theta)

    def with_stream(self, stream: PerturbationStream) -> ZerothOrder:
        return replace(self, stream=stream)

    def local_step(
        self,
        losses_at: LossesAt,
        state: ModelState,
        round: int,
        step: int,
        client: int,
        learning_rate: float,
        along: Along = "drawn",
    ) -> tuple[Update, Estimate]:
        if along == "axes":
            estimate = Backward().estimate(losses_at, (), self.epsilon)
        else:
            keys = self.stream.keys(round, step, client)
            drawn = [shaped(self.rule, state, self.stream.z(key)) for key in keys]
            estimate = self.estimator.estimate(losses_at, drawn, self.epsilon)
        coefficients = np.array(estimate.coefficients, np.float64)
        place = Place(self.stream.seed, round, step, client, along)
        for transform in self.transforms:
            coefficients = transform(coefficients, place)
        rounded = tuple(_float32(value) for value in coefficients.tolist())
        update = self._update(rounded, place, learning_rate)
        return update, replace(estimate, coefficients=rounded)

    def steps(self, report: ClientReport, learning_rate: float) -> Iterator[Update]:
        count = report.perturbations
        for step in range(report.steps):
            scalars = report.scalars[step * count : (step + 1) * count]
            place = Place(self.stream.seed, report.round, step, report.client, report.along)
            yield self._update(scalars, place, learning_rate)

    def aggregate(
        self, reports: Sequence[ClientReport], learning_rate: float
    ) -> tuple[Update, ...]:
        """ḡ^{r,t} for each direction of the round (method.md section 4, step 4).

        With a direction for each client there is nothing to aggregate: each keeps an entry of its
        own, p_k g_k, and those of one key are added up. Reports are sorted, so the order of arrival
        cannot matter. Several perturbations are averaged: each entry is divided by Q. Exact reports
        are aggregated axis by axis; beside reports along drawn directions each counts by what it
        brings (`aggregation.by_precision`).
        """
        reports = sorted(reports, key=lambda report: report.client)
        drawn, exact = self._groups(reports)
        updates = []
        for step in range(max(report.steps for report in reports)):
            if self.over_step:
                drawn, exact = self._groups([r for r in reports if step < r.steps])
            entries = _merged(self._entries(drawn, step)) if drawn else ()
            axes = tuple(self._aggregated(exact, step)) if exact else ()
            updates.append(Update(learning_rate, entries, axes))
        return tuple(updates)

    def _groups(self, reports: Sequence[ClientReport]) -> tuple[_Group | None, _Group | None]:
        """Reports along drawn directions and exact ones, whose weights together add up to one."""
        shares = weights(reports, self.weighting, self.weight_cap)
        shares = by_precision(shares, reports, self.stream.n, self.stream.kind)
        return _group(reports, shares, "drawn"), _group(reports, shares, "axes")

    def _entries(self, group: _Group, step: int) -> Iterator[tuple[DirectionKey, float]]:
        """What reports along drawn directions give a step, before entries of one key are merged."""
        number = group.reports[0].round
        if self.stream.shared:
            if group.columns(step).size:
                keys = self.stream.keys(number, step, group.reports[0].client)
                yield from zip(keys, self._aggregated(group, step), strict=True)
            return
        for row, report in enumerate(group.reports):
            if step < report.steps:
                keys = self.stream.keys(number, step, report.client)
                for value, key in zip(group.columns(step)[row], keys, strict=True):
                    yield key, group.whole * float(value * group.shares[row]) / len(keys)

    def _aggregated(self, group: _Group, step: int) -> list[float]:
        """Aggregate along each direction that all of a group share, by their number."""
        found = [self.aggregator(column, group.shares) for column in group.columns(step).T]
        return [group.whole * value / len(found) for value in found]

    def apply(self, state: ModelState, updates: Iterable[Update]) -> ModelState:
        return apply_log(state, updates, self.rule, self.stream)

    def _update(self, scalars: Sequence[float], place: Place, learning_rate: float) -> Update:
        """One client's local step: ĝ = (1/Q) Σ_q g_q z_q."""
        coefficients = tuple(scalar / len(scalars) for scalar in scalars)
        if place.along == "axes":
            return Update(learning_rate, (), coefficients)
        keys = self.stream.keys(place.round, place.step, place.client)
        return Update(learning_rate, _merged(zip(keys, coefficients, strict=True)))


@dataclass(frozen=True)
class _Group:
    """Reports of one kind, sorted by client."""

    reports: Sequence[ClientReport]
    shares: Float64[np.ndarray, " K"]
    """Weights within the group where there is another one; they add up to 1."""
    whole: float
    """The group's weight among all reports."""
    matrix: Float64[np.ndarray, "K TQ"]

    def columns(self, step: int) -> Float64[np.ndarray, "K Q"]:
        """g of a step; nothing after the last one of the group."""
        count = self.reports[0].perturbations
        return self.matrix[:, step * count : (step + 1) * count]


def _group(
    reports: Sequence[ClientReport], shares: Float64[np.ndarray, " K"], along: Along
) -> _Group | None:
    """The reports along drawn directions or along axes; None if there are none."""
    rows = [row for row, report in enumerate(reports) if report.along == along]
    if not rows:
        return None
    chosen, own, whole = [reports[row] for row in rows], shares, 1.0
    if len(rows) < len(reports):
        whole = math.fsum(shares[rows].tolist())
        own = shares[rows] / whole
    return _Group(chosen, own, whole, scalar_matrix(chosen))


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
