"""A comparison's table for reading: Markdown, CSV, LaTeX, and the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from rich.filesize import decimal
from rich.table import Table

from meerkat.comparison.rows import Row, Spread

__all__ = ["as_csv", "as_latex", "as_markdown", "as_terminal"]

_NOTE = (
    "± is the standard deviation over the seeds; p is of a paired t-test, two-sided, over equal "
    "seeds. * the rate is the smallest or largest of those that were tried. Passes, and bytes up "
    "and down, are those of one client over the whole run."
)


def as_markdown(rows: Sequence[Row], reference: str) -> str:
    """A table for each case."""
    parts = []
    for case in dict.fromkeys(row.case for row in rows):
        own = [row for row in rows if row.case == case]
        head, *body = _cells(own, reference)
        if case:
            parts.append(f"### {', '.join(case)}\n")
        lines = [_line(head), _line(["---"] * len(head)), *map(_line, body)]
        parts.append("\n".join(lines) + "\n")
    return "\n".join([*parts, _NOTE, ""])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def as_csv(rows: Sequence[Row]) -> str:
    """All figures in full, a line for each method and case."""
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    axes = max((len(row.case) for row in rows), default=0)
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    spreads = [f"{name}_{part}" for name in metrics for part in ("mean", "sd")]
    table.writerow(
        [*(f"case_{axis}" for axis in range(axes)), "method", "rate", "rate_at_edge", "rates_tried",
         "seeds", "diverged", *spreads, "difference", "p", "rounds", "passes", "bytes_up",
         "bytes_down", "reached_target", "passes_to_target", "bytes_to_target"]
    )  # fmt: skip
    for row in rows:
        values: list[object] = []
        for name in metrics:
            found = row.metrics.get(name)
            values += ["", ""] if found is None else [found.mean, _or_blank(found.deviation)]
        cost = row.cost
        costs = ["", "", ""] if cost is None else [cost.reached, cost.passes, cost.bytes]
        seeds = 0 if row.score is None else row.score.count
        table.writerow(
            [*row.case, row.method, _or_blank(row.rate), int(row.edge), row.tried, seeds,
             row.diverged, *values, _or_blank(row.difference), _or_blank(row.p), row.rounds,
             row.passes, row.bytes_up, row.bytes_down, *costs]
        )  # fmt: skip
    return file.getvalue()


def as_latex(rows: Sequence[Row], reference: str) -> str:
    """A tabular of booktabs, with a heading for each case."""
    head = _cells(rows[:1], reference)[0] if rows else []
    lines = [
        f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        "\\toprule",
        _row(head),
        "\\midrule",
    ]
    for number, case in enumerate(dict.fromkeys(row.case for row in rows)):
        own = [row for row in rows if row.case == case]
        if case:
            lines += ["\\midrule"] if number else []
            lines.append(f"\\multicolumn{{{len(head)}}}{{l}}{{{_escaped(', '.join(case))}}} \\\\")
        lines += [_row(cells) for cells in _cells(own, reference)[1:]]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def _row(cells: Sequence[str]) -> str:
    return " & ".join(_escaped(cell) for cell in cells) + " \\\\"


def _escaped(text: str) -> str:
    for sign in "&%$#_":
        text = text.replace(sign, f"\\{sign}")
    for sign, written in {"<": "$<$", "±": "$\\pm$", "η": "$\\eta$"}.items():
        text = text.replace(sign, written)
    return text


def as_terminal(rows: Sequence[Row], reference: str) -> Table:
    """All cases in one table: the main metric alone, so that it fits."""
    table = Table(box=None, pad_edge=False)
    table.add_column("method", overflow="fold")
    metric = rows[0].metric if rows else ""
    for name in ("η", "seeds", metric, f"less {reference}", "p", "passes", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    for case in dict.fromkeys(row.case for row in rows):
        if case:
            table.add_row(f"[bold]{', '.join(case)}[/bold]")
        for row in rows:
            if row.case == case:
                total = _bytes(row.bytes_up + row.bytes_down)
                figures = (_spread(row.score), _difference(row), _p(row), f"{row.passes:,.0f}")
                table.add_row(row.title, _rate(row), _seeds(row), *figures, total)
    return table


def _cells(rows: Sequence[Row], reference: str) -> list[list[str]]:
    """The head, and a list of texts for each row."""
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    has_target = any(row.cost is not None for row in rows)
    head = [
        "method",
        "η",
        "seeds",
        *metrics,
        f"less {reference}",
        "p",
        "passes",
        "bytes up",
        "down",
    ]
    head += ["passes, bytes to target"] if has_target else []
    body = [
        [
            row.title,
            _rate(row),
            _seeds(row),
            *(_spread(row.metrics.get(name)) for name in metrics),
            _difference(row),
            _p(row),
            f"{row.passes:,.0f}",
            _bytes(row.bytes_up),
            _bytes(row.bytes_down),
            *([_to_target(row)] if has_target else []),
        ]
        for row in rows
    ]
    return [head, *body]


def _rate(row: Row) -> str:
    if row.rate is None:
        return "being searched" if row.searching else "all diverged" if row.tried else ""
    text = row.rate if isinstance(row.rate, str) else f"{row.rate:g}"
    return text + ("*" if row.edge else "")


def _seeds(row: Row) -> str:
    count = 0 if row.score is None else row.score.count
    return f"{count}" + (f", {row.diverged} diverged" if row.diverged else "")


def _difference(row: Row) -> str:
    return "" if row.difference is None else f"{row.difference:+.3f}"


def _p(row: Row) -> str:
    if row.p is None:
        return ""
    return "<0.001" if row.p < 0.001 else f"{row.p:.3f}"


def _spread(found: Spread | None) -> str:
    if found is None:
        return ""
    return f"{found.mean:.3f}" + ("" if found.deviation is None else f" ± {found.deviation:.3f}")


def _to_target(row: Row) -> str:
    cost = row.cost
    if cost is None:
        return ""
    if not cost.reached:
        return "not reached"
    return f"{cost.passes:,.0f}, {_bytes(cost.bytes)} ({cost.reached} runs)"


def _bytes(count: float) -> str:
    return decimal(round(count))


def _or_blank(value: object) -> object:
    return "" if value is None else value
