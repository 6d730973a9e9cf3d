"""A comparison from its grid file to its tables and pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from meerkat.comparison.cells import Cell, groups_of
from meerkat.comparison.curves import figures_of
from meerkat.comparison.grid import load_grid
from meerkat.comparison.rows import Row, rows_of
from meerkat.comparison.running import GroupOutcome, make_all, outcome_of_group
from meerkat.comparison.tables import as_csv, as_latex, as_markdown
from meerkat.errors import RunError
from meerkat.models.adapters import require_peft
from meerkat.progress import Progress
from meerkat.runs.lock import locked

__all__ = ["Comparison", "compare_methods"]

_TABLES, _PICTURES = "table", "pictures"


@dataclass(frozen=True)
class Comparison:
    """What a comparison gave."""

    reference: str
    rows: tuple[Row, ...]
    groups: tuple[GroupOutcome, ...]
    written: tuple[Path, ...]
    """Tables and pictures."""


def compare_methods(
    path: Path,
    out: Path,
    overrides: Sequence[str] = (),
    jobs: int = 0,
    only_tables: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """See `meerkat.compare`.

    Raises:
        MeerkatError: The grid is not valid, or runs could not be made; those that were are kept.
    """
    progress = progress or Progress()
    grid, data = load_grid(path, overrides)
    groups = list(groups_of(grid, data))
    # A cell that is not valid shows before any is made.
    cells = [cell for group in groups for cell in (*group.search, *group.chosen("auto"))]
    if any(cell.recipe.mask.kind == "lora" for cell in cells):
        require_peft()
    cores = os.cpu_count() or 1
    jobs = jobs or (1 if torch.cuda.is_available() else max(1, cores // 2))
    with locked(out):
        if only_tables:
            found = [outcome_of_group(group, out) for group in groups]
            if not any(group.search or group.cells for group in found):
                raise RunError(f"{out}: no run of the comparison is complete; leave out --tables")
        else:
            progress.start("Runs of the comparison", len(cells))

            def made(cell: Cell) -> None:
                progress.advance()
                progress.show({"last": cell.name})

            found = make_all(groups, out, jobs, max(1, cores // jobs), made)
        rows = rows_of(found)
        written = _write(out, rows, found, grid.reference)
    return Comparison(grid.reference, tuple(rows), tuple(found), tuple(written))


def _write(
    out: Path, rows: Sequence[Row], found: Sequence[GroupOutcome], reference: str
) -> list[Path]:
    texts = {
        f"{_TABLES}.md": as_markdown(rows, reference),
        f"{_TABLES}.csv": as_csv(rows),
        f"{_TABLES}.tex": as_latex(rows, reference),
    }
    texts |= {f"{_PICTURES}/{figure.name}.svg": figure.svg for figure in figures_of(found)}
    (out / _PICTURES).mkdir(exist_ok=True)
    for name, text in texts.items():
        (out / name).write_text(text, "utf-8")
    return [out / name for name in texts]
