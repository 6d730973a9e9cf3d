"""The server's loop over clients that are elsewhere: scripted clients, no model, no waiting.

What a run over the transport leaves is compared with what the same clients give when they are asked
directly.
"""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted import (
    CLIENTS,
    DEADLINE,
    MASK,
    PATIENCE,
    PROOF,
    REJOIN,
    ROUNDS,
    STEPS,
    Clock,
    ScriptedClient,
    ScriptedRun,
    ScriptedTransport,
    answer_changed,
    content,
    evaluations,
    in_round,
    recipe_of,
    run_directly,
    sums_of,
)

from meerkat.config import Recipe
from meerkat.errors import MaskError, MeerkatError, RunError
from meerkat.federation.messages import CALIBRATION, DIGEST_BYTES, ClientReport, RoundPlan
from meerkat.journal import Journal
from meerkat.progress import Progress
from meerkat.reporting.observer import ReportWriter
from meerkat.runs.remote_run import load_server_mask
from meerkat.runs.watching import SelectionWriter
from meerkat.spaces.mask_file import load_mask, save_mask
from meerkat.tasks.metrics import METRICS, metric_values
from meerkat.tasks.objective import Predictions
from meerkat.transport.client_frames import Evaluation, Failed, Hello, Need, Report, WantSpace
from meerkat.transport.frame import DownFrame, encode
from meerkat.transport.messages import ENTRY_BYTES
from meerkat.transport.server_frames import (
    EvaluateRequest,
    Goodbye,
    Notice,
    Plan,
    Refused,
    Snapshot,
    SpaceFile,
)

SOME = {"rho_later": 1.0, "rho_quiet": 0.0, "sigma": 1e9}
MakeRun = Callable[..., ScriptedRun]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    clock.install(monkeypatch)
    return clock


@pytest.fixture
def make_run(tmp_path: Path, clock: Clock) -> MakeRun:
    def make(
        recipe: Recipe | None = None, *clients: ScriptedClient, **sections: Any
    ) -> ScriptedRun:
        return ScriptedRun(recipe or recipe_of(**sections), tmp_path / "hosted", clock, clients)

    return make


# The same bits as without a wire

