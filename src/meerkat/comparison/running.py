"""Makes the cells of a grid, several at a time; what is there is not made again.

Killed at any moment, a comparison goes on where the journals of its cells end.
"""

from __future__ import annotations

import gc
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from meerkat.comparison.cells import Cell, Group
from meerkat.comparison.first_order import run_first_order
from meerkat.comparison.outcome import Outcome, better, outcome_of
from meerkat.comparison.results import FirstOrder
from meerkat.config import Recipe
from meerkat.errors import DivergedError, MeerkatError, RunError
from meerkat.progress import Progress
from meerkat.runs.directory import holds_run
from meerkat.runs.events import RunObserver
from meerkat.runs.given import Given
from meerkat.runs.local_run import resume_run, start_run

__all__ = [
    "GroupOutcome",
    "diverged_in",
    "make_all",
    "make_cell",
    "make_run",
    "worker_pool",
]

_DIVERGED = "diverged.json"


@dataclass(frozen=True)
class GroupOutcome:
    """What a group's cells gave."""

    group: Group
    search: tuple[Outcome, ...]
    rate: float | str | None
    """That was chosen; None where every run of the search diverged, or some are not made yet."""
    cells: tuple[Outcome, ...]

    @property
    def at_the_edge(self) -> bool:
        """Is the chosen rate the smallest or the largest of those that were tried?"""
        tried = sorted(found.cell.rate for found in self.search if found.cell.rate != "auto")
        return len(tried) > 1 and self.rate in (tried[0], tried[-1])


def make_cell(cell: Cell, out: Path, threads: int) -> None:
    """Make a cell, or go on with it; a run that diverges leaves a file that says so.

    Raises:
        MeerkatError: It cannot be made.
    """
    if outcome_of(cell, out) is None:
        make_run(cell.recipe, cell.directory(out), threads, bound=cell.bound)


def make_run(
    recipe: Recipe,
    directory: Path,
    threads: int,
    given: Given | None = None,
    bound: FirstOrder | None = None,
) -> None:
    """Make a run, or go on with it; one that diverges leaves a file that says so.

    Args:
        bound: A first-order method, which is no run of ours.

    Raises:
        MeerkatError: It cannot be made.
    """
    runtime = recipe.runtime.model_copy(update={"threads": threads})
    recipe, given = recipe.model_copy(update={"runtime": runtime}), given or Given()
    try:
        if bound is not None:
            run_first_order(recipe, bound, directory)
        elif holds_run(directory):
            resume_run(directory, RunObserver(), Progress(), given=given)
        else:
            start_run(recipe, directory, RunObserver(), Progress(), given)
    except DivergedError as error:
        directory.mkdir(parents=True, exist_ok=True)
        scratch = directory / (_DIVERGED + ".part")
        scratch.write_text(json.dumps({"error": str(error)}) + "\n", "utf-8")
        scratch.replace(directory / _DIVERGED)
    finally:
        gc.collect()  # a model is in cycles; the next cell of this process loads its own


def diverged_in(directory: Path) -> str | None:
    """Why the run of a directory diverged; None where it did not."""
    path = directory / _DIVERGED
    return json.loads(path.read_text("utf-8"))["error"] if path.exists() else None


def make_all(
    groups: Sequence[Group],
    out: Path,
    jobs: int,
    threads: int,
    made: Callable[[Cell], None] = lambda cell: None,
) -> list[GroupOutcome]:
    """Make the cells of all groups: first a group's search, then its seeds at the chosen rate.

    Args:
        jobs: Cells at a time.
        threads: CPU threads of each.
        made: Called with each cell that is done, also earlier.

    Raises:
        RunError: Some cells could not be made, and all others were; or a process was killed.
    """
    failed: dict[str, str] = {}
    waiting: dict[Future[None], tuple[int, Cell]] = {}
    left: dict[int, list[Cell]] = {}

    def submit(pool: ProcessPoolExecutor, number: int, cells: Sequence[Cell]) -> None:
        left[number] = list(cells)
        for cell in cells:
            waiting[pool.submit(make_cell, cell, out, threads)] = (number, cell)

    searching = set(range(len(groups)))
    with worker_pool(jobs, threads) as pool:
        for number, group in enumerate(groups):
            submit(pool, number, group.search)
        due = [number for number in searching if not left[number]]
        while waiting or due:
            for number in due:
                searching.discard(number)
                rate = _chosen(groups[number], out)
                submit(pool, number, [] if rate is None else groups[number].chosen(rate))
            due = []
            done, _ = wait(waiting, return_when=FIRST_COMPLETED) if waiting else (set(), set())
            for future in done:
                number, cell = waiting.pop(future)
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    raise RunError(
                        f"cell {cell.name}, or one beside it: its process was killed, as where "
                        "memory is short; lower --jobs and go on with the same command"
                    )
                if error is not None and not isinstance(error, MeerkatError):
                    raise error
                if error is not None:
                    failed[cell.name] = str(error)
                made(cell)
                left[number].remove(cell)
                if not left[number] and number in searching:
                    due.append(number)
    if failed:
        name, line = next(iter(failed.items()))
        more = f" ({len(failed) - 1} more)" if len(failed) > 1 else ""
        raise RunError(f"cell {name}{more}: {line}")
    return [outcome_of_group(group, out) for group in groups]


def outcome_of_group(group: Group, out: Path) -> GroupOutcome:
    """What is there of a group; cells that are not complete are left out."""
    search = [found for cell in group.search if (found := outcome_of(cell, out)) is not None]
    rate = _chosen(group, out) if len(search) == len(group.search) else None
    cells = [] if rate is None else group.chosen(rate)
    done = [found for cell in cells if (found := outcome_of(cell, out)) is not None]
    return GroupOutcome(group, tuple(search), rate, tuple(done))


def _chosen(group: Group, out: Path) -> float | str | None:
    """The rate whose run ended with the best validation score; the only one where there is one."""
    if not group.search:
        return group.grid.found(group.method).rates[0]
    best: Outcome | None = None
    for cell in group.search:
        found = outcome_of(cell, out)
        if found is not None and found.evaluations and (best is None or better(found, best)):
            best = found
    return None if best is None else best.cell.rate


@contextmanager
def worker_pool(jobs: int, threads: int) -> Iterator[ProcessPoolExecutor]:
    """Processes with so many threads each, which end with this one."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(threads)))  # read when their libraries are loaded
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), _follow, (os.getpid(),))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _follow(parent: int) -> None:
    """End this process when its parent is gone, whatever it does: a journal loses no round."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
