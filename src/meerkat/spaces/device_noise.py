"""z drawn on a device: the values of `zo.noise` and `zo.directions`, by integers and a gather.

Philox4x64-10 in 64-bit integers, whose products torch keeps modulo 2⁶⁴ on every device; its words
pick tabulated values and signs. Gaussian and orthogonal values, which take float64 arithmetic, are
drawn on the CPU and copied.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cache

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from meerkat.zo.axes import AXES
from meerkat.zo.directions import DirectionKey, PerturbationStream
from meerkat.zo.noise import VALUES_PER_WORD, Kind, NoiseKey, coordinates_of, draw, table
from meerkat.zo.state import Theta

__all__ = ["DevicePerturbationStream", "draw_on", "place_on", "stream_on", "words_on"]

_LOW = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_WORDS_PER_COUNTER = 4
_CPU = torch.device("cpu")
_CHUNK = 2**20
"""Values drawn at a time: what bounds the integers beside them."""
_KEPT, _KEPT_BYTES = 64, 64 * 2**20
"""Most directions that are kept after they were drawn, and most bytes of them; a step's always are,
for the update that follows and for the next client."""


def draw_on(device: torch.device, key: NoiseKey, n: int, kind: Kind) -> Float32[Tensor, " n"]:
    """`zo.noise.draw` of a key as a tensor of a device, bit for bit.

    Raises:
        ValueError: A coordinate is out of range.
    """
    if kind == "gaussian":
        return torch.from_numpy(draw(key, n, kind)).to(device)
    z = torch.empty(n, dtype=torch.float32, device=device)
    per_word, coordinates = VALUES_PER_WORD[kind], coordinates_of(key)
    for low in range(0, n, _CHUNK):
        count = min(_CHUNK, n - low)
        found = words_on(device, key.seed, coordinates, -(-count // per_word), low // per_word)
        if kind == "tabulated":
            # An int64 as four int16 of this machine's order, which is little-endian wherever
            # torch runs; taken modulo 2¹⁶ they are the words that numpy sees.
            places = found.view(torch.int16)[:count].to(torch.int32) & 0xFFFF
            z[low : low + count] = _table_on(device).index_select(0, places)
        else:
            bits = found[:, None] >> torch.arange(64, device=device)
            z[low : low + count] = ((bits & 1) * 2 - 1).flatten()[:count].float()
    return z


def words_on(
    device: torch.device, seed: int, coordinates: Sequence[int], count: int, start: int = 0
) -> Int64[Tensor, " count"]:
    """`zo.noise.words` as the int64 of the same bits."""
    first, skip = divmod(start, _WORDS_PER_COUNTER)
    counters = -(-(skip + count) // _WORDS_PER_COUNTER)
    # numpy steps the counter before it draws.
    low = torch.arange(first + 1, first + 1 + counters, dtype=torch.int64, device=device)
    words = [low, *(torch.full_like(low, _signed(value)) for value in coordinates)]
    keys = [seed & 0xFFFFFFFFFFFFFFFF, seed >> 64]
    for number in range(_ROUNDS):
        if number:
            keys = [key + step & 0xFFFFFFFFFFFFFFFF for key, step in zip(keys, _WEYL, strict=True)]
        high0, low0 = _product(_MULTIPLIERS[0], words[0])
        high1, low1 = _product(_MULTIPLIERS[1], words[2])
        words = [
            high1 ^ words[1] ^ _signed(keys[0]),
            low1,
            high0 ^ words[3] ^ _signed(keys[1]),
            low0,
        ]
    return torch.stack(words, dim=1).flatten()[skip : skip + count]


def _product(factor: int, words: Int64[Tensor, " c"]) -> tuple[Tensor, Tensor]:
    """Upper and lower half of the 128 bits of factor × word, both unsigned.

    By halves of 32 bits; no sum of them is above 2⁶⁴ - 1.
    """
    factor_high, factor_low = factor >> 32, factor & _LOW
    high, low = (words >> 32) & _LOW, words & _LOW
    lows, cross = low * factor_low, low * factor_high
    middle = ((lows >> 32) & _LOW) + (cross & _LOW) + high * factor_low
    upper = high * factor_high + ((cross >> 32) & _LOW) + ((middle >> 32) & _LOW)
    return upper, words * _signed(factor)


def _signed(word: int) -> int:
    """The int64 of the same 64 bits."""
    return word - 2**64 if word >= 2**63 else word


@cache
def _table_on(device: torch.device) -> Float32[Tensor, " 65536"]:
    return torch.from_numpy(table().copy()).to(device)


@dataclass(frozen=True)
class DevicePerturbationStream(PerturbationStream):
    """The same directions, as tensors of a device."""

    device: torch.device = _CPU
    _drawn: OrderedDict[DirectionKey, Tensor] = field(
        default_factory=OrderedDict, repr=False, compare=False
    )

    def z(self, key: DirectionKey) -> Theta:
        if key in self._drawn:
            self._drawn.move_to_end(key)
            return self._drawn[key]
        if self.kind == "orthogonal" or key.client == AXES:
            z = torch.tensor(super().z(key), device=self.device)
        else:
            z = draw_on(self.device, self.coordinates(key), self.n, self.kind)
        self._drawn[key] = z
        most = max(self.perturbations, min(_KEPT, _KEPT_BYTES // z.nbytes))
        while len(self._drawn) > most:
            self._drawn.popitem(last=False)
        return z


def stream_on(device: torch.device, stream: PerturbationStream) -> DevicePerturbationStream:
    """A stream's directions as tensors of a device."""
    same = {field.name: getattr(stream, field.name) for field in fields(PerturbationStream)}
    return DevicePerturbationStream(**same, device=device)


def place_on(device: torch.device, array: np.ndarray | Tensor) -> Tensor:
    """An array's copy on a device, or a tensor that is there."""
    return array.to(device) if isinstance(array, Tensor) else torch.tensor(array, device=device)
