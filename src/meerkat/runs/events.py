"""Events of a run, and the interface of its observers (progress, report, trackers)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meerkat.federation.rounds import RoundRecord
from meerkat.federation.selection import Decision
from meerkat.journal import Journal
from meerkat.journal.records import Evaluated, Renewal, RoundMetrics

__all__ = ["Observers", "RunInfo", "RunObserver"]

_logger = logging.getLogger("meerkat")


@dataclass(frozen=True)
class RunInfo:
    """The run that is watched."""

    directory: Path
    journal: Journal
    """Open for reading; it contains what an event reports."""


class RunObserver:
    """Watches a run. Does nothing; a subclass overrides the events that it wants."""

    def run_started(self, run: RunInfo) -> None:
        """The first round that is lacking begins, also after a resume."""

    def round_closed(self, record: RoundRecord, metrics: RoundMetrics) -> None:
        """A round is in the journal."""

    def evaluated(self, found: Evaluated) -> None:
        """An evaluation is in the journal."""

    def clients_stopped(self, decision: Decision) -> None:
        """A decision on early stopping is in the journal."""

    def subspace_renewed(self, renewal: Renewal) -> None:
        """A renewed subspace is in the journal, and the run goes on in it."""

    def run_ended(self, summary: dict[str, Any]) -> None:
        """The run is complete; the summary is in the run's directory."""


class Observers(RunObserver):
    """Passes each event on to several observers. One that fails is named, and stops nothing."""

    def __init__(self, observers: Sequence[RunObserver]):
        self._observers = tuple(observers)

    def run_started(self, run: RunInfo) -> None:
        self._each(lambda observer: observer.run_started(run))

    def round_closed(self, record: RoundRecord, metrics: RoundMetrics) -> None:
        self._each(lambda observer: observer.round_closed(record, metrics))

    def evaluated(self, found: Evaluated) -> None:
        self._each(lambda observer: observer.evaluated(found))

    def clients_stopped(self, decision: Decision) -> None:
        self._each(lambda observer: observer.clients_stopped(decision))

    def subspace_renewed(self, renewal: Renewal) -> None:
        self._each(lambda observer: observer.subspace_renewed(renewal))

    def run_ended(self, summary: dict[str, Any]) -> None:
        self._each(lambda observer: observer.run_ended(summary))

    def _each(self, notify: Callable[[RunObserver], None]) -> None:
        for observer in self._observers:
            try:
                notify(observer)
            except Exception as error:
                line = " ".join(str(error).split())
                _logger.warning("%s: %s", type(observer).__name__, line or type(error).__name__)
