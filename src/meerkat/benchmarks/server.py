"""What a round costs the server, by the number of its clients: scalars in, n floats out."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import dataclass
from typing import Any

import numpy as np

from meerkat.algorithms import make_algorithm
from meerkat.benchmarks.machine import describe, seconds
from meerkat.config import parse_recipe
from meerkat.federation.algorithm import Algorithm
from meerkat.federation.gradip import GradIPScorer
from meerkat.federation.messages import DIGEST_BYTES, ClientReport, RoundPlan
from meerkat.federation.rounds import close_round, plan_round
from meerkat.federation.schedule import Schedule
from meerkat.federation.state import ServerState, initial_state
from meerkat.transport.messages import decode_report, encode_report
from meerkat.zo.log import Log
from meerkat.zo.state import Theta

__all__ = ["bench_server"]


@dataclass(frozen=True)
class _Round:
    """What the server has at hand when the reports of a round arrive."""

    schedule: Schedule
    state: ServerState
    algorithm: Algorithm
    plans: dict[int, RoundPlan]
    log: Log
    gradient: Theta
    """p of method.md section 1."""
    messages: list[bytes]
    """Encoded reports, in the order of arrival."""


def bench_server(
    clients: int = 100_000, steps: int = 10, mask_size: int = 100_000, seed: int = 0
) -> dict[str, Any]:
    """Seconds and bytes of one round at the server.

    On the clock: decode the reports, check and aggregate them and apply the log entries
    (`rounds.close_round`), and score each client by GradIP. Before it: the plans, and the reports
    as bytes. `cpu_seconds` adds up all threads, so it is what one core needs, however busy the
    machine is.

    `peak_extra_bytes` is what a second, identical pass needs beside the messages and the state, by
    tracemalloc, which would slow the first one.
    """
    arrived, plan_seconds = _round(clients, steps, mask_size, seed)
    cpu = time.process_time()
    split = _pass(arrived)
    cpu = time.process_time() - cpu
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        _pass(arrived)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    return {
        "seconds": sum(split.values()),
        **split,
        "cpu_seconds": cpu,
        "plan_seconds": plan_seconds,
        "peak_extra_bytes": peak,
        "bytes_if_k_times_n": clients * mask_size * np.dtype(np.float32).itemsize,
        "bytes_received": sum(map(len, arrived.messages)),
        "memory_method": "tracemalloc over a second pass",
        "clients": clients,
        "steps": steps,
        "mask_size": mask_size,
        "machine": describe(),
    }


def _pass(arrived: _Round) -> dict[str, float]:
    """Seconds of each part of the server's work."""
    reports: list[ClientReport] = []

    def decode() -> None:
        reports.extend(map(decode_report, arrived.messages))

    def close() -> None:
        close_round(
            arrived.schedule,
            arrived.state,
            arrived.algorithm,
            arrived.plans,
            reports,
            arrived.log,
        )

    def score() -> None:
        for _ in GradIPScorer(arrived.gradient, arrived.algorithm.stream).stream(reports):
            pass

    return {
        "decode_seconds": seconds(decode),
        "close_seconds": seconds(close),
        "score_seconds": seconds(score),
    }


def _round(clients: int, steps: int, mask_size: int, seed: int) -> tuple[_Round, float]:
    """A round whose clients have all answered, in a random order; and the seconds of its plans."""
    recipe = parse_recipe(
        {
            "model": {"name": "none"},
            "task": {"name": "none"},
            "federation": {"clients": clients, "rounds": 1, "local_steps": steps},
            "seed": seed,
        }
    )
    generator = np.random.default_rng(seed)
    theta = generator.standard_normal(mask_size, np.float32)
    schedule, algorithm = Schedule.of(recipe), make_algorithm(recipe, mask_size)
    state = initial_state(algorithm.init(theta), clients, steps)
    log = Log()
    start = time.perf_counter()
    plans = plan_round(schedule, state, log)
    plan_seconds = time.perf_counter() - start
    mark = bytes.fromhex(state.model.digest)[:DIGEST_BYTES]
    scalars = generator.standard_normal((clients, steps), np.float32)
    messages = [
        encode_report(ClientReport(0, client, 16, steps, 1, mark, tuple(scalars[client].tolist())))
        for client in generator.permutation(clients).tolist()
    ]
    gradient = generator.standard_normal(mask_size, np.float32)
    return _Round(schedule, state, algorithm, plans, log, gradient, messages), plan_seconds
