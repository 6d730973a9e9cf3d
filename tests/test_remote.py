"""The server's loop over clients that are elsewhere: scripted clients, no model, no waiting.

Time passes only where the server waits, so a deadline of minutes costs nothing. What a hosted run
leaves is compared with what the same clients give when they are asked directly.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import sqlite3
import struct
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable, Collection
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meerkat import hosting, noise
from meerkat.descent import Theta, descend, digest, follow
from meerkat.directory import carry_out
from meerkat.engines import Assignment, Engine, Outcome
from meerkat.errors import MaskError, MeerkatError, RunError
from meerkat.journal import Journal
from meerkat.links import Event
from meerkat.mask.file import Mask, load_mask, save_mask
from meerkat.noise import Directions
from meerkat.progress import Progress
from meerkat.protocol import (
    CALIBRATION,
    DIGEST_BYTES,
    ENTRY_BYTES,
    ClientReport,
    DownFrame,
    Entries,
    Evaluate,
    Evaluation,
    Failed,
    Goodbye,
    Hello,
    MaskFile,
    Need,
    Notice,
    Plan,
    Proof,
    Refused,
    Report,
    RoundPlan,
    Setup,
    Snapshot,
    WantMask,
    Welcome,
    decode_down,
    encode,
)
from meerkat.recipe import Recipe, parse_recipe
from meerkat.records import Evaluated, directions_of, header_of
from meerkat.server.state import Log, ServerState
from meerkat.training import Evaluate as Evaluating

CLIENTS, ROUNDS, STEPS = 4, 5, 2
DEADLINE, REJOIN, PATIENCE = 100.0, 10.0, 1000.0
LABELS = ("bad", "good")
WINDOWS = {"calibration_steps": 6, "first_window": 2, "later_window": 2}
SOME = {"rho_later": 1.0, "rho_quiet": 0.0, "sigma": 1e9}


# What the tests are made of


def make_mask() -> Mask:
    draw = np.random.default_rng(5)
    indices = (np.arange(0, 20, 2), np.arange(8))
    p, theta = (draw.normal(size=18).astype(np.float32) for _ in range(2))
    shapes = ((4, 5), (8,))
    return Mask(("a", "b"), shapes, indices, 28, "ab" * 32, "sensitivity", p, {"0.1": 0.5}, theta)


MASK = make_mask()
PROOF = Proof(MASK.model, MASK.digest, noise.fingerprint())


def recipe_with(**sections: dict[str, Any]) -> Recipe:
    data: dict[str, Any] = {
        "seed": 7,
        "model": {"name": "elsewhere"},
        "task": {
            "name": "custom",
            "source": "elsewhere.csv",
            "prompt": "{text} It was",
            "verbalizers": {"neg": "bad", "pos": "good"},
        },
        "federation": {"clients": CLIENTS, "rounds": ROUNDS, "local_steps": STEPS},
        "optimizer": {"learning_rate": 0.01},
        "selection": {"kind": "none"},
        "network": {"deadline": DEADLINE, "rejoin": REJOIN, "patience": PATIENCE},
    }
    for section, fields in sections.items():
        data.setdefault(section, {}).update(fields)
    if data["selection"]["kind"] == "gradip":
        data["selection"] = {**WINDOWS, **data["selection"]}
    return parse_recipe(data)


def walk(client: int, plan: RoundPlan, start: Theta, directions: Directions) -> ClientReport:
    """Local steps whose scalars depend on θ, z, the client and its data pointer."""
    theta, scalars = start.copy(), list[float]()
    owner, count = directions.owner(client), directions.perturbations
    for step in range(plan.steps):
        drawn = [directions.z(plan.round, step, q, owner) for q in range(count)]
        batch = (client + 1) * math.cos(plan.first_step + step)
        found = [float(np.float32(theta[:5] @ z[:5] + batch * z[0])) for z in drawn]
        for scalar, z in zip(found, drawn, strict=True):
            descend(theta, plan.learning_rate, scalar / count, z)
        scalars += found
    proof = bytes.fromhex(digest(start))[:DIGEST_BYTES]
    return ClientReport(plan.round, client, 10 + client, plan.steps, count, proof, tuple(scalars))


class Scripted:
    """A client without a model. What it does with a frame, `act` may change."""

    def __init__(self, number: int, held_out: int = 0, delay: float = 0.0):
        self.number, self.held_out, self.delay = number, held_out, delay
        self.act: Callable[[Scripted, DownFrame], bool] = lambda client, frame: False
        """True: that was all, nothing more is done."""
        self.theta, self.position = MASK.initial.copy(), 0
        self.told: int | None = None
        """The position that it says it has; by default the true one."""
        self.proof = PROOF
        self.heard: list[DownFrame] = []
        self.examples = 10 + number
        self.hall: Hall
        self.seat = -1

    def hello(self) -> bytes:
        position = self.position if self.told is None else self.told
        return encode(Hello(self.number, self.examples, self.held_out, position, self.proof))

    def hear(self, frame: DownFrame) -> None:
        self.heard.append(frame)
        if not self.act(self, frame):
            self.obey(frame)

    def obey(self, frame: DownFrame) -> None:
        match frame:
            case Snapshot(position, theta):
                self.theta, self.position = np.frombuffer(theta, "<f4").copy(), position
            case Entries(position, entries):
                self._follow(position, entries)
            case Plan(plan):
                answer = self.answer(plan)
                self.say(answer)
            case Evaluate(number, position):
                needs = position != self.position
                self.say(Need(self.position) if needs else self.measure(number))
            case Refused() | Goodbye() | Welcome() | MaskFile() | Notice():
                pass
            case _:
                raise AssertionError(frame)

    def answer(self, plan: RoundPlan) -> Report | Need:
        if plan.log_start > self.position:
            return Need(self.position)
        self._follow(plan.log_start, plan.entries)
        start = MASK.initial if plan.round == CALIBRATION else self.theta
        return Report(walk(self.number, plan, start, self.directions))

    def measure(self, number: int) -> Evaluation:
        """Counts that depend on θ."""
        right = int(abs(self.theta).sum() * 1000) % (self.held_out + 1)
        rows = ((right, 0), (self.held_out - right, 0))
        return Evaluation(number, self.held_out, float(np.float32(right / 3)), rows)

    def say(self, frame: Any) -> None:
        data = frame if isinstance(frame, bytes) else encode(frame)
        self.hall.later(self.delay, lambda: self.hall.arrived(self, data))

    def forget(self) -> None:
        """A new process."""
        self.theta, self.position = MASK.initial.copy(), 0

    def plans(self) -> list[RoundPlan]:
        return [frame.plan for frame in self.heard if isinstance(frame, Plan)]

    def count(self, kind: type) -> int:
        return sum(isinstance(frame, kind) for frame in self.heard)

    @property
    def directions(self) -> Directions:
        recipe = parse_recipe(json.loads(self.hall.setup.recipe))
        return directions_of(recipe, MASK)

    def _follow(self, position: int, entries: tuple[Any, ...]) -> None:
        assert position <= self.position
        fresh = entries[self.position - position :]
        follow(self.theta, fresh, self.directions)
        self.position += len(fresh)


class Hall:
    """A transport whose seats are scripted clients; client K sits at seat 10 + K."""

    def __init__(self, setup: Setup, clock: Clock):
        self.setup, self.clock = setup, clock
        self.seats: dict[int, Scripted] = {}
        self.sent: list[tuple[int, DownFrame]] = []
        self.barred: set[int] = set()
        self.closed = ""
        self.cut_in = math.inf
        """Events after which the transport fails."""
        self._events: deque[Event] = deque()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    # What tests do

    def join(self, client: Scripted, seat: int | None = None) -> None:
        seat = 10 + client.number if seat is None else seat
        if seat not in self.barred:
            client.hall, client.seat = self, seat
            self.seats[seat] = client
            self.put(seat, client.hello())

    def leave(self, client: Scripted, cause: str = "its line broke") -> None:
        assert self.seats.pop(client.seat) is client
        self._events.append(Event(client.seat, None, cause))

    def away(self, client: Scripted, seconds: float, cause: str = "its line broke") -> None:
        """It leaves and comes back."""
        self.leave(client, cause)
        self.later(seconds, lambda: self.join(client))

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        if seconds <= 0:
            action()
        elif seconds < math.inf:
            heapq.heappush(self._due, (self.clock.now + seconds, next(self._order), action))

    def arrived(self, client: Scripted, data: bytes) -> None:
        if self.seats.get(client.seat) is client:
            self.put(client.seat, data)

    def put(self, seat: int, data: bytes) -> None:
        self._events.append(Event(seat, data))

    def frames(self, kind: type, seat: int | None = None) -> list[Any]:
        return [f for s, f in self.sent if isinstance(f, kind) and seat in (None, s)]

    # What the server does

    def send(self, seat: int, frame: bytes) -> None:
        decoded = decode_down(frame)
        self.sent.append((seat, decoded))
        if seat in self.seats:
            self.seats[seat].hear(decoded)

    def receive(self, timeout: float) -> Event | None:
        end = self.clock.now + timeout
        while not self._events:
            if not self._due or self._due[0][0] > end:
                self.clock.now = end
                return None
            self.clock.now, _, action = heapq.heappop(self._due)
            action()
        self.cut_in -= 1
        if self.cut_in < 0:
            raise RunError("the transport was stopped")
        return self._events.popleft()

    def drop(self, seat: int, reason: str, bar: bool = False) -> None:
        if bar:
            self.barred.add(seat)
        if self.seats.pop(seat, None) is not None:
            self._events.append(Event(seat, None, reason))

    def close(self, reason: str) -> None:
        self.closed = reason


class Clock:
    """The server's time; a loop that never waits is found out."""

    def __init__(self) -> None:
        self.now, self._asked = 0.0, 0

    def monotonic(self) -> float:
        self._asked += 1
        assert self._asked < 50_000, "the server turns in a circle"
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("meerkat.engines.remote.time", clock)
    return clock


