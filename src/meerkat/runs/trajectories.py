"""Journal → GradIP, norm and cosine of each client's path, and the signal for early stopping.

All of it is streamed: a few thousand reports and one z are in memory at a time.
"""

from __future__ import annotations

import csv
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, groupby, takewhile
from pathlib import Path

import numpy as np

from meerkat.errors import MaskError, RunError
from meerkat.federation.gradip import GradIPScorer, Trajectories, magnitudes
from meerkat.federation.messages import CALIBRATION, ClientReport
from meerkat.federation.schedule import Schedule
from meerkat.federation.selection import Decision, Signal
from meerkat.journal import Journal
from meerkat.runs.directory import mask_of, mask_path, open_journal, renewed_mask
from meerkat.zo.directions import PerturbationStream
from meerkat.zo.state import Theta

__all__ = [
    "Gradip",
    "PathSummary",
    "calibration_reports",
    "calibration_signals",
    "read_gradip",
    "round_reports",
    "round_signals",
    "summarise_paths",
    "write_table",
]

_SHORT = 0.5
"""A client with a path shorter than this share of the longest one is not judged."""


@dataclass(frozen=True)
class PathSummary:
    """A client's path in a few numbers."""

    client: int
    steps: int
    first: float
    """Mean |GradIP| of the first window."""
    later: float
    """Mean |GradIP| of the later window."""
    norm: float
    """Mean norm of the local gradient estimate."""
    cosine: float
    """Mean cosine between p and the local gradient estimate."""


@dataclass(frozen=True)
class Gradip:
    """What the server sees of all paths."""

    calibration: bool
    """Are the paths those of the calibrations, or of all rounds?"""
    paths: tuple[PathSummary, ...]
    """By client."""
    decision: Decision | None
    """Who is stopped early now, if anything was decided."""


def read_gradip(directory: Path, to: Path | None, clients: Collection[int]) -> Gradip:
    """A summary of each client's path in a run, and its last decision; see `meerkat.gradip`.

    Args:
        to: A CSV file to write GradIP, norm and cosine of every step to.
        clients: Only these clients in that file; all by default.

    Raises:
        MaskError: The run's mask has no pre-training gradient.
        RunError: There is no run, or `to` exists.
    """
    with closing(open_journal(directory)) as journal:
        header = journal.header
        window = header.parsed.selection.later_window
        scorers = _scorers(directory, journal)
        # The journal does not say in which subspace a client that came late was calibrated.
        known = len(scorers) == 1
        calibrations = journal.calibrations() if known else iter(())
        if to is not None:
            if to.exists():
                raise RunError(f"{to} exists; choose another file")
            everything = chain(calibrations, round_reports(journal))
            write_table(_scored(everything, scorers), to, clients)
        reports = calibration_reports(journal, Schedule.of(header.parsed)) if known else ()
        calibrated = summarise_paths(_scored(reports, scorers), window)
        paths = calibrated or summarise_paths(_scored(round_reports(journal), scorers), window)
        decisions = journal.decisions()
    return Gradip(bool(calibrated), tuple(paths), decisions[-1] if decisions else None)


def _scorers(directory: Path, journal: Journal) -> list[tuple[int, GradIPScorer]]:
    """A scorer for each subspace of a run, by the first round that was in it."""
    header, stream = journal.header, journal.header.algorithm.stream
    masks = [(0, mask_of(directory, journal, 0))]
    masks += [(r.round, renewed_mask(directory, header, r)) for r in journal.renewals()]
    found = []
    for first, mask in masks:
        if (gradient := mask.direction_gradient) is None:
            raise MaskError(
                f"{mask_path(directory)}: a {header.mask_kind} mask keeps no pre-training "
                "gradient, which GradIP needs; set mask.kind = 'sensitivity' in a new run"
            )
        found.append((first, GradIPScorer(gradient, stream)))
    return found


def _scored(
    reports: Iterable[ClientReport], scorers: Sequence[tuple[int, GradIPScorer]]
) -> Iterator[Trajectories]:
    """Trajectories of reports in their order, each by the p of the subspace that it was in."""
    firsts = [first for first, _ in scorers]

    def place(report: ClientReport) -> int:
        return 0 if report.round == CALIBRATION else bisect_right(firsts, report.round) - 1

    for number, some in groupby(reports, key=place):
        yield from scorers[number][1].stream(some)


