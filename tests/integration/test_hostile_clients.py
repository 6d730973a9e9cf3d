"""What a client that is let in may do to the others and to the server: as little as possible.

Lines 1 to 5 of the threat model's second table (docs/security.md); scripted clients, no waiting.
"""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import algorithm_of
from scripted import (
    CLIENTS,
    DEADLINE,
    MASK,
    PATIENCE,
    REJOIN,
    ROUNDS,
    Clock,
    ScriptedClient,
    ScriptedRun,
    ScriptedTransport,
    answer_changed,
    content,
    in_round,
    recipe_of,
    run_directly,
)

from meerkat.config import Recipe
from meerkat.engines.base import Assignment
from meerkat.engines.requests import EvaluationRequest, RoundRequest
from meerkat.federation.messages import ClientReport, RoundPlan
from meerkat.journal import Journal, replay
from meerkat.tasks.metrics import METRICS
from meerkat.transport.client_frames import Failed, Hello, Need, WantSpace
from meerkat.transport.frame import DownFrame, encode
from meerkat.transport.server_frames import EvaluateRequest, Plan, Refused, SpaceFile, Welcome
from meerkat.zo.directions import DirectionKey
from meerkat.zo.log import Log, LogEntry, Update

MakeRun = Callable[..., ScriptedRun]


@pytest.fixture
def make_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRun:
    clock = Clock()
    clock.install(monkeypatch)

    def make(recipe: Recipe | None = None, name: str = "hosted", **sections: Any) -> ScriptedRun:
        return ScriptedRun(recipe or recipe_of(**sections), tmp_path / name, clock)

    return make


def without_client_2(recipe: Recipe, folder: Path, number: int) -> dict[str, Any]:
    """What the journal holds where client 2 does not answer in this round, and is gone then."""
    return run_directly(
        recipe,
        folder / "direct",
        lambda asked: range(4) if asked <= number else (0, 1, 3),
        lambda asked: (2,) if asked == number else (),
    )


# 1. False scalars


def lie(client: ScriptedClient, change: Callable[[ClientReport], ClientReport]) -> None:
    """Have a client change each of its reports."""

    def act(client: ScriptedClient, frame: DownFrame) -> bool:
        if isinstance(frame, Plan) and frame.plan.log_start <= client.position:
            answer_changed(client, frame.plan, change)
            return True
        return False

    client.act = act


def moved(directory: Path) -> float:
    """How far a run moved its weights."""
    assert MASK.initial is not None
    with closing(Journal.open(directory / "journal.sqlite")) as journal:
        return float(np.linalg.norm(replay(journal).theta - MASK.initial))


DEFENCES: dict[str, dict[str, Any]] = {
    "clipped": {},
    "median": {"aggregator": "median", "clip_factor": 0.0},
    "trimmed": {"aggregator": {"kind": "trimmed-mean", "share": 0.25}, "clip_factor": 0.0},
}


@pytest.mark.parametrize("defence", DEFENCES)
def test_one_client_of_four_cannot_throw_the_model(make_run: MakeRun, defence: str) -> None:
    """Unbounded, its reports move the weights hundreds of times further than all others do."""
    distances = {}
    for name, federation in {
        "honest": {},
        "open": {"clip_factor": 0.0},
        "bounded": DEFENCES[defence],
    }.items():
        hosted = make_run(name=name, federation=federation)
        if name != "honest":
            lie(hosted.clients[3], lambda r: replace(r, scalars=tuple(1e4 * g for g in r.scalars)))
        hosted.run()
        distances[name] = moved(hosted.out)
    assert distances["open"] > 300 * distances["honest"]
    assert distances["bounded"] < 10 * distances["honest"]


def test_a_count_is_pinned_at_the_first_hello(make_run: MakeRun, tmp_path: Path) -> None:
    hosted = make_run(federation={"weighting": "examples"})
    expected = without_client_2(hosted.recipe, tmp_path, 2)

    def act(client: ScriptedClient, plan: RoundPlan) -> None:
        client.examples = 10**9
        client.transport.away(client, 1.0)

    hosted.clients[2].act = in_round(2, act)
    hosted.run()
    assert content(hosted.out) == expected
    assert hosted.line("client 2 (peer 12) is refused", "came with 12 examples", "1000000000")


# 2. Hellos without end


def test_a_flood_of_hellos_ends_with_the_peer_barred(make_run: MakeRun, tmp_path: Path) -> None:
    hosted = make_run()
    expected = without_client_2(hosted.recipe, tmp_path, 1)

    def flood(client: ScriptedClient, plan: RoundPlan) -> None:
        client.act = lambda client, frame: True
        for position in range(2000):
            client.claims = position
            client.transport.peers[client.peer] = client
            client.transport.put(client.peer, client.hello())

    hosted.clients[2].act = in_round(1, flood)
    hosted.run()
    assert content(hosted.out) == expected
    assert hosted.transport.barred == {12}
    strikes = [line for line in hosted.lines if ": more than 32 hellos" in line and ";" in line]
    assert [line.rpartition("; ")[2] for line in strikes] == [
        "disconnected",
        "disconnected",
        "barred from this run",
    ]
    assert len(hosted.transport.frames(Welcome, 12)) <= 3 * 32 + 1
    assert len(hosted.transport.frames(Plan, 12)) <= 3 * 32 + 2


