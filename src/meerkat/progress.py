"""What a long command says while it works; the command line draws it."""

from __future__ import annotations

__all__ = ["Progress"]


class Progress:
    """Says nothing. A subclass shows stages and figures."""

    def start(self, stage: str, total: int, done: int = 0) -> None:
        """A stage of `total` units begins, `done` of which are done already."""

    def advance(self) -> None:
        """One unit of the stage is done."""

    def show(self, figures: dict[str, str]) -> None:
        """Figures that changed, by name."""
