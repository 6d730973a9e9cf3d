"""Authentication of clients: one secret token for each peer, of which only a hash is kept."""

from __future__ import annotations

import hashlib
import hmac
import secrets

from meerkat.errors import ProtocolError

__all__ = ["Tokens"]

_BYTES = 32


class Tokens:
    """The tokens of one run.

    A token authenticates a stream as one of the node that Flower sent the token to. No token is
    logged, shown or written, and none can be recovered from the memory of this object.
    """

    def __init__(self, run: str):
        self._run = _hash(run)
        self._hashes: dict[int, bytes] = {}
        self._barred: set[int] = set()
        # An unknown peer's token is compared with this, in the same time as a known peer's.
        self._nobody = secrets.token_bytes(len(self._run))

    def __repr__(self) -> str:
        return "Tokens(...)"

    def issue(self, peer: int) -> str:
        """A new token for a peer; an earlier one is void."""
        token = secrets.token_urlsafe(_BYTES)
        self._hashes[peer] = _hash(token)
        return token

    def bar(self, peer: int) -> None:
        """Refuse a peer for the rest of the run, with any token."""
        self._barred.add(peer)

    def check(self, run: str, peer: int, token: str) -> None:
        """Check that this is the last token issued to a peer.

        Raises:
            ProtocolError: It is not, or the peer is barred; the line has the cause, not the token.
        """
        known = peer in self._hashes
        same_run = hmac.compare_digest(_hash(run), self._run)
        same_token = hmac.compare_digest(_hash(token), self._hashes.get(peer, self._nobody))
        if not same_run:
            raise ProtocolError("its invitation is for another run")
        if not known:
            raise ProtocolError("that peer was not invited")
        if not same_token:
            raise ProtocolError("its token is not that of the last invitation to this peer")
        if peer in self._barred:
            raise ProtocolError("this peer is barred for the rest of the run")


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()
