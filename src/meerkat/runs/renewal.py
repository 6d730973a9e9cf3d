"""When the subspace of a run is made again, and how the run goes on in it (method.md section 9).

A renewal is in the journal before the first round that is in it, and its mask in the run's
directory before that, so a run that is resumed goes on with the same one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from meerkat.config import Recipe
from meerkat.engines.base import Engine
from meerkat.errors import MaskError, RunError
from meerkat.federation.state import ServerState
from meerkat.journal import Journal
from meerkat.journal.records import Renewal
from meerkat.runs.directory import renewed_mask, renewed_mask_path
from meerkat.spaces.mask_file import Mask, load_mask
from meerkat.zo.log import Log

__all__ = ["MakeMask", "Renewals", "is_due", "wait_for_file"]

_logger = logging.getLogger("meerkat")

MakeMask = Callable[[Path, Mask, Float32[np.ndarray, " n"]], None]
"""(where to write it, mask of before, weights of now) → the file of the mask as it is renewed."""

_LOOK_EVERY = 0.2
"""Seconds between looks for a file that another process makes."""


def is_due(recipe: Recipe, round: int) -> bool:
    """Is a subspace made before this round?"""
    every = recipe.subspace.renew_every if recipe.subspace is not None else 0
    return every > 0 and 0 < round < recipe.federation.rounds and round % every == 0


class Renewals:
    """Has the subspace of a run made again, and moves state, log and engine into it.

    Args:
        mask: That the run began with.
        make: Writes the file of a renewed mask, or waits until another process has.
        renewed: Called with each renewal once it is in the journal and the run is in it.
    """

    def __init__(
        self,
        recipe: Recipe,
        directory: Path,
        journal: Journal,
        mask: Mask,
        make: MakeMask,
        renewed: Callable[[Renewal], None] = lambda renewal: None,
    ):
        self._recipe, self._directory, self._journal = recipe, directory, journal
        self._make, self._told = make, renewed
        self.mask = mask
        """That the run is in."""
        self.begins = 0
        """Position of the log at which it begins."""
        renewals = journal.renewals()
        if renewals:
            self.mask = renewed_mask(directory, journal.header, renewals[-1])
            self.begins = renewals[-1].position
        self._last = renewals[-1].round if renewals else 0

    def before_round(self, state: ServerState, log: Log, engine: Engine) -> ServerState:
        """The state to go on with: w = 0 of a new subspace at the same weights, where it is due.

        Raises:
            MaskError: The new mask does not fit the run.
            RunError: It was not made in time.
        """
        if not is_due(self._recipe, state.round) or self._last == state.round:
            return state
        mask = self._renewed(state)
        assert mask.start is not None, "it has a subspace"
        renewal = Renewal(state.round, len(log), mask.fingerprint, mask.start)
        self._journal.append_renewal(renewal)
        self.mask, self.begins, self._last = mask, renewal.position, state.round
        log.restart()
        model = self._journal.header.algorithm.init(mask.start)
        engine.renew(mask, renewal.position, model, renewal.position)
        self._told(renewal)
        return replace(state, model=model)

    def _renewed(self, state: ServerState) -> Mask:
        """The mask for the round to come: one that was made before a crash, or a new one."""
        path = renewed_mask_path(self._directory, state.round)
        weights = self.mask.weights(state.model.theta)
        if path.exists():
            try:
                return _checked(load_mask(path), self.mask, weights)
            except MaskError as error:
                _logger.warning("%s; it is made again", error)
                path.unlink()
        self._make(path, self.mask, weights)
        return _checked(load_mask(path), self.mask, weights)


def _checked(made: Mask, former: Mask, weights: Float32[np.ndarray, " n"]) -> Mask:
    """A renewed mask, if it goes on where the former one has led to.

    Raises:
        MaskError: It is of another model, other coordinates, another k, or other weights.
    """
    same = (made.model, made.digest, made.dimensions) == (
        former.model,
        former.digest,
        former.dimensions,
    )
    if not same or made.subspace is None or made.subspace.base is None:
        raise MaskError("the renewed mask is not over the model, coordinates and k of the run")
    if made.subspace.base.tobytes() != weights.tobytes():
        raise MaskError("the renewed mask was made at other weights than those of this run now")
    return made


def wait_for_file(
    patience: float, say: Callable[[str], None], meanwhile: Callable[[], None] = lambda: None
) -> MakeMask:
    """Waits for a mask that `meerkat recalibrate` makes beside a server without a model.

    Args:
        patience: Seconds.
        say: Takes a line for the log.
        meanwhile: Called again and again while there is none.
    """

    def wait(path: Path, mask: Mask, weights: Float32[np.ndarray, " n"]) -> None:
        way = f"`meerkat recalibrate {path.parent}` where the model is"
        say(f"waiting for {path.name}, which {way} makes")
        end = time.monotonic() + patience
        while not path.exists():
            if time.monotonic() >= end:
                raise RunError(
                    f"{path.name} was not made in network.patience = {patience:g} s; start {way}, "
                    "and the server again: the run goes on"
                )
            meanwhile()
            time.sleep(_LOOK_EVERY)

    return wait
