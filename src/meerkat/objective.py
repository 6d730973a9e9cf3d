"""Packed batch → one loss an example, looking only at the positions and rows that matter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float32, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from meerkat import attention
from meerkat.data.encoding import Encoded
from meerkat.data.packing import PackedBatch, pack, packs
from meerkat.errors import ModelError
from meerkat.models import LoadedModel

__all__ = ["Objective"]


class Objective:
    """The loss of a task (method.md section 3, Loss of a classification task).

    From here on the model attends with `attention.packed_attention`, which without a packed
    layout is transformers' own.

    Args:
        tokens_per_pass: Most tokens in one forward pass; a longer batch takes several.
        compiled: Compile the decoder, for any batch shape.

    Raises:
        ModelError: The architecture mixes sequences of a packed row, so it cannot be packed.
    """

    def __init__(self, loaded: LoadedModel, tokens_per_pass: int, compiled: bool = False):
        self.model = loaded.model
        self.device = next(self.model.parameters()).device
        self._tokens_per_pass = tokens_per_pass
        self._head = self.model.get_output_embeddings()
        if not isinstance(self._head, nn.Linear):
            raise ModelError(f"model.name = {loaded.name!r} has no linear LM head")
        _check_packing(self.model, loaded.name, self.device)
        if compiled:
            self.model.base_model.compile(dynamic=True)

    @torch.inference_mode()
    def loss(self, examples: Sequence[Encoded]) -> float:
        """f(θ; batch): the mean loss over the examples, at the weights as they are."""
        total = sum(
            float(self.losses(batch).sum(dtype=torch.float64))
            for batch in packs(examples, self._tokens_per_pass)
        )
        return total / len(examples)

    @torch.inference_mode()
    def predict(
        self, examples: Sequence[Encoded]
    ) -> tuple[Float32[Tensor, " S"], Int64[Tensor, " S"]]:
        """Loss of each example, and the answer with the highest score."""
        losses, best = [], []
        for batch in packs(examples, self._tokens_per_pass):
            moved = batch.to(self.device)
            scores = self.scores(moved)
            losses.append(_losses(scores, moved).cpu())
            best.append(scores.argmax(1).cpu())
        return torch.cat(losses), torch.cat(best)

    def losses(self, batch: PackedBatch) -> Float32[Tensor, " S"]:
        """Cross-entropy over the verbalizers, or the mean token loss of a free-text answer."""
        batch = batch.to(self.device)
        return _losses(self.scores(batch), batch)

    def scores(self, batch: PackedBatch) -> Float32[Tensor, "S A"]:
        """Score of each answer: the mean log-probability of its tokens.

        For one-token answers it is the logit: the vocabulary-wide normaliser is the same for all
        answers of an example and cancels in the cross-entropy, so only their rows of the LM head
        are multiplied.
        """
        if batch.candidates is not None:
            with self._rows(batch.candidates):
                return self._logits(batch)
        log_probabilities = self._logits(batch).log_softmax(1)
        chosen = log_probabilities.gather(1, batch.targets[:, None]).squeeze(1)
        flat = chosen.new_zeros(batch.examples * batch.answers)
        return flat.index_add(0, batch.answer, chosen * batch.weight).view(-1, batch.answers)

    def _logits(self, batch: PackedBatch) -> Float32[Tensor, "P rows"]:
        return packed_logits(self.model, batch)

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


def packed_logits(model: nn.Module, batch: PackedBatch) -> Float32[Tensor, "P rows"]:
    """Logits at the scored places of a packed batch, in one forward pass."""
    arguments: dict[str, Any] = {"packing": batch.layout, "logits_to_keep": batch.scored}
    output = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        # Any 4D mask is passed through as it is; the layout says who attends to whom.
        attention_mask=torch.ones((1, 1, 1, 1), dtype=torch.bool, device=batch.input_ids.device),
        use_cache=False,
        **arguments,
    )
    logits: Tensor = output.logits[0]
    if logits.shape[0] != batch.scored.shape[0]:  # the model knows no `logits_to_keep`
        logits = logits[batch.scored]
    return logits.float()


def _losses(scores: Float32[Tensor, "S A"], batch: PackedBatch) -> Float32[Tensor, " S"]:
    if batch.answers == 1:
        return -scores[:, 0]
    return cross_entropy(scores, batch.labels, reduction="none")


@torch.inference_mode()
def _check_packing(model: Any, name: str, device: torch.device) -> None:
    """Compare one packed sequence with the same alone under the model's own eager attention.

    All its positions: layers that mix in their neighbours, such as a short convolution, may leave
    the last logits nearly as they were.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = [tuple(range(first, min(first + 7, vocabulary))) for first in (3, 11)]
    batch = pack([Encoded(prompt, ((5,), (6,)), 0) for prompt in ids]).to(device)
    try:
        model.set_attn_implementation("eager")
        alone = model(input_ids=torch.tensor([ids[1]], device=device), use_cache=False).logits[0]
        model.set_attn_implementation(attention.NAME)
        second = torch.arange(len(ids[0]), batch.tokens, device=device)
        packed = packed_logits(model, replace(batch, scored=second))
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"model.name = {name!r} cannot be packed: {reason}") from None
    tolerance = 1e-3 if alone.dtype == torch.float32 else 5e-2
    error_share = (packed - alone.float()).norm() / alone.float().norm()
    if not error_share < tolerance:
        raise ModelError(
            f"model.name = {name!r} cannot be packed: its layers mix the sequences of a row "
            f"(logits differ by {float(error_share):.1%}); use a plain attention model"
        )
