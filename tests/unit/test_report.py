"""The report: self-contained, true to the journal, and drawn whatever the run was."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from browser import options
from PIL import Image
from report_checks import check_self_contained, pictures

from meerkat.config import parse_recipe
from meerkat.errors import RunError
from meerkat.federation.messages import ClientReport
from meerkat.federation.rounds import RoundRecord
from meerkat.journal import Journal
from meerkat.journal.records import Evaluated, Header, RoundMetrics
from meerkat.reporting import charts
from meerkat.reporting.charts import _cells, _split
from meerkat.reporting.figure import running_mean, thin
from meerkat.reporting.writing import write_report
from meerkat.runs.directory import write_holders
from meerkat.zo.directions import DirectionKey
from meerkat.zo.log import LogEntry, Update
from meerkat.zo.state import ModelState

THETA = np.zeros(8, np.float32)
KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")

pytestmark = pytest.mark.slow  # each draws pictures


def digest(theta: np.ndarray) -> str:
    return ModelState(theta).digest


def header(clients: int = 4, labels: tuple[str, ...] = ("terrible", "great"), **recipe) -> Header:
    generator = np.random.default_rng(clients)
    shares = generator.dirichlet([0.5] * max(1, len(labels)), clients)
    split = {"kind": "dirichlet", "alpha": 0.5}
    federation = {"clients": clients, "rounds": recipe.get("rounds", 6), "partition": split}
    model = {"name": recipe.get("model", "tiny-llama")}
    parsed = parse_recipe(
        {"seed": 7, "model": model, "task": {"name": "sst2"}, "federation": federation}
    )
    return Header(
        recipe=parsed.to_json(),
        fingerprint=parsed.fingerprint,
        model="ab" * 32,
        configuration="e" * 64,
        space="cd" * 32,
        size=len(THETA),
        mask="cd" * 32,
        mask_kind="sensitivity",
        mask_size=123_456,
        eligible=98_765_432,
        mask_parts={
            f"model.layers.{block}.{kind}.weight": 10 + 100 * block + 7 * place
            for block in range(12)
            for place, kind in enumerate(KINDS)
        },
        noise="ef" * 32,
        labels=list(labels),
        label_counts=[[int(200 * share) + 1 for share in row] for row in shares],
        partition="12" * 32,
    )


def classification(done: float) -> dict[str, float]:
    return {"accuracy": 0.5 + 0.25 * done, "macro_f1": 0.49 + 0.25 * done}


def journal(
    directory: Path,
    head: Header | None = None,
    rounds: int = 6,
    evaluate: tuple[int, ...] = (0, 3, 6),
    losses: float | None = None,
    scores: Callable[[float], dict[str, float]] = classification,
) -> Journal:
    """A run whose numbers are made up, but plausible.

    `scores` gives the metrics besides the loss after a share of all rounds.
    """
    head = head or header()
    directory.mkdir(parents=True, exist_ok=True)
    written = Journal.create(directory / "journal.sqlite", head, THETA)
    generator = np.random.default_rng(0)
    clients = len(head.label_counts)
    for number in range(rounds + 1):
        done = number / max(1, rounds)
        if number in evaluate:
            metrics = {"loss": 0.7 - 0.2 * done, **scores(done)}
            written.append_evaluation(Evaluated(number, metrics, 400, 1.5))
        if number < rounds:
            reports = tuple(
                ClientReport(number, client, 50, 1, 1, bytes(8), (0.5,))
                for client in range(clients)
            )
            update = Update(1e-4, (LogEntry(DirectionKey(number, 0), 0.25),))
            record = RoundRecord(number, reports, (update,), digest(THETA + number + 1))
            loss = 0.7 - 0.2 * done + float(generator.normal(0, 0.05)) if losses is None else losses
            measured = RoundMetrics(loss, 28 * clients, 48 * clients, 0.25)
            written.append_round(record, measured)
    return written


def report(directory: Path, *args, **kwargs) -> str:
    written = journal(directory, *args, **kwargs)
    path = write_report(directory, written)
    written.close()
    assert path == directory / "report.html"
    return path.read_text("utf-8")


def evaluations(page: str) -> list[list[str]]:
    """Cells of the table of evaluations, the headings first."""
    table = page.split('<table class="numbers">')[1].split("</table>")[0]
    cells = [re.findall(r"<t[hd]\b[^>]*>(.*?)</t[hd]>", row) for row in table.split("</tr>")[:-1]]
    return [[html.unescape(cell) for cell in row] for row in cells]


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a finished run."""
    directory = tmp_path_factory.mktemp("usual")
    report(directory)
    return directory


