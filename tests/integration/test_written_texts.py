"""A subspace from texts that the model writes itself: no corpus is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import ARCHITECTURES, merged, tiny_model

import meerkat
from meerkat.config import parse_recipe
from meerkat.errors import DataError
from meerkat.runs.assembly import assemble
from meerkat.runs.public_texts import public_examples
from meerkat.runs.written_texts import written_texts
from meerkat.spaces.answers import drawn_answer, drawn_together
from meerkat.spaces.mask_file import load_mask


@pytest.fixture
def data(tiny_recipe_data: dict[str, Any]) -> dict[str, Any]:
    section = {"dimensions": 4, "texts": 12, "corpus": "model"}
    return merged(
        tiny_recipe_data, subspace=section, optimizer={"learning_rate": 0.1, "epsilon": 0.1}
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_drawn_together_are_those_drawn_alone(architecture: str) -> None:
    """With the numbers that each would have drawn; where all draw one token, the very same."""
    loaded = tiny_model(architecture)
    prompt, ends = [5, 6, 7], frozenset({2})
    together = drawn_together(loaded.model, prompt, 6, 1, ends, np.random.default_rng(3))
    one_by_one = np.random.default_rng(3)
    alone = [drawn_answer(loaded.model, prompt, 1, ends, one_by_one) for _ in range(6)]
    assert together == alone
    longer = drawn_together(loaded.model, prompt, 6, 9, ends, np.random.default_rng(3))
    assert [answer[:1] for answer in longer] == alone
    assert all(1 <= len(answer) <= 9 for answer in longer)
    assert len(set(longer)) > 1


def test_nothing_follows_an_end() -> None:
    loaded = tiny_model()
    size = loaded.model.config.vocab_size
    ends = frozenset(range(0, size, 2))  # half of all tokens
    found = drawn_together(loaded.model, [5, 6], 40, 12, ends, np.random.default_rng(0))
    assert len({len(answer) for answer in found}) > 2
    for answer in found:
        assert not set(answer[:-1]) & ends
        assert answer[-1] in ends or len(answer) == 12


def test_texts_follow_each_answer_in_turn(data: dict[str, Any], monkeypatch: Any) -> None:
    from meerkat.runs import written_texts as module

    heads: list[str] = []
    sources = assemble(parse_recipe(data))

    def watched(model: Any, head: Any, count: int, *others: Any) -> Any:
        said = sources.loaded.tokenizer.decode(head, skip_special_tokens=True)
        heads.append(said.replace(" ", ""))  # the tiny tokenizer parts tokens by blanks
        return drawn_together(model, head, count, *others)

    monkeypatch.setattr(module, "drawn_together", watched)
    found = written_texts(sources.loaded, sources.task, 0)
    texts = [next(found) for _ in range(33)]
    assert len(heads) == 3
    assert "terrible" in heads[0]
    assert "great" in heads[1]
    assert heads[2] == heads[0]
    assert len(set(texts)) > 16


def test_a_run_needs_no_corpus_for_its_subspace(data: dict[str, Any], tmp_path: Path) -> None:
    summary = meerkat.run(parse_recipe(data), tmp_path / "run", observers=())
    again = meerkat.run(parse_recipe(data), tmp_path / "again", observers=())
    assert summary["state_digest"] == again["state_digest"]
    subspace = load_mask(tmp_path / "run/mask.safetensors").subspace
    assert subspace is not None
    assert subspace.curvature[3] > 0
    other = parse_recipe(merged(data, subspace={"seed": 1}))
    meerkat.run(other, tmp_path / "other", observers=())
    others = load_mask(tmp_path / "other/mask.safetensors").subspace
    assert others is not None
    assert others.about["texts"] != subspace.about["texts"]


def test_no_two_texts_are_alike(data: dict[str, Any]) -> None:
    sources = assemble(parse_recipe(data))
    section = sources.recipe.subspace
    assert section is not None
    found = [example.fields["text"] for example in public_examples(sources, section)]
    assert len(set(found)) == len(found) == 12
    assert all(4 <= len(text.split()) <= 60 for text in found)


def test_a_model_that_writes_no_sentence_is_named(data: dict[str, Any], monkeypatch: Any) -> None:
    sources = assemble(parse_recipe(data))
    section = sources.recipe.subspace
    assert section is not None
    monkeypatch.setattr("meerkat.runs.written_texts._LONGEST", 2)  # tokens, and so words
    with pytest.raises(DataError, match=r"subspace\.corpus = 'model'.*name a corpus"):
        public_examples(sources, section)