@pytest.fixture(autouse=True)
def no_report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "reports" not in request.fixturenames:
        monkeypatch.setattr("meerkat.directory.write_report", lambda directory, journal: None)


@pytest.fixture
def reports() -> None:
    """Reports are written."""


class Stage:
    """A hosted run; once `run` returned or raised, what happened in it."""

    def __init__(self, recipe: Recipe, out: Path, clock: Clock, clients: Collection[Scripted] = ()):
        self.recipe, self.out, self.clock = recipe, out, clock
        self.clients = list(clients) or [Scripted(k) for k in range(recipe.federation.clients)]
        self.opening: Callable[[Hall], None] = lambda hall: [hall.join(c) for c in self.clients]
        self.hall: Hall
        self.lines: list[str] = []
        self.cut_in = math.inf

    def run(self) -> dict[str, Any]:
        return hosting.host(self.recipe, self.out, MASK, self._connect, Progress(), self._say)

    def fails(self) -> str:
        with pytest.raises(RunError) as caught:
            self.run()
        return str(caught.value)

    def _connect(self, setup: Setup) -> Hall:
        self.hall = Hall(setup, self.clock)
        self.hall.cut_in = self.cut_in
        self.opening(self.hall)
        return self.hall

    def _say(self, line: str) -> None:
        assert "\n" not in line
        self.lines.append(line)

    def told(self, *parts: str) -> str:
        """The only line that has these parts."""
        found = [line for line in self.lines if all(part in line for part in parts)]
        assert len(found) == 1, (parts, self.lines)
        return found[0]


@pytest.fixture
def stage(tmp_path: Path, clock: Clock) -> Callable[..., Stage]:
    def make(recipe: Recipe | None = None, *clients: Scripted, **sections: Any) -> Stage:
        return Stage(recipe or recipe_with(**sections), tmp_path / "hosted", clock, clients)

    return make


class Direct:
    """The same clients without a wire, as far as they are there and answer."""

    def __init__(self, directions: Directions, present: Any, silent: Any):
        self._directions, self._present, self._silent = directions, present, silent
        self._round = 0

    def present(self) -> Collection[int]:
        return self._present(self._round)

    def run(self, assignment: Assignment) -> Outcome:
        number = next(iter(assignment.plans.values())).round
        start = MASK.initial if number == CALIBRATION else assignment.theta
        silent = self._silent("calibration" if number == CALIBRATION else number)
        reports = [
            walk(client, plan, start, self._directions)
            for client, plan in assignment.plans.items()
            if client not in silent
        ]
        if number != CALIBRATION:
            self._round = number + 1
        return Outcome(tuple(reports), 0, 0, float("nan"))


def direct(
    recipe: Recipe,
    out: Path,
    present: Callable[[int], Collection[int]] | None = None,
    silent: Callable[[Any], Collection[int]] = lambda round: (),
) -> dict[str, Any]:
    """What the journal must hold: who was there, and who did not answer, by round."""
    everyone = range(recipe.federation.clients)

    def crew(state: ServerState, log: Log) -> tuple[Engine, Evaluating]:
        engine = Direct(directions_of(recipe, MASK), present or (lambda _: everyone), silent)
        return engine, lambda round, theta: Evaluated(round, None, None, 0.5, 1, 0.0)

    header = header_of(recipe, MASK, LABELS, [], "")
    out.mkdir()
    carry_out(out, recipe, header, MASK, crew, Progress())
    return content(out)


