"""Free-text answers drawn from a model, token by token, with draws of our own."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["drawn_answer"]

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
    device = next(model.parameters()).device
    known_as = next((name for name in _CACHES if name in _parameters(model)), None)
    answer: list[int] = []
    known: Any = None
    with torch.compiler.set_stance("force_eager"):
        while len(answer) < most and not (answer and answer[-1] in ends):
            # A model that keeps nothing reads all of it again.
            read = [*prompt, *answer] if known is None else answer[-1:]
            arguments = {} if known_as is None else {known_as: known, "use_cache": True}
            found = model(
                input_ids=torch.tensor([read], device=device), logits_to_keep=1, **arguments
            )
            shares = found.logits[0, -1].double().softmax(0).cumsum(0).cpu().numpy()
            token = int(np.searchsorted(shares, draw.random() * shares[-1], side="right"))
            answer.append(min(token, len(shares) - 1))
            known = None if known_as is None else getattr(found, known_as, None)
    return tuple(answer)


def _parameters(model: nn.Module) -> Sequence[str]:
    return list(inspect.signature(model.forward).parameters)
