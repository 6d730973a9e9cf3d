"""GradIP: inner product of local gradient estimates and the pre-training gradient (section 5)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

import numpy as np
from jaxtyping import Float32, Float64, Int64

from meerkat.federation.aggregation import scalar_matrix
from meerkat.federation.messages import ClientReport
from meerkat.zo.axes import axis_length
from meerkat.zo.directions import PerturbationStream

__all__ = ["GradIPScorer", "Trajectories", "magnitudes"]

_CHUNK = 4096
"""Reports that are looked at together."""


@dataclass(frozen=True)
class Trajectories:
    """What the server sees of K virtual paths in one round; zero where no step was taken."""

    round: int
    """Number of the round, or `messages.CALIBRATION`."""
    clients: Int64[np.ndarray, " K"]
    steps: Int64[np.ndarray, " K"]
    """T_k."""
    gradip: Float64[np.ndarray, "K T"]
    """< p, ĝ >, with the estimate ĝ = (1/Q) Σ_q g_q z_q of the local gradient."""
    norm: Float64[np.ndarray, "K T"]
    """‖ĝ‖."""
    cosine: Float64[np.ndarray, "K T"]
    """< p, ĝ > / (‖p‖ ‖ĝ‖); zero where either is."""


class GradIPScorer:
    """Scores reports by how they lie to p, one vector z at a time: memory O(Q n) for any K and T.

    The products < p, z > and < z, z > are those of a round and an owner of directions. The last
    ones are kept: one dot product a step, however many clients share the direction.
    """

    def __init__(self, gradient: Float32[np.ndarray, " n"], stream: PerturbationStream):
        self._gradient = gradient.astype(np.float64)
        self._norm = math.sqrt(_dot(self._gradient, self._gradient))
        self._stream = stream
        self._key = (-1, -1)
        self._kept: list[tuple[Float64[np.ndarray, " Q"], Float64[np.ndarray, "Q Q"]]] = []

    def stream(self, reports: Iterable[ClientReport]) -> Iterator[Trajectories]:
        """Trajectories of any number of reports, some at a time, where a round's are together."""
        for _, of_round in groupby(reports, key=lambda report: report.round):
            while some := tuple(islice(of_round, _CHUNK)):
                yield self.trajectories(some)

    def trajectories(self, reports: Sequence[ClientReport]) -> Trajectories:
        """GradIP, norm and cosine of some reports of one round; rows follow `reports`."""
        shape = len(reports), max(report.steps for report in reports)
        gradip, squares = np.zeros(shape), np.zeros(shape)
        for along, score in (("drawn", self._drawn), ("axes", self._exact)):
            rows = [row for row, report in enumerate(reports) if report.along == along]
            if rows:
                products, lengths = score([reports[row] for row in rows])
                gradip[rows, : products.shape[1]] = products
                squares[rows, : lengths.shape[1]] = lengths
        norm = np.sqrt(np.maximum(squares, 0.0))
        scale = norm * self._norm
        return Trajectories(
            round=reports[0].round,
            clients=np.array([report.client for report in reports], np.int64),
            steps=np.array([report.steps for report in reports], np.int64),
            gradip=gradip,
            norm=norm,
            cosine=np.divide(gradip, scale, out=np.zeros_like(gradip), where=scale > 0),
        )

    def _drawn(
        self, reports: Sequence[ClientReport]
    ) -> tuple[Float64[np.ndarray, "K T"], Float64[np.ndarray, "K T"]]:
        """< p, ĝ > and < ĝ, ĝ > of reports along drawn directions."""
        count, stream = self._stream.perturbations, self._stream
        scalars = scalar_matrix(reports).reshape(len(reports), -1, count) / count
        owners = np.array([stream.owner(report.client) for report in reports], np.int64)
        gradip, squares = np.zeros(scalars.shape[:2]), np.zeros(scalars.shape[:2])
        for owner in np.unique(owners).tolist():
            rows = owners == owner
            for step in range(scalars.shape[1]):
                products, gram = self._at(reports[0].round, step, owner)
                own = scalars[rows, step]
                gradip[rows, step] = _combined(own, products)
                inner = np.stack([_combined(own, row) for row in gram])
                squares[rows, step] = _combined(own, inner)
        return gradip, squares

    def _exact(
        self, reports: Sequence[ClientReport]
    ) -> tuple[Float64[np.ndarray, "K T"], Float64[np.ndarray, "K T"]]:
        """The same of exact reports: axes are orthogonal, and < p, z_q > is √k p_q."""
        size = len(self._gradient)
        scalars = scalar_matrix(reports).reshape(-1, size) / size
        estimate = scalars * float(axis_length(size))
        shape = len(reports), -1
        products, squares = _combined(estimate, self._gradient), _combined(estimate, estimate.T)
        return products.reshape(shape), squares.reshape(shape)

    def _at(
        self, round: int, step: int, owner: int
    ) -> tuple[Float64[np.ndarray, " Q"], Float64[np.ndarray, "Q Q"]]:
        """< p, z_q > and < z_q, z_r > of a step; steps of a round are asked for in order."""
        if (round, owner) != self._key:
            self._key, self._kept = (round, owner), []
        while len(self._kept) <= step:
            self._kept.append(self._products(round, len(self._kept), owner))
        return self._kept[step]

    def _products(
        self, round: int, step: int, owner: int
    ) -> tuple[Float64[np.ndarray, " Q"], Float64[np.ndarray, "Q Q"]]:
        count = self._stream.perturbations
        keys = self._stream.keys(round, step, owner)
        drawn = [self._stream.z(key).astype(np.float64) for key in keys]
        gram = np.empty((count, count))
        for q in range(count):
            for r in range(q + 1):
                gram[q, r] = gram[r, q] = _dot(drawn[q], drawn[r])
        return np.array([_dot(self._gradient, z) for z in drawn]), gram


def magnitudes(reports: Sequence[ClientReport]) -> Float64[np.ndarray, "K T"]:
    """Root mean square of g over the directions of a step: |GradIP| without |< p, z >|.

    The reports are of one kind. An exact one gives |∇|, which is what others give on average.
    """
    matrix = scalar_matrix(reports).reshape(len(reports), -1, reports[0].perturbations)
    return np.sqrt(np.mean(matrix * matrix, axis=2))


def _combined(
    scalars: Float64[np.ndarray, "K Q"], factors: Float64[np.ndarray, "Q ..."]
) -> Float64[np.ndarray, " K"]:
    """Σ_q g_q f_q of each client; term by term, so that no machine fuses or reorders them."""
    total = np.zeros(len(scalars))
    for column, factor in zip(scalars.T, factors, strict=True):
        total += column * factor
    return total


def _dot(a: Float64[np.ndarray, " n"], b: Float64[np.ndarray, " n"]) -> float:
    return math.fsum((a * b).tolist())  # correctly rounded, whatever the machine
