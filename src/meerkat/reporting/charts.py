"""The pictures of a report: how the run went, who held what, and where the mask lies."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import altair as alt

from meerkat.journal.records import Evaluated, Header
from meerkat.reporting import subspace
from meerkat.reporting.curves import axes, loss, scores
from meerkat.reporting.figure import (
    INK,
    LABEL_COLOURS,
    Chart,
    Figure,
    Rows,
    dressed,
    label_names,
    left_out,
    plain,
    plural,
    short,
    tally,
    thin,
)
from meerkat.reporting.paths import draw_paths
from meerkat.reporting.scatter import draw_scatter
from meerkat.reporting.stopping import Paths, Stopping

__all__ = ["FIGURES", "draw"]

FIGURES = (
    *("loss", "accuracy", "scores"),
    *("loss-by-bytes", "accuracy-by-bytes", "scores-by-bytes"),
    *("gradip", "selection", "gradip-norm", "gradip-cosine"),
    *subspace.NAMES,
    *("clients", "mask"),
)
"""Names of all pictures that a report may have, in their order on the page."""

_HEIGHT = 280
_BARS, _LYING = 200, 24
"""Most clients that are drawn, and that are drawn as lying bars."""
_NAME = 230
"""Most pixels of a client's name."""


def draw(
    header: Header,
    losses: Sequence[float],
    sent: Sequence[int],
    evaluations: Sequence[Evaluated],
    stopping: Stopping | None = None,
    paths: Paths | None = None,
    within: subspace.Within | None = None,
    names: Sequence[str] = (),
) -> list[Figure]:
    """All pictures that there are data for.

    `losses` has one value a round, `sent` the bytes sent before each round and after the last;
    `names` are those of the clients, if they have any.
    """
    found: list[Figure | None] = []
    for axis in axes(sent):
        found += [loss(axis, losses, evaluations), *scores(axis, evaluations)]
    if stopping is not None:
        drawn = draw_paths(paths) if paths is not None else []
        found += [*drawn[:1], draw_scatter(stopping.last), *drawn[1:]]
    found += subspace.draw_within(within) if within is not None else []
    found += [_clients(header.labels, header.label_counts, names), _mask(header.mask_parts)]
    return [figure for figure in found if figure is not None]


def _clients(
    labels: Sequence[str], counts: Sequence[Sequence[int]], called: Sequence[str]
) -> Figure | None:
    sizes = [sum(row) for row in counts]
    if not sizes:
        return None
    names = label_names(labels, max(map(len, counts)))
    shown = thin(len(counts), _BARS)
    sentence = (
        f"{sum(sizes):,} training examples are spread over {plural(len(sizes), 'client')}; the "
        f"smallest holds {min(sizes):,}, the largest {max(sizes):,}"
    )
    if len(sizes) == 1:
        sentence = f"One client holds all {sizes[0]:,} training examples"
    elif len(names) > 1:
        single = sum(1 for row in counts if sum(1 for count in row if count) == 1)
        sentence += (
            f", and {single or 'none'} of them {'holds' if single < 2 else 'hold'} one label only"
        )
    # Beside standing bars there is room for numbers alone.
    roomy = len(called) == len(counts) and len(shown) <= _LYING
    return Figure(
        name="clients",
        sentence=sentence + left_out(len(counts), len(shown), "clients"),
        chart=_bars(names, {called[k] if roomy else str(k): counts[k] for k in shown}),
    )


