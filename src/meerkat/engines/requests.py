"""Requests to clients that are elsewhere: the plans of a round, or an evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from meerkat.engines.base import Assignment
from meerkat.errors import ProtocolError
from meerkat.federation.messages import CALIBRATION, ClientReport, RoundPlan
from meerkat.journal.records import Evaluated
from meerkat.tasks.metrics import METRICS, metric_values
from meerkat.transport.client_frames import Evaluation, Hello, Report
from meerkat.transport.frame import DownFrame, UpFrame, encode
from meerkat.transport.messages import ENTRY_BYTES
from meerkat.transport.server_frames import EvaluateRequest, LogPart, Plan, Snapshot
from meerkat.zo.log import Log, Update
from meerkat.zo.state import ModelState

__all__ = ["EvaluationRequest", "OpenRequest", "Request", "RoundRequest"]


class Request(Protocol):
    """What is sent to each client, and how the answers are checked and kept."""

    name: str
    """For log lines, such as "round 3"."""

    def frames(self, client: int, position: int | None) -> tuple[list[bytes], int | None]:
        """Frames to send to a client, and the position of its state after it has read them.

        Args:
            position: Updates of the log that its state contains; None where it is not trusted.
        """

    def take(self, client: int, frame: UpFrame, hello: Hello) -> None:
        """Check a client's answer and keep it.

        Args:
            hello: The client's own, with its numbers of examples.

        Raises:
            ProtocolError: The frame is no answer to this request, or one that cannot be true.
        """


@dataclass
class OpenRequest:
    """A request that was sent and is not closed."""

    request: Request
    asked: frozenset[int]
    """Clients that it is for."""
    pending: set[int]
    """Those that have not answered."""
    missing: dict[int, str] = field(default_factory=dict)
    """Those without an answer that counts, and why."""
    needs: Counter[int] = field(default_factory=Counter)
    """How often each asked for more of the log."""

    @property
    def answers(self) -> int:
        """How many answers count."""
        return len(self.asked) - len(self.pending) - len(self.missing)


class RoundRequest:
    """The plans of a round, or of a calibration.

    Args:
        largest: A report with a larger |g| is refused.
    """

    def __init__(self, assignment: Assignment, largest: float):
        self._assignment, self._largest = assignment, largest
        self._catch_up = _CatchUp(assignment.state, assignment.log)
        self._encoded: dict[tuple[int | None, int, int], list[bytes]] = {}
        self.reports: dict[int, ClientReport] = {}
        number = next(iter(assignment.plans.values())).round
        self.calibrates = number == CALIBRATION
        self.steps = max(plan.steps for plan in assignment.plans.values())
        self.name = "calibration" if self.calibrates else f"round {number}"

    def frames(self, client: int, position: int | None) -> tuple[list[bytes], int | None]:
        plan, end = self._assignment.plans[client], len(self._assignment.log)
        # Most clients of a round get the same frames, so each variant is encoded once.
        variant = position, plan.first_step, plan.steps
        if variant not in self._encoded:
            self._encoded[variant] = [encode(frame) for frame in self._frames(plan, position)]
        return self._encoded[variant], position if self.calibrates else end

    def _frames(self, plan: RoundPlan, position: int | None) -> list[DownFrame]:
        if self.calibrates:  # it starts from the initial state, which every client has
            return [Plan(plan)]
        lacking = self._catch_up.since(position)
        if isinstance(lacking, Snapshot):
            return [lacking, Plan(replace(plan, log_start=lacking.position, updates=()))]
        assert position is not None
        return [Plan(replace(plan, log_start=position, updates=lacking))]

    def take(self, client: int, frame: UpFrame, hello: Hello) -> None:
        if not isinstance(frame, Report):
            raise ProtocolError(f"{type(frame).__name__.lower()} instead of a report")
        report = frame.report
        if report.client != client:
            raise ProtocolError(f"its report is signed by client {report.client}")
        self._assignment.judge(report)
        _check_examples(hello.examples, report.examples)
        worst = max(map(abs, report.scalars))
        if worst > self._largest:
            raise ProtocolError(
                f"|g| = {worst:.4g} is more than network.largest_scalar = {self._largest:g}"
            )
        self.reports[client] = report


class EvaluationRequest:
    """Evaluation of a state on the clients' held-out examples, of which clients send sums only.

    Args:
        metrics: Names of the run's metrics.
        classes: Of the task; 1 for free text.
    """

    def __init__(
        self, round: int, state: ModelState, log: Log, metrics: Sequence[str], classes: int
    ):
        self.name = f"evaluation after {round} rounds"
        self._round, self._end = round, len(log)
        self._metrics, self._classes = tuple(metrics), classes
        self._catch_up = _CatchUp(state, log)
        self._answers: dict[int, Evaluation] = {}

    def frames(self, client: int, position: int | None) -> tuple[list[bytes], int | None]:
        lacking, frames = self._catch_up.since(position), list[DownFrame]()
        if isinstance(lacking, Snapshot):
            frames.append(lacking)
        elif lacking:
            assert position is not None
            frames.append(LogPart(position, lacking))
        frames.append(EvaluateRequest(self._round, self._end))
        return [encode(frame) for frame in frames], self._end

    def take(self, client: int, frame: UpFrame, hello: Hello) -> None:
        if not isinstance(frame, Evaluation) or frame.round != self._round:
            raise ProtocolError(f"{type(frame).__name__.lower()} instead of the evaluation")
        if tuple(frame.sums) != self._metrics:
            raise ProtocolError(f"its metrics are not the run's: {', '.join(self._metrics)}")
        _check_examples(hello.held_out, frame.examples)
        for name, sums in frame.sums.items():
            if not METRICS[name].is_possible(np.array(sums), frame.examples, self._classes):
                raise ProtocolError(f"its {name} of {frame.examples} examples is not possible")
        self._answers[client] = frame

    def result(self, seconds: float) -> Evaluated:
        """The metrics over the examples of all clients that answered; NaN without any."""
        answers = [self._answers[client] for client in sorted(self._answers)]
        examples = sum(answer.examples for answer in answers)
        sums = {
            name: np.sum([answer.sums[name] for answer in answers], axis=0)
            for name in self._metrics
        }
        return Evaluated(self._round, metric_values(sums, examples), examples, seconds)


def _check_examples(known: int, counted: int) -> None:
    """Check that an answer is over as many examples as the client's hello has.

    Raises:
        ProtocolError: It is not.
    """
    if known != counted:
        raise ProtocolError(f"it came with {known} examples, and answers for {counted}")


class _CatchUp:
    """What brings a client to the server's state: updates, or a snapshot where that is smaller."""

    def __init__(self, state: ModelState, log: Log):
        self._state, self._log = state, log
        self._updates: dict[int, tuple[Update, ...]] = {}

    def since(self, position: int | None) -> tuple[Update, ...] | Snapshot:
        end = len(self._log)
        if position is None or position > end or self._is_long(position):
            return Snapshot(end, self._state.to_bytes())
        if position not in self._updates:
            self._updates[position] = self._log.since(position)
        return self._updates[position]

    def _is_long(self, position: int) -> bool:
        return self._log.entries_since(position) * ENTRY_BYTES > self._state.nbytes
