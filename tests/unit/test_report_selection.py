"""The report of a run with a selection: paths, thresholds, verdicts, and what was not known."""

from __future__ import annotations

import html
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Collection, Sequence
from copy import copy
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import altair as alt
import numpy as np
import pytest
from report_checks import check_self_contained, pictures

from meerkat.config import Recipe, parse_recipe
from meerkat.federation.messages import CALIBRATION, ClientReport
from meerkat.federation.rounds import RoundRecord
from meerkat.federation.schedule import Schedule
from meerkat.federation.selection import (
    Decision,
    Thresholds,
    Verdict,
    decide_by_paths,
    decide_without_paths,
)
from meerkat.journal import Journal
from meerkat.journal.records import Evaluated, Header, RoundMetrics
from meerkat.reporting import charts
from meerkat.reporting.figure import GREY, VERMILLION, Figure
from meerkat.reporting.page import render
from meerkat.reporting.paths import draw_paths
from meerkat.reporting.run_view import Run, read
from meerkat.reporting.scatter import _clumps, _Plane, _Point, draw_scatter
from meerkat.reporting.stopping import read_paths, read_stopping
from meerkat.reporting.writing import write_report
from meerkat.runs.trajectories import calibration_signals
from meerkat.spaces.mask_file import Mask, save_mask
from meerkat.zo.directions import DirectionKey
from meerkat.zo.log import LogEntry, Update
from meerkat.zo.state import ModelState

MODEL, N = "ab" * 32, 64
THETA = np.zeros(N, np.float32)
COMPANIONS = {"gradip-norm", "gradip-cosine"}
SECTION = "<h2>Early stopping</h2>"

pytestmark = pytest.mark.slow  # each draws pictures


def mask(gradient: bool = True) -> Mask:
    p = np.random.default_rng(3).normal(0, 40, N).astype(np.float32) if gradient else None
    indices = (np.arange(N),)
    return Mask(("model.layers.0.q.weight",), ((8, 16),), indices, 128, MODEL, "sensitivity", p)


def recipe(size: int = 8, /, **selection) -> Recipe:
    return parse_recipe(
        {
            "seed": 7,
            "model": {"name": "tiny-llama"},
            "task": {"name": "sst2"},
            "federation": {"clients": size, "rounds": 6, "local_steps": 10},
            "selection": {"kind": "gradip", "signal": "gradip", **selection},
        }
    )


def header(
    parsed: Recipe, extreme: Collection[int] = (), labels: Sequence[str] = ("terrible", "great")
) -> Header:
    """Extreme clients hold 60 examples of one label, the others 20 and a few of each."""
    held = [[20 + (7 * k + 3 * i) % 11 for i in range(len(labels))] for k in range(1000)]
    single = [[60 * (i == k % len(labels)) for i in range(len(labels))] for k in range(1000)]
    return Header(
        recipe=parsed.to_json(),
        fingerprint=parsed.fingerprint,
        model=MODEL,
        configuration="e" * 64,
        space=mask().digest,
        size=N,
        mask=mask().digest,
        mask_kind="sensitivity",
        mask_size=N,
        eligible=128,
        mask_parts={"model.layers.0.q.weight": N},
        noise="ef" * 32,
        labels=list(labels),
        label_counts=[
            single[k] if k in extreme else held[k] for k in range(parsed.federation.clients)
        ],
        partition="12" * 32,
    )


def calibration(clients: Collection[int], extreme: Collection[int], steps: int = 100):
    """Reports of clients, of whom the extreme ones fall silent."""
    times = np.arange(steps)
    for client in clients:
        generator = np.random.default_rng(100 + client)
        fall = np.exp(-times / 18) + 0.02 if client in extreme else 1 - 0.4 * times / steps
        level = 6 * np.exp(generator.normal(0, 0.4 if client in extreme else 0.2))
        g = (generator.normal(0, level, steps) * fall).astype(np.float32)
        yield ClientReport(CALIBRATION, client, 50, steps, 1, bytes(8), tuple(g.tolist()))


