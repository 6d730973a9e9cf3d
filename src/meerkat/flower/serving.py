"""The server of a run over Flower: finds the mask, makes the transport, opens server.log."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from flwr.serverapp import Grid
from jaxtyping import Float32

from meerkat.config import Recipe
from meerkat.errors import MaskError, RecipeError
from meerkat.flower.settings import Settings
from meerkat.flower.transports import FlowerMessages, FlowerStreams
from meerkat.progress import Progress
from meerkat.runs.directory import holds_run, mask_path, write_holders
from meerkat.runs.events import RunObserver
from meerkat.runs.remote_run import check_algorithm, host, load_server_mask
from meerkat.runs.renewal import MakeMask
from meerkat.spaces.mask_file import Mask
from meerkat.tasks import resolve_task
from meerkat.tasks.metrics import metrics_of
from meerkat.tasks.metrics.validation import VALIDATION_EXAMPLES, on_validation
from meerkat.tasks.objective import Predictions
from meerkat.transport.base import Transport
from meerkat.transport.client_frames import Evaluation
from meerkat.transport.frame import encode
from meerkat.transport.server_frames import Setup
from meerkat.transport.stream import StreamHub

__all__ = ["largest_client_frame", "serve"]

Say = Callable[[str], None]

_OTHER_BYTES = 64 * 1024
"""More than the head of a report has, or any frame without scalars or sums."""


def serve(
    grid: Grid,
    settings: Settings,
    observer: RunObserver,
    progress: Progress,
    simulated: bool,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Host a run over Flower's grid; its summary. What happened to clients is in DIR/server.log.

    Args:
        stop: Ends the run when it is set, from another thread.

    Raises:
        RecipeError: The recipe does not fit how Flower runs here.
        MeerkatError: See `remote_run.host`.
    """
    recipe, out = settings.recipe, settings.out
    _transport(recipe, simulated)
    check_algorithm(recipe)
    mask = _mask(settings, progress, simulated)
    label_counts: tuple[list[list[int]], str] = ([], "")
    if simulated:
        _check_nodes(grid, recipe)
        label_counts = _label_counts(recipe, out)

    with logged_to(out / "server.log", aloud=not simulated) as logger:

        def connect(setup: Setup) -> Transport:
            if _transport(recipe, simulated) == "messages":
                return FlowerMessages(grid, setup, stop, simulated)
            return _streams(grid, recipe, setup, logger.info)

        return host(
            recipe,
            out,
            mask,
            connect,
            observer,
            progress,
            logger.info,
            label_counts,
            remember=not simulated,
            trusted=simulated,
            make_mask=_recalibrated(out) if simulated else None,
        )


@contextmanager
def logged_to(path: Path, aloud: bool) -> Iterator[logging.Logger]:
    """The server's logger, whose lines go to a file with the time, and to stdout if wanted."""
    logger = logging.getLogger("meerkat.server")
    logger.setLevel(logging.INFO)
    handlers: list[logging.Handler] = [logging.FileHandler(path, encoding="utf-8", delay=True)]
    if aloud:
        handlers.append(logging.StreamHandler(sys.stdout))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
    propagates, logger.propagate = logger.propagate, False
    try:
        yield logger
    finally:
        logger.propagate = propagates
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


def _mask(settings: Settings, progress: Progress, simulated: bool) -> Mask:
    """The run's own mask, the one that is named, or in a simulation the one that is calibrated."""
    kept = mask_path(settings.out)
    if holds_run(settings.out) and kept.exists():
        return load_server_mask(kept)
    if settings.mask is not None:
        return load_server_mask(settings.mask)
    if not simulated:
        raise MaskError(
            "--run-config mask is missing; a server has no model to calibrate with: make the mask "
            "where the model is, with `meerkat calibrate RECIPE --out FILE`"
        )
    return _calibrated(settings.recipe, progress)


