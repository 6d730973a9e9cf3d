"""From the events of a run to its trackers; what of them is kept in the run's directory.

DIR/tracking.json holds, for each tracker, its id and the last steps that it was given. What the
journal has beyond these is given to it when the run goes on, so that a tracker that can tell what
it holds has each round once, whatever was killed when; any other may have the last one twice.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from meerkat.config import Recipe
from meerkat.extras import needed_extra
from meerkat.federation.rounds import RoundRecord
from meerkat.federation.schedule import Schedule
from meerkat.journal.records import Evaluated, RoundMetrics
from meerkat.registry import look_up
from meerkat.runs.events import RunInfo, RunObserver
from meerkat.tracking import TRACKERS, Tracker
from meerkat.tracking.base import Tracked, Value

__all__ = ["TrackingObserver", "tracked"]

_KEPT = "tracking.json"
_GROUPS = ("train/", "eval/")
"""What names of figures begin with: of rounds, and of evaluations."""
_NOT_SETTINGS = {"runtime", "network", "tracking"}

_logger = logging.getLogger("meerkat")


@contextmanager
def tracked(recipe: Recipe) -> Iterator[list[RunObserver]]:
    """The observer of a recipe's trackers, or none; trackers are left where the run stops early.

    Raises:
        RecipeError: `tracking.to` names what is not known.
        RunError: The extra of a tracker is not installed.
    """
    trackers: dict[str, Tracker] = {}
    for name in recipe.tracking.to:
        kind = look_up(TRACKERS, name, "tracking.to")
        with needed_extra(name):
            kind.require()
        trackers[name] = kind()
    if not trackers:
        yield []
        return
    observer = TrackingObserver(recipe, trackers)
    try:
        yield [observer]
    finally:
        observer.leave()


@dataclass
class _Kept:
    """What the run's directory keeps of a tracker."""

    id: str
    steps: dict[str, int] = field(default_factory=dict)
    """The last that it was given, by group of figures."""
    ended: bool = False


class TrackingObserver(RunObserver):
    """Gives trackers the figures of a run. One that fails is named once, and told no more."""

    def __init__(self, recipe: Recipe, trackers: Mapping[str, Tracker]):
        self._recipe, self._trackers = recipe, dict(trackers)
        self._schedule = Schedule.of(recipe)
        self._started: set[str] = set()
        self._sent = 0

    def run_started(self, run: RunInfo) -> None:
        self._directory = run.directory
        self._kept = _read(run.directory / _KEPT)
        section = self._recipe.tracking
        name = section.name or run.directory.resolve().name
        about = Tracked(run.directory, section.project, name, _settings(self._recipe))
        self._trackers = {
            name: tracker
            for name, tracker in self._trackers.items()
            if name not in self._kept or not self._kept[name].ended
        }
        self._each(lambda name, tracker: self._start(name, tracker, about))
        evaluations = {found.round: found for found in run.journal.evaluations()}
        if 0 in evaluations:
            self.evaluated(evaluations[0])
        for record, metrics in run.journal.records():
            self.round_closed(record, metrics)
            if record.round + 1 in evaluations:
                self.evaluated(evaluations[record.round + 1])

    def round_closed(self, record: RoundRecord, metrics: RoundMetrics) -> None:
        self._sent += metrics.bytes_up + metrics.bytes_down
        figures = {
            "loss": metrics.loss,
            "learning_rate": self._schedule.learning_rate(record.round),
            "reports": len(record.reports),
            "seconds": metrics.seconds,
            "bytes_up": metrics.bytes_up,
            "bytes_down": metrics.bytes_down,
            "bytes_so_far": self._sent,
        }
        self._log("train/", figures, record.round + 1)

    def evaluated(self, found: Evaluated) -> None:
        self._log("eval/", found.metrics, found.round)

    def run_ended(self, summary: dict[str, Any]) -> None:
        def end(name: str, tracker: Tracker) -> None:
            self._started.discard(name)  # whatever happens now, it is left
            tracker.end(flattened(summary))
            self._kept[name].ended = True
            self._keep()

        self._each(end)

    def leave(self) -> None:
        """This process stops; trackers of a run that is not complete are told."""

        def leave(name: str, tracker: Tracker) -> None:
            if name in self._started:
                tracker.leave()

        self._each(leave)
        self._trackers = {}

    def _start(self, name: str, tracker: Tracker, about: Tracked) -> None:
        known = self._kept.get(name)
        found = tracker.start(about, None if known is None else known.id)
        self._started.add(name)
        steps = {} if known is None else known.steps
        stored = {group: tracker.last_step(group) for group in _GROUPS}
        steps |= {group: step for group, step in stored.items() if step is not None}
        self._kept[name] = _Kept(found, steps)
        self._keep()

    def _log(self, group: str, figures: Mapping[str, float], step: int) -> None:
        """Give figures to each tracker that lacks those of this step."""
        named = {group + name: value for name, value in figures.items() if math.isfinite(value)}

        def log(name: str, tracker: Tracker) -> None:
            steps = self._kept[name].steps
            if step > steps.get(group, -1):
                tracker.log(named, step)
                steps[group] = step
                self._keep()

        self._each(log)

    def _each(self, act: Callable[[str, Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                act(name, tracker)
            except Exception as error:
                del self._trackers[name]
                line = " ".join(str(error).split()) or type(error).__name__
                _logger.warning("tracking.to: %s failed and is told no more: %s", name, line)

    def _keep(self) -> None:
        path = self._directory / _KEPT
        scratch = path.with_name(_KEPT + ".part")
        content = {name: asdict(kept) for name, kept in self._kept.items()}
        scratch.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        scratch.replace(path)


def flattened(values: Mapping[str, Any], before: str = "") -> dict[str, Value]:
    """Nested figures by dotted names; lists as JSON, and nothing where there is none.

    >>> flattened({"a": {"b": 1, "c": None}, "d": [1, 2], "e": "f"})
    {'a.b': 1, 'd': '[1, 2]', 'e': 'f'}
    """
    found: dict[str, Value] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flattened(value, f"{before}{name}.")
        elif isinstance(value, bool | int | float | str):
            found[before + name] = value
        elif value is not None:
            found[before + name] = json.dumps(value)
    return found


def _settings(recipe: Recipe) -> dict[str, Value]:
    return flattened(recipe.resolved.model_dump(mode="json", exclude=_NOT_SETTINGS))


def _read(path: Path) -> dict[str, _Kept]:
    """What is kept; nothing where the file is missing or is none of ours."""
    try:
        content = json.loads(path.read_text("utf-8"))
        return {name: _Kept(**kept) for name, kept in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
