"""Does training on macro F1 raise it where classes are uneven? For docs/results/objectives.md.

The demo's snippets, 85 % of them fresh in training, validation and test. Each arm makes another
figure small, with as many forward passes and the same search: seven rates on validation macro F1
with one seed, then other seeds on the test.

    python experiments/objectives.py data runs/objectives      # the uneven files
    python experiments/objectives.py zeros runs/objectives     # how many differences are 0
    python experiments/objectives.py features runs/objectives  # gradients: an hour, once
    python experiments/objectives.py linear runs/objectives    # tables by the linear model
    python experiments/objectives.py check runs/objectives     # the real model at two of its ends
    python experiments/objectives.py run runs/objectives all   # runs of Gemma 3 270M: hours
    python experiments/objectives.py table runs/objectives     # what of them is there

Written down before the first run: the claim is that smoothed macro F1 as the objective gives a
higher test macro F1 than the loss does. It is refuted if the mean difference over the seeds, of one
partition and order of the data each, is not above zero by twice its standard error.

The linear model (`linear_model.py` says what it is) has the scores of each snippet as they follow
from its gradient at the start of the demo's aligned subspace. Its test has all held-out snippets,
weighted so that 15 % are rotten; real runs have files with so many.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from linear.directions import Arm, Directions
from linear.features import gradients

import meerkat
from meerkat.config import Recipe, load_recipe
from meerkat.config.automatic import subspace_epsilon, subspace_rate
from meerkat.data.clients import load_partition
from meerkat.data.encoding import Encoded
from meerkat.journal import Journal
from meerkat.runs.assembly import Assembly, assemble
from meerkat.runs.evaluation import evaluate_objective
from meerkat.tasks import Example, resolve_task
from meerkat.tasks.losses import Scored, TrainingLoss, UsualLoss
from meerkat.tasks.losses.accuracy import Inaccuracy
from meerkat.tasks.losses.macro_f1 import MacroF1Loss
from meerkat.tasks.metrics import metrics_of

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.toml"
RARE = 0.15
HELD, POOL, OF_CLIENT, TRAINED = 768, 2304, 768, 0.75
"""Held-out snippets, those to train and validate on, of a client, share of them for training."""
K, ROUNDS = 32, 30
FACTORS = tuple(2.0**power for power in range(-2, 5))
"""On the rate of Eq. 20."""
SEARCHED, SEEDS, REAL_SEEDS = 100, range(20), range(5)


class Balanced(UsualLoss):
    """Cross-entropy in which both classes of the training data weigh the same."""

    def losses(self, batch: Scored) -> torch.Tensor:
        weights = torch.tensor([0.5 / RARE, 0.5 / (1 - RARE)])
        found: torch.Tensor = super().losses(batch) * weights[batch.labels]
        return found


OBJECTIVES: dict[str, TrainingLoss] = {
    "loss": UsualLoss(),
    "accuracy": Inaccuracy(),
    "accuracy, temperature 0.5": Inaccuracy(0.5),
    "accuracy, temperature 0": Inaccuracy(0.0),
    "macro_f1": MacroF1Loss(),
    "macro_f1, temperature 0.5": MacroF1Loss(0.5),
    "macro_f1, temperature 0": MacroF1Loss(0.0),
    "loss, classes weighted (for comparison)": Balanced(),
}
STEPS = {"8 examples, 3 directions": Arm(8, 3), "16 examples, 1 direction": Arm(16, 1)}
"""32 example passes a client and round, one-sided."""
PARTITIONS = {"Dirichlet 0.5": 0.5, "IID": float("inf")}


# Data


def _recipe(*changes: str) -> Recipe:
    return load_recipe(RECIPE, ["model.dtype=float32", "runtime.threads=1", *changes])


def examples_of(recipe: Recipe) -> tuple[list[Example], list[Example]]:
    """The snippets to train and validate on, and those held out."""
    split, parts = load_partition(recipe, resolve_task(recipe.task))
    pool = [split.train[i] for part in parts for i in part[:OF_CLIENT]][:POOL]
    return pool, list(split.test[:HELD])


IID = "federation.partition.kind=iid"


def uneven(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places to train on and to validate on, so that a share `RARE` is rotten in both."""
    found: tuple[list[int], list[int]] = ([], [])
    fresh, rotten = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    trained = round(TRAINED * len(fresh))
    for places, count in ((fresh, len(fresh)), (rotten, round(len(fresh) * RARE / (1 - RARE)))):
        first = round(trained * count / len(fresh))
        found[0].extend(places[:first])
        found[1].extend(places[first:count])
    return np.sort(found[0]), np.sort(found[1])


