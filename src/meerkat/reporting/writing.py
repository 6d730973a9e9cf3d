"""Journal → the files of a report."""

from __future__ import annotations

from pathlib import Path

from meerkat.errors import RunError
from meerkat.journal import Journal
from meerkat.reporting.charts import FIGURES, draw
from meerkat.reporting.page import render
from meerkat.reporting.run_view import read
from meerkat.reporting.stopping import read_paths
from meerkat.reporting.subspace import read_within

__all__ = ["write_report"]


def write_report(directory: Path, journal: Journal) -> Path:
    """Write `report.html`, and its pictures as `report/*.svg` and `report/*.png`.

    The run may be unfinished. The same journal gives the same files; pictures of an earlier
    report that this one does not have are removed.

    Raises:
        RunError: The directory cannot be written.
    """
    run = read(journal)
    calibrated = run.stopping and run.stopping.calibrated
    paths = read_paths(directory, journal, calibrated) if calibrated else None
    within = read_within(directory, journal)
    figures = draw(
        *(run.header, run.losses, run.sent, run.evaluations, run.stopping, paths, within),
        names=run.names,
    )
    pictures = directory / "report"
    try:
        pictures.mkdir(parents=True, exist_ok=True)
        for name in FIGURES:
            for suffix in ("svg", "png"):
                (pictures / f"{name}.{suffix}").unlink(missing_ok=True)
        for figure in figures:
            (pictures / f"{figure.name}.svg").write_text(figure.svg, "utf-8")
            (pictures / f"{figure.name}.png").write_bytes(figure.png())
        page = directory / "report.html"
        page.write_text(render(run, figures), "utf-8")
    except OSError as error:
        raise RunError(
            f"{directory}: the report cannot be written ({error}); the journal is unharmed: make "
            "room, then `meerkat report`"
        ) from None
    return page
