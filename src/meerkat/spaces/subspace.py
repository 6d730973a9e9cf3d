"""A subspace of the masked weights, as a mask file carries it: directions, scales, origin."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, UInt16

from meerkat.config.schema import without_neutral
from meerkat.config.sections import SubspaceSection
from meerkat.errors import MaskError
from meerkat.tasks import Task

__all__ = ["Subspace", "check_subspace", "combined", "pulled", "settings_of"]


@dataclass(frozen=True, eq=False)
class Subspace:
    """B = diag(scales) V, with the rows of V in bfloat16: 2 bytes for each of k × n numbers."""

    kind: str
    directions: UInt16[np.ndarray, "k n"]
    """Bits of V, one direction a row."""
    scales: Float32[np.ndarray, " k"]
    start: Float32[np.ndarray, " k"]
    """w before any round; zeros are the model as it was loaded."""
    curvature: tuple[float, ...]
    """λ of every direction that the texts span, the largest first."""
    about: Mapping[str, str]
    """Prompt, answers, digest of the texts, and settings that it was made with."""
    base: Float32[np.ndarray, " n"] | None = None
    """Masked weights at w = 0 of a subspace that was made in mid-run; None: as they were loaded."""

    def described(self) -> dict[str, Any]:
        """What is not an array of it, for a file's metadata."""
        return {"kind": self.kind, "curvature": self.curvature, "about": dict(self.about)}

    @classmethod
    def read(cls, described: Any, arrays: Mapping[str, np.ndarray]) -> Subspace | None:
        """The subspace of a file; None where it has none.

        Raises:
            KeyError, TypeError: A part is missing or of another type.
        """
        if described is None:
            return None
        curvature, about = tuple(described["curvature"]), dict(described["about"])
        directions, scales, start = (arrays[name] for name in ("directions", "scales", "start"))
        base = arrays.get("base")
        return cls(described["kind"], directions, scales, start, curvature, about, base)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Its arrays by their names in a file."""
        found = {"directions": self.directions, "scales": self.scales, "start": self.start}
        return found if self.base is None else {**found, "base": self.base}

    def check(self, size: int) -> None:
        """Check types and shapes.

        Args:
            size: n of the mask.

        Raises:
            ValueError: They do not fit.
        """
        k = len(self.scales)
        shaped = self.directions.shape == (k, size) and k > 0
        shaped = shaped and self.scales.shape == self.start.shape == (k,)
        typed = self.directions.dtype == np.uint16
        typed = typed and self.scales.dtype == self.start.dtype == np.float32
        if typed and not np.isfinite(self.start).all():
            raise ValueError("its subspace starts where it is not finite")
        base = self.base
        if base is not None and (base.dtype != np.float32 or base.shape != (size,)):
            raise ValueError("its subspace has no base of one float32 a coordinate")
        if base is not None and not np.isfinite(base).all():
            raise ValueError("its subspace has a base that is not finite")
        texts = [self.kind, *self.about, *self.about.values()]
        if not (shaped and typed and all(isinstance(text, str) for text in texts)):
            raise ValueError("its subspace is not k bfloat16 directions over the mask")
        if not all(type(value) is float for value in self.curvature):
            raise ValueError("its curvature is of another type")

    @property
    def dimensions(self) -> int:
        """k."""
        return len(self.directions)

    @cached_property
    def basis(self) -> Float32[np.ndarray, "k n"]:
        """B, the same bits on every machine: a bfloat16 is the upper half of a float32."""
        rows = (self.directions.astype("<u4") << 16).view("<f4").astype(np.float32)
        return np.multiply(rows, self.scales[:, None])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that it holds."""
        head = [self.kind, self.directions.shape, self.curvature, dict(self.about)]
        digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
        digest.update(self.directions.astype("<u2").tobytes())
        digest.update(self.scales.astype("<f4").tobytes())
        digest.update(self.start.astype("<f4").tobytes())
        digest.update(b"" if self.base is None else self.base.astype("<f4").tobytes())
        return digest.hexdigest()


def check_subspace(found: Subspace | None, section: SubspaceSection | None, task: Task) -> None:
    """Is what a mask file carries what a recipe asks for?

    Raises:
        MaskError: It has none, or one where none is asked for, or it was made with other settings
            or for another prompt or other answers.
    """
    if section is None and found is None:
        return
    if found is None:
        raise MaskError(
            "the mask file holds no subspace, the recipe asks for one; make it with `meerkat "
            "calibrate RECIPE --out FILE`"
        )
    if section is None:
        raise MaskError("the mask file holds a subspace; add [subspace], or take a mask without")
    made_with = found.about.get("settings")
    if made_with != settings_of(section):
        raise MaskError(
            "the mask file holds a subspace that was made with other settings than [subspace] "
            f"has ({made_with}); put those in the recipe, or take a mask without"
        )
    made_for = [found.about.get(name) for name in ("prompt", "answers")]
    if found.kind == "aligned" and made_for != [task.prompt, json.dumps(task.verbalizers)]:
        raise MaskError(
            f"the mask file holds a subspace for the prompt {made_for[0]!r} and the answers "
            f"{made_for[1]}, not for those of this task; take a mask without"
        )


def settings_of(section: SubspaceSection) -> str:
    """A section as the text that a subspace made with it carries.

    Whether it is used, and when it is renewed, is no part of that.
    """
    later = {"least_rank", "usual_spread", "renew_every"}
    dumped = without_neutral(type(section), section.model_dump(mode="json", exclude=later))
    return json.dumps(dumped, sort_keys=True)


def combined(
    start: Float32[np.ndarray, " n"],
    basis: Float32[np.ndarray, "k n"],
    w: Float32[np.ndarray, " k"],
) -> Float32[np.ndarray, " n"]:
    """θ_0 + Σ_j w_j B_j in float32, one direction after the other.

    Elementwise products and sums are exact IEEE operations in this order on every machine; a
    matrix product would leave the order to the processor.
    """
    theta, scratch = start.copy(), np.empty_like(start)
    for weight, row in zip(w, basis, strict=True):
        np.multiply(row, weight, out=scratch)
        np.add(theta, scratch, out=theta)
    return theta


def pulled(
    basis: Float32[np.ndarray, "k n"], gradient: Float64[np.ndarray, " n"]
) -> Float64[np.ndarray, " k"]:
    """< B_j, gradient > in float64, by halves: the same bits on every machine.

    Each row of products is folded in two until one number is left; every addition is elementwise,
    so its order is not left to the processor, as it would be in a matrix product.
    """
    found = np.empty(len(basis))
    for place, row in enumerate(basis):
        products = row * gradient
        while (size := len(products)) > 1:
            half = size // 2
            folded = products[:half] + products[half : 2 * half]
            products = np.append(folded, products[-1]) if size % 2 else folded
        found[place] = products[0]
    return found
