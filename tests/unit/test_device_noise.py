"""θ and z on a device: the bits of numpy, by torch's operations (here on the CPU)."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from builders import make_mask, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import noise_keys

from meerkat.spaces import device_noise
from meerkat.spaces.device_noise import draw_on, place_on, stream_on, words_on
from meerkat.spaces.linear import LinearSpace
from meerkat.spaces.masked import MaskedSpace
from meerkat.zo.arrays import copied, divided, on_host, square_root, zeros_like
from meerkat.zo.directions import DirectionKey, PerturbationStream
from meerkat.zo.estimators import ESTIMATORS
from meerkat.zo.log import LogEntry, Update, apply_log
from meerkat.zo.noise import BLOCK, NoiseKey, draw, words
from meerkat.zo.update_rules import UPDATE_RULES
from meerkat.zo.update_rules.adam import Adam
from meerkat.zo.update_rules.base import UpdateRule
from meerkat.zo.update_rules.hiso import HiSo
from meerkat.zo.update_rules.momentum import Momentum
from meerkat.zo.update_rules.sgd import SGD

CPU = torch.device("cpu")
SIZE = 300
coordinates = st.tuples(
    st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1)
)
floats = st.floats(-(2.0**100), 2.0**100, width=32)
kinds = pytest.mark.parametrize("kind", ["tabulated", "rademacher", "gaussian"])


def same(tensor: torch.Tensor, array: np.ndarray) -> bool:
    found = on_host(tensor)
    return found.dtype == array.dtype and found.tobytes() == array.tobytes()


@given(st.integers(0, 2**128 - 1), coordinates, st.integers(1, 40), st.integers(0, 2**61))
def test_words_are_those_of_numpy(
    seed: int, places: tuple[int, int, int], count: int, start: int
) -> None:
    found = words_on(CPU, seed, places, count, start)
    assert (found.numpy().view(np.uint64) == words(seed, list(places), count, start)).all()


@kinds
@given(key=noise_keys, n=st.integers(1, 700))
@settings(max_examples=30)
def test_values_are_those_of_numpy(kind: str, key: NoiseKey, n: int) -> None:
    assert same(draw_on(CPU, key, n, kind), draw(key, n, kind))


@kinds
def test_long_directions(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meerkat.spaces.device_noise._CHUNK", 3 * BLOCK)
    key, n = NoiseKey(7, 3, 2, 1, 5), 10 * BLOCK + 77
    assert same(draw_on(CPU, key, n, kind), draw(key, n, kind))


def test_a_coordinate_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="out of range"):
        draw_on(CPU, NoiseKey(1, 2, 2**32), 10, "tabulated")


@pytest.mark.parametrize("kind", ["tabulated", "rademacher", "gaussian", "orthogonal"])
@pytest.mark.parametrize("shared", [True, False])
def test_streams_agree(kind: str, shared: bool) -> None:
    stream = PerturbationStream(11, 40, kind, shared, 3, local_steps=2, clients=3)
    there = stream_on(CPU, stream)
    for place in range(4):
        for key in stream.keys(place // 2, place % 2, 1):
            for _ in range(2):  # drawn, then kept
                assert same(there.z(key), stream.z(key))
    assert there.keys(1, 1, 2) == stream.keys(1, 1, 2)


def test_an_axis_is_one_too() -> None:
    stream = PerturbationStream(11, 9)
    (*_, key) = stream.keys(0, 0, 0, "axes")
    assert same(stream_on(CPU, stream).z(key), stream.z(key))


RULES: list[UpdateRule] = [SGD(), Momentum(0.7), Adam(0.8, 0.95, 1e-6), HiSo(0.9, 1e-4)]


def test_every_rule_is_tried() -> None:
    assert {type(rule) for rule in RULES} == set(UPDATE_RULES.values())


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@given(
    coefficients=st.lists(st.floats(-(2.0**40), 2.0**40, width=32), min_size=1, max_size=6),
    rate=st.floats(2**-20, 8, width=32),
)
@settings(max_examples=40)
def test_updates_keep_their_bits(rule: UpdateRule, coefficients: list[float], rate: float) -> None:
    stream = PerturbationStream(5, SIZE, "tabulated")
    updates = [
        Update(rate, (LogEntry(DirectionKey(r, 0), c), LogEntry(DirectionKey(r, 1), -c / 3)))
        for r, c in enumerate(coefficients)
    ]
    start = rule.init(draw(NoiseKey(1, 0, 0), SIZE))
    there = start.placed(torch.tensor)
    expected = apply_log(start, updates, rule, stream)
    found = apply_log(there, updates, rule, stream_on(CPU, stream))
    assert isinstance(found.theta, torch.Tensor)
    assert np.isfinite(expected.theta).all()
    assert found.digest == expected.digest
    assert found.to_bytes() == expected.to_bytes()
    assert found.from_bytes(found.to_bytes()).digest == expected.digest
    assert there.digest == start.digest  # what was handed out is as it was


@given(st.lists(floats, min_size=1, max_size=20), st.floats(2**-10, 1024, width=32))
def test_operations_keep_their_bits(values: list[float], by: float) -> None:
    array = np.array(values, np.float32)
    tensor = torch.tensor(array)
    assert same(divided(tensor, by), divided(array, by))
    assert same(square_root(abs(tensor)), square_root(abs(array)))
    assert same(zeros_like(tensor), zeros_like(array))
    assert same(copied(tensor), array)
    assert copied(tensor).data_ptr() != tensor.data_ptr()
    with np.errstate(over="ignore"):
        assert same(tensor * float(by) + tensor, array * float(by) + array)


@pytest.mark.parametrize("kind", ["two-point", "one-sided", "one-sided-mean"])
def test_perturbed_points_keep_their_bits(kind: str) -> None:
    stream = PerturbationStream(3, SIZE, "rademacher", perturbations=2)
    seen: dict[str, list[bytes]] = {}
    for name, drawn in (("numpy", stream), ("torch", stream_on(CPU, stream))):
        theta = draw(NoiseKey(1, 0, 0), SIZE)
        here = theta if name == "numpy" else torch.tensor(theta)

        def losses(offset: Any, here: Any = here, name: str = name) -> np.ndarray:
            place = here if offset is None else here + offset
            seen.setdefault(name, []).append(on_host(place).tobytes())
            return np.array([float(len(seen[name]))])

        zs = [drawn.z(key) for key in stream.keys(0, 0, 0)]
        ESTIMATORS[kind]().estimate(losses, zs, 1e-3)
    assert seen["numpy"] == seen["torch"]


def test_a_model_has_the_same_bits() -> None:
    loaded = tiny_model("llama")
    mask = make_mask(loaded, SIZE)
    space = MaskedSpace(loaded.model, mask)
    theta = space.read() + draw(NoiseKey(1, 0, 0), SIZE) * np.float32(0.01)
    bits = []
    for values in (theta, torch.tensor(theta)):
        space.write(values)
        bits.append([p.detach().clone() for p in loaded.model.parameters()])
        space.restore()
    assert all(torch.equal(a, b) for a, b in zip(*bits, strict=True))


def test_a_subspace_has_the_same_bits() -> None:
    loaded = tiny_model("llama")
    inner = MaskedSpace(loaded.model, make_mask(loaded, SIZE))
    basis = draw(NoiseKey(2, 0, 0), 8 * SIZE).reshape(8, SIZE)
    w, read = draw(NoiseKey(3, 0, 0), 8), []
    for device in (None, CPU):
        space = LinearSpace(inner, basis, "", device=device)
        space.write(w)
        read.append(inner.read())
        inner.restore()
    assert read[0].tobytes() == read[1].tobytes()


@pytest.mark.parametrize("size", [1, 2, SIZE])
def test_what_a_rule_counts_by_stays(size: int) -> None:
    """The powers of Adam, two float64, are no part of θ, even where θ has two values."""
    start = Adam().init(draw(NoiseKey(1, 0, 0), size))
    there = start.placed(torch.tensor).placed(partial(place_on, CPU))
    for name in ("first", "second"):
        assert isinstance(there.slots[name], torch.Tensor)
    assert isinstance(there.slots["powers"], np.ndarray)
    stream = PerturbationStream(5, size, "rademacher")
    updates = [Update(0.1, (LogEntry(DirectionKey(0, 0), 0.7),))]
    found = apply_log(there, updates, Adam(), stream_on(CPU, stream))
    assert found.digest == apply_log(start, updates, Adam(), stream).digest


def test_few_directions_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as a step has at least, else as many as there is room for."""
    drawn = []
    monkeypatch.setattr(
        device_noise, "draw_on", lambda *arguments: drawn.append(1) or draw_on(*arguments)
    )
    monkeypatch.setattr(device_noise, "_KEPT_BYTES", 5 * 4 * SIZE)
    for perturbations, kept in ((2, 5), (8, 8)):
        stream = stream_on(
            CPU, PerturbationStream(5, SIZE, "tabulated", perturbations=perturbations)
        )
        asked = [DirectionKey(0, step) for step in range(9)]
        drawn.clear()
        for key in [*asked, *asked[-kept:]]:
            stream.z(key)
        assert len(drawn) == 9
        stream.z(asked[0])
        assert len(drawn) == 10
