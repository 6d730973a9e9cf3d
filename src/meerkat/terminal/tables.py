"""Results as tables and lines of text."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal
from rich.table import Table

from meerkat.tasks.metrics import LOSS, metric_title
from meerkat.tasks.metrics.validation import VALIDATION

if TYPE_CHECKING:  # the help texts need no torch
    from meerkat.federation.selection import Verdict
    from meerkat.runs.answers import Answered
    from meerkat.runs.finding_mask import FoundMask
    from meerkat.runs.trajectories import Gradip
    from meerkat.spaces.subspace import Subspace

__all__ = [
    "answer_lines",
    "figures_table",
    "gradip_table",
    "mask_table",
    "plan_table",
    "summary_table",
]


def gradip_table(found: Gradip) -> list[str]:
    """A line for each client: a summary of its path, and what was decided about it."""
    where = "calibration" if found.calibration else "rounds"
    lines = [f"{'client':>8} {'steps':>7} {'|GradIP| first':>15} {'later':>10} {'norm':>9} "]
    lines[0] += f"{'cosine':>8}  over its {where}"
    verdicts = {v.client: v for v in found.decision.verdicts} if found.decision else {}
    for path in found.paths:
        line = f"{path.client:8} {path.steps:7} {path.first:15.4g} {path.later:10.4g} "
        line += f"{path.norm:9.3g} {path.cosine:8.4f}"
        verdict = verdicts.get(path.client)
        if verdict is not None:
            line += f"  {_reason(verdict)}"
        lines.append(line)
    return lines


def _reason(verdict: Verdict) -> str:
    word = f"stopped, T_k = {verdict.steps}" if verdict.flagged else "kept"
    if verdict.rho_later is None:
        return word
    word += f"; ρ_later {verdict.rho_later:.3g}"
    if verdict.rho_quiet is not None:
        word += f", ρ_quiet {verdict.rho_quiet:.2f}"
    return word if verdict.margin is None else f"{word}, margin {verdict.margin:+.2f}"


def mask_table(found: FoundMask) -> list[str]:
    """Lines about a mask: how concentrated the sensitivity is, and in which tensors."""
    mask = found.mask
    share = mask.size / mask.eligible
    lines = [f"{mask.size:,} of {mask.eligible:,} eligible parameters ({share:.2%}), {mask.kind}"]
    if mask.concentration is not None:
        mass, ratio = mask.concentration["mass"], mask.concentration["ratio"]
        lines.append(
            f"they hold {mass:.0%} of the summed score; their mean score is {ratio:.0f} times that "
            f"of the next {9 * mask.size:,}"
        )
    counts: dict[str, int] = defaultdict(int)
    for name, indices in zip(mask.names, mask.indices, strict=True):
        counts[name] += len(indices)
    lines.append("most of them lie in")
    for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:10]:
        lines.append(f"  {count / mask.size:6.1%}  {name}")
    if mask.subspace is not None:
        lines.append(_within(mask.subspace))
        if found.fit is not None:
            line = f"the clients' texts make use of {found.fit.rank:.1f} of them"
            if found.fit.spread is not None:
                line += f"; scores over them spread by {found.fit.spread:.1f}"
            if found.fit.learning_rate is not None and found.fit.epsilon is not None:
                rate, epsilon = found.fit.learning_rate, found.fit.epsilon
                line += f"; learning_rate = {rate:.3g}, epsilon = {epsilon:.3g} go with that"
            else:
                line += "; a run is made without them (subspace.least_rank)"
            lines.append(line)
    if found.path is not None:
        lines.append(f"mask {found.path}")
    return lines


def _within(subspace: Subspace) -> str:
    """A line about a subspace: how much of the curvature its directions hold."""
    line = f"a subspace of {subspace.dimensions:,} directions, {subspace.kind}"
    total = sum(subspace.curvature)
    if subspace.kind == "aligned" and total > 0:
        held = sum(subspace.curvature[: subspace.dimensions]) / total
        line += (
            f": they hold {held:.0%} of the curvature over {len(subspace.curvature):,} texts, the "
            f"first alone {subspace.curvature[0] / total:.0%}"
        )
    return line


def summary_table(summary: dict[str, Any], directory: Path) -> Table:
    """A run's summary: metrics before and after, bytes, who was stopped early."""
    rows: dict[str, str] = {}
    before, after = summary["before"], summary["after"]
    tested = [name for name in after if not name.startswith(VALIDATION)]
    for names in (tested, [name for name in after if name not in tested]):
        for name in sorted(names, key=lambda name: name.endswith(LOSS)):
            if name in before:
                rows[metric_title(name)] = f"{before[name]:.3f} → {after[name]:.3f}"
    if (best := summary.get("best_round")) is not None:
        rows["best round"] = _at_best(best, summary["best"])
    if summary["rounds"] < summary.get("planned_rounds", 0):
        rows["rounds"] = f"{summary['rounds']:,} of {summary['planned_rounds']:,}; then no better"
    up, down = summary["bytes_up_per_client_round"], summary["bytes_down_per_client_round"]
    rows["bytes a client and round"] = f"{up:.0f} up, {down:.0f} down"
    rows["parameters that moved"] = f"{summary['mask_size']:,}"
    if within := summary.get("subspace"):
        half, largest = within["half_in"], within["largest"]
        rows["subspace"] = f"{within['dimensions']:,} directions"
        if largest is not None:
            rows["subspace"] += f"; half of |w|² in {half:,} of them, most in number {largest:,}"
    if summary["stopped_early"]:
        stopped = ", ".join(map(str, summary["stopped_early"]))
        rows["stopped early"] = stopped if len(stopped) <= 60 else f"{stopped[:60]} …"
    rows["state digest"] = summary["state_digest"][:16]
    if (directory / "report.html").exists():
        rows["report"] = str(directory / "report.html")
    return _two_columns(rows)


