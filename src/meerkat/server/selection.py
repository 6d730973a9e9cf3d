"""Virtual-path client selection: which clients are stopped early (method.md section 5).

From the signal of each client along its path, |GradIP| or |g|, come two figures:

    ρ_later = mean of the first window / mean of the later window
    ρ_quiet = share of the later window's steps with a signal below σ

A client beyond both thresholds is extreme. What of σ and the thresholds is `auto` is found from
the trajectories, without labels and without knowing how many clients are extreme; see `_auto`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float64

from meerkat.recipe import Recipe, Selection

__all__ = [
    "Decision",
    "Signal",
    "Thresholds",
    "Verdict",
    "decide_by_paths",
    "decide_without_paths",
    "merged",
]

Signal: TypeAlias = Float64[np.ndarray, " T"]
Source: TypeAlias = Literal["calibration", "rounds", "recipe"]

_APART = 4.0
"""Standard deviations between two groups of clients; one Gaussian group cut in two has 2.65."""
_TIMES = 2.5
"""How many times louder the loud group is at least."""
_WIDTH = math.sqrt(math.pi / 2 - 1)
"""Standard deviation of |g| by its mean, where g is Gaussian."""
_LARGEST = 1e9
"""Stands for an infinite ratio, which JSON cannot hold."""


@dataclass(frozen=True)
class Thresholds:
    """What a client must be beyond; None where `auto` found that no client is."""

    later: float | None
    quiet: float | None
    sigma: float | None


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


@dataclass(frozen=True)
class _Summary:
    """A client's path in a few numbers."""

    client: int
    first: float
    """Mean signal of the first window."""
    later: float
    """Mean signal of the later window."""
    tail: Signal
    """The later window."""

    @property
    def rho_later(self) -> float:
        if self.later * _LARGEST > self.first:
            return self.first / self.later
        return _LARGEST if self.first > 0 else 1.0

    def rho_quiet(self, sigma: float) -> float:
        return float(np.count_nonzero(self.tail < sigma)) / len(self.tail)


def decide_by_paths(
    recipe: Recipe, round: int, source: Source, signals: Mapping[int, Signal]
) -> Decision:
    """Judge clients by the signals along their paths; the order of clients cannot matter.

    A path with a value that is not finite gets no verdict, and moves no threshold.
    """
    chosen, planned = recipe.selection, recipe.federation.local_steps
    summaries = [
        _summarise(client, np.abs(signals[client]), chosen)
        for client in sorted(signals)
        if len(signals[client]) and np.isfinite(signals[client]).all()
    ]
    thresholds = _thresholds(chosen, summaries)
    spared = {client: Verdict(client, False, planned, round, source) for client in sorted(signals)}
    judged = {s.client: _judge(s, thresholds, chosen, spared[s.client]) for s in summaries}
    return Decision(round, source, thresholds, tuple({**spared, **judged}.values()))


def decide_without_paths(recipe: Recipe, extreme: Sequence[int]) -> Decision:
    """Stop these clients from the first round on, whatever their paths are."""
    planned, stopped = recipe.federation.local_steps, set(extreme)
    verdicts = (
        Verdict(client, client in stopped, 1 if client in stopped else planned, 0, "recipe")
        for client in range(recipe.federation.clients)
    )
    return Decision(0, "recipe", None, tuple(verdicts))


def merged(decision: Decision, older: Sequence[Verdict], newer: Sequence[Verdict]) -> Decision:
    """The decision with the older verdicts, and the newer ones of clients that were judged."""
    verdicts = {verdict.client: verdict for verdict in older}
    for verdict in newer:
        if verdict.rho_later is not None or verdict.client not in verdicts:
            verdicts[verdict.client] = verdict
    return replace(decision, verdicts=tuple(verdicts[client] for client in sorted(verdicts)))


