"""Virtual-path client selection: which clients are stopped early (method.md section 5).

From the signal of each client along its path, |GradIP| or |g|, come two figures:

    ρ_later = mean of the first window / mean of the later window
    ρ_quiet = share of the later window's steps with a signal below σ

A client beyond both thresholds is extreme. What of σ and the thresholds is `auto` is found from
the trajectories, without labels and without knowing how many clients are extreme: in a calibration
by `thresholds.otsu_thresholds`, in a repeated selection by `thresholds.median_thresholds`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, TypeAlias

import numpy as np

from meerkat.config import Selection
from meerkat.federation.thresholds import (
    LARGEST,
    PathEnds,
    Signal,
    Thresholds,
    median_thresholds,
    otsu_thresholds,
    path_ends,
)

__all__ = [
    "Decision",
    "Signal",
    "Thresholds",
    "Verdict",
    "decide_by_paths",
    "decide_without_paths",
    "merged",
]

Source: TypeAlias = Literal["calibration", "rounds", "recipe"]


@dataclass(frozen=True)
class Verdict:
    """What is decided of one client, and why."""

    client: int
    flagged: bool
    steps: int
    """T_k."""
    judged: int
    """The round before which this was decided."""
    source: Source
    """What from: a calibration, the paths of rounds, or the recipe."""
    rho_later: float | None = None
    """None where no path was judged: it holds a value that is not finite, or there is none."""
    rho_quiet: float | None = None
    """None also where there is no σ."""
    margin: float | None = None
    """The smaller of ρ / threshold - 1: how far a flagged client is beyond, others short of it."""


@dataclass(frozen=True)
class Decision:
    """A selection, in force from its round on."""

    round: int
    source: Source
    thresholds: Thresholds | None
    verdicts: tuple[Verdict, ...]
    """Of all clients that were ever judged, sorted by client."""

    @property
    def flagged(self) -> tuple[int, ...]:
        return tuple(verdict.client for verdict in self.verdicts if verdict.flagged)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Decision:
        fields = json.loads(text)
        thresholds = fields["thresholds"]
        return cls(
            round=fields["round"],
            source=fields["source"],
            thresholds=None if thresholds is None else Thresholds(**thresholds),
            verdicts=tuple(Verdict(**verdict) for verdict in fields["verdicts"]),
        )


def decide_by_paths(
    chosen: Selection,
    local_steps: int,
    round: int,
    source: Source,
    signals: Mapping[int, Signal],
    stopped: Collection[int] = (),
) -> Decision:
    """Judge clients by the signals along their paths; the order of clients cannot matter.

    A path with a value that is not finite gets no verdict, and moves no threshold.

    Args:
        local_steps: T, what a client that is not flagged takes in a round.
        stopped: Clients that are stopped so far; matters to a repeated selection only.
    """
    ends = [
        path_ends(client, np.abs(signals[client]), chosen)
        for client in sorted(signals)
        if len(signals[client]) and np.isfinite(signals[client]).all()
    ]
    found = Thresholds(None, None, None)
    if "auto" in (chosen.rho_later, chosen.rho_quiet, chosen.sigma):
        if source == "calibration":
            found = otsu_thresholds(ends, None if chosen.sigma == "auto" else chosen.sigma)
        else:
            found = median_thresholds(ends, stopped)
    thresholds = _given(chosen, found)
    verdicts = {
        client: Verdict(client, False, local_steps, round, source) for client in sorted(signals)
    }
    for one in ends:
        spared, held = verdicts[one.client], one.client in stopped
        verdicts[one.client] = _judge(one, thresholds, chosen, spared, held)
    return Decision(round, source, thresholds, tuple(verdicts.values()))


def decide_without_paths(clients: int, local_steps: int, extreme: Sequence[int]) -> Decision:
    """Stop these of so many clients from the first round on, whatever their paths are."""
    stopped = set(extreme)
    verdicts = (
        Verdict(client, client in stopped, 1 if client in stopped else local_steps, 0, "recipe")
        for client in range(clients)
    )
    return Decision(0, "recipe", None, tuple(verdicts))


def merged(decision: Decision, older: Sequence[Verdict], newer: Sequence[Verdict]) -> Decision:
    """The decision with the older verdicts, and the newer ones of clients that were judged."""
    verdicts = {verdict.client: verdict for verdict in older}
    for verdict in newer:
        if verdict.rho_later is not None or verdict.client not in verdicts:
            verdicts[verdict.client] = verdict
    return replace(decision, verdicts=tuple(verdicts[client] for client in sorted(verdicts)))


def _judge(
    ends: PathEnds, thresholds: Thresholds, chosen: Selection, spared: Verdict, stopped: bool
) -> Verdict:
    later, sigma = ends.rho_later, thresholds.sigma
    quiet = None if sigma is None else ends.rho_quiet(sigma)
    verdict = replace(spared, rho_later=later, rho_quiet=quiet)
    least = thresholds.later
    if stopped and thresholds.release is not None:
        least = thresholds.release
    if least is None or thresholds.quiet is None or quiet is None:
        return verdict
    flagged = later > least and quiet > thresholds.quiet
    margin = min(_beyond(later, least), _beyond(quiet, thresholds.quiet))
    steps = spared.steps
    if flagged:
        kept = 0.0
        if chosen.action == "taper":
            # By degree: at the threshold all steps are kept, far beyond it one.
            by_fall = thresholds.release is not None
            kept = least / later if by_fall else (1 - quiet) / (1 - thresholds.quiet)
        steps = max(1, math.floor(kept * steps))
    return replace(verdict, flagged=flagged, steps=steps, margin=margin)


def _beyond(ratio: float, threshold: float) -> float:
    if threshold > 0:
        return ratio / threshold - 1
    return LARGEST if ratio > 0 else 0.0


def _given(chosen: Selection, found: Thresholds) -> Thresholds:
    """The recipe's thresholds, and what was found for those that it leaves open."""
    given = {"later": chosen.rho_later, "quiet": chosen.rho_quiet, "sigma": chosen.sigma}
    if chosen.rho_later != "auto":
        found = replace(found, release=None)
    return replace(found, **{name: value for name, value in given.items() if value != "auto"})
