"""Losses → slopes: exactly on a quadratic, against autograd on models, and at what price."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers
from builders import (
    ANSWERS,
    ARCHITECTURES,
    algorithm_of,
    make_mask,
    make_text_examples,
    make_worker,
    tiny_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from meerkat.data.encoding import Encoded
from meerkat.errors import DivergedError, RecipeError
from meerkat.federation.client import Worker
from meerkat.spaces.mask_file import Mask
from meerkat.zo.estimators import ESTIMATORS, Estimate, Estimator, LossesAt
from meerkat.zo.estimators.base import mean_loss
from meerkat.zo.estimators.one_sided import OneSided, OneSidedMean
from meerkat.zo.estimators.two_point import TwoPoint
from meerkat.zo.noise import NoiseKey, draw

DIFFERENCES = ("one-sided", "one-sided-mean", "two-point")
"""Estimators from losses alone."""

# On a quadratic, where the slope is known

SIZE = 6
EPSILON = 2.0**-6
"""With small integers for the rest, every loss below is exact in float64."""
THETA = np.array([1, -2, 3, 0, 2, -1], np.float64)
CURVATURE = np.array([2, 1, 4, 3, 1, 2], np.float64)
GRADIENT = CURVATURE * THETA
DIRECTIONS = [
    np.array(row, np.float32)
    for row in (
        [1, -1, 1, 1, -1, 1],
        [-1, -1, 1, -1, 1, 1],
        [2, 0, -1, 1, 0, 3],
        [0, 0, 1, 0, 0, 0],
    )
]


class Quadratic:
    """½ Σ h θ² of each example, plus what is the example's own, which adds up to nothing."""

    def __init__(self, constant: float = 0.0):
        self.calls: list[np.ndarray | None] = []
        self.constant = constant

    def __call__(self, offset: np.ndarray | None) -> np.ndarray:
        self.calls.append(offset)
        theta = THETA if offset is None else THETA + offset
        return float(CURVATURE @ theta**2) / 2 + self.constant + np.array([-1.0, 0.0, 0.5, 0.5])


def bend(z: np.ndarray) -> float:
    """½ zᵀ H z, by which a one-sided difference is off for each ε."""
    return float(CURVATURE @ z.astype(np.float64) ** 2) / 2


def slope(z: np.ndarray) -> float:
    return float(GRADIENT @ z)


def test_two_point_has_no_bias_on_a_quadratic() -> None:
    found = TwoPoint().estimate(Quadratic(), DIRECTIONS, EPSILON)
    assert found.coefficients == tuple(map(slope, DIRECTIONS))
    # The losses around θ lie above the loss at θ by ε² times the bend.
    at_theta = float(Quadratic()(None).mean())
    above = np.mean([EPSILON**2 * bend(z) for z in DIRECTIONS])
    assert found.loss == pytest.approx(at_theta + above, rel=1e-15)


def test_one_sided_is_off_by_epsilon_times_the_bend() -> None:
    found = OneSided().estimate(Quadratic(), DIRECTIONS, EPSILON)
    assert found.coefficients == tuple(slope(z) + EPSILON * bend(z) for z in DIRECTIONS)
    assert found.loss == float(Quadratic()(None).mean())


@pytest.mark.parametrize("count", [2, 3, 4])
def test_one_sided_mean_leaves_one_out(count: int) -> None:
    drawn = DIRECTIONS[:count]
    losses = [float(Quadratic()(EPSILON * z).mean()) for z in drawn]
    found = OneSidedMean().estimate(Quadratic(), drawn, EPSILON)
    for i, coefficient in enumerate(found.coefficients):
        others = [loss for j, loss in enumerate(losses) if j != i]
        expected = (losses[i] - math.fsum(others) / (count - 1)) / EPSILON
        assert coefficient == pytest.approx(expected, rel=1e-12)
        # That is the one-sided estimate less the mean of the others'.
        one_sided = [slope(z) + EPSILON * bend(z) for z in drawn]
        left = [value for j, value in enumerate(one_sided) if j != i]
        assert coefficient == pytest.approx(one_sided[i] - np.mean(left), rel=1e-9)
    assert math.fsum(found.coefficients) == pytest.approx(0, abs=1e-9)
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-15)


@pytest.mark.parametrize("name", DIFFERENCES)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_it_makes_as_many_passes_as_it_says(name: str, count: int) -> None:
    estimator, losses_at = ESTIMATORS[name](), Quadratic()
    assert isinstance(estimator, Estimator)
    found = estimator.estimate(losses_at, DIRECTIONS[:count], EPSILON)
    assert len(losses_at.calls) == estimator.forward_passes(count)
    assert len(found.coefficients) == count
    assert sum(offset is None for offset in losses_at.calls) == (name == "one-sided")
    for offset in losses_at.calls:
        assert offset is None or offset.dtype == np.float32


