"""Plans, reports and log entries: what a round consists of.

A report is 24 bytes and 4 for each scalar; a plan is 24 bytes and 24 for each log entry that the
client lacks.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meerkat.errors import ProtocolError

__all__ = [
    "CALIBRATION",
    "DIGEST_BYTES",
    "ENTRY_BYTES",
    "PLAN_BYTES",
    "VERSION",
    "ClientReport",
    "LogEntry",
    "RoundPlan",
    "decode_entries",
    "decode_plan",
    "decode_report",
    "encode_entries",
    "encode_plan",
    "encode_report",
]

VERSION = 1
CALIBRATION = 2**32 - 1
"""The round of a calibration plan, which starts from the initial θ (method.md section 5)."""

DIGEST_BYTES = 8
"""Leading bytes of θ's digest that a report carries."""

_PLAN = struct.Struct("<BBHIIIfI")
_ENTRY = struct.Struct("<IHHIfd")
_REPORT = struct.Struct("<BBHIII8s")

PLAN_BYTES = _PLAN.size
"""Size of a plan without log entries, as a calibration plan is."""

ENTRY_BYTES = _ENTRY.size
"""Size of a log entry."""


@dataclass(frozen=True)
class LogEntry:
    """((r, t), ḡ): one direction and how far θ goes along it (method.md sections 4 and 6)."""

    round: int
    step: int
    perturbation: int
    client: int
    """Whose direction it is, or `noise.SHARED`."""
    learning_rate: float
    """η of the round, a float32."""
    scalar: float
    """ḡ, a float64."""


@dataclass(frozen=True)
class RoundPlan:
    """What the server asks of one client in one round."""

    round: int
    steps: int
    """T_k."""
    learning_rate: float
    """η of the round, a float32."""
    first_step: int
    """Steps that the client took before; its data pointer."""
    log_start: int
    """How many log entries the server believes the client to have."""
    entries: tuple[LogEntry, ...] = ()
    """The log from there on."""


@dataclass(frozen=True)
class ClientReport:
    """What a client answers: one scalar for each local step and perturbation."""

    round: int
    client: int
    examples: int
    """Examples that the client holds, for weighted aggregation."""
    steps: int
    """T_k."""
    perturbations: int
    theta_digest: bytes
    """Leading bytes of the digest of the θ that it started from."""
    scalars: tuple[float, ...]
    """g, float32 values; step by step, and within a step by perturbation."""


def encode_plan(plan: RoundPlan) -> bytes:
    """Bytes of a plan."""
    head = _PLAN.pack(
        VERSION,
        0,  # free, so that what follows is aligned
        plan.steps,
        plan.round,
        plan.first_step,
        plan.log_start,
        plan.learning_rate,
        len(plan.entries),
    )
    return head + encode_entries(plan.entries)


def decode_plan(data: bytes) -> RoundPlan:
    """The plan in these bytes.

    Raises:
        ProtocolError: They are no plan of this version, or a number is not finite.
    """
    version, free, steps, number, first, start, rate, count = _unpack(_PLAN, data, "plan")
    if version != VERSION or free or not steps:
        raise ProtocolError(f"plan of version {version} with {steps} steps; this is {VERSION}")
    if len(data) != _PLAN.size + count * _ENTRY.size:
        raise ProtocolError(f"plan of {len(data)} bytes does not hold its {count} log entries")
    if not math.isfinite(rate):
        raise ProtocolError(f"plan of round {number}: its learning rate is not finite")
    return RoundPlan(number, steps, rate, first, start, decode_entries(data[_PLAN.size :]))


def encode_entries(entries: Sequence[LogEntry]) -> bytes:
    """Bytes of log entries, 24 for each."""
    return b"".join(
        _ENTRY.pack(e.round, e.step, e.perturbation, e.client, e.learning_rate, e.scalar)
        for e in entries
    )


def decode_entries(data: bytes) -> tuple[LogEntry, ...]:
    """The log entries in these bytes.

    Raises:
        ProtocolError: The length is not a multiple of an entry's, or a number is not finite.
    """
    if len(data) % _ENTRY.size:
        raise ProtocolError(f"{len(data)} bytes are no whole number of log entries")
    entries = tuple(LogEntry(*fields) for fields in _ENTRY.iter_unpack(data))
    for entry in entries:
        if not (math.isfinite(entry.learning_rate) and math.isfinite(entry.scalar)):
            raise ProtocolError(f"log entry of round {entry.round}: a number is not finite")
    return entries


def encode_report(report: ClientReport) -> bytes:
    """Bytes of a report."""
    head = _REPORT.pack(
        VERSION,
        report.perturbations,
        report.steps,
        report.round,
        report.client,
        report.examples,
        report.theta_digest,
    )
    return head + np.asarray(report.scalars, "<f4").tobytes()


def decode_report(data: bytes) -> ClientReport:
    """The report in these bytes.

    Raises:
        ProtocolError: They are no report of this version, or a scalar is not finite.
    """
    version, perturbations, steps, number, client, examples, digest = _unpack(
        _REPORT, data, "report"
    )
    if version != VERSION:
        raise ProtocolError(f"report of version {version}; this is {VERSION}")
    if len(data) != _REPORT.size + 4 * steps * perturbations or not steps * perturbations:
        raise ProtocolError(f"report of {len(data)} bytes does not hold its {steps} steps")
    scalars = np.frombuffer(data, "<f4", offset=_REPORT.size)
    if not np.isfinite(scalars).all():
        raise ProtocolError(f"report of client {client}, round {number}: a scalar is not finite")
    return ClientReport(
        number, client, examples, steps, perturbations, digest, tuple(scalars.tolist())
    )


def _unpack(form: struct.Struct, data: bytes, what: str) -> tuple[Any, ...]:
    if len(data) < form.size:
        raise ProtocolError(f"{len(data)} bytes are too short for a {what}")
    return form.unpack_from(data)
