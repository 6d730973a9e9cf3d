"""A run whose clients are elsewhere: this side has no model and no data."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from meerkat import noise
from meerkat.descent import Theta
from meerkat.directory import carry_out, claimed, finished, holds_run, recipe_of
from meerkat.engines import Engine
from meerkat.engines.remote import RemoteEngine
from meerkat.errors import MaskError, RunError
from meerkat.links import Link
from meerkat.mask.file import Mask, load_mask, save_mask
from meerkat.progress import Progress
from meerkat.protocol import Proof, Setup
from meerkat.recipe import Recipe
from meerkat.records import Evaluated, header_of
from meerkat.server.state import Log, ServerState
from meerkat.tasks import resolve_task
from meerkat.training import Evaluate

__all__ = ["host", "host_mask"]


def host(
    recipe: Recipe,
    directory: Path,
    mask: Mask,
    connect: Callable[[Setup], Link],
    progress: Progress,
    say: Callable[[str], None],
    holdings: tuple[list[list[int]], str] = ([], ""),
    remember: bool = False,
) -> dict[str, Any]:
    """See a run through, from its first round or from where its journal ends; its summary.

    Args:
        mask: With θ_0, as `meerkat calibrate --out` writes it.
        connect: Makes the transport, which brings each node the setup.
        say: Takes a line for the log.
        holdings: Who holds how many examples of each label, and a digest of that; in a simulation.
        remember: Does each message come to a new process?

    Raises:
        RunError: The directory holds another run, or too few clients are there.
        MeerkatError: See `training.train`.
    """
    claim: AbstractContextManager[None] = nullcontext()
    if not holds_run(directory):
        claim = claimed(directory, recipe)
    else:
        _check_recipe(directory, recipe)
        summary = finished(directory, recipe)
        if summary is not None:
            return summary
    with claim:
        labels = resolve_task(recipe.task).verbalizers
        header = header_of(recipe, mask, labels, *holdings)
        proof = Proof(header.model, header.mask, noise.fingerprint())
        link = connect(Setup(recipe.to_json(), proof, secrets.token_hex(16), remember))
        file = cache(lambda: _for_clients(mask))
        engine = RemoteEngine(link, recipe, proof, file, say, progress.advance)

        def crew(state: ServerState, log: Log) -> tuple[Engine, Evaluate]:
            def evaluate(round: int, theta: Theta) -> Evaluated:
                return engine.evaluate(round, theta, log, len(labels))

            return engine, evaluate

        reason = "the server stopped before the end"
        try:
            summary = carry_out(directory, recipe, header, mask, crew, progress)
            reason = "the run is complete"
            return summary
        finally:
            engine.close(reason)


def _check_recipe(directory: Path, recipe: Recipe) -> None:
    """Is the run that a directory holds of this recipe?"""
    kept = recipe_of(directory)
    if kept.fingerprint != recipe.fingerprint:
        raise RunError(
            f"{directory} holds another run (fingerprint {kept.fingerprint[:12]}, this recipe's is "
            f"{recipe.fingerprint[:12]}); choose another directory, or put the recipe back"
        )


def host_mask(path: Path) -> Mask:
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


def _for_clients(mask: Mask) -> bytes:
    """The mask as a file, without what clients have or need not know."""
    bare = replace(mask, gradient=None, initial=None, concentration=None)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "mask"
        save_mask(bare, path)
        return path.read_bytes()
