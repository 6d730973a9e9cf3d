"""The two transports over Flower: frames in Flower messages, and streams that Flower invites to.

A node is a peer. Flower authenticates it, by TLS and the node's key where a deployment has them;
what is sent to a node here reaches that node alone.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from contextlib import suppress

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from meerkat.errors import RunError
from meerkat.transport.base import Event
from meerkat.transport.client_frames import Failed
from meerkat.transport.frame import encode
from meerkat.transport.server_frames import Refused, Setup, wants_answer
from meerkat.transport.stream import Invitation, StreamHub

__all__ = ["FRAMES", "SESSION", "FlowerMessages", "FlowerStreams", "pack", "unpack"]

FRAMES = "frames"
"""Action of the messages that carry frames: `train.frames`."""
SESSION = "session"
"""Action of the message that invites to a stream: `train.session`."""

_LOOK_EVERY = 1.0
"""Seconds between looks for new nodes and ended sessions."""
_LONGEST_PAUSE = 60.0
"""Seconds, at most, between attempts to reach a node whose client app fails."""
_FAREWELL = 15.0
"""Seconds, at most, in which client apps tell Flower that their sessions are over."""
_TTL = 365 * 24 * 3600.0
"""Seconds that a session may last; Flower's default is twelve hours."""

Say = Callable[[str], None]


def pack(frames: Iterable[bytes], **others: str | bytes) -> RecordDict:
    """Frames, and what else there is, as the content of a Flower message."""
    return RecordDict({"meerkat": ConfigRecord({"frames": list(frames), **others})})


def unpack(content: RecordDict) -> list[bytes]:
    """The frames of a message; none where it is not one of ours."""
    record = content.config_records.get("meerkat")
    frames = record.get("frames") if record is not None else None
    if not isinstance(frames, list):
        return []
    return [frame for frame in frames if isinstance(frame, bytes)]


class _Attempts:
    """When a node may be tried again: at once, and then more and more seldom."""

    def __init__(self) -> None:
        self._failed: dict[int, int] = defaultdict(int)
        self._not_before: dict[int, float] = {}

    def may(self, node: int) -> bool:
        return time.monotonic() >= self._not_before.get(node, 0.0)

    def failed(self, node: int) -> None:
        pause = min(_LONGEST_PAUSE, 0.5 * 2 ** self._failed[node])
        self._failed[node] += 1
        self._not_before[node] = time.monotonic() + pause

    def worked(self, node: int) -> None:
        self._failed.pop(node, None)


class FlowerMessages:
    """Frames in Flower messages: for simulation, and wherever no stream can be opened.

    Args:
        stop: Makes `receive` raise when it is set, from another thread.
        simulated: Are the nodes workers of one simulation? One that dies is not replaced there.
    """

    def __init__(
        self,
        grid: Grid,
        setup: Setup,
        stop: threading.Event | None = None,
        simulated: bool = False,
    ):
        self._grid, self._stop, self._simulated = grid, stop or threading.Event(), simulated
        self._setup = encode(setup)
        self._outbox: dict[int, list[bytes]] = defaultdict(list)
        self._pending: dict[str, int] = {}
        self._met: set[int] = set()
        self._barred: set[int] = set()
        self._attempts = _Attempts()
        self._refused: set[int] = set()
        self._refusals = _Attempts()
        self._events: deque[Event] = deque()
        self._looked = float("-inf")

    def send(self, peer: int, frame: bytes) -> None:
        self._outbox[peer].append(frame)
        if frame[0] == Refused.number:  # the cause may pass, as that another node is the client yet
            self._refused.add(peer)
            self._refusals.failed(peer)

    def introduce(self, setup: Setup) -> None:
        self._setup = encode(setup)

    def receive(self, timeout: float) -> Event | None:
        end, pause = time.monotonic() + timeout, 0.005
        while not self._events:
            if self._stop.is_set():
                raise RunError("the run was stopped; `meerkat resume DIR` goes on with it")
            self._look()
            self._push()
            self._pull()
            left = end - time.monotonic()
            if self._events or left <= 0:
                break
            time.sleep(min(pause, left))
            pause = min(2 * pause, 0.1)
        return self._events.popleft() if self._events else None

    def drop(self, peer: int, reason: str, bar: bool = False) -> None:
        self._push()  # what was sent before still goes out
        if bar:
            self._barred.add(peer)
        if peer in self._met:
            self._forget(peer, reason)

    def close(self, reason: str) -> None:
        """Nothing is open: a client app ends with its message."""

    def _look(self) -> None:
        """Send the setup to nodes that are new, or came back, or were refused a while ago."""
        if time.monotonic() - self._looked < _LOOK_EVERY:
            return
        self._looked = time.monotonic()
        here = set(self._grid.get_node_ids())
        for peer in self._met - here:
            self._forget(peer, "its node left Flower")
        for peer in here - self._met - self._barred:
            if self._attempts.may(peer):
                self._met.add(peer)
                self._outbox[peer].insert(0, self._setup)
        for peer in self._refused & self._met - self._barred:
            if self._refusals.may(peer) and peer not in self._pending.values():
                self._refused.discard(peer)
                self._outbox[peer].append(self._setup)

    def _push(self) -> None:
        ready = [peer for peer, frames in self._outbox.items() if any(map(wants_answer, frames))]
        messages = [
            Message(pack(self._outbox.pop(peer)), peer, f"train.{FRAMES}") for peer in ready
        ]
        if messages:
            names = self._grid.push_messages(messages)
            self._pending.update(zip(names, ready, strict=True))

    def _pull(self) -> None:
        if not self._pending:
            return
        for reply in self._grid.pull_messages(list(self._pending)):
            peer = self._pending.pop(reply.metadata.reply_to_message_id, None)
            if peer is None:
                continue
            if reply.has_error():
                cause = " ".join(str(reply.error.reason).split())
                if self._simulated:
                    raise RunError(
                        f"a worker of the simulation failed: {cause}; `meerkat resume DIR` goes on "
                        "with the run, with fewer network.workers if memory was short"
                    )
                self._forget(peer, f"its client app failed: {cause}")
                continue
            self._attempts.worked(peer)
            self._events.extend(Event(peer, frame) for frame in unpack(reply.content))

    def _forget(self, peer: int, cause: str) -> None:
        self._met.discard(peer)
        self._refused.discard(peer)
        self._outbox.pop(peer, None)
        self._attempts.failed(peer)
        self._events.append(Event(peer, None, cause))


