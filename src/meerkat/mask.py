"""Scores → mask; the other masks; save and load.

A mask is an ordered list of coordinates: eligible tensors in the model's own order, and inside a
tensor ascending flat indices. That order is the order of θ, of z, and of everything on the wire.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn

from meerkat.errors import MaskError
from meerkat.noise import words
from meerkat.recipe import MaskSection

__all__ = [
    "Mask",
    "eligible_parameters",
    "full_mask",
    "load_mask",
    "magnitude_scores",
    "mask_size",
    "random_mask",
    "save_mask",
    "top_mask",
    "union",
]

_FORMAT = "meerkat-mask-1"


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
    """How the scores were spread: see `calibration.tiers`."""

    @property
    def size(self) -> int:
        """n."""
        return sum(map(len, self.indices))

    @property
    def digest(self) -> str:
        """SHA-256 of the coordinates."""
        digest = hashlib.sha256()
        for name, shape, indices in zip(self.names, self.shapes, self.indices, strict=True):
            digest.update(f"{name} {shape}\n".encode())
            digest.update(indices.astype("<i8").tobytes())
        return digest.hexdigest()


def eligible_parameters(model: nn.Module, section: MaskSection) -> dict[str, nn.Parameter]:
    """Parameters that a mask may choose from (method.md section 2, Eligible tensors).

    By default the weight matrices of the decoder blocks; `include` replaces that.

    Raises:
        MaskError: A glob matches nothing, or nothing is left.
    """
    parameters = dict(model.named_parameters())
    for field, globs in (("include", section.include), ("exclude", section.exclude)):
        for glob in globs:
            if not any(fnmatch.fnmatchcase(name, glob) for name in parameters):
                raise MaskError(
                    f"mask.{field}: {glob!r} matches no parameter; names look like "
                    f"{next(reversed(parameters))!r}"
                )
    if section.include:
        chosen = [n for n in parameters if any(fnmatch.fnmatchcase(n, g) for g in section.include)]
    else:
        blocks = _decoder_blocks(model)
        chosen = [n for n, p in parameters.items() if n.startswith(blocks) and p.ndim >= 2]
    chosen = [n for n in chosen if not any(fnmatch.fnmatchcase(n, g) for g in section.exclude)]
    if not chosen:
        raise MaskError("mask.include and mask.exclude leave no parameter; change one of them")
    return {name: parameters[name] for name in chosen}


def _decoder_blocks(model: nn.Module) -> str:
    """Prefix of the model's largest list of modules: its decoder blocks."""
    lists = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    if not lists:
        raise MaskError("the model has no list of decoder blocks; set mask.include")
    return max(lists, key=lambda name: lists[name]) + "."


def mask_size(density: float, eligible: int) -> int:
    """n = round(u · d_eligible), at least 1."""
    return max(1, round(density * eligible))


def top_mask(
    scores: Mapping[str, Tensor], section: MaskSection, model: str, kind: str | None = None
) -> Mask:
    """The n largest scores, over all tensors or the top share inside each.

    Ties go to the earlier coordinate, so that a mask is the same everywhere. Scores are never
    concatenated: the peak is one tensor's copy beside them.

    Args:
        scores: One finite score for each eligible parameter, in the model's order.

    Raises:
        MaskError: A score is not finite.
    """
    for name, score in scores.items():
        if not torch.isfinite(score).all():
            raise MaskError(f"a score of {name} is not finite; use model.dtype = 'float32'")
    if section.scope == "tensor":
        indices = [
            _top([score], mask_size(section.density, score.numel()))[0] for score in scores.values()
        ]
    else:
        eligible = sum(score.numel() for score in scores.values())
        indices = _top(list(scores.values()), mask_size(section.density, eligible))
    return _mask(scores, indices, model, kind or section.kind)


def _top(scores: Sequence[Tensor], n: int) -> list[np.ndarray]:
    """Flat indices of the n largest over several tensors, for each tensor."""
    best = torch.empty(0)
    for score in scores:
        flat = score.flatten()
        merged = torch.cat([best, flat.topk(min(n, len(flat))).values.cpu()])
        best = merged.topk(min(n, len(merged))).values
    threshold = best[-1].item()
    ties = n - int((best > threshold).sum())
    chosen = []
    for score in scores:
        flat = score.flatten()
        equal = torch.nonzero(flat == threshold).squeeze(1)[:ties]
        ties -= len(equal)
        above = torch.nonzero(flat > threshold).squeeze(1)
        chosen.append(torch.cat([above, equal]).sort().values.cpu().numpy())
    return chosen


