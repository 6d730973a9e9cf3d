"""What the network costs: seconds and bytes of a round with clients that do nothing.

    python experiments/wire.py rounds                 # seconds a round for 2, 8 and 32 clients
    python experiments/wire.py stream                 # bytes at the socket, over the stream
    python experiments/wire.py messages               # bytes and seconds, over Flower messages
    python experiments/wire.py alternatives           # what else could be sent, and its size

The server is the real one, with n masked parameters, journal and TLS; the clients are bare ends of
a stream, all in one other process, that answer each plan with g = 0 at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import grpc
import numpy as np

from meerkat.config import Recipe, parse_recipe
from meerkat.federation.messages import DIGEST_BYTES, ClientReport
from meerkat.federation.rounds import RoundRecord
from meerkat.journal import Journal
from meerkat.journal.records import RoundMetrics
from meerkat.progress import Progress
from meerkat.runs.events import RunObserver
from meerkat.runs.remote_run import host
from meerkat.spaces.mask_file import Mask, save_mask
from meerkat.transport.client_frames import Hello, Report
from meerkat.transport.frame import encode
from meerkat.transport.handshake import Proof
from meerkat.transport.server_frames import Goodbye, Plan, decode_down
from meerkat.transport.stream import Invitation, StreamHub
from meerkat.transport.stream.certificates import NAME
from meerkat.transport.stream.invitation import METHOD, SERVICE, metadata
from meerkat.zo import noise
from meerkat.zo.state import ModelState

RUN = "wire"
GEMMA = 100_270
"""Masked parameters of Gemma 3 270M at a density of 1e-3."""


def mask_of(n: int) -> Mask:
    """A mask of n coordinates of no model."""
    indices = (np.arange(n),)
    zeros = np.zeros(n, np.float32)
    return Mask(("w",), ((n + 1,),), indices, n + 1, "ab" * 32, "random", initial=zeros)


def recipe_of(clients: int, rounds: int) -> Recipe:
    """A recipe whose model and data nobody reads."""
    return parse_recipe(
        {
            "model": {"name": "none"},
            "task": {"name": "sst2"},
            "federation": {"clients": clients, "rounds": rounds},
            "optimizer": {"learning_rate": 1e-5},
        }
    )


@contextmanager
def clients(invitations: list[Invitation], n: int) -> Iterator[None]:
    """Clients that do nothing, together in one process."""
    order = json.dumps([n, [invitation.encode().decode() for invitation in invitations]])
    command = [sys.executable, __file__, "clients"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
    assert process.stdin is not None
    process.stdin.write(order)
    process.stdin.close()
    try:
        yield
    finally:
        process.wait(timeout=60)


def be_clients() -> None:
    """The clients' process."""
    n, texts = json.loads(sys.stdin.read())
    mask = mask_of(n)
    assert mask.initial is not None
    start = bytes.fromhex(ModelState(mask.initial).digest)[:DIGEST_BYTES]
    proof = Proof(mask.model, mask.digest, noise.fingerprint())

    async def be_client(client: int, text: str) -> None:
        invitation = Invitation.decode(text.encode())
        secret = grpc.ssl_channel_credentials(invitation.certificate)
        options = [("grpc.ssl_target_name_override", NAME), ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.secure_channel(invitation.address, secret, options=options) as channel:
            call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(metadata=metadata(invitation))
            await call.write(encode(Hello(client, 1, 0, 0, proof)))
            while not isinstance(frame := decode_down(await call.read()), Goodbye):
                if isinstance(frame, Plan):
                    plan = frame.plan
                    scalars = (0.0,) * plan.steps
                    report = ClientReport(plan.round, client, 1, plan.steps, 1, start, scalars)
                    await call.write(encode(Report(report)))

    async def be_all() -> None:
        await asyncio.gather(*(be_client(*pair) for pair in enumerate(texts)))

    asyncio.run(be_all())


def measure(count: int, n: int, rounds: int, meter: Meter | None = None) -> list[float]:
    """Seconds from one finished round to the next, journal included."""
    ended: list[float] = []

    class Watch(RunObserver):
        def round_closed(self, record: RoundRecord, metrics: RoundMetrics) -> None:
            ended.append(time.perf_counter())

    hub = StreamHub(RUN, "127.0.0.1:0", 64 * 1024)
    address = f"127.0.0.1:{meter.in_front_of(hub.port) if meter else hub.port}"
    peers = [
        Invitation(address, hub.certificate, False, RUN, peer, hub.invite(peer))
        for peer in range(count)
    ]
    with tempfile.TemporaryDirectory() as scratch, clients(peers, n):
        out = Path(scratch) / "run"
        host(
            recipe_of(count, rounds),
            out,
            mask_of(n),
            lambda setup: hub,
            Watch(),
            Progress(),
            lambda line: None,
        )
    return [after - before for before, after in pairwise(ended)]


class Meter:
    """A TCP proxy that counts what passes: the bytes that the two sockets carry."""

    def __init__(self) -> None:
        self.up = self.down = 0

    def in_front_of(self, port: int, host: str = "127.0.0.1") -> int:
        """Forward to this port; returns the port that forwards."""
        listener = socket.create_server((host, 0))
        threading.Thread(target=self._accept, args=(listener, host, port), daemon=True).start()
        return int(listener.getsockname()[1])

    def _accept(self, listener: socket.socket, host: str, port: int) -> None:
        while True:
            near, _ = listener.accept()
            far = socket.create_connection((host, port))
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._forward, args=(near, far), daemon=True).start()

    def _forward(self, near: socket.socket, far: socket.socket) -> None:
        ends = selectors.DefaultSelector()
        ends.register(near, selectors.EVENT_READ, far)
        ends.register(far, selectors.EVENT_READ, near)
        while True:
            for key, _ in ends.select():
                try:
                    data = key.fileobj.recv(65536)
                except ConnectionResetError:
                    data = b""
                if not data:
                    near.close()
                    far.close()
                    return
                if key.fileobj is near:
                    self.up += len(data)
                else:
                    self.down += len(data)
                key.data.sendall(data)


