"""All clients in this process, one after the other, over the encoded messages of the wire."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from meerkat.client import Client, Worker
from meerkat.engines import Assignment, Outcome
from meerkat.protocol import decode_plan, decode_report, encode_plan, encode_report

__all__ = ["LocalEngine"]


class LocalEngine:
    """Simulates clients with one worker: one model and one θ, however many clients.

    Args:
        answered: Called after each client's answer, for progress.
    """

    def __init__(
        self,
        worker: Worker,
        clients: Sequence[Client],
        answered: Callable[[], None] = lambda: None,
    ):
        self._worker = worker
        self._clients = clients
        self._answered = answered

    def present(self) -> Collection[int]:
        return range(len(self._clients))

    def run(self, assignment: Assignment) -> Outcome:
        """Each client answers its plan; what it reads and writes went through the encoding."""
        reports, losses, up, down = [], [], 0, 0
        for number, plan in assignment.plans.items():
            sent = encode_plan(plan)
            report, loss = self._clients[number].answer(decode_plan(sent), self._worker)
            received = encode_report(report)
            reports.append(decode_report(received))
            losses.append(loss)
            up += len(received)
            down += len(sent)
            self._answered()
        return Outcome(tuple(reports), up, down, sum(losses) / len(losses))
