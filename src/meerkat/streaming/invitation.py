"""What a client must know to join, and how it says so: the invitation, and its metadata."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Self

from cryptography import x509

from meerkat.errors import ProtocolError

__all__ = [
    "JOINED",
    "METHOD",
    "SERVICE",
    "Invitation",
    "is_loopback",
    "metadata",
    "read_metadata",
    "split_address",
]

SERVICE, METHOD = "meerkat.Stream", "Join"
JOINED = ("meerkat-joined", "1")
"""The server's first metadata: the token was good."""

_RUN, _SEAT, _TOKEN = "meerkat-run-bin", "meerkat-seat", "meerkat-token"
_LARGEST = 16 * 1024
_LONGEST_RUN = 500
_SEATS = 2**64
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9.])?")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,19}")
_SECRET = re.compile(r"[A-Za-z0-9_-]{22,128}")


@dataclass(frozen=True)
class Invitation:
    """One seat in one run. Whoever holds it can sit there, so it travels on a trusted way only.

    Raises:
        ProtocolError: A field is not what it should be.
    """

    address: str
    """host:port of the server."""
    certificate: bytes
    """The server's, as PEM: the only one that the client accepts. Empty in plain text."""
    insecure: bool
    """Plain text, for measurements on loopback."""
    run: str
    seat: int
    token: str = field(repr=False)

    def __post_init__(self) -> None:
        kinds = {"certificate": bytes, "insecure": bool, "seat": int}
        for name, value in vars(self).items():
            if type(value) is not kinds.get(name, str):
                raise ProtocolError(f"invitation: {name} is of another type")
        try:
            _, port = split_address(self.address)
        except ValueError as error:
            raise ProtocolError(f"invitation: {error}") from None
        if not port or not 0 <= self.seat < _SEATS:
            raise ProtocolError(f"invitation: no port, or {self.seat} is no seat")
        if not _SECRET.fullmatch(self.token):
            raise ProtocolError("invitation: its token is none")
        _check_run(self.run)
        self._check_certificate()

    def encode(self) -> bytes:
        """Bytes of the invitation, JSON."""
        return json.dumps({**asdict(self), "certificate": self.certificate.decode()}).encode()

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """The invitation in these bytes.

        Raises:
            ProtocolError: They are none.
        """
        if len(data) > _LARGEST:
            raise ProtocolError(f"invitation of {len(data)} bytes; at most {_LARGEST} are read")
        try:
            content = json.loads(data)
            if not isinstance(content, dict) or set(content) != {f.name for f in fields(cls)}:
                raise ProtocolError("invitation: its fields are not those of this version")
            return cls(**{**content, "certificate": content["certificate"].encode()})
        except (ValueError, AttributeError, RecursionError) as error:
            # The text of these would hold part of what was read, perhaps the token.
            raise ProtocolError(f"invitation cannot be read: {type(error).__name__}") from None

    def _check_certificate(self) -> None:
        if self.insecure:
            if self.certificate:
                raise ProtocolError("invitation: plain text, yet with a certificate")
            return
        try:
            read = x509.load_pem_x509_certificates(self.certificate)
        except (ValueError, x509.InvalidVersion):
            read = []
        if len(read) != 1:
            raise ProtocolError("invitation: not one certificate")


def metadata(session: Invitation) -> tuple[tuple[str, str | bytes], ...]:
    """What a stream presents before its first frame."""
    return ((_RUN, session.run.encode()), (_SEAT, str(session.seat)), (_TOKEN, session.token))


def read_metadata(given: Iterable[tuple[str, str | bytes]]) -> tuple[str, int, str]:
    """Run, seat and token that a stream presents.

    Raises:
        ProtocolError: One is missing, comes twice, or is not of its form.
    """
    found: dict[str, str] = {}
    for key, value in given:
        if key in (_RUN, _SEAT, _TOKEN):
            if key in found:
                raise ProtocolError(f"it presents {key} twice")
            found[key] = value if isinstance(value, str) else value.decode(errors="replace")
    missing = sorted({_RUN, _SEAT, _TOKEN} - set(found))
    if missing:
        raise ProtocolError(f"it presents no {missing[0]}")
    if not _NUMBER.fullmatch(found[_SEAT]):
        raise ProtocolError(f"its {_SEAT} is no number")
    return found[_RUN], int(found[_SEAT]), found[_TOKEN]


def split_address(address: str) -> tuple[str, int]:
    """Host, without brackets, and port.

    Raises:
        ValueError: It is not host:port.
    """
    host, colon, port = address.rpartition(":")
    wrong = f"{address[:80]!r} is not host:port"
    if not colon or not _NUMBER.fullmatch(port) or int(port) > 65535:
        raise ValueError(wrong)
    if host.startswith("[") and host.endswith("]"):
        try:
            return str(ipaddress.IPv6Address(host[1:-1])), int(port)
        except ValueError:
            raise ValueError(wrong) from None
    if not _HOST.fullmatch(host):
        raise ValueError(wrong)
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Does what goes to this host stay on this machine?"""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_run(run: str) -> None:
    try:
        length = len(run.encode())
    except UnicodeEncodeError:
        length = 0
    if not 0 < length <= _LONGEST_RUN:
        raise ProtocolError(f"invitation: the name of its run has not 1 to {_LONGEST_RUN} bytes")
