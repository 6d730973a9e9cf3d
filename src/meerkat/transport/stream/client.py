"""The client's side of a stream: connects, answers frames, and reconnects."""

from __future__ import annotations

import random
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, NamedTuple

import grpc  # type: ignore[import-untyped]

from meerkat.errors import ProtocolError
from meerkat.transport.frame import encode
from meerkat.transport.server_frames import Goodbye, Refused, decode_down
from meerkat.transport.stream.certificates import NAME
from meerkat.transport.stream.invitation import (
    JOINED,
    METHOD,
    SERVICE,
    Invitation,
    is_loopback,
    metadata,
    split_address,
)

__all__ = ["SessionOutcome", "join_session"]

_LARGEST_FRAME = 512 * 2**20
_FIRST_DELAY, _LONGEST_DELAY = 0.05, 2.0
_PATIENCE = 2.0
"""Seconds for the last frames to reach the server."""
_Code = grpc.StatusCode
_FINAL = {
    _Code.UNAUTHENTICATED: "the server refuses this invitation",
    _Code.ALREADY_EXISTS: "the server has another connection of this peer",
    _Code.RESOURCE_EXHAUSTED: "a frame is larger than the other side takes",
    _Code.UNIMPLEMENTED: "no Meerkat server of this version is there",
    _Code.FAILED_PRECONDITION: "the server ended the session",
}
"""Status codes after which a new connection would end the same way, and what they mean."""
_LAST = {encode(kind(""))[0] for kind in (Goodbye, Refused)}
"""First bytes of the frames that are the last of a session."""


@dataclass(frozen=True)
class SessionOutcome:
    """How a session ended, and its traffic."""

    why: str
    """Why it ended."""
    complete: bool
    """Did the server end it with a `Goodbye`?"""
    connections: int
    frames_received: int
    bytes_received: int
    frames_sent: int
    bytes_sent: int


class _End(NamedTuple):
    """How one connection ended."""

    why: str
    final: bool
    """Is the session over?"""
    joined: bool
    complete: bool = False


def join_session(
    session: Invitation,
    answer: Callable[[bytes], Iterable[bytes]],
    hello: Callable[[], bytes],
    say: Callable[[str], None],
    stop: threading.Event | None = None,
    *,
    retry_seconds: float = 60.0,
    keepalive: float = 30.0,
    keepalive_timeout: float = 20.0,
) -> SessionOutcome:
    """Take part in a session until it ends.

    It ends after a `Goodbye` or `Refused`, which `answer` gets first; when the server closes or
    refuses the invitation; when another server has its address; or when the server cannot be
    reached for `retry_seconds`.

    Args:
        answer: Gives the frames that answer a frame; an error in it ends the session and is raised.
        hello: Gives the first frame of a connection, once the server has accepted the token.
        say: Takes lines for a log.
        stop: Ends the session when it is set, from another thread.
        retry_seconds: How long to try to reconnect.
        keepalive: Seconds after which a silent server is pinged.
        keepalive_timeout: Seconds after which a server without an answer counts as gone.

    Raises:
        ProtocolError: The invitation is for plain text, and to another machine.
    """
    host, _ = split_address(session.address)
    if session.insecure and not is_loopback(host):
        raise ProtocolError(
            f"invitation: plain text is for loopback only, not for {session.address}; start the "
            "server without network.insecure"
        )
    options = _options(session, keepalive, keepalive_timeout)
    return _Session(session, answer, hello, say, stop or threading.Event(), options).run(
        retry_seconds
    )


