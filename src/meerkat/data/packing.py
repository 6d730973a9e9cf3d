"""Examples side by side in one row of tokens, so that no padding is ever multiplied.

Three examples of 3, 5 and 2 tokens are one row of 10, not three rows of 5. Only attention,
which must keep them apart, sees them as a grid of 3 × 5 (`models/attention.py`). The verbalizers
of one example branch off its prompt, which is computed once:

    prompt prompt prompt ┬ answer₀ answer₀
                         └ answer₁
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from meerkat.data.encoding import Encoded

__all__ = ["Layout", "PackedBatch", "pack", "packs"]


class Layout(NamedTuple):
    """How T packed tokens stand in a grid of S sequences of length L."""

    gather: Int64[Tensor, "S L"]
    """Packed place of each token of the grid; a pad points to place 0."""
    scatter: Int64[Tensor, " T"]
    """Place in the flattened grid of each packed token."""
    positions: Int64[Tensor, "S L"]
    """Position of each token in its sequence; tokens of parallel answers share positions."""
    allowed: Bool[Tensor, "S 1 L L"] | None
    """Who may attend to whom; `None` is plain causal attention."""


@dataclass(frozen=True)
class PackedBatch:
    """S examples with A answers each, packed into T tokens, scored at P positions."""

    input_ids: Int64[Tensor, "1 T"]
    position_ids: Int64[Tensor, "1 T"]
    layout: Layout
    scored: Int64[Tensor, " P"]
    """Places whose next token is scored."""
    targets: Int64[Tensor, " N"]
    """The next token of each; N is P, or 0 where there are `candidates`."""
    answer: Int64[Tensor, " N"]
    """Which answer a target belongs to, counted over S · A."""
    weight: Float32[Tensor, " N"]
    """1 / number of that answer's targets."""
    labels: Int64[Tensor, " S"]
    candidates: Int64[Tensor, " A"] | None
    """The answers, where all are one token and the same for all examples: the only rows of the
    LM head that matter. `scored` then has one place for each example."""
    answers: int
    """A; 1 is free text."""

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def examples(self) -> int:
        return self.labels.shape[0]

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on a device."""

        def move(part: Any) -> Any:
            if isinstance(part, Layout):
                return Layout(*map(move, part))
            return part.to(device) if isinstance(part, Tensor) else part

        return PackedBatch(*(move(getattr(self, field.name)) for field in fields(self)))


def packs(
    examples: Sequence[Encoded], tokens_per_pass: int, scored_per_pass: int | None = None
) -> Iterator[PackedBatch]:
    """Pack in order, starting a new pack where the next example would exceed a budget.

    Args:
        scored_per_pass: Most answer tokens, each of which needs a row of logits over the whole
            vocabulary; an example with more of them has a pack of its own.
    """
    group: list[Encoded] = []
    total = scored = 0
    for example in examples:
        length = len(_tokens(example))
        answers = sum(len(example.scored(which)) for which in range(len(example.answers)))
        full = scored_per_pass is not None and scored + answers > scored_per_pass
        if group and (full or total + length > tokens_per_pass):
            yield pack(group)
            group, total, scored = [], 0, 0
        group.append(example)
        total += length
        scored += answers
    if group:
        yield pack(group)


def pack(examples: Sequence[Encoded]) -> PackedBatch:
    """One packed batch.

    Raises:
        ValueError: The examples differ in the number of their answers, or there is none.
    """
    answers = len(examples[0].answers) if examples else 0
    if not answers or any(len(example.answers) != answers for example in examples):
        raise ValueError("a pack needs examples with the same number of answers")
    lengths = [len(_tokens(example)) for example in examples]
    starts = [0, *accumulate(lengths)][:-1]
    one_token = answers > 1 and all(
        len(answer) == 1 and example.answers == examples[0].answers
        for example in examples
        for answer in example.answers
    )
    scored, targets, answer, weight = [], [], [], []
    for number, (start, example) in enumerate(zip(starts, examples, strict=True)):
        if one_token:
            scored.append(start + len(example.prompt) - 1)
            continue
        for place, token, which, share in _targets(example):
            scored.append(start + place)
            targets.append(token)
            answer.append(number * answers + which)
            weight.append(share)
    return PackedBatch(
        input_ids=torch.tensor([[t for example in examples for t in _tokens(example)]]),
        position_ids=torch.tensor([[p for example in examples for p in _positions(example)]]),
        layout=_layout(examples, lengths, starts),
        scored=torch.tensor(scored),
        targets=torch.tensor(targets, dtype=torch.int64),
        answer=torch.tensor(answer, dtype=torch.int64),
        weight=torch.tensor(weight, dtype=torch.float32),
        labels=torch.tensor([example.label for example in examples]),
        candidates=torch.tensor([a[0] for a in examples[0].answers]) if one_token else None,
        answers=answers,
    )


def _tokens(example: Encoded) -> list[int]:
    """What the model reads: the prompt, then each answer without its last token."""
    return [*example.prompt, *(token for answer in example.answers for token in answer[:-1])]


def _positions(example: Encoded) -> list[int]:
    end = len(example.prompt)
    branches = (range(end, end + len(answer) - 1) for answer in example.answers)
    return [*range(end), *(position for branch in branches for position in branch)]


def _targets(example: Encoded) -> Iterator[tuple[int, int, int, float]]:
    """(place, next token, answer, weight) of each token to score; places within the example."""
    branch = len(example.prompt)
    for which, answer in enumerate(example.answers):
        scored = example.scored(which)
        for index in scored:
            # The first token follows the prompt, the others the token before them.
            place = len(example.prompt) - 1 if index == 0 else branch + index - 1
            yield place, answer[index], which, 1.0 / len(scored)
        branch += len(answer) - 1


def _layout(examples: Sequence[Encoded], lengths: Sequence[int], starts: Sequence[int]) -> Layout:
    longest = max(lengths)
    gather = torch.zeros(len(examples), longest, dtype=torch.int64)
    positions = torch.zeros(len(examples), longest, dtype=torch.int64)
    for row, (example, start, length) in enumerate(zip(examples, starts, lengths, strict=True)):
        gather[row, :length] = torch.arange(start, start + length)
        positions[row, :length] = torch.tensor(_positions(example))
    scatter = torch.cat([row * longest + torch.arange(n) for row, n in enumerate(lengths)])
    branching = any(sum(len(answer) > 1 for answer in example.answers) > 1 for example in examples)
    return Layout(gather, scatter, positions, _allowed(examples, longest) if branching else None)


def _allowed(examples: Sequence[Encoded], longest: int) -> Bool[Tensor, "S 1 L L"]:
    """Causal within the prompt and within each answer; an answer sees no other answer."""
    allowed = torch.ones(longest, longest, dtype=torch.bool).tril().repeat(len(examples), 1, 1, 1)
    for row, example in enumerate(examples):
        end = len(example.prompt)
        for answer in example.answers:
            begin, end = end, end + len(answer) - 1
            allowed[row, 0, begin:end, len(example.prompt) : begin] = False
    return allowed
