"""What may go wrong in a deployment over streams: real processes, killed, paused, cut off, wrong.

`bare.py` has the processes. Clients without a model answer with the scalars of a run in one
process, so where every report is the same, θ must be, bit for bit.
"""

from __future__ import annotations

import copy
import json
import os
import random
import secrets
import select
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bare
import pytest
import transformers
from builders import tiny_config, tiny_tokenizer
from cluster import free_port
from typer.testing import CliRunner

import meerkat
from meerkat.cli import app
from meerkat.config import parse_recipe
from meerkat.federation.messages import ClientReport
from meerkat.journal import Journal
from meerkat.spaces.mask_file import load_mask
from meerkat.transport.frame import VERSION
from meerkat.transport.stream import Invitation, join_session

CLIENTS, ROUNDS, STEPS = 3, 6, 20
LONG, SHORT = 120.0, 0.3
"""Seconds: what a wait may take, and what a test waits on purpose."""
BARE = Path(bare.__file__)


# What the tests are made of


class Nursery:
    """Forks processes that have everything imported."""

    def __init__(self, kind: str, environment: dict[str, str], errors: Path):
        self._errors = errors
        with errors.open("ab") as target:
            self._process = subprocess.Popen(
                [sys.executable, str(BARE), "nursery", kind],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=target,
                env=environment,
                text=True,
            )

    def fork(self, arguments: list[str], output: Path) -> Child:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"arguments": arguments, "output": str(output)}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the nursery died; see {self._errors}"
        return Child(int(answer))

    def close(self) -> None:
        """Its children end with it."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)


class Child:
    """A process that is not ours to wait for; its id may be another's once it has ended."""

    def __init__(self, pid: int):
        self.pid = pid
        try:
            self._handle: int | None = os.pidfd_open(pid)
        except ProcessLookupError:
            self._handle = None

    def signal(self, number: int) -> None:
        if self._handle is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, number)

    def runs(self) -> bool:
        return self._handle is not None and not select.select([self._handle], [], [], 0)[0]

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        if self._handle is not None:
            assert select.select([self._handle], [], [], LONG)[0], f"{self.pid} cannot be killed"

    def close(self) -> None:
        self.kill()
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


@dataclass
class World:
    """What all tests share: the run without any fault, and where processes come from."""

    light: Nursery
    model: Nursery
    recipe: dict[str, Any]
    mask: Path
    """With θ_0."""
    recorded: Path
    scalars: dict[tuple[int, int], tuple[float, ...]]
    """By round and client."""
    digests: list[str]
    """Of θ after each round."""


