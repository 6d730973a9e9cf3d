"""A recipe → model, mask, examples, and the partition of the examples over clients."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from meerkat.algorithms import make_algorithm
from meerkat.config import MaskSection, Recipe
from meerkat.data.chat_encoding import ChatEncoder
from meerkat.data.clients import (
    client_holders,
    client_label_counts,
    load_partition,
    validation_examples,
)
from meerkat.data.sources import Split, load_folder
from meerkat.errors import MaskError, ModelError
from meerkat.federation.algorithm import Algorithm
from meerkat.federation.client import Client, Worker
from meerkat.journal.records import Header, header_of
from meerkat.models.adapters import adapt, linear_weights, require_peft
from meerkat.models.generation import writer
from meerkat.models.image_loading import load_image_model
from meerkat.models.loading import LoadedModel, cache_dir, load_model
from meerkat.models.quantised import quantise
from meerkat.progress import Progress
from meerkat.runs.evaluation import Write
from meerkat.runs.finding_mask import FoundMask, check_factors, find_mask
from meerkat.runs.finding_subspace import find_subspace
from meerkat.runs.modalities import ExampleEncoder, Modality, ModelObjective, modality_of
from meerkat.spaces.device_noise import place_on, stream_on
from meerkat.spaces.linear import space_of
from meerkat.spaces.mask_criteria import decoder_blocks, eligible_parameters
from meerkat.spaces.masked import MaskedSpace
from meerkat.spaces.subspace import check_subspace
from meerkat.tasks import Example, Task, resolve_task
from meerkat.tasks.losses import TrainingLoss, training_loss
from meerkat.tasks.metrics import Metric, metrics_of, prepare
from meerkat.zo.noise import permutation

__all__ = [
    "Assembly",
    "EncodedExamples",
    "FoundMask",
    "adapt_model",
    "assemble",
    "load_for",
    "writer_of",
]


class EncodedExamples(Sequence[Any]):
    """Examples that are encoded when they are first read."""

    def __init__(self, examples: Sequence[Example], encoder: ExampleEncoder):
        self._examples = examples
        self._encoder = encoder
        self._encoded: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index not in self._encoded:
            self._encoded[index] = self._encoder.encode(self._examples[index])
        return self._encoded[index]


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
    mask_file: Path | None = None
    """Mask file that replaces the recipe's `mask` section."""

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """The metrics of an evaluation by name."""
        wanted, task = self.recipe.evaluation.metrics, self.task
        return metrics_of(wanted, task.has_classes, task.has_pairs)

    @property
    def write(self) -> Write:
        """What the model writes in the place of examples' answers, at the weights as they are."""
        return writer_of(self.recipe, self.task, self.loaded)

    @property
    def modality(self) -> Modality:
        """What the examples are."""
        return modality_of(self.task)

    @cached_property
    def training_loss(self) -> TrainingLoss:
        """What training makes small."""
        return training_loss(self.recipe, self.task)

    @cached_property
    def encoder(self) -> ExampleEncoder:
        return self.modality.encoder(self.task, self.recipe.task, self.loaded)

    @cached_property
    def configuration(self) -> str:
        """SHA-256 of what else than weights decides on scores: that of the model, with the template
        where examples are conversations."""
        known = self.loaded.configuration
        if not isinstance(self.encoder, ChatEncoder):
            return known
        return hashlib.sha256(f"{known} {self.encoder.template.text}".encode()).hexdigest()

    @cached_property
    def test(self) -> EncodedExamples:
        """The held-out examples that are evaluated on."""
        return EncodedExamples(self.split.test[: self.recipe.evaluation.examples], self.encoder)

    @cached_property
    def validation(self) -> EncodedExamples:
        """Held-out examples to choose a round by; none of them is in `test`."""
        return EncodedExamples(validation_examples(self.recipe, self.split), self.encoder)

    @cached_property
    def algorithm(self) -> Algorithm:
        return make_algorithm(self.recipe, self.found_mask.mask.dimensions)

    @cached_property
    def checked_mask(self) -> FoundMask:
        """The mask, found for this model as it was loaded, with or without a subspace."""
        found, loaded = find_mask(self), self.loaded
        initial = MaskedSpace(loaded.model, found.mask).read()
        check_factors(found.mask, initial, found.path)
        known = self.configuration
        mask = replace(found.mask, initial=initial, configuration=known, probe=loaded.probe)
        return replace(found, mask=mask)

    @cached_property
    def found_mask(self) -> FoundMask:
        """The mask with the subspace that the recipe asks for."""
        found, section = self.checked_mask, self.recipe.subspace
        if section is not None and found.mask.subspace is None:
            found = find_subspace(self, found.mask, section)
        check_subspace(found.mask.subspace, section, self.task)
        return found

    @cached_property
    def objective(self) -> ModelObjective:
        runtime = self.recipe.runtime
        if runtime.compile:
            # Compiled code outlives the process. torch has set a folder of its own by now.
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_dir(runtime, "compiled"))
        blocks = self._blocks if runtime.recompute else []
        return self.modality.objective(self.loaded, runtime, blocks, self.training_loss)

    @property
    def _blocks(self) -> list[nn.Module]:
        try:
            return list(decoder_blocks(self.loaded.model)[1])
        except MaskError:
            raise ModelError(
                f"runtime.recompute = true needs decoder blocks, and model.name = "
                f"{self.loaded.name!r} has no list of them; set it to false"
            ) from None

    def quantise(self) -> None:
        """From here on all but the masked weights have the bits of `runtime.weights`."""
        weights = self.recipe.runtime.weights
        if weights != "stored":
            mask = self.checked_mask.mask
            moving = dict(zip(mask.names, mask.indices, strict=True))
            quantise(self.loaded.model, 8 if weights == "int8" else 4, moving)

    def worker(self) -> Worker:
        """The model as a worker, at the initial θ."""
        self.quantise()
        model, mask, runtime = self.loaded.model, self.found_mask.mask, self.recipe.runtime
        self.modality.hasten(self.objective, model, mask, runtime)
        device, space = self.theta_device, space_of(model, mask, self.theta_device)
        if device is None or mask.subspace is not None:  # w is a few values, which stay here
            return Worker(space, self.objective, self.algorithm)
        stream = stream_on(device, self.algorithm.stream)
        algorithm = self.algorithm.with_stream(stream)
        return Worker(space, self.objective, algorithm, partial(place_on, device))

    @property
    def theta_device(self) -> torch.device | None:
        """Where θ is kept by a client, if not in the CPU's memory."""
        on_device = self.recipe.runtime.theta == "device"
        return next(self.loaded.model.parameters()).device if on_device else None

    def client(self, number: int, part: int | None = None) -> Client:
        """A client with its data.

        Args:
            part: Which part of the data it holds; that of its number by default.
        """
        held = self.parts[number if part is None else part]
        examples = EncodedExamples([self.split.train[i] for i in held], self.encoder)
        return Client(number, examples, self.recipe.federation.batch_size, self.recipe.seed)

    def clients(self) -> list[Client]:
        """All clients with their data."""
        return [self.client(number) for number in range(len(self.parts))]

    def header(self) -> Header:
        """What the journal of this run starts with."""
        counts, digest = client_label_counts(self.task, self.split, self.parts)
        labels = self.task.verbalizers
        return header_of(self.recipe, self.found_mask.mask, tuple(labels), counts, digest)

    def holders(self) -> list[list[str]]:
        """Who holds the rows of each client, in a natural partition."""
        return client_holders(self.recipe, self.split, self.parts)

    def client_examples(self) -> list[list[Example]]:
        """Each client's own examples, for the union mask."""
        return [[self.split.train[i] for i in part] for part in self.parts]

    def example_batches(self) -> list[list[Any]]:
        """Labelled examples of all clients in batches, for the task mask.

        They are drawn without repetition by `mask.seed`, so there are fewer batches where the
        clients hold fewer examples.
        """
        section, held = self.recipe.mask, sorted(i for part in self.parts for i in part)
        size = min(section.batch_size, len(held))
        count = min(section.batches, len(held) // size)
        order = permutation(section.seed, (2, 2), len(held))[: count * size]
        examples = EncodedExamples([self.split.train[held[place]] for place in order], self.encoder)
        return [examples[first : first + size] for first in range(0, count * size, size)]


def assemble(
    recipe: Recipe,
    progress: Progress | None = None,
    data: Path | None = None,
    mask_file: Path | None = None,
    loaded: LoadedModel | None = None,
) -> Assembly:
    """Load data and model; the mask is found when it is first asked for.

    Args:
        data: The folder of the one client that is here, instead of what the recipe names.
        mask_file: A mask to use, whatever the recipe says.
        loaded: The model, where it is in memory already.

    Raises:
        MeerkatError: Something that the recipe names is missing or does not fit.
    """
    progress = progress or Progress()
    if recipe.runtime.threads:
        torch.set_num_threads(recipe.runtime.threads)
    make_algorithm(recipe, 1)  # what is wrong with its choices shows before anything is loaded
    if recipe.mask.kind == "lora":
        require_peft()
    # Data first: what is wrong with them shows in seconds, a model may take a minute.
    task = resolve_task(recipe.task)
    modality_of(task).check(recipe)
    if data is None:
        split, parts = load_partition(recipe, task)
    else:
        split = load_folder(task, data)
        parts = (tuple(range(len(split.train))),)
    progress.start("Loading the model", 1)
    loaded = load_for(recipe, task) if loaded is None else loaded
    if recipe.mask.kind == "lora":
        adapt_model(loaded, recipe.mask)
    assembly = Assembly(recipe, loaded, task, split, parts, progress, mask_file)
    prepare(assembly.metrics)
    encoder = assembly.encoder  # the verbalizers are checked here, before a long calibration
    if isinstance(encoder, ChatEncoder):
        encoder.check([*split.train, *split.test, *split.validation])
    progress.advance()
    return assembly


def writer_of(recipe: Recipe, task: Task, loaded: LoadedModel) -> Write:
    """What a model writes in the place of examples' answers, as a recipe has it evaluated."""
    evaluation = recipe.evaluation
    stop = evaluation.stop
    if stop is None:
        stop = () if task.is_chat else ("\n",)
    return writer(loaded, evaluation.max_new_tokens, recipe.runtime.tokens_per_pass, stop)


def load_for(recipe: Recipe, task: Task) -> LoadedModel:
    """The model of a recipe: a language model, or a classifier of images.

    Raises:
        ModelError: There is no such model, or it is of the other kind.
    """
    if task.image is None:
        return load_model(recipe.model, recipe.runtime)
    return load_image_model(recipe.model, recipe.runtime)


def adapt_model(loaded: LoadedModel, section: MaskSection) -> None:
    """Put LoRA factors into a model; its fingerprint and probe stay those of the base model.

    Here, from the recipe alone, so that whoever has it draws the same factors: an engine's
    process, each client of a deployment, and what evaluates a run.

    Raises:
        MaskError: The weights that the recipe names cannot have factors of this rank.
    """
    chosen = list(eligible_parameters(loaded.model, section))
    weights = linear_weights(loaded.model, chosen, named=bool(section.include))
    adapt(loaded.model, weights, section.lora_rank, section.lora_alpha, section.seed)
