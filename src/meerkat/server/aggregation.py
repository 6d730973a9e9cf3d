"""Reports → log entries (method.md section 4, steps 4 and 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from meerkat.noise import Directions
from meerkat.protocol import ClientReport, LogEntry

__all__ = ["aggregate", "scalar_matrix", "weights"]


def weights(reports: Sequence[ClientReport], weighting: str) -> Float64[np.ndarray, " K"]:
    """p_k over the clients that reported: 1/K (the paper), or by the examples they hold."""
    if weighting == "uniform":
        return np.full(len(reports), 1.0 / len(reports))
    examples = np.array([report.examples for report in reports], np.float64)
    return examples / examples.sum()


def scalar_matrix(reports: Sequence[ClientReport]) -> Float64[np.ndarray, "K TQ"]:
    """g of each report and step; zero where a client was stopped early, [t ≤ T_k]."""
    width = max(len(report.scalars) for report in reports)
    matrix = np.zeros((len(reports), width))
    for row, report in zip(matrix, reports, strict=True):
        row[: len(report.scalars)] = report.scalars
    return matrix


def aggregate(
    reports: Sequence[ClientReport],
    learning_rate: float,
    weighting: str,
    directions: Directions,
) -> tuple[LogEntry, ...]:
    """ḡ^{r,t} = Σ_k p_k g_k^{r,t} [t ≤ T_k] for each direction of the round.

    With a direction for each client there is nothing to add: each keeps its own entry. Sums are
    correctly rounded (`math.fsum`) and reports are sorted, so the order of arrival cannot matter.
    Several perturbations are averaged: each entry is divided by Q.
    """
    reports = sorted(reports, key=lambda report: report.client)
    shares = weights(reports, weighting)
    count = directions.perturbations
    scaled = scalar_matrix(reports) * (shares / count)[:, None]
    entries = []
    for column in range(scaled.shape[1]):
        step, q = divmod(column, count)
        place = (reports[0].round, step, q)
        if directions.shared:
            owner = directions.owner(reports[0].client)
            total = math.fsum(scaled[:, column].tolist())
            entries.append(LogEntry(*place, owner, learning_rate, total))
        else:
            entries += [
                LogEntry(*place, report.client, learning_rate, float(value))
                for report, value in zip(reports, scaled[:, column], strict=True)
                if column < len(report.scalars)
            ]
    return tuple(entries)
