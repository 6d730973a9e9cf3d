"""Remote runs whose clients are sessions in this process, over a transport without a network."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import meerkat
from meerkat.config import Recipe
from meerkat.errors import RunError
from meerkat.journal import Journal
from meerkat.journal.records import Evaluated
from meerkat.models.loading import LoadedModel, load_model
from meerkat.node import runtime as node_runtime
from meerkat.node.config import NodeConfig
from meerkat.node.session import ClientSession
from meerkat.progress import Progress
from meerkat.runs import remote_run
from meerkat.runs.events import RunObserver
from meerkat.runs.renewal import MakeMask
from meerkat.spaces.mask_file import Mask
from meerkat.transport.base import Event
from meerkat.transport.client_frames import decode_up
from meerkat.transport.frame import DownFrame
from meerkat.transport.server_frames import Setup, decode_down, wants_answer
from meerkat.zo.estimators import Estimate

__all__ = [
    "Peers",
    "RemoteRun",
    "evaluations",
    "loaded_once",
    "local_run",
    "new_process",
    "same_evaluations",
    "slopes",
]


@functools.cache
def loaded_once(section: Any, runtime: Any) -> LoadedModel:
    """A run leaves its model as it was; `new_process` does the same for sessions."""
    return load_model(section, runtime)


def new_process() -> None:
    """Sessions that are made from now on share no state with those before."""
    node_runtime._leave_all()


def slopes(_: Any, losses_at: Any, directions: Any, epsilon: float) -> Estimate:
    """Coefficients without a forward pass, which depend on θ, z and the examples."""
    theta, batch = losses_at.theta, losses_at.batch
    weight = sum(sum(example.prompt) for example in batch) % 101 / 101
    found = [float(theta[:20] @ z[:20]) + weight * float(z[0]) for z in directions]
    return Estimate(tuple(found), 0.7)


class Peers:
    """A transport whose peers are sessions in this process.

    Args:
        anew: Is each message answered by a new process?
    """

    def __init__(self, setup: Setup, nodes: list[NodeConfig], anew: bool = False):
        self.setup, self.anew = setup, anew
        self.nodes = {10 + number: node for number, node in enumerate(nodes)}
        self.events: deque[Event] = deque()
        self.said: list[str] = []
        self.sessions = {peer: self._session(node) for peer, node in self.nodes.items()}
        self.sent: list[tuple[int, DownFrame]] = []
        self.answers: list[tuple[int, Any]] = []
        self.before: Callable[[int, DownFrame], bool] = lambda peer, frame: False
        """Called before a session gets a frame; True: the frame is lost."""
        self.closed = ""
        self.cut_in = math.inf
        """Events after which the transport fails."""
        self._kept: dict[int, bytes | None] = {}
        self._waiting: dict[int, list[bytes]] = {}
        for peer, session in self.sessions.items():
            self._put(peer, session.begin(setup))

    def reconnect(self, peer: int) -> None:
        """The peer's process ends, and a new one connects."""
        self.events.append(Event(peer, None, "its process ended"))
        new_process()
        self.sessions[peer] = self._session(self.nodes[peer])
        self._put(peer, self.sessions[peer].begin(self.setup))
        # Sessions share one model here: it is read while it is as it was loaded.
        assert self.sessions[peer]._runtime.worker.position == self.setup.position

    def send(self, peer: int, frame: bytes) -> None:
        decoded = decode_down(frame)
        self.sent.append((peer, decoded))
        if self.before(peer, decoded):
            return
        if self.anew:
            self._send_anew(peer, frame)
        elif peer in self.sessions:
            for answer in self.sessions[peer].answer(frame):
                self._put(peer, answer)

    def receive(self, timeout: float) -> Event | None:
        self.cut_in -= 1
        if self.cut_in < 0:
            raise RunError("the transport was stopped")
        return self.events.popleft() if self.events else None

    def drop(self, peer: int, reason: str, bar: bool = False) -> None:
        if self.sessions.pop(peer, None) is not None:
            self.events.append(Event(peer, None, reason))

    def introduce(self, setup: Setup) -> None:
        self.setup = setup

    def close(self, reason: str) -> None:
        self.closed = reason

    def count(self, kind: type, peer: int | None = None) -> int:
        frames = self.sent + self.answers
        return sum(isinstance(frame, kind) and peer in (None, p) for p, frame in frames)

    def _session(self, node: NodeConfig) -> ClientSession:
        return ClientSession(node, self.said.append)

    def _put(self, peer: int, frame: bytes) -> None:
        self.answers.append((peer, decode_up(frame)))
        self.events.append(Event(peer, frame))

    def _send_anew(self, peer: int, frame: bytes) -> None:
        """As in Flower's messages: a frame without an answer waits for one that has one."""
        waiting = self._waiting.setdefault(peer, [])
        waiting.append(frame)
        if not wants_answer(frame):
            return
        new_process()
        session = self._session(self.nodes[peer])
        first, kept = session.begin(self.setup), self._kept.get(peer)
        if any(isinstance(decode_down(waited), Setup) for waited in waiting):
            self._put(peer, first)
        elif kept is not None:
            session.recall(kept)
        for waited in waiting:
            if isinstance(decode_down(waited), Setup):  # as the client app has it
                continue
            for answer in session.answer(waited):
                self._put(peer, answer)
        waiting.clear()
        self._kept[peer] = session.remembered() if self.setup.remember else None


class RemoteRun:
    """A run over `Peers`."""

    def __init__(
        self, recipe: Recipe, out: Path, mask: Mask, nodes: list[NodeConfig] | None = None
    ):
        self.recipe, self.out, self.mask = recipe, out, mask
        self.nodes = nodes or [NodeConfig(number) for number in range(recipe.federation.clients)]
        self.lines: list[str] = []
        self.cut_in = math.inf
        self.anew = self.remember = False
        self.make_mask: MakeMask | None = None
        self.before: Callable[[int, DownFrame], bool] = lambda peer, frame: False
        self.observer = RunObserver()
        self.peers: Peers

    def run(self) -> dict[str, Any]:
        return remote_run.host(
            self.recipe,
            self.out,
            self.mask,
            self._connect,
            self.observer,
            Progress(),
            self.lines.append,
            remember=self.remember,
            make_mask=self.make_mask,
        )

    def _connect(self, setup: Setup) -> Peers:
        self.peers = Peers(setup, self.nodes, self.anew)
        self.peers.cut_in, self.peers.before = self.cut_in, self.before
        return self.peers


def local_run(recipe: Recipe, out: Path) -> dict[str, Any]:
    """The same run in one process."""
    return meerkat.run(recipe, out=out, observers=())


def evaluations(directory: Path) -> list[Evaluated]:
    with closing(Journal.open(directory / "journal.sqlite")) as journal:
        return journal.evaluations()


def same_evaluations(one: Path, other: Path) -> None:
    first, second = evaluations(one), evaluations(other)
    assert [(e.round, e.examples) for e in first] == [(e.round, e.examples) for e in second]
    for ours, theirs in zip(first, second, strict=True):
        assert list(ours.metrics) == list(theirs.metrics)
        # A loss is a sum of float64, in another order here; all else are counts.
        assert ours.metrics.pop("loss") == pytest.approx(theirs.metrics.pop("loss"), abs=1e-6)
        assert ours.metrics == theirs.metrics
