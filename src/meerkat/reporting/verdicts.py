"""What the page tells of early stopping in words and tables: thresholds, decisions, verdicts."""

from __future__ import annotations

from collections.abc import Sequence

from meerkat.reporting.figure import (
    LABEL_COLOURS,
    label_names,
    listed,
    measured,
    plural,
    safe,
    tally,
    thin,
)
from meerkat.reporting.stopping import Made, Stopping
from meerkat.reporting.summary import Run
from meerkat.server.selection import Decision, Verdict
from meerkat.server.thresholds import EVERYTHING, LARGEST, Thresholds

__all__ = ["early_stopping"]

_ROWS, _EXTREME, _NEAREST = 24, 100, 6
"""Clients in the table: so many, or if more are extreme these up to 100, and the next few."""
_DECISIONS = 13
"""Most decisions in the table of them."""
_LISTED = 24
"""Most numbers of clients in one line."""
_LABELS = 4
"""Most labels of a client that are named."""
_NONE = "–"


def early_stopping(run: Run, stopping: Stopping) -> str:
    """How clients were judged, the decisions if there were several, and a verdict a row."""
    parts = [f'<p class="note">{safe(_told(run, stopping.last))}</p>']
    if len(stopping.made) > 1:
        parts.append(_decisions(stopping.made))
    parts.append(_verdicts(run, stopping.last))
    return "\n".join(parts)


def _told(run: Run, last: Decision) -> str:
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
    told = [
        f"{name} {'none found' if value is None else f'{sign} {measured(value)}'}"
        for name, sign, value in (
            ("σ", "=", limits.sigma),
            ("ρ_later", ">", limits.later),
            ("ρ_quiet", ">", limits.quiet),
        )
    ]
    rule = f"A client beyond both thresholds is extreme: {', '.join(told)}"
    if limits.sigma == EVERYTHING:
        rule = f"A client beyond the threshold is extreme: {told[1]}, whatever ρ_quiet is"
    if limits.release is not None:
        rule += f"; one that was stopped before stays so while ρ_later > {measured(limits.release)}"
    return rule


def _decisions(made: Sequence[Made]) -> str:
    places = thin(len(made), _DECISIONS)
    caption = f"{len(made):,} decisions, of which the last is in force"
    if len(places) < len(made):
        caption += f" ({len(places)} of them)"
    rows = [
        (f"{one.round:,}", one.source, f"{len(one.extreme):,}", listed(one.extreme, _LISTED))
        for one in (made[place] for place in places)
    ]
    heads = ("before round", "judged by", "stopped", "which")
    body = "\n".join(_row([safe(cell or _NONE) for cell in row]) for row in rows)
    return _table("decisions", caption, heads, body)


def _verdicts(run: Run, last: Decision) -> str:
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
    heads = (
        *("client", "verdict", "T_k", "ρ_later", "ρ_quiet", "margin"),
        *("before round", "judged by", "training examples by label"),
    )
    body = "\n".join(_row(_cells(run, client, last, found.get(client)), 1) for client in shown)
    return _table("verdicts", caption, heads, body)


def _rank(client: int, found: dict[int, Verdict]) -> tuple[bool, float, int]:
    """Extreme clients first, then by margin; who was not judged is last."""
    verdict = found.get(client)
    if verdict is None or verdict.margin is None:
        return not (verdict and verdict.flagged), float("inf"), client
    return not verdict.flagged, -verdict.margin, client


def _cells(run: Run, client: int, last: Decision, verdict: Verdict | None) -> list[str]:
    counts = run.header.label_counts
    labels = _labels(run, counts[client]) if client < len(counts) else _NONE
    if verdict is None:
        steps = safe(run.recipe.get("federation.local_steps", "?"))
        return [f"{client}", "not judged", steps, *[_NONE] * 5, labels]
    quiet, margin = verdict.rho_quiet, verdict.margin
    if last.thresholds and last.thresholds.sigma == EVERYTHING and verdict.source == last.source:
        quiet = None  # it plays no part
    told = "kept"
    if verdict.flagged:
        told = '<span class="stopped">stopped</span>'
    elif verdict.rho_later is None and verdict.source != "recipe":
        told = "not judged"
    return [
        f"{client}",
        told,
        f"{verdict.steps:,}",
        _ratio(verdict.rho_later),
        _NONE if quiet is None else f"{quiet:.2f}",
        _ratio(margin) if margin is None or margin > 99 else f"{margin:+.2f}",
        f"{verdict.judged:,}",
        safe(verdict.source),
        labels,
    ]


def _ratio(value: float | None) -> str:
    if value is None:
        return _NONE
    return "∞" if value >= LARGEST else measured(value)


def _labels(run: Run, counts: Sequence[int]) -> str:
    """A bar in the colours of the picture of labels, and the counts, largest first."""
    names = label_names(run.header.labels, max(map(len, run.header.label_counts)))
    held = [(i, count) for i, count in sorted(tally(counts, names).items()) if count]
    total = sum(count for _, count in held)
    if not total:
        return "none"
    bar = "".join(
        f'<i style="width:{100 * count / total:.4g}%;background:{LABEL_COLOURS[i]}"></i>'
        for i, count in held
    )
    ranked = sorted(held, key=lambda one: (-one[1], one[0]))
    told = [f"{safe(names[i])} {count:,}" for i, count in ranked[:_LABELS]]
    if len(ranked) > _LABELS:
        rest = sum(count for _, count in ranked[_LABELS:])
        told.append(f"{len(ranked) - _LABELS} others {rest:,}")
    return f'<span class="bar">{bar}</span> {", ".join(told)}'


def _row(cells: Sequence[str], heads: int = 0) -> str:
    told = "".join(f'<th scope="row">{cell}</th>' for cell in cells[:heads])
    return f"<tr>{told}{''.join(f'<td>{cell}</td>' for cell in cells[heads:])}</tr>"


def _table(kind: str, caption: str, heads: Sequence[str], body: str) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    return (
        f'<div class="scroll">\n<table class="numbers {kind}">\n'
        f"<caption>{safe(caption)}.</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )
