"""θ as a flat float32 view of the masked weights: read, write, restore.

The one mutable thing of the project is the model inside a space.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from meerkat.errors import MaskError
from meerkat.spaces.example_gradients import has_example_gradients, summed_gradient
from meerkat.spaces.mask_file import Mask
from meerkat.spaces.overlay import Overlay
from meerkat.spaces.sensitivity import backward_passes
from meerkat.zo.state import Theta

__all__ = ["MaskedSpace"]

_OVERLAID_SHARE = 0.1
"""Largest `Overlay.share`: above, writing is the faster way."""


class MaskedSpace:
    """The masked coordinates of a model, in the mask's order.

    θ is float32, on the CPU or on the model's device, whatever the model's type. `write` casts it
    to the type that the weights are stored in, which is a parameter's own or its attribute
    `stored_dtype` where the model computes in a wider one; nothing is ever read back from the
    weights during training, so nothing drifts.

    Raises:
        MaskError: The mask names a tensor that the model lacks, or has in another shape, or that is
            quantised for another mask.
    """

    def __init__(self, model: nn.Module, mask: Mask):
        parameters = dict(model.named_parameters())
        self.size = mask.size
        self.fingerprint = mask.digest
        self._model, self._mask = model, mask
        self._parameters = {name: parameters[name] for name in mask.names if name in parameters}
        self._parts: list[tuple[Tensor, Tensor | None, int, int]] = []
        begin = 0
        for name, shape, indices in zip(mask.names, mask.shapes, mask.indices, strict=True):
            parameter = parameters.get(name)
            if parameter is None or tuple(parameter.shape) != shape:
                raise MaskError(f"the mask's tensor {name} {shape} is not in this model")
            if (flat := _kept_in_full(parameter, indices)) is not None:
                where = None
            else:
                flat = parameter.detach().view(-1)  # raises where writing could not reach
                whole = len(indices) == flat.numel()
                where = None if whole else torch.from_numpy(indices).to(flat.device)
            self._parts.append((flat, where, begin, begin + len(indices)))
            begin += len(indices)
        self._stored: list[torch.dtype] = [
            getattr(parameters[name], "stored_dtype", parameters[name].dtype) for name in mask.names
        ]
        self._kinds = {
            (flat.device, stored, flat.dtype)
            for (flat, *_), stored in zip(self._parts, self._stored, strict=True)
        }
        self._original = [self._values(flat, where).clone() for flat, where, _, _ in self._parts]

    @cached_property
    def _of_linear_layers(self) -> bool:
        return has_example_gradients(self._model, self._mask)

    @cached_property
    def _overlay(self) -> Overlay | None:
        if not self._of_linear_layers:
            return None
        found = Overlay(self._model, self._mask)
        return found if found.share <= _OVERLAID_SHARE else None

    @property
    def overlays(self) -> bool:
        """Do the masked coordinates lie in few rows and columns of linear layers?"""
        return self._overlay is not None

    def read(self) -> Theta:
        """The masked weights as they are in the model now, as float32."""
        values = [self._values(flat, where).float().cpu() for flat, where, _, _ in self._parts]
        return np.asarray(torch.cat(values).numpy())

    @torch.no_grad()
    def write(self, theta: Theta) -> None:
        """Make the masked weights exactly cast(θ); no other bit of the model is touched."""
        values = _tensor(theta)
        cast = {kind: values.to(kind[0], dtype=kind[1]).to(dtype=kind[2]) for kind in self._kinds}
        for (flat, where, begin, end), stored in zip(self._parts, self._stored, strict=True):
            self._put(flat, where, cast[flat.device, stored, flat.dtype][begin:end])

    @torch.no_grad()
    def restore(self) -> None:
        """Put back exactly the bits that the model had when the space was made."""
        for (flat, where, _, _), original in zip(self._parts, self._original, strict=True):
            self._put(flat, where, original)

    @contextmanager
    def overlaid(self, thetas: Sequence[Theta]) -> Iterator[None]:
        """Meanwhile a pass over R equally long runs of tokens has run i at cast(`thetas[i]`)."""
        if self._overlay is None:
            raise ValueError("this mask cannot be overlaid")
        values = torch.stack([_tensor(theta) for theta in thetas])
        cast = {kind: values.to(kind[0], dtype=kind[1]).to(dtype=kind[2]) for kind in self._kinds}
        changes = []
        for (flat, where, begin, end), stored in zip(self._parts, self._stored, strict=True):
            there = cast[flat.device, stored, flat.dtype][:, begin:end]
            changes.append((there.float() - self._values(flat, where).float()).to(flat.dtype))
        with self._overlay.applied(changes):
            yield

    def gradient(
        self, parts: Iterable[Tensor], examples: int
    ) -> tuple[Float64[np.ndarray, " S"], Float64[np.ndarray, " n"]]:
        """The loss of each example, and the gradient of their mean at the masked coordinates.

        Where all masked parameters are weights of linear layers, no gradient of a weight is made.
        Else only parameters that the mask touches have one, each freed as soon as it was read. A
        part's activations are freed before the next part is computed. Parts are added up in
        float64.

        Args:
            parts: Losses of some examples each, computed when they are asked for.
            examples: S of all parts.

        Raises:
            MaskError: Weights are quantised, and not all masked ones are of linear layers.
        """
        total = np.zeros(self.size)
        places = dict(zip(self._parameters, self._parts, strict=True))
        losses: list[Tensor] = []

        def collect(name: str, gradient: Tensor) -> None:
            _, where, begin, end = places[name]
            values = self._values(gradient.reshape(-1), where)
            total[begin:end] += values.double().cpu().numpy()

        def mean(part: Tensor) -> Tensor:
            losses.append(part.detach())
            return part.double().sum() / examples

        if self._of_linear_layers:
            total = summed_gradient(self._model, self._mask, parts, mean)
        else:
            if any(hasattr(parameter, "moving") for parameter in self._parameters.values()):
                raise MaskError(
                    "the exact gradient of a mask that is not in linear layers alone is not to be "
                    "had from quantised weights; set runtime.weights = 'stored'"
                )
            with torch.enable_grad():
                backward_passes(mean, self._parameters, parts, collect, lambda: None)
        return _joined(losses), total

    def slopes(
        self, parts: Iterable[Tensor], direction: Theta
    ) -> tuple[Float64[np.ndarray, " S"], Float64[np.ndarray, " S"]]:
        """The loss of each example, and its slope along a direction, by forward-mode passes.

        Args:
            parts: Losses of some examples each, computed when they are asked for.
        """
        losses, along = [], []
        # Attention in one kernel has no forward derivative.
        with torch.no_grad(), self._moving(direction), sdpa_kernel(SDPBackend.MATH):
            for part in parts:
                value, slope = forward_ad.unpack_dual(part)
                losses.append(value)
                along.append(torch.zeros_like(value) if slope is None else slope)
        return _joined(losses), _joined(along)

    @contextmanager
    def _moving(self, direction: Theta) -> Iterator[None]:
        """The masked parameters as dual numbers, with a direction as their tangent."""
        values = _tensor(direction)
        homes: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in self._model.modules():  # a tied parameter has several
            for name, parameter in module._parameters.items():
                homes.setdefault(id(parameter), []).append((module, name))
        with forward_ad.dual_level():
            try:
                for parameter, (flat, where, begin, end) in zip(
                    self._parameters.values(), self._parts, strict=True
                ):
                    if hasattr(parameter, "moving"):
                        parameter.moving = forward_ad.make_dual(flat, values[begin:end].to(flat))
                        continue
                    tangent = torch.zeros_like(flat)
                    self._put(tangent, where, values[begin:end].to(flat))
                    dual = forward_ad.make_dual(parameter.detach(), tangent.view_as(parameter))
                    for module, name in homes[id(parameter)]:
                        module._parameters[name] = dual
                yield
            finally:
                for parameter, (flat, *_) in zip(
                    self._parameters.values(), self._parts, strict=True
                ):
                    if hasattr(parameter, "moving"):
                        parameter.moving = flat
                    for module, name in homes[id(parameter)]:
                        module._parameters[name] = parameter

    @staticmethod
    def _values(flat: Tensor, where: Tensor | None) -> Tensor:
        return flat if where is None else flat.index_select(0, where)

    @staticmethod
    def _put(flat: Tensor, where: Tensor | None, values: Tensor) -> None:
        if where is None:
            flat.copy_(values)
        else:
            flat.index_copy_(0, where, values)


def _tensor(theta: Theta) -> Tensor:
    if isinstance(theta, Tensor):
        return theta
    return torch.from_numpy(theta if theta.flags.writeable else theta.copy())


def _joined(parts: list[Tensor]) -> Float64[np.ndarray, " S"]:
    return torch.cat(parts).double().cpu().numpy()


def _kept_in_full(parameter: Tensor, indices: np.ndarray) -> Tensor | None:
    """What a quantised weight keeps in full: the values at these indices; None for any other.

    Raises:
        MaskError: It keeps those at other indices.
    """
    moving: Tensor | None = getattr(parameter, "moving", None)
    if moving is None:
        return None
    places: Tensor | None = parameter.places  # type: ignore[attr-defined]
    if places is None or not np.array_equal(places.cpu().numpy(), indices):
        raise MaskError("the model is quantised around other coordinates than the mask has")
    return moving
