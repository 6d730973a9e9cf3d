"""`meerkat evaluate --harness`: with the package where it is installed, else with a stand-in.

The stand-in has the names that are called, as lm-eval 0.4.13 has them, and scores by the model.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import merged
from commands import invoke, refused, toml_of

TASK = """
task: polarity
dataset_path: json
dataset_kwargs: {{ data_files: {{ test: {data} }} }}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}} It was"
doc_to_choice: ["terrible", "great"]
doc_to_target: label
metric_list: [{{ metric: acc }}]
"""
INSTALLED = importlib.util.find_spec("lm_eval") is not None


class Manager:
    def __init__(self, include_path: str | None = None):
        self.names = {path.stem for path in Path(include_path or "none").glob("*.yaml")}

    def match_tasks(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.names]


class Model:
    def __init__(self, pretrained: Any, tokenizer: Any, batch_size: int):
        assert isinstance(pretrained, torch.nn.Module)
        self.model, self.tokenizer = pretrained, tokenizer


def simple_evaluate(model: Model, tasks: list[str], limit: int | None, **rest: Any) -> Any:
    ids = torch.tensor([model.tokenizer("the film is a")["input_ids"]])
    with torch.inference_mode():
        score = float(model.model(input_ids=ids).logits[0, -1, 5])
    results = {name: {"alias": name, "acc,none": score, "sample_len": limit} for name in tasks}
    return {"results": results, "config": object(), "versions": {}}


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    if INSTALLED:
        return
    parts = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": Model},
        "lm_eval.tasks": {"TaskManager": Manager},
    }
    for name, content in parts.items():
        module = types.ModuleType(name)
        vars(module).update(content, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"text": f"the film {i} is a story", "label": i % 2} for i in range(12)]
    data = folder / "rows.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    (folder / "polarity.yaml").write_text(TASK.format(data=data))
    return folder


def test_a_run_is_scored_at_its_round(
    tiny_recipe_data: dict[str, Any], tiny_folder: Path, tasks: Path, tmp_path: Path
) -> None:
    recipe, out = tmp_path / "tiny.toml", tmp_path / "run"
    recipe.write_text(toml_of(merged(tiny_recipe_data, optimizer={"learning_rate": 0.3})))
    assert invoke("run", recipe, "--out", out).exit_code == 0
    assert invoke("export", out, "--to", tmp_path / "merged").exit_code == 0
    base = ["--harness", "polarity", "--include-path", tasks, "--limit", 8, "--json"]

    def score(*target: object) -> dict[str, Any]:
        said = invoke("evaluate", *target, *base)
        assert said.exit_code == 0, said.output
        return json.loads(said.stdout[said.stdout.index("{") :])["results"]["polarity"]

    as_recipe = ["--recipe", recipe]
    assert score(out) == score(tmp_path / "merged", *as_recipe)
    assert score(out, "-r", 0) == score(tiny_folder, *as_recipe)
    if not INSTALLED:
        assert score(out) != score(out, "-r", 0)
    shown = invoke("evaluate", out, *base[:-1])
    assert "polarity acc" in shown.stdout

    refused(invoke("evaluate", out, "--harness", "other", *base[2:]), "'other'", "--include-path")
    refused(
        invoke("evaluate", out, "--harness", "polarity", "--include-path", tmp_path / "none"),
        "no such folder",
    )


@pytest.mark.skipif(INSTALLED, reason="this machine has lm-eval")
def test_without_the_extra_it_is_named(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("lm_eval")]:
        monkeypatch.delitem(sys.modules, name)
    refused(invoke("evaluate", tiny_folder, "--harness", "mine"), "lm_eval", "meerkat-fl[harness]")
