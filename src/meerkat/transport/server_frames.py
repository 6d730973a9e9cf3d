"""Frames from server to client; `frame.py` has their order."""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import asdict, dataclass
from typing import Self, cast

from meerkat.errors import ProtocolError
from meerkat.federation.messages import RoundPlan
from meerkat.transport.frame import (
    VERSION,
    DownFrame,
    EmptyFrame,
    TextFrame,
    check_version,
    decode,
    unpack,
    unpack_exactly,
)
from meerkat.transport.handshake import Proof
from meerkat.transport.messages import decode_plan, decode_updates, encode_plan, encode_updates
from meerkat.zo.log import Update

__all__ = [
    "EvaluateRequest",
    "Goodbye",
    "LogPart",
    "Notice",
    "Plan",
    "Refused",
    "Setup",
    "Snapshot",
    "SpaceFile",
    "Welcome",
    "decode_down",
    "wants_answer",
]

_POSITION = struct.Struct("<I")
_EVALUATE = struct.Struct("<II")
_DIGEST = re.compile("[0-9a-f]{64}")
"""Lower case only, as `hex()` writes it: digests are compared as text, and one names a file."""
_DIGESTS = ("model", "space", "noise")
_LONGEST_SESSION = 64


def decode_down(data: bytes) -> DownFrame:
    """The frame that a server sent.

    Raises:
        ProtocolError: The bytes are not a valid frame from a server.
    """
    return cast(DownFrame, decode(data, DownFrame.kinds))


def wants_answer(data: bytes) -> bool:
    """Does the server send nothing more until the client has answered this encoded frame?"""
    return bool(data) and data[0] in DownFrame.kinds and DownFrame.kinds[data[0]].waits


@dataclass(frozen=True)
class Setup(DownFrame, number=1, waits=True):
    """The first frame: the run's recipe, and what both sides must have in common.

    It comes again, with another space and position, when the subspace of a run is renewed.
    """

    recipe: str
    """The recipe as JSON."""
    proof: Proof
    session: str
    """A random name of this start of the server."""
    remember: bool
    """Must the client keep its state outside of its process, which may end after any message?"""
    position: int = 0
    """Updates of the log before the state that the space starts from."""

    def body(self) -> bytes:
        about = {"recipe": self.recipe, "session": self.session, "remember": self.remember}
        about["position"] = self.position
        return bytes([VERSION]) + json.dumps(about | asdict(self.proof)).encode()

    @classmethod
    def parse(cls, body: bytes) -> Self:
        check_version(body, "the server")
        try:
            about = json.loads(body[1:])
            recipe, session, remember = about["recipe"], about["session"], about["remember"]
            position = about["position"]
            probe, *fields = (about[name] for name in ("probe", *_DIGESTS, "configuration"))
            model, space, noise, configuration = fields
            proof = Proof(model, space, noise, configuration, tuple(probe))
            given = fields[:3] if configuration == "" else fields
            digests = [_DIGEST.fullmatch(field) for field in given]
            finite = all(type(value) is float and math.isfinite(value) for value in probe)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ProtocolError(f"setup cannot be read: {type(error).__name__}") from None
        texts = isinstance(recipe, str) and isinstance(session, str)
        named = texts and 0 < len(session) <= _LONGEST_SESSION
        placed = type(position) is int and 0 <= position < 2**32
        if not (named and placed and isinstance(remember, bool) and all(digests) and finite):
            raise ProtocolError("setup cannot be read: a field is of another type")
        return cls(recipe, proof, session, remember, position)


@dataclass(frozen=True)
class SpaceFile(DownFrame, number=2, waits=True):
    """The mask as a file, without pre-training gradient and initial parameters."""

    content: bytes

    def body(self) -> bytes:
        return self.content

    @classmethod
    def parse(cls, body: bytes) -> Self:
        return cls(body)


@dataclass(frozen=True)
class Welcome(EmptyFrame, DownFrame, number=3):
    """The client is a member of the run."""


@dataclass(frozen=True)
class Refused(TextFrame, DownFrame, number=4, waits=True):
    """The client cannot take part, with the reason and the way out."""


@dataclass(frozen=True)
class LogPart(DownFrame, number=5):
    """Updates of the log from a position on."""

    position: int
    updates: tuple[Update, ...]

    def body(self) -> bytes:
        return _POSITION.pack(self.position) + encode_updates(self.updates)

    @classmethod
    def parse(cls, body: bytes) -> Self:
        (position,) = unpack(_POSITION, body, "part of the log")
        return cls(position, decode_updates(body[_POSITION.size :]))


@dataclass(frozen=True)
class Snapshot(DownFrame, number=6):
    """The state at a position of the log; sent where it is smaller than the updates."""

    position: int
    state: bytes
    """`ModelState.to_bytes`."""

    def body(self) -> bytes:
        return _POSITION.pack(self.position) + self.state

    @classmethod
    def parse(cls, body: bytes) -> Self:
        (position,) = unpack(_POSITION, body, "snapshot")
        return cls(position, body[_POSITION.size :])


@dataclass(frozen=True)
class Plan(DownFrame, number=7, waits=True):
    """The client's plan of a round."""

    plan: RoundPlan

    def body(self) -> bytes:
        return encode_plan(self.plan)

    @classmethod
    def parse(cls, body: bytes) -> Self:
        return cls(decode_plan(body))


@dataclass(frozen=True)
class EvaluateRequest(DownFrame, number=8, waits=True):
    """Evaluate the state at a position of the log on the client's held-out examples."""

    round: int
    position: int

    def body(self) -> bytes:
        return _EVALUATE.pack(self.round, self.position)

    @classmethod
    def parse(cls, body: bytes) -> Self:
        return cls(*unpack_exactly(_EVALUATE, body, "evaluation request"))


@dataclass(frozen=True)
class Goodbye(TextFrame, DownFrame, number=9):
    """The run is over, with the reason."""


@dataclass(frozen=True)
class Notice(TextFrame, DownFrame, number=10):
    """The client's last answer is not used, with the reason."""
