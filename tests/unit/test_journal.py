"""The journal: round trips, its codec, damage, other versions, a full disk."""

from __future__ import annotations

import json
import resource
import signal
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import make_recipe, make_report
from hypothesis import given, settings
from hypothesis import strategies as st

import meerkat
from meerkat.errors import JournalError, RecipeError
from meerkat.federation.messages import DIGEST_BYTES, ClientReport
from meerkat.federation.rounds import RoundRecord
from meerkat.journal import Journal, replay
from meerkat.journal.codec import decode_report, decode_updates, encode_report, encode_updates
from meerkat.journal.records import Evaluated, Header, RoundMetrics
from meerkat.journal.store import FORMAT
from meerkat.transport import frame, messages
from meerkat.zo.directions import DirectionKey
from meerkat.zo.log import LogEntry, Update
from meerkat.zo.state import ModelState

N = 50
METRICS = RoundMetrics(0.6, 56, 96, 0.1)
OLDER = Path(__file__).parent / "data" / "journal-format-2.sql"
"""A journal of two rounds that version 0.1 wrote, in format 2; its recipe is in its header."""


def header(**sections: Any) -> Header:
    recipe = make_recipe(**sections)
    return Header(
        recipe=recipe.to_json(),
        fingerprint=recipe.fingerprint,
        model="a" * 64,
        configuration="e" * 64,
        space="b" * 64,
        size=N,
        mask="b" * 64,
        mask_kind="random",
        mask_size=N,
        eligible=5000,
        mask_parts={"layers.0.w": N},
        noise="c" * 64,
        labels=["no", "yes"],
        label_counts=[[3, 4], [5, 6]],
        partition="d" * 64,
    )


def theta0() -> np.ndarray:
    return np.linspace(-1, 1, N, dtype=np.float32)


def add_round(journal: Journal, state: ModelState, steps: int = 1) -> ModelState:
    """Write the next round of two clients; the state after it."""
    algorithm, number = journal.header.algorithm, journal.rounds
    count = algorithm.stream.perturbations
    reports = [
        make_report(
            state,
            client,
            [(number + client) / 7 - 0.3 + 0.25 * place for place in range(steps * count)],
            number,
            count,
        )
        for client in (0, 1)
    ]
    updates = algorithm.aggregate(reports, 0.5)
    state = algorithm.apply(state, updates)
    journal.append_round(RoundRecord(number, tuple(reports), updates, state.digest), METRICS)
    return state


def fill(path: Path, rounds: int, **sections: Any) -> Journal:
    """A journal of so many rounds under a recipe."""
    journal = Journal.create(path, header(**sections), theta0())
    journal.append_evaluation(Evaluated(0, {"loss": 0.7, "accuracy": 0.5}, 20, 1.0))
    state = journal.header.algorithm.init(journal.theta0)
    for _ in range(rounds):
        state = add_round(journal, state)
    return journal


# What is written can be read


def test_round_trip(tmp_path: Path) -> None:
    journal = fill(tmp_path / "j.sqlite", 5)
    written = list(journal.records())
    journal.close()
    again = Journal.open(tmp_path / "j.sqlite")
    assert again.header == header()
    assert again.rounds == 5
    assert list(again.records()) == written
    assert again.evaluations() == [Evaluated(0, {"loss": 0.7, "accuracy": 0.5}, 20, 1.0)]
    assert again.theta0.tobytes() == theta0().tobytes()
    assert [len(record.reports) for record, _ in written] == [2] * 5


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
    fill(tmp_path / "j.sqlite", 2).close()
    journal = Journal.open(tmp_path / "j.sqlite")
    state = add_round(journal, replay(journal))
    journal.close()
    assert replay(Journal.open(tmp_path / "j.sqlite")).digest == state.digest


RULES: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {"optimizer": {"rule": {"kind": "momentum", "decay": 0.8}}},
    "adam": {"optimizer": {"rule": {"kind": "adam", "beta2": 0.99}}},
    "pool": {"noise": {"keys": {"kind": "pool", "size": 2}, "perturbations": 3}},
    "pool of each client": {"algorithm": "fedkseed"},
    "adam over a pool": {
        "optimizer": {"rule": "adam"},
        "noise": {"keys": {"kind": "pool", "size": 3}, "directions": "per-client"},
    },
}


