"""θ and z as numpy arrays, or as tensors of a client's device: what differs between the two.

Update rules and estimators are written such that both give the same bits: sums and differences of
two arrays, products of two arrays or of an array and a float, which both libraries round to float32
first, and what is here. Each is an operation of its own, so that no device can fuse two into one
with a single rounding. Nothing imports torch here; a tensor is told by what it has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

__all__ = ["Place", "copied", "divided", "frozen", "on_host", "square_root", "zeros_like"]

Place: TypeAlias = Callable[[Any], Any]
"""Takes an array to where θ lives: itself, or its copy on a device."""


def _is_tensor(array: Any) -> bool:
    return hasattr(array, "new_zeros")


def zeros_like(array: Any) -> Any:
    """Zeros of the same shape and type, on the same device."""
    return array.new_zeros(array.shape) if _is_tensor(array) else np.zeros_like(array)


def copied(array: Any) -> Any:
    """An array of its own with the same values."""
    return array.clone() if _is_tensor(array) else array.copy()


def square_root(array: Any) -> Any:
    """√ of float32 values, correctly rounded.

    torch's own is not, on a CPU. Rounded from float64 it is: no root of a float32 lies so near the
    middle of two others that an error in the last bit of a float64 could matter.
    """
    return array.double().sqrt().float() if _is_tensor(array) else np.sqrt(array)


def divided(array: Any, by: float) -> Any:
    """Each value by a number that float32 can hold, correctly rounded.

    A device multiplies by the inverse of a number, and divides by one that is a tensor.
    """
    return array / (array.new_full((1,), by) if _is_tensor(array) else np.float32(by))


def on_host(array: Any) -> np.ndarray:
    """The same values as a numpy array."""
    found: np.ndarray = array.cpu().numpy() if _is_tensor(array) else array
    return found


def frozen(array: Any) -> None:
    """Make a numpy array read-only; a tensor cannot be."""
    if not _is_tensor(array):
        array.setflags(write=False)
