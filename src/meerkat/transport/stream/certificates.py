"""The server's certificate: made when the server starts, and pinned by its clients.

It is self-signed and in no file. A client trusts it because it arrives in an invitation, over
Flower's authenticated channel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

__all__ = ["NAME", "Identity", "fresh_identity"]

NAME = "meerkat"
"""The host name in every certificate; clients expect it whatever address they connect to."""

_SKEW = timedelta(days=2)
"""A client's clock may be this much behind."""
_LIFE = timedelta(days=3650)
"""Longer than any run: no certificate is used by two servers, so it need not expire."""


@dataclass(frozen=True)
class Identity:
    """A self-signed certificate and its key, both as PEM."""

    certificate: bytes
    key: bytes = field(repr=False)


def fresh_identity() -> Identity:
    """A new key on the curve P-256, and a certificate for it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + _LIFE)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return Identity(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )
