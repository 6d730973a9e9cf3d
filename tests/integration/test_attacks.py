"""Lying clients against a tiny model that learns: what `experiments/attacks.py` measures."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from meerkat.config import parse_recipe

SCRIPT = Path(__file__).parents[2] / "experiments" / "attacks.py"


@pytest.fixture(scope="module")
def attacks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("attacks", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["attacks"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiny(attacks: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return attacks.tiny_recipe(tmp_path_factory.mktemp("tiny"))


def loss(
    attacks: ModuleType, tiny: dict[str, Any], out: Path, attack: str, liars: int, defence: str
) -> float:
    recipe = parse_recipe(tiny, ["federation.rounds=45", *attacks.DEFENCES[defence]])
    return float(attacks.outcome_of(recipe, out / "run", attack, liars).get("loss", 1e9))


def test_without_liars_each_aggregator_learns(
    attacks: ModuleType, tiny: dict[str, Any], tmp_path: Path
) -> None:
    found = {d: loss(attacks, tiny, tmp_path / d, "none", 0, d) for d in attacks.DEFENCES}
    assert max(found.values()) < 0.5
    assert found["mean, clipped (default)"] == found["mean, no clipping"], "nothing is clipped"


@pytest.mark.parametrize("attack", ["1e3 g", "constant"])
def test_three_of_ten_destroy_a_mean_and_not_a_median(
    attacks: ModuleType, tiny: dict[str, Any], tmp_path: Path, attack: str
) -> None:
    found = {
        defence: loss(attacks, tiny, tmp_path / defence, attack, 3, defence)
        for defence in ("mean, no clipping", "median", "trimmed mean, 0.3")
    }
    learned = max(found["median"], found["trimmed mean, 0.3"])
    assert learned < 0.5
    assert found["mean, no clipping"] > learned + 0.15