def test_page_is_self_contained_and_tells_the_journal(usual):
    page = (usual / "report.html").read_text("utf-8")
    check_self_contained(page)
    expected = (
        "sst2 on tiny-llama|finished|50.0 → 75.0 %|+25.0 points, before and after 6 rounds|"
        "0.700 → 0.500|28 B|48 B|1.824 kB|123,456|0.125 % of 98,765,432 eligible|1.5 s|"
        "learning_rate|1e-05"
    )
    for piece in [*expected.split("|"), digest(THETA + 6), "ab" * 32]:
        assert piece in page, piece
    assert evaluations(page) == [
        ["rounds done", "accuracy", "macro F1", "loss", "examples", "time"],
        ["0", "50.0 %", "49.0 %", "0.7000", "400", "1.5 s"],
        ["3", "62.5 %", "61.5 %", "0.6000", "400", "1.5 s"],
        ["6", "75.0 %", "74.0 %", "0.5000", "400", "1.5 s"],
    ]
    assert page.count("<svg") == page.count("<figcaption>") == 6
    assert page.count('role="img" aria-label="') == 6
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)


def test_pictures_are_written_in_both_formats(usual):
    other = ("gradip", "selection", "scores", "subspace")
    names = [name for name in charts.FIGURES if not name.startswith(other)]
    assert pictures(usual) == {f"{name}.{suffix}" for name in names for suffix in ("svg", "png")}
    for path in (usual / "report").iterdir():
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().get("width") == "480"
        else:
            with Image.open(path) as image:
                assert image.width == 960


def test_same_journal_gives_same_bytes(tmp_path, usual):
    assert report(tmp_path) == (usual / "report.html").read_text("utf-8")
    for name in pictures(usual):
        assert (tmp_path / "report" / name).read_bytes() == (usual / "report" / name).read_bytes()


@pytest.mark.parametrize("clients", [1, 8, 100])
def test_any_number_of_clients(tmp_path, clients):
    page = report(tmp_path, header(clients, rounds=1), rounds=1, evaluate=(0, 1))
    check_self_contained(page)
    assert f"spread over {clients} clients" in page or clients == 1
    assert f'<dd class="value">{clients}</dd>' in page
    assert "terrible" in (tmp_path / "report" / "clients.svg").read_text("utf-8")


def test_many_clients_labels_and_rounds_stay_small(tmp_path):
    labels = tuple(f"label-{i}" for i in range(30))
    head = header(1000, labels, rounds=2500)
    sent = [1000 * done for done in range(2501)]
    run = {figure.name: figure for figure in charts.draw(head, [0.7] * 2500, sent, [])}
    assert "drawn are 200 of 1,000 clients" in run["clients"].sentence
    assert "drawn are 1,000 of 2,500 rounds" in run["loss"].sentence
    assert "23 other labels" in run["clients"].svg
    assert len(run["loss"].svg) < 100_000
    assert len(run["clients"].svg) < 500_000


@pytest.mark.parametrize("evaluate", [(), (0,)])
def test_no_round_so_far(tmp_path, evaluate):
    page = report(tmp_path, rounds=0, evaluate=evaluate)
    check_self_contained(page)
    assert "unfinished: 0 of 6 rounds" in page
    assert digest(THETA) in page
    assert ("No round is done" in page) == (not evaluate)
    assert "loss-by-bytes.svg" not in pictures(tmp_path)


def test_unfinished_run_says_so(tmp_path):
    page = report(tmp_path, rounds=4, evaluate=(0,))
    assert "unfinished: 4 of 6 rounds" in page
    assert "before the first round" in page


