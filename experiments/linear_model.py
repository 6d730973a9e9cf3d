"""The demo as a model that is linear in w: milliseconds a run, to see what is worth a real one.

    python experiments/linear_model.py features runs/linear       # gradients: an hour, once
    python experiments/linear_model.py table texts runs/linear    # one table
    python experiments/linear_model.py table all runs/linear
    python experiments/linear_model.py features runs/chinese --small --set task.name=chinese_reviews
    python experiments/linear_model.py table language runs/chinese
    python experiments/linear_model.py features runs/plain --plain
    python experiments/linear_model.py table stopping runs/plain  # or frequency

The tables are in docs/results/subspace.md. It is no run of the method: no model is asked once the
gradients at the initial weights are there. Each line has mean and standard deviation of the
accuracy on the held-out examples over six seeds (partition, directions, order of the data) and the
mean loss, after 15, 30 and 60 local steps. Reading order: `linear/features.py`, `world.py`,
`directions.py`, `training.py`, then the tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from linear import (
    tables_federation,
    tables_plain,
    tables_reach,
    tables_steps,
    tables_subspace,
    tables_texts,
)
from linear.features import FULL, SMALL, make_features, make_plain_features

MODULES = (tables_texts, tables_subspace, tables_steps, tables_federation, tables_reach)
APART = (tables_plain,)
"""Tables over gradients of their own (`features DIR --plain`), in another folder."""
TABLES: dict[str, Callable[[Path], None]] = {
    name: show for module in (*MODULES, *APART) for name, show in module.TABLES.items()
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    features = commands.add_parser("features")
    features.add_argument("out", type=Path)
    features.add_argument("--plain", action="store_true", help="held-out and pool alone")
    features.add_argument("--small", action="store_true", help="a third of the examples")
    features.add_argument("--set", action="append", default=[], dest="changes")
    table = commands.add_parser("table")
    table.add_argument("name", choices=["all", *TABLES])
    table.add_argument("out", type=Path)
    options = parser.parse_args()
    if options.command == "features":
        if options.plain:
            make_plain_features(options.out, options.changes)
            return
        make_features(options.out, options.changes, SMALL if options.small else FULL)
        return
    every = [name for module in MODULES for name in module.TABLES]
    for name in every if options.name == "all" else (options.name,):
        print(f"## {name}: {(TABLES[name].__doc__ or '').strip()}", flush=True)
        TABLES[name](options.out)


if __name__ == "__main__":
    main()
