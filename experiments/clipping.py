"""What the server's clipping of |g| costs a run without liars, from recorded scalars.

Federations of eight clients from each pool of `calibrations.json`: eight alike, or five and three
extreme ones. Each of the hundred recorded steps is a round of one local step. Prints, for each
factor, the share of scalars that are clipped and the largest change of a seed's path of means,
|Σ_t (clipped - free)| against Σ_t |free|.

    python experiments/clipping.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from detection import CLIENTS, EXTREME, RECORDED, pools

from meerkat.federation.rounds import WINDOW


def clipped(scalars: np.ndarray, factor: float) -> np.ndarray:
    """Scalars [client][round] after the server's clipping, as `federation.rounds` does it."""
    usual = np.median(np.abs(scalars), axis=0)
    running = [np.median(usual[max(0, r + 1 - WINDOW) : r + 1]) for r in range(len(usual))]
    bound = factor * np.maximum(usual, running)
    return np.clip(scalars, -bound, bound)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--factors", type=float, nargs="+", default=[3, 5, 10, 20])
    parser.add_argument("--recorded", type=Path, default=RECORDED)
    options = parser.parse_args()
    print("| clients | factor | clipped | change of the mean |\n|---|---|---|---|")
    for others in ("iid", "dirichlet"):
        for name, chosen in (
            (others, range(CLIENTS)),
            (f"{others}, three extreme", range(EXTREME, CLIENTS + EXTREME)),
        ):
            for factor in options.factors:
                shares, changes = [], []
                for pool in pools(options.recorded, others).values():
                    scalars = np.array([pool[k].scalars for k in chosen])
                    bounded = clipped(scalars, factor)
                    free = scalars.mean(axis=0)
                    shares.append(np.mean(bounded != scalars))
                    change = np.abs((bounded.mean(axis=0) - free).sum())
                    changes.append(change / np.abs(free).sum())
                print(
                    f"| {name} | {factor:g} | {100 * np.mean(shares):.2f} % | "
                    f"{100 * max(changes):.2f} % |"
                )


if __name__ == "__main__":
    main()