def run(
    directory: Path,
    size: int = 8,
    extreme: Collection[int] = (2, 5, 7),
    rounds: int = 2,
    labels: Sequence[str] = ("terrible", "great"),
    reports: Sequence[ClientReport] | None = None,
    save: Mask | None = None,
    **selection,
) -> Journal:
    """A run whose clients were calibrated, judged, and took a few rounds."""
    parsed = recipe(size, **selection)
    directory.mkdir(parents=True, exist_ok=True)
    save_mask(save or mask(), directory / "mask.safetensors")
    path = directory / "journal.sqlite"
    path.unlink(missing_ok=True)
    written = Journal.create(path, header(parsed, extreme, labels), THETA)
    steps, local_steps = parsed.selection.calibration_steps, parsed.federation.local_steps
    if parsed.selection.kind == "gradip":
        if reports is None:
            reports = list(calibration(range(size), extreme, steps))
        written.append_calibrations(reports)
        signals = calibration_signals(written, Schedule.of(parsed), mask().gradient)
        written.append_decision(
            decide_by_paths(parsed.selection, local_steps, 0, "calibration", signals)
        )
    else:
        written.append_decision(decide_without_paths(size, local_steps, sorted(extreme)))
    written.append_evaluation(
        Evaluated(0, {"loss": 0.7, "accuracy": 0.5, "macro_f1": 0.5}, 400, 1.5)
    )
    for number in range(rounds):
        reports = [ClientReport(number, k, 50, 1, 1, bytes(8), (0.5,)) for k in range(size)]
        update = Update(1e-4, (LogEntry(DirectionKey(number, 0), 0.25),))
        after = ModelState(THETA + number + 1).digest
        record = RoundRecord(number, tuple(reports), (update,), after)
        written.append_round(record, RoundMetrics(0.7 - 0.1 * number, 28, 48, 0.25))
    return written


def report(directory: Path, *args, **kwargs) -> str:
    written = run(directory, *args, **kwargs)
    return page_of(directory, written)


def words(written: Journal) -> str:
    """The page without its pictures, which take long to draw."""
    page = render(read(written), [])
    written.close()
    check_self_contained(page)
    return page


def page_of(directory: Path, written: Journal) -> str:
    page = write_report(directory, written).read_text("utf-8")
    written.close()
    check_self_contained(page)
    return page


def strokes(directory: Path, name: str, colour: str) -> int:
    """Marks of a colour in a picture, without the one in its legend."""
    drawn = (directory / "report" / f"{name}.svg").read_text("utf-8")
    legend = f'{colour}" stroke-width="2" opacity="1"' in drawn
    return len(re.findall(rf'<path[^>]*(?:stroke|fill)="{colour}"', drawn)) - legend


def rows(page: str) -> list[list[str]]:
    """Cells of the table of verdicts, as text."""
    table = page.split('class="numbers verdicts"')[1].split("</table>")[0]
    body = table.split("<tbody>")[1]
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in body.split("</tr>")[:-1]]
    return [[re.sub("<[^>]*>", "", cell).strip() for cell in row] for row in cells]


