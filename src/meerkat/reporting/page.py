"""The page of a report: headline, pictures, digests and recipe in one HTML file.

It holds no script and no address, and a content security policy says so to the browser. What the
page says is gathered here; its markup is in `templates`, which escape every value.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from meerkat.journal.records import Evaluated
from meerkat.reporting import subspace
from meerkat.reporting.figure import Figure, plain, plural, thin
from meerkat.reporting.run_view import Run, Score, duration, facts, scores_in
from meerkat.reporting.verdicts import early_stopping

__all__ = ["render"]

_ROWS = 13
"""Most evaluations in the table."""


@dataclass(frozen=True)
class _Picture:
    svg: Markup
    sentence: str


@dataclass(frozen=True)
class _Evaluations:
    """The table of evaluations."""

    caption: str
    heads: list[str]
    rows: list[list[str]]


def render(run: Run, figures: Sequence[Figure]) -> str:
    """The HTML of a report: what `run` says, and the pictures of it."""
    start = [figure for figure in figures if figure.name in ("clients", "mask")]
    paths = [figure for figure in figures if figure.name.startswith(("gradip", "selection"))]
    within = [figure for figure in figures if figure.name in subspace.NAMES]
    course = [figure for figure in figures if figure not in (*start, *paths, *within)]
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            style=Markup(files(__package__).joinpath("page.css").read_text("utf-8")),
            title=_title(run),
            finished=run.finished,
            state=_state(run),
            lead=_lead(run),
            done=plural(run.rounds, "round"),
            state_digest=run.state_digest,
            facts=facts(run),
            course=_pictures(course),
            evaluations=_evaluations(run.evaluations) if run.evaluations else None,
            stopping=early_stopping(run, run.stopping) if run.stopping is not None else None,
            paths=_pictures(paths),
            within=_pictures(within),
            start=_pictures(start),
            digests=_digests(run),
            recipe=_sections(run.recipe),
        )
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _printable(value: object) -> str:
    """A value as text that XML and UTF-8 can hold.

    The templates pass every value through this, and escape it unless it is Markup.
    """
    return value if isinstance(value, Markup) else plain(str(value))


def _pictures(figures: Iterable[Figure]) -> list[_Picture]:
    return [_Picture(Markup(figure.svg), figure.sentence) for figure in figures]


def _title(run: Run) -> str:
    get = run.recipe.get
    return f"{get('task.name', 'task')} on {get('model.name', run.header.model)}"


def _state(run: Run) -> str:
    if run.finished:
        return "finished"
    return f"unfinished: {run.rounds:,} of {run.planned:,} rounds"


def _lead(run: Run) -> str:
    get = run.recipe.get
    partition = get("federation.partition.kind", "unknown")
    if partition == "dirichlet":
        partition += f" (α = {get('federation.partition.alpha', '?')})"
    if extreme := get("federation.partition.extreme"):
        partition = f"{partition}, {extreme} clients of a single label"
    return (
        f"Sparse zeroth-order federated fine-tuning. Mask: {run.header.mask_kind}; partition: "
        f"{partition}; {get('noise.kind', 'unknown')} noise, seed {get('seed', '?')}."
    )


def _evaluations(evaluations: Sequence[Evaluated]) -> _Evaluations:
    """One column for each metric that occurs; of many evaluations some, evenly spread."""
    scores = scores_in(evaluations)
    places = thin(len(evaluations), _ROWS)
    caption = "Evaluations on held-out examples"
    if len(places) < len(evaluations):
        caption += f" ({len(places)} of {len(evaluations):,})"
    titles = [score.title for score in scores]
    return _Evaluations(
        caption=caption,
        heads=["rounds done", *titles, "loss", "examples", "time"],
        rows=[_evaluation(evaluations[place], scores) for place in places],
    )


def _evaluation(evaluated: Evaluated, scores: Sequence[Score]) -> list[str]:
    metrics = evaluated.metrics
    return [
        f"{evaluated.round:,}",
        *(s.number(metrics[s.name]) + s.unit if s.name in metrics else "–" for s in scores),
        f"{metrics['loss']:.4f}",
        f"{evaluated.examples:,}",
        duration(evaluated.seconds),
    ]


def _digests(run: Run) -> dict[str, str | None]:
    header = run.header
    rows = {
        f"θ after {plural(run.rounds, 'round')}": run.state_digest,
        "recipe": header.fingerprint,
        "base model": header.model,
        "mask": header.mask,
        "partition": header.partition,
        "noise": header.noise,
    }
    return {name: _text(digest) for name, digest in rows.items()}


def _sections(recipe: dict[str, Any]) -> list[tuple[str, dict[str, str | None]]]:
    """The fields of a recipe by section; those outside of sections come first, as "run"."""
    sections: dict[str, dict[str, str | None]] = {"": {}}
    for key, value in recipe.items():
        section, _, field = key.rpartition(".") if "." not in key else key.partition(".")
        sections.setdefault(section, {})[field] = _text(value)
    return [(section or "run", fields) for section, fields in sections.items() if fields]


def _text(value: Any) -> str | None:
    """A value of a recipe as text; None where it is not set or empty."""
    if value is None or value in ([], {}, ""):
        return None
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)
