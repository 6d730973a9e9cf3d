"""What making a mask and a subspace takes above the model, kept or computed again, beside the plan.

Each row is a process of its own: two batches of the recipe's calibration, then 64 texts. The peak
starts to count once the model is there. Then, by calculation alone, a model of 7 billion
parameters (the widths of Llama 2), of which nothing but a configuration is made.

    python experiments/calibration_memory.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

from transformers import LlamaConfig

from meerkat.benchmarks.machine import peak_bytes, reset_peak, resident_bytes, seconds
from meerkat.config import Recipe, load_recipe
from meerkat.runs.assembly import assemble
from meerkat.runs.planning import plan_run

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.toml"
MODELS = ("demo:gemma-3-270m", "demo:smollm2-135m")
SETTINGS = [
    [f"runtime.mask_passes={passes}", f"runtime.recompute={again}"]
    for passes, again in product((1, 2), ("false", "true"))
]


def recipe_of(model: str, settings: list[str]) -> Recipe:
    few = ["mask.batches=2", "subspace.texts=64"]
    return load_recipe(RECIPE, [f"model.name={model}", *few, *settings])


def child(model: str, settings: list[str]) -> None:
    with tempfile.TemporaryDirectory() as cache:
        recipe = recipe_of(model, settings)
        found = assemble(recipe)
        # The model is converted once, in the user's cache; mask and subspace are made anew.
        runtime = recipe.runtime.model_copy(update={"cache_dir": cache})
        object.__setattr__(found, "recipe", recipe.model_copy(update={"runtime": runtime}))
        _ = found.objective
        reset_peak()
        resting = resident_bytes()
        taken = seconds(lambda: found.found_mask)
        peak, planned = peak_bytes() - resting, plan_run(recipe).memory
    width = sum(p.nbytes for p in found.loaded.model.parameters())
    most = max(planned.making_the_mask, planned.making_the_subspace) - width
    print(json.dumps({"MB": peak / 1e6, "planned": most / 1e6, "s": taken}))


def large() -> None:
    """A plan for a model that is not here."""
    config = LlamaConfig(architectures=["LlamaForCausalLM"])  # its defaults are those of Llama 7B
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        for settings in SETTINGS:
            stored = [f"model.name={folder}", "runtime.compute=stored"]
            memory = plan_run(load_recipe(RECIPE, [*stored, *settings])).memory
            mask, subspace = memory.making_the_mask, memory.making_the_subspace
            print(
                f"Llama 7B, bf16 {' '.join(settings):48} weights {memory.weights / 1e9:5.1f} GB  "
                f"mask {mask / 1e9:5.1f}  subspace {subspace / 1e9:5.1f}  "
                f"client {memory.client / 1e9:5.1f}  server {memory.server / 1e9:5.1f}",
                flush=True,
            )


def main() -> None:
    if len(sys.argv) > 1:
        child(sys.argv[1], sys.argv[2:])
        return
    large()
    for model in MODELS:
        for settings in SETTINGS:
            command = [sys.executable, __file__, model, *settings]
            found = subprocess.run(command, capture_output=True, text=True, check=True)
            figures = json.loads(found.stdout.splitlines()[-1])
            print(
                f"{model:20} {' '.join(settings):48} {figures['MB']:6.0f} MB above the model, "
                f"{figures['planned']:6.0f} planned, {figures['s']:5.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
