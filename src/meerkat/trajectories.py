"""Journal → what the server sees of each client's path, and the signals that it is judged by."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np

from meerkat.descent import Theta
from meerkat.journal import Journal
from meerkat.noise import Directions
from meerkat.protocol import ClientReport
from meerkat.recipe import Recipe
from meerkat.server.gradip import Compass, magnitudes
from meerkat.server.selection import Signal

__all__ = ["calibration_reports", "calibration_signals", "round_signals"]

_SHORT = 0.5
"""A client with a path shorter than this share of the longest one is not judged."""


def calibration_reports(journal: Journal, recipe: Recipe) -> Iterator[ClientReport]:
    """Each client's answer in its calibration: in round 0, where that was it, or in its own."""
    if recipe.is_founding(0) and journal.rounds:
        record, _ = next(journal.records())
        yield from record.reports
    yield from journal.calibrations()


def calibration_signals(
    journal: Journal, recipe: Recipe, gradient: Theta | None
) -> dict[int, Signal]:
    """The signal of each client along its calibration, T_cali values."""
    found: dict[int, Signal] = {}
    reports = calibration_reports(journal, recipe)
    for client, signal in _signals(reports, recipe, gradient, journal.header.directions):
        found[client] = signal
    return found


def round_signals(
    journal: Journal, recipe: Recipe, gradient: Theta | None, round: int
) -> dict[int, Signal]:
    """The signal of each client along its local paths of the watched rounds before `round`.

    A path of a round is a short one, of T steps. Taken together they are put in the order of the
    step: all first steps, all second steps, and so on. So the first window sees clients where
    they all start from the same θ, the later window where their own data have led them.
    """
    start = round - recipe.watched_rounds
    paths: dict[int, list[Signal]] = defaultdict(list)
    records = journal.records(max(start, 1 if recipe.is_founding(0) else 0))
    reports = (r for record, _ in records if record.round < round for r in record.reports)
    for client, signal in _signals(reports, recipe, gradient, journal.header.directions):
        paths[client].append(signal)
    longest = max((len(rows) for rows in paths.values()), default=0)
    return {
        client: np.stack(rows).T.reshape(-1)
        for client, rows in paths.items()
        if len(rows) >= _SHORT * longest
    }


def _signals(
    reports: Iterable[ClientReport],
    recipe: Recipe,
    gradient: Theta | None,
    directions: Directions,
) -> Iterator[tuple[int, Signal]]:
    if recipe.selection.signal == "projected-gradient":
        for report in reports:
            yield report.client, magnitudes([report])[0]
        return
    assert gradient is not None, "a recipe with this signal was checked against its mask"
    for found in Compass(gradient, directions).stream(reports):
        for client, steps, values in zip(found.clients, found.steps, found.gradip, strict=True):
            yield int(client), np.abs(values[:steps])
