"""GradIP: how far each client walks along the pre-training gradient (method.md section 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Float64

from meerkat.noise import Directions
from meerkat.protocol import ClientReport
from meerkat.server.aggregation import scalar_matrix

__all__ = ["gradip"]


def gradip(
    reports: Sequence[ClientReport],
    gradient: Float32[np.ndarray, " n"],
    directions: Directions,
) -> Float64[np.ndarray, "K T"]:
    """GradIP_k^t = g_k^t · < p, z_t >, averaged over the perturbations of a step.

    One dot product a step where the direction is shared, one a client and step where it is not.
    Rows follow `reports`; steps that a client did not take are zero.
    """
    matrix = scalar_matrix(reports)
    count = directions.perturbations
    wide = gradient.astype(np.float64)
    owners = sorted({directions.owner(report.client) for report in reports})
    row_of = np.array([directions.owner(report.client) for report in reports])
    for column in range(matrix.shape[1]):
        step, q = divmod(column, count)
        for owner in owners:
            z = directions.z(reports[0].round, step, q, owner)
            product = math.fsum((wide * z).tolist())  # correctly rounded, whatever the machine
            matrix[row_of == owner, column] *= product / count
    return matrix.reshape(len(reports), -1, count).sum(axis=2)