@pytest.mark.parametrize("sections", RULES.values(), ids=list(RULES))
def test_replay_is_the_live_state(tmp_path: Path, sections: dict[str, Any]) -> None:
    """θ and all slots, after each round, from the file alone."""
    path = tmp_path / "j.sqlite"
    with closing(Journal.create(path, header(**sections), theta0())) as journal:
        live = [journal.header.algorithm.init(journal.theta0)]
        for _ in range(4):
            live.append(add_round(journal, live[-1], steps=2))
    with closing(Journal.open(path)) as journal:
        for rounds, state in enumerate(live):
            found = replay(journal, rounds)
            assert found.to_bytes() == state.to_bytes()
            assert found.slots.keys() == state.slots.keys()
            assert found.digest == state.digest
        assert replay(journal).digest == live[-1].digest
    assert len({state.digest for state in live}) == len(live)


def test_a_pool_gives_an_update_one_entry_a_direction(tmp_path: Path) -> None:
    """Three perturbations from a pool of two: the case that the codec's counts are for."""
    with closing(fill(tmp_path / "j.sqlite", 4, **RULES["pool"])) as journal:
        sizes = [len(u.entries) for record, _ in journal.records() for u in record.updates]
    assert len(sizes) == 4
    assert set(sizes) <= {1, 2}


def test_replay_of_a_missing_round(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="it has 2 rounds"):
        replay(fill(tmp_path / "j.sqlite", 2), 3)


def test_replay_notices_another_theta(tmp_path: Path) -> None:
    journal = fill(tmp_path / "j.sqlite", 2)
    journal._connection.execute("UPDATE rounds SET digest = ?", ("0" * 64,))
    with pytest.raises(JournalError, match="the run recorded 0000"):
        replay(journal, 1)


# Damage


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE rounds SET updates = zeroblob(32) WHERE round = 3",
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
    assert replay(kept).digest == good[-1].state_digest
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


# Other versions


