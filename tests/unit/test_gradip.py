"""GradIP from reports alone, against the definition."""

from __future__ import annotations

import numpy as np
import pytest
from builders import algorithm_of, make_report, make_server_state

from meerkat.federation.gradip import GradIPScorer, magnitudes
from meerkat.zo.directions import DirectionKey, PerturbationStream
from meerkat.zo.noise import SHARED, NoiseKey, draw

SEED = 11
"""That of `builders.make_recipe`."""


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("q", [1, 3, 9])
def test_gradip_equals_a_double_loop(shared: bool, q: int) -> None:
    n = 700
    directions = "shared" if shared else "per-client"
    algorithm = algorithm_of(n, noise={"directions": directions, "perturbations": q})
    state = make_server_state(algorithm, 9)
    generator = np.random.default_rng(1)
    gradient = generator.standard_normal(n).astype(np.float32)
    reports = [
        make_report(
            state.model, client, generator.standard_normal(steps * q).tolist(), perturbations=q
        )
        for client, steps in ((7, 4), (0, 1), (3, 4), (4, 2))
    ]
    found = GradIPScorer(gradient, algorithm.stream).trajectories(reports)
    estimate = np.zeros((4, 4, n))
    square = np.zeros((4, 4))
    for row, report in enumerate(reports):
        for step in range(report.steps):
            for i in range(q):
                owner = SHARED if shared else report.client
                z = draw(NoiseKey(SEED, 0, step, i, owner), n).astype(np.float64)
                estimate[row, step] += report.scalars[step * q + i] * z / q
                square[row, step] += report.scalars[step * q + i] ** 2 / q
    product, norm = estimate @ gradient.astype(np.float64), np.linalg.norm(estimate, axis=2)
    length = np.linalg.norm(gradient.astype(np.float64))
    cosine = np.divide(product, norm * length, out=np.zeros((4, 4)), where=norm > 0)
    assert found.clients.tolist() == [7, 0, 3, 4]
    assert found.steps.tolist() == [4, 1, 4, 2]
    np.testing.assert_allclose(found.gradip, product, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.norm, norm, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.cosine, cosine, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(magnitudes(reports), np.sqrt(square), rtol=1e-9)


def test_gradip_draws_each_shared_direction_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[int, int]] = []
    original = PerturbationStream.z

    def counted(self: PerturbationStream, key: DirectionKey) -> np.ndarray:
        drawn.append((key.round, key.step))
        return original(self, key)

    monkeypatch.setattr(PerturbationStream, "z", counted)
    algorithm = algorithm_of(50)
    state = make_server_state(algorithm, 40)
    scorer = GradIPScorer(np.ones(50, np.float32), algorithm.stream)
    reports = [make_report(state.model, client, [1.0, -2.0, 3.0]) for client in range(40)]
    whole = scorer.trajectories(reports)
    parts = [scorer.trajectories(reports[i : i + 7]) for i in range(0, 40, 7)]
    np.testing.assert_array_equal(np.concatenate([p.gradip for p in parts]), whole.gradip)
    assert drawn == [(0, 0), (0, 1), (0, 2)]


@pytest.mark.parametrize("shared", [True, False])
def test_a_stream_of_reports_is_scored_round_by_round(shared: bool) -> None:
    algorithm = algorithm_of(50, noise={"directions": "shared" if shared else "per-client"})
    state = make_server_state(algorithm, 3)
    rounds = [[make_report(state.model, k, [1.0 + k, -2.0], r) for k in range(3)] for r in range(4)]
    gradient = draw(NoiseKey(5, 0, 0), 50)
    flat = [report for reports in rounds for report in reports]
    found = list(GradIPScorer(gradient, algorithm.stream).stream(flat))
    assert [some.round for some in found] == [0, 1, 2, 3]
    for some, reports in zip(found, rounds, strict=True):
        alone = GradIPScorer(gradient, algorithm.stream).trajectories(reports)
        for field in ("clients", "steps", "gradip", "norm", "cosine"):
            np.testing.assert_array_equal(getattr(some, field), getattr(alone, field))


def test_a_scalar_of_zero_or_no_gradient_has_no_direction() -> None:
    algorithm = algorithm_of(20)
    state = make_server_state(algorithm, 2)
    still = GradIPScorer(np.ones(20, np.float32), algorithm.stream)
    found = still.trajectories([make_report(state.model, 0, [0.0, 1.0])])
    assert found.cosine[0, 0] == found.norm[0, 0] == found.gradip[0, 0] == 0
    assert found.norm[0, 1] > 0
    flat = GradIPScorer(np.zeros(20, np.float32), algorithm.stream)
    assert not flat.trajectories([make_report(state.model, 0, [1.0])]).cosine.any()