def captions(page: str) -> str:
    return " ".join(re.findall(r"<figcaption>(.*?)</figcaption>", page))


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run with three extreme clients of eight."""
    directory = tmp_path_factory.mktemp("selected")
    report(directory)
    return directory


def test_page_tells_the_decision(usual):
    page = (usual / "report.html").read_text("utf-8")
    written = Journal.open(usual / "journal.sqlite")
    (decision,) = written.decisions()
    written.close()
    assert decision.flagged == (2, 5, 7)
    course, section, data = (
        page.index(f"<h2>{h}</h2>")
        for h in ("Course of the run", "Early stopping", "Data and mask")
    )
    assert course < section < data
    assert '<dd class="value">3 of 8 clients</dd><dd class="hint">2, 5, 7</dd>' in page
    assert "Stopped: 3 of 8 clients" in page
    assert decision.thresholds is not None
    assert f"σ = {decision.thresholds.sigma:.0f}," in page
    found = rows(page)
    assert [row[:3] for row in found[:3]] == [[str(k), "stopped", "1"] for k in (2, 5, 7)]
    assert [row[1:3] for row in found[3:]] == [["kept", "10"]] * 5
    assert found[0][-3:] == ["0", "calibration", "terrible 60"]
    assert found[1][-1] == "great 60"
    margins = [float(row[5]) for row in found[3:]]
    assert margins == sorted(margins, reverse=True)
    assert margins[0] < 0 < float(found[0][5])
    assert "decisions, of which the last" not in page


def test_pictures_show_every_client_in_its_colour(usual):
    for name in ("gradip", "selection", *COMPANIONS):
        assert strokes(usual, name, VERMILLION) == 3, name
        assert strokes(usual, name, GREY) == 5, name
        assert (usual / "report" / f"{name}.png").stat().st_size > 5000
        ElementTree.parse(usual / "report" / f"{name}.svg")
    names = {name for name in charts.FIGURES if not name.startswith(("scores", "subspace"))}
    assert names == {name.rpartition(".")[0] for name in pictures(usual)}
    text = captions((usual / "report.html").read_text("utf-8"))
    assert "3 of 8 clients are extreme; in the last 20 steps the mean |GradIP| is" in text
    assert "(drawn are" not in text


def test_extreme_clients_lie_on_top(usual):
    drawn = (usual / "report" / "gradip.svg").read_text("utf-8")
    colours = re.findall(rf'stroke="({GREY}|{VERMILLION})" stroke-width="(?:1.5|2)"', drawn)
    assert colours[:8] == [GREY] * 5 + [VERMILLION] * 3


def test_same_journal_gives_same_bytes(tmp_path, usual):
    assert report(tmp_path) == (usual / "report.html").read_text("utf-8")
    for name in pictures(usual):
        assert (tmp_path / "report" / name).read_bytes() == (usual / "report" / name).read_bytes()


def test_one_client(tmp_path):
    page = report(tmp_path, 1, (0,), sigma=30.0, rho_later=1.5, rho_quiet=0.5)
    assert "The one client is extreme" in page
    assert "1 of 1 client</dd>" in page
    assert strokes(tmp_path, "gradip", VERMILLION) == 1
    assert GREY not in (tmp_path / "report" / "gradip.svg").read_text("utf-8")


def test_hundred_clients(tmp_path):
    labels = ("World", "Sports", "Business", "Technology")
    page = report(tmp_path, 100, range(70, 100), labels=labels)
    assert strokes(tmp_path, "gradip", VERMILLION) == 30
    assert strokes(tmp_path, "gradip", GREY) == 70
    assert strokes(tmp_path, "selection", VERMILLION) == 30
    found = rows(page)
    assert [row[1] for row in found] == ["stopped"] * 30 + ["kept"] * 6
    assert "(36 of 100)" in page
    assert "70, 71, 72, 73, 74, 75, 76, 77 and 22 more" in page
    assert len(page) < 700_000
    assert all(re.search(r"(World|Sports|Business|Technology) 60$", row[-1]) for row in found[:30])


def test_what_is_left_out_is_said(tmp_path):
    """Of many clients, all pictures and the table show some, and say so."""
    written = run(tmp_path, 600, range(450, 600), rounds=0)
    decision = written.decisions()[0]
    paths = read_paths(tmp_path, written, decision)
    assert paths is not None
    assert [len(lines) for lines in paths.curves.values()] == [200] * 3
    assert all("(drawn are 200 of 600 clients)." in f.sentence for f in draw_paths(paths))
    scatter = draw_scatter(decision)
    assert scatter is not None
    assert "150 of 600 clients are extreme" in scatter.sentence
    assert "(drawn are 400 of 600 clients)." in scatter.sentence
    stopping = read_stopping(written)
    assert stopping is not None
    assert len(stopping.made[0].extreme) == 150
    assert [row[1] for row in rows(words(written))] == ["stopped"] * 100 + ["kept"] * 6


def test_directions_for_each_client(tmp_path):
    """They cost a vector for each client and step, so few paths are drawn."""
    written = run(tmp_path, 40, range(15), calibration_steps=10)
    decision = replace(
        written.decisions()[0],
        verdicts=tuple(Verdict(k, k < 15, 1, 0, "calibration", 2.0, 0.5) for k in range(40)),
    )
    parsed = parse_recipe(
        {**json.loads(written.header.recipe), "noise": {"directions": "per-client"}}
    )
    shape = replace(written.header, recipe=parsed.to_json())
    reports = list(written.calibrations())
    written.close()
    other = Journal.create(tmp_path / "other.sqlite", shape, THETA)
    other.append_calibrations(reports)
    paths = read_paths(tmp_path, other, decision)
    other.close()
    assert paths is not None
    assert len(paths.curves["gradip"]) == 20
    assert all("(drawn are 20 of 40 clients)." in f.sentence for f in draw_paths(paths))


def test_nobody_is_extreme(tmp_path):
    page = report(tmp_path, extreme=())
    assert "σ none found, ρ_later none found, ρ_quiet none found" in page
    assert "0 of 8 clients</dd>" in page
    assert "nobody is extreme" in page
    assert "None of 8 clients is extreme" in page
    assert {row[1] for row in rows(page)} == {"kept"}
    assert "selection.svg" not in pictures(tmp_path)
    assert "σ =" not in (tmp_path / "report" / "gradip.svg").read_text("utf-8")


def test_no_section_without_a_decision(tmp_path, usual):
    for name in pictures(usual):
        (tmp_path / "report").mkdir(exist_ok=True)
        (tmp_path / "report" / name).write_bytes((usual / "report" / name).read_bytes())
    parsed = recipe()
    written = Journal.create(tmp_path / "journal.sqlite", header(parsed), THETA)
    written.append_calibrations(list(calibration(range(8), (2,))))
    page = page_of(tmp_path, written)
    assert SECTION not in page
    assert "Stopped early" not in page
    assert pictures(tmp_path) == {f"{n}.{s}" for n in ("clients", "mask") for s in ("svg", "png")}


def test_decision_without_rounds(tmp_path):
    page = report(tmp_path, rounds=0)
    assert SECTION in page
    assert "unfinished: 0 of 6 rounds" in page
    assert "gradip.svg" in pictures(tmp_path)


@pytest.mark.parametrize("how", ["missing", "without gradient", "another", "damaged"])
def test_without_p_the_projected_gradient_is_drawn(tmp_path, how):
    written = run(tmp_path)
    path = tmp_path / "mask.safetensors"
    match how:
        case "missing":
            path.unlink()
        case "without gradient":
            save_mask(mask(gradient=False), path)
        case "another":
            save_mask(replace(mask(), indices=(np.arange(1, N + 1),)), path)
        case "damaged":
            path.write_bytes(b"not a mask")
    page = page_of(tmp_path, written)
    drawn = (tmp_path / "report" / "gradip.svg").read_text("utf-8")
    assert "|g|" in drawn
    assert "GradIP" not in drawn
    assert "σ =" not in drawn  # it is a level of |GradIP|
    assert "the mean |g| is" in captions(page)
    assert not {name for name in pictures(tmp_path) if name.rpartition(".")[0] in COMPANIONS}
    assert strokes(tmp_path, "selection", VERMILLION) == 3


def test_recipe_that_judges_by_the_projected_gradient(tmp_path):
    page = report(tmp_path, signal="projected-gradient")
    drawn = (tmp_path / "report" / "gradip.svg").read_text("utf-8")
    assert "|g|" in drawn
    assert "σ = " in drawn
    assert "judged by |g| in the calibration" in page
    assert {f"{name}.svg" for name in COMPANIONS} <= pictures(tmp_path)


@pytest.mark.parametrize(
    ("selection", "sentence"),
    [
        ({"kind": "random", "count": 2}, "Chosen at random, whatever"),
        ({"kind": "list", "clients": [1, 6]}, "Chosen by the recipe's list, whatever"),
    ],
)
def test_clients_that_were_not_judged_by_paths(tmp_path, selection, sentence):
    page = report(tmp_path, extreme=(1, 6), **selection)
    assert f"{sentence} their paths are: 2 of 8 clients." in html.unescape(page)
    found = rows(page)
    assert [row[:3] for row in found[:3]] == [
        ["1", "stopped", "1"],
        ["6", "stopped", "1"],
        ["0", "kept", "10"],
    ]
    assert all(row[3:6] == ["–"] * 3 for row in found)
    assert all(row[6:8] == ["0", "recipe"] for row in found)
    assert "margin: the smaller" not in page
    assert not any(name.startswith(("gradip", "selection")) for name in pictures(tmp_path))


def test_several_decisions(tmp_path):
    """The table and the scatter are of the last, the paths' colours of the calibration's."""
    written = run(tmp_path)
    (first,) = written.decisions()
    limits = Thresholds(2.0, 0.5, 100.0)
    newer = [
        replace(
            v, flagged=v.client == 2, steps=1 if v.client == 2 else 10, judged=2, source="rounds"
        )
        if v.client < 6
        else v
        for v in first.verdicts
    ]
    written.append_decision(Decision(2, "rounds", limits, tuple(newer)))
    page = page_of(tmp_path, written)
    table = page.split('class="numbers decisions"')[1].split("</table>")[0]
    assert "2 decisions, of which the last is in force" in table
    assert re.findall(r"<td>(.*?)</td>", table) == [
        *("0", "calibration", "3", "2, 5, 7"),
        *("2", "rounds", "2", "2, 7"),
    ]
    assert '<dd class="value">2 of 8 clients</dd>' in page
    assert "judged by |GradIP| in the rounds before" in page
    judged = {row[0]: row[6:8] for row in rows(page)}
    assert judged["2"] == ["2", "rounds"]
    assert judged["7"] == ["0", "calibration"]
    assert strokes(tmp_path, "gradip", VERMILLION) == 3
    assert strokes(tmp_path, "selection", VERMILLION) == 1
    assert "(drawn are 6 of 8 clients)" in captions(page)


def test_decision_by_the_fall_within_rounds(tmp_path):
    """ρ_quiet plays no part in it, and who is stopped stays so above another threshold."""
    written = run(tmp_path, every=2)
    (first,) = written.decisions()
    paths = {r.client: np.array(r.scalars[:40]) for r in written.calibrations()}
    chosen = recipe(every=2)
    fresh = decide_by_paths(
        chosen.selection, chosen.federation.local_steps, 2, "rounds", paths, first.flagged
    )
    assert fresh.thresholds is not None
    assert fresh.thresholds.release is not None
    written.append_decision(fresh)
    page = page_of(tmp_path, written)
    assert "A client beyond the threshold is extreme: ρ_later &gt; " in page
    assert "one that was stopped before stays so while ρ_later &gt; " in page
    assert "where a client was extreme before (dotted)" in captions(page)
    assert "1e+09" not in page
    assert {row[4] for row in rows(page)} == {"–"}
    drawn = (tmp_path / "report" / "selection.svg").read_text("utf-8")
    assert "ρ_quiet" not in drawn.partition(">")[2]
    assert drawn.count('stroke-dasharray="') == 2
    total = strokes(tmp_path, "selection", VERMILLION) + strokes(tmp_path, "selection", GREY)
    assert total == 8


def test_many_decisions_are_thinned(tmp_path):
    written = run(tmp_path)
    (first,) = written.decisions()
    for number in range(1, 40):
        written.append_decision(replace(first, round=number))
    page = words(written)
    table = page.split('class="numbers decisions"')[1].split("</table>")[0]
    assert "(13 of them)" in table
    assert table.count("<tr>") == 14


def test_calibrations_of_some_clients(tmp_path):
    some = [r for r in calibration(range(12), (3, 5)) if r.client % 2]
    page = report(tmp_path, 12, (3, 5), reports=some)
    found = {row[0]: row[1:] for row in rows(page)}
    assert found["3"][0] == found["5"][0] == "stopped"
    assert found["0"][:7] == ["not judged", "10", *["–"] * 5]
    assert strokes(tmp_path, "gradip", GREY) == 4


def test_calibration_that_is_round_0(tmp_path):
    parsed = recipe(4, apply=True)
    save_mask(mask(), tmp_path / "mask.safetensors")
    written = Journal.create(tmp_path / "journal.sqlite", header(parsed, (3,)), THETA)
    reports = tuple(replace(r, round=0) for r in calibration(range(4), (3,)))
    update = Update(1e-4, (LogEntry(DirectionKey(0, 0), 0.25),))
    record = RoundRecord(0, reports, (update,), ModelState(THETA + 1).digest)
    written.append_round(record, RoundMetrics(0.7, 28, 48, 0.25))
    signals = calibration_signals(written, Schedule.of(parsed), mask().gradient)
    local_steps = parsed.federation.local_steps
    written.append_decision(
        decide_by_paths(parsed.selection, local_steps, 1, "calibration", signals)
    )
    page = page_of(tmp_path, written)
    assert "Before round 1 clients were judged" in page
    assert strokes(tmp_path, "gradip", VERMILLION) == 1
    assert strokes(tmp_path, "gradip", GREY) == 3


@pytest.mark.parametrize("steps", [2, 3, 7])
def test_short_calibration(tmp_path, steps):
    page = report(tmp_path, calibration_steps=steps, sigma=500.0, rho_later=0.1, rho_quiet=0.1)
    assert SECTION in page
    assert strokes(tmp_path, "gradip", GREY) + strokes(tmp_path, "gradip", VERMILLION) == 8
    assert f"in the last {max(1, steps // 2)} step" in captions(page)


def test_silent_clients(tmp_path):
    """Zero has no place on a logarithmic axis, and no ratio to what was before it."""
    silent = [ClientReport(CALIBRATION, k, 50, 40, 1, bytes(8), (0.0,) * 40) for k in range(4)]
    page = report(tmp_path / "all", 4, reports=silent, calibration_steps=40)
    assert "the mean |GradIP| is 0" in captions(page)
    dying = [
        replace(r, scalars=r.scalars[:50] + (0.0,) * 50) if r.client in (2, 5, 7) else r
        for r in calibration(range(8), (2, 5, 7))
    ]
    page = report(tmp_path / "some", reports=dying)
    assert [row[3] for row in rows(page)[:3]] == ["∞"] * 3
    assert re.search(r"lines below [\d.]+ are drawn at that height", captions(page))
    assert "3 points off the scale are drawn at its end" in captions(page)


def test_path_without_a_verdict(tmp_path):
    written = run(tmp_path)
    (first,) = written.decisions()
    spared = Verdict(0, False, 10, 0, "calibration")
    written.append_decision(replace(first, verdicts=(spared, *first.verdicts[1:])))
    found = {row[0]: row[1:] for row in rows(words(written))}
    assert found["0"][:7] == ["not judged", "10", "–", "–", "–", "0", "calibration"]


def test_labels_are_escaped_and_cut_short(tmp_path):
    bad = '</svg><script>alert("x")</script>\x00'
    page = words(run(tmp_path, labels=(bad, *(f"label-{i}" for i in range(11)))))
    assert "<script" not in page
    section = page[page.index(SECTION) : page.index("<h2>Data and mask</h2>")]
    assert "&lt;script&gt;alert(&#34;x&#34;)" in section
    assert re.search(r"5 other labels \d+, label-\d \d+, .*, 4 others \d+", section)
    assert max(map(float, re.findall(r"width:([\d.]+)%;background", section))) == 100


class Outline(HTMLParser):
    """Tags of a page with the names of their attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, ...]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, *(name for name, _ in attrs), dict(attrs).get("class") or ""))

    def handle_endtag(self, tag):
        self.tags.append((f"/{tag}",))

    def handle_data(self, data):
        self.text += data


