"""Where examples come from: the hub, a folder, the user's own file, or the demo's own."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
from datasets.exceptions import DatasetsError

from meerkat.config import TaskSection
from meerkat.data.conversations import conversation_example
from meerkat.data.demo import demo_rows
from meerkat.data.images import idx_rows, image_of, is_idx_folder
from meerkat.errors import DataError
from meerkat.tasks import Example, Task
from meerkat.zo.noise import permutation

__all__ = ["Split", "load_examples", "load_folder", "rows_as_examples"]

_READERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_HELD_OUT_SHARE = 10
_DEBIAN = Path("/usr/share/datasets")
"""Where Debian's packages of data sets put them."""

_Key = tuple[str, ...]
"""The text of an example, without its case and the blanks around it."""


@dataclass(frozen=True)
class Split:
    """Examples to train on and examples that no client trains on; no text is in two of them."""

    train: tuple[Example, ...]
    test: tuple[Example, ...]
    """Held out."""
    validation: tuple[Example, ...] = ()
    """Those of a split of their own; without one, validation examples come from `test`."""


def load_examples(task: Task, section: TaskSection) -> Split:
    """Load a task's examples.

    Repeated texts are dropped. Without a test split a tenth is held out, by `task.seed`. Of a text
    in several splits the test keeps it first, then the validation.

    Raises:
        DataError: The source is missing or unreadable, lacks a column, holds an empty text or a
            label that no verbalizer stands for.
    """
    validation = _validation(task)
    train = _unique(_examples(task, task.train_split))
    if task.test_split is not None:
        test = _unique(_examples(task, task.test_split))
        keys = [key for key in train if key not in test and key not in validation]
        kept = [keys[i] for i in permutation(section.seed, (0, 0), len(keys))]
    else:
        keys = list(train)
        order = [keys[i] for i in permutation(section.seed, (0, 0), len(keys))]
        held_out = len(keys) // _HELD_OUT_SHARE or min(1, len(keys) - 1)
        test = {key: train[key] for key in order[:held_out]}
        kept = [key for key in order[held_out:] if key not in validation]
    split = Split(
        tuple(train[key] for key in kept),
        tuple(test.values()),
        tuple(example for key, example in validation.items() if key not in test),
    )
    if not split.train or not split.test:
        raise DataError(
            f"task.source = {task.source!r}: {len(split.train)} training and {len(split.test)} "
            "test examples; both need at least one"
        )
    if task.validation_split is not None and not split.validation:
        raise DataError(
            f"task.validation_split = {task.validation_split!r}: of its {len(validation)} examples "
            f"none is left that is not held out for the test (task.test_split = "
            f"{task.test_split!r}); leave it out, or name another"
        )
    return replace(split, train=split.train[: section.train_examples])


def _validation(task: Task) -> dict[_Key, Example]:
    """The examples of the task's validation split; empty where it names none.

    Raises:
        DataError: The source is one file, or as `load_examples`.
    """
    if task.validation_split is None:
        return {}
    if Path(task.source).suffix.lower() in _READERS:
        raise DataError(
            f"task.validation_split = {task.validation_split!r}: task.source = {task.source!r} is "
            "one file, which has one split; leave it out: held-out examples that are not tested on "
            "serve"
        )
    return _unique(_examples(task, task.validation_split))


def rows_as_examples(task: Task, split: str) -> list[Example]:
    """A split row by row, repeated texts included.

    Raises:
        DataError: As `load_examples`.
    """
    return list(_examples(task, split))


