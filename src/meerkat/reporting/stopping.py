"""Data of the report's early stopping section: decisions, and the clients' calibration paths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from meerkat.config import Recipe
from meerkat.errors import JournalError, MaskError
from meerkat.federation.gradip import GradIPScorer, magnitudes
from meerkat.federation.messages import ClientReport
from meerkat.federation.schedule import Schedule
from meerkat.federation.selection import Decision, Signal, Source
from meerkat.journal import Journal
from meerkat.journal.records import Header
from meerkat.reporting.figure import thin
from meerkat.runs.trajectories import calibration_reports
from meerkat.spaces.mask_file import load_mask
from meerkat.zo.state import Theta

__all__ = ["DRAWN", "Kind", "Made", "Paths", "Stopping", "read_paths", "read_stopping"]

Kind: TypeAlias = Literal["gradip", "projected-gradient", "norm", "cosine"]

DRAWN = 100
"""Most extreme clients whose paths are drawn, and most others."""
_COSTLY = 10
"""The same where each client has directions of its own, which are all drawn anew."""


@dataclass(frozen=True)
class Made:
    """One decision of several, without its verdicts."""

    round: int
    source: Source
    extreme: tuple[int, ...]


@dataclass(frozen=True)
class Stopping:
    """What was decided in a run."""

    last: Decision
    """In force since."""
    calibrated: Decision | None
    """The last one from calibrations."""
    made: tuple[Made, ...]
    """All of them."""


@dataclass(frozen=True)
class Paths:
    """How clients went in their calibrations, as far as they are drawn."""

    decision: Decision
    """What came of it."""
    curves: dict[Kind, dict[int, Signal]]
    """One value for each step, by client; first the signal, as a magnitude."""
    sigma: float | None
    """σ, where the signal is what was judged."""
    window: int
    """Steps of the later window."""

    @property
    def signal(self) -> Kind:
        return next(iter(self.curves))


def read_stopping(journal: Journal) -> Stopping | None:
    """What was decided; None where nothing was."""
    decisions = journal.decisions()
    if not decisions:
        return None
    calibrated = [decision for decision in decisions if decision.source == "calibration"]
    return Stopping(
        last=decisions[-1],
        calibrated=calibrated[-1] if calibrated else None,
        made=tuple(Made(d.round, d.source, d.flagged) for d in decisions),
    )


def read_paths(directory: Path, journal: Journal, decision: Decision) -> Paths | None:
    """Paths of the clients that a decision was made on by their calibrations; None without any.

    Without p, which is in the run's mask, GradIP is not known, and the signal is |g|.
    """
    try:
        recipe = journal.header.parsed
    except JournalError:  # of another version
        return None
    shared = recipe.noise.directions == "shared"
    chosen = set(_chosen(decision, DRAWN if shared else _COSTLY))
    reports = [r for r in calibration_reports(journal, Schedule.of(recipe)) if r.client in chosen]
    if not reports:
        return None
    p, thresholds = _gradient(directory, journal.header), decision.thresholds
    curves = _curves(reports, journal.header, p, recipe)
    same = next(iter(curves)) == recipe.selection.signal
    steps = max(report.steps for report in reports)
    return Paths(
        decision=decision,
        curves=curves,
        sigma=thresholds.sigma if same and thresholds else None,
        window=min(recipe.selection.later_window, max(1, steps // 2)),
    )


def _chosen(decision: Decision, most: int) -> Iterator[int]:
    for extreme in (True, False):
        group = [verdict.client for verdict in decision.verdicts if verdict.flagged == extreme]
        yield from (group[place] for place in thin(len(group), most))


def _gradient(directory: Path, header: Header) -> Theta | None:
    """p, where the directory holds the run's own mask and the mask has it."""
    try:
        mask = load_mask(directory / "mask.safetensors", header.model)
    except (MaskError, OSError):
        return None
    return mask.direction_gradient if mask.fingerprint == header.space else None


def _curves(
    reports: Sequence[ClientReport], header: Header, gradient: Theta | None, recipe: Recipe
) -> dict[Kind, dict[int, Signal]]:
    curves: dict[Kind, dict[int, Signal]] = {}
    if gradient is None or recipe.selection.signal == "projected-gradient":
        curves["projected-gradient"] = {r.client: magnitudes([r])[0] for r in reports}
    if gradient is None:
        return curves
    for found in GradIPScorer(gradient, header.algorithm.stream).stream(reports):
        for row, client in enumerate(found.clients.tolist()):
            taken = slice(0, int(found.steps[row]))
            if "projected-gradient" not in curves:
                curves.setdefault("gradip", {})[client] = np.abs(found.gradip[row, taken])
            curves.setdefault("norm", {})[client] = found.norm[row, taken]
            curves.setdefault("cosine", {})[client] = found.cosine[row, taken]
    return curves
