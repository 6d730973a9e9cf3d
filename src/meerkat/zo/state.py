"""What a run trains, as a value: θ, and the slots of its update rule."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float32

from meerkat.zo.arrays import Place, frozen, on_host

__all__ = ["ModelState", "Theta"]

Theta: TypeAlias = Float32[Any, " n"]
"""The values that move, float32: a numpy array, or on a client a tensor of a device (`arrays`)."""


@dataclass(frozen=True, eq=False)
class ModelState:
    """θ and what else its update rule remembers (method.md sections 1 and 6).

    Snapshot, digest, replay and resume carry it whole and look at no slot. The arrays are made
    read-only: a state that was handed out never changes.
    """

    theta: Theta
    slots: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Arrays of float32 or float64 by name, such as a momentum."""

    def __post_init__(self) -> None:
        for array in (self.theta, *self.slots.values()):
            frozen(array)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of θ's little-endian float32 bytes, followed by name, type and bytes of slots."""
        found = hashlib.sha256(_bytes(self.theta))
        for name in sorted(self.slots):
            slot = self.slots[name]
            values = on_host(slot)
            found.update(f"{name} {values.dtype.str.lstrip('<>=|')} {values.size}\n".encode())
            found.update(_bytes(values))
        return found.hexdigest()

    @property
    def nbytes(self) -> int:
        """Size of `to_bytes`."""
        return sum(array.nbytes for array in (self.theta, *self.slots.values()))

    def placed(self, place: Place) -> ModelState:
        """The same state where `place` takes θ, and slots of a float32 for each of its values."""
        form = self.theta.shape, self.theta.dtype.itemsize
        slots = {
            name: place(slot) if (slot.shape, slot.dtype.itemsize) == form else slot
            for name, slot in self.slots.items()
        }
        return ModelState(place(self.theta), slots)

    def to_bytes(self) -> bytes:
        """θ, then the slots by name, all little-endian."""
        return b"".join([_bytes(self.theta), *(_bytes(self.slots[n]) for n in sorted(self.slots))])

    def from_bytes(self, data: bytes) -> ModelState:
        """The state of the same form as this one, in numpy, that `to_bytes` gave these bytes of.

        Raises:
            ValueError: They are of another length, or hold a value that is not finite.
        """
        if len(data) != self.nbytes:
            raise ValueError(f"a state of {len(data)} bytes, not {self.nbytes}")
        arrays, start = [], 0
        for held in (self.theta, *(self.slots[name] for name in sorted(self.slots))):
            like = on_host(held)
            end = start + like.nbytes
            array = np.frombuffer(data[start:end], like.dtype.newbyteorder("<")).astype(like.dtype)
            if not np.isfinite(array).all():
                raise ValueError("a state with a value that is not finite")
            arrays.append(array.reshape(like.shape))
            start = end
        return ModelState(arrays[0], dict(zip(sorted(self.slots), arrays[1:], strict=True)))


def _bytes(array: Any) -> bytes:
    array = on_host(array)
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