@pytest.fixture(scope="module")
def world(tiny_recipe_data: dict, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("faults")
    environment = {**os.environ, "MEERKAT_CACHE": str(folder), "OPENBLAS_NUM_THREADS": "1"}
    environment["GRPC_VERBOSITY"] = "ERROR"
    with ExitStack() as stack:
        nurseries = []
        for kind in ("light", "model"):
            nursery = Nursery(kind, environment, folder / f"{kind}.log")
            stack.callback(nursery.close)
            nurseries.append(nursery)
        yield _world(*nurseries, copy.deepcopy(tiny_recipe_data), folder)


def _world(light: Nursery, model: Nursery, data: dict[str, Any], folder: Path) -> World:
    """The run in one process, whose scalars clients without a model answer with."""
    data["federation"] |= {"clients": CLIENTS, "rounds": ROUNDS, "local_steps": STEPS}
    data["federation"]["batch_size"] = 2
    data["evaluation"] = {"examples": 6}
    out = folder / "whole"
    meerkat.run(parse_recipe(data), out, observers=())
    with closing(Journal.open(out / "journal.sqlite")) as journal:
        records = [record for record, _ in journal.records()]
    scalars = {(r.round, p.client): p.scalars for r in records for p in r.reports}
    by_round: dict[int, dict[int, Any]] = {}
    for (number, client), found in scalars.items():
        by_round.setdefault(number, {})[client] = found
    examples = [report.examples for report in records[0].reports]
    recorded = folder / "recorded.json"
    recorded.write_text(json.dumps({"examples": examples, "scalars": by_round}))
    digests = [record.state_digest for record in records]
    return World(light, model, data, out / "mask.safetensors", recorded, scalars, digests)


class Deployment:
    """A server and its clients, in one folder."""

    def __init__(self, world: World, folder: Path, **network: Any):
        self.world, self.folder, self.out = world, folder, folder / "run"
        self.port = free_port()
        self.recipe = copy.deepcopy(world.recipe)
        self.network(**{"rejoin": LONG, "deadline": LONG, "patience": LONG, **network})
        self.recorded = world.recorded
        self.clients: dict[str, Child] = {}
        self._children: list[Child] = []
        self._invitations = folder / "invitations"
        self._invitations.mkdir()
        self.server: Child

    def network(self, **fields: Any) -> None:
        self.recipe.setdefault("network", {}).update(fields)

    # What is started

    def serve(self, *options: Any) -> Child:
        recipe = self.folder / "recipe.json"
        recipe.write_text(parse_recipe(self.recipe).to_json())
        arguments = ["server", recipe, self.world.mask, self.out, self._invitations]
        (self.out / "outcome.json").unlink(missing_ok=True)
        start = len(self.log)
        self.server = self._fork(
            self.world.light, [*arguments, "--port", self.port, *options], "server.out"
        )
        last = f"peer {self.recipe['federation']['clients'] - 1} is invited"
        self.until(lambda: last in self.log[start:] or not self.server.runs(), "the server invites")
        assert self.server.runs(), self._tails()
        return self.server

    def client(
        self,
        peer: int,
        *options: Any,
        model: bool = False,
        name: str = "",
        answers: int | None = None,
    ) -> str:
        """Start one; its name, by which `log_of` knows it.

        Args:
            answers: The last round that it answers before `allow` says another one.
        """
        name = name or f"client-{peer}"
        if answers is not None:
            self.allow(name, answers)
            options = ("--gate", self._gate(name), *options)
        log = self.folder / f"{name}.log"
        if not model:
            options = ("--recorded", self.recorded, "--mask", self.world.mask, *options)
        nursery = self.world.model if model else self.world.light
        arguments = ["client", self._invitations, peer, log, *options]
        self.clients[name] = self._fork(nursery, arguments, f"{name}.out")
        return name

    def allow(self, name: str, number: int = ROUNDS) -> None:
        """Let a client that has a gate answer up to this round."""
        bare.write(self._gate(name), str(number).encode())

    def _gate(self, name: str) -> Path:
        return self.folder / f"{name}.gate"

    def _fork(self, nursery: Nursery, arguments: list[Any], output: str) -> Child:
        child = nursery.fork([str(part) for part in arguments], self.folder / output)
        self._children.append(child)
        return child

    def close(self) -> None:
        for child in self._children:
            child.close()

    # What is seen

    @property
    def log(self) -> str:
        return self._read(self.out / "server.log")

    def log_of(self, name: str) -> str:
        return self._read(self.folder / f"{name}.log")

    def _read(self, path: Path) -> str:
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def rounds(self) -> int:
        """Rounds in the journal; 0 before there is one."""
        path = self.out / "journal.sqlite"
        if not path.exists():
            return 0
        try:
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=0)) as journal:
                return int(journal.execute("SELECT count(*) FROM rounds").fetchone()[0])
        except sqlite3.Error:
            return 0

    def until(self, condition: Callable[[], object], what: str, seconds: float = LONG) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                pytest.fail(f"not within {seconds:g} s: {what}\n{self._tails()}")
            time.sleep(0.01)

    def asked(self, name: str, number: int) -> None:
        """Wait until a client is in this round."""
        line = f"is asked for round {number}"
        self.until(lambda: line in self.log_of(name), f"{name} {line}")

    def logged(self, *parts: str, by: str = "") -> str:
        """Wait for a line of the server's log, or of a client's, that has these parts."""

        def lines() -> list[str]:
            text = self.log_of(by) if by else self.log
            return [line for line in text.splitlines() if all(part in line for part in parts)]

        self.until(lines, f"{by or 'the server'} says {parts}")
        return lines()[0]

    def _tails(self) -> str:
        texts = []
        for path in [*sorted(self.folder.glob("*.log")), *sorted(self.folder.glob("*.out"))]:
            texts.append(f"--- {path.name}\n{self._read(path)[-1500:]}")
        return "\n".join([*texts, f"--- server.log\n{self.log[-4000:]}"])

    # What must hold at the end

    def ended(self) -> dict[str, Any]:
        """Wait for the server's end; how it was."""
        path = self.out / "outcome.json"
        self.until(lambda: path.exists() or not self.server.runs(), "the run ends")
        assert path.exists(), f"the server died\n{self._tails()}"
        self.until(lambda: not self.server.runs(), "the server ends")
        outcome = json.loads(path.read_text())
        assert not {"torch", "transformers", "datasets", "flwr"} & set(outcome["modules"])
        self.keeps_secrets()
        return dict(outcome)

    def fails(self) -> str:
        outcome = self.ended()
        assert "error" in outcome, self._tails()
        return str(outcome["error"])

    def completes(
        self, missing: Collection[tuple[int, int]] = (), same: bool = True
    ) -> dict[tuple[int, int], ClientReport]:
        """Wait for the end of the run; check journal and θ; the accepted reports.

        Args:
            missing: Round and client of reports that must not be in the journal.
            same: Must θ be that of the run without a fault?
        """
        outcome = self.ended()
        assert "summary" in outcome, self._tails()
        found = self.reports()
        assert set(found) == set(self.world.scalars) - set(missing), self._tails()
        digest = self.replayed()
        assert digest == outcome["summary"]["state_digest"]
        assert (digest == self.world.digests[-1]) is same, self._tails()
        if same:
            assert {key: report.scalars for key, report in found.items()} == self.world.scalars
        return found

    def reports(self) -> dict[tuple[int, int], ClientReport]:
        """By round and client; each is the client's own, and there once."""
        with closing(Journal.open(self.out / "journal.sqlite")) as journal:
            rounds = [record for record, _ in journal.records()]
        found = [(record.round, report) for record in rounds for report in record.reports]
        assert all(report.round == number for number, report in found)
        keyed = {(number, report.client): report for number, report in found}
        assert len(keyed) == len(found)
        return keyed

    def replayed(self) -> str:
        """θ's digest, from the journal alone."""
        done = CliRunner().invoke(app, ["replay", str(self.out), "--digest"])
        assert done.exit_code == 0, done.output
        return done.stdout.strip()

    def keeps_secrets(self) -> None:
        """No log has a token, and nothing that was printed."""
        tokens = [self.invitation(path).token for _, _, path in self.invitations()]
        assert len(set(tokens)) == len(tokens) >= self.recipe["federation"]["clients"]
        for path in [
            self.out / "server.log",
            *self.folder.glob("*.log"),
            *self.folder.glob("*.out"),
        ]:
            text = self._read(path)
            assert not any(token in text for token in tokens), path
            assert "Traceback" not in text, self._tails()

    def invitations(self) -> list[tuple[int, int, Path]]:
        return bare.invitations(self._invitations)

    def invitation(self, path: Path) -> Invitation:
        return Invitation.decode(b64decode(json.loads(path.read_bytes())["invitation"]))


