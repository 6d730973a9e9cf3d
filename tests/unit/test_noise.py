"""The guarantees of `noise.py`: pinned values, independence of the machine, distribution."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import noise_keys

from meerkat.zo import noise
from meerkat.zo.directions import DirectionKey, PerturbationStream
from meerkat.zo.noise import BLOCK, SHARED, NoiseKey, draw, permutation, words

KEY = NoiseKey(seed=20250607, round=3, step=14, perturbation=1, client=59)
GOLDEN = {
    "gaussian": (
        [
            -0.9781093001365662,
            -0.7241241931915283,
            -1.3920756578445435,
            -0.1892624944448471,
            -0.9060559272766113,
        ],
        "670ab594a4d5c0dcb44b9ee42ea3225436522974a375dff8f8e1df102a23d40e",
    ),
    "tabulated": (
        [
            0.1715988665819168,
            -0.9781234264373779,
            1.0277721881866455,
            -0.7241488099098206,
            0.4081709086894989,
        ],
        "d384d4e2cad0032559cbdcb028dc47bcd82a7cce1896c5833a1328b2315ed135",
    ),
    "rademacher": (
        [-1.0, -1.0, -1.0, -1.0, 1.0],
        "52cfd3608a436577f3898cccaa647cfc1a0606ba26af256b2ff53e2d7739ea54",
    ),
}
FINGERPRINT = "c4471c551a0878ce6cae77a24e999f400e1e1f138ff433b1e258b77ba5e33059"

# Loads the module alone: it may import nothing of the package, and this stays quick.
PRINT_FINGERPRINT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("noise", sys.argv[1])
sys.modules["noise"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.fingerprint())
"""

kinds = st.sampled_from(["gaussian", "tabulated", "rademacher"])


def sha(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


@cache
def million(kind: str) -> np.ndarray:
    return draw(KEY, 1_000_000, kind)


def fingerprint_in_process(**environment: str) -> str:
    command = [sys.executable, "-c", PRINT_FINGERPRINT, noise.__file__]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


# The same values everywhere


@pytest.mark.parametrize("kind", GOLDEN)
def test_golden_values(kind: str) -> None:
    first, digest = GOLDEN[kind]
    z = draw(KEY, 20_000, kind)
    assert z.dtype == np.float32
    assert z[:5].tolist() == first
    assert sha(z) == digest


def test_golden_fingerprint() -> None:
    assert noise.fingerprint() == FINGERPRINT


def test_golden_permutation() -> None:
    assert permutation(7, (5, 2), 12).tolist() == [4, 0, 3, 7, 9, 6, 11, 2, 10, 5, 1, 8]


@pytest.mark.parametrize("threads", ["1", "2", "4"])
def test_same_for_any_thread_count(threads: str) -> None:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    assert fingerprint_in_process(**dict.fromkeys(names, threads)) == FINGERPRINT


def test_same_without_the_vector_instructions_of_this_processor() -> None:
    umath = np._core._multiarray_umath
    used = [f for f in umath.__cpu_dispatch__ if umath.__cpu_features__.get(f)]
    if not used:
        pytest.skip("numpy has no special instructions to use on this machine")
    assert fingerprint_in_process(NPY_DISABLE_CPU_FEATURES=" ".join(used)) == FINGERPRINT


def test_same_when_drawn_from_many_threads_at_once() -> None:
    jobs = [replace(KEY, step=step) for step in range(16)]
    alone = [sha(draw(job, 30_000)) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda job: sha(draw(job, 30_000)), jobs)) == alone


def test_raw_words_are_philox_of_the_paper() -> None:
    def philox(key: int, counter: list[int]) -> list[int]:
        """Philox4x64-10, Salmon et al. 2011, figure 2 and table 2."""
        low = 2**64 - 1
        k0, k1 = key & low, key >> 64
        c0, c1, c2, c3 = counter
        for _ in range(10):
            first, second = c0 * 0xD2E7470EE14C6C93, c2 * 0xCA5A826395121157
            c0, c1, c2, c3 = (
                second >> 64 ^ c1 ^ k0,
                second & low,
                first >> 64 ^ c3 ^ k1,
                first & low,
            )
            k0, k1 = k0 + 0x9E3779B97F4A7C15 & low, k1 + 0xBB67AE8584CAA73B & low
        return [c0, c1, c2, c3]

    # Known answer of Random123's own test vectors.
    assert philox(0, [0] * 4)[0] == 0x16554D9ECA36314C
    expected = [word for block in range(1, 6) for word in philox(9, [block, 3, 1 << 62, 7])]
    assert words(9, [3, 1 << 62, 7], 20).tolist() == expected
    assert words(9, [3, 1 << 62, 7], 9, start=6).tolist() == expected[6:15]


# Slices and streams