RUNS: dict[str, dict[str, Any]] = {
    "T=1": {"federation": {"local_steps": 1}},
    "T=5": {"federation": {"local_steps": 5}},
    "sampled": {"federation": {"clients_per_round": 2, "rounds": 9}},
    "by examples": {"federation": {"weighting": "examples"}},
    "perturbations": {"noise": {"perturbations": 3}},
    "per client": {"noise": {"directions": "per-client"}},
    "rademacher": {"noise": {"kind": "rademacher"}},
    "pool": {"noise": {"keys": {"kind": "pool", "size": 3}, "perturbations": 2}},
    "momentum": {"optimizer": {"rule": "momentum"}, "federation": {"local_steps": 5}},
    "adam": {"optimizer": {"rule": {"kind": "adam", "beta2": 0.99}}, "noise": {"perturbations": 2}},
    "one-sided": {"optimizer": {"estimator": "one-sided"}, "noise": {"perturbations": 3}},
    "schedule": {"optimizer": {"learning_rate": 0.01, "schedule": "cosine"}},
    "gradip": {"selection": {"kind": "gradip", "signal": "gradip", **SOME}},
    "gradip sampled": {"selection": {"kind": "gradip"}, "federation": {"clients_per_round": 3}},
    "gradip apply": {"selection": {"kind": "gradip", "apply": True, **SOME}},
    "projected": {"selection": {"kind": "gradip", "signal": "projected-gradient", **SOME}},
    "random": {"selection": {"kind": "random", "count": 2}},
    "list": {"selection": {"kind": "list", "clients": [1, 3]}},
    "every": {
        "selection": {"kind": "gradip", "signal": "gradip", "every": 3, **SOME},
        "federation": {"rounds": 9},
    },
    "per client, every": {
        "noise": {"directions": "per-client", "perturbations": 2},
        "selection": {"kind": "gradip", "every": 3, **SOME},
        "federation": {"rounds": 7, "weighting": "examples"},
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_a_hosted_run_has_the_bits_of_a_direct_one(
    make_run: MakeRun, tmp_path: Path, name: str
) -> None:
    recipe = recipe_of(**RUNS[name])
    expected = run_directly(recipe, tmp_path / "direct")
    hosted = make_run(recipe)
    summary = hosted.run()
    assert content(hosted.out) == expected
    assert summary["state_digest"] == expected["rounds"][-1][2]
    # Every client kept its state; it got no update twice.
    assert hosted.transport.closed == "the run is complete"
    assert all(client.count(Goodbye) == 1 for client in hosted.clients)
    assert not hosted.transport.frames(SpaceFile)
    assert [line for line in hosted.lines if "is here" in line] == hosted.lines
    if "clients_per_round" not in RUNS[name].get("federation", {}):
        # A client that is asked in every round lacks the updates of one.
        with closing(Journal.open(hosted.out / "journal.sqlite")) as journal:
            rounds = [record.updates for record, _ in journal.records()][:-1]
        size = hosted.clients[0].state.nbytes
        large = [sum(len(u.entries) for u in updates) * ENTRY_BYTES > size for updates in rounds]
        assert len(hosted.transport.frames(Snapshot)) == CLIENTS * sum(large)


@pytest.mark.parametrize("anew", [False, True], ids=["clients stay", "clients start anew"])
@pytest.mark.parametrize("every", [1, 5, 14])
@pytest.mark.parametrize(
    "name", ["T=5", "sampled", "gradip", "gradip apply", "every", "momentum", "adam"]
)
def test_interruptions_leave_no_trace(
    make_run: MakeRun, tmp_path: Path, name: str, every: int, anew: bool
) -> None:
    """The transport fails after so many events beyond the hellos, again and again."""
    recipe = recipe_of(**RUNS[name])
    expected = run_directly(recipe, tmp_path / "direct")
    hosted, failures = make_run(recipe), 0
    hosted.cut_in = CLIENTS + every
    while True:
        with suppress(RunError):
            hosted.run()
            break
        assert hosted.transport.closed == "the server stopped before the end"
        failures += 1
        # A whole round, or four calibrations, is the least that a start must get through.
        hosted.cut_in = CLIENTS + max(every, CLIENTS)
        if anew:
            for client in hosted.clients:
                client.forget()
    assert content(hosted.out) == expected
    assert failures >= 1
    assert hosted.run()["state_digest"] == expected["rounds"][-1][2]


def test_any_order_of_arrival_gives_the_same_bits(make_run: MakeRun, tmp_path: Path) -> None:
    recipe = recipe_of(noise={"directions": "per-client"})
    expected = run_directly(recipe, tmp_path / "direct")
    hosted = make_run(recipe, *(ScriptedClient(k, delay=CLIENTS - k) for k in (2, 0, 3, 1)))
    hosted.run()
    assert content(hosted.out) == expected


def test_answers_and_bytes_are_counted(make_run: MakeRun) -> None:
    class Counting(Progress):
        done = 0

        def advance(self, steps: int = 1) -> None:
            Counting.done += 1

    hosted = make_run()
    hosted.progress = Counting()
    hosted.run()
    assert Counting.done == CLIENTS * ROUNDS
    with closing(Journal.open(hosted.out / "journal.sqlite")) as journal:
        metrics = [found for _, found in journal.records()]
    assert {found.bytes_up for found in metrics} == {CLIENTS * (1 + 24 + 4 * STEPS)}
    assert metrics[0].bytes_down == CLIENTS * (1 + 24)
    assert {f.bytes_down for f in metrics[1:]} == {CLIENTS * (1 + 24 + ENTRY_BYTES * STEPS)}


# Who comes late, leaves and comes back


def few(**fields: Any) -> dict[str, Any]:
    return {"network": {"quorum": 1}, **fields}


LATE = {
    # Rounds after which three, six and nine log entries are no larger than the state.
    "sgd": {1: 0, 2: 0, 3: 0, 4: 1},
    "momentum": {5: 0, 6: 0, 7: 1, 10: 1},
    "adam": {8: 0, 9: 0, 10: 1, 11: 1},
}
"""Snapshots that a client gets that comes before this round, by update rule."""


@pytest.mark.parametrize(("rule", "late"), [(rule, late) for rule in LATE for late in LATE[rule]])
def test_a_late_client_gets_what_is_smaller(
    make_run: MakeRun, tmp_path: Path, rule: str, late: int
) -> None:
    """Updates, or a snapshot of θ with the slots of the update rule."""
    federation = {"local_steps": 1, "rounds": late + 2}
    recipe = recipe_of(**few(federation=federation, optimizer={"rule": rule}))
    expected = run_directly(
        recipe, tmp_path / "direct", lambda number: range(3 if number < late else 4)
    )
    hosted = make_run(recipe)
    *early, newcomer = hosted.clients

    def join(client: ScriptedClient, frame: DownFrame) -> bool:
        if isinstance(frame, Plan) and frame.plan.round == late - 1:
            client.transport.join(newcomer)
        return False

    early[0].act = join
    hosted.opening = lambda transport: [transport.join(client) for client in early]
    summary = hosted.run()
    assert content(hosted.out) == expected
    assert summary["state_digest"] == expected["rounds"][-1][2]
    first = newcomer.plans()[0]
    snapshots = LATE[rule][late]
    assert first.round == late
    assert newcomer.count(Snapshot) == snapshots
    assert (first.log_start, len(first.updates)) == ((late, 0) if snapshots else (0, late))
    for snapshot in hosted.transport.frames(Snapshot):
        assert snapshot.position == late
        assert len(snapshot.state) == newcomer.state.nbytes
    assert newcomer.position == late + 1
    assert newcomer.state.digest == early[0].state.digest
    assert (
        sorted(newcomer.state.slots)
        == {
            "sgd": [],
            "momentum": ["momentum"],
            "adam": ["first", "powers", "second"],
        }[rule]
    )
    assert all(np.any(slot) for slot in newcomer.state.slots.values())


@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_a_snapshot_without_its_slots_would_be_noticed(
    make_run: MakeRun, tmp_path: Path, rule: str
) -> None:
    """A client that drops the slots starts its next round from another state, and is refused."""
    recipe = recipe_of(**few(federation={"local_steps": 1, "rounds": 13}, optimizer={"rule": rule}))
    expected = run_directly(
        recipe,
        tmp_path / "direct",
        lambda number: range(3 if number < 11 else 4),
        lambda number: (3,) if number == 11 else (),
    )
    hosted = make_run(recipe)
    *early, newcomer = hosted.clients
    early[0].act = lambda client, frame: (
        isinstance(frame, Plan)
        and frame.plan.round == 10
        and client.transport.join(newcomer) is not None
    )

    def drop(client: ScriptedClient, frame: DownFrame) -> bool:
        if isinstance(frame, Plan) and frame.plan.round == 11:
            client._state = client.algorithm.init(client.state.theta)
        return False

    newcomer.act = drop
    hosted.opening = lambda transport: [transport.join(client) for client in early]
    hosted.run()
    assert content(hosted.out) == expected
    assert hosted.line("round 11: client 3 refused: ", "it started from another state")
    assert newcomer.count(Snapshot) == 2
    assert newcomer.state.digest == early[0].state.digest


@pytest.mark.parametrize("claims", [None, 0, 2, 999], ids=str)
def test_a_client_that_comes_back_in_its_round_is_asked_again(
    make_run: MakeRun, tmp_path: Path, claims: int | None
) -> None:
    """Whatever position it claims to have: None is the true one."""
    recipe = recipe_of(**few())
    expected = run_directly(recipe, tmp_path / "direct")
    hosted = make_run(recipe)

    def act(client: ScriptedClient, plan: RoundPlan) -> None:
        client.claims = claims
        if claims is not None:
            client.forget()
        client.transport.away(client, REJOIN / 2)

    hosted.clients[2].act = in_round(2, act)
    hosted.run()
    assert content(hosted.out) == expected
    assert hosted.line("client 2 left: its line broke")
    assert [plan.round for plan in hosted.clients[2].plans()].count(2) == (3 if claims == 2 else 2)
    assert hosted.clock.now == REJOIN / 2


@pytest.mark.parametrize("claims", ["true", 0, 999], ids=str)
def test_a_client_that_comes_back_later_catches_up(
    make_run: MakeRun, tmp_path: Path, claims: Any
) -> None:
    """It left in round 1 and is there again before round 4."""
    recipe = recipe_of(**few(federation={"local_steps": 1}))
    away = {1, 2, 3}
    expected = run_directly(
        recipe,
        tmp_path / "direct",
        lambda number: (0, 1, 3) if number in away - {1} else range(4),
        lambda number: (2,) if number == 1 else (),
    )
    hosted = make_run(recipe)
    leaver = hosted.clients[2]

    def leave(client: ScriptedClient, plan: RoundPlan) -> None:
        client.answer(plan)
        client.transport.leave(client)

    leaver.act = in_round(1, leave)

    def back(client: ScriptedClient, plan: RoundPlan) -> None:
        if claims == 0:
            leaver.forget()
        leaver.claims = claims if claims != "true" else None
        client.transport.join(leaver)
        client.respond(Plan(plan))

    hosted.clients[0].act = in_round(3, back)
    hosted.run()
    assert content(hosted.out) == expected
    assert hosted.clock.now == REJOIN, "nobody waits for a client that is away in later rounds"
    assert hosted.line("round 1: closed without client 2, it left: its line broke after 10.0 s")
    assert leaver.count(Snapshot) == (claims != "true")
    back_at = next(plan for plan in leaver.plans() if plan.round == 4)
    assert len(back_at.updates) == (3 if claims == "true" else 0)
    assert leaver.state.digest == hosted.clients[0].state.digest


def test_a_process_that_is_new_each_time_is_helped_each_time(
    make_run: MakeRun, tmp_path: Path
) -> None:
    recipe = recipe_of(federation={"local_steps": 1}, evaluation={"every": 1})
    expected = run_directly(recipe, tmp_path / "direct")
    clients = [ScriptedClient(k, held_out=5) for k in range(CLIENTS)]
    kept = [ScriptedClient(k, held_out=5) for k in range(CLIENTS)]

    def act(client: ScriptedClient, frame: DownFrame) -> bool:
        if isinstance(frame, Plan | EvaluateRequest) and not isinstance(
            client.received[-2], Snapshot
        ):
            client.forget()
        return False

    clients[1].act = act
    hosted = make_run(recipe, *clients)
    hosted.run()
    assert content(hosted.out) == expected
    assert all("is here" in line for line in hosted.lines)
    found = evaluations(hosted.out)
    other = ScriptedRun(recipe, tmp_path / "kept", hosted.clock, kept)
    other.run()
    assert [e.metrics for e in found] == [e.metrics for e in evaluations(other.out)]
    assert len({e.metrics["accuracy"] for e in found}) > 1
    assert {e.examples for e in found} == {20}


def test_a_client_that_needs_for_ever_is_barred(make_run: MakeRun, tmp_path: Path) -> None:
    recipe = recipe_of()
    expected = run_directly(
        recipe,
        tmp_path / "direct",
        lambda number: (0, 1, 3) if number > 1 else range(4),
        lambda number: (2,) if number == 1 else (),
    )
    hosted = make_run(recipe)
    client = hosted.clients[2]

    def act(client: ScriptedClient, frame: DownFrame) -> bool:
        if isinstance(frame, Plan) and frame.plan.round >= 1:
            client.send(Need(0))
            return True
        return bool(isinstance(frame, Refused))

    client.act = act
    drop = ScriptedTransport.drop

    def returning(transport: ScriptedTransport, peer: int, reason: str, bar: bool = False) -> None:
        drop(transport, peer, reason, bar)
        transport.later(1.0, lambda: transport.join(client))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScriptedTransport, "drop", returning)
        hosted.run()
    assert content(hosted.out) == expected
    assert hosted.line("client 2: it needs more than a snapshot; barred from this run")
    assert hosted.transport.barred == {12}
    # In round 1: a plan, again with entries, with a snapshot, and one for each return.
    assert [plan.round for plan in client.plans()] == [0, 1, 1, 1, 1, 1]
    assert client.count(Snapshot) == 1
    assert client.count(Refused) == 1


# Quorum, deadline, patience


def test_a_round_closes_at_its_deadline_and_a_late_answer_is_not_used(
    make_run: MakeRun, tmp_path: Path
) -> None:
    """It misses round 1, answers while round 2 is under way, and takes part in round 3."""
    recipe = recipe_of()
    expected = run_directly(
        recipe,
        tmp_path / "direct",
        lambda number: (0, 1, 3) if number == 2 else range(4),
        lambda number: (2,) if number == 1 else (),
    )
    hosted = make_run(recipe, *(ScriptedClient(k, delay=1.0) for k in range(CLIENTS)))
    slow = hosted.clients[2]

    def act(client: ScriptedClient, frame: DownFrame) -> bool:
        late = isinstance(frame, Plan) and frame.plan.round == 1
        client.delay = DEADLINE + 0.5 if late else 1.0
        return False

    slow.act = act
    hosted.run()
    assert content(hosted.out) == expected
    assert hosted.line("round 1: closed without client 2, no answer after 100.0 s")
    assert hosted.line("client 2: the answer to round 1 came too late; not used")
    assert hosted.clock.now == DEADLINE + 4.0
    assert [plan.round for plan in slow.plans()] == [0, 1, 3, 4]
    assert slow.peer not in hosted.transport.barred


def test_what_came_while_the_server_was_busy_is_in_time(
    make_run: MakeRun, tmp_path: Path, clock: Clock
) -> None:
    """It sends for longer than the deadline, as after a suspension; all answers wait by then."""
    hosted = make_run()
    expected = run_directly(hosted.recipe, tmp_path / "direct")
    send = ScriptedTransport.send

    def slow(transport: ScriptedTransport, peer: int, frame: bytes) -> None:
        clock.now += DEADLINE
        send(transport, peer, frame)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScriptedTransport, "send", slow)
        hosted.run()
    assert content(hosted.out) == expected
    assert not [line for line in hosted.lines if "closed without" in line]


