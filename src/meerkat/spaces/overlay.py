"""Several small changes of a model in one forward pass, without writing a weight.

A linear layer computes W x. Where W changes by S at the masked coordinates, W x + S x is the same,
and each run of tokens may have an S of its own. Masked coordinates lie in few rows and columns of
a matrix (those of a sensitivity mask of the demo model cross in 1.1 % of it), so S x is a product
of small dense matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from meerkat.spaces.mask_file import Mask

__all__ = ["Overlay"]


@dataclass(frozen=True)
class _Layer:
    """Where the masked coordinates of a linear layer lie."""

    module: nn.Linear
    rows: Int64[Tensor, " r"]
    """Outputs that they reach."""
    columns: Int64[Tensor, " c"]
    """Inputs that they read."""
    places: Int64[Tensor, " m"]
    """Of each coordinate, in a flat (c, r) matrix."""


class Overlay:
    """Changes of the masked coordinates that a pass applies to runs of its tokens.

    Args:
        mask: Each of its tensors is the weight of one linear layer, and of nothing else.
    """

    def __init__(self, model: nn.Module, mask: Mask):
        modules = dict(model.named_modules())
        self._layers: list[_Layer] = []
        touched = total = 0
        for name, shape, indices in zip(mask.names, mask.shapes, mask.indices, strict=True):
            module = modules[name.removesuffix(".weight")]
            assert isinstance(module, nn.Linear)
            rows, row = np.unique(indices // shape[1], return_inverse=True)
            columns, column = np.unique(indices % shape[1], return_inverse=True)
            found = (rows, columns, column * len(rows) + row)
            device = module.weight.device
            self._layers.append(
                _Layer(module, *(torch.from_numpy(part).to(device) for part in found))
            )
            touched += len(rows) * len(columns)
            total += module.weight.numel()
        self.share = touched / total
        """Products of S x in those of W x, for one token."""

    @contextmanager
    def applied(self, changes: Sequence[Tensor]) -> Iterator[None]:
        """Meanwhile run i of R equally long runs of tokens has W + S_i.

        Args:
            changes: For each tensor of the mask (R, m), its m coordinates for each run, in the
                layer's type and on its device.
        """
        handles = [
            layer.module.register_forward_hook(partial(_add, layer, change))
            for layer, change in zip(self._layers, changes, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _add(
    layer: _Layer,
    change: Float[Tensor, "R m"],
    module: nn.Module,
    arguments: tuple[Tensor, ...],
    output: Float[Tensor, "... out"],
) -> None:
    """A forward hook: add S x to the output, in place."""
    runs, r, c = len(change), len(layer.rows), len(layer.columns)
    small = change.new_zeros(runs, c * r)
    small.index_copy_(1, layer.places, change)
    x = arguments[0].flatten(0, -2).index_select(1, layer.columns)
    moved = torch.bmm(x.view(runs, -1, c), small.view(runs, c, r))
    output.flatten(0, -2).index_add_(1, layer.rows, moved.view(-1, r))
