"""Streams: who gets in, what arrives, and that no client can stop or swell the server."""

from __future__ import annotations

import hmac
import json
import logging
import os
import queue
import re
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meerkat.errors import ProtocolError, RecipeError
from meerkat.transport import stream as streaming
from meerkat.transport.base import Event, Transport
from meerkat.transport.frame import encode
from meerkat.transport.server_frames import Goodbye, Refused
from meerkat.transport.stream import Invitation, SessionOutcome, StreamHub, Tokens, join_session
from meerkat.transport.stream import server as hub_module
from meerkat.transport.stream.certificates import fresh_identity
from meerkat.transport.stream.invitation import is_loopback, metadata, read_metadata, split_address

HELLO = b"hello"
GOODBYE = encode(Goodbye("the run is over"))
RUN = "run"
MIB = 2**20
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
IDENTITY = fresh_identity()
STRANGER = fresh_identity()
LONG = 60.0
"""Seconds: what a wait may take on a machine that is busy with something else."""
SOON = 30.0
"""Seconds: what is to happen without a timeout of gRPC or of this package, the least a minute."""


# What the tests are made of


class Hub(StreamHub):
    """A hub that keeps its log lines and its tokens."""

    def __init__(self, insecure: bool = False, **options: Any):
        self.lines: list[str] = []
        self.tokens: list[str] = []
        largest = options.pop("largest_frame", MIB)
        listen = options.pop("listen", "127.0.0.1:0")
        super().__init__(RUN, listen, largest, insecure, self.lines.append, **options)

    def invitation(self, peer: int = 0, port: int | None = None) -> Invitation:
        self.tokens.append(self.invite(peer))
        address = f"127.0.0.1:{port or self.port}"
        return Invitation(
            address, self.certificate, not self.certificate, RUN, peer, self.tokens[-1]
        )

    def take(self, peer: int, frame: bytes | None, timeout: float = LONG) -> str:
        """The next event must be this one."""
        event = self.receive(timeout)
        assert event is not None, f"no event in {timeout} s; {self.lines}"
        assert (event.peer, event.frame) == (peer, frame), (event, self.lines)
        return event.cause


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    """What is closed after a test, last first."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def make_hub(opened: ExitStack) -> Callable[..., Hub]:
    def make(**options: Any) -> Hub:
        hub = Hub(**options)
        opened.callback(hub.close, "the test is over")
        return hub

    return make


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken connection has the time to show that it is one, however busy the machine is."""
    monkeypatch.setattr(hub_module, "_HALF_CLOSED", 5.0)


def echo(frame: bytes) -> Iterable[bytes]:
    return () if frame == GOODBYE else (b"echo " + frame,)


class Member:
    """`join_session` in a thread."""

    def __init__(
        self,
        session: Invitation,
        answer: Callable[[bytes], Iterable[bytes]] = echo,
        stop: threading.Event | None = None,
        **options: Any,
    ):
        self.lines: list[str] = []
        self.hellos = 0
        self._outcome: queue.SimpleQueue[SessionOutcome | BaseException] = queue.SimpleQueue()

        def hello() -> bytes:
            self.hellos += 1
            return HELLO

        def run() -> None:
            try:
                say = self.lines.append
                self._outcome.put(join_session(session, answer, hello, say, stop, **options))
            except BaseException as error:
                self._outcome.put(error)

        threading.Thread(target=run, daemon=True).start()

    def end(self, timeout: float = LONG) -> SessionOutcome:
        outcome = self._outcome.get(timeout=timeout)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


class Bare:
    """A bare stream: sends what it is given, reads when the test asks for it."""

    def __init__(self, session: Invitation, frames: Iterable[bytes] = (), **options: Any):
        credentials = grpc.ssl_channel_credentials(session.certificate or None)
        settings = [("grpc.ssl_target_name_override", "meerkat")]
        self.channel = (
            grpc.insecure_channel(session.address)
            if session.insecure
            else grpc.secure_channel(session.address, credentials, settings)
        )
        self.outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        for frame in frames:
            self.outbox.put(frame)
        options = {"metadata": metadata(session), "timeout": 20, **options}
        join = self.channel.stream_stream("/meerkat.Stream/Join")
        self.call = join(options.pop("iterator", iter(self.outbox.get, None)), **options)

    def close(self) -> None:
        self.outbox.put(None)
        self.call.cancel()
        self.channel.close()

    def refusal(self) -> tuple[grpc.StatusCode, str]:
        with suppress(grpc.RpcError):
            for _ in self.call:
                pytest.fail("a frame came to a stream that is to be refused")
        self.close()
        return self.call.code(), self.call.details()


