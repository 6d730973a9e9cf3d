"""Reports of a round as weights and a matrix (method.md section 4, step 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float64

from meerkat.federation.messages import ClientReport

__all__ = ["clipped", "scalar_matrix", "usual_size", "weights"]


def weights(
    reports: Sequence[ClientReport], weighting: str, most: float = math.inf
) -> Float64[np.ndarray, " K"]:
    """p_k over the clients that reported: 1/K, or by the examples that they claim to hold.

    Args:
        most: A count is no more than so many times the median count, the lower one of an even
            number: of two clients, neither sets its own bound.
    """
    if weighting == "uniform":
        return np.full(len(reports), 1.0 / len(reports))
    examples = np.array([report.examples for report in reports], np.float64)
    examples = np.minimum(examples, most * np.sort(examples)[(len(examples) - 1) // 2])
    return examples / examples.sum()


def usual_size(reports: Sequence[ClientReport]) -> float:
    """The median over a round's clients of their largest |g|.

    As long as less than half of the clients lie, it lies between those of honest ones.
    """
    return float(np.median([max(map(abs, report.scalars)) for report in reports]))


def clipped(report: ClientReport, bound: float) -> ClientReport:
    """The report with no |g| above a bound."""
    scalars = tuple(min(max(scalar, -bound), bound) for scalar in report.scalars)
    return report if scalars == report.scalars else replace(report, scalars=scalars)


def scalar_matrix(reports: Sequence[ClientReport]) -> Float64[np.ndarray, "K TQ"]:
    """g of each report and step; zero where a client was stopped early, [t ≤ T_k]."""
    width = max(len(report.scalars) for report in reports)
    matrix = np.zeros((len(reports), width))
    for row, report in zip(matrix, reports, strict=True):
        row[: len(report.scalars)] = report.scalars
    return matrix
