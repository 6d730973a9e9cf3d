"""Peak memory of a client that trains, beside that of a process that only evaluates.

Each runs in a fresh process of its own, on the same batches, with the model in it.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch

from meerkat.algorithms import make_algorithm
from meerkat.benchmarks.machine import peak_bytes, reset_peak, resident_bytes
from meerkat.config import MaskSection, ModelSection, Runtime, parse_recipe
from meerkat.data.encoding import Encoded
from meerkat.errors import MeerkatError
from meerkat.federation.client import Client, Worker
from meerkat.federation.messages import RoundPlan
from meerkat.models.loading import load_model
from meerkat.models.objective import TextObjective
from meerkat.spaces.mask_criteria import eligible_parameters, random_mask
from meerkat.spaces.masked import MaskedSpace

__all__ = ["child", "peak_memory", "random_worker"]

Work: TypeAlias = Literal["evaluate", "train"]


def peak_memory(
    model: ModelSection,
    runtime: Runtime,
    examples: Sequence[Encoded],
    batch_size: int,
    mask_density: float,
) -> dict[str, Any]:
    """`train_over_eval_memory`, and the peaks in bytes behind it.

    One process predicts all examples, `batch_size` at a time; the other takes one local step on
    each of the same batches. The peak starts to count once the model is loaded, and includes it;
    `…_resting_bytes` is the resident memory at that moment. Weights that are mapped from their file
    count as resident, before and after they are written to; what lies on a GPU does not count.
    Neither process is compiled.

    Raises:
        MeerkatError: A process failed; the line is its last.
    """
    order = {
        "model": model.model_dump(),
        "runtime": {**runtime.model_dump(), "compile": False},
        "examples": [dataclasses.asdict(example) for example in examples],
        "batch_size": batch_size,
        "mask_density": mask_density,
    }
    evaluating, training = (_spawn({**order, "work": work}) for work in ("evaluate", "train"))
    return {
        "train_over_eval_memory": training["peak"] / evaluating["peak"],
        "training_peak_bytes": training["peak"],
        "training_resting_bytes": training["resting"],
        "evaluating_peak_bytes": evaluating["peak"],
        "evaluating_resting_bytes": evaluating["resting"],
        "memory_method": training["method"],
    }


def random_worker(
    model: Any,
    fingerprint: str,
    objective: TextObjective,
    mask_density: float,
    first_block: int = 0,
) -> Worker:
    """A worker with a random mask and the ε of the model's type (method.md section 3)."""
    section = MaskSection(kind="random", density=mask_density, first_block=first_block)
    mask = random_mask(eligible_parameters(model, section), section, fingerprint)
    recipe = parse_recipe(
        {
            "model": {"name": "none", "dtype": str(model.dtype).removeprefix("torch.")},
            "task": {"name": "none"},
            "federation": {"clients": 1, "rounds": 1},
        }
    )
    return Worker(MaskedSpace(model, mask), objective, make_algorithm(recipe, mask.size))


def child() -> None:
    """The process that is measured: reads its order from stdin, prints its peak as JSON."""
    order = json.load(sys.stdin)
    runtime = Runtime(**order["runtime"])
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    loaded = load_model(ModelSection(**order["model"]), runtime)
    objective = TextObjective(loaded, runtime.tokens_per_pass)
    examples = [
        Encoded(tuple(e["prompt"]), tuple(map(tuple, e["answers"])), e["label"])
        for e in order["examples"]
    ]
    size: int = order["batch_size"]
    batches = [examples[start : start + size] for start in range(0, len(examples), size)]
    method, resting = reset_peak(), resident_bytes()
    if order["work"] == "evaluate":
        for batch in batches:
            objective.predict(batch)
    else:
        worker = random_worker(loaded.model, loaded.fingerprint, objective, order["mask_density"])
        for round, batch in enumerate(batches):
            client = Client(round, batch, len(batch), 0)
            client.answer(RoundPlan(round, 1, 1e-6, 0, 0), worker)
    print(json.dumps({"peak": peak_bytes(), "resting": resting, "method": method}))


def _spawn(order: dict[str, Any]) -> dict[str, Any]:
    program = "from meerkat.benchmarks.memory import child; child()"
    finished = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(order), capture_output=True, text=True
    )
    lines = finished.stdout.splitlines()
    if finished.returncode or not lines:
        reason = (finished.stderr.strip() or "no output").splitlines()[-1]
        raise MeerkatError(f"the process that measures memory failed: {reason}")
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer
