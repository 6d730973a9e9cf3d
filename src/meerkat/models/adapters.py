"""peft's LoRA factors in a loaded model: W x becomes W x + (α/r) B A x.

LoRA: Hu et al., arXiv 2106.09685. W stays as it is. A (r, in) is drawn by counters, so it has the
same bits on every machine; B (out, r) starts at zero, so the model computes what it did before.
Both are float32 whatever the model's type. In the model they are weights of linear layers of their
own, so a mask over all of them makes a run of them; spaces, journal and messages know no adapter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from safetensors.numpy import save_file
from torch import nn

from meerkat.errors import MaskError
from meerkat.extras import needed_extra
from meerkat.zo.noise import uniform

__all__ = [
    "adapt",
    "adapter_factors",
    "base_layers",
    "factor_shapes",
    "linear_weights",
    "merge",
    "require_peft",
    "save_adapter",
    "write_adapter",
]

_ADAPTER = "default"
"""What peft calls an adapter that has no other name."""
Factors = Mapping[str, Float32[np.ndarray, "rows columns"]]
"""Factors by their names in the model: `….q_proj.lora_A.default.weight`."""


def require_peft() -> None:
    """Ask for peft before anything is loaded that takes long.

    Raises:
        RunError: It is not installed.
    """
    with needed_extra("lora"):
        import peft  # noqa: F401


def linear_weights(model: nn.Module, names: Sequence[str], named: bool) -> list[str]:
    """Those of these parameters that are the weight of one linear layer, the LM head excepted.

    Args:
        named: Did the recipe name them? Then all of them must be.

    Raises:
        MaskError: One that was named is not, or none is left.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    found = {
        f"{layer}.weight"
        for layer, module in model.named_modules()
        if type(module) is nn.Linear and module is not head
    }
    other = next((name for name in names if name not in found), None)
    if named and other is not None:
        raise MaskError(
            f"mask.include: {other!r} is not the weight of a linear layer below the LM head, and "
            "mask.kind = 'lora' adapts these alone; name others, or add it to mask.exclude"
        )
    chosen = [name for name in names if name in found]
    if not chosen:
        raise MaskError(
            "mask.kind = 'lora' adapts linear layers (torch.nn.Linear), and the decoder blocks of "
            "this model have none; take mask.kind = 'full'"
        )
    return chosen


def factor_shapes(weights: Mapping[str, Sequence[int]], rank: int) -> dict[str, tuple[int, int]]:
    """Shapes of A and B by their names, for weights by theirs.

    >>> factor_shapes({"q.weight": (6, 4)}, 2)
    {'q.lora_A.default.weight': (2, 4), 'q.lora_B.default.weight': (6, 2)}

    Raises:
        MaskError: The rank is more than a matrix can have.
    """
    found = {}
    for name, (rows, columns) in weights.items():
        if rank > min(rows, columns):
            raise MaskError(
                f"mask.lora_rank = {rank} is more than {name} ({rows} × {columns}) can have; "
                "lower it, or add the weight to mask.exclude"
            )
        layer = name.removesuffix(".weight")
        found[_name(layer, "A")] = (rank, columns)
        found[_name(layer, "B")] = (rows, rank)
    return found


