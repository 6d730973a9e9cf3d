"""Where first-order training moves a model: all of its parameters, or those of a mask."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from meerkat.comparison.vectors import Vector
from meerkat.errors import ModelError, RecipeError
from meerkat.runs.assembly import Assembly
from meerkat.spaces.sensitivity import backward_passes

__all__ = ["AllParameters", "Place", "place_of"]


@runtime_checkable
class Place(Protocol):
    """n values that stand for what moves in a model, and the gradient there.

    A `spaces.base.DifferentiableSpace` is one.
    """

    @property
    def size(self) -> int:
        """n."""

    def read(self) -> Vector:
        """The float32 values that training starts from."""

    def write(self, theta: Vector) -> None:
        """Make the model what these values stand for."""

    def restore(self) -> None:
        """Put back exactly the bits that the model had when this was made."""

    def gradient(
        self, parts: Iterable[Any], examples: int
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """The loss of each example, and the n values of the gradient of their mean.

        These may be overwritten by the caller and by the next call.

        Args:
            parts: Losses of some examples each, made when they are asked for.
            examples: S of all parts.
        """


class AllParameters:
    """All parameters of a model one after the other, each tied one once, as one float32 vector.

    Memory beside the model: n values to restore it, and n of the last gradient.

    Raises:
        ModelError: A parameter is not in float32.
    """

    def __init__(self, model: nn.Module):
        self._parameters = dict(model.named_parameters())
        self._slices: dict[str, slice] = {}
        begin = 0
        for name, parameter in self._parameters.items():
            if parameter.dtype != torch.float32:
                raise ModelError(
                    f"{name} is in {str(parameter.dtype).removeprefix('torch.')}: first-order "
                    "training of all parameters needs them in float32; set model.dtype = 'float32'"
                )
            self._slices[name] = slice(begin, begin + parameter.numel())
            begin += parameter.numel()
        self.size = begin
        self._original = np.empty(begin, np.float32)
        for name, where in self._slices.items():
            flat = self._parameters[name].detach().reshape(-1)
            self._original[where] = flat.cpu().numpy()
        self._original.setflags(write=False)
        self._gradient = np.empty(begin, np.float32)

    def read(self) -> Vector:
        """The parameters as they were when this was made; read-only."""
        return self._original

    @torch.no_grad()
    def write(self, theta: Vector) -> None:
        """Make the parameters these values."""
        for name, where in self._slices.items():
            # torch takes no read-only array, and a copy of all of it is long.
            part = theta[where] if theta.flags.writeable else theta[where].copy()
            parameter = self._parameters[name]
            parameter.copy_(torch.from_numpy(part).view_as(parameter))

    def restore(self) -> None:
        """Put back exactly the bits that the model had when this was made."""
        self.write(self._original)

    def gradient(
        self, parts: Iterable[Tensor], examples: int
    ) -> tuple[np.ndarray[Any, Any], Vector]:
        """As `Place.gradient`, added up in float32; a parameter's is freed as soon as it was read.

        A parameter that the losses do not depend on has zeros.
        """
        total = self._gradient  # new memory for each would take longer than the backward pass
        total.fill(0.0)
        losses: list[Tensor] = []

        def collect(name: str, gradient: Tensor) -> None:
            total[self._slices[name]] += gradient.reshape(-1).cpu().numpy()

        def mean(part: Tensor) -> Tensor:
            losses.append(part.detach())
            return part.double().sum() / examples

        with torch.enable_grad():
            backward_passes(mean, self._parameters, parts, collect, lambda: None)
        return torch.cat(losses).double().cpu().numpy(), total


def place_of(assembly: Assembly, name: str) -> Place:
    """Where a model moves, by the name of `FirstOrder.place`.

    Raises:
        RecipeError: The recipe's space has no gradients.
        MeerkatError: The mask cannot be found.
    """
    if name == "all":
        return AllParameters(assembly.loaded.model)
    # As a run has it, with the blocks below the mask computed once a batch.
    space = assembly.worker().space
    if not isinstance(space, Place):
        raise RecipeError(
            f"{type(space).__name__}, from mask.kind = {assembly.recipe.mask.kind!r}, has no "
            "gradient; take place = 'all'"
        )
    return space
