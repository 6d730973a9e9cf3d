"""Frames and their bytes: one byte that names the kind, then the content."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from meerkat.errors import ProtocolError
from meerkat.protocol.frames import (
    DownFrame,
    Entries,
    Evaluate,
    Evaluation,
    Failed,
    Goodbye,
    Hello,
    MaskFile,
    Need,
    Notice,
    Plan,
    Proof,
    Refused,
    Report,
    Setup,
    Snapshot,
    UpFrame,
    WantMask,
    Welcome,
)
from meerkat.protocol.messages import (
    VERSION,
    decode_entries,
    decode_plan,
    decode_report,
    encode_entries,
    encode_plan,
    encode_report,
)

__all__ = ["decode_down", "decode_up", "encode", "wants_answer"]

_TEXT = 1000
"""Longest text in bytes; longer ones are cut when they are sent, refused when they come."""
_DIGEST = re.compile("[0-9a-f]{64}")
"""In the one form that `hex()` writes: it is compared, and names a file."""
_POSITION = struct.Struct("<I")
_HELLO = struct.Struct("<BIIII32s32s32s")
_EVALUATION = struct.Struct("<IIdB")


def encode(frame: DownFrame | UpFrame) -> bytes:
    """Bytes of a frame."""
    return bytes([_NUMBER[type(frame)]]) + _body(frame)


def decode_down(data: bytes) -> DownFrame:
    """The frame that a server sent.

    Raises:
        ProtocolError: These bytes are none.
    """
    frame: DownFrame = _decode(data, _DOWN)
    return frame


def decode_up(data: bytes) -> UpFrame:
    """The frame that a client sent.

    Raises:
        ProtocolError: These bytes are none.
    """
    frame: UpFrame = _decode(data, _UP)
    return frame


def wants_answer(data: bytes) -> bool:
    """Does the server wait after this frame of its own, or may more follow?"""
    return bool(data) and data[0] in map(_NUMBER.get, (Setup, MaskFile, Refused, Plan, Evaluate))


def _body(frame: DownFrame | UpFrame) -> bytes:
    match frame:
        case Setup(recipe, proof, session, remember):
            about = {"recipe": recipe, "session": session, "remember": remember, **vars(proof)}
            return bytes([VERSION]) + json.dumps(about).encode()
        case MaskFile(content):
            return content
        case Refused(reason) | Goodbye(reason) | Notice(reason) | Failed(reason):
            # A path that is no UTF-8 comes with half characters.
            return reason.encode(errors="replace")[:_TEXT].decode(errors="ignore").encode()
        case Entries(position, entries):
            return _POSITION.pack(position) + encode_entries(entries)
        case Snapshot(position, theta):
            return _POSITION.pack(position) + theta
        case Plan(plan):
            return encode_plan(plan)
        case Evaluate(number, position):
            return _POSITION.pack(number) + _POSITION.pack(position)
        case Hello(client, examples, held_out, position, proof):
            digests = (bytes.fromhex(d) for d in (proof.model, proof.mask, proof.noise))
            return _HELLO.pack(VERSION, client, examples, held_out, position, *digests)
        case Report(report):
            return encode_report(report)
        case Need(position):
            return _POSITION.pack(position)
        case Evaluation(number, examples, loss, confusion):
            counts = np.array(confusion, "<u4").tobytes()
            return _EVALUATION.pack(number, examples, loss, len(confusion)) + counts
        case _:
            return b""


def _decode(data: bytes, kinds: _Kinds) -> Any:
    if not data or data[0] not in kinds:
        kind = f"kind {data[0]}" if data else "no kind"
        raise ProtocolError(f"a frame of {len(data)} bytes and {kind} has no place here")
    _, decoder = kinds[data[0]]
    return decoder(data[1:])


def _setup(body: bytes) -> Setup:
    _check_version(body, "the server")
    try:
        about = json.loads(body[1:])
        recipe, session, remember = about["recipe"], about["session"], about["remember"]
        proof = Proof(about["model"], about["mask"], about["noise"])
        digests = [_DIGEST.fullmatch(digest) for digest in vars(proof).values()]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ProtocolError(f"setup cannot be read: {type(error).__name__}") from None
    texts = isinstance(recipe, str) and isinstance(session, str) and 0 < len(session) <= 64
    if not texts or not isinstance(remember, bool) or not all(digests):
        raise ProtocolError("setup cannot be read: a field is of another type")
    return Setup(recipe, proof, session, remember)


def _hello(body: bytes) -> Hello:
    _check_version(body, "the client")
    _, client, examples, held_out, position, *digests = _unpack(_HELLO, body, "hello")
    if len(body) != _HELLO.size:
        raise ProtocolError(f"hello of {len(body)} bytes; it has {_HELLO.size}")
    return Hello(client, examples, held_out, position, Proof(*(d.hex() for d in digests)))


def _check_version(body: bytes, who: str) -> None:
    if not body or body[0] != VERSION:
        theirs = body[0] if body else None
        raise ProtocolError(
            f"{who} speaks version {theirs} of the protocol, this side {VERSION}; install the same "
            "release of meerkat-fl on both"
        )


def _evaluation(body: bytes) -> Evaluation:
    number, examples, loss, classes = _unpack(_EVALUATION, body, "evaluation")
    if len(body) != _EVALUATION.size + 4 * classes**2:
        raise ProtocolError(f"evaluation of {len(body)} bytes does not hold {classes} classes")
    counts = np.frombuffer(body, "<u4", offset=_EVALUATION.size).reshape(classes, classes)
    if not examples or not math.isfinite(loss) or loss < 0:
        raise ProtocolError(f"evaluation of {examples} examples with a loss of {loss}")
    if classes and counts.sum(dtype=np.uint64) != examples:
        raise ProtocolError(f"evaluation: its counts do not add up to {examples} examples")
    return Evaluation(number, examples, loss, tuple(map(tuple, counts.tolist())))


def _entries(body: bytes) -> Entries:
    (position,) = _unpack(_POSITION, body, "part of the log")
    return Entries(position, decode_entries(body[_POSITION.size :]))


def _snapshot(body: bytes) -> Snapshot:
    (position,) = _unpack(_POSITION, body, "snapshot")
    theta = body[_POSITION.size :]
    if len(theta) % 4 or not np.isfinite(np.frombuffer(theta, "<f4")).all():
        raise ProtocolError("snapshot: not a list of finite float32 values")
    return Snapshot(position, theta)


def _need(body: bytes) -> Need:
    return Need(*_exactly(_POSITION, body, "need"))


def _evaluate(body: bytes) -> Evaluate:
    return Evaluate(*_exactly(struct.Struct("<II"), body, "evaluate"))


def _text(kind: type) -> Callable[[bytes], Any]:
    def decode(body: bytes) -> Any:
        if len(body) > _TEXT:
            raise ProtocolError(f"a text of {len(body)} bytes; at most {_TEXT} are sent")
        text = body.decode(errors="replace")
        # It goes into a log: one line, nothing that moves a cursor.
        return kind("".join(c if c.isprintable() else " " for c in text))

    return decode


def _empty(kind: type) -> Callable[[bytes], Any]:
    def decode(body: bytes) -> Any:
        if body:
            raise ProtocolError(f"{kind.__name__.lower()} with {len(body)} bytes of content")
        return kind()

    return decode


def _exactly(form: struct.Struct, body: bytes, what: str) -> tuple[Any, ...]:
    if len(body) != form.size:
        raise ProtocolError(f"{what} of {len(body)} bytes; it has {form.size}")
    return form.unpack(body)


def _unpack(form: struct.Struct, body: bytes, what: str) -> tuple[Any, ...]:
    if len(body) < form.size:
        raise ProtocolError(f"{len(body)} bytes are too short for a {what}")
    return form.unpack_from(body)


_Kinds: TypeAlias = dict[int, tuple[type, Callable[[bytes], Any]]]
_DOWN: _Kinds = {
    1: (Setup, _setup),
    2: (MaskFile, MaskFile),
    3: (Welcome, _empty(Welcome)),
    4: (Refused, _text(Refused)),
    5: (Entries, _entries),
    6: (Snapshot, _snapshot),
    7: (Plan, lambda body: Plan(decode_plan(body))),
    8: (Evaluate, _evaluate),
    9: (Goodbye, _text(Goodbye)),
    10: (Notice, _text(Notice)),
}
_UP: _Kinds = {
    64: (WantMask, _empty(WantMask)),
    65: (Hello, _hello),
    66: (Report, lambda body: Report(decode_report(body))),
    67: (Need, _need),
    68: (Evaluation, _evaluation),
    69: (Failed, _text(Failed)),
}
_NUMBER = {kind: number for number, (kind, _) in (_DOWN | _UP).items()}
