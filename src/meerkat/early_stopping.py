"""Who is stopped early, round by round: calibrate who is new, decide, keep the decision.

The rules are in `server/selection.py`; here is when they are applied. Every decision is in the
journal before the round that it shapes, so a run that is resumed goes by the same one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from meerkat.descent import Theta, digest
from meerkat.engines import Assignment, Engine
from meerkat.errors import DivergedError, ProtocolError, RecipeError
from meerkat.journal import Journal
from meerkat.noise import permutation
from meerkat.progress import Progress
from meerkat.recipe import Recipe
from meerkat.rounds import plan_calibration
from meerkat.server.selection import (
    Decision,
    Verdict,
    decide_by_paths,
    decide_without_paths,
    merged,
)
from meerkat.server.state import Log, ServerState
from meerkat.trajectories import calibration_reports, calibration_signals, round_signals

if TYPE_CHECKING:  # a server process needs no torch
    from meerkat.mask.file import Mask

__all__ = ["EarlyStopping", "check_signal"]


def check_signal(recipe: Recipe, mask: Mask) -> None:
    """Can clients be judged by this signal, with this mask?

    Raises:
        RecipeError: The signal is `gradip`, and the mask has no p.
    """
    chosen = recipe.selection
    if chosen.kind == "gradip" and chosen.signal == "gradip" and mask.gradient is None:
        raise RecipeError(
            f"selection.signal = 'gradip' needs the pre-training gradient, which this {mask.kind} "
            "mask lacks; set selection.signal = 'projected-gradient', or mask.kind = 'sensitivity'"
        )


class EarlyStopping:
    """Keeps T_k of every client up to date (method.md section 5).

    Args:
        gradient: p, which the signal `gradip` needs.
        decided: Called after each decision.
    """

    def __init__(
        self,
        recipe: Recipe,
        journal: Journal,
        gradient: Theta | None,
        decided: Callable[[], None] = lambda: None,
    ):
        self._recipe = recipe
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
        match chosen.kind:
            case "gradip":
                if not recipe.is_founding(state.round):
                    self._calibrate(state, log, engine, progress)
                    self._decide(state.round)
            case "random" | "list" if self._decision is None:
                stopped: tuple[int, ...] = chosen.clients
                if chosen.kind == "random":
                    order = permutation(recipe.seed, (8, 0), recipe.federation.clients)
                    stopped = tuple(order[: chosen.count].tolist())
                self._keep(decide_without_paths(recipe, stopped))
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
        recipe, journal = self._recipe, self._journal
        fresh = sorted(set(engine.present()) - self._calibrated())
        if not fresh:
            return
        plan, start = plan_calibration(recipe), digest(journal.theta0)
        progress.start("Calibrating the clients", len(fresh))
        for begin in range(0, len(fresh), recipe.clients_per_round):
            plans = dict.fromkeys(fresh[begin : begin + recipe.clients_per_round], plan)
            asked = Assignment(plans, start, journal.header.directions, log, state.theta)
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
            reports = calibration_reports(self._journal, self._recipe)
            self._known = {report.client for report in reports}
        return self._known

    def _decide(self, round: int) -> None:
        """Judge by the calibrations when there are new ones, and by rounds when it is time."""
        recipe, journal, every = self._recipe, self._journal, self._recipe.selection.every
        if self._calibrated() - {verdict.client for verdict in self._verdicts()}:
            signals = calibration_signals(journal, recipe, self._gradient)
            fresh = decide_by_paths(recipe, round, "calibration", signals)
            # What was seen in rounds is newer than what a calibration showed.
            seen = [verdict for verdict in self._verdicts() if verdict.source == "rounds"]
            self._keep(merged(fresh, fresh.verdicts, seen))
        due = round - round % every if every else 0
        if due and not any(v.source == "rounds" and v.judged >= due for v in self._verdicts()):
            signals = round_signals(journal, recipe, self._gradient, due)
            stopped = self._decision.flagged if self._decision else ()
            if signals:
                fresh = decide_by_paths(recipe, due, "rounds", signals, stopped)
                self._keep(merged(fresh, self._verdicts(), fresh.verdicts))

    def _verdicts(self) -> tuple[Verdict, ...]:
        return self._decision.verdicts if self._decision else ()

    def _keep(self, decision: Decision) -> None:
        self._journal.append_decision(decision)
        self._decision = decision
        self._decided()
