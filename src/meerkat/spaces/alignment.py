"""Public texts → scores: gradients of a model's own answers at the masked coordinates."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor, nn

from meerkat.data.packing import PackedBatch
from meerkat.spaces.example_gradients import example_gradients
from meerkat.spaces.mask_file import Mask
from meerkat.spaces.sensitivity import backward_passes

__all__ = [
    "IN_MEMORY",
    "AnswerScores",
    "PackedScores",
    "Scheme",
    "Target",
    "packed_score_gradients",
    "score_gradients",
]

AnswerScores: TypeAlias = Callable[[Any], Float32[Tensor, " A"]]
"""A text in its prompt → the score of each answer, with the graph for a backward pass."""
PackedScores: TypeAlias = Callable[[PackedBatch], Float32[Tensor, "S A"]]
"""The same for a batch of texts."""
Scheme: TypeAlias = Literal["sampled", "uniform", "difference", "mixed", "given"]
Target: TypeAlias = Scheme | int
"""How the scores of a text's answers become one number; an integer is the score of that answer."""

IN_MEMORY = 2**30
"""Most bytes of scores that are kept in memory; more are kept in a file that has no name."""


def score_gradients(
    scores: AnswerScores,
    parameters: dict[str, nn.Parameter],
    texts: Sequence[Any],
    mask: Mask,
    scheme: Target,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> Float32[np.ndarray, "N n"]:
    """s_i of each text: one backward pass each, kept at the masked coordinates only.

    Memory: activations of one text, the gradient of one tensor at a time, and the scores, 4 N n
    bytes; where those are more than 1 GiB they are in a file in the folder for temporary files.

    Schemes:
        sampled: ∇ log p(ŷ | x), ŷ drawn from the model's own answers.
        uniform: The same with ŷ drawn uniformly: rare answers are seen, too.
        difference: The gradient of the difference of the first two answers' scores.
        mixed: A random combination of the centred scores of all answers.
        An integer: The gradient of the score of that answer.
        given: The gradient of the score of the one answer that a text brings, drawn before.

    Raises:
        ValueError: `difference` without two answers, or `given` without one.
    """
    draw = _draws(seed)
    chosen = {name: parameters[name] for name in mask.names}
    where = {name: torch.from_numpy(i) for name, i in zip(mask.names, mask.indices, strict=True)}
    rows = _room(len(texts), mask.size)
    ends = np.cumsum([len(i) for i in mask.indices])
    begins = dict(zip(mask.names, [0, *ends[:-1].tolist()], strict=True))
    done = 0

    def collect(name: str, gradient: Tensor) -> None:
        values = gradient.reshape(-1)[where[name].to(gradient.device)].float().cpu().numpy()
        rows[done, begins[name] : begins[name] + len(values)] = values

    def next_text() -> None:
        nonlocal done
        done += 1
        advance()

    def target(text: object) -> Tensor:
        return _target(scores(text), scheme, draw)

    backward_passes(target, chosen, texts, collect, next_text)
    return rows


def packed_score_gradients(
    scores: PackedScores,
    model: nn.Module,
    batches: Iterable[PackedBatch],
    count: int,
    mask: Mask,
    scheme: Target,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> Float32[np.ndarray, "N n"]:
    """As `score_gradients`, by one backward pass of activations for a batch of texts.

    Args:
        model: One that `has_example_gradients` for this mask.
        count: N, texts of all batches.
        advance: Called once for each text.

    Raises:
        ValueError: As `score_gradients`.
    """
    draw, rows, done = _draws(seed), _room(count, mask.size), 0

    def targets(batch: PackedBatch) -> Tensor:
        return torch.stack([_target(found, scheme, draw) for found in scores(batch)])

    for part in example_gradients(model, mask, batches, targets):
        rows[done : done + len(part)] = part
        done += len(part)
        for _ in part:
            advance()
    return rows


def _draws(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def _room(count: int, size: int) -> Float32[np.ndarray, "N n"]:
    """Zeros, in a file where they are large."""
    if 4 * count * size <= IN_MEMORY:
        return np.zeros((count, size), np.float32)
    with tempfile.TemporaryFile() as file:  # mapped, it stays to the end of its last array
        return np.memmap(file, np.float32, "w+", shape=(count, size))


def _target(found: Tensor, scheme: Target, draw: np.random.Generator) -> Tensor:
    """The number of a text whose gradient is its score."""
    match scheme:
        case int():
            return found[scheme]
        case "difference":
            if len(found) != 2:
                raise ValueError(f"the difference of two answers, not of {len(found)}")
            return found[1] - found[0]
        case "given":
            if len(found) != 1:
                raise ValueError(f"the score of one answer, not of {len(found)}")
            return found[0]
        case "mixed":
            weights = torch.from_numpy(draw.standard_normal(len(found))).to(found)
            return ((found - found.mean()) * weights).sum()
        case "uniform":
            answer = int(draw.integers(len(found)))
        case "sampled":
            shares = found.detach().double().softmax(0).cpu().numpy()
            answer = int(draw.choice(len(shares), p=shares / shares.sum()))
    return found.log_softmax(0)[answer]
