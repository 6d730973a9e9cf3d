"""The plain method at T > 1: whom it helps to stop, and what synchronising often gives.

These need gradients of their own: `linear_model.py features DIR --plain`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
from scipy.stats import ttest_rel

from meerkat.config.sections import Selection

from .plain import (
    Metrics,
    PlainArm,
    PlainWorld,
    Projected,
    balanced,
    dirichlet,
    rest_iid,
    run,
    single_label,
)

SEEDS = 20
CLIENTS, EXTREME = 8, 4


def stopping(out: Path) -> None:
    """8 clients of equal size, 4 of one label: the same ("bias"), or two of each."""
    world = PlainWorld(out)
    found = Selection(kind="gradip")
    others, extreme = tuple(range(CLIENTS - EXTREME)), tuple(range(CLIENTS - EXTREME, CLIENTS))
    for steps, batch in ((80, 4), (300, 8)):
        prepared = {seed: world.projected(steps, seed) for seed in range(SEEDS)}
        for labels, singles in (
            ("bias", (1, 1, 1, 1)),
            ("bias, the other label", (0, 0, 0, 0)),
            ("null", (0, 1, 0, 1)),
        ):
            parts = {s: balanced(world.labels, CLIENTS, singles, s) for s in range(SEEDS)}
            for local_steps in (1, 10, 30, 100):
                if local_steps > steps:
                    continue
                arm = PlainArm(local_steps, steps, batch)
                arms = {
                    "nobody": arm,
                    "the four of one label": replace(arm, stopped=extreme),
                    "the four others": replace(arm, stopped=others),
                    "two of the others": replace(arm, stopped=others[:2]),
                    "found": replace(arm, found=found),
                    "found, taper": replace(
                        arm, found=found.model_copy(update={"action": "taper"})
                    ),
                    "the four of one label, weights over all": replace(
                        arm, stopped=extreme, over_step=False
                    ),
                }
                if local_steps == 1:
                    arms = {"nobody": arm}
                if steps < 100:
                    arms = {name: arm for name, arm in arms.items() if arm.found is None}
                print(f"  {steps} steps of {batch}, {labels}, T = {local_steps}")
                _show(prepared, parts, arms)


def alternating(out: Path) -> None:
    """8 clients, 3 of one label in turn and 5 that hold the rest: the first measurement."""
    world, extreme = PlainWorld(out), (5, 6, 7)
    for steps, batch in ((80, 4), (300, 8)):
        prepared = {seed: world.projected(steps, seed) for seed in range(SEEDS)}
        parts = {s: rest_iid(world.labels, CLIENTS, (s % 2, 1 - s % 2, s % 2), s) for s in prepared}
        for local_steps in (10, 30):
            arm = PlainArm(local_steps, steps, batch)
            stopped = replace(arm, stopped=extreme)
            arms = {
                "nobody": arm,
                "the three of one label": stopped,
                "two, one of each label": replace(arm, stopped=extreme[:2]),
                "one of the two of the same label": replace(arm, stopped=extreme[2:]),
                "the three, weights over all": replace(stopped, over_step=False),
            }
            print(f"  {steps} steps of {batch}, T = {local_steps}")
            _show(prepared, parts, arms)


def frequency(out: Path) -> None:
    """4 clients, 60 and 300 local steps of 16 in rounds of T, by how the data are held."""
    world = PlainWorld(out)
    for steps in (60, 300):
        prepared = {seed: world.projected(steps, seed) for seed in range(SEEDS)}
        for local_steps in (1, 10, 30, 100):
            if local_steps > steps:
                continue
            arm, rows = PlainArm(local_steps, steps, 16), {}
            for name, alpha in (("IID", np.inf), ("Dirichlet 0.5", 0.5), ("Dirichlet 0.1", 0.1)):
                rows[name] = {s: dirichlet(world.labels, 4, alpha, s) for s in range(SEEDS)}
            rows["one label each"] = {s: single_label(world.labels, 4, s) for s in range(SEEDS)}
            print(f"  {steps} steps, T = {local_steps}")
            first: np.ndarray | None = None
            for name, parts in rows.items():
                values = _values(prepared, parts, arm)
                _line(name, values, first)
                first = values if first is None else first


def _values(
    prepared: Mapping[int, dict[str, Projected]],
    parts: Mapping[int, Sequence[np.ndarray]],
    arm: PlainArm,
) -> np.ndarray:
    """Metrics, a row a seed."""
    return np.array([astuple(run(prepared[s], parts[s], arm)) for s in prepared])


def _show(
    prepared: Mapping[int, dict[str, Projected]],
    parts: Mapping[int, Sequence[np.ndarray]],
    arms: Mapping[str, PlainArm],
) -> None:
    first: np.ndarray | None = None
    for name, arm in arms.items():
        values = _values(prepared, parts, arm)
        _line(name, values, first)
        first = values if first is None else first
    before = [
        astuple(Metrics.of(g["held"].scores, g["held"].labels)) for g in list(prepared.values())[:1]
    ]
    _line("before any round", np.array(before), None)


def _line(name: str, values: np.ndarray, first: np.ndarray | None) -> None:
    """Accuracy, macro-F1, loss and bias, and the difference in accuracy to the first row."""
    mean, spread = values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else None
    shown = [
        f"{m:.3f}" + ("" if spread is None else f" ± {s:.3f}")
        for m, s in zip(mean, spread if spread is not None else mean, strict=True)
    ]
    text = f"    {name:42} " + "  ".join(
        f"{title} {value}"
        for title, value in zip(("accuracy", "F1", "loss", "bias"), shown, strict=True)
    )
    for column, what in ((0, ""), (2, "; loss ")):
        if first is not None:
            gained, p = values[:, column] - first[:, column], "–"
            if gained.any():
                p = f"{ttest_rel(values[:, column], first[:, column]).pvalue:.1g}"
            text += f"{what} {gained.mean():+.3f}, p {p}"
    print(text, flush=True)


TABLES = {"alternating": alternating, "stopping": stopping, "frequency": frequency}
