"""(run seed, round, step, perturbation, client) → z, a pure function of its coordinates.

Formal guarantees, each with a test in `tests/unit/test_noise.py`:

1. `draw(key, n)` is the same float32 vector on every machine, for any thread count, at any time.
   Raw words come from Philox4x64-10 (Salmon et al., SC 2011), a counter-based generator whose
   stream numpy keeps stable. What follows uses only IEEE-754 operations that are exact or
   correctly rounded (+, -, *, /, sqrt, frexp, comparisons): no libm function, whose last
   bit differs between machines, takes part.
2. Any slice can be drawn alone: `draw(key, n)[a:b]` equals `draw(key, b - a, start=a)` for a
   multiple of `BLOCK`.
3. Two keys that differ in any field never share a counter, so their streams do not overlap.

Gaussian values are Φ⁻¹ of 32-bit uniforms, by Wichura's AS 241 (PPND16) in float64, then
rounded to float32. The largest magnitude is 6.34. Tabulated ones are Φ⁻¹ at the middles of 65,536
equal parts, scaled to variance one, each drawn by 16 bits: a fifth of the time. Their largest
magnitude is 4.32, and their fourth moment 2.999.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from jaxtyping import Float32, Float64
from numpy.typing import NDArray

__all__ = [
    "BLOCK",
    "SHARED",
    "VALUES_PER_WORD",
    "Kind",
    "NoiseKey",
    "coordinates_of",
    "draw",
    "fingerprint",
    "permutation",
    "table",
    "uniform",
    "words",
]

Kind = Literal["gaussian", "tabulated", "rademacher"]

SHARED = 2**32 - 1
"""The client of a direction that all clients share."""

BLOCK = 8192
"""Values drawn at a time; small enough that the temporaries stay in the cache of a core."""

_WORDS_PER_COUNTER = 4
VALUES_PER_WORD: Mapping[Kind, int] = {"gaussian": 2, "tabulated": 4, "rademacher": 64}
"""Values that the 64 bits of one raw word give."""
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_SIGNS = _BITS.astype(np.float32) * np.float32(2) - np.float32(1)
"""The signs that the bits of a byte stand for, the lowest first."""
_DOMAIN_NOISE, _DOMAIN_PERMUTATION, _DOMAIN_UNIFORM = 0, 1, 4
"""Others: 2 is the random mask's (`spaces.mask_criteria`), 3 the seed pool's (`zo.seed_pool`)."""


@dataclass(frozen=True)
class NoiseKey:
    """Coordinates of one z (method.md section 3, Noise)."""

    seed: int
    round: int
    step: int
    perturbation: int = 0
    client: int = SHARED


def draw(
    key: NoiseKey, n: int, kind: Kind = "gaussian", start: int = 0
) -> Float32[np.ndarray, " n"]:
    """z[start : start + n] of a key.

    Args:
        start: First value, a multiple of `BLOCK`.

    Raises:
        ValueError: `start` is not a multiple of `BLOCK`, or a coordinate is out of range.
    """
    if start % BLOCK:
        raise ValueError(f"start = {start} is not a multiple of {BLOCK}")
    coordinates = coordinates_of(key)
    z = np.empty(n, np.float32)
    values_per_word = VALUES_PER_WORD[kind]
    for low in range(0, n, BLOCK):
        count = min(BLOCK, n - low)
        raw = words(
            key.seed, coordinates, -(-count // values_per_word), (start + low) // values_per_word
        )
        if kind == "rademacher":
            signs = np.take(_SIGNS, raw.astype("<u8").view(np.uint8), axis=0)
            z[low : low + count] = signs.reshape(-1)[:count]
        elif kind == "tabulated":
            z[low : low + count] = np.take(table(), raw.astype("<u8").view("<u2")[:count])
        else:
            halves = raw.astype("<u8").view("<u4")[:count]
            z[low : low + count] = _normal((halves + 0.5) * 2.0**-32)
    return z


def coordinates_of(key: NoiseKey) -> list[int]:
    """The three words of the counter that say which stream it is; the lowest counts within it.

    Raises:
        ValueError: A coordinate is out of range.
    """
    if not (0 <= key.step < 2**32 and 0 <= key.perturbation < 2**16 and 0 <= key.client <= SHARED):
        raise ValueError(f"{key}: a coordinate is out of range")
    return [key.round, key.step | key.perturbation << 32, key.client | _DOMAIN_NOISE << 32]


def words(seed: int, coordinates: list[int], count: int, start: int = 0) -> NDArray[np.uint64]:
    """Raw Philox words start … start + count of the stream (seed, coordinates).

    Raises:
        ValueError: A coordinate or the seed is out of range; numpy would wrap or round it.
    """
    if not all(0 <= coordinate < 2**63 for coordinate in (start, *coordinates)):
        raise ValueError(f"start = {start}, coordinates {coordinates}: one is out of range")
    skip = start % _WORDS_PER_COUNTER
    # numpy steps the counter before it draws; its value for counter c is that of c + 1.
    philox = np.random.Philox(key=seed, counter=[start // _WORDS_PER_COUNTER, *coordinates])
    return philox.random_raw(skip + count)[skip:]


def permutation(seed: int, coordinates: tuple[int, int], n: int) -> NDArray[np.int64]:
    """A permutation of range(n) that is the same on every machine."""
    raw = words(seed, [coordinates[0], coordinates[1], _DOMAIN_PERMUTATION << 32], n)
    return np.argsort(raw, kind="stable")


def uniform(seed: int, coordinates: tuple[int, int], n: int) -> Float64[np.ndarray, " n"]:
    """n values of the open interval (-1, 1), by 32 bits each; exact, and the same on every machine.

    >>> values = uniform(0, (0, 0), 10_000)
    >>> bool((abs(values) < 1).all()), round(float(abs(values).mean()), 2)
    (True, 0.5)
    """
    raw = words(seed, [coordinates[0], coordinates[1], _DOMAIN_UNIFORM << 32], -(-n // 2))
    halves = raw.astype("<u8").view("<u4")[:n]
    return (halves + 0.5) * 2.0**-31 - 1.0


def fingerprint() -> str:
    """What a client shows to prove that its generator yields the same noise as the server's.

    Tabulated values are not in it: they are those of `_normal`, which it covers, found by integers.
    """
    digest = hashlib.sha256()
    for kind in ("gaussian", "rademacher"):
        digest.update(draw(NoiseKey(1, 2, 3, 4, 5), 20_000, kind).astype("<f4").tobytes())
    return digest.hexdigest()


@cache
def table() -> Float32[np.ndarray, " 65536"]:
    """Tabulated values, ascending; symmetric, so that their mean is zero."""
    upper = _normal((np.arange(2**15, 2**16) + 0.5) * 2.0**-16)
    upper /= math.sqrt(math.fsum((upper * upper).tolist()) / len(upper))
    table = np.concatenate([-upper[::-1], upper]).astype(np.float32)
    table.setflags(write=False)
    return table


# AS 241 (Wichura, Applied Statistics 37, 1988), PPND16, highest degree first.
_CENTRAL_TOP = (2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4,
                4.5921953931549871457e4, 1.3731693765509461125e4, 1.9715909503065514427e3,
                1.3314166789178437745e2, 3.3871328727963666080e0)  # fmt: skip
_CENTRAL_BOTTOM = (5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4,
                   2.1213794301586595867e4, 5.3941960214247511077e3, 6.8718700749205790830e2,
                   4.2313330701600911252e1, 1.0)  # fmt: skip
_TAIL_TOP = (7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1,
             1.27045825245236838258e0, 3.64784832476320460504e0, 5.76949722146069140550e0,
             4.63033784615654529590e0, 1.42343711074968357734e0)  # fmt: skip
_TAIL_BOTTOM = (1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2,
                1.48103976427480074590e-1, 6.89767334985100004550e-1, 1.67638483018380384940e0,
                2.05319162663775882187e0, 1.0)  # fmt: skip


def _normal(u: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Φ⁻¹(u) for u in [2⁻³³, 1 - 2⁻³³]; there, one of AS 241's two tail branches is enough."""
    q = u - 0.5
    r = 0.180625 - q * q
    z = q * _polynomial(_CENTRAL_TOP, r) / _polynomial(_CENTRAL_BOTTOM, r)
    tail = np.flatnonzero(np.abs(q) > 0.425)
    in_tail = u[tail]
    r = np.sqrt(-_log(np.minimum(in_tail, 1.0 - in_tail))) - 1.6
    magnitude = _polynomial(_TAIL_TOP, r) / _polynomial(_TAIL_BOTTOM, r)
    z[tail] = np.where(in_tail < 0.5, -magnitude, magnitude)
    return z


def _polynomial(coefficients: tuple[float, ...], x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Horner's rule, in place: each operation is rounded on its own, so none can be fused."""
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value *= x
        value += coefficient
    return value


def _log(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Natural logarithm by its atanh series, from exact and correctly rounded operations only."""
    mantissa, exponent = np.frexp(x)
    low = mantissa < 0.70710678118654752
    mantissa = np.where(low, mantissa * 2.0, mantissa)
    exponent = exponent - low
    s = (mantissa - 1.0) / (mantissa + 1.0)
    series = _polynomial(tuple(2.0 / k for k in range(21, 0, -2)), s * s)
    return exponent * 0.6931471805599453094 + s * series
