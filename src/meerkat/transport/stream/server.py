"""The server's side of the streams: admits clients, sends frames, and gives events."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc  # type: ignore[import-untyped]

from meerkat.errors import ProtocolError
from meerkat.transport.base import Event
from meerkat.transport.server_frames import Setup
from meerkat.transport.stream.certificates import fresh_identity
from meerkat.transport.stream.invitation import JOINED, read_metadata
from meerkat.transport.stream.listening import FLUSH, Listener, limits
from meerkat.transport.stream.queues import Bell, End, Inbox, Stream
from meerkat.transport.stream.tokens import Tokens

__all__ = ["StreamHub", "Traffic"]

_UNDELIVERED = 16
"""Frames of one peer that are read before `receive` returns them."""
_HALF_CLOSED = 0.1
"""Seconds after the end of a client's frames in which gRPC reports a broken connection."""
_REFUSALS = 60
"""Most log lines about refused streams in one minute."""
_REPLACED = "a new connection of this peer replaced it"
_Code = grpc.StatusCode


@dataclass(frozen=True)
class Traffic:
    """Frames sent and received, and their bytes without the overhead of gRPC and TLS."""

    frames_up: int = 0
    bytes_up: int = 0
    frames_down: int = 0
    bytes_down: int = 0


class StreamHub:
    """A `Transport` over gRPC: one bidirectional stream for each peer, one frame a message.

    Run, peer and token are checked before any frame of a stream is read. A second stream of a peer
    replaces the first, whose connection may be broken without this side having noticed.

    The memory that a client can take is limited: at most 16 of its frames wait to be received, a
    frame that is too large is refused by its announced length, and a client that does not read is
    dropped.

    Args:
        listen: host:port; port 0 takes a free one.
        largest_frame: Bytes that a client may send in one frame.
        insecure: Plain text; on loopback only.
        say: Takes lines for a log, from any thread.
        largest_queue: Bytes that may wait to be sent to one client, not counting the largest frame.
        streams: Most clients at a time.
        keepalive: Seconds after which a silent client is pinged.
        keepalive_timeout: Seconds after which a client without an answer is disconnected.

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
        """The server's, as PEM; empty in plain text."""
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

    def invite(self, peer: int) -> str:
        """A new token for a peer. An earlier one is void; a stream opened with it goes on."""
        return self._tokens.issue(peer)

    def send(self, peer: int, frame: bytes) -> None:
        """Send a frame; it is discarded if the peer is not connected."""
        with self._lock:
            stream = self._streams.get(peer)
        if stream is not None and not stream.put(frame):
            cause = f"it does not read: more than {self._largest_queue} bytes wait for it"
            self._end(stream, End(_Code.ABORTED, cause, flush=False), cause)

    def receive(self, timeout: float) -> Event | None:
        """The next event, or None after so many seconds; 0 does not wait."""
        return None if self._closed else self._inbox.get(timeout)

    def introduce(self, setup: Setup) -> None:
        """Nothing to do: peers get the setup with their invitation, from whoever invites them."""

    def drop(self, peer: int, reason: str, bar: bool = False) -> None:
        """Disconnect a peer; with `bar`, it cannot connect again in this run.

        Frames that were queued for it are still sent. Frames from it that are not yet received are
        discarded. That it disconnected is an event.
        """
        if bar:
            self._tokens.bar(peer)
        with self._lock:
            stream = self._streams.get(peer)
        if stream is not None:
            code = _Code.UNAUTHENTICATED if bar else _Code.ABORTED
            self._end(stream, End(code, reason, flush=True), reason)

    def close(self, reason: str) -> None:
        """End all streams once their queued frames are sent, within two seconds; no more events."""
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
        """The stream of a client with a valid token; None if it is refused, with the reason."""
        peer = None
        try:
            run, peer, token = read_metadata(context.invocation_metadata())
            self._tokens.check(run, peer, token)
            # A peer that connects again and again must not fill the inbox.
            await self._inbox.wait_for_capacity(peer)
            stream = Stream(peer, self._bell, self._largest_queue)
            with self._lock:
                self._tokens.check(run, peer, token)
                former = self._streams.get(peer)
                full = former is None and len(self._streams) >= self._most
                if not (self._closed or full):
                    self._streams[peer] = stream
                    if former is not None:
                        former.muted = True
                        former.finish(End(_Code.ALREADY_EXISTS, _REPLACED, flush=False))
        except ProtocolError as error:
            self._refuse(context, _Code.UNAUTHENTICATED, peer, str(error))
            return None
        if self._closed or full:
            crowd = f"{self._most} clients are here, no more are let in"
            self._refuse(context, _Code.UNAVAILABLE, peer, crowd if full else "the run is over")
            return None
        if former is not None:
            self._say(f"peer {peer}: a new connection from {context.peer()} replaces the former")
        try:
            await context.send_initial_metadata((JOINED,))
        except BaseException:
            self._end(stream, End(_Code.OK, "", flush=False), self._broke)
            raise
        return stream

    def _refuse(self, context: Any, code: Any, peer: int | None, cause: str) -> None:
        context.set_code(code)
        context.set_details(cause)
        since, count = self._refused
        if time.monotonic() - since > 60:
            since, count = time.monotonic(), 0
        self._refused = since, count + 1
        who = "a stream" if peer is None else f"peer {peer}"
        if count < _REFUSALS:
            self._say(f"refused {who} from {_line(context.peer())}: {cause}")
        elif count == _REFUSALS:
            self._say(f"refused {who}; more of this minute are not listed")

    async def _read(self, stream: Stream, context: Any) -> str:
        """Put frames into the inbox until the stream ends; returns why it ended."""
        while True:
            await self._inbox.wait_for_capacity(stream.peer)
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
        """End a stream, from any thread; only its first end counts and becomes an event."""
        with self._lock:
            if not stream.finish(end):
                return
            if self._streams.get(stream.peer) is stream:
                del self._streams[stream.peer]
            # Within the lock: this event must precede all events of the peer's next stream.
            stream.muted = end.code is not _Code.OK
            self._inbox.leave(stream.peer, cause)


def _line(text: str) -> str:
    """One line without control characters, short enough for the metadata."""
    return "".join(c if c.isprintable() else " " for c in text)[:500]