@pytest.fixture
def deploy(world: World, tmp_path: Path) -> Iterator[Callable[..., Deployment]]:
    with ExitStack() as stack:

        def make(**network: Any) -> Deployment:
            deployment = Deployment(world, tmp_path, **network)
            stack.callback(deployment.close)
            return deployment

        yield make


Deploy = Callable[..., Deployment]


# Without a fault


@pytest.mark.parametrize("model", [True, False], ids=["models", "scripts"])
def test_a_run_without_a_fault(deploy: Deploy, model: bool) -> None:
    run = deploy()
    run.serve(*(["--report"] if model else []))
    names = [run.client(k, model=model) for k in range(CLIENTS)]
    run.completes()
    assert (run.out / "report.html").exists() is model
    for name in names:
        run.logged("the session is over: the run is complete", by=name)
        run.until(lambda name=name: not run.clients[name].runs(), f"{name} ends")


def test_clients_without_a_model_load_no_torch() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(BARE.parent)!r})\n"
        "import bare, meerkat.runs.remote_run\n"
        "loaded = {'torch', 'transformers', 'pandas', 'flwr'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {loaded}' if loaded else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# Processes that are killed or stand still


def test_a_client_is_killed_in_a_round_and_another_takes_its_place(deploy: Deploy) -> None:
    run = deploy()
    run.serve()
    for k in (0, 1):
        run.client(k, model=True)
    victim = run.client(2, "--round", 2, "--sleep", LONG, model=True, name="victim")
    run.asked(victim, 2)
    run.clients[victim].kill()
    run.logged("client 2 left: its connection broke")
    run.client(2, model=True)
    run.completes()
    assert run.log.count("client 2 is here") == 2
    assert "closed without" not in run.log
    assert "is asked for round 2" in run.log_of("client-2")


