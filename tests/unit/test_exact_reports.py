"""Exact reports: gradients and slopes on models, axes as directions, weights, encodings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from builders import (
    ARCHITECTURES,
    algorithm_of,
    make_mask,
    make_recipe,
    make_report,
    make_server_state,
    make_text_examples,
    plans_of,
    tiny_model,
)

from meerkat.errors import DivergedError, ProtocolError, RecipeError
from meerkat.federation.aggregation import by_precision, clipped, largest, usual_size
from meerkat.federation.client import Client, Worker
from meerkat.federation.gradip import GradIPScorer, magnitudes
from meerkat.federation.messages import ClientReport, RoundPlan
from meerkat.federation.rounds import close_round, plan_round
from meerkat.federation.schedule import Schedule
from meerkat.federation.state import ServerState
from meerkat.federation.transforms.base import Place
from meerkat.federation.transforms.clip import Clip
from meerkat.federation.virtual_path import virtual_path
from meerkat.journal import codec
from meerkat.models.loading import LoadedModel
from meerkat.models.objective import TextObjective
from meerkat.node.config import NodeConfig
from meerkat.spaces.linear import LinearSpace
from meerkat.spaces.masked import MaskedSpace
from meerkat.spaces.subspace import pulled
from meerkat.transport import messages
from meerkat.transport.client_frames import Hello, decode_up
from meerkat.transport.frame import encode
from meerkat.transport.handshake import Proof
from meerkat.zo.axes import AXES, along_axes, axis
from meerkat.zo.directions import DirectionKey
from meerkat.zo.estimators import ESTIMATORS
from meerkat.zo.estimators.backward import Backward
from meerkat.zo.estimators.forward_mode import ForwardMode
from meerkat.zo.log import Log, LogEntry, Update, apply_update
from meerkat.zo.noise import NoiseKey, draw
from meerkat.zo.state import ModelState
from meerkat.zo.update_rules import UPDATE_RULES

K = 5
SUBSPACE = {"dimensions": K, "kind": "random"}
TWO_POINT = {"estimator": "two-point"}
MIXED: dict[str, Any] = {
    "subspace": SUBSPACE,
    "optimizer": {"exact_clients": "able", **TWO_POINT},
}
EXACT: dict[str, Any] = {"subspace": SUBSPACE, "optimizer": {"estimator": "backward"}}


def make_subspace(loaded: LoadedModel, size: int = 120, k: int = K) -> LinearSpace:
    rows = np.stack([draw(NoiseKey(3, 0, j), size) for j in range(k)]) / np.float32(10)
    return LinearSpace(MaskedSpace(loaded.model, make_mask(loaded, size)), rows, "ab" * 32)


def make_linear_worker(loaded: LoadedModel, tokens: int = 10_000, **sections: Any) -> Worker:
    algorithm = algorithm_of(K, **(EXACT | sections))
    return Worker(make_subspace(loaded), TextObjective(loaded, tokens), algorithm)


# Gradients and slopes of models


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_gradient_is_that_of_central_differences(architecture: str) -> None:
    worker, batch = make_linear_worker(tiny_model(architecture)), make_text_examples(6)
    losses, gradient = worker.space.gradient(worker.objective.losses_with_graph(batch), 6)
    assert losses.shape == (6,)
    np.testing.assert_allclose(losses, worker.objective.losses(batch), rtol=1e-5)
    step, differences = 2.0**-9, np.empty(K)
    for j in range(K):
        move = np.zeros(K, np.float32)
        move[j] = step
        worker.space.write(move)
        above = worker.objective.losses(batch).mean()
        worker.space.write(-move)
        differences[j] = (above - worker.objective.losses(batch).mean()) / (2 * step)
    assert np.linalg.norm(gradient - differences) < 0.03 * np.linalg.norm(gradient)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_mode_gives_what_the_gradient_gives(architecture: str) -> None:
    loaded = tiny_model(architecture)
    batch, z = make_text_examples(6), draw(NoiseKey(1, 2, 3), 120)
    space = MaskedSpace(loaded.model, make_mask(loaded, 120))
    objective = TextObjective(loaded, 10_000)
    losses, gradient = space.gradient(objective.losses_with_graph(batch), 6)
    again, slopes = space.slopes(objective.losses_with_graph(batch), z)
    np.testing.assert_allclose(again, losses, rtol=1e-5)
    assert np.abs(gradient).max() > 0
    assert slopes.mean() == pytest.approx(float(gradient @ z.astype(np.float64)), rel=1e-3)
    linear, w = make_subspace(loaded), draw(NoiseKey(4, 5, 6), K)
    _, gradient = linear.gradient(objective.losses_with_graph(batch), 6)
    _, slopes = linear.slopes(objective.losses_with_graph(batch), w)
    assert slopes.mean() == pytest.approx(float(gradient @ w.astype(np.float64)), rel=1e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_forward_mode_moves_a_tied_parameter_in_all_its_places(tied: bool) -> None:
    """The embedding is the LM head, too, where they are tied."""
    loaded = tiny_model("qwen2" if tied else "llama")
    name = "model.embed_tokens.weight"
    parameter = dict(loaded.model.named_parameters())[name]
    mask = replace(
        make_mask(loaded, 120),
        names=(name,),
        shapes=(tuple(parameter.shape),),
        indices=(np.arange(0, parameter.numel(), 3),),
    )
    space, objective = MaskedSpace(loaded.model, mask), TextObjective(loaded, 10_000)
    batch, z = make_text_examples(4), draw(NoiseKey(1, 2, 3), mask.size)
    _, gradient = space.gradient(objective.losses_with_graph(batch), 4)
    _, slopes = space.slopes(objective.losses_with_graph(batch), z)
    assert slopes.mean() == pytest.approx(float(gradient @ z.astype(np.float64)), rel=1e-3)


def test_parts_of_a_batch_add_up_to_its_gradient() -> None:
    loaded, batch = tiny_model("llama"), make_text_examples(9)
    space = make_subspace(loaded)
    whole, parts = TextObjective(loaded, 10_000), TextObjective(loaded, 20)
    assert len(list(parts.losses_with_graph(batch))) > 2
    losses, gradient = space.gradient(whole.losses_with_graph(batch), 9)
    again, summed = space.gradient(parts.losses_with_graph(batch), 9)
    np.testing.assert_allclose(again, losses, rtol=1e-4)
    np.testing.assert_allclose(summed, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_steps_leave_the_model_as_it_was(dtype: torch.dtype) -> None:
    loaded = tiny_model("llama", dtype)
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    objects = dict(loaded.model.named_parameters())
    client = Client(0, make_text_examples(6), 3, 1)
    for sections in (EXACT, {"optimizer": {"estimator": "forward-mode"}}):
        worker = make_linear_worker(loaded, **sections)
        along = "axes" if sections is EXACT else "drawn"
        report, loss = client.answer(RoundPlan(0, 2, 0.1, 0, 0, along=along), worker)
        assert math.isfinite(loss)
        assert any(report.scalars)
        worker.space.restore()
        for name, parameter in loaded.model.named_parameters():
            assert parameter is objects[name]
            assert torch.equal(parameter, before[name])
            assert not parameter.requires_grad
            assert parameter.grad is None


@pytest.mark.parametrize("of_linear_layers", [True, False])
def test_which_parameters_get_a_gradient(of_linear_layers: bool) -> None:
    """None where all are weights of linear layers, else those of the mask; the sums are equal."""
    loaded, seen = tiny_model("llama"), set[str]()
    space, objective = make_subspace(loaded), TextObjective(loaded, 10_000)
    _, expected = space.gradient(objective.losses_with_graph(make_text_examples(3)), 3)
    inner = space._inner
    assert inner._of_linear_layers
    inner.__dict__["_of_linear_layers"] = of_linear_layers
    masked = set(make_mask(loaded, 120).names)

    def parts(batch: Sequence[Any]) -> Any:
        for losses in objective.losses_with_graph(batch):
            seen.update(n for n, p in loaded.model.named_parameters() if p.requires_grad)
            yield losses

    _, found = space.gradient(parts(make_text_examples(3)), 3)
    assert seen == (set() if of_linear_layers else masked)
    assert masked < set(dict(loaded.model.named_parameters()))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


def test_forward_mode_cleans_up_after_an_error() -> None:
    loaded = tiny_model("llama")
    objects = dict(loaded.model.named_parameters())
    space = make_subspace(loaded)

    def parts() -> Any:
        raise RuntimeError("no memory")
        yield

    with pytest.raises(RuntimeError, match="no memory"):
        space.slopes(parts(), np.ones(K, np.float32))
    assert all(p is objects[n] for n, p in loaded.model.named_parameters())
    with pytest.raises(RuntimeError, match="no memory"):
        space.gradient(parts(), 3)
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_a_gradient_that_is_not_finite_is_diverged() -> None:
    class Broken:
        def __call__(self, offset: Any) -> Any: ...

        def slope(self, direction: Any) -> Any:
            return np.ones(2), np.array([1.0, math.nan])

        def gradient(self) -> Any:
            return np.array([1.0, math.inf]), np.ones(3)

    for name in ("backward", "forward-mode"):
        with pytest.raises(DivergedError, match="not finite at θ"):
            ESTIMATORS[name]().estimate(Broken(), [np.ones(3, np.float32)], 0.1)
        with pytest.raises(TypeError, match="function have no gradient"):
            ESTIMATORS[name]().estimate(lambda offset: np.ones(2), [np.ones(3, np.float32)], 0.1)


def test_the_pull_is_the_sum_in_a_fixed_order() -> None:
    """Against exact sums; and pinned, so another order of additions is found."""
    for n in (1, 2, 3, 7, 64, 1001):
        basis = np.stack([draw(NoiseKey(3, 1, j), n) for j in range(4)])
        gradient = draw(NoiseKey(9, 9, 9), n).astype(np.float64) * 1e-3
        exact = [math.fsum((row.astype(np.float64) * gradient).tolist()) for row in basis]
        np.testing.assert_allclose(pulled(basis, gradient), exact, rtol=1e-11, atol=1e-15)
    big = np.array([[1.0, 2.0**53, 1.0, -(2.0**53), 1.0]], np.float32)
    # ((1 + 1) + (2^53 - 2^53)) + 1: halves are added elementwise, an odd last one is kept.
    assert pulled(big, np.ones(5)).tolist() == [3.0]


# Axes as directions


def test_an_axis_is_its_key() -> None:
    stream = algorithm_of(K, **EXACT).stream
    keys = stream.keys(7, 3, 2, "axes")
    assert keys == tuple(DirectionKey(0, 0, q, AXES) for q in range(K))
    assert stream.count("axes") == K
    assert stream.count("drawn") == 1
    for q, key in enumerate(keys):
        z = stream.z(key)
        assert z.dtype == np.float32
        assert z.tolist() == [float(np.float32(math.sqrt(K))) if i == q else 0.0 for i in range(K)]
    with pytest.raises(ValueError, match="axis 5 of 5 values"):
        stream.z(DirectionKey(0, 0, K, AXES))


@pytest.mark.parametrize("rule", sorted(UPDATE_RULES))
def test_an_update_along_axes_is_one_along_their_keys(rule: str) -> None:
    algorithm = algorithm_of(K, **EXACT)
    rule_ = UPDATE_RULES[rule]()
    stream, state = algorithm.stream, rule_.init(draw(NoiseKey(1, 1, 1), K))
    values = (0.5, -1.25, 3.0, 0.0, 1e-3)
    keyed = tuple(
        LogEntry(key, value)
        for key, value in zip(stream.keys(0, 0, 0, "axes"), values, strict=True)
    )
    compact = apply_update(state, Update(0.25, (), values), rule_, stream)
    spelt = apply_update(state, Update(0.25, keyed), rule_, stream)
    np.testing.assert_allclose(compact.theta, spelt.theta, rtol=1e-6)
    assert not np.array_equal(compact.theta, state.theta)
    both = apply_update(state, Update(0.25, keyed, values), rule_, stream)
    assert not np.array_equal(both.theta, compact.theta)
    with pytest.raises(ValueError, match="along 4 axes, the state has 5"):
        apply_update(state, Update(0.25, (), values[:4]), rule_, stream)


def test_a_step_of_gradient_descent_is_one() -> None:
    """The mean over axes of g z is the gradient: η is that of a step with the exact one."""

    class Linear:
        def __call__(self, offset: Any) -> Any: ...
        def slope(self, direction: Any) -> Any: ...

        def gradient(self) -> Any:
            return np.array([0.5]), gradient

    gradient = np.array([1.0, -2.0, 0.5, 0.0, 4.0])
    algorithm = algorithm_of(K, **EXACT)
    state = algorithm.init(np.zeros(K, np.float32))
    update, estimate = algorithm.local_step(Linear(), state, 0, 0, 0, 0.5, "axes")
    assert update.entries == ()
    assert estimate.loss == 0.5
    np.testing.assert_allclose(estimate.coefficients, gradient * math.sqrt(K), rtol=1e-6)
    after = algorithm.apply(state, [update])
    np.testing.assert_allclose(after.theta, -0.5 * gradient, rtol=1e-6)


def test_the_virtual_path_is_the_clients_own() -> None:
    worker = make_linear_worker(
        tiny_model("llama"), optimizer={"rule": "adam", **EXACT["optimizer"]}
    )
    client, plan = Client(1, make_text_examples(6), 3, 1), RoundPlan(0, 3, 0.1, 0, 0, along="axes")
    own = [step.state.digest for step in client.local_steps(plan, worker)]
    report, _ = client.answer(plan, worker)
    path = virtual_path(worker.initial, plan.learning_rate, report, worker.algorithm)
    assert [state.digest for state in path] == own
    assert len(set(own)) == 3
    assert (report.perturbations, len(report.scalars), report.along) == (K, 3 * K, "axes")


# The server


def exact_report(
    state: ModelState, client: int, scalars: list[float], round: int = 0, k: int = K
) -> ClientReport:
    return replace(make_report(state, client, scalars, round, k), along="axes")


def test_weights_say_what_a_report_brings() -> None:
    state = make_server_state(algorithm_of(K, **MIXED), 3).model
    drawn = [make_report(state, k, [1.0]) for k in range(2)]
    exact = exact_report(state, 2, [1.0] * K)
    shares = np.array([0.25, 0.25, 0.5])
    r = 1 / (1 + K + 1)
    found = by_precision(shares, [*drawn, exact], K, "gaussian")
    np.testing.assert_allclose(found, np.array([r, r, 2]) / (2 * r + 2), rtol=1e-15)
    r = 1 / (1 + K - 1)
    found = by_precision(shares, [*drawn, exact], K, "rademacher")
    np.testing.assert_allclose(found, np.array([r, r, 2]) / (2 * r + 2), rtol=1e-15)
    found = by_precision(shares, [*drawn, exact], K, "orthogonal")
    np.testing.assert_allclose(found, np.array([1, 1, 2 * K]) / (2 + 2 * K), rtol=1e-15)
    many = [replace(drawn[0], perturbations=K + 1, scalars=(1.0,) * (K + 1)), exact]
    assert by_precision(np.array([0.5, 0.5]), many, K, "orthogonal").tolist() == [0.5, 0.5]
    for same in (drawn, [exact]):
        own = shares[: len(same)]
        assert by_precision(own, same, K, "gaussian") is own


@pytest.mark.parametrize("q", [1, 4])
@pytest.mark.parametrize("kind", ["gaussian", "tabulated", "rademacher", "orthogonal"])
def test_the_precision_of_a_drawn_estimate_is_what_is_seen(kind: str, q: int) -> None:
    """r = |∇|² / E|ĝ|², by drawing."""
    k = 8  # blocks of eight hold whole steps of four
    subspace = {"dimensions": k, "kind": "random"}
    stream = algorithm_of(k, subspace=subspace, noise={"kind": kind, "perturbations": q}).stream
    gradient, squares = draw(NoiseKey(8, 8, 8), k).astype(np.float64), []
    for round in range(2000):
        drawn = [stream.z(key).astype(np.float64) for key in stream.keys(round, 0, 0)]
        squares.append(np.sum(np.mean([(gradient @ z) * z for z in drawn], axis=0) ** 2))
    state = make_server_state(algorithm_of(k), 1).model
    reports = [
        make_report(state, 0, [1.0] * q, perturbations=q),
        exact_report(state, 1, [1.0] * k, k=k),
    ]
    drawn_share, exact_share = by_precision(np.array([0.5, 0.5]), reports, k, stream.kind)
    seen = gradient @ gradient / np.mean(squares)
    assert drawn_share / exact_share == pytest.approx(seen, rel=0.1)


@pytest.mark.parametrize("kind", ["gaussian", "orthogonal"])
@pytest.mark.parametrize(
    ("directions", "aggregator"),
    [("shared", "mean"), ("shared", "median"), ("per-client", "mean")],
)
def test_a_mixed_round_against_its_definition(directions: str, aggregator: str, kind: str) -> None:
    sections = MIXED | {
        "noise": {"directions": directions, "perturbations": 2, "kind": kind},
        "federation": {"aggregator": aggregator, "clip_factor": 0.0},
    }
    algorithm = algorithm_of(K, **sections)
    state = make_server_state(algorithm, 4).model
    reports = [
        exact_report(state, 3, [3.0, 1.0, -1.0, 0.5, 2.0]),
        make_report(state, 0, [1.0, 2.0, -1.0, 0.5], perturbations=2),  # two steps
        exact_report(state, 1, [1.0, 1.0, 1.0, 1.0, 1.0] * 2),
        make_report(state, 2, [0.5, -2.0], perturbations=2),
    ]
    updates = algorithm.aggregate(reports, 0.5)
    assert updates == algorithm.aggregate(reports[::-1], 0.5)
    weight = {"drawn": 2 / (2 + K + 1) if kind == "gaussian" else 2 / K, "axes": 1.0}
    total = sum(weight[r.along] for r in reports)
    for step, update in enumerate(updates):
        expected = np.zeros(K)
        for along in ("drawn", "axes"):
            group = sorted((r for r in reports if r.along == along), key=lambda r: r.client)
            for q in range(group[0].perturbations):
                found = []
                for r in group:
                    g = r.scalars[step * r.perturbations + q] if step < r.steps else 0.0
                    z = algorithm.stream.z(algorithm.stream.keys(0, step, r.client, along)[q])
                    found.append(g * z.astype(np.float64) / r.perturbations)
                middle = np.median if aggregator == "median" else np.mean
                expected += middle(found, axis=0) * len(group) * weight[along] / total
        got = sum(e.coefficient * algorithm.stream.z(e.key).astype(float) for e in update.entries)
        np.testing.assert_allclose(got + along_axes(update.axes), expected, rtol=1e-5, atol=1e-6)
        assert len(update.axes) == K


def test_equal_reports_are_aggregated_as_ever() -> None:
    """A run that could be mixed and is not gives the bits of one that could not."""
    plain, could = algorithm_of(K), algorithm_of(K, **MIXED)
    state = make_server_state(plain, 3).model
    reports = [make_report(state, k, [1.0 / (k + 1), 0.3]) for k in range(3)]
    assert plain.aggregate(reports, 0.1) == could.aggregate(reports, 0.1)


def test_clipping_keeps_the_direction_of_an_exact_gradient() -> None:
    state = make_server_state(algorithm_of(K, **EXACT), 1).model
    long, short = [4.0, 0.0, 0.0, 0.0, -2.0], [0.5, 0.0, 0.25, 0.0, 0.0]
    report = exact_report(state, 0, [*long, *short])
    assert largest(report) == pytest.approx(math.sqrt(20 / K))
    assert usual_size([report]) == largest(report)
    assert magnitudes([report])[0, 0] == pytest.approx(largest(report))
    assert clipped(report, 2.0) is report  # one number of it is larger, its size is not
    found = clipped(report, 1.0)
    assert found.scalars[K:] == tuple(short)
    np.testing.assert_allclose(found.scalars[:K], np.array(long) / 2, rtol=1e-12)
    clip, place = Clip(1.0), Place(0, 0, 0, 0, "axes")
    np.testing.assert_allclose(clip(np.array(long), place), np.array(long) / 2, rtol=1e-12)
    assert clip(np.array(short), place).tolist() == short
    assert clip(np.array([4.0, 0.5]), Place(0, 0, 0, 0)).tolist() == [1.0, 0.5]


def served(sections: dict[str, Any], clients: int = 3) -> tuple[Schedule, Any, ServerState]:
    federation = {"clients": clients, **sections.get("federation", {})}
    sections = sections | {"federation": federation}
    algorithm = algorithm_of(K, **sections)
    schedule = Schedule.of(make_recipe(**sections))
    return schedule, algorithm, make_server_state(algorithm, clients, 1)


def test_plans_say_who_reports_what() -> None:
    def kinds(sections: dict[str, Any], able: Any = None) -> list[str]:
        schedule, _, state = served(sections)
        plans = plan_round(schedule, state, Log(), None, schedule.exact_clients(able))
        return [plans[client].along for client in range(3)]

    some = {"subspace": SUBSPACE, "optimizer": {"exact_clients": [1]}}
    assert kinds({}) == ["drawn"] * 3
    assert kinds(EXACT) == ["axes"] * 3
    assert kinds(EXACT, lambda: [1]) == ["axes"] * 3
    assert kinds(some) == ["drawn", "axes", "drawn"]
    assert kinds(MIXED) == ["axes"] * 3
    assert kinds(MIXED, lambda: [0, 2]) == ["axes", "drawn", "axes"]
    must = [list(served(s)[0].must_be_exact) for s in ({}, EXACT, some, MIXED)]
    assert must == [[], [0, 1, 2], [1], []]


def test_a_report_of_the_other_kind_is_refused() -> None:
    schedule, algorithm, state = served(MIXED)
    exact = exact_report(state.model, 0, [1.0] * K)
    drawn = make_report(state.model, 0, [1.0])
    asked = plans_of([drawn])
    with pytest.raises(ProtocolError, match="client 0: it is along axes, asked was drawn"):
        close_round(schedule, state, algorithm, asked, [exact], Log())
    asked = {0: replace(asked[0], along="axes")}
    with pytest.raises(ProtocolError, match="client 0: it is along drawn, asked was axes"):
        close_round(schedule, state, algorithm, asked, [drawn], Log())
    short = exact_report(state.model, 0, [1.0] * 4, k=4)
    with pytest.raises(ProtocolError, match="1 steps of 4 perturbations, asked were 1 of 5"):
        close_round(schedule, state, algorithm, asked, [short], Log())
    after, record = close_round(schedule, state, algorithm, asked, [exact], Log())
    assert record.updates[0].axes == pytest.approx([1.0 / K] * K)
    assert after.model.digest != state.model.digest


def test_gradip_of_an_exact_report_is_the_product() -> None:
    algorithm = algorithm_of(K, **MIXED)
    state = make_server_state(algorithm, 3).model
    p = draw(NoiseKey(6, 6, 6), K)
    gradients = np.array([[1.0, -2.0, 0.5, 3.0, 0.0], [0.5, 0.5, -1.0, 0.0, 2.0]])
    scalars = (gradients * math.sqrt(K)).reshape(-1).tolist()
    reports = [make_report(state, 0, [0.7, -0.2]), exact_report(state, 2, scalars)]
    scorer = GradIPScorer(p, algorithm.stream)
    found = scorer.trajectories(reports)
    assert found.clients.tolist() == [0, 2]
    length = np.linalg.norm(gradients, axis=1)
    products = gradients @ p.astype(np.float64)
    np.testing.assert_allclose(found.gradip[1], products, rtol=1e-5)
    np.testing.assert_allclose(found.norm[1], length, rtol=1e-5)
    cosine = products / (length * np.linalg.norm(p.astype(np.float64)))
    np.testing.assert_allclose(found.cosine[1], cosine, rtol=1e-5)
    alone = GradIPScorer(p, algorithm.stream).trajectories(reports[:1])
    for field in ("gradip", "norm", "cosine"):
        np.testing.assert_array_equal(getattr(found, field)[:1], getattr(alone, field))


# Encodings


def test_bytes_of_an_exact_report_and_of_its_update() -> None:
    state = make_server_state(algorithm_of(K, **EXACT), 1).model
    report = exact_report(state, 5, [0.5] * 32, round=3, k=32)
    data = messages.encode_report(report)
    assert len(data) == 24 + 4 * 32 < 200
    assert messages.decode_report(data) == report
    assert codec.decode_report(codec.encode_report(report)) == report
    update = Update(0.5, (), tuple(float(q) for q in range(32)))
    assert len(messages.encode_updates([update])) == 24 + 8 * 31
    assert len(codec.encode_updates([update])) == 8 + 4 + 8 * 32


def test_updates_and_plans_with_axes_survive_both_encodings() -> None:
    entry = LogEntry(DirectionKey(7, 3, 1), -1e-300)
    own = LogEntry(DirectionKey(0, 0, 3, AXES), 2.0)  # a key may be that of an axis
    updates = (
        Update(0.5, (entry,)),
        Update(0.5, (), (1.0, -0.0, 1e300)),
        Update(0.25, (entry, own), (2.0,)),
        Update(0.25, (own,)),
        Update(0.125, (), (3.0, 4.0)),
    )
    for code in (messages, codec):
        data = code.encode_updates(updates)
        assert repr(code.decode_updates(data)) == repr(updates)  # tells -0.0 from 0.0
    plan = RoundPlan(7, 10, 0.5, 70, 6, updates, "axes")
    data = messages.encode_plan(plan)
    assert messages.decode_plan(data) == plan
    assert len(data) == 24 + 24 * 7 + 8 * 3
    log = Log(base=2)
    log.append(updates)
    assert log.since(2) == updates == tuple(log)
    assert [log.axes_since(2 + i) for i in range(6)] == [6, 6, 3, 2, 2, 0]
    assert [log.entries_since(2 + i) for i in range(6)] == [4, 3, 3, 1, 0, 0]


def test_damage_to_axes_is_refused() -> None:
    data = messages.encode_updates([Update(0.5, (), (1.0, 2.0, 3.0))])
    for length in range(1, len(data)):
        with pytest.raises(ProtocolError):
            messages.decode_updates(data[:length])
    for place, byte in ((4, 1), (6, 1), (8, 0), (0, 2), (0, 4), (0, 0), (7, 2), (30, 0xFF)):
        changed = bytearray(data)
        changed[place] = byte
        if place == 30:
            changed[31] = 0x7F  # not finite
            changed[30] = 0xF0
        with pytest.raises(ProtocolError):
            messages.decode_updates(bytes(changed))
    data = codec.encode_updates([Update(0.5, (), (1.0, 2.0, 3.0))])
    for length in range(1, len(data)):
        with pytest.raises(ValueError, match="updates of"):
            codec.decode_updates(data[:length])


@pytest.mark.parametrize("gradients", [True, False])
def test_a_hello_says_whether_it_can(gradients: bool) -> None:
    hello = Hello(1, 2, 3, 4, Proof("ab" * 32, "cd" * 32, "ef" * 32), gradients)
    data = encode(hello)
    assert decode_up(data) == hello
    place = data.index(bytes.fromhex("ef" * 32)) + 64
    assert data[place] == gradients
    with pytest.raises(ProtocolError, match="is 2, not 0 or 1"):
        decode_up(data[:place] + b"\x02" + data[place + 1 :])


# What a recipe and a node may say


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"optimizer": {"estimator": "backward"}}, r"estimator = 'backward' needs a subspace"),
        ({"optimizer": {"exact_clients": "able"}}, r"exact_clients = 'able' needs a subspace"),
        ({"optimizer": {"exact_clients": [0]}}, r"exact_clients = \(0,\) needs a subspace"),
        ({**MIXED, "optimizer": {"exact_clients": [3]}}, "exact_clients: 3 is no client"),
        (
            {**MIXED, "optimizer": {"exact_clients": "able", "estimator": "backward"}},
            "exact_clients = 'able' goes with another estimator",
        ),
        ({**EXACT, "subspace": {"dimensions": 4097}}, "subspace.dimensions = 4097 numbers"),
        ({**MIXED, "optimizer": {"exact_clients": "all"}}, "optimizer.exact_clients = 'all'"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=rf"\A[^\n]*{said}[^\n]*\Z"):
        make_recipe(**sections)


def test_estimators_of_a_recipe() -> None:
    assert algorithm_of(K, **EXACT).estimator == Backward()
    assert algorithm_of(K, optimizer={"estimator": "forward-mode"}).estimator == ForwardMode()
    federation = {"aggregator": "median"}
    noise = {"directions": "per-client"}
    algorithm_of(K, **EXACT, federation=federation, noise=noise)  # axes are shared
    with pytest.raises(RecipeError, match="all clients share"):
        algorithm_of(K, federation=federation, noise=noise)


def test_the_fingerprint_of_a_run_without_them_is_as_it_was() -> None:
    plain = make_recipe(subspace=SUBSPACE, optimizer=TWO_POINT)
    named = make_recipe(subspace=SUBSPACE, optimizer={"exact_clients": [], **TWO_POINT})
    assert plain.fingerprint == named.fingerprint
    assert (
        len({plain.fingerprint, make_recipe(**MIXED).fingerprint, make_recipe(**EXACT).fingerprint})
        == 3
    )
    numbers = [
        make_recipe(**s).numbers_per_step for s in ({}, {"subspace": SUBSPACE}, MIXED, EXACT)
    ]
    assert numbers == [1, 7, K, K]


def test_the_rate_of_exact_gradients_is_that_of_many_directions() -> None:
    def rate(**sections: Any) -> float:
        return make_recipe(subspace=SUBSPACE, **sections).learning_rate

    many = rate(noise={"directions": "per-client", "perturbations": 255})
    assert rate() < many < rate(optimizer={"estimator": "backward"}) == 1.0
    # Who is able is not known beforehand: the rate is one that holds without anybody.
    assert rate(optimizer={"exact_clients": "able"}) == rate()
    assert rate(optimizer={"estimator": "backward", "learning_rate": 0.3}) == 0.3


def test_a_node_is_able_where_its_operator_says_so() -> None:
    node = {"partition-id": 0}
    assert not NodeConfig.of(node).gradients
    assert NodeConfig.of(node, trusted=True).gradients
    for value, able in ((True, True), ("true", True), ("false", False), (False, False)):
        assert NodeConfig.of(node | {"gradients": value}).gradients is able
        assert NodeConfig.of(node | {"gradients": value}, trusted=True).gradients is able
    for wrong in ("yes", 1, 0.0):
        with pytest.raises(RecipeError, match=r"gradients = .* is no bool"):
            NodeConfig.of(node | {"gradients": wrong})


def test_the_axes_are_those_of_the_definition() -> None:
    assert along_axes([1.0, 0.0, -2.0]).tolist() == (axis(3, 0) - 2 * axis(3, 2)).tolist()
