"""What a step of each kind of report takes: memory above the resting model, passes, bytes, time.

Each kind runs in a process of its own: six steps of the demo's first client, in a random subspace
of a random mask, since no figure here depends on which they are. The peak starts to count once
model, data and space are there.

    python experiments/step_memory.py
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

from meerkat.benchmarks.machine import peak_bytes, reset_peak, resident_bytes, seconds
from meerkat.config import load_recipe
from meerkat.federation.messages import RoundPlan
from meerkat.runs.assembly import assemble
from meerkat.runs.planning import plan_run
from meerkat.zo.axes import Along

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.toml"
KINDS = {
    "two-point, 16 examples": ("two-point", 1, 16),
    "one-sided, 3 directions of 8": ("one-sided", 3, 8),
    "one-sided, 7 directions of 4": ("one-sided", 7, 4),
    "forward-mode, 7 directions of 4": ("forward-mode", 7, 4),
    "backward, 16 examples": ("backward", 1, 16),
}
STEPS = 6


def child(kind: str) -> None:
    estimator, directions, batch = KINDS[kind]
    settings = [
        f"optimizer.estimator={estimator}",
        f"noise.perturbations={directions}",
        f"federation.batch_size={batch}",
        "subspace.kind=random",
        "mask.kind=random",
    ]
    recipe = load_recipe(RECIPE, settings)
    found = assemble(recipe)
    worker, client = found.worker(), found.client(0)
    along: Along = "axes" if estimator == "backward" else "drawn"
    for step in range(STEPS):
        client.batch(step)  # encoded before anything is measured
    reset_peak()
    resting = resident_bytes()
    taken = []
    for step in range(STEPS):
        plan = RoundPlan(0, 1, 1e-3, step, 0, (), along)
        taken.append(seconds(lambda plan=plan: client.answer(plan, worker)))
    peak, planned = peak_bytes(), plan_run(recipe)
    figures = {
        "above the model, MB": round((peak - resting) / 1e6),
        "bytes": planned.bytes.up_a_client_round,
        "example passes": planned.passes.forward_a_step,
        "seconds": round(statistics.median(taken), 2),
    }
    print(json.dumps(figures))


def main() -> None:
    if len(sys.argv) > 1:
        child(sys.argv[1])
        return
    for kind in KINDS:
        found = subprocess.run(
            [sys.executable, __file__, kind], capture_output=True, text=True, check=True
        )
        print(f"{kind:34} {found.stdout.splitlines()[-1]}", flush=True)


if __name__ == "__main__":
    main()
