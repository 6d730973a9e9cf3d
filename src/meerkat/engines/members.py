"""Clients of a run that are connected, clients that left, and peers that break the protocol."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from meerkat.transport.base import Transport
from meerkat.transport.client_frames import Hello
from meerkat.transport.frame import encode
from meerkat.transport.handshake import Proof, difference
from meerkat.transport.server_frames import Goodbye, Refused, Welcome

__all__ = ["Member", "Members"]

_MOST_VIOLATIONS = 3
"""A peer that breaks the protocol this often is barred from the run."""
_MOST_CAUSES = 5
"""Clients that left, of which an error message gives the cause."""


@dataclass
class Member:
    """A connected client."""

    peer: int
    hello: Hello
    position: int | None
    """Updates of the log that its state contains; None where its state is not trusted."""
    overdue: str = ""
    """Name of a closed request that it has not answered; until it does, it gets no other."""


class Members:
    """The clients of a run by number: each is connected through one peer, and each peer is one.

    Args:
        clients: K; clients are numbered from 0.
        proof: What a client must have in common with the server.
        say: Takes a line for the log.
    """

    def __init__(
        self, transport: Transport, clients: int, proof: Proof, say: Callable[[str], None]
    ):
        self._transport, self._clients, self._proof, self._say = transport, clients, proof, say
        self._members: dict[int, Member] = {}
        self._by_peer: dict[int, int] = {}
        self._left: dict[int, tuple[float, str]] = {}
        self._violations: Counter[int] = Counter()

    def __contains__(self, client: object) -> bool:
        return client in self._members

    def __getitem__(self, client: int) -> Member:
        return self._members[client]

    def client_of(self, peer: int) -> int | None:
        """The client that is connected through a peer."""
        return self._by_peer.get(peer)

    def idle(self) -> list[int]:
        """Clients that can be sent a request now, sorted."""
        return sorted(client for client, member in self._members.items() if not member.overdue)

    def departure(self, client: int) -> tuple[float, str] | None:
        """When a client left, on the monotonic clock, and why; None if it did not."""
        return self._left.get(client)

    def departures(self) -> str:
        """Why clients left, as an addition to an error message."""
        causes = [f"client {k} left: {why}" for k, (_, why) in sorted(self._left.items())]
        return f" ({'; '.join(causes[:_MOST_CAUSES])})" if causes else ""

    def admit(self, peer: int, hello: Hello) -> bool:
        """Answer a hello with a welcome or a refusal; True if the client takes part."""
        client, reason = hello.client, self._objection(peer, hello)
        if reason is not None:
            self._say(f"client {client} (peer {peer}) is refused: {reason}")
            self._transport.send(peer, encode(Refused(reason)))
            return False
        if self._by_peer.get(peer, client) != client:
            self.remove(peer, f"its peer is client {client} now")
        self._by_peer[peer] = client
        self._left.pop(client, None)
        self._members[client] = Member(peer, hello, hello.position)
        self._say(f"client {client} is here (peer {peer}), {hello.examples} examples")
        self._transport.send(peer, encode(Welcome()))
        return True

    def remove(self, peer: int, cause: str) -> None:
        """A peer disconnected."""
        client = self._by_peer.pop(peer, None)
        if client is None:
            self._say(f"peer {peer} left before it was a client: {cause}")
        elif self._members.pop(client, None) is not None:
            self._left[client] = time.monotonic(), cause
            self._say(f"client {client} left: {cause}")

    def disconnect(self, peer: int, cause: str) -> None:
        """Disconnect a peer that broke the protocol; bar it if that was once too often."""
        client = self._by_peer.get(peer)
        name = f"peer {peer}" if client is None else f"client {client}"
        if self.bar_repeated(peer, f"{name}: {cause}", cause):
            return
        self._say(f"{name}: {cause}; disconnected")
        if client is None:  # a client that takes part may connect again
            self._transport.send(peer, encode(Refused(cause)))
        self._transport.drop(peer, cause)

    def bar_repeated(self, peer: int, line: str, cause: str) -> bool:
        """Count a violation of the protocol; True if the peer is barred for it.

        Args:
            line: For the log, if it is.
            cause: For the peer, if it is.
        """
        self._violations[peer] += 1
        if self._violations[peer] < _MOST_VIOLATIONS:
            return False
        self._say(f"{line}; barred from this run")
        self._transport.send(peer, encode(Refused(cause)))
        self._transport.drop(peer, cause, bar=True)
        return True

    def say_goodbye(self, reason: str) -> None:
        """Send every client that the run is over."""
        for member in self._members.values():
            self._transport.send(member.peer, encode(Goodbye(reason)))

    def _objection(self, peer: int, hello: Hello) -> str | None:
        """Why a client cannot take part, and the way out; None if it can."""
        client, member = hello.client, self._members.get(hello.client)
        if client >= self._clients:
            return (
                f"client {client} is not one of federation.clients = {self._clients}, who are "
                "numbered from 0; change its partition-id"
            )
        if member is not None and member.peer != peer:
            return f"client {client} is here already; give each node a partition-id of its own"
        if not hello.examples:
            return f"client {client} has no examples; put some into its data folder"
        return difference(hello.proof, self._proof)
