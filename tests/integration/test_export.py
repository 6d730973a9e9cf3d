"""What exports write: cards, recipes, Modelfiles, adapters for plain peft, the same bytes."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from builders import ARCHITECTURES, merged, save_tiny_model
from commands import invoke, refused
from huggingface_hub import ModelCard

import meerkat
from meerkat.config import load_recipe, parse_recipe
from meerkat.errors import RunError
from meerkat.exporting.ollama import ARCHITECTURES as IMPORTED

IDS = torch.arange(5, 35)[None]


@pytest.fixture(scope="module")
def out(tiny_recipe_data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with evaluations in mid-run."""
    return make_run(
        tiny_recipe_data, tmp_path_factory.mktemp("runs") / "run", evaluation={"every": 2}
    )


def make_run(data: dict[str, Any], out: Path, **sections: Any) -> Path:
    meerkat.run(parse_recipe(merged(data, **sections)), out, observers=())
    return out


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits.float()


def load(path: Path | str, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options).eval()


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def base_of(out: Path) -> str:
    return str(load_recipe(out / "recipe.json").model.name)


# The card, and what else stands beside a merged model


def test_the_card_says_what_the_run_was(out: Path, tmp_path: Path) -> None:
    folder = meerkat.export(out, tmp_path / "merged")
    summary = json.loads((out / "summary.json").read_text())
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.base_model is None  # a local folder has no name on a hub
    assert card.data.license is None
    found = {result.metric_type: result for result in card.data.eval_results}
    assert found["accuracy"].metric_value == summary["after"]["accuracy"]
    assert found["f1"].metric_value == summary["after"]["macro_f1"]
    assert found["accuracy"].dataset_split == "held out of the training split"
    text = card.text
    for part in (
        "| clients | 3 |",
        "dirichlet (alpha = 1)",
        "| rounds | 4 of 4, of 2 local steps |",
        f"sensitivity mask, {summary['mask_size']:,} of {summary['eligible_parameters']:,}",
        "unknown: ask where the base model came from",
        f"{summary['before']['accuracy']:.4f} | {summary['after']['accuracy']:.4f}",
        "Measured on 20 examples",
        "meerkat-fl",
        f"{round(summary['bytes_up_per_client_round']):,} for a client and round",
        f"{round(summary['bytes_up_per_client_round'] * 12):,} in all",
    ):
        assert part in text, part


def test_the_card_of_a_round_in_between(out: Path, tmp_path: Path) -> None:
    folder = meerkat.export(out, tmp_path / "two", rounds=2)
    text = (folder / "README.md").read_text()
    assert "| rounds | 2 of 4" in text
    assert "not measured" not in text
    folder = meerkat.export(out, tmp_path / "three", rounds=3)
    assert "| not measured |" in (folder / "README.md").read_text()
    assert ModelCard.load(folder / "README.md").data.eval_results is None


def test_the_lines_of_the_card_work(out: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """They give the scores of the answers that the merged model has."""
    folder = meerkat.export(out, tmp_path / "merged")
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    assert code is not None
    monkeypatch.chdir(folder)
    with redirect_stdout(io.StringIO()) as printed:
        exec(code[1], {})
    scores = eval(printed.getvalue())
    assert set(scores) == {"terrible", "great"}
    assert all(np.isfinite(list(scores.values())))


def test_nothing_of_the_machine_is_in_an_export(out: Path, tmp_path: Path) -> None:
    private = {str(Path(base_of(out)).parent), str(out), str(tmp_path), os.getcwd()}
    recipe = load_recipe(out / "recipe.json")
    private |= {str(recipe.runtime.cache_dir), str(recipe.task.source), str(recipe.mask.corpus)}
    for form in ({}, {"peft": True}, {"shira": True}):
        folder = meerkat.export(out, tmp_path / "-".join(["of", *form]), **form)
        for name, content in bytes_of(folder).items():
            for path in private:
                assert path.encode() not in content, (name, path)
        published = load_recipe(folder / "recipe.json")
        assert published.runtime == type(published.runtime)()
        assert (published.model.name, published.task.source) == ("tiny-llama", "reviews.csv")
        kept = ("mask", "federation", "optimizer", "noise", "evaluation", "seed")
        for section in kept[1:]:
            assert getattr(published, section) == getattr(recipe, section)


EXPORTS = """
import sys, meerkat
run, to, *forms = sys.argv[1:]
for form in forms:
    meerkat.export(run, f"{to}/{form}", **({form: True} if form != "merged" else {}))
"""


def test_an_export_has_the_same_bytes_each_time(out: Path, tmp_path: Path) -> None:
    """Also from another process, whose hashes are others."""
    forms = ["merged", "delta", "peft", "shira"]
    here, there = tmp_path / "here", tmp_path / "there"
    for form in forms:
        meerkat.export(out, here / form, **({} if form == "merged" else {form: True}))
    command = [sys.executable, "-c", EXPORTS, str(out), str(there), *forms]
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    assert (here / "delta").read_bytes() == (there / "delta").read_bytes()
    for form in ("merged", "peft", "shira"):
        assert bytes_of(here / form) == bytes_of(there / form)


def test_a_licence_comes_from_the_files_of_the_base(
    tiny_recipe_data: dict[str, Any], tmp_path: Path
) -> None:
    base = save_tiny_model(tmp_path / "base")
    (base / "LICENSE").write_text("Do no harm.")
    out = make_run(tiny_recipe_data, tmp_path / "run", model={"name": str(base)})
    folder = meerkat.export(out, tmp_path / "text")
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.license_link) == ("other", "LICENSE")
    assert "see LICENSE" in card.text
    assert (folder / "LICENSE").read_text() == "Do no harm."
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    folder = meerkat.export(out, tmp_path / "named")
    assert ModelCard.load(folder / "README.md").data.license == "apache-2.0"
    (base / "README.md").write_text("no front matter")
    folder = meerkat.export(out, tmp_path / "again")
    assert ModelCard.load(folder / "README.md").data.license == "other"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_modelfile_where_ollama_imports_the_architecture(
    architecture: str, tiny_recipe_data: dict[str, Any], tmp_path: Path
) -> None:
    base = save_tiny_model(tmp_path / "base", architecture)
    one = {"rounds": 1, "clients": 1, "partition": {"kind": "iid"}}
    out = make_run(tiny_recipe_data, tmp_path / "run", model={"name": str(base)}, federation=one)
    printed = invoke("export", out, "--to", tmp_path / "merged")
    assert printed.exit_code == 0, printed.output
    file = tmp_path / "merged" / "Modelfile"
    name = json.loads((tmp_path / "merged" / "config.json").read_text())["architectures"][0]
    if name in IMPORTED:
        lines = file.read_text().splitlines()
        assert lines[1:3] == ["FROM .", 'TEMPLATE """{{ .Prompt }}"""']
        assert 'PARAMETER stop "</s>"' in lines[3:]
        assert "Ollama does not import" not in printed.output
    else:
        assert not file.exists()
        line = f"no Modelfile: Ollama does not import {name} from safetensors"
        assert line in printed.output
        assert line in (tmp_path / "merged" / "README.md").read_text()


