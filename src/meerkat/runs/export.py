"""Export of a run's θ: a merged Hugging Face model, a sparse delta of its base, LoRA factors."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import nn

from meerkat.errors import MaskError, ModelError, RunError
from meerkat.models.adapters import merge, save_adapter
from meerkat.models.loading import LoadedModel, fingerprint
from meerkat.spaces.mask_file import Mask, check_format
from meerkat.spaces.masked import MaskedSpace
from meerkat.zo.state import Theta

__all__ = [
    "apply_delta",
    "check_empty",
    "save_delta",
    "save_factors",
    "save_merged",
    "save_merged_factors",
]

_FORMAT, _VERSION = "meerkat-delta", 1


def save_merged(loaded: LoadedModel, mask: Mask, theta: Theta, folder: Path) -> None:
    """Write model and tokenizer with θ in place, as a folder that plain transformers loads.

    Raises:
        RunError: The folder exists and is not empty.
    """
    check_empty(folder)
    space = MaskedSpace(loaded.model, mask)
    space.write(theta)
    try:
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
    finally:
        space.restore()


def save_merged_factors(
    loaded: LoadedModel, mask: Mask, theta: Theta, alpha: float, folder: Path
) -> None:
    """Write model and tokenizer with W + (α/r) B A in the place of each W, as `save_merged`.

    Args:
        loaded: The base model, without adapters; it stays merged.

    Raises:
        RunError: The folder exists and is not empty.
    """
    check_empty(folder)
    merge(loaded.model, _factors(mask, theta), alpha)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def save_factors(mask: Mask, theta: Theta, alpha: float, base: str, folder: Path) -> None:
    """Write the factors of a LoRA run as peft's adapter of its base model.

    Raises:
        RunError: The folder is not empty, or peft is not installed.
    """
    check_empty(folder)
    save_adapter(_factors(mask, theta), alpha, base, folder)


def check_empty(folder: Path) -> None:
    """May an export go here?

    Raises:
        RunError: The folder exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"--to {folder}: it exists and is not an empty folder; choose another")


def _factors(mask: Mask, theta: Theta) -> dict[str, np.ndarray]:
    """θ of a LoRA mask as its tensors, which it moves as a whole; copies of their own."""
    ends = np.cumsum([len(indices) for indices in mask.indices])[:-1]
    return {
        name: part.reshape(shape)
        for name, shape, part in zip(
            mask.names, mask.shapes, np.split(theta.copy(), ends), strict=True
        )
    }


def save_delta(mask: Mask, theta: Theta, path: Path) -> None:
    """Write the masked coordinates and their values: 8 bytes for each.

    Raises:
        RunError: The file exists, or what moved is not in the base model.
    """
    if mask.kind == "lora":
        raise RunError(
            "--delta: LoRA factors are no weights of the base model, so nothing of it could be "
            "written; take --peft for a folder with the factors alone"
        )
    if path.exists():
        raise RunError(f"--to {path}: it exists; choose another file")
    arrays: dict[str, np.ndarray] = {"theta": theta}
    for number, (indices, shape) in enumerate(zip(mask.indices, mask.shapes, strict=True)):
        width = np.uint32 if math.prod(shape) < 2**32 else np.int64
        arrays[f"indices.{number}"] = indices.astype(width)
    about = {
        "names": mask.names,
        "shapes": mask.shapes,
        "eligible": mask.eligible,
        "model": mask.model,
        "mask": mask.digest,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.part")
    metadata = {"format": f"{_FORMAT}-{_VERSION}", "delta": json.dumps(about)}
    scratch.write_bytes(_in_order(save(arrays, metadata)))
    scratch.replace(path)


def _in_order(data: bytes) -> bytes:
    """A safetensors file with its metadata in order: the library writes them in any."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(dict(sorted(header.items())), separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + data[end:]


def apply_delta(model: nn.Module, path: str | Path) -> None:
    """Put a delta onto its base model, in place.

    Raises:
        MaskError: The file is missing, damaged, or no delta.
        ModelError: The model is not the one that the delta was made for.
    """
    path = Path(path)
    if not path.is_file():
        raise MaskError(f"delta {path}: no such file")
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            check_format(metadata["format"], _FORMAT, _VERSION, f"delta {path}")
            about = json.loads(metadata["delta"])
            count = len(about["names"])
            indices = tuple(file.get_tensor(f"indices.{i}").astype(np.int64) for i in range(count))
            theta = file.get_tensor("theta")
    except (SafetensorError, KeyError, ValueError) as error:
        raise MaskError(f"delta {path} is not a delta file, or is damaged: {error}") from None
    shapes = tuple(tuple(shape) for shape in about["shapes"])
    mask = Mask(tuple(about["names"]), shapes, indices, about["eligible"], about["model"], "delta")
    if mask.digest != about["mask"] or len(theta) != mask.size:
        raise MaskError(f"delta {path} is damaged: its digest does not match; export it again")
    found = fingerprint(model)
    if found != mask.model:
        raise ModelError(
            f"delta {path} was made for another model (fingerprint {mask.model[:12]}, this one is "
            f"{found[:12]}); load the base model unchanged, with the dtype of the run"
        )
    MaskedSpace(model, mask).write(theta)
