"""The pictures of a run in a subspace: how curvature is spread, and how w went."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import altair as alt
import numpy as np

from meerkat.errors import JournalError, MaskError
from meerkat.journal import Journal, origin
from meerkat.reporting.figure import (
    BLUE,
    GREY,
    INK,
    LABEL_COLOURS,
    Chart,
    Figure,
    Rows,
    dressed,
    left_out,
    log_axis,
    measured,
    plural,
    rimmed,
    thin,
)
from meerkat.runs.directory import mask_of
from meerkat.runs.summary import directions_holding

__all__ = ["NAMES", "Spread", "Within", "draw_within", "read_within"]

NAMES = ("subspace-curvature", "subspace-path", "subspace-by-round")

_HEIGHT = 240
_POINTS = 400
"""Most directions, and most rounds of a line, that are drawn."""
_LINES = 6
"""So many of the largest directions are followed over the rounds."""
_REACH = 1e8
"""How far below the largest value the axis of λ reaches."""


@dataclass(frozen=True)
class Spread:
    """How the curvature of the texts' scores is spread."""

    curvature: tuple[float, ...]
    """λ of each direction that the texts span, the largest first."""
    damping: float
    """δ, a share of the largest."""


@dataclass(frozen=True)
class Within:
    """A run in a subspace, as far as it is drawn."""

    dimensions: int
    spread: Spread | None
    """None where the directions are random, or the run's mask is not here."""
    rounds: list[int]
    """Rounds done, of which w is known: from the last renewal on."""
    path: np.ndarray
    """|w_j| then, from where it started, a row for each of them."""


def read_within(directory: Path, journal: Journal) -> Within | None:
    """What is drawn of a run in a subspace; None for a run that is in none."""
    header = journal.header
    try:
        section, algorithm = header.parsed.subspace, header.algorithm
    except JournalError:  # of another version
        return None
    if section is None:
        return None
    first, start = origin(journal)
    rounds = [first + number for number in thin(journal.rounds + 1 - first, _POINTS)]
    state, rows = algorithm.init(start), [np.zeros_like(start)]
    wanted = set(rounds)
    for record, _ in journal.records(first):
        state = algorithm.apply(state, record.updates)
        if record.round + 1 in wanted:
            rows.append(np.abs(state.theta - start))
    spread = None
    if section.kind == "aligned":
        spread = _spread(directory, journal, section.damping)
    return Within(header.size, spread, rounds, np.stack(rows).astype(np.float64))


def draw_within(within: Within) -> list[Figure]:
    """The pictures that there are data for; of w none before it moved."""
    figures = []
    if within.spread is not None:
        figures.append(_curvature(within.spread, within.dimensions))
    if within.path[-1].any() and np.isfinite(within.path).all():
        figures += [_path(within), _by_round(within)]
    return figures


def _spread(directory: Path, journal: Journal, damping: float) -> Spread | None:
    """From the run's own mask, if the directory holds it."""
    try:
        subspace = mask_of(directory, journal).subspace
    except (JournalError, MaskError, OSError):
        return None
    if subspace is None or not subspace.curvature:
        return None
    return Spread(subspace.curvature, damping)


def _curvature(spread: Spread, dimensions: int) -> Figure:
    """λ on a logarithmic axis; those of the subspace stand out."""
    first, total = spread.curvature[0], math.fsum(spread.curvature)
    floor = first / _REACH
    shown = [value for value in spread.curvature if value > floor]
    places = thin(len(shown), _POINTS)
    within, beyond = "in the subspace", "left out"
    rows: Rows = [
        {"j": j + 1, "y": shown[j], "part": within if j < dimensions else beyond} for j in places
    ]
    parts = [part for part in (within, beyond) if any(row["part"] == part for row in rows)]
    level = spread.damping * first
    ends = [row["y"] for row in rows] + ([level] if level > floor else [])
    low, high = min(ends) / 1.3, max(ends) * 1.3
    x = _directions(len(shown))
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    y = alt.Y("y:Q", title="λ, mean squared singular value", scale=scale, axis=log_axis(low, high))
    colours = alt.Scale(domain=parts, range=[BLUE, GREY][: len(parts)])
    colour = alt.Color("part:N", title=None, scale=colours, legend=alt.Legend(orient="top"))
    points = alt.Chart(alt.InlineData(values=rows)).mark_point(filled=True, size=28, opacity=1)
    layers = [points.encode(x=x, y=y, color=colour)]
    if level > floor:
        base = alt.Chart(alt.InlineData(values=[{"y": level, "j": len(shown)}]))
        text = base.encode(x=x, y=y, text=alt.value(f"damping, {measured(spread.damping)} λ_1"))
        layers += [base.mark_rule(strokeDash=[5, 4], color=INK).encode(y=y)]
        layers += rimmed(text, align="right", dx=-4, dy=-8)
    held = math.fsum(spread.curvature[:dimensions]) / total
    least = spread.curvature[min(dimensions, len(spread.curvature)) - 1]
    sentence = (
        f"The {plural(dimensions, 'direction')} of the subspace "
        f"{'holds' if dimensions == 1 else 'hold'} {_percent(held)} of the curvature of the "
        f"model's answers to {plural(len(spread.curvature), 'text')}, the first alone "
        f"{_percent(first / total)}; λ falls from {measured(first)} to {measured(least)} in it"
    )
    return Figure(
        NAMES[0],
        sentence + left_out(len(shown), len(places), "directions"),
        dressed(alt.LayerChart(layer=layers), "How the curvature is spread", _HEIGHT),
    )


