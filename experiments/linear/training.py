"""Federated training on the linear model, and lines of tables from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .directions import Arm, Directions, estimated
from .world import World

SEEDS, MARKS = 6, (15, 30, 60)
WIDE = tuple(2.0**power for power in range(-4, 5))
"""Factors on η that a search tries."""
LONG = tuple(2.0**power for power in range(-7, 4))
"""The same, far down: without whitening the first direction alone sets the rate."""
TWO_POINT = Arm(16, 1, "two")
EXACT = Arm(16, exact=True)
BOTH = (("7 directions of 4", Arm()), ("exact over 16", EXACT))
"""The default of the recipe, and exact reports."""


@dataclass
class Trace:
    """Accuracy and loss at each mark, and every client's |g| and GradIP by step."""

    marks: list[tuple[float, float]]
    sizes: dict[int, list[float]]
    gradip: dict[int, list[float]]


def train(world: World, arm: Arm, seed: int) -> Trace:
    """One run of `arm.steps` local steps in all."""
    draw, k = np.random.default_rng(seed), world.k
    clients = world.clients(arm.clients, arm.alpha, 100 + seed, arm.single)
    w = np.zeros(k) if arm.loaded else world.balanced.copy()
    directions, velocity = Directions(arm, k, draw), np.zeros(k)
    taken = [0] * len(clients)
    trace = Trace([], {c: [] for c in range(len(clients))}, {c: [] for c in range(len(clients))})
    for done in range(0, arm.steps, arm.local_steps):
        rate = arm.rate(k) * _decayed(arm.decay, done / arm.steps)
        chosen = draw.permutation(len(clients))[: arm.sampled or arm.clients]
        drawn = not arm.exact and not arm.own
        shared = [directions.step() for _ in range(arm.local_steps)] if drawn else []
        total, estimates = np.zeros(k), np.zeros((arm.local_steps, k))
        for client in chosen.tolist():
            local, held = w.copy(), clients[client]
            for step in range(arm.local_steps):
                places = (np.arange(arm.batch) + taken[client] * arm.batch) % len(held.labels)
                taken[client] += 1
                z = shared[step] if drawn else np.empty(0) if arm.exact else directions.step()
                estimate, scalars = estimated(held[places], local, z, arm)
                trace.sizes[client].append(float(np.sqrt(np.mean(scalars**2))))
                trace.gradip[client].append(abs(float(estimate @ world.p)))
                local = local - rate * estimate
                estimates[step] += estimate / len(chosen)
            total += (local - w) / len(chosen)
        velocity = arm.momentum * velocity + total
        w = w + (1 - arm.momentum) * velocity
        for estimate in estimates:
            directions.learn(estimate)
        trace.marks += [
            (world.held.accuracy(w), float(world.held.losses(w).mean()))
            for mark in MARKS
            if done < mark <= done + arm.local_steps
        ]
    return trace


def _decayed(decay: str, done: float) -> float:
    if decay == "linear":
        return 1 - done
    return float(0.5 * (1 + np.cos(np.pi * done))) if decay == "cosine" else 1.0


Worlds = World | Callable[[int], World]
"""One for all seeds, or one for each."""


def runs(worlds: Worlds, arm: Arm, seeds: Sequence[int] = range(SEEDS)) -> np.ndarray:
    """Accuracy and loss, by seed and mark."""
    return np.array(
        [
            train(worlds if isinstance(worlds, World) else worlds(seed), arm, seed).marks
            for seed in seeds
        ]
    )


def line(name: str, worlds: Worlds, arm: Arm) -> np.ndarray:
    """Print a row of a table; give accuracy and loss by seed and mark."""
    found = runs(worlds, arm)
    marks = [mark for mark in MARKS if mark <= arm.steps][-found.shape[1] :]
    cells = [
        f"{mark}: {a.mean():.3f} ± {a.std():.3f} ({loss.mean():.3f})"
        for mark, (a, loss) in zip(marks, found.transpose(1, 2, 0), strict=True)
    ]
    print(f"  {name:62} {'  '.join(cells)}", flush=True)
    return found


def best(name: str, worlds: Worlds, arm: Arm, factors: Sequence[float] = WIDE) -> np.ndarray:
    """The row of the factor on η with the lowest loss at the end, on seeds 10 to 15."""
    losses = {}
    for factor in factors:
        tried = replace(arm, factor=arm.factor * factor)
        losses[factor] = runs(worlds, tried, range(10, 10 + SEEDS))[:, -1, 1].mean()
    factor = min(losses, key=lambda tried: losses[tried])
    return line(f"{name}, {factor:g} η", worlds, replace(arm, factor=arm.factor * factor))
