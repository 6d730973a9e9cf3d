"""A client's side of the conversation, whatever the transport: frames in, frames out.

`node` is what a machine's operator says, `crew` what all clients in a process share, `conversation`
what is answered to which frame.
"""

from meerkat.participant.conversation import Participant, told
from meerkat.participant.node import Node

__all__ = ["Node", "Participant", "told"]