def content(directory: Path) -> dict[str, Any]:
    """All that a journal holds but evaluations and how long things took."""
    tables = {
        "rounds": "round, entries, digest, chain",
        "reports": "round, client, payload",
        "calibrations": "client, payload, seal",
        "decisions": "made, content, seal",
    }
    with closing(sqlite3.connect(directory / "journal.sqlite")) as connection:
        return {
            table: connection.execute(f"SELECT {columns} FROM {table} ORDER BY 1, 2").fetchall()
            for table, columns in tables.items()
        }


def evaluations(directory: Path) -> list[Evaluated]:
    with closing(Journal.open(directory / "journal.sqlite")) as journal:
        return journal.evaluations()


def in_round(number: int, action: Callable[[Scripted, RoundPlan], Any]) -> Any:
    """Do this at the first plan of a round, and nothing else."""
    done: list[int] = []

    def act(client: Scripted, frame: DownFrame) -> bool:
        if isinstance(frame, Plan) and frame.plan.round == number and not done:
            done.append(number)
            action(client, frame.plan)
            return True
        return False

    return act


def answering(client: Scripted, plan: RoundPlan, change: Callable[[ClientReport], Any]) -> None:
    """Answer a plan with something else."""
    answer = client.answer(plan)
    assert isinstance(answer, Report)
    changed = change(answer.report)
    client.say(Report(changed) if isinstance(changed, ClientReport) else changed)


# The same bits as without a wire

RUNS: dict[str, dict[str, Any]] = {
    "T=1": {"federation": {"local_steps": 1}},
    "T=5": {"federation": {"local_steps": 5}},
    "sampled": {"federation": {"clients_per_round": 2, "rounds": 9}},
    "by examples": {"federation": {"weighting": "examples"}},
    "perturbations": {"noise": {"perturbations": 3}},
    "per client": {"noise": {"directions": "per-client"}},
    "rademacher": {"noise": {"kind": "rademacher"}},
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
    stage: Callable[..., Stage], tmp_path: Path, name: str
) -> None:
    recipe = recipe_with(**RUNS[name])
    expected = direct(recipe, tmp_path / "direct")
    hosted = stage(recipe)
    summary = hosted.run()
    assert content(hosted.out) == expected
    assert summary["theta_digest"] == expected["rounds"][-1][2]
    # Every client followed the log; what it was not sent again is what it had.
    assert hosted.hall.closed == "the run is complete"
    assert all(client.count(Goodbye) == 1 for client in hosted.clients)
    assert not hosted.hall.frames(MaskFile)
    assert [line for line in hosted.lines if "is here" in line] == hosted.lines
    if "clients_per_round" not in RUNS[name].get("federation", {}):
        # Who was asked in every round lacks the entries of one.
        sizes = [len(row[1]) for row in expected["rounds"][:-1]]
        large = sum(size > len(MASK.initial.tobytes()) for size in sizes)
        assert len(hosted.hall.frames(Snapshot)) == CLIENTS * large


@pytest.mark.parametrize("anew", [False, True], ids=["clients stay", "clients start anew"])
@pytest.mark.parametrize("every", [1, 5, 14])
@pytest.mark.parametrize("name", ["T=5", "sampled", "gradip", "gradip apply", "every"])
def test_interruptions_leave_no_trace(
    stage: Callable[..., Stage], tmp_path: Path, name: str, every: int, anew: bool
) -> None:
    """The transport fails after so many events beyond the hellos, again and again."""
    recipe = recipe_with(**RUNS[name])
    expected = direct(recipe, tmp_path / "direct")
    hosted, failures = stage(recipe), 0
    hosted.cut_in = CLIENTS + every
    while True:
        with suppress(RunError):
            hosted.run()
            break
        assert hosted.hall.closed == "the server stopped before the end"
        failures += 1
        # A whole round, or four calibrations, is the least that a start must get through.
        hosted.cut_in = CLIENTS + max(every, CLIENTS)
        if anew:
            for client in hosted.clients:
                client.forget()
    assert content(hosted.out) == expected
    assert failures >= 1
    assert hosted.run()["theta_digest"] == expected["rounds"][-1][2]


def test_any_order_of_arrival_gives_the_same_bits(
    stage: Callable[..., Stage], tmp_path: Path
) -> None:
    recipe = recipe_with(noise={"directions": "per-client"})
    expected = direct(recipe, tmp_path / "direct")
    hosted = stage(recipe, *(Scripted(k, delay=CLIENTS - k) for k in (2, 0, 3, 1)))
    hosted.run()
    assert content(hosted.out) == expected


def test_answers_and_bytes_are_counted(stage: Callable[..., Stage]) -> None:
    class Counting(Progress):
        done = 0

        def advance(self, steps: int = 1) -> None:
            Counting.done += 1

    hosted = stage()
    hosting.host(hosted.recipe, hosted.out, MASK, hosted._connect, Counting(), hosted.lines.append)
    assert Counting.done == CLIENTS * ROUNDS
    with closing(Journal.open(hosted.out / "journal.sqlite")) as journal:
        metrics = [found for _, found in journal.records()]
    assert {found.bytes_up for found in metrics} == {CLIENTS * (1 + 24 + 4 * STEPS)}
    assert metrics[0].bytes_down == CLIENTS * (1 + 24)
    assert {f.bytes_down for f in metrics[1:]} == {CLIENTS * (1 + 24 + ENTRY_BYTES * STEPS)}


# Who comes late, leaves and comes back


def few(**fields: Any) -> dict[str, Any]:
    return {"network": {"quorum": 1}, **fields}


@pytest.mark.parametrize("late", range(1, ROUNDS))
def test_a_late_client_gets_what_is_smaller(
    stage: Callable[..., Stage], tmp_path: Path, late: int
) -> None:
    """Entries while they are no larger than θ: three of them are."""
    recipe = recipe_with(**few(federation={"local_steps": 1}))
    expected = direct(recipe, tmp_path / "direct", lambda number: range(3 if number < late else 4))
    hosted = stage(recipe)
    *early, newcomer = hosted.clients

    def join(client: Scripted, frame: DownFrame) -> bool:
        if isinstance(frame, Plan) and frame.plan.round == late - 1:
            client.hall.join(newcomer)
        return False

    early[0].act = join
    hosted.opening = lambda hall: [hall.join(client) for client in early]
    hosted.run()
    assert content(hosted.out) == expected
    first = newcomer.plans()[0]
    assert first.round == late
    assert newcomer.count(Snapshot) == (late > 3)
    assert (first.log_start, len(first.entries)) == ((late, 0) if late > 3 else (0, late))
    for snapshot in hosted.hall.frames(Snapshot):
        assert snapshot.position == late
    assert newcomer.position == ROUNDS - 1
    assert np.array_equal(newcomer.theta, early[0].theta)


