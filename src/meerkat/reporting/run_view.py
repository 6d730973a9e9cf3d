"""What a report says about a journal, in numbers and words."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from pydantic import ValidationError

from meerkat.config import Recipe
from meerkat.errors import JournalError
from meerkat.journal import Journal, replay
from meerkat.journal.records import Evaluated, Header
from meerkat.reporting.figure import byte_unit, listed, plain, plural
from meerkat.reporting.stopping import Stopping, read_stopping
from meerkat.runs.best_round import best_evaluation, last_round
from meerkat.runs.directory import holders_of
from meerkat.tasks.metrics import metric_of, metric_title
from meerkat.zo.state import ModelState

__all__ = ["Fact", "Run", "Score", "duration", "facts", "named", "read", "scores_in"]

_LISTED = 8
"""Most numbers of clients in a hint."""

Fact = tuple[str, str, str]
"""What it is, its value, and a hint below it."""


@dataclass(frozen=True)
class Score:
    """How a held-out metric other than the loss is written."""

    name: str
    """Its key in `Evaluated.metrics`."""
    title: str
    percent: bool
    """Is it a share of one, which is written in percent?"""

    @property
    def unit(self) -> str:
        return " %" if self.percent else ""

    def number(self, value: float) -> str:
        """A value without its unit: one decimal of a percentage, else four figures."""
        return f"{100 * value:.1f}" if self.percent else f"{value:.4g}"

    def change(self, before: float, after: float) -> str:
        """The difference of two values, with its sign."""
        if self.percent:
            return f"{100 * after - 100 * before:+.1f} points"
        return f"{after - before:+.4g}"


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
    ends: int
    """After how many rounds it ends, as far as its evaluations say."""
    best: Evaluated | None
    """The evaluation with the best validation score."""
    seconds: float
    """Time in rounds."""
    state_digest: str
    """Digest of the state after the last round."""
    stopping: Stopping | None
    """None where nothing was decided on early stopping."""
    names: list[str]
    """Each client's number and who holds its rows; empty where that is not known."""

    @property
    def rounds(self) -> int:
        return len(self.losses)

    @property
    def planned(self) -> int:
        return int(self.recipe.get("federation.rounds", self.rounds))

    @property
    def clients(self) -> int:
        planned = self.recipe.get("federation.clients")
        return len(self.header.label_counts) or (planned if isinstance(planned, int) else 0)

    def name(self, client: int) -> str:
        return self.names[client] if client < len(self.names) else str(client)

    @property
    def finished(self) -> bool:
        """Are all rounds done, and the last θ evaluated?"""
        return self.rounds >= self.ends and self.evaluated == self.rounds


def read(journal: Journal) -> Run:
    """Gather what the report needs, in one pass over a journal's rounds."""
    losses: list[float] = []
    sizes, up, reports, seconds = [0], 0, 0, 0.0
    state_digest = _first_digest(journal)
    for record, metrics in journal.records():
        losses.append(metrics.loss)
        sizes.append(metrics.bytes_up + metrics.bytes_down)
        up += metrics.bytes_up
        reports += len(record.reports)
        seconds += metrics.seconds
        state_digest = record.state_digest
    evaluations = [e for e in journal.evaluations() if e.round <= len(losses)]
    return Run(
        header=journal.header,
        recipe=dict(_flat(_resolved(journal.header.recipe))),
        losses=losses,
        sent=list(accumulate(sizes)),
        bytes_up=up,
        bytes_down=sum(sizes) - up,
        reports=reports,
        evaluations=[e for e in evaluations if e.examples],
        evaluated=evaluations[-1].round if evaluations else -1,
        ends=_ends(journal.header, evaluations),
        best=best_evaluation(evaluations),
        seconds=seconds,
        state_digest=state_digest,
        stopping=read_stopping(journal),
        names=[named(k, held) for k, held in enumerate(holders_of(journal.path.parent))],
    )


def scores_in(evaluations: Sequence[Evaluated]) -> list[Score]:
    """All metrics besides the test's loss that any of the evaluations has, in order of the first.

    Those on validation examples come after those of the test. The first is the headline metric. One
    that is not registered is written under its name, and not in percent.
    """
    names = dict.fromkeys(name for e in evaluations for name in e.metrics if name != "loss")
    return [_score(name) for name in names]


def named(client: int, holders: Sequence[str]) -> str:
    """A client by its number, and by who holds its rows, the first of several.

    >>> named(3, []), named(0, ["Games Team"]), named(1, ["Fonts", "QA", "Med"])
    ('3', '0 Games Team', '1 Fonts and 2 more')
    """
    if not holders:
        return str(client)
    name = plain(" ".join(holders[0].split()))
    return f"{client} {name}" + (f" and {len(holders) - 1:,} more" if len(holders) > 1 else "")


