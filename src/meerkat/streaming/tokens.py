"""Who may join: one secret for each seat, of which only a hash is kept."""

from __future__ import annotations

import hashlib
import hmac
import secrets

from meerkat.errors import ProtocolError

__all__ = ["Tokens"]

_BYTES = 32


class Tokens:
    """The tokens of one run.

    A token is as good as the channel that brought it: Flower vouches for the node, the token for
    the stream. So nothing here is logged, shown or written down, and a copy of this object's memory
    lets nobody in.
    """

    def __init__(self, run: str):
        self._run = _hash(run)
        self._hashes: dict[int, bytes] = {}
        self._barred: set[int] = set()
        # What an unknown seat is compared with, so that it takes as long as a known one.
        self._nobody = secrets.token_bytes(len(self._run))

    def __repr__(self) -> str:
        return "Tokens(...)"

    def issue(self, seat: int) -> str:
        """A fresh token; the one that the seat had before is void."""
        token = secrets.token_urlsafe(_BYTES)
        self._hashes[seat] = _hash(token)
        return token

    def bar(self, seat: int) -> None:
        """Refuse a seat for the rest of the run, whatever is issued to it."""
        self._barred.add(seat)

    def check(self, run: str, seat: int, token: str) -> None:
        """Let pass who has the last token of a seat.

        Raises:
            ProtocolError: It has not; the line says what is wrong, without the token.
        """
        known = seat in self._hashes
        same_run = hmac.compare_digest(_hash(run), self._run)
        same_token = hmac.compare_digest(_hash(token), self._hashes.get(seat, self._nobody))
        if not same_run:
            raise ProtocolError("its invitation is for another run")
        if not known:
            raise ProtocolError("nobody with that seat was invited")
        if not same_token:
            raise ProtocolError("its token is not that of the last invitation to this seat")
        if seat in self._barred:
            raise ProtocolError("this seat is barred for the rest of the run")


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()