def _bars(names: list[str], counts: Mapping[str, Sequence[int]]) -> Chart:
    """Stacked bars by client: lying while each has room for its name, else standing."""
    rows: Rows = []
    for client, row in counts.items():
        rows += [
            {"client": client, "label": names[i], "order": i, "examples": count}
            for i, count in tally(row, names).items()
        ]
    legend = alt.Legend(orient="top", columns=4, labelLimit=80)
    bars = (
        alt.Chart(alt.InlineData(values=rows))
        .mark_bar()
        .encode(
            color=alt.Color(
                "label:N",
                title=None,
                scale=alt.Scale(domain=names, range=list(LABEL_COLOURS[: len(names)])),
                legend=legend if len(names) > 1 else None,
            ),
            order="order:Q",
        )
    )
    order, length = list(counts), "training examples"
    heading = f"{'Labels' if len(names) > 1 else 'Examples'} by client"
    if len(order) <= _LYING:
        chart = bars.encode(
            x=alt.X("examples:Q", title=length, axis=alt.Axis(tickMinStep=1)),
            y=alt.Y("client:N", title="client", sort=order, axis=alt.Axis(labelLimit=_NAME)),
        )
        return dressed(chart, heading, 112 + 22 * len(order))
    ticks = alt.Axis(values=order[:: math.ceil(len(order) / 10)], labelAngle=0)
    chart = bars.encode(
        x=alt.X("client:N", title="client", sort=order, axis=ticks),
        y=alt.Y("examples:Q", title=length),
    )
    return dressed(chart, heading, _HEIGHT)


def _mask(parts: dict[str, int]) -> Figure | None:
    cells, kinds, blocks = _cells(parts)
    total, most = sum(cells.values()), max(cells.values(), default=0)
    if not total:
        return None
    rows: Rows = [
        {"block": block, "kind": kind, "count": count, "text": short(count)}
        for (block, kind), count in cells.items()
    ]
    x = alt.X("kind:N", title="kind of tensor", sort=kinds, axis=alt.Axis(labelAngle=-40))
    roomy = len(blocks) <= 40
    marked = [b for b in blocks if roomy or not b.isdigit() or int(b) % 5 == 0]
    y = alt.Y("block:N", title="decoder block", sort=blocks, axis=alt.Axis(values=marked))
    base = alt.Chart(alt.InlineData(values=rows)).encode(x=x, y=y)
    blues = alt.SchemeParams("blues", extent=[0, 1])
    colour = alt.Color(
        "count:Q",
        title="masked",
        scale=alt.Scale(type="sqrt", domain=[0, most], scheme=blues),
        legend=alt.Legend(gradientLength=120, tickCount=4, labelExpr="format(datum.value, '~s')"),
    )
    chart: Chart = base.mark_rect(stroke="white", strokeWidth=1).encode(color=colour)
    if len(kinds) <= 9 and roomy:
        ink = alt.condition(alt.datum.count > 0.3 * most, alt.value("white"), alt.value(INK))
        text = base.mark_text(fontSize=9).encode(text="text:N", color=ink)
        chart = alt.LayerChart(layer=[chart, text])
    by_kind: Counter[str] = Counter()
    for (_, kind), count in cells.items():
        by_kind[kind] += count
    (kind, held), ((block, where), peak) = by_kind.most_common(1)[0], cells.most_common(1)[0]
    place = f"in block {block}" if block.isdigit() else "outside the blocks"
    sentence = (
        f"Of {total:,} masked parameters {100 * held / total:.0f} % lie in {kind}; the fullest "
        f"cell is {where} {place}, with {peak:,}."
    )
    height = 110 + (16 if roomy else 6) * len(blocks)
    return Figure("mask", sentence, dressed(chart, "Where in the model the mask lies", height))


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
    outside = ["outside"] if any(block == "outside" for block, _ in cells) else []
    return cells, kinds, [*outside, *numbers]


def _split(name: str) -> tuple[str, tuple[str, ...]]:
    """Block and path within it of a parameter's name; experts of a block are taken together.

    >>> _split("model.layers.3.mlp.down_proj.weight")
    ('3', ('mlp', 'down_proj'))
    """
    pieces = name.removesuffix(".weight").split(".")
    if len(pieces) > 1 and pieces[-1] == "bias":
        pieces[-2:] = [f"{pieces[-2]} bias"]
    place = next((i for i, piece in enumerate(pieces[:-1]) if piece.isdecimal()), None)
    if place is None:
        return "outside", (pieces[-1],)
    path = [piece for piece in pieces[place + 1 :] if not piece.isdecimal()]
    return pieces[place], tuple(path) or ("weight",)
