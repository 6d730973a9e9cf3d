"""What a journal holds besides rounds: where a run starts from, and what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from meerkat import noise
from meerkat.mask.file import Mask
from meerkat.noise import Directions
from meerkat.recipe import Recipe

__all__ = ["Evaluated", "Header", "RoundMetrics", "directions_of", "header_of"]


@dataclass(frozen=True)
class Header:
    """What a run starts from."""

    recipe: str
    """The recipe as JSON."""
    fingerprint: str
    """The recipe's fingerprint."""
    model: str
    """The base model's fingerprint."""
    mask: str
    """The mask's digest."""
    mask_kind: str
    mask_size: int
    eligible: int
    mask_parts: dict[str, int]
    """Masked parameters in each tensor."""
    noise: str
    """The noise generator's fingerprint."""
    seed: int
    kind: str
    shared: bool
    perturbations: int
    labels: list[str]
    label_counts: list[list[int]]
    """Examples of each label that each client holds; empty where only the clients know."""
    partition: str
    """Digest of which client holds which examples; empty where only the clients know."""

    @property
    def directions(self) -> Directions:
        kind: Any = self.kind
        return Directions(self.seed, self.mask_size, kind, self.shared, self.perturbations)


def directions_of(recipe: Recipe, mask: Mask) -> Directions:
    """What all noise of a run is drawn from."""
    section = recipe.noise
    shared = section.directions == "shared"
    return Directions(recipe.seed, mask.size, section.kind, shared, section.perturbations)


def header_of(
    recipe: Recipe,
    mask: Mask,
    labels: Sequence[str],
    label_counts: list[list[int]],
    partition: str,
) -> Header:
    """What the journal of a run starts with; the arguments are its fields."""
    directions = directions_of(recipe, mask)
    return Header(
        recipe=recipe.to_json(),
        fingerprint=recipe.fingerprint,
        model=mask.model,
        mask=mask.digest,
        mask_kind=mask.kind,
        mask_size=mask.size,
        eligible=mask.eligible,
        mask_parts={n: len(i) for n, i in zip(mask.names, mask.indices, strict=True)},
        noise=noise.fingerprint(),
        seed=directions.seed,
        kind=directions.kind,
        shared=directions.shared,
        perturbations=directions.perturbations,
        labels=list(labels),
        label_counts=label_counts,
        partition=partition,
    )


@dataclass(frozen=True)
class RoundMetrics:
    """What was measured beside a round; nothing is computed from it."""

    loss: float
    """Mean training loss of the clients; known in simulation only."""
    bytes_up: int
    """Encoded size of all reports."""
    bytes_down: int
    """Encoded size of all plans."""
    seconds: float


@dataclass(frozen=True)
class Evaluated:
    """An evaluation at the θ before round `round`."""

    round: int
    accuracy: float | None
    """None for free text."""
    macro_f1: float | None
    loss: float
    examples: int
    seconds: float