# Adapters of a sparse change


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch's, of SHiRA
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("llama", "float32"), ("qwen2", "bfloat16"), ("gemma3", "bfloat16"), ("opt", "float32")],
)
def test_plain_peft_loads_a_sparse_change(
    architecture: str, dtype: str, tiny_recipe_data: dict[str, Any], tmp_path: Path
) -> None:
    """SHiRA with the bits of the merged model; LoRA with its logits, and its bits when merged."""
    base = save_tiny_model(tmp_path / "base", architecture)
    model = {"name": str(base), "dtype": dtype}
    mask = {"density": 0.005}
    out = make_run(tiny_recipe_data, tmp_path / "run", model=model, mask=mask)
    merged_folder = meerkat.export(out, tmp_path / "merged")
    for form in ("peft", "shira"):
        # Factors are added to outputs, whose rounding in bfloat16 is larger than any change here.
        in_full = form == "peft"
        plain, first, second = (
            load(path, dtype=dtype).to(torch.float32 if in_full else getattr(torch, dtype))
            for path in (merged_folder, base, base)
        )
        moved = (logits(plain) - logits(first)).norm()
        assert moved > 0
        folder = meerkat.export(out, tmp_path / form, **{form: True})
        adapted = peft.PeftModel.from_pretrained(second, folder).eval()
        exact = not in_full and dtype == "bfloat16"
        assert (logits(adapted) - logits(plain)).norm() <= (0 if exact else 1e-3 * moved)
        whole = adapted.merge_and_unload()
        for ours, theirs in zip(plain.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
        assert ModelCard.load(folder / "README.md").data.library_name == "peft"


def test_the_sizes_of_what_can_be_exported(out: Path, tmp_path: Path) -> None:
    sizes = []
    for form in ("delta", "shira", "peft"):
        path = meerkat.export(out, tmp_path / form, **{form: True})
        file = path if path.is_file() else path / "adapter_model.safetensors"
        sizes.append(file.stat().st_size)
    assert sizes[0] < sizes[1]


def test_what_no_adapter_can_carry_is_refused(
    tiny_recipe_data: dict[str, Any], tmp_path: Path
) -> None:
    spread = {"kind": "full"}
    out = make_run(tiny_recipe_data, tmp_path / "spread", mask=spread)
    refused(invoke("export", out, "--to", tmp_path / "a", "--peft"), "--peft", "take --shira")
    refused(invoke("export", out, "--to", tmp_path / "a", "--shira"), "--shira", "take --delta")
    norms = {"include": ["*norm*"], "kind": "full"}
    out = make_run(tiny_recipe_data, tmp_path / "norms", mask=norms)
    for form in ("--peft", "--shira"):
        line = "layernorm.weight, which is not the weight of a linear layer"
        refused(invoke("export", out, "--to", tmp_path / "a", form), line, "--delta")
    refused(invoke("export", out, "--to", tmp_path / "a", "--peft", "--shira"), "exclude")
    assert not (tmp_path / "a").exists()


def test_a_run_that_changed_nothing_has_no_adapter(
    tiny_recipe_data: dict[str, Any], tmp_path: Path
) -> None:
    out = make_run(tiny_recipe_data, tmp_path / "run", optimizer={"learning_rate": 1e-30})
    with pytest.raises(RunError, match="changed no weight"):
        meerkat.export(out, tmp_path / "a", peft=True)
