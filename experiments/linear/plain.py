"""The plain method on the linear model: all masked coordinates, a Gaussian direction a step.

The score of an example at θ is d + x · (θ - θ_0), with x its gradient at the initial weights. θ
moves along the directions of the steps alone, so x · z of all examples and steps is all that runs
with one seed need; they differ in T, in who holds what and in who is stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from meerkat.config.sections import Selection
from meerkat.federation.selection import decide_by_paths

from .world import SMALLEST

EPSILON = 1e-3
TOGETHER = 50
"""Directions in one matrix product."""


@dataclass(frozen=True)
class PlainArm:
    """What a run is made of, beside its seed."""

    local_steps: int = 10
    steps: int = 80
    batch: int = 4
    rate: float = 1e-5
    stopped: tuple[int, ...] = ()
    """Clients that take one step a round."""
    found: Selection | None = None
    """Who is stopped follows from a calibration by these rules."""
    over_step: bool = True
    """Weights over the clients that take a step, and not over all."""


@dataclass(frozen=True)
class Projected:
    """x · z of examples, a column a step, with their scores at θ_0 and labels."""

    along: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


class PlainWorld:
    """Gradients of held-out examples and of the pool, from `linear_model.py features --plain`."""

    def __init__(self, out: Path):
        self._groups = {}
        for name in ("held", "pool"):
            with np.load(out / f"{name}.npz") as kept:
                self._groups[name] = dict(kept)
        self.labels = self._groups["pool"]["labels"]

    def projected(self, steps: int, seed: int) -> dict[str, Projected]:
        """Both groups along the directions of a seed."""
        draw = np.random.default_rng((seed, 1))
        n = self._groups["pool"]["gradients"].shape[1]
        columns: dict[str, list[np.ndarray]] = {name: [] for name in self._groups}
        for begin in range(0, steps, TOGETHER):
            z = draw.standard_normal((min(TOGETHER, steps - begin), n), np.float32)
            for name, group in self._groups.items():
                columns[name].append(group["gradients"] @ z.T)
        return {
            name: Projected(
                np.concatenate(columns[name], axis=1).astype(float),
                group["scores"].astype(float),
                group["labels"],
            )
            for name, group in self._groups.items()
        }


@dataclass(frozen=True)
class Metrics:
    """Of held-out examples, both labels weighing the same."""

    accuracy: float
    macro_f1: float
    loss: float
    bias: float
    """Mean score: how far the answer of label 1 is preferred, in logits."""

    @classmethod
    def of(cls, scores: np.ndarray, labels: np.ndarray) -> Metrics:
        share = np.where(labels == 1, (labels == 1).sum(), (labels == 0).sum())
        weight = 0.5 / share
        right = (scores > 0) == (labels == 1)
        recalls = [float(right[labels == label].mean()) for label in (0, 1)]
        f1 = [
            recalls[label] / (recalls[label] + 1 - recalls[1 - label] + 1) * 2 for label in (0, 1)
        ]
        losses = np.logaddexp(0, scores) - labels * scores
        return cls(
            float(np.mean(recalls)),
            float(np.mean(f1)),
            float(losses @ weight),
            float(scores @ weight),
        )


def balanced(
    labels: np.ndarray, clients: int, singles: Sequence[int], seed: int
) -> list[np.ndarray]:
    """Equal parts: the first clients hold both labels in equal shares, the last ones one each.

    Args:
        singles: The label of each of the last clients.
    """
    draw = np.random.default_rng((seed, 2))
    left = {label: list(draw.permutation(np.flatnonzero(labels == label))) for label in (0, 1)}
    others = clients - len(singles)
    half = int(
        min(len(left[label]) / (others + 2 * list(singles).count(label)) for label in (0, 1))
    )

    def taken(label: int, count: int) -> list[int]:
        chosen, left[label] = left[label][:count], left[label][count:]
        return chosen

    parts = [taken(0, half) + taken(1, half) for _ in range(others)]
    parts += [taken(label, 2 * half) for label in singles]
    return [draw.permutation(part) for part in parts]


def rest_iid(
    labels: np.ndarray, clients: int, singles: Sequence[int], seed: int
) -> list[np.ndarray]:
    """As `partition.extreme`: an equal share of one label for each of the last clients, and what
    is left in IID parts for the first ones."""
    draw = np.random.default_rng((seed, 5))
    left = {label: list(draw.permutation(np.flatnonzero(labels == label))) for label in (0, 1)}
    each, parts = len(labels) // clients, []
    for label in singles:
        parts.append(np.array(left[label][:each]))
        left[label] = left[label][each:]
    rest = draw.permutation(left[0] + left[1])
    return [*np.array_split(rest, clients - len(singles)), *parts]


def dirichlet(labels: np.ndarray, clients: int, alpha: float, seed: int) -> list[np.ndarray]:
    """Dirichlet parts, drawn again until each client has enough; IID where α is infinite."""
    draw = np.random.default_rng((seed, 3))
    while True:
        parts: list[list[int]] = [[] for _ in range(clients)]
        for label in (0, 1):
            rows = draw.permutation(np.flatnonzero(labels == label))
            shares = np.full(clients, 1 / clients)
            if np.isfinite(alpha):
                shares = draw.dirichlet(np.full(clients, alpha))
            ends = np.round(np.cumsum(shares) * len(rows)).astype(int)
            for part, begin, end in zip(parts, [0, *ends[:-1]], ends, strict=True):
                part += rows[begin:end].tolist()
        if min(map(len, parts)) >= SMALLEST:
            return [draw.permutation(part) for part in parts]


def single_label(labels: np.ndarray, clients: int, seed: int) -> list[np.ndarray]:
    """Client k holds label k mod 2 alone."""
    draw = np.random.default_rng((seed, 4))
    rows = {label: draw.permutation(np.flatnonzero(labels == label)) for label in (0, 1)}
    return [rows[k % 2][k // 2 :: (clients + 1 - k % 2) // 2] for k in range(clients)]


def run(groups: dict[str, Projected], parts: Sequence[np.ndarray], arm: PlainArm) -> Metrics:
    """One run; how well it does on the held-out examples, all labels weighing the same."""
    pool, held = groups["pool"], groups["held"]
    allowed = np.full(len(parts), arm.local_steps)
    if arm.found is not None:
        signals = dict(enumerate(np.abs(_calibrated(pool, parts, arm))))
        decided = decide_by_paths(arm.found, arm.local_steps, 0, "calibration", signals)
        for verdict in decided.verdicts:
            allowed[verdict.client] = verdict.steps
    allowed[list(arm.stopped)] = 1
    moved = np.zeros(arm.steps)
    pointers = [0] * len(parts)
    for first in range(0, arm.steps, arm.local_steps):
        steps = min(arm.local_steps, arm.steps - first)
        base = pool.scores + pool.along[:, :first] @ moved[:first]
        found = np.full((len(parts), steps), np.nan)
        for client, part in enumerate(parts):
            taken = min(int(allowed[client]), steps)
            found[client, :taken] = _path(
                pool, part, base[part], first, taken, pointers[client], arm
            )
            pointers[client] += taken * arm.batch
        took = np.isfinite(found)
        by = took.sum(axis=0) if arm.over_step else len(parts)
        moved[first : first + steps] = -arm.rate * np.nansum(found, axis=0) / by
    return Metrics.of(held.scores + held.along @ moved, held.labels)


def _path(
    pool: Projected,
    part: np.ndarray,
    scores: np.ndarray,
    first: int,
    steps: int,
    pointer: int,
    arm: PlainArm,
) -> np.ndarray:
    """Projected gradients of a client's local steps from one place."""
    scores, found = scores.copy(), np.zeros(steps)
    for step in range(steps):
        chosen = (np.arange(arm.batch) + pointer + step * arm.batch) % len(part)
        along = pool.along[part, first + step]
        labels = pool.labels[part[chosen]]
        at, z = scores[chosen], EPSILON * along[chosen]
        ends = [np.mean(np.logaddexp(0, s) - labels * s) for s in (at + z, at - z)]
        found[step] = (ends[0] - ends[1]) / (2 * EPSILON)
        scores -= arm.rate * found[step] * along
    return found


def _calibrated(pool: Projected, parts: Sequence[np.ndarray], arm: PlainArm) -> np.ndarray:
    """g of each client's calibration, a row each; along the directions of the run's first steps."""
    assert arm.found is not None
    steps = arm.found.calibration_steps
    return np.array([_path(pool, part, pool.scores[part], 0, steps, 0, arm) for part in parts])
