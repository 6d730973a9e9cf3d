"""How the command line shows progress and results."""

from __future__ import annotations

import logging
import os
import sys
from collections import defaultdict
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from meerkat.progress import Progress

if TYPE_CHECKING:  # the help texts need no torch
    from meerkat.api import Gradip
    from meerkat.assembly import Calibrated
    from meerkat.server.selection import Verdict

__all__ = ["Bar", "gradip_table", "mask_table", "quiet_libraries"]


def quiet_libraries() -> None:
    """No bars and warnings of libraries between our own lines."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


class Bar(Progress):
    """A bar on stderr with figures and the time left; plain lines where that is no terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._figures: dict[str, str] = {}
        self._lively = console.is_terminal
        self._bar = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not self._lively,
        )
        self._task = self._bar.add_task("", total=1, figures="", visible=False)
        self._stage = ""
        self._done = self._total = self._told = 0

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def start(self, stage: str, total: int, done: int = 0) -> None:
        """Show a stage from its beginning, or from where it went on."""
        self._stage, self._total, self._done, self._told = stage, total, done, done
        self._bar.reset(self._task, description=stage, total=total, completed=done, visible=True)
        if not self._lively:
            self._tell()

    def advance(self) -> None:
        """Move the bar; without a terminal, print a line for each tenth of a stage."""
        self._done += 1
        self._bar.advance(self._task)
        tenth = max(1, self._total // 10)
        if not self._lively and (self._done - self._told >= tenth or self._done == self._total):
            self._told = self._done
            self._tell()

    def show(self, figures: dict[str, str]) -> None:
        """Show figures from now on."""
        self._figures |= figures
        self._bar.update(self._task, figures=self._line())

    def _line(self) -> str:
        return "  ".join(f"{name} {value}" for name, value in self._figures.items())

    def _tell(self) -> None:
        line = f"{self._stage}: {self._done} of {self._total}  {self._line()}".rstrip()
        print(line, file=sys.stderr, flush=True)


def gradip_table(found: Gradip) -> list[str]:
    """Lines with a summary of each client's path, and what was decided of it."""
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


def mask_table(found: Calibrated) -> list[str]:
    """Lines that say how concentrated a mask's sensitivity is, and where it lies."""
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
    if found.path is not None:
        lines.append(f"mask {found.path}")
    return lines
