"""A comparison: grid files, cells and their budget, rows, tables. No run is made here."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from builders import MINIMAL, make_recipe
from hypothesis import given
from hypothesis import strategies as st

from meerkat.comparison.cells import Cell, Group, calibration_passes, example_passes, groups_of
from meerkat.comparison.curves import figures_of
from meerkat.comparison.grid import Grid, load_grid
from meerkat.comparison.methods import METHODS
from meerkat.comparison.outcome import Outcome, Point, better, main_metric
from meerkat.comparison.rows import paired, rows_of, spread
from meerkat.comparison.running import GroupOutcome
from meerkat.comparison.tables import as_csv, as_latex, as_markdown, as_terminal
from meerkat.errors import RecipeError

GRID: dict[str, Any] = {
    "recipe": "base.json",
    "methods": ["meerkat", "aligned", "fedkseed"],
    "passes": 3200,
    "seeds": [1, 2, 3],
    "cases": {
        "steps": {
            "T = 1": {"federation.local_steps": 1},
            "T = 10": {"federation.local_steps": 10},
        },
        "data": {"IID": {}, "one label": {"federation.partition.kind": "single-label"}},
    },
}


def grid_of(**changes: Any) -> Grid:
    return Grid.model_validate({**GRID, **changes})


def written(folder: Path, text: str) -> Path:
    (folder / "base.json").write_text(json.dumps(MINIMAL))
    path = folder / "grid.toml"
    path.write_text(text)
    return path


TOML = """
recipe = "base.json"
methods = ["meerkat", "slow"]
passes = 3200
[method.slow]
title = "a tenth of the rate"
settings = { "optimizer.rule" = "momentum" }
rates = [1e-6]
[cases.steps]
"T = 1" = {}
"""


def test_a_grid_is_read_with_the_recipe_beside_it(tmp_path: Path) -> None:
    path = written(tmp_path, TOML)
    grid, data = load_grid(path, ["passes=640", "seeds=[4, 5]"])
    assert (grid.passes, grid.seeds, data) == (640, (4, 5), MINIMAL)
    slow = grid.found("slow")
    assert slow.settings == {**METHODS["meerkat"].settings, "optimizer.rule": "momentum"}
    assert slow.rates == (1e-6,)
    assert [group.name for group in groups_of(grid, data)] == ["meerkat/T = 1", "slow/T = 1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("methods=['meerkat', 'lion']", r"methods = 'lion' is not known; known are aligned, .*"),
        ("methods=['aligned']", r"reference = 'meerkat' is none of methods; add it"),
        ("methods=['meerkat', 'meerkat']", r"methods = .*: name each once"),
        ("seeds=[0, 1]", r"search\.seed = 0 is one of seeds; .*: take another"),
        ("passes=0", r"passes = 0: "),
        ("pases=3", r"pases = 3 is not a known key; known here: recipe, methods, .*passes"),
        ("search.rates.meerkat=[-1.0]", r"search\.rates\.meerkat\.0 = -1\.0"),
        ("search.rates.lion=[1.0]", r"methods = 'lion' is not known"),
    ],
)
def test_what_is_wrong_with_a_grid_is_one_line(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_grid(written(tmp_path, TOML), [change])
    assert "\n" not in str(caught.value)


def test_a_grid_that_is_not_there_or_is_no_toml(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file"):
        load_grid(tmp_path / "none.toml")
    with pytest.raises(RecipeError, match="not valid TOML"):
        load_grid(written(tmp_path, "recipe ="))


# Cells


def cells_of(grid: Grid, method: str, case: int = 0) -> Group:
    groups = [group for group in groups_of(grid, MINIMAL) if group.method == method]
    return groups[case]


def test_every_case_is_a_product_of_the_axes() -> None:
    cases = [case for case, _ in grid_of().points]
    assert cases == [
        ("T = 1", "IID"),
        ("T = 1", "one label"),
        ("T = 10", "IID"),
        ("T = 10", "one label"),
    ]
    assert grid_of(cases={}).points == [((), {})]


@pytest.mark.parametrize("method", [name for name in METHODS if name != "meerkat-vp"])
def test_each_method_spends_the_budget_and_no_more(method: str) -> None:
    for case in range(4):
        group = cells_of(grid_of(methods=[*{"meerkat": 0, method: 0}]), method, case)
        for cell in (*group.search, *group.chosen(1e-5)):
            each = example_passes(cell.recipe, cell.bound)
            spent = each * cell.recipe.federation.rounds
            assert 3200 - each < spent <= 3200
            assert cell.recipe.evaluation.every * 4 >= cell.recipe.federation.rounds


@pytest.mark.parametrize(
    ("sections", "passes"),
    [
        ({}, 2 * 16),
        ({"noise": {"perturbations": 3}}, 6 * 16),
        ({"optimizer": {"estimator": "one-sided"}, "noise": {"perturbations": 5}}, 6 * 16),
        ({"federation": {"local_steps": 10, "batch_size": 8}}, 2 * 8 * 10),
        ({"subspace": {}}, 8 * 4),
        ({"subspace": {}, "optimizer": {"estimator": "backward"}}, 3 * 16),
    ],
)
def test_example_passes_of_a_round(sections: dict[str, Any], passes: int) -> None:
    assert example_passes(make_recipe(**sections)) == passes


def test_a_calibration_is_paid_from_the_budget() -> None:
    selection = {"kind": "gradip", "calibration_steps": 50}
    assert calibration_passes(make_recipe(selection=selection)) == 50 * 32
    assert calibration_passes(make_recipe(selection={**selection, "apply": True})) == 0
    settings = {"selection.calibration_steps": 50}
    group = cells_of(grid_of(methods=["meerkat", "meerkat-vp"], settings=settings), "meerkat-vp")
    assert group.chosen(1e-5)[0].recipe.federation.rounds == 50
    with pytest.raises(RecipeError, match=r"passes = 3200 is less than a round takes, 32, and a"):
        cells_of(grid_of(methods=["meerkat", "meerkat-vp"]), "meerkat-vp").chosen(1e-5)


def test_cells_differ_in_rate_and_seed_alone() -> None:
    group = cells_of(grid_of(), "meerkat")
    assert [cell.rate for cell in group.search] == list(METHODS["meerkat"].rates)
    assert {cell.seed for cell in group.search} == {0}
    chosen = group.chosen(1e-5)
    assert [cell.seed for cell in chosen] == [1, 2, 3]
    dumped = [cell.recipe.model_dump(exclude={"seed"}) for cell in chosen]
    assert dumped[0] == dumped[1] == dumped[2]
    assert dumped[0]["optimizer"]["learning_rate"] == 1e-5
    folders = {cell.directory(Path("x")) for cell in (*group.search, *chosen)}
    assert len(folders) == 4 + 3
    other = cells_of(grid_of(passes=1600), "meerkat").chosen(1e-5)
    assert not folders & {cell.directory(Path("x")) for cell in other}


def test_a_method_with_one_rate_is_not_searched() -> None:
    group = cells_of(grid_of(), "aligned")
    assert group.search == []
    assert group.chosen("auto")[0].recipe.optimizer.learning_rate == "auto"


def test_a_cell_with_a_wrong_setting_is_named() -> None:
    grid = grid_of(settings={"federation.rouns": 3})
    with pytest.raises(RecipeError, match=r"cell meerkat/T = 1,IID/.*federation\.rouns = 3"):
        cells_of(grid, "meerkat").chosen(1e-5)


# Rows


def outcome(cell: Cell, *scores: float, up: float = 100.0) -> Outcome:
    """Evaluations with these accuracies, after 0, 10, 20 rounds and so on."""
    points = [
        Point(
            10 * place,
            {
                "loss": 1 - score,
                "accuracy": score,
                "validation_loss": 1 - score,
                "validation_accuracy": score,
            },
            up * place,
            2 * up * place,
            320 * place,
        )
        for place, score in enumerate(scores)
    ]
    return Outcome(cell, tuple(points), None if scores else "the loss is not finite")


def group_outcome(grid: Grid, method: str, *scores: tuple[float, ...]) -> GroupOutcome:
    """Of a group whose runs, by seed, had these accuracies; the second rate was chosen."""
    group = cells_of(grid, method)
    search = [outcome(cell, 0.5, 0.6) for cell in group.search]
    rate = group.search[1].rate if search else "auto"
    cells = [outcome(cell, *own) for cell, own in zip(group.chosen(rate), scores, strict=True)]
    return GroupOutcome(group, tuple(search), rate, tuple(cells))


def example() -> list[GroupOutcome]:
    grid = grid_of(target=0.75, cases={})
    return [
        group_outcome(grid, "meerkat", (0.6, 0.70), (0.6, 0.72), (0.6, 0.71)),
        group_outcome(grid, "aligned", (0.7, 0.80), (0.7, 0.80), (0.7, 0.83)),
        group_outcome(grid, "fedkseed", (0.6, 0.65), (), (0.6, 0.62)),
    ]


def test_rows_have_mean_spread_and_a_paired_test() -> None:
    zero, meerkat, aligned, fedkseed = rows_of(example())
    assert (zero.method, zero.score and zero.score.mean) == ("zero-shot", pytest.approx(0.6))
    assert meerkat.difference is None
    assert meerkat.score is not None
    assert meerkat.score.mean == pytest.approx(0.71)
    assert meerkat.score.deviation == pytest.approx(0.01)
    assert not any(name.startswith("validation") for name in meerkat.metrics)
    assert aligned.difference == pytest.approx(0.10)
    # Differences 0.10, 0.08, 0.12: t = 0.1 / (0.02 / √3) with two degrees of freedom.
    t = 0.10 / (0.02 / math.sqrt(3))
    assert aligned.p == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-6)
    assert (aligned.rate, aligned.tried, aligned.edge) == ("auto", 0, False)
    assert (fedkseed.diverged, fedkseed.score and fedkseed.score.count) == (1, 2)
    assert fedkseed.difference == pytest.approx((-0.05 - 0.09) / 2)


def test_rows_say_what_the_target_cost() -> None:
    zero, meerkat, aligned, _ = rows_of(example())
    assert zero.cost is None
    assert meerkat.cost is not None
    assert meerkat.cost.reached == 0
    assert aligned.cost is not None
    assert (aligned.cost.reached, aligned.cost.passes, aligned.cost.bytes) == (3, 320, 300)


def test_a_search_ends_at_an_edge_or_not() -> None:
    found = example()[0]
    assert not found.at_the_edge
    first = GroupOutcome(found.group, found.search, found.search[0].cell.rate, found.cells)
    assert first.at_the_edge


def test_where_every_rate_diverged_there_is_a_row_without_figures() -> None:
    found = example()
    group = found[2].group
    lost = GroupOutcome(group, tuple(outcome(cell) for cell in group.search), None, ())
    row = rows_of([*found[:2], lost])[-1]
    assert (row.rate, row.score, row.difference, row.p) == (None, None, None, None)
    assert "all diverged" in as_markdown([row], "meerkat")


def test_a_search_that_is_under_way_is_not_called_diverged() -> None:
    found = example()
    group = found[2].group
    half = GroupOutcome(group, (outcome(group.search[0], 0.5, 0.6),), None, ())
    markdown = as_markdown(rows_of([*found[:2], half])[-1:], "meerkat")
    assert "being searched" in markdown
    assert "diverged" not in markdown


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_a_method_beside_itself_differs_by_nothing(scores: list[float]) -> None:
    by_seed = dict(enumerate(scores))
    found = paired(by_seed, by_seed)
    assert found is not None
    assert found[0] == 0
    assert math.isnan(found[1])
    assert spread(scores).count == len(scores)


def test_pairs_are_of_equal_seeds() -> None:
    assert paired({1: 2.0}, {2: 1.0}) is None
    assert paired({1: 2.0, 3: 9.0}, {1: 1.0, 2: 7.0})[0] == 1.0  # type: ignore[index]


def test_a_rate_is_chosen_by_validation_and_then_by_loss() -> None:
    cell = cells_of(grid_of(), "meerkat").search[0]

    def ended(accuracy: float, loss: float, test: float) -> Outcome:
        metrics = {
            "accuracy": test,
            "loss": 0.0,
            "validation_accuracy": accuracy,
            "validation_loss": loss,
        }
        return Outcome(cell, (Point(1, metrics, 0, 0, 0),))

    assert better(ended(0.8, 0.5, 0.1), ended(0.7, 0.1, 0.9))
    assert better(ended(0.8, 0.4, 0.1), ended(0.8, 0.5, 0.9))
    assert not better(ended(0.9, math.nan, 1.0), ended(0.1, 9.0, 0.0))
    assert main_metric(["loss"]) == "loss"


# Tables and pictures


def test_the_tables_have_every_row_and_figure() -> None:
    rows = rows_of(example())
    markdown = as_markdown(rows, "meerkat")
    assert "| Meerkat | 1e-05 | 3 | 0.290 ± 0.010 | 0.710 ± 0.010 |" in markdown
    assert "+0.100 | 0.013 |" in markdown
    assert "2, 1 diverged" in markdown
    assert "320, 300 bytes (3 runs)" in markdown
    assert "not reached" in markdown
    read = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert [row["method"] for row in read] == ["zero-shot", "meerkat", "aligned", "fedkseed"]
    assert float(read[2]["accuracy_mean"]) == pytest.approx(0.81)
    assert float(read[2]["bytes_to_target"]) == 300
    latex = as_latex(rows, "meerkat")
    assert latex.count("\\\\") == 1 + len(rows)
    assert "0.710 $\\pm$ 0.010" in latex
    assert as_terminal(rows, "meerkat").row_count == len(rows)


def test_cases_have_headings() -> None:
    grid = grid_of()
    found = [group_outcome(grid, "meerkat", (0.6, 0.7), (0.6, 0.7), (0.6, 0.7))]
    markdown = as_markdown(rows_of(found), "meerkat")
    assert "### T = 1, IID" in markdown
    assert "T = 1, IID" in as_latex(rows_of(found), "meerkat")


def test_there_is_a_picture_by_rounds_bytes_and_passes() -> None:
    figures = figures_of(example())
    assert [figure.name for figure in figures] == ["all-rounds", "all-bytes", "all-passes"]
    for figure in figures:
        assert "Meerkat, aligned subspace" in figure.svg
    assert "0.810, of Meerkat, aligned subspace" in figures[0].sentence
