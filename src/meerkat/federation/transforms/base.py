"""The interface of a transform: what happens to coefficients before they leave a client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64

from meerkat.zo.axes import Along

__all__ = ["Place", "Transform"]


@dataclass(frozen=True)
class Place:
    """The local step that coefficients belong to."""

    seed: int
    """The run's."""
    round: int
    step: int
    client: int
    along: Along = "drawn"
    """The axes where the coefficients are an exact gradient."""


@runtime_checkable
class Transform(Protocol):
    """Coefficients of one local step → those that the client applies and reports.

    It acts before the client's own update: what is reported is what was applied, so the server
    rebuilds the client's path bit for bit (method.md section 4, step 2).
    """

    def __call__(
        self, coefficients: Float64[np.ndarray, " Q"], place: Place
    ) -> Float64[np.ndarray, " Q"]:
        """As many coefficients as came in."""
