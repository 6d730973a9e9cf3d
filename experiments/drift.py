"""Does a subspace that is made again in mid-run help: where data drift, and where nothing does.

Drift: 8 sections of the Debian index are the answers. Until the middle of the run clients have
descriptions of packages of the first four, from then on of the other four, on which all
evaluations are. Each client reports exact gradients. Arms, each over three seeds:

- `films-kept`, `films-renewed`: B from the demo's public texts, once, or again in the middle;
- `given-kept`, `given-renewed`: B from descriptions that clients gave without labels, of the first
  four sections; made again in the middle from those of the other four.

Nothing drifts: film reviews, B made once (`same-kept`) or again every five rounds
(`same-renewed`).

A run that is there is not made again, one that was interrupted goes on:

    python experiments/drift.py runs/drift films-kept-s0 given-renewed-s0
    python experiments/drift.py runs/drift --all
    python experiments/drift.py runs/drift --table
"""

from __future__ import annotations

import argparse
import functools
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import meerkat
from meerkat.config import Recipe, load_recipe
from meerkat.data.batch_order import batch_indices
from meerkat.federation.client import Client
from meerkat.journal import Journal
from meerkat.runs import local_run
from meerkat.runs.assembly import Assembly, EncodedExamples, assemble
from meerkat.runs.finding_subspace import renewed_subspace

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.toml"
ROUNDS, SEEDS, FIRST, GIVEN = 30, (0, 1, 2), 4, 400
COMMON = [
    "model.name=demo:smollm2-135m",
    "model.dtype=float32",
    "federation.batch_size=16",
    "optimizer.estimator=backward",
    "noise.perturbations=1",
    f"federation.rounds={ROUNDS}",
    "evaluation.every=5",
    "evaluation.examples=256",
]
DRIFTS = ["task.name=debian_sections", "federation.partition.min_size=32"]


def arms(out: Path) -> dict[str, list[str]]:
    """Settings of each arm by its name."""
    found = {}
    for seed in SEEDS:
        own = [*COMMON, f"seed={seed}"]
        renewed = f"subspace.renew_every={ROUNDS // 2}"
        given = f"subspace.corpus={out / 'before.txt'}"
        found[f"films-kept-s{seed}"] = [*own, *DRIFTS]
        found[f"films-renewed-s{seed}"] = [*own, *DRIFTS, renewed]
        found[f"given-kept-s{seed}"] = [*own, *DRIFTS, given]
        found[f"given-renewed-s{seed}"] = [*own, *DRIFTS, given, renewed]
        found[f"same-kept-s{seed}"] = own
        found[f"same-renewed-s{seed}"] = [*own, "subspace.renew_every=5"]
    return found


@dataclass(frozen=True)
class DriftingClient(Client):
    """A client whose examples are others from the middle of the run on."""

    later: Sequence[Any] = ()

    def batch(self, step: int) -> list[Any]:
        held = self.examples if step < ROUNDS // 2 else self.later
        return [
            held[place]
            for place in batch_indices(self.seed, self.number, len(held), self.batch_size, step)
        ]


class Drifting(Assembly):
    """The first sections until the middle of the run, the others from then on and held out."""

    def clients(self) -> list[Client]:
        return [self._client(number, part) for number, part in enumerate(self.parts)]

    def _client(self, number: int, part: tuple[int, ...]) -> Client:
        held = [self.split.train[place] for place in part]
        parts = (
            EncodedExamples([e for e in held if (e.label < FIRST) == early], self.encoder)
            for early in (True, False)
        )
        federation = self.recipe.federation
        return DriftingClient(
            number, next(parts), federation.batch_size, self.recipe.seed, next(parts)
        )


def drifting(recipe: Recipe, *arguments: Any, **others: Any) -> Assembly:
    """As `assemble`, of data that drift."""
    found = assemble(recipe, *arguments, **others)
    later = [example for example in found.split.test if example.label >= FIRST]
    split = replace(found.split, test=later)
    parts = (found.recipe, found.loaded, found.task, split, found.parts, found.progress)
    return Drifting(*parts, found.mask_file)


def write_given(out: Path) -> None:
    """Descriptions that clients give without labels, before the drift and after it."""
    from meerkat.data.clients import load_partition
    from meerkat.tasks import resolve_task

    recipe = load_recipe(RECIPE, [*COMMON, *DRIFTS])
    split, _ = load_partition(recipe, resolve_task(recipe.task))
    for name, early in (("before", True), ("after", False)):
        texts = [e.fields["text"] for e in split.train if (e.label < FIRST) == early]
        order = np.random.default_rng(0).permutation(len(texts))
        out.mkdir(parents=True, exist_ok=True)
        lines = "\n\n".join(texts[place] for place in order[: 2 * GIVEN])
        (out / f"{name}.txt").write_text(lines, "utf-8")


def make(out: Path, arm: str, settings: list[str]) -> None:
    directory = out / arm
    if (directory / "summary.json").exists():
        return
    if not arm.startswith("same"):
        local_run.assemble = drifting
        corpus = str(out / "after.txt") if arm.startswith("given") else None
        local_run.renewed_subspace = functools.partial(renewed_subspace, corpus=corpus)
    else:
        local_run.assemble, local_run.renewed_subspace = assemble, renewed_subspace
    if (directory / "recipe.json").exists():
        meerkat.resume(directory, observers=())
    else:
        meerkat.run(load_recipe(RECIPE, settings), directory, observers=())
    print(arm, "is made", flush=True)


def table(out: Path) -> None:
    """Mean and standard deviation over the seeds that are there."""
    found: dict[str, list[dict[int, tuple[float, float]]]] = defaultdict(list)
    for arm in arms(out):
        if (out / arm / "summary.json").exists():
            with closing(Journal.open(out / arm / "journal.sqlite")) as journal:
                found[arm[:-3]].append(
                    {
                        e.round: (e.metrics["accuracy"], e.metrics["loss"])
                        for e in journal.evaluations()
                    }
                )
    for arm, runs in found.items():
        cells = []
        for mark in sorted(runs[0]):
            accuracy, loss = np.array([run[mark] for run in runs]).T
            cells.append(
                f"{mark}: {accuracy.mean():.3f} ± {accuracy.std():.3f} ({loss.mean():.3f})"
            )
        print(f"{arm:16} {len(runs)} seeds  {'  '.join(cells)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("arm", nargs="*", help="arms to make, in this order")
    parser.add_argument("--all", action="store_true", help="make all arms, seed by seed")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    out = options.out.absolute()
    known = arms(out)
    for arm in options.arm:
        if arm not in known:
            parser.error(f"arm {arm!r} is none of {', '.join(known)}")
    if options.arm or options.all:
        write_given(out)
    for arm in known if options.all else options.arm:
        make(out, arm, known[arm])
    if options.table:
        table(out)


if __name__ == "__main__":
    main()
