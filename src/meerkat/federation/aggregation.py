"""Reports of a round as weights and a matrix (method.md section 4, step 4)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float64

from meerkat.federation.messages import ClientReport
from meerkat.zo.directions import DirectionKind

__all__ = [
    "by_precision",
    "clipped",
    "largest",
    "scalar_matrix",
    "shares",
    "usual_size",
    "weights",
]


def weights(
    reports: Sequence[ClientReport], weighting: str, most: float = math.inf
) -> Float64[np.ndarray, " K"]:
    """p_k over the clients that reported: 1/K, or by the examples that they claim to hold.

    Args:
        most: As in `shares`.
    """
    return shares([report.examples for report in reports], weighting, most)


def shares(
    counts: Sequence[int], weighting: str, most: float = math.inf
) -> Float64[np.ndarray, " K"]:
    """p_k of clients with so many examples: 1/K, or by these counts.

    Args:
        most: A count is no more than so many times the median count, the lower one of an even
            number: of two clients, neither sets its own bound.
    """
    if weighting == "uniform":
        return np.full(len(counts), 1.0 / len(counts))
    examples = np.array(counts, np.float64)
    examples = np.minimum(examples, most * np.sort(examples)[(len(examples) - 1) // 2])
    return examples / examples.sum()


def by_precision(
    shares: Float64[np.ndarray, " K"], reports: Sequence[ClientReport], n: int, kind: DirectionKind
) -> Float64[np.ndarray, " K"]:
    """v_k ∝ p_k r_k: weights where some reports are exact and others are along drawn directions.

    r is the share of |∇|² in the expected squared length of an estimate of n values: 1 for an exact
    one, Q / (Q + n + 1) for Q Gaussian directions, Q / (Q + n - 1) for Rademacher ones, Q / n for
    orthogonal ones, n of which are exact together (method.md section 9). Where all reports are of
    one kind, the weights are p_k.
    """
    if len({report.along for report in reports}) < 2:
        return shares
    precisions = [
        1.0 if report.along == "axes" else _precision(report.perturbations, n, kind)
        for report in reports
    ]
    weighted = shares * np.array(precisions)
    return weighted / math.fsum(weighted.tolist())


def _precision(count: int, n: int, kind: DirectionKind) -> float:
    """r of an estimate along so many directions."""
    if kind == "orthogonal":
        return min(1.0, count / n)
    return count / (count + n + (-1 if kind == "rademacher" else 1))


def usual_size(reports: Sequence[ClientReport]) -> float:
    """The median over a round's clients of their largest |g|.

    As long as less than half of the clients lie, it lies between those of honest ones.
    """
    return float(np.median([largest(report) for report in reports]))


def largest(report: ClientReport) -> float:
    """The largest |g| of a report; of an exact one the largest root mean square g of a step.

    Both are about |∇|: one number of an exact report may be √k times that.
    """
    if report.along == "axes":
        return max(map(_root_mean_square, _by_step(report)))
    return max(map(abs, report.scalars))


def clipped(report: ClientReport, bound: float) -> ClientReport:
    """The report with no |g| above a bound; an exact one keeps the direction of each step."""
    if report.along == "axes":
        scalars = tuple(g for step in _by_step(report) for g in _shortened(step, bound))
    else:
        scalars = tuple(min(max(scalar, -bound), bound) for scalar in report.scalars)
    return report if scalars == report.scalars else replace(report, scalars=scalars)


def _by_step(report: ClientReport) -> Iterator[tuple[float, ...]]:
    for begin in range(0, len(report.scalars), report.perturbations):
        yield report.scalars[begin : begin + report.perturbations]


def _shortened(step: tuple[float, ...], bound: float) -> tuple[float, ...]:
    size = _root_mean_square(step)
    return step if size <= bound else tuple(scalar * (bound / size) for scalar in step)


def _root_mean_square(step: tuple[float, ...]) -> float:
    return math.sqrt(math.fsum(scalar * scalar for scalar in step) / len(step))


def scalar_matrix(reports: Sequence[ClientReport]) -> Float64[np.ndarray, "K TQ"]:
    """g of each report and step; zero where a client was stopped early, [t ≤ T_k].

    The reports are of one kind: all have as many scalars a step.
    """
    width = max(len(report.scalars) for report in reports)
    matrix = np.zeros((len(reports), width))
    for row, report in zip(matrix, reports, strict=True):
        row[: len(report.scalars)] = report.scalars
    return matrix
