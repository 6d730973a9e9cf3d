"""One round, in the steps of method.md section 4; pure: (state, reports) → (state, record)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from meerkat.errors import ProtocolError
from meerkat.federation.aggregation import clipped, usual_size
from meerkat.federation.algorithm import Algorithm
from meerkat.federation.messages import CALIBRATION, DIGEST_BYTES, ClientReport, RoundPlan
from meerkat.federation.schedule import Schedule
from meerkat.federation.state import ServerState
from meerkat.zo.axes import Along
from meerkat.zo.log import Log, Update
from meerkat.zo.noise import permutation

WINDOW = 20
"""Rounds whose |g| says what is usual."""
_FEWEST = 3
"""Clients of a round from which on a median is worth something."""

__all__ = [
    "WINDOW",
    "RoundRecord",
    "check_report",
    "close_round",
    "plan_calibration",
    "plan_round",
    "sampling_order",
]


@dataclass(frozen=True)
class RoundRecord:
    """What a round leaves behind; the journal keeps it."""

    round: int
    reports: tuple[ClientReport, ...]
    """Sorted by client."""
    updates: tuple[Update, ...]
    """What the round adds to the log."""
    state_digest: str
    """Digest of the state after the round."""


def sampling_order(schedule: Schedule, round: int) -> list[int]:
    """All clients, in the order in which a round samples them."""
    order: list[int] = permutation(schedule.seed, (6, round), schedule.federation.clients).tolist()
    return order


def plan_round(
    schedule: Schedule,
    state: ServerState,
    log: Log,
    present: Collection[int] | None = None,
    exact: Collection[int] | None = None,
) -> dict[int, RoundPlan]:
    """1. Sample clients; tell each its T_k and the log entries that it lacks.

    Args:
        present: Clients that can be asked; all by default.
        exact: Those that report the exact gradient; as the recipe says, if all are able to.
    """
    if exact is None:
        exact = schedule.exact_clients()
    order = sampling_order(schedule, state.round)
    here = None if present is None else frozenset(present)
    able = order if here is None else [client for client in order if client in here]
    everyone = schedule.is_calibration_round(state.round)
    sampled = sorted(able[: len(able) if everyone else schedule.clients_per_round])
    rate = schedule.learning_rate(state.round)
    # A log that was resumed from a checkpoint begins later than some clients' knowledge.
    starts = {client: max(int(state.known[client]), log.base) for client in sampled}
    lacking = {start: log.since(start) for start in set(starts.values())}
    return {
        client: RoundPlan(
            round=state.round,
            steps=_steps(schedule, state, client)[0],
            learning_rate=rate,
            first_step=int(state.steps_taken[client]),
            log_start=starts[client],
            updates=lacking[starts[client]],
            along="axes" if client in exact else "drawn",
        )
        for client in sampled
    }


def plan_calibration(schedule: Schedule, along: Along = "drawn") -> RoundPlan:
    """T_cali local steps from the initial state, the same for all clients (method.md section 5)."""
    steps = schedule.selection.calibration_steps
    return RoundPlan(CALIBRATION, steps, schedule.learning_rate(0), 0, 0, along=along)


def close_round(
    schedule: Schedule,
    state: ServerState,
    algorithm: Algorithm,
    plans: Mapping[int, RoundPlan],
    reports: Sequence[ClientReport],
    log: Log,
) -> tuple[ServerState, RoundRecord]:
    """From a round's reports, in any order, to the next state.

    Raises:
        ProtocolError: There is no report, one comes twice, or one does not answer its plan.
    """
    # 2. Check that each client started from the server's state and did what was asked.
    for report in reports:
        check_report(report, plans.get(report.client), state.model.digest, algorithm)
    ordered = tuple(sorted(reports, key=lambda report: report.client))
    clients = [report.client for report in ordered]
    if not clients or len(set(clients)) < len(clients):
        raise ProtocolError(f"round {state.round}: a client reported twice, or none did")

    # 3. Bound what one report may do, whatever its client claims.
    usual = (*state.usual, usual_size(ordered))[-WINDOW:]
    bounded = _bounded(ordered, usual, schedule.federation.clip_factor)

    # 4. Aggregate along the virtual paths: their mean needs only the mean scalars.
    rate = plans[clients[0]].learning_rate
    counted = [_counted(report, _steps(schedule, state, report.client)[1]) for report in bounded]
    updates = algorithm.aggregate(counted, rate)
    model = algorithm.apply(state.model, updates)

    # 5. The updates are the round; those who took part know the log up to its start.
    known, taken = state.known.copy(), state.steps_taken.copy()
    known[clients] = len(log)
    taken[clients] += [report.steps for report in ordered]
    for array in (known, taken):
        array.setflags(write=False)
    record = RoundRecord(state.round, ordered, updates, model.digest)
    after = replace(
        state, round=state.round + 1, model=model, known=known, steps_taken=taken, usual=usual
    )
    return after, record


def _bounded(
    reports: Sequence[ClientReport], usual: Sequence[float], factor: float
) -> Sequence[ClientReport]:
    """The reports with |g| clipped at `factor` times what is usual."""
    if not factor or len(reports) < _FEWEST:
        return reports
    bound = factor * max(usual[-1], float(np.median(usual)))
    return [clipped(report, bound) for report in reports]


def _steps(schedule: Schedule, state: ServerState, client: int) -> tuple[int, int]:
    """Local steps that a client is asked for, and how many of them are aggregated: T_k."""
    if schedule.is_calibration_round(state.round):
        return schedule.selection.calibration_steps, schedule.selection.calibration_steps
    counted = int(state.local_steps[client])
    watched = schedule.is_selection_window(state.round)
    return (schedule.federation.local_steps if watched else counted), counted


def _counted(report: ClientReport, steps: int) -> ClientReport:
    """The first steps of a report."""
    if report.steps <= steps:
        return report
    scalars = report.scalars[: steps * report.perturbations]
    return replace(report, steps=steps, scalars=scalars)


def check_report(
    report: ClientReport, plan: RoundPlan | None, state_digest: str, algorithm: Algorithm
) -> None:
    """Does a report answer its plan, from the state of this digest?

    Raises:
        ProtocolError: It does not; the line names the client and what differs.
    """
    where = f"report of client {report.client}"
    if plan is None:
        raise ProtocolError(f"{where}: it was not asked in round {report.round}")
    if report.round != plan.round:
        raise ProtocolError(f"{where}: it is for round {report.round}, this is {plan.round}")
    if report.along != plan.along:
        raise ProtocolError(f"{where}: it is along {report.along}, asked was {plan.along}")
    perturbations = algorithm.stream.count(plan.along)
    if report.steps != plan.steps or report.perturbations != perturbations:
        raise ProtocolError(
            f"{where}: {report.steps} steps of {report.perturbations} perturbations, asked were "
            f"{plan.steps} of {perturbations}"
        )
    if len(report.scalars) != report.steps * report.perturbations:
        raise ProtocolError(f"{where}: {len(report.scalars)} scalars for {report.steps} steps")
    if report.state_digest != bytes.fromhex(state_digest)[:DIGEST_BYTES]:
        raise ProtocolError(
            f"{where}: it started from another state than the server's "
            f"({report.state_digest.hex()}, here {state_digest[: 2 * DIGEST_BYTES]}); "
            "it must be resynchronised"
        )
    if not report.examples or not all(map(math.isfinite, report.scalars)):
        raise ProtocolError(f"{where}: it has no examples, or a scalar that is not finite")