def filled(run: Run, text: Callable[[str], str]) -> tuple[Run, list[Figure]]:
    """A run and a picture whose every text is `text` of the place where it stands."""
    assert run.stopping is not None
    last = run.stopping.last
    verdicts = tuple(map(copy, last.verdicts))
    for verdict in verdicts:  # not by `replace`: with the tests' type checks it takes no other text
        object.__setattr__(verdict, "source", text("source of a verdict"))
    made = [replace(one, source=text("source of a decision")) for one in run.stopping.made * 2]
    recipe = {
        **{key: text(key) for key in ("task.name", "model.name", "federation.local_steps")},
        "federation.partition.kind": text("kind of partition"),
        "noise.kind": text("kind of noise"),
        "seed": text("seed"),
        "federation.partition.extreme": text("extreme clients"),
        f"{text('section')}.x": text("value"),
        f"x.{text('field')}": [text("first of a list"), text("second of a list")],
    }
    header = replace(
        run.header,
        **{f: text(f) for f in ("fingerprint", "model", "mask", "mask_kind", "noise")},
        labels=[text("label 0"), text("label 1")],
        partition=text("digest of the partition"),
    )
    metrics = {"loss": 0.7, text("metric"): 0.5}
    run = replace(
        run,
        header=header,
        recipe=recipe,
        evaluations=[Evaluated(0, metrics, 400, 1.5)],
        state_digest=text("state"),
        names=[text(f"name of client {client}") for client in range(run.clients)],
        stopping=replace(run.stopping, last=replace(last, verdicts=verdicts), made=tuple(made)),
    )
    dot = alt.Chart(alt.InlineData(values=[{"x": 1}])).mark_point().encode(x="x:Q")
    return run, [Figure("mask", text("sentence").replace("\x00", ""), dot)]


