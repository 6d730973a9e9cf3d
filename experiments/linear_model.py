"""The demo as a model that is linear in w: in milliseconds a run, to see what is worth a real one.

Gradients of the difference of the two answers' scores, of 512 examples of each client, of 768 held
out and of 512 public sentences, at the masked coordinates: the first command takes minutes. What
follows are simulations of federated training on these, with losses at w + ε z as the method has
them; they are no runs of the method.

    python experiments/linear_model.py features runs/linear
    python experiments/linear_model.py table runs/linear

Each line has mean and standard deviation of the accuracy over six seeds (directions and order of
the data), and the mean loss, after 15, 30 and 60 rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from meerkat.config import load_recipe
from meerkat.config.automatic import subspace_rate
from meerkat.data.encoding import Encoded
from meerkat.data.packing import PackedBatch
from meerkat.runs.assembly import assemble
from meerkat.runs.finding_subspace import public_examples
from meerkat.spaces.example_gradients import example_gradients

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.toml"
PUBLIC, HELD, LEARNED, CLIENTS = 512, 768, 512, 4
MARKS, SEEDS, ROUNDS = (15, 30, 60), 6, 60


def features(out: Path) -> None:
    """Write products of all gradients with the public ones, scores and labels."""
    recipe = load_recipe(RECIPE, [f"subspace.texts={PUBLIC}", "subspace.start=loaded"])
    assembly = assemble(recipe)
    mask, objective, model = assembly.found_mask.mask, assembly.objective, assembly.loaded.model
    assert recipe.subspace is not None
    encode = assembly.encoder.encode

    def gradients(examples: Sequence[Encoded]) -> tuple[np.ndarray, np.ndarray]:
        found: list[np.ndarray] = []

        def difference(batch: PackedBatch) -> Tensor:
            scores = objective.scores(batch)
            found.append((scores[:, 1] - scores[:, 0]).detach().numpy())
            return scores[:, 1] - scores[:, 0]

        groups = (examples[begin : begin + 16] for begin in range(0, len(examples), 16))
        batches = (batch for group in groups for batch in objective.packs(group))
        rows = np.concatenate(list(example_gradients(model, mask, batches, difference)))
        return rows, np.concatenate(found)

    public, scores = gradients([encode(e) for e in public_examples(assembly, recipe.subspace)])
    arrays = {"public": public @ public.T, "public_d": scores}
    parts = {"held": list(assembly.test[:HELD])}
    parts |= {f"client{c.number}": list(c.examples[:LEARNED]) for c in assembly.clients()}
    for name, examples in parts.items():
        rows, arrays[f"{name}_d"] = gradients(examples)
        arrays[name] = rows @ public.T
        arrays[f"{name}_y"] = np.array([e.label for e in examples], float)
        print(f"{name}: {len(examples)} examples", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / "features.npz", **arrays)


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
    """The demo within the subspace of the first N public texts."""

    def __init__(self, out: Path, dimensions: int, texts: int = 256):
        kept = np.load(out / "features.npz")
        values, vectors = np.linalg.eigh(kept["public"][:texts, :texts].astype(float))
        values, vectors = values[::-1][:dimensions], vectors[:, ::-1][:, :dimensions]
        whiten = vectors / np.sqrt(values) * (values / texts) ** -0.5
        self.k = dimensions

        def part(name: str) -> Part:
            return Part(kept[name][:, :texts] @ whiten, kept[f"{name}_d"], kept[f"{name}_y"])

        self.held = part("held")
        self.clients = [part(f"client{number}") for number in range(CLIENTS)]
        mean = (kept["public"][:, :texts] @ whiten).mean(0)
        self.balanced = -kept["public_d"].mean() * mean / (mean @ mean)


@dataclass(frozen=True)
class Arm:
    """What a step is made of."""

    batch: int = 16
    directions: int = 1
    one_sided: bool = False
    split: bool = False
    """Each direction sees its own part of the batch."""
    own: bool = False
    """Directions of each client's own."""
    gaussian: bool = False
    exact: bool = False
    loaded: bool = False
    """Start at w = 0."""
    factor: float = 1.0
    """On η."""

    def rate(self, k: int) -> float:
        number = np.inf if self.exact else self.directions * (CLIENTS if self.own else 1)
        return self.factor * subspace_rate(k, number)


