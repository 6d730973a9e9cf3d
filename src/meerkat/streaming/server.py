"""The server's side of the streams: who is let in, what comes from whom, and who has left."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc  # type: ignore[import-untyped]

from meerkat.errors import ProtocolError
from meerkat.links import Event
from meerkat.streaming.certificates import fresh_identity
from meerkat.streaming.invitation import JOINED, read_metadata
from meerkat.streaming.listening import FLUSH, Listener, limits
from meerkat.streaming.seats import Bell, End, Inbox, Stream
from meerkat.streaming.tokens import Tokens

__all__ = ["StreamHub", "Traffic"]

_UNDELIVERED = 16
"""Frames of one stream that are read ahead of `receive`."""
_HALF_CLOSED = 0.1
"""Seconds in which a broken connection shows that it is one, and no client that left in peace."""
_REFUSALS = 60
"""Lines about refused streams in one minute."""
_REPLACED = "a new connection took its seat"
_Code = grpc.StatusCode


@dataclass(frozen=True)
class Traffic:
    """What crossed the streams: frames and their bytes, without what gRPC and TLS add."""

    frames_up: int = 0
    bytes_up: int = 0
    frames_down: int = 0
    bytes_down: int = 0


class StreamHub:
    """A `Link` over gRPC: one bidirectional stream for each seat, one frame a message.

    A stream presents run, seat and token before any frame of it is read. If a second one comes for
    a seat, it replaces the first, which may be a connection that only this side believes in.

    No client can make this process grow: of each stream no more than 16 frames are read ahead,
    a frame is refused by its announced length, and a client that does not read is dropped.

    Args:
        listen: host:port; port 0 takes a free one.
        largest_frame: Bytes that a client may send in one frame.
        insecure: Plain text; on loopback only.
        say: Takes lines for a log, from any thread.
        largest_queue: Bytes that may wait for one client beside the largest frame among them.
        streams: Most clients at a time.
        keepalive: Seconds after which a silent client is pinged.
        keepalive_timeout: Seconds that it has to answer.

    Raises:
        RecipeError: It cannot listen there, or not in plain text.
    """

    def __init__(
        self,
        run: str,
        listen: str,
        largest_frame: int,
        insecure: bool = False,
        say: Callable[[str], None] = lambda line: None,
        *,
        largest_queue: int = 64 * 2**20,
        streams: int = 10_000,
        keepalive: float = 40.0,
        keepalive_timeout: float = 20.0,
    ):
        identity = None if insecure else fresh_identity()
        self.certificate = identity.certificate if identity else b""
        """What clients pin, as PEM; empty in plain text."""
        self._tokens = Tokens(run)
        self._say = say
        self._largest_queue, self._most = largest_queue, streams
        self._broke = (
            "its connection broke: it stopped, the network failed, or it sent a frame of more "
            f"than {largest_frame} bytes"
        )
        self._lock = threading.Lock()
        self._streams: dict[int, Stream] = {}
        self._closed = False
        self._refused = (0.0, 0)
        self._up, self._down = [0, 0], [0, 0]
        options = limits(largest_frame, keepalive, keepalive_timeout)
        self._listener = Listener(self._serve, listen, identity, options)
        self._loop = self._listener.loop
        self._bell = Bell(self._loop)
        self._inbox = Inbox(self._bell, _UNDELIVERED)
        self.port = self._listener.port

    @property
    def traffic(self) -> Traffic:
        return Traffic(*self._up, *self._down)

    def invite(self, seat: int) -> str:
        """A token for a seat; an earlier one is void, a stream that it opened goes on."""
        return self._tokens.issue(seat)

    def send(self, seat: int, frame: bytes) -> None:
        """Send a frame; where nobody sits, nothing happens."""
        with self._lock:
            stream = self._streams.get(seat)
        if stream is not None and not stream.put(frame):
            cause = f"it does not read: more than {self._largest_queue} bytes wait for it"
            self._end(stream, End(_Code.ABORTED, cause, flush=False), cause)

    def receive(self, timeout: float) -> Event | None:
        """The next event, or None after so many seconds; 0 does not wait."""
        return None if self._closed else self._inbox.get(timeout)

    def drop(self, seat: int, reason: str, bar: bool = False) -> None:
        """Break the connection to a seat; with `bar`, for the rest of the run.

        What was sent before still goes out. What the client sent and nobody has received is
        forgotten; its leaving is an event as any other.
        """
        if bar:
            self._tokens.bar(seat)
        with self._lock:
            stream = self._streams.get(seat)
        if stream is not None:
            code = _Code.UNAUTHENTICATED if bar else _Code.ABORTED
            self._end(stream, End(code, reason, flush=True), reason)

    def close(self, reason: str) -> None:
        """End all streams after what was sent to them, within two seconds; no events come."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            streams = list(self._streams.values())
            self._streams.clear()
        for stream in streams:
            # gRPC sends no reason with OK.
            stream.finish(End(_Code.FAILED_PRECONDITION, reason, flush=True))
        self._listener.stop()

    # Within the loop

    async def _serve(self, _frames: Any, context: Any) -> None:
        """One stream, from its metadata to its end."""
        stream = await self._admit(context)
        if stream is None:
            return
        reading = asyncio.create_task(self._read(stream, context))
        writing = asyncio.create_task(self._write(stream, context))
        ended = asyncio.create_task(stream.ended.wait())
        cause = self._broke
        try:
            await asyncio.wait({reading, writing, ended}, return_when=asyncio.FIRST_COMPLETED)
            if reading.done() and reading.exception() is None:
                cause = reading.result()
            if stream.end is not None and stream.end.flush:
                await asyncio.wait({writing}, timeout=FLUSH)
        finally:
            self._end(stream, End(_Code.OK, "", flush=False), cause)
            for task in (reading, writing, ended):
                task.cancel()
            await asyncio.gather(reading, writing, ended, return_exceptions=True)
        if stream.end is not None:
            context.set_code(stream.end.code)
            context.set_details(_line(stream.end.reason))

    async def _admit(self, context: Any) -> Stream | None:
        """A stream for who has a good token; else None, and the client is told why."""
        seat = None
        try:
            run, seat, token = read_metadata(context.invocation_metadata())
            self._tokens.check(run, seat, token)
            # One that comes and goes must not pile up the news of it.
            await self._inbox.room(seat)
            stream = Stream(seat, self._bell, self._largest_queue)
            with self._lock:
                self._tokens.check(run, seat, token)
                former = self._streams.get(seat)
                full = former is None and len(self._streams) >= self._most
                if not (self._closed or full):
                    self._streams[seat] = stream
                    if former is not None:
                        former.muted = True
                        former.finish(End(_Code.ALREADY_EXISTS, _REPLACED, flush=False))
        except ProtocolError as error:
            self._refuse(context, _Code.UNAUTHENTICATED, seat, str(error))
            return None
        if self._closed or full:
            crowd = f"{self._most} clients are here, no more are let in"
            self._refuse(context, _Code.UNAVAILABLE, seat, crowd if full else "the run is over")
            return None
        if former is not None:
            self._say(f"seat {seat}: a new connection from {context.peer()} replaces the former")
        try:
            await context.send_initial_metadata((JOINED,))
        except BaseException:
            self._end(stream, End(_Code.OK, "", flush=False), self._broke)
            raise
        return stream

    def _refuse(self, context: Any, code: Any, seat: int | None, cause: str) -> None:
        context.set_code(code)
        context.set_details(cause)
        since, count = self._refused
        if time.monotonic() - since > 60:
            since, count = time.monotonic(), 0
        self._refused = since, count + 1
        who = "a stream" if seat is None else f"seat {seat}"
        if count < _REFUSALS:
            self._say(f"refused {who} from {_line(context.peer())}: {cause}")
        elif count == _REFUSALS:
            self._say(f"refused {who}; more of this minute are not listed")

    async def _read(self, stream: Stream, context: Any) -> str:
        """Deliver what comes; returns why nothing more does."""
        while True:
            await self._inbox.room(stream.seat)
            frame = await context.read()
            if frame is grpc.aio.EOF:
                # A broken connection looks the same at first, then cancels `_serve`.
                await asyncio.sleep(_HALF_CLOSED)
                return "it left"
            self._up[0] += 1
            self._up[1] += len(frame)
            self._inbox.frame(stream, frame)

    async def _write(self, stream: Stream, context: Any) -> None:
        while (frame := await stream.next()) is not None:
            await context.write(frame)
            self._down[0] += 1
            self._down[1] += len(frame)

    def _end(self, stream: Stream, end: End, cause: str) -> None:
        """From any thread, and however often: the first one counts, and is the event."""
        with self._lock:
            if not stream.finish(end):
                return
            if self._streams.get(stream.seat) is stream:
                del self._streams[stream.seat]
            # Here, so that nothing of a next stream comes before it.
            stream.muted = end.code is not _Code.OK
            self._inbox.leave(stream.seat, cause)


def _line(text: str) -> str:
    """Short enough for the metadata, and nothing in it that moves a cursor."""
    return "".join(c if c.isprintable() else " " for c in text)[:500]
