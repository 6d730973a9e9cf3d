"""1 - the macro F1 of a batch, from expected counts or from counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from meerkat.tasks.losses.base import Kind, OfEach, Scored, check_temperature, choices, of_label

__all__ = ["MacroF1Loss"]


@dataclass(frozen=True)
class MacroF1Loss(OfEach):
    """1 - (1/C) Σ_c 2 r_c / (h_c + a_c) over the C classes of a task.

    Of a batch of S examples with p_i = softmax(scores_i / temperature), h_c hold class c, a_c = Σ
    p_ic answer it, and r_c is that sum over those that hold it. At temperature 0 these are counts,
    and it is 1 - the metric `macro_f1` of the batch. Example i, of class y, has the number

        1 - (S / C) 2 p_iy / (h_y + a_y)

    whose mean over the batch is the above. A class that no example of the batch holds counts 0.
    """

    temperature: float = 1.0

    of: ClassVar[Kind] = "classes"
    is_joint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    @property
    def is_smooth(self) -> bool:
        return self.temperature > 0

    def losses(self, batch: Scored) -> Any:
        chosen = choices(batch.scores, self.temperature)
        examples, classes = chosen.shape
        held = batch.labels.bincount(minlength=classes).to(chosen.dtype)
        # Of a class that is held, h is at least 1.
        share = 2 / (held + chosen.sum(0)).clamp(min=1)
        right = of_label(chosen, batch.labels)
        return 1 - examples / classes * share[batch.labels] * right
