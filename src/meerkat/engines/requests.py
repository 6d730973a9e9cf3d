"""Requests to clients that are elsewhere: the plans of a round, or an evaluation."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

import numpy as np

from meerkat.engines.base import Assignment
from meerkat.errors import ProtocolError
from meerkat.federation.aggregation import largest
from meerkat.federation.messages import CALIBRATION, ClientReport, RoundPlan
from meerkat.journal.records import Evaluated
from meerkat.tasks.metrics import LOSS, Metric, Sums, metric_values
from meerkat.tasks.metrics.validation import (
    VALIDATION,
    VALIDATION_EXAMPLES,
    of_validation,
    on_validation,
)
from meerkat.transport.client_frames import Evaluation, Hello, Report
from meerkat.transport.frame import DownFrame, UpFrame, encode
from meerkat.transport.messages import AXIS_BYTES, ENTRY_BYTES
from meerkat.transport.server_frames import EvaluateRequest, LogPart, Plan, Snapshot
from meerkat.zo.axes import Along
from meerkat.zo.log import Log, Update
from meerkat.zo.state import ModelState

_MOST_VARIANTS = 16
"""Versions of a request, by the position of the client, that are kept encoded."""

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
    """A request that was sent and is not closed.

    Sets are kept up to date event by event: with 10^5 clients none may be searched for each.
    """

    request: Request
    asked: frozenset[int]
    """Clients that it is for."""
    pending: set[int]
    """Those that have not answered."""
    connected: set[int] = field(default_factory=set)
    """Those of them that are connected now."""
    missing: dict[int, str] = field(default_factory=dict)
    """Those without an answer that counts, and why."""
    needs: Counter[int] = field(default_factory=Counter)
    """How often each asked for more of the log."""

    @property
    def answers(self) -> int:
        """How many answers count."""
        return len(self.asked) - len(self.pending) - len(self.missing)

    def settle(self, client: int) -> None:
        """Wait no longer for a client."""
        self.pending.discard(client)
        self.connected.discard(client)


_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value")


class _Variants(Generic[_Key, _Value]):
    """The last few values by key: keys come from positions, which are what clients claim."""

    def __init__(self) -> None:
        self._kept: OrderedDict[_Key, _Value] = OrderedDict()

    def get(self, key: _Key, make: Callable[[], _Value]) -> _Value:
        if key not in self._kept:
            self._kept[key] = make()
            if len(self._kept) > _MOST_VARIANTS:
                self._kept.popitem(last=False)
        return self._kept[key]


class RoundRequest:
    """The plans of a round, or of a calibration.

    Args:
        largest: A report with a larger |g| is refused.
    """

    def __init__(self, assignment: Assignment, largest: float):
        self._assignment, self._largest = assignment, largest
        self._catch_up = _CatchUp(assignment.state, assignment.log)
        self._encoded: _Variants[tuple[int | None, int, int, Along], list[bytes]] = _Variants()
        self.reports: dict[int, ClientReport] = {}
        number = next(iter(assignment.plans.values())).round
        self.calibrates = number == CALIBRATION
        self.steps = max(plan.steps for plan in assignment.plans.values())
        self.name = "calibration" if self.calibrates else f"round {number}"

    def frames(self, client: int, position: int | None) -> tuple[list[bytes], int | None]:
        plan, end = self._assignment.plans[client], len(self._assignment.log)
        # Most clients of a round get the same frames, so each variant is encoded once.
        position = self._catch_up.useful(position)
        variant = position, plan.first_step, plan.steps, plan.along
        encoded = self._encoded.get(
            variant, lambda: [encode(frame) for frame in self._frames(plan, position)]
        )
        return encoded, position if self.calibrates else end

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
        worst = largest(report)
        if worst > self._largest:
            raise ProtocolError(
                f"|g| = {worst:.4g} is more than network.largest_scalar = {self._largest:g}"
            )
        self.reports[client] = report


class EvaluationRequest:
    """Evaluation of a state on the clients' held-out examples, of which clients send sums only.

    Args:
        metrics: The run's metrics by name.
        classes: Of the task; 1 for free text.
        validates: Does the run keep examples to choose a round by?
    """

    def __init__(
        self,
        round: int,
        state: ModelState,
        log: Log,
        metrics: Mapping[str, Metric],
        classes: int,
        validates: bool = False,
    ):
        self.name = f"evaluation after {round} rounds"
        self._round, self._end = round, len(log)
        self._metrics, self._classes = metrics, classes
        self._validates = validates
        self._catch_up = _CatchUp(state, log)
        self._encoded: _Variants[int | None, list[bytes]] = _Variants()
        self._answers: dict[int, Evaluation] = {}

    def frames(self, client: int, position: int | None) -> tuple[list[bytes], int | None]:
        position = self._catch_up.useful(position)
        encoded = self._encoded.get(
            position, lambda: [encode(frame) for frame in self._frames(position)]
        )
        return encoded, self._end

    def _frames(self, position: int | None) -> list[DownFrame]:
        lacking, frames = self._catch_up.since(position), list[DownFrame]()
        if isinstance(lacking, Snapshot):
            frames.append(lacking)
        elif lacking:
            assert position is not None
            frames.append(LogPart(position, lacking))
        frames.append(EvaluateRequest(self._round, self._end))
        return frames

    def take(self, client: int, frame: UpFrame, hello: Hello) -> None:
        if not isinstance(frame, Evaluation) or frame.round != self._round:
            raise ProtocolError(f"{type(frame).__name__.lower()} instead of the evaluation")
        validation = self._validation_examples(frame)
        tested = frame.examples - validation
        names = tuple(self._metrics) if tested else ()
        if validation:
            names = (*names, *on_validation(self._metrics), VALIDATION_EXAMPLES)
        if tuple(frame.sums) != names:
            raise ProtocolError(f"its metrics are not the run's: {', '.join(names)}")
        _check_examples(hello.held_out, frame.examples)
        for name, sums in frame.sums.items():
            metric = self._metrics.get(name.removeprefix(VALIDATION))
            count = validation if name not in self._metrics else tested
            if metric and not metric.is_possible(np.array(sums), count, self._classes):
                raise ProtocolError(f"its {name} of {count} examples is not possible")
        self._answers[client] = frame

    def _validation_examples(self, frame: Evaluation) -> int:
        """How many of an answer's examples are to choose a round by.

        Raises:
            ProtocolError: It cannot be so many.
        """
        given = frame.sums.get(VALIDATION_EXAMPLES, (0.0,)) if self._validates else (0.0,)
        count = given[0] if len(given) == 1 else -1.0
        if not (0 <= count <= frame.examples and count.is_integer()):
            raise ProtocolError(f"its {VALIDATION_EXAMPLES} of {frame.examples} are not possible")
        return int(count)

    def result(self, seconds: float) -> Evaluated:
        """The metrics over the examples of all clients that answered; NaN without any.

        Those on validation examples are there only where a client has some.
        """
        answers = [self._answers[client] for client in sorted(self._answers)]
        validation = sum(map(self._validation_examples, answers))
        examples = sum(answer.examples for answer in answers) - validation
        tests = [answer.sums for answer in answers if LOSS in answer.sums]
        values = metric_values(self._total(tests), examples, self._metrics)
        others = [of_validation(answer.sums) for answer in answers]
        if validation:
            sums = self._total([found for found in others if found])
            values |= on_validation(metric_values(sums, validation, self._metrics))
        return Evaluated(self._round, values, examples, seconds)

    def _total(self, answers: Sequence[Mapping[str, tuple[float, ...]]]) -> dict[str, Sums]:
        """The sums of each metric over all answers."""
        return {
            name: np.sum([answer[name] for answer in answers], axis=0) for name in self._metrics
        }


def _check_examples(known: int, counted: int) -> None:
    """Check that an answer is over as many examples as the client's hello has.

    Raises:
        ProtocolError: It is not.
    """
    if known != counted:
        raise ProtocolError(f"it came with {known} examples, and answers for {counted}")


class _CatchUp:
    """What brings a client to the server's state: updates, or a snapshot where that is smaller.

    Positions are what clients claim, so not all are kept: one snapshot, a few parts of the log.
    """

    def __init__(self, state: ModelState, log: Log):
        self._state, self._log = state, log
        self._snapshot: Snapshot | None = None
        self._updates: _Variants[int, tuple[Update, ...]] = _Variants()

    def useful(self, position: int | None) -> int | None:
        """The position, or None where the client gets a snapshot."""
        if position is None or not self._log.base <= position <= len(self._log):
            return None
        if self._is_long(position):
            return None
        return position

    def since(self, position: int | None) -> tuple[Update, ...] | Snapshot:
        """What a client at this position lacks."""
        if (start := self.useful(position)) is None:
            if self._snapshot is None:
                self._snapshot = Snapshot(len(self._log), self._state.to_bytes())
            return self._snapshot
        return self._updates.get(start, lambda: self._log.since(start))

    def _is_long(self, position: int) -> bool:
        entries, axes = self._log.entries_since(position), self._log.axes_since(position)
        return entries * ENTRY_BYTES + axes * AXIS_BYTES > self._state.nbytes