def literal(name: bytes, value: bytes) -> bytes:
    """A header in HPACK, spelled out."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def h2(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    """A frame of HTTP/2."""
    return (
        struct.pack(">I", len(body))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + body
    )


def raw_stream(session: Invitation) -> socket.socket:
    """A stream by hand, up to its first message; short run names only, and in plain text."""
    headers = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", b"/meerkat.Stream/Join"),
        (b":authority", b"meerkat"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        (b"meerkat-run-bin", b"cnVu"),
        (b"meerkat-peer", str(session.peer).encode()),
        (b"meerkat-token", session.token.encode()),
    ]
    connection = socket.create_connection(split_address(session.address), timeout=10)
    block = b"".join(literal(*header) for header in headers)
    connection.sendall(PREFACE + h2(4, 0, 0, b"") + h2(1, 4, 1, block))
    return connection


def message(length: int, content: bytes) -> bytes:
    """A message of gRPC that announces a length."""
    return h2(0, 0, 1, b"\0" + struct.pack(">I", length) + content)


def read_until(connection: socket.socket, text: bytes) -> bytes:
    got = b""
    while text not in got and (part := connection.recv(65536)):
        got += part
    return got


class Relay:
    """TCP between client and server that can be cut, also after so many bytes to the server."""

    def __init__(self, port: int, cut_after: int | None = None):
        self.target = port
        self.cut_after = cut_after
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self._frozen: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def freeze(self) -> None:
        """Carry nothing more between those that are connected, and tell none of them."""
        self._frozen = set(self._open)

    def cut(self) -> None:
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        self.cut()
        for thread in self._threads[1:]:
            thread.join()
        for end in self._open:
            end.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self.target))
                except OSError:
                    near.close()
                    continue
                self._open += [near, far]
                limit, self.cut_after = self.cut_after, None
                for source, sink, most in ((near, far, limit), (far, near, None)):
                    self._start(self._pump, source, sink, most)

    def _start(self, function: Callable[..., None], *args: Any) -> None:
        self._threads.append(threading.Thread(target=function, args=args, daemon=True))
        self._threads[-1].start()

    def _pump(self, source: socket.socket, sink: socket.socket, most: int | None) -> None:
        left = most if most is not None else float("inf")
        with suppress(OSError):
            while left and (part := source.recv(int(min(left, 65536)))):
                if source not in self._frozen:
                    sink.sendall(part)
                left -= len(part)
        if source in self._frozen:
            return
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


CLIENT = """
import sys
from meerkat.transport.stream import Invitation, join_session
session = Invitation.decode(sys.stdin.buffer.read())
join_session(session, lambda frame: [b"echo " + frame], lambda: b"hello", print,
          keepalive=1.0, keepalive_timeout=10.0)
