"""The picture of a selection: ρ_quiet and ρ_later of each client, and the thresholds.

Where ρ_quiet plays no part, as in a repeated selection, clients stand side by side instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import altair as alt

from meerkat.federation.selection import Decision
from meerkat.federation.thresholds import EVERYTHING, LARGEST, Thresholds
from meerkat.reporting.figure import (
    INK,
    Chart,
    Figure,
    Rows,
    dressed,
    left_out,
    listed,
    log_axis,
    measured,
    plural,
    thin,
)
from meerkat.reporting.paths import EXTREME, OTHERS, group_colour, told_extreme

__all__ = ["draw_scatter"]

_HEIGHT = 280
_POINTS = 250
"""Most extreme clients that are drawn, and most others."""
_NAMED = 24
"""With so many clients all are numbered, else the extreme ones, in so many places."""
_CLOSE, _LISTED = 9.0, 4
"""Points within so many pixels have their numbers in one place, and this many of them."""
_WIDTH, _DEPTH = 412.0, 180.0
"""Size in pixels of the part of the picture that holds the points, about."""
_REACH = 1e4
"""How far from the median a ρ_later is drawn where it belongs."""

_Side: TypeAlias = tuple[Literal["left", "right", "center"], int, int]
_Box: TypeAlias = tuple[float, float, float, float]
# Where a number may stand: how it is aligned, and its distance from the point in pixels.
_SIDES: tuple[_Side, ...] = (
    *(("left", 7, 0), ("right", -7, 0), ("center", 0, -11), ("center", 0, 11)),
    *(("left", 6, -9), ("right", -6, -9), ("left", 6, 9), ("right", -6, 9)),
)


@dataclass(frozen=True)
class _Point:
    client: int
    across: float
    """ρ_quiet, or the client's number."""
    later: float
    extreme: bool


@dataclass(frozen=True)
class _Plane:
    """The ranges of both axes, and where a point about lies in the picture."""

    low: float
    high: float
    left: float = -0.04
    right: float = 1.14
    """There is room for numbers beyond 1, where extreme clients are."""

    def clip(self, later: float) -> float:
        return min(max(later, self.low), self.high)

    def place(self, across: float, later: float) -> tuple[float, float]:
        share = math.log(self.high / self.clip(later)) / math.log(self.high / self.low)
        return _WIDTH * (across - self.left) / (self.right - self.left), _DEPTH * share


def draw_scatter(decision: Decision) -> Figure | None:
    """Clients that were judged in this decision, not in an older one; None where nobody was."""
    limits = decision.thresholds or Thresholds(None, None, None)
    by_fall = limits.sigma == EVERYTHING
    judged = [
        _Point(v.client, v.client if by_fall else v.rho_quiet, v.rho_later, v.flagged)
        for v in decision.verdicts
        if v.rho_quiet is not None and v.rho_later is not None
        if (v.judged, v.source) == (decision.round, decision.source)
    ]
    if not judged:
        return None
    points = []
    for extreme in (False, True):
        group = [point for point in judged if point.extreme == extreme]
        points += [group[place] for place in thin(len(group), _POINTS)]
    plane = _plane(points, limits)
    beyond = sum(1 for point in points if plane.clip(point.later) != point.later)
    sentence = told_extreme(sum(1 for point in judged if point.extreme), len(judged))
    sentence += f": {_told(limits)}"
    if beyond:
        sentence += f"; {plural(beyond, 'point')} off the scale {'is' if beyond == 1 else 'are'} "
        sentence += "drawn at its end"
    return Figure(
        name="selection",
        sentence=sentence + left_out(len(decision.verdicts), len(points), "clients"),
        chart=_drawn(points, limits, plane),
    )


def _told(limits: Thresholds) -> str:
    if limits.later is None or limits.quiet is None:
        return "there are no thresholds for both figures"
    told = f"that takes ρ_later above {measured(limits.later)}"
    if limits.release is not None:
        told += f", or {measured(limits.release)} where a client was extreme before (dotted)"
    return (
        told if limits.sigma == EVERYTHING else f"{told} and ρ_quiet above {measured(limits.quiet)}"
    )


