"""What all pictures of a report share: their look, their rendering, and how numbers are written."""

from __future__ import annotations

import html
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import altair as alt
import numpy as np
import vl_convert

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "INK",
    "LABEL_COLOURS",
    "PALE_BLUE",
    "VERMILLION",
    "Chart",
    "Figure",
    "Rows",
    "byte_unit",
    "dressed",
    "label_names",
    "left_out",
    "listed",
    "log_axis",
    "measured",
    "plain",
    "plural",
    "rimmed",
    "running_mean",
    "short",
    "tally",
    "thin",
]

Chart: TypeAlias = alt.Chart | alt.LayerChart
Rows: TypeAlias = list[dict[str, Any]]

INK, _MUTED, _FRAME, _RULE = "#1f2933", "#52606d", "#9aa5b1", "#e4e7eb"
# Okabe and Ito's colours, which colour-blind readers can tell apart; grey is for all the rest.
BLUE, PALE_BLUE, VERMILLION, GREEN = "#0072B2", "#A8CFE6", "#D55E00", "#009E73"
GREY = "#8FA1B3"
LABEL_COLOURS = (BLUE, "#E69F00", GREEN, "#CC79A7", "#56B4E9", VERMILLION, "#F0E442", "#9AA5B1")
_FONT = "Helvetica Neue, Helvetica, Arial, Liberation Sans, sans-serif"
# One width for all, so that letters are of one size; it is what a narrow window can show.
_WIDTH = 480


@dataclass(frozen=True)
class Figure:
    """One picture."""

    name: str
    sentence: str
    """What is to be seen, for the caption and for those who do not see it."""
    chart: Chart

    @cached_property
    def _spec(self) -> dict[str, Any]:
        return self.chart.to_dict()

    @cached_property
    def svg(self) -> str:
        """The picture as SVG. Its ids carry its name, so that several fit into one page."""
        drawn: str = vl_convert.vegalite_to_svg(self._spec)
        # The renderer numbers ids over the life of the process; ours must be the same each time.
        for place, name in enumerate(dict.fromkeys(re.findall(r'\bid="([^"]+)"', drawn))):
            own = f"{self.name}-{place}"
            drawn = drawn.replace(f'id="{name}"', f'id="{own}"').replace(f"(#{name})", f"(#{own})")
        label = html.escape(self.sentence)
        return drawn.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)

    def png(self) -> bytes:
        """The picture as PNG, at twice its size."""
        drawn: bytes = vl_convert.vegalite_to_png(self._spec, scale=2)
        return drawn


def dressed(chart: Chart, heading: str, height: int) -> Chart:
    """The chart with its heading, in the size and look of all pictures."""
    title = alt.TitleParams(heading, anchor="start", fontSize=15, color=INK, offset=12)
    whole: Chart = chart.properties(
        title=title,
        width=_WIDTH,
        height=height,
        padding=8,
        background="white",
        autosize=alt.AutoSizeParams(type="fit", contains="padding"),
    )
    # Marks need no label of their own: the whole picture has one.
    look: Chart = whole.configure(
        font=_FONT,
        aria=False,
        view=alt.ViewConfig(stroke=None),
        axis=alt.AxisConfig(
            domainColor=_FRAME,
            gridColor=_RULE,
            labelColor=_MUTED,
            labelFontSize=11,
            tickColor=_FRAME,
            titleColor=_MUTED,
            titleFontSize=11,
            titleFontWeight="normal",
            titlePadding=8,
        ),
        legend=alt.LegendConfig(labelColor=INK, titleColor=_MUTED, titleFontWeight="normal"),
    )
    return look


def rimmed(text: alt.Chart, **look: Any) -> list[alt.Chart]:
    """Text with a white rim, which keeps it readable on top of lines."""
    rims: tuple[tuple[str, int], ...] = (("white", 4), ("transparent", 0))
    return [text.mark_text(color=INK, stroke=rim, strokeWidth=width, **look) for rim, width in rims]


def log_axis(low: float, high: float) -> alt.Axis:
    """A logarithmic axis with a few round ticks, rather than nine for each decade."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1.0,), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)):
        values = [float(f"{step}e{decade}") for decade in decades for step in steps]
        values = [value for value in values if low <= value <= high]
        if len(values) >= 3:
            every = math.ceil(len(values) / 8)
            return alt.Axis(values=values[::every], format="~g")
    return alt.Axis(tickCount=5, format="~g")


def byte_unit(most: float) -> tuple[str, int]:
    """The largest unit that is not larger than `most` bytes, and its size."""
    units = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    return [(unit, size) for unit, size in units.items() if size <= max(most, 1)][-1]


def short(count: int) -> str:
    """A count in at most four figures.

    >>> short(999), short(1234567)
    ('999', '1.2M')
    """
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return (
                f"{count / size:.3g}{letter}"
                if count >= 100 * size
                else f"{count / size:.2g}{letter}"
            )
    return str(count)


def measured(value: float) -> str:
    """A number in about three figures.

    >>> measured(0.01234), measured(2.5), measured(1234.5)
    ('0.0123', '2.5', '1,234')
    """
    return f"{value:,.0f}" if 100 <= abs(value) < 1e7 else f"{value:.3g}"


def listed(numbers: Sequence[int], most: int) -> str:
    """Numbers in a row, of which no more than so many are written out.

    >>> listed([2, 5, 7], 3), listed([2, 5, 7, 8], 2)
    ('2, 5, 7', '2, 5 and 2 more')
    """
    told = ", ".join(map(str, numbers[:most]))
    return told + (f" and {len(numbers) - most:,} more" if len(numbers) > most else "")


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def left_out(count: int, shown: int, noun: str) -> str:
    """The end of a caption, with the number of items drawn if that is not all of them."""
    return "." if shown == count else f" (drawn are {shown:,} of {count:,} {noun})."


def plain(text: str) -> str:
    """Text without what XML and UTF-8 cannot hold; line breaks and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def label_names(labels: Sequence[str], count: int) -> list[str]:
    """A name for each colour; what has no colour of its own shares the last."""
    if count <= 1 and not labels:
        return ["examples"]
    names = [plain(labels[i]) if i < len(labels) else f"label {i}" for i in range(count)]
    most = len(LABEL_COLOURS)
    return names if count <= most else [*names[: most - 1], f"{count - most + 1} other labels"]


def tally(counts: Sequence[int], names: Sequence[str]) -> Counter[int]:
    """Examples under each of the names, by its place."""
    held: Counter[int] = Counter()
    for label, count in enumerate(counts):
        held[min(label, len(names) - 1)] += count
    return held


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the finite values among the `window` around each; shorter at the ends."""
    array = np.array(values, dtype=np.float64)
    finite = np.isfinite(array)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, array, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    middle = np.arange(len(array))
    low = np.maximum(0, middle - window // 2)
    high = np.minimum(len(array), middle - window // 2 + window)
    held = counts[high] - counts[low]
    mean = (sums[high] - sums[low]) / np.maximum(1, held)
    result: list[float] = np.where(held > 0, mean, np.nan).tolist()
    return result


def thin(count: int, most: int) -> list[int]:
    """At most so many of `count` positions, evenly spread, with the first and the last.

    >>> thin(7, 4)
    [0, 2, 4, 6]
    """
    return [round(place) for place in np.linspace(0, count - 1, min(count, most)).tolist()]
