"""Early stopping during a run: calibrates new clients, decides, and records each decision.

The rules are in `federation/selection.py`; here is when they are applied. A decision is in the
journal before the first round that uses it, so a run that is resumed uses the same one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from meerkat.config import Recipe, Selection
from meerkat.engines.base import Assignment, Engine
from meerkat.errors import DivergedError, ProtocolError, RecipeError
from meerkat.federation.rounds import plan_calibration
from meerkat.federation.schedule import Schedule
from meerkat.federation.selection import (
    Decision,
    Verdict,
    decide_by_paths,
    decide_without_paths,
    merged,
)
from meerkat.federation.state import ServerState
from meerkat.journal import Journal
from meerkat.progress import Progress
from meerkat.runs.trajectories import calibration_reports, calibration_signals, round_signals
from meerkat.spaces.mask_file import Mask
from meerkat.zo.log import Log
from meerkat.zo.noise import permutation
from meerkat.zo.state import Theta

__all__ = ["EarlyStopping", "check_signal"]


def check_signal(chosen: Selection, mask: Mask) -> None:
    """Can clients be judged by this signal, with this mask?

    Raises:
        RecipeError: The signal is `gradip`, and the mask has no p.
    """
    if chosen.kind == "gradip" and chosen.signal == "gradip" and mask.gradient is None:
        raise RecipeError(
            f"selection.signal = 'gradip' needs the pre-training gradient, which this {mask.kind} "
            "mask lacks; set selection.signal = 'projected-gradient', or mask.kind = 'sensitivity'"
        )


class EarlyStopping:
    """Keeps T_k of every client up to date (method.md section 5).

    Args:
        gradient: p, which the signal `gradip` needs.
        decided: Called with each decision once it is in the journal.
    """

    def __init__(
        self,
        recipe: Recipe,
        journal: Journal,
        gradient: Theta | None,
        decided: Callable[[Decision], None] = lambda decision: None,
    ):
        self._recipe, self._schedule = recipe, Schedule.of(recipe)
        self._journal = journal
        self._gradient = gradient
        self._decided = decided
        decisions = journal.decisions()
        self._decision = decisions[-1] if decisions else None
        self._applied: Decision | None = None
        self._known: set[int] | None = None

    def before_round(
        self, state: ServerState, log: Log, engine: Engine, progress: Progress
    ) -> ServerState:
        """The state with the T_k that hold from now on; calibrates clients that are new.

        Raises:
            DivergedError: A loss of a calibration is not finite.
            JournalError: The journal cannot be written.
            ProtocolError: An answer does not fit the calibration plan.
        """
        recipe, chosen = self._recipe, self._recipe.selection
        clients = recipe.federation.clients
        match chosen.kind:
            case "gradip":
                if not self._schedule.is_calibration_round(state.round):
                    self._calibrate(state, log, engine, progress)
                    self._decide(state.round)
            case "random" | "list" if self._decision is None:
                stopped: tuple[int, ...] = chosen.clients
                if chosen.kind == "random":
                    order = permutation(recipe.seed, (8, 0), clients)
                    stopped = tuple(order[: chosen.count].tolist())
                self._keep(decide_without_paths(clients, recipe.federation.local_steps, stopped))
        if self._decision is self._applied:
            return state
        self._applied = self._decision
        steps = state.local_steps.copy()
        for verdict in self._verdicts():
            steps[verdict.client] = verdict.steps
        steps.setflags(write=False)
        return replace(state, local_steps=steps)

    def _calibrate(self, state: ServerState, log: Log, engine: Engine, progress: Progress) -> None:
        """Have the clients that are new take T_cali steps, as many at a time as a round has."""
        schedule, journal = self._schedule, self._journal
        fresh = sorted(set(engine.present()) - self._calibrated())
        if not fresh:
            return
        algorithm, exact = journal.header.algorithm, schedule.exact_clients(engine.able)
        drawn, along_axes = (plan_calibration(schedule, along) for along in ("drawn", "axes"))
        renewals = journal.renewals()
        start = algorithm.init(renewals[-1].start if renewals else journal.theta0).digest
        progress.start("Calibrating the clients", len(fresh))
        for begin in range(0, len(fresh), schedule.clients_per_round):
            asked_now = fresh[begin : begin + schedule.clients_per_round]
            plans = {client: along_axes if client in exact else drawn for client in asked_now}
            asked = Assignment(plans, start, algorithm, log, state.model)
            try:
                outcome = engine.run(asked)
            except DivergedError as error:
                raise DivergedError(f"calibration: {error}") from None
            for report in outcome.reports:
                asked.judge(report)
            if len({report.client for report in outcome.reports}) < len(outcome.reports):
                raise ProtocolError("calibration: a client reported twice")
            journal.append_calibrations(outcome.reports)
            self._known = self._calibrated() | {report.client for report in outcome.reports}

    def _calibrated(self) -> set[int]:
        """Clients with a calibration; asked for in every round, so read from the journal once."""
        if self._known is None:
            reports = calibration_reports(self._journal, self._schedule)
            self._known = {report.client for report in reports}
        return self._known

    def _decide(self, round: int) -> None:
        """Judge by the calibrations when there are new ones, and by rounds when it is time."""
        schedule, journal, chosen = self._schedule, self._journal, self._recipe.selection
        steps, every = schedule.federation.local_steps, chosen.every
        if self._calibrated() - {verdict.client for verdict in self._verdicts()}:
            signals = calibration_signals(journal, schedule, self._gradient)
            fresh = decide_by_paths(chosen, steps, round, "calibration", signals)
            # What was seen in rounds is newer than what a calibration showed.
            seen = [verdict for verdict in self._verdicts() if verdict.source == "rounds"]
            self._keep(merged(fresh, fresh.verdicts, seen))
        due = round - round % every if every else 0
        if due and not any(v.source == "rounds" and v.judged >= due for v in self._verdicts()):
            signals = round_signals(journal, schedule, self._gradient, due)
            stopped = self._decision.flagged if self._decision else ()
            if signals:
                fresh = decide_by_paths(chosen, steps, due, "rounds", signals, stopped)
                self._keep(merged(fresh, self._verdicts(), fresh.verdicts))

    def _verdicts(self) -> tuple[Verdict, ...]:
        return self._decision.verdicts if self._decision else ()

    def _keep(self, decision: Decision) -> None:
        self._journal.append_decision(decision)
        self._decision = decision
        self._decided(decision)