def _plane(points: Sequence[_Point], limits: Thresholds) -> _Plane:
    """A range that shows all but what is off the scale: dead signals have no finite ratio."""
    values = sorted(p.later for p in points if 0 < p.later < LARGEST)
    middle = values[len(values) // 2] if values else 1.0
    shown = [v for v in values if middle / _REACH <= v <= middle * _REACH] or [1.0]
    shown += [limit for limit in (limits.later, limits.release) if limit]
    low, high = min(shown), max(shown)
    room = max((high / low) ** 0.12, 1.5)  # also where all values are equal
    if limits.sigma != EVERYTHING:
        return _Plane(low / room, high * room)
    last = max(point.client for point in points)
    return _Plane(low / room, high * room, -0.04 * last - 0.5, 1.06 * last + 0.5)


def _drawn(points: Sequence[_Point], limits: Thresholds, plane: _Plane) -> Chart:
    domain = alt.Scale(domain=[plane.left, plane.right], nice=False)
    marks = alt.Axis(values=[0, 0.2, 0.4, 0.6, 0.8, 1], format=".1f", grid=False)
    x = alt.X("across:Q", title="ρ_quiet", scale=domain, axis=marks)
    if limits.sigma == EVERYTHING:
        marks = alt.Axis(tickCount=6, tickMinStep=1, format="d", grid=False)
        x = alt.X("across:Q", title="client", scale=domain, axis=marks)
    scale = alt.Scale(type="log", domain=[plane.low, plane.high], nice=False)
    y = alt.Y("later:Q", title="ρ_later", scale=scale, axis=log_axis(plane.low, plane.high))
    layers = _limits(limits, plane, x, y)
    groups = {
        name: [p for p in points if p.extreme == (name == EXTREME)] for name in (OTHERS, EXTREME)
    }
    colour = group_colour([name for name, group in groups.items() if group])
    for name, group in groups.items():
        rows = [
            {"across": p.across, "later": plane.clip(p.later), "group": name, "client": p.client}
            for p in group
        ]
        base = alt.Chart(alt.InlineData(values=rows)).encode(x=x, y=y, color=colour)
        if rows:
            opacity = 0.9 if len(points) <= _NAMED else 0.6
            layers.append(base.mark_point(filled=True, size=55, opacity=opacity))
    named = points if len(points) <= _NAMED else groups[EXTREME]
    for (align, dx, dy), rows in _numbers(named, points, limits, plane).items():
        text = alt.Chart(alt.InlineData(values=rows)).encode(x=x, y=y, text="clients:N")
        layers.append(
            text.mark_text(align=align, dx=dx, dy=dy, baseline="middle", fontSize=10, color=INK)
        )
    return dressed(alt.LayerChart(layer=layers), "Which clients are extreme", _HEIGHT)


def _limits(limits: Thresholds, plane: _Plane, x: alt.X, y: alt.Y) -> list[alt.Chart]:
    """The thresholds as dashed lines, that of release dotted."""
    layers: list[alt.Chart] = []
    for value, dash in ((limits.later, [5, 4]), (limits.release, [2, 3])):
        if value is not None:
            base = alt.Chart(alt.InlineData(values=[{"later": plane.clip(value)}]))
            layers.append(base.mark_rule(strokeDash=dash, color=INK).encode(y=y))
    if limits.quiet is not None and limits.sigma != EVERYTHING:
        base = alt.Chart(alt.InlineData(values=[{"across": limits.quiet}]))
        layers.append(base.mark_rule(strokeDash=[5, 4], color=INK).encode(x=x))
    return layers


def _numbers(
    named: Sequence[_Point], points: Sequence[_Point], limits: Thresholds, plane: _Plane
) -> dict[_Side, Rows]:
    """Where the numbers of each clump stand, that they cover nothing; else they do not."""
    places = [plane.place(point.across, point.later) for point in points]
    taken: list[_Box] = [(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    for limit in (limits.later, limits.release):
        if limit is not None:
            _, y = plane.place(0.0, limit)
            taken.append((0, y - 1, _WIDTH, y + 1))
    if limits.quiet is not None and limits.sigma != EVERYTHING:
        x, _ = plane.place(limits.quiet, plane.low)
        taken.append((x - 1, 0, x + 1, _DEPTH))
    found: dict[_Side, Rows] = {}
    for clump in _clumps(named, plane)[:_NAMED]:
        told = listed(sorted(point.client for point in clump), _LISTED)
        for side in _SIDES:
            across, later = _anchor(clump, side, plane)
            box = _box(*plane.place(across, later), 6.0 * len(told), side)
            if box[0] >= 0 and box[2] <= _WIDTH and not any(_overlap(box, b) for b in taken):
                taken.append(box)
                row = {"across": across, "later": later, "clients": told}
                found.setdefault(side, []).append(row)
                break
    return found


def _clumps(points: Sequence[_Point], plane: _Plane) -> list[list[_Point]]:
    """Points that lie on top of each other, directly or through others, are together."""
    clumps: list[list[_Point]] = []
    for point in points:
        x, y = plane.place(point.across, point.later)
        near = [
            clump
            for clump in clumps
            if any(math.dist(plane.place(p.across, p.later), (x, y)) < _CLOSE for p in clump)
        ]
        clumps = [clump for clump in clumps if clump not in near]
        clumps.append([point, *(p for clump in near for p in clump)])
    return clumps


def _anchor(clump: Sequence[_Point], side: _Side, plane: _Plane) -> tuple[float, float]:
    """The end of a clump that is on this side of it, or its middle."""
    wide, laters = sorted(p.across for p in clump), sorted(plane.clip(p.later) for p in clump)
    across = {"left": wide[-1], "right": wide[0], "center": (wide[0] + wide[-1]) / 2}
    middle = math.sqrt(laters[0] * laters[-1])
    return across[side[0]], laters[-1] if side[2] < 0 else laters[0] if side[2] else middle


def _box(x: float, y: float, width: float, side: _Side) -> _Box:
    align, dx, dy = side
    left = x + dx - {"left": 0.0, "right": width, "center": width / 2}[align]
    return left, y + dy - 5, left + width, y + dy + 5


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
