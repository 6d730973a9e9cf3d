"""What GradIP and the selection cost the server, for a calibration of 100,000 clients.

Synthetic scalars, a tenth of the clients falling quiet; n = 100,000, T_cali = 100. CPU seconds, so
that other jobs on the machine do not count.

    python experiments/server_cost.py
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from pathlib import Path

import numpy as np

from meerkat.config import load_recipe
from meerkat.federation.gradip import GradIPScorer
from meerkat.federation.messages import CALIBRATION, ClientReport
from meerkat.federation.selection import decide_by_paths
from meerkat.zo.directions import PerturbationStream

RECIPE = Path(__file__).parents[1] / "recipes" / "meerkat-vp.toml"
STEPS, N = 100, 100_000
CHUNK = 4096
"""Reports that the scorer looks at together."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=100_000)
    count = parser.parse_args().clients
    generator = np.random.default_rng(0)
    scalars = generator.standard_normal((count, STEPS), np.float32)
    scalars[::10] *= np.exp(-np.arange(STEPS) / 30, dtype=np.float32)
    reports = [
        ClientReport(CALIBRATION, k, 16, STEPS, 1, b"", tuple(row.tolist()))
        for k, row in enumerate(scalars)
    ]
    gradient = generator.standard_normal(N, np.float32)
    tracemalloc.start()
    # Other directions than those that are timed: what is drawn once is kept for a while.
    for _ in GradIPScorer(gradient, PerturbationStream(1, N)).stream(reports[:CHUNK]):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    scorer = GradIPScorer(gradient, PerturbationStream(0, N))
    cpu = time.process_time()
    signals = {}
    for found in scorer.stream(reports):
        signals.update(zip(found.clients.tolist(), np.abs(found.gradip), strict=True))
    scored = time.process_time()
    changes = ["selection.kind=gradip", f"federation.clients={count}"]
    recipe = load_recipe(RECIPE, changes)
    decision = decide_by_paths(
        recipe.selection, recipe.federation.local_steps, 0, "calibration", signals
    )
    done = time.process_time()
    wrong = set(decision.flagged) ^ set(range(0, count, 10))
    for name, seconds in (("GradIP, norm, cosine", scored - cpu), ("selection", done - scored)):
        print(f"{name}: {seconds:.1f} s, {seconds / count * 1e6:.0f} µs a client")
    print(f"memory of a chunk of {min(CHUNK, count):,} clients with n = {N:,}: {peak / 1e6:.0f} MB")
    print(f"flagged {len(decision.flagged):,} of {count:,}, {len(wrong)} wrongly")


if __name__ == "__main__":
    main()