def write_data(out: Path) -> None:
    """train.csv, validation.csv and test.csv of real runs."""
    pool, held = examples_of(_recipe(IID))
    train, validation = uneven(np.array([e.label for e in pool]))
    fresh = [e for e in held if e.label == 1]
    rotten = [e for e in held if e.label == 0][: round(len(fresh) * RARE / (1 - RARE))]
    tested = [e for e in held if e in fresh or e in rotten]
    folder = out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "train": [pool[i] for i in train],
        "validation": [pool[i] for i in validation],
        "test": tested,
    }
    for name, examples in files.items():
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["text", "category"])
            table.writerows((e.fields["text"], ("rotten", "fresh")[e.label]) for e in examples)
        print(f"{name}: {len(examples)}, {sum(e.label == 0 for e in examples)} of them rotten")


# The linear model


@dataclass(frozen=True)
class Part:
    """Snippets: slopes of the difference of their scores along w, the difference at the start."""

    slopes: np.ndarray
    start: np.ndarray
    labels: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> Part:
        return Part(self.slopes[chosen], self.start[chosen], self.labels[chosen])

    def loss(self, of: TrainingLoss, w: np.ndarray) -> float:
        """The training loss of these snippets as one batch."""
        difference = torch.from_numpy((self.start + self.slopes @ w).astype(np.float32))
        scores = torch.stack([torch.zeros_like(difference), difference], 1)
        found = of.losses(Scored(scores, torch.from_numpy(self.labels)))
        return float(found.double().mean())

    def metrics(self, w: np.ndarray) -> dict[str, float]:
        """Macro F1, accuracy and loss, were a share `RARE` of the snippets rotten."""
        weights = np.where(self.labels == 0, RARE, 1 - RARE)
        weights = weights / np.bincount(self.labels)[self.labels]
        difference = self.start + self.slopes @ w
        predicted, f1 = (difference > 0).astype(int), []
        for label in (0, 1):
            held, answered = self.labels == label, predicted == label
            hits = weights[held & answered].sum()
            f1.append(2 * hits / (weights[held].sum() + weights[answered].sum()))
        losses = np.logaddexp(0, np.where(self.labels == 1, -difference, difference))
        accuracy = float(weights[predicted == self.labels].sum())
        return {
            "macro_f1": float(np.mean(f1)),
            "accuracy": accuracy,
            "loss": float(weights @ losses),
        }


def make_features(out: Path) -> None:
    """Slopes along the demo's aligned subspace, 256 snippets at a time; what is there is kept."""
    assembly = assemble(_recipe(IID))
    subspace = assembly.found_mask.mask.subspace
    assert subspace is not None
    folder = out / "features"
    folder.mkdir(parents=True, exist_ok=True)
    pool = [e for client in assembly.clients() for e in client.examples[:OF_CLIENT]][:POOL]
    for name, examples in (("held", list(assembly.test[:HELD])), ("pool", pool)):
        for begin in range(0, len(examples), 256):
            path = folder / f"{name}-{begin}.npz"
            if not path.exists():
                rows, scores = gradients(assembly, examples[begin : begin + 256])
                np.savez(path, slopes=rows @ subspace.basis.T, scores=scores)
            print(path, flush=True)
    np.savez(folder / "start.npz", start=subspace.start)


@cache
def features(out: Path) -> tuple[Part, Part, Part]:
    """Snippets to train on, to validate on, and to test on."""
    folder, start = out / "features", np.load(out / "features" / "start.npz")["start"]

    def part(name: str, examples: Sequence[Example]) -> Part:
        files = [np.load(folder / f"{name}-{i}.npz") for i in range(0, len(examples), 256)]
        slopes = np.concatenate([file["slopes"] for file in files]).astype(float)
        scores = np.concatenate([file["scores"] for file in files]).astype(float)
        labels = np.array([example.label for example in examples])
        return Part(slopes, scores + slopes @ start, labels)

    pool, held = examples_of(_recipe(IID))
    whole = part("pool", pool)
    train, validation = uneven(whole.labels)
    return whole[train], whole[validation], part("held", held)


