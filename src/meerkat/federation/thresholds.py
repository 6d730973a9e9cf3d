"""Thresholds of the selection from the trajectories alone: no labels, no number of clients.

A calibration shows a client's own data at work for T_cali steps, so extreme clients are known by
how quiet they end: `otsu_thresholds`. In normal rounds all start again from the same θ every T
steps, so nobody ends quiet. What is left is a faster fall within the rounds: `median_thresholds`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Float64

from meerkat.config import Selection

__all__ = [
    "EVERYTHING",
    "LARGEST",
    "PathEnds",
    "Signal",
    "Thresholds",
    "median_thresholds",
    "otsu_thresholds",
    "path_ends",
]

Signal: TypeAlias = Float64[np.ndarray, " T"]

LARGEST = 1e9
"""Stands for an infinite ratio, which JSON cannot hold."""
_APART = 4.0
"""Standard deviations between two groups of clients; one Gaussian group cut in two has 2.65."""
_TIMES = 2.5
"""How many times louder the loud group is at least."""
EVERYTHING = 1e300
"""A σ that every signal is below."""
_SILENT = 30.0
"""Levels below the loudest one by this count as equally quiet, or silence would hide the rest."""
_WIDTH = math.sqrt(math.pi / 2 - 1)
"""Standard deviation of |g| by its mean, where g is Gaussian."""


@dataclass(frozen=True)
class Thresholds:
    """What a client must be beyond; None where `auto` found that no client is."""

    later: float | None
    quiet: float | None
    sigma: float | None
    release: float | None = None
    """Repeated selection: ρ_later of a client that stays stopped is above this instead."""


@dataclass(frozen=True)
class PathEnds:
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
        if self.later * LARGEST > self.first:
            return self.first / self.later
        return LARGEST if self.first > 0 else 1.0

    def rho_quiet(self, sigma: float) -> float:
        return float(np.count_nonzero(self.tail < sigma)) / len(self.tail)


def path_ends(client: int, signal: Signal, chosen: Selection) -> PathEnds:
    """Windows are at most half of the path each, so that they do not overlap."""
    half = max(1, len(signal) // 2)
    first = signal[: min(chosen.first_window, half)]
    tail = signal[-min(chosen.later_window, half) :]
    return PathEnds(client, _mean(first), _mean(tail), tail)


def otsu_thresholds(paths: Sequence[PathEnds], sigma: float | None = None) -> Thresholds:
    """Thresholds between a loud and a quiet group of clients, if there are two.

    Levels (means of the later window) are cut in two where the variance between the groups, on
    a logarithmic scale, is largest (Otsu 1979). The groups are real if they lie `_APART` standard
    deviations apart, the error of a mean over the window counted in, and one is `_TIMES` the
    other. Then σ lies midway between the groups, and the threshold of ρ_quiet where it tells them
    apart best. ρ_later must be above half of that of the loud clients, which carries what is common
    to all: learning, and < p, z >. Not more: a client whose single label the model favours is quiet
    from the start.

    Args:
        sigma: A σ that the recipe gives; the threshold of ρ_quiet is then fitted to it.
    """
    none = Thresholds(None, None, None)
    levels = np.array([s.later for s in paths])
    if len(levels) < 2 or not levels.max() > 0:
        return none
    logs = np.log(np.maximum(levels, levels.max() / _SILENT))
    order = np.argsort(logs, kind="stable")
    cut = _otsu(logs[order])
    quiet, loud = logs[order[:cut]], logs[order[cut:]]
    distance = float(loud.mean() - quiet.mean())
    noise = _WIDTH**2 / min(len(s.tail) for s in paths)
    within = (float(quiet.var()) * len(quiet) + float(loud.var()) * len(loud)) / len(logs)
    spread = math.sqrt(max(noise, within))
    if distance < max(_APART * spread, math.log(_TIMES)):
        return none
    if sigma is None:
        sigma = math.exp((float(loud.mean()) + float(quiet.mean())) / 2)
    falls = sorted(paths[i].rho_later for i in order[cut:].tolist())
    shares = np.array([paths[i].rho_quiet(sigma) for i in order.tolist()])
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


def median_thresholds(paths: Sequence[PathEnds], stopped: Collection[int]) -> Thresholds:
    """Thresholds of a repeated selection, against the clients that are not stopped.

    A client is caught if its ρ_later lies `_APART` standard deviations above the median of those,
    and released once it is not above that median. Between the two, and where there are no others
    to compare with, it stays what it is: one path is weak evidence. ρ_quiet plays no part, so
    every client is beyond it.
    """
    free = sorted(ends.rho_later for ends in paths if ends.client not in stopped)
    if not free:
        return Thresholds(None, 0.0, EVERYTHING, 0.0)
    median = free[(len(free) - 1) // 2]
    deviation = _WIDTH * math.sqrt(2 / min(len(ends.tail) for ends in paths))
    return Thresholds(median * math.exp(_APART * deviation), 0.0, EVERYTHING, median)


def _mean(values: Signal) -> float:
    return math.fsum(values.tolist()) / len(values)
