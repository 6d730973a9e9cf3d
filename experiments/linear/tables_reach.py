"""What reaches 0.87: exact gradients after 15 rounds, drawn directions after 60."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

from .directions import Arm
from .training import EXACT, best
from .world import USUAL, World

CORPORA = (
    ("128 + 128", USUAL),
    ("512 + 512", {"plots": 512, "speeches": 512}),
    ("256 clients", {"clients": 256}),
    ("512 clients", {"clients": 512}),
    ("512 + 512 + 512 clients", {"plots": 512, "speeches": 512, "clients": 512}),
)
OTHERS = (
    ("256 plots", {"plots": 256}),
    ("256 speeches", {"speeches": 256}),
    ("256 clients", {"clients": 256}),
    ("128 plots, 128 chinese", {"plots": 128, "chinese": 128}),
)
SHORT = replace(EXACT, steps=15)
FACTORS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)


def fifteen(out: Path) -> None:
    """Exact gradients, runs of 15 rounds, each with its best rate of seven."""
    world = cache(lambda k, name: World(out, k, dict(CORPORA)[name]))
    for name, _ in CORPORA:
        for k in (32, 44, 64, 88):
            for batch in (16, 32, 64):
                arm = replace(SHORT, batch=batch)
                best(f"{name}, k = {k}, {batch} examples", world(k, name), arm, FACTORS)
    for name, texts in CORPORA:
        for k in (32, 44, 88):
            tamed = World(out, k, texts, kind="first")
            for batch in (16, 64):
                row = f"{name}, k = {k}, {batch} examples, the first direction alone whitened"
                best(row, tamed, replace(SHORT, batch=batch), FACTORS)
    for k in (44, 88):
        for change, arm in (
            ("w = 0", replace(SHORT, loaded=True)),
            ("momentum 0.5", replace(SHORT, momentum=0.5)),
            ("constant rate", replace(SHORT, decay="constant")),
            ("cosine", replace(SHORT, decay="cosine")),
            ("16 clients", replace(SHORT, clients=16)),
        ):
            for batch in (16, 64):
                tried = replace(arm, batch=batch)
                place = world(k, "512 + 512")
                best(f"512 + 512, k = {k}, {batch} examples, {change}", place, tried, FACTORS)


def sixty(out: Path) -> None:
    """Drawn directions, 32 example passes, runs of 60 rounds, each with its best rate of seven."""
    world = cache(lambda k, name: World(out, k, dict(CORPORA)[name]))
    arms = {
        "7 of 4": Arm(),
        "3 of 8": Arm(8, 3),
        "15 of 2": Arm(2, 15),
        "8 of 4, less the others' mean": Arm(4, 8, "others"),
        "7 of 4, own": Arm(own=True),
        "15 of 2, own": Arm(2, 15, own=True),
    }
    for name, _ in CORPORA:
        for k in (16, 24, 32, 48, 64):
            for label, arm in arms.items():
                best(f"{name}, k = {k}, {label}", world(k, name), arm, FACTORS)
    print("  The first direction alone whitened:")
    for name, texts in CORPORA:
        for k in (24, 32, 64):
            tamed = World(out, k, texts, kind="first")
            for label in ("7 of 4", "15 of 2"):
                best(f"{name}, k = {k}, {label}", tamed, arms[label], FACTORS)


def candidates(out: Path) -> None:
    """The best of `sixty` again, over texts that each seed draws anew, best rate of seven."""
    for name, texts in (*CORPORA[:1], *OTHERS):
        for k in (24, 32):
            world = cache(lambda seed, k=k, texts=texts: World(out, k, texts, draw=seed))
            for label, arm in (("7 of 4", Arm()), ("15 of 2", Arm(2, 15))):
                best(f"{name}, k = {k}, {label}", world, arm, FACTORS)


TABLES = {"fifteen": fifteen, "sixty": sixty, "candidates": candidates}
