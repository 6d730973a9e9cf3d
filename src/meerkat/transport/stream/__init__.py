"""The `stream` transport: one gRPC stream between the server app and each client app.

Reading order: `tokens` and `certificates` authenticate client and server, `invitation` carries both
to a client, `queues` holds frames and events that wait, `listening` is the gRPC server, `server`
has the hub, which is a `Transport`, and `client` is the loop on the client's side.

A frame is one gRPC message of raw bytes, in the encoding of `meerkat.transport.frame`.
"""

from meerkat.transport.stream.client import SessionOutcome, join_session
from meerkat.transport.stream.invitation import Invitation
from meerkat.transport.stream.server import StreamHub, Traffic
from meerkat.transport.stream.tokens import Tokens

__all__ = ["Invitation", "SessionOutcome", "StreamHub", "Tokens", "Traffic", "join_session"]
