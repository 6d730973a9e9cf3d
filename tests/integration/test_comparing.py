"""Comparisons of tiny models: search, seeds, tables, and going on after an interruption."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from builders import merged, save_tiny_model

import meerkat
from meerkat.comparison.cells import groups_of
from meerkat.comparison.comparing import Comparison
from meerkat.comparison.grid import load_grid
from meerkat.comparison.outcome import outcome_of
from meerkat.comparison.running import make_cell
from meerkat.errors import RunError
from meerkat.tasks.registry import TASKS

GRID = """
recipe = "base.json"
methods = ["meerkat", "aligned", "feddyn", "fedavg-lora", "fast"]
passes = 256
seeds = [1, 2]
evaluations = 2
target = 0.01
[search]
validation = 8
[search.rates]
meerkat = [1e-3, 1e-2]
feddyn = [1e-3]
fedavg-lora = [1e-3]
[method.fast]
title = "far too fast"
rates = [1e30, 1e31]
[cases.steps]
"T = 1" = { "federation.local_steps" = 1 }
"T = 2" = { "federation.local_steps" = 2 }
"""
SHORT = ["methods=['meerkat']", "cases={}"]


@pytest.fixture
def grid(tiny_recipe_data: dict[str, Any], sentences_file: Path, tmp_path: Path) -> Path:
    """A grid and its recipe: 8 local steps of 2 passes over 16 examples."""
    subspace = {"dimensions": 4, "texts": 12, "kind": "none", "least_rank": 0}
    subspace["corpus"] = str(sentences_file)
    sections = {"federation": {"batch_size": 16}, "evaluation": {"examples": 12}}
    data = merged(tiny_recipe_data, **sections, subspace=subspace)
    (tmp_path / "base.json").write_text(json.dumps(data))
    path = tmp_path / "grid.toml"
    path.write_text(GRID)
    return path


@pytest.mark.slow
def test_a_whole_comparison(grid: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = meerkat.compare(grid, out, jobs=2)
    assert isinstance(found, Comparison)
    assert [(row.case, row.method) for row in found.rows] == [
        ((case,), method)
        for case in ("T = 1", "T = 2")
        for method in ("zero-shot", "meerkat", "aligned", "feddyn", "fedavg-lora", "fast")
    ]
    by_name = {(row.case[0], row.method): row for row in found.rows}
    for case in ("T = 1", "T = 2"):
        for method in ("meerkat", "aligned", "feddyn", "fedavg-lora"):
            row = by_name[case, method]
            assert row.score is not None
            assert (row.score.count, row.diverged) == (2, 0)
            assert 0 < row.passes <= 256
            assert row.bytes_up > 0
            assert row.cost is not None
            assert row.cost.reached == 2
        assert by_name[case, "fast"].rate is None
        assert by_name[case, "meerkat"].rate in (1e-3, 1e-2)
        assert by_name[case, "meerkat"].edge  # of two rates both are
    # With T = 2 there are half as many rounds of as many passes.
    assert by_name["T = 1", "meerkat"].rounds == 2 * by_name["T = 2", "meerkat"].rounds == 8
    for name in ("table.md", "table.csv", "table.tex", "pictures/t-1-bytes.svg"):
        assert (out / name).stat().st_size > 100
    # The exact recipe of each run is in its folder; another call makes none again.
    recipes = sorted(out.glob("cells/*/*/*/recipe.json"))
    assert len(recipes) == 2 * (2 + 2 + 2 + 2 + 2)
    before = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/*/*/*")}
    again = meerkat.compare(grid, out, jobs=1)
    assert again.rows == found.rows
    assert {path: path.stat().st_mtime_ns for path in out.glob("cells/*/*/*/*")} == before


@pytest.mark.slow
def test_tables_of_what_is_there(grid: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RunError, match="no run of the comparison"):
        meerkat.compare(grid, out, SHORT, only_tables=True)
    parsed, data = load_grid(grid, SHORT)
    group = next(groups_of(parsed, data))
    for cell in (*group.search, group.chosen(1e-2)[0]):
        make_cell(cell, out, 1)
    found = meerkat.compare(grid, out, SHORT, only_tables=True)
    rates = [row.rate for row in found.rows]
    assert len(found.rows) in (1, 2)
    assert rates[-1] in (1e-3, 1e-2)


def test_a_calibration_of_clients_is_counted(grid: Path, tmp_path: Path) -> None:
    """Its passes and its bytes, which the rounds do not have."""
    changes = [
        "methods=['meerkat', 'meerkat-vp']",
        "cases={}",
        "search.rates.meerkat=[1e-3]",
        "search.rates.meerkat-vp=[1e-3]",
        "settings={'selection.calibration_steps'=4}",
    ]
    parsed, data = load_grid(grid, changes)
    group = next(g for g in groups_of(parsed, data) if g.method == "meerkat-vp")
    cell = group.chosen(1e-3)[0]
    make_cell(cell, tmp_path, 1)
    found = outcome_of(cell, tmp_path)
    assert found is not None
    summary = json.loads((cell.directory(tmp_path) / "summary.json").read_text())
    assert summary["calibration_bytes_up"] > 0
    rounds = summary["rounds"] * summary["bytes_up_per_client_round"]
    assert found.last.bytes_up == rounds + summary["calibration_bytes_up"] / summary["clients"]
    steps = summary["rounds"] * summary["local_steps"]
    assert found.last.passes == 2 * 16 * (4 + steps) <= 256
    assert (found.evaluations[0].passes, found.evaluations[0].bytes_up) == (0, 0)


def test_a_cell_that_cannot_be_made_is_named(grid: Path, tmp_path: Path) -> None:
    """The others are made, and their tables written when the rest is there."""
    changes = [*SHORT, "settings={'mask.kind'='sensitivity','mask.corpus'='nowhere.txt'}"]
    with pytest.raises(RunError, match=r"cell meerkat/all/.*nowhere\.txt"):
        meerkat.compare(grid, tmp_path / "out", changes, jobs=1)


def test_a_mask_of_density_one_is_full_fedzo(
    tiny_recipe_data: dict[str, Any], tmp_path: Path
) -> None:
    digests = set()
    for number, mask in enumerate(({"kind": "full"}, {"kind": "sensitivity", "density": 1.0})):
        recipe = meerkat.parse_recipe(merged(tiny_recipe_data, mask=mask))
        summary = meerkat.run(recipe, tmp_path / str(number), observers=())
        assert summary["mask_size"] == summary["eligible_parameters"]
        digests.add(summary["state_digest"])
    assert len(digests) == 1


COLUMNS: dict[str, tuple[str, ...]] = {
    "sst2": ("sentence",),
    "ag_news": ("text",),
    "yelp": ("text",),
    "boolq": ("passage", "question"),
    "rte": ("premise", "hypothesis"),
    "wsc": ("text", "span1_text", "span2_text"),
    "wic": ("word", "sentence1", "sentence2"),
}
"""Of the hub's data sets, beside the label."""