def load_folder(task: Task, folder: Path) -> Split:
    """A client's own data: a file `train` and, where it has them, files `test` and `validation`.

    The examples are in the order of the files.

    Raises:
        DataError: There is no such folder or no file `train` of a known type in it, or a row does
            not fit the task.
    """
    found = {
        name: [path for suffix in _READERS if (path := folder / f"{name}{suffix}").is_file()]
        for name in ("train", "test", "validation")
    }
    if len(found["train"]) != 1 or any(len(paths) > 1 for paths in found.values()):
        raise DataError(
            f"data = {str(folder)!r}: it needs one file train (and may have one file test) of type "
            f"{', '.join(_READERS)}, and at most one file validation"
        )
    parts = {
        name: _unique(
            example
            for path in paths
            for example in _examples(replace(task, source=str(path), holder=None), name)
        )
        for name, paths in found.items()
    }
    test, validation = parts["test"], parts["validation"]
    held_out = test.keys() | validation.keys()
    return Split(
        tuple(example for key, example in parts["train"].items() if key not in held_out),
        tuple(test.values()),
        tuple(example for key, example in validation.items() if key not in test),
    )


def _unique(examples: Iterable[Example]) -> dict[_Key, Example]:
    """The first example of each text, whatever case and blanks around it."""
    unique: dict[_Key, Example] = {}
    for example in examples:
        key = tuple(str(value).strip().casefold() for value in example.fields.values())
        unique.setdefault(key, example)
    return unique


def _examples(task: Task, split: str) -> Iterator[Example]:
    labels = {name: index for index, name in enumerate(task.label_names)}
    needed = (*task.fields, *task.outputs)
    for number, row in enumerate(_rows(task, split), start=1):
        where = f"task.source = {task.source!r}, {split} row {number}"
        if task.is_chat:
            yield conversation_example(task.format, row, _holder(task, row, where), where)
            continue
        missing = [column for column in needed if column not in row]
        if missing:
            raise DataError(
                f"{where}: no column {missing[0]!r}; columns: {', '.join(map(str, row))}"
            )
        fields = {field: row[field] for field in task.fields}
        if task.image is not None:
            fields = {name: image_of(value, where) for name, value in fields.items()}
        if any(_is_blank(value) for value in fields.values()):
            blank = next(field for field, value in fields.items() if _is_blank(value))
            raise DataError(f"{where}: column {blank!r} is empty; remove the row or fill it in")
        holder = _holder(task, row, where)
        if task.has_pairs:
            yield _pair(task, row, fields, holder, where)
            continue
        if task.answer is not None:
            if _is_blank(row[task.answer]):
                raise DataError(f"{where}: column {task.answer!r} is empty; remove the row")
            yield Example(fields, answer=str(row[task.answer]), holder=holder)
            continue
        label = _label_text(row[task.label])
        if label not in labels:
            raise DataError(
                f"{where}: label {label!r} has no verbalizer; task.verbalizers has "
                f"{', '.join(labels)}"
            )
        yield Example(fields, label=labels[label], holder=holder)


def _holder(task: Task, row: Mapping[str, Any], where: str) -> str:
    """Who holds a row, where the task names a column for that.

    Raises:
        DataError: There is no such column, or it is empty.
    """
    if task.holder is None:
        return ""
    if task.holder not in row:
        raise DataError(f"{where}: no column {task.holder!r}; columns: {', '.join(map(str, row))}")
    if _is_blank(row[task.holder]):
        raise DataError(
            f"{where}: column {task.holder!r}, which says who holds a row, is empty; remove the "
            "row or fill it in"
        )
    return str(row[task.holder])


def _pair(
    task: Task, row: Mapping[str, Any], fields: dict[str, Any], holder: str, where: str
) -> Example:
    """A row with two answers.

    Raises:
        DataError: One is empty, or no text, or both are the same.
    """
    for column in task.outputs:
        if _is_blank(row[column]):
            raise DataError(f"{where}: column {column!r} is empty; remove the row")
        if not isinstance(row[column], str):
            raise DataError(
                f"{where}: column {column!r} holds a {type(row[column]).__name__}, and an answer "
                "is a text; give the text of the answer alone"
            )
    chosen, rejected = (str(row[column]) for column in task.outputs)
    if chosen.strip() == rejected.strip():
        raise DataError(f"{where}: both answers are the same; remove the row")
    return Example(fields, answer=chosen, holder=holder, rejected=rejected)


