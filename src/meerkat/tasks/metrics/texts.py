"""Metrics of written answers: each gives an answer and its reference a score.

Exact match and token F1 are those of SQuAD: case, punctuation, articles and blanks do not count.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from meerkat.errors import RecipeError
from meerkat.extras import needed_extra
from meerkat.tasks.functions import own_function
from meerkat.tasks.metrics.base import Sums
from meerkat.tasks.objective import Predictions

__all__ = ["ExactMatch", "Function", "Regex", "RougeL", "TextMetric", "TokenF1"]

_NAME = re.compile(r"[A-Za-z0-9_.:-]+")
_FIELD = "evaluation.metrics"


class TextMetric:
    """The mean of the answers' scores, between 0 and `largest`. A sum: that of the scores."""

    title: str
    percent, lower_is_better, of_classes = True, False, False
    largest: float = 1.0
    name: str = ""
    """In results, where it has options."""

    def score(self, prediction: str, reference: str) -> float:
        """How good a written answer is."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Load what the scores need, so that what is missing shows before any pass."""

    def sums(self, found: Predictions) -> Sums:
        pairs = zip(found.written, found.references, strict=True)
        return np.array([math.fsum(self.score(*pair) for pair in pairs)], np.float64)

    def value(self, sums: Sums, examples: int) -> float:
        return float(sums[0]) / examples

    def is_possible(self, sums: Sums, examples: int, classes: int) -> bool:
        return len(sums) == 1 and 0 <= sums[0] <= self.largest * examples


def normalised(text: str) -> str:
    """A text as SQuAD compares it.

    >>> normalised("The  cat, sat.")
    'cat sat'
    """
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


class ExactMatch(TextMetric):
    """The share of answers that are the reference."""

    title = "exact match"

    def score(self, prediction: str, reference: str) -> float:
        return float(normalised(prediction) == normalised(reference))


class TokenF1(TextMetric):
    """F1 of the words that an answer shares with its reference."""

    title = "token F1"

    def score(self, prediction: str, reference: str) -> float:
        words, wanted = normalised(prediction).split(), normalised(reference).split()
        if not words or not wanted:
            return float(words == wanted)
        shared = sum((Counter(words) & Counter(wanted)).values())
        return 2 * shared / (len(words) + len(wanted))


class RougeL(TextMetric):
    """F1 by the longest common subsequence of words, of the package `rouge-score`, with stems."""

    title = "ROUGE-L"

    @cached_property
    def _scorer(self) -> Any:
        with needed_extra("metrics"):
            from rouge_score.rouge_scorer import RougeScorer
        return RougeScorer(["rougeL"], use_stemmer=True)

    def prepare(self) -> None:
        _ = self._scorer

    def score(self, prediction: str, reference: str) -> float:
        return float(self._scorer.score(reference, prediction)["rougeL"].fmeasure)


@dataclass(frozen=True)
class Regex(TextMetric):
    """The share of answers in which a pattern's last match is that of the reference.

    What is compared is the first group, or the match where there is none, without blanks and
    commas; a number by its value. An answer or a reference without a match counts 0.
    """

    pattern: str
    name: str = "regex"
    title: ClassVar[str] = "regular expression"  # type: ignore[misc]

    def __post_init__(self) -> None:
        _check_name(self.name)
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"pattern = {self.pattern!r} is no regular expression: {error}"
            ) from None

    def score(self, prediction: str, reference: str) -> float:
        found, wanted = self._last(prediction), self._last(reference)
        return float(found is not None and found == wanted)

    def _last(self, text: str) -> float | str | None:
        matches = list(re.finditer(self.pattern, text))
        if not matches:
            return None
        match = matches[-1]
        found = (match.group(1) if match.re.groups else match.group()) or ""
        bare = found.replace(",", "").strip().rstrip(".")
        try:
            return float(bare)
        except ValueError:
            return bare


@dataclass(frozen=True)
class Function(TextMetric):
    """The mean of what a function of one's own gives an answer: (prediction, reference) → float."""

    function: str
    largest: float = 1.0
    """A score lies between 0 and this."""
    name: str = ""

    def __post_init__(self) -> None:
        _check_name(self.name or self.function)
        if self.largest <= 0:
            raise ValueError(f"largest = {self.largest:g}: scores go from 0 to it; raise it")

    @property
    def title(self) -> str:  # type: ignore[override]
        return self.name or self.function

    @property
    def percent(self) -> bool:  # type: ignore[override]
        return self.largest == 1

    @cached_property
    def _call(self) -> Callable[..., Any]:
        return own_function(self.function, _FIELD)

    def prepare(self) -> None:
        _ = self._call

    def score(self, prediction: str, reference: str) -> float:
        call = self._call
        try:
            found = float(call(prediction, reference))
        except Exception as error:  # of any type: it is the user's code
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RecipeError(f"{_FIELD}: {self.function} failed: {reason}") from None
        if not 0 <= found <= self.largest:
            raise RecipeError(
                f"{_FIELD}: {self.function} gave {found:g}, and a score is from 0 to "
                f"{self.largest:g}; change it, or set the metric's option largest"
            )
        return found


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"name = {name!r}: take letters, digits, _ and -")
