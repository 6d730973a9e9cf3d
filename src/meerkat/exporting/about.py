"""What an export may say of its run: figures of the journal, and no path of this machine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meerkat.config import Recipe
from meerkat.exporting.licence import Licence, licence_of
from meerkat.journal import Journal
from meerkat.journal.records import Evaluated
from meerkat.models.demo_models import DEMO_MODELS
from meerkat.spaces.mask_file import Mask
from meerkat.tasks import Task, resolve_task
from meerkat.tasks.base import FILE_SUFFIXES

__all__ = ["About", "public_name", "published_recipe"]

_HERE = ("runtime", "network", "tracking")
"""Sections that are about the machine of a run, and not about the run."""
_TEXTS = ("prompt", "verbalizers")
"""Fields that are no names of files, whatever they look like."""
_SUFFIXES = (*FILE_SUFFIXES, ".txt", ".gguf", ".safetensors", ".toml")


@dataclass(frozen=True)
class About:
    """A run up to the round that is exported."""

    recipe: Recipe
    task: Task
    licence: Licence
    """Of the base model."""
    rounds: int
    mask_kind: str
    mask_size: int
    eligible: int
    dimensions: int | None
    """Of the subspace, where there is one."""
    bytes_up: int
    """Of all reports up to this round."""
    bytes_down: int
    reports: int
    before: Evaluated | None
    """The evaluation before round 0, where anything was evaluated."""
    after: Evaluated | None
    """That at the round that is exported."""
    fingerprint: str
    """The recipe's."""

    @classmethod
    def of(cls, journal: Journal, mask: Mask, rounds: int | None) -> About:
        """What a journal says of a run after so many rounds (all by default)."""
        recipe = journal.header.parsed
        done = journal.rounds if rounds is None else rounds
        records = [pair for pair in journal.records() if pair[0].round < done]
        known = {e.round: e for e in journal.evaluations() if e.examples}
        return cls(
            recipe,
            resolve_task(recipe.task),
            licence_of(recipe.model.name),
            done,
            mask.kind,
            mask.size,
            mask.eligible,
            None if mask.subspace is None else mask.subspace.dimensions,
            sum(metrics.bytes_up for _, metrics in records),
            sum(metrics.bytes_down for _, metrics in records),
            sum(len(record.reports) for record, _ in records),
            known.get(0),
            known.get(done),
            journal.header.fingerprint,
        )

    @property
    def base(self) -> str:
        """The base model's name, for people."""
        name = self.recipe.model.name
        if name in DEMO_MODELS:
            demo = DEMO_MODELS[name]
            return f"{demo.origin}, as the package {demo.package} has it in few bits"
        return public_name(name)

    @property
    def base_id(self) -> str | None:
        """Its hub id, where it has one."""
        name = self.recipe.model.name
        if name in DEMO_MODELS:
            return DEMO_MODELS[name].origin
        return None if _is_local(name) else name

    @property
    def title(self) -> str:
        """What the model is called: base and task."""
        short = (self.base_id or self.base).rpartition("/")[2]
        return f"{short}-{self.task.name}"

    @property
    def data_id(self) -> str | None:
        """The hub id of the task's data, where it has one."""
        source = self.task.source
        local = _is_local(source) or source.partition(":")[0] == "demo"
        return None if local else source

    @property
    def split(self) -> str:
        """What the scores were measured on."""
        own = self.recipe.task.test_split or self.task.test_split
        return own or "held out of the training split"

    @property
    def scores(self) -> dict[str, tuple[float | None, float | None]]:
        """Before and after, by metric; None where it was not measured."""
        before = {} if self.before is None else self.before.metrics
        after = {} if self.after is None else self.after.metrics
        return {n: (_finite(before, n), _finite(after, n)) for n in {**before, **after}}


def published_recipe(recipe: Recipe) -> dict[str, Any]:
    """A recipe without the sections of this machine, and with file names in the place of paths."""
    dumped = recipe.model_dump(mode="json", exclude=set(_HERE))
    found: dict[str, Any] = _without_paths(dumped)
    return found


def public_name(value: str) -> str:
    """The last part of a path; anything else as it is.

    >>> public_name("/home/me/models/mine"), public_name("google/gemma-3-270m")
    ('mine', 'google/gemma-3-270m')
    """
    return Path(value).name if _is_local(value) else value


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: v if k in _TEXTS else _without_paths(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_paths(part) for part in value]
    return public_name(value) if isinstance(value, str) else value


def _is_local(value: str) -> bool:
    """Does this name a file or folder of this machine, here now or not?"""
    if not value or "\n" in value or len(value) > 4096:
        return False
    path = Path(value)
    begins = value.startswith(("~", "./", "../")) or path.is_absolute()
    try:
        return begins or path.suffix.lower() in _SUFFIXES or path.exists()
    except OSError:  # too long for a path, or a text
        return False


def _finite(values: Mapping[str, float], name: str) -> float | None:
    value = values.get(name, math.nan)
    return value if math.isfinite(value) else None
