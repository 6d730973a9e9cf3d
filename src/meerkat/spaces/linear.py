"""A linear subspace of the masked weights: θ = θ_0 + B w, the same bits on every machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from jaxtyping import Float32, Float64
from torch import Tensor, nn

from meerkat.spaces.base import ParameterSpace
from meerkat.spaces.mask_file import Mask
from meerkat.spaces.masked import MaskedSpace
from meerkat.spaces.subspace import Subspace, combined, pulled
from meerkat.zo.state import Theta

__all__ = ["LinearSpace", "space_of", "subspace_of"]


class LinearSpace:
    """w of θ_0 + B w, with θ_0 the masked weights as they were loaded, or another base.

    Args:
        basis: B, a row for each of k directions.
        fingerprint: Of the mask and the subspace.
        first: w before any round; zeros by default.
        base: Masked weights at w = 0; as they are now by default.
        device: Where θ_0 + B w is computed, by the same operations; the CPU by default.
    """

    def __init__(
        self,
        inner: MaskedSpace,
        basis: Float32[np.ndarray, "k n"],
        fingerprint: str,
        first: Float32[np.ndarray, " k"] | None = None,
        base: Float32[np.ndarray, " n"] | None = None,
        device: torch.device | None = None,
    ):
        if basis.shape[1] != inner.size:
            raise ValueError(f"a basis over {basis.shape[1]} values, the mask has {inner.size}")
        self._inner, self._basis = inner, basis
        self._base = inner.read() if base is None else base
        self._on_device: tuple[Tensor, Tensor] | None = None
        if device is not None:
            self._on_device = torch.tensor(self._base).to(device), torch.tensor(basis).to(device)
        self._first = np.zeros(len(basis), np.float32) if first is None else first
        self.size = len(basis)
        self.fingerprint = fingerprint

    def read(self) -> Theta:
        """w before any round, not what the model has now."""
        return self._first.copy()

    def write(self, theta: Theta) -> None:
        """Make the masked weights cast(θ_0 + B w)."""
        self._inner.write(self._weights(theta))

    def restore(self) -> None:
        """Put back exactly the bits that the model had when the space was made."""
        self._inner.restore()

    @property
    def overlays(self) -> bool:
        """As `MaskedSpace.overlays`."""
        return self._inner.overlays

    def overlaid(self, thetas: Sequence[Theta]) -> AbstractContextManager[None]:
        """As `MaskedSpace.overlaid`, at θ_0 + B w for each w."""
        return self._inner.overlaid([self._weights(w) for w in thetas])

    def _weights(self, w: Float32[np.ndarray, " k"]) -> Theta:
        """θ_0 + B w."""
        if self._on_device is None:
            return combined(self._base, self._basis, w)
        base, basis = self._on_device
        theta = base.clone()
        for weight, row in zip(w.tolist(), basis, strict=True):
            theta += row * weight  # rounded twice, as `combined` does
        return theta

    def gradient(
        self, parts: Iterable[Tensor], examples: int
    ) -> tuple[Float64[np.ndarray, " S"], Float64[np.ndarray, " k"]]:
        """As `MaskedSpace.gradient`, with respect to w."""
        losses, gradient = self._inner.gradient(parts, examples)
        return losses, self.pull(gradient)

    def slopes(
        self, parts: Iterable[Tensor], direction: Theta
    ) -> tuple[Float64[np.ndarray, " S"], Float64[np.ndarray, " S"]]:
        """As `MaskedSpace.slopes`, along a direction of w."""
        nowhere = np.zeros(self._inner.size, np.float32)
        return self._inner.slopes(parts, combined(nowhere, self._basis, direction))

    def pull(self, gradient: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " k"]:
        """The gradient with respect to w: < B_j, gradient > for each direction."""
        return pulled(self._basis, gradient)


def space_of(model: nn.Module, mask: Mask, device: torch.device | None = None) -> ParameterSpace:
    """Where the state may move in a model: the masked weights, or the mask's subspace of them.

    Args:
        device: Where a subspace is kept and used; the CPU by default.
    """
    inner = MaskedSpace(model, mask)
    if mask.subspace is None:
        return inner
    found = mask.subspace
    return LinearSpace(inner, found.basis, mask.fingerprint, found.start, found.base, device)


def subspace_of(
    kind: str,
    rows: Float32[np.ndarray, "k n"],
    curvature: Float64[np.ndarray, " N"],
    about: Mapping[str, str],
    start: Float32[np.ndarray, " k"] | None = None,
) -> Subspace:
    """A subspace from the rows of B: unit directions in bfloat16, and their lengths.

    One row after the other, so that memory is 2 k n bytes beside B.
    """
    bits, lengths = np.empty(rows.shape, np.uint16), np.empty(len(rows), np.float32)
    for place in range(len(rows)):
        row = rows[place : place + 1].astype(np.float64)
        length = np.linalg.norm(row, axis=1)
        unit = torch.from_numpy((row / length[:, None]).astype(np.float32))
        bits[place], lengths[place] = unit.bfloat16().view(torch.uint16).numpy()[0], length[0]
    start = np.zeros(len(rows), np.float32) if start is None else start
    return Subspace(kind, bits, lengths, start, tuple(curvature.tolist()), about)