def test_text_is_escaped_wherever_it_stands(tmp_path):
    """Whatever stands in a journal, the page has the same tags."""
    written = run(tmp_path)
    found = read(written)
    written.close()
    places: list[str] = []

    def bad(place: str) -> str:
        places.append(place)
        return f"<script>alert(1)</script>&\"'<{place}>\x00</td></table>"

    harmless = Outline(render(*filled(found, lambda place: place.replace(".", " "))))
    page = render(*filled(found, bad))
    check_self_contained(page)
    assert "\x00" not in page
    outline = Outline(page)
    assert outline.tags == harmless.tags
    for place in places:
        assert f"<script>alert(1)</script>&\"'<{place}>" in outline.text, place


def test_free_text_has_no_labels(tmp_path):
    written = run(tmp_path, labels=("",))
    shape = replace(written.header, labels=[], label_counts=[[50 + k] for k in range(8)])
    (decision,) = written.decisions()
    written.close()
    (tmp_path / "journal.sqlite").unlink()
    other = Journal.create(tmp_path / "journal.sqlite", shape, THETA)
    other.append_decision(decision)
    page = page_of(tmp_path, other)
    assert rows(page)[0][-1] == "examples 52"
    assert "gradip.svg" not in pictures(tmp_path)  # its calibrations are gone


