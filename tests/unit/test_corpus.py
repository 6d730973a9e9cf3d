"""Token sequences of the corpus that a mask is calibrated on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import WORDS, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from meerkat.config import MaskSection, TaskSection
from meerkat.data.corpus import calibration_batches, corpus_texts, sequences
from meerkat.data.sources import load_examples
from meerkat.errors import DataError
from meerkat.tasks import resolve_task

SECTION = MaskSection(batches=3, batch_size=2, sequence_length=10)
TEXTS = [f"{WORDS} film number {i}" for i in range(20)]


def with_bos():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def test_sequences_are_pieces_of_the_corpus() -> None:
    tokenizer = tiny_tokenizer()
    batches = sequences(TEXTS, SECTION, tokenizer)
    assert batches.shape == (3, 2, 10)
    assert batches.dtype == torch.int64
    run = tokenizer("".join(text + "\n\n" for text in TEXTS))["input_ids"]
    pieces = {tuple(run[i : i + 10]) for i in range(0, len(run) - 9, 10)}
    rows = [tuple(row) for row in batches.view(-1, 10).tolist()]
    assert set(rows) <= pieces
    assert len(set(rows)) == 6


def test_sequences_start_with_bos_where_the_tokenizer_adds_it() -> None:
    bos = tiny_tokenizer().bos_token_id
    plain, started = (
        sequences(TEXTS, SECTION, tiny_tokenizer()),
        sequences(TEXTS, SECTION, with_bos()),
    )
    assert (plain != bos).all()
    assert started.shape == (3, 2, 10)
    assert (started[..., 0] == bos).all()
    assert (started[..., 1:] != bos).all()


def test_sequences_follow_the_seed() -> None:
    tokenizer = tiny_tokenizer()
    one, same, other = (
        sequences(TEXTS, SECTION.model_copy(update={"seed": seed}), tokenizer) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_sequences_read_no_more_of_the_corpus_than_needed() -> None:
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield WORDS

    sequences(endless(), SECTION, tiny_tokenizer())
    assert read < 100


def test_a_short_corpus_is_refused() -> None:
    with pytest.raises(DataError, match=r"mask\.corpus.* 6 are needed; lower mask\.batches"):
        sequences(["too short"], SECTION, tiny_tokenizer())
    with pytest.raises(DataError, match="0 sequences"):
        sequences([], SECTION, tiny_tokenizer())


def test_batches_of_text_files(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text(
            "\n\n".join(TEXTS[number * 10 :][:10]) + "\n\n \n\n"
        )
    files = tuple(str(tmp_path / f"{number}.txt") for number in range(2))
    section = SECTION.model_copy(update={"corpus": files})
    assert sorted(text.strip() for text in corpus_texts(section)) == sorted(TEXTS)
    assert list(corpus_texts(section)) != [*corpus_texts(section.model_copy(update={"seed": 1}))]
    batches = calibration_batches(section, tiny_tokenizer())
    assert batches.shape == (3, 2, 10)
    assert torch.equal(batches, calibration_batches(section, tiny_tokenizer()))


@pytest.mark.parametrize("corpus", ["missing.txt", ("a.md", "b.md")])
def test_a_missing_corpus_is_refused(corpus: str | tuple[str, ...], tmp_path: Path) -> None:
    names = (corpus,) if isinstance(corpus, str) else corpus
    section = SECTION.model_copy(update={"corpus": tuple(str(tmp_path / n) for n in names)})
    with pytest.raises(DataError, match=r"mask\.corpus.*cannot be read"):
        list(corpus_texts(section))


def test_a_corpus_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"\xff\xfe\x00 not utf-8")
    with pytest.raises(DataError, match="cannot be read"):
        list(corpus_texts(SECTION.model_copy(update={"corpus": str(path)})))


@pytest.mark.real
def test_the_demo_corpus_holds_no_labelled_review() -> None:
    section = TaskSection(name="rotten_tomatoes")
    split = load_examples(resolve_task(section), section)
    reviews = {str(example.fields["text"]) for example in (*split.train, *split.test)}
    assert not reviews & set(corpus_texts(MaskSection(corpus="demo")))