def _summarise(client: int, signal: Signal, chosen: Selection) -> _Summary:
    """Windows are at most half of the path each, so that they do not overlap."""
    half = max(1, len(signal) // 2)
    first = signal[: min(chosen.first_window, half)]
    tail = signal[-min(chosen.later_window, half) :]
    return _Summary(client, _mean(first), _mean(tail), tail)


def _judge(
    summary: _Summary, thresholds: Thresholds, chosen: Selection, spared: Verdict
) -> Verdict:
    later, sigma = summary.rho_later, thresholds.sigma
    quiet = None if sigma is None else summary.rho_quiet(sigma)
    verdict = replace(spared, rho_later=later, rho_quiet=quiet)
    if thresholds.later is None or thresholds.quiet is None or quiet is None:
        return verdict
    flagged = later > thresholds.later and quiet > thresholds.quiet
    margin = min(_beyond(later, thresholds.later), _beyond(quiet, thresholds.quiet))
    steps = spared.steps
    if flagged:
        # By degree: a client at the threshold keeps all its steps, one that is all quiet keeps 1.
        kept = (1 - quiet) / (1 - thresholds.quiet) if chosen.action == "taper" else 0.0
        steps = max(1, math.floor(kept * steps))
    return replace(verdict, flagged=flagged, steps=steps, margin=margin)


def _beyond(ratio: float, threshold: float) -> float:
    if threshold > 0:
        return ratio / threshold - 1
    return _LARGEST if ratio > 0 else 0.0


def _thresholds(chosen: Selection, summaries: Sequence[_Summary]) -> Thresholds:
    """The recipe's thresholds, and `auto` for those that it leaves open."""
    given = {"later": chosen.rho_later, "quiet": chosen.rho_quiet, "sigma": chosen.sigma}
    found = Thresholds(None, None, None)
    if "auto" in given.values():
        found = _auto(summaries)
    return replace(found, **{name: value for name, value in given.items() if value != "auto"})


def _auto(summaries: Sequence[_Summary]) -> Thresholds:
    """Thresholds between a loud and a quiet group of clients, if there are two.

    Levels (means of the later window) are cut in two where the variance between the groups, on
    a logarithmic scale, is largest (Otsu 1979). The groups are real if they lie `_APART` standard
    deviations apart, the error of a mean over the window counted in, and one is `_TIMES` the
    other. Then σ lies midway between the groups, and the threshold of ρ_quiet where it tells them
    apart best. ρ_later must be above half of that of the loud clients, which carries what is common
    to all: learning, and < p, z >. Not more: a client whose single label the model favours is quiet
    from the start.
    """
    none = Thresholds(None, None, None)
    levels = np.array([s.later for s in summaries])
    if len(levels) < 2 or not levels.max() > 0:
        return none
    logs = np.log(np.maximum(levels, levels.max() / _LARGEST))
    order = np.argsort(logs, kind="stable")
    cut = _otsu(logs[order])
    quiet, loud = logs[order[:cut]], logs[order[cut:]]
    distance = float(loud.mean() - quiet.mean())
    noise = _WIDTH**2 / min(len(s.tail) for s in summaries)
    within = (float(quiet.var()) * len(quiet) + float(loud.var()) * len(loud)) / len(logs)
    spread = math.sqrt(max(noise, within))
    if distance < max(_APART * spread, math.log(_TIMES)):
        return none
    sigma = math.exp((float(loud.mean()) + float(quiet.mean())) / 2)
    falls = sorted(summaries[i].rho_later for i in order[cut:].tolist())
    shares = np.array([summaries[i].rho_quiet(sigma) for i in order.tolist()])
    return Thresholds(falls[len(falls) // 2] / 2, _between(shares[cut:], shares[:cut]), sigma)


def _between(low: Float64[np.ndarray, " L"], high: Float64[np.ndarray, " H"]) -> float:
    """The threshold with the fewest values of `low` above it and of `high` not above it."""
    values = np.unique(np.concatenate([low, high]))
    places = (values[:-1] + values[1:]) / 2 if len(values) > 1 else values
    above = len(low) - np.searchsorted(np.sort(low), places, "right")
    below = np.searchsorted(np.sort(high), places, "right")
    best = np.flatnonzero(above + below == (above + below).min())
    return float(places[best[len(best) // 2]])


def _otsu(values: Float64[np.ndarray, " K"]) -> int:
    """Where to cut sorted values in two so that the groups' means differ most."""
    count = len(values)
    sums = np.cumsum(values)
    left = np.arange(1, count)
    means = sums[:-1] / left, (sums[-1] - sums[:-1]) / (count - left)
    return int(np.argmax(left * (count - left) * (means[0] - means[1]) ** 2)) + 1


def _mean(values: Signal) -> float:
    return math.fsum(values.tolist()) / len(values)
