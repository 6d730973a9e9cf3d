"""Point 2: how many public texts, and which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np

from .directions import Arm
from .training import BOTH, EXACT, LONG, SEEDS, best, line, runs
from .world import SOURCES, Kind, World

PUBLIC = tuple(source for source in SOURCES if source not in ("pool", "written"))
CORPORA: list[tuple[str, dict[str, int]]] = [
    *((f"{n} plots, {n} speeches", {"plots": n, "speeches": n}) for n in (16, 32, 64, 128, 256)),
    ("512 plots, 512 speeches", {"plots": 512, "speeches": 512}),
    *((f"256 {source}", {source: 256}) for source in PUBLIC),
    ("512 plots", {"plots": 512}),
    ("512 speeches", {"speeches": 512}),
    ("512 clients", {"clients": 512}),
    ("64 clients", {"clients": 64}),
    ("32 clients", {"clients": 32}),
    ("128 plots, 128 speeches, 64 clients", {"plots": 128, "speeches": 128, "clients": 64}),
]
SAME_SIZE: list[tuple[str, dict[str, int]]] = [
    *((f"256 {source}", {source: 256}) for source in PUBLIC),
    *((f"128 {a}, 128 {b}", {a: 128, b: 128}) for a, b in combinations(PUBLIC, 2)),
]


def _drawn(
    out: Path, texts: dict[str, int], labelled: bool = False, kind: Kind = "aligned"
) -> Callable[[int], World]:
    """A world for each seed, from texts that the seed draws."""
    return cache(lambda seed: World(out, 32, texts, kind=kind, labelled=labelled, draw=seed))


def texts(out: Path) -> None:
    """Sources and numbers of texts, k = 32; texts are drawn anew for each seed."""
    for name, chosen in CORPORA:
        for label, arm in BOTH:
            line(f"{name}, {label}", _drawn(out, chosen), arm)
    for source in PUBLIC:
        for label, arm in BOTH:
            best(f"256 {source}, {label}", _drawn(out, {source: 256}), arm)
            tamed = _drawn(out, {source: 256}, kind="first")
            best(f"256 {source}, first direction alone whitened, {label}", tamed, arm)
    for name, chosen in (("256 clients", {"clients": 256}), ("512 clients", {"clients": 512})):
        for label, arm in BOTH:
            line(f"{name}, labelled losses (oracle), {label}", _drawn(out, chosen, True), arm)


def signs(out: Path) -> None:
    """What is known before training, by corpus of 256 texts, beside what training then gave."""
    rows, gains = [], []
    for name, chosen in SAME_SIZE:
        worlds = _drawn(out, chosen)
        found = [worlds(seed).statistics() for seed in range(SEEDS)]
        means = {key: float(np.mean([row[key] for row in found])) for key in found[0]}
        drawn, exact = (float(runs(worlds, arm)[:, -1, 0].mean()) for arm in (Arm(), EXACT))
        values = ", ".join(f"{key} {value:.3g}" for key, value in means.items())
        print(f"  {name}: {values}; drawn {drawn:.3f}, exact {exact:.3f}", flush=True)
        rows.append(list(means.values()))
        gains.append((drawn, exact))
    table, after = np.array(rows), np.array(gains)
    print("  Rank correlation over corpora with accuracy after 60 steps, drawn and exact:")
    for key, column in zip(means, table.T, strict=True):
        with_drawn, with_exact = (_ranked(column, accuracy) for accuracy in after.T)
        print(f"    {key:28} {with_drawn:+.2f} {with_exact:+.2f}")


def _ranked(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])


def language(out: Path) -> None:
    """Texts in the language of the clients', in another, and those that the model writes."""
    corpora: dict[str, dict[str, int]] = {
        "128 plots, 128 speeches": {"plots": 128, "speeches": 128},
        "256 in Chinese": {"chinese": 256},
        "256 that the model writes": {"written": 256},
        "256 of clients": {"clients": 256},
        "64 plots, 64 speeches, 128 in Chinese": {"plots": 64, "speeches": 64, "chinese": 128},
        "64 plots, 64 speeches, 128 that the model writes": {
            "plots": 64,
            "speeches": 64,
            "written": 128,
        },
    }
    for name, chosen in corpora.items():
        world = World(out, 32, chosen)
        rank = world.statistics()["effective rank at clients"]
        start = world.held.accuracy(world.balanced)
        print(f"  {name}: effective rank at clients {rank:.2f}, before any round {start:.3f}")
        for label, arm in BOTH:
            for factor in (0.25, 0.5, 1.0):
                tried = replace(arm, factor=factor)
                line(f"{name}, {label}, {factor:g} η", world, tried)
    for label, arm in BOTH:
        random = World(out, 32, kind="random")
        best(f"random directions, w = 0, {label}", random, replace(arm, loaded=True), LONG)


TABLES = {"texts": texts, "signs": signs, "language": language}