@pytest.mark.parametrize(("name", "passes"), [("two-point", 2), ("one-sided", 2)])
def test_one_direction_is_enough_for_both_differences(name: str, passes: int) -> None:
    estimator, losses_at = ESTIMATORS[name](), Quadratic()
    estimator.estimate(losses_at, DIRECTIONS[:1], EPSILON)
    assert len(losses_at.calls) == estimator.forward_passes(1) == passes


@pytest.mark.parametrize("name", DIFFERENCES)
@settings(max_examples=40, deadline=None)
@given(constant=st.integers(-(2**20), 2**20))
def test_the_size_of_the_loss_does_not_matter(name: str, constant: int) -> None:
    """All are differences of losses: without a baseline, g would be about L / ε."""
    estimator = ESTIMATORS[name]()
    found = estimator.estimate(Quadratic(), DIRECTIONS[:3], EPSILON)
    raised = estimator.estimate(Quadratic(float(constant)), DIRECTIONS[:3], EPSILON)
    assert raised.coefficients == pytest.approx(found.coefficients, rel=1e-9, abs=1e-9)
    assert raised.loss == pytest.approx(found.loss + constant)
    without = (found.loss + constant) / EPSILON
    if abs(constant) > 1000:
        assert max(map(abs, found.coefficients)) < abs(without) / 10


@pytest.mark.parametrize("name", ["one-sided", "one-sided-mean"])
def test_centring_makes_the_mean_over_directions_the_gradient(name: str) -> None:
    """With L far from 0, the mean of g z is the gradient for both; that of (L / ε) z is not."""
    count, groups = 4, 4000
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (groups, count, SIZE)).astype(np.float32)
    total, bare = np.zeros(SIZE), np.zeros(SIZE)
    for group in signs:
        losses_at = Quadratic(1000.0)
        found = ESTIMATORS[name]().estimate(losses_at, list(group), EPSILON)
        total += np.mean([g * z for g, z in zip(found.coefficients, group, strict=True)], axis=0)
        bare += np.mean([losses_at(EPSILON * z).mean() / EPSILON * z for z in group], axis=0)
    error = np.linalg.norm(total / groups - GRADIENT) / np.linalg.norm(GRADIENT)
    assert error < 0.05
    assert np.linalg.norm(bare / groups - GRADIENT) / np.linalg.norm(GRADIENT) > 1


@pytest.mark.parametrize("name", DIFFERENCES)
def test_z_and_theta_are_left_alone(name: str) -> None:
    drawn = [z.copy() for z in DIRECTIONS]
    for z in drawn:
        z.setflags(write=False)
    found = ESTIMATORS[name]().estimate(Quadratic(), drawn, EPSILON)
    assert found == ESTIMATORS[name]().estimate(Quadratic(), DIRECTIONS, EPSILON)


# The mean loss


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.randoms())
def test_the_mean_loss_does_not_depend_on_the_order(values: list[float], order: object) -> None:
    mean = mean_loss(np.array(values), "θ")
    shuffled = list(values)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    assert mean_loss(np.array(shuffled), "θ") == mean == math.fsum(values) / len(values)


