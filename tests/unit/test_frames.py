"""Messages on the wire: round trips, the promised sizes, and refusal of what is damaged."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from meerkat.errors import ProtocolError
from meerkat.federation.messages import DIGEST_BYTES, ClientReport, RoundPlan
from meerkat.tasks.metrics import METRICS, metric_values
from meerkat.tasks.objective import Predictions
from meerkat.transport.client_frames import Evaluation, Hello, decode_up
from meerkat.transport.frame import VERSION, encode
from meerkat.transport.handshake import Proof
from meerkat.transport.messages import (
    decode_plan,
    decode_report,
    decode_updates,
    encode_plan,
    encode_report,
    encode_updates,
)
from meerkat.transport.server_frames import LogPart, Plan, Setup, decode_down
from meerkat.zo.directions import DirectionKey
from meerkat.zo.log import LogEntry, Update
from meerkat.zo.noise import SHARED

u8, u16, u32 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32))
float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
float64 = st.floats(allow_nan=False, allow_infinity=False)
keys = st.builds(DirectionKey, round=u32, step=u16, perturbation=u8, client=u32)
entries = st.lists(st.builds(LogEntry, keys, float64), min_size=1, max_size=4).map(tuple)
# The type checks of pytest's options use `random`, which hypothesis allows in tests only, not in
# strategies: what has a tuple in it is made in the test, by `made`.
updates = st.tuples(float32, entries)
plans = st.fixed_dictionaries(
    {
        "round": u32,
        "steps": st.integers(1, 2**16 - 1),
        "learning_rate": float32,
        "first_step": u32,
        "log_start": u32,
        "updates": st.lists(updates, max_size=4).map(tuple),
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
            "state_digest": st.binary(min_size=DIGEST_BYTES, max_size=DIGEST_BYTES),
            "scalars": st.tuples(*[float32] * (shape[0] * shape[1])),
        }
    )
)

Drawn = tuple[float, tuple[LogEntry, ...]]


def made(drawn: Iterable[Drawn]) -> tuple[Update, ...]:
    return tuple(Update(rate, entries) for rate, entries in drawn)


ENTRY = LogEntry(DirectionKey(7, 3, 1, SHARED), -1e-300)
ONE = Update(0.25, (ENTRY,))
TWO = Update(0.5, (ENTRY, LogEntry(DirectionKey(7, 4, 0, 2), 3.0)))
PLAN = RoundPlan(7, 10, 0.5, 70, 6, (ONE, TWO))
REPORT = ClientReport(7, 5, 100, 2, 3, b"digest!!", (0.5, -0.5, 0.0, 1.0, 2.0, 3.0))
MESSAGES = [
    (decode_plan, encode_plan(PLAN)),
    (decode_updates, encode_updates([ONE, TWO])),
    (decode_report, encode_report(REPORT)),
]


# Round trips and sizes


@settings(max_examples=200, deadline=None)
@given(plans)
def test_plan_round_trip(fields: dict[str, Any]) -> None:
    plan = RoundPlan(**fields | {"updates": made(fields["updates"])})
    data = encode_plan(plan)
    assert decode_plan(data) == plan
    assert len(data) == 24 + 24 * sum(len(update.entries) for update in plan.updates)


@settings(max_examples=200, deadline=None)
@given(st.lists(updates, max_size=6))
def test_updates_round_trip(drawn: list[Drawn]) -> None:
    """Entries stay in their updates: what was one update is one again, whatever its neighbours."""
    log = made(drawn)
    data = encode_updates(log)
    found = decode_updates(data)
    assert found == log
    assert repr(found) == repr(log)  # tells -0.0 from 0.0
    assert len(data) == 24 * sum(len(update.entries) for update in log)
    assert b"".join(encode_updates([update]) for update in log) == data
    assert decode_down(encode(LogPart(3, log))) == LogPart(3, log)


@settings(max_examples=200, deadline=None)
@given(reports)
def test_report_round_trip(fields: dict[str, Any]) -> None:
    report = ClientReport(**fields)
    data = encode_report(report)
    assert decode_report(data) == report
    assert len(data) == 24 + 4 * report.steps * report.perturbations


def test_extreme_values_round_trip() -> None:
    most = 2**32 - 1
    plan = RoundPlan(most, 2**16 - 1, 3.4028234663852886e38, most, most, (ONE,))
    assert decode_plan(encode_plan(plan)) == plan
    report = replace(REPORT, round=most, client=most, examples=most, steps=1, perturbations=255)
    report = replace(report, scalars=(1.0,) * 255)
    assert decode_report(encode_report(report)) == report


def test_bytes_are_little_endian_and_pinned() -> None:
    assert encode_report(
        replace(REPORT, steps=1, perturbations=1, scalars=(0.5,))
    ) == bytes.fromhex("04 01 0100 07000000 05000000 64000000 6469676573742121 0000003f")
    assert encode_plan(replace(PLAN, updates=(TWO,))) == bytes.fromhex(
        "04 00 0a00 07000000 46000000 06000000 0000003f 02000000"
        "07000000 0300 01 00 ffffffff 0000003f 59f3f8c21f6ea581"
        "07000000 0400 00 01 02000000 0000003f 0000000000000840"
    )


# Damage


@pytest.mark.parametrize(("decode", "data"), MESSAGES)
def test_truncated_and_padded_messages_are_refused(
    decode: Callable[[bytes], object], data: bytes
) -> None:
    decode(data)
    for length in range(1, len(data)):
        if decode is decode_updates and length == 24:  # the first update, whole
            continue
        with pytest.raises(ProtocolError):
            decode(data[:length])
    for padding in (b"\0", b"\0" * 4, b"\xff" * 23):
        with pytest.raises(ProtocolError):
            decode(data + padding)


@pytest.mark.parametrize("decode", [decode_plan, decode_report])
def test_an_empty_message_is_refused(decode: Callable[[bytes], object]) -> None:
    with pytest.raises(
        ProtocolError, match=r"a message of 0 bytes from the (server|client) has no version"
    ):
        decode(b"")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=120), st.booleans())
@example(b"", True)
@example(b"\xff" * 48, True)
def test_random_bytes_raise_nothing_else(data: bytes, with_version: bool) -> None:
    if with_version:
        data = bytes([VERSION]) + data[1:]
    for decode, encoded in (
        (decode_plan, encode_plan),
        (decode_updates, encode_updates),
        (decode_report, encode_report),
    ):
        try:
            message = decode(data)
        except ProtocolError:
            continue
        assert encoded(message) == data


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


PROOF = Proof("ab" * 32, "cd" * 32, "ef" * 32)
VERSIONED: list[tuple[Callable[[bytes], object], bytes, int]] = [
    (decode_plan, encode_plan(PLAN), 0),
    (decode_report, encode_report(REPORT), 0),
    (decode_down, encode(Plan(PLAN)), 1),
    (decode_down, encode(Setup("{}", PROOF, "session", False)), 1),
    (decode_up, encode(Hello(1, 2, 3, 4, PROOF)), 1),
]
"""Messages that carry the version, and where they have it."""


@pytest.mark.parametrize(
    ("version", "age"), [(1, "an older"), (3, "an older"), (5, "a newer"), (0, "an older")]
)
def test_another_version_is_refused_as_older_or_newer(version: int, age: str) -> None:
    for decode, data, place in VERSIONED:
        decode(data)
        with pytest.raises(ProtocolError) as caught:
            decode(data[:place] + bytes([version]) + data[place + 1 :])
        who = "server" if decode in (decode_plan, decode_down) else "client"
        assert str(caught.value) == (
            f"the {who} speaks version {version} of the protocol, {age} one; this side speaks "
            f"{VERSION}: install the same release of meerkat-fl on both"
        )


def test_messages_as_version_1_wrote_them_are_refused_as_older() -> None:
    """Its bytes, not only its number: they are of the lengths of today's messages."""
    report = bytes.fromhex("01 01 0100 07000000 05000000 64000000 6469676573742121 0000003f")
    plan = bytes.fromhex(
        "01 00 0a00 07000000 46000000 06000000 0000003f 01000000"
        "07000000 0300 0100 ffffffff 0000803e 59f3f8c21f6ea581"
    )
    for decode, data in ((decode_report, report), (decode_plan, plan)):
        with pytest.raises(ProtocolError, match="version 1 of the protocol, an older one"):
            decode(data)


