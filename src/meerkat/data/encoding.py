"""Examples to tokens: the text is cut, never the question or the answer position."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from meerkat.errors import DataError
from meerkat.tasks import Example, Task

__all__ = ["Encoded", "Encoder"]


@dataclass(frozen=True)
class Encoded:
    """Tokens of one example.

    The answers share the prompt: one for each verbalizer, the one free text, or those of a pair,
    the chosen one first. The last token of an answer is a target only; the model never reads it.

    A conversation has one answer, all that follows its first prompt, of which parts are scored.
    """

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    label: int
    spans: tuple[tuple[int, int], ...] = ()
    """First token and the one after the last of each part of the one answer that is scored; all of
    an answer is where there are none."""
    reference: str = ""
    """The answer as text, where it is free."""

    @property
    def lead(self) -> tuple[int, ...]:
        """What the model reads before it writes the last answer."""
        if not self.spans:
            return self.prompt
        return self.prompt + self.answers[0][: self.spans[-1][0]]

    def scored(self, which: int) -> list[int]:
        """Places of an answer's tokens that are scored."""
        spans = self.spans or ((0, len(self.answers[which])),)
        return [place for first, after in spans for place in range(first, after)]


class Encoder:
    """Encodes the examples of a task for one tokenizer.

    Raises:
        DataError: Two verbalizers start with the same token, or one has no token.
    """

    def __init__(
        self, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int, window: int
    ):
        self.task = task
        self.max_length = min(max_length, window)
        self._tokenizer = tokenizer
        # The blank between prompt and answer belongs to the answer's first token. A prompt that
        # ends in a new line is followed by the answer as it stands.
        self._template = task.prompt.removesuffix(" ")
        blank = task.prompt.endswith(" ") or not task.prompt[-1:].isspace()
        self._separator = " " if blank else ""
        self.verbalizers = tuple(self._answer(word) for word in task.verbalizers)
        self._check_verbalizers()

    def encode(self, example: Example) -> Encoded:
        """Tokens of an example, at most `max_length` with its longest answer.

        Raises:
            DataError: The example is too long even with an empty text.
        """
        texts = [example.answer, example.rejected] if self.task.has_pairs else [example.answer]
        answers = self.verbalizers or tuple(self._answer(text) for text in texts)
        room = self.max_length - max(map(len, answers)) + 1
        prompt = tuple(self._fit(example, room))
        return Encoded(prompt, answers, example.label, reference=example.answer)

    def _fit(self, example: Example, room: int) -> list[int]:
        """The prompt in at most `room` tokens, with as much of the text as fits."""
        ids = self._prompt(example, None)
        if len(ids) <= room:
            return ids
        text = str(example.fields[self.task.cut_field])
        fits, too_long = -1, len(text)
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if len(self._prompt(example, middle)) <= room:
                fits = middle
            else:
                too_long = middle
        if fits < 0:
            raise DataError(
                f"task.max_length = {self.max_length} (the model's window, or the recipe's) is "
                f"too small for the prompt without {{{self.task.cut_field}}}; raise it"
            )
        return self._prompt(example, fits)

    def _prompt(self, example: Example, keep: int | None) -> list[int]:
        """Tokens of the prompt with the first `keep` characters of the text; `None` keeps all."""
        fields = dict(example.fields)
        fields[self.task.cut_field] = str(fields[self.task.cut_field])[:keep]
        ids = list(self._ids(self._template.format(**fields), special=True))
        # Some tokenizers end a text by EOS; the answer comes first.
        return ids[:-1] if len(ids) > 1 and ids[-1] == self._tokenizer.eos_token_id else ids

    def _answer(self, answer: str) -> tuple[int, ...]:
        """Tokens of an answer as they follow the end of the prompt."""
        # Some tokenizers put a blank before a text, so that the answer needs a word before it.
        tail = self._template.rpartition("}")[2][-20:] or "a"
        before = self._ids(tail)
        both = self._ids(tail + self._separator + answer)
        if both[: len(before)] == before:
            return both[len(before) :]
        return self._ids(self._separator + answer)

    def _ids(self, text: str, special: bool = False) -> tuple[int, ...]:
        # A text over the tokenizer's own length limit is no cause for a warning: it is cut here.
        return tuple(self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _check_verbalizers(self) -> None:
        first: dict[int, str] = {}
        for word, tokens in zip(self.task.verbalizers, self.verbalizers, strict=True):
            if not tokens or not word.strip():
                raise DataError(f"task.verbalizers: {word!r} has no token; give it a word")
            if tokens[0] in first:
                raise DataError(
                    f"task.verbalizers: {first[tokens[0]]!r} and {word!r} start with the same "
                    "token; choose words that differ from their first token on"
                )
            first[tokens[0]] = word
