"""Packed batch → one loss an example, looking only at the positions and rows that matter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.functional import linear

from meerkat.data.encoding import Encoded
from meerkat.data.packing import PackedBatch, pack, packs
from meerkat.errors import ModelError, RecipeError
from meerkat.models import attention
from meerkat.models.adapters import base_layers
from meerkat.models.loading import LoadedModel
from meerkat.models.packing_check import check_packing
from meerkat.models.prefix import KeptActivations, Prefix
from meerkat.models.recomputing import recomputed
from meerkat.tasks.losses import Scored, TrainingLoss, UsualLoss
from meerkat.tasks.objective import Predictions

__all__ = ["TextObjective"]


_LOGITS_PER_PASS = 2**26
"""Most float32 logits over the whole vocabulary in one pass: 256 MiB, twice for the softmax."""


_PREDICTED_PER_PASS = 1024
"""Most tokens in one pass of an evaluation: more make it no faster (docs/results/speed.md)."""


_USUAL = UsualLoss()


class TextObjective:
    """The `Objective` of a task over text (method.md section 3, Loss of a classification task).

    From here on the model attends with `attention.packed_attention`, which without a packed
    layout is transformers' own.

    Args:
        tokens_per_pass: Most tokens in one forward pass; a longer batch takes several.
        compiled: Compile the decoder, for any batch shape.
        recomputed: Decoder blocks whose activations are not kept for a backward pass.
        loss: What training makes small; evaluations report the usual loss.

    Raises:
        ModelError: The architecture mixes sequences of a packed row, so it cannot be packed.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        tokens_per_pass: int,
        compiled: bool = False,
        recomputed: Sequence[nn.Module] = (),
        loss: TrainingLoss = _USUAL,
    ):
        self.model = loaded.model
        self._loss = loss
        self._reference: dict[Encoded, Tensor] = {}
        """Scores at the weights as they were loaded, of examples that a loss compares."""
        self._recomputed = recomputed
        self._name = loaded.name
        self.prefix: Prefix | None = None
        """What is not computed in each pass; see `keep_prefix`."""
        self.device = next(self.model.parameters()).device
        self._tokens_per_pass = tokens_per_pass
        self._compiled = compiled
        self._tokens_together = 0
        self._head = self.model.get_output_embeddings()
        if not isinstance(self._head, nn.Linear):
            raise ModelError(f"model.name = {loaded.name!r} has no linear LM head")
        self._scored_per_pass = max(1, _LOGITS_PER_PASS // self._head.out_features)
        with base_layers(self.model):  # the check builds the architecture anew, without adapters
            check_packing(self.model, loaded.name, self.device)
        if compiled:
            self.model.base_model.compile(dynamic=True)

    def keep_prefix(self, blocks: Sequence[nn.Module], kept: KeptActivations) -> None:
        """From here on these first decoder blocks, which must never change, run once a batch.

        Where nothing can be kept they run in each pass, but once for all copies of a batch in it.

        Raises:
            ModelError: The model does more between its blocks than to hand activations on.
        """
        self.prefix = Prefix(self.model, self._name, blocks, kept) if blocks else None

    def allow_copies(self, tokens: int, layers: Sequence[nn.Module]) -> None:
        """From here on a pass may take copies of a batch, up to so many tokens.

        Not where it is compiled, and not where one of the layers, which are those that an overlay
        changes, does not see all tokens of a pass in one call: some architectures send each token
        to some of their layers only.
        """
        self._tokens_together = 0
        if self._compiled or not tokens:
            return
        seen: list[int] = []

        def see(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen.append(arguments[0].shape[:-1].numel() if arguments else 0)

        handles = [layer.register_forward_pre_hook(see) for layer in layers]
        batch = pack([Encoded(tuple(range(3, 10)), ((5,), (6,)), 0)] * 2)
        try:
            with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
                attention.packed_logits(self.model, batch.to(self.device))
        finally:
            for handle in handles:
                handle.remove()
        if seen == [batch.tokens] * len(layers):
            self._tokens_together = tokens

    def copies_per_pass(self, examples: Sequence[Encoded]) -> int:
        """How many copies of a batch may go through one pass; 1 where that is no use."""
        budget = min(self._tokens_together, self._tokens_per_pass)
        batches = list(self.packs(examples)) if budget else []
        if len(batches) != 1:
            return 1
        most = budget // batches[0].tokens
        if batches[0].candidates is None:
            most = min(most, self._scored_per_pass // len(batches[0].targets))
        return max(1, most)

    @torch.inference_mode()
    def losses_of_copies(
        self, examples: Sequence[Encoded], copies: int
    ) -> Float64[np.ndarray, "copies S"]:
        """The losses of so many copies of a batch, in one pass with a run of tokens for each.

        What never changes in the model is computed for one of them.
        """
        batch = pack([*examples] * copies).to(self.device)
        single = None if self.prefix is None else pack(examples).to(self.device)
        scores = self.scores(batch, single)
        if not self._loss.is_joint:
            found = self._losses(scores, [*examples] * copies)
            return found.cpu().double().numpy().reshape(copies, len(examples))
        each = [self._losses(part, examples) for part in scores.chunk(copies)]
        return torch.stack(each).cpu().double().numpy()

    @torch.inference_mode()
    def losses(self, examples: Sequence[Encoded]) -> Float64[np.ndarray, " S"]:
        """The training loss of each example at the weights as they are.

        Usually cross-entropy over the verbalizers, or the mean token loss of a free-text answer.
        """
        parts = self._parts(examples)
        found = [self._losses(self._scores(batches), some).cpu() for batches, some in parts]
        return torch.cat(found).double().numpy()

    def losses_with_graph(self, examples: Sequence[Encoded]) -> Iterator[Float32[Tensor, " s"]]:
        """The training losses of the examples of each packed batch, in their order.

        They are computed one by one; where they depend on each other, all at once.

        Raises:
            RecipeError: They have no derivative.
        """
        for batches, some in self._parts(examples):
            with self.with_graph():
                scores = self._scores(batches)
                losses = self._losses(scores, some)
            if _lost_its_graph(losses, scores):
                raise RecipeError(
                    "task.objective gives losses without a derivative, which an exact estimator "
                    "needs; compute them from the scores by operations of torch, or set "
                    "optimizer.estimator = 'two-point'"
                )
            yield losses

    def usual_losses_with_graph(
        self, examples: Sequence[Encoded]
    ) -> Iterator[Float32[Tensor, " s"]]:
        """The usual losses of the examples of each packed batch, computed one by one."""
        for batch in self.packs(examples):
            with self.with_graph():
                losses = self.batch_losses(batch)
            yield losses

    def _parts(
        self, examples: Sequence[Encoded]
    ) -> Iterator[tuple[list[PackedBatch], Sequence[Encoded]]]:
        """Packed batches that the training loss is given at a time, and their examples."""
        batches = self.packs(examples)
        if self._loss.is_joint:
            yield list(batches), examples
            return
        begin = 0
        for batch in batches:
            yield [batch], examples[begin : begin + batch.examples]
            begin += batch.examples

    def _scores(self, batches: Sequence[PackedBatch]) -> Float32[Tensor, "S A"]:
        return torch.cat([self.scores(batch.to(self.device)) for batch in batches])

    def _losses(
        self, scores: Float32[Tensor, "S A"], examples: Sequence[Encoded]
    ) -> Float32[Tensor, " S"]:
        """The training loss of each example, by its scores."""
        labels = torch.tensor([example.label for example in examples], device=scores.device)
        lengths = reference = None
        if self._loss.compares:
            reference = torch.stack([self._reference[e] for e in examples])
            lengths = scores.new_tensor([[len(a) for a in e.answers] for e in examples])
        found: Tensor = self._loss.losses(Scored(scores, labels, lengths, reference))
        return found

    def unreferred(self, examples: Sequence[Encoded]) -> list[Encoded]:
        """Those that losses cannot be had of until `refer` has seen them."""
        if not self._loss.compares:
            return []
        return [e for e in dict.fromkeys(examples) if e not in self._reference]

    @torch.inference_mode()
    def refer(self, examples: Sequence[Encoded]) -> None:
        """Keep the scores of these examples at the weights as they are, those that were loaded.

        One pass an example: what else is asked for with it has no part in the last bits.
        """
        for example in examples:
            self._reference[example] = self.scores(pack([example]).to(self.device))[0]

    @contextmanager
    def with_graph(self) -> Iterator[None]:
        """Passes in here are for a backward pass, where gradients are enabled."""
        kept = 0 if self.prefix is None else self.prefix.depth
        with torch.compiler.set_stance("force_eager"), recomputed(self._recomputed[kept:]):
            yield

    @torch.inference_mode()
    def predict(self, examples: Sequence[Encoded]) -> Predictions:
        """Losses, and the answer with the highest score of each example."""
        losses, best, scored = [], [], []
        for batch in self.packs(examples, min(self._tokens_per_pass, _PREDICTED_PER_PASS)):
            moved = batch.to(self.device)
            scores = self.scores(moved)
            losses.append(_usual_losses(scores, moved).cpu())
            best.append(scores.argmax(1).cpu())
            scored.append(scores.cpu())
        labels = torch.tensor([example.label for example in examples])
        return Predictions(
            losses=torch.cat(losses).double().numpy(),
            labels=labels.numpy(),
            predicted=torch.cat(best).numpy(),
            classes=len(examples[0].answers),
            margins=_margins(torch.cat(scored), labels),
        )

    @torch.inference_mode()
    def scores_of(self, examples: Sequence[Encoded]) -> Float64[Tensor, "S A"]:
        """Score of each answer of any number of examples, at the weights as they are."""
        found = [self.scores(batch.to(self.device)) for batch in self.packs(examples)]
        return torch.cat(found).double()

    def pretraining_loss(self, batch: Int64[Tensor, "S L"]) -> Float32[Tensor, ""]:
        """The loss that the mask is calibrated by, with its graph: next-token cross-entropy."""
        ids = batch.to(self.device)
        with self.with_graph():
            loss: Tensor = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss.float()

    def batch_losses(self, batch: PackedBatch) -> Float32[Tensor, " S"]:
        """The usual loss of each example of a packed batch, on the model's device."""
        batch = batch.to(self.device)
        return _usual_losses(self.scores(batch), batch)

    def packs(
        self, examples: Sequence[Encoded], tokens: int | None = None
    ) -> Iterator[PackedBatch]:
        """Examples as batches of one pass each, in order, by what a pass may hold.

        Args:
            tokens: Most tokens of a pass, instead of `tokens_per_pass`.
        """
        first = examples[0].answers
        one_token = all(len(a) == 1 for a in first) and all(e.answers == first for e in examples)
        free = one_token and len(examples[0].answers) > 1  # only the answers' rows are multiplied
        budget = self._tokens_per_pass if tokens is None else tokens
        return packs(examples, budget, None if free else self._scored_per_pass)

    def scores(
        self, batch: PackedBatch, single: PackedBatch | None = None
    ) -> Float32[Tensor, "S A"]:
        """Score of each answer: the mean log-probability of its tokens.

        For one-token answers it is the logit: the vocabulary-wide normaliser is the same for all
        answers of an example and cancels in the cross-entropy, so only their rows of the LM head
        are multiplied.

        Args:
            single: What the batch is copies of; itself by default.
        """
        single = batch if single is None else single
        if batch.candidates is not None:
            with self._rows(batch.candidates):
                return self._logits(batch, single)
        log_probabilities = self._logits(batch, single).log_softmax(1)
        chosen = log_probabilities.gather(1, batch.targets[:, None]).squeeze(1)
        flat = chosen.new_zeros(batch.examples * batch.answers)
        return flat.index_add(0, batch.answer, chosen * batch.weight).view(-1, batch.answers)

    def _logits(self, batch: PackedBatch, single: PackedBatch) -> Float32[Tensor, "P rows"]:
        copies = batch.tokens // single.tokens
        if self.prefix is None or (copies == 1 and not self.prefix.kept.room):
            return attention.packed_logits(self.model, batch)
        with self.prefix.skipped(single, copies):
            return attention.packed_logits(self.model, batch)

    @contextmanager
    def _rows(self, rows: Int64[Tensor, " A"]) -> Iterator[None]:
        """Let the LM head multiply these rows only; what the model does to logits still applies."""
        head = self._head

        def forward(hidden: Tensor) -> Tensor:
            bias = None if head.bias is None else head.bias[rows]
            return linear(hidden, head.weight[rows], bias)

        head.forward = forward
        try:
            yield
        finally:
            del head.forward


def _usual_losses(scores: Float32[Tensor, "S A"], batch: PackedBatch) -> Float32[Tensor, " S"]:
    found: Tensor = _USUAL.losses(Scored(scores, batch.labels))
    return found


def _margins(
    scores: Float32[Tensor, "S A"], labels: Int64[Tensor, " S"]
) -> Float64[np.ndarray, " S"] | None:
    if scores.shape[1] == 1:
        return None
    right = scores.gather(1, labels[:, None])[:, 0]
    others = scores.scatter(1, labels[:, None], -torch.inf).amax(1)
    return (right.double() - others.double()).numpy()


def _lost_its_graph(losses: Tensor, scores: Tensor) -> bool:
    """Can the scores be differentiated, backward or forward, and the losses not?"""
    if scores.requires_grad and not losses.requires_grad:
        return True
    tangents = [forward_ad.unpack_dual(value).tangent for value in (scores, losses)]
    return tangents[0] is not None and tangents[1] is None
