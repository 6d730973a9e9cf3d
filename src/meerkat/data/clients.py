"""Which client holds which examples, and a folder for each; no model is needed."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas

from meerkat.config import Recipe
from meerkat.data.conversations import conversation_row
from meerkat.data.images import as_png
from meerkat.data.partition import label_counts, partition
from meerkat.data.sources import Split, load_examples
from meerkat.errors import DataError, RunError
from meerkat.tasks import Example, Task, resolve_task

__all__ = [
    "Parts",
    "client_holders",
    "client_label_counts",
    "examples_of",
    "held_out_shard",
    "load_partition",
    "validation_examples",
    "validation_shard",
    "write_client_folders",
]

Parts = tuple[tuple[int, ...], ...]
"""Indices into the training examples that each client holds."""


def load_partition(recipe: Recipe, task: Task) -> tuple[Split, Parts]:
    """A recipe's examples, and the part of each client.

    Raises:
        DataError: The source is not usable, cannot be split like this, or has too few examples for
            the validation.
    """
    column = recipe.federation.partition.column
    split = load_examples(task if column is None else replace(task, holder=column), recipe.task)
    _check_validation(recipe, split)
    return split, partition(split.train, recipe.federation, recipe.seed)


def client_label_counts(task: Task, split: Split, parts: Parts) -> tuple[list[list[int]], str]:
    """Examples of each label that each client holds, and a digest of who holds what."""
    counts = label_counts(split.train, parts, max(1, len(task.verbalizers)))
    digest = hashlib.sha256(json.dumps(parts).encode())
    for part in parts:
        for example in (split.train[index] for index in part):
            content = [sorted(example.fields.items()), example.label, example.answer]
            content += [example.rejected] if task.has_pairs else []
            digest.update(json.dumps(content, default=str).encode())
    return counts, digest.hexdigest()


def client_holders(recipe: Recipe, split: Split, parts: Parts) -> list[list[str]]:
    """Who holds the rows of each client in a natural partition, those with most rows first.

    Empty in any other partition; extreme clients, who take rows of many, have no holders.
    """
    chosen = recipe.federation.partition
    if chosen.kind != "natural":
        return []
    found: list[list[str]] = []
    for part in parts[: len(parts) - chosen.extreme]:
        held = Counter(split.train[index].holder for index in part)
        found.append(sorted(held, key=lambda holder: (-held[holder], holder)))
    return found + [[] for _ in range(chosen.extreme)]


def held_out_shard(recipe: Recipe, split: Split, client: int) -> tuple[Example, ...]:
    """The held-out examples that a client evaluates on, so that all together cover them once."""
    return split.test[: recipe.evaluation.examples][client :: recipe.federation.clients]


def validation_examples(recipe: Recipe, split: Split) -> tuple[Example, ...]:
    """The `evaluation.validation` examples to choose a round by, none of which is tested on."""
    wanted, tested = recipe.evaluation.validation, recipe.evaluation.examples
    if split.validation:
        return split.validation[:wanted]
    return split.test[tested : tested + wanted]


def validation_shard(recipe: Recipe, split: Split, client: int) -> tuple[Example, ...]:
    """As `held_out_shard`, of the validation examples."""
    return validation_examples(recipe, split)[client :: recipe.federation.clients]


def examples_of(
    recipe: Recipe, split: Split, name: str, most: int | None = None
) -> tuple[Example, ...]:
    """Examples to evaluate on: of `test`, without those of the validation, `validation` or `train`.

    Args:
        most: At most so many; as many as the recipe evaluates on by default.

    Raises:
        DataError: The recipe keeps no validation examples, or `most` is none.
    """
    if most is not None and most < 1:
        raise DataError(f"--examples {most}: there is nothing to evaluate on; give at least 1")
    tested, validation = recipe.evaluation.examples, recipe.evaluation.validation
    if name == "validation":
        if not validation:
            raise DataError(
                "--split validation: evaluation.validation = 0 keeps no examples for it; evaluate "
                "a run that has some, or set it with --set"
            )
        return validation_examples(recipe, split)[:most]
    if name == "train":
        found = split.train
    else:
        skipped = 0 if split.validation else validation
        found = split.test[:tested] + split.test[tested + skipped :]
    return found[: tested if most is None else most]


def _check_validation(recipe: Recipe, split: Split) -> None:
    """Are there as many validation examples as the recipe asks for?

    Raises:
        DataError: There are fewer.
    """
    wanted, tested = recipe.evaluation.validation, recipe.evaluation.examples
    if len(validation_examples(recipe, split)) == wanted:
        return
    if split.validation:
        raise DataError(
            f"evaluation.validation = {wanted}: task.validation_split = "
            f"{recipe.task.validation_split!r} has {len(split.validation)} examples that are not "
            "in the test split; lower it"
        )
    left = max(0, len(split.test) - tested)
    raise DataError(
        f"evaluation.validation = {wanted}: of {len(split.test)} held-out examples "
        f"evaluation.examples = {tested} leaves {left}; lower one of them, or name a split of its "
        "own in task.validation_split"
    )


def write_client_folders(recipe: Recipe, to: Path) -> list[Path]:
    """Write the examples of each client K to `client-K/train.csv`, `test.csv`, `validation.csv`;
    of a task over images to Parquet files of the same names.

    Conversations go to `.jsonl` files.

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
        parts_of = {
            "train": [split.train[index] for index in part],
            "test": held_out_shard(recipe, split, client),
            "validation": validation_shard(recipe, split, client),
        }
        for name, examples in parts_of.items():
            if examples or name == "train":
                _write(task, examples, folder / name)
    return folders


def _write(task: Task, examples: Sequence[Example], stem: Path) -> None:
    """Write examples to a file that `load_folder` reads and whose type fits the task."""
    if task.is_chat:
        rows = (conversation_row(task.format, example) for example in examples)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        stem.with_suffix(".jsonl").write_text(lines, "utf-8")
        return
    if task.image is not None:
        images = [{"bytes": as_png(e.fields[task.image]), "path": None} for e in examples]
        labels = [task.label_names[example.label] for example in examples]
        rows_of_images = pandas.DataFrame({task.image: images, task.label: labels})
        rows_of_images.to_parquet(stem.with_suffix(".parquet"), index=False)
        return
    path = stem.with_suffix(".csv")
    fields = tuple(dict.fromkeys(task.fields))
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow([*fields, *task.outputs])
        for example in examples:
            outputs = [task.label_names[example.label]] if task.has_classes else [example.answer]
            outputs += [example.rejected] if task.has_pairs else []
            table.writerow([*(example.fields[field] for field in fields), *outputs])