def test_a_client_that_hangs_is_waited_for_once(make_run: MakeRun, tmp_path: Path) -> None:
    recipe = recipe_of()
    expected = run_directly(
        recipe,
        tmp_path / "direct",
        lambda number: (0, 1, 3) if number > 1 else range(4),
        lambda number: (2,) if number == 1 else (),
    )
    hosted = make_run(recipe)
    hosted.clients[2].act = in_round(1, lambda client, plan: None)
    hosted.run()
    assert content(hosted.out) == expected
    assert hosted.clock.now == DEADLINE
    assert hosted.clients[2].count(Goodbye) == 1


def test_the_missing_hold_a_round_up_until_a_quorum_is_there(
    make_run: MakeRun, tmp_path: Path
) -> None:
    """Beyond the deadline, within the patience."""
    recipe = recipe_of(network={"quorum": 3})
    hosted = make_run(recipe)
    for client in hosted.clients[1:]:
        client.act = in_round(1, lambda client, plan: client.transport.away(client, DEADLINE + 50))
    # Who comes back last is not needed any more, but there when the round closes.
    expected = run_directly(recipe, tmp_path / "direct")
    hosted.run()
    assert content(hosted.out) == expected
    assert hosted.clock.now == DEADLINE + 50


def fails_for_ever(client: ScriptedClient) -> None:
    client.act = lambda client, frame: (
        isinstance(frame, Plan) and client.send(Failed("no memory\nleft")) is None
    )
    client.send(Failed("no memory\nleft"))


