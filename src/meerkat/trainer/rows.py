"""A Trainer's data sets as a folder, from which the run reads them, and may be resumed."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets.utils import disable_progress_bars, enable_progress_bars, is_progress_bar_enabled

from meerkat.data.token_rows import split_of
from meerkat.errors import DataError
from meerkat.tasks import Task

__all__ = ["as_rows", "columns_of", "holds_tokens", "longest", "write_rows"]


def as_rows(given: Any, name: str) -> datasets.Dataset:
    """A data set as transformers' Trainer takes it: a `Dataset`, or rows that are mappings.

    Raises:
        DataError: It has no rows, or they are no mappings.
    """
    if isinstance(given, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise DataError(f"{name} is a {type(given).__name__}; take one of its splits")
    if not isinstance(given, datasets.Dataset):
        if not isinstance(given, Iterable) and not hasattr(given, "__getitem__"):
            raise DataError(f"{name} is a {type(given).__name__}, not rows")
        rows = list(given) if isinstance(given, Iterable) else [given[i] for i in range(len(given))]
        wrong = next((i for i, row in enumerate(rows, 1) if not isinstance(row, Mapping)), None)
        if wrong is not None:
            raise DataError(
                f"{name} row {wrong} is a {type(rows[wrong - 1]).__name__}, not a mapping of "
                "columns: {'input_ids': …, 'labels': …}, or texts"
            )
        plain = [{key: _plain(value) for key, value in row.items()} for row in rows]
        given = datasets.Dataset.from_list(plain)
    if not len(given):
        raise DataError(f"{name} has no rows")
    return given


def holds_tokens(rows: datasets.Dataset) -> bool:
    """Are its rows tokenised?"""
    return "input_ids" in rows.column_names


def longest(rows: Mapping[str, datasets.Dataset]) -> int:
    """Tokens of the longest row; every row is looked at.

    Raises:
        DataError: A row is not of the form that can be scored.
    """
    most = 1
    for name, some in rows.items():
        for number, row in enumerate(some, start=1):
            try:
                prompt, answer = split_of(row["input_ids"], row["labels"])
            except DataError as error:
                raise DataError(f"{name} row {number}: {error}") from None
            most = max(most, len(prompt) + len(answer))
    return most


def columns_of(rows: datasets.Dataset, task: Task, name: str) -> datasets.Dataset:
    """The columns that a task reads; of tokens only those that are attended to.

    Raises:
        DataError: One is missing.
    """
    answer = task.answer if task.answer is not None else task.label
    needed = [*dict.fromkeys((*task.fields, answer))]
    missing = [column for column in needed if column not in rows.column_names]
    if missing:
        raise DataError(
            f"{name} has no column {missing[0]!r}; columns: {', '.join(rows.column_names)}"
        )
    if task.is_tokens and "attention_mask" in rows.column_names:
        with _quietly():
            rows = rows.map(_attended, load_from_cache_file=False)
    return rows.select_columns(needed)


def write_rows(rows: Mapping[str, datasets.Dataset], folder: Path) -> None:
    """Write the splits, whole or not at all; what was there before is replaced."""
    scratch = folder.with_name(folder.name + ".part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.parent.mkdir(parents=True, exist_ok=True)
    with _quietly():
        datasets.DatasetDict(dict(rows)).save_to_disk(str(scratch))
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the progress bars of datasets."""
    shown = is_progress_bar_enabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def _plain(value: Any) -> Any:
    """A tensor or an array as a list."""
    return value.tolist() if hasattr(value, "tolist") else value


def _attended(row: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """A row without its padding."""
    seen = [bool(one) for one in row["attention_mask"]]
    return {
        name: [token for token, kept in zip(row[name], seen, strict=True) if kept]
        for name in ("input_ids", "labels")
    }
