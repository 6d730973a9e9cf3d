"""A progress bar on the terminal; and libraries that print nothing between our lines."""

from __future__ import annotations

import logging
import os
import sys
from types import TracebackType

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

__all__ = ["Bar", "quiet_libraries"]


def quiet_libraries() -> None:
    """No bars and warnings of libraries between our own lines; call it before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
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
        self._done = self._total = self._printed = 0

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
        """Begin a stage, of which `done` units are done already."""
        self._stage, self._total, self._done, self._printed = stage, total, done, done
        self._bar.reset(self._task, description=stage, total=total, completed=done, visible=True)
        if not self._lively:
            self._print()

    def advance(self) -> None:
        """Move the bar; without a terminal, print a line for each tenth of a stage."""
        self._done += 1
        self._bar.advance(self._task)
        tenth = max(1, self._total // 10)
        if not self._lively and (self._done - self._printed >= tenth or self._done == self._total):
            self._printed = self._done
            self._print()

    def show(self, figures: dict[str, str]) -> None:
        """Show these figures beside the bar, and keep those shown before."""
        self._figures |= figures
        self._bar.update(self._task, figures=self._line())

    def _line(self) -> str:
        return "  ".join(f"{name} {value}" for name, value in self._figures.items())

    def _print(self) -> None:
        line = f"{self._stage}: {self._done} of {self._total}  {self._line()}".rstrip()
        print(line, file=sys.stderr, flush=True)
