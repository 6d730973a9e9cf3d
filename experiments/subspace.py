"""What the aligned subspace gives: runs of the demo's recipe with some settings changed.

Each arm is a run in a directory of its own; a run that is there is not made again, one that was
interrupted goes on:

    python experiments/subspace.py runs/subspace demo/aligned-s0 demo/plain-s0
    python experiments/subspace.py runs/subspace --list
    python experiments/subspace.py runs/subspace --table
    python experiments/subspace.py runs/subspace --picture docs/subspace.png

The table has accuracy (and loss) of each evaluation, for docs/results/subspace.md.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

import meerkat
from meerkat.config import load_recipe
from meerkat.config.automatic import subspace_epsilon, subspace_rate
from meerkat.data.clients import load_partition
from meerkat.journal import Journal
from meerkat.tasks import resolve_task

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.toml"
SEEDS = (0, 1, 2)
PLAIN = ["subspace.kind=none"]
TWO_POINT = ["federation.batch_size=16", "optimizer.estimator=two-point", "noise.perturbations=1"]
BACKWARD = ["federation.batch_size=16", "optimizer.estimator=backward", "noise.perturbations=1"]
MIXED = ["optimizer.exact_clients=[0, 1]"]  # of four; the others report as the recipe says
UNASKED = ["subspace.least_rank=0", "subspace.usual_spread=0"]
"""A subspace whether it fits the clients' texts or not; the arms `-asked` do what the rules say."""
SHORT = ["federation.rounds=30", "optimizer.learning_rate=0.15", "optimizer.epsilon=0.04"]
K = 32
MODELS = {"gemma": "demo:gemma-3-270m", "smollm2": "demo:smollm2-135m"}
TASKS = (
    "rotten_tomatoes",
    "debian_sections_4",
    "debian_sections",
    "wordnet_pairs",
    "chinese_reviews",
)
FACTORS = (0.75, 1.5, 2.0)
"""On the rate and ε of Eq. 20: a search for the aligned subspace, as RATES are one for plain."""
RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4)


def _blocks(first: int, count: int = 18) -> str:
    """A recipe's list of globs: the weights of decoder blocks from one on."""
    names = (f'"model.layers.{block}.*_proj.weight"' for block in range(first, count))
    return f"[{', '.join(names)}]"


MASKS = {
    "density-1e-4": ["mask.density=1e-4"],
    "density-1e-2": ["mask.density=1e-2"],
    "magnitude": ["mask.kind=magnitude"],
    "random": ["mask.kind=random"],
    # The last blocks of 18, as many coordinates as of all with the usual density.
    "from-6": [f"mask.include={_blocks(6)}", "mask.density=1.5e-3"],
    "from-9": [f"mask.include={_blocks(9)}", "mask.density=2e-3"],
    "from-12": [f"mask.include={_blocks(12)}", "mask.density=3e-3"],
}


def arms(out: Path) -> dict[str, list[str]]:
    """Settings of each arm by its name; those that end in `-own` have B of the task's texts."""
    found = {}
    for seed in SEEDS:
        own = [f"seed={seed}", "evaluation.every=15"]
        found[f"demo/aligned-s{seed}"] = own
        found[f"demo/plain-s{seed}"] = [*PLAIN, *own]
        found[f"demo/two-point-s{seed}"] = [*TWO_POINT, *own]
        found[f"demo/backward-s{seed}"] = [*BACKWARD, "federation.rounds=15", *own]
        found[f"demo/mixed-s{seed}"] = [*MIXED, *own]
        found[f"demo/forward-mode-s{seed}"] = ["optimizer.estimator=forward-mode", *own]
        found[f"demo/loaded-s{seed}"] = ["subspace.start=loaded", *own]
        found[f"demo/random-s{seed}"] = ["subspace.kind=random", "subspace.dimensions=32", *own]
        for name, settings in MASKS.items():
            found[f"masks/{name}-s{seed}"] = [*settings, *own]
        for kept in ("int8", "int4"):
            found[f"weights/{kept}-s{seed}"] = [f"runtime.weights={kept}", *own]
    every = ["evaluation.every=30", "evaluation.examples=512"]
    for model, name in MODELS.items():
        for task in TASKS:
            for seed in SEEDS:
                pair = [f"model.name={name}", f"task.name={task}", *every, f"seed={seed}"]
                end = f"-s{seed}" if seed else ""
                aligned = [*pair, *UNASKED]
                found[f"pairs/{model}-{task}-aligned{end}"] = aligned
                found[f"pairs/{model}-{task}-model{end}"] = [*aligned, "subspace.corpus=model"]
                own = [*aligned, f"subspace.corpus={out / f'{task}.txt'}"]
                found[f"pairs/{model}-{task}-own{end}"] = own
                found[f"pairs/{model}-{task}-short-own{end}"] = [*own, *SHORT]
                found[f"pairs/{model}-{task}-asked{end}"] = pair
                for factor in FACTORS:
                    rate, epsilon = factor * subspace_rate(K, 7), factor * subspace_epsilon(K)
                    longer = [f"optimizer.learning_rate={rate}", f"optimizer.epsilon={epsilon}"]
                    found[f"pairs/{model}-{task}-times-{factor:g}{end}"] = [*aligned, *longer]
                for rate in RATES:
                    settings = [*PLAIN, f"optimizer.learning_rate={rate}", *pair]
                    found[f"pairs/{model}-{task}-plain-{rate:g}{end}"] = settings
    return found


