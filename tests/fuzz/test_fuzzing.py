"""What arrives over the network can do no more than be refused: every decoder, fuzzed.

A `Target` is a decoder and what its result must satisfy. Each gets (1) arbitrary bytes, (2) bytes
that begin as a message does, and (3) messages that are damaged: flipped, cut, extended, doubled,
spliced, with numbers overwritten, and where they are JSON with values put in other places. Each
input must be refused with the documented error, in one line, or be decoded to an object that
satisfies its checks and is encoded to the same bytes again. `MEERKAT_FUZZ` is the number of inputs
of each of the three for each target, 3,500 by default:
`MEERKAT_FUZZ=100000 pytest tests/fuzz/test_fuzzing.py`.

So many are too slow one by one. One example of hypothesis is valid messages and a seed; a batch of
`BATCH` inputs is made of these by `random.Random(seed)`, and every one of it is decoded. What was
refused and what was read is counted, since a decoder that refuses everything proves nothing.

A mask is read by a second copy of `meerkat.spaces.mask_file`, which the type checks of pytest's
options do not reach, and which takes the checksum "signed" as well as the right one: anyone can
compute one.
"""

from __future__ import annotations

import base64
import copy
import importlib.util
import json
import math
import os
import re
import struct
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import meerkat.spaces.mask_file
from meerkat.config import Recipe, parse_recipe
from meerkat.errors import MaskError, MeerkatError, ProtocolError, RecipeError
from meerkat.federation.messages import DIGEST_BYTES, ClientReport, RoundPlan
from meerkat.flower import client_app
from meerkat.flower.transports import pack, unpack
from meerkat.node.config import NodeConfig
from meerkat.node.session import ClientSession
from meerkat.tasks.metrics import METRICS
from meerkat.transport.client_frames import (
    Evaluation,
    Failed,
    Hello,
    Need,
    Report,
    WantSpace,
    decode_up,
)
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
from meerkat.transport.server_frames import (
    EvaluateRequest,
    Goodbye,
    LogPart,
    Notice,
    Plan,
    Refused,
    Setup,
    Snapshot,
    SpaceFile,
    Welcome,
    decode_down,
    wants_answer,
)
from meerkat.transport.stream import Invitation, Tokens
from meerkat.transport.stream.certificates import fresh_identity
from meerkat.transport.stream.invitation import metadata, read_metadata, split_address
from meerkat.zo.axes import AXES
from meerkat.zo.directions import DirectionKey
from meerkat.zo.log import LogEntry, Update
from meerkat.zo.state import ModelState

# The type checks of pytest's options draw from `random` where a tuple is made, and messages with
# tuples are made in strategies.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")

CASES = int(os.environ.get("MEERKAT_FUZZ", "3500"))
BATCH = 100
KIB, MIB = 2**10, 2**20
CERTIFICATES = [fresh_identity().certificate for _ in range(2)]
RUN = "run"


@dataclass(frozen=True)
class Target:
    """A decoder, its inputs, and what is checked of its results."""

    decode: Callable[[Any], Any]
    valid: st.SearchStrategy[Any]
    """Inputs that must be read."""
    check: Callable[[Any, Any], None]
    """Asserts of an input and its result: the values are in range, and are encoded as before."""
    arbitrary: Callable[[Random], Any]
    begun: Callable[[Random], Any]
    damaged: Callable[[Random, list[Any]], Any]
    error: type[MeerkatError | ValueError] = ProtocolError
    small: int = 64
    """Bytes of memory, at most, that a byte of input may take."""
    bombs: tuple[Any, ...] = ()
    """Small inputs that claim to be large."""
    always: bool = False
    """Is nothing refused?"""


def read(target: Target, given: Any) -> bool:
    """True if it was decoded, and rightly so; False if it was refused as documented."""
    try:
        found = target.decode(given)
    except target.error as error:
        check_line(str(error))
        return False
    target.check(given, found)
    return True


def check_line(line: str) -> None:
    assert line
    assert "\n" not in line
    assert "\r" not in line


# Damage


SIZES = (0, 1, 2, 3, 4, 7, 8, 11, 12, 16, 18, 23, 24, 25, 48, 112, 113, 114, 240, 1000, 1001)
FLOATS = [struct.pack("<I", word) for word in (0x7F800000, 0xFF800000, 0x7FC00001, 0x7F800001)]
FLOATS += [struct.pack("<I", word) for word in (0xFFFFFFFF, 0x00000001, 0x80000000, 0x7F7FFFFF)]
DOUBLES = [struct.pack("<Q", word << 48) for word in (0x7FF0, 0xFFF0, 0x7FF8, 0xFFFF, 0x8000)]
DOUBLES += [struct.pack("<Q", 0x7FF0000000000001), struct.pack("<Q", 1)]


def junk(rng: Random) -> bytes:
    """Bytes of a length that is near those of messages; rarely all zeros or ones."""
    size = rng.choice(SIZES) if rng.random() < 0.5 else rng.randrange(300)
    fill = rng.random()
    return bytes(size) if fill < 0.05 else b"\xff" * size if fill < 0.1 else rng.randbytes(size)


def damage(rng: Random, messages: list[bytes]) -> bytes:
    """One of the messages, with one to three things wrong."""
    data = rng.choice(messages)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(WAYS)(rng, data, messages)
    return data


def _flip(rng: Random, data: bytes, _messages: list[bytes]) -> bytes:
    flipped = bytearray(data)
    for _ in range(rng.randint(1, 4) if data else 0):
        # Half of the time in the head, where counts are.
        place = rng.randrange(min(len(data), 32) if rng.random() < 0.5 else len(data))
        flipped[place] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def _cut(rng: Random, data: bytes, _messages: list[bytes]) -> bytes:
    return data[: rng.randint(0, len(data))]


def _extend(rng: Random, data: bytes, _messages: list[bytes]) -> bytes:
    return data + junk(rng) if rng.random() < 0.5 else data + rng.randbytes(rng.choice((1, 4, 24)))


def _double(rng: Random, data: bytes, _messages: list[bytes]) -> bytes:
    begin, end = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
    return data + data if rng.random() < 0.3 else data[:end] + data[begin:end] + data[end:]


def _splice(rng: Random, data: bytes, messages: list[bytes]) -> bytes:
    other = rng.choice(messages)
    return data[: rng.randint(0, len(data))] + other[rng.randint(0, len(other)) :]


