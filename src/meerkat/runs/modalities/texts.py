"""Texts: a causal language model, and answers that follow a prompt."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from jaxtyping import Float32
from torch import Tensor, nn

from meerkat.config import Recipe, Runtime, TaskSection
from meerkat.config.sections import SubspaceSection
from meerkat.data.chat_encoding import ChatEncoder
from meerkat.data.corpus import calibration_batches, sequences
from meerkat.data.encoders import encoder_of
from meerkat.data.encoding import Encoded, Encoder
from meerkat.data.packing import PackedBatch, pack
from meerkat.errors import DataError, ModelError
from meerkat.models.loading import LoadedModel, cache_dir
from meerkat.models.objective import TextObjective
from meerkat.models.prefix import KeptActivations
from meerkat.runs.modalities.base import PublicSources
from meerkat.runs.public_texts import public_examples
from meerkat.spaces.mask_criteria import still_blocks
from meerkat.spaces.mask_file import Mask
from meerkat.tasks import Example, Task
from meerkat.tasks.base import MESSAGES
from meerkat.tasks.losses import TrainingLoss

__all__ = ["Texts", "packed_scores"]

_MIB = 2**20

_logger = logging.getLogger(__name__)


class Texts:
    """The `Modality` of texts."""

    def check(self, recipe: Recipe) -> None:
        """All that a recipe can ask for is there."""

    def encoder(
        self, task: Task, section: TaskSection, loaded: LoadedModel
    ) -> Encoder | ChatEncoder:
        return encoder_of(task, loaded.tokenizer, section.max_length, loaded.window)

    def objective(
        self,
        loaded: LoadedModel,
        runtime: Runtime,
        recomputed: Sequence[nn.Module],
        trained: TrainingLoss,
    ) -> TextObjective:
        tokens, compiled = runtime.tokens_per_pass, runtime.compile
        return TextObjective(loaded, tokens, compiled, recomputed, trained)

    def hasten(
        self, objective: TextObjective, model: nn.Module, mask: Mask, runtime: Runtime
    ) -> None:
        """Keep activations below the mask, and take copies of a batch in one pass."""
        kept = KeptActivations(
            runtime.prefix_cache * _MIB, runtime.prefix_disk * _MIB, cache_dir(runtime)
        )
        try:
            objective.keep_prefix(still_blocks(model, mask.names), kept)
        except ModelError as error:  # it would only have been faster
            if kept.room:
                _logger.warning("%s to be rid of this line; all blocks are computed", error)
        layers = [model.get_submodule(name.rpartition(".")[0]) for name in mask.names]
        objective.allow_copies(runtime.tokens_together, layers)

    def calibration_batches(
        self, sources: PublicSources, own: Sequence[Example] | None
    ) -> Sequence[Tensor] | Tensor:
        section, tokenizer = sources.recipe.mask, sources.loaded.tokenizer
        if own is None:
            return calibration_batches(section, tokenizer)
        if sources.task.is_tokens:
            raise DataError("mask.kind = 'union' needs texts, and task.name = 'tokens' has none")
        texts = [_text_of(sources.task, example) for example in own]
        return sequences(texts, section, tokenizer, fewer=True)

    def public_examples(self, sources: PublicSources, section: SubspaceSection) -> list[Example]:
        return public_examples(sources, section)

    def answer_scores(self, objective: TextObjective, encoded: Encoded) -> Float32[Tensor, " A"]:
        return packed_scores(objective, pack([encoded]))[0]


def _text_of(task: Task, example: Example) -> str:
    """An example as text, without what a model is to answer."""
    if task.is_chat:
        return "\n".join(message["content"] for message in example.fields[MESSAGES])
    return task.prompt.format(**example.fields)


def packed_scores(objective: TextObjective, batch: PackedBatch) -> Float32[Tensor, "S A"]:
    """Score of each answer; a drawn answer's times √T, T its tokens.

    The loss of free text is a mean over T tokens, whose curvature is a T-th of the sum of theirs;
    that of a mean score would be a T²-th, since scores of drawn tokens do not depend on each other.
    """
    moved = batch.to(objective.device)
    with objective.with_graph():
        found = objective.scores(moved)
    if batch.answers == 1:
        return found * moved.answer.bincount(minlength=batch.examples).sqrt()[:, None]
    return found
