"""A task: source of its examples, prompt template, and verbalizers or answer column."""

from __future__ import annotations

import string
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["FILE_SUFFIXES", "MESSAGES", "TOKENS", "Example", "Format", "Task"]

Format = Literal["columns", "chat", "messages", "sharegpt", "alpaca"]
MESSAGES = "messages"
"""The one field of an example that is a conversation: what comes before its last answer, as a list
of `{"role": ..., "content": ...}`; or a text, which is one message of the user."""

FILE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
"""Names of sources that are one file end in one of these."""
TOKENS = "tokens"
"""The task whose rows are tokens."""


@dataclass(frozen=True)
class Task:
    """A data set as a language model sees it (method.md section 8).

    A task is a classification by `verbalizers`, free text by `answer`, pairs by `chosen` and
    `rejected`, or a conversation by `format`; one of them is set.
    """

    name: str
    source: str
    """Hub id, folder or file; `demo` and `demo:...` are the data of `data.demo`."""
    prompt: str
    """Template with `{column}` fields; the model's answer follows it."""
    verbalizers: tuple[str, ...] = ()
    """The answer for each label, in the order of `labels`."""
    labels: tuple[str, ...] = ()
    """Values of the label column, as text; empty means 0, 1, … in verbalizer order."""
    label: str = "label"
    """Column of the label."""
    answer: str | None = None
    """Column of a free-text answer."""
    chosen: str | None = None
    """Column of the answer of a pair that people prefer."""
    rejected: str | None = None
    """Column of the other one."""
    config: str | None = None
    """Configuration of a hub data set or a demo source."""
    train_split: str = "train"
    test_split: str | None = None
    """Split to evaluate on; without one, a part of the training split is held out."""
    validation_split: str | None = None
    """Split to choose a round by; without one, held-out examples that are not tested on."""
    holder: str | None = None
    """Column that says who holds a row, for a natural partition."""
    image: str | None = None
    """Column of an image, of a task over images: there is no prompt then, and the verbalizers are
    classes of the network, by name or number."""
    cut: str | None = None
    """The field that is shortened when an example is too long; the first field by default."""
    format: Format = "columns"
    """What a row is: columns for the prompt, or a conversation in one of several forms."""
    chat_template: str | None = None
    """Jinja template of a conversation, if not the tokenizer's."""

    @property
    def is_chat(self) -> bool:
        """Are its examples conversations?"""
        return self.format != "columns"

    @property
    def fields(self) -> tuple[str, ...]:
        """Columns that the prompt shows, in order; the messages of a conversation, or the image."""
        if self.is_chat:
            return (MESSAGES,)
        if self.image is not None:
            return (self.image,)
        parts = string.Formatter().parse(self.prompt)
        return tuple(field for _, field, _, _ in parts if field is not None)

    @property
    def cut_field(self) -> str:
        return self.cut or self.fields[0]

    @property
    def is_tokens(self) -> bool:
        """Are its rows tokens already? See `data.token_rows`."""
        return self.name == TOKENS

    @property
    def has_classes(self) -> bool:
        """Is it a classification, and not free text, pairs or a conversation?"""
        return self.answer is None and not self.has_pairs and not self.is_chat

    @property
    def has_pairs(self) -> bool:
        """Does an example have two answers, one of which is preferred?"""
        return self.chosen is not None

    @property
    def outputs(self) -> tuple[str, ...]:
        """Columns of the label, the answer, or the two answers."""
        if self.chosen is not None and self.rejected is not None:
            return (self.chosen, self.rejected)
        return (self.label,) if self.answer is None else (self.answer,)

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.labels or tuple(str(index) for index in range(len(self.verbalizers)))


@dataclass(frozen=True)
class Example:
    """One row: the prompt's fields, and a label (index into the verbalizers), an answer, or two.

    Of a conversation the answer is the assistant's last message.
    """

    fields: dict[str, Any]
    label: int = 0
    answer: str = ""
    """A free text, or the chosen answer of a pair."""
    holder: str = ""
    """Who holds it, where the task has a column for that."""
    rejected: str = ""
    """The other answer of a pair."""
    where: str = field(default="", compare=False)
    """Source, split and row of a conversation, for errors about it."""
