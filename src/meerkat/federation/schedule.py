"""The kind, learning rate and steps of each round, from the recipe alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from meerkat.config import Federation, Optimizer, Recipe, Selection

__all__ = ["Schedule", "learning_rate"]


@dataclass(frozen=True)
class Schedule:
    """The sections of a recipe that decide on rounds."""

    federation: Federation
    optimizer: Optimizer
    selection: Selection
    seed: int

    @classmethod
    def of(cls, recipe: Recipe) -> Schedule:
        """The schedule of a recipe."""
        return cls(recipe.federation, recipe.optimizer, recipe.selection, recipe.seed)

    @property
    def clients_per_round(self) -> int:
        return self.federation.clients_per_round or self.federation.clients

    def learning_rate(self, round: int) -> float:
        """η of a round, as the float32 that plan and log carry."""
        return learning_rate(self.optimizer, round, self.federation.rounds)

    def exact_clients(self, able: Callable[[], Collection[int]] | None = None) -> Collection[int]:
        """Clients that report the exact gradient (method.md section 9).

        Args:
            able: Gives the clients that can; all by default.
        """
        everyone, chosen = range(self.federation.clients), self.optimizer.exact_clients
        if self.optimizer.estimator.kind == "backward":
            return everyone
        if chosen == "able":
            return everyone if able is None else frozenset(able())
        return frozenset(chosen)

    @property
    def must_be_exact(self) -> Collection[int]:
        """Clients that can take part only if they can report the exact gradient."""
        return () if self.optimizer.exact_clients == "able" else self.exact_clients()

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


def learning_rate(optimizer: Optimizer, round: int, rounds: int) -> float:
    """η of a round under the recipe's schedule, rounded to float32."""
    done = round / rounds
    match optimizer.schedule:
        case "linear":
            factor = 1.0 - done
        case "cosine":
            factor = 0.5 * (1.0 + math.cos(math.pi * done))
        case _:
            factor = 1.0
    return float(np.float32(optimizer.learning_rate * factor))
