"""The wire encoding of plans, reports and updates.

A report has 24 bytes and 4 for each scalar; a plan has 24 bytes and 24 for each log entry that the
client lacks. Coefficients along axes, of an update from exact reports, are one entry with 8 more
bytes for each but the first.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from meerkat.errors import ProtocolError
from meerkat.federation.messages import DIGEST_BYTES, ClientReport, RoundPlan
from meerkat.transport.frame import VERSION, check_version, unpack
from meerkat.zo.axes import AXES, Along
from meerkat.zo.directions import DirectionKey
from meerkat.zo.log import LogEntry, Update

__all__ = [
    "AXIS_BYTES",
    "ENTRY_BYTES",
    "PLAN_BYTES",
    "REPORT_BYTES",
    "decode_plan",
    "decode_report",
    "decode_updates",
    "encode_plan",
    "encode_report",
    "encode_updates",
]

_PLAN = struct.Struct("<BBHIIIfI")
_ENTRY = struct.Struct("<IHBBIfd")
_REPORT = struct.Struct(f"<BBHIII{DIGEST_BYTES}s")
_LAST, _ALL_AXES = 1, 2
"""Flags of an entry: it is the last one of its update; it is of all axes, and so the last one, with
their number in the place of the round, the first coefficient in its own, and the others behind."""
_ALONG: tuple[Along, Along] = ("drawn", "axes")
"""What a report is along, by number."""

PLAN_BYTES = _PLAN.size
"""Size of a plan without log entries, such as a calibration plan."""

ENTRY_BYTES = _ENTRY.size
"""Size of a log entry."""

REPORT_BYTES = _REPORT.size
"""Size of a report without its scalars, each of which has 4 more bytes."""

AXIS_BYTES = 8
"""Size of a coefficient along an axis."""


def encode_plan(plan: RoundPlan) -> bytes:
    """Bytes of a plan."""
    head = _PLAN.pack(
        VERSION,
        _ALONG.index(plan.along),
        plan.steps,
        plan.round,
        plan.first_step,
        plan.log_start,
        plan.learning_rate,
        _entries(plan.updates),
    )
    return head + encode_updates(plan.updates)


def decode_plan(data: bytes) -> RoundPlan:
    """The plan in these bytes.

    Raises:
        ProtocolError: They are not a plan of this version, or a number is not finite.
    """
    check_version(data, "the server")
    _, along, steps, number, first, start, rate, count = unpack(_PLAN, data, "plan")
    if along >= len(_ALONG) or not steps:
        raise ProtocolError(f"plan of round {number} with {steps} steps of kind {along}")
    more = len(data) - _PLAN.size - count * _ENTRY.size
    if more < 0 or more % AXIS_BYTES:
        raise ProtocolError(f"plan of {len(data)} bytes does not hold its {count} log entries")
    if not math.isfinite(rate):
        raise ProtocolError(f"plan of round {number}: its learning rate is not finite")
    updates = decode_updates(data[_PLAN.size :])
    if _entries(updates) != count:
        raise ProtocolError(f"plan of {len(data)} bytes does not hold its {count} log entries")
    return RoundPlan(number, steps, rate, first, start, updates, _ALONG[along])


def _entries(updates: Sequence[Update]) -> int:
    """Encoded entries, of which the axes of an update are one."""
    return sum(len(update.entries) + bool(update.axes) for update in updates)


def encode_updates(updates: Sequence[Update]) -> bytes:
    """Bytes of updates, 24 for each entry; the last entry of each update is flagged."""
    parts = []
    for update in updates:
        last = 0 if update.axes else len(update.entries)
        for place, entry in enumerate(update.entries, start=1):
            key, flag = entry.key, _LAST if place == last else 0
            parts.append(
                _ENTRY.pack(
                    key.round,
                    key.step,
                    key.perturbation,
                    flag,
                    key.client,
                    update.learning_rate,
                    entry.coefficient,
                )
            )
        if update.axes:
            first, *others = update.axes
            head = len(update.axes), 0, 0, _LAST | _ALL_AXES, AXES, update.learning_rate, first
            parts += [_ENTRY.pack(*head), np.asarray(others, "<f8").tobytes()]
    return b"".join(parts)


def decode_updates(data: bytes) -> tuple[Update, ...]:
    """The updates in these bytes.

    Raises:
        ProtocolError: The length is not that of whole entries, the last update has no end, a
            number is not finite, or entries of one update have several learning rates.
    """
    updates: list[Update] = []
    entries: list[LogEntry] = []
    rates: set[tuple[float, float]] = set()
    place = 0
    while place < len(data):
        if len(data) - place < _ENTRY.size:
            raise ProtocolError(f"{len(data)} bytes are no whole number of log entries")
        head = _ENTRY.unpack_from(data, place)
        round, step, perturbation, flag, client, rate, coefficient = head
        place += _ENTRY.size
        known = flag in (0, _LAST) or (flag == _LAST | _ALL_AXES and _is_of_axes(head))
        if not (known and math.isfinite(rate) and math.isfinite(coefficient)):
            raise ProtocolError(
                f"log entry of round {round}: its flag is {flag}, or a number is not finite"
            )
        rates.add((rate, math.copysign(1.0, rate)))  # 0.0 and -0.0 are equal, but two rates
        axes: tuple[float, ...] = ()
        if flag & _ALL_AXES:
            others = data[place : place + AXIS_BYTES * (round - 1)]
            place += len(others)
            axes = (coefficient, *_other_axes(round, others))
        else:
            entries.append(LogEntry(DirectionKey(round, step, perturbation, client), coefficient))
        if flag:
            if len(rates) > 1:
                raise ProtocolError(f"update of round {round} with {len(rates)} learning rates")
            updates.append(Update(rate, tuple(entries), axes))
            entries, rates = [], set()
    if entries:
        raise ProtocolError(f"{len(entries)} log entries after the last whole update")
    return tuple(updates)


def _is_of_axes(head: tuple[Any, ...]) -> bool:
    """Has an entry what one of all axes has where others have their key?"""
    count, step, perturbation, _, client, *_ = head
    return count > 0 and (step, perturbation, client) == (0, 0, AXES)


def _other_axes(count: int, others: bytes) -> list[float]:
    """The coefficients of an update along axes but the first.

    Raises:
        ProtocolError: They are not as many as the entry says, or one is not finite.
    """
    if len(others) != AXIS_BYTES * (count - 1):
        raise ProtocolError(f"{len(others)} bytes after a log entry do not hold its {count} axes")
    values = np.frombuffer(others, "<f8")
    if not np.isfinite(values).all():
        raise ProtocolError("log entry of axes: a number is not finite")
    found: list[float] = values.tolist()
    return found


def encode_report(report: ClientReport) -> bytes:
    """Bytes of a report; an exact one has 0 directions, and as many scalars a step as follow."""
    head = _REPORT.pack(
        VERSION,
        0 if report.along == "axes" else report.perturbations,
        report.steps,
        report.round,
        report.client,
        report.examples,
        report.state_digest,
    )
    return head + np.asarray(report.scalars, "<f4").tobytes()


def decode_report(data: bytes) -> ClientReport:
    """The report in these bytes.

    Raises:
        ProtocolError: They are not a report of this version, or a scalar is not finite.
    """
    check_version(data, "the client")
    _, drawn, steps, number, client, examples, digest = unpack(_REPORT, data, "report")
    perturbations = drawn or (len(data) - _REPORT.size) // (4 * max(1, steps))
    if len(data) != _REPORT.size + 4 * steps * perturbations or not steps * perturbations:
        raise ProtocolError(f"report of {len(data)} bytes does not hold its {steps} steps")
    scalars = np.frombuffer(data, "<f4", offset=_REPORT.size)
    if not np.isfinite(scalars).all():
        raise ProtocolError(f"report of client {client}, round {number}: a scalar is not finite")
    return ClientReport(
        number,
        client,
        examples,
        steps,
        perturbations,
        digest,
        tuple(scalars.tolist()),
        "drawn" if drawn else "axes",
    )