"""


@pytest.fixture
def start_client(opened: ExitStack) -> Callable[[Invitation], int]:
    """A client in a process of its own; its process id."""

    def start(session: Invitation) -> int:
        process = subprocess.Popen([sys.executable, "-c", CLIENT], stdin=subprocess.PIPE)
        opened.callback(process.wait, LONG)
        opened.callback(process.kill)
        assert process.stdin is not None
        process.stdin.write(session.encode())
        process.stdin.close()
        return process.pid

    return start


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def until(condition: Callable[[], object], seconds: float = LONG) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def drain(hub: StreamHub, seconds: float = 0.3) -> list[Event]:
    return list(iter(lambda: hub.receive(seconds), None))


# Frames


@pytest.mark.parametrize("insecure", [True, False])
def test_hello_comes_first_and_frames_keep_their_order(make_hub, insecure):
    hub: Transport = make_hub(insecure=insecure)
    member = Member(hub.invitation(2**64 - 1))
    peer = 2**64 - 1
    hub.take(peer, HELLO)
    frames = [bytes([128]) * n for n in (1, 0, 24, 70_000, 3, 5_000_000)]
    frames += [b"%d" % n for n in range(200)]
    for frame in frames[:-1]:
        hub.send(peer, frame)
    hub.send(peer, frames[-1])
    for frame in frames:
        if len(frame) < MIB - 5:
            hub.take(peer, b"echo " + frame)
        else:  # its echo is more than a client may send
            break
    assert "1048576" in hub.take(peer, None)
    assert "larger" in member.end().why


def test_meter_counts_frames_and_their_bytes_alone(make_hub):
    hub = make_hub()
    member = Member(hub.invitation())
    hub.take(0, HELLO)
    for _ in range(3):
        hub.send(0, b"12345")
        hub.take(0, b"echo 12345")
    hub.send(0, GOODBYE)
    summary = member.end()
    hub.take(0, None)
    assert asdict(hub.traffic) == {
        "frames_up": 4,
        "bytes_up": 5 + 3 * 10,
        "frames_down": 4,
        "bytes_down": 15 + len(GOODBYE),
    }
    assert summary == SessionOutcome("the run is over", True, 1, 4, 15 + len(GOODBYE), 4, 35)


def test_answers_go_out_one_by_one_and_the_last_ones_too(make_hub):
    hub = make_hub()
    released = threading.Event()

    def answer(frame: bytes) -> Iterable[bytes]:
        yield b"first of " + frame[1:]
        if frame != GOODBYE:
            assert released.wait(LONG)
        yield b"second"

    member = Member(hub.invitation(), answer)
    hub.take(0, HELLO)
    hub.send(0, b"x")
    hub.take(0, b"first of ")
    released.set()
    hub.take(0, b"second")
    hub.send(0, GOODBYE)
    hub.take(0, b"first of the run is over")
    hub.take(0, b"second")
    assert hub.take(0, None) == "it left"
    assert member.end().complete


def test_refused_frame_ends_the_session(make_hub):
    hub = make_hub()
    seen: list[bytes] = []
    member = Member(hub.invitation(), lambda frame: seen.append(frame) or ())
    hub.take(0, HELLO)
    hub.send(0, encode(Refused("another model")))
    summary = member.end()
    assert (summary.why, summary.complete) == ("refused: another model", False)
    assert seen == [encode(Refused("another model"))]


@pytest.mark.usefixtures("patient")
def test_an_exception_of_answer_comes_out_and_ends_the_stream(make_hub):
    hub = make_hub()

    def answer(frame: bytes) -> Iterable[bytes]:
        raise ZeroDivisionError(frame)

    member = Member(hub.invitation(), answer)
    hub.take(0, HELLO)
    hub.send(0, b"x")
    with pytest.raises(ZeroDivisionError):
        member.end()
    assert "broke" in hub.take(0, None)


def test_stop_ends_a_waiting_client(make_hub):
    hub, stop = make_hub(), threading.Event()
    member = Member(hub.invitation(), stop=stop)
    hub.take(0, HELLO)
    stop.set()
    assert member.end().why == "stopped"
    hub.take(0, None)


def test_a_peer_that_is_not_connected(make_hub):
    hub = make_hub()
    hub.send(5, b"x")
    hub.drop(5, "why not")
    assert hub.receive(0) is None
    began = time.monotonic()
    assert hub.receive(0.2) is None
    assert 0.15 < time.monotonic() - began < SOON


# Who may join


def changed(hub: Hub, **changes: Any) -> tuple[tuple[str, str | bytes], ...]:
    return metadata(replace(hub.invitation(), **changes))


WRONG: dict[str, tuple[Callable[[Hub], Iterable[tuple[str, str | bytes]]], str]] = {
    "token": (lambda hub: changed(hub, token="A" * 43), "peer 0.* token"),
    "old": (lambda hub: [changed(hub), hub.invite(0)][0], "peer 0.* token"),
    "of another peer": (lambda hub: changed(hub, token=hub.invite(1)), "peer 0.* token"),
    "peer": (lambda hub: changed(hub, peer=7), "peer 7.*not invited"),
    "run": (lambda hub: changed(hub, run="ruin"), "peer 0.*another run"),
    "barred": (lambda hub: [changed(hub), hub.drop(0, "", True)][0], "peer 0.*barred"),
    "barred, invited again": (lambda hub: [hub.drop(0, "", True), changed(hub)][1], "barred"),
    "nothing": (lambda hub: (), "a stream.*presents no"),
    "twice": (lambda hub: changed(hub) * 2, "a stream.*twice"),
    "no number": (
        lambda hub: [*changed(hub)[:1], ("meerkat-peer", "-0"), *changed(hub)[2:]],
        "numb",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_refused_before_a_frame_is_read_and_no_log_has_the_token(make_hub, caplog, case):
    caplog.set_level(logging.DEBUG)
    hub = make_hub()
    session = hub.invitation()
    given, expected = WRONG[case]
    stranger = Bare(session, [HELLO], metadata=tuple(given(hub)))
    code, cause = stranger.refusal()
    assert code is grpc.StatusCode.UNAUTHENTICATED
    until(lambda: hub.lines)
    (line,) = hub.lines
    assert re.search(expected, line)
    assert "127.0.0.1" in line
    assert cause in line
    everything = cause + repr(hub.lines) + caplog.text + repr(session)
    everything += repr({**vars(hub), **vars(hub._tokens), "tokens": None})
    assert not [token for token in (*hub.tokens, "A" * 43) if token in everything]
    assert hub.receive(0.05) is None
    assert hub.traffic.frames_up == 0


def test_a_refused_client_leaves_at_once(make_hub):
    hub = make_hub()
    session = hub.invitation()
    hub.invite(0)
    member = Member(session)
    summary = member.end(SOON)
    assert "last invitation" in summary.why
    assert (summary.complete, summary.connections, member.hellos) == (False, 0, 0)


def test_a_token_is_compared_in_constant_time_even_for_an_unknown_peer(monkeypatch):
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    tokens = Tokens(RUN)
    token = tokens.issue(1)
    tokens.check(RUN, 1, token)
    known = len(compared)
    for run, peer in ((RUN, 2), ("other", 1), ("other", 2)):
        with pytest.raises(ProtocolError):
            tokens.check(run, peer, token)
    assert len(compared) == 4 * known == 8
    assert token.encode() not in {value for pair in compared for value in pair}


def test_tokens_are_secret_and_each_is_fresh():
    tokens = Tokens(RUN)
    issued = {tokens.issue(peer) for peer in (1, 1, 2, 3)}
    assert len(issued) == 4
    assert all(len(token) >= 43 for token in issued)
    assert not [token for token in issued if token in repr(tokens) + repr(vars(tokens))]


def test_a_token_of_the_empty_string_opens_nothing():
    tokens = Tokens(RUN)
    with pytest.raises(ProtocolError, match="not invited"):
        tokens.check(RUN, 0, "")
    tokens.issue(0)
    with pytest.raises(ProtocolError, match="token"):
        tokens.check(RUN, 0, "")


@settings(max_examples=200, deadline=None)
@given(st.text(), st.integers(), st.text(), st.text())
def test_only_what_was_issued_passes(run, peer, token, other):
    tokens = Tokens(run)
    good = tokens.issue(peer)
    tokens.check(run, peer, good)
    for wrong in ((run, peer, token), (run, peer + 1, good), (run + "x", peer, good)):
        with pytest.raises(ProtocolError) as caught:
            tokens.check(*wrong)
        assert good not in str(caught.value)


@pytest.mark.parametrize(
    "listen", ["0.0.0.0:0", "[::]:0", "example.org:80", "127.0.0.1.example.org:1", "0:0", "127.1:0"]
)
def test_server_refuses_plain_text_off_loopback(listen):
    with pytest.raises(RecipeError, match=r"network\.insecure.*network\.listen"):
        Hub(insecure=True, listen=listen)


@pytest.mark.parametrize("listen", ["", "127.0.0.1", ":1", "::1:0", "127.0.0.1:70000", "unix:x"])
def test_server_refuses_an_address_that_is_none(listen):
    with pytest.raises(RecipeError, match=r"network\.listen"):
        Hub(listen=listen)


def test_a_taken_port_is_refused(make_hub):
    hub = make_hub()
    with pytest.raises(RecipeError, match=r"network\.listen.*taken"):
        Hub(listen=f"127.0.0.1:{hub.port}")


def test_client_refuses_plain_text_off_loopback():
    session = Invitation("192.0.2.1:9", b"", True, RUN, 0, "A" * 43)
    with pytest.raises(ProtocolError, match="plain text"):
        join_session(session, echo, lambda: HELLO, print)
    assert [is_loopback(h) for h in ("127.0.0.1", "::1", "localhost", "127.9.9.9")] == [True] * 4
    assert not any(map(is_loopback, ("0.0.0.0", "127.0.0.1.org", "10.0.0.1", "::", "local", "")))


def test_a_client_joins_no_server_but_the_one_of_its_invitation(make_hub):
    """Also one whose owner answers for it with a certificate of the same name."""
    hub = make_hub()
    session = replace(hub.invitation(), certificate=STRANGER.certificate)
    began = time.monotonic()
    summary = Member(session).end()
    assert summary.why.startswith(f"the server at 127.0.0.1:{hub.port} was started anew;")
    assert time.monotonic() - began < SOON
    assert summary.connections == 0
    code, _ = Bare(session, [HELLO]).refusal()
    assert code is grpc.StatusCode.UNAVAILABLE
    assert hub.receive(0.05) is None


def test_too_many_clients(make_hub):
    hub = make_hub(streams=1)
    first = Bare(hub.invitation(0), [HELLO])
    hub.take(0, HELLO)
    code, cause = Bare(hub.invitation(1), [HELLO]).refusal()
    assert (code, "1 clients" in cause) == (grpc.StatusCode.UNAVAILABLE, True)
    again = Bare(hub.invitation(0), [HELLO])  # takes its own place
    hub.take(0, HELLO)
    for bare in (first, again):
        bare.close()
    hub.take(0, None)


def test_refusals_do_not_fill_the_log(make_hub):
    hub = make_hub(insecure=True)
    session = hub.invitation()
    with grpc.insecure_channel(session.address) as channel:
        for _ in range(70):
            call = channel.stream_stream("/meerkat.Stream/Join")(iter(()))
            assert call.code() is grpc.StatusCode.UNAUTHENTICATED
    assert len(hub.lines) == 61
    assert "not listed" in hub.lines[-1]


def test_metadata_of_any_size_is_not_held(make_hub):
    hub = make_hub(insecure=True)
    session = hub.invitation()
    huge = Bare(session, [HELLO], metadata=(*metadata(session), ("x", "y" * 9_000)))
    assert huge.refusal()[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not [event for event in drain(hub, 0.2) if event.frame is not None]


# Connections that end


class Waits(threading.Event):
    """Keeps how long it was waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.seconds.append(timeout)
        return super().wait(timeout)


@pytest.mark.usefixtures("patient")
def test_a_connection_cut_within_a_frame_comes_back(make_hub, opened):
    hub, stop = make_hub(), Waits()
    relay = Relay(hub.port, cut_after=300_000)
    opened.callback(relay.close)
    large = b"f" * 900_000
    invitation = hub.invitation(port=relay.port)
    member = Member(invitation, lambda f: [large] if f == b"x" else echo(f), stop)
    hub.take(0, HELLO)
    hub.send(0, b"x")
    assert "its connection broke" in hub.take(0, None)
    hub.take(0, HELLO)
    assert stop.seconds == [0.0], "it is to come back at once"
    hub.send(0, b"x")
    hub.take(0, large)
    hub.send(0, GOODBYE)
    summary = member.end()
    assert (summary.complete, summary.connections, member.hellos) == (True, 2, 2)
    assert "trying again" in member.lines[0]
    assert "again" in member.lines[1]


@pytest.mark.slow
def test_a_connection_that_is_lost_without_a_word_is_replaced(make_hub, opened):
    """The server still believes in the first one; that must not lock the client out."""
    hub = make_hub()
    relay = Relay(hub.port)
    opened.callback(relay.close)
    timing = {"keepalive": 1.0, "keepalive_timeout": 3.0}
    member = Member(hub.invitation(port=relay.port), **timing)
    hub.take(0, HELLO)
    assert hub.receive(2) is None
    relay.freeze()
    hub.take(0, HELLO)
    hub.send(0, b"x")
    hub.take(0, b"echo x")
    hub.send(0, GOODBYE)
    assert member.end().connections == 2


