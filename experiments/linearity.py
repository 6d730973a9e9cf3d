"""How far a run's scores stay linear in w: those of the model beside d + s · w.

Of a run with two answers in an aligned subspace: slopes and scores of held-out examples at w = 0,
then for each of some rounds the loss, mean and spread of the linear and of the real scores, and
their correlation.

    python experiments/linearity.py runs/subspace/pairs/gemma-chinese_reviews-own 0 1 2 5 10 30
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

import meerkat
from meerkat.runs.assembly import assemble
from meerkat.runs.directory import mask_path, recipe_of
from meerkat.runs.finding_subspace import slopes_along
from meerkat.runs.fit import effective_rank

EXAMPLES, TOGETHER = 64, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("rounds", type=int, nargs="+")
    options = parser.parse_args()
    recipe = recipe_of(options.run)
    found = assemble(recipe, mask_file=mask_path(options.run))
    assert recipe.subspace is not None, "a run in a subspace"
    held = list(found.test[:EXAMPLES])
    labels = np.array([example.label for example in held])
    slopes = slopes_along(found, found.found_mask.mask, recipe.subspace, held)
    space = found.worker().space

    @torch.inference_mode()
    def scores(w: np.ndarray) -> np.ndarray:
        space.write(w.astype(np.float32))
        parts = (held[begin : begin + TOGETHER] for begin in range(0, len(held), TOGETHER))
        batches = (batch for part in parts for batch in found.objective.packs(part))
        both = torch.cat([found.objective.scores(batch) for batch in batches]).double().numpy()
        return np.asarray(both[:, 1] - both[:, 0])

    def about(values: np.ndarray) -> str:
        loss = np.logaddexp(0, np.where(labels > 0, -values, values)).mean()
        return f"loss {loss:.3f}, mean {values.mean():+.2f}, spread {values.std():.2f}"

    initial = scores(np.zeros(space.size))
    print(f"rank {effective_rank(slopes):.1f}, spread at w = 0 {initial.std():.2f}")
    for number in options.rounds:
        w = meerkat.replay(options.run, number).theta.astype(float)
        linear, real = initial + slopes @ w, scores(w)
        correlation = np.corrcoef(linear, real)[0, 1]
        print(
            f"round {number}: |w| {np.linalg.norm(w):.2f}; linear: {about(linear)}; "
            f"real: {about(real)}; correlation {correlation:.2f}",
            flush=True,
        )
    space.restore()


if __name__ == "__main__":
    main()
