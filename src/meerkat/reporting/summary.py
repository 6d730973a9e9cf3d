"""What a report tells of a journal, in numbers and words."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from meerkat.journal import Journal, replay
from meerkat.records import Evaluated, Header
from meerkat.reporting.figure import byte_unit, listed, plural
from meerkat.reporting.stopping import Stopping, read_stopping

__all__ = ["Fact", "Run", "duration", "facts", "read"]

_LISTED = 8
"""Most numbers of clients in a hint."""

Fact = tuple[str, str, str]
"""What it is, its value, and a hint below it."""


@dataclass(frozen=True)
class Run:
    """What the report needs of a journal."""

    header: Header
    recipe: dict[str, Any]
    """The recipe with its keys joined: `federation.partition.kind`."""
    losses: list[float]
    """Mean training loss of each round."""
    sent: list[int]
    """Bytes sent before each round, and after the last."""
    bytes_up: int
    bytes_down: int
    reports: int
    """Reports of all rounds together."""
    evaluations: list[Evaluated]
    """Those in which there was something to evaluate on."""
    evaluated: int
    """After how many rounds θ was evaluated last, if only in name."""
    seconds: float
    """Time in rounds."""
    theta_digest: str
    stopping: Stopping | None
    """None where nothing was decided on early stopping."""

    @property
    def rounds(self) -> int:
        return len(self.losses)

    @property
    def planned(self) -> int:
        return int(self.recipe.get("federation.rounds", self.rounds))

    @property
    def clients(self) -> int:
        told = self.recipe.get("federation.clients")
        return len(self.header.label_counts) or (told if isinstance(told, int) else 0)

    @property
    def finished(self) -> bool:
        """Are all rounds done, and the last θ evaluated?"""
        return self.rounds >= self.planned and self.evaluated == self.rounds


def read(journal: Journal) -> Run:
    """Gather, in one pass over a journal, what its report tells."""
    losses: list[float] = []
    sizes, up, reports, seconds = [0], 0, 0, 0.0
    theta_digest = replay(journal, 0)[1]
    for record, metrics in journal.records():
        losses.append(metrics.loss)
        sizes.append(metrics.bytes_up + metrics.bytes_down)
        up += metrics.bytes_up
        reports += len(record.reports)
        seconds += metrics.seconds
        theta_digest = record.theta_digest
    evaluations = [e for e in journal.evaluations() if e.round <= len(losses)]
    return Run(
        header=journal.header,
        recipe=dict(_flat(json.loads(journal.header.recipe))),
        losses=losses,
        sent=list(accumulate(sizes)),
        bytes_up=up,
        bytes_down=sum(sizes) - up,
        reports=reports,
        evaluations=[e for e in evaluations if e.examples],
        evaluated=evaluations[-1].round if evaluations else -1,
        seconds=seconds,
        theta_digest=theta_digest,
        stopping=read_stopping(journal),
    )


def facts(run: Run) -> list[Fact]:
    """The headline: what came of it, then what it took."""
    return [*_outcome(run), *_cost(run)]


def duration(seconds: float) -> str:
    """Seconds for a reader.

    >>> duration(7.25), duration(125), duration(3720)
    ('7.2 s', '2 min 5 s', '1 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def _flat(recipe: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in recipe.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _outcome(run: Run) -> list[Fact]:
    if not run.evaluations:
        return [("Held-out loss", "not evaluated", "")]
    first, last = run.evaluations[0], run.evaluations[-1]
    once = first is last
    where = f"{'after' if once else 'before and after'} {plural(last.round, 'round')}"
    if last.round == 0:
        where = "before the first round"
    loss = f"{last.loss:.3f}" if once else f"{first.loss:.3f} → {last.loss:.3f}"
    told = [("Held-out loss", loss, f"mean of {plural(last.examples, 'example')}")]
    if first.accuracy is None or last.accuracy is None:
        return [(told[0][0], told[0][1], f"{told[0][2]}, {where}")]
    before, after = 100 * first.accuracy, 100 * last.accuracy
    accuracy = f"{after:.1f} %" if once else f"{before:.1f} → {after:.1f} %"
    change = "" if once else f"{after - before:+.1f} points, "
    return [("Held-out accuracy", accuracy, change + where), *told]


def _cost(run: Run) -> list[Fact]:
    header, get = run.header, run.recipe.get
    sampled = get("federation.clients_per_round") or run.clients
    everyone = "all in each round" if sampled == run.clients else f"{sampled:,} in each round"
    share = header.mask_size / max(1, header.eligible)
    evaluating = math.fsum(e.seconds for e in run.evaluations)
    up, down = (sent / max(1, run.reports) for sent in (run.bytes_up, run.bytes_down))
    return [
        ("Rounds", f"{run.rounds:,}", f"of {run.planned:,}"),
        ("Clients", f"{run.clients:,}", everyone),
        *_stopped(run),
        (
            "Local steps in a round",
            str(get("federation.local_steps", "?")),
            f"{plural(header.perturbations, 'perturbation')} in each",
        ),
        ("Sent by a client, a round", _bytes(up), "mean size of a report"),
        ("Sent to a client, a round", _bytes(down), "mean size of a plan"),
        ("Sent in all", _bytes(run.sent[-1]), "all clients and rounds, both ways"),
        (
            "Masked parameters",
            f"{header.mask_size:,}",
            f"{100 * share:.3g} % of {header.eligible:,} eligible",
        ),
        ("Time", duration(run.seconds), f"in rounds; {duration(evaluating)} in evaluations"),
    ]


def _stopped(run: Run) -> list[Fact]:
    if run.stopping is None:
        return []
    which = run.stopping.last.flagged
    count = f"{len(which):,} of {plural(run.clients, 'client')}"
    return [("Stopped early", count, listed(which, _LISTED) or "nobody is extreme")]


def _bytes(count: float) -> str:
    unit, size = byte_unit(count)
    return f"{count / size:.4g} {unit}"