def test_a_client_gives_up_after_a_while(make_hub, opened):
    hub = make_hub(insecure=True)
    relay = Relay(hub.port)
    opened.callback(relay.close)
    member = Member(hub.invitation(port=relay.port), retry_seconds=1.0)
    hub.take(0, HELLO)
    relay.target = 1
    began = time.monotonic()
    relay.cut()
    summary = member.end()
    assert 1.0 <= time.monotonic() - began < SOON
    assert "in 1 s" in summary.why
    assert len(member.lines) == 1, "one line for a lost connection, not one for each attempt"


def test_a_client_notices_that_the_server_was_started_anew(make_hub, opened):
    former, anew = make_hub(), make_hub()
    relay = Relay(former.port)
    opened.callback(relay.close)
    member = Member(former.invitation(port=relay.port))
    former.take(0, HELLO)
    relay.target = anew.port
    began = time.monotonic()
    relay.cut()
    summary = member.end()
    assert time.monotonic() - began < SOON
    assert summary.why == (
        f"the server at 127.0.0.1:{relay.port} was started anew; this invitation is void, a new "
        "one is needed"
    )


def test_a_dropped_client_gets_what_was_sent_before_and_may_return(make_hub):
    hub = make_hub()
    seen: list[bytes] = []
    member = Member(hub.invitation(), lambda frame: seen.append(frame) or ())
    hub.take(0, HELLO)
    hub.send(0, b"one")
    hub.send(0, b"two" * 100_000)
    hub.drop(0, "a bad report")
    hub.drop(0, "and again")
    assert hub.take(0, None) == "a bad report"
    hub.take(0, HELLO)
    assert seen == [b"one", b"two" * 100_000]
    hub.drop(0, "enough", bar=True)
    assert hub.take(0, None) == "enough"
    assert "enough" in member.end().why
    assert hub.receive(0.1) is None


def test_frames_of_a_dropped_client_are_forgotten(make_hub):
    hub = make_hub(insecure=True)
    bare = Bare(hub.invitation(), [b"one", b"two", b"three"])
    hub.take(0, b"one")
    until(lambda: hub.traffic.frames_up == 3)
    hub.drop(0, "a bad frame")
    assert hub.take(0, None) == "a bad frame"
    assert hub.receive(0.1) is None
    bare.close()


def test_a_new_stream_replaces_the_former_of_its_peer(make_hub):
    hub = make_hub()
    session = hub.invitation(3)
    former = Bare(session, [b"former"])
    hub.take(3, b"former")
    former.outbox.put(b"not delivered")
    until(lambda: hub.traffic.frames_up == 2)
    anew = Bare(session, [b"anew"])
    until(lambda: hub.lines)
    hub.take(3, b"anew")
    assert former.refusal()[0] is grpc.StatusCode.ALREADY_EXISTS
    assert hub.receive(0.2) is None, "the peer has not left"
    assert "replaces" in hub.lines[0]
    hub.send(3, b"for whom?")
    assert next(anew.call) == b"for whom?"
    anew.close()
    hub.take(3, None)
    assert hub.receive(0.2) is None


def test_a_client_that_was_replaced_does_not_come_back(make_hub):
    hub = make_hub()
    session = hub.invitation()
    member = Member(session)
    hub.take(0, HELLO)
    anew = Bare(session, [b"anew"])
    hub.take(0, b"anew")
    assert "another connection" in member.end().why
    anew.close()


@pytest.mark.usefixtures("patient")
def test_a_killed_client_is_an_event_and_another_may_take_its_place(make_hub, start_client):
    hub = make_hub()
    session = hub.invitation()
    pid = start_client(session)
    hub.take(0, HELLO)
    os.kill(pid, signal.SIGKILL)
    assert "it stopped" in hub.take(0, None)
    member = Member(session)
    hub.take(0, HELLO)
    hub.send(0, GOODBYE)
    assert member.end().complete


@pytest.mark.slow
@pytest.mark.usefixtures("patient")
def test_a_client_that_stands_still_is_noticed_and_returns(make_hub, start_client):
    hub = make_hub(keepalive=0.5, keepalive_timeout=3.0)
    pid = start_client(hub.invitation())
    hub.take(0, HELLO)
    assert hub.receive(2) is None, "a client that answers pings stays"
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    assert "its connection broke" in hub.take(0, None)
    assert time.monotonic() - began < SOON
    os.kill(pid, signal.SIGCONT)
    hub.take(0, HELLO)
    hub.send(0, b"x")
    hub.take(0, b"echo x")