# Groups of entries


def flagged(data: bytes, *flags: int) -> bytes:
    """Encoded entries with these flags, the first ones."""
    changed = bytearray(data)
    for place, flag in enumerate(flags):
        changed[24 * place + 7] = flag
    return bytes(changed)


def test_a_flag_ends_an_update() -> None:
    data = encode_updates([Update(0.5, (*TWO.entries, ENTRY))])
    assert [data[24 * place + 7] for place in range(3)] == [0, 0, 1]
    first, last = decode_updates(flagged(data, 1))
    assert (first.entries, last.entries) == (TWO.entries[:1], (TWO.entries[1], ENTRY))
    assert len(decode_updates(flagged(data, 1, 1))) == 3


@pytest.mark.parametrize("flag", [2, 3, 0x80, 0xFF])
def test_another_flag_is_refused(flag: int) -> None:
    data = encode_updates([TWO])
    for flags in ((flag,), (0, flag)):
        with pytest.raises(ProtocolError, match=f"round 7: its flag is {flag}"):
            decode_updates(flagged(data, *flags))


@pytest.mark.parametrize("other", [0.25, -0.5, 1e-45])
def test_an_update_has_one_learning_rate(other: float) -> None:
    data = encode_updates([TWO])
    for place in (12, 36):
        with pytest.raises(ProtocolError, match="update of round 7 with 2 learning rates"):
            decode_updates(data[:place] + struct.pack("<f", other) + data[place + 4 :])
    # Two updates may have two.
    assert [update.learning_rate for update in decode_updates(encode_updates([ONE, TWO]))] == [
        0.25,
        0.5,
    ]
    zeros = encode_updates([replace(TWO, learning_rate=0.0)])
    with pytest.raises(ProtocolError, match="2 learning rates"):
        decode_updates(zeros[:12] + struct.pack("<f", -0.0) + zeros[16:])


