"""The `stream` transport: one gRPC stream between the server app and each client app.

Reading order: `tokens` and `certificates` say who may join, `invitation` how a client learns of it,
`seats` what waits where; `server` has the hub, a `Link`, and `client` the loop at the other end.

A frame is one gRPC message of raw bytes; what is in it, `meerkat.protocol` says.
"""

from meerkat.streaming.client import Summary, take_part
from meerkat.streaming.invitation import Invitation
from meerkat.streaming.server import StreamHub, Traffic
from meerkat.streaming.tokens import Tokens

__all__ = ["Invitation", "StreamHub", "Summary", "Tokens", "Traffic", "take_part"]
