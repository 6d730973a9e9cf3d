"""Points 4 and 6: how many clients, how their data differ, and whether extreme ones show."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from .directions import Arm
from .training import BOTH, EXACT, SEEDS, WIDE, Trace, best, line, train
from .world import World

IID = float("inf")


def clients(out: Path) -> None:
    """Point 4: so many of so many clients a round, k that grows with them; best rate of nine."""
    world = cache(lambda k: World(out, k, {"plots": 512, "speeches": 512}))
    for number, sampled in ((4, 4), (16, 4), (16, 16), (64, 4), (64, 16), (64, 64)):
        left = np.mean([len(world(32).clients(number, 0.5, 100 + s)) for s in range(SEEDS)])
        print(f"  {sampled} of {number} clients, {left:.0f} of which have 16 examples or more")
        factors = WIDE if sampled < 64 else (0.5, 1.0, 2.0)
        for k in (32, 64, 128):
            arm = Arm(clients=number, sampled=sampled)
            best(f"  k = {k}, shared", world(k), arm, factors)
            best(f"  k = {k}, own", world(k), replace(arm, own=True), factors)
            exact = replace(EXACT, clients=number, sampled=sampled)
            best(f"  k = {k}, exact", world(k), exact, factors)


def heterogeneity(out: Path) -> None:
    """Point 6: 8 clients, T local steps, η of Eq. 20; after 60 local steps in all."""
    world = World(out)
    kinds = (
        ("IID", IID, 0),
        ("Dirichlet 0.5", 0.5, 0),
        ("Dirichlet 0.1", 0.1, 0),
        ("IID, 3 of one label", IID, 3),
        ("all of one label", IID, 8),
    )
    for steps in (1, 10, 30):
        for name, alpha, single in kinds:
            for label, arm in (*BOTH, ("own, 7 directions of 4", Arm(own=True))):
                arm = replace(arm, clients=8, alpha=alpha, single=single, local_steps=steps)
                line(f"T = {steps}, {name}, {label}", world, arm)


def extremes(out: Path) -> None:
    """Point 6: 3 of 8 clients have one label; the share of pairs that a signal orders rightly.

    One virtual path of 100 local steps from the start, other clients IID.
    """
    plain, plain_arm = (
        World(out, 512, kind="random"),
        Arm(16, 1, "two", kind="gaussian", loaded=True),
    )
    eta = plain_arm.rate(512)
    arms = (
        ("aligned, 7 directions of 4", World(out), Arm()),
        ("aligned, 1 two-point of 16", World(out), Arm(16, 1, "two")),
        ("aligned, exact over 16", World(out), EXACT),
        ("aligned from w = 0, 7 directions of 4", World(out), Arm(loaded=True)),
        ("aligned from w = 0, 1 two-point of 16", World(out), Arm(16, 1, "two", loaded=True)),
        # The plain method: η = 1e-5 of its runs, times the trace of the curvature, is 0.95.
        ("plain, 1 two-point of 16", plain, replace(plain_arm, factor=0.95 / 512 / eta)),
    )
    for name, world, arm in arms:
        arm = replace(arm, clients=8, alpha=IID, single=3, local_steps=100, steps=100)
        arm = replace(arm, decay="constant")
        traces = [train(world, arm, seed) for seed in range(4 * SEEDS)]
        for signal in ("sizes", "gradip"):
            _ordered(name, signal, traces)


def _ordered(name: str, signal: str, traces: list[Trace]) -> None:
    paths = np.array([list(getattr(trace, signal).values()) for trace in traces])
    cells = []
    for begin, end in ((0, 5), (0, 10), (10, 30), (30, 60), (60, 100)):
        means = paths[:, :, begin:end].mean(axis=2)
        loud = np.mean(means[:, 5:, None] > means[:, None, :5])
        ratio = np.mean(means[:, 5:].mean(axis=1) / means[:, :5].mean(axis=1))
        cells.append(f"{begin}-{end}: {loud:.2f} ({ratio:.2f})")
    for until in (20, 30, 60, 100):
        fall = paths[:, :, until // 2 : until].mean(axis=2) / paths[:, :, : until // 2].mean(axis=2)
        cells.append(f"fall by {until}: {np.mean(fall[:, 5:, None] < fall[:, None, :5]):.2f}")
    print(f"  {name:40} {signal:7} {'  '.join(cells)}", flush=True)


TABLES = {"clients": clients, "heterogeneity": heterogeneity, "extremes": extremes}
