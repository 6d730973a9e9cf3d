"""The demo as a model that is linear in w: in milliseconds a run, to see what is worth a real one.

`World` has the slopes of every example's score along w, from the products of `linear_features.py`;
`train` simulates federated training on it, with losses at w + ε z as the method has them. It is no
run of the method. `linear_tables.py` prints what follows from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from meerkat.config.automatic import subspace_rate

SEEDS, STEPS, MARKS = 6, 60, (15, 30, 60)
SOURCES = ("plots", "speeches", "words", "debian", "chinese", "clients")
"""Groups of public texts, in the order of the products' columns."""
USUAL = {"plots": 128, "speeches": 128}
"""How many texts of which source B is made from."""


@dataclass(frozen=True)
class Part:
    """Examples: slopes of their score with w, scores at w = 0, labels."""

    slopes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    def losses(self, w: np.ndarray) -> np.ndarray:
        found = self.scores + self.slopes @ w
        return np.asarray(np.logaddexp(0, found) - self.labels * found)

    def accuracy(self, w: np.ndarray) -> float:
        return float(((self.scores + self.slopes @ w > 0) == (self.labels > 0.5)).mean())

    def gradient(self, w: np.ndarray) -> np.ndarray:
        shares = 1 / (1 + np.exp(-(self.scores + self.slopes @ w)))
        return np.asarray((shares - self.labels) @ self.slopes / len(self.labels))

    def __getitem__(self, chosen: np.ndarray) -> Part:
        return Part(self.slopes[chosen], self.scores[chosen], self.labels[chosen])


