"""What requantising leaves of a run: changed weights that still differ, and the accuracy.

The run's θ is written into its base model, then base and fine-tuned model are quantised alike
(matrices of the decoder blocks by gguf's own functions, the embedding to Q8_0 as in the demo's
file), read back, and compared.

    python experiments/requantise.py runs/demo --examples 384 --json requantised.json

`as the file` is the mixture of types that the demo's GGUF file (Q4_K_M) has. gguf quantises to
neither Q4_K nor Q6_K: Q4_1, which also has 4 bits, a scale and a minimum for 32 values, and Q8_0
stand for them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

from meerkat.config import parse_recipe
from meerkat.data.clients import examples_of
from meerkat.journal import replay
from meerkat.models.demo_models import DEMO_MODELS
from meerkat.runs.assembly import Assembly, EncodedExamples, assemble
from meerkat.runs.directory import mask_of, mask_path, open_journal, recipe_of
from meerkat.runs.evaluation import evaluate_objective
from meerkat.spaces.mask_file import Mask
from meerkat.spaces.masked import MaskedSpace

AS_THE_FILE = "as the file"
NEAREST = {Kind.Q4_K: Kind.Q4_1, Kind.Q6_K: Kind.Q8_0}
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Matrices of a block, by their names in GGUF."""


def types_of_file(model: str) -> dict[str, Kind]:
    """The type of each matrix in the GGUF file of a demo model, by the parameter's name."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        reader = gguf.GGUFReader(DEMO_MODELS[model].gguf(Path(scratch)))
        for tensor in reader.tensors:
            parts = tensor.name.split(".")
            if parts[0] == "blk" and parts[2] in NAMES:
                name = f"model.layers.{parts[1]}.{NAMES[parts[2]]}.weight"
                found[name] = NEAREST.get(tensor.tensor_type, tensor.tensor_type)
    return found


def rounded(weight: np.ndarray, kind: Kind) -> np.ndarray:
    """Quantised and read back."""
    packed = gguf.quants.quantize(weight.astype(np.float32), kind)
    return gguf.quants.dequantize(packed, kind).reshape(weight.shape).astype(np.float32)


def matrices(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Weights that a file of few bits holds in few bits: all matrices but the embedding."""
    return {
        name: p
        for name, p in model.named_parameters()
        if p.ndim == 2 and ".layers." in name and p.shape[1] % 32 == 0
    }


def embedding_to_q8(model: torch.nn.Module) -> None:
    weight = model.get_input_embeddings().weight
    weight.data.copy_(torch.from_numpy(rounded(weight.detach().numpy(), Kind.Q8_0)))


def measure(run: Path, examples: int) -> dict[str, dict[str, float]]:
    """Figures by format; without quantising under `none`."""
    recipe = parse_recipe(recipe_of(run).model_dump(mode="json"), ["runtime.compute=float32"])
    assembly = assemble(recipe, mask_file=mask_path(run))
    with closing(open_journal(run)) as journal:
        mask, state = mask_of(run, journal), replay(journal)
    model = assembly.loaded.model
    weights = Weights(model, mask, mask.weights(state.theta))
    file = types_of_file(recipe.model.name)
    formats: dict[str, Callable[[str], Kind] | None] = {
        "none": None,
        AS_THE_FILE: lambda name: file[name],
        "Q4_0": lambda name: Kind.Q4_0,
        "Q8_0": lambda name: Kind.Q8_0,
        "Q5_0": lambda name: Kind.Q5_0,
    }
    found: dict[str, dict[str, float]] = {}
    for title, kind in formats.items():
        found[title] = {} if kind is None else survival(weights, kind)
        print(title, found[title], flush=True)
    for title, kind in formats.items():
        for which in ("fine-tuned", "base"):
            for name, p in matrices(model).items():
                value = weights.of(name, which == "fine-tuned")
                p.data.copy_(
                    torch.from_numpy(value if kind is None else rounded(value, kind(name)))
                )
            found[title][which] = accuracy(assembly, examples)
            print(title, which, found[title][which], flush=True)
        if kind is None:
            embedding_to_q8(model)
    return found


class Weights:
    """The matrices of base and fine-tuned model, in the memory of one in bfloat16."""

    def __init__(self, model: torch.nn.Module, mask: Mask, theta: np.ndarray):
        self._base = {n: p.detach().to(torch.bfloat16) for n, p in matrices(model).items()}
        self.places = dict(zip(mask.names, mask.indices, strict=True))
        space = MaskedSpace(model, mask)
        space.write(theta)
        ends = np.cumsum([len(indices) for indices in mask.indices])[:-1]
        self._tuned = dict(zip(mask.names, np.split(space.read(), ends), strict=True))
        space.restore()

    def of(self, name: str, tuned: bool) -> np.ndarray:
        """A matrix in float32."""
        value = self._base[name].float().numpy()
        if tuned and name in self.places:
            value.reshape(-1)[self.places[name]] = self._tuned[name]
        return value


def survival(weights: Weights, kind: Callable[[str], Kind]) -> dict[str, float]:
    """How much of the change is there after quantising.

    `kept`: share of the changed weights that differ between the two quantised models. `along`: the
    change that they differ by at these places, along the one that was trained, as a share of it.
    `others`: weights that were not trained and differ all the same, for each that was.
    """
    changed = differing = others = 0
    along = square = 0.0
    for name, indices in weights.places.items():
        base, tuned = weights.of(name, False), weights.of(name, True)
        step = (tuned - base).reshape(-1)[indices]
        left = (rounded(tuned, kind(name)) - rounded(base, kind(name))).reshape(-1)
        moved = step != 0
        changed += int(moved.sum())
        differing += int((left[indices][moved] != 0).sum())
        others += int((left != 0).sum()) - int((left[indices] != 0).sum())
        along += float((left[indices].astype(np.float64) * step).sum())
        square += float((step.astype(np.float64) ** 2).sum())
    return {
        "changed": changed,
        "kept": differing / changed,
        "along": along / square,
        "others": others / changed,
    }


def accuracy(assembly: Assembly, examples: int) -> float:
    """On held-out examples."""
    chosen = examples_of(assembly.recipe, assembly.split, "test", examples)
    encoded = EncodedExamples(chosen, assembly.encoder)
    return evaluate_objective(assembly.objective, encoded, assembly.metrics).metrics["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--examples", type=int, default=384)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments.run, arguments.examples)
    print("| format | changed weights that differ | along the change | base | fine-tuned |")
    print("|---|---|---|---|---|")
    for title, figures in found.items():
        kept = f"{figures['kept']:.3f} | {figures['along']:.3f}" if "kept" in figures else "1 | 1"
        print(f"| {title} | {kept} | {figures['base']:.3f} | {figures['fine-tuned']:.3f} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