def test_close_sends_what_waits(make_hub):
    hub = make_hub()
    seen: list[bytes] = []

    def slowly(frame: bytes) -> Iterable[bytes]:
        time.sleep(0.02)
        seen.append(frame)
        return ()

    members = [Member(hub.invitation(peer), slowly) for peer in range(3)]
    assert {hub.receive(LONG).peer for _ in members} == {0, 1, 2}
    for peer in range(3):
        for _ in range(10):
            hub.send(peer, b"f" * 500_000)
        hub.send(peer, GOODBYE)
    hub.close("over")
    assert [member.end().why for member in members] == ["the run is over"] * 3
    assert sum(map(len, seen)) == 3 * (5_000_000 + len(GOODBYE))
    hub.close("again")
    hub.send(0, b"x")
    hub.drop(0, "x")
    assert hub.receive(0) is None


def test_close_does_not_wait_for_who_does_not_read(make_hub):
    hub = make_hub()
    bare = Bare(hub.invitation(), [HELLO])
    hub.take(0, HELLO)
    for _ in range(60):
        hub.send(0, b"f" * 1_000_000)
    bare.outbox.put(b"nobody takes it")
    until(lambda: hub.traffic.frames_up == 2)
    began = time.monotonic()
    hub.close("over")
    assert time.monotonic() - began < SOON
    assert hub.receive(0) is None
    bare.close()


def test_a_dropped_client_that_does_not_read_is_not_waited_for(make_hub, monkeypatch):
    monkeypatch.setattr(hub_module, "FLUSH", 0.2)
    hub = make_hub()
    bare = Bare(hub.invitation(), [HELLO])
    hub.take(0, HELLO)
    for _ in range(60):
        hub.send(0, b"f" * 1_000_000)
    hub.drop(0, "too slow")
    assert hub.take(0, None) == "too slow"
    time.sleep(2.5)
    read = []
    with pytest.raises(grpc.RpcError):
        read.extend(bare.call)
    assert len(read) < 60
    assert bare.call.code() is grpc.StatusCode.ABORTED
    bare.close()


def test_a_server_that_closes_without_goodbye_ends_the_session(make_hub):
    hub = make_hub()
    member = Member(hub.invitation())
    hub.take(0, HELLO)
    hub.close("it failed")
    summary = member.end(SOON)
    assert (summary.why, summary.complete) == ("the server ended the session: it failed", False)


# What clients and strangers may do to the server


@pytest.mark.parametrize("insecure", [True, False])
def test_garbage_on_the_port_harms_nobody(make_hub, opened, insecure):
    hub = make_hub(insecure=insecure)
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname="meerkat").do_handshake()
    garbage = [
        os.urandom(5000),
        b"\0" * 5000,
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        outgoing.read(),
        PREFACE[:12],
        PREFACE + h2(4, 0, 0, b"") + h2(0, 0, 7, b"x" * 99),
        PREFACE + os.urandom(5000),
        b"",
    ]
    member = Member(hub.invitation(0))
    hub.take(0, HELLO)
    for content in garbage:
        connection = opened.enter_context(socket.create_connection(("127.0.0.1", hub.port)))
        with suppress(OSError):
            connection.sendall(content)
        hub.send(0, b"still here")
        hub.take(0, b"echo still here")
    later = Member(hub.invitation(1))
    hub.take(1, HELLO)
    for peer in (0, 1):
        hub.send(peer, GOODBYE)
    assert member.end().complete
    assert later.end().complete


@pytest.mark.usefixtures("patient")
def test_half_a_frame_is_no_frame(make_hub):
    hub = make_hub(insecure=True)
    with raw_stream(hub.invitation()) as connection:
        connection.sendall(message(3, b"abc") + message(1000, b"half"))
        hub.take(0, b"abc")
        assert hub.receive(0.1) is None
    assert "its connection broke" in hub.take(0, None)


@pytest.mark.usefixtures("patient")
def test_a_frame_is_refused_by_its_announced_length(make_hub):
    hub = make_hub(insecure=True)
    before = resident()
    for _ in range(8):
        with raw_stream(hub.invitation()) as connection:
            connection.sendall(message(3, b"abc") + message(2**30, b"x" * 10_000))
            answer = read_until(connection, b"larger than max")
            assert b"larger than max (1073741824 vs. 1048576)" in answer
        hub.take(0, b"abc")
        assert "more than 1048576 bytes" in hub.take(0, None)
    assert resident() - before < 8 * MIB


LARGE = """
import sys
from meerkat.transport.stream import Invitation, join_session
session = Invitation.decode(sys.stdin.buffer.read())
print(join_session(session, lambda frame: [bytes(64 * 2**20)], lambda: b"hello", print).why)
"""


