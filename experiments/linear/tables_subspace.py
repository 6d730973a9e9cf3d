"""Point 1: where the gain comes from, and what a subspace of k dimensions can hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .directions import Arm
from .features import supports
from .training import BOTH, EXACT, LONG, TWO_POINT, best, line
from .world import World

MANY = {"plots": 512, "speeches": 512}
FULL = replace(EXACT, batch=2048, clients=1, alpha=float("inf"))
"""The gradient over all examples to train on."""


def whitening(out: Path) -> None:
    """B made in other ways, each with its best rate of eleven."""
    for k in (8, 32, 128):
        worlds = {
            "whitened": World(out, k),
            "the first direction alone whitened": World(out, k, kind="first"),
            "not whitened": World(out, k, power=0.0),
            "whitened in part, a = 1/4": World(out, k, power=0.25),
            "random directions of the texts' span": World(out, k, kind="span"),
            "random directions": World(out, k, kind="random"),
        }
        for name, world in worlds.items():
            for label, arm in (*BOTH, ("two-point over 16", TWO_POINT)):
                best(f"k = {k}, {name}, {label}", world, arm, LONG)
                if label != "two-point over 16" and k == 32:
                    loaded = replace(arm, loaded=True)
                    best(f"k = {k}, {name}, {label}, w = 0", world, loaded, LONG)


def ceiling(out: Path) -> None:
    """First order inside B over all examples, each with its best rate of eleven."""
    for k in (8, 16, 32, 64, 128, 256, 512):
        worlds = {
            "whitened": World(out, k, MANY),
            "not whitened": World(out, k, MANY, power=0.0),
            "random": World(out, k, MANY, kind="random"),
        }
        for name, world in worlds.items():
            best(f"k = {k}, {name}, all examples", world, FULL, LONG)
    # Gradients of the pool never leave the span of its gradients.
    every = {"pool": 2048}
    for name, world in {
        "the first direction alone whitened": World(out, 2048, every, kind="first"),
        "not whitened": World(out, 2048, every, power=0.0),
    }.items():
        best(f"all masked coordinates, {name}, all examples", world, FULL, LONG)


def dimensions(out: Path) -> None:
    """By k, at η of Eq. 20."""
    for k in (8, 16, 24, 32, 48, 64, 128, 256, 512):
        world = World(out, k, MANY if k > 128 else None)
        for label, arm in BOTH:
            line(f"k = {k}, {label}", world, arm)


def rates(out: Path) -> None:
    """Is η of Eq. 20 near the best of a search?"""
    for k in (16, 32, 48, 64, 128):
        for label, arm in (*BOTH, ("two-point over 16", TWO_POINT), ("own", Arm(own=True))):
            for factor in (0.5, 0.75, 1.0, 1.5, 2.0):
                tried = replace(arm, factor=factor)
                line(f"k = {k}, {label}, {factor:g} η", World(out, k), tried)


def support(out: Path) -> None:
    """Some of the masked coordinates alone, at η of Eq. 20."""
    for name, part in supports(out).items():
        for label, arm in BOTH:
            line(f"{name}, {label}", World(part), arm)


TABLES = {
    "support": support,
    "whitening": whitening,
    "ceiling": ceiling,
    "dimensions": dimensions,
    "rates": rates,
}
