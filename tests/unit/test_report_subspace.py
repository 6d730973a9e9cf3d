"""The report of a run in a subspace: the spread of curvature, and the path of w."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_checks import check_self_contained, pictures

from meerkat.config import parse_recipe
from meerkat.federation.messages import ClientReport
from meerkat.federation.rounds import RoundRecord
from meerkat.journal import Journal, replay
from meerkat.journal.records import Evaluated, RoundMetrics, header_of
from meerkat.reporting.subspace import NAMES, Spread, Within, draw_within, read_within
from meerkat.reporting.writing import write_report
from meerkat.runs.summary import directions_holding, summarise
from meerkat.spaces.mask_file import Mask, save_mask
from meerkat.spaces.subspace import Subspace
from meerkat.terminal.tables import mask_table, summary_table
from meerkat.zo.directions import DirectionKey
from meerkat.zo.log import LogEntry, Update
from meerkat.zo.state import ModelState

K, SIZE, TEXTS = 4, 30, 9
CURVATURE = tuple((4.0 * np.geomspace(1, 1e-2, TEXTS)).tolist())

pytestmark = pytest.mark.slow  # each draws pictures


def mask_of(k: int = K, kind: str = "aligned") -> Mask:
    draw = np.random.default_rng(0)
    subspace = Subspace(
        kind,
        draw.integers(0, 2**14, (k, SIZE)).astype(np.uint16),
        np.ones(k, np.float32),
        np.zeros(k, np.float32),
        CURVATURE if kind == "aligned" else (1.0,) * k,
        {"settings": "{}"},
    )
    whole = (np.arange(SIZE),)
    mask = Mask(("w",), ((5, 6),), whole, SIZE, "ab" * 32, "random", subspace=subspace)
    return replace(mask, initial=np.zeros(SIZE, np.float32))


def run(
    directory: Path,
    rounds: int = 6,
    mask: Mask | None = None,
    first: np.ndarray | None = None,
    **section: Any,
) -> Journal:
    """A run whose w moves from `first`, zeros by default; numbers are made up."""
    first = np.zeros(K, np.float32) if first is None else first
    mask = mask or mask_of()
    directory.mkdir(parents=True, exist_ok=True)
    save_mask(mask, directory / "mask.safetensors")
    recipe = parse_recipe(
        {
            "model": {"name": "tiny-llama"},
            "task": {"name": "sst2"},
            "federation": {"clients": 2, "rounds": max(1, rounds)},
            "subspace": {"dimensions": mask.dimensions, **section},
        }
    )
    header = header_of(recipe, mask, ("terrible", "great"), [[3, 4], [5, 6]], "12" * 32)
    written = Journal.create(directory / "journal.sqlite", header, first)
    state = ModelState(first)
    state = header.algorithm.init(state.theta)
    written.append_evaluation(Evaluated(0, {"loss": 0.7, "accuracy": 0.5}, 40, 0.5))
    for number in range(rounds):
        update = Update(0.1, (LogEntry(DirectionKey(number, 0), 0.25),))
        state = header.algorithm.apply(state, (update,))
        reports = tuple(ClientReport(number, c, 9, 1, 1, bytes(8), (0.5,)) for c in range(2))
        record = RoundRecord(number, reports, (update,), state.digest)
        written.append_round(record, RoundMetrics(0.7, 56, 96, 0.25))
    return written


def test_the_page_has_a_section_of_the_subspace(tmp_path: Path) -> None:
    journal = run(tmp_path)
    w = np.abs(replay(journal).theta)
    page = write_report(tmp_path, journal).read_text("utf-8")
    journal.close()
    check_self_contained(page)
    assert "<h2>Subspace</h2>" in page
    assert {f"{name}.{suffix}" for name in NAMES for suffix in ("svg", "png")} <= pictures(tmp_path)
    for name in NAMES:
        assert ElementTree.parse(tmp_path / f"report/{name}.svg").getroot().get("width") == "480"
    held = 100 * sum(CURVATURE[:K]) / sum(CURVATURE)
    assert f"The 4 directions of the subspace hold {held:.0f} % of the curvature" in page
    assert "answers to 9 texts" in page
    assert f"the largest is direction {int(w.argmax()) + 1}, with |w_j| = {w.max():.3g}" in page
    assert f"{directions_holding(w)} direction" in page
    assert '<dd class="value">4</dd><dd class="hint">numbers that move; aligned</dd>' in page


def test_the_same_journal_gives_the_same_bytes(tmp_path: Path) -> None:
    pages = []
    for name in ("a", "b"):
        journal = run(tmp_path / name)
        pages.append(write_report(tmp_path / name, journal).read_bytes())
        journal.close()
    assert pages[0] == pages[1]


def test_a_run_outside_of_a_subspace_has_none_and_loses_old_pictures(tmp_path: Path) -> None:
    journal = run(tmp_path)
    write_report(tmp_path, journal)
    parsed = journal.header.parsed
    plain = replace(journal.header, recipe=parsed.model_copy(update={"subspace": None}).to_json())
    journal.close()
    (tmp_path / "journal.sqlite").unlink()
    journal = Journal.create(tmp_path / "journal.sqlite", plain, np.zeros(K, np.float32))
    assert read_within(tmp_path, journal) is None
    page = write_report(tmp_path, journal).read_text("utf-8")
    journal.close()
    assert "Subspace</h2>" not in page
    assert "Directions of the subspace" not in page
    assert not any(name.startswith("subspace") for name in pictures(tmp_path))


def test_before_the_first_round_only_the_curvature_is_drawn(tmp_path: Path) -> None:
    journal = run(tmp_path, rounds=0)
    page = write_report(tmp_path, journal).read_text("utf-8")
    journal.close()
    check_self_contained(page)
    drawn = {name for name in pictures(tmp_path) if name.startswith("subspace")}
    assert drawn == {"subspace-curvature.svg", "subspace-curvature.png"}


@pytest.mark.parametrize("why", ["random", "gone", "another", "damaged"])
def test_without_a_curvature_only_the_path_is_drawn(tmp_path: Path, why: str) -> None:
    """Random directions have none; else the run's own mask is not here."""
    kind = "random" if why == "random" else "aligned"
    journal = run(tmp_path, mask=mask_of(kind=kind), kind=kind)
    file = tmp_path / "mask.safetensors"
    if why == "gone":
        file.unlink()
    elif why == "another":
        save_mask(mask_of(k=3), file)
    elif why == "damaged":
        file.write_bytes(file.read_bytes()[:-9])
    page = write_report(tmp_path, journal).read_text("utf-8")
    journal.close()
    check_self_contained(page)
    drawn = {name for name in pictures(tmp_path) if name.startswith("subspace")}
    assert drawn == {f"{name}.{suffix}" for name in NAMES[1:] for suffix in ("svg", "png")}


