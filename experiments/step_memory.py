"""What a step of each kind of report takes: memory above the resting model, passes, bytes, time.

Each kind runs in a process of its own, on snippets of the demo: six steps of one client, B random
over a random mask, since no figure here depends on what B is. The peak starts to count once model
and space are loaded.

    python experiments/step_memory.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

from meerkat.algorithms import make_algorithm
from meerkat.benchmarks.machine import peak_bytes, reset_peak, resident_bytes
from meerkat.benchmarks.step import demo_examples
from meerkat.config import MaskSection, load_recipe
from meerkat.federation.client import Client, Worker
from meerkat.federation.messages import RoundPlan
from meerkat.models.loading import load_model
from meerkat.models.objective import TextObjective
from meerkat.runs.finding_subspace import find_subspace
from meerkat.spaces.linear import space_of
from meerkat.spaces.mask_criteria import eligible_parameters, random_mask
from meerkat.transport.messages import encode_report

RECIPE = "recipes/demo.toml"
KINDS = {
    "two-point, 16 examples": ["two-point", 1, 16],
    "one-sided, 3 directions of 8": ["one-sided", 3, 8],
    "one-sided, 7 directions of 4": ["one-sided", 7, 4],
    "forward-mode, 7 directions of 4": ["forward-mode", 7, 4],
    "backward, 16 examples": ["backward", 1, 16],
}
STEPS = 6


class _Sources:
    """What a random subspace is found from: nothing."""


def child(kind: str) -> None:
    estimator, directions, batch = KINDS[kind]
    recipe = load_recipe(
        RECIPE,
        [
            f"optimizer.estimator={estimator}",
            f"noise.perturbations={directions}",
            f"federation.batch_size={batch}",
            "subspace.kind=random",
        ],
    )
    loaded = load_model(recipe.model, recipe.runtime)
    objective = TextObjective(loaded, recipe.runtime.tokens_per_pass)
    parameters = eligible_parameters(loaded.model, MaskSection())
    mask = random_mask(parameters, MaskSection(kind="random"), loaded.fingerprint)
    assert recipe.subspace is not None
    mask = find_subspace(_Sources(), mask, recipe.subspace).mask  # type: ignore[arg-type]
    examples = demo_examples(loaded, batch * STEPS)
    along = "axes" if estimator == "backward" else "drawn"
    worker = Worker(
        space_of(loaded.model, mask), objective, make_algorithm(recipe, mask.dimensions)
    )
    client = Client(0, examples, batch, 0)
    worker.space.write(worker.state.theta)
    reset_peak()
    resting, taken = resident_bytes(), []
    for step in range(STEPS):
        started = time.perf_counter()
        report, _ = client.answer(RoundPlan(0, 1, 1e-3, step, 0, (), along), worker)
        taken.append(time.perf_counter() - started)
    passes = directions + 1 if estimator == "one-sided" else 2 if estimator == "two-point" else 1
    passes = directions if estimator == "forward-mode" else passes
    print(
        json.dumps(
            {
                "above the model, MB": round((peak_bytes() - resting) / 1e6),
                "bytes": len(encode_report(report)),
                "example passes": passes * batch,
                "seconds": round(sorted(taken)[STEPS // 2], 2),
            }
        )
    )


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