def adapt(model: nn.Module, weights: Sequence[str], rank: int, alpha: float, seed: int) -> None:
    """Put factors beside these weights, in place.

    A is uniform in ±1/√in, as peft draws it (Kaiming-uniform with a = √5); the stream of a weight
    follows from the seed and its place among `weights`.

    Raises:
        RunError: peft is not installed.
        MaskError: The rank is more than a matrix can have.
    """
    parameters = dict(model.named_parameters())
    shapes = factor_shapes({name: tuple(parameters[name].shape) for name in weights}, rank)
    with needed_extra("lora"):
        from peft import inject_adapter_in_model
    layers = [name.removesuffix(".weight") for name in weights]
    # Empty factors: nothing is drawn from torch's generator.
    inject_adapter_in_model(_config(layers, rank, alpha), model, low_cpu_mem_usage=True)
    for place, (name, layer) in enumerate(zip(weights, layers, strict=True)):
        a, b = _name(layer, "A"), _name(layer, "B")
        columns = shapes[a][1]
        drawn = uniform(seed, (place, 0), rank * columns) / math.sqrt(columns)
        for factor, values in (
            (a, torch.from_numpy(drawn.astype(np.float32)).view(shapes[a])),
            (b, torch.zeros(shapes[b])),
        ):
            home = model.get_submodule(factor.removesuffix(".weight"))
            home.weight = nn.Parameter(values.to(parameters[name].device), requires_grad=False)
    model.eval().requires_grad_(False)


def adapter_factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """A and B of each adapted weight by their names, in the model's order."""
    ends = tuple(_name("", letter) for letter in "AB")
    return {name: p for name, p in model.named_parameters() if name.endswith(ends)}


@contextmanager
def base_layers(model: nn.Module) -> Iterator[None]:
    """Meanwhile the model has the modules that it was loaded with, and no adapter."""
    adapted = {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if name.endswith(".base_layer")
    }
    wrappers = {name: model.get_submodule(name) for name in adapted}
    try:
        for name, module in adapted.items():
            _set(model, name, module)
        yield
    finally:
        for name, module in wrappers.items():
            _set(model, name, module)


@torch.no_grad()
def merge(model: nn.Module, factors: Factors, alpha: float) -> None:
    """Add (α/r) B A to the weights of a model without adapters, in place.

    Sums are float32, and rounded once to the type of the weight.
    """
    parameters = dict(model.named_parameters())
    for layer in _layers(factors):
        a, b = (torch.from_numpy(factors[_name(layer, letter)]) for letter in "AB")
        weight = parameters[f"{layer}.weight"]
        weight.copy_((weight.float().cpu() + (alpha / len(a)) * (b @ a)).to(weight.dtype))


def save_adapter(factors: Factors, alpha: float, base: str, folder: Path) -> None:
    """Write factors as a folder that `peft.PeftModel.from_pretrained` loads over the base model.

    Args:
        base: What the recipe calls the base model.

    Raises:
        RunError: peft is not installed.
    """
    layers = _layers(factors)
    rank = len(factors[_name(layers[0], "A")])
    tensors = {
        f"{layer}.lora_{letter}.weight": factors[_name(layer, letter)]
        for layer in layers
        for letter in "AB"
    }
    write_adapter(_config(layers, rank, alpha), tensors, base, folder)


def write_adapter(config: Any, tensors: Mapping[str, np.ndarray], base: str, folder: Path) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` loads; the same bytes each time.

    Args:
        config: A configuration of peft's.
        tensors: By their names in the base model.
        base: As `save_adapter`.
    """
    config.base_model_name_or_path, config.inference_mode = base, True
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    written = json.loads(path.read_text("utf-8"))
    written["target_modules"] = sorted(written["target_modules"])  # peft holds them as a set
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", "utf-8")
    named = {f"base_model.model.{n}": np.ascontiguousarray(t) for n, t in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})


def _config(layers: Sequence[str], rank: int, alpha: float) -> Any:
    with needed_extra("lora"):
        from peft import LoraConfig
    # A whole number is written as one, as peft's own configurations have it.
    scale: Any = int(alpha) if float(alpha).is_integer() else alpha
    return LoraConfig(r=rank, lora_alpha=scale, target_modules=list(layers), task_type="CAUSAL_LM")


def _name(layer: str, letter: str) -> str:
    return f"{layer}.lora_{letter}.{_ADAPTER}.weight"


def _layers(factors: Factors) -> list[str]:
    end = _name("", "A")
    return [name.removesuffix(end) for name in factors if name.endswith(end)]


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