@pytest.mark.parametrize("told", [None, 0, 2, 999], ids=str)
def test_a_client_that_comes_back_in_its_round_is_asked_again(
    stage: Callable[..., Stage], tmp_path: Path, told: int | None
) -> None:
    recipe = recipe_with(**few())
    expected = direct(recipe, tmp_path / "direct")
    hosted = stage(recipe)

    def act(client: Scripted, plan: RoundPlan) -> None:
        client.told = told
        if told is not None:
            client.forget()
        client.hall.away(client, REJOIN / 2)

    hosted.clients[2].act = in_round(2, act)
    hosted.run()
    assert content(hosted.out) == expected
    assert hosted.told("client 2 left: its line broke")
    assert [plan.round for plan in hosted.clients[2].plans()].count(2) == (3 if told == 2 else 2)
    assert hosted.clock.now == REJOIN / 2


@pytest.mark.parametrize("told", ["true", 0, 999], ids=str)
def test_a_client_that_comes_back_later_catches_up(
    stage: Callable[..., Stage], tmp_path: Path, told: Any
) -> None:
    """It left in round 1 and is there again before round 4."""
    recipe = recipe_with(**few(federation={"local_steps": 1}))
    away = {1, 2, 3}
    expected = direct(
        recipe,
        tmp_path / "direct",
        lambda number: (0, 1, 3) if number in away - {1} else range(4),
        lambda number: (2,) if number == 1 else (),
    )
    hosted = stage(recipe)
    leaver = hosted.clients[2]

    def leave(client: Scripted, plan: RoundPlan) -> None:
        client.answer(plan)
        client.hall.leave(client)

    leaver.act = in_round(1, leave)

    def back(client: Scripted, plan: RoundPlan) -> None:
        if told == 0:
            leaver.forget()
        leaver.told = told if told != "true" else None
        client.hall.join(leaver)
        client.obey(Plan(plan))

    hosted.clients[0].act = in_round(3, back)
    hosted.run()
    assert content(hosted.out) == expected
    assert hosted.clock.now == REJOIN, "nobody waits for a client that is away in later rounds"
    assert hosted.told("round 1: closed without client 2, it left: its line broke after 10.0 s")
    assert leaver.count(Snapshot) == (told != "true")
    back_at = next(plan for plan in leaver.plans() if plan.round == 4)
    assert len(back_at.entries) == (3 if told == "true" else 0)
    assert np.array_equal(leaver.theta, hosted.clients[0].theta)


def test_a_process_that_is_new_each_time_is_helped_each_time(
    stage: Callable[..., Stage], tmp_path: Path
) -> None:
    recipe = recipe_with(federation={"local_steps": 1}, evaluation={"every": 1})
    expected = direct(recipe, tmp_path / "direct")
    clients = [Scripted(k, held_out=5) for k in range(CLIENTS)]
    kept = [Scripted(k, held_out=5) for k in range(CLIENTS)]

    def act(client: Scripted, frame: DownFrame) -> bool:
        if isinstance(frame, Plan | Evaluate) and not isinstance(client.heard[-2], Snapshot):
            client.forget()
        return False

    clients[1].act = act
    hosted = stage(recipe, *clients)
    hosted.run()
    assert content(hosted.out) == expected
    assert all("is here" in line for line in hosted.lines)
    found = evaluations(hosted.out)
    other = Stage(recipe, tmp_path / "kept", hosted.clock, kept)
    other.run()
    assert [(e.accuracy, e.loss) for e in found] == [
        (e.accuracy, e.loss) for e in evaluations(other.out)
    ]
    assert {e.examples for e in found} == {20}


def test_a_client_that_needs_for_ever_is_barred(
    stage: Callable[..., Stage], tmp_path: Path
) -> None:
    recipe = recipe_with()
    expected = direct(
        recipe,
        tmp_path / "direct",
        lambda number: (0, 1, 3) if number > 1 else range(4),
        lambda number: (2,) if number == 1 else (),
    )
    hosted = stage(recipe)
    client = hosted.clients[2]

    def act(client: Scripted, frame: DownFrame) -> bool:
        if isinstance(frame, Plan) and frame.plan.round >= 1:
            client.say(Need(0))
            return True
        return bool(isinstance(frame, Refused))

    client.act = act
    drop = Hall.drop

    def returning(hall: Hall, seat: int, reason: str, bar: bool = False) -> None:
        drop(hall, seat, reason, bar)
        hall.later(1.0, lambda: hall.join(client))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hall, "drop", returning)
        hosted.run()
    assert content(hosted.out) == expected
    assert hosted.told("client 2: it needs more than a snapshot; barred from this run")
    assert hosted.hall.barred == {12}
    # In round 1: a plan, again with entries, with a snapshot, and one for each return.
    assert [plan.round for plan in client.plans()] == [0, 1, 1, 1, 1, 1]
    assert client.count(Snapshot) == 1
    assert client.count(Refused) == 1


# Quorum, deadline, patience


def test_a_round_closes_at_its_deadline_and_a_late_answer_is_not_used(
    stage: Callable[..., Stage], tmp_path: Path
) -> None:
    """It misses round 1, answers while round 2 is under way, and takes part in round 3."""
    recipe = recipe_with()
    expected = direct(
        recipe,
        tmp_path / "direct",
        lambda number: (0, 1, 3) if number == 2 else range(4),
        lambda number: (2,) if number == 1 else (),
    )
    hosted = stage(recipe, *(Scripted(k, delay=1.0) for k in range(CLIENTS)))
    slow = hosted.clients[2]

    def act(client: Scripted, frame: DownFrame) -> bool:
        late = isinstance(frame, Plan) and frame.plan.round == 1
        client.delay = DEADLINE + 0.5 if late else 1.0
        return False

    slow.act = act
    hosted.run()
    assert content(hosted.out) == expected
    assert hosted.told("round 1: closed without client 2, no answer after 100.0 s")
    assert hosted.told("client 2: the answer to round 1 came too late; not used")
    assert hosted.clock.now == DEADLINE + 4.0
    assert [plan.round for plan in slow.plans()] == [0, 1, 3, 4]
    assert slow.seat not in hosted.hall.barred


