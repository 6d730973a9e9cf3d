"""How good the model is on examples that no client trains on."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor

from meerkat.data.encoding import Encoded
from meerkat.objective import Objective
from meerkat.progress import Progress
from meerkat.records import Evaluated

__all__ = ["evaluate_objective", "macro_f1"]


def evaluate_objective(
    objective: Objective,
    examples: Sequence[Encoded],
    batch_size: int,
    round: int = 0,
    progress: Progress | None = None,
) -> Evaluated:
    """Accuracy, macro-F1 and mean loss at the weights as they are; for free text the loss alone."""
    progress = progress or Progress()
    started = time.monotonic()
    progress.start("Evaluating", -(-len(examples) // batch_size))
    losses, predicted = [], []
    for begin in range(0, len(examples), batch_size):
        loss, best = objective.predict(examples[begin : begin + batch_size])
        losses.append(loss)
        predicted.append(best)
        progress.advance()
    labels = torch.tensor([example.label for example in examples])
    guesses = torch.cat(predicted)
    classes = len(examples[0].answers)
    return Evaluated(
        round=round,
        accuracy=float((guesses == labels).double().mean()) if classes > 1 else None,
        macro_f1=macro_f1(guesses, labels, classes) if classes > 1 else None,
        loss=float(torch.cat(losses).double().mean()),
        examples=len(examples),
        seconds=time.monotonic() - started,
    )


def macro_f1(predicted: Int64[Tensor, " N"], labels: Int64[Tensor, " N"], classes: int) -> float:
    """Unweighted mean of the classes' F1; a class that is neither there nor predicted counts 0.

    >>> macro_f1(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1]), 2)
    0.7333333333333334
    """
    scores = []
    for label in range(classes):
        hits = int(((predicted == label) & (labels == label)).sum())
        both = int((predicted == label).sum()) + int((labels == label).sum())
        scores.append(2 * hits / both if both else 0.0)
    return sum(scores) / classes
