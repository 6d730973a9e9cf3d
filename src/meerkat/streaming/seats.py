"""What waits at a seat: frames that are to be sent, and frames that nobody has taken yet.

The server's loop and the thread that runs the rounds meet here and nowhere else. Neither waits for
the other: whoever has something for the loop says so through its `Bell`.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any

from meerkat.links import Event

__all__ = ["Bell", "End", "Inbox", "Stream"]

_OVERHEAD = 100
"""What a waiting frame costs beside its bytes; a million empty ones are not free."""


class Bell:
    """Sets events within the loop from any thread; those of one moment wake it once."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._lock = Lock()
        self._waiting: list[asyncio.Event] = []

    def ring(self, event: asyncio.Event) -> None:
        with self._lock:
            self._waiting.append(event)
            first = len(self._waiting) == 1
        if first:
            # RuntimeError: the loop is closed, and what it would do is done.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._answer)

    def _answer(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for event in waiting:
            event.set()


@dataclass(frozen=True)
class End:
    """How a stream ends."""

    code: Any
    """A grpc.StatusCode."""
    reason: str
    flush: bool
    """Is what waits still sent?"""


class Stream:
    """The server's end of one connection: what waits to be sent on it, and how it ends.

    Args:
        largest_queue: Bytes that may wait, beside the largest frame among them.
    """

    def __init__(self, seat: int, bell: Bell, largest_queue: int):
        self.seat = seat
        self.muted = False
        """Its frames are not delivered any more."""
        self.end: End | None = None
        self.ended = asyncio.Event()
        self._bell = bell
        self._largest_queue = largest_queue
        self._lock = Lock()
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        self._asleep = False
        self._wake = asyncio.Event()

    def put(self, frame: bytes) -> bool:
        """Have a frame sent; False if too many wait already. From any thread."""
        with self._lock:
            if self.end is not None:
                return True
            if self._bytes > self._largest_queue and self._is_full():
                return False
            self._waiting.append(frame)
            self._bytes += len(frame) + _OVERHEAD
            asleep, self._asleep = self._asleep, False
        if asleep:
            self._bell.ring(self._wake)
        return True

    def finish(self, end: End) -> bool:
        """Take no more frames; False if it had ended before. From any thread."""
        with self._lock:
            if self.end is not None:
                return False
            self.end = end
            if not end.flush:
                self._waiting.clear()
        self._bell.ring(self._wake)
        self._bell.ring(self.ended)
        return True

    async def next(self) -> bytes | None:
        """The next frame to send; None after the last."""
        while True:
            with self._lock:
                if self._waiting:
                    frame = self._waiting.popleft()
                    self._bytes -= len(frame) + _OVERHEAD
                    return frame
                if self.end is not None:
                    return None
                self._asleep = True
                self._wake.clear()
            await self._wake.wait()

    def _is_full(self) -> bool:
        """One frame may be large: a snapshot, with its plan behind it."""
        largest = max(map(len, self._waiting), default=0)
        return self._bytes - largest > self._largest_queue


@dataclass
class _Desk:
    """Events of one seat that nobody has taken."""

    count: int = 0
    paused: bool = False
    free: asyncio.Event = field(default_factory=asyncio.Event)


class Inbox:
    """Events of all seats in order of arrival; a seat that has too many of them must wait.

    Args:
        limit: Events of one seat that may wait to be taken.
    """

    def __init__(self, bell: Bell, limit: int):
        self._bell = bell
        self._limit = limit
        self._lock = Lock()
        self._desks: defaultdict[int, _Desk] = defaultdict(_Desk)
        self._events: SimpleQueue[tuple[Stream | None, Event]] = SimpleQueue()

    async def room(self, seat: int) -> None:
        """Wait until one more event of a seat may come."""
        while True:
            with self._lock:
                desk = self._desks[seat]
                if desk.count < self._limit:
                    return
                desk.paused = True
                desk.free.clear()
            await desk.free.wait()

    def frame(self, stream: Stream, frame: bytes) -> None:
        """A frame came."""
        self._put(stream, Event(stream.seat, frame))

    def leave(self, seat: int, cause: str) -> None:
        """Whoever sat there has left."""
        self._put(None, Event(seat, None, cause))

    def get(self, timeout: float) -> Event | None:
        """The next event, or None after so many seconds."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                stream, event = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                return None
            with self._lock:
                desk = self._desks[event.seat]
                desk.count -= 1
                wake = desk.paused and desk.count <= self._limit // 2
                if wake:
                    desk.paused = False
            if wake:
                self._bell.ring(desk.free)
            if stream is None or not stream.muted:
                return event

    def _put(self, stream: Stream | None, event: Event) -> None:
        with self._lock:
            self._desks[event.seat].count += 1
        self._events.put((stream, event))