def test_what_came_while_the_server_was_busy_is_in_time(
    stage: Callable[..., Stage], tmp_path: Path, clock: Clock
) -> None:
    """It sends for longer than the deadline, as after a suspension; all answers wait by then."""
    hosted = stage()
    expected = direct(hosted.recipe, tmp_path / "direct")
    send = Hall.send

    def slow(hall: Hall, seat: int, frame: bytes) -> None:
        clock.now += DEADLINE
        send(hall, seat, frame)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hall, "send", slow)
        hosted.run()
    assert content(hosted.out) == expected
    assert not [line for line in hosted.lines if "closed without" in line]


def test_a_client_that_hangs_is_waited_for_once(
    stage: Callable[..., Stage], tmp_path: Path
) -> None:
    recipe = recipe_with()
    expected = direct(
        recipe,
        tmp_path / "direct",
        lambda number: (0, 1, 3) if number > 1 else range(4),
        lambda number: (2,) if number == 1 else (),
    )
    hosted = stage(recipe)
    hosted.clients[2].act = in_round(1, lambda client, plan: None)
    hosted.run()
    assert content(hosted.out) == expected
    assert hosted.clock.now == DEADLINE
    assert hosted.clients[2].count(Goodbye) == 1


def test_the_missing_hold_a_round_up_until_a_quorum_is_there(
    stage: Callable[..., Stage], tmp_path: Path
) -> None:
    """Beyond the deadline, within the patience."""
    recipe = recipe_with(network={"quorum": 3})
    hosted = stage(recipe)
    for client in hosted.clients[1:]:
        client.act = in_round(1, lambda client, plan: client.hall.away(client, DEADLINE + 50))
    # Who comes back last is not needed any more, but there when the round closes.
    expected = direct(recipe, tmp_path / "direct")
    hosted.run()
    assert content(hosted.out) == expected
    assert hosted.clock.now == DEADLINE + 50