def _calibrated(recipe: Recipe, progress: Progress) -> Mask:
    """Calibrate in a process of its own, so that this one never holds a model.

    Raises:
        MaskError: It did not work; the line is the one of that process.
    """
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "recipe.json", Path(scratch) / "mask.safetensors"
        source.write_text(recipe.to_json(), "utf-8")
        progress.start("Finding the mask", 1)
        command = ["calibrate", str(source), "--out", str(target)]
        _run_command(command, "the mask could not be made")
        progress.advance()
        return load_server_mask(target)


def _recalibrated(out: Path) -> MakeMask:
    """Renews the subspace of a simulation, in a process of its own like `_calibrated`."""

    def make(path: Path, mask: Mask, weights: Float32[np.ndarray, " n"]) -> None:
        _run_command(["recalibrate", str(out), "--once"], "the subspace could not be renewed")

    return make


def _run_command(arguments: list[str], failure: str) -> None:
    """Run one of our commands in a process of its own.

    Raises:
        MaskError: It did not work; the line is the one of that process.
    """
    command = [sys.executable, "-m", "meerkat", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("meerkat: ")]
        reason = said[-1].removeprefix("meerkat: ") if said else done.stderr[-300:]
        raise MaskError(f"{failure}: {reason}")


def _check_nodes(grid: Grid, recipe: Recipe) -> None:
    """Wait a little for the nodes of the simulation; there is one for each client."""
    clients, end = recipe.federation.clients, time.monotonic() + 10.0
    while (nodes := len(list(grid.get_node_ids()))) < clients:
        if time.monotonic() > end:
            raise RecipeError(
                f"federation.clients = {clients}, but the simulation has {nodes} SuperNodes; give "
                f"--federation-config 'num-supernodes={clients}', or fewer clients"
            )
        time.sleep(0.05)


def _label_counts(recipe: Recipe, out: Path) -> tuple[list[list[int]], str]:
    """Who holds what; in a simulation the data are here."""
    from meerkat.data.clients import (  # a deployed server needs none of it
        client_holders,
        client_label_counts,
        load_partition,
    )

    task = resolve_task(recipe.task)
    split, parts = load_partition(recipe, task)
    write_holders(out, client_holders(recipe, split, parts))
    return client_label_counts(task, split, parts)


def _transport(recipe: Recipe, simulated: bool) -> str:
    chosen = recipe.network.transport
    if chosen == "auto":
        return "messages" if simulated else "stream"
    if chosen == "stream" and simulated:
        raise RecipeError(
            "network.transport = 'stream' would wait for ever in a simulation, whose workers are "
            "fewer than the clients; leave it out, or set 'messages'"
        )
    return chosen


def _streams(grid: Grid, recipe: Recipe, setup: Setup, say: Say) -> Transport:
    network = recipe.network
    largest = largest_client_frame(recipe)
    hub = StreamHub(setup.session, network.listen, largest, network.insecure, say)
    host_name = network.listen.rpartition(":")[0]
    if host_name in ("0.0.0.0", "[::]", ""):
        host_name = socket.getfqdn()
    address = network.address or f"{host_name}:{hub.port}"
    say(f"streams are taken at {network.listen.rpartition(':')[0]}:{hub.port}, as {address}")
    return FlowerStreams(grid, setup, hub, address, say)


def largest_client_frame(recipe: Recipe) -> int:
    """Bytes that no frame of a client of this run needs more than: a report, or an evaluation."""
    steps = max(recipe.federation.local_steps, recipe.selection.calibration_steps)
    report = 4 * steps * recipe.numbers_per_step
    task = resolve_task(recipe.task)
    one = np.zeros(1, np.int64)
    answers = 2 if task.has_pairs else max(1, len(task.verbalizers))
    found = Predictions(np.zeros(1), one, one, answers, np.zeros(1))
    metrics = metrics_of(recipe.evaluation.metrics, task.has_classes, task.has_pairs)
    sums = {name: tuple(metric.sums(found).tolist()) for name, metric in metrics.items()}
    if recipe.evaluation.validation:
        sums |= {**on_validation(sums), VALIDATION_EXAMPLES: (1.0,)}
    return _OTHER_BYTES + max(report, len(encode(Evaluation(0, 1, sums))))
