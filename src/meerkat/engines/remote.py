"""Clients that are elsewhere: one loop, whatever the transport.

What a client sends is decoded, judged and counted, or refused with a line that names it and the
cause; a run goes on as long as there is a quorum of others. A client whose θ may differ gets a
snapshot before its next plan. A round closes when all that were asked have answered, or without
those that are missing: when they are gone for `network.rejoin` seconds, or at `network.deadline`,
as soon as a quorum has answered.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

from meerkat.descent import Theta
from meerkat.engines import Assignment, Outcome
from meerkat.engines.asking import EvaluationTask, RoundTask, Task
from meerkat.errors import ProtocolError, RunError
from meerkat.links import Event, Link
from meerkat.protocol import (
    Failed,
    Goodbye,
    Hello,
    MaskFile,
    Need,
    Notice,
    Proof,
    Refused,
    UpFrame,
    WantMask,
    Welcome,
    decode_up,
    difference,
    encode,
)
from meerkat.recipe import Recipe
from meerkat.records import Evaluated
from meerkat.server.state import Log

__all__ = ["RemoteEngine"]

_STRIKES = 3
"""A seat that breaks the protocol so often is barred."""
_TELL_EVERY = 30.0
"""Seconds between lines that say who is waited for."""


@dataclass
class _Member:
    """A client that takes part."""

    seat: int
    hello: Hello
    position: int | None
    """Log entries that its θ contains; None where its θ is not to be trusted."""
    behind: str = ""
    """What it still owes, after others went on without it."""


class RemoteEngine:
    """Carries plans over a link.

    Args:
        mask: The mask as a file, for clients that lack it.
        say: Takes a line for the log.
        answered: Called after each client's report, for progress.
    """

    def __init__(
        self,
        link: Link,
        recipe: Recipe,
        proof: Proof,
        mask: Callable[[], bytes],
        say: Callable[[str], None],
        answered: Callable[[], None] = lambda: None,
    ):
        self._link, self._network, self._proof, self._mask = link, recipe.network, proof, mask
        self._clients, self._quorum = recipe.federation.clients, recipe.quorum
        self._steps = recipe.federation.local_steps
        self._say, self._answered = say, answered
        self._members: dict[int, _Member] = {}
        self._seats: dict[int, int] = {}
        self._gone: dict[int, tuple[float, str]] = {}
        self._strikes: Counter[int] = Counter()
        self._opened = False
        # What is asked now: by whom it is owed, and who did not do it.
        self._task: Task | None = None
        self._owing: set[int] = set()
        self._excused: dict[int, str] = {}
        self._needs: Counter[int] = Counter()
        self._up = self._down = 0

    # What the loop calls

    def present(self) -> Collection[int]:
        """Clients that can be asked now; waits until they are enough, at first for all.

        Raises:
            RunError: They were not enough for `network.patience` seconds.
        """
        while (event := self._link.receive(0)) is not None:
            self._handle(event)
        if not self._opened:
            self._wait(self._clients, self._network.deadline)
            self._opened = True
        if len(self._idle()) < self._quorum and not self._wait(
            self._quorum, self._network.patience
        ):
            raise RunError(
                f"{len(self._idle())} of the {self._quorum} clients that network.quorum asks for "
                f"were there for {self._network.patience:g} s{self._causes()}; start the server "
                "again when they are back, and the run goes on"
            )
        return self._idle()

    def run(self, assignment: Assignment) -> Outcome:
        """Have each client answer its plan, as far as they do.

        A calibration needs nobody's answer: who is not calibrated is asked again.

        Raises:
            RunError: A quorum cannot be reached in a round.
        """
        self._up = self._down = 0
        task = RoundTask(assignment, self._network.largest_scalar)
        need = 0 if task.calibrates else min(self._quorum, len(assignment.plans))
        longer = max(1.0, task.steps / self._steps)  # the deadline is for local_steps
        self._collect(task, set(assignment.plans), need, longer * self._network.deadline)
        return Outcome(tuple(task.reports.values()), self._up, self._down, float("nan"))

    def evaluate(self, round: int, theta: Theta, log: Log, classes: int) -> Evaluated:
        """θ on the held-out examples of all clients that are here and have some.

        Args:
            classes: Of the task; 0 for free text.

        Raises:
            RunError: As `present`.
        """
        self.present()
        started = time.monotonic()
        task = EvaluationTask(round, theta, log, classes)
        asked = {k for k in self._idle() if self._members[k].hello.held_out}
        self._collect(task, asked, 0, self._network.deadline)
        return task.summed(time.monotonic() - started)

    def close(self, reason: str) -> None:
        """Tell everyone that the run is over."""
        for member in self._members.values():
            self._link.send(member.seat, encode(Goodbye(reason)))
        self._link.close(reason)

    # Within

    def _idle(self) -> list[int]:
        return sorted(client for client, member in self._members.items() if not member.behind)

    def _wait(self, enough: int, seconds: float) -> bool:
        """Handle what comes until so many clients are here and idle."""
        end = time.monotonic() + seconds
        told = time.monotonic()
        while len(self._idle()) < enough:
            now = time.monotonic()
            if now - told >= _TELL_EVERY:
                told = now
                self._say(f"waiting for clients: {len(self._idle())} of {enough} are here")
            event = self._link.receive(max(0.0, min(end - now, 1.0)))
            if event is not None:
                self._handle(event)
            elif now >= end:
                return False
        return True

    def _collect(self, task: Task, asked: set[int], need: int, deadline: float) -> None:
        """Ask, and take answers until there is nothing more to wait for."""
        started = told = time.monotonic()
        self._task, self._owing, self._excused, self._needs = task, set(asked), {}, Counter()
        for client in sorted(asked):
            self._ask(client)
        while self._owing:
            answered = len(asked) - len(self._owing) - len(self._excused)
            now = time.monotonic()
            if now - told >= _TELL_EVERY:
                told = now
                self._say(f"{task.name}: waiting for {len(self._owing)} of {len(asked)} clients")
            end = started + max(deadline, self._network.patience)
            if answered >= need:
                end = started + deadline
                if not any(client in self._members for client in self._owing):
                    left = [self._gone[client][0] for client in self._owing]
                    end = min(end, max(left) + self._network.rejoin)
            event = self._link.receive(max(0.0, min(end - now, 1.0)))
            if event is not None:
                self._handle(event)  # also what came while the server was busy
            elif now >= end:
                break
        for client in sorted(self._owing):
            cause = f"it left: {self._gone[client][1]}" if client in self._gone else "no answer"
            self._excused[client] = f"{cause} after {time.monotonic() - started:.1f} s"
            self._say(f"{task.name}: closed without client {client}, {self._excused[client]}")
            if client in self._members:
                self._members[client].behind = task.name
        self._task, self._owing = None, set()
        if len(asked) - len(self._excused) < need:
            causes = "; ".join(f"client {k}: {why}" for k, why in sorted(self._excused.items()))
            raise RunError(
                f"{task.name}: {len(asked) - len(self._excused)} of the {need} answers that "
                f"network.quorum asks for ({causes}); start the server again, and the run goes on"
            )

    def _ask(self, client: int) -> None:
        member = self._members.get(client)
        if member is None or self._task is None:
            return
        frames, member.position = self._task.frames(client, member.position)
        for frame in frames:
            self._down += len(frame)
            self._link.send(member.seat, frame)

    def _handle(self, event: Event) -> None:
        client = self._seats.get(event.seat)
        if event.frame is None:
            self._left(event.seat, client, event.cause)
            return
        try:
            frame = decode_up(event.frame)
            if isinstance(frame, WantMask):
                self._link.send(event.seat, encode(MaskFile(self._mask())))
            elif isinstance(frame, Hello):
                self._admit(event.seat, frame)
            elif client is None and isinstance(frame, Failed):
                self._say(f"seat {event.seat} does not take part: {frame.reason}")
            elif client is None:
                raise ProtocolError(f"{type(frame).__name__.lower()} before hello")
            else:
                self._hear(client, frame, len(event.frame))
        except ProtocolError as error:
            self._offended(event.seat, client, str(error))

    def _hear(self, client: int, frame: UpFrame, size: int) -> None:
        """A frame of a client that takes part."""
        member = self._members[client]
        if isinstance(frame, Need) and client in self._owing:
            self._needs[client] += 1
            if self._needs[client] > 2:
                raise ProtocolError("it needs more than a snapshot")
            member.position = frame.position if self._needs[client] == 1 else None
            self._ask(client)
            return
        if client not in self._owing or self._task is None:
            told = member.behind and f"the answer to {member.behind} came too late"
            member.behind = ""
            if not told:
                raise ProtocolError(f"{type(frame).__name__.lower()} that nobody asked for")
            self._say(f"client {client}: {told}; not used")
            self._link.send(member.seat, encode(Notice(told)))
            return
        self._up += size
        self._owing.discard(client)
        if isinstance(frame, Failed):
            self._excused[client] = f"it failed: {frame.reason}"
            self._say(f"{self._task.name}: client {client} failed: {frame.reason}")
            return
        try:
            self._task.take(client, frame, member.hello)
            if isinstance(self._task, RoundTask):
                self._answered()
        except ProtocolError as error:
            member.position = None
            self._excused[client] = f"refused: {error}"
            line = f"{self._task.name}: client {client} refused: {error}"
            if not self._strike(member.seat, line, str(error)):
                self._say(line)
                self._link.send(member.seat, encode(Notice(str(error))))

    def _admit(self, seat: int, hello: Hello) -> None:
        client, reason = hello.client, difference(hello.proof, self._proof)
        holder = self._members.get(client)
        if client >= self._clients:
            reason = (
                f"client {client} is not one of federation.clients = {self._clients}, who are "
                "numbered from 0; change its partition-id"
            )
        elif holder is not None and holder.seat != seat:
            reason = f"client {client} is here already; give each node a partition-id of its own"
        elif not hello.examples:
            reason = f"client {client} has no examples; put some into its data folder"
        if reason is not None:
            self._say(f"client {client} (seat {seat}) is refused: {reason}")
            self._link.send(seat, encode(Refused(reason)))
            return
        former = self._seats.get(seat, client)
        if former != client:
            self._left(seat, former, f"its seat is client {client} now")
        self._seats[seat] = client
        self._gone.pop(client, None)
        self._members[client] = _Member(seat, hello, hello.position)
        self._say(f"client {client} is here (seat {seat}), {hello.examples} examples")
        self._link.send(seat, encode(Welcome()))
        if client in self._owing:
            self._ask(client)

    def _left(self, seat: int, client: int | None, cause: str) -> None:
        self._seats.pop(seat, None)
        if client is None:
            self._say(f"seat {seat} left before it was a client: {cause}")
        elif self._members.pop(client, None) is not None:
            self._gone[client] = time.monotonic(), cause
            self._say(f"client {client} left: {cause}")

    def _offended(self, seat: int, client: int | None, cause: str) -> None:
        """A frame that is none, or has no place: the connection is broken."""
        who = f"seat {seat}" if client is None else f"client {client}"
        if not self._strike(seat, f"{who}: {cause}", cause):
            self._say(f"{who}: {cause}; disconnected")
            if client is None:  # one that takes part may connect again
                self._link.send(seat, encode(Refused(cause)))
            self._link.drop(seat, cause)

    def _strike(self, seat: int, line: str, cause: str) -> bool:
        """Count what a seat did wrong; True if that was once too often."""
        self._strikes[seat] += 1
        if self._strikes[seat] < _STRIKES:
            return False
        self._say(f"{line}; barred from this run")
        self._link.send(seat, encode(Refused(cause)))
        self._link.drop(seat, cause, bar=True)
        return True

    def _causes(self) -> str:
        told = [f"client {client} left: {why}" for client, (_, why) in sorted(self._gone.items())]
        return f" ({'; '.join(told[:5])})" if told else ""
