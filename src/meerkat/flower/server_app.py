"""The server app of Flower: reads the run config and hosts the run. It loads no model.

See `settings.py` for the run config.
"""

from __future__ import annotations

import sys
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid import InMemoryGrid

from meerkat.errors import MeerkatError
from meerkat.flower.serving import serve
from meerkat.flower.settings import read_settings
from meerkat.reporting.observer import ReportWriter
from meerkat.runs.events import Observers
from meerkat.runs.watching import ProgressObserver, SelectionWriter
from meerkat.terminal.progress_bar import Bar
from meerkat.tracking.observer import tracked

__all__ = ["app"]

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Host the run that the run config describes."""
    try:
        settings = read_settings(context.run_config, Path(sys.path[0]))  # the unpacked app
        with Bar() as progress, tracked(settings.recipe) as trackers:
            observer = Observers(
                [ProgressObserver(progress), SelectionWriter(), *trackers, ReportWriter()]
            )
            simulated = isinstance(grid, InMemoryGrid)
            summary = serve(grid, settings, observer, progress, simulated)
    except MeerkatError as error:
        # Flower tells that a run failed, but shows only what was printed.
        print(f"meerkat: {' '.join(str(error).split())}", flush=True)
        raise
    for when in ("before", "after"):
        for name, value in summary[when].items():
            print(f"meerkat: {name} {when} {value}", flush=True)
    print(f"meerkat: state_digest {summary['state_digest']}", flush=True)
    print(f"meerkat: {settings.out}", flush=True)