@settings(max_examples=100, deadline=None)
@given(st.lists(updates, min_size=1, max_size=4), st.data())
def test_a_cut_off_update_is_refused(drawn: list[Drawn], data: st.DataObject) -> None:
    """Cut between two entries of one update; a cut between two updates is a shorter log."""
    log = made(drawn)
    encoded = encode_updates(log)
    size = data.draw(st.integers(1, len(encoded) // 24))
    whole, left = [], size
    for update in log:
        if len(update.entries) > left:
            break
        whole.append(update)
        left -= len(update.entries)
    if left:
        with pytest.raises(ProtocolError, match=f"{left} log entries after the last whole update"):
            decode_updates(encoded[: 24 * size])
        with pytest.raises(ProtocolError, match=f"{left} log entries after the last whole update"):
            decode_down(encode(LogPart(0, ())) + encoded[: 24 * size])
    else:
        assert decode_updates(encoded[: 24 * size]) == tuple(whole)


def test_a_plan_with_a_cut_off_update_is_refused() -> None:
    data = bytearray(encode_plan(replace(PLAN, updates=(TWO,))))
    data[-24 + 7] = 0
    with pytest.raises(ProtocolError, match="2 log entries after the last whole update"):
        decode_plan(bytes(data))


# Values that are refused


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
        replace(PLAN, updates=(replace(ONE, learning_rate=bad),)),
        replace(PLAN, updates=(Update(0.5, (replace(ENTRY, coefficient=bad),)),)),
        replace(PLAN, updates=(ONE, Update(0.5, (ENTRY, replace(ENTRY, coefficient=bad))))),
    ):
        with pytest.raises(ProtocolError, match="not finite"):
            decode_plan(encode_plan(plan))


# Evaluations


def predictions(classes: int, examples: int, seed: int) -> Predictions:
    draw = np.random.default_rng(seed)
    return Predictions(
        draw.exponential(size=examples),
        draw.integers(0, classes, examples),
        draw.integers(0, classes, examples),
        classes,
        draw.normal(size=examples),
    )


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from((1, 2, 3, 128, 129, 255, 256, 257, 300, 1000)),
    st.lists(st.integers(1, 400), min_size=1, max_size=4),
    st.integers(0, 2**32 - 1),
)
@example(129, [200, 1, 50], 0)
@example(300, [500, 20], 1)
def test_sums_of_any_number_of_classes_cross_the_wire(
    classes: int, shards: list[int], seed: int
) -> None:
    """The server's metrics from clients' sums are those of all examples in one place."""
    found = [predictions(classes, count, seed + place) for place, count in enumerate(shards)]
    received = []
    for part in found:
        sums = {name: tuple(metric.sums(part).tolist()) for name, metric in METRICS.items()}
        sent = Evaluation(7, len(part.labels), sums)
        frame = decode_up(encode(sent))
        assert frame == sent
        assert isinstance(frame, Evaluation)
        for name, metric in METRICS.items():
            assert metric.is_possible(np.array(frame.sums[name]), frame.examples, classes)
        received.append(frame)
    examples = sum(frame.examples for frame in received)
    totals = {name: np.sum([f.sums[name] for f in received], axis=0) for name in METRICS}
    metrics = metric_values(totals, examples)
    together = Predictions(
        *(
            np.concatenate([getattr(part, field) for part in found])
            for field in ("losses", "labels", "predicted")
        ),
        classes,
        np.concatenate([part.margins for part in found if part.margins is not None]),
    )
    sums = {name: metric.sums(together) for name, metric in METRICS.items()}
    expected = metric_values(sums, sum(shards))
    assert metrics.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-14)
    assert metrics.pop("margin") == pytest.approx(expected.pop("margin"), abs=1e-12)
    assert metrics == expected