@settings(max_examples=40, deadline=None)
@given(noise_keys, kinds, st.integers(0, 3), st.integers(0, 3 * BLOCK))
def test_slices_equal_the_whole(key: NoiseKey, kind: str, block: int, count: int) -> None:
    whole = draw(key, block * BLOCK + count, kind)
    part = draw(key, count, kind, start=block * BLOCK)
    np.testing.assert_array_equal(whole[block * BLOCK :], part)


@settings(max_examples=60, deadline=None)
@given(
    noise_keys,
    kinds,
    st.sampled_from(["seed", "round", "step", "perturbation", "client"]),
    st.data(),
)
def test_any_coordinate_changes_the_stream(
    key: NoiseKey, kind: str, field: str, data: st.DataObject
) -> None:
    other = data.draw(noise_keys)
    assume(getattr(other, field) != getattr(key, field))
    n = 4096
    z, w = draw(key, n, kind), draw(replace(key, **{field: getattr(other, field)}), n, kind)
    assert not np.array_equal(z, w)
    # 6 standard deviations of the correlation of independent streams.
    assert abs(float(z @ w) / n) < 6 / math.sqrt(n)


def test_neighbouring_coordinates_share_no_word() -> None:
    neighbours = [
        NoiseKey(seed, round, step, perturbation, client)
        for seed in (0, 1)
        for round in (0, 1)
        for step in (0, 1)
        for perturbation in (0, 1)
        for client in (0, 1, SHARED)
    ]
    z = np.concatenate([draw(key, 512) for key in neighbours])
    # 24,576 draws of 32 bits repeat 0.07 times by chance; a shared counter would repeat 512.
    assert len(np.unique(z)) > len(z) - 100


def test_directions_are_shared_or_per_client() -> None:
    shared, own = PerturbationStream(1, 100), PerturbationStream(1, 100, shared=False)
    assert shared.owner(4) == SHARED
    assert own.owner(4) == 4
    np.testing.assert_array_equal(shared.z(DirectionKey(2, 3)), draw(NoiseKey(1, 2, 3), 100))
    key = DirectionKey(2, 3, 1, 4)
    np.testing.assert_array_equal(own.z(key), draw(NoiseKey(1, 2, 3, 1, 4), 100))


def test_keys_of_a_step_are_its_place() -> None:
    shared = PerturbationStream(1, 100, perturbations=2)
    own = PerturbationStream(1, 100, shared=False, perturbations=2)
    assert shared.keys(5, 6, 7) == tuple(DirectionKey(5, 6, q, SHARED) for q in (0, 1))
    assert own.keys(5, 6, 7) == tuple(DirectionKey(5, 6, q, 7) for q in (0, 1))


def test_a_direction_cannot_be_written_to() -> None:
    z = PerturbationStream(1, 100).z(DirectionKey(2, 3))
    with pytest.raises(ValueError, match="read-only"):
        z[0] = 1


def test_a_kept_direction_is_that_of_its_own_size_seed_and_kind() -> None:
    """Directions that were drawn are kept for all streams of a process together."""
    key = DirectionKey(7, 7)
    for seed, n, kind in ((1, 9, "gaussian"), (1, 12, "gaussian"), (2, 9, "gaussian")):
        for _ in range(2):
            z = PerturbationStream(seed, n, kind).z(key)
            np.testing.assert_array_equal(z, draw(NoiseKey(seed, 7, 7), n, kind))
    assert set(PerturbationStream(1, 9, "rademacher").z(key)) <= {-1.0, 1.0}


@pytest.mark.parametrize(
    "change",
    [
        {"seed": -1},
        {"seed": 2**128},
        {"round": -1},
        {"round": 2**63},
        {"round": 2**64},
        {"step": -1},
        {"step": 2**32},
        {"perturbation": -1},
        {"perturbation": 2**16},
        {"client": -1},
        {"client": 2**32},
    ],
    ids=str,
)
def test_coordinates_out_of_range_raise(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"range|key"):
        draw(replace(KEY, **change), 8)


@pytest.mark.parametrize("start", [1, BLOCK - 1, BLOCK + 2, -BLOCK])
def test_start_must_be_a_block(start: int) -> None:
    with pytest.raises(ValueError, match="start"):
        draw(KEY, 8, start=start)


def test_permutation_out_of_range_raises() -> None:
    with pytest.raises(ValueError, match="range"):
        permutation(1, (-1, 0), 4)


# The distribution


def cdf(z: float) -> float:
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


def test_gaussian_passes_kolmogorov_smirnov() -> None:
    z = np.sort(million("gaussian"))
    n = len(z)
    expected = np.array([cdf(value) for value in z.tolist()])
    steps = np.arange(n + 1) / n
    distance = max(np.max(steps[1:] - expected), np.max(expected - steps[:-1]))
    assert distance * math.sqrt(n) < 1.95  # exceeded by chance with probability 0.001


