"""Two forward passes → one scalar."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from meerkat.data.encoding import Encoded
from meerkat.descent import Theta
from meerkat.errors import DivergedError
from meerkat.objective import Objective
from meerkat.space import MaskedSpace

__all__ = ["Probe", "projected_gradient"]


@dataclass(frozen=True)
class Probe:
    """What two forward passes tell."""

    gradient: float
    """g, the projected gradient: the slope of the loss along z."""
    loss: float
    """Mean of L+ and L-; it stays on the client."""


def projected_gradient(
    space: MaskedSpace,
    objective: Objective,
    theta: Theta,
    z: Theta,
    epsilon: float,
    batch: Sequence[Encoded],
) -> Probe:
    """g = (L+ - L-) / 2ε, with L± = f(θ ± ε z; batch) (method.md section 3).

    The weights are left at cast(θ - ε z): whoever steps next writes θ anyway.

    Raises:
        DivergedError: A loss is not finite.
    """
    move = z * theta.dtype.type(epsilon)
    space.write(theta + move)
    above = objective.loss(batch)
    space.write(theta - move)
    below = objective.loss(batch)
    if not (math.isfinite(above) and math.isfinite(below)):
        raise DivergedError(
            f"the loss is not finite (L+ = {above}, L- = {below}); lower optimizer.learning_rate "
            "or optimizer.epsilon, or set model.dtype = 'float32'"
        )
    return Probe((above - below) / (2 * epsilon), (above + below) / 2)