def test_free_text_shows_loss_alone_where_an_earlier_report_had_more(tmp_path):
    report(tmp_path)
    (tmp_path / "report" / "mine.svg").write_text("kept")
    (tmp_path / "journal.sqlite").unlink()
    page = report(tmp_path, header(labels=()), scores=lambda done: {})
    check_self_contained(page)
    assert "Held-out accuracy" not in page
    assert evaluations(page)[0] == ["rounds done", "loss", "examples", "time"]
    assert "0.700 → 0.500" in page
    assert not any(name.startswith("accuracy") for name in pictures(tmp_path))
    assert "mine.svg" in pictures(tmp_path)


def test_every_metric_is_shown_by_name(tmp_path):
    page = report(
        tmp_path,
        scores=lambda done: {
            **classification(done),
            "balanced_accuracy": 0.48 + 0.25 * done,
            "perplexity <2>": 20 - 4 * done,
        },
    )
    check_self_contained(page)
    head, first, _, last = evaluations(page)
    assert head[1:6] == ["accuracy", "macro F1", "balanced accuracy", "perplexity <2>", "loss"]
    assert first[1:6] == ["50.0 %", "49.0 %", "48.0 %", "20", "0.7000"]
    assert last[1:6] == ["75.0 %", "74.0 %", "73.0 %", "16", "0.5000"]
    assert "<dt>Held-out accuracy</dt>" in page
    assert "balanced accuracy goes from 48.0 to 73.0 percent." in page
    assert "held-out perplexity &lt;2&gt; goes from 20 to 16." in page
    for axis in ("", "-by-bytes"):
        shares, others = (
            ElementTree.parse(tmp_path / "report" / f"{name}{axis}.svg").getroot()
            for name in ("accuracy", "scores")
        )
        assert {"accuracy", "macro F1", "balanced accuracy"} <= set(shares.itertext())
        assert "perplexity <2>" in set(others.itertext())
        assert not {"perplexity <2>"} & set(shares.itertext())
        assert not {"accuracy", "balanced accuracy"} & set(others.itertext())
    assert {f"scores{axis}.png" for axis in ("", "-by-bytes")} <= pictures(tmp_path)


def test_first_metric_is_the_headline(tmp_path):
    page = report(
        tmp_path / "percent",
        scores=lambda done: {"balanced_accuracy": 0.4 + 0.2 * done, "accuracy": 0.5},
    )
    assert (
        '<dt>Held-out balanced accuracy</dt><dd class="value">40.0 → 60.0 %</dd>'
        '<dd class="hint">+20.0 points, before and after 6 rounds</dd>'
    ) in page
    assert "Held-out balanced accuracy by round" in page
    page = report(tmp_path / "number", scores=lambda done: {"perplexity": 20 - 4 * done})
    assert (
        '<dt>Held-out perplexity</dt><dd class="value">20 → 16</dd>'
        '<dd class="hint">-4, before and after 6 rounds</dd>'
    ) in page
    assert not any(name.startswith("accuracy") for name in pictures(tmp_path / "number"))


def test_metric_that_some_evaluations_lack(tmp_path):
    page = report(tmp_path, scores=lambda done: {"accuracy": 0.5} if done else {})
    assert [row[1] for row in evaluations(page)] == ["accuracy", "–", "50.0 %", "50.0 %"]
    assert "<dt>Held-out accuracy</dt>" not in page
    assert "<dt>Held-out loss</dt>" in page


def test_loss_that_is_not_known(tmp_path):
    page = report(tmp_path, losses=math.nan)
    check_self_contained(page)
    assert "training loss" not in page
    assert "held-out loss goes from 0.700 to 0.500" in page


def test_hostile_text_is_escaped(tmp_path):
    bad = '</svg><script>alert("x")</script>\x00\ud800'
    head = header(labels=(bad, "good"), model=f"<img src=x onerror=alert(1)>{bad[:-1]}")
    head = replace(head, mask_parts={f"model.layers.0.{bad}.weight": 3, "<b>.weight": 4})
    page = report(tmp_path, head)
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;" in page
    for picture in (tmp_path / "report").glob("*.svg"):
        assert "<script" not in picture.read_text("utf-8")
        ElementTree.parse(picture)


