"""Finds a recipe's mask: reads its file or the cache, or computes it on the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from meerkat.config.schema import without_neutral
from meerkat.errors import MaskError
from meerkat.models.adapters import adapter_factors
from meerkat.runs.mask_cache import cache_path, corpus_digests, read_cached
from meerkat.runs.modalities import Modality, ModelObjective
from meerkat.runs.modalities.base import PublicSources
from meerkat.spaces.mask_criteria import (
    eligible_parameters,
    full_mask,
    magnitude_scores,
    random_mask,
    top_mask,
    union,
)
from meerkat.spaces.mask_file import Mask, load_mask, save_mask
from meerkat.spaces.sensitivity import concentration_of, gradient_at, sensitivity_scores
from meerkat.tasks import Example
from meerkat.transport.handshake import same_probe

__all__ = ["Fit", "FoundMask", "Sources", "check_factors", "find_mask"]


@dataclass(frozen=True)
class Fit:
    """What the clients' texts, without labels, say of an aligned subspace (Eq. 22)."""

    rank: float
    """How many of its directions they make use of."""
    spread: float | None
    """Standard deviation of the answers' scores over them; None for free text."""
    learning_rate: float | None = None
    epsilon: float | None = None
    """η and ε of a run that goes with that spread; None where it is made without a subspace."""


@dataclass(frozen=True)
class FoundMask:
    """A mask, and where it is kept."""

    mask: Mask
    path: Path | None = None
    fit: Fit | None = None
    """How its subspace fits the clients' texts, where that was asked."""


class Sources(PublicSources, Protocol):
    """What a mask may be found from; `assembly.Assembly`."""

    @property
    def modality(self) -> Modality: ...
    @property
    def objective(self) -> ModelObjective: ...
    @property
    def mask_file(self) -> Path | None: ...
    @property
    def configuration(self) -> str: ...
    def client_examples(self) -> list[list[Example]]: ...
    def example_batches(self) -> list[list[Any]]: ...


def find_mask(sources: Sources) -> FoundMask:
    """The mask of a recipe: its file, the cache, or a calibration.

    Raises:
        MaskError: The file belongs to another model, or nothing may be masked.
        DataError: The corpus cannot be read, or is too short.
    """
    loaded, section = sources.loaded, sources.recipe.mask
    path = sources.mask_file or (Path(section.file) if section.file is not None else None)
    if path is not None:
        mask = load_mask(path, loaded.fingerprint, loaded.parameters)
        _check_same_model(mask, sources, path)
        return FoundMask(mask, path)
    if section.kind == "lora":  # its factors are in the model by now
        everything = full_mask(adapter_factors(loaded.model), loaded.fingerprint)
        return FoundMask(replace(everything, kind="lora"))
    parameters = eligible_parameters(loaded.model, section)
    match section.kind:
        case "task":
            mask = _by_gradients(sources, _task_loss(sources.objective), sources.example_batches())
        case "magnitude":
            mask = top_mask(magnitude_scores(parameters), section, loaded.fingerprint)
        case "random":
            mask = random_mask(parameters, section, loaded.fingerprint)
        case "full":
            mask = full_mask(parameters, loaded.fingerprint)
        case "union":
            masks = [_sensitive(sources, own) for own in sources.client_examples()]
            mask = union(masks, parameters)
        case _:
            return _cached(sources)
    return FoundMask(mask)


def _check_same_model(mask: Mask, sources: Sources, path: Path) -> None:
    """The parameters are equal; is what the model computes with them?

    Raises:
        MaskError: The configuration, the tokenizer, its template, or the code is another.
    """
    loaded = sources.loaded
    same = ("", sources.configuration, loaded.configuration)  # a template has no part in a mask
    if loaded.configuration and mask.configuration not in same:
        raise MaskError(
            f"mask {path} was made with another configuration or tokenizer of this model; put "
            "config.json and the tokenizer's files back, or calibrate again"
        )
    if not same_probe(loaded.probe, mask.probe):
        raise MaskError(
            f"mask {path} was made where this model computed other logits; install that release "
            "of transformers, or calibrate again"
        )


def check_factors(mask: Mask, initial: Float32[np.ndarray, " n"], path: Path | None) -> None:
    """Does a LoRA mask start from the factors that this recipe draws?

    Args:
        initial: Those in the model.

    Raises:
        MaskError: It was made with another seed, or for other weights of the same shapes.
    """
    known = mask.kind == "lora" and mask.initial is not None
    if known and not np.array_equal(mask.initial, initial):  # type: ignore[arg-type]
        raise MaskError(
            f"mask {path} starts from other LoRA factors than this recipe; put mask.seed and "
            "mask.include back, or calibrate again"
        )


def _cached(sources: Sources) -> FoundMask:
    """The sensitivity mask, found again by model, corpus and settings."""
    section, loaded = sources.recipe.mask, sources.loaded
    dumped = without_neutral(type(section), section.model_dump(mode="json", exclude={"file"}))
    settings = dumped | corpus_digests(section.corpus)
    content = [loaded.fingerprint, loaded.configuration, settings]
    path = cache_path(sources.recipe.runtime, "masks", content)
    kept = read_cached(path, loaded.fingerprint)
    if kept is not None:
        return FoundMask(kept, path)
    mask = _sensitive(sources, None)
    save_mask(mask, path)
    return FoundMask(mask, path)


def _sensitive(sources: Sources, own: Sequence[Example] | None) -> Mask:
    """By pre-training gradients over the corpus, or these examples (method.md section 2)."""
    batches = sources.modality.calibration_batches(sources, own)
    return _by_gradients(sources, sources.objective.pretraining_loss, batches)


def _task_loss(objective: ModelObjective) -> Callable[[list[Any]], Tensor]:
    """Labelled examples → their mean usual loss, with its graph."""
    return lambda examples: torch.cat(list(objective.usual_losses_with_graph(examples))).mean()


def _by_gradients(
    sources: Sources, loss: Callable[[Any], Tensor], batches: Sequence[Any] | Tensor
) -> Mask:
    """The largest scores of these batches, with p, the mean of their gradients."""
    section, loaded, progress = sources.recipe.mask, sources.loaded, sources.progress
    parameters = eligible_parameters(loaded.model, section)
    passes = sources.recipe.runtime.mask_passes
    progress.start("Calibrating the mask", len(batches) * passes)
    found = sensitivity_scores(loss, parameters, batches, section, passes == 1, progress.advance)
    mask = top_mask(found.scores, section, loaded.fingerprint)
    gradient = gradient_at(loss, parameters, batches, mask, found, progress.advance)
    return replace(mask, gradient=gradient, concentration=concentration_of(found.scores, mask.size))
