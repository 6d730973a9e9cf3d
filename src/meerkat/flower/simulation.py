"""`meerkat run --engine flower`: Flower's simulation from our own command line.

Each client is a node; the nodes share a few worker processes (Ray actors), and each of these loads
the model once.
"""

from __future__ import annotations

import logging
import os
import threading
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns about itself

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from meerkat.config import Recipe
from meerkat.flower.client_app import app as client_app
from meerkat.flower.serving import serve
from meerkat.flower.settings import Settings
from meerkat.progress import Progress
from meerkat.runs.directory import check_free
from meerkat.runs.events import RunObserver
from meerkat.runs.remote_run import check_algorithm

__all__ = ["simulate"]


def simulate(
    recipe: Recipe, directory: Path, observer: RunObserver, progress: Progress, new: bool
) -> dict[str, Any]:
    """See a run through in Flower's simulation; its summary.

    Args:
        new: Must the directory hold no run yet?

    Raises:
        RunError: It does.
        MeerkatError: See `serving.serve`.
    """
    if new:
        check_free(directory)
    check_algorithm(recipe)
    server, stop = ServerApp(), threading.Event()
    settings = Settings(recipe, directory, None)
    found: dict[str, Any] = {}

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        found.update(serve(grid, settings, observer, progress, True, stop))

    if recipe.runtime.cache_dir is not None:  # the workers' caches, too
        os.environ["MEERKAT_CACHE"] = recipe.runtime.cache_dir
    _quiet()
    try:
        run_simulation(
            server, client_app, recipe.federation.clients, backend_config=_backend(recipe)
        )
    finally:
        stop.set()  # the server's thread ends when we do
    return found


def _backend(recipe: Recipe) -> dict[str, Any]:
    """Ray's settings; where RAY_ADDRESS names a cluster, its machines are the workers."""
    init: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    cores = _cores()
    workers = min(recipe.network.workers or cores, recipe.federation.clients)
    if "RAY_ADDRESS" in os.environ:
        init["address"] = os.environ["RAY_ADDRESS"]
    else:
        init |= {"address": "local", "num_cpus": workers, "include_dashboard": False}
    gpus = 0 if recipe.runtime.device == "cpu" else _gpus()
    return {
        "init_args": init,
        "client_resources": {"num_cpus": 1, "num_gpus": min(1.0, gpus / workers)},
    }


def _cores() -> int:
    """Cores that this process may use, or those of the machine where the system has no limit."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gpus() -> int:
    """GPUs that this process may use: those of CUDA_VISIBLE_DEVICES, else all of the driver's."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def _quiet() -> None:
    """Flower's and Ray's own lines are for their developers."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(flwr|ray)\.")
