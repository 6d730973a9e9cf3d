"""A client's answer: what it reports, what it leaves behind, and its path as the server sees it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from builders import (
    ARCHITECTURES,
    make_mask,
    make_text_examples,
    make_update,
    make_worker,
    tiny_model,
)

from meerkat.errors import DivergedError, ProtocolError
from meerkat.federation.client import Client
from meerkat.federation.messages import CALIBRATION, RoundPlan
from meerkat.federation.virtual_path import virtual_path
from meerkat.zo.log import Update
from meerkat.zo.noise import NoiseKey, draw

SEED = 11
"""That of `builders.make_recipe`."""
PLAN = RoundPlan(round=0, steps=3, learning_rate=0.01, first_step=0, log_start=0)
RULES = ("sgd", "momentum", "adam")


class MadeUpLosses:
    """An objective without a model: losses of the batches it is asked about, one after the other.

    Args:
        values: The loss of each example; the last one for all that are asked about after it.
    """

    def __init__(self, *values: float):
        self.values = list(values)
        self.batches: list[list[Any]] = []

    def losses(self, examples: list[Any]) -> np.ndarray:
        self.batches.append(examples)
        value = self.values.pop(0) if len(self.values) > 1 else self.values[0]
        return np.full(len(examples), value)


# The virtual path


@pytest.mark.parametrize(
    ("noise", "optimizer"),
    [
        ({}, {}),
        ({"kind": "rademacher"}, {}),
        ({"directions": "per-client"}, {}),
        ({"perturbations": 3}, {}),
        ({"kind": "rademacher", "directions": "per-client", "perturbations": 3}, {}),
        ({}, {"rule": "momentum"}),
        ({}, {"rule": "adam"}),
        ({"directions": "per-client", "perturbations": 3}, {"rule": "adam"}),
        ({"perturbations": 3}, {"rule": "momentum", "estimator": "one-sided"}),
        ({"perturbations": 3}, {"estimator": "one-sided-mean"}),
        ({"keys": {"kind": "pool", "size": 2}, "perturbations": 3}, {"rule": "momentum"}),
        ({"keys": {"kind": "pool", "size": 2}, "directions": "per-client"}, {}),
    ],
    ids=str,
)
def test_virtual_path_is_the_clients_own(noise: dict[str, Any], optimizer: dict[str, Any]) -> None:
    worker = make_worker(tiny_model("llama"), 300, noise=noise, optimizer=optimizer)
    # From a state whose slots are not zero any more.
    worker.catch_up(0, [make_update(0.01, 0.3, step=step) for step in range(3)])
    start = worker.state
    plan = RoundPlan(round=4, steps=5, learning_rate=0.03, first_step=2, log_start=3)
    examples = make_text_examples(9)
    paths = []
    for number in (0, 6):
        client = Client(number, examples, 4, SEED)
        own = [step.state for step in client.local_steps(plan, worker)]
        report, _ = client.answer(plan, worker)
        rebuilt = list(virtual_path(start, plan.learning_rate, report, worker.algorithm))
        assert len(own) == len(rebuilt) == 5
        for theirs, ours in zip(own, rebuilt, strict=True):
            assert theirs.to_bytes() == ours.to_bytes()
            assert theirs.digest == ours.digest
        assert not np.array_equal(own[0].theta, start.theta)
        paths.append(own[-1].theta)
    assert not np.array_equal(*paths)
    assert worker.state is start


@pytest.mark.parametrize("rule", RULES)
def test_a_calibration_starts_from_the_initial_state(rule: str) -> None:
    worker = make_worker(tiny_model("llama"), optimizer={"rule": rule})
    client = Client(0, make_text_examples(5), 2, SEED)
    plan = RoundPlan(CALIBRATION, 3, 0.01, 0, 0)
    before, _ = client.answer(plan, worker)
    worker.catch_up(0, [make_update(0.5, 0.25)])
    after, _ = client.answer(plan, worker)
    assert after == before
    assert worker.initial.digest.startswith(after.state_digest.hex())
    assert worker.state.digest != worker.initial.digest
    np.testing.assert_array_equal(worker.space.read(), worker.state.theta)


# What ends a run


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(bad: float) -> None:
    worker = make_worker(tiny_model("llama"))
    theta = worker.state.theta.copy()
    theta[7] = bad
    worker.synchronise(worker.algorithm.init(theta), 0)
    with pytest.raises(DivergedError, match=r"loss is not finite.*lower optimizer\.learning_rate"):
        Client(0, make_text_examples(4), 2, 0).answer(PLAN, worker)


def test_a_scalar_beyond_float32_ends_the_run() -> None:
    worker = make_worker(tiny_model("llama"), optimizer={"epsilon": 1e-45})
    # ε = 1e-45 moves nothing, so the losses are made to differ.
    worker.objective = MadeUpLosses(2.0, 1.0)
    with pytest.raises(DivergedError, match=r"projected gradient .* out of range"):
        Client(0, make_text_examples(4), 2, 0).answer(PLAN, worker)


# The answer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_answer_leaves_the_weights_at_theta(architecture: str, dtype: torch.dtype) -> None:
    loaded = tiny_model(architecture, dtype)
    before = {n: p.clone() for n, p in loaded.model.named_parameters()}
    worker = make_worker(loaded)
    mask = make_mask(tiny_model(architecture, dtype), 100)
    plan = RoundPlan(1, 3, 0.01, 0, 0, (make_update(0.5, 0.25),))
    report, loss = Client(3, make_text_examples(6), 4, 0).answer(plan, worker)

    # θ holds the log and nothing of the local path; the weights are its cast, the rest untouched.
    z, theta = draw(NoiseKey(SEED, 0, 0), 100), worker.state.theta
    named = dict(loaded.model.named_parameters())
    places = list(zip(mask.names, mask.indices, strict=True))
    original = torch.cat([before[name].flatten()[indices] for name, indices in places]).float()
    np.testing.assert_array_equal(theta, original.numpy() - np.float32(0.5 * 0.25) * z)
    begin = 0
    with torch.no_grad():
        for name, indices in places:
            part = torch.from_numpy(theta[begin : begin + len(indices)].copy()).to(dtype)
            assert torch.equal(named[name].flatten()[indices], part)
            named[name].view(-1)[indices] = before[name].flatten()[indices]
            begin += len(indices)
    assert all(torch.equal(named[name], tensor) for name, tensor in before.items())
    assert math.isfinite(loss)
    assert (report.client, report.round, report.steps, report.examples) == (3, 1, 3, 6)
    assert len(report.scalars) == 3
    assert worker.state.digest.startswith(report.state_digest.hex())


def test_an_answer_depends_on_nothing_but_plan_and_data() -> None:
    worker = make_worker(tiny_model("llama"))
    clients = [Client(number, make_text_examples(5 + number), 2, 0) for number in range(3)]
    first = [client.answer(PLAN, worker) for client in clients]
    again = [client.answer(PLAN, worker) for client in reversed(clients)]
    assert again[::-1] == first
    alone = clients[2].answer(PLAN, make_worker(tiny_model("llama")))
    assert alone == first[2]
    assert len({report.scalars for report, _ in first}) == 3


def test_what_is_reported_is_what_is_applied() -> None:
    worker = make_worker(tiny_model("llama"), noise={"perturbations": 2})
    steps = list(Client(0, make_text_examples(5), 2, 0).local_steps(PLAN, worker))
    theta = worker.state.theta.copy()
    for number, step in enumerate(steps):
        assert len(step.scalars) == 2
        for q, scalar in enumerate(step.scalars):
            assert np.float32(scalar) == scalar
            z = draw(NoiseKey(SEED, 0, number, q), 100)
            theta -= np.float32(PLAN.learning_rate * (scalar / 2)) * z
        np.testing.assert_array_equal(step.state.theta, theta)


@pytest.mark.parametrize(
    ("estimator", "perturbations", "passes"),
    [("two-point", 1, 2), ("two-point", 3, 6), ("one-sided", 3, 4), ("one-sided-mean", 3, 3)],
)
def test_a_client_makes_the_passes_of_its_estimator(
    estimator: str, perturbations: int, passes: int
) -> None:
    worker = make_worker(
        tiny_model("llama"),
        noise={"perturbations": perturbations},
        optimizer={"estimator": estimator},
    )
    worker.objective = losses = MadeUpLosses(1.0)
    report, loss = Client(0, make_text_examples(5), 2, 0).answer(PLAN, worker)
    assert len(losses.batches) == PLAN.steps * passes
    assert report.scalars == (0.0,) * (PLAN.steps * perturbations)
    assert loss == 1.0


# Where a client stands: in its data, and in the log


def test_the_batch_order_moves_on() -> None:
    client = Client(0, make_text_examples(7), 3, 0)
    seen = [client.batch(step) for step in range(7)]
    for step in range(7):
        assert client.batch(step) == seen[step]
    flat = [id(example) for batch in seen for example in batch]
    assert all(flat.count(id(example)) == 3 for example in client.examples)
    worker = make_worker(tiny_model("llama"))
    three, _ = client.answer(PLAN, worker)
    assert three.steps == 3
    # A round that goes on at step 2 sees the same batch with another direction.
    worker.objective = losses = MadeUpLosses(1.0, 2.0)
    client.answer(RoundPlan(1, 1, 0.01, 2, 0), worker)
    assert losses.batches == [seen[2], seen[2]]


@pytest.mark.parametrize("rule", RULES)
def test_a_worker_applies_each_update_once(rule: str) -> None:
    updates = [make_update(0.01, 0.5 + round, round) for round in range(4)]
    worker, fresh, given = (
        make_worker(tiny_model("llama"), optimizer={"rule": rule}) for _ in range(3)
    )
    worker.catch_up(0, updates[:2])
    worker.catch_up(1, updates[1:2])
    worker.catch_up(1, updates[1:])
    fresh.catch_up(0, updates)
    given.synchronise(given.algorithm.apply(given.initial, updates[:3]), 3)
    given.catch_up(2, updates[2:])
    assert worker.position == fresh.position == given.position == 4
    assert worker.state.digest == fresh.state.digest == given.state.digest
    nothing: list[Update] = []
    with pytest.raises(ProtocolError, match=r"from update 5 on, this worker has 4; .*sent"):
        worker.catch_up(5, nothing)
    assert worker.state.digest == fresh.state.digest
