"""Weights & Biases: where its own environment says; with WANDB_MODE=offline DIR/wandb alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meerkat.tracking.base import Tracked, Tracker, Value

__all__ = ["WandbTracker"]


class WandbTracker(Tracker):
    """A run of the project `tracking.project`. Code, git state and console are not sent."""

    @staticmethod
    def require() -> None:
        import wandb  # noqa: F401

    def start(self, run: Tracked, known: str | None) -> str:
        import wandb

        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, save_code=False, disable_job_creation=True
        )
        self._run: Any = wandb.init(
            project=run.project,
            name=run.name,
            id=known,
            resume="allow",
            dir=str(run.directory),
            config=dict(run.settings),
            reinit="create_new",
            settings=settings,
        )
        return str(self._run.id)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log(dict(figures), step=step)

    def end(self, summary: Mapping[str, Value]) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish()

    def leave(self) -> None:
        self._run.finish(exit_code=1)
