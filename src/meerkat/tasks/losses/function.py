"""A loss that is a Python function of the user's own, `module:function`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from meerkat.errors import RecipeError
from meerkat.tasks.functions import own_function
from meerkat.tasks.losses.base import Kind, Scored

__all__ = ["FunctionLoss"]


@dataclass(frozen=True)
class FunctionLoss:
    """function(scores, labels, **options): the loss of each example of a batch, or of the batch.

    It is given whole batches: scores, a float32 tensor (S, A), and labels, an int64 tensor (S), on
    the model's device. It returns S numbers or one: a tensor, an array or a list. For exact
    estimators it must return a tensor that follows from the scores by operations of torch.
    """

    path: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments by name, from the recipe."""

    of: ClassVar[Kind] = "any"
    is_joint: ClassVar[bool] = True
    is_smooth: ClassVar[bool] = True
    """It may be; where it is not, that shows at its first result."""
    compares: ClassVar[bool] = False

    def losses(self, batch: Scored) -> Any:
        """Raises:
        RecipeError: The function fails, or gives neither S numbers nor one.
        """
        function, examples = own_function(self.path, "task.objective"), len(batch.labels)
        try:
            found = function(batch.scores, batch.labels, **self.options)
            if not hasattr(found, "new_tensor"):
                found = batch.scores.new_tensor(found)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RecipeError(
                f"task.objective = {self.path!r} failed over {examples} examples: "
                f"{type(error).__name__}: {reason}"
            ) from error
        found = found.to(batch.scores)  # its device and type
        if found.ndim == 0:
            return found.expand(examples)
        if tuple(found.shape) != (examples,):
            raise RecipeError(
                f"task.objective = {self.path!r} gave numbers of shape {tuple(found.shape)} for "
                f"{examples} examples; it must return one an example, or one for the batch"
            )
        return found
