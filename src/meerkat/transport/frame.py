"""Frames: one byte with the number of the kind, then the body. All numbers are little-endian.

    server                                client
    Setup ──────────────────────────────▶         recipe, and what both must have in common
          ◀───────────────────── WantSpace        only if it has no mask with the digest
    SpaceFile ──────────────────────────▶
          ◀───────────────────────── Hello        its number, examples and position in the log
    Welcome or Refused ─────────────────▶
    Snapshot, Plan ─────────────────────▶         a plan has updates; Snapshot only if smaller
          ◀───────── Report, Need or Failed       Need: it lacks updates that the plan assumes
    Notice ─────────────────────────────▶         only if the answer is not used
    LogPart or Snapshot, EvaluateRequest ▶
          ◀────── Evaluation, Need or Failed
    Goodbye ────────────────────────────▶

A `Setup` within a conversation is that of a renewed subspace; it is answered like the first.

Both transports carry the same frames: `messages` several in one Flower message, `stream` one in
each message of gRPC. A decoder raises `ProtocolError` for bytes that are not a valid frame, and
allocates at most a small multiple of its input.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from meerkat.errors import ProtocolError

__all__ = [
    "VERSION",
    "DownFrame",
    "EmptyFrame",
    "Frame",
    "TextFrame",
    "UpFrame",
    "check_version",
    "decode",
    "encode",
    "unpack",
    "unpack_exactly",
]

VERSION = 4
"""Version of the protocol: of every frame and message on the wire."""

_LONGEST_TEXT = 1000
"""Bytes; a longer text is cut when it is sent, and refused when it is received."""


class Frame:
    """One frame. A subclass is registered under its number, and encodes and parses its body."""

    number: ClassVar[int]
    waits: ClassVar[bool] = False
    """Does the server send nothing more until the client has answered this frame?"""
    kinds: ClassVar[dict[int, type[Frame]]]
    """Classes of the frames of one direction, by number."""

    def __init_subclass__(cls, number: int | None = None, waits: bool = False) -> None:
        if number is not None:
            cls.number, cls.waits = number, waits
            assert number not in cls.kinds, f"number {number} is taken"
            cls.kinds[number] = cls

    def body(self) -> bytes:
        """Bytes after the number."""
        raise NotImplementedError

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """The frame with this body.

        Raises:
            ProtocolError: The body is not valid.
        """
        raise NotImplementedError


class DownFrame(Frame):
    """A frame from server to client; see `server_frames`."""

    kinds: ClassVar[dict[int, type[Frame]]] = {}


class UpFrame(Frame):
    """A frame from client to server; see `client_frames`."""

    kinds: ClassVar[dict[int, type[Frame]]] = {}


def encode(frame: Frame) -> bytes:
    """Bytes of a frame."""
    return bytes([frame.number]) + frame.body()


def decode(data: bytes, kinds: dict[int, type[Frame]]) -> Frame:
    """The frame in these bytes.

    Args:
        kinds: Classes that it may be of, by number.

    Raises:
        ProtocolError: It is of another kind, or its body is not valid.
    """
    if not data or data[0] not in kinds:
        kind = f"kind {data[0]}" if data else "no kind"
        raise ProtocolError(f"a frame of {len(data)} bytes and {kind} has no place here")
    return kinds[data[0]].parse(data[1:])


@dataclass(frozen=True)
class TextFrame(Frame):
    """A frame with one line of text."""

    reason: str

    def body(self) -> bytes:
        # A path that is not UTF-8 has surrogates, which cannot be encoded.
        text = self.reason.encode(errors="replace")[:_LONGEST_TEXT]
        return text.decode(errors="ignore").encode()

    @classmethod
    def parse(cls, body: bytes) -> Self:
        if len(body) > _LONGEST_TEXT:
            raise ProtocolError(f"a text of {len(body)} bytes; at most {_LONGEST_TEXT} are sent")
        text = body.decode(errors="replace")
        # The text goes into a log: it must be one line without control characters.
        return cls("".join(c if c.isprintable() else " " for c in text))


@dataclass(frozen=True)
class EmptyFrame(Frame):
    """A frame without a body."""

    def body(self) -> bytes:
        return b""

    @classmethod
    def parse(cls, body: bytes) -> Self:
        if body:
            raise ProtocolError(f"{cls.__name__.lower()} with {len(body)} bytes of content")
        return cls()


def check_version(body: bytes, who: str) -> None:
    """Check that a message starts with `VERSION`.

    Args:
        who: The sender, for the error message.

    Raises:
        ProtocolError: It does not; the line has both versions and the way out.
    """
    if not body:
        raise ProtocolError(f"a message of 0 bytes from {who} has no version")
    if body[0] != VERSION:
        age = "an older" if body[0] < VERSION else "a newer"
        raise ProtocolError(
            f"{who} speaks version {body[0]} of the protocol, {age} one; this side speaks "
            f"{VERSION}: "
            "install the same release of meerkat-fl on both"
        )


def unpack(form: struct.Struct, body: bytes, what: str) -> tuple[Any, ...]:
    """The values at the start of a body.

    Raises:
        ProtocolError: The body is too short.
    """
    if len(body) < form.size:
        raise ProtocolError(f"{len(body)} bytes are too short for a {what}")
    return form.unpack_from(body)


def unpack_exactly(form: struct.Struct, body: bytes, what: str) -> tuple[Any, ...]:
    """The values of a body that has nothing after them.

    Raises:
        ProtocolError: The body is of another length.
    """
    if len(body) != form.size:
        raise ProtocolError(f"{what} of {len(body)} bytes; it has {form.size}")
    return form.unpack(body)
