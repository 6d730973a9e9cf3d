"""The interface of a modality: from examples to what a model takes, and its public data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float64
from torch import Tensor, nn

from meerkat.config import Recipe, Runtime, TaskSection
from meerkat.config.sections import SubspaceSection
from meerkat.models.loading import LoadedModel
from meerkat.models.prefix import Prefix
from meerkat.runs.public_texts import TextSources
from meerkat.spaces.mask_file import Mask
from meerkat.tasks import Example, Task
from meerkat.tasks.losses import TrainingLoss
from meerkat.tasks.objective import Predictions

__all__ = ["ExampleEncoder", "Modality", "ModelObjective", "PublicSources"]


class ExampleEncoder(Protocol):
    """Makes of a task's examples what its model takes."""

    max_length: int
    """Most tokens of an example; pixels of a side."""

    def encode(self, example: Example) -> Any:
        """One example."""


class ModelObjective(Protocol):
    """An objective with what masks and subspaces are found by (`tasks.objective`)."""

    @property
    def prefix(self) -> Prefix | None: ...

    def losses(self, examples: Sequence[Any]) -> Float64[np.ndarray, " S"]: ...

    def predict(self, examples: Sequence[Any]) -> Predictions: ...

    def losses_with_graph(self, examples: Sequence[Any]) -> Iterator[Tensor]: ...

    def usual_losses_with_graph(self, examples: Sequence[Any]) -> Iterator[Tensor]:
        """The same of the usual loss, whatever training makes small."""

    def scores_of(self, examples: Sequence[Any]) -> Float64[Tensor, "S A"]:
        """Score of each answer."""

    def pretraining_loss(self, batch: Any) -> Tensor:
        """The loss that a mask is calibrated by, with its graph."""


class PublicSources(TextSources, Protocol):
    """What public examples are found from; `assembly.Assembly`."""

    @property
    def encoder(self) -> ExampleEncoder: ...


class Modality(Protocol):
    """All that differs between texts and images in a run."""

    def check(self, recipe: Recipe) -> None:
        """Can it do what a recipe asks for?

        Raises:
            RecipeError: No.
        """

    def encoder(self, task: Task, section: TaskSection, loaded: LoadedModel) -> ExampleEncoder:
        """What encodes the examples of a task for it."""

    def objective(
        self,
        loaded: LoadedModel,
        runtime: Runtime,
        recomputed: Sequence[nn.Module],
        trained: TrainingLoss,
    ) -> ModelObjective:
        """The losses of the model, of which training makes `trained` small."""

    def hasten(self, objective: Any, model: nn.Module, mask: Mask, runtime: Runtime) -> None:
        """Let passes be faster where only masked weights move, with the same results."""

    def calibration_batches(
        self, sources: PublicSources, own: Sequence[Example] | None
    ) -> Sequence[Any] | Tensor:
        """Batches for `pretraining_loss`: of the recipe's corpus, or of these examples."""

    def public_examples(self, sources: PublicSources, section: SubspaceSection) -> list[Example]:
        """Unlabelled examples of a subspace's corpus."""

    def answer_scores(self, objective: Any, encoded: Any) -> Tensor:
        """Score of each answer (A,) of one encoded example, with its graph."""
