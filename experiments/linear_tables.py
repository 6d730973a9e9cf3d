"""Tables of the linear model of the demo (`linear_model.py`), for docs/results/subspace.md.

    python experiments/linear_features.py runs/linear
    python experiments/linear_tables.py runs/linear texts
    python experiments/linear_tables.py runs/linear          # all of them

Each line has mean and standard deviation of the accuracy on the held-out examples over six seeds
(partition, directions, order of the data), and the mean loss, after 15, 30 and 60 local steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from linear_model import MARKS, SEEDS, SOURCES, USUAL, Arm, World, train

TWO_POINT = Arm(16, 1, one_sided=False)
EXACT = Arm(16, exact=True)
BOTH = (("7 directions of 4", Arm()), ("exact over 16", EXACT))
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


class Tables:
    """Prints one table a method.

    Args:
        out: Where `products.npz` is.
    """

    def __init__(self, out: Path):
        self._out = out
        self._world = cache(lambda k: World(out, k))

    def _line(self, name: str, world: World, arm: Arm) -> np.ndarray:
        runs = np.array([train(world, arm, seed).marks for seed in range(SEEDS)])
        cells = []
        for place, mark in enumerate(MARKS[-runs.shape[1] :]):
            accuracy, loss = runs[:, place].T
            cells.append(
                f"{mark}: {accuracy.mean():.3f} ± {accuracy.std():.3f} ({loss.mean():.3f})"
            )
        print(f"  {name:58} {'  '.join(cells)}", flush=True)
        return np.asarray(runs.mean(axis=0))

    def _best(self, name: str, world: World, arm: Arm, factors: Sequence[float] = FACTORS) -> None:
        """The line of the factor on η with the best accuracy at the end, on seeds 10 to 15."""
        found = []
        for factor in factors:
            tried = replace(arm, factor=arm.factor * factor)
            runs = [train(world, tried, 10 + seed).marks[-1][0] for seed in range(SEEDS)]
            found.append((float(np.mean(runs)), factor))
        _, factor = max(found)
        self._line(f"{name}, {factor:g} η", world, replace(arm, factor=arm.factor * factor))

    def texts(self) -> None:
        """Point 2: how many public texts, and which."""
        choices: list[tuple[str, dict[str, int]]] = [
            (f"{n} plots, {n} speeches", {"plots": n, "speeches": n})
            for n in (16, 32, 64, 128, 256, 512)
        ]
        choices += [(f"256 of {source}", {source: 256}) for source in SOURCES]
        for name, texts in choices:
            world = World(self._out, 32, texts)
            share = world.curvature[0] / world.curvature.sum()
            ten = world.curvature[:10].sum() / world.curvature.sum()
            start = world.held.accuracy(world.balanced)
            length = float(np.linalg.norm(world.balanced))
            spread = float(np.std(world.held.slopes @ world.balanced)) if length else 0.0
            print(
                f"{name}: λ_1 {world.curvature[0]:.4g}, its share {share:.2f}, of the first ten "
                f"{ten:.2f}; |w| of the start {length:.2f}, accuracy there {start:.3f}, "
                f"standard deviation of what it adds {spread:.2f}"
            )
            for label, arm in BOTH:
                self._line(label, world, arm)

    def whitening(self) -> None:
        """Point 1: where the gain comes from."""
        for k in (8, 32, 128):
            print(f"k = {k}")
            for label, arm in BOTH:
                self._best(f"{label}", World(self._out, k), arm)
                self._best(f"{label}, not whitened", World(self._out, k, power=0.0), arm)
                first = World(self._out, k, power="first")
                self._best(f"{label}, the first direction whitened", first, arm)
                random = World(self._out, k, random=True)
                self._best(f"{label}, random subspace", random, replace(arm, loaded=True))
                oracle = World(self._out, k, {"clients": 256}, labelled=True)
                self._best(f"{label}, of labelled losses (oracle)", oracle, arm)

    def dimensions(self) -> None:
        """Point 1: first order inside B, and the recipe, by k."""
        texts = {"plots": 512, "speeches": 512}
        for k in (8, 16, 32, 64, 128, 256, 512):
            world = World(self._out, k, texts)
            full = replace(EXACT, batch=512)
            self._line(f"exact over all, k = {k}", world, full)
            self._line(f"exact over 16, k = {k}", world, EXACT)
            self._line(f"7 directions of 4, k = {k}", world, Arm())

    def scheme(self) -> None:
        """Point 3: what a step is made of, at 32 example passes; each with its best rate."""
        world = self._world(32)
        arms = {
            "7 one-sided over 4": Arm(),
            "3 one-sided over 8": Arm(8, 3),
            "15 one-sided over 2": Arm(2, 15),
            "two-point over 16": TWO_POINT,
            "4 two-point over 4": Arm(4, 4, one_sided=False),
            "7 one-sided over 4, each client its own": Arm(own=True),
            "two-point over 16, each client its own": replace(TWO_POINT, own=True),
        }
        for name, arm in arms.items():
            self._best(name, world, arm)
        for momentum in (0.5, 0.9):
            self._best(f"7 one-sided over 4, momentum {momentum}", world, Arm(momentum=momentum))
        for decay in ("cosine", "constant"):
            self._best(f"7 one-sided over 4, {decay}", world, replace(Arm(), decay=decay))

    def clients(self) -> None:
        """Point 4: so many clients a round of so many, and k that grows with them."""
        for clients, sampled in ((4, 4), (16, 16), (64, 4), (64, 16), (64, 64)):
            for k in (32, 64, 128):
                arm = Arm(clients=clients, sampled=sampled)
                name = f"{sampled} of {clients} clients, k = {k}"
                self._line(name, self._world(k), arm)
                self._line(f"{name}, each its own", self._world(k), replace(arm, own=True))
            exact = replace(EXACT, clients=clients, sampled=sampled)
            self._line(f"{sampled} of {clients} clients, k = 64, exact", self._world(64), exact)

    def heterogeneity(self) -> None:
        """Point 6: how data differ, local steps, and whether extreme clients show."""
        world = self._world(32)
        for steps in (1, 10, 30):
            for name, alpha, single in (
                ("IID", np.inf, 0),
                ("Dirichlet 0.5", 0.5, 0),
                ("Dirichlet 0.1", 0.1, 0),
                ("IID, 3 of 8 of one label", np.inf, 3),
                ("all of one label", np.inf, 8),
            ):
                for label, arm in BOTH:
                    arm = replace(arm, clients=8, alpha=alpha, single=single, local_steps=steps)
                    self._line(f"T = {steps}, {name}, {label}", world, arm)
        print("Extreme clients (3 of 8): mean |g| and |GradIP| over those of the others, and the")
        print("share of pairs that they order rightly, over the first 5, 15 and 30 steps, T = 30")
        for label, arm in BOTH:
            arm = replace(arm, clients=8, alpha=np.inf, single=3, local_steps=30)
            traces = [train(world, arm, seed) for seed in range(SEEDS)]
            for signal in ("sizes", "gradip"):
                cells = []
                for until in (5, 15, 30):
                    means = [
                        np.array([np.mean(v[:until]) for v in getattr(t, signal).values()])
                        for t in traces
                    ]
                    ratio = np.mean([m[5:].mean() / m[:5].mean() for m in means])
                    right = np.mean([(m[5:, None] > m[None, :5]).mean() for m in means])
                    cells.append(f"{until}: {ratio:.2f}, {right:.2f}")
                print(f"  {label}, {signal:8} {'  '.join(cells)}", flush=True)

    def others(self) -> None:
        """Point 8: other methods' steps in the same subspace, each with its best rate of nine."""
        world, factors = self._world(32), tuple(2.0**power for power in range(-4, 5))
        for label, arm in (("7 one-sided over 4", Arm()), ("two-point over 16", TWO_POINT)):
            self._best(f"ours, {label}", world, arm, factors)
            gaussian = replace(arm, kind="gaussian")
            self._best(f"Gaussian directions, {label}", world, gaussian, factors)
            for momentum in (0.5, 0.9):
                with_it = replace(arm, momentum=momentum)
                self._best(f"momentum {momentum}, {label}", world, with_it, factors)
            self._best(f"HiSo, {label}", world, replace(gaussian, method="hiso"), factors)
            self._best(f"ConMeZO, {label}", world, replace(arm, method="conmezo"), factors)
        fzoo = Arm(kind="rademacher", method="fzoo")
        self._best("FZOO, 7 one-sided over 4", world, fzoo, factors)
        self._best("FZOO, 3 one-sided over 8", world, replace(fzoo, batch=8, directions=3), factors)

    def reach(self) -> None:
        """What reaches 0.87: exact reports after 15 steps, drawn directions after 60."""
        for name, texts in (
            ("128 + 128", USUAL),
            ("512 + 512", {"plots": 512, "speeches": 512}),
            ("512 of clients", {"clients": 512}),
            ("all", dict.fromkeys(("plots", "speeches", "clients"), 512)),
        ):
            for k in (32, 44, 64, 88):
                world = World(self._out, k, texts)
                for batch in (16, 64):
                    arm = Arm(batch, exact=True)
                    self._best(f"{name}, k = {k}, exact over {batch}", world, arm)
                self._best(f"{name}, k = {k}, 7 directions of 4", world, Arm())

    def rates(self) -> None:
        """Is η of Eq. 20 near the best of a search, by k, directions and clients?"""
        for k in (8, 16, 32, 64, 128):
            for label, arm in (*BOTH, ("two-point over 16", TWO_POINT)):
                for clients in (4, 16):
                    for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
                        tried = replace(arm, factor=factor, clients=clients)
                        name = f"k = {k}, {label}, {clients} clients, {factor:g} η"
                        self._line(name, self._world(k), tried)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    names = [name for name in vars(Tables) if not name.startswith("_")]
    parser.add_argument("table", nargs="*", choices=[[], *names])
    options = parser.parse_args()
    tables = Tables(options.out)
    for name in options.table or names:
        show: Callable[[], None] = getattr(tables, name)
        print(f"## {name}: {(show.__doc__ or '').strip()}", flush=True)
        show()


if __name__ == "__main__":
    main()
