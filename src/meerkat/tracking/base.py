"""Interface of a tracker: something outside that a run's figures are sent to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Tracked", "Tracker", "Value"]

Value = bool | int | float | str


@dataclass(frozen=True)
class Tracked:
    """A run, as its trackers are told of it."""

    directory: Path
    project: str
    name: str
    settings: Mapping[str, Value]
    """Fields of the recipe, by `section.field`."""


class Tracker(ABC):
    """Takes figures of a run by step. Any error of it ends the tracking, and not the run.

    A step is a number of rounds: those that were done when its figures were measured.
    """

    @staticmethod
    @abstractmethod
    def require() -> None:
        """Import what is needed.

        Raises:
            ModuleNotFoundError: It is not installed.
        """

    @abstractmethod
    def start(self, run: Tracked, known: str | None) -> str:
        """Begin, or go on with what was begun; its id, which is kept in the run's directory.

        Args:
            known: The id from an earlier start.
        """

    def last_step(self, group: str) -> int | None:
        """The last step with stored figures of a group, −1 if there is none; None if unknown.

        Args:
            group: What their names begin with.
        """
        return None

    @abstractmethod
    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Store the figures of a step, so that they outlive this process."""

    @abstractmethod
    def end(self, summary: Mapping[str, Value]) -> None:
        """The run is complete."""

    @abstractmethod
    def leave(self) -> None:
        """This process stops before the run is complete; it may go on in another."""
