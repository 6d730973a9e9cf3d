"""A recipe → all that a run is made of: model, mask, examples, who holds which."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import overload

import torch

from meerkat.calibration import Calibration, calibrate_scores, gradient_at, tiers
from meerkat.client import Client, Worker
from meerkat.data.corpus import calibration_batches, sequences
from meerkat.data.encoding import Encoded, Encoder
from meerkat.data.holdings import deal, holdings
from meerkat.data.sources import Split, load_folder
from meerkat.errors import MaskError
from meerkat.mask.file import Mask, load_mask, save_mask
from meerkat.mask.making import (
    eligible_parameters,
    full_mask,
    magnitude_scores,
    random_mask,
    top_mask,
    union,
)
from meerkat.models import LoadedModel, cache_dir, load_model
from meerkat.noise import Directions
from meerkat.objective import Objective
from meerkat.progress import Progress
from meerkat.recipe import Recipe
from meerkat.records import Header, directions_of, header_of
from meerkat.space import MaskedSpace
from meerkat.tasks import Example, Task, resolve_task

__all__ = ["Assembly", "Calibrated", "EncodedExamples", "assemble"]


class EncodedExamples(Sequence[Encoded]):
    """Examples that are encoded when they are first read."""

    def __init__(self, examples: Sequence[Example], encoder: Encoder):
        self._examples = examples
        self._encoder = encoder
        self._encoded: dict[int, Encoded] = {}

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...

    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...

    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index not in self._encoded:
            self._encoded[index] = self._encoder.encode(self._examples[index])
        return self._encoded[index]


@dataclass(frozen=True)
class Calibrated:
    """A mask, and where it is kept."""

    mask: Mask
    path: Path | None = None


@dataclass(frozen=True)
class Assembly:
    """What a recipe means on this machine."""

    recipe: Recipe
    loaded: LoadedModel
    task: Task
    split: Split
    parts: tuple[tuple[int, ...], ...]
    """Indices into `split.train` that each client holds."""
    progress: Progress

    @cached_property
    def encoder(self) -> Encoder:
        section = self.recipe.task
        return Encoder(self.task, self.loaded.tokenizer, section.max_length, self.loaded.window)

    @cached_property
    def test(self) -> EncodedExamples:
        """The held-out examples that are evaluated on."""
        return EncodedExamples(self.split.test[: self.recipe.evaluation.examples], self.encoder)

    @cached_property
    def directions(self) -> Directions:
        return directions_of(self.recipe, self.calibrated.mask)

    @cached_property
    def calibrated(self) -> Calibrated:
        found = find_mask(self.recipe, self.loaded, self._client_texts, self.progress)
        initial = MaskedSpace(self.loaded.model, found.mask).read()
        return replace(found, mask=replace(found.mask, initial=initial))

    @cached_property
    def objective(self) -> Objective:
        runtime = self.recipe.runtime
        if runtime.compile:
            # Compiled code outlives the process. torch has set a folder of its own by now.
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_dir(runtime, "compiled"))
        return Objective(self.loaded, runtime.tokens_per_pass, runtime.compile)

    def worker(self) -> Worker:
        """The model as a worker, at the initial θ."""
        space = MaskedSpace(self.loaded.model, self.calibrated.mask)
        return Worker(space, self.objective, self.directions, self.recipe.epsilon)

    def clients(self) -> list[Client]:
        """All clients with their data."""
        return [
            Client(
                number,
                EncodedExamples([self.split.train[i] for i in part], self.encoder),
                self.recipe.federation.batch_size,
                self.recipe.seed,
            )
            for number, part in enumerate(self.parts)
        ]

    def header(self) -> Header:
        """What the journal of this run starts with."""
        counts, digest = holdings(self.task, self.split, self.parts)
        labels = self.task.verbalizers
        return header_of(self.recipe, self.calibrated.mask, tuple(labels), counts, digest)

    def _client_texts(self) -> list[list[str]]:
        """Each client's own examples as text, for the union mask."""
        return [
            [self.task.prompt.format(**self.split.train[i].fields) for i in part]
            for part in self.parts
        ]


