"""What first-order steps reach on the recipe for images, as a bound for Meerkat's runs of it.

    python experiments/vision.py OUT [--place masked|all] [--rounds N] [--rate η] [--set F=V]

Adam over the clients' batches of each round together, on the recipe's data, batches and mask.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from meerkat.comparison.first_order import run_first_order
from meerkat.comparison.results import FirstOrder
from meerkat.config import load_recipe

RECIPE = Path(__file__).parent.parent / "recipes" / "vision.toml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--place", choices=("masked", "all"), default="masked")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--set", action="append", default=[])
    given = parser.parse_args()
    changes = [
        "subspace.kind=none",
        "federation.batch_size=16",
        f"federation.rounds={given.rounds}",
        f"optimizer.learning_rate={given.rate}",
        *given.set,
    ]
    method = FirstOrder("central", given.place, "adam")
    result = run_first_order(load_recipe(RECIPE, changes), method, given.out)
    for point in result.points:
        print(point)


if __name__ == "__main__":
    main()
