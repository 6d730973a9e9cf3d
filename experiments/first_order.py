"""What first-order Adam reaches with the same data in the same steps: the upper end of the tables.

All weights in float32; each step takes the batches of 16 that the four clients would take, and the
mean of their gradients; η falls linearly to nothing. No weight decay, no clipping. This is central
training on clients' data: no method of federation, and gigabytes of state a step.

    python experiments/first_order.py runs/first-order gemma-rotten_tomatoes gemma-debian_sections
    python experiments/first_order.py runs/first-order smollm2-rotten_tomatoes --rate 1e-5 --seed 1

Prints accuracy (and loss) before and after each 30 of 60 steps; a result that is there is printed
and not made again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from subspace import MODELS, RECIPE, TASKS

from meerkat.config import load_recipe
from meerkat.runs.assembly import Assembly, assemble
from meerkat.runs.evaluation import evaluate_objective

STEPS, BATCH = 60, 16


def train(
    model: str, task: str, rate: float, seed: int, every: int, out: Path
) -> dict[int, dict[str, float]]:
    """Metrics by number of steps."""
    path = out / f"{model}-{task}-{rate:g}-s{seed}{'' if every == 30 else f'-every-{every}'}.json"
    if path.exists():
        return {int(step): found for step, found in json.loads(path.read_text()).items()}
    settings = [
        f"model.name={MODELS[model]}",
        f"task.name={task}",
        f"seed={seed}",
        "model.dtype=float32",
        f"federation.batch_size={BATCH}",
        "evaluation.examples=512",
    ]
    found = _train(assemble(load_recipe(RECIPE, settings)), rate, every)
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))
    return found


def _train(assembly: Assembly, rate: float, every: int) -> dict[int, dict[str, float]]:
    objective, clients = assembly.objective, assembly.clients()
    parameters = list(assembly.loaded.model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    found = {}
    for step in range(STEPS + 1):
        if step % every == 0:
            measured = evaluate_objective(
                objective, assembly.test, assembly.metrics, step, assembly.progress
            )
            found[step] = dict(measured.metrics)
        if step == STEPS:
            return found
        for client in clients:
            for losses in objective.losses_with_graph(client.batch(step)):
                (losses.sum() / (BATCH * len(clients))).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    raise AssertionError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    pairs = {f"{model}-{task}": (model, task) for model in MODELS for task in TASKS}
    parser.add_argument("pair", nargs="+", choices=sorted(pairs))
    parser.add_argument("--rate", type=float, default=2e-5, help="η (2e-5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=30, help="steps between evaluations (30)")
    options = parser.parse_args()
    for pair in options.pair:
        found = train(*pairs[pair], options.rate, options.seed, options.every, options.out)
        cells = [f"{s}: {m['accuracy']:.3f} ({m['loss']:.3f})" for s, m in sorted(found.items())]
        print(f"{pair:32} η {options.rate:g}  seed {options.seed}  {'  '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
