"""1 - the share of examples whose right answer is chosen, smoothed or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from meerkat.tasks.losses.base import Kind, OfEach, Scored, check_temperature, choices, of_label

__all__ = ["Inaccuracy"]


@dataclass(frozen=True)
class Inaccuracy(OfEach):
    """1 - softmax(scores / temperature)[label]: the expected share of wrong answers, were each
    drawn with these probabilities. At temperature 0 it is 0 or 1."""

    temperature: float = 1.0

    of: ClassVar[Kind] = "answers"

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    @property
    def is_smooth(self) -> bool:
        return self.temperature > 0

    def losses(self, batch: Scored) -> Any:
        return 1 - of_label(choices(batch.scores, self.temperature), batch.labels)
