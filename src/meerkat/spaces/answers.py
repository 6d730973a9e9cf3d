"""Free text drawn from a model, token by token, with draws of our own."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["drawn_answer", "drawn_together"]

_CACHES = ("cache", "past_key_values")
"""What transformers calls the keys and values that it has, the newest name first."""


@torch.inference_mode()
def drawn_answer(
    model: nn.Module,
    prompt: Sequence[int],
    most: int,
    ends: frozenset[int],
    draw: np.random.Generator,
) -> tuple[int, ...]:
    """An answer from the model's own distribution, at least one token long.

    Args:
        most: Most tokens of it.
        ends: Tokens that end a text; the one that is drawn is the last of the answer.
        draw: One uniform number for each token.
    """
    (answer,) = drawn_together(model, prompt, 1, most, ends, draw)
    return answer


@torch.inference_mode()
def drawn_together(
    model: nn.Module,
    prompt: Sequence[int],
    count: int,
    most: int,
    ends: frozenset[int],
    draw: np.random.Generator,
) -> list[tuple[int, ...]]:
    """So many answers to one prompt, as `drawn_answer` draws each, in one pass a token.

    Args:
        draw: One uniform number for each token of each answer that has not ended.
    """
    device = next(model.parameters()).device
    known_as = next((name for name in _CACHES if name in _parameters(model)), None)
    answers: list[list[int]] = [[] for _ in range(count)]
    ended = [False] * count
    known: Any = None
    with torch.compiler.set_stance("force_eager"):
        while not all(ended) and len(answers[0]) < most:
            # A model that keeps nothing reads all of it again.
            read = [[*prompt, *answer] if known is None else answer[-1:] for answer in answers]
            arguments = {} if known_as is None else {known_as: known, "use_cache": True}
            found = model(
                input_ids=torch.tensor(read, device=device), logits_to_keep=1, **arguments
            )
            shares = found.logits[:, -1].double().softmax(1).cumsum(1).cpu().numpy()
            for row, answer in enumerate(answers):
                token = next(iter(ends), 0)  # after its end it is read no more
                if not ended[row]:
                    drawn = draw.random() * shares[row, -1]
                    token = int(np.searchsorted(shares[row], drawn, side="right"))
                answer.append(min(token, shares.shape[1] - 1))
                ended[row] = ended[row] or answer[-1] in ends
            known = None if known_as is None else getattr(found, known_as, None)
    return [_until(answer, ends) for answer in answers]


def _until(answer: Sequence[int], ends: frozenset[int]) -> tuple[int, ...]:
    """An answer with its first end, and nothing after that."""
    last = next((place for place, token in enumerate(answer) if token in ends), len(answer))
    return tuple(answer[: last + 1])


def _parameters(model: nn.Module) -> Sequence[str]:
    return list(inspect.signature(model.forward).parameters)
