"""What clients elsewhere are asked for: a round's plans, or an evaluation."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np

from meerkat.descent import Theta
from meerkat.engines import Assignment
from meerkat.errors import ProtocolError
from meerkat.protocol import (
    CALIBRATION,
    ENTRY_BYTES,
    ClientReport,
    DownFrame,
    Entries,
    Evaluate,
    Evaluation,
    Hello,
    LogEntry,
    Plan,
    Report,
    RoundPlan,
    Snapshot,
    UpFrame,
    encode,
)
from meerkat.records import Evaluated
from meerkat.server.state import Log

__all__ = ["EvaluationTask", "RoundTask", "Task"]


_LARGEST_LOSS = 1e30
"""An example's loss is no larger, so that sums stay finite."""


class Task(Protocol):
    """Something that clients are asked for."""

    name: str

    def frames(self, client: int, position: int | None) -> tuple[list[bytes], int | None]:
        """What to send to a client whose θ is at this position of the log, and where it is then.

        Args:
            position: None where the client's θ is not to be trusted.
        """

    def take(self, client: int, frame: UpFrame, hello: Hello) -> None:
        """Keep a client's answer.

        Args:
            hello: What the client came with.

        Raises:
            ProtocolError: It is none, or not one to go by.
        """


class RoundTask:
    """A round's plans, or those of a calibration.

    Args:
        largest: A report with a larger |g| is refused.
    """

    def __init__(self, assignment: Assignment, largest: float):
        self._assignment, self._largest = assignment, largest
        self._supply = _Supply(assignment.theta, assignment.log)
        self._encoded: dict[tuple[int | None, int, int], list[bytes]] = {}
        self.reports: dict[int, ClientReport] = {}
        number = next(iter(assignment.plans.values())).round
        self.calibrates = number == CALIBRATION
        self.steps = max(plan.steps for plan in assignment.plans.values())
        self.name = "calibration" if self.calibrates else f"round {number}"

    def frames(self, client: int, position: int | None) -> tuple[list[bytes], int | None]:
        plan, end = self._assignment.plans[client], len(self._assignment.log)
        # Most clients of a round are told the same.
        name = position, plan.first_step, plan.steps
        if name not in self._encoded:
            self._encoded[name] = [encode(frame) for frame in self._frames(plan, position)]
        return self._encoded[name], position if self.calibrates else end

    def _frames(self, plan: RoundPlan, position: int | None) -> list[DownFrame]:
        if self.calibrates:  # it starts from the initial θ, which all have
            return [Plan(plan)]
        lacking = self._supply.lacking(position)
        if isinstance(lacking, Snapshot):
            return [lacking, Plan(replace(plan, log_start=lacking.position, entries=()))]
        assert position is not None
        return [Plan(replace(plan, log_start=position, entries=lacking))]

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


class EvaluationTask:
    """θ on the clients' held-out examples; the sums are all that is sent.

    Args:
        classes: Of the task; 0 for free text.
    """

    def __init__(self, round: int, theta: Theta, log: Log, classes: int):
        self.name = f"evaluation after {round} rounds"
        self._round, self._end, self._classes = round, len(log), classes
        self._supply = _Supply(theta, log)
        self._answers: dict[int, Evaluation] = {}

    def frames(self, client: int, position: int | None) -> tuple[list[bytes], int | None]:
        lacking, frames = self._supply.lacking(position), list[DownFrame]()
        if isinstance(lacking, Snapshot):
            frames.append(lacking)
        elif lacking:
            assert position is not None
            frames.append(Entries(position, lacking))
        frames.append(Evaluate(self._round, self._end))
        return [encode(frame) for frame in frames], self._end

    def take(self, client: int, frame: UpFrame, hello: Hello) -> None:
        if not isinstance(frame, Evaluation) or frame.round != self._round:
            raise ProtocolError(f"{type(frame).__name__.lower()} instead of the evaluation")
        if len(frame.confusion) != self._classes:
            raise ProtocolError(f"{len(frame.confusion)} classes, the task has {self._classes}")
        _check_examples(hello.held_out, frame.examples)
        if frame.loss / frame.examples > _LARGEST_LOSS:
            raise ProtocolError(f"a mean loss of {frame.loss / frame.examples:.4g}")
        self._answers[client] = frame

    def summed(self, seconds: float) -> Evaluated:
        """Accuracy, macro-F1 and mean loss over all examples; without any, none."""
        answers = [self._answers[client] for client in sorted(self._answers)]
        examples = sum(answer.examples for answer in answers)
        if not examples:
            return Evaluated(self._round, None, None, float("nan"), 0, seconds)
        loss = sum(answer.loss for answer in answers) / examples
        if not answers[0].confusion:
            return Evaluated(self._round, None, None, loss, examples, seconds)
        counts = np.sum([answer.confusion for answer in answers], 0, np.int64)
        hits, both = np.diag(counts), counts.sum(0) + counts.sum(1)
        f1 = np.divide(2 * hits, both, out=np.zeros(len(hits)), where=both > 0)
        accuracy = float(hits.sum() / examples)
        return Evaluated(self._round, accuracy, float(f1.mean()), loss, examples, seconds)


def _check_examples(told: int, counted: int) -> None:
    """Weights and accuracy go by the numbers of examples that a client came with.

    Raises:
        ProtocolError: It answers for another number.
    """
    if told != counted:
        raise ProtocolError(f"it came with {told} examples, and answers for {counted}")


class _Supply:
    """What a client lacks of the log: entries, or a snapshot of θ where that is smaller."""

    def __init__(self, theta: Theta, log: Log):
        self._theta, self._log = theta, log
        self._entries: dict[int, tuple[LogEntry, ...]] = {}

    def lacking(self, position: int | None) -> tuple[LogEntry, ...] | Snapshot:
        end = len(self._log)
        size = self._theta.nbytes
        if position is None or position > end or (end - position) * ENTRY_BYTES > size:
            return Snapshot(end, self._theta.astype("<f4").tobytes())
        if position not in self._entries:
            self._entries[position] = self._log.since(position)
        return self._entries[position]