def magnitude_scores(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weight magnitude, the baseline of method.md section 7."""
    return {name: parameter.detach().float().abs() for name, parameter in parameters.items()}


def random_mask(parameters: Mapping[str, Tensor], section: MaskSection, model: str) -> Mask:
    """n coordinates uniformly at random, the same ones on every machine."""
    eligible = sum(parameter.numel() for parameter in parameters.values())
    n = mask_size(section.density, eligible)
    if n == eligible:
        return full_mask(parameters, model)
    # Distinct draws from range(d): repeats are dropped and drawn anew until there are enough, of
    # those that are in, or where these are more than half, of those that are not.
    wanted = min(n, eligible - n)
    drawn, start = np.empty(0, np.int64), 0
    while len(drawn) < wanted:
        count = wanted - len(drawn)
        raw = words(section.seed, [0, 0, 2 << 32], count, start)
        places = (raw % np.uint64(eligible)).astype(np.int64)
        both = np.concatenate([drawn, places])
        drawn = both[np.sort(np.unique(both, return_index=True)[1])]
        start += count
    places = np.sort(drawn)
    if wanted < n:
        places = np.delete(np.arange(eligible), places)
    ends = np.cumsum([parameter.numel() for parameter in parameters.values()])
    begins = ends - [parameter.numel() for parameter in parameters.values()]
    parts = np.split(places, np.searchsorted(places, ends[:-1]))
    return _mask(parameters, [p - b for p, b in zip(parts, begins, strict=True)], model, "random")


def full_mask(parameters: Mapping[str, Tensor], model: str) -> Mask:
    """Every eligible parameter (Full-FedZO)."""
    indices = [np.arange(parameter.numel()) for parameter in parameters.values()]
    return _mask(parameters, indices, model, "full")


def union(masks: Sequence[Mask], parameters: Mapping[str, Tensor]) -> Mask:
    """Coordinates that are in any of several masks chosen from the same parameters."""
    merged: dict[str, np.ndarray] = {name: np.empty(0, np.int64) for name in parameters}
    for mask in masks:
        for name, indices in zip(mask.names, mask.indices, strict=True):
            merged[name] = np.union1d(merged[name], indices)
    return _mask(parameters, list(merged.values()), masks[0].model, "union")


def _mask(
    tensors: Mapping[str, Tensor], indices: Sequence[np.ndarray], model: str, kind: str
) -> Mask:
    kept = [
        (name, tuple(tensor.shape), np.ascontiguousarray(chosen, dtype=np.int64))
        for (name, tensor), chosen in zip(tensors.items(), indices, strict=True)
        if len(chosen)
    ]
    names, shapes, arrays = zip(*kept, strict=True)
    eligible = sum(tensor.numel() for tensor in tensors.values())
    return Mask(names, shapes, arrays, eligible, model, kind)


def save_mask(mask: Mask, path: str | Path) -> None:
    """Write a mask as a safetensors file, whole or not at all."""
    path = Path(path)
    # A tensor that is masked as a whole needs no list of its coordinates.
    arrays = {
        f"indices.{number}": indices.astype(np.uint32 if math.prod(shape) < 2**32 else np.int64)
        for number, (indices, shape) in enumerate(zip(mask.indices, mask.shapes, strict=True))
        if len(indices) < math.prod(shape)
    }
    if mask.gradient is not None:
        arrays["gradient"] = mask.gradient
    about = {
        "names": mask.names,
        "shapes": mask.shapes,
        "eligible": mask.eligible,
        "model": mask.model,
        "kind": mask.kind,
        "concentration": mask.concentration,
        "checksum": _checksum(mask),
    }
    scratch = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(arrays, scratch, {"format": _FORMAT, "mask": json.dumps(about)})
    scratch.replace(path)


def load_mask(path: str | Path, model: str | None = None) -> Mask:
    """Read a mask file, and check that it was made for the model with this fingerprint.

    Raises:
        MaskError: The file is missing or damaged, or belongs to another model.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise MaskError(f"mask {path}: no such file")
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            if metadata["format"] != _FORMAT:
                raise ValueError(f"its format is {metadata['format']!r}, not {_FORMAT!r}")
            about = json.loads(metadata["mask"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no dict)
            mask = Mask(
                tuple(about["names"]),
                tuple(tuple(shape) for shape in about["shapes"]),
                tuple(
                    arrays[key].astype(np.int64)
                    if (key := f"indices.{number}") in arrays
                    else np.arange(math.prod(shape))
                    for number, shape in enumerate(about["shapes"])
                ),
                about["eligible"],
                about["model"],
                about["kind"],
                arrays.get("gradient"),
                about["concentration"],
            )
        if _checksum(mask) != about["checksum"]:
            raise ValueError("its checksum does not match; calibrate again")
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise MaskError(f"mask {path} is not a mask file, or is damaged: {error}") from None
    if model is not None and mask.model != model:
        raise MaskError(
            f"mask {path} was made for another model (fingerprint {mask.model[:12]}, this model is "
            f"{model[:12]}); calibrate for this model, or load the model with the same dtype"
        )
    return mask


def _checksum(mask: Mask) -> str:
    """SHA-256 of all that a mask file holds."""
    others = (mask.eligible, mask.model, mask.kind, mask.concentration)
    digest = hashlib.sha256(f"{mask.digest} {others}\n".encode())
    if mask.gradient is not None:
        digest.update(mask.gradient.astype("<f4").tobytes())
    return digest.hexdigest()
