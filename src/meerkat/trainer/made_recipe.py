"""The recipe of a Trainer: from its arguments, its model and its rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
from transformers import PreTrainedModel

from meerkat.config import Recipe
from meerkat.errors import DataError, ModelError
from meerkat.trainer.arguments import TrainingArguments
from meerkat.trainer.checks import check_recipe
from meerkat.trainer.rows import holds_tokens

__all__ = ["DATA", "name_of", "recipe_for"]

DATA = "data"
"""The folder of the rows, in `output_dir`."""
_IN_MEMORY = "in-memory"


def recipe_for(
    args: TrainingArguments,
    model: PreTrainedModel | str,
    rows: Mapping[str, datasets.Dataset],
    task: Mapping[str, Any] | None,
) -> Recipe:
    """What `meerkat run` would be given for the same run.

    Args:
        rows: By split, `train` and `test`; one may be missing.
        task: Fields of `[task]`, of texts.

    Raises:
        MeerkatError: An argument, the model or the kind of rows is not usable.
    """
    data: dict[str, Any] = {"task": _task(args, rows, task)}
    if "test" in rows:
        data["evaluation"] = {"examples": len(rows["test"])}
    in_memory: dict[str, str] = {}
    if isinstance(model, str):
        data["model"] = {"name": model}
    else:
        data["model"] = in_memory = _model(model)
        data["runtime"] = {"compute": "stored"}
    recipe = args.recipe(data, len(rows.get("train", ())) or 1)
    check_recipe(recipe, in_memory)
    return recipe


def name_of(model: PreTrainedModel) -> str:
    """Where a model came from, as far as it says so."""
    return getattr(model.config, "name_or_path", "") or _IN_MEMORY


def _task(
    args: TrainingArguments, rows: Mapping[str, datasets.Dataset], task: Mapping[str, Any] | None
) -> dict[str, Any]:
    if task is None and not all(map(holds_tokens, rows.values())):
        columns = ", ".join(next(iter(rows.values())).column_names)
        raise DataError(
            f"rows of texts ({columns}) need a task: task={{'prompt': …, 'label': …, "
            "'verbalizers': …}, or tokenise them to input_ids and labels"
        )
    places = {"source": str(args.directory / DATA), "train_split": "train"}
    if "test" in rows:
        places["test_split"] = "test"
    return {"name": "tokens" if task is None else "custom", **(task or {}), **places}


def _model(model: PreTrainedModel) -> dict[str, str]:
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype not in ("float32", "bfloat16"):
        raise ModelError(f"the model is in {dtype}; load it in float32 or bfloat16")
    return {"name": name_of(model), "dtype": dtype}
