"""The small face of a transport: frames to and from whoever sits at the other end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["Event", "Link"]


@dataclass(frozen=True)
class Event:
    """Something came from a seat: a frame, or the news that whoever sat there has left."""

    seat: int
    frame: bytes | None
    """None: it left."""
    cause: str = ""
    """Why it left."""


class Link(Protocol):
    """A transport, seen from the server.

    A seat is a place that the transport vouches for: one node of Flower. Which client sits there,
    its `Hello` says. Nothing here blocks but `receive`, and no call fails because of what a client
    does: that comes as an event.
    """

    def send(self, seat: int, frame: bytes) -> None:
        """Send a frame; where nobody sits, nothing happens."""

    def receive(self, timeout: float) -> Event | None:
        """The next event, or None after so many seconds; 0 does not wait."""

    def drop(self, seat: int, reason: str, bar: bool = False) -> None:
        """Break the connection to a seat; with `bar`, for the rest of the run."""

    def close(self, reason: str) -> None:
        """End the run for all seats, telling them why, and free what the transport holds."""
