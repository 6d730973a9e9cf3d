"""Directions of a run: which keys a client's step has, and the z of a key.

A key names coordinates of the noise. In the log it stands for its direction, so that 12 bytes are
sent instead of n values (method.md section 3, Noise, and section 6).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from threading import Lock
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Float32

from meerkat.zo.axes import AXES, Along, axis
from meerkat.zo.noise import SHARED, Kind, NoiseKey, draw
from meerkat.zo.orthogonal import orthogonal_direction

__all__ = ["DirectionKey", "DirectionKind", "FreshKeys", "KeyScheme", "PerturbationStream"]

DirectionKind: TypeAlias = Kind | Literal["orthogonal"]
"""Independent values of z, or directions that are orthogonal in blocks."""

_KEPT_BYTES = 64 * 2**20
"""Most bytes of a run's directions that are kept after they were drawn."""
_SMALL = 2**16
"""Bytes that even a small direction counts for, so that there are never many."""


@dataclass(frozen=True)
class DirectionKey:
    """Coordinates of one direction within a run."""

    round: int
    step: int
    perturbation: int = 0
    client: int = SHARED
    """Whose direction it is: `noise.SHARED`, a client's number, or a mark such as `POOL`
    or `AXES`."""


@runtime_checkable
class KeyScheme(Protocol):
    """How the keys of a step are chosen; a pure function of its arguments."""

    def key(self, seed: int, place: DirectionKey) -> DirectionKey:
        """The key of the direction that is used at this place of the run."""


@dataclass(frozen=True)
class FreshKeys:
    """A new direction for each place: the key is the place itself (the default)."""

    def key(self, seed: int, place: DirectionKey) -> DirectionKey:
        return place


@dataclass(frozen=True)
class PerturbationStream:
    """All directions of a run: what server, clients and replay draw from."""

    seed: int
    n: int
    """Values of a direction: those of θ."""
    kind: DirectionKind = "gaussian"
    shared: bool = True
    """One direction for all clients of a step, or one for each client."""
    perturbations: int = 1
    """Q, directions that a step averages over."""
    scheme: KeyScheme = field(default_factory=FreshKeys)
    local_steps: int = 1
    clients: int = 1
    """Steps of a round, and clients of the run: what orthogonal directions are counted by."""

    def owner(self, client: int) -> int:
        """Whose direction a client's step goes along."""
        return SHARED if self.shared else client

    def count(self, along: Along) -> int:
        """Directions of a step: Q that are drawn, or the n axes."""
        return self.n if along == "axes" else self.perturbations

    def keys(
        self, round: int, step: int, client: int, along: Along = "drawn"
    ) -> tuple[DirectionKey, ...]:
        """Keys of the directions of a client's local step."""
        if along == "axes":  # the same in every step
            return tuple(DirectionKey(0, 0, q, AXES) for q in range(self.n))
        owner = self.owner(client)
        return tuple(
            self.scheme.key(self.seed, DirectionKey(round, step, q, owner))
            for q in range(self.perturbations)
        )

    def z(self, key: DirectionKey) -> Float32[np.ndarray, " n"]:
        """z(r, t) of method.md section 1; read-only.

        The same z is needed by each client of a process, by the server, and by who catches up, so
        those that were drawn last are kept.

        Raises:
            ValueError: It is the key of an axis that there is not.
        """
        if key.client == AXES:
            return axis(self.n, key.perturbation)
        if self.kind == "orthogonal":
            lap, place = self._place(key)
            return orthogonal_direction(self.seed, lap, place, self.n)
        return _recent(self.coordinates(key), self.n, self.kind)

    def coordinates(self, key: DirectionKey) -> NoiseKey:
        """What a key's values are drawn by, where they are independent."""
        return NoiseKey(self.seed, key.round, key.step, key.perturbation, key.client)

    def _place(self, key: DirectionKey) -> tuple[int, int]:
        """Which sequence of directions, and how many of it come before: round by round, step by
        step, client by client. Steps beyond those of a round (a calibration's) have sequences of
        their own."""
        lap, step = divmod(key.step, self.local_steps)
        place = key.round * self.local_steps + step
        if not self.shared:
            place = place * self.clients + key.client
        return lap, place * self.perturbations + key.perturbation


_kept: OrderedDict[tuple[NoiseKey, int, Kind], Float32[np.ndarray, " n"]] = OrderedDict()
_keeping = Lock()


def _recent(key: NoiseKey, n: int, kind: Kind) -> Float32[np.ndarray, " n"]:
    """`draw`, from what was drawn last if it is there."""
    name = (key, n, kind)
    with _keeping:
        if name in _kept:
            _kept.move_to_end(name)
            return _kept[name]
    z = draw(key, n, kind)
    z.setflags(write=False)
    with _keeping:
        _kept[name] = z
        # The newest is kept whatever its size: all clients of a step need it in turn.
        while len(_kept) > max(1, _KEPT_BYTES // max(z.nbytes, _SMALL)):
            _kept.popitem(last=False)
    return z
