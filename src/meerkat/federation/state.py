"""What the server knows between two rounds: the model's state, and O(K) integers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from meerkat.zo.state import ModelState

__all__ = ["ServerState", "initial_state"]


@dataclass(frozen=True)
class ServerState:
    """The state before a round; `rounds.close_round` makes the next one."""

    round: int
    """Number of the round to come, from 0."""
    model: ModelState
    """θ_r, and the slots of its update rule."""
    known: Int64[np.ndarray, " K"]
    """Updates of the log that each client has."""
    steps_taken: Int64[np.ndarray, " K"]
    """Local steps that each client took: where it stands in its batch order."""
    local_steps: Int64[np.ndarray, " K"]
    """T_k."""
    usual: tuple[float, ...] = ()
    """`aggregation.usual_size` of the last rounds, at most `rounds.WINDOW`."""


def initial_state(model: ModelState, clients: int, local_steps: int) -> ServerState:
    """The state before round 0, with `local_steps` for every client."""
    known, taken = np.zeros(clients, np.int64), np.zeros(clients, np.int64)
    steps = np.full(clients, local_steps, np.int64)
    for array in (known, taken, steps):
        array.setflags(write=False)
    return ServerState(0, model, known, taken, steps)
