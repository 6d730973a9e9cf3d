"""The wire encoding of plans, reports and updates.

A report has 24 bytes and 4 for each scalar; a plan has 24 bytes and 24 for each log entry that the
client lacks.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import numpy as np

from meerkat.errors import ProtocolError
from meerkat.federation.messages import DIGEST_BYTES, ClientReport, RoundPlan
from meerkat.transport.frame import VERSION, check_version, unpack
from meerkat.zo.directions import DirectionKey
from meerkat.zo.log import LogEntry, Update

__all__ = [
    "ENTRY_BYTES",
    "PLAN_BYTES",
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
_LAST = 1
"""Flag of the last entry of an update."""

PLAN_BYTES = _PLAN.size
"""Size of a plan without log entries, such as a calibration plan."""

ENTRY_BYTES = _ENTRY.size
"""Size of a log entry."""


def encode_plan(plan: RoundPlan) -> bytes:
    """Bytes of a plan."""
    head = _PLAN.pack(
        VERSION,
        0,  # padding: the fields that follow are aligned
        plan.steps,
        plan.round,
        plan.first_step,
        plan.log_start,
        plan.learning_rate,
        sum(len(update.entries) for update in plan.updates),
    )
    return head + encode_updates(plan.updates)


def decode_plan(data: bytes) -> RoundPlan:
    """The plan in these bytes.

    Raises:
        ProtocolError: They are not a plan of this version, or a number is not finite.
    """
    check_version(data, "the server")
    _, padding, steps, number, first, start, rate, count = unpack(_PLAN, data, "plan")
    if padding or not steps:
        raise ProtocolError(f"plan of round {number} with {steps} steps")
    if len(data) != _PLAN.size + count * _ENTRY.size:
        raise ProtocolError(f"plan of {len(data)} bytes does not hold its {count} log entries")
    if not math.isfinite(rate):
        raise ProtocolError(f"plan of round {number}: its learning rate is not finite")
    return RoundPlan(number, steps, rate, first, start, decode_updates(data[_PLAN.size :]))


def encode_updates(updates: Sequence[Update]) -> bytes:
    """Bytes of updates, 24 for each entry; the last entry of each update is flagged."""
    parts = []
    for update in updates:
        for place, entry in enumerate(update.entries, start=1):
            key, flag = entry.key, _LAST if place == len(update.entries) else 0
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
    return b"".join(parts)


def decode_updates(data: bytes) -> tuple[Update, ...]:
    """The updates in these bytes.

    Raises:
        ProtocolError: The length is not a multiple of an entry's, the last update has no end, a
            number is not finite, or entries of one update have several learning rates.
    """
    if len(data) % _ENTRY.size:
        raise ProtocolError(f"{len(data)} bytes are no whole number of log entries")
    updates: list[Update] = []
    entries: list[LogEntry] = []
    rates: set[tuple[float, float]] = set()
    for round, step, perturbation, flag, client, rate, coefficient in _ENTRY.iter_unpack(data):
        if flag not in (0, _LAST) or not (math.isfinite(rate) and math.isfinite(coefficient)):
            raise ProtocolError(
                f"log entry of round {round}: its flag is {flag}, or a number is not finite"
            )
        rates.add((rate, math.copysign(1.0, rate)))  # 0.0 and -0.0 are equal, but two rates
        entries.append(LogEntry(DirectionKey(round, step, perturbation, client), coefficient))
        if flag == _LAST:
            if len(rates) > 1:
                raise ProtocolError(f"update of round {round} with {len(rates)} learning rates")
            updates.append(Update(rate, tuple(entries)))
            entries, rates = [], set()
    if entries:
        raise ProtocolError(f"{len(entries)} log entries after the last whole update")
    return tuple(updates)


def encode_report(report: ClientReport) -> bytes:
    """Bytes of a report."""
    head = _REPORT.pack(
        VERSION,
        report.perturbations,
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
    _, perturbations, steps, number, client, examples, digest = unpack(_REPORT, data, "report")
    if len(data) != _REPORT.size + 4 * steps * perturbations or not steps * perturbations:
        raise ProtocolError(f"report of {len(data)} bytes does not hold its {steps} steps")
    scalars = np.frombuffer(data, "<f4", offset=_REPORT.size)
    if not np.isfinite(scalars).all():
        raise ProtocolError(f"report of client {client}, round {number}: a scalar is not finite")
    return ClientReport(
        number, client, examples, steps, perturbations, digest, tuple(scalars.tolist())
    )
