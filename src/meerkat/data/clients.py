"""Which client holds which examples, and a folder for each; no model is needed."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from meerkat.config import Recipe
from meerkat.data.partition import label_counts, partition
from meerkat.data.sources import Split, load_examples
from meerkat.errors import RunError
from meerkat.tasks import Example, Task, resolve_task

__all__ = [
    "Parts",
    "client_label_counts",
    "held_out_shard",
    "load_partition",
    "write_client_folders",
]

Parts = tuple[tuple[int, ...], ...]
"""Indices into the training examples that each client holds."""


def load_partition(recipe: Recipe, task: Task) -> tuple[Split, Parts]:
    """A recipe's examples, and the part of each client.

    Raises:
        DataError: The source is not usable, or cannot be split like this.
    """
    split = load_examples(task, recipe.task)
    return split, partition(split.train, recipe.federation, recipe.seed)


def client_label_counts(task: Task, split: Split, parts: Parts) -> tuple[list[list[int]], str]:
    """Examples of each label that each client holds, and a digest of who holds what."""
    counts = label_counts(split.train, parts, max(1, len(task.verbalizers)))
    digest = hashlib.sha256(json.dumps(parts).encode())
    for part in parts:
        for example in (split.train[index] for index in part):
            content = [sorted(example.fields.items()), example.label, example.answer]
            digest.update(json.dumps(content, default=str).encode())
    return counts, digest.hexdigest()


def held_out_shard(recipe: Recipe, split: Split, client: int) -> tuple[Example, ...]:
    """The held-out examples that a client evaluates on, so that all together cover them once."""
    return split.test[: recipe.evaluation.examples][client :: recipe.federation.clients]


def write_client_folders(recipe: Recipe, to: Path) -> list[Path]:
    """Write the examples of each client K to `client-K/train.csv` and `client-K/test.csv`.

    To try a deployment with a partition of one data set: a node that is given such a folder holds
    exactly what client K holds in a simulation.

    Raises:
        DataError: As `load_partition`.
        RunError: `to` exists and is not an empty folder.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RunError(f"--to {to}: it exists and is not an empty folder; choose another")
    task = resolve_task(recipe.task)
    split, parts = load_partition(recipe, task)
    folders = []
    for client, part in enumerate(parts):
        folder = to / f"client-{client}"
        folder.mkdir(parents=True)
        folders.append(folder)
        _write(task, [split.train[index] for index in part], folder / "train.csv")
        held_out = held_out_shard(recipe, split, client)
        if held_out:
            _write(task, held_out, folder / "test.csv")
    return folders


def _write(task: Task, examples: Sequence[Example], path: Path) -> None:
    fields = tuple(dict.fromkeys(task.fields))
    answer = task.answer if task.answer is not None else task.label
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow([*fields, answer])
        for example in examples:
            named = task.label_names[example.label] if task.answer is None else example.answer
            table.writerow([*(example.fields[field] for field in fields), named])
