"""Evaluation of a run, or any model, by lm-evaluation-harness (extra `harness`)."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from meerkat.config import ModelSection, Recipe, Runtime
from meerkat.errors import RunError
from meerkat.extras import needed_extra
from meerkat.journal import replay
from meerkat.models.loading import LoadedModel, load_model
from meerkat.runs.assembly import adapt_model
from meerkat.runs.best_round import Rounds, wanted_rounds
from meerkat.runs.directory import mask_of, open_journal, recipe_of
from meerkat.spaces.linear import space_of

__all__ = ["figures_of", "harness_results", "model_of", "run_model"]

_KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
"""What of the harness's answer is figures."""


def model_of(name: str, recipe: Recipe | None) -> LoadedModel:
    """A model by its name, loaded as the recipe says, if there is one.

    Raises:
        ModelError: There is no such model.
    """
    if recipe is None:
        return load_model(ModelSection(name=name), Runtime())
    return load_model(recipe.model.model_copy(update={"name": name}), recipe.runtime)


@contextmanager
def run_model(directory: Path, rounds: Rounds, recipe: Recipe | None) -> Iterator[LoadedModel]:
    """The model of a run with θ after so many rounds in place, LoRA factors beside their weights.

    Args:
        recipe: As the run's own, with another `[runtime]`; the run's own by default.

    Raises:
        MeerkatError: There is no such run or round, or its base model changed.
    """
    recipe = recipe_of(directory) if recipe is None else recipe
    with closing(open_journal(directory)) as journal:
        done, header = wanted_rounds(journal, rounds), journal.header
        theta, mask = replay(journal, done).theta, mask_of(directory, journal, done)
    loaded = load_model(recipe.model, recipe.runtime)
    if loaded.fingerprint != header.model:
        raise RunError(
            f"model.name = {recipe.model.name!r} is not the model that the run began with "
            f"(fingerprint {loaded.fingerprint[:12]}, journal {header.model[:12]}); restore it"
        )
    if mask.kind == "lora":
        adapt_model(loaded, recipe.mask)
    space = space_of(loaded.model, mask)
    space.write(theta)
    try:
        yield loaded
    finally:
        space.restore()


def harness_results(
    loaded: LoadedModel,
    tasks: Sequence[str],
    include: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """The harness's results, versions and sample counts on some of its tasks.

    Args:
        include: A folder of task files (YAML) of one's own, whose data may be local.
        limit: At most so many examples of each task.

    Raises:
        RunError: The package is missing, a task is not known, or its data cannot be had.
    """
    if include is not None and not include.is_dir():
        raise RunError(f"--include-path {include}: no such folder")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with needed_extra("harness"):
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder = None if include is None else str(include)
    manager = TaskManager(include_path=folder)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        where = "" if folder is None else f", nor in {folder}"
        raise RunError(
            f"--harness {unknown[0]!r}: it is no task of lm-evaluation-harness{where}; "
            "`lm_eval ls tasks` lists them, --include-path names a folder of your own"
        )
    model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size)
    try:
        found = simple_evaluate(
            model,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            log_samples=False,
            bootstrap_iters=0,
        )
    except (OSError, ValueError, KeyError, ConnectionError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RunError(f"--harness {','.join(tasks)}: {reason}") from None
    return {name: found[name] for name in _KEPT if name in found}


def figures_of(results: dict[str, Any]) -> dict[str, Any]:
    """Each task's metrics as `task metric` and a number, for people.

    >>> figures_of({"results": {"mine": {"alias": "mine", "acc,none": 0.5}}})
    {'mine acc': 0.5}
    """
    return {
        f"{task} {metric.removesuffix(',none')}": value
        for task, metrics in results["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and metric != "sample_len"
    }
