"""Reports of a round as weights and a matrix (method.md section 4, step 4)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from meerkat.federation.messages import ClientReport

__all__ = ["scalar_matrix", "weights"]


def weights(reports: Sequence[ClientReport], weighting: str) -> Float64[np.ndarray, " K"]:
    """p_k over the clients that reported: 1/K, or by the examples that they hold."""
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
