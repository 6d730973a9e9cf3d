"""Digests of all that is computed from recorded scalars: our arithmetic, and nothing else.

No model, no torch, no matrix product: as a program it prints the digests of the process that it
runs in, so that a test can compare processes whose processor features differ.

    python tests/support/pinned.py [--torch]
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np

from meerkat.algorithms import make_algorithm
from meerkat.config import parse_recipe
from meerkat.data.batch_order import batch_indices
from meerkat.federation.algorithm import Algorithm
from meerkat.federation.gradip import GradIPScorer, magnitudes
from meerkat.federation.messages import DIGEST_BYTES, ClientReport
from meerkat.federation.virtual_path import virtual_path
from meerkat.tasks.metrics import METRICS, metric_values
from meerkat.tasks.objective import Predictions
from meerkat.zo.noise import NoiseKey, draw, permutation
from meerkat.zo.state import ModelState

SIZE = 301
"""Values of θ; odd, so that vector instructions leave a rest."""
ROUNDS, STEPS = 10, 3
CLIENTS = (0, 1, 4, 6)
RULES: dict[str, Any] = {
    "sgd": "sgd",
    "momentum": {"kind": "momentum", "decay": 0.75},
    "adam": {"kind": "adam", "beta1": 0.9, "beta2": 0.99, "delta": 1e-8},
}
KEYS: dict[str, Any] = {"fresh": "fresh", "pool": {"kind": "pool", "size": 5}}
RATE = float(np.float32(0.05))


def recorded(client: int, round: int, step: int, perturbation: int = 0) -> float:
    """A scalar from whole numbers alone: 24 bits, so exact in float32, and none of them idle."""
    place = 1 + client + 8 * (round + 16 * (step + 4 * perturbation))
    return (place * 0x9E3779B1 % 2**24 - 2**23) / 2**21


def initial_theta() -> np.ndarray:
    return ((5 * np.arange(SIZE)) % 17 - 8).astype(np.float32) / np.float32(16)


def algorithm_of(
    rule: str = "sgd",
    weighting: str = "uniform",
    directions: str = "shared",
    perturbations: int = 1,
    keys: str = "fresh",
    kind: str = "gaussian",
) -> Algorithm:
    recipe = {
        "seed": 11,
        "model": {"name": "none"},
        "task": {"name": "sst2"},
        "federation": {"clients": 8, "rounds": ROUNDS, "weighting": weighting},
        "optimizer": {"rule": RULES[rule]},
        "noise": {
            "kind": kind,
            "directions": directions,
            "perturbations": perturbations,
            "keys": KEYS[keys],
        },
    }
    return make_algorithm(parse_recipe(recipe), SIZE)


def reports_of(
    state: ModelState, round: int, perturbations: int, scale: float = 1.0
) -> list[ClientReport]:
    """All clients take all steps, but client 4 is stopped after one."""
    reports = []
    for client in CLIENTS:
        steps = 1 if client == 4 else STEPS
        scalars = tuple(
            scale * recorded(client, round, step, q)
            for step in range(steps)
            for q in range(perturbations)
        )
        digest = bytes.fromhex(state.digest)[:DIGEST_BYTES]
        examples = 3 + 2 * client
        reports.append(ClientReport(round, client, examples, steps, perturbations, digest, scalars))
    return reports


class Hash:
    """SHA-256 of arrays and numbers, in the order in which they are added."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def add(self, *values: np.ndarray | float | bytes) -> None:
        for value in values:
            if isinstance(value, np.ndarray):
                value = value.astype(value.dtype.newbyteorder("<")).tobytes()
            elif not isinstance(value, bytes):
                value = struct.pack("<d", value)
            self._sha.update(value)

    def hex(self) -> str:
        return self._sha.hexdigest()


def rounds(found: Hash, algorithm: Algorithm, scale: float = 1.0) -> None:
    """Aggregate and apply, round after round: the log, and the state after each."""
    state = algorithm.init(initial_theta())
    for round in range(ROUNDS):
        reports = reports_of(state, round, algorithm.stream.perturbations, scale)
        updates = algorithm.aggregate(reports, RATE)
        for update in updates:
            found.add(update.learning_rate, *(entry.coefficient for entry in update.entries))
        state = algorithm.apply(state, updates)
        found.add(state.to_bytes())


