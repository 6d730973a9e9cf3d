"""Runs all clients in this process, one after the other, with encoded plans and reports."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

from meerkat.engines.base import Assignment, Outcome
from meerkat.federation.client import Client, Worker
from meerkat.federation.messages import CALIBRATION
from meerkat.federation.rounds import RoundRecord
from meerkat.spaces.base import ParameterSpace
from meerkat.spaces.mask_file import Mask
from meerkat.transport.messages import decode_plan, decode_report, encode_plan, encode_report
from meerkat.zo.state import ModelState

__all__ = ["LocalEngine"]


class LocalEngine:
    """Runs any number of clients with one worker, so with one model and one state.

    Args:
        space_of: Makes the space of a mask in the worker's model, whose bits are as loaded.
        answered: Called after each client's report, for progress.
    """

    def __init__(
        self,
        worker: Worker,
        clients: Sequence[Client],
        space_of: Callable[[Mask], ParameterSpace],
        answered: Callable[[], None] = lambda: None,
    ):
        self._worker = worker
        self._clients = clients
        self._space_of = space_of
        self._answered = answered

    def present(self) -> Collection[int]:
        return range(len(self._clients))

    def able(self) -> Collection[int]:
        return self.present()

    def renew(self, mask: Mask, begins: int, state: ModelState, position: int) -> None:
        self._worker.space.restore()
        self._worker.enter(self._space_of(mask), begins)
        self._worker.synchronise(state, position)

    def recall(self, records: Iterable[RoundRecord]) -> None:
        """Make what clients carry from round to round again, from the rounds of a journal."""
        for record in records:
            for report in record.reports:
                self._worker.remember(report, record.updates[0].learning_rate)

    def run(self, assignment: Assignment) -> Outcome:
        """Each client answers its plan; plan and report are encoded and decoded as on the wire."""
        reports, losses, up, down = [], [], 0, 0
        for number, plan in assignment.plans.items():
            sent = encode_plan(plan)
            report, loss = self._clients[number].answer(decode_plan(sent), self._worker)
            received = encode_report(report)
            reports.append(decode_report(received))
            if plan.round != CALIBRATION:
                self._worker.remember(reports[-1], plan.learning_rate)
            losses.append(loss)
            up += len(received)
            down += len(sent)
            self._answered()
        return Outcome(tuple(reports), up, down, sum(losses) / len(losses))
