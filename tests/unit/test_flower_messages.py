"""Frames in Flower messages over a scripted grid: who is set up, and who is again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("flwr")
from flwr.app import RecordDict

from meerkat.flower import transports
from meerkat.flower.transports import FlowerMessages, pack, unpack
from meerkat.transport.frame import encode
from meerkat.transport.handshake import Proof
from meerkat.transport.server_frames import Refused, Setup, Welcome, decode_down

SETUP = Setup("{}", Proof("a" * 64, "b" * 64, "c" * 64, "d" * 64, (1.0,)), "e" * 32, True)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Metadata:
    dst_node_id: int
    reply_to_message_id: str = ""


class Message:
    """As much of Flower's, which is made in a run only, as is used."""

    def __init__(self, content: RecordDict, to: int, kind: str):
        self.content, self.metadata, self.kind = content, Metadata(to), kind

    def has_error(self) -> bool:
        return False


class Grid:
    """Nodes that answer every message at once, with no frame."""

    def __init__(self) -> None:
        self.nodes = {1, 2}
        self.sent: list[tuple[float, int, list[str]]] = []
        self._answers: dict[str, Message] = {}
        self.clock: Clock

    def get_node_ids(self) -> Iterable[int]:
        return sorted(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        names = []
        for message in messages:
            kinds = [type(decode_down(frame)).__name__ for frame in unpack(message.content)]
            self.sent.append((self.clock.now, message.metadata.dst_node_id, kinds))
            name = f"message-{len(self.sent)}"
            self._answers[name] = Message(pack([]), 0, "")
            self._answers[name].metadata.reply_to_message_id = name
            names.append(name)
        return names

    def pull_messages(self, names: Iterable[str]) -> list[Message]:
        return [self._answers.pop(name) for name in list(names) if name in self._answers]

    def kinds_to(self, peer: int) -> list[list[str]]:
        return [kinds for _, to, kinds in self.sent if to == peer]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(transports, "time", clock)
    monkeypatch.setattr(transports, "Message", Message)
    return clock


@pytest.fixture
def grid(clock: Clock) -> Grid:
    grid = Grid()
    grid.clock = clock
    return grid


@pytest.fixture
def made(grid: Grid) -> FlowerMessages:
    scripted: Any = grid
    return FlowerMessages(scripted, SETUP)


def test_a_node_is_set_up_once(grid: Grid, made: FlowerMessages) -> None:
    made.receive(30.0)
    made.send(1, encode(Welcome()))
    made.receive(30.0)
    assert grid.kinds_to(1) == grid.kinds_to(2) == [["Setup"]]


def test_a_node_that_was_refused_is_asked_again_more_and_more_seldom(
    grid: Grid, made: FlowerMessages, clock: Clock
) -> None:
    """What it was refused for may be over: its client's former node has left, say."""
    made.receive(2.0)
    times = []
    for _ in range(10):
        before = clock.now
        made.send(2, encode(Refused("client 1 is here already")))
        while grid.kinds_to(2)[-1] != ["Setup"] or clock.now == before:
            made.receive(1.0)
        times.append(clock.now - before)
    assert grid.kinds_to(1) == [["Setup"]]
    assert grid.kinds_to(2) == [["Setup"], *([["Refused"], ["Setup"]] * 10)]
    assert times == sorted(times)
    assert 0.5 <= times[0] <= 3.0
    assert 60.0 <= times[-1] <= 63.0


def test_a_node_that_is_barred_is_not(grid: Grid, made: FlowerMessages) -> None:
    made.receive(2.0)
    made.send(2, encode(Refused("it broke the protocol")))
    made.drop(2, "it broke the protocol", bar=True)
    for _ in range(200):
        made.receive(1.0)
    assert grid.kinds_to(2) == [["Setup"], ["Refused"]]


def test_a_node_that_was_refused_and_left_is_set_up_when_it_is_back(
    grid: Grid, made: FlowerMessages
) -> None:
    made.receive(2.0)
    made.send(2, encode(Refused("client 1 is here already")))
    grid.nodes.discard(2)
    events = [made.receive(1.0) for _ in range(5)]
    assert [(event.peer, event.frame) for event in events if event is not None] == [(2, None)]
    for _ in range(100):
        made.receive(1.0)
    assert grid.kinds_to(2) == [["Setup"], ["Refused"]]
    grid.nodes.add(2)
    made.receive(3.0)
    assert grid.kinds_to(2) == [["Setup"], ["Refused"], ["Setup"]]
