"""Precision, recall and area under the curve of the selection, from simulated calibrations.

Composes federations of eight clients from each pool of `calibrations.json`, which
`trajectories.py` made: none extreme; one (each of the three in turn); all three. Prints a table for
each kind of others, then which of the Dirichlet clients are flagged, by their labels.

    python experiments/detection.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from meerkat.config import Recipe, load_recipe
from meerkat.federation.selection import Decision, decide_by_paths

RECIPE = Path(__file__).parents[1] / "recipes" / "meerkat-vp.toml"
RECORDED = Path(__file__).with_name("calibrations.json")
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

    seed: int
    truth: tuple[int, ...]
    decision: Decision
    scores: dict[int, tuple[float, float]]
    """ρ_later, and minus the level of the later window: the higher, the more extreme."""


def pools(recorded: Path, others: str) -> dict[int, dict[int, Simulated]]:
    """The clients of each seed whose pool is whole."""
    content = json.loads(recorded.read_text())
    found = {}
    for seed, shared in content["seeds"].items():
        names = [
            f"{'extreme' if number >= CLIENTS else others}-{seed}-{number}"
            for number in range(CLIENTS + EXTREME)
        ]
        if not set(names) <= set(content["clients"]):
            continue
        alignments = np.array(shared["alignments"])
        found[int(seed)] = {
            number: Simulated(client["labels"], np.array(client["scalars"]), alignments)
            for number, client in enumerate(content["clients"][name] for name in names)
        }
    return found


def federations(pool: dict[int, Simulated]) -> Iterator[tuple[int, ...]]:
    """Eight clients each: none, one, or three of them extreme."""
    singles = range(CLIENTS, CLIENTS + EXTREME)
    yield tuple(range(CLIENTS))
    for single in singles:
        yield (*range(CLIENTS - 1), single)
    yield (*range(CLIENTS - EXTREME), *singles)


def cases(pools: dict[int, dict[int, Simulated]], recipe: Recipe) -> Iterator[Case]:
    """What is decided of each federation of each pool."""
    steps, name = recipe.selection.calibration_steps, recipe.selection.signal
    window = min(recipe.selection.later_window, steps // 2)
    for seed, pool in pools.items():
        for members in federations(pool):
            signals = {k: pool[k].signal(name, steps) for k in members}
            local_steps = recipe.federation.local_steps
            decision = decide_by_paths(recipe.selection, local_steps, 0, "calibration", signals)
            scores = {
                v.client: (v.rho_later or 0.0, -float(signals[v.client][-window:].mean()))
                for v in decision.verdicts
            }
            truth = tuple(k for k in members if k >= CLIENTS)
            yield Case(seed, truth, decision, scores)


def chosen(signal: str, steps: int) -> Recipe:
    """The recipe with a signal and T_cali, all thresholds automatic."""
    changes = ["kind=gradip", f"signal={signal}", f"calibration_steps={steps}"]
    return load_recipe(RECIPE, [f"selection.{change}" for change in changes])


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


def tell_dirichlet(pools: dict[int, dict[int, Simulated]]) -> None:
    """Each Dirichlet client of the federations without an extreme one, by its larger label."""
    rows = []
    for case in cases(pools, chosen("projected-gradient", 100)):
        if not case.truth:
            for client, (_, level) in case.scores.items():
                labels = pools[case.seed][client].labels
                share, flagged = max(labels) / sum(labels), client in case.decision.flagged
                rows.append((share, case.seed, labels, -level, flagged))
    print("\n| larger label's share | seed | rotten, fresh | level of the later window | flagged |")
    print("|---|---|---|---|---|")
    for share, seed, labels, level, flagged in sorted(rows, reverse=True):
        counts = ", ".join(map(str, labels))
        print(f"| {share:.3f} | {seed} | {counts} | {level:.1f} | {'yes' if flagged else ''} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recorded", type=Path, nargs="?", default=RECORDED)
    recorded = parser.parse_args().recorded
    for others in ("iid", "dirichlet"):
        found = pools(recorded, others)
        print(f"\nothers {others}, pools {', '.join(map(str, found))}\n")
        print(
            "| signal | T_cali | extreme | federations | wrongly flagged | precision | recall | "
            "AUC of ρ_later | AUC of the level |\n|---|---|---|---|---|---|---|---|---|"
        )
        for name in ("gradip", "projected-gradient"):
            for steps in (25, 50, 100):
                decided = list(cases(found, chosen(name, steps)))
                for extreme in (0, 1, 3):
                    some = [case for case in decided if len(case.truth) == extreme]
                    if some:
                        print(f"| {name} | {steps} | {extreme} | {row(some)} |")
    tell_dirichlet(pools(recorded, "dirichlet"))


if __name__ == "__main__":
    main()
