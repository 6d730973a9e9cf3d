"""Observers see what happens in a run, in order, once it is in the journal; and stop nothing."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from builders import STOPS_ALL, merged
from commands import toml_of

import meerkat
from meerkat.config import parse_recipe
from meerkat.federation.rounds import RoundRecord
from meerkat.federation.selection import Decision
from meerkat.journal.records import Evaluated, RoundMetrics
from meerkat.runs.events import RunInfo, RunObserver

Event = tuple[str, int]


class Recorder(RunObserver):
    """Keeps what it is told, and looks it up in the journal.

    Args:
        until: Interrupt the run once so many rounds are closed, as Ctrl-C does.
    """

    def __init__(self, until: int | None = None) -> None:
        self.events: list[Event] = []
        self.summary: dict[str, Any] = {}
        self._until = until

    def run_started(self, run: RunInfo) -> None:
        self._run = run
        self.events.append(("started", run.journal.rounds))

    def round_closed(self, record: RoundRecord, metrics: RoundMetrics) -> None:
        assert list(self._run.journal.records(record.round)) == [(record, metrics)]
        self.events.append(("round", record.round))
        if self._until == record.round + 1:
            raise KeyboardInterrupt

    def evaluated(self, found: Evaluated) -> None:
        assert self._run.journal.evaluations()[-1] == found
        self.events.append(("evaluated", found.round))

    def clients_stopped(self, decision: Decision) -> None:
        assert self._run.journal.decisions()[-1] == decision
        self.events.append(("stopped", decision.round))

    def run_ended(self, summary: dict[str, Any]) -> None:
        assert json.loads((self._run.directory / "summary.json").read_text()) == summary
        self.summary = summary
        self.events.append(("ended", summary["rounds"]))


def run(data: dict[str, Any], out: Path, *observers: RunObserver, **sections: Any) -> dict:
    return meerkat.run(parse_recipe(merged(data, **sections)), out, observers=observers)


def rounds(first: int, end: int) -> list[Event]:
    return [("round", number) for number in range(first, end)]


def test_events_come_in_order_and_are_in_the_journal(
    tiny_recipe_data: dict, tmp_path: Path
) -> None:
    recorder = Recorder()
    summary = run(tiny_recipe_data, tmp_path / "run", recorder, evaluation={"every": 2})
    assert recorder.events == [
        ("started", 0),
        ("evaluated", 0),
        *rounds(0, 2),
        ("evaluated", 2),
        *rounds(2, 4),
        ("evaluated", 4),
        ("ended", 4),
    ]
    assert recorder.summary == summary


def test_a_resume_tells_what_is_lacking(tiny_recipe_data: dict, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(tiny_recipe_data, out, Recorder(until=2))
    recorder = Recorder()
    meerkat.resume(out, observers=[recorder])
    assert recorder.events == [("started", 2), *rounds(2, 4), ("evaluated", 4), ("ended", 4)]
    # A complete run is only summed up again.
    again = Recorder()
    assert meerkat.resume(out, observers=[again]) == recorder.summary
    assert again.events == [("started", 4), ("ended", 4)]


def test_decisions_on_early_stopping_are_told_before_the_round_that_they_shape(
    tiny_recipe_data: dict, tmp_path: Path
) -> None:
    out, first = tmp_path / "run", Recorder(until=3)
    selection = {**STOPS_ALL, "every": 2}
    with pytest.raises(KeyboardInterrupt):
        run(tiny_recipe_data, out, first, selection=selection)
    assert first.events == [
        ("started", 0),
        ("evaluated", 0),
        ("stopped", 0),
        *rounds(0, 2),
        ("stopped", 2),
        ("round", 2),
    ]
    second = Recorder()
    summary = meerkat.resume(out, observers=[second])
    # A decision is made once, and told once.
    assert second.events == [("started", 3), ("round", 3), ("evaluated", 4), ("ended", 4)]
    kept = json.loads((out / "selection.json").read_text())
    assert kept["flagged"] == summary["stopped_early"]
    assert len(kept["decisions"]) == 2


class Broken(RunObserver):
    """Fails at every event."""

    def _fail(self, *told: Any) -> None:
        raise ValueError("no\nroom")

    run_started = round_closed = evaluated = clients_stopped = run_ended = _fail


def test_an_observer_that_fails_is_logged_and_stops_nothing(
    tiny_recipe_data: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    beside = Recorder()
    with caplog.at_level(logging.WARNING, "meerkat"):
        summary = run(tiny_recipe_data, tmp_path / "run", Broken(), beside)
    assert summary["state_digest"] == meerkat.replay(tmp_path / "run", 4).digest
    # Those after it are told all the same.
    assert beside.events == [
        ("started", 0),
        ("evaluated", 0),
        *rounds(0, 4),
        ("evaluated", 4),
        ("ended", 4),
    ]
    logged = [record.getMessage() for record in caplog.records if record.name == "meerkat"]
    assert logged == ["Broken: no room"] * len(beside.events)


def test_an_observer_of_nothing_needs_no_method(tiny_recipe_data: dict, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(tiny_recipe_data, out, RunObserver(), federation={"rounds": 1})
    assert (out / "summary.json").exists()


# The report is drawn by an observer


def test_without_observers_no_report_is_drawn(tiny_recipe_data: dict, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(tiny_recipe_data, out, federation={"rounds": 1})
    assert {path.name for path in out.iterdir()} == {
        "journal.sqlite",
        "lock",
        "mask.safetensors",
        "recipe.json",
        "summary.json",
    }


def test_by_default_a_report_is_drawn(tiny_recipe_data: dict, tmp_path: Path) -> None:
    out = tmp_path / "run"
    recipe = parse_recipe(merged(tiny_recipe_data, federation={"rounds": 1}))
    meerkat.run(recipe, out)
    assert (out / "report.html").exists()
    assert (out / "report/loss.png").exists()
    (out / "report.html").unlink()
    meerkat.resume(out)
    assert (out / "report.html").exists()


WITHOUT = """
import sys
for name in ("altair", "vl_convert", "jinja2"):
    sys.modules[name] = None  # an import of it fails as if it were not installed
from meerkat.cli import app
app(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_run_without_the_packages_of_the_report(tiny_recipe_data: dict, tmp_path: Path) -> None:
    recipe, out = tmp_path / "tiny.toml", tmp_path / "run"
    recipe.write_text(toml_of(merged(tiny_recipe_data, federation={"rounds": 1})))

    def without(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", WITHOUT, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    done = without("run", recipe, "--out", out)
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "no report is drawn" in line]
    assert len(warnings) == 1, done.stderr
    assert "altair is not installed: pip install 'meerkat-fl[report]'" in warnings[0]
    assert (out / "summary.json").exists()
    assert not (out / "report.html").exists()

    refused = without("report", out)
    assert refused.returncode == 2
    assert refused.stderr.splitlines() == [
        "meerkat: this needs the package altair: pip install 'meerkat-fl[report]'"
    ]
