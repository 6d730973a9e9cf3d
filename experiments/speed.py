"""What a step costs, and how that grows: the tables of docs/results/speed.md.

    python experiments/speed.py together    # passes of a step one by one, and as one
    python experiments/speed.py shares      # what S x takes of W x, by mask
    python experiments/speed.py tokens      # a forward pass, by its tokens
    python experiments/speed.py values      # noise, update and writing, by n
    python experiments/speed.py dimensions  # θ_0 + B w, by k
    python experiments/speed.py steps       # of several methods, in one process
    python experiments/speed.py weights     # in 16, 8 and 4 bits: memory, time, accuracy
    python experiments/speed.py kernels     # ways to multiply with int8 weights
    python experiments/speed.py clients     # up to 1,000 in one process, and on Ray

Seconds are medians of passes in turn (A B A B) in one process with nothing else running; memory is
measured in a process for each row. Mask and subspace are the demo's own, which `meerkat calibrate
recipes/demo.toml` makes and keeps.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear

import meerkat
from meerkat.benchmarks.machine import (
    describe,
    interleaved,
    peak_bytes,
    reset_peak,
    resident_bytes,
    seconds,
)
from meerkat.benchmarks.step import demo_examples
from meerkat.config import MaskSection, Recipe, load_recipe
from meerkat.federation.client import Client, Worker
from meerkat.federation.messages import RoundPlan
from meerkat.federation.rounds import RoundRecord
from meerkat.journal.records import RoundMetrics
from meerkat.models.quantised import QuantisedWeight
from meerkat.runs.assembly import Assembly, assemble
from meerkat.runs.evaluation import evaluate_objective
from meerkat.runs.events import RunObserver
from meerkat.spaces.device_noise import draw_on
from meerkat.spaces.mask_criteria import random_mask
from meerkat.spaces.masked import MaskedSpace
from meerkat.spaces.overlay import Overlay
from meerkat.spaces.subspace import combined
from meerkat.zo.axes import Along
from meerkat.zo.noise import NoiseKey, draw

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.toml"
KINDS = {
    "one-sided, 7 directions of 4": [],
    "one-sided, 3 directions of 8": ["noise.perturbations=3", "federation.batch_size=8"],
    "two-point, 16 examples": [
        "optimizer.estimator=two-point",
        "noise.perturbations=1",
        "federation.batch_size=16",
    ],
    "plain, two-point, 16 examples": ["subspace.kind=none"],
}
APART, TOGETHER = "runtime.tokens_together=0", "runtime.tokens_together=1024"
STEPS, REPEATS = 6, 5


def recipe_of(*settings: str) -> Recipe:
    return load_recipe(RECIPE, list(settings))


def stepper(found: Assembly, worker: Worker) -> Callable[[], float]:
    """A step of the first client, on a batch that differs from call to call."""
    client, step = found.client(0), [0]
    along: Along = "axes" if found.recipe.optimizer.estimator.kind == "backward" else "drawn"

    def one() -> float:
        step[0] = step[0] % STEPS + 1
        plan = RoundPlan(0, 1, 1e-3, step[0], 0, (), along)
        client.batch(step[0])  # encoded before it is measured
        return seconds(lambda: client.answer(plan, worker))

    return one


def together() -> None:
    """Both ways in turn on one model; the memory of each in a process of its own."""
    print("| step | one by one | together | ratio | above the model: one by one | together |")
    for kind, settings in KINDS.items():
        found = assemble(recipe_of(*settings))
        worker = found.worker()
        layers = [
            found.loaded.model.get_submodule(name.removesuffix(".weight"))
            for name in found.found_mask.mask.names
        ]
        step = stepper(found, worker)

        def way(
            tokens: int, found: Assembly = found, layers: Any = layers, step: Any = step
        ) -> float:
            found.objective.allow_copies(tokens, layers)
            return float(step())

        pairs = {"apart": partial(way, 0), "together": partial(way, 1024)}
        taken = interleaved(pairs, 2 * STEPS)
        memory = [_child("memory", choice, *settings) for choice in (APART, TOGETHER)]
        print(
            f"| {kind} | {taken['apart']:.2f} s | {taken['together']:.2f} s | "
            f"{taken['apart'] / taken['together']:.2f} | {memory[0]} MB | {memory[1]} MB |",
            flush=True,
        )


def memory(*settings: str) -> int:
    """Peak of a few steps above the resting model, in MB."""
    found = assemble(recipe_of(*settings))
    worker = found.worker()
    step = stepper(found, worker)
    for number in range(1, STEPS + 1):
        found.client(0).batch(number)
    reset_peak()
    resting = resident_bytes()
    for _ in range(STEPS):
        step()
    return round((peak_bytes() - resting) / 1e6)


def _child(table: str, *settings: str) -> Any:
    command = [sys.executable, __file__, table, *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def shares() -> None:
    """In how much of their matrices the rows and columns of masked coordinates cross."""
    print("| model | mask | matrices | rows | columns | share |")
    for model in ("demo:gemma-3-270m", "demo:smollm2-135m"):
        for kind in ("sensitivity", "magnitude", "random"):
            settings = (f"model.name={model}", f"mask.kind={kind}", "subspace.kind=none")
            found = assemble(recipe_of(*settings))
            mask = found.found_mask.mask
            rows = columns = all_rows = all_columns = 0
            for shape, indices in zip(mask.shapes, mask.indices, strict=True):
                row, column = np.divmod(indices, shape[1])
                rows, columns = rows + len(np.unique(row)), columns + len(np.unique(column))
                all_rows, all_columns = all_rows + shape[0], all_columns + shape[1]
            share = Overlay(found.loaded.model, mask).share
            print(
                f"| {model} | {kind} | {len(mask.names)} | {rows} of {all_rows} | "
                f"{columns} of {all_columns} | {share:.3f} |",
                flush=True,
            )


def tokens() -> None:
    """Passes over batches of the demo's snippets, and what a token costs in each."""
    found = assemble(recipe_of("runtime.tokens_per_pass=65536"))
    objective, examples = found.objective, demo_examples(found.loaded, 256)
    print("| examples | tokens | seconds | µs a token |")
    for count in (2, 4, 8, 16, 32, 64, 128, 256):
        batch = examples[:count]
        size = next(iter(objective.packs(batch))).tokens
        passes = {"pass": lambda batch=batch: seconds(lambda: objective.losses(batch))}
        taken = interleaved(passes, REPEATS)["pass"]
        print(f"| {count} | {size} | {taken:.3f} | {1e6 * taken / size:.0f} |", flush=True)


