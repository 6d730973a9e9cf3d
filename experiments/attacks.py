"""What lying clients do to a run, by attack, number of liars and defence.

    python experiments/attacks.py --tiny --out runs/attacks-tiny
    python experiments/attacks.py recipes/demo.toml --out runs/attacks --set federation.clients=10 \
        --set subspace.kind=none --set federation.rounds=20 --set federation.batch_size=8 \
        --set evaluation.examples=256

Each run has the same recipe but for the defence. Liars are the last clients; they take their local
steps honestly and change what they report. Prints a line of JSON for each run, and a table at the
end; a run whose directory is complete is not made again. `--tiny` is a random Llama of two layers
that learns to tell two words apart; it needs the extra `dev`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import meerkat
from meerkat.config import Recipe, load_recipe, parse_recipe
from meerkat.engines.base import Assignment, Outcome
from meerkat.engines.local import LocalEngine
from meerkat.errors import MeerkatError
from meerkat.federation.messages import ClientReport
from meerkat.runs import local_run

Attack = Callable[[ClientReport], tuple[float, ...]]
ATTACKS: dict[str, Attack] = {
    "none": lambda r: r.scalars,
    "1e3 g": lambda r: tuple(1e3 * g for g in r.scalars),
    "-g": lambda r: tuple(-g for g in r.scalars),
    "constant": lambda r: (1e3,) * len(r.scalars),
    "random": lambda r: tuple(np.random.default_rng(r.round).normal(0, 1e3, len(r.scalars))),
}
DEFENCES: dict[str, list[str]] = {
    "mean, no clipping": ["federation.clip_factor=0"],
    "mean, clipped (default)": [],
    "median": ["federation.aggregator=median"],
    "trimmed mean, 0.3": ['federation.aggregator={kind="trimmed-mean", share=0.3}'],
}


@contextmanager
def lying(attack: str, liars: int) -> Iterator[None]:
    """Within it, the last clients of every local run change what they report."""

    class LyingEngine(LocalEngine):
        def run(self, assignment: Assignment) -> Outcome:
            outcome = super().run(assignment)
            first = len(self._clients) - liars
            reports = tuple(
                replace(r, scalars=tuple(map(float, np.float32(ATTACKS[attack](r)))))
                if r.client >= first
                else r
                for r in outcome.reports
            )
            return replace(outcome, reports=reports)

    honest, local_run.LocalEngine = local_run.LocalEngine, LyingEngine  # type: ignore[misc]
    try:
        yield
    finally:
        local_run.LocalEngine = honest  # type: ignore[misc]


def outcome_of(recipe: Recipe, directory: Path, attack: str, liars: int) -> dict[str, Any]:
    """Metrics after a run under attack, or why it ended early."""
    try:
        with lying(attack, liars):
            if directory.exists():
                summary = meerkat.resume(directory, observers=())
            else:
                summary = meerkat.run(recipe, directory, observers=())
    except MeerkatError as error:
        return {"error": str(error)[:60]}
    return dict(summary["after"])


def tiny_recipe(folder: Path) -> dict[str, Any]:
    """A recipe of ten clients with a tiny model, and what it needs, in a folder."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
    from builders import tiny_model

    loaded = tiny_model("llama")
    loaded.model.save_pretrained(folder / "model")
    loaded.tokenizer.save_pretrained(folder / "model")
    words = ("good fine great", "pos"), ("bad awful", "neg")
    lines = [
        f"the film {i} is a {words[i % 2][0]} story {'plot ' * (i % 7)},{words[i % 2][1]}"
        for i in range(600)
    ]
    (folder / "reviews.csv").write_text("\n".join(["text,label", *lines]) + "\n", "utf-8")
    return {
        "seed": 7,
        "model": {"name": str(folder / "model"), "dtype": "float32"},
        "mask": {"kind": "random", "density": 0.1},
        "task": {
            "name": "custom",
            "source": str(folder / "reviews.csv"),
            "prompt": "{text} It was",
            "verbalizers": {"neg": "terrible", "pos": "great"},
            "max_length": 64,
        },
        "federation": {"clients": 10, "rounds": 60, "local_steps": 1, "batch_size": 16},
        "optimizer": {"learning_rate": 0.03, "epsilon": 1e-3},
        "evaluation": {"examples": 100},
        "runtime": {"cache_dir": str(folder / "cache"), "threads": 1},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path, nargs="?")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], dest="changes")
    parser.add_argument("--liars", type=int, nargs="+", default=[1, 3])
    options = parser.parse_args()
    if options.tiny:
        options.out.mkdir(parents=True, exist_ok=True)
        data = tiny_recipe(options.out)
    rows = []
    for attack in ATTACKS:
        for liars in options.liars if attack != "none" else [0]:
            for defence, fields in DEFENCES.items():
                changes = [*options.changes, *fields]
                recipe = (
                    parse_recipe(data, changes)
                    if options.tiny
                    else load_recipe(options.recipe, changes)
                )
                name = f"{attack}-{liars}-{defence}".replace(" ", "_")
                found = outcome_of(recipe, options.out / name, attack, liars)
                row = {"attack": attack, "liars": liars, "defence": defence, **found}
                rows.append(row)
                print(json.dumps(row), flush=True)
    print(f"\n| attack | liars | {' | '.join(DEFENCES)} |\n|---|---|{'---|' * len(DEFENCES)}")
    for attack, liars in dict.fromkeys((row["attack"], row["liars"]) for row in rows):
        cells = [
            f"{row['accuracy']:.3f}" if "accuracy" in row else "diverged"
            for row in rows
            if (row["attack"], row["liars"]) == (attack, liars)
        ]
        print(f"| {attack} | {liars} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