def assemble(
    recipe: Recipe, progress: Progress | None = None, data: Path | None = None
) -> Assembly:
    """Load data and model; the mask is found when it is first asked for.

    Args:
        data: The folder of the one client that is here, instead of what the recipe names.

    Raises:
        MeerkatError: Something that the recipe names is missing or does not fit.
    """
    progress = progress or Progress()
    if recipe.runtime.threads:
        torch.set_num_threads(recipe.runtime.threads)
    # Data first: what is wrong with them shows in seconds, a model may take a minute.
    task = resolve_task(recipe.task)
    if data is None:
        split, parts = deal(recipe, task)
    else:
        split = load_folder(task, data)
        parts = (tuple(range(len(split.train))),)
    progress.start("Loading the model", 1)
    loaded = load_model(recipe.model, recipe.runtime)
    assembly = Assembly(recipe, loaded, task, split, parts, progress)
    _ = assembly.encoder  # the verbalizers are checked here, before a long calibration
    progress.advance()
    return assembly


def find_mask(
    recipe: Recipe,
    loaded: LoadedModel,
    client_texts: Callable[[], list[list[str]]],
    progress: Progress,
) -> Calibrated:
    """The mask of a recipe: its file, the cache, or a calibration.

    Raises:
        MaskError: The file belongs to another model, or nothing may be masked.
        DataError: The corpus cannot be read, or is too short.
    """
    section = recipe.mask
    if section.file is not None:
        path = Path(section.file)
        return Calibrated(load_mask(path, loaded.fingerprint), path)
    parameters = eligible_parameters(loaded.model, section)
    match section.kind:
        case "magnitude":
            mask = top_mask(magnitude_scores(parameters), section, loaded.fingerprint)
        case "random":
            mask = random_mask(parameters, section, loaded.fingerprint)
        case "full":
            mask = full_mask(parameters, loaded.fingerprint)
        case "union":
            texts = client_texts()
            masks = [_sensitive(recipe, loaded, own, progress) for own in texts]
            mask = union(masks, parameters)
        case _:
            return _cached(recipe, loaded, progress)
    return Calibrated(mask)


def _cached(recipe: Recipe, loaded: LoadedModel, progress: Progress) -> Calibrated:
    """The sensitivity mask, found again by model, corpus and settings."""
    settings = recipe.mask.model_dump(mode="json", exclude={"file"})
    corpus = recipe.mask.corpus
    for name in (corpus,) if isinstance(corpus, str) else corpus:
        if Path(name).is_file():
            settings[name] = hashlib.sha256(Path(name).read_bytes()).hexdigest()
    content = json.dumps([loaded.fingerprint, settings], sort_keys=True)
    key = hashlib.sha256(content.encode()).hexdigest()[:24]
    path = cache_dir(recipe.runtime, "masks") / f"{key}.safetensors"
    with suppress(MaskError):  # absent, damaged, or of another version: made again
        return Calibrated(load_mask(path, loaded.fingerprint), path)
    mask = _sensitive(recipe, loaded, None, progress)
    save_mask(mask, path)
    return Calibrated(mask, path)


def _sensitive(
    recipe: Recipe, loaded: LoadedModel, texts: Sequence[str] | None, progress: Progress
) -> Mask:
    """Calibrate on the recipe's corpus, or on these texts (method.md section 2)."""
    section, model = recipe.mask, loaded.model
    parameters = eligible_parameters(model, section)
    if texts is None:
        batches = calibration_batches(section, loaded.tokenizer)
    else:
        batches = sequences(texts, section, loaded.tokenizer, fewer=True)
    passes = recipe.runtime.calibration_passes
    progress.start("Calibrating the mask", len(batches) * passes)
    calibration: Calibration = calibrate_scores(
        model, parameters, batches, section, passes == 1, progress.advance
    )
    mask = top_mask(calibration.scores, section, loaded.fingerprint)
    gradient = gradient_at(model, parameters, batches, mask, calibration, progress.advance)
    concentration = tiers(calibration.scores, mask.size)
    return replace(mask, gradient=gradient, concentration=concentration)
