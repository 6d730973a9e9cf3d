"""What `compute_metrics` and `predict` get: predictions and labels of examples, as arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction, PreTrainedModel

from meerkat.data.encoding import Encoded
from meerkat.data.token_rows import UNSCORED
from meerkat.models.objective import TextObjective

__all__ = ["Reduce", "predictions_of"]

Reduce = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits, labels) of a batch → what is kept of the logits, with the same first two axes."""

_BATCH = 8


def predictions_of(
    objective: TextObjective, examples: Sequence[Encoded], reduce: Reduce | None
) -> EvalPrediction:
    """Predictions and labels, at the weights as they are.

    With answers to choose from `predictions` (S, A) are their scores, `label_ids` (S,) the labels.
    Else `predictions` (S, L) are the likeliest tokens, or what `reduce` makes of the
    logits, and `label_ids` (S, L) the tokens, -100 where none is scored; as in transformers a
    prediction at a place is that of the next token.
    """
    if len(examples[0].answers) > 1:
        scores = objective.scores_of(examples).float().cpu().numpy()
        return EvalPrediction(scores, np.array([example.label for example in examples]))
    reduce = _likeliest if reduce is None else reduce
    found: list[np.ndarray[Any, Any]] = []
    labels: list[np.ndarray[Any, Any]] = []
    for begin in range(0, len(examples), _BATCH):
        some, given = _pass(objective.model, examples[begin : begin + _BATCH], reduce)
        found.append(some)
        labels.append(given)
    return EvalPrediction(_stacked(found, UNSCORED), _stacked(labels, UNSCORED))


def _likeliest(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


@torch.inference_mode()
def _pass(
    model: PreTrainedModel, examples: Sequence[Encoded], reduce: Reduce
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rows = [(*example.prompt, *example.answers[0]) for example in examples]
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, UNSCORED)
    for number, (row, example) in enumerate(zip(rows, examples, strict=True)):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
        labels[number, len(example.prompt) : len(row)] = torch.tensor(example.answers[0])
    device = next(model.parameters()).device
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    kept = reduce(logits.float(), labels.to(device)).cpu().numpy()
    return kept, labels.numpy()


def _stacked(parts: Sequence[np.ndarray[Any, Any]], fill: int) -> np.ndarray[Any, Any]:
    """Batches one after the other, their second axis padded to the longest."""
    longest = max(part.shape[1] for part in parts)
    rest = [(0, 0)] * (parts[0].ndim - 2)
    return np.concatenate(
        [
            np.pad(part, [(0, 0), (0, longest - part.shape[1]), *rest], constant_values=fill)
            for part in parts
        ]
    )