class _Session:
    """The connections of a session, one after the other, and their traffic."""

    def __init__(
        self,
        invitation: Invitation,
        answer: Callable[[bytes], Iterable[bytes]],
        hello: Callable[[], bytes],
        say: Callable[[str], None],
        stop: threading.Event,
        options: list[tuple[str, Any]],
    ):
        self._invitation = invitation
        self._answer, self._hello = answer, hello
        self._say, self._stop = say, stop
        self._options = options
        self._connections = 0
        self._received, self._sent = [0, 0], [0, 0]

    def run(self, retry_seconds: float) -> SessionOutcome:
        delay, lost, silent = 0.0, time.monotonic(), False
        while True:
            began = time.monotonic()
            end = self._connect()
            now = time.monotonic()
            if end.joined:
                lost, silent = now, False
            if end.joined and now - began > _LONGEST_DELAY:
                delay = 0.0
            end = self._judge(end, now - lost, retry_seconds)
            if end.final:
                counts = (*self._received, *self._sent)
                return SessionOutcome(end.why, end.complete, self._connections, *counts)
            if not silent:
                self._say(f"no connection to {self._invitation.address} ({end.why}); trying again")
                silent = True
            # At random, so that not all clients reconnect at the same moment.
            self._stop.wait(delay * random.uniform(0.8, 1.2))
            delay = min(max(2 * delay, _FIRST_DELAY), _LONGEST_DELAY)

    def _judge(self, end: _End, gone: float, retry_seconds: float) -> _End:
        """The end of a connection, final if a new connection is of no use."""
        why = ""
        if end.final:
            return end
        if self._stop.is_set():
            why = "stopped"
        elif not end.joined and self._is_new_server():
            why = (
                f"the server at {self._invitation.address} was started anew; this invitation is "
                "void, a new one is needed"
            )
        elif gone >= retry_seconds:
            why = f"no connection to {self._invitation.address} in {retry_seconds:g} s: {end.why}"
        return end._replace(why=why, final=True) if why else end

    def _connect(self) -> _End:
        """One connection, to its end."""
        outbox: SimpleQueue[bytes | None] = SimpleQueue()
        with _channel(self._invitation, self._options) as channel:
            call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(
                iter(outbox.get, None), metadata=metadata(self._invitation)
            )
            over = threading.Event()
            watch = threading.Thread(target=self._watch, args=(call, over), daemon=True)
            watch.start()
            joined = False
            try:
                joined = JOINED in tuple(map(tuple, call.initial_metadata()))
                if joined:
                    return self._converse(call, outbox)
                next(call, None)
                return _End(*_cause(call), joined)
            except grpc.RpcError:
                return _End(*_cause(call), joined)
            finally:
                over.set()
                outbox.put(None)
                call.cancel()

    def _converse(self, call: Any, outbox: SimpleQueue[bytes | None]) -> _End:
        self._connections += 1
        if self._connections > 1:
            self._say(f"connected to {self._invitation.address} again")
        self._send(outbox, self._hello())
        for frame in call:
            self._received[0] += 1
            self._received[1] += len(frame)
            for reply in self._answer(frame):
                self._send(outbox, reply)
            if frame[:1] and frame[0] in _LAST:
                outbox.put(None)
                with suppress(grpc.FutureTimeoutError, grpc.FutureCancelledError):
                    call.exception(_PATIENCE)
                return _farewell(frame)
        return _End(*_cause(call), True)

    def _send(self, outbox: SimpleQueue[bytes | None], frame: bytes) -> None:
        self._sent[0] += 1
        self._sent[1] += len(frame)
        outbox.put(frame)

    def _watch(self, call: Any, over: threading.Event) -> None:
        """Cancel a call when `stop` is set, also while it waits for a frame."""
        while not over.wait(0.2):
            if self._stop.is_set():
                call.cancel()
                return

    def _is_new_server(self) -> bool:
        """Is there a server at the address with another certificate?"""
        if self._invitation.insecure:
            return False
        try:
            address = split_address(self._invitation.address)
            there = ssl.get_server_certificate(address, timeout=_PATIENCE)
        except (OSError, ValueError):
            return False
        pinned = self._invitation.certificate.decode()
        return ssl.PEM_cert_to_DER_cert(there) != ssl.PEM_cert_to_DER_cert(pinned)


def _farewell(frame: bytes) -> _End:
    match decode_down(frame):
        case Goodbye(reason):
            return _End(reason, True, True, True)
        case Refused(reason):
            return _End(f"refused: {reason}", True, True)
        case other:
            raise AssertionError(other)


def _cause(call: Any) -> tuple[str, bool]:
    """Why a connection ended, and whether a new one would end the same way."""
    code, details = call.code(), call.details() or ""
    line = "".join(c if c.isprintable() else " " for c in details)[:300]
    what = _FINAL.get(code, "")
    return ": ".join(filter(None, (what, line))) or code.name, bool(what)


def _channel(session: Invitation, options: list[tuple[str, Any]]) -> Any:
    host, port = split_address(session.address)
    target = f"dns:///{host}:{port}" if ":" not in host else f"ipv6:%5B{host}%5D:{port}"
    if session.insecure:
        return grpc.insecure_channel(target, options)
    credentials = grpc.ssl_channel_credentials(session.certificate)
    return grpc.secure_channel(target, credentials, options)


def _options(session: Invitation, keepalive: float, timeout: float) -> list[tuple[str, Any]]:
    host, _ = split_address(session.address)
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", _LARGEST_FRAME),
        ("grpc.max_send_message_length", -1),
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.enable_retries", 0),
        # Channels share no subchannel: a shared one delays a connection by its own backoff.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.min_reconnect_backoff_ms", 10_000),
        ("grpc.enable_http_proxy", 0 if is_loopback(host) else 1),
        ("grpc.keepalive_time_ms", round(1000 * keepalive)),
        ("grpc.keepalive_timeout_ms", round(1000 * timeout)),
        ("grpc.http2.ping_timeout_ms", round(1000 * timeout)),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    if not session.insecure:
        options.append(("grpc.ssl_target_name_override", NAME))
    return options
