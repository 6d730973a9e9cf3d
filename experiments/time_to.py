"""How long the demo takes to an accuracy of 0.80, by method, first order included.

    python experiments/time_to.py steps runs/time-to all     # how many steps each arm needs
    python experiments/time_to.py seconds runs/time-to all   # of a step, arms in turn; a table

A step takes a batch of each of the four clients. Its number is the first of the evaluations, on 384
held-out snippets, with 0.80 or more; rounds in a subspace are evaluated after each `every`. Adam
takes the mean of the clients' gradients at a constant η: central training on their data, which is
no federated method. LoRA needs `pip install peft`. Both commands can be called arm by arm, and keep
what they found; seconds are of this machine, with nothing else running.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import meerkat
from meerkat.benchmarks.machine import describe, seconds
from meerkat.config import load_recipe
from meerkat.federation.messages import RoundPlan
from meerkat.journal import Journal
from meerkat.journal.records import Evaluated
from meerkat.runs import finding_mask, finding_subspace
from meerkat.runs.assembly import Assembly, assemble
from meerkat.runs.evaluation import evaluate_objective
from meerkat.runs.events import RunObserver
from meerkat.zo.axes import Along

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.toml"
AIM, REPEATS = 0.80, 2
EXAMPLES = ["evaluation.examples=384"]
BACKWARD = ["federation.batch_size=16", "optimizer.estimator=backward", "noise.perturbations=1"]
OURS: dict[str, tuple[int, list[str]]] = {
    "plain": (15, ["subspace.kind=none"]),
    "aligned, passes one by one": (3, ["runtime.tokens_together=0"]),
    "aligned": (3, []),
    "aligned, int8": (3, ["runtime.weights=int8"]),
    "aligned, exact gradients": (1, [*BACKWARD, "federation.rounds=15"]),
}
"""Rounds between evaluations, and settings. One by one a run takes the rounds of `aligned`."""


@dataclass(frozen=True)
class FirstOrder:
    """Adam over all weights, or over LoRA factors."""

    rate: float
    batch: int
    rank: int = 0
    every: int = 2
    most: int = 24
    """Steps."""


FIRST = {
    f"{'LoRA-' if rank else ''}Adam, η {rate:g}, {batch} examples a client": FirstOrder(
        rate, batch, rank
    )
    for rank, rates in ((0, (2e-5, 5e-5)), (8, (1e-3, 3e-3)))
    for rate in rates
    for batch in (4, 16)
}


class _Until(RunObserver):
    """Ends a run where an evaluation reaches the aim."""

    def evaluated(self, found: Evaluated) -> None:
        if found.metrics["accuracy"] >= AIM:
            raise KeyboardInterrupt


def steps_of_ours(arm: str, out: Path) -> dict[int, float]:
    every, settings = OURS[arm]
    directory = _path(out, "run", arm).with_suffix("")
    recipe = load_recipe(RECIPE, [*EXAMPLES, f"evaluation.every={every}", *settings])
    shutil.rmtree(directory, ignore_errors=True)
    with suppress(KeyboardInterrupt):
        meerkat.run(recipe, directory, observers=[_Until()])
    with closing(Journal.open(directory / "journal.sqlite")) as journal:
        return {found.round: found.metrics["accuracy"] for found in journal.evaluations()}


def first_order(arm: FirstOrder) -> tuple[Assembly, Callable[[int], None]]:
    """A model with its data, and what takes a step."""
    settings = [*EXAMPLES, "model.dtype=float32", f"federation.batch_size={arm.batch}"]
    found = assemble(load_recipe(RECIPE, settings))
    model, clients, objective = found.loaded.model, found.clients(), found.objective
    if arm.rank:
        from peft import LoraConfig, inject_adapter_in_model

        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = LoraConfig(r=arm.rank, lora_alpha=2 * arm.rank, target_modules=names)
        inject_adapter_in_model(config, model)
        parameters = [p for name, p in model.named_parameters() if "lora_" in name]
    else:
        parameters = list(model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=arm.rate, weight_decay=0.0)

    def step(number: int) -> None:
        for client in clients:
            for losses in objective.losses_with_graph(client.batch(number)):
                (losses.sum() / (arm.batch * len(clients))).backward()
        optimizer.step()
        optimizer.zero_grad()

    return found, step


def steps_of_first_order(arm: FirstOrder) -> dict[int, float]:
    assembly, step = first_order(arm)
    found = {}
    for number in range(arm.most + 1):
        if number % arm.every == 0:
            measured = evaluate_objective(assembly.objective, assembly.test, assembly.metrics)
            found[number] = measured.metrics["accuracy"]
            if found[number] >= AIM:
                break
        step(number)
    return found


def stepper(arm: str) -> Callable[[int], None]:
    """What takes a step of an arm, without what surrounds it."""
    if arm in FIRST:
        return first_order(FIRST[arm])[1]
    recipe = load_recipe(RECIPE, [*EXAMPLES, *OURS[arm][1]])
    found = assemble(recipe)
    worker, clients = found.worker(), found.clients()
    along: Along = "axes" if recipe.optimizer.estimator.kind == "backward" else "drawn"

    def step(number: int) -> None:
        for client in clients:
            client.answer(RoundPlan(0, 1, 1e-9, number, 0, (), along), worker)

    return step


def preparing() -> float:
    """Seconds to make mask and subspace anew, with the model loaded."""
    found = assemble(load_recipe(RECIPE, EXAMPLES))
    with ExitStack() as patches:
        for module in (finding_mask, finding_subspace):
            patches.enter_context(patch.object(module, "read_cached", lambda *_: None))
        return seconds(lambda: found.found_mask)


def _path(out: Path, kind: str, arm: str) -> Path:
    """A file for each arm, so that several can be made side by side."""
    return out / kind / f"{re.sub('[^a-z0-9]+', '-', arm.lower())}.json"


def _kept(out: Path, kind: str, arm: str) -> Any:
    path = _path(out, kind, arm)
    return json.loads(path.read_text()) if path.exists() else None


def _keep(out: Path, kind: str, arm: str, value: Any) -> None:
    path = _path(out, kind, arm)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def measure_steps(out: Path, arms: list[str]) -> None:
    for arm in arms:
        if _kept(out, "steps", arm) or arm == "aligned, passes one by one":
            continue
        found = steps_of_ours(arm, out) if arm in OURS else steps_of_first_order(FIRST[arm])
        _keep(out, "steps", arm, found)
        print(arm, {step: round(value, 3) for step, value in found.items()}, flush=True)


def measure_seconds(out: Path, arms: list[str]) -> None:
    """Arms in turn, each loaded anew: all at a time are too many for the memory."""
    if _kept(out, "seconds", "preparing") is None:
        _keep(out, "seconds", "preparing", [preparing()])
    for turn in range(REPEATS):
        for arm in arms:
            taken = _kept(out, "seconds", arm) or []
            if len(taken) > turn:
                continue
            _keep(out, "seconds", arm, [*taken, _seconds(stepper(arm))])


def _seconds(step: Callable[[int], None]) -> float:
    step(0)
    return statistics.median(seconds(partial(step, number)) for number in (1, 2, 3))


def table(out: Path) -> None:
    (prepared,) = _kept(out, "seconds", "preparing")
    print(f"{describe()}\nmask and subspace: {prepared:.0f} s\n")
    print("| method | steps | seconds a step | seconds |\n|---|---|---|---|")
    for arm in [*OURS, *FIRST]:
        found = _kept(out, "steps", "aligned" if arm == "aligned, passes one by one" else arm)
        taken = _kept(out, "seconds", arm)
        if found is None or taken is None:
            continue
        last, best = list(found.items())[-1]
        each = statistics.median(taken)
        reached = best >= AIM
        count = last if reached else f"{last}: {best:.3f}"
        total = f"{int(last) * each:.0f}" if reached else f"more than {int(last) * each:.0f}"
        print(f"| {arm} | {count} | {each:.2f} | {total} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["steps", "seconds", "table"])
    parser.add_argument("out", type=Path)
    parser.add_argument("arm", nargs="*", help="`all`, or names")
    options = parser.parse_args()
    known = [*OURS, *FIRST]
    arms = known if options.arm == ["all"] else options.arm
    if unknown := set(arms) - set(known):
        parser.error(f"{', '.join(sorted(unknown))}: known are {'; '.join(known)}")
    if options.what == "steps":
        measure_steps(options.out, arms)
    elif options.what == "seconds":
        measure_seconds(options.out, arms)
    if options.what != "steps":
        table(options.out)


if __name__ == "__main__":
    main()