def facts(run: Run) -> list[Fact]:
    """The headline: first the results, then what the run took."""
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


def _first_digest(journal: Journal) -> str:
    """Digest of the initial state; that of θ alone where this version does not know the recipe."""
    try:
        return replay(journal, 0).digest
    except JournalError:
        return ModelState(journal.theta0).digest


def _ends(header: Header, evaluations: Sequence[Evaluated]) -> int:
    """After how many rounds the run ends; as planned where its recipe is of another version."""
    try:
        return last_round(header.parsed, evaluations)
    except JournalError:
        return int(json.loads(header.recipe).get("federation", {}).get("rounds", 0))


def _resolved(text: str) -> dict[str, Any]:
    """A recipe with what `auto` means, or as it is where this version does not know it."""
    try:
        return Recipe.model_validate_json(text).resolved.model_dump(mode="json")
    except ValidationError:
        found: dict[str, Any] = json.loads(text)
        return found


def _flat(recipe: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in recipe.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _score(name: str) -> Score:
    metric = metric_of(name)
    return Score(name, plain(metric_title(name)), metric is not None and metric.percent)


def _outcome(run: Run) -> list[Fact]:
    if not run.evaluations:
        return [("Held-out loss", "not evaluated", "")]
    first, last = run.evaluations[0], run.evaluations[-1]
    once = first is last
    where = f"{'after' if once else 'before and after'} {plural(last.round, 'round')}"
    if last.round == 0:
        where = "before the first round"
    losses = first.metrics["loss"], last.metrics["loss"]
    loss = f"{losses[1]:.3f}" if once else f"{losses[0]:.3f} → {losses[1]:.3f}"
    examples = f"mean of {plural(last.examples, 'example')}"
    both = first.metrics.keys() & last.metrics.keys()
    headline = next((score for score in scores_in(run.evaluations) if score.name in both), None)
    if headline is None:
        return [("Held-out loss", loss, f"{examples}, {where}")]
    before, after = first.metrics[headline.name], last.metrics[headline.name]
    value = headline.number(after) + headline.unit
    if once:
        hint = where
    else:
        value = f"{headline.number(before)} → {value}"
        hint = f"{headline.change(before, after)}, {where}"
    return [(f"Held-out {headline.title}", value, hint), ("Held-out loss", loss, examples)]


def _cost(run: Run) -> list[Fact]:
    header, get = run.header, run.recipe.get
    sampled = get("federation.clients_per_round") or run.clients
    perturbations = get("noise.perturbations", 1)
    everyone = "all in each round" if sampled == run.clients else f"{sampled:,} in each round"
    share = header.mask_size / max(1, header.eligible)
    evaluating = math.fsum(e.seconds for e in run.evaluations)
    up, down = (sent / max(1, run.reports) for sent in (run.bytes_up, run.bytes_down))
    return [
        ("Rounds", f"{run.rounds:,}", _rounds_hint(run)),
        ("Clients", f"{run.clients:,}", everyone),
        *_stopped(run),
        (
            "Local steps in a round",
            str(get("federation.local_steps", "?")),
            f"{perturbations} perturbation{'' if perturbations == 1 else 's'} in each",
        ),
        ("Sent by a client, a round", _bytes(up), "mean size of a report"),
        ("Sent to a client, a round", _bytes(down), "mean size of a plan"),
        ("Sent in all", _bytes(run.sent[-1]), "all clients and rounds, both ways"),
        (
            "Masked parameters",
            f"{header.mask_size:,}",
            f"{100 * share:.3g} % of {header.eligible:,} eligible",
        ),
        *_within(run),
        ("Time", duration(run.seconds), f"in rounds; {duration(evaluating)} in evaluations"),
    ]


def _rounds_hint(run: Run) -> str:
    hint = f"of {run.planned:,}"
    if run.ends < run.planned:
        hint += "; its validation was no better for as long as it had patience"
    return hint if run.best is None else f"{hint}; best on validation after {run.best.round:,}"


def _stopped(run: Run) -> list[Fact]:
    if run.stopping is None:
        return []
    which = run.stopping.last.flagged
    count = f"{len(which):,} of {plural(run.clients, 'client')}"
    return [("Stopped early", count, listed(which, _LISTED) or "nobody is extreme")]


def _within(run: Run) -> list[Fact]:
    kind = run.recipe.get("subspace.kind")
    if kind is None:
        return []
    return [("Directions of the subspace", f"{run.header.size:,}", f"numbers that move; {kind}")]


def _bytes(count: float) -> str:
    unit, size = byte_unit(count)
    return f"{count / size:.4g} {unit}"
