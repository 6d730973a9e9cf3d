"""Scores → a basis in which each direction has about the same curvature (method.md section 9)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64

__all__ = ["Basis", "whitened"]

_BLOCK = 2**24
"""Values of the scores that are turned into float64 together, 128 MiB."""


@dataclass(frozen=True)
class Basis:
    """B, and how the curvature was spread."""

    rows: Float32[np.ndarray, "k n"]
    """B, a row for each direction, the most curved one first."""
    curvature: Float64[np.ndarray, " N"]
    """λ_j = σ_j² / N of all directions."""


def whitened(
    scores: Float32[np.ndarray, "N n"], dimensions: int, damping: float = 0.0, power: float = 0.5
) -> Basis:
    """B = V_k diag((λ_j + δ λ_1)^-power): from the Gram matrix.

    Memory beside S: B, 4 k n bytes; the N × N Gram matrix and its vectors, 16 N² bytes; and a block
    of coordinates in float64, and what is made of it, at most 256 MiB.

    Args:
        scores: s_i, a row for each text.
        dimensions: k; at most the rank of the scores.
        damping: δ, as a share of the largest curvature.
        power: 0.5 makes the curvature of all directions 1; 0 leaves it.

    Raises:
        ValueError: The scores have fewer directions than that.
    """
    count = len(scores)
    gram = np.zeros((count, count))
    columns = max(1, _BLOCK // max(256, count))
    for begin in range(0, scores.shape[1], columns):
        block = scores[:, begin : begin + columns].astype(np.float64)
        gram += block @ block.T
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1].clip(min=0.0), vectors[:, ::-1]
    rank = int((values > values[0] * 1e-10).sum())
    if dimensions > rank:
        raise ValueError(f"{count} scores span {rank} directions, fewer than {dimensions}")
    curvature = values / count
    # V = Sᵀ U / σ; the sign of an eigenvector is open, and made such that its largest part is > 0.
    chosen = vectors[:, :dimensions]
    chosen = chosen * np.sign(chosen[np.abs(chosen).argmax(axis=0), range(dimensions)])
    scale = (curvature[:dimensions] + damping * curvature[0]) ** -power
    mix = (chosen / np.sqrt(values[:dimensions]) * scale).T
    rows = np.empty((dimensions, scores.shape[1]), np.float32)
    for begin in range(0, scores.shape[1], columns):
        part = slice(begin, begin + columns)
        rows[:, part] = mix @ scores[:, part].astype(np.float64)
    return Basis(rows, curvature)
