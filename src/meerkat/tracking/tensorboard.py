"""TensorBoard: event files under DIR/tensorboard, by its own writer, without torch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from meerkat.tracking.base import Tracked, Tracker, Value

__all__ = ["TensorBoardTracker"]

FOLDER = "tensorboard"


class TensorBoardTracker(Tracker):
    """Scalars by step, and the recipe's fields as hyperparameters."""

    @staticmethod
    def require() -> None:
        import tensorboard.summary.writer.event_file_writer  # noqa: F401

    def start(self, run: Tracked, known: str | None) -> str:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._folder = run.directory / FOLDER
        self._writer = EventFileWriter(str(self._folder))
        if known is None:
            from tensorboard.plugins.hparams.summary_v2 import hparams_pb

            self._write(hparams_pb(dict(run.settings)))
        return FOLDER

    def last_step(self, group: str) -> int:
        return max(
            (step for name, step in _stored(self._folder) if name.startswith(group)), default=-1
        )

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._write(_scalars(figures), step)

    def end(self, summary: Mapping[str, Value]) -> None:
        numbers = {f"summary/{n}": float(v) for n, v in summary.items() if not isinstance(v, str)}
        self._write(_scalars(numbers), int(summary.get("rounds", 0)))
        self._writer.close()

    def leave(self) -> None:
        self._writer.close()

    def _write(self, summary: Any, step: int = 0) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()


def _scalars(figures: Mapping[str, float]) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
    return Summary(value=values)


def _stored(folder: Path) -> Iterator[tuple[str, int]]:
    """Name and step of each scalar in the event files of a folder."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    for path in folder.glob("events.out.tfevents.*"):
        # A file that ends within an event, since its process was killed, is read up to there.
        for data in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(data)
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    yield value.tag, int(event.step)