def test_recipe_of_another_shape(tmp_path):
    recipe = json.dumps({"a": {"b": {"c": [1, 2]}}, "d": None})
    page = report(tmp_path, replace(header(), recipe=recipe))
    assert "b.c" in page
    assert "1, 2" in page


def test_clients_are_named_by_their_holders(tmp_path):
    holders = [["Games Team"], [], ["Fonts", "QA", "Med"], ["<b>R & D</b>"]]
    write_holders(tmp_path, holders)
    report(tmp_path)
    picture = (tmp_path / "report/clients.svg").read_text("utf-8")
    names = ("0 Games Team", "1", "2 Fonts and 2 more", "3 &lt;b&gt;R &amp; D&lt;/b&gt;")
    for name in names:
        assert f">{name}</text>" in picture
    # Without the file, and in a run of more clients than there is room for, they have numbers.
    report(tmp_path / "many", header(clients=40))
    write_holders(tmp_path / "many", [[f"team {client}"] for client in range(40)])
    with closing(Journal.open(tmp_path / "many/journal.sqlite")) as written:
        numbered = write_report(tmp_path / "many", written)
    assert "team" not in (numbered.parent / "report/clients.svg").read_text("utf-8")


@pytest.mark.parametrize("text", ["", "[]", '{"holders": [["a"], 3]}', '{"holders": ['])
def test_damaged_names_are_refused_in_a_line(tmp_path, text):
    written = journal(tmp_path)
    (tmp_path / "clients.json").write_text(text)
    with pytest.raises(RunError, match=r"clients\.json is damaged; remove it"):
        write_report(tmp_path, written)
    written.close()


def test_directory_that_cannot_be_written(tmp_path):
    written = journal(tmp_path)
    (tmp_path / "report").write_text("in the way")
    with pytest.raises(RunError, match="cannot be written"):
        write_report(tmp_path, written)
    written.close()


def test_place_of_a_parameter():
    for name, expected in {
        "model.layers.3.mlp.down_proj.weight": ("3", ("mlp", "down_proj")),
        "transformer.h.0.attn.c_attn.weight": ("0", ("attn", "c_attn")),
        "model.decoder.layers.11.fc1.bias": ("11", ("fc1 bias",)),
        "model.layers.2.mlp.experts.5.up_proj.weight": ("2", ("mlp", "experts", "up_proj")),
        "model.embed_tokens.weight": ("outside", ("embed_tokens",)),
    }.items():
        assert _split(name) == expected


def test_cells_tell_equal_names_apart_and_keep_order():
    names = ("wte", "h.10.attn.c_proj", "h.10.mlp.c_proj", "h.2.mlp.c_fc")
    cells, kinds, blocks = _cells({f"{name}.weight": len(name) for name in names})
    assert kinds == ["wte", "attn.c_proj", "mlp.c_proj", "c_fc"]
    assert blocks == ["outside", "2", "10"]
    assert cells["10", "mlp.c_proj"] == len("h.10.mlp.c_proj")


def test_thin_keeps_the_ends():
    places = thin(10_000, 1000)
    assert len(places) == len(set(places)) == 1000
    assert (places[0], places[-1]) == (0, 9999)
    assert thin(3, 10) == [0, 1, 2]
    assert thin(0, 10) == []


def test_running_mean_leaves_out_what_is_not_finite():
    assert running_mean([1.0, math.nan, 3.0, math.inf], 3) == [1.0, 2.0, 3.0, 3.0]
    assert math.isnan(running_mean([math.nan], 3)[0])
    assert running_mean([], 5) == []


@pytest.mark.skipif(shutil.which("chromium") is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [480, 1200])
def test_browser_shows_it_without_complaint(tmp_path, usual, width):
    picture = tmp_path / "page.png"
    command = ["chromium", *options(tmp_path / "profile"), "--enable-logging=stderr"]
    command += [f"--screenshot={picture}", f"--window-size={width},2600"]
    command += [f"file://{usual / 'report.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert complaints == []
    with Image.open(picture) as image:
        assert image.width == width
        colours = image.convert("RGB").getcolors(maxcolors=2**24)
        assert colours is not None
        assert len(colours) > 50
