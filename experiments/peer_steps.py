"""A step of the peers' own code beside ours: the same model, the same 16 examples, in turn.

    git clone https://github.com/ZidongLiu/DeComFL  # Apache-2.0
    git clone https://github.com/princeton-nlp/MeZO  # MIT
    python experiments/peer_steps.py --decomfl DeComFL --mezo MeZO

- DeComFL: `RandomGradientEstimator.compute_grad` with one central perturbation, its loss of the
  last token, and `optimizer.step()` of SGD, as its client does.
- MeZO: `zo_step` and `zo_update` of `large_models/trainer.py`, taken out of the file as they stand
  (the file asks for a transformers of 2023); the loss is that of its options, one sequence each.
- Ours: the plain method of the demo's recipe (two-point, 16 examples), and the demo's own step.

Weights in float32. Nothing of their code is in this repository.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speed import recipe_of, stepper
from torch.nn.functional import cross_entropy

from meerkat.benchmarks.machine import describe, interleaved, seconds
from meerkat.benchmarks.reference import option_batch, option_scores
from meerkat.data.encoding import Encoded
from meerkat.runs.assembly import assemble

REPEATS = 3


def decomfl(folder: Path, model: Any, batch: list[Encoded]) -> Callable[[], object]:
    """Left-padded prompts with the answer as the last token, as its data loader has them."""
    sys.path.insert(0, str(folder))
    from cezo_fl.gradient_estimators.random_gradient_estimator import (  # type: ignore
        RandomGradientEstimator,
    )

    answers = [answer[0] for answer in batch[0].answers]
    longest = max(len(example.prompt) for example in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(batch):
        ids[row, longest - len(example.prompt) :] = torch.tensor(example.prompt)
        mask[row, longest - len(example.prompt) :] = 1
    labels = torch.tensor([example.label for example in batch])
    estimator = RandomGradientEstimator(model.parameters(), mu=1e-3, device="cpu")
    optimizer = torch.optim.SGD(estimator.parameters_list, lr=1e-9)

    def loss(inputs: Any, wanted: Any) -> torch.Tensor:
        logits = model(input_ids=inputs, attention_mask=mask).logits
        return cross_entropy(logits[:, -1, answers], wanted)

    @torch.no_grad()
    def step() -> None:
        estimator.compute_grad(ids, labels, loss, seed=1)
        optimizer.step()

    return step


def mezo(folder: Path, model: Any, batch: list[Encoded]) -> Callable[[], object]:
    """Its methods on an object that has what they ask for."""
    source = (folder / "large_models" / "trainer.py").read_text()
    wanted = {"zo_perturb_parameters", "zo_step", "zo_update"}
    names: dict[str, Any] = {"torch": torch, "np": np}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name in wanted:
            exec(compile(ast.Module([node], []), str(folder), "exec"), names)
    options = option_batch(batch)

    def forward(*_: Any) -> torch.Tensor:
        return cross_entropy(option_scores(model, options), options.labels)

    trainer: Any = Namespace(
        args=Namespace(zo_eps=1e-3, gradient_accumulation_steps=1, weight_decay=0.0),
        lr_scheduler=Namespace(step=lambda: None),
        zo_forward=forward,
        _get_learning_rate=lambda: 1e-9,
    )
    for name in wanted:
        setattr(trainer, name, partial(names[name], trainer))

    @torch.no_grad()
    def step() -> None:
        trainer.zo_step(model, None)
        trainer.zo_update(model)

    return step


def revision(folder: Path) -> str:
    found = subprocess.run(
        ["git", "-C", folder, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return found.stdout.strip() or "unknown revision"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--decomfl", type=Path, required=True, help="a clone")
    parser.add_argument("--mezo", type=Path, required=True, help="a clone")
    options = parser.parse_args()
    found = assemble(recipe_of("subspace.kind=none", "model.dtype=float32"))
    demo = assemble(recipe_of("model.dtype=float32"))
    batch = found.client(0).batch(0)
    ways: dict[str, Callable[[], float]] = {
        "plain": stepper(found, found.worker()),
        "demo": stepper(demo, demo.worker()),
    }
    other: Any = assemble(recipe_of("model.dtype=float32")).loaded.model
    other.requires_grad_(True)
    other.set_attn_implementation("sdpa")
    ways["DeComFL"] = partial(seconds, decomfl(options.decomfl, other, batch))
    ways["MeZO"] = partial(seconds, mezo(options.mezo, other, batch))
    taken = interleaved(ways, REPEATS)
    print(describe(), "DeComFL", revision(options.decomfl), "MeZO", revision(options.mezo))
    print("| step | seconds | times ours |")
    for name, value in taken.items():
        print(f"| {name} | {value:.2f} | {value / taken['plain']:.1f} |")


if __name__ == "__main__":
    main()
