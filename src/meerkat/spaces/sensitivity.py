"""Batches → scores and their mean gradient, by one backward pass a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor, nn

from meerkat.config import MaskSection
from meerkat.spaces.mask_criteria import largest
from meerkat.spaces.mask_file import Mask

__all__ = [
    "Sensitivity",
    "backward_passes",
    "concentration_of",
    "gradient_at",
    "sensitivity_scores",
]


BatchLoss: TypeAlias = Callable[[Any], Tensor]
"""A batch of the corpus, or of labelled examples → its loss, with the graph for a backward pass."""


@dataclass(frozen=True)
class Sensitivity:
    """Sensitivity of a model's parameters to a loss, which in the method is that of pre-training
    (method.md section 2)."""

    scores: Mapping[str, Tensor]
    """score_j of each eligible parameter, float32 on the CPU."""
    gradients: Mapping[str, Tensor] | None
    """Mean gradient of each, where it was kept; else `gradient_at` reads the corpus again."""
    losses: tuple[float, ...]
    """Loss of each batch."""


def sensitivity_scores(
    loss: BatchLoss,
    parameters: Mapping[str, nn.Parameter],
    batches: Sequence[Any] | Tensor,
    section: MaskSection,
    keep_gradients: bool = True,
    advance: Callable[[], None] = lambda: None,
) -> Sensitivity:
    """Scores by either definition (method.md section 2).

    `mean_square` is (1/B) Σ (∂L_b/∂w)², `squared_mean` is ((1/B) Σ ∂L_b/∂w)². Each gradient is
    added to its accumulator as soon as the backward pass has it, and freed, so the peak is the
    model plus one accumulator, or two where `mean_square` also keeps the gradients.
    """
    wants_squares = section.score == "mean_square"
    wants_sums = not wants_squares or keep_gradients
    zeros = partial(torch.zeros, dtype=torch.float32)
    squares = {n: zeros(p.shape) for n, p in parameters.items()} if wants_squares else {}
    sums = {n: zeros(p.shape) for n, p in parameters.items()} if wants_sums else {}

    def collect(name: str, gradient: Tensor) -> None:
        gradient = gradient.float().cpu()
        if wants_sums:
            sums[name] += gradient
        if wants_squares:
            squares[name].addcmul_(gradient, gradient)

    losses = backward_passes(loss, parameters, batches, collect, advance)
    count = len(batches)
    for accumulator in (squares, sums):
        for tensor in accumulator.values():
            tensor /= count
    scores = squares if wants_squares else {name: mean**2 for name, mean in sums.items()}
    return Sensitivity(scores, sums or None, losses)


def gradient_at(
    loss: BatchLoss,
    parameters: Mapping[str, nn.Parameter],
    batches: Sequence[Any] | Tensor,
    mask: Mask,
    sensitivity: Sensitivity,
    advance: Callable[[], None] = lambda: None,
) -> Float32[np.ndarray, " n"]:
    """p: the mean gradient at the masked coordinates, from what was kept or a second pass."""
    indices = {name: torch.from_numpy(i) for name, i in zip(mask.names, mask.indices, strict=True)}
    if sensitivity.gradients is not None:
        kept = sensitivity.gradients
        parts = [kept[name].view(-1)[i] for name, i in indices.items()]
        return torch.cat(parts).numpy()
    sums = {name: torch.zeros(len(i)) for name, i in indices.items()}

    def collect(name: str, gradient: Tensor) -> None:
        if name in sums:
            sums[name] += gradient.float().cpu().reshape(-1)[indices[name]]

    backward_passes(loss, parameters, batches, collect, advance)
    return torch.cat([total / len(batches) for total in sums.values()]).numpy()


def backward_passes(
    loss: Callable[[Any], Tensor],
    parameters: Mapping[str, nn.Parameter],
    batches: Iterable[Any],
    collect: Callable[[str, Tensor], None],
    advance: Callable[[], None],
) -> tuple[float, ...]:
    """Run a backward pass for each batch; hand each gradient over as it arrives, and free it."""

    def hook(name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        collect(name, parameter.grad)
        parameter.grad = None

    handles = []
    losses = []
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(True)
            handle = parameter.register_post_accumulate_grad_hook(partial(hook, name))
            handles.append(handle)
        for batch in batches:
            value = loss(batch)
            value.backward()
            losses.append(float(value.detach()))
            advance()
    finally:
        for handle in handles:
            handle.remove()
        for parameter in parameters.values():
            parameter.requires_grad_(False)
    return tuple(losses)


def concentration_of(scores: Mapping[str, Tensor], n: int) -> dict[str, float]:
    """How concentrated the sensitivity is (the known figures of method.md section 2).

    Returns:
        `mass`: share of the summed scores in the top n; `ratio`: mean score of the top n over
        the mean score of the next 9 n.
    """
    total = sum(float(score.sum(dtype=torch.float64)) for score in scores.values())
    best = largest(scores.values(), 10 * n)
    top, rest = best[:n].double(), best[n:].double()
    ratio = float(top.mean() / rest.mean()) if len(rest) and rest.mean() > 0 else float("inf")
    return {"mass": float(top.sum()) / total if total > 0 else 1.0, "ratio": ratio}
