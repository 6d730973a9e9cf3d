"""One long round: does stopping extreme clients help where they drift for up to 100 steps?

The calibrations in `calibrations.json` are the local paths of a first round. Averaged as a round
would average them they give θ without a single step more; only θ is evaluated. Five IID clients and
three of a single label, for each seed. Arms: nobody stopped, the three stopped (weights 1/8 as in
method.md section 4, and weights over those that took the step), three IID clients stopped.

    python experiments/one_round.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from meerkat.config import load_recipe
from meerkat.federation.messages import CALIBRATION
from meerkat.runs.assembly import assemble
from meerkat.runs.evaluation import evaluate_objective
from meerkat.zo.directions import DirectionKey
from meerkat.zo.log import LogEntry, Update

ROOT = Path(__file__).parents[1]
IID, SINGLE = tuple(range(5)), (8, 9, 10)
ARMS = ("nobody", "the three", "the three, others weighted up", "three others")


def mean_scalars(scalars: np.ndarray, arm: str) -> np.ndarray:
    """ḡ of each step, from g of the five and the three clients."""
    stopped = {"nobody": [], "three others": [0, 1, 2]}.get(arm, [5, 6, 7])
    taken = np.ones_like(scalars)
    taken[stopped, 1:] = 0
    count = taken.sum(axis=0) if arm.endswith("weighted up") else len(scalars)
    return (scalars * taken).sum(axis=0) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2", "3", "4"])
    parser.add_argument("--steps", type=int, nargs="+", default=[30, 100])
    parser.add_argument("--examples", type=int, default=512, help="held-out examples")
    options = parser.parse_args()
    content = json.loads((ROOT / "experiments" / "calibrations.json").read_text())
    print("| seed | T | stopped | accuracy | loss |\n|---|---|---|---|---|", flush=True)
    for seed in options.seeds:
        changes = [
            f"seed={seed}",
            f"evaluation.examples={options.examples}",
            "runtime.threads=1",
        ]
        recipe = load_recipe(ROOT / "recipes" / "meerkat-vp.toml", changes)
        assembly = assemble(recipe)
        worker = assembly.worker()
        names = [f"iid-{seed}-{k}" for k in IID] + [f"extreme-{seed}-{k}" for k in SINGLE]
        scalars = np.array([content["clients"][name]["scalars"] for name in names])
        for arm in ARMS:
            state, means = worker.initial, mean_scalars(scalars, arm)
            for step, scalar in enumerate(means.tolist(), start=1):
                key = DirectionKey(CALIBRATION, step - 1)
                update = Update(recipe.optimizer.learning_rate, (LogEntry(key, scalar),))
                state = worker.algorithm.apply(state, [update])
                if step in options.steps:
                    worker.space.write(state.theta)
                    found = evaluate_objective(
                        assembly.objective, assembly.test, assembly.metrics
                    ).metrics
                    cells = f"{found['accuracy']:.3f} | {found['loss']:.3f}"
                    print(f"| {seed} | {step} | {arm} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
