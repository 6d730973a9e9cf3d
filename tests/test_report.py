"""The report: self-contained, true to the journal, and drawn whatever the run was."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from meerkat.descent import digest
from meerkat.errors import RunError
from meerkat.journal import Journal
from meerkat.protocol import ClientReport, LogEntry
from meerkat.recipe import parse_recipe
from meerkat.records import Evaluated, Header, RoundMetrics
from meerkat.reporting import charts, write_report
from meerkat.reporting.charts import _cells, _split
from meerkat.reporting.figure import running_mean, thin
from meerkat.rounds import RoundRecord

THETA = np.zeros(8, np.float32)
KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def header(clients: int = 4, labels: tuple[str, ...] = ("terrible", "great"), **recipe) -> Header:
    generator = np.random.default_rng(clients)
    shares = generator.dirichlet([0.5] * max(1, len(labels)), clients)
    split = {"kind": "dirichlet", "alpha": 0.5}
    federation = {"clients": clients, "rounds": recipe.get("rounds", 6), "partition": split}
    model = {"name": recipe.get("model", "tiny-llama")}
    parsed = parse_recipe({"model": model, "task": {"name": "sst2"}, "federation": federation})
    return Header(
        recipe=parsed.to_json(),
        fingerprint=parsed.fingerprint,
        model="ab" * 32,
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
        seed=7,
        kind="gaussian",
        shared=True,
        perturbations=1,
        labels=list(labels),
        label_counts=[[int(200 * share) + 1 for share in row] for row in shares],
        partition="12" * 32,
    )


def journal(
    directory: Path,
    head: Header | None = None,
    rounds: int = 6,
    evaluate: tuple[int, ...] = (0, 3, 6),
    losses: float | None = None,
    accuracy: bool = True,
) -> Journal:
    """A run whose numbers are made up, but plausible."""
    head = head or header()
    directory.mkdir(parents=True, exist_ok=True)
    written = Journal.create(directory / "journal.sqlite", head, THETA)
    generator = np.random.default_rng(0)
    clients = len(head.label_counts)
    for number in range(rounds + 1):
        done = number / max(1, rounds)
        if number in evaluate:
            score = 0.5 + 0.25 * done if accuracy else None
            written.append_evaluation(
                Evaluated(number, score, score and score - 0.01, 0.7 - 0.2 * done, 400, 1.5)
            )
        if number < rounds:
            reports = tuple(
                ClientReport(number, client, 50, 1, 1, bytes(8), (0.5,))
                for client in range(clients)
            )
            entry = LogEntry(number, 0, 0, 2**32 - 1, 1e-4, 0.25)
            record = RoundRecord(number, reports, (entry,), digest(THETA + number + 1))
            loss = 0.7 - 0.2 * done + float(generator.normal(0, 0.05)) if losses is None else losses
            metrics = RoundMetrics(loss, 28 * clients, 48 * clients, 0.25)
            written.append_round(record, metrics)
    return written


def report(directory: Path, *args, **kwargs) -> str:
    written = journal(directory, *args, **kwargs)
    path = write_report(directory, written)
    written.close()
    assert path == directory / "report.html"
    return path.read_text("utf-8")


def check_self_contained(page: str) -> None:
    assert not re.search(r"<script", page, re.IGNORECASE)
    assert not re.search(r"\son\w+\s*=", page)
    assert not re.search(r"(src|href)\s*=", page)
    assert not re.search(r"""(url\(|@import)\s*["']?(?!#)""", page)
    assert set(re.findall(r"https?://[^\s\"'<>]*", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def pictures(directory: Path) -> set[str]:
    return {path.name for path in (directory / "report").iterdir()}


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a finished run."""
    directory = tmp_path_factory.mktemp("usual")
    report(directory)
    return directory


def test_page_is_self_contained_and_tells_the_journal(usual):
    page = (usual / "report.html").read_text("utf-8")
    check_self_contained(page)
    told = (
        "sst2 on tiny-llama|finished|50.0 → 75.0 %|+25.0 points, before and after 6 rounds|"
        "0.700 → 0.500|28 B|48 B|1.824 kB|123,456|0.125 % of 98,765,432 eligible|1.5 s|"
        "learning_rate|0.0001"
    )
    for piece in [*told.split("|"), digest(THETA + 6), "ab" * 32]:
        assert piece in page, piece
    assert page.count("<svg") == page.count("<figcaption>") == 6
    assert page.count('role="img" aria-label="') == 6
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)


def test_pictures_are_written_in_both_formats(usual):
    names = [name for name in charts.FIGURES if not name.startswith(("gradip", "selection"))]
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
    page = report(tmp_path, header(labels=()), accuracy=False)
    check_self_contained(page)
    assert "Held-out accuracy" not in page
    assert "0.700 → 0.500" in page
    assert not any(name.startswith("accuracy") for name in pictures(tmp_path))
    assert "mine.svg" in pictures(tmp_path)


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
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        "--disable-background-networking --disable-component-update --disable-sync "
        f"--user-data-dir={tmp_path / 'profile'} --enable-logging=stderr "
        f"--screenshot={picture} --window-size={width},2600 file://{usual / 'report.html'}"
    )
    done = subprocess.run(
        ["chromium", *options.split()], capture_output=True, text=True, timeout=120
    )
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert complaints == []
    with Image.open(picture) as image:
        assert image.width == width
        colours = image.convert("RGB").getcolors(maxcolors=2**24)
        assert colours is not None
        assert len(colours) > 50