def _at_best(round: int, metrics: dict[str, float]) -> str:
    """The round with the best validation score, and what was measured there."""
    chosen = [name for name in metrics if name.startswith(VALIDATION) and not name.endswith(LOSS)]
    name = chosen[0] if chosen else VALIDATION + LOSS
    if name not in metrics:
        return f"{round:,}"
    shown = (name, name.removeprefix(VALIDATION))
    return f"{round:,}, {', '.join(f'{metric_title(n)} {metrics[n]:.3f}' for n in shown)}"


def figures_table(figures: dict[str, Any]) -> Table:
    """Figures by name."""
    return _two_columns(
        {
            key: f"{value:.4g}" if isinstance(value, float) else str(value)
            for key, value in figures.items()
        }
    )


def answer_lines(answered: Answered) -> list[str]:
    """What a model was given, what it answered, and what it should have."""
    lines = []
    for name in ("prompt", "answer", "reference"):
        first, *others = getattr(answered, name).splitlines() or [""]
        lines.append(f"{name:9}  {first}")
        lines += [f"{'':9}  {line}" for line in others]
    return [*lines, ""]


def plan_table(figures: dict[str, dict[str, float]]) -> Table:
    """What a run will need, section by section; bytes and seconds with their unit."""
    rows: dict[str, str] = {}
    for section, part in figures.items():
        for name, value in part.items():
            rows[f"{section}: {name.replace('_', ' ')}"] = _with_unit(section, value)
    return _two_columns(rows)


def _with_unit(section: str, value: float) -> str:
    match section:
        case "bytes" | "memory" | "disk":
            return decimal(round(value))
        case "seconds":
            return f"{value:.2g} s" if value < 60 else f"{value / 60:.1f} min"
    return f"{value:,}"


def _two_columns(rows: dict[str, str]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for row in rows.items():
        table.add_row(*row)
    return table
