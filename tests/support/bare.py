"""A deployment over streams without Flower: a server and clients as processes, some of them bad.

    python bare.py server RECIPE MASK OUT FOLDER --port P
    python bare.py client FOLDER PEER LOG [--recorded FILE --mask MASK] [--fault NAME ...]
    python bare.py nursery light|model

FOLDER stands for what Flower does: the server puts an invitation for each peer there, and a client
that took one holds a lock for as long as its session lasts. When the lock is free, the client app
is gone, and the peer is invited again. A nursery has everything imported and forks such processes
at once, one for each line of JSON that it reads.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import secrets
import select
import signal
import struct
import sys
import threading
import time
import traceback
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from meerkat.algorithms import make_algorithm
from meerkat.config import load_recipe, parse_recipe
from meerkat.errors import MeerkatError
from meerkat.federation.messages import DIGEST_BYTES, ClientReport, RoundPlan
from meerkat.progress import Progress
from meerkat.spaces.mask_file import load_mask
from meerkat.transport.base import Event
from meerkat.transport.client_frames import (
    Evaluation,
    Failed,
    Hello,
    Need,
    Report,
    WantSpace,
    decode_up,
)
from meerkat.transport.frame import VERSION, encode
from meerkat.transport.server_frames import (
    EvaluateRequest,
    LogPart,
    Plan,
    Refused,
    Setup,
    Snapshot,
    Welcome,
    decode_down,
)
from meerkat.transport.stream import Invitation, StreamHub, join_session
from meerkat.zo.log import Update

HOST = "127.0.0.1"
LOOK_EVERY = 0.05
"""Seconds between looks at the folder."""
Say = Callable[[str], None]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = parser.add_subparsers(required=True)
    server = kinds.add_parser("server")
    server.add_argument("recipe", type=Path)
    server.add_argument("mask", type=Path)
    server.add_argument("out", type=Path)
    server.add_argument("folder", type=Path)
    server.add_argument("--port", type=int, required=True)
    server.add_argument("--report", action="store_true", help="Draw the report at the end.")
    server.set_defaults(run=serve)
    client = kinds.add_parser("client")
    client.add_argument("folder", type=Path)
    client.add_argument("peer", type=int)
    client.add_argument("log", type=Path)
    client.add_argument("--count", type=int, default=1, help="So many, from this peer on.")
    client.add_argument("--recorded", type=Path, help="Scalars to answer with, without a model.")
    client.add_argument("--mask", type=Path)
    client.add_argument("--model")
    client.add_argument("--strict", action="store_true", help="Settings of a node as by default.")
    client.add_argument("--through", type=int, help="Port of a proxy.")
    client.add_argument("--again", action="store_true", help="Take the next invitation, too.")
    client.add_argument("--retry", type=float, default=60.0)
    client.add_argument("--pace", type=float, default=0.0, help="Seconds before each answer.")
    client.add_argument("--gate", type=Path, help="Has the last round that may be answered.")
    client.add_argument("--sleep", type=float, default=0.0, help="Seconds before one answer.")
    client.add_argument("--fault", choices=sorted({*REPORTS, "version", "wrong", "old"}))
    client.add_argument("--round", type=int, default=1, help="Of the sleep and the fault.")
    client.add_argument("--always", action="store_true", help="The fault in each round from then.")
    client.set_defaults(run=attend)
    nursery = kinds.add_parser("nursery")
    nursery.add_argument("kind", choices=["light", "model"])
    nursery.set_defaults(run=nurse)
    chosen = parser.parse_args(arguments)
    chosen.run(chosen)


# The server


def serve(options: argparse.Namespace) -> None:
    """Host a run to its end; OUT/outcome.json says how it ended."""
    from meerkat.reporting.observer import ReportWriter
    from meerkat.runs.events import Observers
    from meerkat.runs.remote_run import host, load_server_mask

    observer = Observers([ReportWriter()] if options.report else [])
    recipe, say = load_recipe(options.recipe), _Log(options.out / "server.log")

    def connect(setup: Setup) -> Door:
        scalars = recipe.federation.local_steps * recipe.noise.perturbations
        run, listen = secrets.token_hex(16), f"{HOST}:{options.port}"
        hub = StreamHub(run, listen, 64 * 1024 + 4 * scalars, say=say)
        return Door(hub, run, setup, options.folder, recipe.federation.clients, say)

    outcome: dict[str, Any] = {}
    try:
        mask = load_server_mask(options.mask)
        outcome["summary"] = host(recipe, options.out, mask, connect, observer, Progress(), say)
    except MeerkatError as error:
        outcome["error"] = str(error)
        say(f"the run ends: {error}")
    outcome["modules"] = sorted({name.partition(".")[0] for name in sys.modules})
    write(options.out / "outcome.json", json.dumps(outcome).encode())


class Door:
    """Streams, and invitations to them; a peer whose client is gone is invited again."""

    def __init__(self, hub: StreamHub, run: str, setup: Setup, folder: Path, peers: int, say: Say):
        self._hub, self._run, self._setup, self._say = hub, run, setup, say
        self._folder = folder
        self._number = max((number for number, _, _ in invitations(folder)), default=0)
        self._sessions: dict[int, Path] = {}
        self._barred: set[int] = set()
        self._events: list[Event] = []
        self._closing = threading.Event()
        for peer in range(peers):
            self._invite(peer)
        self._inviting = threading.Thread(target=self._invite_all, daemon=True)
        self._inviting.start()

    def send(self, peer: int, frame: bytes) -> None:
        self._hub.send(peer, frame)

    def receive(self, timeout: float) -> Event | None:
        return self._events.pop(0) if self._events else self._hub.receive(timeout)

    def drop(self, peer: int, reason: str, bar: bool = False) -> None:
        if bar:
            self._barred.add(peer)
        self._hub.drop(peer, reason, bar)

    def close(self, reason: str) -> None:
        self._hub.close(reason)
        self._closing.set()
        self._inviting.join()

    def _invite_all(self) -> None:
        while not self._closing.wait(LOOK_EVERY):
            for peer, session in list(self._sessions.items()):
                last = ended(session)
                if last is not None and peer not in self._barred:
                    self._events += [Event(peer, b64decode(line)) for line in last.split()]
                    self._invite(peer)

    def _invite(self, peer: int) -> None:
        self._number += 1
        hub, address = self._hub, f"{HOST}:{self._hub.port}"
        invitation = Invitation(address, hub.certificate, False, self._run, peer, hub.invite(peer))
        content = {
            "invitation": b64encode(invitation.encode()).decode(),
            "setup": b64encode(encode(self._setup)).decode(),
        }
        path = self._folder / f"{self._number}-{peer}.json"
        write(path, json.dumps(content).encode())
        self._sessions[peer] = path.with_suffix(".session")
        self._say(f"peer {peer} is invited")


def invitations(folder: Path) -> list[tuple[int, int, Path]]:
    """Number, peer and file of each, first to last."""
    found = [(*map(int, path.stem.split("-")), path) for path in folder.glob("*-*.json")]
    return sorted(found)


def ended(session: Path) -> bytes | None:
    """What a client left when its session ended; None while it lasts, or before it began."""
    try:
        with session.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            content = file.read()
    except OSError:
        return None
    return content[1:] if content else None


@contextmanager
def held(session: Path) -> Iterator[Any]:
    """A session: taken with its first byte, and over when this process or the block ends."""
    with session.open("wb", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(b"+")
        yield file


# The clients


def attend(options: argparse.Namespace) -> None:
    say = _Log(options.log)
    logging.basicConfig(handlers=[_Handler(say)], force=True)
    threads = [
        threading.Thread(target=_sessions, args=(options, peer, say))
        for peer in range(options.peer, options.peer + options.count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _sessions(options: argparse.Namespace, peer: int, say: Say) -> None:
    number = 0
    while True:
        number, path = _await_invitation(options.folder, peer, number)
        content = json.loads(path.read_bytes())
        invitation = Invitation.decode(b64decode(content["invitation"]))
        if options.fault == "wrong":
            invitation = replace(invitation, token=secrets.token_urlsafe(32))
        elif options.fault == "old":
            (_, _, older), *_ = [row for row in invitations(options.folder) if row[1] == peer]
            before = Invitation.decode(b64decode(json.loads(older.read_bytes())["invitation"]))
            invitation = replace(invitation, token=before.token)
        if options.through:
            invitation = replace(invitation, address=f"{HOST}:{options.through}")
        with held(path.with_suffix(".session")) as session:
            try:
                complete = _session(options, peer, invitation, b64decode(content["setup"]), say)
            except MeerkatError as error:
                say(f"client {peer}: {error}")
                session.write(b64encode(encode(Failed(_told(options, error)))))
                complete = False
        if complete or not options.again:
            return


def _told(options: argparse.Namespace, error: MeerkatError) -> str:
    """What a client app sends of an error."""
    if options.recorded is not None:
        return str(error)
    from meerkat.node.session import public_message

    return public_message(error)


def _await_invitation(folder: Path, peer: int, after: int) -> tuple[int, Path]:
    while True:
        found = [(number, path) for number, owner, path in invitations(folder) if owner == peer]
        if found and found[-1][0] > after and not found[-1][1].with_suffix(".session").exists():
            return found[-1]
        time.sleep(LOOK_EVERY)


def _session(
    options: argparse.Namespace, peer: int, invitation: Invitation, sent: bytes, say: Say
) -> bool:
    setup = decode_down(sent)
    assert isinstance(setup, Setup)
    Fault.setup = setup
    if options.recorded is not None:
        script = Scripted(peer, setup, options.mask, json.loads(options.recorded.read_text()), say)
        hello, inner = script.hello, script.answer
    else:
        from meerkat.node.config import NodeConfig
        from meerkat.node.session import ClientSession

        node = NodeConfig(peer, model=options.model, mask=options.mask)
        if options.strict:
            node = NodeConfig.of({"partition-id": peer})
        participant = ClientSession(node, say)
        participant.begin(setup)
        hello, inner = lambda: participant.begin(setup), participant.answer
    fault = Fault(options, peer, inner, say)
    summary = join_session(
        invitation,
        fault.answer,
        lambda: fault.hello(hello()),
        say,
        retry_seconds=options.retry,
    )
    say(f"client {peer}: the session is over: {summary.why}")
    return summary.complete


class Scripted:
    """A client without a model: it has the run's state, and its scalars are those of another run.

    Args:
        recorded: "examples" by client, and "scalars" by round and client; what is not there comes
            from a formula.
    """

    def __init__(self, client: int, setup: Setup, mask: Path, recorded: dict[str, Any], say: Say):
        loaded = load_mask(mask)
        assert loaded.initial is not None
        self._client, self._setup, self._recorded, self._say = client, setup, recorded, say
        self._algorithm = make_algorithm(parse_recipe(json.loads(setup.recipe)), loaded.size)
        self._state, self._position = self._algorithm.init(loaded.initial), 0

    def hello(self) -> bytes:
        examples = self._recorded["examples"][self._client]
        return encode(Hello(self._client, examples, 0, self._position, self._setup.proof))

    def answer(self, data: bytes) -> Iterator[bytes]:
        match decode_down(data):
            case Snapshot(position, content):
                self._state, self._position = self._state.from_bytes(content), position
            case LogPart(position, updates):
                self._catch_up(position, updates)
            case Plan(plan) if plan.log_start > self._position:
                yield encode(Need(self._position))
            case Plan(plan):
                self._catch_up(plan.log_start, plan.updates)
                yield encode(Report(self._report(plan)))
            case EvaluateRequest(number, _):
                yield encode(Evaluation(number, 1, {"loss": (0.5,)}))
            case Welcome():
                self._say(f"client {self._client} takes part")
            case Refused(reason):
                self._say(f"client {self._client} is refused: {reason}")

    def _report(self, plan: RoundPlan) -> ClientReport:
        scalars = self._recorded["scalars"].get(str(plan.round), {}).get(str(self._client))
        if scalars is None:
            scalars = formula(self._client, plan.round, plan.steps)
        return ClientReport(
            plan.round,
            self._client,
            self._recorded["examples"][self._client],
            plan.steps,
            1,
            bytes.fromhex(self._state.digest)[:DIGEST_BYTES],
            tuple(scalars),
        )

    def _catch_up(self, position: int, updates: tuple[Update, ...]) -> None:
        fresh = updates[self._position - position :]
        self._state = self._algorithm.apply(self._state, fresh)
        self._position += len(fresh)


def formula(client: int, round: int, steps: int) -> list[float]:
    """Scalars of a client that has none on record; exact in float32."""
    return [((7 * client + 3 * round + step) % 13 - 6) / 8 for step in range(steps)]


class Fault:
    """What a client does wrong, and how long it takes."""

    setup: Setup | None = None
    """Of the session."""

    def __init__(
        self,
        options: argparse.Namespace,
        client: int,
        answer: Callable[[bytes], Iterable[bytes]],
        say: Say,
    ):
        self._options, self._client, self._answer, self._say = options, client, answer, say
        self._done = False

    def hello(self, frame: bytes) -> bytes:
        if self._options.fault == "version":
            return frame[:1] + bytes([VERSION + 1]) + frame[2:]
        return frame

    def answer(self, data: bytes) -> Iterator[bytes]:
        frame, options = decode_down(data), self._options
        replies = list(self._answer(data))
        if not isinstance(frame, Plan):
            yield from replies
            return
        number, its = frame.plan.round, frame.plan.round == options.round
        self._say(f"client {self._client} is asked for round {number}")
        time.sleep(options.pace + (options.sleep if its else 0.0))
        while options.gate is not None and number > read_gate(options.gate):
            time.sleep(LOOK_EVERY)
        due = number >= options.round if options.always else its and not self._done
        for reply in replies:
            if due and options.fault in REPORTS and isinstance(decode_up(reply), Report):
                self._done = True
                self._say(f"client {self._client} does wrong: {options.fault}")
                yield from REPORTS[options.fault](reply)
            else:
                yield reply
        self._say(f"client {self._client} answered round {number}")


def _changed(**fields: Callable[[ClientReport], Any]) -> Callable[[bytes], list[bytes]]:
    def change(frame: bytes) -> list[bytes]:
        decoded = decode_up(frame)
        assert isinstance(decoded, Report)
        report = decoded.report
        return [encode(Report(replace(report, **{k: f(report) for k, f in fields.items()})))]

    return change


def _last_scalar(value: float) -> Callable[[bytes], list[bytes]]:
    return lambda frame: [frame[:-4] + struct.pack("<f", value)]


def _hello(frame: bytes, **fields: Callable[[Hello], Any]) -> bytes:
    """The hello of the client whose report this is, with fields changed."""
    report = decode_up(frame)
    assert isinstance(report, Report)
    assert Fault.setup is not None
    about = report.report
    hello = Hello(about.client, about.examples, 0, 0, Fault.setup.proof)
    return encode(replace(hello, **{name: change(hello) for name, change in fields.items()}))


REPORTS: dict[str, Callable[[bytes], list[bytes]]] = {
    "nan": _last_scalar(float("nan")),
    "inf": _last_scalar(float("inf")),
    "large": _last_scalar(1e30),
    "fewer steps": _changed(steps=lambda r: r.steps - 1, scalars=lambda r: r.scalars[:-1]),
    "more steps": _changed(steps=lambda r: r.steps + 1, scalars=lambda r: (*r.scalars, 0.5)),
    "too short": lambda frame: [frame[:-4]],
    "too long": lambda frame: [frame + bytes(4)],
    "another round": _changed(round=lambda r: r.round + 1),
    "another client": _changed(client=lambda r: r.client + 1),
    "another version": lambda frame: [frame[:1] + bytes([VERSION + 1]) + frame[2:]],
    "no examples": _changed(examples=lambda r: 0),
    "more examples": _changed(examples=lambda r: 1_000_000),
    "twice": lambda frame: [frame, frame],
    "digest": _changed(state_digest=lambda r: bytes([r.state_digest[0] ^ 1]) + r.state_digest[1:]),
    "garbage": lambda frame: [b"\xff" + secrets.token_bytes(100)],  # no kind of frame
    "nothing": lambda frame: [b""],
    "huge": lambda frame: [bytes(10**9)],
    "failed": lambda frame: [encode(Failed("no memory"))],
    "thrown": _changed(scalars=lambda r: tuple(1e5 * g + 1e5 for g in r.scalars)),
    "hello as another": lambda frame: [_hello(frame, client=lambda h: h.client + 1)],
    "hellos": lambda frame: [_hello(frame, position=lambda h, p=p: p) for p in range(1000)],
    "asks for the mask": lambda frame: [encode(WantSpace("ab" * 32))] * 1000,
}
"""Frames instead of a report."""


# Both


def write(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    scratch = path.with_name(f"{path.name}.part")
    scratch.write_bytes(content)
    scratch.replace(path)


def read_gate(path: Path) -> int:
    """The last round that clients with this gate may answer; -1 before there is a file."""
    return int(path.read_text()) if path.exists() else -1


class _Log:
    """Lines with the time, to a file."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path

    def __call__(self, line: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


class _Handler(logging.Handler):
    def __init__(self, say: Say):
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(record.getMessage())


# A nursery


def nurse(options: argparse.Namespace) -> None:
    """Fork a process for each line: {"arguments": [...], "output": FILE} → its process id."""
    if options.kind == "model":
        import transformers.models.llama.modeling_llama  # noqa: F401

        import meerkat.node.session
    else:
        import meerkat.runs.remote_run  # noqa: F401
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    children: list[int] = []
    try:
        while line := sys.stdin.readline():
            order = json.loads(line)
            child = os.fork()
            if child == 0:
                _grow_up(order["arguments"], order["output"])
            with suppress(ProcessLookupError):
                children.append(os.pidfd_open(child))
            print(child, flush=True)
    finally:
        for child in children:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(child, signal.SIGKILL)
                select.select([child], [], [], 10)
        os._exit(0)  # torch takes seconds to leave


def _grow_up(arguments: list[str], output: str) -> None:
    """In the child: never returns."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for there, here in ((nothing, 0), (target, 1), (target, 2)):
            os.dup2(there, here)
        main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