def _path(within: Within) -> Figure:
    """|w_j| at the end."""
    last, count = within.path[-1], within.dimensions
    places = thin(count, _POINTS)
    rows: Rows = [{"j": j + 1, "y": float(last[j])} for j in places]
    bars = alt.Chart(alt.InlineData(values=rows)).mark_bar(
        color=BLUE, size=max(1.0, 300 / max(8, len(places)))
    )
    chart = bars.encode(x=_directions(count), y=alt.Y("y:Q", title="|w_j|"))
    held, largest = directions_holding(last), int(last.argmax())
    since = f", since the renewal before round {within.rounds[0]}," if within.rounds[0] else ""
    sentence = (
        f"After {plural(within.rounds[-1], 'round')}{since} {plural(held, 'direction')} of "
        f"{count:,} "
        f"{'holds' if held == 1 else 'hold'} half of |w|²; the largest is direction {largest + 1}, "
        f"with |w_j| = {measured(float(last[largest]))}"
    )
    return Figure(
        NAMES[1],
        sentence + left_out(count, len(places), "directions"),
        dressed(chart, "How far each direction went", _HEIGHT),
    )


def _by_round(within: Within) -> Figure:
    """|w_j| over the rounds, of the directions that are largest at the end."""
    last = within.path[-1]
    chosen = np.argsort(-last, kind="stable")[:_LINES].tolist()
    names = [f"direction {j + 1}" for j in chosen]
    rows: Rows = [
        {"round": round, "y": float(row[j]), "line": name}
        for j, name in zip(chosen, names, strict=True)
        for round, row in zip(within.rounds, within.path, strict=True)
    ]
    colours = alt.Scale(domain=names, range=list(LABEL_COLOURS[: len(names)]))
    legend = alt.Legend(orient="top", columns=3, symbolType="stroke", symbolStrokeWidth=3)
    ends = [within.rounds[0], within.rounds[-1]]
    marks = alt.Axis(tickCount=6, grid=False)
    if ends[1] - ends[0] <= 6:
        marks = alt.Axis(values=list(range(ends[0], ends[1] + 1)), format="d", grid=False)
    chart: Chart = (
        alt.Chart(alt.InlineData(values=rows))
        .mark_line(strokeWidth=2)
        .encode(
            x=alt.X("round:Q", title="rounds done", scale=alt.Scale(domain=ends), axis=marks),
            y=alt.Y("y:Q", title="|w_j|"),
            color=alt.Color("line:N", title=None, scale=colours, legend=legend),
        )
    )
    share = float((last[chosen] ** 2).sum() / (last**2).sum())
    what = "one direction" if len(chosen) == 1 else f"{len(chosen)} largest directions"
    sentence = f"The {what} over the rounds; at the end {_hold(len(chosen))} {_percent(share)} "
    return Figure(
        NAMES[2],
        f"{sentence}of |w|²" + left_out(ends[1] - ends[0] + 1, len(within.rounds), "states"),
        dressed(chart, "The largest directions by round", _HEIGHT),
    )


def _directions(count: int) -> alt.X:
    marks = alt.Axis(tickCount=8, grid=False)
    if count <= 8:
        marks = alt.Axis(values=list(range(1, count + 1)), format="d", grid=False)
    scale = alt.Scale(domain=[0.5, count + 0.5], nice=False)
    return alt.X("j:Q", title="direction j", scale=scale, axis=marks)


def _hold(count: int) -> str:
    return "it holds" if count == 1 else "they hold"


def _percent(share: float) -> str:
    """A share in percent, which is 100 only where all is held.

    >>> _percent(0.934), _percent(0.9999), _percent(1.0), _percent(0.004)
    ('93 %', '99.9 %', '100 %', '0.4 %')
    """
    percent = 100 * share
    if 1 <= percent < 99:
        return f"{percent:.0f} %"
    if percent > 99.9:
        return "100 %" if share >= 1 - 1e-12 else "99.9 %"
    return f"{percent:.1f} %"