def _is_blank(value: Any) -> bool:
    missing = pandas.api.types.is_scalar(value) and pandas.isna(value)
    return bool(missing) or not str(value).strip()


def _label_text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _rows(task: Task, split: str) -> Iterator[Mapping[str, Any]]:
    if task.source == "demo" or task.source.startswith("demo:"):
        yield from demo_rows(task.source, task.config, split)
        return
    path = Path(task.source).expanduser()
    if path.suffix.lower() in _READERS:
        yield from _file_rows(path)
        return
    if path.parent == _DEBIAN and not path.is_dir():
        raise DataError(
            f"task.source = {task.source!r}: no such folder; install Debian's package "
            f"dataset-{path.name}, or name a folder that holds its files"
        )
    if task.image is not None and is_idx_folder(path):
        yield from idx_rows(path, split)
        return
    dataset = _dataset(task, path, split)
    feature = dataset.features.get(task.label)
    named = isinstance(feature, datasets.ClassLabel) and set(task.label_names) <= set(feature.names)
    names = dict(enumerate(feature.names)) if named else {}
    for row in dataset:
        # A hidden label, -1, has no name.
        yield {**row, task.label: names.get(row[task.label], row[task.label])} if named else row


def _file_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if not path.is_file():
        raise DataError(f"task.source = {str(path)!r}: no such file")
    try:
        match _READERS[path.suffix.lower()]:
            case "csv":
                separator = "\t" if path.suffix.lower() == ".tsv" else ","
                table = _read_table(path, separator)
            case "json":
                lines = path.suffix.lower() == ".jsonl"
                table = pandas.read_json(path, lines=lines, dtype=False)
            case _:
                table = pandas.read_parquet(path)
    except (ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"task.source = {str(path)!r} cannot be read: {reason}") from None
    yield from _records(table)


def _read_table(path: Path, separator: str) -> pandas.DataFrame:
    """A CSV or TSV file, all of whose rows have as many values as there are columns.

    Raises:
        ValueError: A row has more; pandas would shift its values, or leave one out.
    """
    limit = csv.field_size_limit(2**31 - 1)  # by default a long document is an error
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file, delimiter=separator)
            width = len(next(rows, []))
            for row in rows:
                if len(row) > width:
                    raise ValueError(
                        f"line {rows.line_num} has {len(row)} values for {width} columns; quote a "
                        "value that holds the separator"
                    )
    except csv.Error as error:
        raise ValueError(f"line {rows.line_num}: {error}") from None
    finally:
        csv.field_size_limit(limit)
    return pandas.read_csv(path, sep=separator, dtype=str, keep_default_na=False, index_col=False)


def _records(table: pandas.DataFrame) -> Iterator[Mapping[str, Any]]:
    columns = [str(column) for column in table.columns]
    for values in table.itertuples(index=False, name=None):
        # Parquet's lists come as arrays.
        plain = [value.tolist() if isinstance(value, np.ndarray) else value for value in values]
        yield dict(zip(columns, plain, strict=True))


def _dataset(task: Task, path: Path, split: str) -> datasets.Dataset:
    """A split of a hub data set, of a folder written by `save_to_disk`, or of a folder of files."""
    try:
        if (path / "dataset_dict.json").exists():
            return datasets.load_from_disk(str(path))[split]
        if (path / "state.json").exists():
            return datasets.load_from_disk(str(path))
        if task.source.startswith((".", "/", "~")) and not path.is_dir():
            raise FileNotFoundError("no such folder")
        source = str(path) if path.is_dir() else task.source
        return datasets.load_dataset(source, task.config, split=split)
    except (OSError, ValueError, KeyError, ConnectionError, DatasetsError) as error:
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise DataError(
            f"task.source = {task.source!r}, split {split!r} cannot be loaded: {reason}"
        ) from None
