"""The kind, learning rate and steps of each round, from the recipe alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np

from meerkat.config import Federation, Recipe, Selection

__all__ = ["Schedule", "learning_rate"]


@dataclass(frozen=True)
class Schedule:
    """What of a recipe decides on rounds."""

    federation: Federation
    selection: Selection
    seed: int
    first_rate: float
    """η of the first round."""
    decay: Literal["constant", "linear", "cosine"]
    """How it goes on."""
    exact: Literal["all", "able"] | tuple[int, ...] = ()
    """Clients that report the exact gradient (method.md section 9)."""

    @classmethod
    def of(cls, recipe: Recipe) -> Schedule:
        """The schedule of a recipe."""
        backward = recipe.optimizer.estimator.kind == "backward"
        return cls(
            recipe.federation,
            recipe.selection,
            recipe.seed,
            recipe.learning_rate,
            recipe.schedule,
            "all" if backward else recipe.optimizer.exact_clients,
        )

    @property
    def clients_per_round(self) -> int:
        return self.federation.clients_per_round or self.federation.clients

    def learning_rate(self, round: int) -> float:
        """η of a round, as the float32 that plan and log carry."""
        return learning_rate(self.first_rate, self.decay, round, self.federation.rounds)

    def exact_clients(self, able: Callable[[], Collection[int]] | None = None) -> Collection[int]:
        """Clients that report the exact gradient (method.md section 9).

        Args:
            able: Gives the clients that can; all by default.
        """
        everyone = range(self.federation.clients)
        if self.exact == "all":
            return everyone
        if self.exact == "able":
            return everyone if able is None else frozenset(able())
        return frozenset(self.exact)

    @property
    def must_be_exact(self) -> Collection[int]:
        """Clients that can take part only if they can report the exact gradient."""
        return () if self.exact == "able" else self.exact_clients()

    def is_calibration_round(self, round: int) -> bool:
        """Is this round the calibration of the clients, whose update is kept?"""
        return round == 0 and self.selection.kind == "gradip" and self.selection.apply

    @property
    def selection_window_rounds(self) -> int:
        """Rounds before a repeated selection whose paths it judges by; at most `every`."""
        steps, chosen = self.federation.local_steps, self.selection
        return min(chosen.every, -(-chosen.calibration_steps // steps))

    def is_selection_window(self, round: int) -> bool:
        """Will this round's paths be judged by a repeated selection?"""
        every = self.selection.every
        if not every:
            return False
        left = every - round % every
        return left <= self.selection_window_rounds and round + left < self.federation.rounds


def learning_rate(first: float, decay: str, round: int, rounds: int) -> float:
    """η of a round, rounded to float32.

    Args:
        first: η of the first round.
        decay: `Optimizer.schedule` after `auto`.
    """
    done = round / rounds
    match decay:
        case "linear":
            factor = 1.0 - done
        case "cosine":
            factor = 0.5 * (1.0 + math.cos(math.pi * done))
        case _:
            factor = 1.0
    return float(np.float32(first * factor))
