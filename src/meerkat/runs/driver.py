"""The training loop: plan, run and close rounds, evaluate, and write the journal."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from meerkat.config import Recipe
from meerkat.engines.base import Assignment, Engine
from meerkat.errors import DivergedError
from meerkat.federation.aggregation import usual_size
from meerkat.federation.rounds import WINDOW, close_round, plan_round
from meerkat.federation.schedule import Schedule
from meerkat.federation.state import ServerState, initial_state
from meerkat.journal import Journal, replay
from meerkat.journal.records import Checkpoint, Evaluated, RoundMetrics
from meerkat.progress import Progress
from meerkat.runs.best_round import last_round
from meerkat.runs.early_stopping import EarlyStopping
from meerkat.runs.events import RunObserver
from meerkat.runs.pausing import Stops, never
from meerkat.runs.renewal import Renewals
from meerkat.zo.log import Log
from meerkat.zo.state import ModelState

CHECKPOINT_EVERY = 500
"""Rounds between two checkpoints of the journal."""

__all__ = ["CHECKPOINT_EVERY", "Evaluator", "checkpoint_of", "restore_state", "train"]

Evaluator = Callable[[int, ModelState], Evaluated]
"""(rounds done, the state then) → its metrics."""


def train(
    recipe: Recipe,
    journal: Journal,
    state: ServerState,
    log: Log,
    engine: Engine,
    stopping: EarlyStopping,
    renewals: Renewals,
    evaluate: Evaluator,
    observer: RunObserver,
    progress: Progress,
    stops: Stops = never,
) -> ServerState:
    """Run the rounds that the journal lacks; each is in the journal before the next begins.

    They end at `federation.rounds`, where `evaluation.patience` is at an end, or where `stops`
    says so: then the journal can be gone on with.

    Args:
        state, log: Where the journal ends, from `restore_state`.
        observer: Is told what is in the journal.

    Raises:
        DivergedError: A loss is not finite; the journal ends before that round.
        JournalError: The journal cannot be written.
        ProtocolError: A report does not answer its plan.
        RunError: A subspace was not renewed in time.
    """
    schedule, algorithm = Schedule.of(recipe), journal.header.algorithm
    known = journal.evaluations()

    def evaluate_once() -> None:
        if all(found.round != state.round for found in known):
            found = evaluate(state.round, state.model)
            journal.append_evaluation(found)
            known.append(found)
            observer.evaluated(found)

    while state.round < recipe.federation.rounds:
        if _is_due(recipe.evaluation.every, state.round):
            evaluate_once()
            if state.round >= last_round(recipe, known):
                break
        if stops(state.round):
            break
        state = renewals.before_round(state, log, engine)
        state = stopping.before_round(state, log, engine, progress)
        started = time.monotonic()
        present, exact = engine.present(), schedule.exact_clients(engine.able)
        plans = plan_round(schedule, state, log, present, exact)
        try:
            outcome = engine.run(Assignment(plans, state.model.digest, algorithm, log, state.model))
        except DivergedError as error:
            raise DivergedError(f"round {state.round}: {error}") from None
        state, record = close_round(schedule, state, algorithm, plans, outcome.reports, log)
        log.append(record.updates)
        metrics = RoundMetrics(
            outcome.loss, outcome.bytes_up, outcome.bytes_down, time.monotonic() - started
        )
        journal.append_round(record, metrics)
        if state.round % CHECKPOINT_EVERY == 0:
            journal.append_checkpoint(checkpoint_of(state, log))
        observer.round_closed(record, metrics)
    evaluate_once()
    return state


def restore_state(journal: Journal, clients: int, local_steps: int) -> tuple[ServerState, Log]:
    """The server's state and log where the journal ends; the log begins at the last checkpoint.

    Raises:
        JournalError: Replaying does not give the state that the run recorded.
    """
    first = initial_state(_replayed(journal), clients, local_steps)
    known, taken = first.known.copy(), first.steps_taken.copy()
    usual: deque[float] = deque(maxlen=WINDOW)
    start, log = 0, Log()
    if (checkpoint := journal.checkpoint()) is not None:
        known, taken = checkpoint.known.copy(), checkpoint.steps_taken.copy()
        usual.extend(checkpoint.usual)
        start, log = checkpoint.round, Log(checkpoint.position)
    renewed = {renewal.round for renewal in journal.renewals()}
    for record, _ in journal.records(start):
        if record.round in renewed:
            log.restart()
        for report in record.reports:
            known[report.client] = len(log)
            taken[report.client] += report.steps
        usual.append(usual_size(record.reports))
        log.append(record.updates)
    if journal.rounds in renewed:
        log.restart()
    for array in (known, taken):
        array.setflags(write=False)
    state = replace(first, round=journal.rounds, known=known, steps_taken=taken, usual=tuple(usual))
    return state, log


def _replayed(journal: Journal) -> ModelState:
    """The state that the next round starts from."""
    state = replay(journal)  # checks what was recorded
    last = journal.renewals()[-1:]
    if last and last[0].round == journal.rounds:
        return journal.header.algorithm.init(last[0].start)
    return state


def checkpoint_of(state: ServerState, log: Log) -> Checkpoint:
    """What the journal keeps of a state, so that the rounds before it need not be read again."""
    return Checkpoint(
        state.round,
        len(log),
        state.model.to_bytes(),
        state.known,
        state.steps_taken,
        state.usual,
    )


def _is_due(every: int, round: int) -> bool:
    return round == 0 or (every > 0 and round % every == 0)