def _overwrite(rng: Random, data: bytes, _messages: list[bytes]) -> bytes:
    """A number of the head, or any, becomes 0, 1, the largest, not finite, or a likely count."""
    size = rng.choice((1, 2, 4, 8))
    count = rng.choice((len(data), len(data) // 4, len(data) // 24, 255, 2**31))
    numbers = [
        *(bytes(size), b"\xff" * size, b"\1" + bytes(size - 1), b"\xfe" + b"\xff" * (size - 1)),
        (count % 256**size).to_bytes(size, "little"),
        rng.choice(FLOATS),
        rng.choice(DOUBLES),
    ]
    number = rng.choice(numbers)
    place = rng.randint(0, min(len(data), 32) if rng.random() < 0.7 else len(data))
    return data[:place] + number + data[place + len(number) :]


WAYS = (_flip, _cut, _extend, _double, _splice, _overwrite)


def begins(*heads: bytes) -> Callable[[Random], bytes]:
    return lambda rng: rng.choice(heads) + junk(rng)


# Damaged JSON


RAW = {
    '"@digits@"': "9" * 5000,
    '"@most digits@"': "9" * 4300,
    '"@inf@"': "1e999",
    '"@deep@"': "[" * 2000 + "]" * 2000,
    '"@deep object@"': '{"a":' * 300 + "1" + "}" * 300,
}
"""What `json.dumps` would not write."""
NASTY = [
    *(None, True, False, 0, 1, -1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64, -(2**63), 10**30),
    *(0.0, 0.5, -0.5, 1e308, math.nan, math.inf, -math.inf, [], {}, [[]], {"": {}}, [None] * 3),
    *("", " ", "a", "\0", "\n", "\ud800", "\udfff\ud800", "€", "a" * 2000, "ab" * 32, "AB" * 32),
    *("1", "1e5", "nan", "../../x", [1, 2, 3], ["a", 10**10], [2**34], [2**20, 2**20]),
    *(name.strip('"') for name in RAW),
]


def dumps(value: Any) -> str:
    text = json.dumps(value)
    for name, raw in RAW.items():
        text = text.replace(name, raw)
    return text


def nasty(rng: Random) -> Any:
    return copy.deepcopy(rng.choice(NASTY))


def spoil(rng: Random, text: str) -> str:
    """JSON in which values are replaced, left out, added, or in another's place."""
    value = json.loads(text)
    for _ in range(rng.choice((1, 1, 2))):
        spots = list(_spots(value))
        if not spots or rng.random() < 0.02:
            return dumps(nasty(rng))
        container, key = rng.choice(spots)
        way = rng.random()
        if way < 0.6:
            container[key] = nasty(rng)
        elif way < 0.75:
            del container[key]
        elif way < 0.9:
            other, its = rng.choice(spots)
            container[key] = json.loads(json.dumps(other[its]))
        elif isinstance(container, dict):
            container[rng.choice(("", "x", "\ud800", "a.b", "a\nb", "kind"))] = nasty(rng)
    return dumps(value)


def _spots(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _spots(value[key])


def damaged_json(rng: Random, messages: list[bytes], head: int = 0) -> bytes:
    """JSON after so many other bytes, damaged as JSON or as bytes."""
    if rng.random() < 0.4:
        return damage(rng, messages)
    data = rng.choice(messages)
    return data[:head] + spoil(rng, data[head:].decode()).encode()


BRACKETS = [b"[" * 200_000, b'{"a":' * 50_000, b"[[]," * 20_000, b"[" + b"{}," * 20_000 + b"{}]"]
BRACKETS += [b"1" * 100_000, b'{"peer":' + b"9" * 10_000 + b"}", b"-1e999", b'"\\ud800"', b"NaN"]


# Values


EDGES = (0, 1, 2, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1)
u32 = st.sampled_from(EDGES) | st.integers(0, 2**32 - 1)
u16 = st.sampled_from((0, 1, 2**15, 2**16 - 1)) | st.integers(0, 2**16 - 1)
float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
float64 = st.floats(allow_nan=False, allow_infinity=False)
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
probes = st.lists(float32, max_size=9).map(tuple)
proofs = st.builds(
    Proof,
    digests,
    digests,
    digests,
    st.just("") | digests.filter(lambda d: set(d) != {"0"}),
    probes,
)
texts = st.text(st.characters(), max_size=40) | st.sampled_from(
    ("", "a" * 1000, "é" * 500, "€" * 334, "x\ud800", "one\ntwo", "\u202e\u2028\x1b[2J\r\0")
)
lines = st.text(max_size=200).map(lambda t: "".join(c if c.isprintable() else "?" for c in t))
u8 = st.sampled_from((0, 1, 255)) | st.integers(0, 255)
keys = st.builds(DirectionKey, u32, u16, u8, u32)
entries = st.builds(LogEntry, keys, float64)
axes = st.lists(float64, min_size=1, max_size=5).map(tuple)
updates = st.builds(
    Update, float32, st.lists(entries, min_size=1, max_size=3).map(tuple), st.just(()) | axes
) | st.builds(Update, float32, st.just(()), axes)
logs = st.lists(updates, max_size=3).map(tuple)
steps = st.sampled_from((1, 2**16 - 1)) | st.integers(1, 2**16 - 1)
kinds = st.sampled_from(("drawn", "axes"))
plans = st.builds(RoundPlan, u32, steps, float32, u32, u32, logs, kinds)
shapes = st.sampled_from(((1, 1), (1, 255), (300, 1))) | st.tuples(
    st.integers(1, 6), st.integers(1, 4)
)


@st.composite
def made_reports(draw: st.DrawFn) -> ClientReport:
    count, perturbations = draw(shapes)
    few = draw(st.lists(float32, min_size=1, max_size=6))
    scalars = tuple((few * (count * perturbations))[: count * perturbations])
    digest = draw(st.binary(min_size=DIGEST_BYTES, max_size=DIGEST_BYTES))
    head = draw(u32), draw(u32), draw(u32), count, perturbations
    return ClientReport(*head, digest, scalars, draw(kinds))


metric_names = st.sampled_from((*METRICS, "!", "~" * 255)) | st.text(
    st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=9
)
sums = st.lists(float64, max_size=6) | st.integers(0, 900).map(lambda count: [0.5] * count)


@st.composite
def made_evaluations(draw: st.DrawFn) -> Evaluation:
    examples = draw(st.sampled_from((1, 2**32 - 1)) | st.integers(1, 2**32 - 1))
    found = draw(st.dictionaries(metric_names, sums.map(tuple), max_size=4))
    return Evaluation(draw(u32), examples, found)


reports, evaluations = made_reports(), made_evaluations()
UP: dict[type, st.SearchStrategy[Any]] = {
    WantSpace: st.builds(WantSpace, digests),
    Hello: st.builds(Hello, u32, u32, u32, u32, proofs, st.booleans()),
    Report: st.builds(Report, reports),
    Need: st.builds(Need, u32),
    Evaluation: evaluations,
    Failed: st.builds(Failed, lines),
}
DOWN: dict[type, st.SearchStrategy[Any]] = {
    Setup: st.builds(
        Setup,
        texts,
        proofs,
        st.text("0123456789abcdef", min_size=1, max_size=64),
        st.booleans(),
        u32,
    ),
    SpaceFile: st.builds(SpaceFile, st.binary(max_size=100)),
    Welcome: st.builds(Welcome),
    Refused: st.builds(Refused, lines),
    LogPart: st.builds(LogPart, u32, logs),
    Snapshot: st.builds(Snapshot, u32, st.binary(max_size=40)),
    Plan: st.builds(Plan, plans),
    EvaluateRequest: st.builds(EvaluateRequest, u32, u32),
    Goodbye: st.builds(Goodbye, lines),
    Notice: st.builds(Notice, lines),
}
NUMBERS = dict(zip([*DOWN, *UP], [*range(1, 11), *range(64, 70)], strict=True))
VERSIONED = (Setup, Hello, Report, Plan)


# Checks


def check_frame(data: bytes, frame: Any) -> None:
    assert type(frame) is next(kind for kind, number in NUMBERS.items() if number == data[0])
    match frame:
        case Setup(recipe, proof, session, remember):
            assert type(recipe) is str
            assert type(session) is str
            assert 0 < len(session) <= 64
            assert type(remember) is bool
            check_proof(proof)
            assert decode_down(encode(frame)) == frame
            return
        case Refused(reason) | Goodbye(reason) | Notice(reason) | Failed(reason):
            check_text(data, frame, reason)
            return
        case Plan(plan):
            check_plan(data[1:], plan)
            return
        case Report(report):
            check_report(data[1:], report)
        case LogPart(position, log):
            check_u32(position)
            check_updates(data[5:], log)
        case Snapshot(position, state):
            check_u32(position)
            assert state == data[5:]
        case EvaluateRequest() | Need():
            check_u32(*astuple(frame))
        case Hello(client, examples, held_out, position, proof, gradients):
            check_u32(client, examples, held_out, position)
            assert type(gradients) is bool
            check_proof(proof)
        case Evaluation(number, examples, found):
            check_u32(number, examples)
            assert examples > 0
            for name, values in found.items():
                assert re.fullmatch("[!-~]{1,255}", name)
                assert all(type(value) is float and math.isfinite(value) for value in values)
    assert encode(frame) == data


def check_u32(*numbers: int) -> None:
    assert all(type(number) is int and 0 <= number < 2**32 for number in numbers)


def check_proof(proof: Proof) -> None:
    *digests, configuration, probe = astuple(proof)
    assert all(type(logit) is float for logit in probe)
    for digest in [*digests, configuration] if configuration else digests:
        assert re.fullmatch("[0-9a-f]{64}", digest)


def check_text(data: bytes, frame: Any, text: str) -> None:
    """One printable line of at most 1000 characters, as it was sent where it was one."""
    assert text.isprintable()
    assert len(text) <= 1000
    again = decode(encode(frame))
    assert again == frame or len(text.encode()) > 1000
    if text.encode() == data[1:]:
        assert encode(frame) == data
    else:
        assert "�" in text or not data[1:].decode().isprintable()


def check_plan(data: bytes, plan: RoundPlan) -> None:
    check_u32(plan.round, plan.first_step, plan.log_start)
    assert 1 <= plan.steps < 2**16
    assert plan.along in ("drawn", "axes")
    assert math.isfinite(plan.learning_rate)
    check_updates(data[24:], plan.updates)
    assert encode_plan(plan) == data


def check_updates(data: bytes, log: tuple[Update, ...]) -> None:
    for update in log:
        assert update.entries or update.axes
        assert all(map(math.isfinite, update.axes))
        assert math.isfinite(update.learning_rate)
        for entry in update.entries:
            check_u32(entry.key.round, entry.key.client)
            assert 0 <= entry.key.step < 2**16
            assert 0 <= entry.key.perturbation < 2**8
            assert math.isfinite(entry.coefficient)
    assert encode_updates(log) == data


def check_report(data: bytes, report: ClientReport) -> None:
    check_u32(report.round, report.client, report.examples)
    assert len(report.state_digest) == DIGEST_BYTES
    assert len(report.scalars) == report.steps * report.perturbations > 0
    assert all(map(math.isfinite, report.scalars))
    assert encode_report(report) == data


def decode(data: bytes) -> Any:
    """A frame of either side."""
    return (decode_down if data[:1] < b"\x40" else decode_up)(data)


# Targets: frames and messages


def frame_target(kind: type, values: st.SearchStrategy[Any]) -> Target:
    head = bytes([NUMBERS[kind]]) + (bytes([VERSION]) if kind in VERSIONED else b"")
    damaged: Callable[[Random, list[bytes]], bytes] = damage
    if kind is Setup:
        damaged = lambda rng, messages: damaged_json(rng, messages, head=2)  # noqa: E731
    body = struct.pack("<II", 1, 2**32 - 1)
    bombs: list[bytes] = [head + bytes([fill]) * size for fill in (0, 255) for size in (18, 23, 40)]
    bombs += [head + body * 4, head + body * 8_000]
    if kind is Evaluation:
        bombs += [head + struct.pack("<IIB", 1, 2**32 - 1, n) + bytes(9) for n in (1, 255)]
        one = head + struct.pack("<IIB", 1, 1, 1)
        bombs += [one + struct.pack("<BI", 4, n) + b"loss" + bytes(16) for n in EDGES[1:]]
        bombs += [one + struct.pack("<BI", 4, 100_000) + b"loss" + bytes(800_000)]
        many = b"".join(struct.pack("<BI", 2, 0) + b"%02x" % n for n in range(255))
        bombs += [head + struct.pack("<IIB", 1, 1, 255) + many]
    if kind is Plan:
        bombs += [head + struct.pack("<xHIIIfI", 1, 1, 0, 0, 0.5, n) for n in EDGES[1:]]
    if kind is Report:
        bombs += [head + struct.pack("<BHIII8s", 255, 2**16 - 1, 1, 1, 1, bytes(8))]
    if kind is Setup:
        bombs += [head + brackets for brackets in BRACKETS]
    return Target(
        decode_up if kind in UP else decode_down,
        values.map(encode),
        check_frame,
        lambda rng: bytes([NUMBERS[kind]]) + junk(rng),
        begins(head),
        damaged,
        bombs=tuple(bombs),
        always=kind is SpaceFile,
    )


def mixed_target(decoder: Callable[[bytes], Any], kinds: dict[type, Any]) -> Target:
    heads = [bytes([NUMBERS[kind]]) + bytes([VERSION]) * (kind in VERSIONED) for kind in kinds]
    return Target(
        decoder,
        st.one_of([values.map(encode) for values in kinds.values()]),
        check_frame,
        junk,
        begins(*heads),
        damage,
        bombs=tuple(bytes([n]) * 30 for n in range(256)),
    )


TARGETS: dict[str, Target] = {
    kind.__name__: frame_target(kind, values) for kind, values in (UP | DOWN).items()
}
TARGETS["decode_up"] = mixed_target(decode_up, UP)
TARGETS["decode_down"] = mixed_target(decode_down, DOWN)
TARGETS["decode_plan"] = Target(
    decode_plan, plans.map(encode_plan), check_plan, junk, begins(bytes([VERSION])), damage
)
TARGETS["decode_report"] = Target(
    decode_report, reports.map(encode_report), check_report, junk, begins(bytes([VERSION])), damage
)
TARGETS["decode_updates"] = Target(
    decode_updates,
    logs.map(encode_updates),
    check_updates,
    junk,
    lambda rng: rng.randbytes(24 * rng.randrange(4)) + (junk(rng) if rng.random() < 0.3 else b""),
    damage,
    bombs=(
        b"\1" * 24_000,
        b"\xff" * 24_000,
        *(struct.pack("<IHBBIfd", n, 0, 0, 3, AXES, 0.5, 1.0) + bytes(800) for n in EDGES),
    ),
)


# Targets: the state of a snapshot


LIKE = ModelState(
    np.zeros(3, np.float32),
    {"first": np.zeros(3, np.float32), "powers": np.ones(2, np.float64)},
)
"""Says which form the states have that are read."""


@st.composite
def made_states(draw: st.DrawFn) -> bytes:
    singles = st.lists(float32, min_size=3, max_size=3)
    theta, first = (np.array(draw(singles), np.float32) for _ in range(2))
    powers = np.array(draw(st.lists(float64, min_size=2, max_size=2)), np.float64)
    return ModelState(theta, {"first": first, "powers": powers}).to_bytes()


def check_state(data: bytes, state: ModelState) -> None:
    assert (state.theta.dtype, state.theta.shape) == (np.float32, (3,))
    assert list(state.slots) == ["first", "powers"]
    for name, slot in state.slots.items():
        assert (slot.dtype, slot.shape) == (LIKE.slots[name].dtype, LIKE.slots[name].shape)
    for array in (state.theta, *state.slots.values()):
        assert np.isfinite(array).all()
        assert not array.flags.writeable
    assert state.to_bytes() == data


TARGETS["ModelState.from_bytes"] = Target(
    LIKE.from_bytes,
    made_states(),
    check_state,
    junk,
    lambda rng: rng.randbytes(LIKE.nbytes) if rng.random() < 0.9 else junk(rng),
    damage,
    error=ValueError,
    bombs=(b"", bytes(LIKE.nbytes * 1000), b"\xff" * LIKE.nbytes),
)


# Targets: who may join


hosts = st.sampled_from(("localhost", "127.0.0.1", "[::1]", "a-b.example", "x" * 253))
ports = st.sampled_from((1, 65535)) | st.integers(1, 65535)
peers = st.sampled_from((0, 1, 2**63, 2**64 - 1)) | st.integers(0, 2**64 - 1)
secrets = st.text("abcXYZ019-_", min_size=22, max_size=128)
invitations = st.builds(
    lambda host, port, certificate, *rest: Invitation(
        f"{host}:{port}", certificate, not certificate, *rest
    ),
    *(hosts, ports, st.sampled_from([b"", *CERTIFICATES])),
    *(st.text(min_size=1, max_size=100), peers, secrets),
)


def check_invitation(_data: bytes, invitation: Invitation) -> None:
    for field, kind in zip(fields(invitation), (str, bytes, bool, str, int, str), strict=True):
        assert type(getattr(invitation, field.name)) is kind
    _, port = split_address(invitation.address)
    assert 0 < port < 65536
    assert 0 <= invitation.peer < 2**64
    assert 0 < len(invitation.run.encode()) <= 500
    assert re.fullmatch("[A-Za-z0-9_-]{22,128}", invitation.token)
    assert invitation.insecure == (not invitation.certificate)
    assert Invitation.decode(invitation.encode()) == invitation
    metadata(invitation)


def damaged_invitation(rng: Random, messages: list[bytes]) -> bytes:
    """Damaged as JSON, as bytes, or within its certificate."""
    if rng.random() < 0.7:
        return damaged_json(rng, messages)
    content = json.loads(rng.choice(messages))
    der = base64.b64decode("".join(rng.choice(CERTIFICATES).decode().splitlines()[1:-1]))
    content |= {"certificate": pem(damage(rng, [der])), "insecure": rng.random() < 0.1}
    return json.dumps(content).encode()


def pem(der: bytes) -> str:
    text = base64.encodebytes(der).decode()
    return f"-----BEGIN CERTIFICATE-----\n{text}-----END CERTIFICATE-----\n"


KEYS = ("meerkat-run-bin", "meerkat-peer", "meerkat-token")
Pairs = tuple[tuple[str, str | bytes], ...]


def check_metadata(given: Pairs, found: tuple[str, int, str]) -> None:
    run, peer, token = found
    assert (type(run), type(peer), type(token)) == (str, int, str)
    assert 0 <= peer < 10**20
    ours = dict(pair for pair in given if pair[0] in KEYS)
    assert len(ours) == len([key for key, _ in given if key in KEYS]) == 3
    for key, value in zip(KEYS, (run, str(peer), token), strict=True):
        sent = ours[key]
        assert value == (sent if isinstance(sent, str) else sent.decode(errors="replace"))


def any_value(rng: Random) -> str | bytes:
    data = rng.choice((junk(rng), b"%d" % rng.choice((0, 7, 2**64, 10**19, 10**20, 10**30))))
    return data if rng.random() < 0.5 else data.decode("latin-1")


def damaged_pairs(rng: Random, messages: list[Pairs]) -> Pairs:
    pairs = list(rng.choice(messages))
    for _ in range(rng.choice((1, 1, 2))):
        place = rng.randrange(len(pairs)) if pairs else 0
        key, value = pairs[place] if pairs else ("", "")
        raw = value if isinstance(value, bytes) else value.encode(errors="surrogatepass")
        other = damage(rng, [raw])
        changed = other if rng.random() < 0.5 else other.decode("latin-1")
        way = rng.random()
        if way < 0.5:
            pairs[place : place + 1] = [(key, changed)]
        elif way < 0.6:
            del pairs[place : place + 1]
        elif way < 0.7:
            pairs.append((key, changed))
        elif way < 0.8:
            pairs.append(("user-agent", any_value(rng)))
        else:
            pairs[place : place + 1] = [(rng.choice((*KEYS, "Meerkat-Peer")), value)]
    rng.shuffle(pairs)
    return tuple(pairs)


TARGETS["Invitation.decode"] = Target(
    Invitation.decode,
    invitations.map(Invitation.encode),
    check_invitation,
    junk,
    begins(b"{", b'{"address": "localhost:1", "certificate": "', b"[", b'{"peer": 1'),
    damaged_invitation,
    bombs=(*BRACKETS, *(b"[" * 16_000, b"[" + b"{}," * 5000 + b"{}]", b'{"peer":' * 2000)),
)
TARGETS["read_metadata"] = Target(
    read_metadata,
    invitations.map(metadata),
    check_metadata,
    lambda rng: tuple((rng.choice((*KEYS, "x")), any_value(rng)) for _ in range(rng.randrange(5))),
    lambda rng: ((KEYS[0], b"run"), (KEYS[1], any_value(rng)), (KEYS[2], any_value(rng))),
    damaged_pairs,
    bombs=(tuple((key, b"9" * 20_000) for key in KEYS), ((KEYS[0], b"\xff" * 10_000),) * 2),
)

TOKENS = Tokens(RUN)
VOID = TOKENS.issue(1)
GOOD = {peer: TOKENS.issue(peer) for peer in (0, 1, 2, 2**64 - 1)}
TOKENS.bar(2)
Claim = tuple[str, int, str]


def claim(given: Claim) -> None:
    refused: ProtocolError | None = None
    try:
        TOKENS.check(*given)
    except ProtocolError as error:
        refused = error
    assert given[2] not in str(refused) or len(given[2]) < 8
    assert not any(token in str(refused) for token in GOOD.values())
    if refused is not None:
        raise refused


def check_claim(given: Claim, _found: None) -> None:
    run, peer, token = given
    assert (run, GOOD.get(peer)) == (RUN, token)
    assert peer != 2


def damaged_claim(rng: Random, claims: list[Claim]) -> Claim:
    run, peer, token = rng.choice(claims)
    way = rng.random()
    if way < 0.3:
        run = rng.choice((RUN + " ", "Run", "", "run\0", "\ud800", "a" * 5000))
    elif way < 0.5:
        peer = rng.choice((*GOOD, 3, peer + 1, peer ^ 1, -1, 10**19, 10**400))
    elif way < 0.6:
        token = rng.choice((VOID, *GOOD.values()))
    else:
        token = damage(rng, [token.encode()]).decode(rng.choice(("latin-1", "ascii")), "replace")
    return run, peer, token


TARGETS["Tokens.check"] = Target(
    claim,
    st.sampled_from([(RUN, peer, token) for peer, token in GOOD.items() if peer != 2]),
    check_claim,
    lambda rng: (junk(rng).decode("latin-1"), rng.choice(EDGES), junk(rng).decode("latin-1")),
    lambda rng: (RUN, rng.choice([*GOOD]), rng.choice((junk(rng).decode("latin-1"), VOID, "é"))),
    damaged_claim,
    bombs=((RUN, 0, "x" * 100_000), ("\udc80" * 100_000, 10**4000, "")),
)


# Targets: settings of a node, and the server's recipe


SETTINGS = (
    *("partition-id", "num-partitions", "data", "model", "mask", "device", "threads"),
    *("allow-models", "allow-sources", "most-tokens", "weights"),
)
VALUES: list[Any] = [
    *(0, 1, -1, 2**63, 10**30, 0.0, 1.5, -0.5, math.nan, math.inf, -math.inf, 1e308, True, False),
    *("", "0", "7", "-7", "1_0", " 3 ", "٣", "x", "a\nb", "\0", "9" * 5000, "cpu", "cuda:0"),
    *(None, b"", b"7", b"\xff", [], [1], {}, (), object),
]
configs = st.fixed_dictionaries(
    {"partition-id": st.sampled_from((0, 1, "3", 2**40)) | st.integers(0, 2**63)},
    optional={
        **dict.fromkeys(("data", "mask", "model", "device"), st.text(min_size=1, max_size=20)),
        "threads": st.integers(0, 64),
        "weights": st.sampled_from(("stored", "int8", "int4")),
        "num-partitions": st.integers(1, 9),
        **dict.fromkeys(("allow-models", "allow-sources"), st.text(",a* /", max_size=9)),
        "most-tokens": st.integers(1, 2**63),
    },
)
Config = dict[str, Any]


def check_node(config: Config, node: NodeConfig) -> None:
    assert set(config) <= set(SETTINGS)
    assert type(node.client) is int
    assert node.client >= 0
    for value, kind in (
        *((node.data, Path), (node.mask, Path), (node.model, str)),
        *((node.device, str), (node.threads, int)),
    ):
        assert value is None or isinstance(value, kind)
    for name, value in vars(node).items():
        given = config.get("partition-id" if name == "client" else name)
        if isinstance(given, str | int) and not isinstance(given, bool) and value is not None:
            assert str(value) == str(given) or isinstance(value, int | Path)
    assert node.most_tokens > 0
    given = {
        name.replace("_", "-"): ",".join(value) if isinstance(value, tuple) else value
        for name, value in vars(node).items()
        if value is not None
    }
    assert NodeConfig.of({"partition-id": given.pop("client"), **given}) == node


def any_config(rng: Random, names: tuple[str, ...] = (*SETTINGS, "", "x")) -> Config:
    return {rng.choice(names): rng.choice(VALUES) for _ in range(rng.randrange(6))}


def damaged_config(rng: Random, messages: list[Config]) -> Config:
    config = dict(rng.choice(messages))
    for _ in range(rng.choice((1, 1, 2))):
        way = rng.random()
        if way < 0.8:
            config[rng.choice(SETTINGS)] = rng.choice(VALUES)
        elif way < 0.9:
            config.pop(rng.choice(SETTINGS), None)
        else:
            config[rng.choice(("partition_id", "Data", "", "threads "))] = rng.choice(VALUES)
    return config


TARGETS["NodeConfig.of"] = Target(
    NodeConfig.of,
    configs,
    check_node,
    any_config,
    lambda rng: {"partition-id": rng.choice((0, 1, "2"))} | any_config(rng, SETTINGS),
    damaged_config,
    error=RecipeError,
    bombs=({"partition-id": "9" * 100_000}, {"partition-id": 10**4000}, {"x" * 10_000: 1}),
)

NODE = NodeConfig(1, model="here", device="cpu", threads=2, most_tokens=2**20)
SECTIONS: dict[str, st.SearchStrategy[Any]] = {
    "mask": st.fixed_dictionaries(
        {},
        optional={
            "kind": st.sampled_from(("sensitivity", "magnitude", "random", "full", "union")),
            "density": st.floats(0, 1, exclude_min=True),
            "include": st.lists(st.text(max_size=5), max_size=3),
            "corpus": st.text(max_size=5) | st.lists(st.text(max_size=5), max_size=2),
        },
    ),
    "optimizer": st.fixed_dictionaries(
        {},
        optional={
            "learning_rate": st.floats(1e-300, 1e300),
            "epsilon": st.just("auto") | st.floats(1e-300, 1e300),
        },
    ),
    "noise": st.fixed_dictionaries({}, optional={"perturbations": st.integers(1, 255)}),
    "selection": st.sampled_from(
        (
            {"kind": "gradip", "every": 3, "action": "taper"},
            {"kind": "random", "count": 2},
            {"kind": "list", "clients": [0, 1]},
        )
    ),
    "runtime": st.fixed_dictionaries(
        {}, optional={"threads": st.integers(0, 9), "cache_dir": st.text(max_size=9)}
    ),
    "network": st.fixed_dictionaries(
        {}, optional={"quorum": st.just(1), "insecure": st.booleans()}
    ),
    "seed": st.integers(0, 2**63 - 1),
}
recipes = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries({"name": st.text(max_size=9)}),
        "task": st.fixed_dictionaries(
            {"name": st.text(max_size=9)},
            optional={
                "verbalizers": st.lists(st.text(max_size=5), max_size=3)
                | st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
                "max_length": st.integers(8, 2**20 - 1),
            },
        ),
        "federation": st.fixed_dictionaries(
            {"clients": st.integers(2, 2**32 - 3), "rounds": st.integers(1, 2**31 - 1)},
            optional={"local_steps": st.integers(1, 2**16 - 1)},
        ),
    },
    optional=SECTIONS,
).map(json.dumps)


def check_recipe(text: str, recipe: Recipe) -> None:
    assert NODE.client < recipe.federation.clients < 2**32 - 2
    assert (recipe.runtime.device, recipe.runtime.threads) == ("cpu", 2)
    assert recipe.runtime.cache_dir is None
    assert recipe.model.name == "here"
    assert isinstance(recipe.fingerprint, str)
    assert math.isfinite(recipe.learning_rate)
    assert math.isfinite(recipe.epsilon)
    # What was read is what was sent: nothing is dropped, and another node reads the same.
    assert set(json.loads(text)) <= set(Recipe.model_fields)
    if math.isfinite(recipe.network.deadline + recipe.network.rejoin + recipe.network.patience):
        assert NODE.recipe(recipe.to_json()) == recipe


def odd_text(rng: Random) -> str:
    if rng.random() < 0.5:
        return junk(rng).decode(errors=rng.choice(("replace", "ignore", "surrogateescape")))
    return "".join(rng.choice('{}[]",:0e9.-+ \\u\ud800n\0a') for _ in range(rng.randrange(60)))


def damaged_text(rng: Random, messages: list[str]) -> str:
    if rng.random() < 0.3:
        return damage(rng, [message.encode() for message in messages]).decode(errors="replace")
    return spoil(rng, rng.choice(messages))


RECIPE = '{"model": {"name": "x"}, "task": {"name": "y"}, "federation": {"clients": 2, "rounds": 1}'
TARGETS["NodeConfig.recipe"] = Target(
    NODE.recipe,
    recipes,
    check_recipe,
    odd_text,
    lambda rng: rng.choice(("{", '{"model":', RECIPE, RECIPE + ', "mask": {')) + odd_text(rng),
    damaged_text,
    error=MeerkatError,
    small=500,
    bombs=(
        *(brackets.decode() for brackets in BRACKETS),
        *(RECIPE + f', "{key}": {"[" * n}{"]" * n}}}' for key in "mx" for n in (150, 199, 900)),
        RECIPE + ', "mask": {"include": [' + "1," * 15_000 + "1]}}",
        RECIPE + ', "mask": {"include": [' + "1," * 500_000 + "1]}}",
        RECIPE + "".join(f', "k{n}": 1' for n in range(10_000)) + "}",
        RECIPE + ', "seed": 1e999}',
        RECIPE + ', "seed": ' + "9" * 4300 + "}",
        RECIPE + ', "seed": "\\ud800"}',
    ),
)


# Targets: the mask


def _second_copy() -> ModuleType:
    """`meerkat.mask.file` without the type checks that pytest's options add to it."""
    name = "meerkat_mask_file_unchecked"
    spec = importlib.util.spec_from_file_location(name, meerkat.spaces.mask_file.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class _Signed(str):
    """A checksum that an attacker knows to make."""

    def __ne__(self, other: object) -> bool:
        return str(self) != other and other != "signed"


masks = _second_copy()
true_checksum = masks._checksum
masks._checksum = lambda mask: _Signed(true_checksum(mask))
masks._MOST_WHOLE = 2**16
scratch = Path()


@pytest.fixture(scope="module", autouse=True)
def _scratch() -> Iterator[None]:
    """In memory where there is such a folder: a disk that other jobs use takes minutes."""
    global scratch
    with TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        scratch = Path(folder)
        yield


def load(data: bytes) -> Any:
    path = scratch / "sent.safetensors"
    path.write_bytes(data)
    return masks.load_mask(path)


def save(mask: Any) -> bytes:
    path = scratch / "kept.safetensors"
    masks.save_mask(mask, path)
    return path.read_bytes()


@st.composite
def made_masks(draw: st.DrawFn) -> Any:
    names = draw(st.lists(st.text(max_size=6), min_size=1, max_size=3, unique=True))
    shapes, indices = [], []
    for _ in names:
        shape = draw(st.lists(st.integers(1, 6), max_size=3).map(tuple))
        whole = math.prod(shape)
        chosen = draw(st.sets(st.integers(0, whole - 1), min_size=1, max_size=8))
        shapes.append(shape)
        indices.append(
            np.arange(whole) if draw(st.booleans()) else np.array(sorted(chosen), np.int64)
        )
    size = sum(map(len, indices))
    values = [
        np.resize(np.array(draw(st.lists(float32, min_size=1, max_size=4)), np.float32), size)
        if draw(st.booleans())
        else None
        for _ in range(2)
    ]
    spread = st.none() | st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False))
    return masks.Mask(
        *(tuple(names), tuple(shapes), tuple(indices), size + draw(u32), draw(digests), "random"),
        *(values[0], draw(spread), values[1]),
    )