def test_the_mask_is_not_sent_without_end(make_run: MakeRun) -> None:
    """Each request is of two bytes, and each answer may be of megabytes."""
    hosted = make_run()

    def opening(transport: ScriptedTransport) -> None:
        for _ in range(500):
            transport.peers[99] = hosted.clients[0]
            transport.put(99, encode(WantSpace("ab" * 32)))
        for client in hosted.clients:
            transport.join(client)

    hosted.opening = opening
    hosted.run()
    assert len(hosted.transport.frames(SpaceFile, 99)) == 3 * 32
    assert hosted.transport.barred == {99}


def test_a_client_that_comes_back_every_few_seconds_is_not_barred(make_run: MakeRun) -> None:
    """A line that breaks often is no offence."""
    hosted = make_run(network={"deadline": 2000.0})
    restless = hosted.clients[2]
    restless.act = lambda client, frame: isinstance(frame, Plan) and frame.plan.round == 0

    def come_again(times: int) -> None:
        if times and restless.transport.peers.get(restless.peer) is restless:
            restless.transport.away(restless, 0.0)
            restless.transport.later(5.0, lambda: come_again(times - 1))
        elif not times:
            restless.act = lambda client, frame: False
            restless.transport.away(restless, 0.0)

    def opening(transport: ScriptedTransport) -> None:
        for client in hosted.clients:
            transport.join(client)
        transport.later(5.0, lambda: come_again(200))

    hosted.opening = opening
    hosted.run()
    assert hosted.transport.barred == set()
    assert [plan.round for plan in restless.plans()][-ROUNDS + 1 :] == list(range(1, ROUNDS))


@pytest.mark.parametrize("kind", ["round", "evaluation"])
def test_positions_that_clients_claim_take_no_memory(kind: str) -> None:
    n = 20_000
    algorithm, log = algorithm_of(n), Log()
    for step in range(300):
        key = DirectionKey(step, 0, 0, 0)
        log.append([Update(0.1, (LogEntry(key, 1.0),))])
    state = algorithm.init(np.zeros(n, np.float32))
    plan = RoundPlan(300, 1, 0.1, 0, 0)
    request: Any = (
        RoundRequest(Assignment({0: plan}, state.digest, algorithm, log, state), 1e6)
        if kind == "round"
        else EvaluationRequest(300, state, log, {"loss": METRICS["loss"]}, 2)
    )
    request.frames(0, None)
    tracemalloc.start()
    try:
        for position in [*range(301), *(2**40 + k for k in range(300))]:
            request.frames(0, position)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 20 * state.nbytes, "one snapshot, and sixteen parts of the log"


# 3. Events without end


class Flooded(ScriptedTransport):
    """A transport on which there is always an event: a stranger's, ten milliseconds later."""

    flooding = False
    noise = encode(Failed("again"))

    def receive(self, timeout: float) -> Any:
        if self.flooding and not self._events and not self._due_now():
            self.clock.now += 0.01
            self._number = getattr(self, "_number", 0) + 1
            self.put(1000 + self._number, self.noise)  # a new peer each time: none is barred
        return super().receive(timeout)

    def _due_now(self) -> bool:
        return bool(self._due) and self._due[0][0] <= self.clock.now


