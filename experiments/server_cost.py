"""What GradIP and the selection cost the server, for a calibration of 100,000 clients.

Synthetic scalars, a tenth of the clients falling quiet; n = 100,000, T_cali = 100. CPU seconds, so
that other jobs on the machine do not count.

    python experiments/server_cost.py
"""

from __future__ import annotations

import time
import tracemalloc

import numpy as np

from meerkat.noise import Directions
from meerkat.protocol import CALIBRATION, ClientReport
from meerkat.recipe import load_recipe
from meerkat.server.gradip import Compass
from meerkat.server.selection import decide_by_paths

CLIENTS, STEPS, N = 100_000, 100, 100_000


def main() -> None:
    generator = np.random.default_rng(0)
    scalars = generator.standard_normal((CLIENTS, STEPS), np.float32)
    scalars[::10] *= np.exp(-np.arange(STEPS) / 30, dtype=np.float32)
    reports = [
        ClientReport(CALIBRATION, k, 16, STEPS, 1, b"", tuple(row.tolist()))
        for k, row in enumerate(scalars)
    ]
    gradient, directions = generator.standard_normal(N, np.float32), Directions(0, N)
    tracemalloc.start()
    for _ in Compass(gradient, directions).stream(reports[:4096]):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    cpu = time.process_time()
    signals = {}
    for found in Compass(gradient, directions).stream(reports):
        signals.update(zip(found.clients.tolist(), np.abs(found.gradip), strict=True))
    scored = time.process_time()
    changes = ["selection.kind=gradip", f"federation.clients={CLIENTS}"]
    recipe = load_recipe("recipes/meerkat-vp.toml", changes)
    decision = decide_by_paths(recipe, 0, "calibration", signals)
    done = time.process_time()
    wrong = set(decision.flagged) ^ set(range(0, CLIENTS, 10))
    for name, seconds in (("GradIP, norm, cosine", scored - cpu), ("selection", done - scored)):
        print(f"{name}: {seconds:.1f} s, {seconds / CLIENTS * 1e6:.0f} µs a client")
    print(f"memory of a chunk of 4,096 clients with n = {N:,}: {peak / 1e6:.0f} MB")
    print(f"flagged {len(decision.flagged):,} of {CLIENTS:,}, {len(wrong)} wrongly")


if __name__ == "__main__":
    main()
