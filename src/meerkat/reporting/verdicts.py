"""The section on early stopping, without its pictures: a sentence and the rows of two tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meerkat.federation.selection import Decision, Verdict
from meerkat.federation.thresholds import EVERYTHING, LARGEST, Thresholds
from meerkat.reporting.figure import (
    LABEL_COLOURS,
    label_names,
    listed,
    measured,
    plural,
    tally,
    thin,
)
from meerkat.reporting.run_view import Run
from meerkat.reporting.stopping import Made, Stopping

__all__ = ["ClientRow", "DecisionRow", "EarlyStopping", "LabelBar", "early_stopping"]

_ROWS, _EXTREME, _NEAREST = 24, 100, 6
"""Clients in the table: so many, or if more are extreme these up to 100, and the next few."""
_DECISIONS = 13
"""Most decisions in the table of them."""
_LISTED = 24
"""Most numbers of clients in one line."""
_LABELS = 4
"""Most labels of a client that are named."""
_NONE = "–"


@dataclass(frozen=True)
class DecisionRow:
    """One decision of several."""

    round: str
    source: str
    stopped: str
    """How many clients."""
    clients: str
    """Their numbers."""


@dataclass(frozen=True)
class LabelBar:
    """What examples a client holds."""

    parts: tuple[tuple[str, str], ...]
    """Width in percent and colour of each part of the bar; the colours are those of the picture
    of labels."""
    counts: str
    """Counts by label, largest first."""


@dataclass(frozen=True)
class ClientRow:
    """What is decided of one client, and why; each cell is text."""

    client: str
    verdict: str
    steps: str
    later: str
    quiet: str
    margin: str
    round: str
    source: str
    labels: LabelBar


@dataclass(frozen=True)
class EarlyStopping:
    """The section on early stopping."""

    sentence: str
    """By what rule clients were judged, and how many were stopped."""
    decisions_caption: str
    decisions: list[DecisionRow]
    """Empty where there was one decision only."""
    clients_caption: str
    clients: list[ClientRow]


def early_stopping(run: Run, stopping: Stopping) -> EarlyStopping:
    """The section on the decisions of a run, of which the last is in force."""
    decisions_caption, decisions = _decisions(stopping.made)
    clients_caption, clients = _clients(run, stopping.last)
    return EarlyStopping(
        sentence=_sentence(run, stopping.last),
        decisions_caption=decisions_caption,
        decisions=decisions if len(stopping.made) > 1 else [],
        clients_caption=clients_caption,
        clients=clients,
    )


def _sentence(run: Run, last: Decision) -> str:
    count = f"{len(last.flagged):,} of {plural(run.clients, 'client')}"
    limits = last.thresholds
    if limits is None:
        kind = {"random": "at random", "list": "by the recipe's list"}
        how = kind.get(run.recipe.get("selection.kind", ""), "by the recipe")
        return f"Chosen {how}, whatever their paths are: {count}."
    signal = "|g|" if run.recipe.get("selection.signal") == "projected-gradient" else "|GradIP|"
    source = {"calibration": "in the calibration", "rounds": "in the rounds before"}
    return (
        f"Before round {last.round:,} clients were judged by {signal} "
        f"{source.get(last.source, '')}. {_rule(limits)}. Stopped: {count}."
    )


def _rule(limits: Thresholds) -> str:
    values = [
        f"{name} {'none found' if value is None else f'{sign} {measured(value)}'}"
        for name, sign, value in (
            ("σ", "=", limits.sigma),
            ("ρ_later", ">", limits.later),
            ("ρ_quiet", ">", limits.quiet),
        )
    ]
    rule = f"A client beyond both thresholds is extreme: {', '.join(values)}"
    if limits.sigma == EVERYTHING:
        rule = f"A client beyond the threshold is extreme: {values[1]}, whatever ρ_quiet is"
    if limits.release is not None:
        rule += f"; one that was stopped before stays so while ρ_later > {measured(limits.release)}"
    return rule


def _decisions(made: Sequence[Made]) -> tuple[str, list[DecisionRow]]:
    """Caption and rows; of many decisions some, evenly spread."""
    places = thin(len(made), _DECISIONS)
    caption = f"{len(made):,} decisions, of which the last is in force"
    if len(places) < len(made):
        caption += f" ({len(places)} of them)"
    rows = [
        DecisionRow(
            round=f"{one.round:,}",
            source=one.source,
            stopped=f"{len(one.extreme):,}",
            clients=listed(one.extreme, _LISTED) or _NONE,
        )
        for one in (made[place] for place in places)
    ]
    return f"{caption}.", rows


def _clients(run: Run, last: Decision) -> tuple[str, list[ClientRow]]:
    """Caption and rows; of many clients the extreme ones, and those nearest to being extreme."""
    found = {verdict.client: verdict for verdict in last.verdicts}
    clients = sorted({*range(run.clients), *found}, key=lambda client: _rank(client, found))
    extreme = len(last.flagged)
    shown = [*clients[: min(extreme, _EXTREME)]]
    shown += clients[extreme : extreme + max(_NEAREST, _ROWS - extreme)]
    caption = "Clients: those that are stopped, then the others, nearest to it first"
    if len(shown) < len(clients):
        caption += f" ({len(shown)} of {len(clients):,})"
    caption += ". T_k: local steps in a round"
    if last.thresholds is not None:
        caption += "; margin: the smaller of ρ by its threshold, less one"
    return f"{caption}.", [_row(run, client, last, found.get(client)) for client in shown]


def _rank(client: int, found: dict[int, Verdict]) -> tuple[bool, float, int]:
    """Sorts extreme clients first, then by margin; those that were not judged come last."""
    verdict = found.get(client)
    if verdict is None or verdict.margin is None:
        return not (verdict and verdict.flagged), float("inf"), client
    return not verdict.flagged, -verdict.margin, client


def _row(run: Run, client: int, last: Decision, verdict: Verdict | None) -> ClientRow:
    if verdict is None:
        return ClientRow(
            client=run.name(client),
            verdict="not judged",
            steps=f"{run.recipe.get('federation.local_steps', '?')}",
            later=_NONE,
            quiet=_NONE,
            margin=_NONE,
            round=_NONE,
            source=_NONE,
            labels=_labels(run, client),
        )
    quiet, margin = verdict.rho_quiet, verdict.margin
    if last.thresholds and last.thresholds.sigma == EVERYTHING and verdict.source == last.source:
        quiet = None  # Every step counts as quiet, so ρ_quiet says nothing.
    unjudged = verdict.rho_later is None and verdict.source != "recipe"
    return ClientRow(
        client=run.name(client),
        verdict="stopped" if verdict.flagged else "not judged" if unjudged else "kept",
        steps=f"{verdict.steps:,}",
        later=_ratio(verdict.rho_later),
        quiet=_NONE if quiet is None else f"{quiet:.2f}",
        margin=_ratio(margin) if margin is None or margin > 99 else f"{margin:+.2f}",
        round=f"{verdict.judged:,}",
        source=verdict.source,
        labels=_labels(run, client),
    )


def _ratio(value: float | None) -> str:
    if value is None:
        return _NONE
    return "∞" if value >= LARGEST else measured(value)


def _labels(run: Run, client: int) -> LabelBar:
    every_count = run.header.label_counts
    if client >= len(every_count):
        return LabelBar((), _NONE)
    names = label_names(run.header.labels, max(map(len, every_count)))
    held = [(i, count) for i, count in sorted(tally(every_count[client], names).items()) if count]
    total = sum(count for _, count in held)
    if not total:
        return LabelBar((), "none")
    ranked = sorted(held, key=lambda one: (-one[1], one[0]))
    counts = [f"{names[i]} {count:,}" for i, count in ranked[:_LABELS]]
    if len(ranked) > _LABELS:
        rest = sum(count for _, count in ranked[_LABELS:])
        counts.append(f"{len(ranked) - _LABELS} others {rest:,}")
    return LabelBar(
        parts=tuple((f"{100 * count / total:.4g}", LABEL_COLOURS[i]) for i, count in held),
        counts=", ".join(counts),
    )