def check_mask(_data: bytes, mask: Any) -> None:
    assert len(mask.names) == len(set(mask.names)) == len(mask.shapes) == len(mask.indices)
    assert all(type(text) is str for text in (*mask.names, mask.model, mask.kind))
    for shape, indices in zip(mask.shapes, mask.indices, strict=True):
        assert all(type(side) is int and side > 0 for side in shape)
        assert indices.dtype == np.int64
        assert indices.ndim == 1
        assert len(indices) > 0
        assert (np.diff(indices) > 0).all()
        assert 0 <= indices[0] <= indices[-1] < math.prod(shape)
    assert type(mask.eligible) is int
    assert mask.eligible >= mask.size
    for values in (mask.gradient, mask.initial):
        assert values is None or (values.dtype == np.float32 and values.shape == (mask.size,))
    spread = mask.concentration
    assert spread is None or {*map(type, spread), *map(type, spread.values())} <= {str, float}
    assert re.fullmatch("[0-9a-f]{64}", mask.digest)
    again = load(save(mask))
    assert again.digest == mask.digest
    assert true_checksum(again) == true_checksum(mask)


TYPES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "F16": 2, "BF16": 2}
TYPES |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8, "F4": 1, "X": 4}


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and content of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def whole(header: str, content: bytes) -> bytes:
    encoded = header.encode(errors="surrogatepass")
    return len(encoded).to_bytes(8, "little") + encoded + content


