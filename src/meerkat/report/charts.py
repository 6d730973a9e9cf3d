"""The pictures of a report, drawn with Vega-Lite and rendered here: no browser, no network."""

from __future__ import annotations

import html
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import altair as alt
import numpy as np
import vl_convert

from meerkat.journal import Evaluated, Header

__all__ = ["FIGURES", "Figure", "byte_unit", "draw", "plain", "thin"]

FIGURES = ("loss", "accuracy", "loss-by-bytes", "accuracy-by-bytes", "clients", "mask")
"""Names of all pictures that a report may have, in their order on the page."""

Chart: TypeAlias = alt.Chart | alt.LayerChart
Rows: TypeAlias = list[dict[str, Any]]

_WIDTH, _HEIGHT = 480, 280
_POINTS = 1000
_BARS = 200
_FONT = "Helvetica Neue, Helvetica, Arial, Liberation Sans, sans-serif"
_INK, _MUTED, _RULE = "#1f2933", "#52606d", "#e4e7eb"
# Okabe and Ito's colours, which colour-blind readers can tell apart; grey is for all the rest.
_BLUE, _PALE_BLUE, _VERMILLION, _GREEN = "#0072B2", "#A8CFE6", "#D55E00", "#009E73"
_LABELS = (_BLUE, "#E69F00", _GREEN, "#CC79A7", "#56B4E9", _VERMILLION, "#F0E442", "#9AA5B1")


@dataclass(frozen=True)
class Figure:
    """One picture."""

    name: str
    sentence: str
    """What is to be seen, for the caption and for those who do not see it."""
    chart: Chart

    def svg(self) -> str:
        """The picture as SVG. Its ids carry its name, so that several fit into one page."""
        drawn: str = vl_convert.vegalite_to_svg(self.chart.to_dict())
        drawn = re.sub(r'(\bid="|url\(#)', rf"\g<1>{self.name}-", drawn)
        label = html.escape(self.sentence)
        return drawn.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)

    def png(self) -> bytes:
        """The picture as PNG, at twice its size."""
        drawn: bytes = vl_convert.vegalite_to_png(self.chart.to_dict(), scale=2)
        return drawn


@dataclass(frozen=True)
class _Axis:
    """Where the θ before each round, and after the last, stands on a horizontal axis."""

    suffix: str
    title: str
    heading: str
    at: list[float]

    def encoding(self) -> alt.X:
        whole = all(place == int(place) for place in self.at)
        return alt.X(
            "x:Q",
            title=self.title,
            scale=alt.Scale(domain=[0, max(1, *self.at)]),
            axis=alt.Axis(tickCount=6, **({"tickMinStep": 1} if whole else {})),
        )


def draw(
    header: Header,
    losses: Sequence[float],
    sent: Sequence[int],
    evaluations: Sequence[Evaluated],
) -> list[Figure]:
    """All pictures that there are data for.

    `losses` has one value a round, `sent` the bytes sent before each round and after the last.
    """
    unit, factor = byte_unit(sent[-1])
    axes = [_Axis("", "rounds done", "round", [float(r) for r in range(len(sent))])]
    if sent[-1]:
        title = f"bytes sent so far, all clients, up + down ({unit})"
        axes.append(_Axis("-by-bytes", title, "bytes sent", [s / factor for s in sent]))
    found: list[Figure | None] = []
    for axis in axes:
        found += [_loss(axis, losses, evaluations), _accuracy(axis, evaluations)]
    found += [_clients(header.labels, header.label_counts), _mask(header.mask_parts)]
    return [figure for figure in found if figure is not None]


def byte_unit(most: float) -> tuple[str, int]:
    """The largest unit that is not larger than `most` bytes, and its size."""
    units = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    return [(unit, size) for unit, size in units.items() if size <= max(most, 1)][-1]


def thin(count: int, most: int) -> list[int]:
    """At most so many of `count` positions, evenly spread, with the first and the last.

    >>> thin(7, 4)
    [0, 2, 4, 6]
    """
    return [round(place) for place in np.linspace(0, count - 1, min(count, most)).tolist()]


