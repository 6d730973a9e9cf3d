"""Runs clients that are elsewhere, over any transport.

What a client sends is decoded and checked, then counted or refused with a line that names the
client and the cause; the run goes on while a quorum of other clients answers. A client whose state
may differ from the server's gets a snapshot before its next plan.

A request is closed when all clients that got it have answered. With a quorum of answers it is also
closed when the others have been disconnected for `network.rejoin` seconds, or at
`network.deadline`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import cache

from meerkat.config import Federation, Network
from meerkat.engines.base import Assignment, Outcome
from meerkat.engines.mask_to_send import sent_file
from meerkat.engines.members import Members
from meerkat.engines.requests import EvaluationRequest, OpenRequest, Request, RoundRequest
from meerkat.errors import ProtocolError, RunError
from meerkat.journal.records import Evaluated
from meerkat.spaces.mask_file import Mask
from meerkat.tasks.metrics import Metric
from meerkat.tasks.metrics.validation import of_validation
from meerkat.transport.base import Event, Transport
from meerkat.transport.client_frames import Failed, Hello, Need, WantSpace, decode_up
from meerkat.transport.frame import UpFrame, encode
from meerkat.transport.server_frames import Notice, Setup, SpaceFile
from meerkat.zo.log import Log
from meerkat.zo.state import ModelState

__all__ = ["RemoteEngine"]

_MOST_NEEDS = 2
"""Times that a client may ask for more of the log in one request: updates, then a snapshot."""
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
"""Seconds before clients that failed are asked again, where a quorum needs them."""
_REMIND_EVERY = 30.0
"""Seconds between log lines about the clients that the server waits for."""


class RemoteEngine:
    """Sends plans over a transport and collects reports.

    Args:
        setup: What clients were set up with.
        mask: Sent to clients that lack it.
        say: Takes a line for the log.
        answered: Called after each client's report, for progress.
        trusted: Are the clients processes of one simulation? Where all of them fail, it ends.
        exact: Clients that can take part only if they can report the exact gradient.
    """

    def __init__(
        self,
        transport: Transport,
        federation: Federation,
        network: Network,
        setup: Setup,
        mask: Mask,
        say: Callable[[str], None],
        answered: Callable[[], None] = lambda: None,
        trusted: bool = False,
        exact: Collection[int] = (),
    ):
        self._transport, self._network, self._setup = transport, network, setup
        self._file = cache(lambda: sent_file(mask))
        self._former: set[str] = set()
        clients, proof = federation.clients, setup.proof
        self._members = Members(transport, clients, proof, say, network.rebind, exact)
        self._clients = federation.clients
        sampled = federation.clients_per_round or federation.clients
        self._quorum = network.quorum or sampled // 2 + 1
        self._steps = federation.local_steps
        self._say, self._answered, self._trusted = say, answered, trusted
        self._started = False
        self._open: OpenRequest | None = None
        self._bytes_up = self._bytes_down = 0

    # What a run calls

    def present(self) -> Collection[int]:
        """Clients that can be sent a request now.

        The first call waits up to `network.deadline` for all clients, one in a renewed subspace
        for those that were set up again and have not left, every call for a quorum.

        Raises:
            RunError: There was no quorum for `network.patience` seconds.
        """
        self._drain(self._clients)
        members, deadline = self._members, self._network.deadline
        if not self._started:
            self._wait(lambda: self._lack(self._clients), deadline)
            self._started = True
        self._wait(lambda: len(members.renewing), deadline)
        if not self._wait(lambda: self._lack(self._quorum), self._network.patience):
            raise RunError(
                f"{len(self._members.idle)} of the {self._quorum} clients that network.quorum "
                f"asks for were there for {self._network.patience:g} s"
                f"{self._members.departures()}; start the server again when they are back, and the "
                "run goes on"
            )
        return self._members.idle

    def able(self) -> Collection[int]:
        """Connected clients whose hello says that they can report the exact gradient."""
        return frozenset(k for k in self._members.idle if self._members[k].hello.gradients)

    def renew(self, mask: Mask, begins: int, state: ModelState, position: int) -> None:
        """Set up all clients again; each asks for the mask, and starts from its subspace."""
        self._drain(self._clients)
        self._former.add(self._setup.proof.space)
        proof = replace(self._setup.proof, space=mask.fingerprint)
        self._setup = replace(self._setup, proof=proof, position=begins)
        self._file = cache(lambda: sent_file(mask))
        self._transport.introduce(self._setup)
        self._members.renew(proof, encode(self._setup))

    def tend(self) -> None:
        """Handle what has arrived, while the run waits for something else than clients.

        Raises:
            RunError: The transport was stopped.
        """
        self._drain(self._clients)

    def run(self, assignment: Assignment) -> Outcome:
        """Send each client its plan and collect the reports that arrive in time.

        A calibration is complete without any report: clients without one are asked again later.

        Raises:
            RunError: A round has no quorum of reports.
        """
        self._bytes_up = self._bytes_down = 0
        request = RoundRequest(assignment, self._network.largest_scalar)
        need = 0 if request.calibrates else min(self._quorum, len(assignment.plans))
        longer = max(1.0, request.steps / self._steps)  # the deadline is for local_steps
        self._collect(request, assignment.plans, need, longer * self._network.deadline)
        reports = tuple(request.reports.values())
        return Outcome(reports, self._bytes_up, self._bytes_down, float("nan"))

    def evaluate(
        self,
        round: int,
        state: ModelState,
        log: Log,
        metrics: Mapping[str, Metric],
        classes: int,
        validates: bool = False,
    ) -> Evaluated:
        """Metrics of a state over the held-out examples of all clients that are connected.

        Args:
            metrics: The run's metrics by name.
            classes: Of the task; 1 for free text.
            validates: Does the run keep examples to choose a round by?

        Raises:
            RunError: As `present`.
        """
        self.present()
        started = time.monotonic()
        request = EvaluationRequest(round, state, log, metrics, classes, validates)
        asked = [k for k in self._members.idle if self._members[k].hello.held_out]
        self._collect(request, asked, 0, self._network.deadline)
        found = request.result(time.monotonic() - started)
        if validates and not of_validation(found.metrics):
            self._say(
                f"{request.name}: no client has validation examples; put a file validation into "
                "data folders, or this round cannot be chosen"
            )
        return found

    def close(self, reason: str) -> None:
        """End the run for all clients."""
        self._members.say_goodbye(reason)
        self._transport.close(reason)

    # Waiting for clients and for answers

    def _lack(self, enough: int) -> int:
        """How many clients are missing until so many are idle."""
        return max(0, enough - len(self._members.idle))

    def _wait(self, lacking: Callable[[], int], seconds: float) -> bool:
        """Handle events until no client is lacking; False if one still is after so long."""
        end = time.monotonic() + seconds
        reminded = time.monotonic()
        while (missing := lacking()) > 0:
            now = time.monotonic()
            if now >= end:
                self._drain(self._clients)  # what came while the server was busy
                return not lacking()
            if now - reminded >= _REMIND_EVERY:
                reminded = now
                idle = len(self._members.idle)
                self._say(f"waiting for clients: {idle} of {idle + missing} are here")
            event = self._transport.receive(max(0.0, min(end - now, 1.0)))
            if event is not None:
                self._handle(event)
        return True

    def _drain(self, clients: int) -> None:
        """Handle events that have arrived, but only some for each client: a flood has no end."""
        for _ in range(2 * clients + 64):
            event = self._transport.receive(0)
            if event is None:
                return
            self._handle(event)

    def _collect(
        self, request: Request, clients: Collection[int], need: int, deadline: float
    ) -> None:
        """Send a request to clients and handle events until it is closed.

        Args:
            need: Answers without which it stays open, up to `network.patience` seconds.
            deadline: Seconds after which it is closed when there are so many.

        Raises:
            RunError: There are fewer answers.
        """
        started = reminded = time.monotonic()
        opened = self._open = OpenRequest(request, frozenset(clients), set(clients))
        for client in sorted(opened.asked):
            self._send(opened, client)
        pause, again = _FIRST_PAUSE, math.inf
        while opened.pending or opened.answers < need:
            now = time.monotonic()
            if now - reminded >= _REMIND_EVERY:
                reminded = now
                waiting = f"waiting for {len(opened.pending)} of {len(opened.asked)} clients"
                self._say(f"{request.name}: {waiting}")
            end = self._end(opened, started, need, deadline)
            if now >= end:
                self._drain(len(opened.asked))  # what came while the server was busy
                break
            if not opened.pending and self._trusted:
                break
            hopes = len(opened.connected) if now < started + deadline else 0
            if not opened.missing or opened.answers + hopes >= need:
                again = math.inf
            elif again == math.inf:
                again = now + pause
                pause = min(2 * pause, _LONGEST_PAUSE)
            elif now >= again:
                self._ask_again(opened)
                again = math.inf
            event = self._transport.receive(max(0.0, min(end - now, again - now, 1.0)))
            if event is not None:
                self._handle(event)
        self._open = None
        self._list_missing(opened, time.monotonic() - started)
        if opened.answers < need:
            causes = "; ".join(f"client {k}: {why}" for k, why in sorted(opened.missing.items()))
            raise RunError(
                f"{request.name}: {opened.answers} of the {need} answers that network.quorum asks "
                f"for ({causes}); start the server again, and the run goes on"
            )

    def _ask_again(self, opened: OpenRequest) -> None:
        """Send the request again to clients that failed: without them there is no quorum."""
        for client in sorted(opened.missing):
            if client in self._members and not self._members[client].overdue:
                del opened.missing[client]
                opened.pending.add(client)
                self._send(opened, client)

    def _end(self, opened: OpenRequest, started: float, need: int, deadline: float) -> float:
        """The time at which a request is closed, as things are now."""
        if opened.answers < need:
            return started + max(deadline, self._network.patience)
        if opened.connected:  # these may answer
            return started + deadline
        left = [self._members.departure(client) for client in opened.pending]
        times = [departure[0] for departure in left if departure is not None]
        return min(started + deadline, max(times) + self._network.rejoin)

    def _list_missing(self, opened: OpenRequest, seconds: float) -> None:
        """Note and log why clients did not answer; those still connected are overdue."""
        name = opened.request.name
        for client in sorted(opened.pending):
            departure = self._members.departure(client)
            cause = "no answer" if departure is None else f"it left: {departure[1]}"
            opened.missing[client] = f"{cause} after {seconds:.1f} s"
            self._say(f"{name}: closed without client {client}, {opened.missing[client]}")
            if client in self._members:
                self._members.set_overdue(client, name)
        opened.pending.clear()
        opened.connected.clear()

    # Frames

    def _send(self, opened: OpenRequest, client: int) -> None:
        """Send a client the open request, and before it what its state lacks."""
        if client not in self._members:
            return
        opened.connected.add(client)
        member = self._members[client]
        frames, member.position = opened.request.frames(client, member.position)
        for frame in frames:
            self._bytes_down += len(frame)
            self._transport.send(member.peer, frame)

    def _handle(self, event: Event) -> None:
        """Act on one event; a frame that breaks the protocol disconnects its peer."""
        peer, client = event.peer, self._members.client_of(event.peer)
        if event.frame is None:
            self._members.remove(peer, event.cause)
            if self._open is not None and client is not None:
                self._open.connected.discard(client)
            return
        if self._members.is_barred(peer):  # what it had sent before
            return
        try:
            frame = decode_up(event.frame)
            if client is None or isinstance(frame, Hello | WantSpace):
                self._members.count_asked(peer)
            if self._is_former(frame):
                self._transport.send(peer, encode(self._setup))
            elif isinstance(frame, WantSpace):
                self._transport.send(peer, encode(SpaceFile(self._file())))
            elif isinstance(frame, Hello):
                admitted = self._members.admit(peer, frame)
                if admitted and self._open is not None and frame.client in self._open.pending:
                    self._send(self._open, frame.client)
            elif client is None and isinstance(frame, Failed):
                self._say(f"peer {peer} does not take part: {frame.reason}")
            elif client is None:
                raise ProtocolError(f"{type(frame).__name__.lower()} before hello")
            elif self._open is not None and client in self._open.pending:
                self._take(self._open, client, frame, len(event.frame))
            else:
                self._take_overdue(client, frame)
        except ProtocolError as error:
            self._members.disconnect(peer, str(error))

    def _is_former(self, frame: UpFrame) -> bool:
        """Does a client speak of a subspace that was renewed since it was set up?"""
        if isinstance(frame, Hello):
            return frame.proof.space in self._former
        return isinstance(frame, WantSpace) and frame.space in self._former

    def _take(self, opened: OpenRequest, client: int, frame: UpFrame, size: int) -> None:
        """A frame of a client that the open request waits for."""
        member = self._members[client]
        if isinstance(frame, Need):
            opened.needs[client] += 1
            if opened.needs[client] > _MOST_NEEDS:
                raise ProtocolError("it needs more than a snapshot")
            member.position = frame.position if opened.needs[client] == 1 else None
            self._send(opened, client)
            return
        self._bytes_up += size
        opened.settle(client)
        line = f"{opened.request.name}: client {client}"
        if isinstance(frame, Failed):
            opened.missing[client] = f"it failed: {frame.reason}"
            self._say(f"{line} failed: {frame.reason}")
            return
        try:
            opened.request.take(client, frame, member.hello)
        except ProtocolError as error:
            member.position = None
            opened.missing[client] = f"refused: {error}"
            line = f"{line} refused: {error}"
            if not self._members.bar_repeated(member.peer, line, str(error)):
                self._say(line)
                self._transport.send(member.peer, encode(Notice(str(error))))
            return
        if isinstance(opened.request, RoundRequest):
            self._answered()

    def _take_overdue(self, client: int, frame: UpFrame) -> None:
        """A frame of a client that no open request waits for: an overdue answer, or a violation."""
        member = self._members[client]
        if not member.overdue:
            raise ProtocolError(f"{type(frame).__name__.lower()} that nobody asked for")
        line = f"the answer to {member.overdue} came too late"
        self._members.set_overdue(client, "")
        self._say(f"client {client}: {line}; not used")
        self._transport.send(member.peer, encode(Notice(line)))