def values() -> None:
    """What a step does outside its passes for n values: draw, move, write."""
    print(
        "| n | Gaussian | tabulated | Rademacher | by torch: tabulated | Rademacher | numpy's |"
        " θ + a z | write |"
    )
    model = nn.ModuleList([nn.Linear(4096, 4096, bias=False) for _ in range(6)])
    parameters = dict(model.named_parameters())
    total = sum(parameter.numel() for parameter in parameters.values())
    generator, cpu = np.random.default_rng(0), torch.device("cpu")
    for n in (10**4, 10**5, 10**6, 10**7):
        section = MaskSection(kind="random", density=n / total)
        mask = random_mask(parameters, section, "any")
        space = MaskedSpace(model, mask)
        theta, key = space.read(), NoiseKey(0, 0, 0)
        z = draw(key, n)
        work: dict[str, Callable[[], object]] = {
            "gaussian": partial(draw, key, n),
            "tabulated": partial(draw, key, n, "tabulated"),
            "rademacher": partial(draw, key, n, "rademacher"),
            "tabulated by torch": partial(draw_on, cpu, key, n, "tabulated"),
            "rademacher by torch": partial(draw_on, cpu, key, n, "rademacher"),
            "numpy": partial(generator.standard_normal, n, np.float32),
            "move": partial(_moved, theta, z),
            "write": partial(space.write, theta),
        }
        taken = interleaved({name: partial(seconds, run) for name, run in work.items()}, REPEATS)
        cells = " | ".join(f"{1e3 * value:.2f} ms" for value in taken.values())
        print(f"| {n:.0e} | {cells} |", flush=True)


def _moved(theta: np.ndarray, z: np.ndarray) -> np.ndarray:
    return theta + np.float32(1e-3) * z


def dimensions() -> None:
    """θ_0 + B w for the demo's n, in float32, one direction after the other."""
    n = 100_270
    start = np.zeros(n, np.float32)
    print("| k | ms |")
    for k in (8, 32, 128, 512):
        basis = np.ones((k, n), np.float32)
        w = np.ones(k, np.float32)
        work = {"w": lambda b=basis, w=w: seconds(lambda: combined(start, b, w))}
        print(f"| {k} | {1e3 * interleaved(work, REPEATS)['w']:.1f} |", flush=True)


def steps() -> None:
    """A client's step of 16 examples, by method, on one model: ours, and first-order Adam."""
    found = assemble(recipe_of(KINDS["two-point, 16 examples"][2], "model.dtype=float32"))
    client: Client = found.client(0)
    objective, model = found.objective, found.loaded.model
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-9, weight_decay=0.0)

    def adam() -> None:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for losses in objective.losses_with_graph(client.batch(0)):
            losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for parameter in parameters:
            parameter.requires_grad_(False)

    ways = {"pass": lambda: seconds(lambda: objective.losses(client.batch(0)))}
    ways["first-order Adam, all weights"] = lambda: seconds(adam)
    taken = interleaved(ways, REPEATS)
    print("| step of 16 examples | seconds | forward passes |")
    for name, value in taken.items():
        print(f"| {name} | {value:.2f} | {value / taken['pass']:.2f} |", flush=True)


