"""Images: a classifier, some of whose own classes are the answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32
from torch import Tensor, nn

from meerkat.config import Recipe, Runtime, TaskSection
from meerkat.config.sections import SubspaceSection
from meerkat.data.images import EncodedImage, ImageEncoder
from meerkat.data.public_images import public_images
from meerkat.errors import RecipeError
from meerkat.models.image_loading import LoadedImageModel
from meerkat.models.image_objective import DrawnBatch, ImageObjective
from meerkat.models.loading import LoadedModel
from meerkat.runs.modalities.base import PublicSources
from meerkat.runs.public_texts import corpus_of
from meerkat.runs.written_texts import WRITTEN
from meerkat.spaces.mask_file import Mask
from meerkat.tasks import Example, Task
from meerkat.tasks.losses import TrainingLoss

__all__ = ["Images"]

_MASK, _SUBSPACE = 0, 1
"""What public images are drawn for."""


class Images:
    """The `Modality` of images."""

    def check(self, recipe: Recipe) -> None:
        mask, runtime, subspace = recipe.mask, recipe.runtime, recipe.subspace
        for field, given, usual in (
            ("mask.kind", mask.kind, mask.kind if mask.kind != "lora" else "sensitivity"),
            ("task.objective", recipe.task.objective.kind, "loss"),
            ("runtime.weights", runtime.weights, "stored"),
            ("runtime.compile", runtime.compile, False),
            ("runtime.recompute", runtime.recompute, False),
        ):
            if given != usual:
                raise RecipeError(
                    f"{field} = {given!r} is for language models, and task.name = "
                    f"{recipe.task.name!r} is a task over images; set it to {usual!r}"
                )
        if subspace is not None and subspace.corpus == WRITTEN:
            raise RecipeError(
                f"subspace.corpus = {WRITTEN!r} is for language models: a classifier makes no "
                "images; name image files or folders, or 'demo'"
            )

    def encoder(self, task: Task, section: TaskSection, loaded: LoadedModel) -> ImageEncoder:
        assert isinstance(loaded, LoadedImageModel)
        size = section.image_size or loaded.preparation.size
        return ImageEncoder(task, size, loaded.classes)

    def objective(
        self,
        loaded: LoadedModel,
        runtime: Runtime,
        recomputed: Sequence[nn.Module],
        trained: TrainingLoss,
    ) -> ImageObjective:
        assert isinstance(loaded, LoadedImageModel)
        return ImageObjective(loaded)

    def hasten(
        self, objective: ImageObjective, model: nn.Module, mask: Mask, runtime: Runtime
    ) -> None:
        """A pass is as it is."""

    def calibration_batches(
        self, sources: PublicSources, own: Sequence[Example] | None
    ) -> list[DrawnBatch]:
        """Images, with a number for each by which the network's class is drawn."""
        section, task = sources.recipe.mask, sources.task
        count = section.batches * section.batch_size
        if own is None:
            images = public_images(section, count, _MASK, "mask.corpus")
            own = _examples(task, images)
        size = min(section.batch_size, len(own))
        encoded = [sources.encoder.encode(e) for e in own[: min(count, len(own)) // size * size]]
        drawn = np.random.Generator(np.random.Philox(section.seed)).random(len(encoded))
        return [
            (encoded[first : first + size], drawn[first : first + size])
            for first in range(0, len(encoded), size)
        ]

    def public_examples(self, sources: PublicSources, section: SubspaceSection) -> list[Example]:
        of_corpus = corpus_of(sources, section).model_copy(update={"seed": section.seed})
        images = public_images(of_corpus, section.texts, _SUBSPACE, "subspace.corpus")
        return _examples(sources.task, images)

    def answer_scores(
        self, objective: ImageObjective, encoded: EncodedImage
    ) -> Float32[Tensor, " A"]:
        return objective.scores([encoded])[0]


def _examples(task: Task, images: Sequence[object]) -> list[Example]:
    return [Example({str(task.image): image}) for image in images]