def test_a_round_without_a_quorum_ends_the_run_and_it_goes_on(
    make_run: MakeRun, tmp_path: Path
) -> None:
    recipe = recipe_of()  # a quorum of 3
    expected = run_directly(recipe, tmp_path / "direct")
    hosted = make_run(recipe)
    acts = (
        lambda client, plan: fails_for_ever(client),
        lambda client, plan: None,
        lambda client, plan: client.transport.leave(client),
    )
    for client, act in zip(hosted.clients, acts, strict=False):
        client.act = in_round(2, act)
    line = hosted.fails()
    assert line.startswith("round 2: 1 of the 3 answers that network.quorum asks for (client 0: it")
    for part in (
        "client 0: it failed: no memory left",
        "client 1: no answer after 1000.0 s",
        "client 2: it left: its line broke after 1000.0 s",
        "start the server again",
    ):
        assert part in line, line
    assert "round 2: client 0 failed: no memory left" in hosted.lines
    assert content(hosted.out)["rounds"] == expected["rounds"][:2]
    assert content(hosted.out)["reports"] == expected["reports"][: 2 * CLIENTS]
    hosted.clients[0].act = lambda client, frame: False
    hosted.run()
    assert content(hosted.out) == expected


def test_too_few_clients_are_waited_for_and_named(make_run: MakeRun, tmp_path: Path) -> None:
    recipe = recipe_of()
    expected = run_directly(
        recipe, tmp_path / "direct", silent=lambda number: (0,) if number == 1 else ()
    )
    hosted = make_run(recipe)
    leave = in_round(1, lambda client, plan: client.transport.leave(client))
    hosted.clients[0].act = leave

    def after(client: ScriptedClient, plan: RoundPlan) -> None:
        client.respond(Plan(plan))
        client.transport.leave(client, "power cut")

    hosted.clients[3].act = in_round(1, after)
    line = hosted.fails()
    assert line.startswith("2 of the 3 clients that network.quorum asks for were there for 1000 s ")
    assert "(client 0 left: its line broke; client 3 left: power cut)" in line
    waiting = [line for line in hosted.lines if line == "waiting for clients: 2 of 3 are here"]
    assert 30 < len(waiting) < 34
    assert content(hosted.out)["rounds"] == expected["rounds"][:2]
    hosted.run()
    assert content(hosted.out) == expected


def test_nobody_comes(make_run: MakeRun) -> None:
    hosted = make_run()
    hosted.opening = lambda transport: None
    assert "0 of the 3 clients" in hosted.fails()
    assert hosted.clock.now == DEADLINE + PATIENCE
    hosted.opening = lambda transport: [transport.join(client) for client in hosted.clients]
    assert hosted.run()["rounds"] == ROUNDS


def test_the_first_round_waits_for_all_and_then_for_none(make_run: MakeRun, tmp_path: Path) -> None:
    hosted = make_run()
    expected = run_directly(hosted.recipe, tmp_path / "direct", lambda number: range(3))
    hosted.opening = lambda transport: [transport.join(client) for client in hosted.clients[:3]]
    hosted.run()
    assert content(hosted.out) == expected
    assert hosted.clock.now == DEADLINE


# What is refused

NUMBER = 1
"""The round in which client 2 does something wrong."""


def packed(report: ClientReport, value: float) -> bytes:
    return encode(Report(report))[:-4] + struct.pack("<f", value)


