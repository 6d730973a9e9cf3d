"""Points 3 and 8: what a step is made of, and other methods' steps, at 32 example passes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .directions import Arm
from .training import LONG, TWO_POINT, best, line
from .world import World


def start(out: Path) -> None:
    """From w = 0 or balanced, at η of Eq. 20."""
    arms = {
        "two-point, shared, Gaussian": replace(TWO_POINT, kind="gaussian"),
        "two-point, shared, orthogonal": TWO_POINT,
        "two-point, own, Gaussian": replace(TWO_POINT, kind="gaussian", own=True),
        "two-point, own, orthogonal": replace(TWO_POINT, own=True),
        "4 two-point of 4": Arm(4, 4, "two"),
        "3 one-sided of 8": Arm(8, 3),
        "7 one-sided of 4": Arm(),
        "15 one-sided of 2": Arm(2, 15),
        "exact over 16": Arm(16, exact=True),
    }
    world = World(out)
    for name, arm in arms.items():
        line(f"{name}, w = 0", world, replace(arm, loaded=True))
        line(f"{name}, balanced", world, arm)


def step(out: Path) -> None:
    """Point 3: each with its best rate of nine."""
    world, usual = World(out), Arm()
    arms = {
        "7 one-sided of 4 (default)": usual,
        "15 one-sided of 2": Arm(2, 15),
        "3 one-sided of 8": Arm(8, 3),
        "1 one-sided of 16": Arm(16, 1),
        "1 two-point of 16": TWO_POINT,
        "2 two-point of 8": Arm(8, 2, "two"),
        "4 two-point of 4": Arm(4, 4, "two"),
        "8 of 4, less the others' mean": Arm(4, 8, "others"),
        "4 of 8, less the others' mean": Arm(8, 4, "others"),
        "16 examples, each its own, one-sided": Arm(16, 16, "each"),
        "16 examples, each its own, two-point": Arm(16, 16, "each-two"),
        "7 one-sided of 4, own": replace(usual, own=True),
        "1 two-point of 16, own": replace(TWO_POINT, own=True),
        "7 one-sided of 4, Gaussian": replace(usual, kind="gaussian"),
        "7 one-sided of 4, Rademacher": replace(usual, kind="rademacher"),
        "7 one-sided of 4, momentum 0.5": replace(usual, momentum=0.5),
        "7 one-sided of 4, momentum 0.9": replace(usual, momentum=0.9),
        "1 two-point of 16, momentum 0.5": replace(TWO_POINT, momentum=0.5),
        "1 two-point of 16, momentum 0.9": replace(TWO_POINT, momentum=0.9),
        "7 one-sided of 4, cosine": replace(usual, decay="cosine"),
        "7 one-sided of 4, constant": replace(usual, decay="constant"),
    }
    for name, arm in arms.items():
        best(name, world, arm)


def others(out: Path) -> None:
    """Point 8: other methods in the same span, each with its best rate of eleven."""
    places = (("whitened", World(out), False), ("whitened", World(out), True))
    for place, world, loaded in (*places, ("not whitened", World(out, power=0.0), False)):
        print(f"  {place}, {'w = 0' if loaded else 'balanced'}")
        for label, arm in (("7 one-sided of 4", Arm()), ("1 two-point of 16", TWO_POINT)):
            usual = replace(arm, loaded=loaded)
            gaussian = replace(usual, kind="gaussian")
            arms = {
                "ours": usual,
                "Gaussian (MeZO's step)": gaussian,
                "Gaussian, momentum 0.9": replace(gaussian, momentum=0.9),
                "HiSo, ν = 0.1": replace(gaussian, method="hiso"),
                "HiSo, ν = 0.01": replace(gaussian, method="hiso", memory=0.99),
            }
            for angle in (1.2, 1.35, 1.5):
                arms[f"ConMeZO, {angle}, β = 0.9"] = replace(
                    gaussian, method="conmezo", angle=angle
                )
            for name, tried in arms.items():
                best(f"  {label}, {name}", world, tried, LONG)
        fzoo = Arm(kind="rademacher", method="fzoo", loaded=loaded)
        for batch, directions in ((4, 7), (8, 3), (2, 15)):
            tried = replace(fzoo, batch=batch, directions=directions)
            best(f"  {directions} one-sided of {batch}, FZOO", world, tried, LONG)


TABLES = {"start": start, "step": step, "others": others}
