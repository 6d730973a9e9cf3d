"""Pictures of a comparison: the main metric by rounds, by bytes and by forward passes."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence

import altair as alt

from meerkat.comparison.outcome import Point, main_metric
from meerkat.comparison.running import GroupOutcome
from meerkat.reporting.figure import BLUE, LABEL_COLOURS, VERMILLION, Figure, Rows, dressed

__all__ = ["figures_of"]

_HEIGHT = 320
_DASHES = ([1, 0], [6, 3], [2, 2])
"""Of lines that have the same colour."""
_AXES: tuple[tuple[str, str, Callable[[Point], float]], ...] = (
    ("rounds", "rounds", lambda point: point.round),
    ("bytes", "bytes of a client, up and down", lambda point: point.bytes_up + point.bytes_down),
    ("passes", "forward passes of a client, over one example", lambda point: point.passes),
)


def figures_of(found: Sequence[GroupOutcome]) -> list[Figure]:
    """Three pictures for each case; the mean over seeds, and their range at each evaluation."""
    figures = []
    for case in dict.fromkeys(group.group.case for group in found):
        groups = [group for group in found if group.group.case == case]
        name = re.sub(r"[^a-z0-9.]+", "-", "-".join(case).lower()) or "all"
        for suffix, title, position in _AXES:
            rows = [row for group in groups for row in _rows(group, position)]
            if suffix == "bytes":
                rows = [row for row in rows if row["x"] > 0]  # the axis is logarithmic
            if rows:
                heading = f"{rows[0]['metric']} by {suffix}"
                heading += f": {', '.join(case)}" if case else ""
                figures.append(_figure(f"{name}-{suffix}", heading, title, rows, suffix == "bytes"))
    return figures


def _rows(group: GroupOutcome, position: Callable[[Point], float]) -> Rows:
    """One row for each evaluation of a group's runs, which are all after the same rounds."""
    by_round: dict[int, list[Point]] = {}
    for cell in group.cells:
        for point in cell.evaluations:
            by_round.setdefault(point.round, []).append(point)
    rows = []
    for points in by_round.values():
        metric = main_metric(points[0].metrics)
        values = [point.metrics[metric] for point in points]
        rows.append(
            {
                "x": statistics.fmean(map(position, points)),
                "y": statistics.fmean(values),
                "low": min(values),
                "high": max(values),
                "method": group.group.grid.found(group.group.method).title,
                "metric": metric,
            }
        )
    return rows


def _figure(name: str, heading: str, title: str, rows: Rows, logarithmic: bool) -> Figure:
    names = list(dict.fromkeys(row["method"] for row in rows))
    colours = list(dict.fromkeys((VERMILLION, BLUE, *LABEL_COLOURS)))
    laps = [place // len(colours) for place in range(len(names))]  # of the colours
    legend = alt.Legend(orient="bottom", columns=3, labelLimit=200, symbolType="stroke")
    along = alt.Scale(type="log", nice=False) if logarithmic else alt.Scale(nice=False)
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("x:Q", title=title, scale=along, axis=alt.Axis(format="~s", tickCount=6)),
        color=alt.Color(
            "method:N",
            title=None,
            legend=legend,
            scale=alt.Scale(
                domain=names, range=[colours[i % len(colours)] for i in range(len(names))]
            ),
        ),
        strokeDash=alt.StrokeDash(
            "method:N",
            title=None,
            legend=legend,
            scale=alt.Scale(domain=names, range=[_DASHES[lap % len(_DASHES)] for lap in laps]),
        ),
    )
    values = alt.Y("y:Q", title=rows[0]["metric"], scale=alt.Scale(zero=False))
    lines = base.mark_line(point=True).encode(y=values)
    ranges = base.mark_rule(opacity=0.5).encode(y="low:Q", y2="high:Q")
    best = max(rows, key=lambda row: row["y"])
    sentence = (
        f"{heading}: of {len(names)} methods the highest mean is {best['y']:.3f}, of "
        f"{best['method']}."
    )
    return Figure(name, sentence, dressed(lines + ranges, heading, _HEIGHT))
