"""Draws the report of a run when it ends, if the extra `report` is installed."""

from __future__ import annotations

import logging
from typing import Any

from meerkat.runs.events import RunInfo, RunObserver

__all__ = ["ReportWriter"]

_logger = logging.getLogger("meerkat")


class ReportWriter(RunObserver):
    """Writes DIR/report.html and its pictures at the end of a run."""

    def run_started(self, run: RunInfo) -> None:
        self._run = run

    def run_ended(self, summary: dict[str, Any]) -> None:
        try:
            from meerkat.reporting.writing import write_report
        except ModuleNotFoundError as error:
            _logger.warning(
                "no report is drawn, since %s is not installed: pip install 'meerkat-fl[report]', "
                "then `meerkat report`",
                error.name,
            )
            return
        write_report(self._run.directory, self._run.journal)
