"""Scripted clients and a transport to them: no model, no network, no waiting.

Time passes only where the server waits, so a deadline of minutes costs nothing. `run_directly`
gives what a run over the transport must leave in its journal.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import json
import math
import sqlite3
from collections import deque
from collections.abc import Callable, Collection, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import make_recipe, merged

from meerkat.algorithms import make_algorithm
from meerkat.config import Recipe, parse_recipe
from meerkat.engines.base import Assignment, Engine, Outcome
from meerkat.errors import RunError
from meerkat.federation.algorithm import Algorithm
from meerkat.federation.messages import CALIBRATION, DIGEST_BYTES, ClientReport, RoundPlan
from meerkat.federation.state import ServerState
from meerkat.journal import Journal
from meerkat.journal.records import Evaluated, header_of
from meerkat.progress import Progress
from meerkat.runs.driver import Evaluator
from meerkat.runs.events import RunObserver
from meerkat.runs.execution import execute
from meerkat.runs.remote_run import host
from meerkat.spaces.mask_file import Mask
from meerkat.transport.base import Event
from meerkat.transport.client_frames import Evaluation, Hello, Need, Report
from meerkat.transport.frame import DownFrame, encode
from meerkat.transport.handshake import Proof
from meerkat.transport.server_frames import (
    EvaluateRequest,
    Goodbye,
    LogPart,
    Notice,
    Plan,
    Refused,
    Setup,
    Snapshot,
    SpaceFile,
    Welcome,
    decode_down,
)
from meerkat.zo import noise
from meerkat.zo.log import Log, Update
from meerkat.zo.state import ModelState

CLIENTS, ROUNDS, STEPS = 4, 5, 2
DEADLINE, REJOIN, PATIENCE = 100.0, 10.0, 1000.0
WINDOWS = {"calibration_steps": 6, "first_window": 2, "later_window": 2}
RUN: dict[str, Any] = {
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
    "network": {"deadline": DEADLINE, "rejoin": REJOIN, "patience": PATIENCE},
}


def _make_mask() -> Mask:
    draw = np.random.default_rng(5)
    indices = (np.arange(0, 20, 2), np.arange(8))
    p, theta = (draw.normal(size=18).astype(np.float32) for _ in range(2))
    shapes = ((4, 5), (8,))
    return Mask(
        ("a", "b"),
        shapes,
        indices,
        28,
        "ab" * 32,
        "sensitivity",
        p,
        {"0.1": 0.5},
        theta,
        "cd" * 32,
        (3.0, -4.0),
    )


MASK = _make_mask()
"""Of 18 values: three log entries are as large as θ."""
PROOF = Proof(MASK.model, MASK.digest, noise.fingerprint(), MASK.configuration, MASK.probe)


def recipe_of(**sections: Any) -> Recipe:
    """The recipe of a short run with fields of its sections changed."""
    if sections.get("selection", {}).get("kind") == "gradip":
        sections = {**sections, "selection": WINDOWS | sections["selection"]}
    return make_recipe(**merged(RUN, **sections))


@functools.cache
def _algorithm_of(recipe: str) -> Algorithm:
    return make_algorithm(parse_recipe(json.loads(recipe)), MASK.size)


def initial_of(algorithm: Algorithm) -> ModelState:
    """The state before round 0."""
    assert MASK.initial is not None
    return algorithm.init(MASK.initial)


def walk(client: int, plan: RoundPlan, start: ModelState, algorithm: Algorithm) -> ClientReport:
    """Local steps over losses that depend on θ, the client and its place in its batch order."""
    state, scalars = start, list[float]()
    for step in range(plan.steps):
        weight = (client + 1) * math.cos(plan.first_step + step)

        def losses_at(offset: Any, theta: Any = state.theta, weight: float = weight) -> Any:
            moved = (theta if offset is None else theta + offset).astype(np.float64)
            return np.array([moved[:5] @ moved[:5] / 2 + weight * moved[0]])

        update, estimate = algorithm.local_step(
            losses_at, state, plan.round, step, client, plan.learning_rate
        )
        state = algorithm.apply(state, [update])
        scalars += estimate.coefficients
    proof = bytes.fromhex(start.digest)[:DIGEST_BYTES]
    perturbations = algorithm.stream.perturbations
    return ClientReport(
        plan.round, client, 10 + client, plan.steps, perturbations, proof, tuple(scalars)
    )


def sums_of(confusion: Iterable[Iterable[int]], loss: float) -> dict[str, tuple[float, ...]]:
    """Sums of the metrics that a classification has by default, from counts [class][predicted]."""
    counts = np.array([list(row) for row in confusion], np.float64)
    hits = np.diag(counts)
    by_class = np.concatenate([hits, counts.sum(axis=1), counts.sum(axis=0)])
    return {
        "loss": (loss,),
        "accuracy": (float(hits.sum()),),
        "macro_f1": tuple(by_class.tolist()),
    }


class ScriptedClient:
    """A client without a model. `act` may change what it does with a frame."""

    def __init__(self, number: int, held_out: int = 0, delay: float = 0.0):
        self.number, self.held_out, self.delay = number, held_out, delay
        self.act: Callable[[ScriptedClient, DownFrame], bool] = lambda client, frame: False
        """Called with each frame first; if it returns True, nothing more is done with the frame."""
        self.position = 0
        self.claims: int | None = None
        """The position that its hello has; None is the true one."""
        self.proof = PROOF
        self.received: list[DownFrame] = []
        self.examples = 10 + number
        self.transport: ScriptedTransport
        self.peer = -1
        self._state: ModelState | None = None

    @property
    def algorithm(self) -> Algorithm:
        return _algorithm_of(self.transport.setup.recipe)

    @property
    def state(self) -> ModelState:
        """After the updates that it has."""
        return self._state or initial_of(self.algorithm)

    def hello(self) -> bytes:
        position = self.position if self.claims is None else self.claims
        return encode(Hello(self.number, self.examples, self.held_out, position, self.proof))

    def receive(self, frame: DownFrame) -> None:
        self.received.append(frame)
        if not self.act(self, frame):
            self.respond(frame)

    def respond(self, frame: DownFrame) -> None:
        """What a client does with a frame."""
        match frame:
            case Snapshot(position, data):
                self._state = initial_of(self.algorithm).from_bytes(data)
                self.position = position
            case LogPart(position, updates):
                self._catch_up(position, updates)
            case Plan(plan):
                self.send(self.answer(plan))
            case EvaluateRequest(number, position):
                needs = position != self.position
                self.send(Need(self.position) if needs else self.evaluate(number))
            case Refused() | Goodbye() | Welcome() | SpaceFile() | Notice():
                pass
            case _:
                raise AssertionError(frame)

    def answer(self, plan: RoundPlan) -> Report | Need:
        if plan.log_start > self.position:
            return Need(self.position)
        self._catch_up(plan.log_start, plan.updates)
        start = initial_of(self.algorithm) if plan.round == CALIBRATION else self.state
        return Report(walk(self.number, plan, start, self.algorithm))

    def evaluate(self, number: int) -> Evaluation:
        """Sums that depend on θ."""
        right = int(abs(self.state.theta).sum() * 1000) % (self.held_out + 1)
        confusion = ((right, 0), (self.held_out - right, 0))
        return Evaluation(number, self.held_out, sums_of(confusion, right / 3))

    def send(self, frame: Any) -> None:
        data = frame if isinstance(frame, bytes) else encode(frame)
        self.transport.later(self.delay, lambda: self.transport.arrive(self, data))

    def forget(self) -> None:
        """A new process."""
        self._state, self.position = None, 0

    def plans(self) -> list[RoundPlan]:
        return [frame.plan for frame in self.received if isinstance(frame, Plan)]

    def count(self, kind: type) -> int:
        return sum(isinstance(frame, kind) for frame in self.received)

    def _catch_up(self, position: int, updates: tuple[Update, ...]) -> None:
        assert position <= self.position
        fresh = updates[self.position - position :]
        self._state = self.algorithm.apply(self.state, fresh)
        self.position += len(fresh)


class ScriptedTransport:
    """A transport to scripted clients; client K connects at peer 10 + K."""

    def __init__(self, setup: Setup, clock: Clock):
        self.setup, self.clock = setup, clock
        self.peers: dict[int, ScriptedClient] = {}
        self.sent: list[tuple[int, DownFrame]] = []
        self.barred: set[int] = set()
        self.closed = ""
        self.cut_in = math.inf
        """Events after which the transport fails."""
        self._events: deque[Event] = deque()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    # What tests do

    def join(self, client: ScriptedClient, peer: int | None = None) -> None:
        peer = 10 + client.number if peer is None else peer
        if peer not in self.barred:
            client.transport, client.peer = self, peer
            self.peers[peer] = client
            self.put(peer, client.hello())

    def leave(self, client: ScriptedClient, cause: str = "its line broke") -> None:
        assert self.peers.pop(client.peer) is client
        self.put(client.peer, None, cause)

    def away(self, client: ScriptedClient, seconds: float, cause: str = "its line broke") -> None:
        """It disconnects and comes back."""
        self.leave(client, cause)
        self.later(seconds, lambda: self.join(client))

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        if seconds <= 0:
            action()
        elif seconds < math.inf:
            heapq.heappush(self._due, (self.clock.now + seconds, next(self._order), action))

    def arrive(self, client: ScriptedClient, data: bytes) -> None:
        """A frame of a client, unless it has disconnected by now."""
        if self.peers.get(client.peer) is client:
            self.put(client.peer, data)

    def put(self, peer: int, data: bytes | None, cause: str = "") -> None:
        self._events.append(Event(peer, data, cause))

    def frames(self, kind: type, peer: int | None = None) -> list[Any]:
        """Frames that the server sent."""
        return [f for p, f in self.sent if isinstance(f, kind) and peer in (None, p)]

    # What the server does

    def send(self, peer: int, frame: bytes) -> None:
        decoded = decode_down(frame)
        self.sent.append((peer, decoded))
        if peer in self.peers:
            self.peers[peer].receive(decoded)

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

    def drop(self, peer: int, reason: str, bar: bool = False) -> None:
        if bar:
            self.barred.add(peer)
        if self.peers.pop(peer, None) is not None:
            self.put(peer, None, reason)

    def close(self, reason: str) -> None:
        self.closed = reason


class Clock:
    """The server's time; a loop that never waits is found."""

    def __init__(self) -> None:
        self.now, self._asked = 0.0, 0

    def monotonic(self) -> float:
        self._asked += 1
        assert self._asked < 50_000, "the server loops without waiting"
        return self.now

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make it the time of the remote engine."""
        for module in ("members", "remote"):
            monkeypatch.setattr(f"meerkat.engines.{module}.time", self)


class ScriptedRun:
    """A run over scripted clients; once `run` returned or raised, what happened in it."""

    def __init__(
        self, recipe: Recipe, out: Path, clock: Clock, clients: Collection[ScriptedClient] = ()
    ):
        self.recipe, self.out, self.clock = recipe, out, clock
        self.clients = list(clients) or [
            ScriptedClient(k) for k in range(recipe.federation.clients)
        ]
        self.mask = MASK
        self.observer, self.progress = RunObserver(), Progress()
        self.opening: Callable[[ScriptedTransport], Any] = self._join_all
        """Called when the transport is there."""
        self.transport: ScriptedTransport
        self.lines: list[str] = []
        """Of the server's log."""
        self.cut_in = math.inf

    def run(self) -> dict[str, Any]:
        return host(
            self.recipe, self.out, self.mask, self._connect, self.observer, self.progress, self._say
        )

    def fails(self) -> str:
        with pytest.raises(RunError) as caught:
            self.run()
        return str(caught.value)

    def line(self, *parts: str) -> str:
        """The only line of the log that has these parts."""
        found = [line for line in self.lines if all(part in line for part in parts)]
        assert len(found) == 1, (parts, self.lines)
        return found[0]

    def _join_all(self, transport: ScriptedTransport) -> None:
        for client in self.clients:
            transport.join(client)

    def _connect(self, setup: Setup) -> ScriptedTransport:
        self.transport = ScriptedTransport(setup, self.clock)
        self.transport.cut_in = self.cut_in
        self.opening(self.transport)
        return self.transport

    def _say(self, line: str) -> None:
        assert "\n" not in line
        self.lines.append(line)


