"""The page of a report: headline, pictures, digests and recipe in one HTML file.

It holds no script and no address, and a content security policy says so to the browser. All text
that comes from a journal is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any

from meerkat.records import Evaluated
from meerkat.reporting.figure import Figure, plural, safe, thin
from meerkat.reporting.summary import Run, duration, facts
from meerkat.reporting.verdicts import early_stopping

__all__ = ["render"]

_ROWS = 13
"""Most evaluations in the table."""


def render(run: Run, figures: Sequence[Figure]) -> str:
    """The whole page."""
    style = files(__package__).joinpath("page.css").read_text("utf-8")
    title = _title(run)
    start = [figure for figure in figures if figure.name in ("clients", "mask")]
    paths = [figure for figure in figures if figure.name.startswith(("gradip", "selection"))]
    course = [figure for figure in figures if figure not in start and figure not in paths]
    none = '<p class="note">No round is done and nothing is evaluated so far.</p>'
    parts = [
        _header(run, title),
        _facts(run),
        "<h2>Course of the run</h2>",
        _gallery(course) if course else none,
        _evaluations(run.evaluations),
        *_stopping(run, paths),
        "<h2>Data and mask</h2>",
        _gallery(start),
        "<h2>Identity</h2>",
        '<p class="note">Digests of θ, the masked parameters, as the run left them, and of '
        "all that it started from.</p>",
        _digests(run),
        "<h2>Recipe</h2>",
        _recipe(run.recipe),
    ]
    body = "\n".join(part for part in parts if part)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title} · Meerkat</title>
<style>
{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _title(run: Run) -> str:
    task, model = (
        run.recipe.get("task.name", "task"),
        run.recipe.get("model.name", run.header.model),
    )
    return f"{safe(task)} on {safe(model)}"


def _header(run: Run, title: str) -> str:
    state, kind = "finished", "done"
    if not run.finished:
        state, kind = f"unfinished: {run.rounds:,} of {run.planned:,} rounds", "open"
    partition = run.recipe.get("federation.partition.kind", "unknown")
    if partition == "dirichlet":
        partition += f" (α = {run.recipe.get('federation.partition.alpha', '?')})"
    if extreme := run.recipe.get("federation.partition.extreme"):
        partition += f", {extreme} clients of a single label"
    lead = (
        f"Sparse zeroth-order federated fine-tuning. Mask: {run.header.mask_kind}; partition: "
        f"{partition}; {run.header.kind} noise, seed {run.header.seed}."
    )
    return (
        f'<header>\n<p class="state {kind}">{state}</p>\n<h1>{title}</h1>\n'
        f'<p class="lead">{safe(lead)}</p>\n'
        f'<p class="lead">θ after {plural(run.rounds, "round")}: '
        f"<code>{safe(run.theta_digest[:16])}</code></p>\n</header>"
    )


def _facts(run: Run) -> str:
    cells = "\n".join(
        f'<div><dt>{safe(what)}</dt><dd class="value">{safe(value)}</dd>'
        f'<dd class="hint">{safe(hint)}</dd></div>'
        for what, value, hint in facts(run)
    )
    return f'<dl class="facts">\n{cells}\n</dl>'


def _gallery(figures: Iterable[Figure]) -> str:
    drawn = "\n".join(
        f"<figure>\n{figure.svg}\n<figcaption>{safe(figure.sentence)}</figcaption>\n</figure>"
        for figure in figures
    )
    return f'<div class="figures">\n{drawn}\n</div>'


def _evaluations(evaluations: Sequence[Evaluated]) -> str:
    if not evaluations:
        return ""
    places = thin(len(evaluations), _ROWS)
    rows = "\n".join(_evaluation(evaluations[place]) for place in places)
    heads = ("rounds done", "accuracy", "macro F1", "loss", "examples", "time")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    told = "Evaluations on held-out examples"
    if len(places) < len(evaluations):
        told += f" ({len(places)} of {len(evaluations):,})"
    return (
        f'<div class="scroll">\n<table class="numbers">\n<caption>{told}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n</div>"
    )


def _evaluation(evaluated: Evaluated) -> str:
    scores = (evaluated.accuracy, evaluated.macro_f1)
    cells = [
        f"{evaluated.round:,}",
        *("–" if score is None else f"{100 * score:.1f} %" for score in scores),
        f"{evaluated.loss:.4f}",
        f"{evaluated.examples:,}",
        duration(evaluated.seconds),
    ]
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _stopping(run: Run, figures: Sequence[Figure]) -> list[str]:
    if run.stopping is None:
        return []
    gallery = _gallery(figures) if figures else ""
    return ["<h2>Early stopping</h2>", gallery, early_stopping(run, run.stopping)]


def _digests(run: Run) -> str:
    header = run.header
    rows = {
        f"θ after {plural(run.rounds, 'round')}": run.theta_digest,
        "recipe": header.fingerprint,
        "base model": header.model,
        "mask": header.mask,
        "partition": header.partition,
        "noise": header.noise,
    }
    return f'<div class="scroll">{_pairs(rows, "digests")}</div>'


def _recipe(recipe: dict[str, Any]) -> str:
    """One table a section; what stands outside of sections comes first."""
    sections: dict[str, dict[str, Any]] = {"": {}}
    for key, value in recipe.items():
        section, _, field = key.rpartition(".") if "." not in key else key.partition(".")
        sections.setdefault(section, {})[field] = value
    tables = "\n".join(
        f"<section>\n<h3>{safe(section or 'run')}</h3>\n{_pairs(fields, 'pairs')}\n</section>"
        for section, fields in sections.items()
        if fields
    )
    return f'<div class="recipe">\n{tables}\n</div>'


def _pairs(rows: dict[str, Any], kind: str) -> str:
    body = "\n".join(
        f'<tr><th scope="row">{safe(name)}</th>{_value(value)}</tr>' for name, value in rows.items()
    )
    return f'<table class="{kind}">\n<tbody>\n{body}\n</tbody>\n</table>'


def _value(value: Any) -> str:
    if value is None or value in ([], {}, ""):
        return '<td class="none">–</td>'
    if isinstance(value, bool):
        return f"<td>{'yes' if value else 'no'}</td>"
    if isinstance(value, list):
        return f"<td>{safe(', '.join(map(str, value)))}</td>"
    return f"<td>{safe(value)}</td>"
