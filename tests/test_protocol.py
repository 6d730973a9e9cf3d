"""Messages survive their encoding, have the size that is promised, and damage is noticed."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from meerkat.errors import ProtocolError
from meerkat.noise import SHARED
from meerkat.protocol import (
    DIGEST_BYTES,
    VERSION,
    ClientReport,
    LogEntry,
    RoundPlan,
    decode_entries,
    decode_plan,
    decode_report,
    encode_entries,
    encode_plan,
    encode_report,
)

u8, u16, u32 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32))
float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
entries = st.builds(
    LogEntry,
    round=u32,
    step=u16,
    perturbation=u16,
    client=u32,
    learning_rate=float32,
    scalar=st.floats(allow_nan=False, allow_infinity=False),
)
plans = st.fixed_dictionaries(
    {
        "round": u32,
        "steps": st.integers(1, 2**16 - 1),
        "learning_rate": float32,
        "first_step": u32,
        "log_start": u32,
        "entries": st.lists(entries, max_size=5).map(tuple),
    }
)


reports = st.tuples(st.integers(1, 20), st.integers(1, 4)).flatmap(
    lambda shape: st.fixed_dictionaries(
        {
            "round": u32,
            "client": u32,
            "examples": u32,
            "steps": st.just(shape[0]),
            "perturbations": st.just(shape[1]),
            "theta_digest": st.binary(min_size=DIGEST_BYTES, max_size=DIGEST_BYTES),
            "scalars": st.tuples(*[float32] * (shape[0] * shape[1])),
        }
    )
)

ENTRY = LogEntry(7, 3, 1, SHARED, 0.25, -1e-300)
PLAN = RoundPlan(7, 10, 0.5, 70, 6, (ENTRY, ENTRY))
REPORT = ClientReport(7, 5, 100, 2, 3, b"digest!!", (0.5, -0.5, 0.0, 1.0, 2.0, 3.0))
MESSAGES = [
    (decode_plan, encode_plan(PLAN)),
    (decode_entries, encode_entries([ENTRY, ENTRY])),
    (decode_report, encode_report(REPORT)),
]


# Round trips and sizes


@settings(max_examples=200, deadline=None)
@given(plans)
def test_plan_round_trip(fields: dict[str, Any]) -> None:
    plan = RoundPlan(**fields)
    data = encode_plan(plan)
    assert decode_plan(data) == plan
    assert len(data) == 24 + 24 * len(plan.entries)


@settings(max_examples=200, deadline=None)
@given(st.lists(entries, max_size=8))
def test_entries_round_trip(log: list[LogEntry]) -> None:
    data = encode_entries(log)
    assert decode_entries(data) == tuple(log)
    assert len(data) == 24 * len(log)
    assert b"".join(encode_entries([entry]) for entry in log) == data


@settings(max_examples=200, deadline=None)
@given(reports)
def test_report_round_trip(fields: dict[str, Any]) -> None:
    report = ClientReport(**fields)
    data = encode_report(report)
    assert decode_report(data) == report
    assert len(data) == 24 + 4 * report.steps * report.perturbations


def test_extreme_values_round_trip() -> None:
    most = 2**32 - 1
    plan = RoundPlan(most, 2**16 - 1, 3.4028234663852886e38, most, most, (ENTRY,))
    assert decode_plan(encode_plan(plan)) == plan
    report = replace(REPORT, round=most, client=most, examples=most, steps=1, perturbations=255)
    report = replace(report, scalars=(1.0,) * 255)
    assert decode_report(encode_report(report)) == report


def test_bytes_are_little_endian_and_pinned() -> None:
    assert encode_report(
        replace(REPORT, steps=1, perturbations=1, scalars=(0.5,))
    ) == bytes.fromhex("01 01 0100 07000000 05000000 64000000 6469676573742121 0000003f")
    assert encode_plan(replace(PLAN, entries=(ENTRY,))) == bytes.fromhex(
        "01 00 0a00 07000000 46000000 06000000 0000003f 01000000"
        "07000000 0300 0100 ffffffff 0000803e 59f3f8c21f6ea581"
    )


# Damage


@pytest.mark.parametrize(("decode", "data"), MESSAGES)
def test_truncated_and_padded_messages_are_refused(
    decode: Callable[[bytes], object], data: bytes
) -> None:
    decode(data)
    for length in range(1, len(data)):
        if decode is decode_entries and length % 24 == 0:
            continue
        with pytest.raises(ProtocolError):
            decode(data[:length])
    for padding in (b"\0", b"\0" * 4, b"\xff" * 23):
        with pytest.raises(ProtocolError):
            decode(data + padding)


@pytest.mark.parametrize("decode", [decode_plan, decode_report])
def test_an_empty_message_is_refused(decode: Callable[[bytes], object]) -> None:
    with pytest.raises(ProtocolError, match="0 bytes are too short"):
        decode(b"")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=120), st.booleans())
@example(b"", True)
@example(b"\xff" * 48, True)
def test_random_bytes_raise_nothing_else(data: bytes, with_version: bool) -> None:
    if with_version:
        data = bytes([VERSION]) + data[1:]
    for decode, encode in (
        (decode_plan, encode_plan),
        (decode_entries, encode_entries),
        (decode_report, encode_report),
    ):
        try:
            message = decode(data)
        except ProtocolError:
            continue
        assert len(encode(message)) == len(data)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(MESSAGES), st.data())
def test_flipped_bits_raise_nothing_else(
    case: tuple[Callable[[bytes], object], bytes], data: st.DataObject
) -> None:
    decode, message = case
    damaged = bytearray(message)
    for place in data.draw(st.lists(st.integers(0, 8 * len(message) - 1), max_size=5)):
        damaged[place // 8] ^= 1 << place % 8
    try:
        decode(bytes(damaged))
    except ProtocolError:
        return


def test_another_version_is_refused() -> None:
    for decode, data in MESSAGES[::2]:
        with pytest.raises(ProtocolError, match=f"version 2.*this is {VERSION}"):
            decode(b"\x02" + data[1:])


def test_a_plan_without_steps_is_refused() -> None:
    with pytest.raises(ProtocolError, match="0 steps"):
        decode_plan(encode_plan(replace(PLAN, steps=0)))


def test_a_report_without_scalars_is_refused() -> None:
    for change in ({"steps": 0}, {"perturbations": 0}):
        with pytest.raises(ProtocolError, match="does not hold its"):
            decode_report(encode_report(replace(REPORT, scalars=(), **change)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_scalars_that_are_not_finite_are_refused(bad: float) -> None:
    data = encode_report(REPORT)[:-4] + struct.pack("<f", bad)
    with pytest.raises(ProtocolError, match="client 5, round 7: a scalar is not finite"):
        decode_report(data)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_of_a_plan_that_are_not_finite_are_refused(bad: float) -> None:
    for plan in (
        replace(PLAN, learning_rate=bad),
        replace(PLAN, entries=(replace(ENTRY, scalar=bad),)),
        replace(PLAN, entries=(replace(ENTRY, learning_rate=bad),)),
    ):
        with pytest.raises(ProtocolError, match="not finite"):
            decode_plan(encode_plan(plan))