@pytest.mark.parametrize("where", ["round", "evaluation", "first"])
def test_a_deadline_holds_whatever_else_arrives(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The clock is looked at after each event, and what is left is drained for a bounded time."""
    monkeypatch.setattr("scripted.ScriptedTransport", Flooded)
    hosted = make_run(network={"deadline": 2.0, "quorum": 2})
    silent = hosted.clients[2]
    silent.held_out = 5

    def act(client: ScriptedClient, frame: DownFrame) -> bool:
        hosted.transport.flooding = True  # type: ignore[attr-defined]
        return {
            "round": isinstance(frame, Plan) and frame.plan.round == 0,
            "evaluation": isinstance(frame, EvaluateRequest),
        }[where]

    if where == "first":
        Flooded.flooding = True
        hosted.opening = lambda transport: [transport.join(c) for c in hosted.clients[:3]]
    else:
        silent.act = act
    try:
        hosted.run()
    finally:
        Flooded.flooding = False
    closings = [line for line in hosted.lines if "closed without client 2" in line]
    assert all(float(line.split()[-2]) < 3.5 for line in closings)
    assert len(closings) == {"round": 1, "evaluation": 1, "first": 0}[where]
    # The other rounds close at once; `drain` may take 64 events and two for each client.
    assert hosted.clock.now < {"round": 9, "evaluation": 12, "first": 9}[where]


# 4. Another client's number


def test_a_node_is_one_client(make_run: MakeRun, tmp_path: Path) -> None:
    """It says hello as another client: an offence, and the other is as it was."""
    hosted = make_run()
    expected = without_client_2(hosted.recipe, tmp_path, 1)

    def act(client: ScriptedClient, plan: RoundPlan) -> None:
        client.number = 3
        for pause in (1.0, 2.0, 3.0):
            client.transport.later(pause, lambda: client.transport.join(client, 12))

    hosted.clients[2].act = in_round(1, act)
    hosted.run()
    assert content(hosted.out) == expected
    offence = "it is client 2 in this run, not 3; "
    offences = [line.partition(offence)[2] for line in hosted.lines if offence in line]
    assert offences == ["disconnected", "disconnected", "barred from this run"]
    assert hosted.transport.barred == {12}


@pytest.mark.parametrize("rebind", [False, True])
def test_a_client_is_one_node(make_run: MakeRun, tmp_path: Path, rebind: bool) -> None:
    """Its own node has left; another that comes in its name is let in only where that is set."""
    hosted = make_run(network={"rebind": rebind})
    expected = run_directly(
        hosted.recipe,
        tmp_path / "direct",
        lambda number: range(4) if rebind or number < 3 else (0, 1, 3),
        lambda number: (2,) if number == 2 and not rebind else (),
    )
    another = ScriptedClient(2)

    def act(client: ScriptedClient, plan: RoundPlan) -> None:
        client.transport.leave(client)
        client.transport.join(another, 50)

    hosted.clients[2].act = in_round(2, act)
    hosted.run()
    assert content(hosted.out) == expected
    if rebind:
        assert [plan.round for plan in another.plans()] == [2, 3, 4]
        assert hosted.line("client 2 is here (peer 50), 12 examples")
    else:
        (refused,) = (frame for frame in another.received if isinstance(frame, Refused))
        assert "client 2 is bound to another node" in refused.reason
        assert "network.rebind = true" in refused.reason
        assert not another.plans()


# 5. Failing on purpose


def fail(client: ScriptedClient, times: float) -> None:
    """Have a client fail in its first plans."""
    left = [times]

    def act(client: ScriptedClient, frame: DownFrame) -> bool:
        if isinstance(frame, Plan) and left[0] > 0:
            left[0] -= 1
            client.send(Failed("no memory"))
            return True
        return False

    client.act = act


def test_clients_that_fail_are_asked_again(make_run: MakeRun, tmp_path: Path) -> None:
    """Two of two: before, the first such answer ended the run."""
    hosted = make_run(federation={"clients": 2})
    expected = run_directly(hosted.recipe, tmp_path / "direct")
    for client in hosted.clients:
        fail(client, 3)
    summary = hosted.run()
    assert content(hosted.out) == expected
    assert summary["rounds"] == ROUNDS
    assert hosted.clock.now == pytest.approx(1 + 2 + 4)


def test_who_fails_for_ever_is_waited_for_with_patience(make_run: MakeRun) -> None:
    """The run stops, but it is not lost."""
    hosted = make_run(federation={"clients": 2}, network={"quorum": 2})
    expected_rounds = 0
    fail(hosted.clients[1], math.inf)
    assert "client 1: it failed: no memory" in hosted.fails()
    assert hosted.clock.now >= PATIENCE
    asked = hosted.clients[1].count(Plan)
    assert PATIENCE / 60 < asked < PATIENCE / 60 + 10, "it is not asked without a pause"
    with closing(Journal.open(hosted.out / "journal.sqlite")) as journal:
        assert journal.rounds == expected_rounds
    for client in hosted.clients:
        client.act = lambda client, frame: False
        client.forget()
    assert hosted.run()["rounds"] == ROUNDS


def test_a_quorum_goes_on_without_who_fails(make_run: MakeRun, tmp_path: Path) -> None:
    hosted = make_run()
    expected = run_directly(hosted.recipe, tmp_path / "direct", silent=lambda number: (2,))
    fail(hosted.clients[2], math.inf)
    hosted.run()
    assert content(hosted.out) == expected
    assert hosted.clock.now == 0.0


EVIL: dict[str, Callable[[ScriptedClient], Any]] = {
    "need": lambda client: client.send(Need(0)),
    "hello": lambda client: client.transport.join(client),
    "garbage": lambda client: client.send(b"\xff" * 9),
    "failed": lambda client: client.send(Failed("x" * 1000)),
    "leaves": lambda client: client.transport.away(client, 0.5),
    "silent": lambda client: None,
    "other": lambda client: client.send(encode(Hello(0, 10, 0, 0, client.proof))),
    "space": lambda client: client.send(WantSpace("ab" * 32)),
}


@pytest.mark.parametrize("name", EVIL)
def test_nothing_that_a_client_sends_ends_a_run(
    make_run: MakeRun, tmp_path: Path, name: str
) -> None:
    """One of four does this with every frame that it gets; the others' run is as if alone."""
    hosted = make_run()
    bad = hosted.clients[2]
    bad.act = lambda client, frame: isinstance(frame, Plan) and (EVIL[name](client), True)[1]
    summary = hosted.run()
    assert summary["rounds"] == ROUNDS
    with closing(Journal.open(hosted.out / "journal.sqlite")) as journal:
        for record, _ in journal.records():
            assert [report.client for report in record.reports] == [0, 1, 3]
    assert hosted.clock.now <= ROUNDS * (DEADLINE + REJOIN)
    assert CLIENTS == 4