def summarise_paths(found: Iterable[Trajectories], window: int) -> list[PathSummary]:
    """One summary a client, over all that is streamed in; windows of so many steps, or fewer."""
    paths: dict[int, _Running] = {}
    for some in found:
        for row, client in enumerate(some.clients.tolist()):
            kept = slice(0, int(some.steps[row]))
            running = paths.setdefault(client, _Running(window))
            running.add(some.gradip[row, kept], some.norm[row, kept], some.cosine[row, kept])
    return [paths[client].summary(client) for client in sorted(paths)]


def write_table(found: Iterable[Trajectories], path: Path, clients: Collection[int] = ()) -> int:
    """A CSV file with a row for each client and step; returns how many.

    Args:
        clients: Which clients; all by default.
    """
    count = 0
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["client", "round", "step", "gradip", "norm", "cosine"])
        for some in found:
            name = "calibration" if some.round == CALIBRATION else some.round
            for row, client in enumerate(some.clients.tolist()):
                if clients and client not in clients:
                    continue
                for step in range(int(some.steps[row])):
                    values = (some.gradip, some.norm, some.cosine)
                    table.writerow([client, name, step, *(float(v[row, step]) for v in values)])
                    count += 1
    return count


class _Running:
    """The ends of a path and its means, while it is streamed."""

    def __init__(self, window: int):
        self._first, self._last = np.zeros(window, np.float32), np.zeros(window, np.float32)
        self._steps, self._sums = 0, np.zeros(2)

    def add(self, gradip: Signal, norm: Signal, cosine: Signal) -> None:
        window, begin = len(self._first), self._steps
        values = np.abs(gradip)
        room = self._first[begin : begin + len(values)]
        room[:] = values[: len(room)]
        places = np.arange(begin, begin + len(values)) % window
        self._last[places[-window:]] = values[-window:]
        self._sums += (norm.sum(), cosine.sum())
        self._steps += len(values)

    def summary(self, client: int) -> PathSummary:
        held = min(self._steps, len(self._first))
        norm, cosine = (self._sums / self._steps).tolist()
        first, last = (float(ends[:held].mean()) for ends in (self._first, self._last))
        return PathSummary(client, self._steps, first, last, norm, cosine)


def round_reports(journal: Journal, start: int = 0) -> Iterator[ClientReport]:
    """All reports of rounds, in order."""
    for record, _ in journal.records(start):
        yield from record.reports


def calibration_reports(journal: Journal, schedule: Schedule) -> Iterator[ClientReport]:
    """Each client's answer in its calibration: in round 0, where that was it, or in its own."""
    if schedule.is_calibration_round(0) and journal.rounds:
        record, _ = next(journal.records())
        yield from record.reports
    yield from journal.calibrations()


def calibration_signals(
    journal: Journal, schedule: Schedule, gradient: Theta | None
) -> dict[int, Signal]:
    """The signal of each client along its calibration, T_cali values."""
    found: dict[int, Signal] = {}
    reports = calibration_reports(journal, schedule)
    for client, signal in _signals(reports, schedule, gradient, journal.header.algorithm.stream):
        found[client] = signal
    return found


def round_signals(
    journal: Journal, schedule: Schedule, gradient: Theta | None, round: int
) -> dict[int, Signal]:
    """The signal of each client along its local paths of the watched rounds before `round`.

    A path of a round is a short one, of T steps. Taken together they are put in the order of the
    step: all first steps, all second steps, and so on. So the first window sees clients where
    they all start from the same θ, the later window where their own data have led them.
    """
    start = round - schedule.selection_window_rounds
    paths: dict[int, list[Signal]] = defaultdict(list)
    every = round_reports(journal, max(start, 1 if schedule.is_calibration_round(0) else 0))
    reports = takewhile(lambda report: report.round < round, every)
    for client, signal in _signals(reports, schedule, gradient, journal.header.algorithm.stream):
        paths[client].append(signal)
    longest = max((len(rows) for rows in paths.values()), default=0)
    return {
        client: np.stack(rows).T.reshape(-1)
        for client, rows in paths.items()
        if len(rows) >= _SHORT * longest
    }


def _signals(
    reports: Iterable[ClientReport],
    schedule: Schedule,
    gradient: Theta | None,
    stream: PerturbationStream,
) -> Iterator[tuple[int, Signal]]:
    if schedule.selection.signal == "projected-gradient":
        for report in reports:
            yield report.client, magnitudes([report])[0]
        return
    assert gradient is not None, "a recipe with this signal was checked against its mask"
    for found in GradIPScorer(gradient, stream).stream(reports):
        for client, steps, values in zip(found.clients, found.steps, found.gradip, strict=True):
            yield int(client), np.abs(values[:steps])
