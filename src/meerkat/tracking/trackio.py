"""trackio: its own local store, or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meerkat.tracking.base import Tracked, Tracker, Value

__all__ = ["TrackioTracker"]


class TrackioTracker(Tracker):
    """A run of the project `tracking.project`, which it knows by its name."""

    @staticmethod
    def require() -> None:
        import trackio  # noqa: F401

    def start(self, run: Tracked, known: str | None) -> str:
        import trackio

        # An object of its own: trackio's functions act on the run of the calling thread.
        self._run: Any = trackio.init(
            project=run.project,
            name=known or run.name,
            config=dict(run.settings),
            resume="never" if known is None else "allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return str(self._run.name)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log(dict(figures), step=step)

    def end(self, summary: Mapping[str, Value]) -> None:
        numbers = {n: v for n, v in summary.items() if not isinstance(v, str)}
        self._run.log({f"summary/{n}": v for n, v in numbers.items()}, step=int(numbers["rounds"]))
        self._run.finish()

    def leave(self) -> None:
        self._run.finish()
