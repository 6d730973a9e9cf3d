"""The grids that come with the project: each cell has a valid recipe."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from meerkat.comparison.cells import groups_of
from meerkat.comparison.grid import load_grid
from meerkat.comparison.methods import METHODS
from meerkat.tasks import resolve_task

ROOT = Path(__file__).parents[2] / "recipes"
GRIDS = sorted(p for folder in ("paper", "comparison") for p in (ROOT / folder).glob("*.toml"))
GRIDS = [path for path in GRIDS if path.stem != "base"]


def test_there_are_grids() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in GRIDS}
    assert {"paper/methods.toml", "paper/frequency.toml", "comparison/stopping.toml"} <= names


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_cell_is_valid(path: Path) -> None:
    grid, data = load_grid(path)
    count = 0
    for group in groups_of(grid, data):
        rate = group.search[0].rate if group.search else "auto"
        for cell in (*group.search, *group.chosen(rate)):
            resolve_task(cell.recipe.task)
            assert cell.recipe.federation.rounds >= 1
            count += 1
    assert count >= 5 * len(grid.points)


def test_the_grid_of_the_documentation_is_valid(tmp_path: Path) -> None:
    text = (ROOT.parent / "docs" / "comparing.md").read_text("utf-8")
    (block,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "grid.toml").write_text(block, "utf-8")
    shutil.copy(ROOT / "comparison" / "base.toml", tmp_path)
    grid, data = load_grid(tmp_path / "grid.toml")
    cells = [cell for group in groups_of(grid, data) for cell in group.search]
    assert {cell.recipe.optimizer.rule.kind for cell in cells} == {"sgd", "momentum"}


def test_the_documentation_names_every_method() -> None:
    text = (ROOT.parent / "docs" / "comparing.md").read_text("utf-8")
    named = set(re.findall(r"`([a-z-]+)`", text))
    left_out = {"-masked", "-lora"}
    for name in METHODS:
        assert {name, *(name.removesuffix(end) for end in left_out)} & named, name


def test_the_papers_grids_have_its_models_tasks_and_steps() -> None:
    grid, _ = load_grid(ROOT / "paper" / "methods.toml")
    assert len(grid.cases["model"]) == 3
    assert len(grid.cases["task"]) == 7
    frequency, _ = load_grid(ROOT / "paper" / "frequency.toml")
    steps = [next(iter(s.values())) for s in frequency.cases["steps"].values()]
    assert steps == [1, 10, 30, 50, 100]
    assert list(frequency.cases["data"]) == ["IID", "Dirichlet 0.5"]
    density, _ = load_grid(ROOT / "paper" / "density.toml")
    densities = [next(iter(s.values())) for s in density.cases["density"].values()]
    assert densities == [1e-2, 1e-3, 1e-4]
