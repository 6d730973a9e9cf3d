"""Frames from client to server; `frame.py` has their order."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self, cast

import numpy as np

from meerkat.errors import ProtocolError
from meerkat.federation.messages import ClientReport
from meerkat.transport.frame import (
    VERSION,
    TextFrame,
    UpFrame,
    check_version,
    decode,
    unpack,
    unpack_exactly,
)
from meerkat.transport.handshake import Proof
from meerkat.transport.messages import decode_report, encode_report

__all__ = ["Evaluation", "Failed", "Hello", "Need", "Report", "WantSpace", "decode_up"]

_POSITION = struct.Struct("<I")
_HELLO = struct.Struct("<BIIII32s32s32s32sBB")
_EVALUATION = struct.Struct("<IIB")
_METRIC = struct.Struct("<BI")
"""Length of a metric's name in bytes, and its number of sums."""
_NAME = re.compile(rb"[!-~]+")
"""A metric's name: printable, as it may get into a log."""


def decode_up(data: bytes) -> UpFrame:
    """The frame that a client sent.

    Raises:
        ProtocolError: The bytes are not a valid frame from a client.
    """
    return cast(UpFrame, decode(data, UpFrame.kinds))


@dataclass(frozen=True)
class WantSpace(UpFrame, number=64):
    """Request for the mask, from a client that has none with the digest of the setup."""

    space: str
    """That digest."""

    def body(self) -> bytes:
        return bytes.fromhex(self.space)

    @classmethod
    def parse(cls, body: bytes) -> Self:
        if len(body) != 32:
            raise ProtocolError(f"a request for the mask of {len(body)} bytes; it has 32")
        return cls(body.hex())


@dataclass(frozen=True)
class Hello(UpFrame, number=65):
    """A client's number, how many examples it has, and how much of the log its state contains."""

    client: int
    examples: int
    """To train on."""
    held_out: int
    """To evaluate on: to test, and to choose a round by."""
    position: int
    """Updates of the log that its state contains."""
    proof: Proof
    gradients: bool = False
    """Can it report the exact gradient?"""

    def body(self) -> bytes:
        proof = self.proof
        fields = (proof.model, proof.space, proof.noise, proof.configuration)
        digests = (bytes.fromhex(field) for field in fields)
        counts = (self.client, self.examples, self.held_out, self.position)
        head = _HELLO.pack(VERSION, *counts, *digests, self.gradients, len(proof.probe))
        return head + np.array(proof.probe, "<f4").tobytes()

    @classmethod
    def parse(cls, body: bytes) -> Self:
        check_version(body, "the client")
        head = unpack(_HELLO, body, "hello")
        _, client, examples, held_out, position, *digests, gradients, width = head
        if len(body) != _HELLO.size + 4 * width:
            raise ProtocolError(f"hello of {len(body)} bytes with a probe of {width} logits")
        model, space, noise, known = (bytes(digest).hex() for digest in digests)
        configuration = known if any(digests[3]) else ""
        probe = tuple(np.frombuffer(body, "<f4", offset=_HELLO.size).tolist())
        if not all(map(math.isfinite, probe)):
            raise ProtocolError("hello: a logit of its probe is not finite")
        if gradients > 1:
            raise ProtocolError(f"hello: whether it has gradients is {gradients}, not 0 or 1")
        proof = Proof(model, space, noise, configuration, probe)
        return cls(client, examples, held_out, position, proof, bool(gradients))


@dataclass(frozen=True)
class Report(UpFrame, number=66):
    """The answer to a plan."""

    report: ClientReport

    def body(self) -> bytes:
        return encode_report(self.report)

    @classmethod
    def parse(cls, body: bytes) -> Self:
        return cls(decode_report(body))


@dataclass(frozen=True)
class Need(UpFrame, number=67):
    """The client lacks updates of the log that a plan or an evaluation assumes."""

    position: int

    def body(self) -> bytes:
        return _POSITION.pack(self.position)

    @classmethod
    def parse(cls, body: bytes) -> Self:
        return cls(*unpack_exactly(_POSITION, body, "need"))


@dataclass(frozen=True)
class Evaluation(UpFrame, number=68):
    """The answer to an evaluation request: sums over examples, which the server adds up."""

    round: int
    examples: int
    """All that the client has to evaluate on."""
    sums: Mapping[str, tuple[float, ...]]
    """The sums of each metric, by name; see `tasks.metrics`. Those over validation examples, and
    how many these are, have the names of `tasks.metrics.validation`."""

    def body(self) -> bytes:
        parts = [_EVALUATION.pack(self.round, self.examples, len(self.sums))]
        for name, sums in self.sums.items():
            encoded = name.encode()
            parts += [_METRIC.pack(len(encoded), len(sums)), encoded]
            parts.append(np.asarray(sums, "<f8").tobytes())
        return b"".join(parts)

    @classmethod
    def parse(cls, body: bytes) -> Self:
        number, examples, count = unpack(_EVALUATION, body, "evaluation")
        place, sums = _EVALUATION.size, dict[str, tuple[float, ...]]()
        for _ in range(count):
            length, width = unpack(_METRIC, body[place : place + _METRIC.size], "metric")
            place += _METRIC.size
            name, values = body[place : place + length], body[place + length :][: 8 * width]
            place += length + 8 * width
            if place > len(body) or not _NAME.fullmatch(name):
                raise ProtocolError(f"evaluation of {len(body)} bytes does not hold its metrics")
            found = np.frombuffer(values, "<f8")
            if not np.isfinite(found).all():
                raise ProtocolError("evaluation: a sum is not finite")
            sums[name.decode()] = tuple(found.tolist())
        if place != len(body) or len(sums) != count or not examples:
            raise ProtocolError(f"evaluation of {len(body)} bytes and {examples} examples")
        return cls(number, examples, sums)


@dataclass(frozen=True)
class Failed(TextFrame, UpFrame, number=69):
    """The client could not answer, with the reason."""
