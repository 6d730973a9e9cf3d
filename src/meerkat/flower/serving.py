"""A run over Flower, seen from the server: its mask, its transport, its log."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from meerkat.directory import holds_run, mask_path
from meerkat.engines.flower import FlowerMessages, FlowerStreams
from meerkat.errors import MaskError, RecipeError
from meerkat.flower.settings import Settings
from meerkat.hosting import host, host_mask
from meerkat.links import Link
from meerkat.mask.file import Mask
from meerkat.progress import Progress
from meerkat.protocol import Setup
from meerkat.recipe import Recipe
from meerkat.streaming import StreamHub
from meerkat.tasks import resolve_task

__all__ = ["serve"]

Say = Callable[[str], None]


def serve(
    grid: Grid,
    settings: Settings,
    progress: Progress,
    simulated: bool,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Host a run over Flower's grid; its summary. What happened to clients is in DIR/server.log.

    Args:
        stop: Ends the run when it is set, from another thread.

    Raises:
        RecipeError: The recipe does not fit how Flower runs here.
        MeerkatError: See `hosting.host`.
    """
    recipe, out = settings.recipe, settings.out
    _transport(recipe, simulated)
    mask = _mask(settings, progress, simulated)
    holdings: tuple[list[list[int]], str] = ([], "")
    if simulated:
        _check_nodes(grid, recipe)
        holdings = _holdings(recipe)
    log = _Log(out, aloud=not simulated)

    def connect(setup: Setup) -> Link:
        if _transport(recipe, simulated) == "messages":
            return FlowerMessages(grid, setup, stop, simulated)
        return _streams(grid, recipe, setup, log)

    remember = not simulated
    return host(recipe, out, mask, connect, progress, log, holdings, remember)


class _Log:
    """Lines with the time, to a file in the run's directory, and in a deployment to stdout."""

    def __init__(self, directory: Path, aloud: bool):
        self._path = directory / "server.log"
        self._aloud = aloud

    def __call__(self, line: str) -> None:
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}"
        if self._aloud:
            print(line, flush=True)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _mask(settings: Settings, progress: Progress, simulated: bool) -> Mask:
    """The run's own mask, the one that is named, or in a simulation the one that is calibrated."""
    kept = mask_path(settings.out)
    if holds_run(settings.out) and kept.exists():
        return host_mask(kept)
    if settings.mask is not None:
        return host_mask(settings.mask)
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
        source.write_text(recipe.to_json())
        command = [sys.executable, "-m", "meerkat", "calibrate", str(source), "--out", str(target)]
        progress.start("Finding the mask", 1)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("meerkat: ")]
            reason = said[-1].removeprefix("meerkat: ") if said else done.stderr[-300:]
            raise MaskError(f"the mask could not be made: {reason}")
        progress.advance()
        return host_mask(target)


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


def _holdings(recipe: Recipe) -> tuple[list[list[int]], str]:
    """Who holds what; in a simulation the data are here."""
    from meerkat.data.holdings import deal, holdings  # a deployed server needs none of it

    task = resolve_task(recipe.task)
    return holdings(task, *deal(recipe, task))


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


def _streams(grid: Grid, recipe: Recipe, setup: Setup, say: Say) -> Link:
    network = recipe.network
    scalars = recipe.federation.local_steps * recipe.noise.perturbations
    scalars = max(scalars, recipe.selection.calibration_steps * recipe.noise.perturbations)
    hub = StreamHub(setup.session, network.listen, 64 * 1024 + 4 * scalars, network.insecure, say)
    host_name = network.listen.rpartition(":")[0]
    if host_name in ("0.0.0.0", "[::]", ""):
        host_name = socket.getfqdn()
    address = network.address or f"{host_name}:{hub.port}"
    say(f"streams are taken at {network.listen.rpartition(':')[0]}:{hub.port}, as {address}")
    return FlowerStreams(grid, setup, hub, address, say)