def hub_like(folder: Path, task: str, splits: dict[str, int]) -> Path:
    """Files of a task's columns, a text of its own in each row."""
    labels = len(TASKS[task].label_names)
    folder.mkdir()
    for number, (name, rows) in enumerate(splits.items()):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*COLUMNS[task], "label"])
            for row in range(rows):
                text = f"{('good', 'bad')[row % 2]} thing {number} {row}"
                writer.writerow([*(f"{text} {column}" for column in COLUMNS[task]), row % labels])
    return folder


PAPER = [(task, ("llama", "qwen2", "gemma2")[turn % 3]) for turn, task in enumerate(COLUMNS)]
"""Each task on one of the architectures, and one task on all."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "architecture"), [*PAPER, ("sst2", "qwen2"), ("sst2", "gemma2")], ids=str
)
def test_a_step_of_the_papers_grid_on_a_tiny_model(
    tiny_recipe_data: dict[str, Any], tmp_path: Path, task: str, architecture: str
) -> None:
    """The recipe of a cell, with local files of the hub's columns, and a model of two layers."""
    path = Path(__file__).parents[2] / "recipes" / "paper" / "methods.toml"
    grid, data = load_grid(path)
    case = (architecture, task.replace("_", ""))
    group = next(g for g in groups_of(grid, data) if (g.method, g.case) == ("meerkat", case))
    cell = group.chosen(1e-3)[0].recipe.model_dump(mode="json", exclude_defaults=True)
    tested = TASKS[task].test_split
    assert tested is not None
    source = hub_like(tmp_path / "data", task, {"train": 200, tested: 40})
    size = {"max_position_embeddings": 512, "vocab_size": 512}
    model = save_tiny_model(tmp_path / "model", architecture, TASKS[task].verbalizers, **size)
    changes: dict[str, Any] = {
        "model": {"name": str(model)},
        "mask": {**tiny_recipe_data["mask"], "corpus_config": None},
        "task": {"source": str(source), "source_config": None, "validation_split": "train[:30]"},
        "federation": {"rounds": 1, "local_steps": 1, "clients": 3},
        "evaluation": {"examples": 20, "validation": 20, "every": 0},
        "runtime": tiny_recipe_data["runtime"],
    }
    summary = meerkat.run(meerkat.parse_recipe(merged(cell, **changes)), tmp_path / "run")
    assert summary["rounds"] == 1
    assert {"validation_accuracy", "accuracy"} <= summary["after"].keys()
