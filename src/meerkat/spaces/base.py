"""The interface of a space: where the training state may move in a model. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64

from meerkat.zo.state import Theta

__all__ = ["DifferentiableSpace", "OverlaidSpace", "ParameterSpace"]


@runtime_checkable
class ParameterSpace(Protocol):
    """n float32 values that stand for a part of a model's parameters.

    The values need not be parameters: in a linear subspace they are w of θ_0 + B w, with LoRA the
    factors. Whatever they are, `write` makes the model a function of them alone, so nothing drifts.
    """

    @property
    def size(self) -> int:
        """n."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of which space it is; server and client compare it."""

    def read(self) -> Theta:
        """The values at which the model is as it was loaded; where a run starts."""

    def write(self, theta: Theta) -> None:
        """Make the model what these values stand for; nothing else of it is touched."""

    def restore(self) -> None:
        """Put back exactly the bits that the model had when the space was made."""


@runtime_checkable
class DifferentiableSpace(ParameterSpace, Protocol):
    """A space that exact estimators can differentiate along.

    Losses come in parts, as `DifferentiableObjective.losses_with_graph` gives them: each part is
    made when it is asked for, so that only its activations are kept.
    """

    def slopes(
        self, parts: Iterable[Any], direction: Theta
    ) -> tuple[Float64[np.ndarray, " S"], Float64[np.ndarray, " S"]]:
        """The loss of each example, and its slope along a direction, by one forward pass.

        Args:
            parts: Losses of some examples each.
        """

    def gradient(
        self, parts: Iterable[Any], examples: int
    ) -> tuple[Float64[np.ndarray, " S"], Float64[np.ndarray, " n"]]:
        """The loss of each example, and the gradient of their mean, by a backward pass a part.

        Args:
            parts: Losses of some examples each.
            examples: S of all parts.
        """


@runtime_checkable
class OverlaidSpace(ParameterSpace, Protocol):
    """A space in which one forward pass can be at several places."""

    @property
    def overlays(self) -> bool:
        """Is that possible with this model and mask, and less work than passes one by one?"""

    def overlaid(self, thetas: Sequence[Theta]) -> AbstractContextManager[None]:
        """Meanwhile a pass over R equally long runs of tokens has run i at `thetas[i]`.

        No weight is written. Losses are those that writing would give, up to the rounding of sums
        in another order.
        """