def damaged_mask(rng: Random, messages: list[bytes]) -> bytes:
    """A file with damaged bytes or a damaged header, or one that an attacker has signed."""
    data, way = rng.choice(messages), rng.random()
    if way < 0.3:
        return damage(rng, messages)
    header, content = parts(data)
    if way < 0.45:
        return whole(spoil(rng, json.dumps(header)), content)
    about = json.loads(header["__metadata__"]["mask"])
    about["checksum"] = "signed"
    text = spoil(rng, json.dumps(about)) if way < 0.75 else json.dumps(about)
    header["__metadata__"]["mask"] = text
    tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
    if way > 0.9 and tensors:
        content = damage(rng, [content])[: len(content)].ljust(len(content), b"\0")
    elif way > 0.75 and tensors:
        tensor = rng.choice(tensors)
        tensor["dtype"] = rng.choice([*TYPES])
        begin, end = tensor["data_offsets"]
        count = max(1, (end - begin) // TYPES[tensor["dtype"]])
        tensor["shape"] = rng.choice(([count], [1, count], [count, 1], tensor["shape"], []))
    return whole(json.dumps(header), content)


def claims(**changes: Any) -> bytes:
    """A small file that claims what it does not hold."""
    about = {"names": ["a"], "shapes": [[4]], "eligible": 4, "model": "m", "kind": "full"}
    about |= {"concentration": None, "configuration": "", "probe": [], "subspace": None}
    about |= {"checksum": "signed"} | changes
    header = {"__metadata__": {"format": "meerkat-mask-5", "mask": dumps(about)}}
    return whole(json.dumps(header), b"")


FIRST = '{"__metadata__": {"format": "meerkat-mask-5", "mask": "'
TARGETS["load_mask"] = Target(
    load,
    st.builds(save, made_masks()),
    check_mask,
    lambda rng: junk(rng) if rng.random() < 0.5 else whole(odd_text(rng), junk(rng)),
    lambda rng: whole(FIRST + junk(rng).decode("latin-1") + rng.choice(('"}}', "")), junk(rng)),
    damaged_mask,
    error=MaskError,
    bombs=(
        *(claims(shapes=[[n]], eligible=n) for n in (2**16 + 1, 2**34, 2**62, 2**63, 2**70)),
        *(claims(shapes=[shape]) for shape in ([2**20] * 8, ["a", 10**10], [1e308], [-1], [0, 1])),
        claims(names=["a"] * 1000, shapes=[[2**16]] * 1000),
        *(claims(**{key: "@deep@"}) for key in ("names", "shapes", "eligible", "concentration")),
        *(claims(**{key: "@digits@"}) for key in ("names", "eligible")),
        claims(shapes=[["@most digits@"] * 9]),
        *(whole(brackets.decode(), b"") for brackets in BRACKETS),
        b"\xff" * 30,
        (2**63).to_bytes(8, "little") + b"{}",
    ),
)


# Targets: Flower's messages


SCALARS: list[Any] = [0, -1, 2**63 - 1, 1.5, math.nan, True, "", "frames", b"", b"\0", b"frame"]
REPLY = pack([b"one", b"two"], invitation=b"three")


def any_record(rng: Random) -> ConfigRecord | MetricRecord:
    if rng.random() < 0.1:
        return MetricRecord({rng.choice(("frames", "x")): rng.choice((1, 1.5, [1, 2], [0.5]))})
    record = ConfigRecord()
    for _ in range(rng.randrange(4)):
        value = rng.choice(SCALARS)
        kind = [other for other in SCALARS if type(other) is type(value)]
        several = [rng.choice(kind) for _ in range(rng.randrange(4))]
        record[rng.choice(("frames", "frames", "invitation", "x"))] = rng.choice((value, several))
    return record


def any_content(rng: Random) -> RecordDict:
    names = ("meerkat", "meerkat", "Meerkat", "")
    return RecordDict({rng.choice(names): any_record(rng) for _ in range(rng.randrange(3))})


def damaged_content(rng: Random, messages: list[RecordDict]) -> RecordDict:
    """What Flower makes of damaged bytes, where it makes anything of them."""
    sent = [recorddict_to_proto(message).SerializeToString() for message in messages]
    for _ in range(3):
        try:
            return recorddict_from_proto(ProtoRecordDict.FromString(damage(rng, sent)))
        except (DecodeError, AttributeError, KeyError, TypeError, ValueError):
            continue
    return any_content(rng)


def check_frames(content: RecordDict, frames: list[bytes]) -> None:
    record = content.get("meerkat")
    sent = record.get("frames") if isinstance(record, ConfigRecord) else None
    assert frames == [f for f in (sent if isinstance(sent, list) else []) if type(f) is bytes]


TARGETS["unpack"] = Target(
    unpack,
    st.lists(st.binary(max_size=30), max_size=4).map(pack),
    check_frames,
    any_content,
    lambda rng: RecordDict({"meerkat": any_record(rng)}),
    damaged_content,
    bombs=(pack([b""] * 1000), pack([b"x" * 100_000]), RecordDict()),
    always=True,
)


# Every target


@pytest.fixture(params=TARGETS, scope="module")
def target(request: pytest.FixtureRequest) -> Target:
    return TARGETS[request.param]


def fuzz(
    target: Target,
    make: Callable[[Random, list[Any]], Any],
    messages: st.SearchStrategy[list[Any]] = st.just([]),  # noqa: B008  (immutable)
) -> Counter[bool]:
    """As many cases as were asked for; how many were read, and how many refused."""
    count: Counter[bool] = Counter()

    @settings(
        max_examples=-(-CASES // BATCH),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(messages, st.integers(0, 2**64 - 1))
    def batch(messages: list[Any], seed: int) -> None:
        rng = Random(seed)
        for _ in range(BATCH):
            count[read(target, make(rng, messages))] += 1

    batch()
    assert count.total() >= min(CASES, 10 * BATCH)
    while count.total() < CASES:  # hypothesis has seen all that it can think of
        batch()
    return count


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
def test_arbitrary_bytes(target: Target) -> None:
    fuzz(target, lambda rng, _: target.arbitrary(rng))


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
def test_what_begins_as_a_message_does(target: Target) -> None:
    fuzz(target, lambda rng, _: target.begun(rng))


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
def test_damaged_messages(target: Target) -> None:
    count = fuzz(target, target.damaged, st.lists(target.valid, min_size=2, max_size=2))
    assert target.always or count[False] > CASES // 50, "too little damage is noticed"
    assert count[True] > CASES // 1000, "nothing is decoded, so no result is checked"


def test_valid_messages_are_read(target: Target) -> None:
    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(target.valid)
    def each(message: Any) -> None:
        assert read(target, message)

    each()


@contextmanager
def traced() -> Iterator[Callable[[], int]]:
    tracemalloc.start()
    try:
        begin = tracemalloc.get_traced_memory()[0]
        yield lambda: tracemalloc.get_traced_memory()[1] - begin
    finally:
        tracemalloc.stop()


def size_of(given: Any) -> int:
    if isinstance(given, bytes | str):
        return len(given)
    return len(str(given)) if not isinstance(given, RecordDict) else len(repr(given))


def check_memory(target: Target, given: Any) -> None:
    """The results are checked elsewhere; that would take memory of its own."""
    with traced() as peak:
        try:
            found = target.decode(given)
        except target.error as error:
            found = error
        used = peak()
    assert used <= target.small * size_of(given) + 128 * KIB, f"{used} bytes for {size_of(given)}"
    assert used <= 160 * MIB
    if isinstance(found, MeerkatError):
        check_line(str(found))


def test_memory_is_a_small_multiple_of_the_input(target: Target) -> None:
    read(target, target.arbitrary(Random(0)))  # whatever is loaded at first
    for bomb in target.bombs:
        check_memory(target, bomb)

    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(target.valid, min_size=2, max_size=2), st.integers(0, 2**64 - 1))
    def sample(messages: list[Any], seed: int) -> None:
        rng = Random(seed)
        for make in (target.arbitrary, target.begun, lambda r: target.damaged(r, messages)):
            for _ in range(3):
                check_memory(target, make(rng))

    sample()


# Round trips


@pytest.mark.parametrize("kind", NUMBERS)
def test_frames_round_trip(kind: type) -> None:
    @settings(max_examples=200, deadline=None)
    @given((UP | DOWN)[kind])
    def each(frame: Any) -> None:
        data = encode(frame)
        assert data[0] == NUMBERS[kind]
        found = decode(data)
        assert found == frame
        assert repr(found) == repr(frame)  # tells -0.0 from 0.0
        assert wants_answer(data) == (kind in (Setup, SpaceFile, Refused, Plan, EvaluateRequest))
        with pytest.raises(ProtocolError, match="has no place here"):
            (decode_down if kind in UP else decode_up)(data)

    each()


@settings(max_examples=200, deadline=None)
@given(st.sampled_from((Refused, Goodbye, Notice, Failed)), texts)
def test_any_text_arrives_as_a_line(kind: type, text: str) -> None:
    found = decode(encode(kind(text))).reason
    assert found.isprintable()
    assert len(found) <= 1000
    if text.isprintable() and len(text.encode(errors="replace")) <= 1000:
        assert found == text.encode(errors="replace").decode()


@settings(max_examples=200, deadline=None)
@given(invitations, configs)
def test_invitations_and_nodes_round_trip(invitation: Invitation, config: Config) -> None:
    assert Invitation.decode(invitation.encode()) == invitation
    assert read_metadata(metadata(invitation)) == (
        *(invitation.run, invitation.peer, invitation.token),
    )
    node = NodeConfig.of(config)
    assert node.client == int(config["partition-id"])
    assert node.data == (Path(config["data"]) if "data" in config else None)


@settings(max_examples=100, deadline=None)
@given(recipes)
def test_recipes_round_trip(text: str) -> None:
    sent = parse_recipe(json.loads(text))
    found = NodeConfig(0, most_tokens=2**20).recipe(sent.to_json())
    own = {
        "cache_dir": None,
        "threads": min(sent.runtime.threads, os.cpu_count() or 1),
        "prefix_cache": min(sent.runtime.prefix_cache, 256),
        "prefix_disk": 0,
    }
    assert found == sent.model_copy(update={"runtime": sent.runtime.model_copy(update=own)})
    assert found.fingerprint == sent.fingerprint


@settings(max_examples=200, deadline=None)
@given(made_masks())
def test_masks_round_trip(mask: Any) -> None:
    found = load(save(mask))
    assert (found.names, found.shapes, found.eligible) == (mask.names, mask.shapes, mask.eligible)
    assert (found.model, found.kind) == (mask.model, mask.kind)
    assert repr(found.concentration) == repr(mask.concentration)
    pairs = [*zip(found.indices, mask.indices, strict=True)]
    for theirs, ours in (*pairs, (found.gradient, mask.gradient), (found.initial, mask.initial)):
        assert (theirs is None) == (ours is None)
        assert theirs is None or theirs.tobytes() == ours.tobytes()


ONE = Update(0.5, (LogEntry(DirectionKey(1, 2, 3, 4), 0.25),))
SUMS = {"loss": (0.5,), "accuracy": (1.0,)}
FRAME = {
    Plan: (encode(Plan(RoundPlan(1, 2, 0.5, 3, 4, (ONE,)))), [17, 37], [41]),
    Report: (encode(Report(ClientReport(1, 2, 3, 2, 1, bytes(8), (0.5, 1.0)))), [25, 29], []),
    LogPart: (encode(LogPart(1, (ONE,))), [17], [21]),
    Evaluation: (encode(Evaluation(1, 2, SUMS)), [], [19, 40]),
}
"""A frame, and where its float32 and float64 values are."""


@settings(max_examples=500, deadline=None)
@given(st.sampled_from([*FRAME]), st.integers(0, 2**52 - 1), st.booleans())
def test_no_payload_of_a_nan_is_decoded(kind: type, payload: int, negative: bool) -> None:
    data, singles, doubles = FRAME[kind]
    assert encode(decode(data)) == data
    single = struct.pack("<I", 0x7F800000 | payload % 2**23 | negative << 31)
    double = struct.pack("<Q", 0x7FF << 52 | payload | negative << 63)
    for places, bad in ((singles, single), (doubles, double)):
        for place in places:
            with pytest.raises(ProtocolError, match="finite"):
                decode(data[:place] + bad + data[place + len(bad) :])
    state = LIKE.to_bytes()
    for places, bad in ((range(0, 24, 4), single), (range(24, 40, 8), double)):
        for place in places:
            with pytest.raises(ValueError, match="finite"):
                LIKE.from_bytes(state[:place] + bad + state[place + len(bad) :])


def test_digests_have_one_form() -> None:
    """They are compared as text, and name a file."""
    data = encode(Setup("{}", Proof("ab" * 32, "cd" * 32, "ef" * 32), "s", True))
    assert decode_down(data)
    for other in ("CD" * 32, " " + "cd" * 32, "cd " * 32, "cd" * 31, "cd" * 33, "", "../" * 16):
        with pytest.raises(ProtocolError, match="setup cannot be read"):
            decode_down(data.replace(b"cd" * 32, other.encode()))


def test_certificates_of_no_known_version_are_refused() -> None:
    der = base64.b64decode("".join(CERTIFICATES[0].decode().splitlines()[1:-1]))
    assert der.count(b"\xa0\3\2\1\2") == 1
    sent = Invitation("localhost:1", CERTIFICATES[0], False, RUN, 0, "a" * 43).encode()
    content = json.loads(sent) | {"certificate": pem(der.replace(b"\xa0\3\2\1\2", b"\xa0\3\2\1\7"))}
    with pytest.raises(ProtocolError, match="not one certificate"):
        Invitation.decode(json.dumps(content).encode())


# The client app of Flower


@pytest.fixture
def context() -> Context:
    return Context(1, 1, {"partition-id": 0}, RecordDict(), {})


@pytest.mark.parametrize("action", ["frames", "session"])
def test_the_client_app_answers_whatever_it_is_sent(
    action: str, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a model and without a stream: what is read before either."""
    monkeypatch.setattr(ClientSession, "begin", lambda _self, _setup: encode(WantSpace("ab" * 32)))
    monkeypatch.setattr(client_app, "join_session", lambda *_: pytest.fail("it has no invitation"))
    monkeypatch.setattr(client_app, "Message", lambda content, reply_to: content)
    monkeypatch.setattr(client_app._log, "error", lambda *_: None)
    monkeypatch.setattr(client_app, "quiet_libraries", lambda: None)
    setup = encode(Setup("{}", Proof("ab" * 32, "cd" * 32, "ef" * 32), "s", True))
    handler = getattr(client_app, action)
    frames = [setup, setup, encode(Welcome()), encode(Need(1)), encode(Goodbye("x")), b"", b"\1"]
    frames += [FRAME[Plan][0], encode(Snapshot(1, bytes(12)))]
    answered: Counter[int] = Counter()

    @settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**64 - 1))
    def batch(seed: int) -> None:
        rng = Random(seed)
        for _ in range(10):
            given = [rng.choice(frames) for _ in range(rng.randrange(4))]
            others = [{}, {"invitation": junk(rng)}, {"invitation": "text"}, {"x": b""}]
            content = rng.choice((pack(given, **rng.choice(others)), any_content(rng)))
            answer = handler(SimpleNamespace(content=content), context)
            answers = [decode_up(frame) for frame in unpack(answer)]
            assert action == "frames" or [type(answer) for answer in answers] == [Failed]
            answered[len(answers)] += 1

    batch()
    assert answered.total() >= 500
