"""Runs of the tasks that need no network, with a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import SECTIONS, WORDS, merged, tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM

import meerkat
from meerkat.config import parse_recipe
from meerkat.flower.serving import _label_counts
from meerkat.runs.directory import holders_of


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokenizer knows the answers of all tasks as words."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = tiny_config("llama")
    config.vocab_size, config.max_position_embeddings = 600, 512
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer(600, f"{WORDS} {SECTIONS}").save_pretrained(folder)
    return folder


SKEWED = {"kind": "dirichlet", "alpha": 0.5, "min_size": 8}


@pytest.mark.parametrize(
    ("name", "partition"),
    [
        ("debian_sections", SKEWED),
        ("debian_sections", {"kind": "natural"}),
        ("debian_sections_4", {"kind": "single-label"}),
        ("debian_sections_4", {"kind": "natural", "min_size": 100}),
        ("wordnet_pairs", SKEWED),
    ],
)
def test_a_run_on_a_snapshot(
    name: str,
    partition: dict[str, Any],
    model_folder: Path,
    tiny_recipe_data: dict[str, Any],
    tmp_path: Path,
) -> None:
    data = merged(tiny_recipe_data, federation={"clients": 8, "rounds": 2, "batch_size": 2})
    data["model"]["name"] = str(model_folder)
    data["task"] = {"name": name, "max_length": 384}
    data["federation"]["partition"] = partition
    data["evaluation"]["examples"] = 16
    recipe = parse_recipe(data)
    summary = meerkat.run(recipe, tmp_path / "run", observers=())
    assert summary["rounds"] == 2
    assert 0 <= summary["after"]["accuracy"] <= 1
    assert summary["state_digest"] == meerkat.replay(tmp_path / "run").digest
    # Who holds what is written down where clients are their holders, in a simulation alike.
    holders = holders_of(tmp_path / "run")
    assert len(holders) == (8 if partition["kind"] == "natural" else 0)
    assert not holders or holders[0][0] == "Debian Fonts Task Force"
    _label_counts(recipe, tmp_path / "simulated")
    assert holders_of(tmp_path / "simulated") == holders
