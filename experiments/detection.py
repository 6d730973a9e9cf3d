"""Precision, recall and area under the curve of the selection, from simulated calibrations.

Reads what `trajectories.py` wrote and composes federations of eight clients from each pool: none
extreme; one (each of the three in turn); all three. Prints one table for each kind of others.

    python experiments/detection.py runs/vp
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from meerkat.recipe import Recipe, load_recipe
from meerkat.server.selection import Decision, decide_by_paths

RECIPE = Path(__file__).parents[1] / "recipes" / "meerkat-vp.toml"
CLIENTS, EXTREME = 8, 3


@dataclass(frozen=True)
class Simulated:
    """A client's simulated calibration."""

    labels: list[int]
    scalars: np.ndarray
    alignments: np.ndarray

    def signal(self, name: str, steps: int) -> np.ndarray:
        factor = self.alignments if name == "gradip" else 1.0
        return np.abs(self.scalars * factor)[:steps]


@dataclass(frozen=True)
class Case:
    """One federation and what was decided of it."""

    extreme: int
    truth: tuple[int, ...]
    decision: Decision
    scores: dict[int, tuple[float, float]]
    """ρ_later, and minus the level of the later window: the higher, the more extreme."""


def read(folder: Path, others: str, seed: int) -> dict[int, Simulated]:
    """The pool of a seed, as far as it is there."""
    pool = {}
    for number in range(CLIENTS + EXTREME):
        path = folder / f"{'extreme' if number >= CLIENTS else others}-{seed}-{number}.json"
        if path.exists():
            content = json.loads(path.read_text())
            arrays = (np.array(content[name]) for name in ("scalars", "alignments"))
            pool[number] = Simulated(content["labels"], *arrays)
    return pool


def federations(pool: dict[int, Simulated]) -> Iterator[tuple[int, ...]]:
    """Eight clients each: none, one, or three of them extreme."""
    singles = range(CLIENTS, CLIENTS + EXTREME)
    yield tuple(range(CLIENTS))
    for single in singles:
        yield (*range(CLIENTS - 1), single)
    yield (*range(CLIENTS - EXTREME), *singles)


def cases(folder: Path, others: str, seeds: Sequence[int], recipe: Recipe) -> Iterator[Case]:
    steps, name = recipe.selection.calibration_steps, recipe.selection.signal
    for seed in seeds:
        pool = read(folder, others, seed)
        if len(pool) < CLIENTS + EXTREME:
            continue
        for members in federations(pool):
            signals = {k: pool[k].signal(name, steps) for k in members}
            decision = decide_by_paths(recipe, 0, "calibration", signals)
            window = min(recipe.selection.later_window, steps // 2)
            scores = {
                v.client: (v.rho_later or 0.0, -float(signals[v.client][-window:].mean()))
                for v in decision.verdicts
            }
            truth = tuple(k for k in members if k >= CLIENTS)
            yield Case(len(truth), truth, decision, scores)


def area(found: Sequence[Case], score: int) -> float:
    """Area under the ROC curve, the mean over federations with extreme clients."""
    areas = []
    for case in found:
        high = [case.scores[k][score] for k in case.scores if k in case.truth]
        low = [case.scores[k][score] for k in case.scores if k not in case.truth]
        if high:
            pairs = [(h > n) + 0.5 * (h == n) for h in high for n in low]
            areas.append(np.mean(pairs))
    return float(np.mean(areas)) if areas else float("nan")


def row(found: Sequence[Case]) -> str:
    flagged = sum(len(c.decision.flagged) for c in found)
    truth = sum(len(c.truth) for c in found)
    hits = sum(len(set(c.decision.flagged) & set(c.truth)) for c in found)
    precision = f"{hits / flagged:.2f}" if flagged else "–"
    recall = f"{hits / truth:.2f}" if truth else "–"
    areas = [f"{area(found, score):.2f}" if truth else "–" for score in (0, 1)]
    return " | ".join((str(len(found)), str(flagged - hits), precision, recall, *areas))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options = parser.parse_args()
    for others in ("iid", "dirichlet"):
        print(f"\nothers {others}\n")
        print(
            "| signal | T_cali | extreme | federations | wrongly flagged | precision | recall | "
            "AUC of ρ_later | AUC of the level |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        for name in ("gradip", "projected-gradient"):
            for steps in (25, 50, 100):
                changes = [
                    "selection.kind=gradip",
                    f"selection.signal={name}",
                    f"selection.calibration_steps={steps}",
                ]
                found = list(
                    cases(options.folder, others, options.seeds, load_recipe(RECIPE, changes))
                )
                for extreme in (0, 1, 3):
                    some = [case for case in found if case.extreme == extreme]
                    if some:
                        print(f"| {name} | {steps} | {extreme} | {row(some)} |")


if __name__ == "__main__":
    main()