def paths(found: Hash, algorithm: Algorithm) -> None:
    """Each client's states of a round that starts from slots which are not zero."""
    state = algorithm.init(initial_theta())
    state = algorithm.apply(
        state, algorithm.aggregate(reports_of(state, 0, algorithm.stream.perturbations), RATE)
    )
    for report in reports_of(state, 1, algorithm.stream.perturbations):
        for after in virtual_path(state, RATE, report, algorithm):
            found.add(after.to_bytes())


def trajectories(found: Hash, algorithm: Algorithm) -> None:
    state = algorithm.init(initial_theta())
    scorer = GradIPScorer(draw(NoiseKey(3, 1, 4), SIZE), algorithm.stream)
    for round in range(3):
        reports = reports_of(state, round, algorithm.stream.perturbations)
        seen = scorer.trajectories(reports)
        found.add(seen.gradip, seen.norm, seen.cosine, magnitudes(reports))


def metrics(found: Hash) -> None:
    """Metrics of examples in batches of uneven size."""
    count, classes = 157, 5
    index = np.arange(count)
    labels, predicted = (index * index) % classes, (3 * index + index // 7) % classes
    losses = ((11 * index) % 23).astype(np.float64) / 7
    for name in ("accuracy", "balanced_accuracy", "loss", "macro_f1"):
        totals = [
            METRICS[name].sums(Predictions(losses[part], labels[part], predicted[part], classes))
            for part in (slice(0, 64), slice(64, 100), slice(100, count))
        ]
        sums = totals[0] + totals[1] + totals[2]
        found.add(sums, metric_values({name: sums}, count)[name])


def orders(found: Hash) -> None:
    """Client sampling, and which examples are behind a step."""
    for round in range(5):
        found.add(permutation(11, (6, round), 37))
    for step in range(20):
        found.add(np.array(batch_indices(11, 3, 17, 5, step)))


def digests() -> dict[str, str]:
    """Digest by what it is of."""
    return dict(_each())


def _each() -> Iterator[tuple[str, str]]:
    for kind in ("gaussian", "tabulated", "rademacher"):
        found = Hash()
        for key in (NoiseKey(11, 0, 0), NoiseKey(2**63 - 1, 7, 3, 2, 5)):
            found.add(draw(key, 20_001, kind), draw(key, 99, kind, start=8192))
        yield f"draw {kind}", found.hex()
    for rule, directions, keys in product(RULES, ("shared", "per-client"), KEYS):
        found = Hash()
        for weighting, q in product(("uniform", "examples"), (1, 3)):
            rounds(found, algorithm_of(rule, weighting, directions, q, keys))
        yield f"rounds {rule} {directions} {keys}", found.hex()
    for rule in RULES:
        found = Hash()
        # g² is below the normal float32 numbers: nothing may flush it to zero.
        rounds(found, algorithm_of(rule, perturbations=3), scale=2.0**-70)
        yield f"rounds {rule} of tiny scalars", found.hex()
    for rule in RULES:
        found = Hash()
        for directions, q, kind in product(
            ("shared", "per-client"), (1, 3), ("gaussian", "rademacher")
        ):
            paths(found, algorithm_of(rule, directions=directions, perturbations=q, kind=kind))
        yield f"virtual paths {rule}", found.hex()
    for directions in ("shared", "per-client"):
        found = Hash()
        for q in (1, 3, 9):
            trajectories(found, algorithm_of(directions=directions, perturbations=q))
        yield f"gradip {directions}", found.hex()
    for name, computation in (("metrics", metrics), ("orders", orders)):
        found = Hash()
        computation(found)
        yield name, found.hex()


def controls() -> dict[str, str]:
    """What no contract may rest on: it differs with the instructions of the processor."""
    values = draw(NoiseKey(11, 0, 0), 40_000).reshape(200, 200)
    found = {}
    for name, value in (("exp", np.exp(values)), ("matrix product", values @ values)):
        digest = Hash()
        digest.add(value)
        found[name] = digest.hex()
    return found


def main() -> None:
    """Print digests and controls as JSON; with `--torch`, in a process that has torch loaded."""
    about: dict[str, Any] = {}
    if "--torch" in sys.argv:
        import torch

        about["torch"] = torch.backends.cpu.get_cpu_capability()
    about |= {"digests": digests(), "controls": controls()}
    print(json.dumps(about))


if __name__ == "__main__":
    main()