def plain(text: str) -> str:
    """Text without what XML and UTF-8 cannot hold; line breaks and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _loss(
    axis: _Axis, losses: Sequence[float], evaluations: Sequence[Evaluated]
) -> Figure | None:
    window = max(1, len(losses) // 40) if len(losses) >= 40 else 1
    smooth = _smooth(losses, window)
    places = thin(len(losses), _POINTS)
    kinds = [("training, each round", losses, _PALE_BLUE)] if window > 1 else []
    mean = f"training, mean of {window} rounds" if window > 1 else "training"
    series: dict[str, tuple[Rows, str]] = {}
    for name, values, colour in [*kinds, (mean, smooth, _BLUE)]:
        series[name] = _points(name, [(axis.at[r], values[r]) for r in places]), colour
    held = [(axis.at[e.round], e.loss) for e in _thinned(evaluations, axis)]
    series["held-out"] = _points("held-out", held), _VERMILLION
    told = [
        f"{'held-out' if name == 'held-out' else 'training'} loss {_course(rows)}"
        for name, (rows, _) in series.items()
        if rows and name != "training, each round"
    ]
    if not told:
        return None
    sentence = "; ".join(told).capitalize() + _shown(len(losses), len(places), "rounds")
    chart = _lines(axis, f"Loss by {axis.heading}", "mean loss per example (nats)", series, ".3f")
    return Figure(f"loss{axis.suffix}", sentence, chart)


def _accuracy(axis: _Axis, evaluations: Sequence[Evaluated]) -> Figure | None:
    shown = _thinned(evaluations, axis)
    series: dict[str, tuple[Rows, str]] = {}
    for name, field, colour in (
        ("accuracy", "accuracy", _VERMILLION),
        ("macro F1", "macro_f1", _GREEN),
    ):
        values = [(axis.at[e.round], getattr(e, field)) for e in shown]
        percent = [(x, 100 * y) for x, y in values if y is not None]
        series[name] = _points(name, percent), colour
    if not series["accuracy"][0]:
        return None
    sentence = f"Held-out accuracy in percent {_course(series['accuracy'][0])}"
    if series["macro F1"][0]:
        sentence += f"; macro F1 {_course(series['macro F1'][0])}"
    heading = f"Held-out accuracy by {axis.heading}"
    chart = _lines(axis, heading, "held-out score (%)", series, ".1f")
    return Figure(f"accuracy{axis.suffix}", f"{sentence}.", chart)


def _lines(
    axis: _Axis, heading: str, title: str, series: dict[str, tuple[Rows, str]], form: str
) -> Chart:
    """Lines over one axis, those of few points with a dot at each; the ends are labelled."""
    series = {name: line for name, line in series.items() if line[0]}
    colour = alt.Color(
        "series:N",
        title=None,
        scale=alt.Scale(domain=list(series), range=[colour for _, colour in series.values()]),
        legend=alt.Legend(orient="top", symbolType="stroke", symbolStrokeWidth=2.5),
    )
    x, y = axis.encoding(), alt.Y("y:Q", title=title, scale=alt.Scale(zero=False, padding=18))
    layers: list[alt.Chart] = []
    for name, (rows, shade) in series.items():
        base = alt.Chart(alt.Data(values=rows)).encode(x=x, y=y, color=colour)
        pale = shade == _PALE_BLUE
        layers.append(base.mark_line(strokeWidth=1 if pale else 2, interpolate="linear"))
        if len(rows) <= 60:
            layers.append(base.mark_point(filled=True, size=16 if pale else 40, opacity=1))
        if name in ("accuracy", "held-out"):
            layers += _ends(rows, x, y, form)
    return _dressed(alt.layer(*layers), heading, _HEIGHT)


def _ends(rows: Rows, x: alt.X, y: alt.Y, form: str) -> list[alt.Chart]:
    """The first and the last value, written at their points."""
    ends = [(rows[0], "left")] if len(rows) == 1 else [(rows[0], "left"), (rows[-1], "right")]
    return [
        alt.Chart(alt.Data(values=[row]))
        .mark_text(align=align, dy=-11, color=_INK, fontWeight="bold")  # type: ignore[arg-type]
        .encode(x=x, y=y, text=alt.Text("y:Q", format=form))
        for row, align in ends
    ]


def _clients(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> Figure | None:
    sizes = [sum(row) for row in counts]
    if not sizes:
        return None
    names = _label_names(labels, max(map(len, counts)))
    shown = thin(len(counts), _BARS)
    rows: Rows = []
    for client in shown:
        tally: Counter[int] = Counter()
        for label, count in enumerate(counts[client]):
            tally[min(label, len(names) - 1)] += count
        rows += [
            {"client": str(client), "label": names[i], "order": i, "examples": n}
            for i, n in sorted(tally.items())
        ]
    colour = alt.Color(
        "label:N",
        title=None,
        scale=alt.Scale(domain=names, range=list(_LABELS[: len(names)])),
        legend=alt.Legend(orient="top", columns=4, labelLimit=100) if len(names) > 1 else None,
    )
    length = alt.X("examples:Q", title="training examples", axis=alt.Axis(tickMinStep=1))
    bars = alt.Chart(alt.Data(values=rows)).mark_bar()
    few = len(shown) <= 24
    order = [str(client) for client in shown]
    if few:
        across = alt.Y("client:N", title="client", sort=order)
        chart = bars.encode(x=length, y=across, color=colour, order="order:Q")
    else:
        marked = order[:: math.ceil(len(order) / 10)]
        ticks = alt.Axis(values=marked, labelAngle=0, labelAlign="center", grid=False)
        chart = bars.encode(
            x=alt.X("client:N", title="client", sort=order, axis=ticks),
            y=alt.Y("examples:Q", title="training examples"),
            color=colour,
            order="order:Q",
        )
    sentence = (
        f"{sum(sizes):,} training examples over {_plural(len(sizes), 'client')}: the smallest "
        f"client holds {min(sizes):,}, the largest {max(sizes):,}"
    )
    if len(names) > 1:
        single = sum(1 for row in counts if sum(1 for count in row if count) == 1)
        sentence += f"; {_plural(single, 'client')} of one label only"
    sentence += _shown(len(counts), len(shown), "clients")
    height = 100 + 22 * len(shown) if few else _HEIGHT
    return Figure("clients", sentence, _dressed(chart, "Labels that each client holds", height))


def _label_names(labels: Sequence[str], count: int) -> list[str]:
    """A name for each colour; what has no colour of its own shares the last."""
    if count <= 1 and not labels:
        return ["examples"]
    names = [plain(labels[i]) if i < len(labels) else f"label {i}" for i in range(count)]
    most = len(_LABELS)
    return names if count <= most else [*names[: most - 1], f"{count - most + 1} other labels"]


def _mask(parts: dict[str, int]) -> Figure | None:
    cells, kinds, blocks = _cells(parts)
    total, most = sum(cells.values()), max(cells.values(), default=0)
    if not total:
        return None
    rows: Rows = [
        {"block": block, "kind": kind, "count": count, "text": _short(count)}
        for (block, kind), count in cells.items()
    ]
    x = alt.X("kind:N", title="kind of tensor", sort=kinds, axis=alt.Axis(labelAngle=-40))
    y = alt.Y("block:N", title="decoder block", sort=blocks, axis=alt.Axis(grid=False))
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, y=y)
    colour = alt.Color(
        "count:Q",
        title="masked",
        scale=alt.Scale(scheme="blues", type="sqrt", domain=[0, most]),
        legend=alt.Legend(gradientLength=120, tickCount=4, format="~s"),
    )
    chart: Chart = base.mark_rect(stroke="white", strokeWidth=1).encode(color=colour)
    if len(kinds) <= 9 and len(blocks) <= 48:
        ink = alt.condition(alt.datum.count > 0.3 * most, alt.value("white"), alt.value(_INK))
        text = base.mark_text(fontSize=9).encode(text="text:N", color=ink)
        chart = alt.layer(chart, text)
    by_kind: Counter[str] = Counter()
    for (_, kind), count in cells.items():
        by_kind[kind] += count
    (kind, held), ((block, where), peak) = by_kind.most_common(1)[0], cells.most_common(1)[0]
    sentence = (
        f"Of {total:,} masked parameters {held / total:.0%} lie in {kind}; the fullest cell is "
        f"{where} {'of block ' if block.isdigit() else ''}{block} with {peak:,}."
    )
    height = 110 + (16 if len(blocks) <= 40 else 9) * len(blocks)
    return Figure("mask", sentence, _dressed(chart, "Where in the model the mask lies", height))


def _cells(parts: dict[str, int]) -> tuple[Counter[tuple[str, str]], list[str], list[str]]:
    """Masked parameters by (block, kind), with kinds and blocks in the order of the model."""
    split = {name: _split(plain(name)) for name in parts}
    # `attn.c_proj` and `mlp.c_proj` need their full paths, `q_proj` does not.
    paths = dict.fromkeys(path for _, path in split.values())
    last = Counter(path[-1] for path in paths)
    cells: Counter[tuple[str, str]] = Counter()
    for name, (block, path) in split.items():
        cells[block, path[-1] if last[path[-1]] == 1 else ".".join(path)] += parts[name]
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    numbers = sorted({block for block, _ in cells if block.isdigit()}, key=int)
    rest = [block for block in dict.fromkeys(b for b, _ in cells) if not block.isdigit()]
    return cells, kinds, [*rest, *numbers]


def _split(name: str) -> tuple[str, tuple[str, ...]]:
    """Block and path within it of a parameter's name; experts of a block are taken together.

    >>> _split("model.layers.3.mlp.down_proj.weight")
    ('3', ('mlp', 'down_proj'))
    """
    pieces = name.removesuffix(".weight").split(".")
    place = next((i for i, piece in enumerate(pieces[:-1]) if piece.isdecimal()), None)
    if place is None:
        return "outside", tuple(pieces[-1:])
    path = [piece for piece in pieces[place + 1 :] if not piece.isdecimal()]
    if len(path) > 1 and path[-1] == "bias":
        path[-2:] = [f"{path[-2]} bias"]
    return pieces[place], tuple(path) or ("weight",)