def test_a_round_without_a_quorum_ends_the_run_and_it_goes_on(
    stage: Callable[..., Stage], tmp_path: Path
) -> None:
    recipe = recipe_with()  # a quorum of 3
    expected = direct(recipe, tmp_path / "direct")
    hosted = stage(recipe)
    acts = (
        lambda client, plan: client.say(Failed("no memory\nleft")),
        lambda client, plan: None,
        lambda client, plan: client.hall.leave(client),
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
    assert hosted.told("round 2: client 0 failed: no memory left")
    assert content(hosted.out)["rounds"] == expected["rounds"][:2]
    assert content(hosted.out)["reports"] == expected["reports"][: 2 * CLIENTS]
    hosted.run()
    assert content(hosted.out) == expected


def test_too_few_clients_are_waited_for_and_named(
    stage: Callable[..., Stage], tmp_path: Path
) -> None:
    recipe = recipe_with()
    expected = direct(
        recipe, tmp_path / "direct", silent=lambda number: (0,) if number == 1 else ()
    )
    hosted = stage(recipe)
    leave = in_round(1, lambda client, plan: client.hall.leave(client))
    hosted.clients[0].act = leave

    def after(client: Scripted, plan: RoundPlan) -> None:
        client.obey(Plan(plan))
        client.hall.leave(client, "power cut")

    hosted.clients[3].act = in_round(1, after)
    line = hosted.fails()
    assert line.startswith("2 of the 3 clients that network.quorum asks for were there for 1000 s ")
    assert "(client 0 left: its line broke; client 3 left: power cut)" in line
    waiting = [line for line in hosted.lines if line == "waiting for clients: 2 of 3 are here"]
    assert 30 < len(waiting) < 34
    assert content(hosted.out)["rounds"] == expected["rounds"][:2]
    hosted.run()
    assert content(hosted.out) == expected


def test_nobody_comes(stage: Callable[..., Stage]) -> None:
    hosted = stage()
    hosted.opening = lambda hall: None
    assert "0 of the 3 clients" in hosted.fails()
    assert hosted.clock.now == DEADLINE + PATIENCE
    hosted.opening = lambda hall: [hall.join(client) for client in hosted.clients]
    assert hosted.run()["rounds"] == ROUNDS


def test_the_first_round_waits_for_all_and_then_for_none(
    stage: Callable[..., Stage], tmp_path: Path
) -> None:
    hosted = stage()
    expected = direct(hosted.recipe, tmp_path / "direct", lambda number: range(3))
    hosted.opening = lambda hall: [hall.join(client) for client in hosted.clients[:3]]
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
    "theta": (
        lambda r: replace(r, theta_digest=bytes(DIGEST_BYTES)),
        "it started from another θ than the server's",
    ),
    "evaluation": (
        lambda r: Evaluation(NUMBER, 1, 0.5, ((1, 0), (0, 0))),
        "evaluation instead of a report",
    ),
    "failed": (lambda r: Failed("no memory"), "client 2 failed: no memory"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_report_is_no_report(
    stage: Callable[..., Stage], tmp_path: Path, name: str
) -> None:
    """The line names client and cause; the round is as without it, the client stays."""
    change, cause = REFUSED[name]
    hosted = stage()
    expected = direct(
        hosted.recipe, tmp_path / "direct", silent=lambda number: (2,) if number == 1 else ()
    )
    liar = hosted.clients[2]
    liar.act = in_round(NUMBER, lambda client, plan: answering(client, plan, change))
    hosted.run()
    assert content(hosted.out) == expected
    assert hosted.told("round 1: client 2", cause)
    assert len(hosted.lines) == CLIENTS + 1
    assert hosted.clock.now == 0.0
    # Its θ is not trusted any more, unless it only failed.
    assert liar.count(Snapshot) == (name != "failed")
    assert [plan.round for plan in liar.plans()] == list(range(ROUNDS))


BROKEN: dict[str, tuple[Callable[[ClientReport], Any], str]] = {
    "nan": (lambda r: packed(r, math.nan), "a scalar is not finite"),
    "inf": (lambda r: packed(r, math.inf), "a scalar is not finite"),
    "cut": (lambda r: encode(Report(r))[:-1], "does not hold its 2 steps"),
    "long": (lambda r: encode(Report(r)) + bytes(4), "does not hold its 2 steps"),
    "head": (lambda r: encode(Report(r))[:9], "too short for a report"),
    "version": (lambda r: bytes([66, 9]) + encode(Report(r))[2:], "report of version 9"),
    "kind": (lambda r: bytes([200]), "kind 200 has no place here"),
    "empty": (lambda r: b"", "no kind has no place here"),
    "of the server": (lambda r: encode(Goodbye("")), "kind 9 has no place here"),
    "loss": (
        lambda r: encode(Evaluation(1, 1, math.nan, ((1, 0), (0, 0)))),
        "evaluation of 1 examples with a loss of nan",
    ),
}


@pytest.mark.parametrize("returns", [False, True], ids=["gone", "returns"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_frame_that_is_none_breaks_the_connection(
    stage: Callable[..., Stage], tmp_path: Path, name: str, returns: bool
) -> None:
    """Who returns in time is asked again, and answers well."""
    change, cause = BROKEN[name]
    hosted = stage()
    expected = direct(
        hosted.recipe,
        tmp_path / "direct",
        lambda number: range(4) if returns or number < 2 else (0, 1, 3),
        lambda number: (2,) if number == 1 and not returns else (),
    )

    def act(client: Scripted, plan: RoundPlan) -> None:
        answering(client, plan, change)
        if returns:
            client.hall.later(1.0, lambda: client.hall.join(client))

    hosted.clients[2].act = in_round(NUMBER, act)
    hosted.run()
    assert content(hosted.out) == expected
    assert hosted.told("client 2: ", cause, "; disconnected")
    assert hosted.told("client 2 left: ")
    assert hosted.clients[2].count(Refused) == 0
    assert hosted.clock.now == (1.0 if returns else REJOIN)


def test_a_report_that_comes_twice_counts_once(stage: Callable[..., Stage], tmp_path: Path) -> None:
    hosted = stage()
    expected = direct(hosted.recipe, tmp_path / "direct")

    def act(client: Scripted, plan: RoundPlan) -> None:
        client.obey(Plan(plan))
        client.obey(Plan(plan))
        client.hall.later(0.5, lambda: client.hall.join(client))

    hosted.clients[2].act = in_round(NUMBER, act)
    hosted.clients[3].delay = 1.0
    hosted.run()
    assert content(hosted.out) == expected
    assert hosted.told("client 2: report that nobody asked for; disconnected")


def test_three_strikes(stage: Callable[..., Stage], tmp_path: Path) -> None:
    hosted = stage()
    expected = direct(
        hosted.recipe,
        tmp_path / "direct",
        lambda number: range(4) if number < 4 else (0, 1, 3),
        lambda number: (2,) if number == 3 else (),
    )
    client = hosted.clients[2]

    def act(client: Scripted, frame: DownFrame) -> bool:
        if not isinstance(frame, Plan) or frame.plan.round == 0:
            return False
        if client.count(Plan) % 2 == 0 or frame.plan.round == 3:
            client.say(b"garbage")
            client.hall.later(1.0, lambda: client.hall.join(client))
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
    assert hosted.hall.barred == {client.seat}
    assert client.count(Refused) == 1


def test_frames_before_hello(stage: Callable[..., Stage], tmp_path: Path) -> None:
    hosted = stage()
    expected = direct(hosted.recipe, tmp_path / "direct")
    report = encode(Report(ClientReport(0, 1, 5, STEPS, 1, bytes(8), (0.5,) * STEPS)))

    def opening(hall: Hall) -> None:
        stranger = Scripted(1)
        for frame in (report, encode(Need(0)), bytes([1, 2])):
            hall.seats[99] = stranger
            hall.put(99, frame)
        hall.put(98, encode(Failed("no such\x1b[2J model")))
        hall._events.append(Event(98, None, "it ended"))
        for client in hosted.clients:
            hall.join(client)

    hosted.opening = opening
    hosted.run()
    assert content(hosted.out) == expected
    assert hosted.told("seat 99: report before hello; disconnected")
    assert hosted.told("seat 99: need before hello; disconnected")
    assert hosted.told("seat 99: ", "kind 1 has no place here; barred from this run")
    assert hosted.hall.barred == {99}
    assert len(hosted.hall.frames(Refused, 99)) == 3
    assert hosted.told("seat 98 does not take part: no such [2J model")
    assert hosted.told("seat 98 left before it was a client: it ended")


# The handshake

HELLO = Hello(2, 12, 0, 0, PROOF)
STRANGERS: dict[str, tuple[Hello, str]] = {
    "model": (
        replace(HELLO, proof=replace(PROOF, model="00" * 32)),
        "the client's base model is 000000000000, the run's is abababababab; load the model",
    ),
    "mask": (
        replace(HELLO, proof=replace(PROOF, mask="00" * 32)),
        f"the client's mask is 000000000000, the run's is {PROOF.mask[:12]}; use the run's mask",
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
def test_who_does_not_fit_is_told_why(
    stage: Callable[..., Stage], tmp_path: Path, name: str
) -> None:
    hello, cause = STRANGERS[name]
    hosted = stage()
    expected = direct(hosted.recipe, tmp_path / "direct", lambda number: (0, 1, 3))
    wrong = hosted.clients[2]
    wrong.hello = lambda: encode(hello)  # type: ignore[method-assign]
    hosted.run()
    assert content(hosted.out) == expected
    assert hosted.told(f"client {hello.client} (seat 12) is refused: ", cause)
    (refused,) = (frame for frame in wrong.heard if isinstance(frame, Refused))
    assert refused.reason.startswith(cause)
    assert not wrong.plans()
    assert wrong.count(Goodbye) == 0


def test_another_version_is_told(stage: Callable[..., Stage]) -> None:
    hosted = stage()
    wrong = hosted.clients[2]
    right = wrong.hello
    wrong.hello = lambda: bytes([65, 9]) + right()[2:]  # type: ignore[method-assign]
    hosted.run()
    line = hosted.told("seat 12: the client speaks version 9 of the protocol, this side 1; install")
    (refused,) = (frame for frame in wrong.heard if isinstance(frame, Refused))
    assert refused.reason in line


def test_a_number_is_free_again_when_its_client_left(
    stage: Callable[..., Stage], tmp_path: Path
) -> None:
    """Another node takes it, in the same round."""
    hosted = stage()
    expected = direct(hosted.recipe, tmp_path / "direct")
    another = Scripted(2)

    def act(client: Scripted, plan: RoundPlan) -> None:
        client.hall.leave(client)
        client.hall.join(another, 50)

    hosted.clients[2].act = in_round(2, act)
    hosted.run()
    assert content(hosted.out) == expected
    assert [plan.round for plan in another.plans()] == [2, 3, 4]
    assert hosted.told("client 2 is here (seat 50), 12 examples")


def test_a_seat_is_one_client_at_a_time(stage: Callable[..., Stage], tmp_path: Path) -> None:
    """A new connection replaces the former of its seat, and may be another client."""
    hosted = stage(**few())
    expected = direct(
        hosted.recipe,
        tmp_path / "direct",
        lambda number: (0, 1, 2) if number < 2 else (0, 1, 3) if number < 4 else (0, 1),
        lambda number: (2,) if number == 1 else (),
    )
    early, another = hosted.clients[:3], hosted.clients[3]
    hosted.opening = lambda hall: [hall.join(client) for client in early]
    early[2].act = in_round(1, lambda client, plan: client.hall.join(another, client.seat))

    def leave(client: Scripted, plan: RoundPlan) -> None:
        client.obey(Plan(plan))
        client.hall.leave(client)

    another.act = in_round(ROUNDS - 2, leave)
    hosted.run()
    assert content(hosted.out) == expected
    assert hosted.told("client 2 left: ", "client 3")
    assert hosted.told("client 3 left: its line broke")
    assert hosted.clock.now == DEADLINE + REJOIN


def test_a_second_hello_of_a_client_starts_it_again(
    stage: Callable[..., Stage], tmp_path: Path
) -> None:
    """Its connection was replaced, and nobody saw the former one end."""
    hosted = stage()
    expected = direct(hosted.recipe, tmp_path / "direct")
    for number in (1, 3):
        act = in_round(number, lambda client, plan: client.hall.join(client))
        hosted.clients[number].act = act
    hosted.run()
    assert content(hosted.out) == expected
    assert Counter(plan.round for plan in hosted.clients[1].plans())[1] == 2


# The mask


def test_the_mask_goes_to_who_asks_and_tells_nothing_else(
    stage: Callable[..., Stage], tmp_path: Path
) -> None:
    hosted = stage()

    def opening(hall: Hall) -> None:
        for client in hosted.clients:
            hall.seats[10 + client.number] = client
            client.hall, client.seat = hall, 10 + client.number
            if client.number in (1, 3):
                hall.put(client.seat, encode(WantMask()))
            hall.put(client.seat, client.hello())

    hosted.opening = opening
    hosted.run()
    assert [seat for seat, frame in hosted.hall.sent if isinstance(frame, MaskFile)] == [11, 13]
    content = hosted.clients[1].heard[0].content
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
        hosting.host_mask(tmp_path / "bare")
    save_mask(MASK, tmp_path / "whole")
    assert np.array_equal(hosting.host_mask(tmp_path / "whole").initial, MASK.initial)


# Evaluation


def evaluating(**fields: Any) -> list[Scripted]:
    return [Scripted(k, held_out) for k, held_out in enumerate((3, 0, 4, 0))]


def test_sums_over_those_who_have_held_out_examples(stage: Callable[..., Stage]) -> None:
    hosted = stage(recipe_with(evaluation={"every": 2}), *evaluating())
    counts = {0: ((1, 1), (0, 1)), 2: ((0, 2), (1, 1))}

    def act(client: Scripted, frame: DownFrame) -> bool:
        if isinstance(frame, Evaluate):
            rows = counts[client.number]
            client.obey(frame) if frame.position != client.position else client.say(
                Evaluation(frame.round, client.held_out, 1.5 + client.number, rows)
            )
            return True
        return False

    for client in hosted.clients:
        client.act = act
    summary = hosted.run()
    found = evaluations(hosted.out)
    assert [e.round for e in found] == [0, 2, 4, 5]
    # Together ((1, 3), (1, 2)): F1 is 2/6 and 4/8.
    assert {(e.examples, e.accuracy, e.loss) for e in found} == {(7, 3 / 7, 5.0 / 7)}
    assert {e.macro_f1 for e in found} == {(2 / 6 + 4 / 8) / 2}
    assert summary["evaluated_examples"] == 7
    assert [client.count(Evaluate) for client in hosted.clients] == [4, 0, 4, 0]
    assert hosted.clock.now == 0.0


@pytest.mark.parametrize("first", [True, False], ids=["answers first", "answers last"])
@pytest.mark.parametrize(
    "lie",
    [
        lambda number: Evaluation(number, 4, 1.0, ((1, 0, 0), (1, 1, 0), (1, 0, 0))),
        lambda number: Evaluation(number, 4, 1.0, ()),
        lambda number: Evaluation(number + 1, 4, 1.0, ((2, 2), (0, 0))),
        lambda number: Failed("no memory"),
        lambda number: Report(ClientReport(0, 2, 5, 1, 1, bytes(8), (0.5,))),
    ],
    ids=["classes", "free text", "round", "failed", "report"],
)
def test_an_evaluation_goes_without_who_lies(
    stage: Callable[..., Stage], tmp_path: Path, lie: Any, first: bool
) -> None:
    hosted = stage(recipe_with(), *evaluating())
    expected = direct(hosted.recipe, tmp_path / "direct")
    hosted.clients[0].delay = 0.5 if first else 0.0
    hosted.clients[2].delay = 0.0 if first else 0.5

    def act(client: Scripted, frame: DownFrame) -> bool:
        if isinstance(frame, Evaluate):
            client.say(lie(frame.round))
            return True
        return False

    hosted.clients[2].act = act
    summary = hosted.run()
    assert content(hosted.out) == expected
    assert summary["evaluated_examples"] == 3
    assert {e.examples for e in evaluations(hosted.out)} == {3}
    assert hosted.told("evaluation after 0 rounds: client 2")
    assert hosted.told("evaluation after 5 rounds: client 2")


def test_an_evaluation_does_not_wait_for_ever(stage: Callable[..., Stage]) -> None:
    """Nor does it end a run; who did not answer it is asked again when it did."""
    hosted = stage(recipe_with(), *(Scripted(k, held_out=2) for k in range(CLIENTS)))

    def act(client: Scripted, frame: DownFrame) -> bool:
        client.delay = DEADLINE + 0.5 if isinstance(frame, Evaluate) and frame.round == 0 else 0.0
        return False

    hosted.clients[1].act = act
    hosted.clients[3].act = lambda client, frame: bool(
        isinstance(frame, Evaluate) and frame.round == 0 and not client.hall.leave(client)
    )
    hosted.clients[0].delay = 1.0
    summary = hosted.run()
    assert hosted.told("evaluation after 0 rounds: closed without client 1, no answer")
    assert hosted.told("evaluation after 0 rounds: closed without client 3, it left")
    assert hosted.told("client 1: the answer to evaluation after 0 rounds came too late; not used")
    first, last = evaluations(hosted.out)
    assert (first.examples, last.examples) == (4, 6)
    assert summary["rounds"] == ROUNDS


def test_a_run_without_any_held_out_example(stage: Callable[..., Stage], reports: None) -> None:
    hosted = stage()
    summary = hosted.run()
    text = (hosted.out / "summary.json").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in summary.json")

    assert json.loads(text, parse_constant=refuse) == summary
    assert summary["accuracy_after"] is summary["loss_after"] is summary["macro_f1_after"] is None
    page = (hosted.out / "report.html").read_text()
    assert "NaN" not in page
    assert ">nan" not in page.lower()
    assert hosted.run() == summary


def test_no_loss_is_too_large_for_a_summary(stage: Callable[..., Stage], reports: None) -> None:
    hosted = stage(recipe_with(), *evaluating())

    def act(client: Scripted, frame: DownFrame) -> bool:
        if isinstance(frame, Evaluate):
            rows = ((client.held_out, 0), (0, 0))
            client.say(Evaluation(frame.round, client.held_out, 1.7e308, rows))
            return True
        return False

    for client in hosted.clients:
        client.act = act
    hosted.run()
    text = (hosted.out / "summary.json").read_text()
    assert "Infinity" not in text
    assert "NaN" not in text


# Early stopping


@pytest.mark.parametrize("wrong", ["failed", "large", "nan", "silent", "gone"])
def test_a_newcomer_whose_calibration_fails_ends_nothing(
    stage: Callable[..., Stage], tmp_path: Path, wrong: str
) -> None:
    """It comes before round 2; nobody else is asked for a calibration with it."""
    recipe = recipe_with(selection={"kind": "gradip", **SOME})
    hosted = stage(recipe)
    *early, newcomer = hosted.clients

    def act(client: Scripted, plan: RoundPlan) -> None:
        match wrong:
            case "failed":
                client.say(Failed("no memory"))
            case "large":
                answering(client, plan, lambda r: replace(r, scalars=(1e9,) * r.steps))
            case "nan":
                answering(client, plan, lambda r: packed(r, math.nan))
            case "gone":
                client.hall.leave(client)

    newcomer.act = in_round(CALIBRATION, act)

    def join(client: Scripted, plan: RoundPlan) -> None:
        client.hall.join(newcomer)
        client.obey(Plan(plan))

    early[0].act = in_round(1, join)
    hosted.opening = lambda hall: [hall.join(client) for client in early]
    summary = hosted.run()
    assert summary["rounds"] == ROUNDS
    assert [line for line in hosted.lines if line.startswith("calibration: ")]
    calibrated = [row[0] for row in content(hosted.out)["calibrations"]]
    # Who is still there is asked again before the next round.
    assert calibrated == ([0, 1, 2, 3] if wrong in ("failed", "large") else [0, 1, 2])


@pytest.mark.parametrize("apply", [False, True], ids=["own", "founding"])
def test_a_newcomer_is_calibrated_and_judged(
    stage: Callable[..., Stage], tmp_path: Path, apply: bool
) -> None:
    recipe = recipe_with(selection={"kind": "gradip", "apply": apply, **SOME})
    expected = direct(recipe, tmp_path / "direct", lambda number: range(3 if number < 2 else 4))
    hosted = stage(recipe)
    *early, newcomer = hosted.clients

    def join(client: Scripted, plan: RoundPlan) -> None:
        client.hall.join(newcomer)
        client.obey(Plan(plan))

    early[0].act = in_round(1, join)
    hosted.opening = lambda hall: [hall.join(client) for client in early]
    hosted.run()
    assert content(hosted.out) == expected
    assert len(expected["decisions"]) == 2
    chosen = json.loads((hosted.out / "selection.json").read_text())
    assert [client["client"] for client in chosen["clients"]] == [0, 1, 2, 3]
    assert not any("labels" in client for client in chosen["clients"])


def test_a_client_that_leaves_between_calibrations_is_not_waited_for(
    stage: Callable[..., Stage], tmp_path: Path
) -> None:
    """Two at a time: it is gone before its turn."""
    recipe = recipe_with(selection={"kind": "gradip", **SOME}, federation={"clients_per_round": 2})
    hosted = stage(recipe)

    def leave(client: Scripted, plan: RoundPlan) -> None:
        client.hall.leave(hosted.clients[3])
        client.obey(Plan(plan))

    hosted.clients[0].act = in_round(CALIBRATION, leave)
    summary = hosted.run()
    assert summary["rounds"] == ROUNDS
    assert [row[0] for row in content(hosted.out)["calibrations"]] == [0, 1, 2]
    assert hosted.told("calibration: closed without client 3, it left: its line broke")
    assert hosted.clock.now <= REJOIN


# The directory


def test_the_directory_of_another_run_is_refused(stage: Callable[..., Stage]) -> None:
    hosted = stage()
    hosted.run()
    before = content(hosted.out)
    hosted.recipe = recipe_with(optimizer={"learning_rate": 0.1})
    line = hosted.fails()
    assert "holds another run" in line
    assert hosted.recipe.fingerprint[:12] in line
    assert content(hosted.out) == before


def test_the_network_may_change_between_two_starts(
    stage: Callable[..., Stage], tmp_path: Path
) -> None:
    hosted = stage()
    expected = direct(hosted.recipe, tmp_path / "direct")
    hosted.cut_in = 3 * CLIENTS
    assert hosted.fails() == "the transport was stopped"
    hosted.cut_in = math.inf
    hosted.recipe = recipe_with(network={"deadline": 1.0, "quorum": 1})
    hosted.run()
    assert [row[2] for row in content(hosted.out)["rounds"]] == [
        row[2] for row in expected["rounds"]
    ]


def test_a_mask_that_does_not_serve_leaves_no_directory(stage: Callable[..., Stage]) -> None:
    hosted = stage(recipe_with(selection={"kind": "gradip", "signal": "gradip"}))
    with pytest.raises(MeerkatError, match="needs the pre-training gradient"):
        hosting.host(
            hosted.recipe,
            hosted.out,
            replace(MASK, gradient=None),
            hosted._connect,
            Progress(),
            hosted.lines.append,
        )
    assert not hosted.out.exists()
    assert hosted.hall.closed == "the server stopped before the end"


def test_a_server_loads_no_torch() -> None:
    code = (
        "import sys\n"
        "import meerkat.hosting, meerkat.flower.serving, meerkat.flower.server_app\n"
        "loaded = {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {sorted(loaded)}' if loaded else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
