"""The one loop: rounds, evaluation and journal, whatever the engine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

from meerkat.descent import Theta
from meerkat.early_stopping import EarlyStopping
from meerkat.engines import Assignment, Engine
from meerkat.errors import DivergedError
from meerkat.journal import Journal, replay
from meerkat.progress import Progress
from meerkat.recipe import Recipe
from meerkat.records import Evaluated, RoundMetrics
from meerkat.rounds import close_round, plan_round
from meerkat.server.state import Log, ServerState, initial_state

__all__ = ["restore_state", "train"]

Evaluate = Callable[[int, Theta], Evaluated]


def train(
    recipe: Recipe,
    journal: Journal,
    state: ServerState,
    log: Log,
    engine: Engine,
    stopping: EarlyStopping,
    evaluate: Evaluate,
    progress: Progress,
) -> ServerState:
    """Run the rounds that the journal lacks; each is in the journal before the next begins.

    Args:
        state, log: Where the journal ends, from `restore_state`.

    Raises:
        DivergedError: A loss is not finite; the journal ends before that round.
        JournalError: The journal cannot be written.
        ProtocolError: A report does not answer its plan.
    """
    rounds, directions = recipe.federation.rounds, journal.header.directions
    meter = _Meter(recipe, journal, progress)

    def evaluate_once() -> None:
        if state.round not in meter.evaluated:
            found = evaluate(state.round, state.theta)
            journal.append_evaluation(found)
            meter.saw_evaluation(found)
            meter.start_rounds(state.round)

    meter.start_rounds(state.round)
    while state.round < rounds:
        if _due(recipe, state.round):
            evaluate_once()
        decided = stopping.before_round(state, log, engine, progress)
        if decided is not state:
            state = decided
            meter.start_rounds(state.round)
        started = time.monotonic()
        plans = plan_round(recipe, state, log, engine.present())
        try:
            outcome = engine.run(
                Assignment(plans, state.theta_digest, directions, log, state.theta)
            )
        except DivergedError as error:
            raise DivergedError(f"round {state.round}: {error}") from None
        state, record = close_round(recipe, state, directions, plans, outcome.reports, log)
        log.append(record.entries)
        metrics = RoundMetrics(
            outcome.loss, outcome.bytes_up, outcome.bytes_down, time.monotonic() - started
        )
        journal.append_round(record, metrics)
        meter.saw_round(metrics)
    evaluate_once()
    return state


def restore_state(journal: Journal, clients: int, local_steps: int) -> tuple[ServerState, Log]:
    """The server's state and log where the journal ends.

    Raises:
        JournalError: Replaying does not give the θ that the run recorded.
    """
    theta, digest = replay(journal)
    first = initial_state(theta, digest, clients, local_steps)
    known, taken, log = first.known.copy(), first.steps_taken.copy(), Log()
    for record, _ in journal.records():
        for report in record.reports:
            known[report.client] = len(log)
            taken[report.client] += report.steps
        log.append(record.entries)
    return replace(first, round=journal.rounds, known=known, steps_taken=taken), log


def _due(recipe: Recipe, round: int) -> bool:
    every = recipe.evaluation.every
    return round == 0 or (every > 0 and round % every == 0)


class _Meter:
    """Figures for the progress display."""

    def __init__(self, recipe: Recipe, journal: Journal, progress: Progress):
        self.evaluated = {found.round for found in journal.evaluations()}
        self._progress = progress
        self._rounds = recipe.federation.rounds
        self._clients = recipe.clients_per_round
        self._bytes = sum(m.bytes_up + m.bytes_down for _, m in journal.records())
        for found in journal.evaluations():
            self.saw_evaluation(found)

    def start_rounds(self, round: int) -> None:
        total = self._rounds * self._clients
        self._progress.start("Fine-tuning", total, round * self._clients)

    def saw_evaluation(self, found: Evaluated) -> None:
        self.evaluated.add(found.round)
        if found.accuracy is not None:
            self._progress.show({"accuracy": f"{found.accuracy:.3f}"})

    def saw_round(self, metrics: RoundMetrics) -> None:
        self._bytes += metrics.bytes_up + metrics.bytes_down
        loss = {} if math.isnan(metrics.loss) else {"loss": f"{metrics.loss:.3f}"}
        self._progress.show({**loss, "sent": f"{self._bytes:,} B"})