def write_own(out: Path, task: str) -> None:
    """Texts of a task, without labels, as clients might choose to give them: 512, drawn."""
    path = out / f"{task}.txt"
    if path.exists():
        return
    recipe = load_recipe(RECIPE, [f"task.name={task}"])
    found = resolve_task(recipe.task)
    split, _ = load_partition(recipe, found)
    order = np.random.default_rng(0).permutation(len(split.train))[:512]
    rows = (split.train[place].fields for place in order)
    lines = (" ".join(" ".join(row[field] for field in found.fields).split()) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def make(out: Path, arm: str, settings: list[str]) -> None:
    directory = out / arm
    if "-own" in arm:
        write_own(out, re.sub(r"^pairs/[^-]+-|(-short)?-own.*$", "", arm))
    if (directory / "summary.json").exists():
        return
    if (directory / "recipe.json").exists():
        meerkat.resume(directory)
    else:
        meerkat.run(load_recipe(RECIPE, settings), directory)


def evaluations(directory: Path) -> dict[int, dict[str, float]]:
    """Metrics by round."""
    with closing(Journal.open(directory / "journal.sqlite")) as journal:
        return {found.round: dict(found.metrics) for found in journal.evaluations()}


def made(out: Path) -> Iterator[tuple[str, dict[int, dict[str, float]]]]:
    """The arms that are there, in the order of `arms`."""
    for arm in arms(out):
        if (out / arm / "journal.sqlite").exists():
            yield arm, evaluations(out / arm)


def table(out: Path) -> None:
    for arm, found in made(out):
        cells = [f"{r}: {m['accuracy']:.3f} ({m['loss']:.3f})" for r, m in sorted(found.items())]
        print(f"{arm:48} {'  '.join(cells)}")


def picture(out: Path, path: Path) -> None:
    """Accuracy by round of the demo, aligned and plain, mean and range over the seeds made."""
    import altair
    import pandas

    rows = [
        {"round": number, "method": label, "accuracy": 100 * metrics["accuracy"]}
        for arm, found in made(out)
        for name, label in (("aligned", "aligned subspace"), ("plain", "plain Meerkat"))
        if re.fullmatch(rf"demo/{name}-s\d", arm)
        for number, metrics in found.items()
    ]
    base = altair.Chart(pandas.DataFrame(rows)).encode(
        x=altair.X("round:Q", title="round"),
        color=altair.Color("method:N", title=None, legend=altair.Legend(orient="bottom")),
    )
    scale = altair.Scale(zero=False)
    accuracy = altair.Y("mean(accuracy):Q", title="accuracy on 768 snippets, %", scale=scale)
    line = base.mark_line(point=True).encode(y=accuracy)
    ends = base.mark_rule(strokeWidth=1).encode(y="min(accuracy):Q", y2="max(accuracy):Q")
    (line + ends).properties(width=560, height=280).save(path, scale_factor=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("arm", nargs="*", help="arms to make, in this order")
    parser.add_argument("--list", action="store_true", help="names of all arms")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    known = arms(options.out)
    for arm in options.arm:
        if arm not in known:
            parser.error(f"arm {arm!r} is none of those that --list gives")
    if options.list:
        print("\n".join(known))
    for arm in options.arm:
        make(options.out, arm, known[arm])
    if options.table:
        table(options.out)
    if options.picture:
        picture(options.out, options.picture)


if __name__ == "__main__":
    main()
