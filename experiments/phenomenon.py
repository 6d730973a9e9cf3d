"""The picture of the paper: GradIP, norm and cosine of three clients over their calibration.

One IID client, one with rotten snippets alone, one with fresh ones alone, of the pool of seed 0 in
`calibrations.json`, which `trajectories.py` made.

    python experiments/phenomenon.py docs/results/gradip.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import altair as alt
import numpy as np
import pandas as pd
import vl_convert

RECORDED = Path(__file__).with_name("calibrations.json")
CLIENTS = {
    "IID": ("iid-0-0", "#8896a5"),
    "only rotten": ("extreme-0-8", "#D55E00"),
    "only fresh": ("extreme-0-9", "#0072B2"),
}
PANELS = {
    "|GradIP|": "linear",
    "norm of the gradient estimate": "linear",
    "cosine with p": "linear",
}


def rows() -> pd.DataFrame:
    """One row for each client, step and panel."""
    content, frames = json.loads(RECORDED.read_text()), []
    shared = content["seeds"]["0"]
    products, lengths = np.array(shared["alignments"]), np.array(shared["norms"])
    for name, (key, _) in CLIENTS.items():
        scalars = np.array(content["clients"][key]["scalars"])
        gradip, norm = scalars * products, np.abs(scalars) * lengths
        cosine = gradip / (norm * shared["gradient_norm"])
        for panel, values in zip(PANELS, (np.abs(gradip), norm, cosine), strict=True):
            frames.append(
                pd.DataFrame(
                    {"client": name, "step": range(len(values)), "panel": panel, "value": values}
                )
            )
    return pd.concat(frames)


def draw(table: pd.DataFrame) -> alt.VConcatChart:
    names = list(CLIENTS)
    colour = alt.Color(
        "client:N",
        title=None,
        scale=alt.Scale(domain=names, range=[colour for _, colour in CLIENTS.values()]),
        legend=alt.Legend(orient="top", symbolType="stroke", symbolStrokeWidth=3),
    )
    panels = []
    for panel, scale in PANELS.items():
        last = panel == list(PANELS)[-1]
        y = alt.Y("value:Q", title=panel, scale=alt.Scale(type=scale))
        panels.append(
            alt.Chart(table[table.panel == panel])
            .mark_line(strokeWidth=1.5)
            .encode(
                x=alt.X("step:Q", title="local step" if last else None, axis=alt.Axis(grid=False)),
                y=y,
                color=colour,
            )
            .properties(width=640, height=150)
        )
    return alt.vconcat(*panels).configure_view(stroke=None).configure_axis(gridColor="#e4e7eb")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    table = rows()
    options.picture.write_bytes(vl_convert.vegalite_to_png(draw(table).to_dict(), scale=1.0))
    size = table.assign(value=table.value.abs())
    for (panel, client), part in size.groupby(["panel", "client"], sort=False):
        ends = part[part.step < 20].value.mean(), part[part.step >= 80].value.mean()
        print(f"{panel}, {client}: first 20 steps {ends[0]:.3g}, last 20 {ends[1]:.3g}")


if __name__ == "__main__":
    main()
