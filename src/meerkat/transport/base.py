"""The interface of a transport: it sends and receives frames for each connected peer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from meerkat.transport.server_frames import Setup

__all__ = ["Event", "Transport"]


@dataclass(frozen=True)
class Event:
    """A frame arrived from a peer, or the peer disconnected."""

    peer: int
    frame: bytes | None
    """None: the peer disconnected."""
    cause: str = ""
    """Why it disconnected."""


class Transport(Protocol):
    """The server's end of all connections.

    A peer is a node of Flower that the transport has authenticated; its `Hello` has the number of
    the client that runs there. Only `receive` blocks. No call fails because of what a client does:
    that is an event.
    """

    def send(self, peer: int, frame: bytes) -> None:
        """Send a frame; it is discarded if the peer is not connected."""

    def receive(self, timeout: float) -> Event | None:
        """The next event, or None after so many seconds; 0 does not wait."""

    def introduce(self, setup: Setup) -> None:
        """Set up peers that connect from now on with this frame instead of the former one."""

    def drop(self, peer: int, reason: str, bar: bool = False) -> None:
        """Disconnect a peer; with `bar`, it cannot connect again in this run."""

    def close(self, reason: str) -> None:
        """Disconnect all peers, with the reason where the transport can send one."""