def clients_of(train: Part, alpha: float, seed: int) -> list[Part]:
    """Four clients, none with less than 16 snippets."""
    draw, order = np.random.default_rng(seed), np.random.default_rng(seed).permutation
    while True:
        parts: list[list[int]] = [[] for _ in range(4)]
        for label in (0, 1):
            rows = np.flatnonzero(train.labels == label)[order(int((train.labels == label).sum()))]
            shares = draw.dirichlet(np.full(4, alpha)) if np.isfinite(alpha) else np.full(4, 0.25)
            ends = np.round(np.cumsum(shares) * len(rows)).astype(int)
            for held, begin, end in zip(parts, [0, *ends[:-1]], ends, strict=True):
                held += rows[begin:end].tolist()
        if min(map(len, parts)) >= 16:
            return [train[draw.permutation(held)] for held in parts]


def trained(train: Part, arm: Arm, of: TrainingLoss, alpha: float, factor: float, seed: int):
    """w after 30 rounds of one step, from the balanced start; η falls linearly."""
    clients, w = clients_of(train, alpha, seed), np.zeros(K)
    directions = Directions(arm, K, np.random.default_rng(1000 + seed))
    epsilon, rate = subspace_epsilon(K), factor * subspace_rate(K, arm.directions)
    for round in range(ROUNDS):
        z, total = directions.step(), np.zeros(K)
        for client in clients:
            places = (np.arange(arm.batch) + round * arm.batch) % len(client.labels)
            batch = client[places]
            here = batch.loss(of, w)
            slopes = [(batch.loss(of, w + epsilon * row) - here) / epsilon for row in z]
            total += np.array(slopes) @ z / len(z) / len(clients)
        w = w - rate * (1 - round / ROUNDS) * total
    return w


