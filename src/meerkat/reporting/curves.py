"""The pictures over the course of a run: loss and accuracy, by round and by bytes sent."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import altair as alt

from meerkat.records import Evaluated
from meerkat.reporting.figure import (
    BLUE,
    GREEN,
    PALE_BLUE,
    VERMILLION,
    Chart,
    Figure,
    Rows,
    byte_unit,
    dressed,
    left_out,
    rimmed,
    running_mean,
    thin,
)

__all__ = ["Axis", "accuracy", "axes", "loss"]

_HEIGHT = 280
_POINTS = 1000
_DOTTED = 30
"""Lines of at most so many points have a dot at each; longer training has a running mean."""


@dataclass(frozen=True)
class Axis:
    """Where the θ before each round, and after the last, stands on a horizontal axis."""

    suffix: str
    heading: str
    title: str
    at: list[float]

    @property
    def encoding(self) -> alt.X:
        end = max(1.0, self.at[-1])
        ticks = alt.Axis(tickCount=6, grid=False)
        if not self.suffix and end <= 6:
            ticks = alt.Axis(values=list(range(int(end) + 1)), format="d", grid=False)
        return alt.X("x:Q", title=self.title, scale=alt.Scale(domain=[0, end]), axis=ticks)


@dataclass(frozen=True)
class _Line:
    """Finite values under one name."""

    name: str
    colour: str
    rows: Rows

    def course(self, form: str) -> str:
        first, last = (f"{self.rows[end]['y']:{form}}" for end in (0, -1))
        return f"is {first}" if len(self.rows) == 1 else f"goes from {first} to {last}"


def axes(sent: Sequence[int]) -> list[Axis]:
    """Rounds, and bytes where any were sent; `sent` has the bytes before each round, and all."""
    unit, size = byte_unit(sent[-1])
    found = [Axis("", "round", "rounds done", [float(done) for done in range(len(sent))])]
    if sent[-1]:
        title = f"sent so far, up + down, all clients ({unit})"
        found.append(Axis("-by-bytes", "bytes sent", title, [total / size for total in sent]))
    return found


def loss(axis: Axis, losses: Sequence[float], evaluations: Sequence[Evaluated]) -> Figure | None:
    """Training and held-out loss; many rounds are drawn pale, with their running mean."""
    places = thin(len(losses), _POINTS)
    window = max(5, len(losses) // 20) if len(losses) > _DOTTED else 1
    mean = running_mean(losses, window)
    lines = [
        _line("held-out", VERMILLION, ((axis.at[e.round], e.loss) for e in _few(evaluations))),
        _line(
            f"training, mean of {window} rounds" if window > 1 else "training",
            BLUE,
            ((axis.at[r], mean[r]) for r in places),
        ),
    ]
    names = ("held-out loss", "training loss" + f" (mean of {window} rounds)" * (window > 1))
    told = [
        f"{name} {line.course('.3f')}" for name, line in zip(names, lines, strict=True) if line.rows
    ]
    if not told:
        return None
    if window > 1:
        each = ((axis.at[r], losses[r]) for r in places)
        lines.append(_line("each round", PALE_BLUE, each))
    chart = _drawn(axis, f"Loss by {axis.heading}", "mean loss of an example (nats)", lines, ".3f")
    return Figure(
        name=f"loss{axis.suffix}",
        sentence=f"By {axis.heading}: {'; '.join(told)}"
        + left_out(len(losses), len(places), "rounds"),
        chart=chart,
    )


def accuracy(axis: Axis, evaluations: Sequence[Evaluated]) -> Figure | None:
    """Held-out accuracy and macro F1; None for free text."""
    shown = _few(evaluations)
    lines = [
        _line(name, colour, ((axis.at[r], 100 * y) for r, y in values if y is not None))
        for name, colour, values in (
            ("accuracy", VERMILLION, [(e.round, e.accuracy) for e in shown]),
            ("macro F1", GREEN, [(e.round, e.macro_f1) for e in shown]),
        )
    ]
    if not lines[0].rows:
        return None
    told = "; ".join(f"{line.name} {line.course('.1f')} percent" for line in lines if line.rows)
    return Figure(
        name=f"accuracy{axis.suffix}",
        sentence=f"By {axis.heading}: held-out {told}.",
        chart=_drawn(
            axis, f"Held-out accuracy by {axis.heading}", "held-out score (%)", lines, ".1f"
        ),
    )


def _line(name: str, colour: str, points: Iterable[tuple[float, float]]) -> _Line:
    rows = [{"x": x, "y": y, "line": name} for x, y in points if math.isfinite(y)]
    return _Line(name, colour, rows)


def _few(evaluations: Sequence[Evaluated]) -> list[Evaluated]:
    return [evaluations[i] for i in thin(len(evaluations), _POINTS)]


def _drawn(axis: Axis, heading: str, title: str, lines: Sequence[_Line], form: str) -> Chart:
    """Lines over one axis, the last one undermost; the first has its ends labelled."""
    lines = [line for line in lines if line.rows]
    colour = alt.Color(
        "line:N",
        title=None,
        scale=alt.Scale(
            domain=[line.name for line in lines], range=[line.colour for line in lines]
        ),
        legend=alt.Legend(orient="top", symbolType="stroke", symbolStrokeWidth=3),
    )
    x, y = axis.encoding, alt.Y("y:Q", title=title, scale=_scale(lines))
    layers: list[alt.Chart] = []
    for line in reversed(lines):
        base = alt.Chart(alt.InlineData(values=line.rows)).encode(x=x, y=y, color=colour)
        layers.append(base.mark_line(strokeWidth=1 if line.colour == PALE_BLUE else 2))
        if len(line.rows) <= _DOTTED:
            layers.append(base.mark_point(filled=True, size=36, opacity=1))
    layers += _ends(lines[0].rows, x, y, form)
    return dressed(alt.LayerChart(layer=layers), heading, _HEIGHT)


def _scale(lines: Sequence[_Line]) -> alt.Scale:
    values = {row["y"] for line in lines for row in line.rows}
    if len(values) > 1:
        return alt.Scale(zero=False, padding=16)
    # Of a single value Vega-Lite would draw one tick, with a rounded number beside it.
    (value,) = values
    room = max(0.1 * abs(value), 0.01)
    return alt.Scale(zero=False, domain=[value - room, value + room])


def _ends(rows: Rows, x: alt.X, y: alt.Y, form: str) -> list[alt.Chart]:
    """The first and the last value, written at their points."""
    sides: tuple[Literal["left", "right"], ...] = ("left", "right")
    layers: list[alt.Chart] = []
    for end, side in zip((0, -1), sides[: len(rows)], strict=False):
        text = alt.Chart(alt.InlineData(values=[rows[end]])).encode(
            x=x, y=y, text=alt.Text("y:Q", format=form)
        )
        layers += rimmed(
            text, align=side, dx=6 if side == "left" else -6, dy=-12, fontWeight="bold"
        )
    return layers