@pytest.mark.parametrize(
    ("power", "moment", "variance"), [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]
)
def test_gaussian_moments(power: int, moment: float, variance: float) -> None:
    z = million("gaussian").astype(np.float64)
    assert abs(np.mean(z**power) - moment) < 4 * math.sqrt(variance / len(z))


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 4.5])
@pytest.mark.parametrize("sign", [-1, 1])
def test_gaussian_tails(distance: float, sign: int) -> None:
    z = million("gaussian")
    expected = len(z) * (1 - cdf(distance))
    assert abs(np.sum(sign * z > distance) - expected) < 4 * math.sqrt(expected)


def test_gaussian_neighbours_are_independent() -> None:
    z = million("gaussian").astype(np.float64)
    for lag in (1, 2, 4, 8, BLOCK):
        assert abs(np.mean(z[:-lag] * z[lag:])) < 4.5 / math.sqrt(len(z))


def probes() -> np.ndarray:
    """Uniforms that `draw` can make: both extremes, the borders of branches, and a grid."""
    extremes = np.array([0, 1, 2, 3, 10, 2**32 - 2, 2**32 - 1], dtype=np.float64)
    borders = np.floor(np.array([0.075, 0.5, 0.925]) * 2**32)
    grid = np.floor(np.linspace(0, 2**32 - 1, 1000))
    tails = 2.0 ** np.linspace(0, 31, 500)
    counts = [extremes, borders - 1, borders, borders + 1, grid, tails, 2**32 - 1 - tails]
    return (np.floor(np.concatenate(counts)) + 0.5) * 2.0**-32


def test_inverse_agrees_with_the_standard_library() -> None:
    u = probes()
    expected = np.array([NormalDist().inv_cdf(value) for value in u])
    assert np.max(np.abs(noise._normal(u) - expected)) < 1e-7
    assert np.max(np.abs(noise._normal(u))) == pytest.approx(6.34, abs=0.01)


def test_inverse_inverts_the_distribution_function() -> None:
    # erfc, unlike inv_cdf above, shares no formula with AS 241.
    for u, z in zip(probes(), noise._normal(probes()), strict=True):
        tail, magnitude = (u, -z) if u < 0.5 else (1 - u, z)
        assert 0.5 * math.erfc(magnitude / math.sqrt(2)) == pytest.approx(tail, rel=1e-12)


def test_logarithm_is_accurate() -> None:
    x = np.concatenate([probes(), 2.0 ** -np.arange(1, 34)])
    expected = np.array([math.log(value) for value in x])
    np.testing.assert_allclose(noise._log(x), expected, rtol=1e-14, atol=1e-17)


def test_tabulated_values_are_gaussian() -> None:
    """Moments of the table itself, and every entry equally often."""
    table = noise.table().astype(np.float64)
    assert len(np.unique(table)) == 2**16
    assert table.sum() == 0
    assert np.mean(table**2) == pytest.approx(1, abs=1e-8)
    assert np.mean(table**4) == pytest.approx(3, abs=1e-3)
    exact = [NormalDist().inv_cdf((place + 0.5) * 2.0**-16) for place in range(2**16)]
    assert np.max(np.abs(table - exact)) < 2e-4  # but for the scale, which makes up for the tails
    counts = np.bincount(np.searchsorted(table, million("tabulated")) >> 6, minlength=1024)
    expected = 1_000_000 / 1024
    assert np.sum((counts - expected) ** 2) / expected < 1023 + 5 * math.sqrt(2 * 1023)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, BLOCK])
def test_tabulated_neighbours_are_independent(lag: int) -> None:
    z = million("tabulated").astype(np.float64)
    assert abs(np.mean(z[:-lag] * z[lag:])) < 4.5 / math.sqrt(len(z))
    assert abs(np.mean(z[:-lag] ** 2 * z[lag:] ** 2) - 1) < 4.5 * 2 * math.sqrt(2 / len(z))


def test_rademacher_is_balanced() -> None:
    z = million("rademacher")
    assert set(np.unique(z)) == {-1.0, 1.0}
    assert abs(z.sum(dtype=np.float64)) < 4 * math.sqrt(len(z))
    # No bit of the 64-bit words is biased.
    by_bit = z[: 15_625 * 64].reshape(-1, 64).sum(0, dtype=np.float64)
    assert np.max(np.abs(by_bit)) < 4.5 * math.sqrt(15_625)


# Permutations


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**63 - 1),
    st.tuples(st.integers(0, 2**40), st.integers(0, 2**32)),
    st.integers(0, 400),
)
def test_permutation_is_one(seed: int, coordinates: tuple[int, int], n: int) -> None:
    assert sorted(permutation(seed, coordinates, n).tolist()) == list(range(n))


def test_permutation_is_uniform() -> None:
    counts = np.zeros((6, 6))
    for number in range(3000):
        counts[np.arange(6), permutation(1, (number, 0), 6)] += 1
    assert np.max(np.abs(counts - 500)) < 5 * math.sqrt(500 * 5 / 6)


def test_permutation_depends_on_all_coordinates() -> None:
    made = {
        tuple(permutation(seed, (a, b), 20).tolist())
        for seed in (0, 1)
        for a in (0, 1, 256)
        for b in (0, 1)
    }
    assert len(made) == 12