def set_format(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header's JSON in place."""
    with closing(sqlite3.connect(path)) as connection, connection:
        (text,) = connection.execute("SELECT value FROM header WHERE key = 'header'").fetchone()
        content = json.loads(text)
        change(content)
        connection.execute(
            "UPDATE header SET value = ? WHERE key = 'header'", (json.dumps(content),)
        )


@pytest.fixture(params=["of an older version", "with an older format"])
def older(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A run's directory, whose journal is of format 2."""
    directory = tmp_path / "run"
    directory.mkdir()
    path = directory / "journal.sqlite"
    if request.param == "of an older version":
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript(OLDER.read_text("utf-8"))
            (text,) = connection.execute("SELECT value FROM header WHERE key = 'header'").fetchone()
        recipe = json.loads(text)["recipe"]
        assert "calibration_passes" in recipe, "a field that this version does not know"
    else:
        fill(path, 2).close()
        set_format(path, lambda content: content.update(format=2))
        recipe = make_recipe().to_json()
    (directory / "recipe.json").write_text(recipe, "utf-8")
    return directory


OPENED: dict[str, Callable[[Path], object]] = {
    "open": lambda directory: Journal.open(directory / "journal.sqlite"),
    "recover": lambda directory: Journal.recover(directory / "journal.sqlite"),
    "replay": meerkat.replay,
    "resume": meerkat.resume,
    "resume --recover": lambda directory: meerkat.resume(directory, recover=True),
    "report": meerkat.report,
}


@pytest.mark.parametrize("command", OPENED)
def test_an_older_journal_is_called_older(older: Path, command: str) -> None:
    before = {path.name: path.read_bytes() for path in older.iterdir()} | {"lock": b""}
    with pytest.raises(JournalError) as caught:
        OPENED[command](older)
    line = str(caught.value)
    assert f"an older version of meerkat-fl (its format is 2, this one reads {FORMAT})" in line
    assert "go on with that version" in line
    assert "damaged" not in line
    assert {path.name: path.read_bytes() for path in older.iterdir()} | {"lock": b""} == before


@pytest.mark.parametrize("command", OPENED)
def test_a_newer_journal_is_called_newer(tmp_path: Path, command: str) -> None:
    path = tmp_path / "journal.sqlite"
    fill(path, 2).close()
    # Fields that are not known here are no reason to call it damaged.
    set_format(path, lambda content: content.update(format=FORMAT + 1, colour="red"))
    (tmp_path / "recipe.json").write_text(make_recipe().to_json(), "utf-8")
    with pytest.raises(JournalError, match="written by a newer version") as caught:
        OPENED[command](tmp_path)
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize("found", ["2", None, True, [3], {}, 2.5])
def test_a_format_that_is_no_number_is_damage(tmp_path: Path, found: object) -> None:
    path = tmp_path / "j.sqlite"
    fill(path, 2).close()
    set_format(path, lambda content: content.update(format=found))
    with pytest.raises(JournalError, match="damaged after 0 good rounds"):
        Journal.open(path)
    with pytest.raises(JournalError, match="not even its header"):
        Journal.recover(path)


def test_a_header_without_a_format_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    fill(path, 2).close()
    set_format(path, lambda content: content.pop("format"))
    with pytest.raises(JournalError, match="damaged after 0 good rounds"):
        Journal.open(path)


def test_a_recipe_that_was_edited_wrongly_is_named_as_before(tmp_path: Path) -> None:
    """Only a journal of another version makes an unknown field a matter of versions."""
    fill(tmp_path / "journal.sqlite", 2).close()
    content = json.loads(make_recipe().to_json())
    content["runtime"]["colour"] = "red"
    (tmp_path / "recipe.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(RecipeError, match="colour"):
        meerkat.resume(tmp_path)


def test_the_arithmetic_is_that_of_an_older_version(tmp_path: Path) -> None:
    """What format 2 recorded of its rounds, by today's algorithm: the same bits."""
    with closing(sqlite3.connect(tmp_path / "older.sqlite")) as connection:
        connection.executescript(OLDER.read_text("utf-8"))
        rows = connection.execute("SELECT entries, digest FROM rounds ORDER BY round").fetchall()
        (start,) = connection.execute("SELECT value FROM header WHERE key = 'theta'").fetchone()
    theta = np.frombuffer(start, "<f4").copy()
    recipe = make_recipe(federation={"clients": 2, "rounds": 3}, optimizer={"learning_rate": 0.5})
    algorithm = meerkat.algorithms.make_algorithm(recipe, len(theta))
    state = algorithm.init(theta)
    for entries, recorded in rows:
        update = [
            Update(rate, (LogEntry(DirectionKey(number, step, perturbation, client), coefficient),))
            for number, step, perturbation, client, rate, coefficient in struct.iter_unpack(
                "<IHHIfd", entries
            )
        ]
        state = algorithm.apply(state, update)
        assert state.digest == recorded


# The codec

NUMBER = st.integers(0, 2**32 - 1)
ENTRY = st.tuples(NUMBER, NUMBER, NUMBER, NUMBER, st.floats(allow_nan=False))
"""Round, step, perturbation, client and coefficient."""
UPDATES = st.lists(
    st.tuples(st.floats(width=32, allow_nan=False), st.lists(ENTRY, min_size=1, max_size=5)),
    max_size=5,
)
"""Learning rates, and one to five entries."""


Drawn = list[tuple[float, list[tuple[int, int, int, int, float]]]]


def updates_of(drawn: Drawn) -> tuple[Update, ...]:
    """The objects are made here: a strategy may not make what is type-checked by sampling."""
    return tuple(
        Update(rate, tuple(LogEntry(DirectionKey(*key), value) for *key, value in entries))
        for rate, entries in drawn
    )


@st.composite
def report_fields(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of reports of one to four steps, of one to five perturbations."""
    steps, count = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    scalar = st.floats(width=32, allow_nan=False)
    return {
        "round": draw(NUMBER),
        "client": draw(NUMBER),
        "examples": draw(NUMBER),
        "steps": steps,
        "perturbations": count,
        "state_digest": draw(st.binary(min_size=DIGEST_BYTES, max_size=DIGEST_BYTES)),
        "scalars": tuple(draw(st.lists(scalar, min_size=steps * count, max_size=steps * count))),
    }


@settings(deadline=None)
@given(UPDATES)
def test_updates_survive_their_encoding(drawn: Drawn) -> None:
    updates = updates_of(drawn)
    data = encode_updates(updates)
    assert decode_updates(data) == updates
    assert len(data) == sum(8 + 24 * len(update.entries) for update in updates)


@settings(deadline=None)
@given(UPDATES)
def test_updates_that_are_cut_off_are_none(drawn: Drawn) -> None:
    """A cut between two updates leaves fewer of them, which the chain of digests finds."""
    updates = updates_of(drawn)
    data = encode_updates(updates)
    whole = {len(encode_updates(updates[:count])): count for count in range(len(updates) + 1)}
    for length in range(len(data)):
        if length in whole:
            assert decode_updates(data[:length]) == updates[: whole[length]]
        else:
            with pytest.raises(ValueError, match="updates of"):
                decode_updates(data[:length])


@settings(deadline=None)
@given(report_fields())
def test_a_report_survives_its_encoding(fields: dict[str, Any]) -> None:
    report = ClientReport(**fields)
    data = encode_report(report)
    assert decode_report(data) == report
    assert len(data) == 28 + 4 * report.steps * report.perturbations


@settings(deadline=None)
@given(report_fields())
def test_a_report_that_is_cut_off_or_longer_is_none(fields: dict[str, Any]) -> None:
    data = encode_report(ClientReport(**fields))
    for other in (*(data[:length] for length in range(len(data))), data + bytes(4)):
        with pytest.raises(ValueError, match="a report of"):
            decode_report(other)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for decode, encode in ((decode_updates, encode_updates), (decode_report, encode_report)):
        try:
            found = decode(data)
        except ValueError:
            continue
        assert encode(found) == data or b"\x7f" in data or b"\xff" in data  # NaN has many forms


def test_updates_without_entries_are_none() -> None:
    with pytest.raises(ValueError, match="do not hold 0 entries"):
        decode_updates(struct.pack("<fI", 0.5, 0))
    with pytest.raises(ValueError, match="do not hold 4294967295 entries"):
        decode_updates(struct.pack("<fI", 0.5, 2**32 - 1) + bytes(24))


def test_the_codec_is_not_that_of_the_wire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever crosses the wire one day, a journal of today opens, replays and goes on."""
    path = tmp_path / "j.sqlite"
    with closing(fill(path, 3, **RULES["momentum"])) as journal:
        journal.append_calibrations([make_report(replay(journal, 0), 1, [0.5, 0.25])])
        written, state = list(journal.records()), replay(journal)
        calibrated = list(journal.calibrations())

    for module in (frame, messages):
        monkeypatch.setattr(module, "VERSION", frame.VERSION + 1)
    for name, form in (("_PLAN", ">QQ"), ("_ENTRY", ">QQdd"), ("_REPORT", ">QQQ")):
        monkeypatch.setattr(messages, name, struct.Struct(form))

    def unusable(*_: object) -> bytes:
        pytest.fail("the journal went by the wire's codec")

    for name in messages.__all__:
        if name.startswith(("encode", "decode")):
            monkeypatch.setattr(messages, name, unusable)

    with closing(Journal.open(path)) as journal:
        assert list(journal.records()) == written
        assert list(journal.calibrations()) == calibrated
        assert replay(journal).digest == state.digest
        later = add_round(journal, state)
    with closing(Journal.recover(path)) as journal:
        assert replay(journal).digest == later.digest
        assert list(journal.calibrations()) == calibrated


# A full disk

_FULL_DISK = """
import sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from test_journal import fill
from meerkat.errors import JournalError
try:
    fill(Path(sys.argv[1]), 100_000)
except JournalError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.slow
def test_full_disk_keeps_what_was_recorded(tmp_path: Path) -> None:
    """The file system refuses to grow the files beyond 200 kB while rounds are written."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    path = tmp_path / "j.sqlite"
    done = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(path), *sys.path],
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
