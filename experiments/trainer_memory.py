"""What training takes above the loaded model: `meerkat.Trainer` beside transformers' own.

A demo model in float32, batches of 8 rows of 64 tokens, of which the last two are scored, two steps
each. Every row of the table is a process of its own; the peak of resident memory starts to count
once the model is there and has been read through.

    python experiments/trainer_memory.py                    # Gemma 3 270M
    python experiments/trainer_memory.py demo:smollm2-135m
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model

import meerkat
from meerkat.benchmarks.machine import peak_bytes, reset_peak, resident_bytes, seconds
from meerkat.config import load_recipe
from meerkat.models.demo_models import DEMO
from meerkat.models.loading import fingerprint, load_model

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.toml"
ROWS, TOKENS, BATCH, STEPS = 32, 64, 8, 2
OURS: dict[str, dict[str, Any]] = {
    "meerkat, mask": {"mask.kind": "random"},
    "meerkat, subspace of 32": {
        "mask.kind": "random",
        "subspace.kind": "random",
        "subspace.dimensions": 32,
        "noise.perturbations": 7,
        "optimizer.estimator": "one-sided",
    },
}
THEIRS = ("transformers, LoRA (r = 8)", "transformers, AdamW")


def rows_of() -> list[dict[str, list[int]]]:
    draw = np.random.default_rng(0)
    found = []
    for _ in range(ROWS):
        ids = draw.integers(5, 40_000, TOKENS).tolist()
        found.append({"input_ids": ids, "labels": [-100] * (TOKENS - 2) + ids[-2:]})
    return found


def ours(name: str, model: Any, tokenizer: Any, folder: str) -> Callable[[], object]:
    args = meerkat.TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        disable_tqdm=True,
        settings=OURS[name],
    )
    rows = rows_of()
    trainer = meerkat.Trainer(
        model, args, train_dataset=rows, eval_dataset=rows[:BATCH], processing_class=tokenizer
    )
    return trainer.train


def theirs(name: str, model: Any, folder: str) -> Callable[[], object]:
    model.requires_grad_(True)
    if "LoRA" in name:
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    args = transformers.TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, args, train_dataset=rows_of())
    return trainer.train


def child(model: str, name: str) -> None:
    torch.set_num_threads(1)
    recipe = load_recipe(RECIPE, ["model.dtype=float32", f"model.name={model}"])
    loaded = load_model(recipe.model, recipe.runtime)
    with tempfile.TemporaryDirectory() as folder:
        if name in OURS:
            train = ours(name, loaded.model, loaded.tokenizer, f"{folder}/run")
        else:
            train = theirs(name, loaded.model, folder)
        fingerprint(loaded.model)
        reset_peak()
        resting = resident_bytes()
        taken = seconds(train)
        print(json.dumps({"MB": (peak_bytes() - resting) / 1e6, "s": taken}))


def main() -> None:
    if len(sys.argv) > 2:
        child(sys.argv[1], sys.argv[2])
        return
    model = sys.argv[1] if len(sys.argv) > 1 else DEMO
    print(f"| {model}, {BATCH} rows of {TOKENS} tokens | MB above the model |\n|---|---|")
    for name in (*OURS, *THEIRS):
        command = [sys.executable, __file__, model, name]
        found = subprocess.run(command, capture_output=True, text=True)
        if found.returncode:
            sys.exit(found.stderr)
        figures = json.loads(found.stdout.splitlines()[-1])
        print(f"| {name} | {figures['MB']:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