REFUSED: dict[str, tuple[Callable[[ClientReport], Any], str]] = {
    "large": (
        lambda r: replace(r, scalars=(-1e9, 0.0)),
        "|g| = 1e+09 is more than network.largest_scalar = 1e+06",
    ),
    "few": (
        lambda r: replace(r, steps=1, scalars=r.scalars[:1]),
        "1 steps of 1 perturbations, asked were 2 of 1",
    ),
    "many": (
        lambda r: replace(r, steps=3, scalars=(*r.scalars, 0.5)),
        "3 steps of 1 perturbations, asked were 2 of 1",
    ),
    "turned": (
        lambda r: replace(r, steps=1, perturbations=2),
        "1 steps of 2 perturbations, asked were 2 of 1",
    ),
    "round before": (lambda r: replace(r, round=NUMBER - 1), "it is for round 0, this is 1"),
    "round after": (lambda r: replace(r, round=NUMBER + 1), "it is for round 2, this is 1"),
    "calibration": (lambda r: replace(r, round=CALIBRATION), "this is 1"),
    "signed": (lambda r: replace(r, client=1), "its report is signed by client 1"),
    "nobody": (lambda r: replace(r, examples=0), "it has no examples"),
    "state": (
        lambda r: replace(r, state_digest=bytes(DIGEST_BYTES)),
        "it started from another state than the server's",
    ),
    "evaluation": (
        lambda r: Evaluation(NUMBER, 1, sums_of(((1, 0), (0, 0)), 0.5)),
        "evaluation instead of a report",
    ),
    "failed": (lambda r: Failed("no memory"), "client 2 failed: no memory"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_report_is_no_report(make_run: MakeRun, tmp_path: Path, name: str) -> None:
    """The line names client and cause; the round is as without it, the client stays."""
    change, cause = REFUSED[name]
    hosted = make_run()
    expected = run_directly(
        hosted.recipe, tmp_path / "direct", silent=lambda number: (2,) if number == 1 else ()
    )
    liar = hosted.clients[2]
    liar.act = in_round(NUMBER, lambda client, plan: answer_changed(client, plan, change))
    hosted.run()
    assert content(hosted.out) == expected
    assert hosted.line("round 1: client 2", cause)
    assert len(hosted.lines) == CLIENTS + 1
    assert hosted.clock.now == 0.0
    # Its state is not trusted any more, unless it only failed.
    assert liar.count(Snapshot) == liar.count(Notice) == (name != "failed")
    assert [plan.round for plan in liar.plans()] == list(range(ROUNDS))


BROKEN: dict[str, tuple[Callable[[ClientReport], Any], str]] = {
    "nan": (lambda r: packed(r, math.nan), "a scalar is not finite"),
    "inf": (lambda r: packed(r, math.inf), "a scalar is not finite"),
    "cut": (lambda r: encode(Report(r))[:-1], "does not hold its 2 steps"),
    "long": (lambda r: encode(Report(r)) + bytes(4), "does not hold its 2 steps"),
    "head": (lambda r: encode(Report(r))[:9], "too short for a report"),
    "newer": (
        lambda r: bytes([66, 9]) + encode(Report(r))[2:],
        "the client speaks version 9 of the protocol, a newer one; this side speaks 4: install",
    ),
    "older": (
        lambda r: bytes([66, 1]) + encode(Report(r))[2:],
        "the client speaks version 1 of the protocol, an older one; this side speaks 4: install",
    ),
    "kind": (lambda r: bytes([200]), "kind 200 has no place here"),
    "empty": (lambda r: b"", "no kind has no place here"),
    "of the server": (lambda r: encode(Goodbye("")), "kind 9 has no place here"),
    "loss": (
        lambda r: encode(Evaluation(1, 1, sums_of(((1, 0), (0, 0)), math.nan))),
        "evaluation: a sum is not finite",
    ),
    "metric": (
        lambda r: encode(Evaluation(1, 1, {"loss": (0.5,), "line\n": (0.5,)})),
        "does not hold its metrics",
    ),
}


@pytest.mark.parametrize("returns", [False, True], ids=["gone", "returns"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_frame_that_is_none_breaks_the_connection(
    make_run: MakeRun, tmp_path: Path, name: str, returns: bool
) -> None:
    """Who returns in time is asked again, and answers well."""
    change, cause = BROKEN[name]
    hosted = make_run()
    expected = run_directly(
        hosted.recipe,
        tmp_path / "direct",
        lambda number: range(4) if returns or number < 2 else (0, 1, 3),
        lambda number: (2,) if number == 1 and not returns else (),
    )

    def act(client: ScriptedClient, plan: RoundPlan) -> None:
        answer_changed(client, plan, change)
        if returns:
            client.transport.later(1.0, lambda: client.transport.join(client))

    hosted.clients[2].act = in_round(NUMBER, act)
    hosted.run()
    assert content(hosted.out) == expected
    assert hosted.line("client 2: ", cause, "; disconnected")
    assert hosted.line("client 2 left: ")
    assert hosted.clients[2].count(Refused) == 0
    assert hosted.clock.now == (1.0 if returns else REJOIN)


def test_a_report_that_comes_twice_counts_once(make_run: MakeRun, tmp_path: Path) -> None:
    hosted = make_run()
    expected = run_directly(hosted.recipe, tmp_path / "direct")

    def act(client: ScriptedClient, plan: RoundPlan) -> None:
        client.respond(Plan(plan))
        client.respond(Plan(plan))
        client.transport.later(0.5, lambda: client.transport.join(client))

    hosted.clients[2].act = in_round(NUMBER, act)
    hosted.clients[3].delay = 1.0
    hosted.run()
    assert content(hosted.out) == expected
    assert hosted.line("client 2: report that nobody asked for; disconnected")


def test_three_strikes(make_run: MakeRun, tmp_path: Path) -> None:
    hosted = make_run()
    expected = run_directly(
        hosted.recipe,
        tmp_path / "direct",
        lambda number: range(4) if number < 4 else (0, 1, 3),
        lambda number: (2,) if number == 3 else (),
    )
    client = hosted.clients[2]

    def act(client: ScriptedClient, frame: DownFrame) -> bool:
        if not isinstance(frame, Plan) or frame.plan.round == 0:
            return False
        if client.count(Plan) % 2 == 0 or frame.plan.round == 3:
            client.send(b"garbage")
            client.transport.later(1.0, lambda: client.transport.join(client))
            return True
        return False

    client.act = act
    hosted.run()
    assert content(hosted.out) == expected
    lines = [line for line in hosted.lines if line.startswith("client 2: ")]
    assert [line.rpartition("; ")[2] for line in lines] == [
        "disconnected",
        "disconnected",
        "barred from this run",
    ]
    assert hosted.transport.barred == {client.peer}
    assert client.count(Refused) == 1


def test_frames_before_hello(make_run: MakeRun, tmp_path: Path) -> None:
    hosted = make_run()
    expected = run_directly(hosted.recipe, tmp_path / "direct")
    report = encode(Report(ClientReport(0, 1, 5, STEPS, 1, bytes(8), (0.5,) * STEPS)))

    def opening(transport: ScriptedTransport) -> None:
        stranger = ScriptedClient(1)
        for frame in (report, encode(Need(0)), bytes([1, 2])):
            transport.peers[99] = stranger
            transport.put(99, frame)
        transport.put(98, encode(Failed("no such\x1b[2J model")))
        transport.put(98, None, "it ended")
        for client in hosted.clients:
            transport.join(client)

    hosted.opening = opening
    hosted.run()
    assert content(hosted.out) == expected
    assert hosted.line("peer 99: report before hello; disconnected")
    assert hosted.line("peer 99: need before hello; disconnected")
    assert hosted.line("peer 99: ", "kind 1 has no place here; barred from this run")
    assert hosted.transport.barred == {99}
    assert len(hosted.transport.frames(Refused, 99)) == 3
    assert hosted.line("peer 98 does not take part: no such [2J model")
    assert hosted.line("peer 98 left before it was a client: it ended")


# The handshake

HELLO = Hello(2, 12, 0, 0, PROOF)
STRANGERS: dict[str, tuple[Hello, str]] = {
    "model": (
        replace(HELLO, proof=replace(PROOF, model="00" * 32)),
        "the client's base model is 000000000000, the run's is abababababab; load the model",
    ),
    "space": (
        replace(HELLO, proof=replace(PROOF, space="00" * 32)),
        f"the client's mask is 000000000000, the run's is {PROOF.space[:12]}; use the run's mask",
    ),
    "configuration": (
        replace(HELLO, proof=replace(PROOF, configuration="11" * 32)),
        "the client's configuration or tokenizer is 111111111111, the run's is cdcdcdcdcdcd",
    ),
    "unproved": (
        replace(HELLO, proof=replace(PROOF, configuration="")),
        "the client's configuration or tokenizer is not known, the run's is cdcdcdcdcdcd",
    ),
    "probe": (
        replace(HELLO, proof=replace(PROOF, probe=(3.0, -3.0))),
        "the client's model computes other logits than the run's from the same parameters; install",
    ),
    "another probe": (
        replace(HELLO, proof=replace(PROOF, probe=(3.0,))),
        "the client's model computes other logits than the run's from the same parameters; install",
    ),
    "noise": (
        replace(HELLO, proof=replace(PROOF, noise="00" * 32)),
        "the client's noise generator is 000000000000, the run's is "
        f"{PROOF.noise[:12]}; install the same release",
    ),
    "number": (
        replace(HELLO, client=CLIENTS),
        "client 4 is not one of federation.clients = 4, who are numbered from 0; change its part",
    ),
    "examples": (replace(HELLO, examples=0), "client 2 has no examples; put some into its data"),
    "taken": (
        replace(HELLO, client=1),
        "client 1 is here already; give each node a partition-id of its own",
    ),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_client_that_does_not_fit_is_refused_with_the_reason(
    make_run: MakeRun, tmp_path: Path, name: str
) -> None:
    hello, cause = STRANGERS[name]
    hosted = make_run()
    expected = run_directly(hosted.recipe, tmp_path / "direct", lambda number: (0, 1, 3))
    wrong = hosted.clients[2]
    wrong.hello = lambda: encode(hello)  # type: ignore[method-assign]
    hosted.run()
    assert content(hosted.out) == expected
    assert hosted.line(f"client {hello.client} (peer 12) is refused: ", cause)
    (refused,) = (frame for frame in wrong.received if isinstance(frame, Refused))
    assert refused.reason.startswith(cause)
    assert not wrong.plans()
    assert wrong.count(Goodbye) == 0


@pytest.mark.parametrize(("version", "age"), [(1, "an older"), (9, "a newer")])
def test_a_hello_of_another_version_is_refused(make_run: MakeRun, version: int, age: str) -> None:
    hosted = make_run()
    wrong = hosted.clients[2]
    right = wrong.hello
    wrong.hello = lambda: bytes([65, version]) + right()[2:]  # type: ignore[method-assign]
    hosted.run()
    line = hosted.line(
        f"peer 12: the client speaks version {version} of the protocol, {age} one; this side "
        "speaks 4: install"
    )
    (refused,) = (frame for frame in wrong.received if isinstance(frame, Refused))
    assert refused.reason in line


def test_a_second_hello_of_a_client_starts_it_again(make_run: MakeRun, tmp_path: Path) -> None:
    """Its connection was replaced, and nobody saw the former one end."""
    hosted = make_run()
    expected = run_directly(hosted.recipe, tmp_path / "direct")
    for number in (1, 3):
        act = in_round(number, lambda client, plan: client.transport.join(client))
        hosted.clients[number].act = act
    hosted.run()
    assert content(hosted.out) == expected
    assert Counter(plan.round for plan in hosted.clients[1].plans())[1] == 2


# The mask


def test_the_mask_goes_to_who_asks_without_what_it_may_not_show(
    make_run: MakeRun, tmp_path: Path
) -> None:
    hosted = make_run()

    def opening(transport: ScriptedTransport) -> None:
        for client in hosted.clients:
            transport.peers[10 + client.number] = client
            client.transport, client.peer = transport, 10 + client.number
            if client.number in (1, 3):
                transport.put(client.peer, encode(WantSpace("ab" * 32)))
            transport.put(client.peer, client.hello())

    hosted.opening = opening
    hosted.run()
    assert [peer for peer, frame in hosted.transport.sent if isinstance(frame, SpaceFile)] == [
        11,
        13,
    ]
    content = hosted.clients[1].received[0].content
    path = tmp_path / "sent"
    path.write_bytes(content)
    sent = load_mask(path, MASK.model)
    assert sent.digest == MASK.digest
    assert (sent.gradient, sent.initial, sent.concentration) == (None, None, None)
    for secret in (MASK.gradient, MASK.initial):
        assert secret[:2].tobytes() not in content
    assert MASK.initial is not None, "the server keeps its own"


def test_a_server_needs_the_initial_parameters(tmp_path: Path) -> None:
    save_mask(replace(MASK, initial=None), tmp_path / "bare")
    with pytest.raises(MaskError, match=r"lacks the initial parameters.*meerkat calibrate"):
        load_server_mask(tmp_path / "bare")
    save_mask(MASK, tmp_path / "whole")
    assert np.array_equal(load_server_mask(tmp_path / "whole").initial, MASK.initial)


# Evaluation


def some_held_out() -> list[ScriptedClient]:
    return [ScriptedClient(k, held_out) for k, held_out in enumerate((3, 0, 4, 0))]


def evaluate_as(
    clients: list[ScriptedClient], sums: Callable[[ScriptedClient], dict[str, tuple[float, ...]]]
) -> None:
    """Have clients answer evaluation requests with these sums, once their state is up to date."""

    def act(client: ScriptedClient, frame: DownFrame) -> bool:
        if not isinstance(frame, EvaluateRequest) or frame.position != client.position:
            return False
        client.send(Evaluation(frame.round, client.held_out, sums(client)))
        return True

    for client in clients:
        client.act = act


def test_sums_over_those_who_have_held_out_examples(make_run: MakeRun) -> None:
    hosted = make_run(recipe_of(evaluation={"every": 2}), *some_held_out())
    counts = {0: ((1, 1), (0, 1)), 2: ((0, 2), (1, 1))}
    evaluate_as(hosted.clients, lambda c: sums_of(counts[c.number], 1.5 + c.number))
    summary = hosted.run()
    found = evaluations(hosted.out)
    assert [e.round for e in found] == [0, 2, 4, 5]
    # Together ((1, 3), (1, 2)): F1 is 2/6 and 4/8.
    expected = {"loss": 5.0 / 7, "accuracy": 3 / 7, "macro_f1": (2 / 6 + 4 / 8) / 2}
    assert all((e.examples, e.metrics) == (7, expected) for e in found)
    assert summary["after"] == expected
    assert summary["evaluated_examples"] == 7
    assert [client.count(EvaluateRequest) for client in hosted.clients] == [4, 0, 4, 0]
    assert hosted.clock.now == 0.0


@pytest.mark.parametrize("classes", [3, 129, 300])
def test_any_number_of_classes(make_run: MakeRun, classes: int) -> None:
    """The metrics are those of all held-out examples in one place."""
    names = ("balanced_accuracy", "accuracy", "macro_f1")
    task = {"verbalizers": [f"word {n}" for n in range(classes)]}
    recipe = recipe_of(task=task, evaluation={"metrics": list(names)})
    clients = [ScriptedClient(k, held_out=500 * k) for k in range(CLIENTS)]
    draw = np.random.default_rng(classes)
    parts = []
    for client in clients:
        labels = draw.integers(0, classes, client.held_out)
        hit = draw.random(client.held_out) < 0.6
        predicted = np.where(hit, labels, draw.integers(0, classes, client.held_out))
        losses = draw.exponential(size=client.held_out).astype(np.float32).astype(np.float64)
        parts.append(Predictions(losses, labels, predicted, classes))
    hosted = make_run(recipe, *clients)
    evaluate_as(
        clients,
        lambda c: {
            name: tuple(METRICS[name].sums(parts[c.number]).tolist()) for name in ("loss", *names)
        },
    )
    summary = hosted.run()
    fields = ([getattr(part, f) for part in parts] for f in ("losses", "labels", "predicted"))
    everything = Predictions(*map(np.concatenate, fields), classes)
    sums = {name: METRICS[name].sums(everything) for name in ("loss", *names)}
    assert summary["evaluated_examples"] == 3000
    assert summary["after"] == pytest.approx(metric_values(sums, 3000), rel=1e-12)
    for name in names:
        assert summary["after"][name] == metric_values(sums, 3000)[name]
    assert not [line for line in hosted.lines if "refused" in line]


HONEST = sums_of(((2, 0), (1, 1)), 4.0)
"""Of client 2, which has four held-out examples."""


def lie(**sums: tuple[float, ...]) -> Callable[[int], Evaluation]:
    return lambda number: Evaluation(number, 4, HONEST | sums)


LIES: dict[str, tuple[Callable[[int], Any], str]] = {
    "failed": (lambda number: Failed("no memory"), "failed: no memory"),
    "report": (
        lambda number: Report(ClientReport(0, 2, 5, 1, 1, bytes(8), (0.5,))),
        "report instead of the evaluation",
    ),
    "round": (lambda number: Evaluation(number + 1, 4, HONEST), "evaluation instead of the eval"),
    "examples": (
        lambda number: Evaluation(number, 5, sums_of(((2, 1), (1, 1)), 4.0)),
        "it came with 4 examples, and answers for 5",
    ),
    "more classes": (
        lambda number: Evaluation(number, 4, sums_of(((1, 0, 0), (1, 1, 0), (1, 0, 0)), 4.0)),
        "its macro_f1 of 4 examples is not possible",
    ),
    "one class": (
        lambda number: Evaluation(number, 4, sums_of(((4,),), 4.0)),
        "its macro_f1 of 4 examples is not possible",
    ),
    "free text": (
        lambda number: Evaluation(number, 4, {"loss": (4.0,)}),
        "its metrics are not the run's: loss, accuracy, macro_f1",
    ),
    "another metric": (
        lambda number: Evaluation(
            number, 4, {"loss": (4.0,), "accuracy": (3.0,), "balanced_accuracy": HONEST["macro_f1"]}
        ),
        "its metrics are not the run's",
    ),
    "one metric more": (lie(balanced_accuracy=HONEST["macro_f1"]), "its metrics are not the run's"),
    "unknown metric": (lie(surprise=(1.0,)), "its metrics are not the run's"),
    "another order": (
        lambda number: Evaluation(number, 4, dict(reversed(HONEST.items()))),
        "its metrics are not the run's",
    ),
    **{
        f"{metric} {name}": (lie(**{metric: sums}), f"its {metric} of 4 examples is not possible")
        for metric, name, sums in (
            ("accuracy", "of more hits than examples", (5.0,)),
            ("accuracy", "negative", (-1.0,)),
            ("accuracy", "fractional", (2.5,)),
            ("accuracy", "empty", ()),
            ("accuracy", "twice", (1.0, 1.0)),
            # Hits, examples and predictions of each class.
            ("macro_f1", "of more hits than examples", (2.0, 2.0, 3.0, 1.0, 2.0, 2.0)),
            ("macro_f1", "of more hits than predictions", (3.0, 0.0, 3.0, 1.0, 2.0, 2.0)),
            ("macro_f1", "of other examples", (2.0, 1.0, 2.0, 3.0, 3.0, 1.0)),
            ("macro_f1", "of other predictions", (2.0, 1.0, 2.0, 2.0, 3.0, 0.0)),
            ("macro_f1", "negative", (-1.0, 1.0, 2.0, 2.0, 3.0, 1.0)),
            ("macro_f1", "negative counts", (2.0, -1.0, 5.0, -1.0, 5.0, -1.0)),
            ("macro_f1", "fractional", (1.5, 1.0, 2.0, 2.0, 3.0, 1.0)),
            ("macro_f1", "of a part", (2.0, 1.0, 2.0, 2.0, 3.0)),
            ("macro_f1", "empty", ()),
            ("loss", "negative", (-1.0,)),
            ("loss", "large", (1.7e308,)),
            ("loss", "twice", (1.0, 1.0)),
            ("loss", "empty", ()),
        )
    },
}


@pytest.mark.parametrize("first", [True, False], ids=["answers first", "answers last"])
@pytest.mark.parametrize("name", LIES)
def test_an_evaluation_goes_without_who_lies(
    make_run: MakeRun, tmp_path: Path, name: str, first: bool
) -> None:
    answer, cause = LIES[name]
    hosted = make_run(recipe_of(), *some_held_out())
    expected = run_directly(hosted.recipe, tmp_path / "direct")
    hosted.clients[0].delay = 0.5 if first else 0.0
    hosted.clients[2].delay = 0.0 if first else 0.5

    def act(client: ScriptedClient, frame: DownFrame) -> bool:
        if isinstance(frame, EvaluateRequest):
            client.send(answer(frame.round))
            return True
        return False

    hosted.clients[2].act = act
    summary = hosted.run()
    assert content(hosted.out) == expected
    assert summary["evaluated_examples"] == 3
    assert {e.examples for e in evaluations(hosted.out)} == {3}
    assert hosted.line("evaluation after 0 rounds: client 2", cause)
    assert hosted.line("evaluation after 5 rounds: client 2", cause)


def test_an_evaluation_does_not_wait_for_ever(make_run: MakeRun) -> None:
    """Nor does it end a run; who did not answer it is asked again when it did."""
    hosted = make_run(recipe_of(), *(ScriptedClient(k, held_out=2) for k in range(CLIENTS)))

    def act(client: ScriptedClient, frame: DownFrame) -> bool:
        client.delay = (
            DEADLINE + 0.5 if isinstance(frame, EvaluateRequest) and frame.round == 0 else 0.0
        )
        return False

    hosted.clients[1].act = act
    hosted.clients[3].act = lambda client, frame: bool(
        isinstance(frame, EvaluateRequest)
        and frame.round == 0
        and not client.transport.leave(client)
    )
    hosted.clients[0].delay = 1.0
    summary = hosted.run()
    assert hosted.line("evaluation after 0 rounds: closed without client 1, no answer")
    assert hosted.line("evaluation after 0 rounds: closed without client 3, it left")
    assert hosted.line("client 1: the answer to evaluation after 0 rounds came too late; not used")
    first, last = evaluations(hosted.out)
    assert (first.examples, last.examples) == (4, 6)
    assert summary["rounds"] == ROUNDS


def test_a_run_without_any_held_out_example(make_run: MakeRun) -> None:
    hosted = make_run()
    hosted.observer = ReportWriter()
    summary = hosted.run()
    text = (hosted.out / "summary.json").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in summary.json")

    assert json.loads(text, parse_constant=refuse) == summary
    assert summary["before"] == summary["after"] == {}
    assert summary["evaluated_examples"] is None
    page = (hosted.out / "report.html").read_text()
    assert "NaN" not in page
    assert ">nan" not in page.lower()
    assert hosted.run() == summary


def test_no_loss_is_too_large_for_a_summary(make_run: MakeRun) -> None:
    """The largest that is not refused is 1e30 an example."""
    hosted = make_run(recipe_of(), *some_held_out())
    hosted.observer = ReportWriter()
    evaluate_as(hosted.clients, lambda c: sums_of(((c.held_out, 0), (0, 0)), 1e30 * c.held_out))
    summary = hosted.run()
    assert summary["after"]["loss"] == pytest.approx(1e30)
    text = (hosted.out / "summary.json").read_text()
    assert "Infinity" not in text
    assert "NaN" not in text
    assert (hosted.out / "report.html").exists()


# Early stopping


@pytest.mark.parametrize("wrong", ["failed", "large", "nan", "silent", "gone"])
def test_a_newcomer_whose_calibration_fails_ends_nothing(
    make_run: MakeRun, tmp_path: Path, wrong: str
) -> None:
    """It comes before round 2; nobody else is asked for a calibration with it."""
    recipe = recipe_of(selection={"kind": "gradip", **SOME})
    hosted = make_run(recipe)
    *early, newcomer = hosted.clients

    def act(client: ScriptedClient, plan: RoundPlan) -> None:
        match wrong:
            case "failed":
                client.send(Failed("no memory"))
            case "large":
                answer_changed(client, plan, lambda r: replace(r, scalars=(1e9,) * r.steps))
            case "nan":
                answer_changed(client, plan, lambda r: packed(r, math.nan))
            case "gone":
                client.transport.leave(client)

    newcomer.act = in_round(CALIBRATION, act)

    def join(client: ScriptedClient, plan: RoundPlan) -> None:
        client.transport.join(newcomer)
        client.respond(Plan(plan))

    early[0].act = in_round(1, join)
    hosted.opening = lambda transport: [transport.join(client) for client in early]
    summary = hosted.run()
    assert summary["rounds"] == ROUNDS
    assert [line for line in hosted.lines if line.startswith("calibration: ")]
    calibrated = [row[0] for row in content(hosted.out)["calibrations"]]
    # Who is still there is asked again before the next round.
    assert calibrated == ([0, 1, 2, 3] if wrong in ("failed", "large") else [0, 1, 2])


@pytest.mark.parametrize("apply", [False, True], ids=["own", "round 0"])
def test_a_newcomer_is_calibrated_and_judged(
    make_run: MakeRun, tmp_path: Path, apply: bool
) -> None:
    recipe = recipe_of(selection={"kind": "gradip", "apply": apply, **SOME})
    expected = run_directly(
        recipe, tmp_path / "direct", lambda number: range(3 if number < 2 else 4)
    )
    hosted = make_run(recipe)
    *early, newcomer = hosted.clients

    def join(client: ScriptedClient, plan: RoundPlan) -> None:
        client.transport.join(newcomer)
        client.respond(Plan(plan))

    early[0].act = in_round(1, join)
    hosted.opening = lambda transport: [transport.join(client) for client in early]
    hosted.observer = SelectionWriter()
    hosted.run()
    assert content(hosted.out) == expected
    assert len(expected["decisions"]) == 2
    chosen = json.loads((hosted.out / "selection.json").read_text())
    assert [client["client"] for client in chosen["clients"]] == [0, 1, 2, 3]
    assert not any("labels" in client for client in chosen["clients"])


def test_a_client_that_leaves_between_calibrations_is_not_waited_for(
    make_run: MakeRun, tmp_path: Path
) -> None:
    """Two at a time: it is gone before its turn."""
    recipe = recipe_of(selection={"kind": "gradip", **SOME}, federation={"clients_per_round": 2})
    hosted = make_run(recipe)

    def leave(client: ScriptedClient, plan: RoundPlan) -> None:
        client.transport.leave(hosted.clients[3])
        client.respond(Plan(plan))

    hosted.clients[0].act = in_round(CALIBRATION, leave)
    summary = hosted.run()
    assert summary["rounds"] == ROUNDS
    assert [row[0] for row in content(hosted.out)["calibrations"]] == [0, 1, 2]
    assert hosted.line("calibration: closed without client 3, it left: its line broke")
    assert hosted.clock.now <= REJOIN


# The directory


def test_the_directory_of_another_run_is_refused(make_run: MakeRun) -> None:
    hosted = make_run()
    hosted.run()
    before = content(hosted.out)
    hosted.recipe = recipe_of(optimizer={"learning_rate": 0.1})
    line = hosted.fails()
    assert "holds another run" in line
    assert hosted.recipe.fingerprint[:12] in line
    assert content(hosted.out) == before


def test_the_network_may_change_between_two_starts(make_run: MakeRun, tmp_path: Path) -> None:
    hosted = make_run()
    expected = run_directly(hosted.recipe, tmp_path / "direct")
    hosted.cut_in = 3 * CLIENTS
    assert hosted.fails() == "the transport was stopped"
    hosted.cut_in = math.inf
    hosted.recipe = recipe_of(network={"deadline": 1.0, "quorum": 1})
    hosted.run()
    assert [row[2] for row in content(hosted.out)["rounds"]] == [
        row[2] for row in expected["rounds"]
    ]


def test_a_mask_that_does_not_serve_leaves_no_directory(make_run: MakeRun) -> None:
    hosted = make_run(recipe_of(selection={"kind": "gradip", "signal": "gradip"}))
    hosted.mask = replace(MASK, gradient=None)
    with pytest.raises(MeerkatError, match="needs the pre-training gradient"):
        hosted.run()
    assert not hosted.out.exists()
    assert not hasattr(hosted, "transport"), "no client is invited to a run that cannot begin"


def test_a_server_loads_no_torch() -> None:
    code = (
        "import sys\n"
        "import meerkat.runs.remote_run, meerkat.flower.serving, meerkat.flower.server_app\n"
        "loaded = {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {sorted(loaded)}' if loaded else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
