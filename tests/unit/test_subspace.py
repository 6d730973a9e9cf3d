"""The aligned subspace: exact sums, whitening, gradients of answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meerkat.spaces.subspace import combined
from meerkat.spaces.whitening import whitened


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 300), st.integers(0, 2**32))
def test_sums_are_ordered(k: int, n: int, seed: int) -> None:
    """Value by value as written down, whatever vector unit or library computes it."""
    draw = np.random.default_rng(seed)
    start, w = draw.normal(size=n).astype(np.float32), draw.normal(size=k).astype(np.float32)
    basis = draw.normal(size=(k, n)).astype(np.float32)
    found = combined(start, basis, w)
    for place in {0, n // 2, n - 1}:
        value = start[place]
        for weight, row in zip(w, basis, strict=True):
            value = np.float32(value + np.float32(row[place] * weight))
        assert found[place] == value


def test_whitening_makes_all_curvatures_one() -> None:
    draw = np.random.default_rng(0)
    scores = (draw.normal(size=(60, 60)) * np.geomspace(30, 0.1, 60)) @ draw.normal(size=(60, 500))
    scores = scores.astype(np.float32)
    basis = whitened(scores, 20)
    assert basis.rows.shape == (20, 500)
    moved = basis.rows.astype(np.float64) @ scores.T
    assert np.allclose(moved @ moved.T / 60, np.eye(20), atol=1e-3)
    assert (np.diff(basis.curvature) <= 0).all()


def test_damping_and_power() -> None:
    draw = np.random.default_rng(1)
    scores = (draw.normal(size=(12, 40)) * np.geomspace(9, 1, 40)).astype(np.float32)
    plain, damped, part = (whitened(scores, 5, *a) for a in ((0.0, 0.0), (0.5, 0.5), (0.0, 0.25)))
    norms = [np.linalg.norm(found.rows, axis=1) for found in (plain, damped, part)]
    top = plain.curvature[:5]
    assert np.allclose(norms[0], 1, atol=1e-5)
    assert np.allclose(norms[1], (top + 0.5 * top[0]) ** -0.5, rtol=1e-5)
    assert np.allclose(norms[2], top**-0.25, rtol=1e-5)


def test_more_dimensions_than_scores() -> None:
    with pytest.raises(ValueError, match="span 3 directions, fewer than 4"):
        whitened(np.random.default_rng(2).normal(size=(3, 9)).astype(np.float32), 4)


def test_directions_are_kept_in_bfloat16() -> None:
    import torch

    from meerkat.spaces.linear import subspace_of

    rows = np.random.default_rng(3).normal(size=(4, 1000)).astype(np.float32)
    found = subspace_of("aligned", rows, np.ones(4), {"prompt": "{text}"})
    assert found.dimensions == 4
    unit = torch.from_numpy((rows / np.linalg.norm(rows, axis=1)[:, None]).astype(np.float32))
    lengths = torch.from_numpy(found.scales)[:, None]
    assert np.array_equal(found.basis, (unit.bfloat16().float() * lengths).numpy())
    assert np.allclose(found.basis, rows, rtol=1e-2, atol=1e-4)
    assert found.digest == subspace_of("aligned", rows, np.ones(4), {"prompt": "{text}"}).digest
    assert found.digest != subspace_of("aligned", rows, np.ones(4), {"prompt": "{x}"}).digest


@pytest.mark.parametrize("scheme", ["difference", "sampled", "uniform", "mixed"])
def test_scores_are_gradients_at_the_masked_coordinates(scheme: str) -> None:
    import torch

    from meerkat.spaces.alignment import score_gradients
    from meerkat.spaces.mask_file import Mask

    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(2, 5), requires_grad=False)
    other = torch.nn.Parameter(torch.randn(3), requires_grad=False)
    indices = np.array([0, 3, 7])
    mask = Mask(("w",), ((2, 5),), (indices,), 10, "m", "random")
    texts = list(torch.randn(6, 5))
    found = score_gradients(
        lambda x: weight @ x + other[:2], {"w": weight, "o": other}, texts, mask, scheme, seed=4
    )
    assert found.shape == (6, 3)
    if scheme == "difference":
        full = np.stack([np.concatenate([-x.numpy(), x.numpy()]) for x in texts])
        assert np.allclose(found, full[:, indices])
    assert weight.grad is None
    assert not weight.requires_grad
    assert np.abs(found).sum(axis=1).min() > 0
    again = score_gradients(
        lambda x: weight @ x + other[:2], {"w": weight}, texts, mask, scheme, seed=4
    )
    assert np.array_equal(found, again)


def test_a_start_is_covered_by_the_digest_and_finite() -> None:
    from meerkat.spaces.linear import subspace_of

    rows = np.random.default_rng(4).normal(size=(2, 30)).astype(np.float32)
    good = subspace_of("aligned", rows, np.ones(2), {})
    good.check(30)
    assert replace(good, start=np.ones(2, np.float32)).digest != good.digest
    with pytest.raises(ValueError, match="starts where it is not finite"):
        replace(good, start=np.array([0.0, np.nan], np.float32)).check(30)
