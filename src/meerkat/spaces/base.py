"""The interface of a space: where the training state may move in a model. No torch."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from meerkat.zo.state import Theta

__all__ = ["ParameterSpace"]


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