NAMES = {"loss": (1.5,), "accuracy": (2.0,)}


def test_an_evaluation_that_does_not_hold_its_metrics_is_refused() -> None:
    data = encode(Evaluation(1, 3, NAMES))
    assert decode_up(data) == Evaluation(1, 3, NAMES)
    for length in range(1, len(data)):
        with pytest.raises(ProtocolError):
            decode_up(data[:length])
    for damaged in (
        data + bytes(1),
        data[:9] + bytes([1]) + data[10:],  # one metric of the two
        data[:9] + bytes([3]) + data[10:],
        data[:5] + bytes(4) + data[9:],  # no examples
        data.replace(b"accuracy", b"loss\x00\x00\x00\x00"),
        data[:11] + struct.pack("<I", 2**32 - 1) + data[15:],  # so many sums
    ):
        assert damaged != data
        with pytest.raises(ProtocolError, match=r"evaluation of|too short"):
            decode_up(damaged)


def test_a_metric_comes_once() -> None:
    data = encode(Evaluation(1, 3, {"loss": (1.5,), "lost": (1.5,)}))
    with pytest.raises(ProtocolError, match="evaluation of"):
        decode_up(data.replace(b"lost", b"loss"))


@pytest.mark.parametrize("name", ["", "a b", "a\nb", "\x1b[2J", "é", "\0"])
def test_a_metric_has_a_printable_name(name: str) -> None:
    with pytest.raises(ProtocolError, match="does not hold its metrics"):
        decode_up(encode(Evaluation(1, 3, {name: (1.5,)})))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_sums_that_are_not_finite_are_refused(bad: float) -> None:
    for sums in ({"loss": (bad,)}, {"loss": (1.0,), "macro_f1": (1.0, bad, 0.0)}):
        with pytest.raises(ProtocolError, match="evaluation: a sum is not finite"):
            decode_up(encode(Evaluation(1, 3, sums)))
