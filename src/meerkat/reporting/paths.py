"""The pictures of the clients' paths in the calibration: GradIP, norm and cosine, step by step."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import altair as alt

from meerkat.federation.selection import Signal
from meerkat.reporting.figure import (
    GREY,
    INK,
    VERMILLION,
    Figure,
    dressed,
    left_out,
    log_axis,
    measured,
    plural,
    rimmed,
    running_mean,
    thin,
)
from meerkat.reporting.stopping import DRAWN, Kind, Paths

__all__ = ["EXTREME", "OTHERS", "draw_paths", "group_colour", "told_extreme"]

EXTREME, OTHERS = "extreme", "not extreme"
"""Names of the two groups of clients in all pictures of early stopping."""

_HEIGHT, _COMPANION = 280, 220
_POINTS, _FEWEST = 2400, 50
"""Most points of all lines together, but so many a line in any case."""
_REACH = 1e6
"""How far below the largest value a logarithmic axis reaches."""
_STROKES = ((3, 2.0, 1.0), (12, 1.5, 0.9), (24, 1.2, 0.75), (DRAWN, 1.0, 0.45))
"""Width and opacity of lines, of which there are at most so many."""


@dataclass(frozen=True)
class _Look:
    """How a kind of curve is presented."""

    name: str
    heading: str
    axis: str
    quantity: str
    """In a sentence."""
    height: int = _COMPANION
    logarithmic: bool = True


_PATHS = "Paths of the clients in the calibration"
_LOOKS: dict[Kind, _Look] = {
    "gradip": _Look("gradip", f"{_PATHS}: |GradIP|", "|GradIP|", "|GradIP|", _HEIGHT),
    "projected-gradient": _Look("gradip", f"{_PATHS}: |g|", "|g|", "|g|", _HEIGHT),
    "norm": _Look(
        *("gradip-norm", "Norm of the local gradient estimate", "norm"),
        quantity="norm of the local gradient estimate",
    ),
    "cosine": _Look(
        *("gradip-cosine", "Cosine between the estimate and p", "cosine"),
        quantity="|cosine| between the estimate and p, the pre-training gradient,",
        logarithmic=False,
    ),
}


def draw_paths(paths: Paths) -> list[Figure]:
    """A picture for each kind of curve."""
    extreme, count = set(paths.decision.flagged), len(paths.decision.verdicts)
    figures = []
    for kind, curves in paths.curves.items():
        look, sigma = _LOOKS[kind], paths.sigma if kind == paths.signal else None
        told = _told_levels(look.quantity, curves, extreme, paths.window)
        if kind == paths.signal:
            told = f"{told_extreme(len(extreme), count)}; {told[0].lower()}{told[1:]}"
        steps = max(map(len, curves.values()))
        window = min(steps, max(5, steps // 5))
        lines = {client: running_mean(values.tolist(), window) for client, values in curves.items()}
        floor = _floor(lines.values(), sigma) if look.logarithmic else None
        if floor is not None and floor > min(map(min, lines.values())):
            told += f"; lines below {measured(floor)} are drawn at that height"
            lines = {client: [max(y, floor) for y in line] for client, line in lines.items()}
        title = f"{look.axis}, mean of {plural(window, 'step')}"
        y = _vertical(title, lines.values(), floor is not None, sigma)
        figures.append(
            Figure(
                name=look.name,
                sentence=told + left_out(count, len(lines), "clients"),
                chart=dressed(_drawn(lines, extreme, y, sigma), look.heading, look.height),
            )
        )
    return figures


def told_extreme(extreme: int, count: int) -> str:
    """How many clients are extreme, as a sentence without its end.

    >>> told_extreme(0, 8), told_extreme(1, 8)
    ('None of 8 clients is extreme', '1 of 8 clients is extreme')
    """
    if count == 1:
        return f"The one client is {'' if extreme else 'not '}extreme"
    verb = "is" if extreme < 2 else "are"
    return f"{f'{extreme:,}' if extreme else 'None'} of {count:,} clients {verb} extreme"


def group_colour(groups: Collection[str]) -> alt.Color:
    """The colour of the two groups, with a legend of those that there are."""
    looks = {EXTREME: VERMILLION, OTHERS: GREY}
    domain = [name for name in looks if name in groups]
    scale = alt.Scale(domain=domain, range=[looks[name] for name in domain])
    legend = alt.Legend(orient="top", symbolOpacity=1, symbolStrokeWidth=2)
    return alt.Color("group:N", title=None, scale=scale, legend=legend)


def _told_levels(
    quantity: str, curves: Mapping[int, Signal], extreme: Collection[int], window: int
) -> str:
    """How large the later window of either group is in the mean."""
    groups = {
        EXTREME: [_level(values, window) for c, values in curves.items() if c in extreme],
        OTHERS: [_level(values, window) for c, values in curves.items() if c not in extreme],
    }
    means = {name: measured(math.fsum(g) / len(g)) for name, g in groups.items() if g}
    told = f"In the last {plural(window, 'step')} the mean {quantity} is "
    if len(set(means.values())) == 2:
        return f"{told}{means[EXTREME]} for extreme clients and {means[OTHERS]} for the others"
    return told + next(iter(means.values())) + " for either group" * (len(means) == 2)


def _level(values: Signal, window: int) -> float:
    tail = [abs(value) for value in values[-window:].tolist()]
    return math.fsum(tail) / len(tail)


def _floor(lines: Iterable[Sequence[float]], sigma: float | None) -> float | None:
    """Where zero is drawn on a logarithmic axis, below all else; None where all lines are zero."""
    positive = [value for line in lines for value in line if value > 0]
    if not positive:
        return None
    return max(min([*positive, *([sigma] if sigma else [])]) / 2, max(positive) / _REACH)


def _vertical(
    title: str, lines: Iterable[Sequence[float]], logarithmic: bool, sigma: float | None
) -> alt.Y:
    if not logarithmic:
        return alt.Y("y:Q", title=title, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5))
    shown = [end(line) for line in lines for end in (min, max)] + ([sigma] if sigma else [])
    room = max((max(shown) / min(shown)) ** 0.04, 1.05)
    low, high = min(shown) / room, max(shown) * room
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    return alt.Y("y:Q", title=title, scale=scale, axis=log_axis(low, high))


def _drawn(
    lines: Mapping[int, Sequence[float]], extreme: Collection[int], y: alt.Y, sigma: float | None
) -> alt.LayerChart:
    """Extreme clients lie on top of the others, and σ on top of all."""
    steps = max(map(len, lines.values()))
    marks = alt.Axis(tickCount=6, grid=False)
    if steps <= 6:
        marks = alt.Axis(values=list(range(1, steps + 1)), format="d", grid=False)
    x = alt.X("step:Q", title="step", scale=alt.Scale(domain=[1, max(2, steps)]), axis=marks)
    groups = {
        OTHERS: [client for client in lines if client not in extreme],
        EXTREME: [client for client in lines if client in extreme],
    }
    colour = group_colour([name for name, clients in groups.items() if clients])
    most = max(_FEWEST, _POINTS // len(lines))
    layers: list[alt.Chart] = []
    for name, clients in groups.items():
        rows = [
            {"client": client, "step": place + 1, "y": lines[client][place], "group": name}
            for client in clients
            for place in thin(len(lines[client]), most)
        ]
        base = alt.Chart(alt.InlineData(values=rows)).encode(x=x, y=y, color=colour)
        width, opacity = next(stroke for count, *stroke in _STROKES if len(clients) <= count)
        if rows:
            mark = base.mark_line(strokeWidth=width, opacity=opacity)
            layers.append(mark.encode(detail="client:N"))
    if sigma is not None:
        layers += _level_line(sigma, max(2, steps), x, y)
    return alt.LayerChart(layer=layers)


def _level_line(sigma: float, end: int, x: alt.X, y: alt.Y) -> list[alt.Chart]:
    base = alt.Chart(alt.InlineData(values=[{"y": sigma, "step": end}]))
    text = base.encode(x=x, y=y, text=alt.value(f"σ = {measured(sigma)}"))
    rule = base.mark_rule(strokeDash=[5, 4], color=INK).encode(y=y)
    return [rule, *rimmed(text, align="right", dx=-4, dy=-8)]
