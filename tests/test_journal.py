"""The journal: round trips, damage, a full disk; what was recorded is kept."""

from __future__ import annotations

import resource
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from meerkat.descent import digest, follow
from meerkat.errors import JournalError
from meerkat.journal import Journal, replay
from meerkat.noise import SHARED
from meerkat.protocol import ClientReport, LogEntry
from meerkat.records import Evaluated, Header, RoundMetrics
from meerkat.rounds import RoundRecord

N = 50


def header() -> Header:
    return Header(
        recipe="{}",
        fingerprint="f" * 64,
        model="a" * 64,
        mask="b" * 64,
        mask_kind="random",
        mask_size=N,
        eligible=5000,
        mask_parts={"layers.0.w": N},
        noise="c" * 64,
        seed=3,
        kind="gaussian",
        shared=True,
        perturbations=1,
        labels=["no", "yes"],
        label_counts=[[3, 4], [5, 6]],
        partition="d" * 64,
    )


def fill(path: Path, rounds: int) -> Journal:
    """A journal of so many rounds, whose digests are those of its θ."""
    theta = np.linspace(-1, 1, N, dtype=np.float32)
    journal = Journal.create(path, header(), theta)
    journal.append_evaluation(Evaluated(0, 0.5, 0.4, 0.7, 20, 1.0))
    for number in range(rounds):
        entry = LogEntry(number, 0, 0, SHARED, 0.5, number / 7 - 0.3)
        follow(theta, [entry], journal.header.directions)
        reports = tuple(
            ClientReport(number, client, 7, 1, 1, b"12345678", (0.5 * client,)) for client in (0, 1)
        )
        record = RoundRecord(number, reports, (entry,), digest(theta))
        journal.append_round(record, RoundMetrics(0.6, 56, 96, 0.1))
    return journal


def test_round_trip(tmp_path: Path) -> None:
    journal = fill(tmp_path / "j.sqlite", 5)
    written = list(journal.records())
    journal.close()
    again = Journal.open(tmp_path / "j.sqlite")
    assert again.header == header()
    assert again.rounds == 5
    assert list(again.records()) == written
    assert again.evaluations()[0].accuracy == 0.5
    assert again.theta0.tobytes() == np.linspace(-1, 1, N, dtype=np.float32).tobytes()


def test_a_run_that_is_under_way_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round is written while another process checks the rounds before it."""
    path = tmp_path / "j.sqlite"
    writer = fill(path, 4)
    (record, metrics) = list(writer.records())[-1]
    original, late = Journal._count, [replace(record, round=4)]

    def count(self: Journal, table: str) -> int:
        while table == "rounds" and late:
            writer.append_round(late.pop(), metrics)
        return original(self, table)

    monkeypatch.setattr(Journal, "_count", count)
    assert Journal.open(path).rounds == 5
    assert not late


def test_goes_on_after_reopening(tmp_path: Path) -> None:
    """The chain continues where the file ended."""
    journal = fill(tmp_path / "j.sqlite", 2)
    theta, _ = replay(journal)
    journal.close()
    journal = Journal.open(tmp_path / "j.sqlite")
    entry = LogEntry(2, 0, 0, SHARED, 0.5, 1.0)
    follow(theta, [entry], journal.header.directions)
    journal.append_round(RoundRecord(2, (), (entry,), digest(theta)), RoundMetrics(0.6, 0, 0, 0.1))
    journal.close()
    assert replay(Journal.open(tmp_path / "j.sqlite"))[1] == digest(theta)


def test_replay_of_a_missing_round(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="it has 2 rounds"):
        replay(fill(tmp_path / "j.sqlite", 2), 3)


def test_replay_notices_another_theta(tmp_path: Path) -> None:
    journal = fill(tmp_path / "j.sqlite", 2)
    journal._connection.execute("UPDATE rounds SET digest = ?", ("0" * 64,))
    with pytest.raises(JournalError, match="the run recorded 0000"):
        replay(journal, 1)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE rounds SET entries = zeroblob(24) WHERE round = 3",
        "UPDATE reports SET payload = zeroblob(28) WHERE round = 3 AND client = 1",
        "DELETE FROM reports WHERE round = 3",
        "DELETE FROM rounds WHERE round = 3",
        "UPDATE rounds SET digest = 'x' WHERE round = 3",
    ],
)
def test_damage_is_found_and_the_good_part_is_kept(tmp_path: Path, change: str) -> None:
    path = tmp_path / "j.sqlite"
    journal = fill(path, 6)
    good = [record for record, _ in journal.records()][:3]
    journal._connection.execute(change)
    journal.close()
    with pytest.raises(JournalError, match="damaged after 3 good rounds"):
        Journal.open(path)
    kept = Journal.recover(path)
    assert [record for record, _ in kept.records()] == good
    assert len(kept.evaluations()) == 1
    assert replay(kept)[1] == good[-1].theta_digest
    assert path.with_name("j.sqlite.damaged").exists()


def test_overwritten_pages_are_found(tmp_path: Path) -> None:
    """Bytes of the file itself are overwritten, as a failing disk would."""
    path = tmp_path / "j.sqlite"
    journal = fill(path, 300)
    journal._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    journal.close()
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\xff" * 8192)
    with pytest.raises(JournalError, match="damaged after"):
        Journal.open(path)
    kept = Journal.recover(path)
    assert 0 <= kept.rounds < 300
    replay(kept)


def test_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    journal = fill(path, 300)
    journal._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    journal.close()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(JournalError, match="damaged"):
        Journal.open(path)


def test_not_a_journal(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(JournalError, match="damaged"):
        Journal.open(path)
    with pytest.raises(JournalError, match="not even its header"):
        Journal.recover(path)


def test_a_header_that_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    journal = fill(path, 3)
    journal._connection.execute("DELETE FROM header")
    journal.close()
    with pytest.raises(JournalError, match="damaged after 0 good rounds"):
        Journal.open(path)
    with pytest.raises(JournalError, match="not even its header"):
        Journal.recover(path)


_FULL_DISK = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_journal import fill
from meerkat.errors import JournalError
try:
    fill(Path(sys.argv[1]), 100_000)
except JournalError as error:
    print(error)
    sys.exit(2)
"""


def test_full_disk_keeps_what_was_recorded(tmp_path: Path) -> None:
    """The file system refuses to grow the files beyond 200 kB while rounds are written."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    path = tmp_path / "j.sqlite"
    done = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(path), str(Path(__file__).parent)],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "all complete rounds are kept" in done.stdout
    journal = Journal.open(path)
    assert journal.rounds > 10
    replay(journal)


def test_a_failed_round_leaves_nothing(tmp_path: Path) -> None:
    journal = fill(tmp_path / "j.sqlite", 2)
    before = list(journal.records())
    with pytest.raises(JournalError, match="UNIQUE"):
        journal.append_round(before[1][0], before[1][1])
    assert list(journal.records()) == before
    with sqlite3.connect(tmp_path / "j.sqlite") as connection:
        assert connection.execute("SELECT count(*) FROM reports").fetchone() == (4,)
    connection.close()