def weights() -> None:
    """Each model as loaded, in the bits of `runtime.weights`, in a process of its own."""
    print("| model | weights | MB | of bf16 | pass of 16 | accuracy (loss) |")
    for model in ("demo:gemma-3-270m", "demo:smollm2-135m"):
        for kept in ("stored", "int8", "int4"):
            settings = (f"model.name={model}", f"runtime.weights={kept}")
            found = _child("as-loaded", *settings, "subspace.kind=none")
            print(
                f"| {model} | {kept} | {found['mb']:.0f} | {found['of_bf16']:.2f} | "
                f"{found['seconds']:.2f} s | {found['accuracy']:.3f} ({found['loss']:.4f}) |",
                flush=True,
            )


def as_loaded(*settings: str) -> dict[str, float]:
    """Bytes of the weights beside bf16, a pass, and 512 held-out snippets."""
    found = assemble(recipe_of(*settings, "evaluation.examples=512"))
    worker = found.worker()
    parameters = list(found.loaded.model.parameters())
    held = sum(getattr(parameter, "held_bytes", parameter.nbytes) for parameter in parameters)
    batch = found.client(0).batch(0)
    taken = interleaved({"pass": lambda: seconds(lambda: worker.objective.losses(batch))}, REPEATS)
    measured = evaluate_objective(found.objective, found.test, found.metrics)
    return {
        "mb": held / 1e6,
        "of_bf16": held / (2 * sum(parameter.numel() for parameter in parameters)),
        "seconds": taken["pass"],
        "accuracy": measured.metrics["accuracy"],
        "loss": measured.metrics["loss"],
    }


def kernels() -> None:
    """493 × 640 by 640 × 2048 in float32 on one thread, with weights in int8."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, layer = torch.randn(493, 640), nn.Linear(640, 2048, bias=False).requires_grad_(False)
    ours = QuantisedWeight(layer.weight.detach(), 8, None)
    scales = ours.scales.flatten()
    ways: dict[str, Callable[[], object]] = {
        "float32": lambda: linear(x, layer.weight),
        "made anew (ours)": lambda: linear(x, ours),
        "torch._weight_int8pack_mm": lambda: torch._weight_int8pack_mm(x, ours.codes, scales),
    }
    with suppress(ImportError):
        from torchao.quantization import Int8WeightOnlyConfig, quantize_  # type: ignore

        theirs = nn.Sequential(copy.deepcopy(layer))
        quantize_(theirs, Int8WeightOnlyConfig())
        ways["torchao, Int8WeightOnlyConfig"] = lambda: theirs(x)
    with torch.inference_mode():
        taken = interleaved({name: partial(seconds, run) for name, run in ways.items()}, REPEATS)
    torch.set_num_threads(threads)
    print("| weights | ms |")
    for name, value in taken.items():
        print(f"| {name} | {1e3 * value:.1f} |")


class _Rounds(RunObserver):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def round_closed(self, record: RoundRecord, metrics: RoundMetrics) -> None:
        self.ends.append(time.perf_counter())


def clients() -> None:
    """SmolLM2, IID parts, a random mask, two-point steps of 4 examples, four rounds."""
    print("| engine | clients | sampled | seconds a round | ms a client | peak of this process |")
    settings = ["model.name=demo:smollm2-135m", "subspace.kind=none", "mask.kind=random"]
    settings += ["federation.batch_size=4", "evaluation.examples=16", "federation.rounds=4"]
    settings += ['federation.partition={kind="iid"}']
    for engine in ("local", "flower"):
        for held, sampled in ((4, 4), (64, 64), (1000, 64)):
            sizes = [f"federation.clients={held}", f"federation.clients_per_round={sampled}"]
            recipe = recipe_of(*settings, *sizes, f"runtime.engine={engine}")
            watch = _Rounds()
            reset_peak()
            with tempfile.TemporaryDirectory() as scratch:
                meerkat.run(recipe, Path(scratch) / "run", observers=[watch])
            taken = float(np.median(np.diff(watch.ends)))
            print(
                f"| {engine} | {held} | {sampled} | {taken:.2f} | {1e3 * taken / sampled:.0f} | "
                f"{peak_bytes() / 1e6:.0f} MB |",
                flush=True,
            )


TABLES = {
    "clients": clients,
    "together": together,
    "tokens": tokens,
    "values": values,
    "dimensions": dimensions,
    "kernels": kernels,
    "shares": shares,
    "steps": steps,
    "weights": weights,
}
PARTS = {"memory": memory, "as-loaded": as_loaded}
"""What a process of its own measures."""


def main() -> None:
    if part := PARTS.get("".join(sys.argv[1:2])):
        print(json.dumps(part(*sys.argv[2:])))
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", nargs="+", choices=sorted(TABLES))
    for table in parser.parse_args().table:
        print(f"\n{table}: {describe()}\n")
        TABLES[table]()


if __name__ == "__main__":
    main()