class World:
    """The demo within a subspace.

    Args:
        out: Where `products.npz` is.
        texts: How many texts of which source B is made from.
        power: a of B = V λ^-a; `first` whitens the first direction alone.
        labelled: Score a text by the gradient of its labelled loss: an oracle.
        random: Directions drawn at random over the masked coordinates instead.
    """

    def __init__(
        self,
        out: Path,
        dimensions: int = 32,
        texts: dict[str, int] | None = None,
        power: float | Literal["first"] = 0.5,
        labelled: bool = False,
        random: bool = False,
    ):
        kept = np.load(out / "products.npz")
        sizes = [len(kept[f"{source}_d"]) for source in SOURCES]
        starts = dict(zip(SOURCES, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
        chosen = texts or USUAL
        columns = np.concatenate([starts[s] + np.arange(n) for s, n in chosen.items()])
        scores = np.concatenate([kept[f"{s}_d"][:n] for s, n in chosen.items()])
        weights = np.ones(len(columns))
        if labelled:
            labels = np.concatenate([kept[f"{s}_y"][:n] for s, n in chosen.items()])
            weights = 1 / (1 + np.exp(-scores)) - labels
        gram = np.concatenate([kept[s][:n][:, columns] for s, n in chosen.items()])
        gram = gram.astype(float) * weights[:, None] * weights
        values, vectors = np.linalg.eigh(gram)
        values, vectors = values[::-1], vectors[:, ::-1]
        self.curvature = values / len(columns)
        self.k = dimensions = min(dimensions, int((values > 1e-9 * values[0]).sum()))
        values, vectors = values[:dimensions], vectors[:, :dimensions]
        scaled = self.curvature[:dimensions]
        if power == "first":
            lengths = np.full(dimensions, scaled[1:].mean() ** -0.5)
            lengths[0] = scaled[0] ** -0.5
        else:
            # Whatever the power, the mean curvature is one, so that rates mean the same.
            lengths = scaled**-power
            lengths *= np.mean(scaled * lengths**2) ** -0.5
        whiten = weights[:, None] * vectors / np.sqrt(values) * lengths

        def part(name: str) -> Part:
            slopes = kept[name][:, columns] @ whiten
            if random:
                slopes = kept[f"{name}_random"][:, :dimensions]
                slopes = slopes * float(np.mean(kept["held_random"][:, :dimensions] ** 2)) ** -0.5
            return Part(slopes, kept[f"{name}_d"], kept[f"{name}_y"])

        self.held, self.pool = part("held"), part("pool")
        self.p = kept["p"][columns] @ whiten
        public = (
            kept["plots"] if random else np.concatenate([kept[s][:n] for s, n in chosen.items()])
        )
        mean = (public[:, columns] @ whiten).mean(0)
        self.balanced = np.zeros(self.k) if random else -scores.mean() * mean / (mean @ mean)

    def clients(self, number: int, alpha: float, seed: int, single: int = 0) -> list[Part]:
        """The pool over so many clients.

        Args:
            alpha: Of a Dirichlet partition; infinite is IID.
            single: So many clients, the last ones, hold one label each.
        """
        draw, labels = np.random.default_rng(seed), self.pool.labels
        order = draw.permutation(len(labels))
        parts: list[list[int]] = [[] for _ in range(number)]
        for label in (0, 1):
            rows = order[labels[order] == label]
            shares = np.full(number, 1 / number)
            if np.isfinite(alpha):
                shares = draw.dirichlet(np.full(number, alpha))
            own = [place for place in range(number - single, number) if place % 2 != label]
            shares[own] = 0
            ends = np.round(np.cumsum(shares / shares.sum()) * len(rows)).astype(int)
            for held, begin, end in zip(parts, [0, *ends[:-1]], ends, strict=True):
                held += rows[begin:end].tolist()
        return [self.pool[draw.permutation(held)] for held in parts if len(held) >= 16]


@dataclass(frozen=True)
class Arm:
    """What a run is made of; by default as the recipe of the demo has it."""

    batch: int = 4
    directions: int = 7
    one_sided: bool = True
    own: bool = False
    """Directions of each client's own."""
    kind: Literal["orthogonal", "gaussian", "rademacher"] = "orthogonal"
    exact: bool = False
    loaded: bool = False
    """Start at w = 0."""
    factor: float = 1.0
    """On η."""
    decay: Literal["linear", "cosine", "constant"] = "linear"
    momentum: float = 0.0
    local_steps: int = 1
    clients: int = 4
    sampled: int | None = None
    alpha: float = 0.5
    single: int = 0
    method: Literal["ours", "hiso", "fzoo", "conmezo"] = "ours"

    def rate(self, k: int) -> float:
        number = np.inf if self.exact else self.directions * (self.sampled_ if self.own else 1)
        return self.factor * subspace_rate(k, number)

    @property
    def sampled_(self) -> int:
        return self.sampled or self.clients


@dataclass
class Trace:
    """Metrics at each mark, and every client's |g| and GradIP by step."""

    marks: list[tuple[float, float]]
    sizes: dict[int, list[float]]
    gradip: dict[int, list[float]]


class _Directions:
    """Draws z, from what all know of the run."""

    def __init__(self, arm: Arm, k: int, draw: np.random.Generator):
        self._arm, self._k, self._draw = arm, k, draw
        self._queue: list[np.ndarray] = []
        self.curvature = np.ones(k)
        self.momentum = np.zeros(k)

    def __call__(self) -> np.ndarray:
        k, arm = self._k, self._arm
        if arm.kind == "gaussian":
            z = self._draw.standard_normal(k)
        elif arm.kind == "rademacher":
            z = self._draw.choice([-1.0, 1.0], k)
        else:
            if not self._queue:
                q, r = np.linalg.qr(self._draw.standard_normal((k, k)))
                self._queue.extend((q * np.sign(np.diag(r))).T * np.sqrt(k))
            z = self._queue.pop()
        if arm.method == "hiso":
            return np.asarray(z / np.sqrt(self.curvature / self.curvature.mean()))
        if arm.method == "conmezo" and (length := np.linalg.norm(self.momentum)) > 0:
            unit, angle = self.momentum / length, 1.35
            return np.asarray(np.sqrt(k) * np.cos(angle) * unit + np.sin(angle) * z)
        return np.asarray(z)

    def learn(self, estimate: np.ndarray) -> None:
        """Take the round's aggregated estimate, which all have."""
        self.curvature = 0.9 * self.curvature + 0.1 * (estimate**2 + 1e-3)
        self.momentum = 0.9 * self.momentum + 0.1 * estimate


def train(world: World, arm: Arm, seed: int) -> Trace:
    """One run of `STEPS` local steps in all."""
    draw, k = np.random.default_rng(seed), world.k
    clients = world.clients(arm.clients, arm.alpha, 100 + seed, arm.single)
    w = np.zeros(k) if arm.loaded else world.balanced.copy()
    directions, velocity = _Directions(arm, k, draw), np.zeros(k)
    taken = [0] * len(clients)
    trace = Trace([], {c: [] for c in range(len(clients))}, {c: [] for c in range(len(clients))})
    for number in range(STEPS // arm.local_steps):
        done = number * arm.local_steps
        rate = arm.rate(k) * _decayed(arm.decay, done / STEPS)
        chosen = draw.permutation(len(clients))[: arm.sampled_]
        shared = [[directions() for _ in range(arm.directions)] for _ in range(arm.local_steps)]
        total, estimates = np.zeros(k), np.zeros((arm.local_steps, k))
        for client in chosen.tolist():
            local, held = w.copy(), clients[client]
            for step in range(arm.local_steps):
                places = (np.arange(arm.batch) + taken[client] * arm.batch) % len(held.labels)
                taken[client] += 1
                zs = [directions() for _ in range(arm.directions)] if arm.own else shared[step]
                estimate, scalars = _estimate(held[places], local, zs, arm, k)
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


def _estimate(
    batch: Part, w: np.ndarray, zs: Sequence[np.ndarray], arm: Arm, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """ĝ of a local step, and the scalars that are reported for it."""
    if arm.exact:
        gradient = batch.gradient(w)
        return gradient, gradient
    epsilon = 0.6 / np.sqrt(k)
    above = np.array([batch.losses(w + epsilon * z).mean() for z in zs])
    below = batch.losses(w).mean() if arm.one_sided else None
    if below is None:
        below = np.array([batch.losses(w - epsilon * z).mean() for z in zs])
    scalars = np.atleast_1d((above - below) / (epsilon * (1 if arm.one_sided else 2)))
    estimate = scalars @ np.array(zs) / len(zs)
    if arm.method == "fzoo":
        # By the deviation of the losses over directions; ε, so that the unit of η is as elsewhere.
        estimate = estimate * epsilon / max(float(above.std()), 1e-6)
    return np.asarray(estimate), scalars


def _decayed(decay: str, done: float) -> float:
    if decay == "linear":
        return 1 - done
    return float(0.5 * (1 + np.cos(np.pi * done))) if decay == "cosine" else 1.0
