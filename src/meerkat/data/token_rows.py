"""Rows that are tokens already: `input_ids`, and `labels` with -100 where no loss is taken."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from meerkat.data.encoding import Encoded, Encoder
from meerkat.errors import DataError
from meerkat.tasks import Example

__all__ = ["UNSCORED", "TokenEncoder", "split_of"]

UNSCORED = -100
"""The label of a token that is read and not scored."""


class TokenEncoder(Encoder):
    """Takes tokens as they are. A public text, which has no labels, is tokenised as a prompt."""

    def encode(self, example: Example) -> Encoded:
        """The prompt is what stands before the first scored token, the answer what is scored.

        Raises:
            DataError: The row is too long, or not of this form.
        """
        if not example.answer:
            return super().encode(example)
        ids = _tokens(example.fields["input_ids"], "input_ids")
        prompt, answer = split_of(ids, _tokens(example.answer, "labels"))
        length = len(prompt) + len(answer) - 1  # the last one is a target only
        if length > self.max_length:
            raise DataError(
                f"task.max_length = {self.max_length} (the model's window, or the recipe's) is "
                f"less than the {length} tokens of a row; cut it where it is tokenised, or raise it"
            )
        return Encoded(prompt, (answer,), 0)


def split_of(ids: Sequence[int], labels: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A row's tokens up to the first that is scored, and those that are.

    The first token of a row has nothing before it, so it is never scored; what follows the last
    scored one cannot change the loss and is left out.

    >>> split_of([7, 8, 9, 5, 0], [-100, -100, 9, 5, -100])
    ((7, 8), (9, 5))
    >>> split_of([7, 8, 9], [7, 8, 9])
    ((7,), (8, 9))

    Raises:
        DataError: Labels are of another length, differ from their tokens, are all -100, or leave
            out tokens between two that are scored.
    """
    if len(ids) != len(labels):
        raise DataError(f"{len(ids)} input_ids and {len(labels)} labels; both need one a token")
    scored = [place for place in range(1, len(ids)) if labels[place] != UNSCORED]
    if not scored:
        raise DataError("labels are all -100 after the first token: nothing is scored; drop it")
    first, last = scored[0], scored[-1]
    if len(scored) != last + 1 - first:
        raise DataError(
            "labels leave out tokens between two that are scored; one stretch can be scored: make "
            "a row for each, or leave all but the last out"
        )
    if any(labels[place] != ids[place] for place in scored):
        raise DataError(
            "labels differ from input_ids at the same place; they are not shifted: a scored label "
            "is its token"
        )
    return tuple(ids[:first]), tuple(ids[first : last + 1])


def _tokens(value: Any, column: str) -> list[int]:
    """Whole numbers of a list, or of one as text."""
    try:
        found = json.loads(value) if isinstance(value, str) else list(value)
        return [int(token) for token in found]
    except (TypeError, ValueError):
        raise DataError(f"task.name = 'tokens': {column} is no list of token numbers") from None
