"""A journal → the content of summary.json and selection.json."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from meerkat.journal import Journal, origin, replay
from meerkat.registry import build
from meerkat.runs.best_round import best_evaluation
from meerkat.transport.messages import PLAN_BYTES, encode_report
from meerkat.zo.axes import Along
from meerkat.zo.estimators import ESTIMATORS, Estimator
from meerkat.zo.estimators.backward import Backward
from meerkat.zo.state import Theta

__all__ = ["describe_selection", "directions_holding", "summarise"]


def describe_selection(journal: Journal) -> dict[str, Any] | None:
    """Who is stopped early and why, with each client's labels; None where nothing was decided."""
    decisions, header = journal.decisions(), journal.header
    if not decisions:
        return None
    chosen, last = header.parsed.selection, decisions[-1]
    clients = []
    for verdict in last.verdicts:
        known = {}
        if header.label_counts:  # in a deployment only the clients know
            counts = header.label_counts[verdict.client]
            labels = dict(zip(header.labels, counts, strict=False)) or {"examples": sum(counts)}
            known = {"labels": labels}
        clients.append({**asdict(verdict), **known})
    return {
        **{name: getattr(chosen, name) for name in ("kind", "signal", "action")},
        "flagged": list(last.flagged),
        "decisions": [
            {
                "round": decision.round,
                "source": decision.source,
                "thresholds": decision.thresholds and asdict(decision.thresholds),
                "flagged": list(decision.flagged),
            }
            for decision in decisions
        ],
        "clients": clients,
    }


def summarise(journal: Journal) -> dict[str, Any]:
    """The figures of a run, from its journal alone."""
    header, recipe = journal.header, journal.header.parsed
    metrics = [metrics for _, metrics in journal.records()]
    answers = sum(len(record.reports) for record, _ in journal.records())
    evaluations = [e for e in journal.evaluations() if e.examples]
    decisions = journal.decisions()
    calibrated = len(journal.calibrated())
    chosen = recipe.optimizer.estimator
    drawn = build(ESTIMATORS, chosen.kind, chosen.options, "optimizer.estimator")
    estimators: dict[Along, Estimator] = {"drawn": drawn, "axes": Backward()}
    calibrations = list(journal.calibrations())
    before = next((e for e in evaluations if e.round == 0), None)
    after = next((e for e in evaluations if e.round == journal.rounds), None)
    state = replay(journal)
    path = state.theta - origin(journal)[1]
    best = best_evaluation(journal.evaluations())
    seconds = sum(m.seconds for m in metrics) + sum(e.seconds for e in evaluations)
    return {
        "before": before.metrics if before else {},
        "after": after.metrics if after else {},
        "evaluated_examples": before and before.examples,
        "best_round": best and best.round,
        "best": best.metrics if best and best.examples else {},
        "rounds": journal.rounds,
        "planned_rounds": recipe.federation.rounds,
        "clients": recipe.federation.clients,
        "local_steps": recipe.federation.local_steps,
        "bytes_up_per_client_round": sum(m.bytes_up for m in metrics) / max(1, answers),
        "bytes_down_per_client_round": sum(m.bytes_down for m in metrics) / max(1, answers),
        "stopped_early": list(decisions[-1].flagged) if decisions else [],
        "calibrated_clients": calibrated,
        "calibration_forward_passes": sum(
            estimators[report.along].forward_passes(report.perturbations) * report.steps
            for report in calibrations
        ),
        "calibration_bytes_up": sum(len(encode_report(r)) for r in calibrations),
        "calibration_bytes_down": PLAN_BYTES * calibrated,
        "state_digest": state.digest,
        "mask_size": header.mask_size,
        "subspace": None if recipe.subspace is None else _describe_path(path),
        "subspace_renewals": [renewal.round for renewal in journal.renewals()],
        "eligible_parameters": header.eligible,
        "model": recipe.model.name,
        "seed": recipe.seed,
        "fingerprint": header.fingerprint,
        "seconds": round(seconds, 3),
    }


def directions_holding(w: Theta, share: float = 0.5) -> int:
    """The fewest directions of a subspace that hold this share of |w|².

    >>> directions_holding(np.array([0.0, 3.0, -4.0, 0.0])), directions_holding(np.zeros(4))
    (1, 0)
    """
    squares = np.sort(w.astype(np.float64) ** 2)[::-1]
    total = squares.sum()
    return int(np.searchsorted(squares.cumsum(), share * total) + 1) if total > 0 else 0


def _describe_path(w: Theta) -> dict[str, Any]:
    """How w, from where it started, is spread over the directions of a subspace."""
    largest = int(np.abs(w).argmax()) + 1 if w.any() else None
    return {"dimensions": len(w), "half_in": directions_holding(w), "largest": largest}
