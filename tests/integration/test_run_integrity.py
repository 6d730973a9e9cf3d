"""A run is not lost, and does not lie: its own mask, its lock, its journal's state, its data."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from builders import merged

import meerkat
from meerkat.config import parse_recipe
from meerkat.errors import DivergedError, JournalError, RunError
from meerkat.federation.rounds import RoundRecord
from meerkat.journal import Journal
from meerkat.journal.records import Evaluated, RoundMetrics
from meerkat.runs.events import RunObserver
from meerkat.runs.lock import locked


class Stop(BaseException):
    """Ends a run as a kill would."""


class StopAfter(RunObserver):
    """Ends a run once so many rounds are in the journal."""

    def __init__(self, rounds: int):
        self._rounds = rounds

    def round_closed(self, record: RoundRecord, metrics: RoundMetrics) -> None:
        if record.round + 1 == self._rounds:
            raise Stop


def stopped_run(data: dict[str, Any], directory: Path, rounds: int = 2) -> None:
    with pytest.raises(Stop):
        meerkat.run(parse_recipe(data), directory, observers=[StopAfter(rounds)])


def test_resume_uses_the_runs_own_mask(tiny_recipe_data: dict, tmp_path: Path) -> None:
    """The file that the mask came from is moved; for a calibrated one the cache is deleted."""
    mask = tmp_path / "mask.safetensors"
    meerkat.calibrate(parse_recipe(tiny_recipe_data), mask)
    cache = tmp_path / "cache"
    for name, changes in (
        ("file", {"mask": {"file": str(mask)}}),
        ("cache", {"runtime": {"cache_dir": str(cache)}}),
    ):
        data = merged(tiny_recipe_data, **changes)
        whole = meerkat.run(parse_recipe(data), tmp_path / f"whole-{name}", observers=())
        stopped_run(data, tmp_path / f"run-{name}")
        mask.unlink(missing_ok=True)
        shutil.rmtree(cache, ignore_errors=True)
        summary = meerkat.resume(tmp_path / f"run-{name}", observers=())
        assert summary["state_digest"] == whole["state_digest"]
        assert not list(cache.glob("masks/*"))  # nothing was calibrated again


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Another process holds a run's directory."""
    program = (
        "import sys; from pathlib import Path; from meerkat.runs.lock import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(directory)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield
    finally:
        process.kill()  # no farewell: what a lock leaves behind must not matter
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_one_process_at_a_time(tiny_recipe_data: dict, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    stopped_run(tiny_recipe_data, directory)
    before = meerkat.replay(directory)
    with held(directory):
        for recover in (False, True):
            with pytest.raises(RunError, match="another process is working on this run"):
                meerkat.resume(directory, recover=recover, observers=())
        assert meerkat.replay(directory).digest == before.digest  # reading needs no lock
    assert meerkat.resume(directory, observers=())["rounds"] == 4


def test_a_new_run_does_not_start_beside_another(tiny_recipe_data: dict, tmp_path: Path) -> None:
    with (
        held(tmp_path / "run"),
        pytest.raises(RunError, match="another process is working on this run"),
    ):
        meerkat.run(parse_recipe(tiny_recipe_data), tmp_path / "run", observers=())


def test_a_lock_leaves_no_directory_behind(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()


def test_reading_a_journal_writes_nothing(tiny_recipe_data: dict, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    digest = meerkat.run(parse_recipe(tiny_recipe_data), directory, observers=())["state_digest"]
    journal = directory / "journal.sqlite"
    with closing(sqlite3.connect(journal)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    with closing(Journal.open(journal, read_only=True)) as opened:
        assert opened.state_digest(4) == digest
        with pytest.raises(JournalError, match="cannot be written"):
            opened.append_evaluation(Evaluated(9, {"loss": 0.0}, 1, 0.0))
    left = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path in before}
    assert left == before


def test_a_locked_journal_is_not_called_damaged(tiny_recipe_data: dict, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    meerkat.run(parse_recipe(tiny_recipe_data), directory, observers=())
    journal = directory / "journal.sqlite"
    with closing(sqlite3.connect(journal, isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = DELETE")
        other.execute("BEGIN EXCLUSIVE")
        for action in (Journal.open, Journal.recover):
            with pytest.raises(JournalError, match="not known to be damaged") as caught:
                action(journal)
            assert "--recover" not in str(caught.value)
    Journal.open(journal).close()


def test_a_kill_while_recovering_loses_nothing(
    tiny_recipe_data: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every moment there is a journal in place: the damaged one, or the recovered one."""
    directory = tmp_path / "run"
    stopped_run(tiny_recipe_data, directory, 3)
    journal = directory / "journal.sqlite"
    with closing(sqlite3.connect(journal)) as connection:
        connection.execute("UPDATE rounds SET digest = 'x' WHERE round = 2")
        connection.commit()

    def killed(self: Path, target: Path) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(Stop):
            Journal.recover(journal)
    with pytest.raises(JournalError, match="damaged after 2 good rounds"):
        Journal.open(journal)
    with closing(Journal.recover(journal)) as recovered:
        assert recovered.rounds == 2
    assert journal.with_name("journal.sqlite.damaged").exists()


def test_changed_data_are_noticed_also_where_the_rows_are_as_many(
    tiny_recipe_data: dict, tmp_path: Path
) -> None:
    source = tmp_path / "reviews.csv"
    text = Path(tiny_recipe_data["task"]["source"]).read_text("utf-8")
    source.write_text(text, "utf-8")
    data = merged(tiny_recipe_data, task={"source": str(source)})
    stopped_run(data, tmp_path / "run")
    source.write_text(text.replace("the film 3 is", "the film 3 was"), "utf-8")
    with pytest.raises(JournalError, match="the run began with another partition"):
        meerkat.resume(tmp_path / "run", observers=())
    source.write_text(text, "utf-8")
    assert meerkat.resume(tmp_path / "run", observers=())["rounds"] == 4


def test_the_default_learning_rate_does_not_diverge(tiny_recipe_data: dict) -> None:
    data = {k: v for k, v in tiny_recipe_data.items() if k != "optimizer"}
    assert parse_recipe(data).learning_rate == 1e-5
    assert issubclass(DivergedError, meerkat.MeerkatError)
