"""A run's directory: what is in it.

DIR/recipe.json      the recipe; only [runtime], [network] and [tracking] may be edited
DIR/mask.safetensors the mask
DIR/mask-000030.safetensors  the mask with the subspace renewed before round 30, and so on
DIR/journal.sqlite   the record
DIR/clients.json     who holds the rows of each client, in a simulation with a natural partition
DIR/tracking.json    what the trackers of `tracking.to` were told; DIR/tensorboard, DIR/wandb and
                     DIR/mlflow.db are theirs
DIR/selection.json   who is stopped early and why, where a selection was made
DIR/summary.json     the figures, once the run is complete
DIR/report.html      the report, and its pictures under DIR/report/, where an observer draws them
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ValidationError

from meerkat.config import Recipe, load_recipe
from meerkat.errors import JournalError, MeerkatError, RecipeError, RunError
from meerkat.journal import Journal
from meerkat.journal.records import Header, Renewal
from meerkat.spaces.mask_file import Mask, load_mask

__all__ = [
    "check_free",
    "claimed",
    "holders_of",
    "holds_run",
    "journal_path",
    "mask_of",
    "mask_path",
    "open_journal",
    "recipe_of",
    "renewed_mask",
    "renewed_mask_path",
    "summary_path",
    "write_holders",
    "write_recipe",
]

_RECIPE, _MASK, _JOURNAL, _SUMMARY, _CLIENTS = (
    "recipe.json",
    "mask.safetensors",
    "journal.sqlite",
    "summary.json",
    "clients.json",
)


def holds_run(directory: Path) -> bool:
    """Is there a run, begun or not?"""
    return (directory / _RECIPE).exists() or (directory / _JOURNAL).exists()


def check_free(directory: Path) -> None:
    """May a new run go here?

    Raises:
        RunError: The directory holds a run.
    """
    if holds_run(directory):
        raise RunError(
            f"{directory} holds another run; choose another --out, or go on with "
            f"`meerkat resume {directory}`"
        )


@contextmanager
def claimed(directory: Path, recipe: Recipe) -> Iterator[None]:
    """A directory for a new run; where nothing has begun, an error leaves no trace of it.

    Raises:
        RunError: The directory holds a run.
    """
    check_free(directory)
    # The recipe is written first, so that a run that is killed at any moment can be resumed.
    write_recipe(recipe, directory)
    try:
        yield
    except MeerkatError:
        if not Journal.exists(journal_path(directory)):
            for name in (_RECIPE, _MASK, _JOURNAL, _CLIENTS):
                (directory / name).unlink(missing_ok=True)
            if not any(directory.iterdir()):
                directory.rmdir()
        raise


def write_recipe(recipe: Recipe, directory: Path) -> None:
    """Write a run's recipe, whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / _RECIPE, recipe.to_json())


def write_holders(directory: Path, holders: Sequence[Sequence[str]]) -> None:
    """Write down who holds the rows of each client, where that is known."""
    if holders:
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory / _CLIENTS, json.dumps({"holders": holders}, indent=1))


def holders_of(directory: Path) -> list[list[str]]:
    """Who holds the rows of each client; empty where that is not known.

    Raises:
        RunError: The file is damaged.
    """
    path = directory / _CLIENTS
    if not path.exists():
        return []
    try:
        return _Clients.model_validate_json(path.read_bytes(), strict=True).holders
    except ValidationError:
        raise RunError(
            f"{path} is damaged; remove it, and the report numbers the clients"
        ) from None


class _Clients(BaseModel):
    holders: list[list[str]]


def _write(path: Path, text: str) -> None:
    """A file, whole or not at all."""
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(text, "utf-8")
    scratch.replace(path)


def journal_path(directory: Path) -> Path:
    return directory / _JOURNAL


def mask_path(directory: Path) -> Path:
    return directory / _MASK


def renewed_mask_path(directory: Path, round: int) -> Path:
    """Of the mask with the subspace that was made before a round in mid-run."""
    return directory / f"mask-{round:06d}.safetensors"


def summary_path(directory: Path) -> Path:
    return directory / _SUMMARY


def open_journal(directory: Path, read_only: bool = True, audit: bool = False) -> Journal:
    """The journal of a run directory, which must be of the directory's recipe.

    Raises:
        RunError: There is no run, or it has not begun.
        RecipeError: recipe.json is not that of the journal.
        JournalError: The journal is damaged.
    """
    if not directory.is_dir():
        raise RunError(f"{directory}: no such run directory")
    if not Journal.exists(journal_path(directory)):
        if not (directory / _RECIPE).exists():
            raise RunError(f"{directory}: no run directory, as it holds no {_RECIPE}")
        raise RunError(f"{directory} holds no journal; `meerkat resume {directory}` begins the run")
    journal = Journal.open(journal_path(directory), read_only, audit)
    if (directory / _RECIPE).exists():
        edited, kept = recipe_of(directory), journal.header.fingerprint
        if edited.fingerprint != kept:
            journal.close()
            raise RecipeError(
                f"{directory / _RECIPE} is not the recipe of this journal (fingerprint "
                f"{edited.fingerprint[:12]}, journal {kept[:12]}): only [runtime], "
                "[tracking] and [network] may change; put it back, or start another run"
            )
    return journal


def recipe_of(directory: Path) -> Recipe:
    """The recipe of a run directory.

    Raises:
        RunError: There is no run.
        JournalError: Another version wrote the run, whose recipe this one does not know.
        RecipeError: The recipe is not valid.
    """
    path = directory / _RECIPE
    if not path.exists():
        raise RunError(f"{directory} holds no run; start one with `meerkat run RECIPE --out`")
    try:
        return load_recipe(path)
    except RecipeError:
        Journal.check_version(journal_path(directory))
        raise


def mask_of(directory: Path, journal: Journal, rounds: int | None = None) -> Mask:
    """The mask of a run after so many rounds (all by default), as the journal names it.

    It is that of the last subspace that a round was in, as `journal.replay` has its state.

    Raises:
        MaskError: Its file is missing or damaged.
        JournalError: It is another.
    """
    renewals = journal.renewals(journal.rounds if rounds is None else rounds)
    if renewals:
        return renewed_mask(directory, journal.header, renewals[-1])
    return _named(mask_path(directory), journal.header, journal.header.space)


def renewed_mask(directory: Path, header: Header, renewal: Renewal) -> Mask:
    """The mask with a subspace that was made in mid-run.

    Raises:
        MaskError, JournalError: As `mask_of`.
    """
    return _named(renewed_mask_path(directory, renewal.round), header, renewal.space)


def _named(path: Path, header: Header, space: str) -> Mask:
    mask = load_mask(path, header.model)
    if mask.fingerprint != space:
        raise JournalError(
            f"{path} is not the mask of this run ({mask.fingerprint[:12]}, journal "
            f"{space[:12]}); put the run's own mask back"
        )
    return mask
