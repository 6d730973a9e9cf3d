"""A run → what was asked for: the merged model, a delta, or an adapter for peft."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from meerkat.config import Recipe
from meerkat.errors import RunError
from meerkat.exporting.about import About, public_name
from meerkat.exporting.folder import complete_adapter, complete_model
from meerkat.exporting.sparse_adapters import changes_of, save_lora, save_shira
from meerkat.journal import replay
from meerkat.models.loading import LoadedModel
from meerkat.runs.assembly import load_for
from meerkat.runs.best_round import Rounds, wanted_rounds
from meerkat.runs.directory import mask_of, open_journal, recipe_of
from meerkat.runs.export import (
    check_empty,
    save_delta,
    save_factors,
    save_merged,
    save_merged_factors,
)
from meerkat.spaces.mask_file import Mask
from meerkat.tasks import resolve_task
from meerkat.zo.state import Theta

__all__ = ["export_run"]


def export_run(directory: Path, to: Path, form: str | None, rounds: Rounds) -> Path:
    """Write a run's θ after so many rounds to a folder, or a delta to a file.

    Args:
        form: `--delta`, `--peft` or `--shira`; None is the merged model.

    Raises:
        MeerkatError: There is no such run, its base model changed, or `to` exists.
    """
    with closing(open_journal(directory)) as journal:
        model, done = journal.header.model, wanted_rounds(journal, rounds)
        theta = replay(journal, done).theta
        mask = mask_of(directory, journal, done)
        if form == "--delta":
            save_delta(mask, mask.weights(theta), to)
            return to
        about = About.of(journal, mask, done)
    check_empty(to)
    recipe = recipe_of(directory)
    base = public_name(recipe.model.name)
    if mask.kind == "lora" and form is not None:
        if form == "--shira":
            raise RunError("--shira: LoRA factors are no entries of weights; take --peft")
        save_factors(mask, theta, recipe.mask.lora_alpha, base, to)
        complete_adapter(to, about, "LoRA")
        return to
    loaded = _base_model(recipe, model)
    if form is None:
        _save_merged(loaded, recipe, mask, theta, to)
        complete_model(to, about, loaded)
        return to
    changes = changes_of(loaded, mask, mask.weights(theta))
    if form == "--peft":
        save_lora(changes, base, to)
        complete_adapter(to, about, "LoRA")
    else:
        save_shira(changes, base, to)
        complete_adapter(to, about, "SHiRA")
    return to


def _save_merged(
    loaded: LoadedModel, recipe: Recipe, mask: Mask, theta: Theta, folder: Path
) -> None:
    if mask.kind == "lora":
        save_merged_factors(loaded, mask, theta, recipe.mask.lora_alpha, folder)
    else:
        save_merged(loaded, mask, mask.weights(theta), folder)


def _base_model(recipe: Recipe, expected: str) -> LoadedModel:
    """The model that a run began with, as it is stored.

    Args:
        expected: Its fingerprint.

    Raises:
        ModelError: It cannot be loaded.
        RunError: It is another one now.
    """
    # What is written has the type of the run's weights, whatever this machine computes in.
    runtime = recipe.runtime.model_copy(update={"compute": "stored"})
    stored = recipe.model_copy(update={"runtime": runtime})
    loaded = load_for(stored, resolve_task(recipe.task))
    if loaded.fingerprint != expected:
        raise RunError(
            f"model.name = {recipe.model.name!r} is not the model that the run began with "
            f"(fingerprint {loaded.fingerprint[:12]}, journal {expected[:12]}); restore it"
        )
    return loaded