class FlowerStreams:
    """Streams to the server app; Flower's messages invite each node to one.

    Args:
        address: Where clients reach the hub, host:port.
        say: Takes a line for the log.
    """

    def __init__(self, grid: Grid, setup: Setup, hub: StreamHub, address: str, say: Say):
        self._grid, self._hub, self._say = grid, hub, say
        self._run, self._address = setup.session, address
        self._setup = encode(setup)
        self._sessions: dict[str, int] = {}
        self._barred: set[int] = set()
        self._attempts = _Attempts()
        self._closing = threading.Event()
        self._failures: deque[Event] = deque()
        self._stopped = False
        # Of all that is here, the inviting thread alone speaks to Flower.
        self._inviting = threading.Thread(target=self._invite_all, daemon=True)
        self._inviting.start()

    def send(self, peer: int, frame: bytes) -> None:
        self._hub.send(peer, frame)

    def introduce(self, setup: Setup) -> None:
        self._setup = encode(setup)

    def receive(self, timeout: float) -> Event | None:
        if self._stopped:
            raise RunError("the run was stopped; start it again with the same `out`")
        if self._failures:
            return self._failures.popleft()
        return self._hub.receive(timeout)

    def drop(self, peer: int, reason: str, bar: bool = False) -> None:
        if bar:
            self._barred.add(peer)
        self._hub.drop(peer, reason, bar)

    def close(self, reason: str) -> None:
        self._hub.close(reason)
        self._closing.set()
        self._inviting.join()

    def _invite_all(self) -> None:
        while not self._closing.wait(_LOOK_EVERY if self._sessions else 0.1):
            try:
                self._end_sessions()
                busy = set(self._sessions.values()) | self._barred
                for node in set(self._grid.get_node_ids()) - busy:
                    if self._attempts.may(node):
                        self._invite(node)
            except Exception as error:  # the SuperLink may be away for a while
                self._say(f"Flower does not answer ({type(error).__name__}); trying again")
                self._closing.wait(5.0)
            except SystemExit:  # how Flower says `flwr stop`
                self._stopped = True
                return
        end = time.monotonic() + _FAREWELL
        with suppress(Exception):
            while self._sessions and time.monotonic() < end:
                self._end_sessions()
                time.sleep(0.1)

    def _invite(self, node: int) -> None:
        """Ask a node to open a stream; its token is good for that node and this run."""
        hub, token = self._hub, self._hub.invite(node)
        invitation = Invitation(
            self._address, hub.certificate, not hub.certificate, self._run, node, token
        )
        content = pack([self._setup], invitation=invitation.encode())
        message = Message(content, node, f"train.{SESSION}", ttl=_TTL)
        (name,) = self._grid.push_messages([message])
        self._sessions[name] = node

    def _end_sessions(self) -> None:
        """Hear how sessions ended; such nodes are invited again."""
        if not self._sessions:
            return
        for reply in self._grid.pull_messages(list(self._sessions)):
            node = self._sessions.pop(reply.metadata.reply_to_message_id, None)
            if node is None:
                continue
            record = None if reply.has_error() else reply.content.config_records.get("summary")
            if record is not None:  # there was a session, so earlier failures count no more
                self._attempts.worked(node)
                self._say(f"peer {node}: {', '.join(f'{k} {record[k]!r}' for k in sorted(record))}")
            self._attempts.failed(node)
            if reply.has_error():
                cause = " ".join(str(reply.error.reason).split())
                self._failures.append(Event(node, encode(Failed(f"its client app: {cause}"))))
                continue
            self._failures.extend(Event(node, frame) for frame in unpack(reply.content))
