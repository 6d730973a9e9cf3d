"""A mask and its file, which a server reads that has no model.

A mask is an ordered list of coordinates: eligible tensors in the model's own order, and inside a
tensor ascending flat indices. That order is the order of θ, of z, and of everything on the wire.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from meerkat.errors import MaskError
from meerkat.spaces.subspace import Subspace, combined

__all__ = ["Mask", "check_format", "load_mask", "save_mask"]

_FORMAT, _VERSION = "meerkat-mask", 5
_INDEX_TYPES = (np.uint32, np.int64)
_MOST_WHOLE = 2**33
"""Most coordinates, 64 GiB of indices, that a file may claim without listing them."""


@dataclass(frozen=True)
class Mask:
    """Which parameters of which model may move."""

    names: tuple[str, ...]
    """Tensors with at least one masked coordinate, in the model's order."""
    shapes: tuple[tuple[int, ...], ...]
    indices: tuple[np.ndarray, ...]
    """Flat int64 indices into each, ascending."""
    eligible: int
    """Parameters that the mask was chosen from (d_eligible)."""
    model: str
    """Fingerprint of the model that it was made for."""
    kind: str
    gradient: Float32[np.ndarray, " n"] | None = None
    """p, the mean pre-training gradient at the masked coordinates (method.md section 2)."""
    concentration: dict[str, float] | None = None
    """How the scores were spread: see `sensitivity.concentration_of`."""
    initial: Float32[np.ndarray, " n"] | None = None
    """θ_0, the masked weights as they are in the model, for a server that has no model."""
    configuration: str = ""
    """As `transport.handshake.Proof` has it, for a server that has no model."""
    probe: tuple[float, ...] = ()
    """Likewise its probe logits."""
    subspace: Subspace | None = None
    """Where θ may move within the mask; anywhere by default."""

    @property
    def size(self) -> int:
        """n."""
        return sum(map(len, self.indices))

    @property
    def dimensions(self) -> int:
        """Values of the training state: n, or the k of a subspace."""
        return self.size if self.subspace is None else self.subspace.dimensions

    @property
    def fingerprint(self) -> str:
        """Of the space: the digest, or SHA-256 of it and the subspace's."""
        if self.subspace is None:
            return self.digest
        return hashlib.sha256(f"{self.digest} {self.subspace.digest}".encode()).hexdigest()

    @property
    def start(self) -> Float32[np.ndarray, " k"] | None:
        """The state's values before round 0: θ_0, or w = 0."""
        return self.initial if self.subspace is None else self.subspace.start.copy()

    @property
    def direction_gradient(self) -> Float32[np.ndarray, " k"] | None:
        """p along the state's values: p itself, or B p."""
        if self.subspace is None or self.gradient is None:
            return self.gradient
        p = self.gradient.astype(np.float64)
        return np.array([math.fsum((row * p).tolist()) for row in self.subspace.basis], np.float32)

    def weights(self, values: Float32[np.ndarray, " k"]) -> Float32[np.ndarray, " n"]:
        """The masked weights that the state's values stand for."""
        if self.subspace is None:
            return values
        base = self.initial if self.subspace.base is None else self.subspace.base
        assert base is not None, "θ_0 is read with the mask"
        return combined(base, self.subspace.basis, values)

    @property
    def digest(self) -> str:
        """SHA-256 of the coordinates."""
        digest = hashlib.sha256()
        for name, shape, indices in zip(self.names, self.shapes, self.indices, strict=True):
            digest.update(f"{name} {shape}\n".encode())
            digest.update(indices.astype("<i8").tobytes())
        return digest.hexdigest()