def test_what_is_drawn_is_the_replayed_w(tmp_path: Path) -> None:
    journal = run(tmp_path)
    within = read_within(tmp_path, journal)
    assert within is not None
    assert within.rounds == list(range(7))
    for rounds, row in zip(within.rounds, within.path, strict=True):
        assert np.array_equal(row, np.abs(replay(journal, rounds).theta).astype(np.float64))
    journal.close()
    assert within.spread == Spread(CURVATURE, 0.0)


def test_many_directions_and_rounds_stay_small() -> None:
    k, draw = 3000, np.random.default_rng(0)
    path = np.abs(draw.normal(size=(400, k)).cumsum(axis=0))
    spread = Spread(tuple((np.arange(5000, 0, -1.0) ** 2).tolist()), 0.01)
    within = Within(k, spread, list(range(0, 4000, 10)), path)
    figures = {figure.name: figure for figure in draw_within(within)}
    assert tuple(figures) == NAMES
    assert "drawn are 400 of 5,000 directions" in figures[NAMES[0]].sentence
    assert "damping, 0.01" in figures[NAMES[0]].svg
    assert "drawn are 400 of 3,000 directions" in figures[NAMES[1]].sentence
    assert "drawn are 400 of 3,991 states" in figures[NAMES[2]].sentence
    assert all(len(figure.svg) < 300_000 for figure in figures.values())


@pytest.mark.parametrize("curvature", [(2.0,), (1.0, 0.0, 0.0), (3.0, 3.0)])
def test_any_spectrum(curvature: tuple[float, ...]) -> None:
    within = Within(1, Spread(curvature, 0.0), [0, 1], np.array([[0.0], [0.5]]))
    first, second, third = draw_within(within)
    assert "The 1 direction of the subspace holds" in first.sentence
    assert "1 direction of 1 holds half of |w|²" in second.sentence
    assert "at the end it holds 100 % of |w|²" in third.sentence
    for figure in (first, second, third):
        ElementTree.fromstring(figure.svg)
        assert figure.png()[:4] == b"\x89PNG"


@pytest.mark.parametrize("first", [(0, 0, 0, 0), (0, 0, 90, 0)])
def test_the_terminal_says_it_in_a_line(tmp_path: Path, first: tuple[float, ...]) -> None:
    """How far w went from where it started, not how far that is from zero."""
    start = np.array(first, np.float32)
    journal = run(tmp_path, first=start)
    summary, w = summarise(journal), replay(journal).theta - start
    within = read_within(tmp_path, journal)
    journal.close()
    assert within is not None
    np.testing.assert_array_equal(within.path[-1], np.abs(w).astype(np.float64))
    assert not within.path[0].any()
    half, largest = directions_holding(w), int(np.abs(w).argmax()) + 1
    assert largest != 3
    assert summary["subspace"] == {"dimensions": K, "half_in": half, "largest": largest}
    cells = [
        str(cell) for column in summary_table(summary, tmp_path).columns for cell in column.cells
    ]
    assert f"4 directions; half of |w|² in {half} of them, most in number {largest}" in cells
    summary["subspace"] = None
    columns = summary_table(summary, tmp_path).columns
    assert "subspace" not in [str(cell) for column in columns for cell in column.cells]


def test_calibrate_says_how_the_curvature_is_spread() -> None:
    from meerkat.runs.finding_mask import FoundMask

    total = sum(CURVATURE)
    held, first = sum(CURVATURE[:K]) / total, CURVATURE[0] / total
    line = (
        f"a subspace of 4 directions, aligned: they hold {held:.0%} of the curvature over 9 texts, "
        f"the first alone {first:.0%}"
    )
    assert line in mask_table(FoundMask(mask_of()))
    assert "a subspace of 4 directions, random" in mask_table(FoundMask(mask_of(kind="random")))


@pytest.mark.parametrize(
    ("w", "share", "expected"),
    [([1, 1, 1, 1], 0.5, 2), ([0, 0], 0.5, 0), ([5, 1], 1.0, 2), ([1e20, 1], 0.9, 1)],
)
def test_directions_holding(w: list[float], share: float, expected: int) -> None:
    assert directions_holding(np.array(w, np.float32), share) == expected
