"""Simulate the calibration phase of pools of clients, client by client, into JSON files.

One pool a seed: eight clients that share the data as `--others` says, and three that hold a
single label. Since z is shared and every client starts at the initial θ, any eight of them are a
federation of their own; `detection.py` composes them. A file that is there is not made again, and
two processes may share the work:

    python experiments/trajectories.py runs/vp --shard 0/2 &
    python experiments/trajectories.py runs/vp --shard 1/2
    python experiments/trajectories.py runs/vp --pack experiments/calibrations.json

The last line puts all of them into the one file that the other scripts read.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from meerkat.config import load_recipe
from meerkat.federation.messages import CALIBRATION, RoundPlan
from meerkat.runs.assembly import assemble

RECIPE = Path(__file__).parents[1] / "recipes" / "meerkat-vp.toml"
OTHERS, EXTREME = 8, 3


def collect(
    out: Path, others: str, seed: int, steps: int, wanted: list[int], changes: list[str]
) -> None:
    """Write `out/OTHERS-SEED-CLIENT.json` for the clients of this pool that lack one."""
    names = {k: "extreme" if k >= OTHERS else others for k in wanted}
    lacking = {
        k: path for k in wanted if not (path := out / f"{names[k]}-{seed}-{k}.json").exists()
    }
    if not lacking:
        return
    recipe = load_recipe(
        RECIPE,
        [
            *changes,
            f"seed={seed}",
            f"federation.clients={OTHERS + EXTREME}",
            f"federation.partition.kind={others}",
            f"federation.partition.extreme={EXTREME}",
            "runtime.threads=1",
        ],
    )
    assembly = assemble(recipe)
    worker, clients = assembly.worker(), assembly.clients()
    gradient = assembly.found_mask.mask.gradient.astype(np.float64)
    counts = assembly.header().label_counts
    plan = RoundPlan(CALIBRATION, steps, recipe.optimizer.learning_rate, 0, 0)
    for number, path in lacking.items():
        started = time.monotonic()
        taken = [(step.scalars[0], step.loss) for step in clients[number].local_steps(plan, worker)]
        stream = worker.algorithm.stream
        drawn = [stream.z(stream.keys(CALIBRATION, step, number)[0]) for step in range(steps)]
        content = {
            "labels": counts[number],
            "scalars": [scalar for scalar, _ in taken],
            "losses": [loss for _, loss in taken],
            "alignments": [float(gradient @ z) for z in drawn],
            "norms": [float(np.linalg.norm(z.astype(np.float64))) for z in drawn],
            "gradient_norm": float(np.linalg.norm(gradient)),
            "seconds": time.monotonic() - started,
        }
        path.write_text(json.dumps(content))
        print(f"{path.name}: {content['seconds']:.0f} s", flush=True)


def pack(out: Path, target: Path) -> None:
    """All files of a folder in one, with what clients of a seed share kept once."""
    clients, seeds = {}, {}
    for path in sorted(out.glob("*-*-*.json")):
        content = json.loads(path.read_text())
        clients[path.stem] = {
            "labels": content["labels"],
            "scalars": [round(scalar, 4) for scalar in content["scalars"]],
        }
        seeds[path.stem.split("-")[1]] = {
            "gradient_norm": round(content["gradient_norm"], 3),
            **{key: [round(value, 3) for value in content[key]] for key in ("alignments", "norms")},
        }
    target.write_text(json.dumps({"seeds": seeds, "clients": clients}, indent=None) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--others", nargs="+", default=["iid", "dirichlet"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--shard", default="0/1", help="this process and how many there are")
    parser.add_argument("--set", action="append", default=[], help="section.field=value")
    parser.add_argument("--pack", type=Path, help="only gather what is there into this file")
    options = parser.parse_args()
    if options.pack:
        pack(options.out, options.pack)
        return
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    shard, shards = map(int, options.shard.split("/"))
    for others in options.others:
        for seed in options.seeds:
            numbers = range(OTHERS + EXTREME)
            wanted = [k for k in numbers if (k + seed) % shards == shard]
            collect(options.out, others, seed, options.steps, wanted, options.set)


if __name__ == "__main__":
    main()
