"""The log of a run: how far the state goes along which directions (method.md section 6)."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from meerkat.zo.axes import along_axes
from meerkat.zo.directions import DirectionKey, PerturbationStream
from meerkat.zo.state import ModelState
from meerkat.zo.update_rules.base import Term, UpdateRule

__all__ = ["Log", "LogEntry", "Update", "apply_log", "apply_update"]


@dataclass(frozen=True)
class LogEntry:
    """One direction and its coefficient."""

    key: DirectionKey
    coefficient: float
    """ḡ by the number of perturbations, a float64."""


@dataclass(frozen=True)
class Update:
    """One application of the update rule: the estimate ĝ = Σ c z of a step, and its rate."""

    learning_rate: float
    """η, a float32."""
    entries: tuple[LogEntry, ...]
    """At least one, where there are no axes."""
    axes: tuple[float, ...] = ()
    """Coefficients along all axes (`zo.axes`), float64; empty where there was no exact report."""


def apply_update(
    state: ModelState, update: Update, rule: UpdateRule, stream: PerturbationStream
) -> ModelState:
    """The state after one update; z is drawn when its turn comes, so memory is O(n).

    Raises:
        ValueError: It has coefficients along axes, and not one for each value of the state.
    """
    return rule.apply(state, update.learning_rate, _terms(update, stream))


def _terms(update: Update, stream: PerturbationStream) -> Iterator[Term]:
    """Coefficients and their directions; what is along axes is one term, the last."""
    if update.axes and len(update.axes) != stream.n:
        raise ValueError(f"an update along {len(update.axes)} axes, the state has {stream.n}")
    for entry in update.entries:
        yield entry.coefficient, stream.z(entry.key)
    if update.axes:
        yield 1.0, along_axes(update.axes)


def apply_log(
    state: ModelState, updates: Iterable[Update], rule: UpdateRule, stream: PerturbationStream
) -> ModelState:
    """The state after updates in their order (method.md section 6)."""
    for update in updates:
        state = apply_update(state, update, rule, stream)
    return state


class Log:
    """The append-only list of updates, in memory at 24 bytes an entry and 16 an update.

    Where some are along axes, it takes 8 bytes more for each update and for each coefficient.

    A position in the log is a number of updates.

    Args:
        base: Position of its first update; a run resumed from a checkpoint has none before.
    """

    def __init__(self, base: int = 0) -> None:
        self.base = base
        self._clear()

    def _clear(self) -> None:
        self._keys = array("I")
        self._coefficients = array("d")
        self._rates = array("d")
        self._ends = array("Q")
        self._axes = array("d")
        self._axis_ends = array("Q")

    def __len__(self) -> int:
        return self.base + len(self._ends)

    def restart(self) -> None:
        """Drop all updates: what comes after them starts from a state of its own."""
        self.base = len(self)
        self._clear()

    def append(self, updates: Iterable[Update]) -> None:
        """Add updates at the end."""
        for update in updates:
            for entry in update.entries:
                key = entry.key
                self._keys.extend((key.round, key.step, key.perturbation, key.client))
                self._coefficients.append(entry.coefficient)
            self._rates.append(update.learning_rate)
            self._ends.append(len(self._coefficients))
            if update.axes and not self._axes:  # those before have none
                self._axis_ends.extend([0] * (len(self._ends) - 1))
            self._axes.extend(update.axes)
            if self._axes:
                self._axis_ends.append(len(self._axes))

    def since(self, position: int) -> tuple[Update, ...]:
        """Updates from this position on, which is not before `base`."""
        if position < self.base:
            raise ValueError(f"position {position} is before {self.base}, where this log begins")
        return tuple(self._update(i) for i in range(position - self.base, len(self._ends)))

    def entries_since(self, position: int) -> int:
        """How many entries these have."""
        return len(self._coefficients) - _start(self._ends, position - self.base)

    def axes_since(self, position: int) -> int:
        """How many coefficients along axes these have."""
        return len(self._axes) - self._axis_start(position - self.base)

    def __iter__(self) -> Iterator[Update]:
        return (self._update(index) for index in range(len(self._ends)))

    def _update(self, index: int) -> Update:
        entries = tuple(
            LogEntry(DirectionKey(*self._keys[4 * i : 4 * i + 4]), self._coefficients[i])
            for i in range(_start(self._ends, index), self._ends[index])
        )
        axes = self._axes[self._axis_start(index) : self._axis_start(index + 1)]
        return Update(self._rates[index], entries, tuple(axes))

    def _axis_start(self, index: int) -> int:
        return _start(self._axis_ends, index) if self._axis_ends else 0


def _start(ends: array[int], index: int) -> int:
    return ends[index - 1] if index else 0
