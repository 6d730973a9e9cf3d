"""Updates and reports as a journal keeps them.

This is the journal's own encoding, of the version `store.FORMAT`: a change of what crosses the wire
does not touch it. All integers and floats are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from meerkat.federation.messages import DIGEST_BYTES, ClientReport
from meerkat.zo.axes import Along
from meerkat.zo.directions import DirectionKey
from meerkat.zo.log import LogEntry, Update

__all__ = ["decode_report", "decode_updates", "encode_report", "encode_updates"]

_UPDATE = struct.Struct("<fI")
"""η, and how many entries follow; with the highest bit, coefficients along axes follow them."""
_AXES = struct.Struct("<I")
"""How many axes there are, before their coefficients."""
_MARK = 2**31
"""The highest bit of a count: it is along axes."""
_ENTRY = struct.Struct("<IIIId")
"""Round, step, perturbation and client of a key, and its coefficient."""
_REPORT = struct.Struct(f"<IIIII{DIGEST_BYTES}s")
"""Round, client, examples, steps, perturbations (with the highest bit: axes) and the digest;
scalars follow as float32."""


def encode_updates(updates: Sequence[Update]) -> bytes:
    """Bytes of a round's updates: 8 for each, 24 for each of its entries, and 4 and 8 for each
    coefficient where there are some along axes.
    """
    parts = []
    for update in updates:
        mark = _MARK if update.axes else 0
        parts.append(_UPDATE.pack(update.learning_rate, len(update.entries) | mark))
        for entry in update.entries:
            key = entry.key
            parts.append(
                _ENTRY.pack(key.round, key.step, key.perturbation, key.client, entry.coefficient)
            )
        if update.axes:
            parts.append(_AXES.pack(len(update.axes)))
            parts.append(np.asarray(update.axes, "<f8").tobytes())
    return b"".join(parts)


def decode_updates(data: bytes) -> tuple[Update, ...]:
    """The updates in these bytes.

    Raises:
        ValueError: They are none.
    """
    updates, place = [], 0
    while place < len(data):
        try:
            rate, marked = _UPDATE.unpack_from(data, place)
            place += _UPDATE.size
            count = marked & ~_MARK
            entries = tuple(
                LogEntry(DirectionKey(*fields[:4]), fields[4])
                for fields in _ENTRY.iter_unpack(data[place : place + count * _ENTRY.size])
            )
            if len(entries) != count:
                raise ValueError(f"updates of {len(data)} bytes do not hold {marked} entries")
            place += count * _ENTRY.size
            axes: tuple[float, ...] = ()
            if marked & _MARK:
                (number,) = _AXES.unpack_from(data, place)
                place += _AXES.size + 8 * number
                axes = struct.unpack(f"<{number}d", data[place - 8 * number : place])
        except struct.error as error:
            raise ValueError(f"updates of {len(data)} bytes: {error}") from None
        if not (count or axes):
            raise ValueError(f"updates of {len(data)} bytes do not hold {count} entries")
        updates.append(Update(rate, entries, axes))
    return tuple(updates)


def encode_report(report: ClientReport) -> bytes:
    """Bytes of a report: 28, and 4 for each scalar."""
    head = _REPORT.pack(
        report.round,
        report.client,
        report.examples,
        report.steps,
        report.perturbations | (_MARK if report.along == "axes" else 0),
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
    number, client, examples, steps, marked, digest = _REPORT.unpack_from(data)
    perturbations = marked & ~_MARK
    if len(data) != _REPORT.size + 4 * steps * perturbations:
        raise ValueError(f"a report of {len(data)} bytes does not hold its {steps} steps")
    scalars = tuple(np.frombuffer(data, "<f4", offset=_REPORT.size).tolist())
    along: Along = "axes" if marked & _MARK else "drawn"
    return ClientReport(number, client, examples, steps, perturbations, digest, scalars, along)
