"""A conversation as the text of a model's chat template, with the places of the answers in it.

Templates seldom say which part is the assistant's. So a conversation is rendered twice: as it is,
and with a mark in the place of each answer. What stands between the marks must stand between the
answers, too, letter by letter, or else the template does more with an answer than to show it, and
the conversation is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from meerkat.data.conversations import Message
from meerkat.errors import DataError

__all__ = ["ChatTemplate", "Rendered"]

_DATE = "26 Jul 2024"
"""What a template that shows the date shows, so that tokens are the same on every day; the one that
Llama 3's shows where no clock is at hand."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    answers: tuple[tuple[int, int], ...]
    """First character of each answer, with a blank before it, and the one after its last."""


class ChatTemplate:
    """The template of a tokenizer, or one that takes its place.

    Raises:
        DataError: The tokenizer has none and none is given, or a file's name is given.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, own: str | None = None):
        if own is not None and "{" not in own:
            raise DataError(
                f"task.chat_template = {own!r} shows no message; give Jinja text, or the name of a "
                "file that ends in .jinja"
            )
        if own is None and not tokenizer.chat_template:
            raise DataError(
                "the model's tokenizer has no chat template (a base model has none); name one in "
                "task.chat_template, as text or as a .jinja file, or take the model's chat version"
            )
        self._tokenizer = tokenizer
        try:
            self.text: str = tokenizer.get_chat_template(own)
        except ValueError:
            raise DataError(
                "the model's tokenizer has several chat templates and no default; copy one of them "
                "to a .jinja file and name it in task.chat_template"
            ) from None
        if "strftime_now" in self.text:
            clock = f"{{% macro strftime_now(format) %}}{_DATE}{{% endmacro %}}"
            self.text = clock + self.text

    def prompt(self, messages: Sequence[Message], where: str) -> str:
        """Messages as the text that the assistant's next answer follows."""
        return self._render(messages, where, add_generation_prompt=True)

    def render(self, messages: Sequence[Message], where: str) -> Rendered:
        """A conversation with an answer, and where its answers are.

        Raises:
            DataError: The template refuses it, or changes an answer.
        """
        text = self._render(messages, where)
        between = self._between(messages, where)
        numbers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        answers, place = [], len(between[0])
        if not text.startswith(between[0]):
            raise DataError(self._changed(where, messages, numbers[0]))
        for number, (before, after) in zip(numbers, pairwise(between), strict=True):
            shown = _shown(text, place, messages[number]["content"], after)
            if shown is None:
                raise DataError(self._changed(where, messages, number))
            # As a prompt ends before a blank, which is then part of the answer's first token.
            blank = before.endswith(" ") and not before[:-1].endswith((" ", "\n"))
            answers.append((place - blank, place + len(shown)))
            place += len(shown) + len(after)
        if place != len(text):
            raise DataError(self._changed(where, messages, numbers[-1]))
        return Rendered(text, tuple(answers))

    def _between(self, messages: Sequence[Message], where: str) -> list[str]:
        """What stands before the first answer, between two of them, and after the last."""
        contents = "".join(message["content"] for message in messages)
        word = next(w for w in (f"answer{n}of" for n in count(1000)) if w not in contents)
        marked = [
            {**message, "content": f"{word}{number}x"}
            if message["role"] == "assistant"
            else message
            for number, message in enumerate(messages)
        ]
        rest, parts = self._render(marked, where), []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before, found, rest = rest.partition(f"{word}{number}x")
                if not found:
                    raise DataError(
                        f"{where}, message {number + 1}: the chat template leaves this answer of "
                        "the assistant out; give another in task.chat_template"
                    )
                parts.append(before)
        if word in rest:
            raise DataError(
                f"{where}: the chat template shows an answer twice; give another in "
                "task.chat_template"
            )
        return [*parts, rest]

    def _changed(self, where: str, messages: Sequence[Message], number: int) -> str:
        shown = messages[number]["content"]
        shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
        return (
            f"{where}, message {number + 1}: the chat template does not show this answer of the "
            f"assistant as it is ({shown!r}; it may leave out earlier thoughts), so its tokens "
            "cannot be told; remove that part, or give another in task.chat_template"
        )

    def _render(self, messages: Sequence[Message], where: str, **options: Any) -> str:
        try:
            return self._apply(messages, **options)
        except Exception as error:  # of any type: a template is a program
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            number = self._refused(messages, options)
            role = messages[number]["role"]
            raise DataError(
                f"{where}, message {number + 1}: the chat template refuses this message by the "
                f"{role}: {reason}; leave the row out, or give another in task.chat_template"
            ) from None

    def _refused(self, messages: Sequence[Message], options: dict[str, Any]) -> int:
        """The first message with which the template fails."""
        for number in range(len(messages)):
            try:
                self._apply(messages[: number + 1], **options)
            except Exception:
                return number
        return len(messages) - 1

    def _apply(self, messages: Sequence[Message], **options: Any) -> str:
        plain = [dict(message) for message in messages]
        text = self._tokenizer.apply_chat_template(
            plain, chat_template=self.text, tokenize=False, date_string=_DATE, **options
        )
        assert isinstance(text, str)
        return text


def _shown(text: str, place: int, content: str, after: str) -> str | None:
    """An answer as it stands at a place, before what follows it: as it is, or trimmed."""
    for shown in (content, content.strip()):
        if text.startswith(shown, place) and text.startswith(after, place + len(shown)):
            return shown
    return None