def test_recipe_of_another_version(tmp_path):
    """What the recipe says of the calibration cannot be read, but the decision can."""
    shape = replace(header(recipe()), recipe=json.dumps({"federation": {"clients": "many"}}))
    written = Journal.create(tmp_path / "journal.sqlite", shape, THETA)
    verdicts = (Verdict(0, True, 1, 0, "calibration", 9.0, 0.9, 0.5),)
    written.append_decision(Decision(0, "calibration", Thresholds(6.0, 0.6, 1.0), verdicts))
    page = page_of(tmp_path, written)
    assert rows(page)[0][:6] == ["0", "stopped", "1", "9", "0.90", "+0.50"]
    assert "selection.svg" in pictures(tmp_path)
    assert "gradip.svg" not in pictures(tmp_path)


def test_points_on_top_of_each_other_share_their_numbers():
    plane = _Plane(1.0, 100.0)
    points = [_Point(k, x, y, True) for k, (x, y) in enumerate([(0, 2), (1, 9), (0, 2.1), (1, 50)])]
    clumps = [sorted(p.client for p in clump) for clump in _clumps(points, plane)]
    assert sorted(clumps) == [[0, 2], [1], [3]]
    chain = [_Point(k, 0.5, 2 * 1.2**k, True) for k in range(10)]
    assert len(_clumps(chain[::2] + chain[1::2], plane)) == 1
