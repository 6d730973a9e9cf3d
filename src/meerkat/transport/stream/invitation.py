"""Invitations: what a client needs to open a stream, and the metadata that it opens one with."""

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
"""Initial metadata of the server, once it has accepted the token."""

_RUN, _PEER, _TOKEN = "meerkat-run-bin", "meerkat-peer", "meerkat-token"
_LARGEST = 16 * 1024
_LONGEST_RUN = 500
_PEERS = 2**64
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9.])?")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,19}")
_SECRET = re.compile(r"[A-Za-z0-9_-]{22,128}")


@dataclass(frozen=True)
class Invitation:
    """Lets its holder join a run as one peer; it is secret, and sent over trusted channels only.

    Raises:
        ProtocolError: A field is not valid.
    """

    address: str
    """host:port of the server."""
    certificate: bytes
    """The server's, as PEM, the only one that the client accepts; empty in plain text."""
    insecure: bool
    """Plain text, for measurements on loopback."""
    run: str
    peer: int
    token: str = field(repr=False)

    def __post_init__(self) -> None:
        kinds = {"certificate": bytes, "insecure": bool, "peer": int}
        for name, value in vars(self).items():
            if type(value) is not kinds.get(name, str):
                raise ProtocolError(f"invitation: {name} is of another type")
        try:
            _, port = split_address(self.address)
        except ValueError as error:
            raise ProtocolError(f"invitation: {error}") from None
        if not port or not 0 <= self.peer < _PEERS:
            raise ProtocolError(f"invitation: no port, or {self.peer} is no peer")
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
            ProtocolError: They are not a valid invitation.
        """
        if len(data) > _LARGEST:
            raise ProtocolError(f"invitation of {len(data)} bytes; at most {_LARGEST} are read")
        try:
            content = json.loads(data)
            if not isinstance(content, dict) or set(content) != {f.name for f in fields(cls)}:
                raise ProtocolError("invitation: its fields are not those of this version")
            return cls(**{**content, "certificate": content["certificate"].encode()})
        except (ValueError, AttributeError, RecursionError) as error:
            # The text of these errors may quote the input, and so the token.
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
    """Metadata that a client opens a stream with: run, peer and token."""
    return ((_RUN, session.run.encode()), (_PEER, str(session.peer)), (_TOKEN, session.token))


def read_metadata(given: Iterable[tuple[str, str | bytes]]) -> tuple[str, int, str]:
    """Run, peer and token in the metadata of a stream.

    Raises:
        ProtocolError: One is missing or there twice, or the peer is not a number.
    """
    found: dict[str, str] = {}
    for key, value in given:
        if key in (_RUN, _PEER, _TOKEN):
            if key in found:
                raise ProtocolError(f"it presents {key} twice")
            found[key] = value if isinstance(value, str) else value.decode(errors="replace")
    missing = sorted({_RUN, _PEER, _TOKEN} - set(found))
    if missing:
        raise ProtocolError(f"it presents no {missing[0]}")
    if not _NUMBER.fullmatch(found[_PEER]):
        raise ProtocolError(f"its {_PEER} is no number")
    return found[_RUN], int(found[_PEER]), found[_TOKEN]


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
    """Is this host the machine itself?"""
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