def test_a_client_is_killed_for_good(deploy: Deploy) -> None:
    run = deploy(rejoin=SHORT)
    run.serve()
    for k in (0, 1):
        run.client(k, model=True)
    victim = run.client(2, "--round", 2, "--sleep", LONG, model=True)
    run.asked(victim, 2)
    run.clients[victim].kill()
    run.completes(missing=[(r, 2) for r in range(2, ROUNDS)], same=False)
    run.logged("round 2: closed without client 2, it left: its connection broke")
    assert run.log.count("closed without") == 1


def test_too_few_clients_are_left_and_the_run_goes_on_later(deploy: Deploy) -> None:
    run = deploy(patience=6.0, deadline=6.0, rejoin=SHORT)
    run.client(0)
    for k in (1, 2):
        run.client(k, "--round", 2, "--sleep", LONG, name=f"victim-{k}")
    run.serve()
    for k in (1, 2):
        run.asked(f"victim-{k}", 2)
    for k in (1, 2):
        run.clients[f"victim-{k}"].kill()
    line = run.fails()
    assert line.startswith("round 2: 1 of the 2 answers that network.quorum asks for")
    assert "client 1: it left: its connection broke" in line
    assert "client 2: it left: its connection broke" in line
    assert "start the server again, and the run goes on" in line
    run.logged("the session is over", "the server stopped before the end", by="client-0")
    assert run.rounds() == 2
    run.network(patience=LONG, deadline=LONG)
    run.serve()
    for k in range(CLIENTS):
        run.client(k, name=f"back-{k}")
    run.completes()


def test_a_client_stands_still_until_the_deadline_is_over(deploy: Deploy) -> None:
    run = deploy(deadline=3.0)
    run.serve()
    run.client(2, model=True)
    run.until(lambda: "takes part" in run.log_of("client-2"), "client 2, which loads, takes part")
    for k in (0, 1):
        run.client(k, "--pace", 0.5)
    run.asked("client-2", 1)
    run.clients["client-2"].signal(signal.SIGSTOP)
    line = run.logged("closed without client 2, no answer")
    number = int(line.partition("round ")[2].partition(":")[0])
    run.clients["client-2"].signal(signal.SIGCONT)
    run.logged(f"client 2: the answer to round {number} came too late; not used")
    run.ended()
    took_part = {r for r, client in run.reports() if client == 2}
    assert number not in took_part
    assert max(took_part) > number
    run.completes(missing=[(r, 2) for r in range(ROUNDS) if r not in took_part], same=False)
    run.logged("the session is over: the run is complete", by="client-2")


def test_a_client_stands_still_within_the_deadline(deploy: Deploy) -> None:
    run = deploy()
    run.serve()
    for k in (0, 1):
        run.client(k)
    run.client(2, model=True, answers=0)
    run.asked("client-2", 1)
    run.clients["client-2"].signal(signal.SIGSTOP)
    run.allow("client-2")
    for k in (0, 1):
        run.logged(f"client {k} answered round 1", by=f"client-{k}")
    time.sleep(1.0)  # so long nothing may happen
    assert run.rounds() == 1
    run.clients["client-2"].signal(signal.SIGCONT)
    run.completes()
    assert "left: its" not in run.log


