"""Plans and reports, the messages of a round; their encoding is in `transport.messages`."""

from __future__ import annotations

from dataclasses import dataclass

from meerkat.zo.axes import Along
from meerkat.zo.log import Update

__all__ = ["CALIBRATION", "DIGEST_BYTES", "ClientReport", "RoundPlan"]

CALIBRATION = 2**32 - 1
"""The round of a calibration plan, which starts from the initial state (method.md section 5)."""

DIGEST_BYTES = 8
"""Leading bytes of a state's digest that a report carries."""


@dataclass(frozen=True)
class RoundPlan:
    """What the server asks of one client in one round."""

    round: int
    steps: int
    """T_k."""
    learning_rate: float
    """η of the round, a float32."""
    first_step: int
    """Steps that the client took before: where it stands in its batch order."""
    log_start: int
    """How many updates of the log the server believes the client to have."""
    updates: tuple[Update, ...] = ()
    """The log from there on."""
    along: Along = "drawn"
    """What the report is to be along: "axes" asks for the exact gradient."""


@dataclass(frozen=True)
class ClientReport:
    """What a client answers: one scalar for each local step and direction."""

    round: int
    client: int
    examples: int
    """Examples that the client holds, for weighted aggregation."""
    steps: int
    """T_k."""
    perturbations: int
    """Directions of a step: those that were drawn, or all axes."""
    state_digest: bytes
    """Leading bytes of the digest of the state that it started from."""
    scalars: tuple[float, ...]
    """g, float32 values; step by step, and within a step by direction."""
    along: Along = "drawn"
    """The axes where it is the exact gradient."""
