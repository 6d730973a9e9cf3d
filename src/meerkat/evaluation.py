"""How good the model is on examples that no client trains on."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from meerkat.data.encoding import Encoded
from meerkat.objective import Objective
from meerkat.progress import Progress
from meerkat.records import Evaluated

__all__ = ["evaluate_objective", "evaluation_sums", "macro_f1"]


def evaluate_objective(
    objective: Objective,
    examples: Sequence[Encoded],
    batch_size: int,
    round: int = 0,
    progress: Progress | None = None,
) -> Evaluated:
    """Accuracy, macro-F1 and mean loss at the weights as they are; for free text the loss alone."""
    started = time.monotonic()
    losses, guesses, labels, classes = _predict(objective, examples, batch_size, progress)
    return Evaluated(
        round=round,
        accuracy=float((guesses == labels).double().mean()) if classes > 1 else None,
        macro_f1=macro_f1(guesses, labels, classes) if classes > 1 else None,
        loss=float(losses.double().mean()),
        examples=len(examples),
        seconds=time.monotonic() - started,
    )


def evaluation_sums(
    objective: Objective, examples: Sequence[Encoded], batch_size: int
) -> tuple[float, tuple[tuple[int, ...], ...]]:
    """Summed loss and [label][prediction] counts, which a client may send and a server add up."""
    losses, guesses, labels, classes = _predict(objective, examples, batch_size)
    if classes == 1:
        return float(losses.double().sum()), ()
    counts = torch.bincount(labels * classes + guesses, minlength=classes**2)
    rows = counts.reshape(classes, classes).tolist()
    return float(losses.double().sum()), tuple(map(tuple, rows))


def _predict(
    objective: Objective,
    examples: Sequence[Encoded],
    batch_size: int,
    progress: Progress | None = None,
) -> tuple[Float[Tensor, " N"], Int64[Tensor, " N"], Int64[Tensor, " N"], int]:
    """Losses, predictions and labels of the examples, and how many classes there are."""
    progress = progress or Progress()
    progress.start("Evaluating", -(-len(examples) // batch_size))
    losses, predicted = [], []
    for begin in range(0, len(examples), batch_size):
        loss, best = objective.predict(examples[begin : begin + batch_size])
        losses.append(loss)
        predicted.append(best)
        progress.advance()
    labels = torch.tensor([example.label for example in examples])
    return torch.cat(losses), torch.cat(predicted).cpu(), labels, len(examples[0].answers)


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