def save_mask(mask: Mask, path: str | Path) -> None:
    """Write a mask as a safetensors file, whole or not at all."""
    path = Path(path)
    # A tensor that is masked as a whole needs no list of its coordinates.
    arrays = {
        f"indices.{number}": indices.astype(np.uint32 if math.prod(shape) < 2**32 else np.int64)
        for number, (indices, shape) in enumerate(zip(mask.indices, mask.shapes, strict=True))
        if len(indices) < math.prod(shape)
    }
    for name, values in (("gradient", mask.gradient), ("initial", mask.initial)):
        if values is not None:
            arrays[name] = values
    if mask.subspace is not None:
        arrays |= mask.subspace.arrays
    about = {
        "names": mask.names,
        "shapes": mask.shapes,
        "eligible": mask.eligible,
        "model": mask.model,
        "kind": mask.kind,
        "concentration": mask.concentration,
        "configuration": mask.configuration,
        "probe": mask.probe,
        "subspace": None if mask.subspace is None else mask.subspace.described(),
        "checksum": _checksum(mask),
    }
    scratch = path.with_name(f"{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(arrays, scratch, {"format": f"{_FORMAT}-{_VERSION}", "mask": json.dumps(about)})
    scratch.replace(path)


def load_mask(
    path: str | Path,
    model: str | None = None,
    parameters: Mapping[str, tuple[int, ...]] | None = None,
) -> Mask:
    """Read a mask file, and check that it was made for the model with this fingerprint.

    Args:
        parameters: Shapes of the model's parameters by name. A tensor that is not one of them is
            refused before any memory is taken, which a file from elsewhere could ask for.

    Raises:
        MaskError: The file is missing or damaged, or belongs to another model.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise MaskError(f"mask {path}: no such file")
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            check_format(metadata["format"], _FORMAT, _VERSION, f"mask {path}")
            about = json.loads(metadata["mask"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no dict)
            shapes = tuple(tuple(shape) for shape in about["shapes"])
            listed = [arrays.get(f"indices.{number}") for number in range(len(shapes))]
            _check_size(shapes, listed)
            if parameters is not None:
                _check_parameters(about["names"], shapes, parameters)
            mask = Mask(
                tuple(about["names"]),
                shapes,
                tuple(
                    np.arange(math.prod(shape)) if indices is None else indices.astype(np.int64)
                    for shape, indices in zip(shapes, listed, strict=True)
                ),
                about["eligible"],
                about["model"],
                about["kind"],
                arrays.get("gradient"),
                about["concentration"],
                arrays.get("initial"),
                about["configuration"],
                tuple(about["probe"]),
                Subspace.read(about["subspace"], arrays),
            )
        _check_form(mask)
        if _checksum(mask) != about["checksum"]:
            raise ValueError("its checksum does not match; calibrate again")
    except (
        SafetensorError,
        AttributeError,  # numpy lacks a type that safetensors has
        KeyError,
        MemoryError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        cause = " ".join(str(error).split())  # it may quote the file
        raise MaskError(f"mask {path} is not a mask file, or is damaged: {cause}") from None
    if model is not None and mask.model != model:
        raise MaskError(
            f"mask {path} was made for another model (fingerprint {mask.model[:12]}, this model is "
            f"{model[:12]}); calibrate for this model, or load the model with the same dtype"
        )
    return mask


def check_format(found: str, name: str, version: int, what: str) -> None:
    """Is a file of this format, in the version that is read here?

    Args:
        found: What the file says, `name-version`.

    Raises:
        MaskError: It is of an older or a newer version.
        ValueError: It is of another format.
    """
    stem, _, number = found.rpartition("-")
    if stem != name or not number.isdecimal():
        raise ValueError(f"its format is {found[:80]!r}, not {name!r}")
    if int(number) != version:
        age = "an older" if int(number) < version else "a newer"
        raise MaskError(
            f"{what} was written by {age} version of meerkat-fl (its format is {found[:80]}, this "
            f"one reads {name}-{version}); make it again, or use that version"
        )


def _check_size(shapes: tuple[tuple[int, ...], ...], listed: list[np.ndarray | None]) -> None:
    """Before room is made: a tensor that is masked as a whole takes no bytes in the file."""
    if any(type(side) is not int or side < 1 for shape in shapes for side in shape):
        raise ValueError("a shape is none")
    whole = sum(math.prod(s) for s, indices in zip(shapes, listed, strict=True) if indices is None)
    if whole > _MOST_WHOLE:
        raise ValueError(f"it claims more than {_MOST_WHOLE} coordinates that it does not list")
    for indices in listed:
        if indices is not None and (indices.ndim != 1 or indices.dtype not in _INDEX_TYPES):
            raise ValueError("its indices are no lists of integers")


def _check_parameters(
    names: list[str],
    shapes: tuple[tuple[int, ...], ...],
    parameters: Mapping[str, tuple[int, ...]],
) -> None:
    if len(names) != len(shapes) or len(set(names)) != len(names):
        raise ValueError("its names and shapes do not agree")
    of_adapters, adapted = any(map(_is_factor, names)), any(map(_is_factor, parameters))
    if of_adapters != adapted:
        raise MaskError(
            f"the mask's tensors are {'' if of_adapters else 'no '}LoRA factors, and mask.kind = "
            f"'lora' is {'' if adapted else 'not '}what the recipe says; set it to what the mask "
            "was made with, or calibrate again"
        )
    for name, shape in zip(names, shapes, strict=True):
        if parameters.get(name) != shape:
            raise ValueError(f"its tensor {str(name)[:80]} {shape} is not in the model")


def _is_factor(name: object) -> bool:
    return isinstance(name, str) and (".lora_A." in name or ".lora_B." in name)


def _check_form(mask: Mask) -> None:
    """Check types, order and ranges, which a valid checksum does not guarantee."""
    texts = (*mask.names, mask.model, mask.kind)
    spread = mask.concentration
    probe = all(type(value) is float for value in mask.probe)
    if not isinstance(mask.configuration, str) or not probe:
        raise ValueError("its configuration or probe is of another type")
    if not all(isinstance(text, str) for text in texts) or type(mask.eligible) is not int:
        raise ValueError("a field is of another type")
    if spread is not None and (
        type(spread) is not dict or not all(type(value) is float for value in spread.values())
    ):
        raise ValueError("its concentration is of another type")
    if len(set(mask.names)) != len(mask.shapes) or len(mask.names) != len(mask.shapes):
        raise ValueError("its names and shapes do not agree")
    for shape, indices in zip(mask.shapes, mask.indices, strict=True):
        ascending = (indices[1:] > indices[:-1]).all()
        if not len(indices) or not ascending or indices[0] < 0 or indices[-1] >= math.prod(shape):
            raise ValueError("its indices are not ascending, or not inside their tensor")
    if mask.eligible < mask.size:
        raise ValueError(f"it has more than the {mask.eligible} coordinates to choose from")
    for values in (mask.gradient, mask.initial):
        if values is not None and (values.dtype != np.float32 or values.shape != (mask.size,)):
            raise ValueError("its gradient or initial parameters are not one float32 a coordinate")
    if mask.subspace is not None:
        mask.subspace.check(mask.size)


def _checksum(mask: Mask) -> str:
    """SHA-256 of all that a mask file holds."""
    others = (mask.eligible, mask.model, mask.kind, mask.concentration)
    identity = (mask.configuration, mask.probe)
    digest = hashlib.sha256(f"{mask.digest} {others} {identity}\n".encode())
    digest.update(b"" if mask.subspace is None else mask.subspace.digest.encode())
    for values in (mask.gradient, mask.initial):
        if values is not None:
            digest.update(values.astype("<f4").tobytes())
    return digest.hexdigest()
