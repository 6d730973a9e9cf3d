"""Conversations to tokens, with the loss on those of the assistant alone.

A turn's tokens are those of its text and the token that ends it. That they are is checked for each
conversation: decoded, they must give the assistant's text.
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from meerkat.data.chat_template import ChatTemplate, Rendered
from meerkat.data.conversations import Message, messages_of
from meerkat.data.encoding import Encoded
from meerkat.errors import DataError
from meerkat.tasks import Example, Task

__all__ = ["ChatEncoder"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Tokens:
    """A conversation as tokens, to the end of its last answer."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    """First token of each answer, and the one after the token that ends it."""


class ChatEncoder:
    """Encodes conversations for one tokenizer.

    Args:
        max_length: Most tokens that the model reads of a conversation.
        window: Most that it can.

    Raises:
        DataError: There is no template.
    """

    verbalizers: tuple[tuple[int, ...], ...] = ()

    def __init__(
        self, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int, window: int
    ):
        self.task = task
        self.max_length = min(max_length, window)
        self.template = ChatTemplate(tokenizer, task.chat_template)
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = (index for index, token in added.items() if token.special)
        self._special = frozenset([*tokenizer.all_special_ids, *special])
        self._said_cut = False

    def encode(self, example: Example) -> Encoded:
        """Tokens of a conversation, of which the model reads at most `max_length`.

        Of a longer one the earliest turns are left out, then the system's message and the
        beginning of the user's last message as far as need be. The end of the last answer is left
        out only where that alone is too long, which is logged once.

        Raises:
            DataError: The template refuses the conversation, or its answers cannot be told.
        """
        messages = messages_of(example)
        if not example.answer:  # a public text, which has none
            ids = self._ids(self.template.prompt(messages, example.where))[-self.max_length :]
            return Encoded(tuple(ids), ((self._end,),), 0)
        found = self._fit(messages, example.where)
        start = found.spans[0][0]
        spans = tuple((first - start, after - start) for first, after in found.spans)
        answer = found.ids[start:]
        return Encoded(found.ids[:start], (answer,), 0, spans, example.answer)

    def check(self, examples: Sequence[Example]) -> None:
        """Does the template take these conversations?

        Raises:
            DataError: Not this one.
        """
        for example in examples:
            self.template.render(messages_of(example), example.where)

    def before_user(self, where: str = "a conversation") -> list[int]:
        """Tokens that the first message of a user follows."""
        mark = "message1000"
        text = self.template.prompt([{"role": "user", "content": mark}], where)
        return list(self._ids(text.partition(mark)[0]))

    @property
    def _end(self) -> int:
        return self._tokenizer.eos_token_id or 0

    def _fit(self, messages: Sequence[Message], where: str) -> _Tokens:
        """The tokens of as much of a conversation as has room."""
        most = self.max_length + 1  # the last token is never read

        def tokens(kept: Sequence[Message]) -> _Tokens:
            return self._tokens(self.template.render(kept, where), where)

        def fits(kept: Sequence[Message]) -> bool:
            return len(tokens(kept).ids) <= most

        whole = tokens(messages)
        if len(whole.ids) <= most:
            return whole
        system = [m for m in messages[:1] if m["role"] == "system"]
        turns = list(messages[len(system) :])
        pairs = len(turns) // 2
        kept = _most(pairs - 1, lambda n: fits([*system, *turns[2 * (pairs - n) :]]))
        if kept:
            return tokens([*system, *turns[2 * (pairs - kept) :]])
        user, answer = turns[-2:]
        for first in (system, []):

            def cut(size: int, first: Sequence[Message] = first) -> list[Message]:
                return [*first, {**user, "content": user["content"].strip()[-size:]}, answer]

            size = _most(len(user["content"].strip()), lambda n: fits(cut(n)))
            if size:
                return tokens(cut(size))
        return self._without_end(tokens(cut(1)), most, where)

    def _without_end(self, found: _Tokens, most: int, where: str) -> _Tokens:
        """As many tokens as have room of a conversation whose last answer alone is too long.

        Raises:
            DataError: Not even one of them has room.
        """
        ((first, after),) = found.spans
        if first >= most:
            raise DataError(
                f"{where}: task.max_length = {self.max_length} (the model's window, or the "
                f"recipe's) leaves no token for the answer, before which the chat template has "
                f"{first}; raise it"
            )
        if not self._said_cut:
            self._said_cut = True
            _logger.warning(
                "%s: the last answer of %d tokens alone is longer than task.max_length = %d; its "
                "end is left out, and so it is in other such rows",
                where,
                after - first,
                self.max_length,
            )
        return _Tokens(found.ids[:most], ((first, most),))

    def _tokens(self, rendered: Rendered, where: str) -> _Tokens:
        found = self._together(rendered) or self._apart(rendered)
        if found is None:
            raise DataError(
                f"{where}: the chat template ends an answer without a special token of the model's "
                "tokenizer, so that a model could not learn where to stop; give one in "
                "task.chat_template that does, such as by {{ eos_token }}"
            )
        for (start, end), (first, after) in zip(rendered.answers, found.spans, strict=True):
            self._prove(rendered.text[start:end], found.ids[first:after], where)
        return found

    def _prove(self, answer: str, ids: Sequence[int], where: str) -> None:
        """Are these the tokens of an answer, and the one that ends it?

        Raises:
            DataError: They are not.
        """
        if self._tokenizer.unk_token_id in ids:  # which stands for any letter
            return
        decoded = str(self._tokenizer.decode(list(ids[:-1]), clean_up_tokenization_spaces=False))
        if _plain(decoded) != _plain(answer):
            raise DataError(
                f"{where}: the tokenizer makes {decoded.strip()[:40]!r} of the answer "
                f"{answer.strip()[:40]!r}, so its tokens cannot be told; leave the row out"
            )

    def _together(self, rendered: Rendered) -> _Tokens | None:
        """From the tokens of the whole text; None where one of them is over a border of an answer.

        This is what `apply_chat_template` gives, so it comes first.
        """
        if not self._tokenizer.is_fast:
            return None
        found = self._tokenizer(
            rendered.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids, offsets = found["input_ids"], found["offset_mapping"]
        spans, place = [], 0
        for start, end in rendered.answers:
            while place < len(ids) and offsets[place][1] <= start:
                place += 1
            first = place
            while place < len(ids) and offsets[place][1] <= end:
                place += 1
            over = (first == len(ids) or offsets[first][0] < start or place == len(ids)) or offsets[
                place
            ][0] < end
            after = None if over else self._after_end(ids, place)
            if after is None or first == place:
                return None
            spans.append((first, after))
            place = after
        return _Tokens(tuple(ids[: spans[-1][1]]), tuple(spans))

    def _apart(self, rendered: Rendered) -> _Tokens | None:
        """From the tokens of each part; None where nothing ends an answer."""
        borders = [0, *(border for answer in rendered.answers for border in answer)]
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for number, (start, end) in enumerate(pairwise([*borders, len(rendered.text)])):
            first = len(ids)
            ids += self._ids(rendered.text[start:end])
            if number and number % 2 == 0:  # what follows an answer
                after = self._after_end(ids, first)
                if after is None:
                    return None
                spans[-1] = (spans[-1][0], after)
            elif number % 2:
                spans.append((first, len(ids)))
        return _Tokens(tuple(ids[: spans[-1][1]]), tuple(spans))

    def _after_end(self, ids: Sequence[int], place: int) -> int | None:
        """The place after the special token that ends an answer; only blanks come before it."""
        for at in range(place, len(ids)):
            if ids[at] in self._special:
                return at + 1
            if str(self._tokenizer.decode([ids[at]])).strip():
                break
        return None

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _plain(text: str) -> str:
    """A text up to what tokenizers may do with it: blanks around it, and forms of a letter."""
    return unicodedata.normalize("NFKC", text).strip()


def _most(high: int, fits: Callable[[int], bool]) -> int:
    """The most of 0, 1, … `high` that fits; 0 is taken to."""
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