def train(world: World, arm: Arm, seed: int) -> list[tuple[float, float]]:
    """Accuracy and loss on the held-out examples at each mark."""
    draw, k = np.random.default_rng(seed), world.k
    w = np.zeros(k) if arm.loaded else world.balanced.copy()
    epsilon, queue, found = 0.6 / np.sqrt(k), [], []
    orders = [draw.permutation(len(client.labels)) for client in world.clients]

    def direction() -> np.ndarray:
        if arm.gaussian:
            return draw.standard_normal(k)
        if not queue:
            q, r = np.linalg.qr(draw.standard_normal((k, k)))
            queue.extend((q * np.sign(np.diag(r))).T * np.sqrt(k))
        return np.asarray(queue.pop())

    for number in range(ROUNDS):
        total = np.zeros(k)
        shared = [direction() for _ in range(0 if arm.own else arm.directions)]
        for client, order in zip(world.clients, orders, strict=True):
            chosen = order[(np.arange(arm.batch) + number * arm.batch) % len(order)]
            if arm.exact:
                total += client[chosen].gradient(w) / CLIENTS
                continue
            for q in range(arm.directions):
                z = direction() if arm.own else shared[q]
                batch = client[chosen[q :: arm.directions] if arm.split else chosen]
                above = batch.losses(w + epsilon * z).mean()
                if arm.one_sided:
                    slope = (above - batch.losses(w).mean()) / epsilon
                else:
                    slope = (above - batch.losses(w - epsilon * z).mean()) / (2 * epsilon)
                total += slope * z / CLIENTS / arm.directions
        w = w - arm.rate(k) * (1 - number / ROUNDS) * total
        if number + 1 in MARKS:
            found.append((world.held.accuracy(w), float(world.held.losses(w).mean())))
    return found


def table(out: Path) -> None:
    worlds = {k: World(out, k) for k in (8, 16, 32, 48, 64)}

    def line(name: str, k: int, arm: Arm, factors: Sequence[float] = (0.5, 1.0, 2.0)) -> None:
        for factor in factors:
            tried = replace(arm, factor=factor)
            runs = np.array([train(worlds[k], tried, seed) for seed in range(SEEDS)])
            cells = []
            for mark, (accuracy, loss) in zip(MARKS, runs.mean(axis=0), strict=True):
                deviation = runs[:, MARKS.index(mark), 0].std()
                cells.append(f"{mark}: {accuracy:.3f} ± {deviation:.3f} ({loss:.3f})")
            print(f"{f'{name}, k = {k}, {factor:g} η':62} {'  '.join(cells)}", flush=True)

    for loaded in (True, False):
        start = "from w = 0" if loaded else "balanced"
        line(f"exact gradient, {start}", 32, Arm(exact=True, loaded=loaded))
        for own in (False, True):
            for gaussian in (True, False):
                whose, kind = "own" if own else "shared", "Gaussian" if gaussian else "orthogonal"
                arm = Arm(own=own, gaussian=gaussian, loaded=loaded)
                line(f"two-point, {whose}, {kind}, {start}", 32, arm)
    for parts in (2, 4, 8, 16):
        arm = Arm(directions=parts, split=True)
        line(f"two-point, {parts} directions, each over its part of 16", 32, arm)
    for k in worlds:
        for directions, batch in ((3, 8), (7, 4), (15, 2)):
            arm = Arm(batch, directions, one_sided=True)
            line(f"one-sided, {directions} directions over {batch}", k, arm, (0.5, 0.75, 1.0, 1.5))
        line("exact gradient", k, Arm(exact=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["features", "table"])
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    {"features": features, "table": table}[options.what](options.out)


if __name__ == "__main__":
    main()
