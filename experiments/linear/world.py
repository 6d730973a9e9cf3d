"""The demo within a subspace: slopes of every example's score along w, and who holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

SOURCES = ("plots", "speeches", "words", "debian", "chinese", "written", "clients", "pool")
"""Groups of texts, in the order of the products' columns."""
USUAL = {"plots": 128, "speeches": 128}
"""How many texts of which source B is made from."""
SMALLEST = 16
"""Clients with fewer examples are left out."""

Kind = Literal["aligned", "first", "span", "random"]


@dataclass(frozen=True)
class Part:
    """Examples: slopes of their score with w, scores at w = 0, labels."""

    slopes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    def losses(self, w: np.ndarray) -> np.ndarray:
        """Loss of each example; with a column of w for each point, a column of losses."""
        found = (self.scores + (self.slopes @ w).T).T
        return np.asarray(np.logaddexp(0, found) - (self.labels * found.T).T)

    def accuracy(self, w: np.ndarray) -> float:
        return float(((self.scores + self.slopes @ w > 0) == (self.labels > 0.5)).mean())

    def gradient(self, w: np.ndarray) -> np.ndarray:
        shares = np.exp(-np.logaddexp(0, -(self.scores + self.slopes @ w)))
        return np.asarray((shares - self.labels) @ self.slopes / len(self.labels))

    def __getitem__(self, chosen: np.ndarray) -> Part:
        return Part(self.slopes[chosen], self.scores[chosen], self.labels[chosen])


@cache
def products(out: Path) -> dict[str, np.ndarray]:
    """What `features.write_products` has written."""
    return dict(np.load(out / "products.npz").items())


class World:
    """The demo within a subspace.

    Args:
        out: Where `products.npz` is.
        dimensions: k; fewer where the texts have fewer directions.
        texts: How many texts of which source B is made from.
        power: a of B = V λ^-a.
        kind: `aligned`; `first`, which whitens the first direction alone; k random directions of
            the texts' `span`; `random` directions over all masked coordinates.
        labelled: Score a text by the gradient of its labelled loss: an oracle.
        draw: Which texts of a source: the first ones, or a draw by this seed.
    """

    def __init__(
        self,
        out: Path,
        dimensions: int = 32,
        texts: Mapping[str, int] | None = None,
        power: float = 0.5,
        kind: Kind = "aligned",
        labelled: bool = False,
        draw: int | None = None,
    ):
        kept, self.texts = products(out), texts or USUAL
        starts = np.cumsum([0, *(len(kept[f"{source}_d"]) for source in SOURCES)])
        rows: dict[str, np.ndarray] = {}
        for place, (source, count) in enumerate(self.texts.items()):
            rows[source] = np.arange(len(kept[f"{source}_d"]))
            if draw is not None:
                rows[source] = np.random.default_rng((draw, place)).permutation(rows[source])
            rows[source] = rows[source][:count]
        columns = np.concatenate([starts[SOURCES.index(s)] + r for s, r in rows.items()])

        def public(what: str) -> np.ndarray:
            return np.concatenate([kept[f"{source}{what}"][r] for source, r in rows.items()])

        self.scores = public("_d").astype(float)
        weights = np.ones(len(columns))
        if labelled:
            weights = 1 / (1 + np.exp(-self.scores)) - public("_y")
        products_of = public("")[:, columns].astype(float)
        values, vectors = np.linalg.eigh(products_of * weights[:, None] * weights)
        values, vectors = values[::-1], vectors[:, ::-1]
        self.curvature = values / len(columns)
        """λ of every direction of the texts."""
        usable = int((values > 1e-6 * values[0]).sum())
        self.k = min(dimensions, usable)
        suffix, chosen = "", columns
        if kind == "random":
            suffix, chosen = "_random", np.arange(self.k)
            turn = np.eye(self.k)
        elif kind == "span":
            draws = np.random.default_rng(8).standard_normal((usable, self.k))
            turn = np.linalg.qr(draws)[0]
            turn = weights[:, None] * vectors[:, :usable] / np.sqrt(values[:usable]) @ turn
        else:
            lengths = self.curvature[: self.k] ** -power
            if kind == "first":
                lengths[:] = self.curvature[1 : self.k].mean() ** -0.5
                lengths[0] = self.curvature[0] ** -0.5
            turn = weights[:, None] * vectors[:, : self.k] / np.sqrt(values[: self.k]) * lengths
        own = public(suffix)[:, chosen] @ turn
        # However B is made, the mean curvature of a direction is one, so that rates mean the same.
        scale = float(np.mean(own**2)) ** -0.5
        turn, own = turn * scale, own * scale

        def part(name: str) -> Part:
            slopes = kept[f"{name}{suffix}"][:, chosen] @ turn
            return Part(slopes, kept[f"{name}_d"].astype(float), kept[f"{name}_y"])

        self.held, self.pool = part("held"), part("pool")
        self.p = kept[f"p{suffix}"][chosen] @ turn
        mean = own.mean(axis=0)
        self.balanced = -self.scores.mean() * mean / (mean @ mean)
        """w at which the public texts prefer no answer."""
        self._first = kept["pool"][:, columns] @ (
            weights[:, None] * vectors[:, : self.k] / np.sqrt(values[: self.k])
        )
        self._norms = kept["pool_norm"].astype(float)

    def statistics(self) -> dict[str, float]:
        """What can be known before training, from the texts and, unlabelled, from the pool."""
        rest = self.curvature[1:]
        moved = self.scores.mean()
        squares = self._first**2
        # Of what the first direction leaves of the clients' gradients, how much lies in B.
        coverage = float(squares[:, 1:].sum() / (self._norms**2 - squares[:, 0]).sum())
        slopes = self.pool.slopes
        curvature = float(np.mean(slopes[:, 1:] ** 2))
        turned = np.linalg.eigvalsh(slopes.T @ slopes / len(slopes))
        return {
            "share of λ_1": float(self.curvature[0] / self.curvature.sum()),
            "effective rank of the rest": float(rest.sum() ** 2 / (rest**2).sum()),
            "spread of scores": float(self.scores.std()),
            "mean score": float(moved),
            "coverage": coverage,
            "curvature at clients": curvature,
            "coverage by curvature": coverage / curvature,
            "highest curvature at clients": float(turned[-1]),
            "effective rank at clients": float(turned.sum() ** 2 / (turned**2).sum()),
            "mean score at clients": float(
                np.mean(self.pool.scores + self.pool.slopes @ self.balanced)
            ),
            "accuracy of the start": self.held.accuracy(self.balanced),
        }

    def clients(self, number: int, alpha: float, seed: int, single: int = 0) -> list[Part]:
        """The pool over so many clients, less those with fewer than 16 examples.

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
            lacking = [place for place in range(number - single, number) if place % 2 != label]
            shares[lacking] = 0
            ends = np.round(np.cumsum(shares / shares.sum()) * len(rows)).astype(int)
            for held, begin, end in zip(parts, [0, *ends[:-1]], ends, strict=True):
                held += rows[begin:end].tolist()
        return [self.pool[draw.permutation(held)] for held in parts if len(held) >= SMALLEST]
