"""The pictures over the course of a run: loss and other metrics, by round and by bytes sent."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import altair as alt

from meerkat.journal.records import Evaluated
from meerkat.reporting.figure import (
    BLUE,
    GREEN,
    LABEL_COLOURS,
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
from meerkat.reporting.run_view import Score, scores_in
from meerkat.tasks.metrics import LOSS
from meerkat.tasks.metrics.validation import VALIDATION

__all__ = ["Axis", "axes", "loss", "scores"]

_HEIGHT = 280
_VALIDATION_LOSS = VALIDATION + LOSS
_POINTS = 1000
_DOTTED = 30
"""Lines of at most so many points have a dot at each; longer training has a running mean."""
_SCORE_COLOURS = tuple(dict.fromkeys((VERMILLION, GREEN, BLUE, *LABEL_COLOURS)))
"""Colours of the metrics in one picture, in their order; with more metrics they repeat."""


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
    """Training, held-out and validation loss; many rounds are drawn pale, with a running mean."""
    places = thin(len(losses), _POINTS)
    window = max(5, len(losses) // 20) if len(losses) > _DOTTED else 1
    mean = running_mean(losses, window)
    few = _few(evaluations)
    held_out, validation = (
        [(axis.at[e.round], e.metrics[name]) for e in few if name in e.metrics]
        for name in (LOSS, _VALIDATION_LOSS)
    )
    lines = [
        _line("held-out", VERMILLION, held_out),
        _line(
            f"training, mean of {window} rounds" if window > 1 else "training",
            BLUE,
            ((axis.at[r], mean[r]) for r in places),
        ),
        _line("validation", GREEN, validation),
    ]
    training = "training loss" + f" (mean of {window} rounds)" * (window > 1)
    names = ("held-out loss", training, "validation loss")
    courses = [
        f"{name} {line.course('.3f')}" for name, line in zip(names, lines, strict=True) if line.rows
    ]
    if not courses:
        return None
    if window > 1:
        each = ((axis.at[r], losses[r]) for r in places)
        lines.append(_line("each round", PALE_BLUE, each))
    chart = _drawn(axis, f"Loss by {axis.heading}", "mean loss of an example (nats)", lines, ".3f")
    return Figure(
        name=f"loss{axis.suffix}",
        sentence=f"By {axis.heading}: {'; '.join(courses)}"
        + left_out(len(losses), len(places), "rounds"),
        chart=chart,
    )


def scores(axis: Axis, evaluations: Sequence[Evaluated]) -> list[Figure]:
    """The held-out metrics besides losses, one line for each; no picture without a value.

    The picture "accuracy" has those that are shown in percent, the picture "scores" the others.
    """
    found = [score for score in scores_in(evaluations) if score.name != _VALIDATION_LOSS]
    drawn = (
        _scores("accuracy", axis, evaluations, [score for score in found if score.percent]),
        _scores("scores", axis, evaluations, [score for score in found if not score.percent]),
    )
    return [figure for figure in drawn if figure is not None]


def _scores(
    name: str, axis: Axis, evaluations: Sequence[Evaluated], shown: Sequence[Score]
) -> Figure | None:
    """One picture of metrics that share a unit: all of `shown` are in percent, or none is."""
    percent = all(score.percent for score in shown)
    size, unit, sentence_unit = (100, " (%)", " percent") if percent else (1, "", "")
    few = _few(evaluations)
    lines = [
        _line(
            score.title,
            _SCORE_COLOURS[place % len(_SCORE_COLOURS)],
            (
                (axis.at[e.round], size * e.metrics[score.name])
                for e in few
                if score.name in e.metrics
            ),
        )
        for place, score in enumerate(shown)
    ]
    lines = [line for line in lines if line.rows]
    if not lines:
        return None
    # The two notations of one format: Python drops trailing zeros of "g" by itself, D3 by "~".
    form, d3_form = (".1f", ".1f") if percent else (".4g", ".4~g")
    what = lines[0].name if percent or len(lines) == 1 else "scores"
    courses = "; ".join(f"{line.name} {line.course(form)}{sentence_unit}" for line in lines)
    heading, title = f"Held-out {what} by {axis.heading}", f"held-out score{unit}"
    return Figure(
        name=f"{name}{axis.suffix}",
        sentence=f"By {axis.heading}: held-out {courses}.",
        chart=_drawn(axis, heading, title, lines, d3_form),
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
