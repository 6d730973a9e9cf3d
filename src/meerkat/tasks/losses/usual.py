"""The usual loss: cross-entropy over the answers, or the mean token loss of a free text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from meerkat.tasks.losses.base import Kind, OfEach, Scored, of_label

__all__ = ["UsualLoss"]


@dataclass(frozen=True)
class UsualLoss(OfEach):
    """- log softmax(scores)[label] (method.md section 3), or - score of the one answer.

    Of a pair it is - log σ(s_chosen - s_rejected), SimPO with β = 1 and no margin.
    """

    of: ClassVar[Kind] = "any"

    def losses(self, batch: Scored) -> Any:
        if batch.scores.shape[1] == 1:
            return -batch.scores[:, 0]
        return -of_label(batch.scores.log_softmax(1), batch.labels)