def linear_tables(out: Path) -> None:
    train, validation, test = features(out)
    print(f"{len(train.labels)} to train on, {(train.labels == 0).mean():.3f} of them rotten")
    begin = test.metrics(np.zeros(K))
    print("start: " + ", ".join(f"{name} {value:.3f}" for name, value in begin.items()))
    for (step, arm), (partition, alpha) in [
        (s, p) for p in PARTITIONS.items() for s in STEPS.items()
    ]:
        print(f"\n### {step}, {partition}\n")
        print("| objective | factor on η | macro F1 | less that of `loss` | accuracy | loss |")
        print("|---|---|---|---|---|---|")
        usual: list[float] = []
        for name, of in OBJECTIVES.items():
            scores = {
                factor: validation.metrics(trained(train, arm, of, alpha, factor, SEARCHED))
                for factor in FACTORS
            }
            factor = max(FACTORS, key=lambda f: scores[f]["macro_f1"])
            found = [test.metrics(trained(train, arm, of, alpha, factor, s)) for s in SEEDS]
            f1 = [metrics["macro_f1"] for metrics in found]
            usual = usual or f1
            cells = [
                name,
                f"{factor:g}",
                _spread(f1),
                "" if name == "loss" else _difference(f1, usual),
                _spread([metrics["accuracy"] for metrics in found]),
                _spread([metrics["loss"] for metrics in found]),
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def _difference(values: Sequence[float], usual: Sequence[float]) -> str:
    """Mean over seeds, and its standard error."""
    each = [a - b for a, b in zip(values, usual, strict=True)]
    error = statistics.stdev(each) / len(each) ** 0.5
    return f"{statistics.mean(each):+.3f} (standard error {error:.3f})"


def check(out: Path) -> None:
    """The real model at the w of two objectives in the linear model, on the real test."""
    train, _, test = features(out)
    assembly = assemble(_recipe(*arms(out)["loss-1-s0"]))
    space = assembly.worker().space
    start, examples = space.read(), list(assembly.test)
    step, alpha = STEPS["8 examples, 3 directions"], PARTITIONS["IID"]
    for name, factor in (("loss", 2.0), ("macro_f1", 4.0)):  # as the search finds them
        w = trained(train, step, OBJECTIVES[name], alpha, factor, 0)
        space.write(start + w.astype(np.float32))
        found = evaluate_objective(
            assembly.objective, examples, metrics_of(("macro_f1", "accuracy"), True)
        )
        linear = {k: round(v, 3) for k, v in test.metrics(w).items()}
        print(name, "linear", linear, "real", {k: round(v, 3) for k, v in found.metrics.items()})


# How often a difference is exactly 0


def zeros(out: Path, batches: int = 8) -> None:
    """Two-point differences of batches of the demo at its start, by ε and objective."""
    for name, changes in {
        "plain mask, ε 3e-3": ["subspace.kind=none", "optimizer.epsilon=3e-3"],
        "aligned subspace, ε 0.106": ["subspace.least_rank=0"],
    }.items():
        assembly = assemble(_recipe(IID, *changes))
        found = list(_differences(assembly, batches))
        for objective, size in sorted({(o, s) for o, s, _ in found}):
            each = [d for o, s, d in found if (o, s) == (objective, size)]
            nil = sum(d == 0 for d in each)
            middle = statistics.median(map(abs, each))
            zeros = f"{nil} of {len(each)} are 0, median size {middle:.2g}"
            print(f"{name}: {objective}, {size} examples: {zeros}")


def _differences(assembly: Assembly, batches: int) -> Iterator[tuple[str, int, float]]:
    worker, epsilon = assembly.worker(), assembly.recipe.epsilon
    draw, theta = np.random.default_rng(0), worker.initial.theta
    examples: Sequence[Encoded] = assembly.client(0).examples[: 16 * batches]
    labels = torch.tensor([e.label for e in examples])
    scores = []
    z = draw.standard_normal((batches, len(theta)), np.float32)
    for sign in (1, -1):
        rows = []
        for number in range(batches):
            worker.space.write(theta + np.float32(sign * epsilon) * z[number])
            rows.append(assembly.objective.scores_of(examples[16 * number : 16 * number + 16]))
        scores.append(torch.cat(rows).float())
    for name, of in OBJECTIVES.items():
        for size in (4, 8, 16):
            for begin in range(0, len(examples), size):
                part = slice(begin, begin + size)
                up, down = (
                    float(of.losses(Scored(found[part], labels[part])).double().mean())
                    for found in scores
                )
                yield name, size, up - down


# Real runs


REAL = {"loss": "loss", "accuracy": "accuracy", "macro_f1": "macro_f1"}


def arms(out: Path) -> dict[str, list[str]]:
    """Settings of each real run by its name: those of the search, then the seeds."""
    common = [
        "task.name=custom",
        f"task.source={out / 'data'}",
        "task.prompt={text} It was",
        'task.verbalizers={rotten="terrible", fresh="great"}',
        "task.label=category",
        "task.validation_split=validation",
        "task.test_split=test",
        "federation.batch_size=8",
        "noise.perturbations=3",
        "optimizer.estimator=one-sided",
        f"federation.rounds={ROUNDS}",
        "evaluation.examples=1024",
        "evaluation.validation=256",
        "subspace.usual_spread=0",
        "subspace.least_rank=0",
    ]
    found = {}
    for name, objective in REAL.items():
        own = [*common, f"task.objective={objective}"]
        for factor in (1.0, 2.0, 4.0):
            rate = f"optimizer.learning_rate={factor * subspace_rate(K, 3)}"
            for seed in (SEARCHED, *REAL_SEEDS):
                found[f"{name}-{factor:g}-s{seed}"] = [*own, rate, f"seed={seed}"]
    return found


def make(out: Path, arm: str) -> None:
    directory = out / "runs" / arm
    if (directory / "summary.json").exists():
        return
    if (directory / "recipe.json").exists():
        meerkat.resume(directory)
    else:
        meerkat.run(_recipe(*arms(out)[arm]), directory)


def table(out: Path) -> None:
    print("| run | | macro F1 | accuracy | loss | validation macro F1 |")
    print("|---|---|---|---|---|---|")
    for arm in arms(out):
        if not (out / "runs" / arm / "summary.json").exists():
            continue
        with closing(Journal.open(out / "runs" / arm / "journal.sqlite")) as journal:
            for found in journal.evaluations():
                m = found.metrics
                names = ("macro_f1", "accuracy", "loss", "validation_macro_f1")
                cells = " | ".join(f"{m[name]:.3f}" for name in names)
                print(f"| {arm} | {found.round} | {cells} |")


def main() -> None:
    simple = {
        "data": write_data,
        "zeros": zeros,
        "features": make_features,
        "linear": linear_tables,
        "check": check,
        "table": table,
    }
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=[*simple, "run"])
    parser.add_argument("out", type=Path)
    parser.add_argument("arms", nargs="*", help="of `run`: names, or all")
    options = parser.parse_args()
    if options.command in simple:
        simple[options.command](options.out)
        return
    known = arms(options.out)
    for arm in known if options.arms == ["all"] else options.arms:
        if arm not in known:
            parser.error(f"{arm} is not one of {', '.join(known)}")
        make(options.out, arm)


if __name__ == "__main__":
    main()
