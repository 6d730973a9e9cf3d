"""What a server bears: clients of a round, rounds of a journal, hellos of one client.

    python experiments/growth.py clients --clients 1000 10000 100000
    python experiments/growth.py journal --clients 1000 --rounds 1000
    python experiments/growth.py hellos --count 2000

CPU seconds, so that other jobs on the machine do not count. Clients are bare: they have no model,
know the state of the server, and answer with random scalars over a link within this process. What
their part takes is measured and left out.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from meerkat.algorithms import make_algorithm
from meerkat.config import Recipe, parse_recipe
from meerkat.engines.base import Assignment
from meerkat.engines.requests import RoundRequest
from meerkat.federation.messages import DIGEST_BYTES, ClientReport, RoundPlan
from meerkat.federation.rounds import close_round, plan_round
from meerkat.federation.schedule import Schedule
from meerkat.federation.state import ServerState, initial_state
from meerkat.journal import Journal, replay
from meerkat.journal.records import RoundMetrics, header_of
from meerkat.progress import Progress
from meerkat.runs.driver import CHECKPOINT_EVERY, checkpoint_of
from meerkat.runs.events import RunObserver
from meerkat.runs.remote_run import host
from meerkat.spaces.mask_file import Mask
from meerkat.transport.base import Event
from meerkat.transport.client_frames import Hello, Report
from meerkat.transport.frame import encode
from meerkat.transport.handshake import Proof
from meerkat.transport.server_frames import Plan, Setup, decode_down
from meerkat.zo import noise
from meerkat.zo.log import Log

N = 10_000
"""Parameters in the mask."""
PLAN = Plan.number


def recipe_of(clients: int, rounds: int) -> Recipe:
    return parse_recipe(
        {
            "model": {"name": "elsewhere"},
            "task": {
                "name": "custom",
                "source": "elsewhere.csv",
                "prompt": "{text}",
                "verbalizers": {"neg": "bad", "pos": "good"},
            },
            "federation": {"clients": clients, "rounds": rounds},
            "optimizer": {"learning_rate": 1e-4},
        }
    )


def mask_of(n: int = N) -> Mask:
    theta = np.random.default_rng(0).normal(size=n).astype(np.float32)
    return Mask(("a",), ((n,),), (np.arange(n),), n, "ab" * 32, "random", None, None, theta)


class Bare:
    """All clients of a run behind one link; they keep one state between them."""

    def __init__(self, setup: Setup, recipe: Recipe, mask: Mask):
        assert mask.initial is not None
        self._algorithm = make_algorithm(recipe, mask.size)
        self._state = self._algorithm.init(mask.initial)
        self._position = 0
        self._last = b""
        self._events: deque[Event] = deque()
        self._draw = np.random.default_rng(1)
        self.seconds = 0.0
        for client in range(recipe.federation.clients):
            hello = Hello(client, 16, 0, 0, setup.proof)
            self._events.append(Event(client, encode(hello)))

    def send(self, peer: int, frame: bytes) -> None:
        if frame[0] != PLAN:
            return
        started = time.process_time()
        if frame is not self._last:
            self._last, decoded = frame, decode_down(frame)
            assert isinstance(decoded, Plan)
            plan = self._plan = decoded.plan
            fresh = plan.updates[self._position - plan.log_start :]
            self._state = self._algorithm.apply(self._state, fresh)
            self._position += len(fresh)
            self._proof = bytes.fromhex(self._state.digest)[:DIGEST_BYTES]
        scalars = tuple(self._draw.standard_normal(self._plan.steps, np.float32).tolist())
        report = ClientReport(self._plan.round, peer, 16, self._plan.steps, 1, self._proof, scalars)
        self._events.append(Event(peer, encode(Report(report))))
        self.seconds += time.process_time() - started

    def receive(self, timeout: float) -> Event | None:
        return self._events.popleft() if self._events else None

    def drop(self, peer: int, reason: str, bar: bool = False) -> None:
        raise AssertionError(reason)

    def close(self, reason: str) -> None:
        pass


class Stopwatch(RunObserver):
    """CPU seconds of the server in each round."""

    def __init__(self) -> None:
        self.marks: list[float] = []
        self.link: Bare

    def round_closed(self, *_: Any) -> None:
        self.marks.append(time.process_time() - self.link.seconds)


def clients(count: int, rounds: int) -> None:
    """CPU seconds of the server for a run of bare clients."""
    recipe, mask, watch = recipe_of(count, rounds), mask_of(), Stopwatch()

    def connect(setup: Setup) -> Bare:
        watch.link = Bare(setup, recipe, mask)
        return watch.link

    started = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        host(recipe, Path(scratch) / "run", mask, connect, watch, Progress(), lambda line: None)
    per_round = np.diff(watch.marks)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{count:>7,} clients: joining and first round {watch.marks[0] - started:.1f} s, a "
        f"round {np.median(per_round):.2f} s, {np.median(per_round) / count * 1e6:.0f} µs a "
        f"client; peak memory {peak / 2**20:,.0f} MiB",
        flush=True,
    )


def journal(count: int, rounds: int) -> None:
    """A journal of count × rounds reports: opened and replayed from its checkpoint, and in full."""
    recipe, mask = recipe_of(count, rounds), mask_of()
    draw = np.random.default_rng(2)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "journal.sqlite"
        header = header_of(recipe, mask, ("bad", "good"), [], "")
        assert mask.initial is not None
        algorithm = make_algorithm(recipe, mask.size)
        state: ServerState = initial_state(algorithm.init(mask.initial), count, 1)
        log = Log()
        schedule = Schedule.of(recipe)
        with closing(Journal.create(path, header, mask.initial)) as kept:
            for number in range(rounds):
                plans = plan_round(schedule, state, log)
                proof = bytes.fromhex(state.model.digest)[:DIGEST_BYTES]
                scalars = draw.standard_normal(count, np.float32).tolist()
                reports = [
                    ClientReport(number, client, 16, 1, 1, proof, (scalar,))
                    for client, scalar in enumerate(scalars)
                ]
                state, record = close_round(schedule, state, algorithm, plans, reports, log)
                log.append(record.updates)
                kept.append_round(record, RoundMetrics(0.0, 0, 0, 0.0))
                if state.round % CHECKPOINT_EVERY == 0 and state.round < rounds:
                    kept.append_checkpoint(checkpoint_of(state, log))
            last = kept.checkpoint()
        print(
            f"{count * rounds:,} records in {rounds:,} rounds, {path.stat().st_size / 2**20:.0f} "
            f"MiB; last checkpoint after round {last.round if last else 0:,}"
        )

        def timed(name: str, work: Callable[[], Any]) -> Any:
            started = time.process_time()
            found = work()
            print(f"{name}: {time.process_time() - started:.2f} s", flush=True)
            return found

        for audit in (False, True):
            way = "in full (--audit)" if audit else "from the checkpoint"
            opened = timed(f"opened {way}", lambda a=audit: Journal.open(path, True, a))
            found = timed(f"replayed {way}", lambda o=opened, a=audit: replay(o, audit=a))
            assert found.digest == state.model.digest
            opened.close()


def hellos(count: int) -> None:
    """Memory that a request keeps for so many hellos, each with a position of its own."""
    n = 100_000
    recipe, mask = recipe_of(4, 10_000), mask_of(n)
    assert mask.initial is not None
    algorithm, log = make_algorithm(recipe, n), Log()
    state = algorithm.init(mask.initial)
    request = RoundRequest(
        Assignment({0: RoundPlan(1, 1, 0.1, 0, 0)}, state.digest, algorithm, log, state), 1e6
    )
    proof = Proof(mask.model, mask.digest, noise.fingerprint(), "cd" * 32, (0.5,) * 8)
    before, received = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for position in range(10**6, 10**6 + count):
        request.frames(0, position)
        received += len(encode(Hello(0, 16, 0, position, proof)))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{count:,} hellos of {received / 1e3:.0f} kB: +{(after - before) / 1024:.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("clients")
    command.add_argument("--clients", type=int, nargs="+", default=[1000, 10_000, 100_000])
    command.add_argument("--rounds", type=int, default=4)
    command = commands.add_parser("journal")
    command.add_argument("--clients", type=int, default=1000)
    command.add_argument("--rounds", type=int, default=1000)
    command = commands.add_parser("hellos")
    command.add_argument("--count", type=int, default=2000)
    options = parser.parse_args()
    match options.command:
        case "clients":
            for count in options.clients:
                clients(count, options.rounds)
        case "journal":
            journal(options.clients, options.rounds)
        case _:
            hellos(options.count)


if __name__ == "__main__":
    main()
