"""The public texts of a subspace: sentences of a corpus, or of what the model writes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Protocol

import numpy as np
from jaxtyping import Int64

from meerkat.config import Recipe
from meerkat.config.sections import MaskSection, SubspaceSection
from meerkat.data.corpus import corpus_texts
from meerkat.errors import DataError
from meerkat.models.loading import LoadedModel
from meerkat.progress import Progress
from meerkat.runs.written_texts import WRITTEN, written_texts
from meerkat.tasks import Example, Task
from meerkat.zo.noise import permutation

__all__ = ["TextSources", "corpus_of", "public_examples"]

_SHORTEST, _LONGEST = 4, 60
"""Words of a sentence that is taken."""
_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*|\n+")
"""Between two sentences; Chinese and Japanese have no blank there."""
_NO_BLANKS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
)
_WORD = re.compile(rf"[{_NO_BLANKS}]|[^\s{_NO_BLANKS}]+")
"""A word; a character counts as one in scripts without blanks between words: Thai, Lao, Burmese,
Khmer, Japanese, Chinese."""
_POOL = 16
"""Sentences are drawn from at most this many times as many as are needed."""


class TextSources(Protocol):
    """What public texts are found from; `assembly.Assembly`."""

    @property
    def recipe(self) -> Recipe: ...
    @property
    def loaded(self) -> LoadedModel: ...
    @property
    def task(self) -> Task: ...
    @property
    def progress(self) -> Progress: ...


def corpus_of(sources: TextSources, section: SubspaceSection) -> MaskSection:
    """The mask's section with the corpus that a subspace is made from."""
    corpus = section.corpus or sources.recipe.mask.corpus
    return sources.recipe.mask.model_copy(update={"corpus": corpus})


def public_examples(sources: TextSources, section: SubspaceSection) -> list[Example]:
    """Sentences of the corpus as the fields of the task's prompt; they have no label."""
    of_corpus = corpus_of(sources, section)
    names = sorted(set(sources.task.fields))
    needed = section.texts * len(names)
    if of_corpus.corpus == WRITTEN:
        chosen = np.arange(needed).reshape(section.texts, -1)
        return _examples(names, _written(sources, section, needed), chosen)
    pool: list[str] = []
    for sentence in _sentences(corpus_texts(of_corpus)):
        pool.append(sentence)
        if len(pool) >= needed * _POOL:
            break
    if len(pool) < needed:
        raise DataError(
            f"subspace.corpus = {of_corpus.corpus!r} has {len(pool)} sentences of {_SHORTEST} to "
            f"{_LONGEST} words, {needed} are needed; lower subspace.texts"
        )
    chosen = permutation(section.seed, (2, 1), len(pool))[:needed].reshape(section.texts, -1)
    return _examples(names, pool, chosen)


def _examples(
    names: Sequence[str], pool: Sequence[str], chosen: Int64[np.ndarray, "N F"]
) -> list[Example]:
    return [
        Example({name: pool[place] for name, place in zip(names, row, strict=True)}, 0)
        for row in chosen.tolist()
    ]


def _written(sources: TextSources, section: SubspaceSection, needed: int) -> list[str]:
    """The first sentence of each text that the model writes, no two alike."""
    sources.progress.start("Writing texts", needed)
    found: dict[str, None] = {}
    texts = written_texts(sources.loaded, sources.task, section.seed)
    for text in islice(texts, _POOL * needed):
        sentence = next(_sentences([text]), None)
        if sentence is not None and sentence not in found:
            found[sentence] = None
            sources.progress.advance()
        if len(found) == needed:
            return list(found)
    raise DataError(
        f"subspace.corpus = {WRITTEN!r}: of {_POOL * needed} texts that the model wrote "
        f"{len(found)} begin with a sentence of {_SHORTEST} to {_LONGEST} words, {needed} are "
        "needed; lower subspace.texts, or name a corpus"
    )


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Sentences of a few to some dozen words."""
    for text in texts:
        for sentence in _END.split(text):
            if _SHORTEST <= len(_WORD.findall(sentence)) <= _LONGEST:
                yield sentence.strip()