@pytest.mark.parametrize("seed", [1, 2])
def test_a_server_is_killed_three_times(deploy: Deploy, seed: int) -> None:
    """And started again on its journal; clients come back by new invitations."""
    moments = random.Random(seed)
    run = deploy()
    run.serve()
    for k in range(CLIENTS):  # the last round waits until all is done that is to be done before
        run.client(k, "--again", "--pace", 0.2, model=k == 0, answers=ROUNDS - 2)
    former: list[Invitation] = []
    for target in (0, 2, 4):
        run.until(lambda target=target: run.rounds() >= target, f"{target} rounds")
        time.sleep(moments.random() * 0.3)
        assert run.server.runs(), run._tails()
        run.server.kill()
        former = [run.invitation(path) for _, _, path in run.invitations()]
        run.serve()
    # Who comes with an invitation of before is not let in, nor in the way of who is there.
    (*_, (_, _, newest)) = run.invitations()
    before = next(invitation for invitation in former if invitation.peer == 1)
    stranger = replace(before, certificate=run.invitation(newest).certificate)
    summary = join_session(stranger, lambda _: (), lambda: b"", print, retry_seconds=5)
    assert not summary.complete
    assert "the server refuses this invitation: its invitation is for another run" in summary.why
    for k in range(CLIENTS):
        run.allow(f"client-{k}")
    run.completes()
    run.logged("refused peer 1 from", "its invitation is for another run")
    for k in range(CLIENTS):
        run.logged("was started anew; this invitation is void", by=f"client-{k}")


# Connections that break


