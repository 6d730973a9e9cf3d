"""θ as a flat float32 view of the masked weights: read, write, restore.

The one mutable thing of the project is the model inside a space.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from meerkat.errors import MaskError
from meerkat.spaces.mask_file import Mask
from meerkat.zo.state import Theta

__all__ = ["MaskedSpace"]


class MaskedSpace:
    """The masked coordinates of a model, in the mask's order.

    θ is float32 on the CPU, whatever the model's type and device. `write` casts it to the
    weights' type; nothing is ever read back from the weights during training, so nothing drifts.

    Raises:
        MaskError: The mask names a tensor that the model lacks, or has in another shape.
    """

    def __init__(self, model: nn.Module, mask: Mask):
        parameters = dict(model.named_parameters())
        self.size = mask.size
        self.fingerprint = mask.digest
        self._parts: list[tuple[Tensor, Tensor | None, int, int]] = []
        begin = 0
        for name, shape, indices in zip(mask.names, mask.shapes, mask.indices, strict=True):
            parameter = parameters.get(name)
            if parameter is None or tuple(parameter.shape) != shape:
                raise MaskError(f"the mask's tensor {name} {shape} is not in this model")
            flat = parameter.detach().view(-1)  # a view: raises where writing could not reach
            whole = len(indices) == flat.numel()
            where = None if whole else torch.from_numpy(indices).to(flat.device)
            self._parts.append((flat, where, begin, begin + len(indices)))
            begin += len(indices)
        self._kinds = {(flat.device, flat.dtype) for flat, *_ in self._parts}
        self._original = [self._values(flat, where).clone() for flat, where, _, _ in self._parts]

    def read(self) -> Theta:
        """The masked weights as they are in the model now, as float32."""
        values = [self._values(flat, where).float().cpu() for flat, where, _, _ in self._parts]
        return np.asarray(torch.cat(values).numpy())

    @torch.no_grad()
    def write(self, theta: Theta) -> None:
        """Make the masked weights exactly cast(θ); no other bit of the model is touched."""
        values = torch.from_numpy(theta if theta.flags.writeable else theta.copy())
        cast = {kind: values.to(*kind) for kind in self._kinds}
        for flat, where, begin, end in self._parts:
            self._put(flat, where, cast[flat.device, flat.dtype][begin:end])

    @torch.no_grad()
    def restore(self) -> None:
        """Put back exactly the bits that the model had when the space was made."""
        for (flat, where, _, _), original in zip(self._parts, self._original, strict=True):
            self._put(flat, where, original)

    @staticmethod
    def _values(flat: Tensor, where: Tensor | None) -> Tensor:
        return flat if where is None else flat.index_select(0, where)

    @staticmethod
    def _put(flat: Tensor, where: Tensor | None, values: Tensor) -> None:
        if where is None:
            flat.copy_(values)
        else:
            flat.index_copy_(0, where, values)
