"""What a journal holds besides rounds: where a run starts from, and what was measured."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Self

import numpy as np
from jaxtyping import Float32, Int64

from meerkat.algorithms import make_algorithm
from meerkat.config import Recipe, parse_recipe
from meerkat.errors import JournalError, RecipeError
from meerkat.federation.algorithm import Algorithm
from meerkat.spaces.mask_file import Mask
from meerkat.zo import noise

__all__ = ["Checkpoint", "Evaluated", "Header", "Renewal", "RoundMetrics", "header_of"]


@dataclass(frozen=True)
class Header:
    """What a run starts from."""

    recipe: str
    """The recipe as JSON."""
    fingerprint: str
    """The recipe's fingerprint."""
    model: str
    """The base model's fingerprint."""
    configuration: str
    """Digest of its configuration and tokenizer, as `transport.handshake.Proof` has it."""
    space: str
    """Fingerprint of the space, which for a mask is the mask's digest."""
    size: int
    """n, values of θ."""
    mask: str
    """The mask's digest."""
    mask_kind: str
    mask_size: int
    eligible: int
    mask_parts: dict[str, int]
    """Masked parameters in each tensor."""
    noise: str
    """The noise generator's fingerprint."""
    labels: list[str]
    label_counts: list[list[int]]
    """Examples of each label that each client holds; empty where only the clients know."""
    partition: str
    """Digest of which client holds which examples; empty where only the clients know."""

    @cached_property
    def parsed(self) -> Recipe:
        """The recipe.

        Raises:
            JournalError: This version does not know it.
        """
        try:
            return parse_recipe(json.loads(self.recipe), origin="the journal's recipe")
        except RecipeError as error:
            raise JournalError(f"{error}; use the version of meerkat-fl that wrote it") from None

    @cached_property
    def algorithm(self) -> Algorithm:
        """The run's algorithm: all that replay needs."""
        return make_algorithm(self.parsed, self.size)


def header_of(
    recipe: Recipe,
    mask: Mask,
    labels: Sequence[str],
    label_counts: list[list[int]],
    partition: str,
) -> Header:
    """What the journal of a run over a mask starts with; the arguments are its fields."""
    return Header(
        recipe=recipe.to_json(),
        fingerprint=recipe.fingerprint,
        model=mask.model,
        configuration=mask.configuration,
        space=mask.fingerprint,
        size=mask.dimensions,
        mask=mask.digest,
        mask_kind=mask.kind,
        mask_size=mask.size,
        eligible=mask.eligible,
        mask_parts={n: len(i) for n, i in zip(mask.names, mask.indices, strict=True)},
        noise=noise.fingerprint(),
        labels=list(labels),
        label_counts=label_counts,
        partition=partition,
    )


@dataclass(frozen=True)
class RoundMetrics:
    """What was measured beside a round; nothing is computed from it."""

    loss: float
    """Mean training loss of the clients; known in simulation only."""
    bytes_up: int
    """Encoded size of all reports."""
    bytes_down: int
    """Encoded size of all plans."""
    seconds: float


@dataclass(frozen=True, eq=False)
class Renewal:
    """A subspace made in mid-run, and the state that its rounds start from."""

    round: int
    """The first round that is in it."""
    position: int
    """Updates of the log before it."""
    space: str
    """Fingerprint of the mask with it, whose file is in the run's directory."""
    start: Float32[np.ndarray, " k"]
    """w before that round; w = 0 are the weights that the rounds before have led to."""

    def encode(self) -> bytes:
        """Bytes of it."""
        head = struct.pack("<QQ32s", self.round, self.position, bytes.fromhex(self.space))
        return head + self.start.astype("<f4").tobytes()

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """The renewal in these bytes, which are sealed by the journal."""
        round, position, space = struct.unpack_from("<QQ32s", data)
        start = np.frombuffer(data, "<f4", offset=struct.calcsize("<QQ32s")).astype(np.float32)
        return cls(round, position, space.hex(), start)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """All that a server needs to go on from a round, without reading the rounds before."""

    round: int
    """The round to come."""
    position: int
    """Updates of the log so far."""
    state: bytes
    """`ModelState.to_bytes`."""
    known: Int64[np.ndarray, " K"]
    steps_taken: Int64[np.ndarray, " K"]
    usual: tuple[float, ...]
    """As in `federation.state.ServerState`, like the two before."""

    def encode(self) -> bytes:
        """Bytes of it: lengths, then what they are of."""
        parts = [
            self.state,
            self.known.astype("<i8").tobytes(),
            self.steps_taken.astype("<i8").tobytes(),
            np.array(self.usual, "<f8").tobytes(),
        ]
        head = struct.pack("<QQ4Q", self.round, self.position, *map(len, parts))
        return head + b"".join(parts)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """The checkpoint in these bytes, which are sealed by the journal."""
        round, position, *lengths = struct.unpack_from("<QQ4Q", data)
        ends = list(accumulate(lengths, initial=struct.calcsize("<QQ4Q")))
        state, known, taken, usual = (data[a:b] for a, b in pairwise(ends))
        return cls(
            round,
            position,
            state,
            np.frombuffer(known, "<i8").astype(np.int64),
            np.frombuffer(taken, "<i8").astype(np.int64),
            tuple(np.frombuffer(usual, "<f8").tolist()),
        )


@dataclass(frozen=True)
class Evaluated:
    """An evaluation at the state before round `round`."""

    round: int
    metrics: dict[str, float]
    """By name (`tasks.metrics`), the loss first; NaN where there was nothing to evaluate on."""
    examples: int
    seconds: float