class Relay:
    """TCP to the server that can be cut in the middle of what it carries."""

    def __init__(self, port: int):
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._cut: tuple[str, int, int] | None = None
        self.cuts = 0
        self._start(self._accept)

    def cut(self, way: str, least: int, after: int) -> None:
        """Cut the next burst of at least so many bytes, "up" or "down", after some of them."""
        self._cut = way, least, after

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(10)
        self._listener.close()
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join(10)
        for end in self._open:
            end.close()

    def _start(self, function: Callable[..., None], *arguments: Any) -> None:
        self._threads.append(threading.Thread(target=function, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self._target), 10)
                except OSError:
                    near.close()
                    continue
                far.settimeout(None)
                self._open += [near, far]
                self._start(self._pump, near, far, "up")
                self._start(self._pump, far, near, "down")

    def _pump(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        with suppress(OSError):
            while part := source.recv(65536):
                order = self._cut
                if order is not None and order[0] == way and len(part) >= order[1]:
                    self._cut = None
                    self.cuts += 1
                    sink.sendall(part[: order[2]])
                    break
                sink.sendall(part)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_connection_is_cut_within_a_frame(deploy: Deploy, way: str) -> None:
    """Once in each round but the first: within a report, or within a plan."""
    least = 4 * STEPS + 30 if way == "up" else 24 * STEPS
    run = deploy()
    run.serve()
    with closing(Relay(run.port)) as relay:
        for k in (0, 1):
            run.client(k)
        run.client(2, "--through", relay.port, answers=-1)
        for number, after in zip(range(1, ROUNDS), (0, 1, 30, 80, 100), strict=True):
            # Its next report, or the plan after it, is at least `least` bytes; nothing else is.
            answered = number if way == "up" else number - 1
            run.allow("client-2", answered - 1)
            run.asked("client-2", answered)
            relay.cut(way, least, after)
            run.allow("client-2", answered)
            run.until(lambda number=number: relay.cuts == number, f"cut {number}")
        run.allow("client-2")
        run.completes()
        assert relay.cuts == ROUNDS - 1
    assert run.log.count("client 2 left: its connection broke") == ROUNDS - 1
    assert run.log.count("client 2 is here") == ROUNDS
    assert "closed without" not in run.log
    assert run.log_of("client-2").count("trying again") == ROUNDS - 1


# Clients that do wrong

VERSIONS = (
    f"speaks version {VERSION + 1} of the protocol, a newer one; this side speaks {VERSION}: "
    "install the same release"
)
WRONG_REPORTS = {
    # What the server says of the report; then "refused": the round closes without it, or "again":
    # the client is disconnected, and may answer again.
    "nan": ("a scalar is not finite", "again"),
    "inf": ("a scalar is not finite", "again"),
    "too short": ("does not hold its 20 steps", "again"),
    "too long": ("does not hold its 20 steps", "again"),
    "another version": (f"the client {VERSIONS}", "again"),
    "garbage": ("has no place here", "again"),
    "nothing": ("a frame of 0 bytes and no kind has no place here", "again"),
    "twice": ("report that nobody asked for", "again"),
    "large": ("|g| = 1e+30 is more than network.largest_scalar = 1e+06", "refused"),
    "fewer steps": ("19 steps of 1 perturbations, asked were 20 of 1", "refused"),
    "more steps": ("21 steps of 1 perturbations, asked were 20 of 1", "refused"),
    "another round": ("it is for round 3, this is 2", "refused"),
    "another client": ("its report is signed by client 2", "refused"),
    "digest": ("it started from another state than the server's", "refused"),
    "no examples": ("examples", "refused"),
    "more examples": ("examples, and answers for 1000000", "refused"),
}


@pytest.mark.parametrize("fault", WRONG_REPORTS)
def test_a_client_sends_a_wrong_report(deploy: Deploy, fault: str) -> None:
    cause, then = WRONG_REPORTS[fault]
    run = deploy()
    run.serve()
    run.client(0)
    run.client(1, "--fault", fault, "--round", 2)
    # So that the round is still open when the second of two reports comes.
    run.client(2, answers=1)
    if fault == "twice":
        run.logged("client 1", cause, "disconnected")
    run.allow("client-2")
    if then == "again":
        run.completes()
        run.logged("client 1", cause, "disconnected")
        assert run.log.count("client 1 is here") == 2
        run.logged(cause, by="client-1")
    else:
        run.completes(missing=[(2, 1)], same=False)
        run.logged("round 2", "client 1", "refused", cause)
        assert run.log.count("client 1 is here") == 1
    run.logged("the session is over: the run is complete", by="client-1")


@pytest.mark.parametrize("fault", ["garbage", "nan"])
def test_a_client_that_does_wrong_again_and_again_is_barred(deploy: Deploy, fault: str) -> None:
    run = deploy(rejoin=1.0)
    run.serve()
    for k in (0, 2):
        run.client(k)
    run.client(1, "--fault", fault, "--round", 2, "--always", "--again")
    run.completes(missing=[(r, 1) for r in range(2, ROUNDS)], same=False)
    run.logged("client 1: ", WRONG_REPORTS[fault][0], "barred from this run")
    run.logged("round 2: closed without client 1, it left")
    run.logged("refused: ", WRONG_REPORTS[fault][0], by="client-1")
    assert run.log.count("client 1 is here") == 3
    assert run.log.count("peer 1 is invited") == 1


@pytest.mark.parametrize("fault", ["hello as another", "hellos", "asks for the mask"])
def test_a_client_claims_or_asks_too_much(deploy: Deploy, fault: str) -> None:
    """It is disconnected once, comes back as who it is, and the run is as without a fault."""
    run = deploy()
    run.serve()
    for k in (0, 2):
        run.client(k)
    run.client(1, "--fault", fault, "--round", 2)
    run.completes()
    cause = "it is client 1 in this run, not 2" if "another" in fault else "more than 32 hellos"
    run.logged("client 1", cause, "disconnected")
    assert "barred" not in run.log
    assert run.log.count("client 2 is here") == 1
    assert sum("client 1" in line for line in run.log.splitlines()) < 100, "a flood of lines"


def test_a_client_fails_again_and_again(deploy: Deploy) -> None:
    run = deploy()
    run.serve()
    for k in (0, 2):
        run.client(k)
    run.client(1, "--fault", "failed", "--round", 2, "--always")
    run.completes(missing=[(r, 1) for r in range(2, ROUNDS)], same=False)
    run.logged("round 2: client 1 failed: no memory")


def test_two_of_three_fail_once_and_are_asked_again(deploy: Deploy) -> None:
    """Less than a quorum is left: before, that ended the run."""
    run = deploy(quorum=3)
    run.serve()
    run.client(0)
    for k in (1, 2):
        run.client(k, "--fault", "failed", "--round", 2)
    run.completes()
    for k in (1, 2):
        run.logged(f"round 2: client {k} failed: no memory")


def test_a_client_throws_the_model_with_large_scalars(deploy: Deploy) -> None:
    """All that it reports is recorded, and clipped before it counts."""
    run = deploy()
    run.serve()
    for k in (0, 2):
        run.client(k)
    run.client(1, "--fault", "thrown", "--round", 2, "--always")
    found = run.completes(same=False)
    assert min(max(map(abs, found[r, 1].scalars)) for r in range(2, ROUNDS)) > 1e4
    honest = max(max(map(abs, found[r, k].scalars)) for r in range(ROUNDS) for k in (0, 2))
    with closing(Journal.open(run.out / "journal.sqlite")) as journal:
        entries = [e for record, _ in journal.records() for u in record.updates for e in u.entries]
    assert max(abs(entry.coefficient) for entry in entries) < 11 * honest


@pytest.fixture(scope="module")
def another_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shapes, other weights."""
    import torch

    folder = tmp_path_factory.mktemp("models") / "another"
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config("llama"), dtype=torch.float32)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def another_mask(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the same model."""
    path = tmp_path_factory.mktemp("masks") / "another.safetensors"
    recipe = copy.deepcopy(world.recipe)
    recipe["mask"] = {"kind": "random", "density": recipe["mask"]["density"]}
    meerkat.calibrate(parse_recipe(recipe), path)
    assert load_mask(path).digest != load_mask(world.mask).digest
    return path


def test_a_client_has_another_model(deploy: Deploy, another_model: Path) -> None:
    run = deploy()
    run.serve()
    for k in (0, 2):
        run.client(k)
    run.client(1, "--model", another_model, model=True)
    run.logged("client 1 (peer 1) is refused: the client's base model is", "load the model that")
    run.logged("client 1 is refused: the client's base model is", "load the model", by="client-1")
    run.client(1, model=True, name="right")
    run.completes()


def test_a_client_has_another_configuration(deploy: Deploy, world: World, tmp_path: Path) -> None:
    """The very same parameters, and another `rms_norm_eps`."""
    folder = tmp_path / "changed"
    shutil.copytree(world.recipe["model"]["name"], folder)
    config = json.loads((folder / "config.json").read_text())
    config["rms_norm_eps"] = 1e-2
    (folder / "config.json").write_text(json.dumps(config))
    run = deploy()
    run.serve()
    for k in (0, 2):
        run.client(k)
    run.client(1, "--model", folder, model=True)
    run.logged("client 1 (peer 1) is refused: the client's configuration or tokenizer is", "config")
    run.client(1, model=True, name="right")
    run.completes()


def test_a_server_names_a_model_that_a_node_does_not_allow(deploy: Deploy, world: World) -> None:
    run = deploy()
    run.serve()
    for k in (0, 2):
        run.client(k)
    run.client(1, "--strict", model=True)
    run.logged("is not allowed at this node; add it to --node-config allow-models", by="client-1")
    run.logged("peer 1 does not take part: its operator or version does not allow this recipe")
    run.client(1, model=True, name="right")
    run.completes()


def test_a_client_has_another_mask(deploy: Deploy, another_mask: Path) -> None:
    run = deploy()
    run.serve()
    for k in (0, 2):
        run.client(k)
    run.client(1, "--mask", another_mask, model=True)
    run.logged("client 1 (peer 1) is refused: the client's mask is", "use the run's mask")
    run.logged("client 1 is refused: the client's mask is", "use the run's mask", by="client-1")
    run.logged("the session is over: refused", by="client-1")
    run.client(1, model=True, name="right")
    run.completes()


def test_a_client_speaks_another_version(deploy: Deploy) -> None:
    run = deploy()
    run.serve()
    for k in (0, 2):
        run.client(k)
    run.client(1, "--fault", "version")
    run.logged("peer 1: the client ", VERSIONS)
    run.logged("the session is over: refused: the client ", VERSIONS, by="client-1")
    run.client(1, name="right")
    run.completes()


@pytest.mark.parametrize("fault", ["wrong", "old"])
def test_a_client_has_no_good_token(deploy: Deploy, fault: str) -> None:
    run = deploy()
    run.serve()
    for k in (0, 2):
        run.client(k)
    if fault == "old":
        first = run.client(1, "--round", 0, "--sleep", LONG, name="first")
        run.asked(first, 0)
        run.clients[first].kill()
        run.until(lambda: run.log.count("peer 1 is invited") > 1, "peer 1 is invited again")
    run.client(1, "--fault", fault)
    said = "its token is not that of the last invitation to this peer"
    run.logged("refused peer 1 from ", said)
    run.logged("the session is over: the server refuses this invitation: ", said, by="client-1")
    run.client(1, name="right")
    run.completes()


# The port


def test_strangers_at_the_port(deploy: Deploy) -> None:
    """Noise, HTTP/1.1, TLS and then nothing, or nothing at all, while a run goes on."""
    run = deploy()
    run.serve()
    before = _memory(run.server.pid, "VmRSS")
    for k in range(CLIENTS):
        run.client(k, "--pace", 0.1, answers=ROUNDS - 2)
    run.asked("client-0", 0)
    with ExitStack() as stack:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])

        def connect() -> socket.socket:
            return stack.enter_context(socket.create_connection(("127.0.0.1", run.port), 10))

        def secure() -> ssl.SSLSocket:
            return stack.enter_context(context.wrap_socket(connect()))

        for _ in range(5):
            connect()
            with suppress(OSError):
                connect().sendall(secrets.token_bytes(100_000))
            with suppress(OSError):
                connect().sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
            with suppress(OSError):
                connect().sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(20))
            secure()
            with suppress(OSError):
                secure().sendall(secrets.token_bytes(100_000))
            with suppress(OSError):
                secure().sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
            with suppress(OSError):
                secure().sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9 * 1000))
        assert run.rounds() < ROUNDS
        for k in range(CLIENTS):
            run.allow(f"client-{k}")
        run.logged("is here (peer 2)")
        assert _memory(run.server.pid, "VmHWM") - before < 50
        run.completes()
    assert "left: its" not in run.log


