"""Clients of a run that are connected, clients that left, and peers that break the protocol."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Set
from dataclasses import dataclass

from meerkat.errors import ProtocolError
from meerkat.transport.base import Transport
from meerkat.transport.client_frames import Hello
from meerkat.transport.frame import encode
from meerkat.transport.handshake import Proof, difference
from meerkat.transport.server_frames import Goodbye, Refused, Welcome

__all__ = ["Member", "Members"]

_MOST_VIOLATIONS = 3
"""A peer that breaks the protocol this often is barred from the run."""
_MOST_ASKED = 32
"""Hellos, requests for the mask, and frames before a hello, of one peer in a minute."""
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
        rebind: May another peer take over a client whose own has left?
        exact: Clients that can take part only if they can report the exact gradient.
    """

    def __init__(
        self,
        transport: Transport,
        clients: int,
        proof: Proof,
        say: Callable[[str], None],
        rebind: bool = False,
        exact: Collection[int] = (),
    ):
        self._rebind, self._exact = rebind, exact
        self._transport, self._clients, self._proof, self._say = transport, clients, proof, say
        self._members: dict[int, Member] = {}
        self._by_peer: dict[int, int] = {}
        self._left: dict[int, tuple[float, str]] = {}
        self._violations: Counter[int] = Counter()
        # What a peer and a client are at their first hello holds for the run.
        self._bound: dict[int, int] = {}
        self._owners: dict[int, int] = {}
        self._counts: dict[int, tuple[int, int]] = {}
        self._idle: set[int] = set()
        self.renewing: set[int] = set()
        """Clients that were set up again, and have not said hello since."""
        self._asked: Counter[int] = Counter()
        self._asked_since = -math.inf

    def __contains__(self, client: object) -> bool:
        return client in self._members

    def __getitem__(self, client: int) -> Member:
        return self._members[client]

    def client_of(self, peer: int) -> int | None:
        """The client that is connected through a peer."""
        return self._by_peer.get(peer)

    def count_asked(self, peer: int) -> None:
        """Count a frame that a peer may send at any time.

        Raises:
            ProtocolError: It sends too many of them.
        """
        now = time.monotonic()
        if now - self._asked_since >= 60.0:
            self._asked.clear()
            self._asked_since = now
        self._asked[peer] += 1
        if self._asked[peer] > _MOST_ASKED:
            del self._asked[peer]  # it may come back once it is disconnected, but not for ever
            raise ProtocolError(f"more than {_MOST_ASKED} hellos or requests for the mask a minute")

    def is_barred(self, peer: int) -> bool:
        """Has it broken the protocol too often?"""
        return self._violations.get(peer, 0) >= _MOST_VIOLATIONS

    @property
    def idle(self) -> Set[int]:
        """Clients that can be sent a request now."""
        return self._idle

    def set_overdue(self, client: int, request: str) -> None:
        """A connected client has not answered this request; "" when it has."""
        self._members[client].overdue = request
        busy = request or client in self.renewing
        (self._idle.discard if busy else self._idle.add)(client)

    def renew(self, proof: Proof, setup: bytes) -> None:
        """Set up all clients again, with what they must have in common from now on.

        They are not idle until they say hello again.
        """
        self._proof = proof
        self._idle.clear()
        for client, member in self._members.items():
            self.renewing.add(client)
            self._transport.send(member.peer, setup)

    def departure(self, client: int) -> tuple[float, str] | None:
        """When a client left, on the monotonic clock, and why; None if it did not."""
        return self._left.get(client)

    def departures(self) -> str:
        """Why clients left, as an addition to an error message."""
        causes = [f"client {k} left: {why}" for k, (_, why) in sorted(self._left.items())]
        return f" ({'; '.join(causes[:_MOST_CAUSES])})" if causes else ""

    def admit(self, peer: int, hello: Hello) -> bool:
        """Answer a hello with a welcome or a refusal; True if the client takes part.

        Raises:
            ProtocolError: The peer was another client before in this run.
        """
        client, reason = hello.client, self._objection(peer, hello)
        if self._bound.get(peer, client) != client:
            raise ProtocolError(f"it is client {self._bound[peer]} in this run, not {client}")
        if reason is not None:
            self.renewing.discard(client)
            self._say(f"client {client} (peer {peer}) is refused: {reason}")
            self._transport.send(peer, encode(Refused(reason)))
            return False
        self._bound[peer] = self._by_peer[peer] = client
        self._owners[client] = peer
        self._counts[client] = hello.examples, hello.held_out
        self._left.pop(client, None)
        self._members[client] = Member(peer, hello, hello.position)
        self._idle.add(client)
        self.renewing.discard(client)
        self._say(f"client {client} is here (peer {peer}), {hello.examples} examples")
        self._transport.send(peer, encode(Welcome()))
        return True

    def remove(self, peer: int, cause: str) -> None:
        """A peer disconnected."""
        client = self._by_peer.pop(peer, None)
        if client is None:
            self._say(f"peer {peer} left before it was a client: {cause}")
        elif self._members.pop(client, None) is not None:
            self._idle.discard(client)
            self.renewing.discard(client)
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
        if not self._rebind and self._owners.get(client, peer) != peer:
            return (
                f"client {client} is bound to another node in this run; start that one, or set "
                "network.rebind = true if its node has no key and so a new identity at each start"
            )
        counts = hello.examples, hello.held_out
        if self._counts.get(client, counts) != counts:
            return (
                f"client {client} came with {self._counts[client][0]} examples to train and "
                f"{self._counts[client][1]} to evaluate on, and has {counts[0]} and {counts[1]} "
                "now; put its data back, or start another run"
            )
        if client in self._exact and not hello.gradients:
            return (
                f"client {client} is to report the exact gradient, and its node does not allow "
                "that; set --node-config gradients = true, which takes memory for activations"
            )
        return difference(hello.proof, self._proof)