@pytest.mark.parametrize("name", DIFFERENCES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_names_the_way_out(name: str, bad: float) -> None:
    estimator = ESTIMATORS[name]()

    for number in range(estimator.forward_passes(2)):
        inner = Quadratic()

        def losses_at(
            offset: np.ndarray | None, number: int = number, inner: Quadratic = inner
        ) -> np.ndarray:
            losses = inner(offset)
            if len(inner.calls) == number + 1:
                losses[2] = bad
            return losses

        with pytest.raises(DivergedError) as caught:
            estimator.estimate(losses_at, DIRECTIONS[:2], EPSILON)
        line = str(caught.value)
        assert "\n" not in line
        assert re.search(r"loss is not finite at θ( [+-] ε z)?; lower optimizer\.learning", line)
        assert "optimizer.epsilon" in line
        assert "model.dtype = 'float32'" in line


def test_losses_whose_mean_overflows_are_diverged_too() -> None:
    with pytest.raises(DivergedError, match="not finite at θ"), np.errstate(over="ignore"):
        mean_loss(np.full(3, 1.7e308), "θ")


# Where a recipe asks for what does not fit


def test_one_sided_mean_needs_a_second_direction() -> None:
    with pytest.raises(RecipeError, match=r"\A[^\n]*noise\.perturbations[^\n]*\Z") as caught:
        algorithm_of(10, optimizer={"estimator": "one-sided-mean"})
    line = str(caught.value)
    assert "optimizer.estimator = 'one-sided-mean' needs at least 2 directions" in line
    assert "raise it" in line
    chosen = algorithm_of(10, optimizer={"estimator": "one-sided-mean"}, noise={"perturbations": 2})
    assert chosen.estimator == OneSidedMean()


def test_the_estimator_of_a_recipe() -> None:
    assert algorithm_of(10).estimator == TwoPoint()
    assert algorithm_of(10, optimizer={"estimator": "one-sided"}).estimator == OneSided()
    with pytest.raises(RecipeError, match=r"optimizer\.estimator = 'central' is not known"):
        algorithm_of(10, optimizer={"estimator": "central"})


# On models, against autograd


def losses_near(worker: Worker, batch: list[Encoded]) -> LossesAt:
    theta = worker.state.theta

    def losses_at(offset: np.ndarray | None) -> np.ndarray:
        worker.space.write(theta if offset is None else theta + offset)
        return worker.objective.losses(batch)

    return losses_at


def masked_gradient(
    model: transformers.PreTrainedModel, mask: Mask, batch: list[Encoded]
) -> np.ndarray:
    """∇f at the masked coordinates, by autograd through a plain forward pass."""
    model.set_attn_implementation("eager")
    parameters = dict(model.named_parameters())
    loss = torch.zeros(())
    rows = [answer[0] for answer in ANSWERS]
    tensors = [parameters[name].requires_grad_(True) for name in mask.names]
    for example in batch:
        logits = model(input_ids=torch.tensor([example.prompt])).logits[0, -1]
        loss = loss - logits[rows].log_softmax(0)[example.label] / len(batch)
    gradients = torch.autograd.grad(loss, tensors)
    parts = [g.flatten()[i] for g, i in zip(gradients, mask.indices, strict=True)]
    return torch.cat(parts).double().numpy()


def errors_by_epsilon(
    architecture: str, estimate: Callable[[LossesAt, list[np.ndarray], float], Estimate]
) -> dict[float, float]:
    """Relative error of the slopes along four directions."""
    batch = make_text_examples(5)
    worker = make_worker(tiny_model(architecture), 150)
    mask = make_mask(tiny_model(architecture), 150)
    gradient = masked_gradient(tiny_model(architecture).model, mask, batch)
    drawn = [draw(NoiseKey(0, 0, step), 150) for step in range(4)]
    exact = np.array([gradient @ z for z in drawn])
    errors = {}
    for epsilon in (0.1, 1e-2, 1e-3):
        found = estimate(losses_near(worker, batch), drawn, epsilon).coefficients
        errors[epsilon] = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
    return errors


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_point_converges_to_the_directional_derivative(architecture: str) -> None:
    errors = errors_by_epsilon(architecture, TwoPoint().estimate)
    # The error of a central difference falls with ε², until rounding takes over.
    assert errors[1e-2] < 0.5 * errors[0.1]
    assert errors[1e-3] < 0.02
    assert errors[1e-3] < errors[1e-2]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_one_sided_converges_to_the_directional_derivative(architecture: str) -> None:
    errors = errors_by_epsilon(architecture, OneSided().estimate)
    # That of a one-sided difference falls with ε.
    assert errors[1e-2] < 0.5 * errors[0.1]
    assert errors[1e-3] < 0.1
    assert errors[1e-3] < 0.5 * errors[1e-2]


def test_the_mean_over_directions_is_the_gradient() -> None:
    batch = make_text_examples(4)
    worker = make_worker(tiny_model("llama"), 8)
    mask = make_mask(tiny_model("llama"), 8)
    gradient = masked_gradient(tiny_model("llama").model, mask, batch)
    count = 200
    drawn = [draw(NoiseKey(5, 0, step), 8) for step in range(count)]
    found = TwoPoint().estimate(losses_near(worker, batch), drawn, 1e-3)
    mean = np.mean([g * z for g, z in zip(found.coefficients, drawn, strict=True)], axis=0)
    # E[g z] = ∇f, with variance (n + 1) |∇f|² / count over all coordinates.
    error = np.linalg.norm(mean - gradient) / np.linalg.norm(gradient)
    assert error < 3 * math.sqrt(9 / count)
    cosine = mean @ gradient / (np.linalg.norm(mean) * np.linalg.norm(gradient))
    assert cosine > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_losses_are_taken_around_theta(dtype: torch.dtype) -> None:
    batch = make_text_examples(4)
    worker = make_worker(tiny_model("qwen2", dtype))
    z = draw(NoiseKey(0, 0, 0), 100)
    epsilon, theta = 0.01, worker.state.theta
    found = TwoPoint().estimate(losses_near(worker, batch), [z], epsilon)
    losses = []
    for sign in (1, -1):
        worker.space.write(theta + np.float32(sign * epsilon) * z)
        losses.append(math.fsum(worker.objective.losses(batch).tolist()) / len(batch))
    assert found.loss == sum(losses) / 2
    assert found.coefficients == ((losses[0] - losses[1]) / (2 * epsilon),)
