"""Trackers get each figure once, across a kill and a resume; what fails in one stops nothing."""

from __future__ import annotations

import logging
import sys
import types
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from builders import make_recipe, merged
from commands import invoke, refused, toml_of

import meerkat
from meerkat.config import parse_recipe
from meerkat.federation.rounds import RoundRecord
from meerkat.journal import Journal
from meerkat.journal.records import RoundMetrics
from meerkat.runs.events import RunObserver
from meerkat.tracking import TRACKERS, Tracker
from meerkat.tracking.base import Tracked, Value
from meerkat.tracking.trackio import TrackioTracker


class Listed(Tracker):
    """Keeps what it is told for all of its runs; fails at what `fails` names."""

    fails: str = ""
    told: list[tuple[Any, ...]]

    @staticmethod
    def require() -> None:
        pass

    def start(self, run: Tracked, known: str | None) -> str:
        self._note("start", run.name, run.project, known, dict(run.settings))
        return "the id"

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._note("log", step, dict(figures))

    def end(self, summary: Mapping[str, Value]) -> None:
        self._note("end", dict(summary))

    def leave(self) -> None:
        self._note("leave")

    def _note(self, *told: Any) -> None:
        if self.fails == told[0] or self.fails == f"{told[0]} {told[1:2]}":
            raise OSError("no\nroom")
        self.told.append(told)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the tracker `listed` is told, and what `fails`."""
    found: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Listed, "told", found, raising=False)
    monkeypatch.setitem(TRACKERS, "listed", Listed)  # type: ignore[arg-type]
    return found


@pytest.fixture
def data(tiny_recipe_data: dict[str, Any]) -> dict[str, Any]:
    return merged(tiny_recipe_data, evaluation={"every": 2, "examples": 8})


class _StopAfter(RunObserver):
    def __init__(self, rounds: int) -> None:
        self._rounds = rounds

    def round_closed(self, record: RoundRecord, metrics: RoundMetrics) -> None:
        if record.round + 1 == self._rounds:
            raise KeyboardInterrupt


def start(data: dict[str, Any], out: Path, to: str, *observers: RunObserver) -> dict[str, Any]:
    tracking = {"to": [to], "project": "ours"}
    return meerkat.run(parse_recipe(merged(data, tracking=tracking)), out, observers=observers)


def interrupted(data: dict[str, Any], out: Path, to: str) -> dict[str, Any]:
    """A run that stops after two rounds, and goes on."""
    with pytest.raises(KeyboardInterrupt):
        start(data, out, to, _StopAfter(2))
    return meerkat.resume(out, observers=())


STEPS = {"train/loss": [1, 2, 3, 4], "train/bytes_up": [1, 2, 3, 4], "eval/accuracy": [0, 2, 4]}


def test_what_a_tracker_is_told(
    data: dict[str, Any], tmp_path: Path, told: list[tuple[Any, ...]]
) -> None:
    summary = start(data, tmp_path / "mine", "listed")
    kind, name, project, known, settings = told[0]
    assert (kind, name, project, known) == ("start", "mine", "ours", None)
    assert settings["federation.partition.alpha"] == 1.0
    assert settings["optimizer.learning_rate"] == 0.01
    assert settings["optimizer.schedule"] == "constant"
    assert not any(name.startswith(("runtime.", "network.", "tracking.")) for name in settings)
    assert [entry[1] for entry in told[1:-1]] == [0, 1, 2, 2, 3, 4, 4]
    assert told[1][2]["eval/accuracy"] == summary["before"]["accuracy"]
    with closing(Journal.open(tmp_path / "mine" / "journal.sqlite")) as journal:
        _, metrics = next(iter(journal.records()))
    first = told[2][2]
    assert first["train/loss"] == metrics.loss
    assert first["train/bytes_up"] == metrics.bytes_up
    assert first["train/learning_rate"] == pytest.approx(0.01)
    assert first["train/bytes_so_far"] == metrics.bytes_up + metrics.bytes_down
    assert told[-1][0] == "end"
    assert told[-1][1]["after.accuracy"] == summary["after"]["accuracy"]
    assert told[-1][1]["rounds"] == 4
    # A complete run is told nothing more.
    count = len(told)
    meerkat.resume(tmp_path / "mine", observers=())
    assert len(told) == count


def test_a_resume_goes_on_with_what_was_begun(
    data: dict[str, Any], tmp_path: Path, told: list[tuple[Any, ...]]
) -> None:
    interrupted(data, tmp_path / "run", "listed")
    assert [entry[0] for entry in told].count("start") == 2
    assert [entry[3] for entry in told if entry[0] == "start"] == [None, "the id"]
    assert ("leave",) in told
    steps = Counter((name, entry[1]) for entry in told if entry[0] == "log" for name in entry[2])
    assert set(steps.values()) == {1}
    for name, expected in STEPS.items():
        assert [step for tag, step in sorted(steps) if tag == name] == expected
    sent = [entry[2]["train/bytes_so_far"] for entry in told if "train/loss" in str(entry)]
    assert sent == sorted(sent)


@pytest.mark.parametrize("fails", ["start", "log (2,)", "end", "leave"])
def test_a_tracker_that_fails_is_named_once_and_stops_nothing(
    fails: str,
    data: dict[str, Any],
    tmp_path: Path,
    told: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(Listed, "fails", fails)
    with caplog.at_level(logging.WARNING, "meerkat"):
        if fails == "leave":
            interrupted(data, tmp_path / "run", "listed")
        else:
            start(data, tmp_path / "run", "listed")
    lines = [record.getMessage() for record in caplog.records if record.name == "meerkat"]
    assert lines == ["tracking.to: listed failed and is told no more: no room"]
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_tracker_that_is_missing_or_not_known_is_refused_before_the_run(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = tmp_path / "tiny.toml", tmp_path / "run"
    recipe.write_text(toml_of(merged(data, model={"name": "./nowhere"})))
    packages = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
    for name, package in {**packages, "trackio": "trackio"}.items():
        for module in [m for m in sys.modules if m.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, package, None)
        wanted = f'tracking.to=["{name}"]'
        refused(invoke("run", recipe, "--out", out, "--set", wanted), f"meerkat-fl[{name}]")
    known = "known are mlflow, tensorboard, trackio, wandb"
    refused(invoke("run", recipe, "--out", out, "--set", 'tracking.to=["excel"]'), "'excel'", known)
    assert not out.exists()


def test_tracking_is_no_part_of_the_run_and_reaches_no_client() -> None:
    told = make_recipe(tracking={"to": ["wandb"], "project": "secret", "name": "x"})
    assert told.fingerprint == make_recipe().fingerprint
    assert told.for_clients == make_recipe()
    assert "secret" not in told.for_clients.to_json()


# The trackers themselves


def test_tensorboard_event_files(data: dict[str, Any], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    summary = interrupted(data, tmp_path / "run", "tensorboard")
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for name, expected in STEPS.items():
        assert [event.step for event in found.Scalars(name)] == expected
    last = found.Scalars("eval/accuracy")[-1].value
    assert last == pytest.approx(summary["after"]["accuracy"])
    assert found.Scalars("summary/rounds")[-1].value == 4
    assert found.PluginTagToContent("hparams")
    assert "torch" not in TRACKERS["tensorboard"].__module__


@pytest.mark.slow
def test_an_mlflow_database(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    interrupted(data, tmp_path / "run", "mlflow")
    client = MlflowClient(f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("ours")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["federation.clients"] == "3"
    assert run.data.tags["summary.rounds"] == "4"
    for name, expected in STEPS.items():
        history = client.get_metric_history(run.info.run_id, name)
        assert sorted(metric.step for metric in history) == expected


def offline_records(data: bytes) -> Iterator[bytes]:
    """The records of a file that wandb writes offline: LevelDB's log format after 7 bytes."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # the rest of a block
            place += 32768 - place % 32768
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last of its parts
            yield whole
            whole = b""


