"""The server of a run whose clients are other processes; it loads no model and no data."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from meerkat.algorithms import make_algorithm
from meerkat.config import Recipe
from meerkat.engines.base import Engine
from meerkat.engines.remote import RemoteEngine
from meerkat.errors import MaskError, RecipeError, RunError
from meerkat.federation.algorithm import RememberingAlgorithm
from meerkat.federation.schedule import Schedule
from meerkat.federation.state import ServerState
from meerkat.journal.records import Evaluated, header_of
from meerkat.progress import Progress
from meerkat.runs.directory import claimed, holds_run, recipe_of
from meerkat.runs.driver import Evaluator
from meerkat.runs.events import RunObserver
from meerkat.runs.execution import execute, summary_if_complete
from meerkat.runs.lock import locked
from meerkat.runs.renewal import MakeMask, wait_for_file
from meerkat.spaces.mask_file import Mask, load_mask
from meerkat.spaces.subspace import check_subspace
from meerkat.tasks import resolve_task
from meerkat.tasks.losses import training_loss
from meerkat.tasks.metrics import metrics_of
from meerkat.transport.base import Transport
from meerkat.transport.handshake import Proof
from meerkat.transport.server_frames import Setup
from meerkat.zo import noise
from meerkat.zo.log import Log
from meerkat.zo.state import ModelState

__all__ = ["check_algorithm", "host", "load_server_mask"]


def check_algorithm(recipe: Recipe, n: int = 1) -> None:
    """Can a recipe's algorithm run with clients elsewhere?

    Raises:
        RecipeError: It cannot, or a choice of it is wrong.
    """
    if isinstance(make_algorithm(recipe, n), RememberingAlgorithm):
        raise RecipeError(
            f"algorithm = {recipe.algorithm.kind!r} has clients that carry a vector from round to "
            "round, which is only kept where runtime.engine = 'local'; take another"
        )


def host(
    recipe: Recipe,
    directory: Path,
    mask: Mask,
    connect: Callable[[Setup], Transport],
    observer: RunObserver,
    progress: Progress,
    say: Callable[[str], None],
    label_counts: tuple[list[list[int]], str] = ([], ""),
    remember: bool = False,
    trusted: bool = False,
    make_mask: MakeMask | None = None,
) -> dict[str, Any]:
    """See a run through, from its first round or from where its journal ends; its summary.

    Args:
        mask: With θ_0, as `meerkat calibrate --out` writes it.
        connect: Makes the transport, which brings each node the setup.
        say: Takes a line for the log.
        label_counts: Examples of each label that each client holds, and a digest of who holds
            which; known in a simulation.
        remember: Does each message come to a new process?
        trusted: Are the clients processes of one simulation? Where all of them fail, it ends.
        make_mask: Writes a mask whose subspace is renewed; by default a calibrator does, which is
            waited for.

    Raises:
        RunError: The directory holds another run, or too few clients are there.
        MaskError: The mask's subspace is not what the recipe asks for.
        MeerkatError: See `driver.train`.
    """
    with locked(directory), ExitStack() as claim:
        if not holds_run(directory):
            claim.enter_context(claimed(directory, recipe))
        else:
            _check_recipe(directory, recipe)
            summary = summary_if_complete(directory, recipe, observer)
            if summary is not None:
                return summary
        check_algorithm(recipe, mask.dimensions)  # a wrong choice shows before any client joins
        task = resolve_task(recipe.task)
        training_loss(recipe, task)
        check_subspace(mask.subspace, recipe.subspace, task)
        metrics = metrics_of(recipe.evaluation.metrics, task.has_classes, task.has_pairs)
        header = header_of(recipe, mask, task.verbalizers, *label_counts)
        proof = Proof(
            header.model, header.space, noise.fingerprint(), header.configuration, mask.probe
        )
        setup = Setup(recipe.for_clients.to_json(), proof, secrets.token_hex(16), remember)
        federation, network = recipe.federation, recipe.network
        exact = Schedule.of(recipe).must_be_exact
        engines: list[RemoteEngine] = []

        def tend() -> None:
            for engine in engines:
                engine.tend()

        make = make_mask or wait_for_file(network.patience, say, tend)

        def start_engine(
            state: ServerState, log: Log, mask: Mask, begins: int
        ) -> tuple[Engine, Evaluator]:
            own = replace(setup, proof=replace(proof, space=mask.fingerprint), position=begins)
            engine = RemoteEngine(
                connect(own), federation, network, own, mask, say, progress.advance, trusted, exact
            )
            engines.append(engine)

            def evaluate(round: int, state: ModelState) -> Evaluated:
                classes = max(1, len(task.verbalizers))
                validates = recipe.evaluation.validation > 0
                return engine.evaluate(round, state, log, metrics, classes, validates)

            return engine, evaluate

        reason = "the server stopped before the end"
        try:
            summary = execute(
                directory, recipe, header, mask, start_engine, make, observer, progress
            )
            reason = "the run is complete"
            return summary
        finally:
            for engine in engines:
                engine.close(reason)


def _check_recipe(directory: Path, recipe: Recipe) -> None:
    """Is the run that a directory holds of this recipe?"""
    kept = recipe_of(directory)
    if kept.fingerprint != recipe.fingerprint:
        raise RunError(
            f"{directory} holds another run (fingerprint {kept.fingerprint[:12]}, this recipe's is "
            f"{recipe.fingerprint[:12]}); choose another directory, or put the recipe back"
        )


def load_server_mask(path: Path) -> Mask:
    """A mask file that a server can start from.

    Raises:
        MaskError: It is missing or damaged, or lacks the initial parameters.
    """
    mask = load_mask(path)
    if mask.initial is None:
        raise MaskError(
            f"mask {path} lacks the initial parameters, which a server without a model starts "
            "from; make it with `meerkat calibrate RECIPE --out FILE`"
        )
    return mask
