"""Updates and reports as a journal keeps them.

This is the journal's own encoding, of the version `store.FORMAT`: a change of what crosses the wire
does not touch it. All integers and floats are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from meerkat.federation.messages import DIGEST_BYTES, ClientReport
from meerkat.zo.directions import DirectionKey
from meerkat.zo.log import LogEntry, Update

__all__ = ["decode_report", "decode_updates", "encode_report", "encode_updates"]

_UPDATE = struct.Struct("<fI")
"""η, and how many entries follow."""
_ENTRY = struct.Struct("<IIIId")
"""Round, step, perturbation and client of a key, and its coefficient."""
_REPORT = struct.Struct(f"<IIIII{DIGEST_BYTES}s")
"""Round, client, examples, steps, perturbations and the digest; scalars follow as float32."""


def encode_updates(updates: Sequence[Update]) -> bytes:
    """Bytes of a round's updates: 8 for each, and 24 for each of its entries."""
    parts = []
    for update in updates:
        parts.append(_UPDATE.pack(update.learning_rate, len(update.entries)))
        for entry in update.entries:
            key = entry.key
            parts.append(
                _ENTRY.pack(key.round, key.step, key.perturbation, key.client, entry.coefficient)
            )
    return b"".join(parts)


def decode_updates(data: bytes) -> tuple[Update, ...]:
    """The updates in these bytes.

    Raises:
        ValueError: They are none.
    """
    updates, place = [], 0
    while place < len(data):
        try:
            rate, count = _UPDATE.unpack_from(data, place)
            place += _UPDATE.size
            entries = tuple(
                LogEntry(DirectionKey(*fields[:4]), fields[4])
                for fields in _ENTRY.iter_unpack(data[place : place + count * _ENTRY.size])
            )
        except struct.error as error:
            raise ValueError(f"updates of {len(data)} bytes: {error}") from None
        place += count * _ENTRY.size
        if not count or len(entries) != count:
            raise ValueError(f"updates of {len(data)} bytes do not hold {count} entries")
        updates.append(Update(rate, entries))
    return tuple(updates)


def encode_report(report: ClientReport) -> bytes:
    """Bytes of a report: 28, and 4 for each scalar."""
    head = _REPORT.pack(
        report.round,
        report.client,
        report.examples,
        report.steps,
        report.perturbations,
        report.state_digest,
    )
    return head + np.asarray(report.scalars, "<f4").tobytes()


def decode_report(data: bytes) -> ClientReport:
    """The report in these bytes.

    Raises:
        ValueError: They are none.
    """
    if len(data) < _REPORT.size:
        raise ValueError(f"a report of {len(data)} bytes")
    number, client, examples, steps, perturbations, digest = _REPORT.unpack_from(data)
    if len(data) != _REPORT.size + 4 * steps * perturbations:
        raise ValueError(f"a report of {len(data)} bytes does not hold its {steps} steps")
    scalars = tuple(np.frombuffer(data, "<f4", offset=_REPORT.size).tolist())
    return ClientReport(number, client, examples, steps, perturbations, digest, scalars)
