"""One round, its steps in the order of the paper; pure: (state, reports) → (state, record)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from meerkat.descent import digest, follow
from meerkat.errors import ProtocolError
from meerkat.noise import Directions, permutation
from meerkat.protocol import CALIBRATION, DIGEST_BYTES, ClientReport, LogEntry, RoundPlan
from meerkat.recipe import Optimizer, Recipe
from meerkat.server.aggregation import aggregate
from meerkat.server.state import Log, ServerState

__all__ = [
    "RoundRecord",
    "check_report",
    "close_round",
    "learning_rate",
    "plan_calibration",
    "plan_round",
]


@dataclass(frozen=True)
class RoundRecord:
    """What a round leaves behind; the journal keeps it."""

    round: int
    reports: tuple[ClientReport, ...]
    """Sorted by client."""
    entries: tuple[LogEntry, ...]
    theta_digest: str
    """Digest of θ_{r+1}."""


def plan_round(
    recipe: Recipe, state: ServerState, log: Log, present: Collection[int] | None = None
) -> dict[int, RoundPlan]:
    """1. Sample clients; tell each its T_k and the log entries that it lacks.

    Args:
        present: Clients that can be asked; all by default.
    """
    federation = recipe.federation
    order = permutation(recipe.seed, (6, state.round), federation.clients).tolist()
    able = order if present is None else [client for client in order if client in present]
    most = len(able) if recipe.is_founding(state.round) else recipe.clients_per_round
    sampled = sorted(able[:most])
    rate = learning_rate(recipe.optimizer, state.round, federation.rounds)
    lacking = {start: log.since(start) for start in {int(state.known[k]) for k in sampled}}
    return {
        client: RoundPlan(
            round=state.round,
            steps=_steps(recipe, state, client)[0],
            learning_rate=rate,
            first_step=int(state.steps_taken[client]),
            log_start=int(state.known[client]),
            entries=lacking[int(state.known[client])],
        )
        for client in sampled
    }


def plan_calibration(recipe: Recipe) -> RoundPlan:
    """T_cali local steps from the initial θ (method.md section 5), the same for every client."""
    rate = learning_rate(recipe.optimizer, 0, recipe.federation.rounds)
    return RoundPlan(CALIBRATION, recipe.selection.calibration_steps, rate, 0, 0)


def close_round(
    recipe: Recipe,
    state: ServerState,
    directions: Directions,
    plans: Mapping[int, RoundPlan],
    reports: Sequence[ClientReport],
    log: Log,
) -> tuple[ServerState, RoundRecord]:
    """From a round's reports, in any order, to the next state.

    Raises:
        ProtocolError: There is no report, one comes twice, or one does not answer its plan.
    """
    # 2. Check that each client started from the server's θ and did what was asked.
    for report in reports:
        check_report(report, plans.get(report.client), state.theta_digest, directions)
    ordered = tuple(sorted(reports, key=lambda report: report.client))
    clients = [report.client for report in ordered]
    if not clients or len(set(clients)) < len(clients):
        raise ProtocolError(f"round {state.round}: a client reported twice, or none did")

    # 3. and 4. Aggregate along the virtual paths: their mean needs only the mean scalars.
    rate = plans[clients[0]].learning_rate
    counted = [_counted(report, _steps(recipe, state, report.client)[1]) for report in ordered]
    entries = aggregate(counted, rate, recipe.federation.weighting, directions)
    theta = state.theta.copy()
    follow(theta, entries, directions)
    theta.setflags(write=False)

    # 5. The log entries are the round; those who took part know the log up to its start.
    known, taken = state.known.copy(), state.steps_taken.copy()
    known[clients] = len(log)
    taken[clients] += [report.steps for report in ordered]
    for array in (known, taken):
        array.setflags(write=False)
    record = RoundRecord(state.round, ordered, entries, digest(theta))
    after = replace(
        state,
        round=state.round + 1,
        theta=theta,
        theta_digest=record.theta_digest,
        known=known,
        steps_taken=taken,
    )
    return after, record


def _steps(recipe: Recipe, state: ServerState, client: int) -> tuple[int, int]:
    """Local steps that a client is asked for, and how many of them are aggregated: T_k."""
    if recipe.is_founding(state.round):
        return recipe.selection.calibration_steps, recipe.selection.calibration_steps
    counted = int(state.local_steps[client])
    watched = recipe.is_watched(state.round)
    return (recipe.federation.local_steps if watched else counted), counted


def _counted(report: ClientReport, steps: int) -> ClientReport:
    """The first steps of a report."""
    if report.steps <= steps:
        return report
    scalars = report.scalars[: steps * report.perturbations]
    return replace(report, steps=steps, scalars=scalars)


def check_report(
    report: ClientReport, plan: RoundPlan | None, theta_digest: str, directions: Directions
) -> None:
    """Does a report answer its plan, from the θ of this digest?

    Raises:
        ProtocolError: It does not; the line names the client and what differs.
    """
    where = f"report of client {report.client}"
    if plan is None:
        raise ProtocolError(f"{where}: it was not asked in round {report.round}")
    if report.round != plan.round:
        raise ProtocolError(f"{where}: it is for round {report.round}, this is {plan.round}")
    if report.steps != plan.steps or report.perturbations != directions.perturbations:
        raise ProtocolError(
            f"{where}: {report.steps} steps of {report.perturbations} perturbations, asked were "
            f"{plan.steps} of {directions.perturbations}"
        )
    if len(report.scalars) != report.steps * report.perturbations:
        raise ProtocolError(f"{where}: {len(report.scalars)} scalars for {report.steps} steps")
    if report.theta_digest != bytes.fromhex(theta_digest)[:DIGEST_BYTES]:
        raise ProtocolError(
            f"{where}: it started from another θ than the server's ({report.theta_digest.hex()}, "
            f"here {theta_digest[: 2 * DIGEST_BYTES]}); it must be resynchronised"
        )
    if not report.examples or not all(map(math.isfinite, report.scalars)):
        raise ProtocolError(f"{where}: it has no examples, or a scalar that is not finite")


def learning_rate(optimizer: Optimizer, round: int, rounds: int) -> float:
    """η of a round, as the float32 that plan and log carry."""
    done = round / rounds
    match optimizer.schedule:
        case "linear":
            factor = 1.0 - done
        case "cosine":
            factor = 0.5 * (1.0 + math.cos(math.pi * done))
        case _:
            factor = 1.0
    return float(np.float32(optimizer.learning_rate * factor))
