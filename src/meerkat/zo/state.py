"""What a run trains, as a value: θ, and the slots of its update rule."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from jaxtyping import Float32

__all__ = ["ModelState", "Theta"]

Theta: TypeAlias = Float32[np.ndarray, " n"]
"""The values that move, float32, on the CPU."""


@dataclass(frozen=True, eq=False)
class ModelState:
    """θ and what else its update rule remembers (method.md sections 1 and 6).

    Snapshot, digest, replay and resume carry it whole and look at no slot. The arrays are made
    read-only: a state that was handed out never changes.
    """

    theta: Theta
    slots: Mapping[str, np.ndarray] = field(default_factory=lambda: MappingProxyType({}))
    """Arrays of float32 or float64 by name, such as a momentum."""

    def __post_init__(self) -> None:
        for array in (self.theta, *self.slots.values()):
            array.setflags(write=False)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of θ's little-endian float32 bytes, followed by name, type and bytes of slots."""
        found = hashlib.sha256(_bytes(self.theta))
        for name in sorted(self.slots):
            slot = self.slots[name]
            found.update(f"{name} {slot.dtype.str.lstrip('<>=|')} {slot.size}\n".encode())
            found.update(_bytes(slot))
        return found.hexdigest()

    @property
    def nbytes(self) -> int:
        """Size of `to_bytes`."""
        return sum(array.nbytes for array in (self.theta, *self.slots.values()))

    def to_bytes(self) -> bytes:
        """θ, then the slots by name, all little-endian."""
        return b"".join([_bytes(self.theta), *(_bytes(self.slots[n]) for n in sorted(self.slots))])

    def from_bytes(self, data: bytes) -> ModelState:
        """The state of the same form as this one that `to_bytes` gave these bytes of.

        Raises:
            ValueError: They are of another length, or hold a value that is not finite.
        """
        if len(data) != self.nbytes:
            raise ValueError(f"a state of {len(data)} bytes, not {self.nbytes}")
        arrays, start = [], 0
        for like in (self.theta, *(self.slots[name] for name in sorted(self.slots))):
            end = start + like.nbytes
            array = np.frombuffer(data[start:end], like.dtype.newbyteorder("<")).astype(like.dtype)
            if not np.isfinite(array).all():
                raise ValueError("a state with a value that is not finite")
            arrays.append(array.reshape(like.shape))
            start = end
        return ModelState(arrays[0], dict(zip(sorted(self.slots), arrays[1:], strict=True)))


def _bytes(array: np.ndarray) -> bytes:
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