@pytest.mark.slow
def test_wandb_without_a_network(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two parts with one id, which `wandb sync` puts together."""
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    interrupted(data, tmp_path / "run", "wandb")
    parts = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    steps: Counter[tuple[str, int]] = Counter()
    ids, configured = set(), set()
    for part in parts:
        for content in offline_records(part.read_bytes()):
            record = Record.FromString(content)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
                configured |= {item.key for item in record.run.config.update}
            if record.WhichOneof("record_type") == "history":
                named = [item.key or ".".join(item.nested_key) for item in record.history.item]
                steps.update((name, record.history.step.num) for name in named)
    assert len(parts) == 2
    assert len(ids) == 1
    assert "federation.clients" in configured
    for name, expected in STEPS.items():
        assert [step for tag, step in sorted(steps) if tag == name] == expected
        assert all(steps[name, step] == 1 for step in expected)


def test_the_calls_to_trackio(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its package would change others of the tests' environment: a stand-in of the same calls."""
    calls: list[tuple[str, Any]] = []
    module = types.ModuleType("trackio")

    def init(**options: Any) -> types.SimpleNamespace:
        calls.append(("init", options))
        return types.SimpleNamespace(
            name=options["name"],
            log=lambda figures, step: calls.append(("log", (step, figures))),
            finish=lambda: calls.append(("finish", None)),
        )

    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", module)
    interrupted(data, tmp_path / "run", "trackio")
    begun = [options for name, options in calls if name == "init"]
    assert [(o["name"], o["project"], o["resume"]) for o in begun] == [
        ("run", "ours", "never"),
        ("run", "ours", "allow"),
    ]
    assert [name for name, _ in calls].count("finish") == 2
    logged = [step for name, told in calls if name == "log" for step in [told[0]]]
    assert logged == [0, 1, 2, 2, 3, 4, 4, 4]
    assert isinstance(TRACKERS["trackio"](), TrackioTracker)
