"""θ ← θ - η ḡ z: the arithmetic that clients, server and replay share bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
from jaxtyping import Float32

from meerkat.noise import Directions
from meerkat.protocol import LogEntry

__all__ = ["Theta", "descend", "digest", "follow"]

Theta: TypeAlias = Float32[np.ndarray, " n"]
"""The masked parameters, float32, on the CPU."""


def descend(theta: Theta, learning_rate: float, scalar: float, z: Theta) -> None:
    """θ ← θ - η · scalar · z, in place (method.md section 3).

    The product η · scalar is taken in float64 and rounded to float32 once; then there is one
    float32 multiplication and one subtraction a coordinate, each rounded on its own.
    """
    theta -= np.float32(learning_rate * scalar) * z


def follow(theta: Theta, entries: Iterable[LogEntry], directions: Directions) -> None:
    """Apply log entries in order, in place (method.md section 6)."""
    for entry in entries:
        z = directions.z(entry.round, entry.step, entry.perturbation, entry.client)
        descend(theta, entry.learning_rate, entry.scalar, z)


def digest(theta: Theta) -> str:
    """SHA-256 of θ's little-endian float32 bytes."""
    return hashlib.sha256(theta.astype("<f4", copy=False).tobytes()).hexdigest()