def rounds_table() -> None:
    for n in (1, GEMMA):
        for count in (2, 8, 32):
            found = sorted(1000 * s for s in measure(count, n, 300)[50:])
            middle, late = statistics.median(found), found[int(0.95 * len(found))]
            print(f"n = {n:7,}  {count:2} clients  {middle:6.2f} ms a round, 95 %: {late:6.2f} ms")


def stream_bytes() -> None:
    for count in (2, 8):
        seen = []
        for rounds in (10, 210):
            meter = Meter()
            measure(count, 1, rounds, meter)
            seen.append((meter.up, meter.down))
        up, down = ((b - a) / 200 / count for a, b in zip(*seen, strict=True))
        print(f"{count} clients: {up:.1f} bytes up, {down:.1f} down a client and round")


APP = """
[project]
name = "empty"
version = "1.0.0"
[tool.flwr.app]
publisher = "meerkat"
[tool.flwr.app.components]
serverapp = "meerkat.flower.server_app:app"
clientapp = "empty:app"
[tool.flwr.app.config]
recipe = ""
out = ""
mask = ""
"federation.rounds" = ""
"network.transport" = ""
"""
EMPTY = """
from flwr.app import Message
from flwr.clientapp import ClientApp
from meerkat.flower.transports import pack, unpack
from meerkat.federation.messages import ClientReport
from meerkat.transport.client_frames import Hello, Report
from meerkat.transport.server_frames import Plan, Setup
from meerkat.transport.server_frames import decode_down
from meerkat.transport.frame import encode

app = ClientApp()

@app.train("frames")
def frames(message, context):
    answers, client = [], context.node_config["partition-id"]
    for data in unpack(message.content):
        frame = decode_down(data)
        if isinstance(frame, Setup):
            answers.append(encode(Hello(client, 1, 0, 0, frame.proof)))
        elif isinstance(frame, Plan):
            start = bytes.fromhex(START)
            report = ClientReport(frame.plan.round, client, 1, 1, 1, start, (0.0,))
            answers.append(encode(Report(report)))
    return Message(pack(answers), reply_to=message)
"""


def over_messages() -> None:
    """Two SuperNodes whose client apps do nothing, in a deployment with TLS and node keys."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/support"))
    from cluster import Cluster

    mask = mask_of(1)
    assert mask.initial is not None
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in ("app", "cluster"):
            (folder / name).mkdir()
        (folder / "app/pyproject.toml").write_text(APP)
        start = ModelState(mask.initial).digest[: 2 * DIGEST_BYTES]
        (folder / "app/empty.py").write_text(f'START = "{start}"\n{EMPTY}')
        recipe = recipe_of(2, 1)
        (folder / "recipe.json").write_text(recipe.to_json())
        save_mask(mask, folder / "mask.safetensors")
        meter = Meter()
        with Cluster(folder / "cluster", nodes=2) as cluster:
            cluster.port = meter.in_front_of(cluster.port)
            for node in range(2):
                cluster.start_node(node, {"partition-id": node})
            seen, seconds = [], []
            for rounds in (2, 12):
                before = meter.up, meter.down
                out = folder / f"run-{rounds}"
                config = {
                    "recipe": str(folder / "recipe.json"),
                    "out": str(out),
                    "mask": str(folder / "mask.safetensors"),
                    "federation.rounds": rounds,
                    "network.transport": "messages",
                }
                run = cluster.run(folder / "app", config)
                status = cluster.wait(run, timeout=600)
                assert status == "finished:completed", cluster.log(run)
                seen.append((meter.up - before[0], meter.down - before[1]))
                journal = Journal.open(out / "journal.sqlite")
                seconds = [metrics.seconds for _, metrics in journal.records()]
                journal.close()
            up, down = ((b - a) / 10 / 2 for a, b in zip(*seen, strict=True))
            before, idle = (meter.up, meter.down), 30
            time.sleep(idle)
            still = (meter.up - before[0]) / idle / 2, (meter.down - before[1]) / idle / 2
    print(f"{up:.0f} bytes up, {down:.0f} down a client and round")
    print(f"of these, an idle SuperNode: {still[0]:.0f} up, {still[1]:.0f} down a second")
    print(f"{statistics.median(seconds):.2f} s a round (median of {len(seconds)})")


def alternatives() -> None:
    """What other things would weigh that could be sent each way, for Gemma 3 270M."""
    from meerkat.config import MaskSection, ModelSection, Runtime
    from meerkat.models.loading import load_model
    from meerkat.spaces.mask_criteria import eligible_parameters

    model = load_model(ModelSection(name="demo:gemma-3-270m"), Runtime(device="cpu")).model
    matrices = eligible_parameters(model, MaskSection()).values()
    lora = sum(8 * sum(matrix.shape) for matrix in matrices)
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(f"theta, float32             {4 * GEMMA:13,} bytes")
    print(f"LoRA factors, r = 8, bf16  {2 * lora:13,} bytes")
    print(f"all weights, bf16          {2 * weights:13,} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["rounds", "stream", "messages", "alternatives", "clients"])
    what = parser.parse_args().what
    commands = {"rounds": rounds_table, "stream": stream_bytes, "messages": over_messages}
    commands |= {"alternatives": alternatives, "clients": be_clients}
    commands[what]()
