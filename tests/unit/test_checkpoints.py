"""Checkpoints of a journal: opening and resuming from the last one, and the full audit."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import make_recipe, make_report

from meerkat.errors import JournalError
from meerkat.federation.rounds import close_round, plan_round
from meerkat.federation.schedule import Schedule
from meerkat.federation.state import ServerState, initial_state
from meerkat.journal import Journal, replay
from meerkat.journal.records import RoundMetrics, header_of
from meerkat.runs.driver import checkpoint_of, restore_state
from meerkat.spaces.mask_file import Mask
from meerkat.zo.log import Log

N, CLIENTS, ROUNDS, EVERY = 30, 3, 25, 10


def write(path: Path, rule: str = "sgd", checkpoints: bool = True) -> tuple[ServerState, Log]:
    """A journal of a run with a checkpoint every ten rounds; the state and log at its end."""
    federation = {"clients": CLIENTS, "rounds": ROUNDS, "clients_per_round": 2}
    recipe = make_recipe(federation=federation, optimizer={"rule": rule, "learning_rate": 0.1})
    theta = np.linspace(-1, 1, N, dtype=np.float32)
    mask = Mask(("w",), ((N,),), (np.arange(N),), N, "ab" * 32, "full", initial=theta)
    journal = Journal.create(path, header_of(recipe, mask, ("a", "b"), [], ""), theta)
    schedule, algorithm, log = Schedule.of(recipe), journal.header.algorithm, Log()
    state = initial_state(algorithm.init(theta), CLIENTS, 1)
    with closing(journal):
        for r in range(ROUNDS):
            plans = plan_round(schedule, state, log)
            reports = [make_report(state.model, k, [(3 * k + r) % 7 - 3.0], r) for k in plans]
            state, record = close_round(schedule, state, algorithm, plans, reports, log)
            log.append(record.updates)
            journal.append_round(record, RoundMetrics(float("nan"), 1, 2, 0.0))
            if checkpoints and state.round % EVERY == 0:
                journal.append_checkpoint(checkpoint_of(state, log))
    return state, log


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam"])
def test_a_run_goes_on_from_a_checkpoint_as_from_the_start(tmp_path: Path, rule: str) -> None:
    live, log = write(tmp_path / "with", rule)
    write(tmp_path / "without", rule, checkpoints=False)
    for name, base in (("with", 20), ("without", 0)):
        with closing(Journal.open(tmp_path / name)) as journal:
            state, found = restore_state(journal, CLIENTS, 1)
        assert state.model.digest == live.model.digest
        assert state.usual == live.usual
        assert state.known.tolist() == live.known.tolist()
        assert state.steps_taken.tolist() == live.steps_taken.tolist()
        assert (found.base, len(found)) == (base, len(log))
        assert found.since(20) == log.since(20)


def test_replay_starts_from_the_last_checkpoint_before(tmp_path: Path) -> None:
    write(tmp_path / "journal")
    with closing(Journal.open(tmp_path / "journal")) as journal:
        digests = [replay(journal, r).digest for r in range(ROUNDS + 1)]
        assert digests == [replay(journal, r, audit=True).digest for r in range(ROUNDS + 1)]
        assert journal.checkpoint(9) is None  # only the last two are kept
        assert [journal.checkpoint(r).round for r in (10, 19, 20, 25)] == [10, 10, 20, 20]


def damage(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute(statement).rowcount == 1
        connection.commit()


def test_an_audit_finds_what_a_checkpoint_hides(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    write(path)
    damage(path, "UPDATE rounds SET digest = 'x' WHERE round = 4")
    Journal.open(path).close()
    with pytest.raises(JournalError, match="damaged after 4 good rounds"):
        Journal.open(path, audit=True)


def test_an_audit_compares_the_state_with_each_checkpoint(tmp_path: Path) -> None:
    """One that is whole, and of another state than the rounds before it give."""
    path = tmp_path / "journal"
    live, log = write(path, checkpoints=False)
    theta = live.model.theta + np.float32(1)
    with closing(Journal.open(path)) as journal:
        another = replace(live, model=replace(live.model, theta=theta))
        journal.append_checkpoint(checkpoint_of(another, log))
        with pytest.raises(JournalError, match="after round 25 has digest"):
            replay(journal)
        with pytest.raises(JournalError, match="the checkpoint after round 25 is another"):
            replay(journal, audit=True)


def test_damage_after_the_checkpoint_is_found_at_once(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    write(path)
    damage(path, "UPDATE rounds SET digest = 'x' WHERE round = 22")
    with pytest.raises(JournalError, match="damaged after 22 good rounds"):
        Journal.open(path)


@pytest.mark.parametrize("column", ["content", "chain", "seal"])
def test_a_damaged_checkpoint_is_not_used(tmp_path: Path, column: str) -> None:
    path = tmp_path / "journal"
    live, _ = write(path)
    damage(path, f"UPDATE checkpoints SET {column} = x'00' WHERE round = 20")
    with closing(Journal.open(path)) as journal:
        checkpoint = journal.checkpoint()
        assert checkpoint is not None
        assert checkpoint.round == 10
        assert restore_state(journal, CLIENTS, 1)[0].model.digest == live.model.digest


def test_a_log_that_begins_later_has_nothing_before() -> None:
    log = Log(7)
    assert len(log) == 7
    assert log.since(7) == ()
    with pytest.raises(ValueError, match="position 6 is before 7"):
        log.since(6)
