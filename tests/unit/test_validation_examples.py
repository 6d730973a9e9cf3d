"""Validation examples: held out, never tested on, never trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from builders import make_recipe
from hypothesis import given, settings
from hypothesis import strategies as st

from meerkat.config import Recipe
from meerkat.data import sources
from meerkat.data.clients import (
    examples_of,
    held_out_shard,
    load_partition,
    validation_examples,
    validation_shard,
    write_client_folders,
)
from meerkat.data.sources import Split, load_examples, load_folder
from meerkat.errors import DataError
from meerkat.tasks import Example, Task, resolve_task

TASK: dict[str, Any] = {
    "name": "custom",
    "source": "some/hub",
    "prompt": "{text} It was",
    "verbalizers": {"neg": "terrible", "pos": "great"},
}


def recipe_of(validation: int = 0, examples: int = 6, **task: Any) -> Recipe:
    evaluation = {"examples": examples, "validation": validation}
    return make_recipe(task=TASK | task, evaluation=evaluation, federation={"clients": 3})


def rows(*texts: str) -> list[dict[str, str]]:
    return [{"text": text, "label": ("neg", "pos")[i % 2]} for i, text in enumerate(texts)]


def texts(examples: tuple[Example, ...]) -> list[str]:
    return [str(example.fields["text"]) for example in examples]


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, str]]]:
    """The splits of a hub data set."""
    splits = {
        "train": rows(*(f"film {i}" for i in range(100))),
        "test": rows(*(f"test {i}" for i in range(10))),
        "validation": rows(*(f"choice {i}" for i in range(8)), "film 3", "TEST 4 ", "choice 0"),
    }
    of_files = sources._rows

    def read(task: Task, split: str) -> Any:
        return splits[split] if task.source == "some/hub" else of_files(task, split)

    monkeypatch.setattr(sources, "_rows", read)
    return splits


def split_of(recipe: Recipe) -> Split:
    return load_partition(recipe, resolve_task(recipe.task))[0]


@pytest.mark.parametrize("test_split", [None, "test"])
def test_they_are_the_held_out_ones_after_those_that_are_tested_on(test_split: str | None) -> None:
    """Partition and test stay what they are without a validation."""
    plain, kept = (recipe_of(count, test_split=test_split) for count in (0, 4))
    split = split_of(kept)
    assert split == split_of(plain)
    assert validation_examples(plain, split) == ()
    assert validation_examples(kept, split) == split.test[6:10]
    both = [*texts(split.test[:6]), *texts(validation_examples(kept, split))]
    assert len(set(both)) == 10
    shards = [
        example
        for client in range(3)
        for shard in (held_out_shard, validation_shard)
        for example in shard(kept, split, client)
    ]
    assert sorted(texts(tuple(shards))) == sorted(both)


def test_a_split_of_their_own() -> None:
    """No text of it is in test or training, and the test stays what it is."""
    for test_split in (None, "test"):
        plain = split_of(recipe_of(test_split=test_split))
        recipe = recipe_of(5, test_split=test_split, validation_split="validation")
        split = split_of(recipe)
        assert split.test == plain.test
        assert "film 3" not in texts(split.train)
        known = {*texts(split.train), *texts(split.test)}
        assert known | {"film 3"} == {*texts(plain.train), *texts(plain.test)}
        assert not known & set(texts(split.validation))
        assert texts(split.validation[:8]) == [f"choice {i}" for i in range(8)]
        assert ("TEST 4 " in texts(split.validation)) == (test_split is None)
        assert validation_examples(recipe, split) == split.validation[:5]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_text_is_in_two_of_the_three(data: st.DataObject) -> None:
    drawn = st.lists(st.sampled_from(["a", "A ", "b", "B", "c", "d", "e", "f"]), min_size=1)
    splits = {name: rows(*data.draw(drawn)) for name in ("train", "test", "validation")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_rows", lambda task, split: splits[split])
        section = recipe_of(
            test_split=data.draw(st.sampled_from([None, "test"])), validation_split="validation"
        ).task
        try:
            split = load_examples(resolve_task(section), section)
        except DataError as error:
            assert "both need" in str(error) or "none is left" in str(error)  # noqa: PT017
            return
    parts = [
        [text.strip().casefold() for text in texts(part)]
        for part in (split.train, split.test, split.validation)
    ]
    together = [text for part in parts for text in part]
    assert len(set(together)) == len(together)


@pytest.mark.parametrize(
    ("recipe", "line"),
    [
        (
            recipe_of(5),
            "evaluation.validation = 5: of 10 held-out examples evaluation.examples = 6 leaves 4; "
            "lower one of them, or name a split of its own in task.validation_split",
        ),
        (recipe_of(1, examples=512), "evaluation.examples = 512 leaves 0; lower one of them"),
        (
            recipe_of(9, validation_split="validation", test_split="test"),
            "task.validation_split = 'validation' has 8 examples that are not in the test split",
        ),
        (
            recipe_of(1, validation_split="test", test_split="test"),
            "task.validation_split = 'test': of its 10 examples none is left",
        ),
        (
            recipe_of(1, source="rows.csv", validation_split="validation"),
            "task.source = 'rows.csv' is one file, which has one split; leave it out",
        ),
    ],
)
def test_too_few_are_named(hub: dict[str, list[dict[str, str]]], recipe: Recipe, line: str) -> None:
    hub["validation"] = [row for row in hub["validation"] if row["text"] != "film 3"]
    with pytest.raises(DataError) as caught:
        split_of(recipe)
    assert line in str(caught.value)


def test_folders_hold_what_clients_validate_on(tmp_path: Path) -> None:
    for name, changes in (("rest", {}), ("own", {"validation_split": "validation"})):
        recipe = recipe_of(4, **changes)
        split, task = split_of(recipe), resolve_task(recipe.task)
        for client, folder in enumerate(write_client_folders(recipe, tmp_path / name)):
            own = load_folder(task, folder)
            assert own.validation == validation_shard(recipe, split, client)
            assert own.test == held_out_shard(recipe, split, client)
            assert validation_examples(recipe, own) == own.validation


def test_no_text_is_in_two_files(tmp_path: Path) -> None:
    files = {"train": "a b c d", "test": "b", "validation": "B c"}
    for name, words in files.items():
        lines = [f"{word},pos" for word in words.split()]
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,label", *lines]))
    found = load_folder(resolve_task(recipe_of().task), tmp_path)
    assert [texts(part) for part in (found.train, found.test, found.validation)] == [
        ["a", "d"],
        ["b"],
        ["c"],
    ]
    (tmp_path / "validation.jsonl").write_text("")
    with pytest.raises(DataError, match="at most one file validation"):
        load_folder(resolve_task(recipe_of().task), tmp_path)


def test_an_evaluation_on_the_test_never_sees_them() -> None:
    """Not even one of more examples than the recipe has."""
    recipe = recipe_of(2)
    split = split_of(recipe)
    chosen = set(texts(validation_examples(recipe, split)))
    assert examples_of(recipe, split, "test") == split.test[:6]
    assert examples_of(recipe, split, "test", 3) == split.test[:3]
    assert examples_of(recipe, split, "test", 100) == split.test[:6] + split.test[8:]
    assert not chosen & set(texts(examples_of(recipe, split, "test", 100)))
    assert set(texts(examples_of(recipe, split, "validation"))) == chosen
    assert len(examples_of(recipe, split, "validation", 1)) == 1
    assert examples_of(recipe, split, "train") == split.train[:6]
    with pytest.raises(DataError, match=r"evaluation\.validation = 0 keeps no examples"):
        examples_of(recipe_of(), split, "validation")
    with pytest.raises(DataError, match="--examples 0"):
        examples_of(recipe, split, "test", 0)