class _DirectEngine:
    """The same clients without a transport, as far as they are present and answer."""

    def __init__(self, algorithm: Algorithm, present: Any, silent: Any):
        self._algorithm, self._present, self._silent = algorithm, present, silent
        self._round = 0

    def present(self) -> Collection[int]:
        return self._present(self._round)

    def able(self) -> Collection[int]:
        return self.present()

    def run(self, assignment: Assignment) -> Outcome:
        number = next(iter(assignment.plans.values())).round
        start = initial_of(self._algorithm) if number == CALIBRATION else assignment.state
        silent = self._silent("calibration" if number == CALIBRATION else number)
        reports = [
            walk(client, plan, start, self._algorithm)
            for client, plan in assignment.plans.items()
            if client not in silent
        ]
        if number != CALIBRATION:
            self._round = number + 1
        return Outcome(tuple(reports), 0, 0, float("nan"))


def run_directly(
    recipe: Recipe,
    out: Path,
    present: Callable[[int], Collection[int]] | None = None,
    silent: Callable[[Any], Collection[int]] = lambda round: (),
) -> dict[str, Any]:
    """What the journal must hold.

    Args:
        present: Clients that can be asked, by round; all by default.
        silent: Clients that do not answer, by round, or for "calibration".
    """
    everyone = range(recipe.federation.clients)
    algorithm = make_algorithm(recipe, MASK.size)

    def start_engine(
        _state: ServerState, _log: Log, _mask: Mask, _begins: int
    ) -> tuple[Engine, Evaluator]:
        engine = _DirectEngine(algorithm, present or (lambda _: everyone), silent)
        return engine, lambda round, _state: Evaluated(round, {"loss": 0.5}, 1, 0.0)

    def never(path: Path, _mask: Mask, _weights: Any) -> None:
        raise AssertionError(f"{path} is not asked for: there is no subspace")

    header = header_of(recipe, MASK, ("bad", "good"), [], "")
    out.mkdir()
    execute(out, recipe, header, MASK, start_engine, never, RunObserver(), Progress())
    return content(out)


def content(directory: Path) -> dict[str, Any]:
    """All that a journal holds but evaluations and how long things took."""
    tables = {
        "rounds": "round, updates, digest, chain",
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


def in_round(number: int, action: Callable[[ScriptedClient, RoundPlan], Any]) -> Any:
    """An `act`: do this with the first plan of a round, and nothing else."""
    done: list[int] = []

    def act(client: ScriptedClient, frame: DownFrame) -> bool:
        if isinstance(frame, Plan) and frame.plan.round == number and not done:
            done.append(number)
            action(client, frame.plan)
            return True
        return False

    return act


def answer_changed(
    client: ScriptedClient, plan: RoundPlan, change: Callable[[ClientReport], Any]
) -> None:
    """Answer a plan with what `change` makes of the report."""
    answer = client.answer(plan)
    assert isinstance(answer, Report)
    changed = change(answer.report)
    client.send(Report(changed) if isinstance(changed, ClientReport) else changed)
