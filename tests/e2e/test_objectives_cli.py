"""Objectives as a user sees them: a run on macro F1, on a function, on pairs; refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builders import merged
from commands import invoke, refused, toml_of


@pytest.fixture
def data(tiny_recipe_data: dict[str, Any]) -> dict[str, Any]:
    return merged(tiny_recipe_data, federation={"clients": 2, "rounds": 2, "local_steps": 1})


def run(data: dict[str, Any], folder: Path, *arguments: object) -> tuple[Path, Any]:
    path, out = folder / "recipe.toml", folder / "run"
    path.write_text(toml_of(data))
    return out, invoke("run", path, "--out", out, *arguments)


def test_a_run_on_macro_f1_resumes_and_evaluates(data: dict[str, Any], tmp_path: Path) -> None:
    objective = {"kind": "macro_f1", "temperature": 0.5}
    out, done = run(merged(data, task={"objective": objective}), tmp_path)
    assert done.exit_code == 0, done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["after"]) == ["loss", "accuracy", "macro_f1"]
    assert invoke("resume", out).exit_code == 0
    found = invoke("evaluate", out)
    assert found.exit_code == 0, found.stderr


def test_a_function_that_is_not_there_shows_before_the_run(
    data: dict[str, Any], tmp_path: Path
) -> None:
    _, done = run(data, tmp_path, "--set", "task.objective=no_such_module:loss")
    refused(done, "task.objective = 'no_such_module:loss'", "PYTHONPATH")


def test_steps_and_exact_gradients_are_refused(data: dict[str, Any], tmp_path: Path) -> None:
    steps = {"kind": "accuracy", "temperature": 0}
    changed = merged(data, task={"objective": steps}, optimizer={"estimator": "forward-mode"})
    _, done = run(changed, tmp_path)
    refused(done, "task.objective", "no derivative", "optimizer.estimator = 'two-point'")


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["loss", "dpo", "simpo"])
def test_pairs_from_a_run_to_folders(data: dict[str, Any], tmp_path: Path, objective: str) -> None:
    rows = [
        {"prompt": f"the film {n} is", "chosen": "great fine", "rejected": f"bad plot {n}"}
        for n in range(40)
    ]
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "name": "custom",
        "source": str(source),
        "prompt": "{prompt}",
        "chosen": "chosen",
        "rejected": "rejected",
        "objective": objective,
        "max_length": 64,
    }
    pairs = {**data, "task": task}
    pairs["federation"] = {**pairs["federation"], "partition": {"kind": "iid"}}
    out, done = run(pairs, tmp_path)
    assert done.exit_code == 0, done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["after"]) == ["loss", "preference_accuracy", "margin"]
    folders = tmp_path / "clients"
    split = invoke("split", tmp_path / "recipe.toml", "--to", folders)
    assert split.exit_code == 0, split.stderr
    header = (folders / "client-0" / "train.csv").read_text().splitlines()[0]
    assert header == "prompt,chosen,rejected"
    assert invoke("evaluate", out).exit_code == 0
