"""Does early stopping help: Meerkat, Meerkat-vp, a random set and the true set stopped.

Eight clients, three of a single label. Each arm is a run of its own, in a directory of its own;
a run that is there is not made again. Two processes may share the work:

    python experiments/arms.py runs/arms --shard 0/2 &
    python experiments/arms.py runs/arms --shard 1/2
    python experiments/arms.py runs/arms --table

The table is followed by what the journals of the runs without stopping say of the reasons: who
holds what, whether the extreme clients pull the way that the others go, and how far a client's
path ends from the mean one, by the length of the mean one.

The calibration depends on neither T nor what follows, so Meerkat-vp calibrates in the runs of
T = 10 alone. Where it stops the clients that the oracle stops, the two runs are the same bit for
bit (`tests/integration/test_early_stopping.py`), and one of them stands for both.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

import meerkat
from meerkat.config import parse_recipe
from meerkat.federation.schedule import Schedule
from meerkat.federation.selection import decide_by_paths
from meerkat.journal import Journal
from meerkat.runs.trajectories import round_signals

RECIPE = Path(__file__).parents[1] / "recipes" / "meerkat-vp.toml"
TRUTH = [5, 6, 7]
ARMS = {
    "none": ["selection.kind=none"],
    "random": ["selection.kind=random", f"selection.count={len(TRUTH)}"],
    "oracle": ["selection.kind=list", f"selection.clients={TRUTH}"],
    "vp": ["selection.kind=gradip"],
}
ROUNDS = {10: 8, 30: 3}
RATES = (1e-5, 2e-5)

Run = tuple[str, int, int, float]
"""Arm, T, seed, η."""


def plan() -> list[Run]:
    """All runs, the ones that matter most first."""
    runs: list[Run] = []
    for seed in (0, 1, 2):
        runs += [(arm, 10, seed, RATES[0]) for arm in ("vp", "none", "random")]
        runs += [(arm, 30, seed, RATES[0]) for arm in ("none", "oracle", "random")]
        if seed == 0:
            runs += [(arm, 10, 0, RATES[1]) for arm in ("none", "oracle", "random")]
    return runs


def folder(out: Path, run: Run) -> Path:
    arm, steps, seed, rate = run
    return out / f"{arm}-T{steps}-seed{seed}-eta{rate:g}"


def make(out: Path, run: Run) -> None:
    arm, steps, seed, rate = run
    directory = folder(out, run)
    if (directory / "summary.json").exists():
        return
    if directory.exists():
        summary = meerkat.resume(directory)
    else:
        changes = [
            *ARMS[arm],
            f"seed={seed}",
            f"federation.local_steps={steps}",
            f"federation.rounds={ROUNDS[steps]}",
            "federation.batch_size=4",
            f"optimizer.learning_rate={rate}",
            "evaluation.examples=512",
            "runtime.threads=1",
        ]
        summary = meerkat.run(RECIPE, directory, changes)
    print(f"{directory.name}: {summary['after']['accuracy']:.3f}", flush=True)


def table(out: Path) -> None:
    found = {
        run: json.loads((folder(out, run) / "summary.json").read_text())
        for run in plan()
        if (folder(out, run) / "summary.json").exists()
    }
    for seed in (0, 1, 2):
        vp = found.get(("vp", 10, seed, RATES[0]))
        if vp is None:
            continue
        print(f"seed {seed}: Meerkat-vp stopped {vp['stopped_early']}")
    rows: dict[tuple[int, float, str], list[tuple[float, float]]] = defaultdict(list)
    for (arm, steps, _, rate), summary in found.items():
        after = summary["after"]
        rows[steps, rate, arm].append((after["accuracy"], after["loss"]))
    print("\n| T | η | arm | seeds | accuracy | loss |\n|---|---|---|---|---|---|")
    for (steps, rate, arm), values in sorted(rows.items()):
        cells = " | ".join(map(_spread, zip(*values, strict=True)))
        print(f"| {steps} | {rate:g} | {arm} | {len(values)} | {cells} |")


def _spread(values: tuple[float, ...]) -> str:
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.3f}"


def unstopped(out: Path) -> Iterator[tuple[Run, Path]]:
    """The journals of the runs in which nobody was stopped."""
    for run in plan():
        path = folder(out, run) / "journal.sqlite"
        if run[0] == "none" and Journal.exists(path):
            yield run, path


def reasons(out: Path) -> None:
    """From the scalars alone: ‖θ_k - θ_l‖² is about η² n Σ (g_k - g_l)², since z is shared."""
    print(
        "\n| T | seed | η | rotten share of the five | correlation of the three's mean g with the "
        "five's | drift² / step² of the five | of the three |\n|---|---|---|---|---|---|---|"
    )
    for (_, steps, seed, rate), path in unstopped(out):
        with closing(Journal.open(path)) as journal:
            scalars = np.array([[r.scalars for r in rec.reports] for rec, _ in journal.records()])
            labels = np.array(journal.header.label_counts)
        five, three = scalars[:, :5].mean(axis=1), scalars[:, 5:].mean(axis=1)
        mean = scalars.mean(axis=1, keepdims=True)
        step = (mean**2).sum(axis=2).mean()
        drift = ((scalars - mean) ** 2).sum(axis=2).mean(axis=0) / step
        share = labels[:5, 0].sum() / labels[:5].sum()
        together = np.corrcoef(five.ravel(), three.ravel())[0, 1]
        print(
            f"| {steps} | {seed} | {rate:g} | {share:.2f} | {together:+.2f} | "
            f"{drift[:5].mean():.1f} | {drift[5:].mean():.1f} |"
        )


def repeated(out: Path) -> None:
    """What a repeated selection at the end of the runs without stopping would decide."""
    print(
        "\n| T | seed | η | steps | ρ_later of the five | of the three | caught above | caught | "
        "released below | would stay stopped |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    for (_, steps, seed, rate), path in unstopped(out):
        with closing(Journal.open(path)) as journal:
            content, rounds = json.loads(journal.header.recipe), journal.rounds
            content["selection"] |= {"kind": "gradip", "every": rounds}
            recipe = parse_recipe(content)
            signals = round_signals(journal, Schedule.of(recipe), None, rounds)
        judged = recipe.selection, recipe.federation.local_steps, rounds, "rounds", signals
        free, held = decide_by_paths(*judged), decide_by_paths(*judged, TRUTH)
        falls = [f"{verdict.rho_later:.2f}" for verdict in free.verdicts]
        print(
            f"| {steps} | {seed} | {rate:g} | {len(signals[0])} | {', '.join(falls[:5])} | "
            f"{', '.join(falls[5:])} | {free.thresholds.later:.2f} | {list(free.flagged)} | "
            f"{held.thresholds.release:.2f} | {list(held.flagged)} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--shard", default="0/1", help="this process and how many there are")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    if options.table:
        table(options.out)
        reasons(options.out)
        repeated(options.out)
        return
    shard, shards = map(int, options.shard.split("/"))
    for number, run in enumerate(plan()):
        if number % shards == shard:
            make(options.out, run)


if __name__ == "__main__":
    main()
