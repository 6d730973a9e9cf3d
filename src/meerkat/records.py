"""What a journal holds besides rounds: where a run starts from, and what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from meerkat.noise import Directions

__all__ = ["Evaluated", "Header", "RoundMetrics"]


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
    """Examples of each label that each client holds."""
    partition: str
    """Digest of which client holds which examples."""

    @property
    def directions(self) -> Directions:
        kind: Any = self.kind
        return Directions(self.seed, self.mask_size, kind, self.shared, self.perturbations)


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