def test_a_frame_of_a_gigabyte(deploy: Deploy) -> None:
    run = deploy()
    run.serve()
    for k in (0, 2):
        run.client(k, "--pace", 0.1)
    run.client(1, "--fault", "huge", "--round", 1)
    run.asked("client-1", 1)
    before = _memory(run.server.pid, "VmRSS")
    run.logged("client 1 left: its connection broke", "it sent a frame of more than")
    run.logged("the session is over: a frame is larger than the other side takes", by="client-1")
    assert _memory(run.server.pid, "VmHWM") - before < 50
    run.client(1, name="right")
    run.completes()


def _memory(pid: int, what: str) -> float:
    """MiB of a process, now or at most so far."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) / 1024
    raise ValueError(what)


def test_fifty_clients_come_at_once(deploy: Deploy, tmp_path: Path) -> None:
    clients, rounds = 50, 4
    run = deploy()
    run.recipe["federation"] |= {"clients": clients, "rounds": rounds, "local_steps": 1}
    run.recorded = tmp_path / "recorded.json"
    run.recorded.write_text(json.dumps({"examples": [8] * clients, "scalars": {}}))
    run.client(0, "--count", clients)
    run.serve()
    outcome = run.ended()
    found = run.reports()
    assert set(found) == {(r, k) for r in range(rounds) for k in range(clients)}
    for (number, client), report in found.items():
        assert list(report.scalars) == bare.formula(client, number, 1)
    assert run.replayed() == outcome["summary"]["state_digest"]
    assert "left" not in run.log
    assert run.log_of("client-0").count("the session is over: the run is complete") == clients


def test_tokens_are_in_no_log(deploy: Deploy) -> None:
    """Not even where clients are refused, cut off, and invited again; other tests look, too."""
    run = deploy()
    run.serve()
    with closing(Relay(run.port)) as relay:
        run.client(0, "--fault", "garbage")
        run.client(1, "--through", relay.port, "--again", "--pace", SHORT)
        run.client(2, "--fault", "wrong", name="stranger")
        run.logged("refused peer 2 from")
        run.client(2, "--again", "--pace", 0.1)
        relay.cut("up", 4 * STEPS, 10)
        run.until(lambda: run.rounds() > 1, "two rounds")
        run.server.kill()
        run.serve()
        run.client(0, name="later")
        run.completes()
    tokens = [run.invitation(path).token for _, _, path in run.invitations()]
    assert len(tokens) >= 2 * CLIENTS + 1
    for name in ("client-0", "client-1", "client-2", "stranger", "later"):
        assert run.log_of(name)
