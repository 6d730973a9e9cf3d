"""What `meerkat plan` says: figures of a run by section."""

from __future__ import annotations

from dataclasses import asdict, dataclass

__all__ = [
    "ByteFigures",
    "DiskFigures",
    "MemoryFigures",
    "ModelFigures",
    "PassFigures",
    "Plan",
    "TimeFigures",
]


@dataclass(frozen=True)
class ModelFigures:
    """The model, and where θ may move in it."""

    parameters: int
    eligible: int
    """Parameters that the mask is chosen from."""
    masked: int
    """n; of a union mask the most that it may have."""
    moving: int
    """Values of the training state: n, or the k of a subspace."""
    blocks: int
    """Decoder blocks."""
    kept_blocks: int
    """The first of them, which are computed once for a batch (`runtime.prefix_cache`)."""


@dataclass(frozen=True)
class PassFigures:
    """Passes of one example through the model. A backward pass is on top of its forward pass."""

    forward_a_step: int
    """By one client in one local step, for all its directions and examples."""
    backward_a_step: int
    training: int
    """Forward passes by all clients in the whole run, if it does not end by its patience."""
    evaluating: int
    """Test and validation examples, in all evaluations of such a run."""


@dataclass(frozen=True)
class ByteFigures:
    """Bytes of the messages; what a transport puts around them is not counted."""

    up_a_client_round: int
    down_a_client_round: float
    """With the part of the log that a client lacks, on average over a run."""
    up: int
    down: int
    once: int
    """Mask and subspace, sent to each client once."""


@dataclass(frozen=True)
class MemoryFigures:
    """Bytes in main or device memory."""

    weights: int
    """In the type that the forward pass computes in, or in the bits of `runtime.weights`: those are
    loaded first, and then quantised matrix by matrix."""
    activations: int
    """Of one pass, or with exact reports of those that are kept for the backward pass. Estimated,
    for examples as long as `task.max_length`."""
    client: int
    """Those two, mask, subspace and state, and `runtime.prefix_cache` where it is used."""
    server: int
    """Mask, subspace and state: a server has no model."""
    making_the_mask: int
    """Once, where it is calibrated."""
    making_the_subspace: int
    """Once; more than 1 GiB of scores are kept in a file meanwhile, which is not counted."""


@dataclass(frozen=True)
class DiskFigures:
    """Bytes on disk."""

    model: int
    """A client's: weights as they are stored."""
    mask: int
    """Mask and subspace."""
    journal: int
    """After the last round; the two checkpoints that it keeps included."""


@dataclass(frozen=True)
class TimeFigures:
    """Seconds on this machine, where one process computes one client after the other."""

    forward: float
    """One pass over a batch of the recipe's own examples."""
    step: float
    """One local step of one client."""
    mask: float
    subspace: float
    """To make it, and to ask whether it fits."""
    training: float
    evaluating: float


@dataclass(frozen=True)
class Plan:
    """What a run will need."""

    model: ModelFigures
    passes: PassFigures
    bytes: ByteFigures
    memory: MemoryFigures
    disk: DiskFigures
    seconds: TimeFigures | None = None

    def as_dict(self) -> dict[str, dict[str, float]]:
        """All figures by section and name."""
        return {name: part for name, part in asdict(self).items() if part is not None}
