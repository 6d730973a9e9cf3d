"""The client app of Flower: what a SuperNode, or a worker of a simulation, runs."""

from __future__ import annotations

import logging
import sys
from dataclasses import asdict

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from meerkat.errors import MeerkatError, ProtocolError
from meerkat.flower.transports import FRAMES, SESSION, pack, unpack
from meerkat.node.config import NodeConfig
from meerkat.node.session import ClientSession, public_message
from meerkat.terminal.progress_bar import quiet_libraries
from meerkat.transport.client_frames import Failed
from meerkat.transport.frame import encode
from meerkat.transport.server_frames import Setup, decode_down
from meerkat.transport.stream import Invitation, join_session

__all__ = ["app"]

app = ClientApp()
_log = logging.getLogger("flwr.meerkat")
_STATE = "meerkat"


@app.train(FRAMES)
def frames(message: Message, context: Context) -> Message:
    """Answer the frames of one message. The process may be new: setup and θ are in the context."""
    quiet_libraries()
    received = unpack(message.content)
    try:
        answers = _answer(received, context)
    except MeerkatError as error:
        answers = [_failed(error)]
    return Message(pack(answers), reply_to=message)


@app.train(SESSION)
def session(message: Message, context: Context) -> Message:
    """Open a stream to the server app and stay in it to the end of the run."""
    quiet_libraries()
    try:
        client = ClientSession(NodeConfig.of(context.node_config, _is_simulated()), _log.info)
        received = unpack(message.content)
        if len(received) != 1:
            raise ProtocolError(f"an invitation with {len(received)} frames; it has one")
        setup = _setup(received[0])
        # The model is loaded before the stream is opened, so that the server waits for nobody.
        client.begin(setup)
        sent = message.content.config_records["meerkat"].get("invitation")
        invitation = Invitation.decode(sent if isinstance(sent, bytes) else b"")
        summary = join_session(invitation, client.answer, lambda: client.begin(setup), _log.info)
    except MeerkatError as error:
        return Message(pack([_failed(error)]), reply_to=message)
    figures = {key: value for key, value in asdict(summary).items() if value is not None}
    figures |= {"answered": client.answered, "seconds_working": client.working}
    content = RecordDict({"summary": ConfigRecord(figures)})
    return Message(content, reply_to=message)


def _is_simulated() -> bool:
    """Is this a worker of a simulation, which the server's own operator has started?"""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _answer(received: list[bytes], context: Context) -> list[bytes]:
    """A message has a setup, of which the last counts, or goes on where the node's last ended."""
    client = ClientSession(NodeConfig.of(context.node_config, _is_simulated()), _log.info)
    setups = [data for data in received if isinstance(decode_down(data), Setup)]
    setup = setups[-1] if setups else None
    if setup is not None:
        answers = [client.begin(_setup(setup))]
    else:
        setup, answers = _recall(client, context), []
    for data in received:
        if data not in setups:
            answers.extend(client.answer(data))
    remembered = client.remembered() if _setup(setup).remember else None
    kept = ConfigRecord({"setup": setup})
    if remembered is not None:
        kept["state"] = remembered
    context.state.config_records[_STATE] = kept
    return answers


def _recall(client: ClientSession, context: Context) -> bytes:
    """Bring a client to where the node was after its last message; the setup of then."""
    state = context.state.config_records.get(_STATE, ConfigRecord())
    setup, remembered = state.get("setup"), state.get("state")
    if not isinstance(setup, bytes):
        raise ProtocolError("a message of a run that this node was not set up for")
    client.begin(_setup(setup))
    if isinstance(remembered, bytes):
        client.recall(remembered)
    return setup


def _setup(data: bytes) -> Setup:
    frame = decode_down(data)
    if not isinstance(frame, Setup):
        raise ProtocolError("an invitation without a setup")
    return frame


def _failed(error: MeerkatError) -> bytes:
    _log.error("%s", error)
    return encode(Failed(public_message(error)))