@pytest.mark.usefixtures("patient")
def test_a_large_frame_of_a_real_client_is_refused(make_hub):
    hub = make_hub()
    process = subprocess.Popen(
        [sys.executable, "-c", LARGE], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdin.write(hub.invitation().encode())
    process.stdin.close()
    hub.take(0, HELLO)
    before = resident()
    hub.send(0, b"x")
    assert "more than 1048576 bytes" in hub.take(0, None)
    assert resident() - before < 16 * MIB
    with process.stdout:
        assert b"a frame is larger than the other side takes" in process.stdout.read()
    assert process.wait(LONG) == 0


def test_what_is_small_only_while_it_is_packed_is_refused(make_hub):
    hub = make_hub(insecure=True)
    packed = Bare(hub.invitation(), [bytes(MIB // 2)], compression=grpc.Compression.Gzip)
    hub.take(0, None)
    with pytest.raises(grpc.RpcError):
        next(packed.call)
    packed.close()
    assert hub.traffic.frames_up == 0


def test_a_flood_waits_at_the_client(make_hub):
    hub = make_hub(insecure=True)
    sent = 0

    def flood() -> Iterator[bytes]:
        nonlocal sent
        while sent < 1_000_000:
            sent += 1
            yield b"%d" % sent

    other = Member(hub.invitation(1))
    hub.take(1, HELLO)
    bare = Bare(hub.invitation(0), iterator=flood())
    before = resident()
    until(lambda: hub.traffic.frames_up >= 17)
    time.sleep(1)
    assert hub.traffic.frames_up == 17, "16 of the flood, and a hello"
    assert sent < 50_000
    assert resident() - before < 24 * MIB
    for n in range(3000):
        hub.take(0, b"%d" % (n + 1))
    hub.send(1, b"x")
    while (event := hub.receive(LONG)).peer == 0:
        assert event.frame is not None
    assert event == Event(1, b"echo x")
    hub.drop(0, "a flood")
    assert hub.receive(LONG) == Event(0, None, "a flood")
    assert hub.receive(0.1) is None
    bare.close()
    hub.send(1, GOODBYE)
    assert other.end().complete


def test_what_is_read_ahead_does_not_grow_with_the_speed_of_the_network(make_hub):
    hub = make_hub(insecure=True)
    sent = 0

    def fast() -> Iterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield bytes(32768)

    bare = Bare(hub.invitation(), iterator=fast())
    for _ in range(2000):
        assert hub.receive(LONG).frame is not None
    time.sleep(0.5)
    assert sent - 2000 < 60
    bare.close()


def test_a_client_that_does_not_read_is_dropped(make_hub):
    hub = make_hub(insecure=True, largest_queue=MIB)
    bare = Bare(hub.invitation(), [HELLO])
    hub.take(0, HELLO)
    before, sent = resident(), 0
    while (event := hub.receive(0)) is None:
        hub.send(0, os.urandom(65536))
        sent += 65536
        assert sent < 64 * MIB
    assert event == Event(0, None, "it does not read: more than 1048576 bytes wait for it")
    assert resident() - before < 48 * MIB
    bare.close()


def test_many_tiny_frames_are_bounded_too(make_hub):
    hub = make_hub(insecure=True, largest_queue=MIB)
    bare = Bare(hub.invitation(), [HELLO])
    hub.take(0, HELLO)
    sent = 0
    while hub.receive(0) is None:
        for _ in range(100):
            hub.send(0, b"")
        sent += 100
        assert sent < 3_000_000
    bare.close()


def test_one_frame_may_be_larger_than_the_queue(make_hub):
    hub = make_hub(largest_queue=MIB)
    seen: list[int] = []
    member = Member(hub.invitation(), lambda frame: seen.append(len(frame)) or ())
    hub.take(0, HELLO)
    for frame in (b"welcome", b"s" * 40 * MIB, b"plan", GOODBYE):
        hub.send(0, frame)
    assert member.end().complete
    assert seen == [7, 40 * MIB, 4, len(GOODBYE)]


@pytest.mark.slow
def test_one_that_comes_and_goes_piles_up_nothing(make_hub):
    hub = make_hub(insecure=True)
    session = hub.invitation()
    codes = [grpc.StatusCode.OK]
    while codes[-1] is grpc.StatusCode.OK and len(codes) < 12:
        bare = Bare(session, [HELLO], timeout=3)
        bare.outbox.put(None)
        with suppress(grpc.RpcError):
            assert not list(bare.call)
        codes.append(bare.call.code())
        bare.close()
    assert codes[-1] is grpc.StatusCode.DEADLINE_EXCEEDED
    # Counted before one is received: then there is room again, and what was on its way may come in.
    assert 12 <= hub._inbox._events.qsize() <= 16
    events = drain(hub)
    assert events[:2] == [Event(0, HELLO), Event(0, None, "it left")]
    member = Member(session)
    hub.take(0, HELLO)
    hub.send(0, GOODBYE)
    assert member.end().complete


# Many of them


def test_fifty_clients_join_at_once_and_do_twenty_rounds(make_hub):
    hub = make_hub()
    sessions = [hub.invitation(peer) for peer in range(50)]
    members = [Member(session) for session in sessions]
    assert sorted(hub.receive(LONG).peer for _ in members) == list(range(50))
    before = threading.active_count()
    for number in range(20):
        for peer in range(50):
            hub.send(peer, b"%d %d" % (number, peer))
        answers = [hub.receive(LONG) for _ in members]
        assert sorted(answers, key=lambda event: event.peer) == [
            Event(peer, b"echo %d %d" % (number, peer)) for peer in range(50)
        ]
    assert threading.active_count() <= before, "rounds start no threads"
    for peer in range(50):
        hub.send(peer, GOODBYE)
    hub.close("over")
    assert all(member.end().complete for member in members)


def test_a_peer_that_is_barred_while_it_waits_to_be_admitted_stays_out(make_hub):
    hub = make_hub(insecure=True)
    session = hub.invitation()
    former = Bare(session, [b"%d" % n for n in range(16)])
    until(lambda: hub.traffic.frames_up == 16)
    waiting = Bare(session, [HELLO])
    time.sleep(0.2)
    hub.drop(0, "a bad frame", bar=True)
    assert drain(hub) == [Event(0, None, "a bad frame")]
    code, cause = waiting.refusal()
    assert (code, "barred" in cause) == (grpc.StatusCode.UNAUTHENTICATED, True)
    former.close()


def test_a_closed_hub_leaves_nothing_behind(opened):
    before = threading.active_count()
    hub = Hub()
    members = [Member(hub.invitation(peer)) for peer in range(4)]
    assert len([hub.receive(LONG) for _ in members]) == 4
    hub.close("over")
    assert [member.end().complete for member in members] == [False] * 4
    until(lambda: threading.active_count() <= before + 1)  # gRPC's poller may stay
    assert isinstance(Hub(listen=f"127.0.0.1:{hub.port}").close("over"), type(None))


def test_a_round_trip_is_quick(make_hub):
    hub = make_hub()
    members = [Member(hub.invitation(peer)) for peer in range(8)]
    assert len([hub.receive(LONG) for _ in members]) == 8
    times = []
    for _ in range(100):
        began = time.perf_counter()
        for peer in range(8):
            hub.send(peer, b"p" * 24)
        assert all(hub.receive(LONG) for _ in range(8))
        times.append(time.perf_counter() - began)
    # The quickest one: so nothing looks only now and then, however busy the machine is.
    assert min(times) < 0.05
    hub.close("over")
    assert not any(member.end().complete for member in members)


# Invitations

VALID = Invitation("server.example.org:1234", IDENTITY.certificate, False, RUN, 7, "A" * 43)


@given(
    st.sampled_from(["a:1", "127.0.0.1:65535", "[::1]:80", "x-y.z:9"]),
    st.booleans(),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=100),
    st.integers(0, 2**64 - 1),
    st.text("abcXYZ019_-", min_size=22, max_size=128),
)
def test_an_invitation_survives_its_encoding_and_shows_no_token(address, plain, run, peer, token):
    certificate = b"" if plain else IDENTITY.certificate
    session = Invitation(address, certificate, plain, run, peer, token)
    assert Invitation.decode(session.encode()) == session
    assert token not in repr(replace(session, run="r", address="a:1"))
    assert read_metadata(metadata(session)) == (run, peer, token)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.sampled_from(["address", "certificate", "insecure", "run", "peer", "token"])


@settings(max_examples=300)
@given(
    st.binary()
    | ANYTHING.map(lambda content: json.dumps(content).encode())
    | st.tuples(st.dictionaries(FIELDS, ANYTHING), st.sets(FIELDS, max_size=1)).map(
        lambda change: json.dumps(
            {
                k: v
                for k, v in (json.loads(VALID.encode()) | change[0]).items()
                if k not in change[1]
            }
        ).encode()
    )
)
def test_any_bytes_are_an_invitation_or_refused(data):
    try:
        session = Invitation.decode(data)
    except ProtocolError:
        return
    assert Invitation.decode(session.encode()) == session


@pytest.mark.parametrize(
    "change",
    [
        {"address": "server"},
        {"address": "server:0"},
        {"address": "unix:/tmp/x"},
        {"address": "a b:1"},
        {"address": "http://a:1"},
        {"certificate": ""},
        {"certificate": IDENTITY.certificate.decode() + STRANGER.certificate.decode()},
        {"certificate": IDENTITY.key.decode()},
        {"certificate": "é"},
        {"insecure": True},
        {"insecure": 0},
        {"peer": True},
        {"peer": -1},
        {"peer": 2**64},
        {"peer": 1.0},
        {"run": ""},
        {"run": "\ud800"},
        {"run": "r" * 501},
        {"token": "short"},
        {"token": "A" * 42 + "\n"},
        {"token": None},
        {"more": 1},
    ],
)
def test_what_an_invitation_is_not(change):
    data = json.dumps({**json.loads(VALID.encode()), **change}).encode()
    with pytest.raises(ProtocolError) as caught:
        Invitation.decode(data)
    assert "A" * 42 not in str(caught.value)
    assert len(data) < 4000
    with pytest.raises(ProtocolError, match="at most"):
        Invitation.decode(VALID.encode() + b" " * 20_000)
    with pytest.raises(ProtocolError, match="RecursionError"):
        Invitation.decode(b"[" * 15_000)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["meerkat-run-bin", "meerkat-peer", "meerkat-token", "other"]),
            st.text() | st.binary(),
        ),
        max_size=5,
    )
)
def test_any_metadata_is_read_or_refused(given):
    try:
        run, peer, token = read_metadata(given)
    except ProtocolError:
        return
    assert (type(run), type(peer), type(token)) == (str, int, str)
    assert 0 <= peer < 10**20


def test_a_certificate_and_its_key_are_fresh():
    assert len({*vars(IDENTITY).values(), *vars(STRANGER).values()}) == 4
    assert "PRIVATE" not in repr(IDENTITY)
    assert b"PRIVATE" not in IDENTITY.certificate


def test_public_names_are_sorted():
    assert streaming.__all__ == sorted(streaming.__all__)
    assert all(hasattr(streaming, name) for name in streaming.__all__)
