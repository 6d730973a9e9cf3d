"""Queues between the event loop of the streams and the thread that runs the rounds.

They hold frames to send and events not yet received, with a limit for each peer. Neither side
blocks the other: the thread wakes the loop through a `Bell`.
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

from meerkat.transport.base import Event

__all__ = ["Bell", "End", "Inbox", "Stream"]

_OVERHEAD = 100
"""Bytes of memory that a waiting frame takes besides its content."""


class Bell:
    """Sets events of a loop from any thread; events set at about the same time wake it once."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._lock = Lock()
        self._waiting: list[asyncio.Event] = []

    def ring(self, event: asyncio.Event) -> None:
        with self._lock:
            self._waiting.append(event)
            first = len(self._waiting) == 1
        if first:
            # RuntimeError: the loop is closed, so nothing waits for the events.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._answer)

    def _answer(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for event in waiting:
            event.set()


@dataclass(frozen=True)
class End:
    """The end of a stream, as the client sees it."""

    code: Any
    """A grpc.StatusCode."""
    reason: str
    flush: bool
    """Are waiting frames still sent?"""


class Stream:
    """The server's side of one connection: the frames to send on it, and its end.

    Args:
        largest_queue: Bytes that may wait to be sent, not counting the largest waiting frame.
    """

    def __init__(self, peer: int, bell: Bell, largest_queue: int):
        self.peer = peer
        self.muted = False
        """Are frames of it discarded that are not yet received?"""
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
        """Queue a frame to be sent; False if too many bytes wait. From any thread."""
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
        """End the stream; False if it had ended before. From any thread."""
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
        """Do too many bytes wait? One large frame is not counted: a snapshot before its plan."""
        largest = max(map(len, self._waiting), default=0)
        return self._bytes - largest > self._largest_queue


@dataclass
class _Backlog:
    """Events of one peer that are not yet received."""

    count: int = 0
    paused: bool = False
    free: asyncio.Event = field(default_factory=asyncio.Event)


class Inbox:
    """Events of all peers in order of arrival; reading from a peer pauses while it has too many.

    Args:
        limit: Events of one peer that may wait to be received.
    """

    def __init__(self, bell: Bell, limit: int):
        self._bell = bell
        self._limit = limit
        self._lock = Lock()
        self._backlogs: defaultdict[int, _Backlog] = defaultdict(_Backlog)
        self._events: SimpleQueue[tuple[Stream | None, Event]] = SimpleQueue()

    async def wait_for_capacity(self, peer: int) -> None:
        """Wait until a peer has fewer events than the limit."""
        while True:
            with self._lock:
                backlog = self._backlogs[peer]
                if backlog.count < self._limit:
                    return
                backlog.paused = True
                backlog.free.clear()
            await backlog.free.wait()

    def frame(self, stream: Stream, frame: bytes) -> None:
        """Add a frame that arrived."""
        self._put(stream, Event(stream.peer, frame))

    def leave(self, peer: int, cause: str) -> None:
        """Add that a peer disconnected."""
        self._put(None, Event(peer, None, cause))

    def get(self, timeout: float) -> Event | None:
        """The next event, or None after so many seconds."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                stream, event = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                return None
            with self._lock:
                backlog = self._backlogs[event.peer]
                backlog.count -= 1
                wake = backlog.paused and backlog.count <= self._limit // 2
                if wake:
                    backlog.paused = False
            if wake:
                self._bell.ring(backlog.free)
            if stream is None or not stream.muted:
                return event

    def _put(self, stream: Stream | None, event: Event) -> None:
        with self._lock:
            self._backlogs[event.peer].count += 1
        self._events.put((stream, event))
