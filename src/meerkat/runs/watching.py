"""The observers that every run has: the progress display, and selection.json."""

from __future__ import annotations

import json
import math
from pathlib import Path

from meerkat.federation.rounds import RoundRecord
from meerkat.federation.selection import Decision
from meerkat.journal.records import Evaluated, Renewal, RoundMetrics
from meerkat.progress import Progress
from meerkat.runs.best_round import last_round
from meerkat.runs.events import RunInfo, RunObserver
from meerkat.runs.summary import describe_selection
from meerkat.tasks.metrics import LOSS, metric_title

__all__ = ["ProgressObserver", "SelectionWriter"]

SELECTION = "selection.json"


class ProgressObserver(RunObserver):
    """Shows rounds, the first metric besides the loss, the training loss, and bytes sent."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._done, self._clients, self._bytes = 0, 0, 0
        self._evaluations: list[Evaluated] = []

    def run_started(self, run: RunInfo) -> None:
        self._recipe = run.journal.header.parsed
        self._clients = self._recipe.clients_per_round
        self._done = run.journal.rounds
        self._bytes = sum(m.bytes_up + m.bytes_down for _, m in run.journal.records())
        self._evaluations = run.journal.evaluations()
        for found in self._evaluations:
            self._show(found)
        self._start()

    def round_closed(self, record: RoundRecord, metrics: RoundMetrics) -> None:
        self._done = record.round + 1
        self._bytes += metrics.bytes_up + metrics.bytes_down
        loss = {} if math.isnan(metrics.loss) else {"loss": f"{metrics.loss:.3f}"}
        self._progress.show({**loss, "sent": f"{self._bytes:,} B"})

    def evaluated(self, found: Evaluated) -> None:
        self._evaluations.append(found)
        self._show(found)
        self._start()  # the evaluation was a stage of its own

    def clients_stopped(self, decision: Decision) -> None:
        self._start()  # so was the calibration of the clients

    def subspace_renewed(self, renewal: Renewal) -> None:
        self._start()  # so was the making of the subspace

    def _start(self) -> None:
        rounds = last_round(self._recipe, self._evaluations)
        self._progress.start("Fine-tuning", rounds * self._clients, self._done * self._clients)

    def _show(self, found: Evaluated) -> None:
        for name, value in found.metrics.items():
            if name != LOSS and not math.isnan(value):
                self._progress.show({metric_title(name): f"{value:.3f}"})
                return


class SelectionWriter(RunObserver):
    """Writes who is stopped early and why as DIR/selection.json, after each decision."""

    def run_started(self, run: RunInfo) -> None:
        self._run = run

    def clients_stopped(self, decision: Decision) -> None:
        write_selection(self._run)

    def run_ended(self, summary: dict[str, object]) -> None:
        write_selection(self._run)


def write_selection(run: RunInfo) -> None:
    """DIR/selection.json, where anything was decided."""
    selection = describe_selection(run.journal)
    if selection is not None:
        path: Path = run.directory / SELECTION
        path.write_text(json.dumps(selection, indent=1) + "\n", "utf-8")
